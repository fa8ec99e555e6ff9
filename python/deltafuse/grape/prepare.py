"""The frame of a mixture of planes."""

import torch

from .. import _checks
from . import raw_frame
from .reference_frame import F64, frame_of


def expect_planes(op, a, b, omega):
    """a, b [H, r, D] and omega [H, r] of real floating point, on one device, 2 r <= D."""
    _checks.expect_floats(op, a=a, b=b, omega=omega)
    _checks.expect_dim(op, "a", a, 3, "[H, r, D]")
    _checks.expect_shape(op, "b", b, a.shape, "the shape of a, [H, r, D]")
    H, r, D = a.shape
    _checks.expect_shape(op, "omega", omega, (H, r), "[H, r]")
    if 2 * r > D:
        _checks.fail(op, f"2 r must be at most D, got r = {r} planes in D = {D}")


def prepare_frame(a, b, omega):
    """The frame of L = sum_k omega_k (a_k b_k^T - b_k a_k^T), once a parameter update.

    exp(t L) x = x + W (Rc(t theta) - I) W^T x; arXiv 2512.07805, Section 2.3 and Appendix D. The
    planes may overlap, repeat or vanish: W is orthonormal to rounding whatever L is.

    Args:
        a, b: [H, r, D], any float dtype; 2 r <= D.
        omega: [H, r].

    Returns:
        W [H, D, 2r], whose columns 2k and 2k + 1 span plane k, and theta [H, r], at least 0 and
        descending, both in float64 on the device of a. They carry no gradient (that of W does not
        exist where two theta agree): `mixture_rotate` takes them as `frame` and differentiates a, b
        and omega. Computed on the CPU: planes on another device are copied, which synchronises it.

    Raises:
        ValueError: shapes that do not fit, 2 r > D, several devices.
        TypeError: tensors that are not real floating point.
    """
    expect_planes("prepare_frame", a, b, omega)
    return frame(a, b, omega)


def frame(a, b, omega):
    """prepare_frame without checks."""
    with torch.no_grad():
        H, r, D = a.shape
        if r == 0 or H == 0:
            return a.new_zeros((H, D, 2 * r), dtype=F64), a.new_zeros((H, r), dtype=F64)
        a64, b64, omega64 = (v.detach().to("cpu", F64) for v in (a, b, omega))
        W, theta = frame_of(a64, b64, omega64, raw_frame.skew_tridiagonal)
        return W.to(a.device), theta.to(a.device)
