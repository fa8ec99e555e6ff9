"""The CUDA forward of the chunked gated delta rule: results, what it saves, segments."""

import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICES
from deltafuse import _library, backend_info
from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule, ops
from deltafuse.testing import assert_close, relative_error
from gated_delta_cases import FUSED, LIMITS, Case, exactly, make
from test_gated_delta_regimes import BETAS, GATES, replaced

on_cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)

# each width of K of the kernels with 64 and with 128 rows of V, whole vectors and single elements,
# T around chunks of 32 and 64 tokens
CASES = {
    "K64 V64": Case(T=65, H=1, HV=2, K=64, V=64),
    "K64 V128 group4": Case(T=33, H=1, HV=4, K=64, V=128),
    "K128 V128": Case(B=2, T=70, H=1, HV=1, K=128, V=128),
    "K128 V64": Case(T=64, H=1, HV=1, K=128, V=64, h0=False),
    "K96 V72": Case(T=63, H=2, HV=2, K=96, V=72),
    "K256 V256": Case(T=65, H=1, HV=1, K=256, V=256),
    "K192 V16": Case(T=130, H=1, HV=3, K=192, V=16),
    "elements": Case(T=66, H=2, HV=2, K=17, V=131),
    "elements, wide": Case(T=35, H=1, HV=2, K=130, V=3),
    "packed": Case(T=210, HV=2, K=64, V=72, lengths=(0, 1, 63, 0, 64, 65, 0)),  # 17 of tail
    "packed elements": Case(T=75, HV=2, K=33, V=5, lengths=(33, 0, 31)),
}
PACKED = CASES["packed"]


# so many heads that a CTA has 128 rows of V
MANY = Case(T=17, H=5, HV=110, K=64, V=128, h0=False)


def leaves(x):
    return {name: t.detach() for name, t in x.items()}


def forward(x, **options):
    return chunk_gated_delta_rule(**leaves(x), output_final_state=True, **options)


def check(x, factor=1, limit=None, given=None, **options):
    """o and S_T against the float64 recurrence, which does not know the options of `given`."""
    o, ht = forward(x, **(given or {}), **options)
    expected = naive_recurrent_gated_delta_rule(
        **leaves(exactly(x)), output_final_state=True, **options
    )
    limit = limit or factor * LIMITS[x["q"].dtype][0]
    for name, got, want in zip(("o", "ht"), (o, ht), expected, strict=True):
        if want.abs().amax() > 1e-30:
            assert_close(name, got.cpu(), want, limit)
        else:
            assert got.abs().amax() <= 1e-30, name
    return o, ht


@on_cuda
@dtypes
@pytest.mark.parametrize("name", CASES)
def test_results(device, name, dtype):
    check(make(CASES[name], dtype, device))


@on_cuda
@pytest.mark.parametrize("K, precision", [(64, "high"), (128, "fast")])
def test_many_heads_have_the_bits_of_few(device, K, precision):
    """Two state warpgroups a CTA, and one: the same sums."""
    x = leaves(make(MANY._replace(K=K), BF16, device))
    few = {m: t[:, :, :22] if m in ("v", "g", "beta") else t[:, :, :1] for m, t in x.items()}
    few = check(few, given={"precision": precision})
    many = forward(x, precision=precision)
    assert torch.equal(many[0][:, :, :22], few[0]) and torch.equal(many[1][:, :22], few[1])


@on_cuda
@dtypes
@pytest.mark.parametrize("name", ["K64 V128 group4", "K96 V72", "packed elements"])
def test_fused(device, name, dtype):
    x = make(CASES[name], dtype, device, fused=True)
    check(x, 2, **FUSED)
    check(x, 2, **FUSED, given={"precision": "fast"})


@on_cuda
@dtypes
def test_layouts_and_strides_bitwise(device, dtype):
    x = leaves(make(Case(T=70, H=2, HV=2, K=64, V=64), dtype, device))
    o, ht = forward(x)
    state = x["initial_state"].transpose(2, 3).contiguous()
    o2, ht2 = forward({**x, "initial_state": state}, state_v_first=True)
    assert torch.equal(o, o2) and torch.equal(ht, ht2.transpose(2, 3))
    qkv = torch.cat([x["q"], x["k"], x["v"]], dim=2)
    views = dict(zip("qkv", qkv.split(2, dim=2), strict=True))
    assert not views["k"].is_contiguous()
    assert torch.equal(forward({**x, **views})[0], o)
    shifted = {n: torch.cat([x[n][..., :1], x[n]], dim=3)[..., 1:] for n in "qkv"}  # no vectors
    assert_close("o", forward({**x, **shifted})[0], o.double(), LIMITS[dtype][0])


@on_cuda
def test_scale_zero_and_other_types_of_gates(device):
    x = make(Case(T=66, HV=2, K=64, V=16), BF16, device)
    assert not forward(x, scale=0)[0].any()
    low = {n: x[n].to(BF16) for n in ("g", "beta", "initial_state")}
    check({**x, **low})


