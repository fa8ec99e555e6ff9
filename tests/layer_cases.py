"""What the tests of the layer's operators share: limits and the comparison with float64."""

import pytest
import torch

from deltafuse import _library
from deltafuse.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# relative error of outputs and of gradients: rounding once, and sums of many products
LIMITS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (1e-3, 2e-3),
}


def normal(*shape, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)


def require_kernel(name):
    if _library.kernel(name, torch.empty(0)) is None:
        pytest.skip(f"no kernel for {name} in this build")


def leaves(tensors, dtype=None):
    """The same values as new leaves; None stays None, offsets stay as they are."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype or t.dtype).clone()
        for t in tensors
    ]


def run(function, tensors, seed=7):
    """Outputs of function(*tensors), then the gradients of the floating point tensors."""
    inputs = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [t for t in outputs if t is not None]
    ds = [normal(*t.shape, seed=seed, dtype=torch.bfloat16).to(t) for t in outputs]
    wanted = [t for t in inputs if t is not None and t.is_floating_point()]
    return outputs, list(torch.autograd.grad(outputs, wanted, ds))


def compare(function, tensors):
    """The kernel against the float64 reference on the same values; returns the kernel's results."""
    outputs, grads = run(function, tensors)
    with _library.use("reference"):
        expected, expected_grads = run(function, leaves(tensors, torch.float64))
    given = [t for t in tensors if t is not None and t.is_floating_point()]
    for i, (a, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {i}", a, e, LIMITS[outputs[i].dtype][0])
    for i, (a, e, t) in enumerate(zip(grads, expected_grads, given, strict=True)):
        assert a.dtype == t.dtype
        assert_close(f"gradient {i}", a, e, LIMITS[given[0].dtype][1])
    return outputs, grads
