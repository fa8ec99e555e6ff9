"""Modules of Deep Delta Learning: gates, read-outs, expander, KV shift, their initialisations."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltafuse.ddl import (
    DeepDeltaResidual,
    DeepDeltaResidualExpanded,
    DeepDeltaResidualVdim1,
    InputEmbedExpander,
    ResidualCompressor,
    RMSNorm,
    ShiftLinear,
    reset_ddl_parameters,
)
from deltafuse.testing import assert_close

D = 24
GATES = {
    "repo": {},
    "paper": {"v_source": "context", "v_activation": None},
    "two_layers": {"beta_hidden_size": 7},
    "constant": {"v_constant": 2.0},
    "scale": {"v_scale": 1.5, "k_eps": 0.3},
}


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def randomised(module, seed=0):
    """The module in float64 with weights that no initialisation gives."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=seed + i))
    return module


def expected_residual(m, x, k, v_in, context):
    """Equations 2.1 and 2.2 of arXiv 2601.00417 with x [..., d, d_v], written out."""
    if m.two_layers:
        z = torch.tanh(context @ m.beta_in.weight.T) @ m.beta_out.weight.T + m.beta_out.bias
    else:
        z = context @ m.beta.weight.T + m.beta.bias
    beta = 2 / (1 + torch.exp(-z))
    source = context if m.v_source == "context" else v_in
    v = source @ m.v_proj.weight.T + m.v_proj.bias
    if m.v_activation == "sigmoid":
        v = m.v_scale / (1 + torch.exp(-v))
    if m.v_constant is not None:
        v = torch.full_like(v, m.v_constant)
    k = k / (k.square().sum(-1, keepdim=True) + m.k_eps**2).sqrt()
    read = torch.einsum("...d,...dv->...v", k, x)
    return x + torch.einsum("...d,...v->...dv", k, beta * (v - read))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_residual_is_the_equation(gate, channels):
    m = randomised(DeepDeltaResidual(D, channels, **GATES[gate]))
    x, k = normal(2, 5, D, channels), normal(2, 5, D, seed=1)
    v_in, context = normal(2, 5, D, seed=2), normal(2, 5, D, seed=3)
    y = m(x, k_in=k, v_in=v_in, context=context)
    assert_close("y", y, expected_residual(m, x, k, v_in, context), 1e-13)
    y.square().sum().backward()
    for name, p in m.named_parameters():
        frozen = m.v_constant is not None and name.startswith("v_proj")
        assert p.requires_grad is not frozen
        assert frozen or p.grad.abs().sum() > 0, name


