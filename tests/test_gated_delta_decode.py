"""Decode: a few tokens of the gated delta rule on an indexed pool of states, in place."""

import pytest
import torch

from deltafuse import _library, backend_info
from deltafuse.gated_delta import gated_delta_rule_decode, naive_recurrent_gated_delta_rule
from deltafuse.testing import assert_close

LIMITS = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}
# B, T, H, HV, K, V
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1),
    "no whole vector": (2, 1, 1, 2, 60, 33),
    "grouped heads, padded tile": (1, 2, 2, 6, 100, 60),
    "whole tiles": (2, 1, 1, 1, 128, 64),
    "largest": (1, 2, 1, 1, 256, 100),
    "all tokens": (1, 8, 1, 1, 64, 16),
    "three tokens": (3, 3, 1, 2, 16, 8),
}
V_FIRST = pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])


def make(B, T, H, HV, K, V, *, dtype=torch.float32, state_dtype=None, v_first=True, P=None, seed=0):
    """The keyword arguments of a call, with a pool of P slots (default B)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": randn(B, T, H, K).to(dtype),
        "k": randn(B, T, H, K).to(dtype),
        "v": randn(B, T, HV, V).to(dtype),
        "state": randn(P or B, HV, *((V, K) if v_first else (K, V))).to(state_dtype or dtype),
        "A_log": randn(HV).to(gates),
        "a": randn(B, T, HV).to(gates),
        "dt_bias": randn(HV).to(gates),
        "b": randn(B, T, HV).to(gates),
        "state_v_first": v_first,
    }


def move(call, device):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in call.items()}


def copy(call):
    return {name: x.clone() if torch.is_tensor(x) else x for name, x in call.items()}


def expected(call, slots=None, **changes):
    """Output and last states [B, ...] of the recurrence in float64, from the slots of each row."""
    call = {
        k: x.cpu().double() if torch.is_tensor(x) else x for k, x in {**call, **changes}.items()
    }
    state = call["state"]
    return naive_recurrent_gated_delta_rule(
        call["q"],
        call["k"],
        call["v"],
        call["a"],
        call["b"],
        call.get("scale"),
        state[: call["q"].shape[0]] if slots is None else state[slots],
        output_final_state=True,
        use_qk_l2norm_in_kernel=call.get("use_qk_l2norm", True),
        use_beta_sigmoid_in_kernel=True,
        state_v_first=call["state_v_first"],
        use_gate_in_kernel=True,
        A_log=call["A_log"],
        dt_bias=call["dt_bias"],
    )


def check(call, limit, state_limit=None):
    o_expected, state_expected = expected(call)
    o = gated_delta_rule_decode(**call)
    assert o.dtype == call["q"].dtype
    assert_close("o", o.cpu(), o_expected, limit)
    assert_close("state", call["state"].cpu(), state_expected, state_limit or limit)


@V_FIRST
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(device, shape, v_first):
    check(move(make(*shape, v_first=v_first), device), LIMITS[torch.float32])


@V_FIRST
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(device, dtype, state_dtype, v_first):
    call = make(1, 2, 1, 2, 64, 24, dtype=dtype, state_dtype=state_dtype, v_first=v_first)
    check(move(call, device), LIMITS[dtype], LIMITS[state_dtype])


@V_FIRST
def test_half_states_with_the_widest_rows(device, v_first):
    call = make(1, 1, 1, 1, 256, 32, state_dtype=torch.bfloat16, v_first=v_first)
    check(move(call, device), LIMITS[torch.float32], LIMITS[torch.bfloat16])


@V_FIRST
def test_float64(v_first):
    check(make(2, 3, 2, 4, 20, 7, dtype=torch.float64, v_first=v_first), LIMITS[torch.float64])


def test_gates_may_have_any_dtype(device):
    call = move(make(2, 1, 1, 2, 16, 8), device)
    call["a"], call["A_log"] = call["a"].bfloat16(), call["A_log"].double()
    call["b"], call["dt_bias"] = call["b"].half(), call["dt_bias"].bfloat16()
    check(call, LIMITS[torch.float32])


@pytest.mark.parametrize(
    "change", [{"scale": 0.0}, {"scale": 0.7}, {"use_qk_l2norm": False}], ids=str
)
def test_options(device, change):
    call = {**make(1, 2, 1, 2, 16, 8), **change}
    call["k"] /= 4  # without the norm, keys longer than one make the state grow
    check(move(call, device), LIMITS[torch.float32])
    if change.get("scale") == 0:
        assert not gated_delta_rule_decode(**move(call, device)).any()


def test_no_dt_bias_and_strong_gates(device):
    call = make(2, 1, 1, 2, 16, 8)
    call["a"][0, 0, 0], call["a"][1, 0, 1] = torch.inf, -200  # a reset and no decay at all
    o_expected, state_expected = expected(call, dt_bias=torch.zeros(2))
    call = move({**call, "dt_bias": None}, device)
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, LIMITS[torch.float32])
    assert_close("state", call["state"].cpu(), state_expected, LIMITS[torch.float32])


@V_FIRST
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_permuted_slots(device, v_first, index):
    call = make(3, 1, 1, 1, 16, 8, P=5, v_first=v_first)
    slots = torch.tensor([4, 0, 3])
    o_expected, state_expected = expected(call, slots)
    pool = call["state"].double()
    pool[slots] = state_expected
    call = move({**call, "state_indices": slots.to(index)}, device)
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, 5e-6)
    assert_close("pool", call["state"].cpu(), pool, 5e-6)


def test_repeated_read_slots_write_elsewhere(device):
    call = make(3, 2, 1, 1, 16, 8, P=6)
    read, write = torch.tensor([1, 1, 2]), torch.tensor([3, 5, 4])
    o_expected, state_expected = expected(call, read)
    pool = call["state"].double()
    pool[write] = state_expected
    call = move({**call, "state_indices": read, "output_state_indices": write.int()}, device)
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, 5e-6)
    assert_close("pool", call["state"].cpu(), pool, 5e-6)


@V_FIRST
def test_padding_rows_give_zero_and_write_nothing(device, v_first):
    call = make(3, 2, 1, 2, 16, 40, P=3, v_first=v_first)
    for name in ("q", "k", "v", "a", "b"):
        call[name][1] = torch.nan
    before = call["state"].clone()
    output = torch.full_like(call["v"], torch.nan)
    snapshots = torch.full((3, 2, *before.shape[1:]), torch.nan)
    indices = torch.tensor([2, -1, 0])
    call = move(
        {**call, "output": output, "snapshots": snapshots, "state_indices": indices}, device
    )
    o = gated_delta_rule_decode(**call)
    assert o is call["output"] and not o[1].any()
    assert o.isfinite().all() and call["state"].isfinite().all()
    assert torch.equal(call["state"][1].cpu(), before[1])
    assert call["snapshots"][1].isnan().all() and call["snapshots"][::2].isfinite().all()


def test_a_negative_output_slot_leaves_the_pool_alone(device):
    call = make(2, 1, 1, 1, 16, 8)
    before = call["state"].clone()
    o_expected, state_expected = expected(call)
    call = move({**call, "output_state_indices": torch.tensor([-1, 1])}, device)
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, 5e-6)
    assert torch.equal(call["state"][0].cpu(), before[0])
    assert_close("state", call["state"][1].cpu(), state_expected[1], 5e-6)


@V_FIRST
def test_slots_apart_with_nan_between_and_in_unused_ones(device, v_first):
    call = make(2, 1, 1, 2, 16, 8, P=4, v_first=v_first)
    P, *slot = call["state"].shape
    buffer = torch.full((P, 300), torch.nan)
    pool = buffer[:, 4 : 4 + 2 * 16 * 8].unflatten(1, slot)
    slots = torch.tensor([3, 1])
    pool[slots] = call["state"][slots]
    o_expected, state_expected = expected(call, slots)
    buffer = buffer.to(device)
    pool = buffer[:, 4 : 4 + 2 * 16 * 8].unflatten(1, slot)
    call = move({**call, "state": None, "state_indices": slots}, device)
    call["state"] = pool
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, 5e-6)
    assert_close("pool", pool[slots.to(device)].cpu(), state_expected, 5e-6)
    pool[slots.to(device)] = torch.nan
    assert buffer.isnan().all()


def test_strided_inputs_equal_contiguous_ones(device):
    B, T, H, HV, K, V = 2, 2, 1, 2, 16, 24
    call = make(B, T, H, HV, K, V)
    fused = torch.randn(B, T, (2 * H * K) + HV * V + 2 * HV, generator=torch.manual_seed(1))
    fused = fused.to(device)
    parts = fused.split([H * K, H * K, HV * V, HV, HV], -1)
    views = [x.unflatten(-1, (h, -1)) for x, h in zip(parts[:3], (H, H, HV), strict=True)]
    strided = dict(zip(("q", "k", "v", "a", "b"), (*views, *parts[3:]), strict=True))
    assert not strided["v"].is_contiguous()
    results = []
    for inputs in (strided, {name: x.contiguous() for name, x in strided.items()}):
        one = {**copy(move(call, device)), **inputs}
        results.append((gated_delta_rule_decode(**one), one["state"]))
    for strided_result, result in zip(*results, strict=True):
        assert torch.equal(strided_result, result)


def test_transposed_inputs_and_strided_output(device):
    call = make(2, 2, 1, 2, 16, 24)
    o_expected, _ = expected(call)
    call = move(call, device)
    call["q"] = call["q"].mT.contiguous().mT  # the last stride is not one
    call["output"] = torch.empty(2, 2, 2, 30, device=device)[..., :24]
    assert_close("o", gated_delta_rule_decode(**call).cpu(), o_expected, 5e-6)


@V_FIRST
def test_snapshots_are_the_states_of_shorter_calls(device, v_first):
    call = make(2, 3, 1, 2, 16, 24, v_first=v_first)
    snapshots = torch.full((2, 3, *call["state"].shape[1:]), torch.nan)
    whole = move({**copy(call), "snapshots": snapshots}, device)
    o = gated_delta_rule_decode(**whole)
    one = move(copy(call), device)
    for t in range(3):
        token = {name: one[name][:, t : t + 1] for name in ("q", "k", "v", "a", "b")}
        o_t = gated_delta_rule_decode(**{**one, **token})
        assert_close("o", o[:, t : t + 1], o_t, 1e-6)
        assert_close("snapshot", whole["snapshots"][:, t], one["state"], 1e-6)
    assert torch.equal(whole["snapshots"][:, 2], whole["state"])


def test_layouts_hold_the_same_state():
    call = make(1, 2, 1, 2, 60, 100)
    other = {**copy(call), "state": call["state"].mT.contiguous(), "state_v_first": False}
    assert_close("o", gated_delta_rule_decode(**other), gated_delta_rule_decode(**call), 1e-6)
    assert_close("state", other["state"].mT, call["state"], 1e-6)


@V_FIRST
def test_every_instruction_set(cpu_isa, v_first):
    check(make(2, 2, 1, 2, 100, 70, v_first=v_first), LIMITS[torch.float32])
    call = make(1, 1, 1, 1, 60, 33, dtype=torch.bfloat16, v_first=v_first)
    check(call, LIMITS[torch.bfloat16])


def test_bits_do_not_depend_on_the_thread_count(threads):
    results = []
    for n in (1, 2, 8):
        threads(n)
        call = make(3, 2, 2, 4, 128, 128)
        results.append((gated_delta_rule_decode(**call), call["state"]))
    for o, state in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(state, results[0][1])


def test_no_rows(device):
    call = move(make(1, 1, 1, 1, 8, 8), device)
    rows = {name: call[name][:0] for name in ("q", "k", "v", "a", "b")}
    before = call["state"].clone()
    assert gated_delta_rule_decode(**{**call, **rows}).shape == (0, 1, 1, 8)
    assert torch.equal(call["state"], before)


def test_reference_has_the_same_semantics():
    call = make(3, 2, 1, 2, 16, 24, P=4)
    call["state_indices"] = torch.tensor([2, -1, 0])
    call["output_state_indices"] = torch.tensor([3, 1, -1])
    results = []
    for backend in ("native", "reference"):
        one = {**copy(call), "snapshots": torch.zeros(3, 2, *call["state"].shape[1:])}
        with _library.use(backend):
            results.append((gated_delta_rule_decode(**one), one["state"], one["snapshots"]))
    for actual, reference in zip(*results, strict=True):
        assert_close("reference", actual, reference, 5e-6)


def test_every_output_element_is_written(device, nan_filled_memory):
    call = move(make(2, 2, 1, 2, 60, 33), device)
    assert gated_delta_rule_decode(**call).isfinite().all()


@pytest.mark.cuda
def test_cuda_graph_replays_with_other_slots_and_tokens():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    call = move(make(2, 1, 1, 2, 128, 128, P=4), "cuda")
    call["state_indices"] = torch.tensor([0, 1], device="cuda")
    gated_delta_rule_decode(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_delta_rule_decode(**call)
    call["state_indices"].copy_(torch.tensor([3, -1]))
    call["q"].normal_()
    one = copy(call)
    graph.replay()
    assert torch.equal(o, gated_delta_rule_decode(**one))
    assert torch.equal(call["state"], one["state"])


def test_opcheck():
    call = make(2, 2, 1, 2, 8, 8, P=3)
    output, snapshots = torch.empty_like(call["v"]), torch.empty(2, 2, *call["state"].shape[1:])
    inputs = [call[name] for name in ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")]
    slots = torch.tensor([2, 0])
    op = torch.ops.deltafuse.gated_delta_decode.default
    torch.library.opcheck(op, (*inputs, 0.5, output, True, slots, None, True, snapshots))
    torch.library.opcheck(op, (*inputs, 0.5, output, False, None, None, True, None))


def test_compiles_without_graph_breaks():
    def step(call):
        return gated_delta_rule_decode(**call) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 3):
        call = make(B, 1, 1, 2, 16, 8, P=4)
        call["state_indices"] = torch.arange(B).flip(0)
        eager = copy(call)
        assert torch.equal(compiled(call), step(eager))
        assert torch.equal(call["state"], eager["state"])


def test_backend_info_names_the_kernel():
    backends = backend_info()["ops"]["gated_delta_decode"]
    assert backends == {
        "cpu": "cpu",
        "cuda": "cuda" if "cuda" in backend_info()["build"] else "reference",
    }


BAD = {
    "q must be": {"q": torch.zeros(2, 8)},
    "k must be": {"k": torch.zeros(2, 1, 1, 7)},
    "v must be": {"v": torch.zeros(3, 1, 2, 8)},
    "multiple of q's H": {"q": torch.zeros(2, 1, 3, 16), "k": torch.zeros(2, 1, 3, 16)},
    r"T must be in 1\.\.8": {
        **{name: torch.zeros(2, 9, 1, 16) for name in ("q", "k")},
        "v": torch.zeros(2, 9, 2, 8),
    },
    "a must be": {"a": torch.zeros(2, 1, 1)},
    "b must be": {"b": torch.zeros(2, 2)},
    "A_log must be": {"A_log": torch.zeros(1)},
    "dt_bias must be": {"dt_bias": torch.zeros(3)},
    "one dtype": {"v": torch.zeros(2, 1, 2, 8).half()},
    "state must be .* got": {"state": torch.zeros(3, 2, 16, 8)},
    "float64": {"state": torch.zeros(3, 2, 8, 16).double()},
    "must be contiguous": {"state": torch.zeros(3, 2, 16, 8).mT},
    "overlap": {"state": torch.zeros(1, 2, 8, 16).expand(3, -1, -1, -1)},
    "slot a row": {"state": torch.zeros(1, 2, 8, 16)},
    "state_indices must be": {"state_indices": torch.zeros(3).long()},
    "output_state_indices must be": {"output_state_indices": torch.zeros(2, 1).int()},
    "state_indices must be below P = 3, got": {"state_indices": torch.tensor([0, 3])},
    "output_state_indices must be below P = 3": {"output_state_indices": torch.tensor([7, 0])},
    "output must be": {"output": torch.zeros(2, 1, 8)},
    "unit last stride": {"output": torch.zeros(2, 1, 2, 16)[..., ::2]},
    "snapshots must be": {"snapshots": torch.zeros(2, 1, 2, 16, 8)},
}
BAD_TYPES = {
    "q must be floating": {"q": torch.zeros(2, 1, 1, 16).int()},
    "state must be floating": {"state": torch.zeros(3, 2, 8, 16).int()},
    "int32 or int64": {"state_indices": torch.zeros(2)},
    "output must be torch.float32": {"output": torch.zeros(2, 1, 2, 8).half()},
    "snapshots must be torch.float32": {"snapshots": torch.zeros(2, 1, 2, 8, 16).half()},
}


@pytest.mark.parametrize(
    "error, message, change",
    [(ValueError, *case) for case in BAD.items()]
    + [(TypeError, *case) for case in BAD_TYPES.items()],
    ids=[*BAD, *BAD_TYPES],
)
def test_bad_input_is_named_before_anything_is_written(error, message, change):
    call = make(2, 1, 1, 2, 16, 8, P=3)
    before = call["state"].clone()
    with pytest.raises(error, match="gated_delta_rule_decode: .*" + message):
        gated_delta_rule_decode(**{**call, **change})
    assert torch.equal(call["state"], before)
