"""Chunked gated delta rule against the float64 recurrence, and identities it must fulfil."""

import pytest
import torch
import torch.nn.functional as F

from deltafuse import _library
from deltafuse.gated_delta import (
    chunk_gated_delta_rule,
    chunk_gdn,
    gated_delta_rule_decode,
    naive_chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
)
from deltafuse.testing import assert_close, relative_error
from gated_delta_cases import CASES, FUSED, LONG_CASES, Case, compare, make, require_kernel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(device, name, dtype):
    require_kernel(device)
    # with K = 1 its dg is twelve sums of few terms, at rounded operands up to 1.5e-2 (median of 24
    # seeds 2.9e-3, emulated)
    factor = 2 if name == "two_tokens_group3" else 1
    compare(make(CASES[name], dtype, device), factor, dht=CASES[name].dht)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG_CASES)
def test_outputs_and_gradients_of_long_inputs(name, dtype):
    compare(make(LONG_CASES[name], dtype), dht=LONG_CASES[name].dht)


def grid():
    """All lengths with four (K, V, group) each; long sequences with the smaller heads only."""
    sizes = [(1, 16, 1), (60, 100, 2), (16, 1, 3), (128, 64, 8), (100, 256, 4), (192, 60, 1)]
    sizes += [(64, 192, 2), (256, 128, 3)]
    for i, T in enumerate((1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 500, 2048)):
        small = sizes[:3] if T > 500 else sizes
        for j in range(4):
            K, V, group = small[(i + 3 * j) % len(small)]
            yield Case(T=T, H=1 + j % 2, HV=(1 + j % 2) * group, K=K, V=V, h0=j < 2, dht=j % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_outputs_and_gradients_over_the_grid(device, case, dtype):
    require_kernel(device)
    compare(make(case, dtype, device), 1 if case.K > 1 else 2, dht=case.dht)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["T15", "T65_group2", "packed"])
def test_preactivations_in_the_kernel(device, name, dtype):
    require_kernel(device)
    # beta up to 2 amplifies the rounding of bfloat16 inputs: twice the limit
    compare(make(CASES[name], dtype, device, fused=True), 2, **FUSED)


@pytest.mark.parametrize("option", [*FUSED, "none"])
def test_each_preactivation_alone(option):
    x = make(Case(T=70), torch.float64)
    options = {option: True} if option != "none" else {}
    if option == "allow_neg_eigval":
        options["use_beta_sigmoid_in_kernel"] = True
    if option == "use_gate_in_kernel":  # dt_bias stays None
        x["A_log"] = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    compare(x, **options)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes(chunk_size):
    compare(make(CASES["T127_wide_K"]), chunk_size=chunk_size)


@pytest.mark.parametrize("T", [464, 480, 500])
def test_backward_that_recomputes_in_segments(T):
    """So many bytes of states that the backward keeps only those of 16 chunks at a time.

    The chunk reference is compared with here: the recurrence would keep 8 GB for its gradient.
    """
    x = make(Case(T=T, HV=8, K=256, V=256))
    compare(x, reference=naive_chunk_gated_delta_rule, chunk_size=16, save_states=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(cpu_isa, dtype):
    for name in ("T65_group2", "T17", "packed"):
        compare(make(CASES[name], dtype, fused=True), 2, **FUSED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one_token", "T65_group2", "T127_wide_K", "packed"])
def test_chunk_reference(name, dtype):
    x = make(CASES[name], dtype, fused=True)
    compare(x, 2, function=naive_chunk_gated_delta_rule, **FUSED)


def test_reference_backend_is_selectable():
    x = make(Case(T=70))
    with _library.use("reference"):
        chosen = chunk_gdn(**x, scale=0.3)[0]
    assert torch.equal(chosen, naive_chunk_gated_delta_rule(**x, scale=0.3)[0])


@pytest.mark.parametrize("name", ["plain", "fused", "packed"])
def test_gradcheck(device, name):
    require_kernel(device)
    case = Case(T=20, K=5, V=3, lengths=(0, 12, 7) if name == "packed" else ())
    x = make(case, torch.float64, device, fused=name != "plain")
    cu_seqlens = x.pop("cu_seqlens", None)
    options = {**(FUSED if name != "plain" else {}), "cu_seqlens": cu_seqlens, "chunk_size": 16}

    def function(*tensors):
        named = dict(zip(x, tensors, strict=True))
        return chunk_gated_delta_rule(**named, output_final_state=True, **options)

    assert torch.autograd.gradcheck(function, tuple(x.values()))


def test_second_derivative_is_an_error():
    x = make(Case(T=20))
    (dv,) = torch.autograd.grad(
        chunk_gated_delta_rule(**x)[0].sum(), x["v"], create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        dv.sum().backward()


def test_empty_inputs():
    x = make(Case(B=2, T=0))
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    assert o.shape == (2, 0, 2, 20)
    assert torch.equal(ht, x["initial_state"])
    assert ht.data_ptr() != x["initial_state"].data_ptr()
    (dh0,) = torch.autograd.grad(ht.sum(), x["initial_state"])
    assert torch.equal(dh0, torch.ones_like(dh0))


def test_scale_zero_is_zero():
    o, ht = chunk_gated_delta_rule(**make(Case()), scale=0, output_final_state=True)
    assert torch.count_nonzero(o) == 0
    assert torch.count_nonzero(ht) > 0


def test_heads_beyond_the_kernel_use_the_reference_visibly():
    x = make(Case(T=5, K=257, V=4), torch.float64)
    with pytest.warns(UserWarning, match="K = 257"):
        compare(x)


def test_beta_zero_is_pure_decay():
    x = {name: t.detach() for name, t in make(Case(HV=1), torch.float64).items()}
    x["beta"].zero_()
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    G = x["g"].cumsum(1)
    expected = 16**-0.5 * G.exp().view(-1, 1) * (x["q"][0, :, 0] @ x["initial_state"][0, 0])
    assert_close("o", o[0, :, 0], expected, 1e-12)
    assert_close("ht", ht, G[:, -1].exp().view(1, 1, 1, 1) * x["initial_state"], 1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.bfloat16, 6e-3)])
def test_a_written_value_is_read_back(dtype, limit):
    """Unit keys, beta = 1 and q = k: o_t = scale v_t whatever the gate and the state."""
    x = make(Case(T=150, K=24), dtype)
    x["beta"] = torch.ones_like(x["beta"])
    x["q"] = x["k"]
    o, _ = chunk_gated_delta_rule(**x, scale=0.7, use_qk_l2norm_in_kernel=dtype != torch.float64)
    assert_close("o", o, 0.7 * x["v"], limit)


def test_equals_repeated_decoding():
    """A prompt at once and token by token: the same outputs, and the same state to go on from."""
    x = {name: t.detach() for name, t in make(Case(B=2, T=70, HV=4), fused=True).items()}
    options = {**FUSED, "allow_neg_eigval": False}
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True, **options)
    state, outputs = x["initial_state"].clone(), []
    for t in range(70):
        q, k, v, a, b = (x[name][:, t : t + 1] for name in ("q", "k", "v", "g", "beta"))
        step = gated_delta_rule_decode(
            q, k, v, state, x["A_log"], a, x["dt_bias"], b, state_v_first=False
        )
        outputs.append(step)
    assert_close("o", torch.cat(outputs, 1), o, 5e-6)
    assert_close("ht", state, ht, 5e-6)


