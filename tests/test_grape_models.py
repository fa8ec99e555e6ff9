"""The language model with attention: positions, streams, residuals, training runs."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from torch.nn import functional as F

from deltafuse.cli import main
from deltafuse.models import PRESETS, GatedDeltaLM, ModelConfig
from deltafuse.models.attention import attend
from deltafuse.models.config import POSITIONS
from deltafuse.optim import split_decay_groups
from deltafuse.testing import assert_close
from deltafuse.train import commands
from deltafuse.train.progress import Progress
from deltafuse.train.run_folder import read_rows
from deltafuse.train.sample import generate

SMALL = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_v_heads=4,
    head_dim=16,
    mlp_size=48,
    mixer="attention",
    position="rope",
)


def make(position, residual="plain", **changes):
    torch.manual_seed(0)
    channels = 4 if residual == "ddl" else 1
    options = {"position": position, "residual": residual, "value_channels": channels}
    return GatedDeltaLM(dataclasses.replace(SMALL, **options, **changes)).eval()


@pytest.fixture(params=POSITIONS)
def model(request):
    """Weights away from the start, where a phase does not depend on the tokens."""
    model = make(request.param)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".grape." in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def tokens_of(length, batch=2):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


def streamed(model, x, parts):
    cache = model.new_cache()
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in x.split(parts, 1)], 1)


@pytest.mark.parametrize("parts", [[40], [1] * 40, [17, 20, 1, 2]], ids=["whole", "tokens", "both"])
def test_check_12_prefill_and_decode_equal_the_full_forward(model, parts):
    x = tokens_of(40)
    assert_close("logits", streamed(model, x, parts), model(x).detach(), 2e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_ddl_residuals_go_with_attention(position):
    model, x = make(position, "ddl"), tokens_of(20)
    assert_close("logits", streamed(model, x, [13, 1, 6]), model(x).detach(), 2e-6)


def test_later_tokens_do_not_change_earlier_logits(model):
    x = tokens_of(30)
    changed = x.clone()
    changed[:, 25:] = 7
    with torch.no_grad():
        assert_close("logits", model(changed)[:, :25], model(x)[:, :25], 1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_order_of_earlier_tokens_counts(position):
    """One layer of attention without positions would not see it."""
    model, x = make(position, num_layers=1), tokens_of(12)
    swapped = torch.cat((x[:, :-1].flip(1), x[:, -1:]), 1)
    with torch.no_grad():
        one, two = model(x)[:, -1], model(swapped)[:, -1]
    assert (one - two).abs().max() > 1e-4 * one.abs().max()


def test_gradients_reach_every_parameter(model):
    model(tokens_of(20)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("T, S", [(1, 1), (1, 7), (3, 7), (7, 7)])
def test_attention_is_the_last_rows_of_causal_attention(T, S):
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, 3, 4, dtype=torch.float64) for n in (T, S))
    v = torch.randn(2, S, 3, 10, dtype=torch.float64)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    hide = torch.arange(S) > torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(hide, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    assert_close("o", attend(q, k, v), expected, 1e-12)


def test_rotations_keep_their_own_start():
    block = make("grape-m-ctx").blocks[1].mixer
    assert not block.grape.omega_proj.weight.any()
    assert abs(block.grape.omega(torch.randn(1, 1, 32)).item() - 0.3937) < 1e-4
    assert make("grape-mixture").blocks[0].mixer.grape.rank == 4


def test_planes_do_not_decay():
    model = make("grape-mixture")
    decayed, others = split_decay_groups(model, 0.1)
    rotations = {id(p) for name, p in model.named_parameters() if ".grape." in name}
    assert len(rotations) == 6 and rotations <= {id(p) for p in others["params"]}
    assert any(p.ndim == 2 for p in decayed["params"])


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model, x = make("grape-m-ctx", "ddl", num_layers=1), tokens_of(9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close("logits", compiled, model(x), 1e-5)


def test_16_bits_keep_the_rotations_parameters():
    model = make("grape-m-ctx").bfloat16()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".grape." in name else torch.bfloat16), name
    assert model(tokens_of(5)).dtype == torch.bfloat16


def test_temperature_zero_is_the_full_forwards_argmax(model):
    prompt = b"def f(x):\n"
    written = bytes(generate(model, prompt, 6, temperature=0))
    x = torch.tensor([list(b"\0" + prompt + written)])
    assert model(x)[0, -7:-1].argmax(-1).tolist() == list(written)


@pytest.mark.parametrize("position", POSITIONS)
def test_loss_falls(position):
    """A repeated text is learned within some steps; its bytes alone have 2.4 nats."""
    model = make(position).train()
    optimizer = torch.optim.AdamW(split_decay_groups(model, 0.01), lr=1e-2)
    text = torch.tensor(list(b"what the tokens between two say. " * 4)).view(2, -1)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 1.8


FLAGS = ["--steps", "8", "--batch", "2", "--context", "32", "--checkpoint-every", "2",
         "--device", "cpu", "--mixer", "attention"]  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text; the model and the sample take no time."""
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(SMALL, num_v_heads=2, num_layers=1))
    monkeypatch.setattr(commands, "SAMPLE_BYTES", 4)
    path = tmp_path / "text.txt"
    path.write_text("some text to learn\n" * 60)
    return path


def losses_of(out):
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("position", [None, "grape-m-ctx", "grape-mixture"])
def test_run_stops_continues_and_samples(text, tmp_path, monkeypatch, capsys, position):
    """Settings, checkpoint and sample; together with DDL for one of the positions."""
    flags = ["train", "--data", str(text), *FLAGS]
    flags += [] if position is None else ["--position", position]
    flags += ["--residual", "ddl"] if position == "grape-m-ctx" else []
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*flags, "--out", str(whole)]) == 0
    assert f"attention with {position or 'rope'}, " in capsys.readouterr().out
    config = json.loads((whole / "config.json").read_text())
    for part in ("model", "settings"):
        assert config[part]["mixer"] == "attention"
        assert config[part]["position"] == (position or "rope")
    losses = losses_of(whole)
    assert len(losses) == 8 and losses[-1] < losses[0]
    plain = Progress.update

    def interrupt(self, step, *values):
        plain(self, step, *values)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        assert main([*flags, "--out", str(run)]) == 0
    assert len(losses_of(run)) == 5
    assert main(["train", "--out", str(run), "--resume", "--device", "cpu"]) == 0
    assert losses_of(run) == losses
    capsys.readouterr()
    assert main(["generate", str(run), "--tokens", "8", "--prompt", "some", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("some")
