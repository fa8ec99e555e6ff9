"""Bits, memory and layouts of the learned rotations; compilation and operator checks."""

import pytest
import torch

from deltafuse import _library, grape
from grape_frame_cases import BF16, F32, F64, check, error, mixture_inputs, normal, run
from test_grape_frame import basis_inputs, frame_inputs

SHAPES = [(2, 70, 3, 40, 3), (1, 130, 2, 64, 1)]
OPS = {
    "frame": (grape.frame_rotate, frame_inputs),
    "mixture": (grape.mixture_rotate, mixture_inputs),
}
each_op = pytest.mark.parametrize("function, make", OPS.values(), ids=OPS)


def outcome(function, inputs):
    y, grads = run(function, inputs)
    return [y, *grads]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_op
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_thread_count(function, make, shape, dtype, threads):
    inputs = make(*shape, dtype=dtype)
    threads(1)
    single = outcome(function, inputs)
    threads(2)
    assert equal(outcome(function, inputs), single) and equal(outcome(function, inputs), single)


@each_op
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_that_was_not_written(function, make, dtype, nan_filled_memory, device):
    # only a warning where a product of PyTorch is not deterministic; memory is filled all the same
    torch.use_deterministic_algorithms(True, warn_only=True)
    inputs = [v.to(device) for v in make(*SHAPES[0], dtype=dtype)]
    check(function, inputs, dtype)


@each_op
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_each_instruction_set(function, make, dtype, cpu_isa):
    check(function, make(*SHAPES[0], dtype=dtype), dtype)
    check(function, make(1, 5, 1, 16, 8, dtype=dtype), dtype)


@pytest.mark.parametrize("frame", ["internal", "ambient"])
def test_basis_on_each_instruction_set(frame, cpu_isa):
    q, _, *rest = basis_inputs(1, 37, 2, 18, F32)
    check(lambda q, B, theta, t: grape.basis_rotate(q, None, B, theta, t, frame), [q, *rest], F32)


@each_op
def test_any_strides_and_canaries(function, make, device):
    x, *rest = (v.to(device) for v in make(2, 9, 3, 24, 2, dtype=F32))
    inputs = [x, *rest]
    exact = outcome(function, inputs)
    buffer = torch.full((2, 3, 11, 40), 7.0, device=device)
    buffer[:, :, 1:-1, 8:32] = x.transpose(1, 2)
    view = buffer[:, :, 1:-1, 8:32].transpose(1, 2)
    assert torch.equal(function(view, *rest), exact[0])
    spread = torch.stack((x, x + 1), -1)[..., 0]
    assert torch.equal(function(spread, *rest), exact[0])
    wide = torch.cat((x, x), 2)[:, :, ::2][:, :, :3]  # heads two apart
    assert torch.equal(function(wide, *rest), function(wide.contiguous(), *rest))
    dy = normal(*x.shape, seed=3, dtype=F32).to(device)
    leaf = x.detach().requires_grad_()
    grads = [
        torch.autograd.grad(function(leaf, *rest), leaf, d)[0]
        for d in (dy, dy.transpose(1, 2).contiguous().transpose(1, 2), dy.mT.contiguous().mT)
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    summed = torch.autograd.grad(function(leaf, *rest).sum(), leaf)[0]  # a gradient of strides 0
    assert (
        error(summed, torch.autograd.grad(function(leaf, *rest), leaf, torch.ones_like(x))[0]) == 0
    )
    canary = buffer.clone()
    canary[:, :, 1:-1, 8:32] = 7
    assert (canary == 7).all()


@each_op
def test_heads_and_rows_of_the_batch_are_independent(function, make):
    x, *rest, t = make(3, 9, 4, 24, 2, dtype=F32)
    y = function(x, *rest, t)
    heads, rows = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = function(x[rows][:, :, heads], *(v[heads] for v in rest), t[rows])
    assert torch.equal(moved, y[rows][:, :, heads])


@each_op
def test_only_the_gradients_that_are_needed(function, make):
    inputs = make(1, 9, 2, 24, 2)
    _, exact = run(function, inputs)
    dy = normal(1, 9, 2, 24, seed=11, dtype=BF16).double()
    for i in range(len(inputs)):
        leaves = [v.detach().requires_grad_(n == i) for n, v in enumerate(inputs)]
        (grad,) = torch.autograd.grad(function(*leaves), leaves[i], dy)
        assert error(grad, exact[i]) <= 1e-14


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype):
    x, a, b, omega, t = mixture_inputs(2, 3, 2, 8, 2, dtype=dtype)
    frame = grape.prepare_frame(a, b, omega)
    ops, t = torch.ops.deltafuse, t.double()
    leaf, planes = x.requires_grad_(), [v.requires_grad_() for v in (a, b, omega)]
    torch.library.opcheck(ops.grape_frame_fwd, (leaf, *frame, t))
    torch.library.opcheck(ops.grape_frame_fwd, (leaf, None, normal(2, 4), t))
    torch.library.opcheck(ops.grape_mixture_fwd, (leaf, *planes, t.requires_grad_(), *frame))
    for wanted in range(8):
        args = (normal(2, 3, 2, 8, dtype=dtype), x.detach(), *frame, t.detach(), wanted)
        torch.library.opcheck(ops.grape_frame_bwd, args)
    S = normal(2, 4, 4)
    torch.library.opcheck(ops.grape_skew_tridiagonal, (S - S.mT,))


