"""The rotation in planes as differentiable operators, and the choice of their backend."""

import torch

from .. import _library
from .._checks import cast
from . import reference_frame as reference
from .reference_frame import compute_dtype

WANT_T, WANT_FRAME, WANT_GENERATOR = 1, 2, 4  # csrc/grape/frame_host.h
MAX_CUDA_D = 256


def _dense(x, *shape, dtype=None):
    return x.new_empty(shape or x.shape, dtype=dtype)


def _bwd_fake(dy, x, W, theta, t, wanted):
    (H, r), D, wide = theta.shape, x.shape[-1], compute_dtype(x)
    generator = W is not None and wanted & WANT_GENERATOR
    sums = generator or wanted & WANT_FRAME

    def made(here, *shape):
        return _dense(x, *(shape if here else (0,)), dtype=wide)

    return (
        _dense(x),
        made(wanted & WANT_T, *x.shape[:3]),
        made(sums and W is not None, H, 2 * r, D),
        made(generator, H, 2 * r, 2 * r),
        made(wanted & WANT_FRAME, H, r),
    )


def _save_frame(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _frame_backward(ops, ctx, dy):
    x, W, theta, t = ctx.saved_tensors
    _, need_W, need_theta, need_t = ctx.needs_input_grad
    wanted = WANT_T * need_t + WANT_FRAME * (need_W or need_theta)
    dx, dt, dW, _, dtheta = ops.grape_frame_bwd(dy, x, W, theta, t, wanted)
    return (
        dx,
        cast(dW.mT, W.dtype) if need_W else None,
        cast(dtheta, theta.dtype) if need_theta else None,
        cast(dt.sum(-1), t.dtype) if need_t else None,
    )


def _mixture_backward(ops, ctx, dy):
    x, a, b, omega, t, W, theta = ctx.saved_tensors
    need_planes, need_t = any(ctx.needs_input_grad[1:4]), ctx.needs_input_grad[4]
    wanted = WANT_T * need_t + WANT_GENERATOR * need_planes
    dx, dt, P_t, K, _ = ops.grape_frame_bwd(dy, x, W, theta, t, wanted)
    planes = (None, None, None)
    if need_planes:
        grads = reference.plane_gradients(a, b, omega, W, P_t, K)
        planes = (cast(g, v.dtype) for g, v in zip(grads, (a, b, omega), strict=True))
    return dx, *planes, cast(dt.sum(-1), t.dtype) if need_t else None, None, None


_library.register("grape_frame_fwd", lambda x, *rest: _dense(x), _save_frame, _frame_backward)
_library.register("grape_mixture_fwd", lambda x, *rest: _dense(x), _save_frame, _mixture_backward)
_library.register_backward("grape_frame_bwd", _bwd_fake, "grape")
_library.register(
    "grape_skew_tridiagonal",
    lambda L: (L.new_empty(L.shape[0], L.shape[1] - 1), L.new_empty(L.shape)),
)
_library.not_on_cuda(torch.float64, "grape_frame_fwd", "grape_mixture_fwd")


def _kernel(name, x):
    """The compiled operator, or None where the CUDA kernels do not reach."""
    return None if x.is_cuda and x.shape[-1] > MAX_CUDA_D else _library.kernel(name, x)


def frame_rotate(x, W, theta, t):
    """x [B, T, H, D]; W [H, D, 2r] or None; theta [H, r], t [B, T] in float64."""
    return (_kernel("grape_frame_fwd", x) or reference.naive_frame_rotate)(x, W, theta, t)


def mixture_rotate(x, a, b, omega, t, W, theta):
    """As frame_rotate; gradients go to a, b, omega, never to the frame."""
    kernel = _kernel("grape_mixture_fwd", x) or reference.naive_mixture_rotate
    return kernel(x, a, b, omega, t, W, theta)


def skew_tridiagonal(L):
    return (_library.kernel("grape_skew_tridiagonal", L) or reference.naive_tridiagonal)(L)
