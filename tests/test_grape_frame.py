"""Rotations by a frame and in a basis, and the orthogonal parametrisations."""

import pytest
import torch

from deltafuse import _library, grape
from grape_frame_cases import (
    BF16,
    DTYPES,
    F32,
    F64,
    check,
    error,
    normal,
    positions,
)

# B, T, H, D, r
SHAPES = [
    (1, 1, 1, 2, 1),
    (2, 37, 3, 24, 2),
    (1, 65, 2, 40, 7),
    (1, 9, 1, 128, 8),
    (1, 3, 2, 33, 16),
    (2, 0, 2, 16, 2),
    (1, 3, 2, 16, 0),  # no plane
]


def frame_inputs(B, T, H, D, r, dtype=F64, seed=0):
    """x, W, theta, t."""
    W = torch.linalg.qr(normal(H, D, max(2 * r, 1), seed=seed + 1))[0][..., : 2 * r]
    wide = F64 if dtype == F64 else F32
    return [
        normal(B, T, H, D, seed=seed, dtype=dtype),
        W.to(wide).contiguous(),
        normal(H, r, seed=seed + 2, dtype=wide),
        positions(B, T, seed=seed + 3).to(wide),
    ]


def basis_inputs(B, T, H, D, dtype=F64):
    """q, k, basis, theta, t."""
    wide = F64 if dtype == F64 else F32
    q, k = (normal(B, T, H, D, seed=i, dtype=dtype) for i in range(2))
    basis = grape.cayley_basis(normal(H, D, D, seed=2)).to(wide)
    return [q, k, basis, normal(H, D // 2, seed=3, dtype=wide), positions(B, T, seed=4).to(wide)]


def explicit(x, W, theta, t):
    """y = x + W (Rc - I) W^T x by matrices, in float64."""
    f = t.double()[..., None, None] * theta.double()
    less_one, turn = -2 * (f / 2).sin() ** 2, f.sin()
    R = torch.stack((torch.stack((less_one, turn), -1), torch.stack((-turn, less_one), -1)), -2)
    c = torch.einsum("bthd,hdk->bthk", x.double(), W.double()).unflatten(-1, (-1, 2))
    delta = torch.einsum("bthkij,bthkj->bthki", R, c).flatten(-2)
    return x.double() + torch.einsum("bthk,hdk->bthd", delta, W.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_equation(shape):
    inputs = frame_inputs(*shape)
    with _library.use("reference"):
        assert error(grape.frame_rotate(*inputs), explicit(*inputs)) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, device):
    if dtype == F64 and _library._current != _library.NATIVE:
        pytest.skip("no float64 kernels on CUDA")
    check(grape.frame_rotate, [v.to(device) for v in frame_inputs(*shape, dtype=dtype)], dtype)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 2, 6, 1), (2, 2, 1, 7, 3)], ids=str)
def test_gradcheck(shape, which):
    inputs = frame_inputs(*shape)
    inputs[3] = inputs[3] / 20
    for i in which:
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(grape.frame_rotate, inputs, atol=1e-6)


@pytest.mark.parametrize("frame", ["internal", "ambient"])
def test_gradcheck_of_basis(frame):
    q, _, *rest = basis_inputs(1, 3, 2, 6)
    inputs = [v.requires_grad_() for v in (q, *rest[:2], rest[2] / 20)]
    assert torch.autograd.gradcheck(
        lambda q, B, theta, t: grape.basis_rotate(q, None, B, theta, t, frame), inputs, atol=1e-6
    )