@on_cuda
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gate_regimes(device, gate, dtype):
    x = make(Case(T=130, HV=2, K=64, V=16), dtype, device)
    check(replaced(x, g=GATES[gate](x["g"].shape).to(device)))


@on_cuda
@pytest.mark.parametrize("beta", BETAS)
def test_beta_regimes(device, beta):
    x = make(Case(T=130, HV=2, K=64, V=16), BF16, device)
    check(replaced(x, beta=BETAS[beta](x["beta"].shape).to(device)), 2)


@on_cuda
@pytest.mark.parametrize(
    "dtype, precision, limit",
    [(BF16, "fast", 4e-2), (BF16, "high", 4e-3), (F16, "high", 1e-3), (F32, None, 1e-5)],
    ids=str,
)
@pytest.mark.parametrize("K", [64, 128])
def test_identical_keys(device, dtype, precision, limit, K):
    """The inverse is as large as it can be, and errors of T' add up: beta 1.9, no decay."""
    x = make(Case(T=300, HV=1, K=K, V=32, h0=False), F32, device)
    key = x["k"][:, :1].expand(1, 300, 1, K)
    beta, g = torch.full_like(x["beta"], 1.9), torch.zeros_like(x["g"])
    x = {**x, "k": key, "beta": beta, "g": g}
    x = {n: t.to(dtype) if n in "qkv" else t for n, t in x.items()}
    check(x, limit=limit, given={"precision": precision})


def raw(x, save, **options):
    """The raw operator's results for plain inputs."""
    x = leaves(x)
    cu_seqlens = x.pop("cu_seqlens", None)
    call = ops.Call(
        *(x[n] for n in ("q", "k", "v", "g", "beta")),
        x.get("initial_state"), cu_seqlens, None, None,
        0.1, False, 0.0, False, 64, False, 0, False,
    )._replace(**options)  # fmt: skip
    return _library.kernel("gated_delta_fwd", call.q)(*call, True, save)


