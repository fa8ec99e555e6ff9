"""TC, EC and the token shift: gradients, determinism, torch.compile, opcheck, bad input."""

import re

import pytest
import torch

from ddl_time_cases import LARGE, OPS, PACKED, SHAPES, make_ec, make_tc, packed, tc
from deltafuse import _library
from deltafuse.ddl import ddl_compress_tc, ddl_expand, token_shift
from layer_cases import compare, normal, require_kernel, run

each_op = pytest.mark.parametrize("name", OPS)
TINY = {"tc": (1, 5, 2, 2, 3), "ec": (1, 5, 2, 2, 3), "shift": (1, 5, 2, 3)}


@each_op
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 4]], ids=["whole", "packed"])
def test_gradcheck(name, offsets, threads):
    threads(1)
    function, make, _, count = OPS[name]
    offsets = None if offsets is None else torch.tensor(offsets)
    x = make(TINY[name], torch.float64, states=None if offsets is None else 3)

    def call(*tensors):
        return function(*tensors[: count + 1], offsets)

    together = [t.clone().requires_grad_() for t in x]
    assert torch.autograd.gradcheck(call, together)
    for i in range(count + 1):  # each input alone: the others ask for nothing
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate(x)]
        assert torch.autograd.gradcheck(call, alone)
    without = [t.clone().requires_grad_() for t in x[:count]]
    assert torch.autograd.gradcheck(lambda *t: function(*t, None, offsets)[0], without)


@pytest.mark.parametrize("K", [1, 4])
def test_gradcheck_of_one_tap_and_of_the_fast_path(K, threads):
    threads(1)
    for name, make in (("tc", make_tc), ("ec", make_ec)):
        x = [t.requires_grad_() for t in make((2, 6, 2, 4, K), torch.float64)]
        assert torch.autograd.gradcheck(lambda *t, f=OPS[name][0]: f(*t), x)


@each_op
def test_gradcheck_of_the_mask(name, threads):
    threads(1)
    function, make, _, _ = OPS[name]
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    x = [t.requires_grad_() for t in make(TINY[name], torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: function(*t, attention_mask=mask), x)


def test_gradcheck_of_the_copy():
    x = normal(1, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ddl_expand(x, value_channels=2), x)


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(cpu_isa, name, dtype):
    function, make, shape, _ = OPS[name]
    shapes = [shape]
    if name != "shift":
        shapes = [SHAPES[n] for n in ("one_tap", "as_many_as_taps", "two_taps", "three_taps")]
        shapes += [SHAPES["seven_taps_odd_channels"], LARGE["next_block"], LARGE["next_block_odd"]]
    for shape in shapes:
        compare(function, make(shape, dtype))


@each_op
def test_same_bits_for_any_number_of_threads_and_every_time(name, threads):
    function, make, shape, _ = OPS[name]
    x = make((2, 700, *shape[2:]))
    results = []
    for count in (1, 2, 8, *[1] * 7):
        threads(count)
        outputs, grads = run(function, x)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written(device, nan_filled_memory, name, dtype):
    function, make, shape, _ = OPS[name]
    inputs = [make(shape, dtype), (*packed(name, dtype), PACKED)]
    inputs.append((*make((1, 3, *shape[2:]), dtype, states=1), torch.tensor([0, 0])))
    for tensors in inputs:
        outputs, grads = run(function, [t.to(device) for t in tensors])
        assert all(t.isfinite().all() for t in (*outputs, *grads))


@each_op
def test_no_second_derivative(device, name):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make(shape)[:count]]
    leaf = x[0].requires_grad_()
    (dx,) = torch.autograd.grad(function(*x)[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of the gradient is not implemented"):
        dx.sum().backward()


def raw_arguments(name, packed):
    """Of the raw forward operator, without the last one."""
    _, make, _, count = OPS[name]
    x = [t.requires_grad_() for t in make(TINY[name], torch.float32, states=2 if packed else 1)]
    offsets = torch.tensor([0, 2, 4]) if packed else None
    if name == "shift":
        return *x, offsets
    _, _, d, dv, K = TINY[name]
    return x[0], normal(K, d, dv).requires_grad_(), x[count], offsets


@each_op
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_opcheck(device, name, packed):
    raw = "token_shift" if name == "shift" else f"ddl_{name}"
    require_kernel(f"{raw}_fwd")
    args = [a.to(device).detach().requires_grad_(a.is_floating_point()) if a is not None else a
            for a in raw_arguments(name, packed)]  # fmt: skip
    fwd, bwd = (_library.kernel(f"{raw}_{part}", args[0]).default for part in ("fwd", "bwd"))
    torch.library.opcheck(fwd, (*args, True))
    torch.library.opcheck(fwd, (*args[:-2], None, args[-1], False))
    args = [a.detach() if a is not None else a for a in args]
    y, state = fwd(*args, True)
    for d_state in (None, torch.randn_like(state, dtype=torch.float32)):
        torch.library.opcheck(bwd, (torch.randn_like(y), d_state, *args))


@each_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(name, backend):
    function, make, shape, _ = OPS[name]

    def loss(*tensors, cu_seqlens):
        y, state = function(*tensors, cu_seqlens)
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for T in (9, 14):
        x = make((1, T, *shape[2:]), torch.float32, states=2)
        offsets = torch.tensor([0, 4, T - 1])
        results = []
        for f in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in x]
            results.append(torch.autograd.grad(f(*leaves, cu_seqlens=offsets), leaves))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@each_op
def test_checkpoint_and_autocast(device, name):
    function, make, shape, _ = OPS[name]
    x = [t.to(device).requires_grad_() for t in make(shape)]
    y, _ = function(*x)
    expected = torch.autograd.grad(y.sum(), x)
    again = torch.utils.checkpoint.checkpoint(lambda *t: function(*t)[0], *x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), x), expected))
    with torch.autocast(x[0].device.type, torch.bfloat16):
        cast, _ = function(*x)
    assert torch.equal(cast, y)


