"""Checks of the rotations' arguments, and their way into the form of csrc/grape/rotary.h."""

import torch

from .. import _checks
from .._checks import cast

INDICES = (torch.int32, torch.int64)


def expect_choice(op, name, value, choices):
    if value not in choices:
        listed = " or ".join(repr(c) for c in choices)
        _checks.fail(op, f"{name} must be {listed}, got {value!r}")


def readable(tensor, validate):
    """Whether values may be looked at: asked for, or a CPU tensor outside of any tracing."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    on_cpu = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and (validate or on_cpu)


def expect_heads(op, q, k):
    """q [B, T, Hq, D] and k [B, T, Hk, D] of one dtype, Hq a multiple of Hk."""
    _checks.expect_dim(op, "q", q, 4, "[B, T, H, D] (or [total, H, D] with cu_seqlens)")
    if k is None:
        return
    if k.dtype != q.dtype:
        _checks.expect_same_dtype(op, q=q, k=k)
    (B, T, Hq, D), of_k = q.shape, k.shape
    Hk = of_k[2] if len(of_k) == 4 else 0
    if of_k != (B, T, Hk, D):
        _checks.fail(
            op,
            "k must be [B, T, Hk, D] with the B, T and D of q, got "
            f"q {tuple(q.shape)} and k {tuple(of_k)}",
        )
    if Hk == 0 or Hq % Hk:
        _checks.fail(op, f"Hq must be a multiple of Hk, got {Hq} and {Hk} heads")


def expect_group(op, name, heads, q, k):
    """Angle heads divide the heads of q and of k."""
    if heads == 1:
        return
    counts = [q.shape[2]] + ([] if k is None else [k.shape[2]])
    if heads == 0 or any(count % heads for count in counts):
        _checks.fail(op, f"{name} has {heads} heads, which do not divide {counts}")


def expect_width(op, name, width, D):
    """The rotary width Dr: even, at most D."""
    if width < 0 or width % 2 or width > D:
        _checks.fail(op, f"{name}: rotary width {width} must be even and at most D = {D}")


def expect_indices(op, name, tensor, count, like):
    if tensor.dtype not in INDICES:
        _checks.fail(op, f"{name} must be int32 or int64, got {tensor.dtype}")
    _checks.expect_dim(op, name, tensor, 1, "[N]")
    if count is not None and tensor.shape[0] != count:
        _checks.fail(op, f"{name} must have {count} elements, got shape {tuple(tensor.shape)}")
    _checks.expect_same_device(op, q=like, **{name: tensor})


def expect_sequences(op, cu_seqlens, q, validate):
    """The number of sequences: B, or that of cu_seqlens [N + 1] with B = 1."""
    if cu_seqlens is None:
        return q.shape[0]
    expect_indices(op, "cu_seqlens", cu_seqlens, None, q)
    if cu_seqlens.shape[0] < 1 or q.shape[0] != 1:
        _checks.fail(
            op,
            "cu_seqlens [N + 1] needs packed tensors with B = 1, got "
            f"cu_seqlens {tuple(cu_seqlens.shape)} and {tuple(q.shape)}",
        )
    if readable(cu_seqlens, validate):
        bounds, total = cu_seqlens.tolist(), q.shape[1]
        if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
            _checks.fail(op, f"cu_seqlens must rise from 0 to the total {total}, got {bounds}")
    return cu_seqlens.shape[0] - 1


def as_positions(op, name, t, q, axes, heads=False):
    """[B, T, Hp, A] from [T], [B, T], with `axes` [.., T, A], with `heads` [B, T, H]."""
    if t.device != q.device:
        _checks.expect_same_device(op, q=q, **{name: t})
    if t.dtype == torch.bool or t.is_complex():
        _checks.fail(op, f"{name} must be integers or real numbers, got {t.dtype}")
    if t.is_floating_point():
        t = t if t.dtype in (torch.float32, torch.float64) else t.float()
    elif t.dtype not in INDICES:
        t = t.long()
    B, T = q.shape[:2]
    given = tuple(t.shape)
    if axes:
        t = t.unsqueeze(-2)
    elif not (heads and t.dim() == 3):
        t = t.view(*given, 1, 1)
    else:
        t = t.unsqueeze(-1)
    t = t.unsqueeze(0) if t.dim() == 3 else t
    if t.dim() != 4 or t.shape[1] != T or t.shape[0] not in (1, B):
        wanted = "[B, T, A]" if axes else "[B, T, H]" if heads and len(given) == 3 else "[B, T]"
        _checks.fail(
            op, f"{name} must broadcast to {wanted} with B, T = {(B, T)}, got shape {given}"
        )
    return t.expand(B, *t.shape[1:])


def as_freqs(op, freqs, axes):
    """[H, P, A] from [P], [H, P], with `axes` [P, A] or [H, P, A]; float32 or float64."""
    _checks.expect_float(op, "freqs", freqs)
    given, shape = freqs.shape, freqs.shape
    if axes is None and len(shape) in (1, 2):
        shape = (*shape, 1)
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3 or shape[-1] != (axes or 1):
        wanted = "[P] or [H, P]" if axes is None else f"[P, A] or [H, P, A] with A = {axes}"
        _checks.fail(op, f"freqs must be {wanted}, got shape {tuple(given)}")
    if shape != given:
        freqs = freqs.view(*shape)
    return freqs if freqs.dtype == torch.float64 else cast(freqs, torch.float32)


def as_tables(op, cos, sin, q):
    """cos and sin as [B or 1, T, 1, P], or [1, rows, 1, P] from [rows, P]; and which of the two."""
    _checks.expect_floats(op, cos=cos, sin=sin)
    if cos.device != q.device:
        _checks.expect_same_device(op, q=q, cos=cos)
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dim() not in (2, 3):
        _checks.fail(
            op,
            "cos and sin must both be [rows, P] or [B, T, P] in one dtype, got "
            f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}",
        )
    if cos.dim() == 2:
        rows, P = cos.shape
        return cos.view(1, rows, 1, P), sin.view(1, rows, 1, P), True
    B, T = q.shape[:2]
    if cos.shape[0] not in (1, B) or cos.shape[1] != T:
        _checks.fail(
            op, f"cos must be [B, T, P] with B, T = {(B, T)} (or B = 1), got {tuple(cos.shape)}"
        )
    return cos.unsqueeze(2), sin.unsqueeze(2), False


def expect_rows(op, rows, T, offset, offsets, cu_seqlens, positions, max_seqlen, validate):
    """The table reaches every position, as far as that is known without looking at a device."""
    least, most = 0, None
    if positions is not None:
        if readable(positions, validate) and positions.numel():
            least, most = (int(x) for x in torch.aminmax(positions))
    else:
        length = T if cu_seqlens is None else max_seqlen
        if cu_seqlens is not None and readable(cu_seqlens, validate):
            length = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        first = last = offset
        if offsets is not None:
            if not readable(offsets, validate) or not offsets.numel():
                return
            first, last = (offset + int(x) for x in torch.aminmax(offsets))
        if length:
            least, most = first, last + length - 1
    if least < 0 or (most is not None and most >= rows):
        _checks.fail(op, f"cos and sin have {rows} rows, but positions are {least}..{most}")


def expect_writable(op, **tensors):
    """In place: no leaf that requires a gradient, no element twice."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.requires_grad and t.is_leaf and torch.is_grad_enabled():
            _checks.fail(op, f"{name} {tuple(t.shape)} is a leaf that requires grad: not in place")
        if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True)):
            _checks.fail(
                op, f"{name} {tuple(t.shape)} is expanded (strides {t.stride()}): not in place"
            )