def slots(case, C):
    """(slot, first token, rows, sequence) of every chunk."""
    lengths = case.lengths or (case.T,) * case.B
    begin, slot = 0, 0
    for n, length in enumerate(lengths):
        slot = begin // C + n if case.lengths else slot
        for c in range(-(-length // C)):
            yield slot + c, n, begin * bool(case.lengths) + c * C, min(C, length - c * C)
        begin += length
        slot += -(-length // C)


@on_cuda
@dtypes
@pytest.mark.parametrize("name", ["K64 V64", "K96 V72", "packed", "K256 V256"])
@pytest.mark.parametrize("split", [-1, 1])
def test_saved(device, name, dtype, split):
    """T' and the entering states of every chunk, against float64; the padding is zero."""
    case, C = CASES[name], ops.cuda_chunk(dtype)
    x = make(case, dtype, device)
    saved = raw(x, ops.STATES, split=split)[2].cpu().double()
    square, Kp, Vp = C * C, -(-case.K // 64) * 64, -(-case.V // 64) * 64
    parts = 1 if dtype == F32 else 2
    ref = leaves(exactly(x))
    ref.pop("cu_seqlens", None)
    for slot, n, first, rows in slots(case, C):
        row = 0 if case.lengths else n
        begin = sum(case.lengths[:n]) if case.lengths else 0
        before = {m: t[row : row + 1, begin:first] for m, t in ref.items() if m != "initial_state"}
        start = ref["initial_state"][n : n + 1]
        state = naive_recurrent_gated_delta_rule(
            **before, initial_state=start, output_final_state=True
        )[1][0]
        for head in range(case.HV):
            got = saved[slot, head]
            here = slice(first, first + rows)
            k = ref["k"][row, here, head // (case.HV // case.H)]
            g, beta = (ref[m][row, here, head] for m in ("g", "beta"))
            G = g.clamp(min=-88).cumsum(0)
            decay = (G[:, None] - G).tril().exp().tril(-1)
            inverse = torch.linalg.inv(torch.eye(rows) + decay * (k @ k.T) * beta)
            whole = torch.eye(C, dtype=torch.float64)
            whole[:rows, :rows] = inverse
            sum_of_parts = got[: parts * square].view(parts, C, C).sum(0)
            assert (sum_of_parts - whole).abs().amax() < (1e-6 if dtype == F32 else 2e-5)
            padded = F.pad(state[head].T, (0, Kp - case.K, 0, Vp - case.V))
            at = got[parts * square :].view(Vp, Kp)
            assert_close("S", at, padded, LIMITS[dtype][0])
            assert not at[case.V :].any() and not at[:, case.K :].any()
    only = raw(x, ops.INVERSES, split=split)[2].cpu().double()
    kept = [slot for slot, *_ in slots(case, C)]
    assert torch.equal(only[kept], saved[kept][..., : parts * square])


def check_segments(x, dtype):
    """Cut and whole differ by two roundings of 16 bits: cut may not be further from float64."""
    split, whole = (forward(x, auto_cp=cut) for cut in (True, False))
    exact = naive_recurrent_gated_delta_rule(**leaves(exactly(x)), output_final_state=True)
    for a, b, want in zip(split, whole, exact, strict=True):
        assert not torch.equal(a, b)
        errors = [relative_error(y.cpu(), want) for y in (a, b)]
        assert max(errors) <= 2 * LIMITS[dtype][0]
        if dtype == F32:
            assert relative_error(a, b.double()) <= 1e-5
        else:
            assert errors[0] <= 1.1 * errors[1]


@on_cuda
@pytest.mark.parametrize(
    "name, dtype",
    [("K64 V64", F32), ("K64 V64", BF16), ("K96 V72", F16), ("K192 V16", F32), ("K192 V16", BF16)],
    ids=str,
)
def test_segments(device, name, dtype):
    """No gate hides an error of M. 16 chunks make 8 segments, of which six have an M."""
    T = 16 * ops.cuda_chunk(dtype) - 20
    x = make(CASES[name]._replace(T=T, H=1, HV=1), dtype, device)
    check_segments({**x, "g": torch.zeros_like(x["g"])}, dtype)


@on_cuda
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_segments_of_long_keys(device, dtype):
    x = make(Case(T=16 * ops.cuda_chunk(dtype), HV=1, K=64, V=64), dtype, device)
    weak = {"beta": torch.full_like(x["beta"], 0.2), "g": torch.zeros_like(x["g"])}
    check_segments({**x, **weak, "k": 3 * x["k"]}, dtype)


@on_cuda
@dtypes
def test_packed_segments(device, dtype):
    check(make(PACKED, dtype, device), given={"auto_cp": True})


@on_cuda
@pytest.mark.parametrize(
    "case, dtype",
    [(PACKED, BF16), (Case(T=1201, HV=1, K=16, V=8, lengths=(101, 1100)), F32)],
    ids=["short", "in segments"],
)
def test_batch_invariance(device, case, dtype):
    """A sequence has the same bits alone and packed with others, cut into segments or not."""
    x = leaves(make(case, dtype, device))
    together = forward(x, batch_invariant=True)
    x.pop("cu_seqlens")
    begin = 0
    for n, length in enumerate(case.lengths):
        end = begin + length
        alone = {m: t[:, begin:end] for m, t in x.items()}
        alone["initial_state"] = x["initial_state"][n : n + 1]
        o, ht = forward(alone, batch_invariant=True)
        assert torch.equal(o, together[0][:, begin:end])
        assert torch.equal(ht, together[1][n : n + 1])
        begin = end


@on_cuda
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("offset_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("K", [64, 33])
def test_packed_edges(device, dtype, offset_type, K):
    """NaN of one sequence, of one head, and of the tail stay where they are."""
    case = PACKED._replace(K=K)
    x = leaves(make(case, dtype, device))
    x["cu_seqlens"] = x["cu_seqlens"].to(offset_type)
    clean, ht = forward(x)
    end = sum(case.lengths)
    assert not clean[:, end:].any()
    for n in (0, 3, 6):  # the empty ones
        assert torch.equal(ht[n], x["initial_state"][n])
    dirty = {m: t.clone() for m, t in x.items()}
    for m in ("q", "k", "v", "g", "beta"):
        dirty[m][:, end:] = float("nan")
        dirty[m][:, 64:128] = float("inf")  # the sequence of 64 tokens
    dirty["v"][:, :64, 1] = float("nan")
    o, dirty_ht = forward(dirty)
    assert torch.equal(o[:, 128:], clean[:, 128:])
    assert torch.equal(o[:, :64, 0], clean[:, :64, 0])
    assert torch.equal(dirty_ht[5], ht[5]) and torch.equal(dirty_ht[2, 0], ht[2, 0])
    assert o[:, 64:128].isnan().any() and o[:, :64, 1].isnan().all()


@on_cuda
def test_empty_inputs(device):
    x = make(Case(B=2, T=0, HV=2, K=64, V=64), BF16, device)
    o, ht = forward(x)
    assert o.shape == (2, 0, 2, 64) and torch.equal(ht, x["initial_state"])
    packed = {**x, **{m: x[m][:1] for m in ("q", "k", "v", "g", "beta")}}
    packed["cu_seqlens"] = torch.zeros(3, dtype=torch.int64, device=device)
    assert torch.equal(forward(packed)[1], x["initial_state"])


@pytest.mark.parametrize("device", [DEVICES[1]], indirect=True)  # too many for the emulator
def test_more_heads_than_a_grid_axis(device):
    """HV N above 2^16: one token each, as o = scale beta (k q) v shows."""
    HV = (1 << 16) + 3
    x = make(Case(T=1, HV=HV, K=1, V=1, h0=False), BF16, device)
    x["g"] = torch.zeros_like(x["g"])
    q, k, v, beta = (x[m].double() for m in ("q", "k", "v", "beta"))
    assert_close("o", forward(x)[0], (beta[..., None] * v) * (q * k), 6e-3)


@on_cuda
def test_float64_runs_on_the_reference(device):
    check(make(Case(T=20, K=5, V=3), torch.float64, device))
    assert backend_info()["ops"]["gated_delta_fwd"]["cuda float64"] == "reference"