def _mixture(x, a, b, omega, t):
    return grape.mixture_rotate(x, a, b, omega, t)


def _basis(x, A, theta, t):
    return grape.basis_rotate(x, None, grape.cayley_basis(A), theta, t)


COMPILED = [
    ("mixture", "aot_eager"),
    # Inductor writes 20 s of C++ for the small matrices of the planes' gradients
    pytest.param("mixture", "inductor", marks=pytest.mark.slow),
    ("frame", "inductor"),
    ("basis", "inductor"),
]


@pytest.mark.parametrize("name, backend", COMPILED)
def test_compiles_whole(name, backend):
    torch._dynamo.reset()
    function = {"mixture": _mixture, "frame": grape.frame_rotate, "basis": _basis}[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 9):
        if name == "mixture":
            inputs = mixture_inputs(2, T, 2, 16, 2, dtype=F32)
        elif name == "frame":
            inputs = frame_inputs(2, T, 2, 16, 2, dtype=F32)
        else:
            q, _, _, theta, t = basis_inputs(2, T, 2, 16, F32)
            inputs = [q, normal(2, 16, 16, dtype=F32), theta, t]
        for a, b in zip(outcome(compiled, inputs), outcome(function, inputs), strict=True):
            assert error(a, b) <= 2e-6


def test_the_reference_backend_has_the_same_gradients():
    inputs = mixture_inputs(1, 9, 2, 24, 2)
    native = outcome(grape.mixture_rotate, inputs)
    with _library.use("reference"):
        for a, b in zip(native, outcome(grape.mixture_rotate, inputs), strict=True):
            assert error(a, b) <= 1e-12


def test_a_given_frame_leaves_the_gradients_alone():
    inputs = mixture_inputs(1, 9, 2, 24, 2)
    frame = grape.prepare_frame(*inputs[1:4])
    given = outcome(lambda *v: grape.mixture_rotate(*v, frame=frame), inputs)
    assert equal(given, outcome(grape.mixture_rotate, inputs))


class Mixture(torch.nn.Module):
    def __init__(self, a, b, omega):
        super().__init__()
        self.a, self.b, self.omega = (torch.nn.Parameter(v) for v in (a, b, omega))

    def forward(self, x, t):
        return grape.mixture_rotate(x, self.a, self.b, self.omega, t)


def test_export():
    x, *planes, t = mixture_inputs(2, 9, 2, 16, 2, dtype=F32)
    module, T = Mixture(*planes), torch.export.Dim("T", min=2, max=64)
    exported = torch.export.export(module, (x, t), dynamic_shapes=({1: T}, {1: T}))
    x, *_, t = mixture_inputs(2, 33, 2, 16, 2, dtype=F32)
    assert torch.equal(exported.module()(x, t), module(x, t))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_autocast_changes_nothing(dtype):
    inputs = mixture_inputs(1, 9, 2, 24, 2, dtype=dtype)
    plain = outcome(grape.mixture_rotate, inputs)
    with torch.autocast("cpu", BF16):
        assert equal(outcome(grape.mixture_rotate, inputs), plain)