@pytest.mark.parametrize("frame", ["internal", "ambient"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_basis(dtype, frame, device):
    if dtype == F64 and _library._current != _library.NATIVE:
        pytest.skip("no float64 kernels on CUDA")
    q, k, *rest = (v.to(device) for v in basis_inputs(2, 37, 2, 32, dtype))

    def rotate(q, B, theta, t):
        return grape.basis_rotate(q, None, B, theta, t, frame)

    check(rotate, [q, *rest], dtype)
    both = grape.basis_rotate(q, k, *rest, output_frame=frame)
    assert torch.equal(both[0], rotate(q, *rest)) and torch.equal(both[1], rotate(k, *rest))


def test_basis_is_a_rotation_about_it():
    q, k, B, theta, t = basis_inputs(1, 9, 2, 16)
    f = t[..., None, None] * theta
    inner = torch.einsum("bthd,hde->bthe", q, B)
    c0, c1 = inner[..., ::2], inner[..., 1::2]
    turned = torch.stack((c0 * f.cos() + c1 * f.sin(), c1 * f.cos() - c0 * f.sin()), -1).flatten(-2)
    internal = grape.basis_rotate(q, None, B, theta, t)
    assert error(internal, turned) <= 1e-13
    ambient = grape.basis_rotate(q, k, B, theta, t, output_frame="ambient")
    assert error(ambient[0], torch.einsum("bthe,hde->bthd", turned, B)) <= 1e-13

    def logits(q, k):
        return torch.einsum("bihd,bjhd->bhij", q, k)

    assert error(logits(*grape.basis_rotate(q, k, B, theta, t)), logits(*ambient)) <= 1e-13
    shared = grape.basis_rotate(q, k[:, :, :1], B[:1], theta[:1], t)
    assert error(shared[0][:, :, 0], internal[:, :, 0]) <= 1e-14 and shared[1].shape[2] == 1


def test_the_inner_basis_stays_float32_under_autocast():
    q, k, *rest = basis_inputs(1, 9, 2, 16, F32)
    plain = grape.basis_rotate(q, k, *rest)
    with torch.autocast("cpu", BF16):
        assert all(
            torch.equal(x, y) for x, y in zip(grape.basis_rotate(q, k, *rest), plain, strict=True)
        )


@pytest.mark.parametrize("D", [1, 2, 7, 64])
def test_orthogonal_bases(D):
    eye = torch.eye(D, dtype=F64)
    for B in (
        grape.cayley_basis(normal(3, D, D)),
        *(grape.householder_basis(normal(3, m, D)) for m in {1, (D + 1) // 2, D}),
    ):
        assert B.shape == (3, D, D) and error(B @ B.mT, eye.expand(3, D, D)) <= 1e-13
    assert error(torch.linalg.det(grape.cayley_basis(normal(3, D, D))), torch.ones(3)) <= 1e-12
    assert torch.equal(grape.cayley_basis(torch.zeros(D, D)), torch.eye(D))
    V, product = normal(2, D, D), eye
    for v in V[1]:
        product = product @ (eye - 2 * torch.outer(v, v) / (v @ v))
    assert error(grape.householder_basis(V)[1], product) <= 1e-13
    assert grape.cayley_basis(normal(2, D, D, dtype=BF16)).dtype == F32
    assert grape.householder_basis(normal(2, 1, D, dtype=F32)).dtype == F32


def test_gradcheck_of_orthogonal_bases():
    for make, shape in ((grape.cayley_basis, (2, 5, 5)), (grape.householder_basis, (2, 3, 5))):
        assert torch.autograd.gradcheck(make, normal(*shape).requires_grad_(), atol=1e-6)


def test_a_basis_is_trained_through_its_parametrisation():
    """A step along the gradient of Cayley's parameter lowers the loss, and stays orthogonal."""
    q, _, _, theta, t = basis_inputs(1, 9, 2, 8)
    A = normal(2, 8, 8, seed=5).requires_grad_()
    target = normal(1, 9, 2, 8, seed=6)

    def loss(A):
        y = grape.basis_rotate(q, None, grape.cayley_basis(A), theta, t, "ambient")
        return (y - target).square().sum()

    (dA,) = torch.autograd.grad(loss(A), A)
    assert loss(A - 1e-4 * dA) < loss(A) and torch.autograd.gradcheck(loss, A, atol=1e-6)


X, W, THETA, T_ = frame_inputs(1, 3, 2, 8, 2, F32)
A, OMEGA = normal(2, 2, 8), normal(2, 2)
BAD = {
    "dims of x": (lambda: grape.frame_rotate(X[0, 0], W, THETA, T_), r"x must be \[B, T, H, D\]"),
    "W": (lambda: grape.frame_rotate(X, W[..., :2], THETA, T_), r"W must be \[H, D, 2 r\]"),
    "heads": (lambda: grape.frame_rotate(X, W[:1], THETA[:1], T_), "theta must be .* H of x"),
    "2 r > D": (
        lambda: grape.frame_rotate(X[..., :2], W[:, :2], THETA, T_),
        "2 r must be at most D, got r = 2 planes in D = 2",
    ),
    "t": (lambda: grape.frame_rotate(X, W, THETA, T_[:, :2]), r"broadcastable to \(1, 3\)"),
    "dims of t": (lambda: grape.frame_rotate(X, W, THETA, T_[None]), "broadcastable"),
    "packed t": (lambda: grape.frame_rotate(X[0], W, THETA, T_), r"broadcastable to \(3,\)"),
    "planes": (lambda: grape.mixture_rotate(X, A[0], A[0], OMEGA, T_), r"a must be \[H, r, D\]"),
    "b": (lambda: grape.mixture_rotate(X, A, A[:, :1], OMEGA, T_), "b must be the shape of a"),
    "omega": (lambda: grape.mixture_rotate(X, A, A, OMEGA[:1], T_), r"omega must be \[H, r\]"),
    "D": (lambda: grape.mixture_rotate(X, *[A[..., :6]] * 2, OMEGA, T_), "the H and D of x"),
    "many planes": (
        lambda: grape.prepare_frame(normal(1, 3, 4), normal(1, 3, 4), normal(1, 3)),
        "2 r must be at most D, got r = 3 planes in D = 4",
    ),
    "another frame": (
        lambda: grape.mixture_rotate(X, A, A, OMEGA, T_, frame=(W[..., :2], THETA[:, :1])),
        "theta of the frame",
    ),
    "rank 2": (lambda: grape.rank2_rotate(X, A, A, T_), r"a must be \[H, D\]"),
    "speed": (lambda: grape.rank2_rotate(X, A[0], A[0], T_, OMEGA), "omega must be a number or"),
    "output_frame": (
        lambda: grape.basis_rotate(X, X, normal(2, 8, 8), normal(2, 4), T_, "outer"),
        "must be 'internal' or 'ambient', got 'outer'",
    ),
    "basis": (
        lambda: grape.basis_rotate(X, X, normal(2, 8, 6), normal(2, 4), T_),
        r"W must be \[H, D, 2 r\]",
    ),
    "odd D": (
        lambda: grape.basis_rotate(X[..., :7], None, normal(2, 7, 7), normal(2, 3), T_),
        "D must be even",
    ),
    "square": (lambda: grape.cayley_basis(normal(3, 4)), r"A must be \[..., D, D\]"),
    "reflections": (lambda: grape.householder_basis(normal(4, 3)), "m <= D"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: grape.frame_rotate(X.long(), W, THETA, T_), "x must be floating point"),
        (lambda: grape.frame_rotate(X, W, THETA, T_ > 0), "t must be integer or floating"),
        (lambda: grape.frame_rotate(X, W.to(torch.complex64), THETA, T_), "W must be floating"),
        (lambda: grape.mixture_rotate(X, A, A.int(), OMEGA, T_), "b must be floating point"),
        (lambda: grape.prepare_frame(A.int(), A, OMEGA), "a must be floating point"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_several_devices():
    with pytest.raises(ValueError, match="one device"):
        grape.frame_rotate(X, W.to("meta"), THETA, T_)


def test_no_second_derivative():
    inputs = [v.requires_grad_() for v in frame_inputs(1, 3, 2, 6, 1)]
    y = grape.frame_rotate(*inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        dx.sum().backward()
