"""Rotations by exp(t L) for learned skew L of low rank (arXiv 2512.07805, Section 2)."""

import torch

from .. import _checks
from .._checks import cast
from . import prepare, raw_frame
from .reference_frame import F64

FRAMES = ("internal", "ambient")


def _expect_input(op, name, x):
    _checks.expect_float(op, name, x)
    if x.dim() not in (3, 4):
        _checks.fail(op, f"{name} must be [B, T, H, D] or [total, H, D], got {tuple(x.shape)}")


def _positions(op, t, x):
    """t in float64 as [B, T]; [1, total] for packed x."""
    if t.is_complex() or t.dtype == torch.bool:
        _checks.fail(op, f"t must be integer or floating point, got {t.dtype}", TypeError)
    if t.device != x.device:
        _checks.expect_same_device(op, x=x, t=t)
    leading = x.shape[:-2]
    if t.shape != leading:
        if t.dim() > len(leading) or any(
            n not in (1, size)
            for n, size in zip(reversed(t.shape), reversed(leading), strict=False)
        ):
            _checks.fail(op, f"t must be broadcastable to {tuple(leading)}, got {tuple(t.shape)}")
        t = t.expand(*leading)
    t = cast(t, F64)
    return t if x.dim() == 4 else t.unsqueeze(0)


def _batched(x):
    return x if x.dim() == 4 else x.unsqueeze(0)


def _like(x, y):
    """The result of `_batched(x)` in the shape of x."""
    return y if x.dim() == 4 else y.squeeze(0)


def rank2_rotate(x, a, b, t, omega=1.0):
    """exp(t omega (a b^T - b a^T)) x a head: a rotation in the plane of a and b. Differentiable.

    arXiv 2512.07805, Section 2.2, evaluated in an orthonormal frame of the plane, which stays
    accurate where a and b are nearly parallel. It is `mixture_rotate` with one plane; a = e_i and
    b = e_j turn channels (i, j) clockwise.

    Args:
        x, t: as for `mixture_rotate`.
        a, b: [H, D].
        omega: a number, or a tensor of shape [] or [H].

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError, TypeError: as `mixture_rotate`.
    """
    op = "rank2_rotate"
    _checks.expect_dim(op, "a", a, 2, "[H, D]")
    _checks.expect_dim(op, "b", b, 2, "[H, D]")
    H = a.shape[0]
    if not isinstance(omega, torch.Tensor):
        omega = torch.full((H,), float(omega), dtype=F64, device=a.device)
    if tuple(omega.shape) not in ((), (1,), (H,)):
        _checks.fail(op, f"omega must be a number or [H] = ({H},), got {tuple(omega.shape)}")
    return _mixture(op, x, a.unsqueeze(1), b.unsqueeze(1), omega.expand(H).unsqueeze(1), t, None)


def mixture_rotate(x, a, b, omega, t, *, frame=None):
    """exp(t L) x with L = sum_k omega_k (a_k b_k^T - b_k a_k^T) a head, in O(r D) a token.

    arXiv 2512.07805, Section 2 and Appendix D. The planes may overlap in any way. Differentiable in
    x, a, b, omega and real t; the gradients hold for equal, zero and tiny angles. Computed in
    float32, angles and float64 inputs in float64; integer positions are exact to 2^53, angles to
    1e-15 while |t theta| < 2^50 (NaN beyond, in kernels).

    Args:
        x: [B, T, H, D] or packed [total, H, D]; float32, bfloat16, float16 or float64; any strides,
            but a last one other than 1 costs a copy. [B, H, T, D] is served by `x.transpose(1, 2)`.
        a, b: [H, r, D], any float dtype; 2 r <= D.
        omega: [H, r].
        t: positions, integer or real, broadcastable to [B, T] or [total].
        frame: `prepare_frame(a, b, omega)`, for callers that rotate several tensors by the same
            planes; None prepares it here.

    Returns:
        y, the shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes that do not fit, 2 r > D, several devices.
        TypeError: tensors of a type that is not listed.
    """
    return _mixture("mixture_rotate", x, a, b, omega, t, frame)


def _mixture(op, x, a, b, omega, t, frame):
    _expect_input(op, "x", x)
    prepare.expect_planes(op, a, b, omega)
    if a.device != x.device:
        _checks.expect_same_device(op, x=x, a=a)
    H, D = x.shape[-2:]
    _checks.expect_shape(op, "a", a, (H, a.shape[1], D), "[H, r, D] with the H and D of x")
    t = _positions(op, t, x)
    W, theta = prepare.frame(a, b, omega) if frame is None else _frame(op, x, *frame)
    _checks.expect_shape(op, "theta of the frame", theta, omega.shape, "the shape of omega")
    return _like(x, raw_frame.mixture_rotate(_batched(x), a, b, omega, t, W, theta))


