"""Validation of arguments: ValueError or TypeError that names the argument and the shapes."""

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op, message, error=ValueError):
    raise error(f"{op}: {message}")


def expect_shape(op, name, tensor, shape, meaning):
    """tensor.shape must equal shape; meaning is its text, for example "[B, T, HV]"."""
    if tuple(tensor.shape) != tuple(shape):
        fail(op, f"{name} must be {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")


def expect_dim(op, name, tensor, dim, meaning):
    if tensor.dim() != dim:
        fail(op, f"{name} must be {meaning}, got shape {tuple(tensor.shape)}")


def expect_float(op, name, tensor):
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def expect_same_dtype(op, **tensors):
    """All tensors share one dtype; the message lists each name with its dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        listed = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        fail(op, f"expected one dtype, got {listed}")


def expect_same_device(op, **tensors):
    given = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in given.items())
        fail(op, f"expected one device, got {listed}")
