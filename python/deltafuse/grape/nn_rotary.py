"""Rotary embeddings by the calling convention of flash-attn's module."""

import torch

from .. import _checks
from .frequencies import rotary_frequencies
from .nn import WideModule
from .ops_rotary import rotary_qk
from .reference_rotary import token_positions
from .validation import expect_writable


class RotaryEmbedding(WideModule):
    """RoPE (arXiv 2104.09864) or XPos (arXiv 2212.10554) of packed q, k and v, in place.

    Plane p turns by position * base^(-2p / dim), counter-clockwise: GRAPE-M with fixed frequencies
    (arXiv 2512.07805, eqs. 3 to 8). Angles are exact at any position below 2^31 and need no table.

    Args:
        dim: rotary width, even; channels beyond it stay as they are.
        base: wavelength base.
        interleaved: pairs (2p, 2p + 1) instead of (p, p + dim / 2).
        scale_base: XPos: plane p of q is multiplied by zeta_p^((t - c) / scale_base) and that of k
            by its inverse, zeta_p = (2p + 0.4 dim) / (1.4 dim); None for RoPE. c is half of
            max_seqlen, or of the tokens so far, as in flash-attn; keys that are kept between calls
            need the same max_seqlen in all of them.
        device: where the buffers are.

    Attributes:
        inv_freq, scale: buffers float32 [dim / 2] (scale None for RoPE), not in the state_dict,
            float32 also under `module.to(torch.bfloat16)`.

    Raises:
        ValueError: an odd dim, scale_base not positive.
    """

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None, device=None):
        super().__init__()
        if scale_base is not None and not scale_base > 0:
            _checks.fail("RotaryEmbedding", f"scale_base must be above 0, got {scale_base}")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base = scale_base
        inv_freq, _ = rotary_frequencies(dim, self.base, device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        scale = None
        if scale_base is not None:
            plane = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
            scale = (plane + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """Rotates q and k where they are.

        Args:
            qkv: [B, T, 3, H, D]; or [B, T, num_heads_q + 2 Hk, D], heads of q, then of k, then of
                v; with kv it is q alone, [B, T, Hq, D]. float32, bfloat16, float16 or float64.
            kv: [B, T, 2, Hk, D], Hk divides Hq.
            seqlen_offset: position of the first token, an int or a tensor [B].
            max_seqlen: the longest sequence that is to come; XPos alone looks at it.
            num_heads_q: for qkv with four dimensions.

        Returns:
            qkv itself, or (qkv, kv) themselves.

        Raises:
            ValueError: shapes that do not fit, a leaf that requires grad, XPos with a tensor of
                offsets and no max_seqlen.
            TypeError: tensors that are not floating point.
        """
        op = "RotaryEmbedding"
        expect_writable(op, qkv=qkv, kv=kv)
        q, k, both = self._parts(op, qkv, kv, num_heads_q)
        options = {"interleaved": self.interleaved, "inplace": True}
        if self.scale is None:
            where = {"freqs": self.inv_freq, "offsets": seqlen_offset, **options}
            if both is not None:
                rotary_qk(both, **where)
            else:
                rotary_qk(q, k, **where)
        else:
            tables = self._tables(op, q, seqlen_offset, max_seqlen)
            rotary_qk(q, k, **tables, **options)
        return qkv if kv is None else (qkv, kv)

    def _parts(self, op, qkv, kv, num_heads_q):
        """q, k, and where they lie side by side both as the heads of one tensor."""
        if kv is not None:
            _checks.expect_dim(op, "qkv", qkv, 4, "[B, T, H, D] beside kv")
            B, T, _, D = qkv.shape
            if kv.dim() != 5:
                _checks.fail(op, f"kv must be [B, T, 2, Hk, D], got shape {tuple(kv.shape)}")
            expected = (B, T, 2, kv.shape[3], D)
            _checks.expect_shape(op, "kv", kv, expected, "[B, T, 2, Hk, D] with those of qkv")
            return qkv, kv[:, :, 0], None
        if qkv.dim() == 5:
            if qkv.shape[2] != 3:
                _checks.fail(op, f"qkv must be [B, T, 3, H, D], got shape {tuple(qkv.shape)}")
            side_by_side = qkv.stride(2) == qkv.shape[3] * qkv.stride(3)
            both = qkv[:, :, :2].flatten(2, 3) if side_by_side else None
            return qkv[:, :, 0], qkv[:, :, 1], both
        _checks.expect_dim(op, "qkv", qkv, 4, "[B, T, Hq + 2 Hk, D] or [B, T, 3, H, D]")
        rest = -1 if num_heads_q is None else qkv.shape[2] - num_heads_q
        if num_heads_q is None or num_heads_q < 1 or rest < 2 or rest % 2:
            _checks.fail(
                op,
                "num_heads_q must leave 2 Hk of the heads of qkv, got "
                f"{num_heads_q} and shape {tuple(qkv.shape)}",
            )
        end = num_heads_q + rest // 2
        return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end], qkv[:, :, :end]

    def _tables(self, op, q, seqlen_offset, max_seqlen):
        """cos and sin of the tokens, multiplied for q and for k."""
        T, offset, offsets = q.shape[1], seqlen_offset, None
        if isinstance(seqlen_offset, torch.Tensor):
            offset, offsets = 0, seqlen_offset
            if max_seqlen is None:
                _checks.fail(op, "XPos needs max_seqlen beside a tensor of offsets, got None")
        length = T + offset if max_seqlen is None else max_seqlen
        at = token_positions(T, q.device, offset, offsets).double().unsqueeze(-1)
        angle = at * self.inv_freq.double()
        factor = self.scale.double() ** ((at - length // 2) / self.scale_base)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        made = {"cos": angle.cos(), "sin": angle.sin()}
        return {n: ((t * factor).to(dtype), (t / factor).to(dtype)) for n, t in made.items()}

    def extra_repr(self):
        xpos = "" if self.scale_base is None else f", scale_base={self.scale_base:g}"
        return f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}{xpos}"
