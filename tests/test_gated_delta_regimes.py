"""Chunked gated delta rule where its numbers are hard: gates and betas at their extremes."""

import pytest
import torch

from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from deltafuse.testing import assert_close
from gated_delta_cases import FUSED, Case, compare, exactly, make, outputs_and_gradients

CASE = Case(B=1, T=200, H=1, HV=2, K=32, V=24)


def uniform(low):
    return lambda shape: low * torch.rand(shape, generator=torch.Generator().manual_seed(3))


def sometimes(value, share):
    """value at a share of the tokens, else a gate in (-0.1, 0)."""

    def make_gate(shape):
        chosen = uniform(1)(shape) < share
        return torch.where(chosen, value, uniform(-0.1)(shape.__class__((*shape, 2)))[..., 1])

    return make_gate


GATES = {
    "zero": lambda shape: torch.zeros(shape),
    "tiny": lambda shape: torch.full(shape, -1e-4),
    "weak": uniform(-0.06),
    "medium": uniform(-2),
    "strong": uniform(-16),
    "some_at_-30": sometimes(-30.0, 0.02),
    "all_at_-88": lambda shape: torch.full(shape, -88.0),
    "resets": sometimes(-torch.inf, 0.05),
    "below_-88": sometimes(-500.0, 0.05),
}
BETAS = {
    "zero": lambda shape: torch.zeros(shape),
    "one": lambda shape: torch.ones(shape),
    "two": lambda shape: torch.full(shape, 2.0),
    "mixed_zeros": lambda shape: (uniform(1)(shape) < 0.5).float(),
    "up_to_two": uniform(2),
}
DTYPES = [torch.float32, torch.bfloat16]


def replaced(x, **tensors):
    return {**x, **{name: t.to(x[name].dtype).requires_grad_() for name, t in tensors.items()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_gate_regimes(name, dtype):
    x = make(CASE, dtype)
    g = GATES[name](x["g"].shape)
    actual, expected = compare(replaced(x, g=g))
    # what the parameters of a gate receive: the sum of g dg, where cancellation would show
    if g.isfinite().all():
        sums = [(g.double() * r["dg"].double()).sum() for r in (actual, expected)]
        torch.testing.assert_close(*sums, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("A", [0.03, 1.0, 16.0])
def test_gradient_of_the_gate_parameters(A, dtype):
    """Decays up to exp(-16 softplus(..)) a token: the gradients of A_log and dt_bias stay exact."""
    x = make(CASE, dtype, fused=True)
    x = replaced(x, A_log=torch.full((2,), A).log())
    _, expected = compare(x, 2, **FUSED)
    # not vacuous: each head's gradient is a real number, not the rest of a cancellation
    assert (expected["dA_log"].abs() > 1e-6).all()


def test_minus_infinity_resets_the_state():
    x = {name: t.detach() for name, t in make(CASE).items()}
    x["g"][:, 75] = -torch.inf
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    rest = {name: t[:, 75:] for name, t in x.items() if name != "initial_state"}
    o_rest, ht_rest = chunk_gated_delta_rule(**rest, output_final_state=True)
    assert_close("o", o[:, 75:], o_rest, 1e-6)
    assert_close("ht", ht, ht_rest, 1e-6)


def test_gate_below_its_minimum_has_no_gradient():
    x = make(CASE)
    g = x["g"].detach().clone()
    g[:, ::3] = -100.0
    g[:, 1::9] = -torch.inf
    dg = outputs_and_gradients(chunk_gated_delta_rule, replaced(x, g=g))["dg"]
    assert torch.count_nonzero(dg[g < -88]) == 0
    assert torch.count_nonzero(dg[g >= -88]) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BETAS)
def test_beta_regimes(name, dtype):
    x = make(CASE, dtype)
    beta = BETAS[name](x["beta"].shape)
    # no decay, the hardest case; beta above 1 amplifies rounding
    compare(replaced(x, beta=beta, g=torch.zeros_like(x["g"])), 2)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_identical_keys(dtype, limit):
    """The worst system to invert: one key for all tokens, beta = 1.9, no decay."""
    x = make(CASE, dtype)
    x = replaced(
        x,
        k=x["k"].detach()[:, :1].expand_as(x["k"]).clone(),
        beta=torch.full_like(x["beta"], 1.9),
        g=torch.zeros_like(x["g"]),
    )
    actual = outputs_and_gradients(chunk_gated_delta_rule, x)
    expected = outputs_and_gradients(naive_recurrent_gated_delta_rule, exactly(x))
    for name in ("o", "ht"):
        assert_close(name, actual[name], expected[name], limit)
    for name, value in actual.items():
        assert value.isfinite().all(), name


def test_keys_longer_than_one():
    compare(replaced(x := make(CASE), k=3 * x["k"].detach(), beta=0.2 * x["beta"].detach()))


EULER = {
    "one sequence": CASE,
    "batch": CASE._replace(B=3, T=90),
    "packed": CASE._replace(lengths=(1, 64, 0, 130)),
}


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", EULER)
def test_gradients_satisfy_euler(name, dtype, limit):
    """dg of a sequence's first token is <dS_0, S_0>; and the function is linear in (v, S_0), so
    <o, do> + <S_T, dS_T> = <v, dv> + <S_0, dS_0>."""
    x = make(EULER[name], dtype)
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    random = torch.Generator().manual_seed(5)
    do, dht = (torch.randn(t.shape, generator=random).to(dtype) for t in (o, ht))
    dv, dg, dh0 = torch.autograd.grad(
        (o, ht), [x[n] for n in ("v", "g", "initial_state")], (do, dht)
    )
    first = (dh0 * x["initial_state"]).double().sum((2, 3))
    if "cu_seqlens" in x:
        starts, ends = x["cu_seqlens"][:-1], x["cu_seqlens"][1:]
        found, expected = dg[0, starts[starts < ends]], first[starts < ends]
    else:
        found, expected = dg[:, 0], first
    assert_close("dg of the first token", found, expected, limit)
    left = (o * do).double().sum() + (ht * dht).double().sum()
    right = (x["v"] * dv).double().sum() + first.sum()
    assert_close("homogeneity", left, right, limit)
