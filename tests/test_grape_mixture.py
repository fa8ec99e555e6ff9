"""Mixtures of planes against the matrix exponential, and the laws of a rotation group."""

import mpmath
import pytest
import torch

from deltafuse import _library, grape
from grape_frame_cases import (
    BF16,
    DEGENERATE,
    DTYPES,
    F16,
    F32,
    F64,
    OUTPUT,
    check,
    degenerate,
    error,
    exact_mixture,
    expected,
    generator,
    mixture_inputs,
    normal,
    run,
)

POSITIONS = [0, 1e-6, -3.7, 10.0, 1e5, 1e7]
PLANES = [(1, 16), (1, 64), (2, 16), (4, 64), (8, 16), (8, 128)]
BACKENDS = ["native", "reference"]
# B, T, H, D, r
SHAPES = [
    (2, 3, 1, 2, 1),  # the smallest head
    (1, 1, 2, 16, 1),  # one token
    (2, 37, 3, 24, 2),  # tokens beyond a tile, two rows of the batch in one
    (1, 33, 2, 40, 7),  # a tail of channels, an odd number of planes
    (1, 40, 2, 64, 4),
    (1, 9, 1, 128, 8),
    (1, 5, 1, 256, 3),  # the widest head of the CUDA kernels
    (1, 3, 2, 33, 16),  # odd D, 2 r = D - 1
    (1, 70, 1, 64, 32),  # 2 r = D
    (0, 3, 2, 16, 2),  # empty
    (2, 0, 2, 16, 2),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with _library.use(request.param):
        yield request.param


def orthonormal(W):
    return (W.mT @ W - torch.eye(W.shape[-1], dtype=W.dtype)).abs().max().item()


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("r, D", PLANES, ids=str)
def test_2_the_matrix_exponential(r, D, kind, backend):
    x, a, b, omega, _ = mixture_inputs(1, len(POSITIONS), 2, D, r)
    a, b, omega = degenerate(kind, a, b, omega)
    t = torch.tensor([POSITIONS], dtype=F64)
    y, exact = grape.mixture_rotate(x, a, b, omega, t), exact_mixture(x, a, b, omega, t)
    turns = t[0].abs() * (omega.abs() * a.norm(dim=-1) * b.norm(dim=-1)).sum(-1).max()
    for n in range(len(POSITIONS)):
        # both sides round L: an angle is known to 1e-16 of t times the size of its terms
        assert error(y[:, n], exact[:, n]) <= 1e-13 + 5e-15 * turns[n].item()
    single = grape.mixture_rotate(x.float(), a, b, omega, t)
    assert error(single, exact) <= OUTPUT[F32] + 5e-15 * turns.max().item()


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("r, D", [(1, 16), (2, 16), (4, 64), (8, 16)], ids=str)
def test_2_gradients_of_the_matrix_exponential(r, D, kind, backend):
    x, a, b, omega, _ = mixture_inputs(1, 4, 2, D, r)
    a, b, omega = degenerate(kind, a, b, omega)
    t = torch.tensor([[0.0, 1e-6, -3.7, 10.0]], dtype=F64)
    inputs = (x, a, b, omega, t)
    _, exact = run(exact_mixture, inputs)
    largest = max(e.abs().max().item() for e in exact)
    for dtype, limit in ((F64, 1e-10), (F32, 1e-4)):
        _, grads = run(grape.mixture_rotate, (x.to(dtype), *inputs[1:]))
        for g, e in zip(grads, exact, strict=True):
            floor = 1e-6 * largest if dtype == F32 else 1e-12 * largest
            assert (g - e).abs().max() <= limit * e.abs().max() + floor


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("r, D", [*PLANES, (64, 128)], ids=str)
def test_the_frame_is_orthonormal(r, D, kind, backend):
    a, b, omega = degenerate(kind, *mixture_inputs(1, 1, 2, D, r)[1:4])
    W, theta = grape.prepare_frame(a, b, omega)
    assert W.shape == (2, D, 2 * r) and theta.shape == (2, r) and W.dtype == theta.dtype == F64
    assert orthonormal(W) <= 2e-14 and (theta >= 0).all()
    Jc = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    block = torch.stack([torch.block_diag(*(v * Jc for v in row)) for row in theta])
    L = generator(a, b, omega)
    size = (omega.abs() * a.norm(dim=-1) * b.norm(dim=-1)).sum(-1).max()
    assert (W @ block @ W.mT - L).abs().max() <= 1e-14 * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, device):
    if dtype == F64 and _library._current != _library.NATIVE:
        pytest.skip("no float64 kernels on CUDA")
    inputs = [v.to(device) for v in mixture_inputs(*shape, dtype=dtype)]
    check(grape.mixture_rotate, inputs, dtype)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 2, 6, 1), (2, 2, 1, 7, 3)], ids=str)
