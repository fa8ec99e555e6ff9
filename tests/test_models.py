"""The language model: sizes, causality, and that decoding with a cache equals the full forward."""

import dataclasses
import json

import pytest
import torch

from deltafuse.models import PRESETS, GatedDeltaLM, ModelConfig
from deltafuse.testing import assert_close

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=1, num_v_heads=2, head_dim=16, mlp_size=48
)


RESIDUALS = {"plain": ("plain", 1), "ddl of 1": ("ddl", 1), "ddl of 4": ("ddl", 4)}


@pytest.fixture(params=RESIDUALS)
def model(request):
    residual, channels = RESIDUALS[request.param]
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, residual=residual, value_channels=channels)
    return GatedDeltaLM(config).eval()


def tokens_of(length, batch=2):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


def test_config_survives_json():
    config = dataclasses.replace(SMALL, norm_eps=1e-6)
    assert ModelConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["hidden_size"] == 32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number"),
        ({"num_layers": 2.5}, "num_layers must be a whole number"),
        ({"num_heads": 2, "num_v_heads": 3}, "num_v_heads .3. must be a multiple of num_heads .2."),
        ({"head_dim": 200}, "must be at most 256"),
        ({"norm_eps": 0.0}, "norm_eps must be > 0"),
        ({"residual": "hyper"}, "residual must be plain or ddl"),
        ({"value_channels": 4}, "value_channels must be 1 with residual plain"),
        ({"residual": "ddl", "value_channels": 17}, "at most 16 with ddl"),
        ({"mixer": "conv"}, "mixer must be gated_delta or attention"),
        ({"position": "rope"}, "position must be none with mixer gated_delta"),
        ({"mixer": "attention"}, "position must be rope or grape-m or"),
        ({"mixer": "attention", "position": "rope", "head_dim": 15}, "must be even for attention"),
    ],
)
def test_config_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_config_refuses_unknown_and_missing_names():
    values = dataclasses.asdict(SMALL)
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.from_dict({**values, "colour": 1})
    del values["mlp_size"]
    with pytest.raises(ValueError, match="mlp_size"):
        ModelConfig.from_dict(values)


def test_config_from_before_residuals_and_mixers_has_what_there_was():
    values = dataclasses.asdict(SMALL)
    for name in ("residual", "value_channels", "mixer", "position"):
        del values[name]
    assert ModelConfig.from_dict(values) == SMALL


def test_ddl_model_runs_on_fused_boundaries(monkeypatch):
    from deltafuse.ddl import sub_layers

    calls, plain = [], sub_layers.ddl_boundary
    monkeypatch.setattr(
        sub_layers, "ddl_boundary", lambda *a, **k: calls.append(1) or plain(*a, **k)
    )
    model = GatedDeltaLM(dataclasses.replace(SMALL, residual="ddl", value_channels=2))
    model(tokens_of(5))
    assert len(calls) == 2 * SMALL.num_layers


def test_ddl_model_starts_near_the_identity():
    model = GatedDeltaLM(dataclasses.replace(SMALL, residual="ddl", value_channels=4))
    x = model.embedding(tokens_of(5))
    for compress in (model.read_out, *(block.compress for block in model.blocks)):
        assert torch.equal(compress(model.expand(x)), x)
    for block in model.blocks:
        for ddl in (block.ddl_attn, block.ddl_mlp):
            assert not ddl.beta.weight.any()
            assert abs(2 * torch.sigmoid(ddl.beta.bias).item() - 0.05) < 1e-6


def test_ddl_compiles_as_one_graph():
    torch._dynamo.reset()
    config = dataclasses.replace(SMALL, num_layers=1, residual="ddl", value_channels=4)
    model = GatedDeltaLM(config)
    x = tokens_of(9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close("logits", compiled, model(x), 1e-5)


def test_presets_grow():
    sizes = []
    for name in ("tiny", "small", "medium"):
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in GatedDeltaLM(PRESETS[name]).parameters()))
    assert sizes == sorted(sizes)
    assert sizes[0] < 2e6


def test_head_shares_the_embedding(model):
    names = dict(model.named_parameters())
    assert sum(256 in p.shape for p in names.values()) == 1


def test_first_loss_is_that_of_uniform_bytes(model):
    x = tokens_of(64)
    loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - 5.545) < 0.1  # log 256


def test_later_tokens_do_not_change_earlier_logits(model):
    x = tokens_of(70)
    changed = x.clone()
    changed[:, 65:] = 7
    with torch.no_grad():
        assert_close("logits", model(changed)[:, :65], model(x)[:, :65], 1e-6)


# 1: no prefill to speak of; 63, 64, 65: around a chunk; 70 also leaves the recurrent form
@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 70])
def test_prefill_and_decode_equal_the_full_forward(model, prompt):
    x = tokens_of(prompt + 6)
    with torch.no_grad():
        full = model(x)
        cache = model.new_cache()
        parts = [model(x[:, :prompt], cache)]
        parts += [model(x[:, i : i + 1], cache) for i in range(prompt, prompt + 6)]
    assert_close("logits", torch.cat(parts, 1), full, 1e-5)


def test_gradients_reach_every_parameter(model):
    model(tokens_of(20)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
