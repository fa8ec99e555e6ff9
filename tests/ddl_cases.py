"""What the tests of Deep Delta Learning share: inputs, limits and the float64 comparison."""

import torch

from deltafuse import _library
from deltafuse.testing import assert_close

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# state and direction
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]
# relative Frobenius error of gradients, of gradients of weights
GRADIENT = {F64: (1e-12, 1e-12), F32: (1e-5, 1e-5), BF16: (6e-3, 4e-3), F16: (1e-3, 4e-3)}


def normal(*shape, seed=0, dtype=F32, scale=1.0):
    random = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (scale * torch.randn(*shape, generator=random, dtype=F64)).to(dtype)


def wide(dtype):
    return F64 if dtype == F64 else F32


def rewrite_inputs(N, d, d_v, dtype=F32, act=None, seed=0):
    """x, k, v, beta of delta_rewrite; beta in (0, 2)."""
    act = act or dtype
    gate = wide(dtype)
    beta = 2 * torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return [
        normal(N, d, d_v, seed=seed, dtype=dtype),
        normal(N, d, seed=seed + 1, dtype=act),
        normal(N, d_v, seed=seed + 2, dtype=gate),
        beta.to(gate),
    ]


def boundary_inputs(N, d, d_v, dtype=F32, act=None, seed=0):
    """The ten tensors of ddl_boundary."""
    gate, size = wide(dtype), d**-0.5
    return [
        *rewrite_inputs(N, d, d_v, dtype, act, seed)[:3],
        normal(N, seed=seed + 3, dtype=gate),
        normal(d, d_v, seed=seed + 4, dtype=gate),
        1 + 0.1 * normal(d, seed=seed + 5, dtype=gate),
        normal(d_v, d, seed=seed + 6, dtype=gate, scale=size),
        normal(d_v, seed=seed + 7, dtype=gate),
        normal(1, d, seed=seed + 8, dtype=gate, scale=size),
        normal(1, seed=seed + 9, dtype=gate),
    ]


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def run(function, tensors, seed=11):
    """Outputs and gradients; incoming gradients have few bits, so that every dtype holds them."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = [normal(*t.shape, seed=seed, dtype=BF16).to(t) for t in outputs]
    return list(outputs), list(torch.autograd.grad(outputs, inputs, d_outputs))


def expected(function, tensors):
    """The same of the float64 reference."""
    with _library.use("reference"):
        return run(function, leaves(tensors, F64))


def assert_rounded_once(actual, exact, d):
    """The page's limit on outputs: one rounding of the exact result."""
    if actual.numel() == 0:
        return
    error, size = (actual.double() - exact).abs(), exact.abs()
    limit = {
        F64: 1e-13 * size.clamp(min=1) * max(1, d) ** 0.5,
        F32: 2e-6 * size.clamp(min=1) * torch.tensor(max(2.0, d)).log2(),
        BF16: 2**-8 * size + 1e-4,
        F16: 2**-11 * size + 2e-5,
    }[actual.dtype]
    excess = (error - limit).max().item()
    assert excess <= 0 and not actual.isnan().any(), f"beyond the limit by {excess:.3e}"


def assert_gradients(actual, exact, kind, weights_from):
    """Relative errors within the limits of the lower precision `kind`."""
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert_close(f"gradient {i}", a, e, GRADIENT[kind][i >= weights_from])