def _frame(op, x, W, theta):
    """W in float32 or float64 and theta in float64."""
    _checks.expect_floats(op, x=x, W=W, theta=theta)
    _checks.expect_dim(op, "theta", theta, 2, "[H, r]")
    H, D = x.shape[-2:]
    r = theta.shape[1]
    _checks.expect_shape(op, "theta", theta, (H, r), "[H, r] with the H of x")
    _checks.expect_shape(op, "W", W, (H, D, 2 * r), "[H, D, 2 r]")
    if 2 * r > D:
        _checks.fail(op, f"2 r must be at most D, got r = {r} planes in D = {D}")
    return W if W.dtype == F64 else cast(W, torch.float32), cast(theta, F64)


def frame_rotate(x, W, theta, t):
    """y = x + W (Rc(t theta) - I) W^T x, for a frame that is itself the parameter.

    arXiv 2512.07805, Section 2.3 and Appendix D. Differentiable in x, W, theta and real t. That W
    is orthonormal is the caller's part (`cayley_basis` and `householder_basis` make it so); its
    gradient is that of the formula, with W unconstrained.

    Args:
        x, t: as for `mixture_rotate`.
        W: [H, D, 2r], any float dtype; columns 2k and 2k + 1 span plane k.
        theta: [H, r], any float dtype, used as the real numbers that it holds.

    Returns:
        y, the shape and dtype of x, contiguous.

    Raises:
        ValueError, TypeError: as `mixture_rotate`.
    """
    op = "frame_rotate"
    _expect_input(op, "x", x)
    W, theta = _frame(op, x, W, theta)
    return _like(x, raw_frame.frame_rotate(_batched(x), W, theta, _positions(op, t, x)))


def basis_rotate(q, k, B, theta, t, output_frame="internal"):
    """q and k rotated in the planes of an orthogonal basis: B Rc(t theta) B^T x a head.

    arXiv 2512.07805, Section 2. Columns 2p and 2p + 1 of B span plane p. In logits the outer B of q
    cancels against that of k, so "internal" leaves it out: Rc(t theta) B^T x, a product (PyTorch's)
    and a clockwise rotation of neighbouring channels. For inference B^T can be merged into the
    projections of q and k. Differentiable in q, k, B, theta and real t; the gradient of B is that
    of the formula ("ambient": of `frame_rotate`'s), with B unconstrained.

    Args:
        q, k: [B, T, H, D] or packed [total, H, D]; k may be None. k may have fewer heads only where
            B and theta have one head, which then serves all.
        B: [H, D, D] orthogonal, D even, any float dtype; [1, D, D] for all heads.
        theta: [H, D/2] or [1, D/2].
        t: as for `mixture_rotate`, for q and k alike.
        output_frame: "internal", or "ambient" for B Rc(t theta) B^T x.

    Returns:
        (q, k), or q alone where k is None; shapes and dtypes of the inputs.

    Raises:
        ValueError, TypeError: as `mixture_rotate`; another output_frame.
    """
    op = "basis_rotate"
    if output_frame not in FRAMES:
        _checks.fail(op, f"output_frame must be 'internal' or 'ambient', got {output_frame!r}")
    rotated = [_in_basis(op, n, x, B, theta, t, output_frame) for n, x in (("q", q), ("k", k))]
    return rotated[0] if k is None else tuple(rotated)


def _in_basis(op, name, x, B, theta, t, output_frame):
    if x is None:
        return None
    _expect_input(op, name, x)
    _checks.expect_float(op, "B", B)
    _checks.expect_dim(op, "B", B, 3, "[H, D, D]")
    _checks.expect_dim(op, "theta", theta, 2, "[H, D/2]")
    H, D = x.shape[-2:]
    if D % 2:
        _checks.fail(op, f"D must be even, got {name} of shape {tuple(x.shape)}")
    if B.shape[0] == 1:
        B = B.expand(H, -1, -1)
    if theta.shape[0] == 1:
        theta = theta.expand(H, -1)
    B, theta = _frame(op, x, B, theta)
    _checks.expect_shape(op, "B", B, (H, D, D), f"[H, D, D] with the H and D of {name}")
    t = _positions(op, t, x)
    if output_frame == "ambient":
        return _like(x, raw_frame.frame_rotate(_batched(x), B, theta, t))
    wide = F64 if x.dtype == F64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        inner = torch.einsum("bthd,hde->bthe", cast(_batched(x), wide), cast(B, wide))
    return cast(_like(x, raw_frame.frame_rotate(inner, None, theta, t)), x.dtype)
