"""Validation of arguments: ValueError or TypeError that names the argument and the shapes.

A good call pays for comparisons alone: names and texts are looked at once one of them fails.
"""

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op, message, error=ValueError):
    raise error(f"{op}: {message}")


def expect_shape(op, name, tensor, shape, meaning):
    """tensor.shape must equal shape; meaning is its text, for example "[B, T, HV]"."""
    if tensor.shape != shape:
        fail(op, f"{name} must be {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")


def expect_dim(op, name, tensor, dim, meaning):
    if tensor.dim() != dim:
        fail(op, f"{name} must be {meaning}, got shape {tuple(tensor.shape)}")


def expect_float(op, name, tensor):
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def expect_floats(op, *, error=ValueError, **tensors):
    """Every given tensor is real floating point, and all are on one device, else `error`."""
    first = None
    for tensor in tensors.values():
        if tensor is not None:
            first = tensor.device if first is None else first
            if tensor.dtype not in FLOATS or tensor.device != first:
                break
    else:
        return
    for name, tensor in tensors.items():
        if tensor is not None:
            expect_float(op, name, tensor)
    expect_same_device(op, error=error, **tensors)


def expect_same_dtype(op, **tensors):
    """All tensors share one dtype; the message lists each name with its dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        listed = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        fail(op, f"expected one dtype, got {listed}")


def expect_same_device(op, *, error=ValueError, **tensors):
    if len({t.device for t in tensors.values() if t is not None}) > 1:
        given = {name: t.device for name, t in tensors.items() if t is not None}
        listed = ", ".join(f"{name} on {device}" for name, device in given.items())
        fail(op, f"expected one device, got {listed}", error)


def cast(tensor, dtype):
    """tensor.to(dtype), which takes a microsecond also where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def expect_offsets(op, x, cu_seqlens):
    """The number of sequences: the batch of x, or those that cu_seqlens packs into its one row."""
    if cu_seqlens is None:
        return x.shape[0]
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail(op, f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or x.shape[0] != 1:
        fail(
            op,
            f"cu_seqlens must be [N + 1] and B 1, got cu_seqlens {tuple(cu_seqlens.shape)} "
            f"and x {tuple(x.shape)}",
        )
    return cu_seqlens.shape[0] - 1


def has_values(tensor):
    """Whether the host may look: a CPU tensor, neither traced nor fake (a device would wait)."""
    known = type(tensor) is torch.Tensor and not torch.compiler.is_compiling()
    return known and tensor.device.type == "cpu"


def expect_rising(op, cu_seqlens, T):
    """Offsets that rise from 0 to at most T; waits for the device of cu_seqlens."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > T or bounds != sorted(bounds):
        fail(op, f"cu_seqlens must rise from 0 to at most T = {T}, got {bounds}")
