"""Loads libdeltafuse.so and chooses a backend for each operator.

The only place that names the operators' namespaces. A test build has further libraries with the
same schemas, whose CUDA kernels run on CPU tensors; `use("cuda-emulated-sm80")` switches to one.
"""

import contextlib
import functools
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from ._eager import Operator

torch.ops.load_library(str(Path(__file__).with_name("libdeltafuse.so")))
try:
    from . import _C  # introspection; tied to one Python, absent on others
except ImportError:
    _C = None

NATIVE = "deltafuse"
_namespaces = {"native": NATIVE}
_current = NATIVE
_registered = []
_operators = {NATIVE: SimpleNamespace()}  # namespace: its operators, as eager mode calls them
_kernels = {}  # (namespace, operator, device type): the operator
_not_on_cuda = {}  # operator: dtypes that its CUDA kernel does not take
_warned = set()
_backend = os.environ.get("DELTAFUSE_BACKEND", "auto")
_strict = os.environ.get("DELTAFUSE_STRICT", "0") not in ("", "0")
if _backend not in ("auto", "reference"):
    raise ValueError(f"DELTAFUSE_BACKEND must be 'auto' or 'reference', got {_backend!r}")


def kernel(name, tensor):
    """The compiled operator for the tensor's device, or None: the caller runs its reference.

    None on a CPU tensor means that the reference was asked for (`DELTAFUSE_BACKEND=reference`,
    `use("reference")`) or that no kernel was compiled. A CUDA tensor without a CUDA kernel warns
    once an operator, and raises with `DELTAFUSE_STRICT=1`.
    """
    if _backend == "reference":
        return None
    if name in _not_on_cuda and runs_cuda(tensor) and tensor.dtype in _not_on_cuda[name]:
        return None
    device = tensor.device.type
    operator = _kernels.get((_current, name, device))
    if operator is None and device not in ("cpu", "meta") and _current == NATIVE:
        _missing(name, device)
    return operator


def has_kernel(name, tensor):
    """Whether `kernel` would return an operator; says nothing to the user."""
    if name in _not_on_cuda and runs_cuda(tensor) and tensor.dtype in _not_on_cuda[name]:
        return False
    return _backend != "reference" and (_current, name, tensor.device.type) in _kernels


def _missing(name, device):
    message = f"deltafuse: no {device} kernel for {name} in this build, using the PyTorch reference"
    if _strict:
        raise RuntimeError(message)
    if (name, device) not in _warned:
        _warned.add((name, device))
        warnings.warn(message, stacklevel=4)


def runs_cuda(tensor):
    """Whether a compiled operator runs its CUDA kernel on this tensor, emulated or not."""
    return tensor.is_cuda or _current != NATIVE


def written(*tensors):
    """Counts an operation in place: autograd then notices a backward that needs old values."""
    if not torch.compiler.is_compiling():  # compiled code counts by itself
        counted = [t for t in tensors if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(counted)


def not_on_cuda(dtype, *names):
    """The CUDA kernels of these operators do not take tensors of dtype: the reference runs."""
    for name in names:
        _not_on_cuda.setdefault(name, []).append(dtype)


def register(name, fake, setup_context=None, backward=None):
    """Fake kernel and gradient of an operator; backward gets the namespace's operators first."""
    _registered.append((name, fake, setup_context, backward))
    for namespace in _namespaces.values():
        _register_in(namespace, *_registered[-1])


def register_backward(name, fake, public):
    """The operator that computes the gradients of `public`; they have no gradient themselves."""

    def refuse(ops, ctx, *grads):
        raise RuntimeError(f"{public}: the gradient of the gradient is not implemented")

    register(name, fake, lambda ctx, inputs, output: None, refuse)


def _register_in(namespace, name, fake, setup_context, backward):
    qualified = f"{namespace}::{name}"
    torch.library.register_fake(qualified, fake)
    operator = getattr(getattr(torch.ops, namespace), name)
    if backward is not None:
        registered = functools.partial(backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(qualified, registered, setup_context=setup_context)
        eager = functools.partial(backward, _operators[namespace])
        operator = Operator(operator.default, setup_context, eager)
    setattr(_operators[namespace], name, operator)
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            _kernels[namespace, name, key.lower()] = operator


def load_emulated(path, arch):
    """Adds a test library; its operators answer within `use("cuda-emulated-" + arch)`."""
    torch.ops.load_library(str(path))
    namespace = f"deltafuse_emulated_{arch}"
    _namespaces[f"cuda-emulated-{arch}"] = namespace
    _operators[namespace] = SimpleNamespace()
    for entry in _registered:
        _register_in(namespace, *entry)


@contextlib.contextmanager
def use(backend):
    """Within the block operators come from "native", "reference" or a loaded emulated library."""
    global _backend, _current
    before = _backend, _current
    if backend == "reference":
        _backend = "reference"
    else:
        _backend, _current = "auto", _namespaces[backend]
    try:
        yield
    finally:
        _backend, _current = before


def build_info():
    """What was compiled in, for example "cpu, cuda 80 90a"."""
    return getattr(torch.ops, _current).build_info()


def has_cuda():
    """Whether CUDA kernels were compiled in; says nothing about a GPU."""
    return "cuda" in build_info()


def cpu_isa():
    """The instruction set that CPU kernels use: "scalar", "avx2" or "avx512" (None: unknown)."""
    return _C.cpu_isa() if _C else None


def backend_info():
    """What is compiled in and what each operator would use.

    Returns:
        dict with `build` (str), `cpu_isa` (str or None), `backend` ("auto" or "reference"),
        `strict` (bool), and `ops`: {operator: {"cpu": backend, "cuda": backend}} where backend is
        "cpu", "cuda" or "reference"; a further entry such as "cuda float64" names tensors that a
        CUDA kernel leaves to the reference.
    """
    ops = {}
    for name, *_ in _registered:
        ops[name] = {
            device: device
            if _backend == "auto" and (_current, name, device) in _kernels
            else "reference"
            for device in ("cpu", "cuda")
        }
        for dtype in _not_on_cuda.get(name, ()):
            ops[name][f"cuda {dtype}".replace("torch.", "")] = "reference"
    return {
        "build": build_info(),
        "cpu_isa": cpu_isa(),
        "backend": _backend,
        "strict": _strict,
        "ops": ops,
    }