def test_residual_of_one_channel_takes_states_with_and_without_it():
    m = randomised(DeepDeltaResidualVdim1(D))
    x, k, context = normal(3, D), normal(3, D, seed=1), normal(3, D, seed=2)
    y = m(x, k_in=k, context=context)
    assert y.shape == x.shape
    assert torch.equal(m(x[..., None], k_in=k, context=context)[..., 0], y)
    assert torch.equal(m(x, k_in=k, v_in=x, context=context), y)
    assert DeepDeltaResidualExpanded is DeepDeltaResidual


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: DeepDeltaResidual(0), "hidden_size must be at least 1"),
        (lambda: DeepDeltaResidual(D, v_source="x_in"), "v_source must be 'input' or 'context'"),
        (lambda: DeepDeltaResidual(D, v_activation="tanh"), "v_activation"),
        (lambda: DeepDeltaResidual(D, k_eps=-1.0), "k_eps must be at least 0"),
        (lambda: DeepDeltaResidual(D, beta_hidden_size=0), "beta_hidden_size"),
        (lambda: ResidualCompressor(D, 4, "ec"), "mode must be"),
        (lambda: ResidualCompressor(D, 4, kernel_size=3), "kernel_size must be value_channels = 4"),
        (lambda: ResidualCompressor(D, 4, "tc", kernel_size=0), "kernel_size must be at least 1"),
        (lambda: ResidualCompressor(D, 4)(normal(2, D)), r"x must be \[\.\.\., d, d_v\]"),
        (lambda: ResidualCompressor(D, 4, "tc").read_weight(), "mixes tokens"),
        (lambda: InputEmbedExpander(D, 4, "cc"), "mode must be"),
        (lambda: InputEmbedExpander(D, 4)(normal(2, D)), r"x must be \[B, T, 24\]"),
        (lambda: ShiftLinear(D, 10, 3, bias=False), "must be a multiple of num_heads"),
        (lambda: ShiftLinear(D, 12, 3, bias=False)(normal(2, D)), r"x must be \[B, T, 24\]"),
    ],
)
def test_wrong_arguments_are_named(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_residual_names_wrong_shapes():
    m, k = DeepDeltaResidual(D, 4).double(), normal(3, D)
    with pytest.raises(ValueError, match="v_in is needed for value_channels = 4"):
        m(normal(3, D, 4), k_in=k, context=k)
    with pytest.raises(ValueError, match="context must be"):
        m(normal(3, D, 4), k_in=k, v_in=k, context=normal(2, D))
    with pytest.raises(ValueError, match="x must be"):
        m(normal(2, D, 4), k_in=k, v_in=k, context=k)


def test_autocast_leaves_state_and_gates_alone():
    m = DeepDeltaResidual(D, 4)
    x, k = normal(3, D, 4, dtype=torch.float32), normal(3, D, dtype=torch.float32)
    plain = m(x, k_in=k, v_in=k, context=k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(m(x, k_in=k, v_in=k, context=k), plain)


# 2.11, initialisations


@pytest.mark.parametrize("beta0, logit", [(1.0, 0.0), (0.05, math.log(0.025 / 0.975)), (2.0, 13.8)])
@pytest.mark.parametrize("hidden", [None, 5])
def test_gate_starts_at_beta_init(beta0, logit, hidden):
    m = DeepDeltaResidual(D, beta_init=beta0, beta_hidden_size=hidden)
    last = m.beta if hidden is None else m.beta_out
    assert abs(last.bias.item() - logit) < 0.02
    m.reset_parameters("identity")
    assert not last.weight.any() and abs(last.bias.item() - logit) < 0.02
    _, z = m.logits(normal(4, D, dtype=torch.float32), normal(4, D, dtype=torch.float32))
    assert torch.allclose(2 * torch.sigmoid(z), torch.full((4,), beta0), atol=1e-5)


def test_check_16_beta_init_of_zero_warns():
    with pytest.warns(UserWarning, match="the gate hardly learns"):
        DeepDeltaResidual(D, beta_init=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepDeltaResidual(D, beta_init=1e-3)


def test_repo_preset_has_its_standard_deviations():
    torch.manual_seed(0)
    d = 256
    std = 0.5 / d**0.5
    residual = DeepDeltaResidual(d, 4, beta_hidden_size=128)
    weights = [residual.v_proj.weight, residual.beta_in.weight]
    weights += [ResidualCompressor(d, 4).weight, ResidualCompressor(d, 4, "tc").shortconv.weight]
    for weight in weights:
        assert abs(weight.std().item() / std - 1) < 0.1
    assert torch.equal(ResidualCompressor(d, 4).read, torch.full((4,), 0.25))


# 3 and 8: the sum of equal numbers rounds on its way
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["cc", "cc_causal", "tc", "linear", "mean"])
def test_identity_preset_reads_back_what_was_repeated(mode, channels):
    x = normal(2, 5, D, dtype=torch.float32)
    compress = ResidualCompressor(D, channels, mode.split("_")[0], causal="causal" in mode)
    compress.reset_parameters("identity")
    state = InputEmbedExpander(D, channels, "repeat")(x)
    assert state.shape == (2, 5, D, channels)
    if channels in (3, 8):
        assert_close("x", compress(state), x, 1e-6)
    else:
        assert torch.equal(compress(state), x)


def test_repo_preset_does_not_read_back():
    """Its read-out of equal channels is a random scale of each feature, half of them negative."""
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 768, 4)
    scale = ResidualCompressor(768, 4)(ones)
    assert abs(scale.std().item() - 0.028) < 0.004
    assert 0.4 < (scale < 0).float().mean().item() < 0.6


def test_expander_is_the_identity_again_after_a_global_initialisation():
    model = nn.ModuleList([InputEmbedExpander(D, 4), ResidualCompressor(D, 4), RMSNorm(D)])
    x = normal(2, 5, D, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.3)
    assert not torch.equal(model[0](x), x[..., None].expand(2, 5, D, 4))
    reset_ddl_parameters(model)
    assert torch.equal(model[0](x), x[..., None].expand(2, 5, D, 4))
    assert torch.equal(model[1](model[0](x)), x)
    assert torch.equal(model[2].weight, torch.full((D,), 0.3))  # not one of ours to reset
    with pytest.raises(ValueError, match="init"):
        reset_ddl_parameters(model, "zero")


# 2.5 and 2.6, read-outs and expansion


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_cc_is_a_convolution_along_the_channels(causal, channels):
    m = randomised(ResidualCompressor(D, channels, causal=causal))
    x = normal(2, 5, D, channels)
    left = channels - 1 if causal else (channels - 1) // 2
    padded = F.pad(x.flatten(0, 1), (left, channels - 1 - left))
    convolved = F.conv1d(padded, m.weight[:, None], groups=D)
    assert_close("x_in", m(x), (convolved * m.read).sum(-1).view(2, 5, D), 1e-13)
    linear = ResidualCompressor(D, channels, "linear").double()
    linear.weight.data = m.read_weight().detach()
    assert_close("linear", linear(x), m(x), 1e-13)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_tc_and_ec_are_causal_convolutions_over_time(K):
    tc, ec = ResidualCompressor(D, 3, "tc", K), InputEmbedExpander(D, 3, kernel_size=K)
    tc, ec = randomised(tc), randomised(ec)
    x = normal(2, 5, D)
    padded = F.pad(x.transpose(1, 2), (K - 1, 0))
    state = F.conv1d(padded, ec.conv.weight, groups=D).transpose(1, 2).reshape(2, 5, D, 3)
    assert_close("state", ec(x), state, 1e-13)
    padded = F.pad(state.flatten(2).transpose(1, 2), (K - 1, 0))
    out = F.conv1d(padded, tc.shortconv.weight[:, None], groups=3 * D).transpose(1, 2)
    assert_close("x_in", tc(state), (out.reshape(2, 5, D, 3) * tc.read).sum(-1), 1e-13)


def pieces(module, x, cuts):
    """Outputs for x cut along time, each call with the state of the one before, joined."""
    outputs, state = [], None
    for part in x.split(cuts, 1):
        y, state = module(part, initial_state=state, output_final_state=True)
        outputs.append(y)
    return torch.cat(outputs, 1)


# a first call of one token, of fewer than K - 1 tokens, of more
@pytest.mark.parametrize("cuts", [[1] * 9, [2, 1, 1, 5], [7, 1, 1]])
@pytest.mark.parametrize("K", [1, 4])
def test_check_13_decoding_equals_the_full_forward(K, cuts):
    tc, ec = ResidualCompressor(D, 4, "tc", K), InputEmbedExpander(D, 4, kernel_size=K)
    tc, ec = randomised(tc), randomised(ec)
    x, state = normal(2, 9, D), normal(2, 9, D, 4)
    assert_close("expanded", pieces(ec, x, cuts), ec(x), 1e-13)
    assert_close("read", pieces(tc, state, cuts), tc(state), 1e-13)


def test_mask_of_a_cache_covers_more_than_the_new_tokens():
    tc = randomised(ResidualCompressor(D, 4, "tc"))
    x = normal(2, 6, D, 4)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :4] = 0  # padding on the left
    full = tc(x, attention_mask=mask)
    assert not full[0, :4].any()
    assert_close("as a sequence of its own", full[:1, 4:], tc(x[:1, 4:]), 1e-13)
    _, state = tc(x[:, :5], attention_mask=mask[:, :5], output_final_state=True)
    last = tc(x[:, 5:], attention_mask=mask, initial_state=state)
    assert_close("last", last, full[:, 5:], 1e-13)