def test_linear_in_values_and_state():
    x = make(Case(T=150), torch.float64)
    other = make(Case(T=150), torch.float64, seed=1)

    def run(v, state):
        return chunk_gated_delta_rule(
            **{**x, "v": v, "initial_state": state}, output_final_state=True
        )

    one = run(x["v"], x["initial_state"])
    two = run(other["v"], other["initial_state"])
    both = run(x["v"] + 3 * other["v"], x["initial_state"] + 3 * other["initial_state"])
    for name, a, b, c in zip(("o", "ht"), one, two, both, strict=True):
        assert_close(name, c, a + 3 * b, 1e-13)


def test_without_decay_it_is_the_delta_rule():
    """g = 0 against the delta rule written down independently, S (I - beta k k^T) + beta v k^T."""
    x = make(Case(T=90, HV=1), torch.float64)
    o, ht = chunk_gated_delta_rule(
        **{**x, "g": torch.zeros_like(x["g"])}, scale=1.0, output_final_state=True
    )
    S = x["initial_state"][0, 0].mT
    for t in range(90):
        q, k, v, beta = (x[n][0, t, 0] for n in ("q", "k", "v", "beta"))
        S = S @ (torch.eye(16) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        assert_close("o", o[0, t, 0], S @ q, 1e-12)
    assert_close("ht", ht[0, 0], S.mT, 1e-12)


def test_grouped_heads_equal_repeated_ones():
    x = make(Case(H=2, HV=6), torch.float64)
    grouped = chunk_gated_delta_rule(**x)[0]
    for name in ("q", "k"):
        x[name] = x[name].repeat_interleave(3, 2)
    assert relative_error(chunk_gated_delta_rule(**x)[0], grouped) < 1e-14


def test_per_channel_options_of_the_recurrence():
    """gk and gv equal to a scalar gate on every channel are that gate; beta may be per channel."""
    x = make(Case(T=20), torch.float64)
    plain = naive_recurrent_gated_delta_rule(**x)[0]
    g, beta = x.pop("g"), x.pop("beta").unsqueeze(-1).expand(1, 20, 2, 20)
    for channel, size in (("gk", 16), ("gv", 20)):
        gates = {channel: g.unsqueeze(-1).expand(1, 20, 2, size)}
        o = naive_recurrent_gated_delta_rule(**x, beta=beta, **gates)[0]
        assert_close(channel, o, plain, 1e-14)
    # no gate and no beta are a gate of 0 and a beta of 1
    o = naive_recurrent_gated_delta_rule(**x)[0]
    expected = chunk_gated_delta_rule(**x, g=torch.zeros_like(g), beta=torch.ones_like(g))[0]
    assert_close("o", o, expected, 1e-12)


def test_l2norm_has_its_epsilon_inside_the_root():
    x = make(Case(T=3), torch.float64)
    tiny = {**x, "q": x["q"] * 1e-3, "k": x["k"] * 1e-3}
    o = chunk_gated_delta_rule(**tiny, use_qk_l2norm_in_kernel=True)[0]
    shrunk = {name: tiny[name] / (1e-6 + 1e-6) ** 0.5 for name in ("q", "k")}
    assert_close("o", o, chunk_gated_delta_rule(**{**x, **shrunk})[0], 1e-13)
    assert F.normalize(tiny["q"], dim=-1).norm() > 1.4 * shrunk["q"].norm()
