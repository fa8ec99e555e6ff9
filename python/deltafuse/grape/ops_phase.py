"""The contextual phase of GRAPE-M (arXiv 2512.07805)."""

import torch

from .. import _checks
from . import raw_phase, validation
from .reference_phase import LARGEST, UNIT


def cumulative_phase(omega, cu_seqlens=None, initial=None, *, validate=False):
    """Phi_t = sum_{s<t} omega_s, exclusive, from 0 at the start of every sequence.

    The position of contextual GRAPE-M (arXiv 2512.07805), where token s advances the angle by
    omega_s. Summed in int64 fixed point of 2^-40, so that chunks and single steps, each started
    from the `final` before it, give the bits of one call over all tokens. The gradient, d omega_s =
    sum_{t>s} d phi_t, stays within the call: none flows through initial and final.

    Args:
        omega: [B, T], or [B, T, ...] for several phases a token; any float dtype. Every sum must
            stay below 2^23.
        cu_seqlens: [N + 1] int32 or int64, where packed sequences begin; B = 1.
        initial: the `final` of the tokens before, [B, ...] ([N, ...] with cu_seqlens); int64.
        validate: looks at the values of cu_seqlens and phi, which on CUDA waits for the GPU.

    Returns:
        phi: [B, T, ...] float64.
        final: int64, the shape of `initial`; to be passed on, not to be computed with.

    Raises:
        ValueError: shapes that do not fit; on the CPU or with validate bad cu_seqlens, and sums
            beyond 2^23 or omega that is not finite.
        TypeError: omega is not floating point.
    """
    op = "cumulative_phase"
    _checks.expect_float(op, "omega", omega)
    if omega.dim() < 2:
        _checks.fail(op, f"omega must be [B, T] or [B, T, ...], got shape {tuple(omega.shape)}")
    N = validation.expect_sequences(op, cu_seqlens, omega, validate)
    if initial is not None:
        _checks.expect_shape(op, "initial", initial, (N, *omega.shape[2:]), "[N, ...] of omega")
        if initial.dtype != torch.int64:
            _checks.fail(op, f"initial must be the int64 `final` of a call, got {initial.dtype}")
        _checks.expect_same_device(op, omega=omega, initial=initial)
    phi, final = raw_phase.phase(omega, cu_seqlens, initial)
    if validation.readable(final, validate) and omega.numel():
        _expect_in_range(op, omega, cu_seqlens, initial)
    return phi, final


def _expect_in_range(op, omega, cu_seqlens, initial):
    """No sum of a sequence is beyond 2^23: the sums of magnitudes are not."""
    sums = omega.detach().double().abs().cumsum(1)
    if cu_seqlens is None:
        sums = sums[:, -1]
    else:
        at = cu_seqlens.long()
        sums = torch.cat((torch.zeros_like(sums[0, :1]), sums[0]))[at].diff(dim=0)
    largest = float(sums.max())
    if initial is not None:
        largest += float(initial.double().abs().max()) * UNIT
    if not largest < LARGEST:
        _checks.fail(op, f"omega must be finite and its sums below 2^23, got {largest}")
