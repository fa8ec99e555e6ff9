"""The phase of contextual Multiplicative GRAPE (arXiv 2512.07805) in plain PyTorch.

Phi_t = sum_{s<t} omega_s within a sequence, in fixed point of 2^-40: sums of integers do not depend
on how the tokens are divided, so whole sequences, chunks and single steps agree in every bit.
"""

import torch

UNIT = 2.0**-40
LARGEST = 2.0**23


class Phase(torch.autograd.Function):
    """(phi, final) of omega; d omega_s = sum_{t>s} d phi_t within the sequence."""

    @staticmethod
    def forward(ctx, omega, cu_seqlens, initial):
        ctx.save_for_backward(cu_seqlens)
        ctx.dtype = omega.dtype
        phi, final = naive_phase(omega, cu_seqlens, initial)
        ctx.mark_non_differentiable(final)
        return phi, final

    @staticmethod
    def backward(ctx, d_phi, _):
        return naive_phase_grad(d_phi, ctx.saved_tensors[0]).to(ctx.dtype), None, None


def naive_phase(omega, cu_seqlens, initial):
    """phi [B, T, ...] in float64 and final [N, ...] in int64 units."""
    fixed = (omega.detach().double() / UNIT).round().long()
    before = torch.nn.functional.pad(fixed.cumsum(1), _one_before(fixed))  # [B, T + 1, ...]
    phi = before[:, :-1]
    if cu_seqlens is None:
        final = before[:, -1]
        if initial is not None:
            phi, final = phi + initial[:, None], final + initial
        return phi.double() * UNIT, final.clone()
    cu = cu_seqlens.long()
    start = before[0, cu[:-1]]
    final = before[0, cu[1:]] - start
    if initial is not None:
        start, final = start - initial, final + initial
    phi = phi - start[sequence_of(cu, omega.shape[1])]
    return phi.double() * UNIT, final


def naive_phase_grad(d_phi, cu_seqlens):
    """Exclusive sums from the end of each sequence, in float64."""
    d_phi = d_phi.double()
    after = torch.nn.functional.pad(d_phi.flip(1).cumsum(1).flip(1), _one_after(d_phi))
    if cu_seqlens is None:
        return after[:, 1:]
    cu = cu_seqlens.long()
    end = cu[1:][sequence_of(cu, d_phi.shape[1])]
    return after[:, 1:] - after[:, end]


def sequence_of(cu, T):
    """The sequence of each token."""
    index = torch.arange(T, device=cu.device)
    return torch.searchsorted(cu, index, right=True).sub(1).clamp(0, max(0, cu.numel() - 2))


def _one_before(t):
    return (0, 0) * (t.dim() - 2) + (1, 0)


def _one_after(t):
    return (0, 0) * (t.dim() - 2) + (0, 1)
