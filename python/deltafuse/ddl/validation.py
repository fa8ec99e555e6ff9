"""Checks of the boundary's arguments, and their way into rows and back."""

import dataclasses

import torch

from .. import _checks

MAX_CHANNELS = 16
V_SOURCES = ("input", "context")


def expect_floats(op, **tensors):
    """Every given tensor is real floating point, and all are on one device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, tensor in given.items():
        _checks.expect_float(op, name, tensor)
    _checks.expect_same_device(op, error=TypeError, **given)


def expect_eps(op, **values):
    for name, value in values.items():
        if not value >= 0:
            _checks.fail(op, f"{name} must be at least 0, got {value}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a state's shape maps to rows [N, d, d_v].

    Attributes:
        leading: the dimensions that N stands for.
        channels: whether the state has a channel axis; without one d_v = 1.
    """

    leading: tuple
    d: int
    d_v: int
    channels: bool

    @property
    def N(self):
        return torch.Size(self.leading).numel()

    def state_rows(self, x):
        return x.reshape(self.N, self.d, self.d_v)

    def rows(self, t):
        return t if t is None else t.reshape(self.N, self.d)

    def state(self, rows):
        channels = (self.d_v,) if self.channels else ()
        return None if rows is None else rows.view(*self.leading, self.d, *channels)

    def back(self, rows):
        """[N, ...] to [leading..., ...]."""
        return None if rows is None else rows.view(*self.leading, *rows.shape[1:])

    def target(self, op, name, v, dtype):
        """v [..., d_v], or [...] where d_v = 1, as rows [N, d_v]."""
        shapes = [(*self.leading, self.d_v)] + ([self.leading] if self.d_v == 1 else [])
        return _reshaped(op, name, v, shapes, (self.N, self.d_v), dtype)

    def gate(self, op, name, beta, dtype):
        """beta [...] or [..., 1] as rows [N]."""
        return _reshaped(op, name, beta, [self.leading, (*self.leading, 1)], (self.N,), dtype)


def _reshaped(op, name, t, shapes, rows, dtype):
    if tuple(t.shape) not in [tuple(s) for s in shapes]:
        listed = " or ".join(str(tuple(s)) for s in shapes)
        _checks.fail(op, f"{name} must have shape {listed}, got {tuple(t.shape)}")
    return t.to(dtype).reshape(rows)


def layout_with(op, x, k):
    """The layout of x [..., d, d_v] or [..., d] beside k [..., d]."""
    shape = tuple(x.shape)
    if k.dim() == 0:
        _checks.fail(op, f"k must be [..., d], got shape {tuple(k.shape)}")
    channels = x.dim() == k.dim() + 1
    if shape[: k.dim()] != tuple(k.shape) or x.dim() > k.dim() + 1:
        _checks.fail(
            op,
            "x must be [..., d, d_v] or [..., d] with the [..., d] of k, got "
            f"x {shape} and k {tuple(k.shape)}",
        )
    return _layout(op, tuple(k.shape[:-1]), k.shape[-1], shape[-1] if channels else 1, channels)


def layout_of(op, x, d, d_v):
    """The layout of x [..., d, d_v], or [..., d] where d_v is 1 or None (not known)."""
    shape = tuple(x.shape)
    known = (d,) if d_v is None else (d, d_v)
    if d_v is None and len(shape) >= 2 and shape[-2] == d and shape[-1] <= MAX_CHANNELS:
        if shape[-1] == d and d > 1:
            _checks.fail(op, f"x {shape} could be [..., d] or [..., d, d_v]: give read_weight")
        return _layout(op, shape[:-2], d, shape[-1], True)
    if d_v is not None and shape[-2:] == (d, d_v):
        return _layout(op, shape[:-2], d, d_v, True)
    if d_v in (1, None) and shape[-1:] == (d,):
        return _layout(op, shape[:-1], d, 1, False)
    _checks.fail(op, f"x must be [..., d, d_v] with {known} from the weights, got {shape}")


def _layout(op, leading, d, d_v, channels):
    if d == 0 or not 1 <= d_v <= MAX_CHANNELS:
        _checks.fail(op, f"d must be positive and d_v in 1..{MAX_CHANNELS}, got {d} and {d_v}")
    return Layout(leading, d, d_v, channels)


def expect_weights(op, layout, read, norm, W_v, b_v, W_beta, b_beta):
    d, d_v = layout.d, layout.d_v
    shapes = {
        "read_weight": (read, (d, d_v), "[d, d_v]"),
        "norm_weight": (norm, (d,), "[d]"),
        "W_v": (W_v, (d_v, d), "[d_v, d]"),
        "b_v": (b_v, (d_v,), "[d_v]"),
        "W_beta": (W_beta, (1, d), "[1, d]"),
        "b_beta": (b_beta, (1,), "[1]"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        if tensor is not None:
            _checks.expect_shape(op, name, tensor, shape, meaning)
    for name, bias, weight in (("b_v", b_v, W_v), ("b_beta", b_beta, W_beta)):
        if bias is not None and weight is None:
            _checks.fail(op, f"{name} {tuple(bias.shape)} is given without its weight")


def expect_choice(op, name, value, choices):
    if value not in choices:
        listed = " or ".join(repr(c) for c in choices)
        _checks.fail(op, f"{name} must be {listed}, got {value!r}")
