"""The contextual phase as one differentiable operator, and the choice of its backend."""

import torch

from .. import _library
from .reference_phase import Phase


def _fwd_fake(omega, cu_seqlens, initial):
    B, T, M = omega.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    phi = omega.new_empty((B, T, M), dtype=torch.float64)
    return phi, omega.new_empty((N, M), dtype=torch.int64)


def _setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(inputs[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ops, ctx, d_phi, _):
    return ops.grape_phase_bwd(d_phi, ctx.saved_tensors[0]).to(ctx.dtype), None, None


_library.register("grape_phase_fwd", _fwd_fake, _setup, _backward)
_library.register_backward(
    "grape_phase_bwd",
    lambda d_phi, cu_seqlens: d_phi.new_empty(d_phi.shape, dtype=torch.float64),
    "grape",
)


def phase(omega, cu_seqlens, initial):
    """phi and final of omega [B, T, ...]."""
    kernel = _library.kernel("grape_phase_fwd", omega)
    if kernel is None:
        return Phase.apply(omega, cu_seqlens, initial)
    rest = omega.shape[2:]
    M = rest.numel()
    rows = omega.reshape(*omega.shape[:2], M)
    phi, final = kernel(rows, cu_seqlens, None if initial is None else initial.reshape(-1, M))
    return phi.view_as(omega), final.view(final.shape[0], *rest)
