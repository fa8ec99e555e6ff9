"""What memory an optimizer's tensors have: dtypes of state, strides, ownership."""

import math

import torch

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
GRADIENTS = ("last_grad", "previous_grad")


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


def as_real(lists):
    """Complex tensors as real ones with a last dimension of 2; same memory."""
    return [[torch.view_as_real(t) if t.is_complex() else t for t in tensors] for tensors in lists]


def is_finite(grad):
    """One pass without a temporary: the largest magnitude is NaN or inf."""
    return grad.numel() == 0 or bool(torch.linalg.vector_norm(grad, math.inf).isfinite())


def only_finite(lists):
    """The lists of _init_group without the tensors whose gradient has NaN or inf."""
    keep = [i for i, g in enumerate(lists[1]) if is_finite(g)]
    # last_grads and maxima may be shorter
    return [[tensors[i] for i in keep if i < len(tensors)] for tensors in lists]


def loaded_state(saved, p):
    """A parameter's state from a checkpoint: known keys only, moments in the state's own dtype."""
    state = {}
    for name, value in saved.items():
        if name == "step":
            value = torch.as_tensor(value, dtype=torch.float32)
            state[name] = value.detach().clone().to(step_device(p))
        elif name in MOMENTS + GRADIENTS and value is not None:
            dtype = state_dtype(p) if name in MOMENTS else value.dtype
            state[name] = like(value.detach().to(p.device, dtype, copy=True), p)
    return state
