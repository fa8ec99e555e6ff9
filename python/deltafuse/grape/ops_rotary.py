"""Rotations in coordinate planes: rotary embeddings, Multiplicative GRAPE (arXiv 2512.07805)."""

import torch

from .. import _checks
from . import raw_rotary as raw
from . import validation
from .frequencies import rotary_frequencies
from .reference_rotary import token_positions


class _Call:
    """The arguments of a rotation on their way to the operator."""

    def __init__(self, op, q, k, *, interleaved, clockwise, cu_seqlens, offsets, validate):
        self.op, self.validate = op, validate
        self.packed = q.dim() == 3
        if self.packed:
            if cu_seqlens is None:
                _checks.fail(op, f"q {tuple(q.shape)} is packed [total, H, D]: give cu_seqlens")
            q, k = q.unsqueeze(0), None if k is None else k.unsqueeze(0)
        _checks.expect_floats(op, q=q, k=k)
        validation.expect_heads(op, q, k)
        self.q, self.k = q, k
        self.D = q.shape[3]
        self.cu_seqlens = cu_seqlens
        self.N = validation.expect_sequences(op, cu_seqlens, q, validate)
        self.offset, self.offsets = self._split_offsets(offsets)
        self.flags = raw.INTERLEAVED * bool(interleaved) | raw.CLOCKWISE * bool(clockwise)
        self.freqs = self.positions = None
        self.tables = [None] * 4
        self.factor = 1.0

    def _split_offsets(self, offsets):
        if isinstance(offsets, torch.Tensor):
            validation.expect_indices(self.op, "offsets", offsets, self.N, self.q)
            return 0, offsets
        return 0 if offsets is None else offsets, None

    def own_positions(self):
        """Positions [B or 1, T] where none were given."""
        where = (self.offset, self.offsets, self.cu_seqlens)
        return token_positions(self.q.shape[1], self.q.device, *where)

    def set_angles(self, freqs, positions):
        validation.expect_width(self.op, "freqs", 2 * freqs.shape[1], self.D)
        validation.expect_group(self.op, "freqs", freqs.shape[0], self.q, self.k)
        if positions is not None:
            heads = positions.shape[2]
            validation.expect_group(self.op, "phase", heads, self.q, self.k)
            if 1 not in (heads, freqs.shape[0]) and heads != freqs.shape[0]:
                _checks.fail(
                    self.op, f"phase has {heads} heads, freqs {freqs.shape[0]}: one, or as many"
                )
        self.freqs, self.positions = freqs, positions

    def tabulate(self):
        """angle="fp32": cos and sin of the float32 products, as tables."""
        freqs, positions = self.freqs.float(), self.positions
        if positions is None:
            positions = self.own_positions()[..., None, None]
        products = positions.float().unsqueeze(-2) * freqs
        angle = products.squeeze(-1) if products.shape[-1] == 1 else products.sum(-1)
        self.tables[:2] = angle.cos() * self.factor, angle.sin() * self.factor
        self.freqs = self.positions = None
        self.factor = 1.0

    def set_tables(self, cos, sin, positions, max_seqlen=None):
        """cos and sin, each a tensor or a pair for q and k."""
        pairs = [t if isinstance(t, (tuple, list)) else (t,) for t in (cos, sin)]
        if len(pairs[0]) != len(pairs[1]) or len(pairs[0]) not in (1, 2):
            _checks.fail(self.op, "cos and sin must both be tensors, or both pairs for q and k")
        made = [validation.as_tables(self.op, c, s, self.q) for c, s in zip(*pairs, strict=True)]
        first = made[0]
        for table in made:
            width = 2 * table[0].shape[-1]
            validation.expect_width(self.op, "cos", width, self.D)
            if table[2] != first[2] or table[0].shape != first[0].shape:
                _checks.fail(
                    self.op,
                    "cos of q and k must have one shape, got "
                    f"{tuple(first[0].shape)} and {tuple(table[0].shape)}",
                )
        self.tables[: 2 * len(made)] = [t for cos, sin, _ in made for t in (cos, sin)]
        if first[2]:
            self._by_position(positions, max_seqlen)
        elif positions is not None or self.offsets is not None or self.offset:
            _checks.fail(self.op, "positions have no meaning beside cos and sin of every token")

    def _by_position(self, positions, max_seqlen):
        if positions is not None and (positions.is_floating_point() or positions.shape[3] != 1):
            _checks.fail(
                self.op,
                "cos and sin [rows, P] need position_ids [B, T] of integers, got "
                f"{tuple(positions.shape)} {positions.dtype}",
            )
        given = (self.offset, self.offsets, self.cu_seqlens, positions, max_seqlen, self.validate)
        rows = self.tables[0].shape[1]
        validation.expect_rows(self.op, rows, self.q.shape[1], *given)
        if any(t is not None and t.requires_grad for t in self.tables):
            where = self.own_positions() if positions is None else positions[:, :, 0, 0]
            self.tables = [None if t is None else t[0][where.long()] for t in self.tables]
        else:
            self.positions = positions
            self.flags |= raw.BY_POSITION

    def run(self, inplace=False, output_cache=None):
        tensors = (self.q, self.k, self.freqs, self.positions, self.offsets, self.cu_seqlens)
        arguments = ((*tensors, *self.tables), self.offset, self.factor, self.flags)
        if output_cache is not None:
            return self._into_cache(arguments, inplace, output_cache)
        if not inplace:
            return self._back(*raw.rotate(*arguments))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tables):
            _checks.fail(self.op, "gradients of cos and sin need q and k: not in place")
        return self._back(*raw.rotate_in_place(*arguments))

    def _into_cache(self, arguments, inplace, cache):
        op, k = self.op, self.k
        if k is None:
            _checks.fail(op, "output_cache receives the rotated k, which is not given")
        cache = cache.unsqueeze(0) if self.packed else cache
        _checks.expect_shape(op, "output_cache", cache, k.shape, "the shape of k")
        _checks.expect_same_dtype(op, k=k, output_cache=cache)
        validation.expect_writable(op, output_cache=cache)
        inputs = [t for t in (*arguments[0], cache) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise RuntimeError(f"{op}: output_cache has no gradient; use torch.no_grad()")
        q = self.q if inplace else torch.empty_like(self.q, memory_format=torch.contiguous_format)
        raw.rotate_out(arguments[0], q, cache, *arguments[1:])
        return self._back(q, cache)

    def _back(self, q, k):
        if self.packed:
            q, k = q.squeeze(0), None if k is None else k.squeeze(0)
        return q, k


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Rotary embedding of one tensor from tables, by the calling convention of flash-attn.

    y0 = x0 cos - x1 sin, y1 = x0 sin + x1 cos (arXiv 2104.09864; arXiv 2512.07805).
    Computed in float32 (float64 for float64), rounded once. Differentiable in x; tables get no
    gradient here.

    Args:
        x: [B, T, H, D], or [total, H, D] with cu_seqlens; any strides (a last one other than 1
            costs a copy).
        cos, sin: [rows, Dr / 2], any float dtype; row i is position i, Dr <= D.
        interleaved: pairs (2p, 2p + 1) instead of (p, p + Dr / 2).
        inplace: x itself is rotated and returned.
        seqlen_offsets: position of the first token, an int or a tensor [B] (a sequence each).
        cu_seqlens: [N + 1] int32 or int64, where sequences begin.
        max_seqlen: the longest sequence; only to check the tables' rows.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shapes that do not fit, too few rows, an expanded x or a leaf that requires grad
            in place, bad cu_seqlens (their values are looked at on the CPU alone).
        TypeError: tensors that are not floating point.
    """
    op = "apply_rotary_emb"
    if inplace:
        validation.expect_writable(op, x=x)
    call = _Call(
        op,
        x,
        None,
        interleaved=interleaved,
        clockwise=False,
        cu_seqlens=cu_seqlens,
        offsets=seqlen_offsets,
        validate=False,
    )
    call.set_tables(cos.detach(), sin.detach(), None, max_seqlen)
    y = call.run(inplace)[0]
    return x if inplace else y


def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """Rotary embedding of q and k, by the calling convention of transformers and Liger.

    q cos + rotate_half(q) sin, computed in float32 and rounded once to the dtype of q and k, also
    where cos is of a wider type. Differentiable in q, k, cos and sin.

    Args:
        q: [B, Hq, T, D] ([B, T, Hq, D] with unsqueeze_dim=2), through strides, never a copy.
        k: [B, Hk, T, D], likewise; Hk divides Hq.
        cos, sin: [B or 1, T, Dr] as `LlamaRotaryEmbedding` makes them, or [rows, Dr] for positions.
            Both halves of the last dimension hold the same numbers; the first one is read. Dr < D
            leaves the other channels as they are.
        position_ids: [B, T], rows of cos [rows, Dr]; without meaning for the other form. An int is
            taken as unsqueeze_dim, which is fifth in transformers.
        unsqueeze_dim: 1 or 2, the dimension of heads.

    Returns:
        q and k rotated, in their shapes and dtypes.

    Raises:
        ValueError: shapes that do not fit, too few rows.
        TypeError: tensors that are not floating point.
    """
    op = "apply_rotary_pos_emb"
    if isinstance(position_ids, int):
        position_ids, unsqueeze_dim = None, position_ids
    validation.expect_choice(op, "unsqueeze_dim", unsqueeze_dim, (1, 2))
    for name, t in (("q", q), ("k", k)):
        _checks.expect_dim(op, name, t, 4, "[B, H, T, D]")
    if cos.shape[-1] % 2:
        _checks.fail(op, f"cos must hold each frequency twice, got shape {tuple(cos.shape)}")
    swap = unsqueeze_dim == 1
    if swap:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    options = dict(interleaved=False, clockwise=False, cu_seqlens=None, offsets=None)
    call = _Call(op, q, k, **options, validate=False)
    cos, sin = (t.narrow(-1, 0, t.shape[-1] // 2) for t in (cos, sin))
    positions = None
    if cos.dim() == 2 and position_ids is not None:
        positions = validation.as_positions(op, "position_ids", position_ids, q, axes=False)
    call.set_tables(cos, sin, positions)
    q, k = call.run()
    return (q.transpose(1, 2), k.transpose(1, 2)) if swap else (q, k)


def rotary_qk(
    q,
    k=None,
    *,
    freqs=None,
    base=1e4,
    rotary_dim=None,
    position_ids=None,
    offsets=None,
    cu_seqlens=None,
    phase=None,
    cos=None,
    sin=None,
    interleaved=False,
    clockwise=False,
    inplace=False,
    attention_factor=1.0,
    angle="exact",
    output_cache=None,
    validate=False,
):
    """Rotates q and k in one pass: RoPE, learned-frequency and contextual Multiplicative GRAPE.

    G(t) = exp(t L) of arXiv 2512.07805 in coordinate planes: plane p turns by
    sum_a position_a freqs[p, a], or by phase freqs[p]. Arithmetic in float32 (float64 for float64),
    rounded once. Differentiable in q, k, freqs, phase, real positions, cos and sin. On CUDA float64
    and more than 512 planes run as plain PyTorch.

    Args:
        q: [B, T, Hq, D], or [total, Hq, D] with cu_seqlens; float32, bfloat16, float16, float64.
        k: [B, T, Hk, D] of the same dtype, Hk divides Hq; None rotates q alone.
        freqs: [P], [H, P]; with axes [P, A], [H, P, A]; P = Dr / 2. H divides Hq and Hk: q's head h
            uses row h H // Hq. None: base^(-2p / Dr), made anew in every call.
        base, rotary_dim: Dr (default D) and the base where neither freqs nor cos is given.
        position_ids: [T], [B, T] or, with axes, [B, T, A]; integers below 2^31 or real numbers.
            None: the index in the sequence.
        offsets: added to the index: an int, or [B] (with cu_seqlens one a sequence).
        cu_seqlens: [N + 1] int32 or int64, where packed sequences begin.
        phase: [B, T] or [B, T, H], real, from `cumulative_phase`; instead of positions.
        cos, sin: tables instead of freqs: [rows, P] by position, or [B or 1, T, P]. A pair of them,
            (for q, for k), where these differ, as in XPos.
        interleaved: planes (2p, 2p + 1) instead of (p, p + P).
        clockwise: the orientation of exp(+angle L(e_i, e_j)), the paper's; False is RoPE's.
        inplace: q and k are changed and returned. Not together with gradients of cos and sin.
        attention_factor: multiplies cos and sin.
        angle: "exact" reduces integer positions without rounding and real ones in float64 (error at
            most 1.5e-7 below 2^31); "fp32" has the bits of a table of float32 products.
        output_cache: [B, T, Hk, D], receives the rotated k; without gradients.
        validate: looks at the values of cu_seqlens and positions, which on CUDA waits for the GPU.

    Returns:
        (q, k), or q where k is None.

    Raises:
        ValueError: shapes or combinations that do not fit; in place an expanded tensor or a leaf
            that requires grad; on the CPU or with validate bad cu_seqlens and positions beyond cos.
        TypeError: tensors that are not floating point.
        RuntimeError: output_cache while gradients are recorded.
    """
    op = "rotary_qk"
    validation.expect_choice(op, "angle", angle, ("exact", "fp32"))
    _exclusive(op, position_ids, offsets, phase, cos, sin, freqs)
    if inplace:
        validation.expect_writable(op, q=q, k=k)
    call = _Call(
        op,
        q,
        k,
        interleaved=interleaved,
        clockwise=clockwise,
        cu_seqlens=cu_seqlens,
        offsets=offsets,
        validate=validate,
    )
    call.factor = float(attention_factor)
    positions, axes = _positions(call, position_ids, phase)
    if cos is None:
        _set_freqs(call, freqs, base, rotary_dim, positions, axes, q.device)
        if angle == "fp32":
            call.tabulate()
    else:
        call.set_tables(cos, sin, positions)
        if rotary_dim is not None and rotary_dim != 2 * call.tables[0].shape[-1]:
            _checks.fail(
                op, f"rotary_dim {rotary_dim}, but cos has {call.tables[0].shape[-1]} planes"
            )
    rotated = call.run(inplace, output_cache)
    if inplace:
        rotated = (q, k if output_cache is None else rotated[1])
    return rotated[0] if k is None else rotated


def _exclusive(op, position_ids, offsets, phase, cos, sin, freqs):
    if position_ids is not None and offsets is not None:
        _checks.fail(op, "give position_ids or offsets, not both")
    if phase is not None and (position_ids is not None or offsets is not None):
        _checks.fail(op, "phase replaces positions: give neither position_ids nor offsets")
    if (cos is None) != (sin is None):
        _checks.fail(op, "cos and sin belong together")
    if cos is not None and (freqs is not None or phase is not None):
        _checks.fail(op, "cos and sin replace freqs and phase: give one of them")


def _positions(call, position_ids, phase):
    """Positions [B, T, Hp, A] and the number of axes, None where positions have none."""
    if phase is not None:
        _checks.expect_float(call.op, "phase", phase)
        if call.packed:
            phase = phase.unsqueeze(0)
        return validation.as_positions(call.op, "phase", phase, call.q, False, heads=True), None
    if position_ids is None:
        return None, None
    axes = position_ids.dim() == 3
    made = validation.as_positions(call.op, "position_ids", position_ids, call.q, axes)
    return made, made.shape[3] if axes else None


def _set_freqs(call, freqs, base, rotary_dim, positions, axes, device):
    if freqs is None:
        if axes is not None:
            _checks.fail(call.op, "position_ids [B, T, A] need freqs [P, A]")
        width = call.D if rotary_dim is None else rotary_dim
        validation.expect_width(call.op, "rotary_dim", width, call.D)
        freqs = rotary_frequencies(width, base, device=device)[0]
    elif rotary_dim is not None and rotary_dim != 2 * freqs.shape[-1 if axes is None else -2]:
        _checks.fail(call.op, f"rotary_dim {rotary_dim}, but freqs has shape {tuple(freqs.shape)}")
    if freqs.device != call.q.device:
        _checks.expect_same_device(call.op, q=call.q, freqs=freqs)
    call.set_angles(validation.as_freqs(call.op, freqs, axes), positions)
