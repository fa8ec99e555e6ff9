"""What memory an optimizer's tensors have: dtypes of state, strides, ownership."""

import math

import torch


def state_dtype(p):
    """float64 for double parameters, else float32, whatever the parameter's own precision."""
    double = p.dtype in (torch.float64, torch.complex128)
    if p.is_complex():
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


def step_device(p):
    return p.device if p.device.type == "cuda" else "cpu"


def is_dense(p):
    """Whether some order of the dimensions is contiguous: such memory is walked linearly."""
    if p.is_contiguous():
        return True
    dims = sorted(zip(p.stride(), p.shape, strict=True))
    expected = [math.prod(size for _, size in dims[:i]) for i in range(len(dims))]
    return all(
        size == 1 or stride == want for (stride, size), want in zip(dims, expected, strict=True)
    )


def like(t, p):
    """t with the strides of p; itself if it has them."""
    same = t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous())
    return t if same else torch.empty_like(p, dtype=t.dtype).copy_(t)


def owned(grad):
    """The gradient itself, or a copy if it is part of a larger buffer that others write."""
    whole = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    return grad.detach() if whole else grad.detach().clone()


def as_real(tensors):
    """Complex tensors as real ones with a last dimension of 2; same memory."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def is_finite(grad):
    """One pass without a temporary: the largest magnitude is NaN or inf."""
    return grad.numel() == 0 or bool(torch.linalg.vector_norm(grad, math.inf).isfinite())