def test_gradcheck(shape, which):
    inputs = mixture_inputs(*shape, scale=3.0)
    for i in which:
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(grape.mixture_rotate, inputs, atol=1e-6)


def test_gradcheck_of_rank_2():
    x, a, b, omega, t = mixture_inputs(1, 3, 2, 6, 1, scale=3.0)
    inputs = [v.requires_grad_() for v in (x, a[:, 0].clone(), b[:, 0].clone(), t)]
    assert torch.autograd.gradcheck(grape.rank2_rotate, inputs, atol=1e-6)
    speed = omega[:, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: grape.rank2_rotate(*inputs, w), speed, atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_3_group_laws(dtype):
    x, a, b, omega, _ = mixture_inputs(1, 6, 2, 64, 4, dtype=dtype)
    t = torch.tensor([[1e7, -3.25, 0, 17, 1e5, 1e-3]], dtype=F64)
    u = torch.tensor([[3.0, 0.5, 8, -17, -1e5, 1.0]], dtype=F64)

    def rotate(x, t):
        return grape.mixture_rotate(x, a, b, omega, t)

    limit = 1e-8 if dtype == F64 else 2e-6  # of float64: what rounding t + u does to the angle
    assert error(rotate(rotate(x, t), u), rotate(x, t + u)) <= limit
    assert error(rotate(rotate(x, t), -t), x) <= OUTPUT[dtype]
    assert torch.equal(rotate(x, 0 * t), x)
    assert ((rotate(x, t).norm(dim=-1) / x.norm(dim=-1) - 1).abs() <= 1e-6).all()
    y = normal(1, 6, 2, 64, seed=9, dtype=dtype)
    logits = torch.einsum("bihd,bjhd->bhij", rotate(x, t % 1024), rotate(y, u % 1024))
    shifted = torch.einsum(
        "bihd,bjhd->bhij", rotate(x, t % 1024 + 10**6), rotate(y, u % 1024 + 10**6)
    )
    assert error(shifted, logits) <= 2e-5


@pytest.mark.parametrize("D", [2, 16, 64])
def test_4_coordinate_planes_are_clockwise_rope(D):
    P = D // 2
    x = normal(2, 9, 1, D)
    theta = 10000.0 ** (-2 * torch.arange(P, dtype=F64) / D)
    t = torch.arange(18).view(2, 9) * 100
    f = t[..., None, None] * theta
    x0, x1 = x[..., :P], x[..., P:]
    rope = torch.cat((x0 * f.cos() + x1 * f.sin(), x1 * f.cos() - x0 * f.sin()), -1)
    eye = torch.eye(D, dtype=F64)
    assert (
        error(grape.mixture_rotate(x, eye[None, :P], eye[None, P:], theta[None], t), rope) < 1e-12
    )
    for p in range(P):
        y = grape.rank2_rotate(x, eye[None, p], eye[None, p + P], t, theta[p].item())
        plane = [p, p + P]
        rest = [d for d in range(D) if d not in plane]
        assert error(y[..., plane], rope[..., plane]) < 1e-12
        assert torch.equal(y[..., rest], x[..., rest])


def exact_turns(theta, t):
    with mpmath.workdps(60):
        angles = [mpmath.mpf(theta) * mpmath.mpf(p) for p in t]
        values = [[float(mpmath.cos(f)), float(-mpmath.sin(f))] for f in angles]
        return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("kind", ["integer", "real"])
def test_angles_of_far_positions(kind, device):
    random = torch.Generator().manual_seed(3)
    if kind == "integer":
        t = torch.randint(0, 2**31, (1, 200), generator=random, dtype=torch.int64)
    else:
        t = 2e9 * (torch.rand(1, 200, generator=random, dtype=F64) - 0.5)
    theta = 10000.0**-0.125
    x = torch.zeros(1, 200, 1, 2)
    x[..., 0] = 1
    W, speed = torch.eye(2).unsqueeze(0), torch.tensor([[theta]], dtype=F64)
    exact = exact_turns(theta, t[0].tolist())
    x, W, speed, t = (v.to(device) for v in (x, W, speed, t))
    y = grape.frame_rotate(x, W, speed, t).cpu()[0, :, 0]
    assert (y - exact).abs().max() <= 2e-7
    if device == "cpu" and _library._current == _library.NATIVE:
        y = grape.frame_rotate(x.double(), W, speed, t)[0, :, 0]
        assert (y - exact).abs().max() <= 4e-15


@pytest.mark.parametrize("b_noise", [1.0, 1e-2, 1e-4])
def test_nearly_parallel_vectors_in_float32(b_noise):
    a = normal(1, 32, seed=1)
    b = a + b_noise * normal(1, 32, seed=2)
    x, t = normal(1, 1, 1, 32, seed=3), torch.tensor([[1e5]], dtype=F64)
    y = grape.rank2_rotate(x.float(), a, b, t)
    exact = exact_mixture(x, a[:, None], b[:, None], torch.ones(1, 1, dtype=F64), t)
    assert error(y, exact) <= 5e-7


def test_a_prepared_frame_is_the_same():
    x, a, b, omega, t = mixture_inputs(2, 9, 3, 24, 2)
    frame = grape.prepare_frame(a, b, omega)
    assert torch.equal(
        grape.mixture_rotate(x, a, b, omega, t, frame=frame),
        grape.mixture_rotate(x, a, b, omega, t),
    )
    assert torch.equal(grape.frame_rotate(x, *frame, t), grape.mixture_rotate(x, a, b, omega, t))


def test_packed_tokens_and_broadcast_positions():
    x, a, b, omega, t = mixture_inputs(1, 9, 3, 24, 2)
    y = grape.mixture_rotate(x, a, b, omega, t)
    assert torch.equal(grape.mixture_rotate(x[0], a, b, omega, t[0]), y[0])
    assert torch.equal(grape.mixture_rotate(x, a, b, omega, t[0]), y)
    twice = torch.cat((x, x))
    assert torch.equal(grape.mixture_rotate(twice, a, b, omega, t), torch.cat((y, y)))
    packed = [x[0], a, b, omega, t[0]]
    check(grape.mixture_rotate, packed, F64)
    check(grape.mixture_rotate, [twice, a, b, omega, t[0]], F64)


def test_integer_positions():
    x, a, b, omega, _ = mixture_inputs(2, 9, 3, 24, 2)
    t = torch.arange(18).view(2, 9)
    y = grape.mixture_rotate(x, a, b, omega, t)
    for dtype in (torch.int32, torch.int16, F64, F32):
        assert torch.equal(grape.mixture_rotate(x, a, b, omega, t.to(dtype)), y)


@pytest.mark.parametrize("scale", [1e5, 1e-4])
def test_gradients_of_far_and_near_positions(scale):
    """Each branch of the integral: sums and differences of angles, large and small."""
    x, a, b, omega, t = mixture_inputs(1, 40, 2, 16, 4, scale=scale)
    omega[:, 1] = omega[:, 0] * (1 + 1e-7)
    a[:, :2], b[:, :2] = normal(2, 2, 16, seed=5), normal(2, 2, 16, seed=6)
    inputs = [x.float(), a, b, omega, t]
    _, grads = run(grape.mixture_rotate, inputs)
    _, exact = expected(grape.mixture_rotate, inputs)
    for g, e in zip(grads, exact, strict=True):
        assert error(g, e) <= 1e-4


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_column_of_nan_stays_in_its_head_and_token(dtype):
    x, a, b, omega, t = mixture_inputs(1, 5, 2, 16, 2, dtype=dtype)
    x[0, 2, 1, 3] = float("nan")
    y = grape.mixture_rotate(x, a, b, omega, t)
    bad = y.isnan()
    assert bad[0, 2, 1].all() and bad.sum() == 16
