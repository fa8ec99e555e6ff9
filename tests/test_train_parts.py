"""Schedule, checkpoint file, metrics, progress, picture and sampling, each on its own."""

import io
import math
import resource

import pytest
import torch

from deltafuse.models import GatedDeltaLM, ModelConfig
from deltafuse.train import checkpoint
from deltafuse.train.errors import UserError
from deltafuse.train.files import write_atomically
from deltafuse.train.plot import draw_losses, moving_average
from deltafuse.train.progress import Progress, clock
from deltafuse.train.run_folder import MetricsLog, read_rows
from deltafuse.train.sample import as_text, choose, generate
from deltafuse.train.schedule import learning_rate

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=1, num_v_heads=1, head_dim=16, mlp_size=32
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GatedDeltaLM(SMALL)


@pytest.fixture
def saved(model, tmp_path):
    """(path, model, optimizer) of a checkpoint after two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randint(256, (1, 12))).square().mean().backward()
        optimizer.step()
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, model, optimizer, {"step": 2})
    return path, model, optimizer


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 1000, 50, 1.0) for step in range(1, 1001)]
    assert math.isclose(rates[0], 1 / 50) and math.isclose(rates[49], 1.0)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert math.isclose(rates[-1], 0.1)
    assert math.isclose(learning_rate(1, 1, 50, 1.0), 1.0)


def test_checkpoint_returns_model_optimizer_and_rng(saved):
    path, model, optimizer = saved
    expected = torch.rand(5)
    torch.manual_seed(99)
    other = GatedDeltaLM(SMALL)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3)
    loaded = checkpoint.load(path)
    checkpoint.restore_model(loaded, other, path)
    checkpoint.restore_optimizer(loaded, fresh)
    checkpoint.restore_rng(loaded)
    assert torch.equal(torch.rand(5), expected)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [o.state_dict()["state"] for o in (optimizer, fresh)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())


@pytest.mark.parametrize("position", [20, 0.3, 0.9])
def test_one_flipped_bit_is_noticed(saved, position):
    path = saved[0]
    data = bytearray(path.read_bytes())
    data[position if position > 1 else int(position * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint_is_noticed(saved, part):
    path = saved[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match="corrupt or truncated checkpoint"):
        checkpoint.load(path)


def test_other_safetensors_file_is_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_checkpoint_of_other_shapes_names_the_tensor(saved):
    path = saved[0]
    other = GatedDeltaLM(ModelConfig(**{**vars(SMALL), "mlp_size": 48}))
    with pytest.raises(UserError, match="another config: blocks.0.mlp.down_proj.weight"):
        checkpoint.restore_model(checkpoint.load(path), other, path)


def test_full_disk_keeps_the_old_file(saved):
    path, model, optimizer = saved
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*state.safetensors: File too large"):
            checkpoint.save(path, model, optimizer, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_write_is_complete_before_it_replaces(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and not (tmp_path / "x.tmp").exists()


def test_metrics_drop_what_the_checkpoint_has_not_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 1}\n{"step": 3}\n{"st')
    log = MetricsLog(path, last_step=2)
    log.append({"step": 3, "loss": 0.5})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 2, 3]


def test_progress_without_a_terminal_is_plain_lines():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.update(1, 2.5, 1000)
    progress.update(2, 2.4, 1000)  # too soon after the first
    progress.update(10, 2.0, 1000)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in stream.getvalue()
    assert lines[0].startswith("step 1/10  loss 2.500  1000 tokens/s")
    assert lines[1].endswith("0:00 left")


def test_progress_bar_on_a_terminal_fits_its_width(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    progress = Progress(4, stream=stream)
    progress.update(4, 2.5, 1000)
    progress.close()
    text = stream.getvalue()
    assert text.startswith("\r[") and max(map(len, text.splitlines())) < 60


def test_progress_survives_a_closed_stream():
    stream = io.StringIO()
    progress = Progress(4, stream=stream)
    stream.close()
    progress.update(1, 2.5, 1000)
    progress.close()


def test_clock():
    assert [clock(s) for s in (5, 75, 3700)] == ["0:05", "1:15", "1:01:40"]


def test_moving_average_has_no_pull_to_zero():
    assert moving_average([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_picture_is_a_png(tmp_path):
    rows = [{"step": s, "loss": 5 / s} for s in range(1, 20)]
    rows += [{"step": 10, "val_loss": 0.6, "bits_per_byte": 0.9}]
    draw_losses(tmp_path / "loss.png", rows, 3.3, "a run")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_temperature_zero_is_the_full_forwards_argmax(model):
    prompt = b"def f(x):\n" * 9  # longer than a chunk
    written = bytes(generate(model, prompt, 24, temperature=0))
    text = b"\0" + prompt
    for byte in written:
        with torch.no_grad():
            assert model(torch.tensor([list(text)]))[0, -1].argmax().item() == byte
        text += bytes([byte])


def test_seed_decides_the_sample(model):
    samples = [bytes(generate(model, b"x", 30, seed=seed)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_top_p_draws_from_the_most_likely_only():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 0.6, generator) for _ in range(200)} == {1, 2}
    assert {choose(logits, 1.0, 0.0, generator) for _ in range(50)} == {1}
    assert {choose(logits, 1.0, 1.0, generator) for _ in range(300)} == {0, 1, 2, 3}
    assert {choose(logits, 0.01, 1.0, generator) for _ in range(50)} == {1}


def test_text_waits_for_complete_characters():
    pieces = list(as_text("aé€".encode() + b"\xff" + b"z\xe2"))
    assert pieces == ["a", "é", "€", "\ufffd", "z", "\ufffd"]
