"""The rotation of q and k as one differentiable operator, and the choice of its backend."""

import torch

from .. import _library
from . import reference_rotary as reference
from .reference_rotary import BY_POSITION, CLOCKWISE, INTERLEAVED

__all__ = ["BY_POSITION", "CLOCKWISE", "INTERLEAVED", "rotate", "rotate_out"]
ANGLES, TABLES = 8, 16  # gradients that the backward is asked for
_SAVED = 10  # q to sin_k
CUDA_PLANES = 512  # csrc/grape/rotary_launch.h


def angle_heads(freqs, positions, cos):
    if cos is not None:
        return cos.shape[2]
    return freqs.shape[0] if positions is None else max(freqs.shape[0], positions.shape[2])


def _fwd_fake(q, k, *rest):
    return q.new_empty(q.shape), q.new_empty((0,)) if k is None else k.new_empty(k.shape)


def _bwd_fake(dq, dk, q, k, freqs, positions, offsets, cu, cos_q, sin_q, cos_k, *rest):
    angles, tables = rest[-1] & ANGLES, rest[-1] & TABLES
    real = angles and positions is not None and positions.is_floating_point()
    two = tables and cos_k is not None

    def made(wanted, like, **options):
        return dq.new_empty((0,)) if not wanted else like.new_empty(like.shape, **options)

    def table(wanted):
        shape = (*dq.shape[:2], *cos_q.shape[2:]) if wanted else (0,)
        return dq.new_empty(shape, dtype=reference.compute_dtype(dq))

    return (
        made(True, dq),
        made(dk is not None, dk),
        made(angles, freqs),
        made(real, positions, dtype=torch.float64),
        *(table(wanted) for wanted in (tables, tables, two, two)),
    )


def _wanted(needed):
    """What gradients are wanted, from the flags of q to sin_k."""
    return ANGLES * bool(needed[2] or needed[3]) | TABLES * any(needed[6:10])


def _save(ctx, inputs, y_q, y_k):
    """For the angles' gradient the rotated tensors, for that of tables q and k themselves."""
    q, k, *angle_tensors = inputs[:_SAVED]
    wanted = _wanted(ctx.needs_input_grad)
    kept = (q, k) if wanted & TABLES else (y_q, y_k) if wanted else (None, None)
    kept = [t if k is not None or i == 0 else None for i, t in enumerate(kept)]
    ctx.save_for_backward(*kept, *angle_tensors)
    ctx.has_k = k is not None
    ctx.offset, ctx.factor, flags = inputs[_SAVED : _SAVED + 3]
    ctx.flags = flags | wanted


def _setup(ctx, inputs, output):
    _save(ctx, inputs, *output)


def _backward(ops, ctx, dq, dk):
    dk = dk if ctx.has_k else None
    saved = ctx.saved_tensors
    positions = saved[3]
    grads = ops.grape_rotary_bwd(dq, dk, *saved, ctx.offset, ctx.factor, ctx.flags)
    dq, dk, dfreqs, dpositions, *dtables = grads
    if positions is not None and positions.is_floating_point():
        dpositions = dpositions.to(positions.dtype)
    dtables = [
        _like_table(g, t) if ctx.flags & TABLES and t is not None else None
        for g, t in zip(dtables, saved[6:10], strict=True)
    ]
    each = (dq, dk, dfreqs, dpositions, None, None, *dtables)
    needed = ctx.needs_input_grad[:_SAVED]
    return (*(g if need else None for g, need in zip(each, needed, strict=True)), None, None, None)


def _like_table(grad, table):
    grad = grad.sum(0, keepdim=True) if table.shape[0] < grad.shape[0] else grad
    return grad.to(table.dtype)


_library.register("grape_rotary_fwd", _fwd_fake, _setup, _backward)
_library.register_backward("grape_rotary_bwd", _bwd_fake, "grape")
_library.register("grape_rotary_out", lambda *args: None)
_library.not_on_cuda(torch.float64, "grape_rotary_fwd", "grape_rotary_out")


