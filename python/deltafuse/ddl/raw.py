"""The boundary as one differentiable operator on rows, and the choice of its backend."""

from typing import NamedTuple

import torch

from .. import _library
from . import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # csrc/common/dtype.h
V_LOGITS, BETA_LOGITS, NORMALIZE_K, V_FROM_CONTEXT, X_IN, NORM, SAVE = (1 << i for i in range(7))
_TENSORS = 11  # x to b_beta


class Options(NamedTuple):
    """What the operator does beside its tensors."""

    k_eps: float = 1e-5
    norm_eps: float = 1e-5
    v_scale: float = 4.0
    v_logits: bool = False
    beta_logits: bool = False
    normalize_k: bool = True
    v_from_context: bool = False
    x_in: bool = False
    norm: bool = False
    out_dtype: torch.dtype | None = None

    def flags(self, save=False):
        return (
            V_LOGITS * bool(self.v_logits)
            | BETA_LOGITS * bool(self.beta_logits)
            | NORMALIZE_K * bool(self.normalize_k)
            | V_FROM_CONTEXT * bool(self.v_from_context)
            | X_IN * bool(self.x_in)
            | NORM * bool(self.norm)
            | SAVE * bool(save)
        )


def _fwd_fake(
    x, k, v, beta, beta_erase, read, norm, W_v, b_v, W_beta, b_beta, act, *numbers_and_flags
):
    flags = numbers_and_flags[-1]
    N, d, d_v = x.shape
    wide = reference.compute_dtype(x)

    def made(present, shape, dtype):
        return x.new_empty(shape if present else (0,), dtype=dtype)

    return (
        made(k is not None, (N, d, d_v), x.dtype),
        made(flags & X_IN, (N, d), DTYPES[act]),
        made(flags & NORM, (N, d), DTYPES[act]),
        made(W_v is not None, (N, d_v), wide),
        made(W_beta is not None, (N,), wide),
        made(flags & SAVE, (N, d_v + 2), wide),
    )


def _bwd_fake(d_y, d_x_in, d_c, d_z_v, d_z_beta, y, *rest):
    k, *others = rest[: _TENSORS - 1]
    grads = [y.new_empty(y.shape)]
    for t in (k, *others):
        grads.append(y.new_empty((0,)) if t is None else t.new_empty(t.shape))
    return tuple(grads)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    tensors = inputs[:_TENSORS]
    state = tensors[0] if tensors[1] is None else output[0]
    ctx.save_for_backward(state, *tensors[1:], output[5])
    ctx.act, _, _, ctx.v_scale, ctx.flags = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[5])


def _backward(ops, ctx, d_y, d_x_in, d_c, d_z_v, d_z_beta, _):
    d_x_in = d_x_in if ctx.flags & X_IN else None
    grads = ops.ddl_boundary_bwd(
        d_y, d_x_in, d_c, d_z_v, d_z_beta, *ctx.saved_tensors, ctx.act, ctx.v_scale, ctx.flags
    )
    needed = ctx.needs_input_grad[:_TENSORS]
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 5)


_library.register("ddl_boundary_fwd", _fwd_fake, _setup, _backward)
_library.register_backward("ddl_boundary_bwd", _bwd_fake, "ddl")
_library.register("ddl_rewrite_out", lambda *args: None)
_library.not_on_cuda(torch.float64, "ddl_boundary_fwd", "ddl_rewrite_out")


def boundary(tensors, options):
    """y, x_in, c, z_v, z_beta of rows; `tensors` are x to b_beta as in csrc/ddl/ddl_ops.cpp.

    Those that options or absent tensors leave out are None.
    """
    x, k, *_, W_v, _, W_beta, _ = tensors
    out_dtype = options.out_dtype or (x.dtype if k is None else k.dtype)
    kernel = _library.kernel("ddl_boundary_fwd", x)
    if kernel is None:
        results = _reference(tensors, options, out_dtype)
    else:
        save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
        numbers = (options.k_eps, options.norm_eps, options.v_scale)
        act = DTYPES.index(out_dtype)
        results = kernel(*tensors, act, *numbers, options.flags(save))
    present = (k is not None, options.x_in, options.norm, W_v is not None, W_beta is not None)
    return [t if here else None for t, here in zip(results, present, strict=False)]


def _reference(tensors, options, out_dtype):
    chosen = options._asdict()
    for name in ("x_in", "norm", "out_dtype"):
        del chosen[name]
    with reference.autocast_off(tensors[0]):
        return reference.naive_boundary(*tensors, **chosen, out_dtype=out_dtype)


def rewrite_out(x, k, v, beta, beta_erase, out, options):
    """The rewrite of rows into `out`, which may be x; no gradient."""
    kernel = _library.kernel("ddl_rewrite_out", x)
    if kernel is None:
        gates = (v, beta, beta_erase)
        y = _reference((x, k, *gates, *[None] * 6), options, x.dtype)[0]
        out.copy_(y)
    else:
        kernel(x, k, v, beta, beta_erase, out, options.k_eps, options.v_scale, options.flags())
        _library.written(out)
