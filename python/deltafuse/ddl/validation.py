"""Checks of the boundary's arguments, and their way into rows and back."""

from typing import NamedTuple

from .. import _checks
from .._checks import cast

MAX_CHANNELS = 16
V_SOURCES = ("input", "context")


def expect_eps(op, **values):
    for name, value in values.items():
        if not value >= 0:
            _checks.fail(op, f"{name} must be at least 0, got {value}")


class Layout(NamedTuple):
    """How a state's shape maps to rows [N, d, d_v].

    Attributes:
        leading: the dimensions that N stands for.
        token: leading and d.
    """

    leading: tuple
    token: tuple
    N: int
    d: int
    d_v: int

    def state_rows(self, x):
        return x.reshape(self.N, self.d, self.d_v)

    def rows(self, t):
        return t if t is None else t.reshape(self.N, self.d)

    def target(self, op, name, v, dtype):
        """v [..., d_v], or [...] where d_v = 1, as rows [N, d_v]."""
        shape = (*self.leading, self.d_v)
        if v.shape != shape and (self.d_v > 1 or v.shape != self.leading):
            _refuse(op, name, v, shape, *([self.leading] if self.d_v == 1 else []))
        return cast(v, dtype).reshape(self.N, self.d_v)

    def gate(self, op, name, beta, dtype):
        """beta [...] or [..., 1] as rows [N]."""
        if beta.shape != self.leading and beta.shape != (*self.leading, 1):
            _refuse(op, name, beta, self.leading, (*self.leading, 1))
        return cast(beta, dtype).reshape(self.N)


def _refuse(op, name, t, *shapes):
    listed = " or ".join(str(tuple(s)) for s in shapes)
    _checks.fail(op, f"{name} must have shape {listed}, got {tuple(t.shape)}")


def layout_with(op, x, k):
    """The layout of x [..., d, d_v] or [..., d] beside k [..., d]."""
    shape, of_k = x.shape, k.shape
    if not of_k:
        _checks.fail(op, f"k must be [..., d], got shape {tuple(of_k)}")
    channels = len(shape) == len(of_k) + 1
    if (shape[:-1] if channels else shape) != of_k:
        _checks.fail(
            op,
            "x must be [..., d, d_v] or [..., d] with the [..., d] of k, got "
            f"x {tuple(shape)} and k {tuple(of_k)}",
        )
    return _layout(op, of_k, shape[-1] if channels else 1)


def layout_of(op, x, d, d_v):
    """The layout of x [..., d, d_v], or [..., d] where d_v is 1 or None (not known)."""
    shape = x.shape
    known = (d,) if d_v is None else (d, d_v)
    if d_v is None and len(shape) >= 2 and shape[-2] == d and shape[-1] <= MAX_CHANNELS:
        if shape[-1] == d and d > 1:
            _checks.fail(
                op, f"x {tuple(shape)} could be [..., d] or [..., d, d_v]: give read_weight"
            )
        return _layout(op, shape[:-1], shape[-1])
    if d_v is not None and shape[-2:] == (d, d_v):
        return _layout(op, shape[:-1], d_v)
    if d_v in (1, None) and shape[-1:] == (d,):
        return _layout(op, shape, 1)
    _checks.fail(op, f"x must be [..., d, d_v] with {known} from the weights, got {tuple(shape)}")


def _layout(op, token, d_v):
    N, (*leading, d) = token[:-1].numel(), token
    if d == 0 or not 1 <= d_v <= MAX_CHANNELS:
        _checks.fail(op, f"d must be positive and d_v in 1..{MAX_CHANNELS}, got {d} and {d_v}")
    # a torch.Size as the argument of view takes a microsecond more than a tuple
    return Layout(tuple(leading), tuple(token), N, d, d_v)


def expect_weights(op, layout, read, norm, W_v, b_v, W_beta, b_beta):
    d, d_v = layout.d, layout.d_v
    for name, tensor, shape, meaning in (
        ("read_weight", read, (d, d_v), "[d, d_v]"),
        ("norm_weight", norm, (d,), "[d]"),
        ("W_v", W_v, (d_v, d), "[d_v, d]"),
        ("b_v", b_v, (d_v,), "[d_v]"),
        ("W_beta", W_beta, (1, d), "[1, d]"),
        ("b_beta", b_beta, (1,), "[1]"),
    ):
        if tensor is not None and tensor.shape != shape:
            _checks.expect_shape(op, name, tensor, shape, meaning)
    for name, bias, weight in (("b_v", b_v, W_v), ("b_beta", b_beta, W_beta)):
        if bias is not None and weight is None:
            _checks.fail(op, f"{name} {tuple(bias.shape)} is given without its weight")


def expect_choice(op, name, value, choices):
    if value not in choices:
        listed = " or ".join(repr(c) for c in choices)
        _checks.fail(op, f"{name} must be {listed}, got {value!r}")