def _kernel(name, tensors):
    """The compiled operator, or None: also for what the CUDA kernels leave to the reference."""
    q, freqs, cos = tensors[0], tensors[2], tensors[6]
    if q.is_cuda and (cos.shape[-1] if freqs is None else freqs.shape[1]) > CUDA_PLANES:
        return None
    return _library.kernel(name, q)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, backward, q, k, *rest):
        kernel(q, k, *rest, q, k)
        dirty = (q,) if k is None else (q, k)
        ctx.mark_dirty(*dirty)
        needed = ctx.needs_input_grad
        ctx.needed = needed[2:]
        wanted = _wanted(ctx.needed)
        kept = dirty if wanted else (None, None)
        ctx.save_for_backward(kept[0], kept[1] if k is not None else None, *rest[: _SAVED - 2])
        ctx.has_k, ctx.ops_backward = k is not None, backward
        ctx.offset, ctx.factor, ctx.flags = *rest[-3:-1], rest[-1] | wanted
        return dirty[0] if k is None else dirty

    @staticmethod
    def backward(ctx, dq, dk=None):
        saved = ctx.saved_tensors
        dq, dk, dfreqs, dpositions, *_ = ctx.ops_backward(
            dq, dk, *saved, ctx.offset, ctx.factor, ctx.flags
        )
        positions = saved[3]
        if positions is not None and positions.is_floating_point():
            dpositions = dpositions.to(positions.dtype)
        each = (dq, dk, dfreqs, dpositions)
        grads = (g if need else None for g, need in zip(each, ctx.needed[:4], strict=True))
        return (None, None, *grads, *[None] * 9)


def rotate(tensors, offset, factor, flags):
    """Rotated q and k (None without one); `tensors` are q to sin_k of csrc/grape/grape_ops.cpp."""
    kernel = _kernel("grape_rotary_fwd", tensors)
    if kernel is None:
        return reference.naive_rotary(*tensors, offset, factor, flags)
    q, k = kernel(*tensors, offset, factor, flags)
    return q, None if tensors[1] is None else k


def rotate_out(tensors, out_q, out_k, offset, factor, flags):
    """The rotation into other tensors, or into q and k themselves; no gradient."""
    kernel = _kernel("grape_rotary_out", tensors)
    if kernel is not None:
        kernel(*tensors, offset, factor, flags, out_q, out_k)
        return _library.written(out_q, out_k)
    y_q, y_k = reference.naive_rotary(*tensors, offset, factor, flags)
    out_q.copy_(y_q)
    if out_k is not None:
        out_k.copy_(y_k)


def rotate_in_place(tensors, offset, factor, flags):
    """q and k themselves, rotated; differentiable except in cos and sin.

    Autograd allows a function that changes several tensors only if none of them is a view: views
    of which gradients are asked for are rotated one after the other.
    """
    q, k, *rest = tensors
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    kernel = _kernel("grape_rotary_out", tensors)
    if not recorded:
        rotate_out(tensors, q, k, offset, factor, flags)
    elif kernel is None or torch.compiler.is_compiling():
        y_q, y_k = rotate(tensors, offset, factor, flags)
        q.copy_(y_q)
        if k is not None:
            k.copy_(y_k)
    else:
        backward = _library.kernel("grape_rotary_bwd", q)
        numbers = (offset, factor, flags)
        if k is None or not (q._is_view() or k._is_view()):
            _InPlace.apply(kernel, backward, q, k, *rest, *numbers)
        else:
            _InPlace.apply(kernel, backward, q, None, *rest, *numbers)
            tables = [rest[4], rest[5]] if rest[6] is None else [rest[6], rest[7]]
            _InPlace.apply(kernel, backward, k, None, *rest[:4], *tables, None, None, *numbers)
    return q, k
