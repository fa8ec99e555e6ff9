"""The recurrent (per token) gated delta rule against its float64 reference, and identities."""

import pytest
import torch

from deltafuse import _library
from deltafuse.gated_delta import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    gated_delta_rule_step,
    naive_recurrent_gated_delta_rule,
)
from deltafuse.testing import assert_close
from gated_delta_cases import (
    FUSED,
    SMALLEST,
    Case,
    compare,
    exactly,
    limit_of,
    make,
    outputs_and_gradients,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# backward keeps a state every 64 tokens; forward cuts columns into tiles of 32 KB of state, on CUDA
# of 16 columns a warp (8 above K = 128)
CASES = {
    "one_token": Case(B=3, T=1, H=2, HV=2, K=64, V=64),  # as in decoding
    "smallest": Case(T=3, H=2, HV=2, K=1, V=1, dht=False),
    "one_segment_group3": Case(T=64, HV=3, K=5, V=5, h0=False),  # less than a vector
    "next_segment": Case(T=65, HV=1, K=100, V=64),
    "two_tiles_group3": Case(T=6, HV=3, K=100, V=100, dht=False),
    "many_tiles": Case(T=6, HV=1, K=64, V=256),
    "wide_K": Case(B=2, T=6, HV=1, K=256, V=100),  # the last tile and vector are cut
    "three_segments_group3": Case(T=130, H=2, HV=6, K=5, V=100, h0=False, dht=False),
    "packed": Case(T=77, HV=3, K=20, V=24, lengths=(0, 1, 66, 0, 5)),  # 5 tokens of tail
}
SMALL = Case(B=2, T=67, HV=2, K=8, V=12)  # two segments


def check(x, factor=1, dht=True, **options):
    return compare(x, factor, fused_recurrent_gated_delta_rule, dht, **options)


def detached(x):
    return {name: t.detach() for name, t in x.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(device, name, dtype):
    check(make(CASES[name], dtype, device), dht=CASES[name].dht)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["next_segment", "packed"])
def test_preactivations_in_the_kernel(device, name, dtype):
    # beta up to 2 amplifies the rounding of bfloat16 inputs: twice the limit
    check(make(CASES[name], dtype, device, fused=True), 2, **FUSED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(cpu_isa, dtype):
    # columns in one cut vector, in cut tiles, and in two segments of tokens
    for case in (Case(T=5, HV=3, K=5, V=5), Case(T=5, HV=1, K=100, V=100), SMALL):
        check(make(case, dtype, fused=True), 2, **FUSED)


@pytest.mark.parametrize("name", ["plain", "fused", "packed", "beta_per_channel"])
def test_gradcheck(name, threads):
    threads(1)  # thousands of tiny calls
    fused = name in ("fused", "packed")
    case = Case(T=20 if fused else 6, K=5, V=3, lengths=(0, 12, 7) if name == "packed" else ())
    x = make(case, torch.float64, fused=fused)
    if name == "beta_per_channel":
        x["beta"] = torch.rand(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    options = {**(FUSED if fused else {}), "cu_seqlens": x.pop("cu_seqlens", None)}

    def function(*tensors):
        named = dict(zip(x, tensors, strict=True))
        return fused_recurrent_gated_delta_rule(**named, output_final_state=True, **options)

    assert torch.autograd.gradcheck(function, tuple(x.values()))


GATES = {
    "zero": lambda u: 0 * u,
    "tiny": lambda u: -1e-4 + 0 * u,
    "weak": lambda u: -0.06 * u,
    "medium": lambda u: -2 * u,
    "strong": lambda u: -16 * u,
    "rare_resets": lambda u: torch.where(u < 0.02, -30.0, -0.01),
    "smallest": lambda u: -88 + 0 * u,
    "minus_infinity": lambda u: torch.where(u < 0.1, -torch.inf, -0.1),
}


@pytest.mark.parametrize("name", GATES)
def test_gate_regimes(device, name):
    x = make(SMALL, device=device)
    with torch.no_grad():
        x["g"].copy_(GATES[name](torch.rand(x["g"].shape, generator=torch.Generator())))
    actual, expected = check(x)
    total, exact = ((x["g"].cpu().clamp(min=-88) * r["dg"].cpu()).sum() for r in (actual, expected))
    if exact.abs() > SMALLEST:
        assert_close("sum g dg", total, exact, 1e-4)


def test_minus_infinity_is_a_reset(device):
    x = detached(make(SMALL, torch.float32, device))
    x["g"][:, 40] = -torch.inf
    o, ht = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    tail = {name: x[name][:, 40:] for name in ("q", "k", "v", "g", "beta")}
    o_tail, ht_tail = fused_recurrent_gated_delta_rule(**tail, output_final_state=True)
    assert_close("o", o[:, 40:], o_tail, 1e-6)
    assert_close("ht", ht, ht_tail, 1e-6)


BETAS = {
    "zero": lambda u: 0 * u,
    "one": lambda u: 1 + 0 * u,
    "two": lambda u: 2 + 0 * u,
    "some_zeros": lambda u: torch.where(u < 0.3, 0.0, u),
    "up_to_two": lambda u: 2 * u,
}


@pytest.mark.parametrize("name", BETAS)
def test_write_strengths(device, name):
    x = make(SMALL, device=device)
    with torch.no_grad():
        x["beta"].copy_(BETAS[name](torch.rand(x["beta"].shape, generator=torch.Generator())))
    check(x, 2)


def test_identical_keys_stay_finite(device):
    x = detached(make(Case(T=300, HV=1, K=64, V=64), device=device))
    x["k"][:], x["beta"][:], x["g"][:] = x["k"][:, :1].clone(), 1.9, 0
    o, _ = fused_recurrent_gated_delta_rule(**x)
    expected, _ = naive_recurrent_gated_delta_rule(**exactly(x))
    assert_close("o", o.cpu(), expected, 1e-5)


def test_equals_the_chunk_form():
    x = make(CASES["packed"], torch.float64, fused=True)
    actual = outputs_and_gradients(fused_recurrent_gdn, x, **FUSED)
    expected = outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED)
    for name, value in expected.items():
        assert_close(name, actual[name], value, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_the_sequence_bitwise(device, dtype):
    x = detached(make(SMALL, dtype, device))
    o, ht = fused_recurrent_gated_delta_rule(
        **x, output_final_state=True, use_qk_l2norm_in_kernel=True, scale=0.3
    )
    state = x["initial_state"]
    for t in range(SMALL.T):
        token = (x[name][:, t] for name in ("q", "k", "v", "g", "beta"))
        o_t, state = gated_delta_rule_step(*token, state, scale=0.3, use_qk_l2norm=True)
        assert torch.equal(o_t, o[:, t])
    assert torch.equal(state, ht)


def test_step_is_a_function_and_differentiable():
    x = make(Case(B=2, T=1, HV=2), torch.float64)
    token = {name: x[name].detach()[:, 0] for name in ("q", "k", "v", "g", "beta")}
    state = x["initial_state"].detach().mT.contiguous().requires_grad_()
    before = state.detach().clone()
    o, new = gated_delta_rule_step(**token, state=state, state_v_first=True)
    assert torch.equal(state, before)
    exact, exact_new = naive_recurrent_gated_delta_rule(**x, output_final_state=True)
    assert_close("o", o, exact[:, 0], 1e-12)
    assert_close("new", new, exact_new.mT, 1e-12)
    (d,) = torch.autograd.grad(o.sum() + new.square().sum(), state)
    (exact_d,) = torch.autograd.grad(exact.sum() + exact_new.square().sum(), x["initial_state"])
    assert_close("d", d, exact_d.mT, 1e-12)


@pytest.mark.parametrize("name", ["wide_K", "packed"])
def test_states_v_first_are_the_transpose_bitwise(device, name):
    x = make(CASES[name], device=device)
    plain = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()

    def function(**arguments):
        o, ht = fused_recurrent_gated_delta_rule(**arguments, state_v_first=True)
        return o, ht.mT

    for key, value in outputs_and_gradients(function, x).items():
        assert torch.equal(value.mT if key == "dinitial_state" else value, plain[key]), key


def test_absent_gates_are_neutral_bitwise(device):
    x = make(SMALL, device=device)
    with torch.no_grad():
        x["g"].zero_(), x["beta"].fill_(1)
    given = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    del x["g"], x["beta"]
    for key, value in outputs_and_gradients(fused_recurrent_gated_delta_rule, x).items():
        assert torch.equal(value, given[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["beta", "logit"])
def test_beta_per_channel(device, dtype, fused):
    x = make(SMALL, dtype, device)
    wide = x["beta"].dtype
    logits = torch.randn(2, 67, 2, 12, generator=torch.Generator().manual_seed(1))
    x["beta"] = (logits if fused else logits.sigmoid()).to(device, wide).requires_grad_()
    check(x, 2, use_beta_sigmoid_in_kernel=fused, allow_neg_eigval=fused)


def check_channels(case, given, dtype, device="cpu"):
    x, random = detached(make(case, dtype, device)), torch.Generator().manual_seed(2)
    if "g" not in given:
        del x["g"]
    for name, n in (("gk", case.K), ("gv", case.V)):
        if name in given:
            decay = -torch.rand(*x["v"].shape[:3], n, generator=random)
            decay[:, 5] = -torch.inf
            x[name] = decay.to(device, x["beta"].dtype)
    o, ht = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    exact, exact_ht = naive_recurrent_gated_delta_rule(**exactly(x), output_final_state=True)
    assert_close("o", o.cpu(), exact, limit_of("o", dtype))
    assert_close("ht", ht.cpu(), exact_ht, limit_of("ht", dtype))


CHANNELS = pytest.mark.parametrize("given", [("gk",), ("gv",), ("g", "gk", "gv")], ids=" ".join)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@CHANNELS
def test_decay_channels(cpu_isa, given, dtype):
    check_channels(CASES["packed"], given, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["packed", "two_tiles_group3", "wide_K"])
@CHANNELS
def test_decay_channels_on_each_device(device, name, given, dtype):
    check_channels(CASES[name], given, dtype, device)


@pytest.mark.parametrize("name, channels", [("gk", 8), ("gv", 12)])
def test_gradient_through_decay_channels_is_an_error(name, channels):
    x = make(SMALL)
    x[name] = torch.zeros(2, 67, 2, channels)
    with pytest.raises(NotImplementedError, match="no gradient with gk or gv"):
        fused_recurrent_gated_delta_rule(**x)[0].sum().backward()


def test_packed_equals_separate_calls_bitwise(device):
    x = detached(make(CASES["packed"], device=device))
    o, ht = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    bounds = x.pop("cu_seqlens").tolist()
    states = x.pop("initial_state")
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {name: t[:, start:end] for name, t in x.items()}
        o_n, ht_n = fused_recurrent_gated_delta_rule(
            **part, initial_state=states[n : n + 1], output_final_state=True
        )
        assert torch.equal(o[:, start:end], o_n)
        assert torch.equal(ht[n : n + 1], ht_n)
    int32 = torch.tensor(bounds, dtype=torch.int32, device=device)
    assert torch.equal(
        fused_recurrent_gated_delta_rule(**x, initial_state=states, cu_seqlens=int32)[0], o
    )


def test_offsets_beyond_the_tokens_are_an_error():
    x = detached(make(SMALL._replace(B=1)))
    for bounds in ((0, 68), (0, 50, 40), (3, 67)):
        x["cu_seqlens"] = torch.tensor(bounds)
        x["initial_state"] = torch.zeros(len(bounds) - 1, 2, 8, 12)
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to at most T = 67"):
            fused_recurrent_gated_delta_rule(**x)


def test_padding_tail_is_zero_and_memory_is_written(device, nan_filled_memory):
    x = make(CASES["packed"], device=device, fused=True)
    with torch.no_grad():
        x["v"][:, -5:] = torch.nan  # is not even read
    result = outputs_and_gradients(fused_recurrent_gated_delta_rule, x, **FUSED)
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        assert torch.count_nonzero(result[name][:, -5:]) == 0, name
    for name, value in result.items():
        assert torch.isfinite(value).all(), name


def test_nan_stays_in_its_value_head(device, threads):
    threads(1)  # one worker's scratch serves all heads
    x = make(Case(B=2, T=70, H=2, HV=4, K=5, V=7), device=device)
    clean = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    with torch.no_grad():
        x["g"][0, 3, 0] = torch.nan
    dirty = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    for name, value in dirty.items():
        touched = 1  # of the value heads, or of the two q/k heads
        dim = 1 if name in ("ht", "dinitial_state") else 2
        rest = (t.narrow(dim, touched, t.shape[dim] - touched) for t in (value, clean[name]))
        assert torch.equal(*rest), name
        assert torch.equal(value[1], clean[name][1]), name


def test_threads_and_repeats_agree_bitwise(threads):
    x = make(Case(B=2, T=70, H=2, HV=6, K=64, V=128), fused=True)
    results = []
    for count in (1, 2, 8, 8):
        threads(count)
        results.append(outputs_and_gradients(fused_recurrent_gated_delta_rule, x, **FUSED))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("contiguous", ["views", "last_stride_2"])
def test_strided_inputs_bitwise(device, contiguous):
    B, T, H, K = 2, 20, 2, 24
    if contiguous == "views":
        q, k, v = torch.randn(B, T, 3, H, K, generator=torch.Generator()).to(device).unbind(2)
    else:
        wide = torch.randn(3, B, T, H, 2 * K, generator=torch.Generator()).to(device)
        q, k, v = wide[..., ::2]
    g, beta = -torch.rand(2, B, H, T).to(device).transpose(2, 3)
    x = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    x = {name: t.requires_grad_() for name, t in x.items()}
    dense = {name: t.detach().contiguous().requires_grad_() for name, t in x.items()}
    options = {"use_qk_l2norm_in_kernel": True}
    actual = outputs_and_gradients(fused_recurrent_gated_delta_rule, x, **options)
    expected = outputs_and_gradients(fused_recurrent_gated_delta_rule, dense, **options)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_first_gate_gradient_is_the_state_product(device):
    """S_0 enters as exp(g_1) S_0: dg_1 = <dS_0, S_0>; and o, S_T are linear in v and S_0."""
    x = make(SMALL._replace(B=1), device=device)
    r = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    h0 = x["initial_state"].detach()
    assert_close("dg", r["dg"][0, 0], (r["dinitial_state"] * h0).sum((0, 2, 3)), 1e-5)


def test_gradients_only_where_asked(device):
    x = detached(make(SMALL, device=device))
    x["beta"].requires_grad_()
    o, _ = fused_recurrent_gated_delta_rule(**x)
    o.sum().backward()
    assert x["beta"].grad is not None
    assert all(t.grad is None for name, t in x.items() if name != "beta")


def test_second_derivative_is_an_error():
    x = make(SMALL)
    o, _ = fused_recurrent_gated_delta_rule(**x)
    (dv,) = torch.autograd.grad(o.sum(), x["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        dv.sum().backward()


def test_empty_inputs(device):
    x = make(SMALL._replace(T=0), device=device)
    o, ht = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    assert o.shape == (2, 0, 2, 12)
    assert torch.equal(ht, x["initial_state"])
    assert ht.data_ptr() != x["initial_state"].data_ptr()
    (dh0,) = torch.autograd.grad(ht.sum(), x["initial_state"])
    assert torch.equal(dh0, torch.ones_like(dh0))


def test_scale_zero_is_zero(device):
    x = make(SMALL, device=device)
    o, ht = fused_recurrent_gated_delta_rule(**x, scale=0, output_final_state=True)
    assert torch.count_nonzero(o) == 0
    assert torch.count_nonzero(ht) > 0


def test_reference_backend_is_selectable():
    x = make(SMALL)
    with _library.use("reference"):
        chosen = fused_recurrent_gdn(**x)[0]
    assert torch.equal(chosen, naive_recurrent_gated_delta_rule(**x)[0])


def test_heads_beyond_the_kernel_use_the_reference_visibly():
    x = make(Case(T=5, K=257, V=4), torch.float64)
    with pytest.warns(UserWarning, match="K = 257"):
        check(x)