@pytest.mark.cuda
@each_op
def test_cuda_graph(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    function, _, _, count = OPS[name]
    x = [t.cuda() for t in (*packed(name), PACKED)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = function(*x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*x)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.cuda
def test_more_than_2_31_elements():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("no GPU with 12 GB")
    T, d, dv = (1 << 21) + 3, 256, 4
    x = torch.zeros(1, T, d, dv, dtype=torch.bfloat16, device="cuda")
    x[0, -4:] = normal(4, d, dv)
    weight, read = normal(d * dv, 4).cuda(), normal(dv).cuda()
    y = ddl_compress_tc(x, weight, read)
    assert torch.equal(y[:, -4:], ddl_compress_tc(x[:, -4:], weight, read))
    assert y[:, :-4].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_float64_on_cuda_is_the_reference(emulated, dtype):
    x = make_tc((1, 5, 3, 2, 4), dtype)
    with _library.use("reference"):
        expected = tc(*x)
    assert all(map(torch.equal, tc(*x), expected))


X, E, V = normal(2, 6, 5, 4), normal(2, 6, 5), normal(2, 6, 3, 8)
W, R, TAPS, P = normal(20, 4), normal(4), normal(20, 1, 4), normal(2, 6, 3)
OFFSETS = torch.tensor([0, 6])
BAD = {
    "x is 3-d": (lambda: ddl_compress_tc(E, W, R), ValueError, r"x must be \[B, T, d, d_v\]"),
    "other channels": (lambda: ddl_compress_tc(X, W[1:], R), ValueError, r"\(20, 4\), got \(19, 4"),
    "no tap": (lambda: ddl_compress_tc(X, W[:, :0], R), ValueError, r"K >= 1 .*\(20, 0\)"),
    "short read": (lambda: ddl_compress_tc(X, W, R[1:]), ValueError, r"read .*\(4,\), got \(3,\)"),
    "short state": (
        lambda: ddl_compress_tc(X, W, R, initial_state=normal(2, 20, 2)),
        ValueError,
        r"initial_state .*\(2, 20, 3\), got \(2, 20, 2\)",
    ),
    "offsets with B = 2": (
        lambda: ddl_compress_tc(X, W, R, cu_seqlens=OFFSETS),
        ValueError,
        r"cu_seqlens \(2,\) and x \(2, 6, 5, 4\)",
    ),
    "offsets of floats": (
        lambda: ddl_compress_tc(X[:1], W, R, cu_seqlens=OFFSETS.float()),
        ValueError,
        "int32 or int64, got torch.float32",
    ),
    "mask of other tokens": (
        lambda: ddl_compress_tc(X, W, R, attention_mask=torch.ones(2, 5)),
        ValueError,
        r"attention_mask .*\(2, 6\), got \(2, 5\)",
    ),
    "integers": (lambda: ddl_compress_tc(X.int(), W, R), TypeError, "x must be floating point"),
    "complex": (lambda: ddl_compress_tc(X, W, R.cfloat()), TypeError, "read must be floating"),
    "two devices": (lambda: ddl_compress_tc(X, W.to("meta"), R), TypeError, "weight on meta"),
    "wide state": (
        lambda: ddl_compress_tc(normal(1, 1, 1, 17), normal(17, 4), normal(17)),
        ValueError,
        r"d_v in 1..16, got d 1 and d_v 17",
    ),
    "expand: x is 4-d": (lambda: ddl_expand(X, TAPS), ValueError, r"x must be \[B, T, d\]"),
    "expand: 2-d taps": (lambda: ddl_expand(E, W), ValueError, r"value_channels, 1, K\]"),
    "expand: channels": (lambda: ddl_expand(E, TAPS, 2), ValueError, r"\(10, 1, 4\), got \(20, 1"),
    "expand: no channel": (lambda: ddl_expand(E, value_channels=0), ValueError, "d_v 0"),
    "expand: state of the copy": (
        lambda: ddl_expand(E, initial_state=normal(2, 5, 3)),
        ValueError,
        r"\(2, 5, 0\), got \(2, 5, 3\)",
    ),
    "shift: weights": (lambda: token_shift(V, P, P[:, 1:]), ValueError, r"curr_weight .*\(2, 6, 3"),
    "shift: cache": (
        lambda: token_shift(V, P, P, cache=normal(2, 3, 7)),
        ValueError,
        r"cache .*\(2, 3, 8\), got \(2, 3, 7\)",
    ),
    "shift: integers": (lambda: token_shift(V, P, P.long()), TypeError, "curr_weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


BAD_OFFSETS = {"first": [1, 6], "order": [0, 5, 4], "end": [0, 7]}


@each_op
@pytest.mark.parametrize("kind", BAD_OFFSETS)
def test_bad_offsets_on_the_cpu(name, kind):
    offsets = BAD_OFFSETS[kind]
    function, make, shape, count = OPS[name]
    x = make((1, 6, *shape[2:]))[:count]
    message = f"cu_seqlens must rise from 0 to at most T = 6, got {offsets}"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*x, None, torch.tensor(offsets))
