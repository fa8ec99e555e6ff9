"""The modules of flash-linear-attention: convolutions and their caches, norm, whole layers."""

import warnings

import pytest
import torch

from deltafuse.gated_delta import causal_conv1d, gated_rms_norm
from deltafuse.integrations import fla
from deltafuse.testing import assert_close
from fla_package import imported
from gated_delta_cases import offsets
from layer_cases import normal


@pytest.mark.parametrize("activation", ["swish", None])
def test_convolution_states_have_all_taps(activation):
    """States are the last W inputs; a split at any token gives the whole."""
    x, weight, bias = normal(2, 9, 6), normal(6, 4), normal(6)
    options = {"bias": bias, "activation": activation}
    y, state = fla.causal_conv1d(x, weight, output_final_state=True, **options)
    expected = causal_conv1d(x, weight, bias, activation=activation and "silu")[0]
    assert_close("y", y, expected, 1e-6)
    assert torch.equal(state, x[:, -4:].mT)
    assert fla.causal_conv1d(x, weight, **options)[1] is None
    first, state = fla.causal_conv1d(x[:, :2], weight, output_final_state=True, **options)
    assert torch.equal(state, torch.cat((torch.zeros(2, 2, 6), x[:, :2]), 1).mT)
    rest, state = fla.causal_conv1d(
        x[:, 2:], weight, residual=x[:, 2:], initial_state=state, output_final_state=True, **options
    )
    assert_close("y", torch.cat((first, rest - x[:, 2:]), 1), y, 1e-6)
    assert torch.equal(state, x[:, -4:].mT)


def test_convolution_of_packed_sequences():
    x, weight = normal(1, 9, 6), normal(6, 4)
    options = {"output_final_state": True, "activation": "silu"}
    y, state = fla.causal_conv1d(x, weight, cu_seqlens=offsets((2, 7)), **options)
    for n, tokens in enumerate((slice(0, 2), slice(2, 9))):
        alone, last = fla.causal_conv1d(x[:, tokens], weight, **options)
        assert torch.equal(state[n : n + 1], last)
        assert torch.equal(y[:, tokens], alone)


def test_convolution_module():
    module = fla.ShortConvolution(6, 4, bias=True, dtype=torch.float64)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"weight": (6, 1, 4), "bias": (6,)}
    assert module.state_size == 24 and module.kernel_size == (4,)
    x = normal(2, 9, 6).double()
    y, none = module(x)
    assert none is None
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, :2] = 0
    assert torch.equal(module(x, mask=mask)[0], module(x * mask[..., None])[0])
    y, cache = module(x, cache=torch.zeros(2, 6, 4).double(), output_final_state=True)
    (y.sum() + cache.sum()).backward()
    assert module.weight.grad.abs().sum() > 0


def test_decoding_replaces_the_cache_in_place():
    module, x = fla.ShortConvolution(6, 4, bias=True, dtype=torch.float64), normal(2, 9, 6).double()
    with torch.no_grad():
        whole = module(x)[0]
        first, cache = module(x[:, :7], output_final_state=True)
        outputs, held = [first], cache
        for t in (7, 8):
            token, cache = module(x[:, t : t + 1], cache=cache, output_final_state=True)
            outputs.append(token)
        assert cache is held
        assert_close("y", torch.cat(outputs, 1), whole, 1e-14)
        assert torch.equal(cache, x[:, -4:].mT)
        packed, fresh = module.step(x[None, :, 0], None, None, True)
        assert_close("y", packed[0], whole[:, 0], 1e-14)
        assert torch.equal(fresh[..., 3], x[:, 0]) and fresh.shape == (2, 6, 4)