def test_modes_without_time_have_no_state():
    x = normal(2, 3, D, 4)
    read, state = ResidualCompressor(D, 4).double()(x, output_final_state=True)
    assert state is None and read.shape == (2, 3, D)
    assert_close("mean", ResidualCompressor(D, 4, "mean")(x), x.mean(-1), 1e-13)


# 2.10, KV shift


def expected_shift(m, x):
    o = x @ m.linear.weight.T + (0 if m.linear.bias is None else m.linear.bias)
    o = o.unflatten(-1, (m.num_heads, -1))
    a = x @ m.shift_proj.weight.T
    a = torch.sigmoid(a if m.shift_proj.bias is None else a + m.shift_proj.bias)[..., None]
    before = torch.cat([torch.zeros_like(o[:, :1]), o[:, :-1]], 1)
    return (a * before + (1 - a) * o).flatten(-2)


@pytest.mark.parametrize("bias, T", [(False, 1), (True, 1), (True, 6)])
def test_shift_follows_one_rule_for_one_token_and_for_many(bias, T):
    m = randomised(ShiftLinear(D, 12, 3, bias, bias))
    x = normal(2, T, D)
    assert_close("y", m(x), expected_shift(m, x), 1e-13)
    names = {"linear.weight", "shift_proj.weight"} | (
        {"linear.bias", "shift_proj.bias"} if bias else set()
    )
    assert set(m.state_dict()) == names


def test_shift_decodes_with_a_state_in_place_or_returned():
    m = randomised(ShiftLinear(D, 12, 3, True))
    x = normal(2, 5, D)
    state, outputs = torch.zeros(2, 12, dtype=torch.float64), []
    for part in x.split([1, 1, 3], 1):
        outputs.append(m(part, state))
    assert_close("in place", torch.cat(outputs, 1), m(x), 1e-13)
    assert_close("state", state, m.linear(x[:, -1]), 1e-13)
    first, state = m(x[:, :1], output_final_state=True)
    kept = state.clone()
    rest, _ = m(x[:, 1:], state, output_final_state=True)
    assert torch.equal(state, kept)
    assert_close("returned", torch.cat([first, rest], 1), m(x), 1e-13)
    m(x, state.flatten(1)).sum().backward()  # the backward still has the state as it was


def test_norm_is_the_rms_norm():
    m = randomised(RMSNorm(D, eps=0.1))
    x = normal(3, 16, D)
    assert_close("c", m(x), F.rms_norm(x, (D,), m.weight, 0.1), 1e-13)
    half = RMSNorm(D)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert RMSNorm(D)(x[:, :D].transpose(1, 2)[..., :16].transpose(1, 2)).shape == x.shape


def test_check_15_modules_survive_deepcopy_and_pickle():
    modules = nn.ModuleList(
        [
            DeepDeltaResidual(D, 4, beta_hidden_size=5),
            ResidualCompressor(D, 4, "tc"),
            InputEmbedExpander(D, 4),
            ShiftLinear(D, 12, 3, True),
            RMSNorm(D),
        ]
    )
    for other in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        assert str(other) == str(modules)
        for a, b in zip(other.parameters(), modules.parameters(), strict=True):
            assert torch.equal(a, b)
