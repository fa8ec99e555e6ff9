"""What the tests of learned rotations share: inputs, limits, exact results."""

import torch

from deltafuse import _library

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]
# max|x - ref| / max|ref| of outputs and of gradients of parameters
OUTPUT = {F64: 1e-12, F32: 2e-6, BF16: 8e-3, F16: 1e-3}
GRADIENT = {F64: 1e-10, F32: 1e-4, BF16: 1e-2, F16: 1e-2}


def normal(*shape, seed=0, dtype=F64, scale=1.0):
    random = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (scale * torch.randn(*shape, generator=random, dtype=F64)).to(dtype)


def positions(B, T, seed=0, scale=100.0):
    return normal(B, T, seed=seed, scale=scale)


def mixture_inputs(B, T, H, D, r, dtype=F64, seed=0, scale=30.0):
    """x, a, b, omega, t."""
    wide = F64 if dtype == F64 else F32
    return [
        normal(B, T, H, D, seed=seed, dtype=dtype),
        normal(H, r, D, seed=seed + 1, dtype=wide, scale=D**-0.5),
        normal(H, r, D, seed=seed + 2, dtype=wide, scale=D**-0.5),
        normal(H, r, seed=seed + 3, dtype=wide),
        positions(B, T, seed=seed + 4, scale=scale).to(wide),
    ]


def generator(a, b, omega):
    """L [H, D, D]."""
    half = torch.einsum("hr,hri,hrj->hij", omega, a, b)
    return half - half.mT


def exact_mixture(x, a, b, omega, t):
    """exp(t L) x by the matrix exponential, in float64."""
    x, a, b, omega, t = (v.double() for v in (x, a, b, omega, t))
    L = generator(a, b, omega)
    G = torch.linalg.matrix_exp(t[:, :, None, None, None] * L)
    return torch.einsum("bthij,bthj->bthi", G, x)


def degenerate(kind, a, b, omega):
    """Copies of the planes with what a frame must survive."""
    a, b, omega = a.clone(), b.clone(), omega.clone()
    if kind == "parallel":
        b[:, 0] = -2.5 * a[:, 0]
    elif kind == "nearly parallel":
        b[:, 0] = a[:, 0] * (1 + 1e-9)
        b[:, 0, 0] += 1e-7
    elif kind == "zero vector":
        a[:, 0] = 0
    elif kind == "tiny vector":
        a[:, 0] *= 1e-9
    elif kind == "repeated plane":
        a[:], b[:], omega[:] = a[:, :1].clone(), b[:, :1].clone(), omega[:, :1].clone()
    elif kind == "no speed":
        omega[:] = 0
    elif kind == "equal angles":  # coordinate planes of one speed
        a[:], b[:], omega[:] = 0, 0, 0.7
        for k in range(a.shape[1]):
            a[:, k, 2 * k] = b[:, k, 2 * k + 1] = 1
    return a, b, omega


DEGENERATE = [
    "plain",
    "parallel",
    "nearly parallel",
    "zero vector",
    "tiny vector",
    "repeated plane",
    "no speed",
    "equal angles",
]


def error(actual, expected):
    """max|actual - expected| / max|expected|; absolute where nothing is expected."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    size = expected.detach().double().abs().max().item()
    return (actual.double() - expected.double()).abs().max().item() / (size or 1.0)


def run(function, inputs, seed=11):
    """Output and gradients; the incoming gradient has few bits, so that every dtype holds it."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y = function(*inputs)
    dy = normal(*y.shape, seed=seed, dtype=BF16).to(y)
    leaves = [t for t in inputs if t.requires_grad]
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def expected(function, inputs):
    """The same of the float64 reference."""
    with _library.use("reference"):
        return run(function, [t.double() if t.is_floating_point() else t for t in inputs])


def check(function, inputs, dtype):
    """Output and gradients of the first input within one rounding, of the others by kind."""
    y, grads = run(function, inputs)
    exact, exact_grads = expected(function, inputs)
    assert y.dtype == dtype and [g.dtype for g in grads] == [
        t.dtype for t in inputs if t.is_floating_point()
    ]
    assert error(y, exact) <= OUTPUT[dtype]
    assert error(grads[0], exact_grads[0]) <= OUTPUT[dtype]
    if dtype in (BF16, F16):  # no worse than twice the best rounding
        for a, e in ((y, exact), (grads[0], exact_grads[0])):
            best = e.float().to(dtype)
            assert error(a, e) <= 2 * error(best, e) + 1e-6
    for i, (a, e) in enumerate(zip(grads[1:], exact_grads[1:], strict=True)):
        assert error(a, e) <= GRADIENT[dtype], i