def test_convolution_errors():
    x = normal(1, 3, 6)
    with pytest.raises(ValueError, match="weight .* required"):
        fla.causal_conv1d(x)
    with pytest.raises(ValueError, match="weight .* required"):
        fla.causal_conv1d_update(x, torch.zeros(3, 6, 4))
    with pytest.raises(ValueError, match="cp_context excludes"):
        fla.causal_conv1d(x, normal(6, 4), output_final_state=True, cp_context=object())
    with pytest.raises(ValueError, match="exclude each other"):
        fla.ShortConvolution(6, 4)(x, mask=torch.ones(1, 3), cu_seqlens=offsets((3,)))
    with pytest.raises(ValueError, match="activation"):
        fla.ShortConvolution(6, 4, activation="relu")(x)


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_gated_norm_module(activation, dtype, limit):
    norm = fla.FusedRMSNormGated(12, eps=1e-3, activation=activation, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(12))
    x, g, residual = (normal(3, 5, 12, seed=seed).to(dtype) for seed in range(3))
    for added in (None, residual):
        wide = x.double() if added is None else x.double() + added.double()
        gate = g.double().sigmoid() * (1 if activation == "sigmoid" else g.double())
        expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        expected = expected * norm.weight.double() * gate
        y, total = norm(x, g, added, prenorm=True)
        assert y.dtype == total.dtype == dtype
        assert_close("y", y, expected, limit)
        assert_close("residual", total, wide, limit)
        assert torch.equal(norm(x, g, added), y)
    assert norm(x, g, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


def test_gated_norm_module_without_weight():
    norm = fla.FusedRMSNormGated(12, elementwise_affine=False)
    assert not norm.state_dict() and not [*norm.parameters()]
    x, g = normal(3, 12), normal(3, 12, seed=1)
    assert torch.equal(norm(x, g), gated_rms_norm(x, torch.ones(12), g))
    with pytest.raises(ValueError, match="activation must be"):
        fla.FusedRMSNormGated(12, activation="relu")


LAYERS = {
    "default": {},
    "no_gate": {"use_gate": False},
    "no_convolution": {"use_short_conv": False},
    "convolution_bias": {"conv_bias": True, "conv_size": 3},
    "more_value_heads": {"num_v_heads": 4, "expand_v": 1},
    "sigmoid_gate": {"output_gate_activation": "sigmoid"},
    "negative_eigenvalues": {"allow_neg_eigval": True},
}


class PlainRMSNorm(torch.nn.RMSNorm):
    """Stands in for the package's norm without a gate, a triton kernel."""

    def __init__(self, hidden_size, eps, dtype):
        super().__init__(hidden_size, eps=eps, dtype=dtype)


def their_layer(monkeypatch, **options):
    """The package's layer, whose code runs with our operators under its names."""
    module = imported("fla.layers.gated_deltanet")
    for name in (
        *("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "causal_conv1d"),
        *("ShortConvolution", "FusedRMSNormGated"),
    ):
        monkeypatch.setattr(module, name, getattr(fla, name))
    monkeypatch.setattr(module, "RMSNorm", PlainRMSNorm)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layer without convolutions
        return module.GatedDeltaNet(
            **{"hidden_size": 40, "head_dim": 12, "num_heads": 2, "layer_idx": 0, **options}
        )


@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers(monkeypatch, name):
    """The package's forward against ours with the same parameters: output and gradient."""
    theirs = their_layer(monkeypatch, **LAYERS[name])
    theirs.o_proj.weight.requires_grad_(False)
    layer = fla.convert(theirs)
    converted = dict(layer.named_parameters())
    assert converted.keys() == dict(theirs.named_parameters()).keys()
    for n, p in theirs.named_parameters():
        assert converted[n] is p and p.requires_grad == (n != "o_proj.weight")
    x, d_o = normal(2, 70, 40).requires_grad_(), normal(2, 70, 40, seed=1)
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, :30] = 0
    for arguments in ({}, {"attention_mask": mask}):
        o, expected = (side(x, **arguments)[0] for side in (layer, theirs))
        assert_close("output", o, expected, 1e-5)
        gradients = (torch.autograd.grad(t, x, d_o)[0] for t in (o, expected))
        assert_close("gradient", *gradients, 2e-5)
    packed = {"cu_seqlens": offsets((20, 50))}
    assert_close("packed", *(side(x[:1], **packed)[0] for side in (layer, theirs)), 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers_decode(monkeypatch, name):
    """Prefill, a few tokens, then one by one, each layer with a cache of the package."""
    cache = imported("fla.models.cache_utils").Cache
    theirs = their_layer(monkeypatch, **LAYERS[name]).eval()
    layer, x = fla.convert(theirs), normal(2, 75, 40)
    outputs = []
    with torch.no_grad():
        for side in (layer, theirs):
            held, parts = cache(), []
            for start, end in ((0, 70), (70, 73), (73, 74), (74, 75)):
                o, weights, held = side(x[:, start:end], past_key_values=held, use_cache=True)
                assert weights is None and held.get_seq_length() == end
                parts.append(o)
            outputs.append(torch.cat(parts, 1))
    assert_close("output", *outputs, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *LAYERS.values(),
        {"use_gate": False, "use_short_conv": False},
        {"num_heads": 3, "num_v_heads": 9, "expand_v": 0.5},
    ],
    ids=str,
)
def test_state_dicts_load_both_ways(monkeypatch, options):
    """With their own modules, not ours: the same names and shapes, strictly."""
    module = imported("fla.layers.gated_deltanet")
    options = {"hidden_size": 40, "head_dim": 12, "num_heads": 2, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = module.GatedDeltaNet(**options)
    layer = fla.GatedDeltaNet(**options)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    for p in layer.parameters():
        assert p.dtype == torch.float32
