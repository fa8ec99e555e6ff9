"""Rotations in coordinate planes in plain PyTorch, any dtype (arXiv 2512.07805).

They are G(t) = exp(t L) of Multiplicative GRAPE for L = sum_p freqs_p (e_i e_j^T - e_j e_i^T), with
the channels i and j of plane p; that is clockwise, and rotary embeddings are its transpose.

Plane p of a head is rotated by angle(p) = sum_a position_a freqs[p, a]; sg = 1, or -1 clockwise:
    y0 = m (x0 cos - sg x1 sin),   y1 = m (sg x0 sin + x1 cos)
Tensors are in the form of csrc/grape/rotary.h: freqs [Hf, P, A], positions [B, T, Hp, A], tables
[B or 1, T or rows, Ht, P].
"""

import math

import torch

INTERLEAVED, CLOCKWISE, BY_POSITION = 1, 2, 4
# floor(2^192 / (2 pi)) in words of 64 bits, the lowest first; zeros above
_INVERSE = (0x36D8A5664F10E410, 0x7F09D5F47D4D3770, 0x28BE60DB9391054A, 0, 0, 0)
_LOW = 0xFFFFFFFF


def compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def turns(theta):
    """theta / (2 pi) modulo 1 in units of 2^-64, truncated, as int64; |theta| < 2^117.

    The mantissa, an integer below 2^53, times the 128 bits of 1 / (2 pi) that count for it.
    """
    mantissa, exponent = torch.frexp(theta.detach().double())
    finite = mantissa.isfinite()
    m = (torch.where(finite, mantissa, 0).abs() * 2.0**53).to(torch.int64)
    shift = (117 - exponent.to(torch.int64)).clamp(0, 192)
    low, high = (_bits_at(shift + 64 * i) for i in (0, 1))
    size = m * high + _product_high(m, low)
    return torch.where(mantissa < 0, -size, size)


def _bits_at(shift):
    """64 bits of the constant from the given bit on."""
    words = torch.tensor(_INVERSE, dtype=torch.int64, device=shift.device)
    word, bit = shift // 64, shift % 64
    upper = words[word + 1] << (64 - bit).clamp(max=63)
    lower = (words[word] >> bit) & ~(torch.full_like(bit, -1) << (64 - bit).clamp(max=63))
    return torch.where(bit == 0, words[word], upper | lower)


def _product_high(a, b):
    """The upper 64 bits of the 128-bit product of a >= 0 and b, b unsigned."""
    a0, a1, b0, b1 = a & _LOW, a >> 32, b & _LOW, (b >> 32) & _LOW
    t = a1 * b0 + ((a0 * b0 >> 32) & _LOW)  # a1 < 2^21: no overflow
    u = a0 * b1
    carry = (t & _LOW) + (u & _LOW)
    return a1 * b1 + (t >> 32) + ((u >> 32) & _LOW) + (carry >> 32)


def token_positions(T, device, offset=0, offsets=None, cu_seqlens=None):
    """Positions [B or 1, T] of tokens: their index in the sequence, plus the offsets."""
    index = torch.arange(T, device=device)
    if cu_seqlens is None:
        positions = index[None] + offset
        return positions if offsets is None else positions + offsets.long()[:, None]
    cu = cu_seqlens.long()
    sequence = torch.searchsorted(cu, index, right=True).sub(1).clamp(0, max(0, cu.numel() - 2))
    positions = index - cu[sequence] + offset
    return (positions if offsets is None else positions + offsets.long()[sequence])[None]


def angles(freqs, positions):
    """Angles [B, T, H, P] in float64, integer positions reduced exactly; differentiable."""
    product = (positions.double().unsqueeze(-2) * freqs.double()).sum(-1)
    if positions.is_floating_point():
        return product
    turn = (positions.long().unsqueeze(-2) * turns(freqs)).sum(-1)  # wraps: modulo whole turns
    reduced = turn.double() * (2 * math.pi / 2.0**64)
    return reduced + (product - product.detach())  # the value of one, the gradient of the other


def _rotate(x, cos, sin, flags):
    """x [B, T, H, D]; cos and sin [B or 1, T, Ha, P]."""
    P, repeat = cos.shape[-1], x.shape[2] // max(1, cos.shape[2])
    if cos.shape[2] > 1:
        cos, sin = (t.repeat_interleave(repeat, 2) for t in (cos, sin))
    wide = x.to(compute_dtype(x))
    if flags & INTERLEAVED:
        x0, x1 = wide[..., : 2 * P : 2], wide[..., 1 : 2 * P : 2]
    else:
        x0, x1 = wide[..., :P], wide[..., P : 2 * P]
    if flags & CLOCKWISE:
        sin = -sin
    y0, y1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    y = torch.stack((y0, y1), -1).flatten(-2) if flags & INTERLEAVED else torch.cat((y0, y1), -1)
    return torch.cat((y.to(x.dtype), x[..., 2 * P :]), -1)


def naive_rotary(
    q,
    k,
    freqs,
    positions,
    offsets,
    cu_seqlens,
    cos_q,
    sin_q,
    cos_k,
    sin_k,
    offset=0,
    factor=1.0,
    flags=0,
):
    """Rotated q and k (None without one); arguments as in csrc/grape/grape_ops.cpp."""
    dtype, T = compute_dtype(q), q.shape[1]
    if positions is None:
        own = token_positions(T, q.device, offset, offsets, cu_seqlens)
    if cos_q is None:
        where = own[..., None, None] if positions is None else positions
        angle = angles(freqs, where)
        tables = [(factor * t).to(dtype) for t in (angle.cos(), angle.sin())] * 2
    else:
        tables = [
            cos_q,
            sin_q,
            cos_q if cos_k is None else cos_k,
            sin_q if sin_k is None else sin_k,
        ]
        if flags & BY_POSITION:
            rows = own if positions is None else positions[:, :, 0, 0].long()
            tables = [t[0][rows] for t in tables]
        tables = [factor * t.to(dtype) for t in tables]
    y = _rotate(q, tables[0], tables[1], flags)
    return y, None if k is None else _rotate(k, tables[2], tables[3], flags)
