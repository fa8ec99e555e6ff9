"""Multiplicative GRAPE as modules: learned frequencies, contextual phase, mixtures of planes.

Parameters have the names that the paper's repository gives them, and stay in float32 under
`module.to(torch.bfloat16)` and `module.half()`. Normalise q and k before they are rotated, not
after: an RMSNorm with a gain per channel does not commute with a rotation, and the logits of two
tokens would depend on where they are, not only on how far apart.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from .frequencies import rotary_frequencies
from .ops_frame import mixture_rotate
from .ops_phase import cumulative_phase
from .ops_rotary import rotary_qk
from .prepare import prepare_frame
from .reference_rotary import token_positions
from .validation import expect_choice

GATES = ("sigmoid", "softplus", "none")
FIRST_OMEGA = 1e-3  # what the repository puts through the inverse of softplus
_WIDE, _NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


class WideModule(nn.Module):
    """Parameters and buffers that a cast of the module to 16 bits leaves as they are."""

    def _apply(self, fn, recurse=True):
        def keep(t):
            moved = fn(t)
            narrowed = t.dtype in _WIDE and moved.dtype in _NARROW
            return t.to(moved.device) if narrowed else moved

        return super()._apply(keep, recurse)


def expect_sizes(op, **sizes):
    for name, size in sizes.items():
        if size < 1:
            _checks.fail(op, f"{name} must be at least 1, got {size}")


def _expect_alone(op, cache, **others):
    """A cache says where the tokens are: nothing else does."""
    if cache is not None:
        for name, value in others.items():
            if isinstance(value, torch.Tensor) or value:
                _checks.fail(op, f"give cache or {name}, not both")


class GrapeM(WideModule):
    """Rotation of q and k in coordinate planes with learned frequencies: GRAPE-M.

    G(t) = exp(t L) with L = sum_p theta_p L(e_p, e_{p + P}), arXiv 2512.07805, Section 2 and eqs. 3
    to 8; theta = exp(log_freq / log_freq_scale), which starts as RoPE's base^(-2p / head_dim).

    Args:
        n_head: heads; with frequencies of its own for each head of k where k has fewer than q.
        head_dim: D, even; P = D / 2 planes.
        base: of the first frequencies.
        learnable: False freezes log_freq, and log_freq_scale is 1.
        share_across_heads: log_freq [P] for all heads instead of [n_head, P].
        log_freq_scale: a step on log_freq changes log theta by so many times less.
        interleaved: planes of channels (2p, 2p + 1) instead of (p, p + P).
        clockwise: the orientation of exp(+t L), the paper's; False is that of RoPE. Logits do not
            depend on it.

    Raises:
        ValueError: sizes below 1, an odd head_dim, log_freq_scale not positive.
    """

    def __init__(
        self,
        n_head,
        head_dim,
        base=10000.0,
        learnable=True,
        share_across_heads=True,
        log_freq_scale=16,
        *,
        interleaved=False,
        clockwise=True,
    ):
        super().__init__()
        op = type(self).__name__
        expect_sizes(op, n_head=n_head, head_dim=head_dim)
        if head_dim % 2:
            _checks.fail(op, f"head_dim must be even, got {head_dim}")
        if not log_freq_scale > 0:
            _checks.fail(op, f"log_freq_scale must be above 0, got {log_freq_scale}")
        self.n_head, self.head_dim, self.base = n_head, head_dim, float(base)
        self.learnable, self.share_across_heads = learnable, share_across_heads
        self.log_freq_scale = float(log_freq_scale) if learnable else 1.0
        self.rotation = {"interleaved": interleaved, "clockwise": clockwise}
        shape = (head_dim // 2,) if share_across_heads else (n_head, head_dim // 2)
        self.log_freq = nn.Parameter(torch.empty(shape), requires_grad=learnable)
        self.log_freq._no_weight_decay = True
        with torch.no_grad():
            self._reset_frequencies()

    @torch.no_grad()
    def reset_parameters(self):
        """The frequencies of RoPE."""
        self._reset_frequencies()

    def _reset_frequencies(self):
        plane = torch.arange(self.head_dim // 2, dtype=torch.float64)
        log = -2 * math.log(self.base) * self.log_freq_scale / self.head_dim * plane
        self.log_freq.copy_(log.expand_as(self.log_freq))

    @property
    def freq(self):
        """theta [P] or [n_head, P] in float64, so that it has no rounding but log_freq's."""
        return (self.log_freq.double() / self.log_freq_scale).exp()

    def forward(self, q, k=None, positions=None, *, offset=0, cu_seqlens=None, cache=None):
        """q and k, rotated; see `rotary_qk`.

        Args:
            q: [B, T, Hq, D], or packed [total, Hq, D] with cu_seqlens; float32, bfloat16, float16
                or float64.
            k: [B, T, Hk, D] in the dtype of q, Hk divides Hq; None rotates q alone.
            positions: [T] or [B, T], integer or real; None: the index in the sequence + offset.
            offset: int, or a tensor [B] (with cu_seqlens one a sequence).
            cu_seqlens: [N + 1], where packed sequences begin.
            cache: `GrapeCache`; the tokens continue its stream, and it is moved on.

        Returns:
            (q, k), or q alone; shapes and dtypes of the inputs.

        Raises:
            ValueError: shapes that do not fit, a cache together with positions of other kinds.
            TypeError: tensors that are not floating point.
        """
        op = "GrapeM"
        _expect_alone(op, cache, positions=positions, offset=offset, cu_seqlens=cu_seqlens)
        where = {"position_ids": positions, "cu_seqlens": cu_seqlens}
        if positions is None or isinstance(offset, torch.Tensor) or offset:
            where["offsets"] = offset if cache is None else cache.position
        rotated = rotary_qk(q, k, freqs=self.freq, **where, **self.rotation)
        if cache is not None:
            cache.position += q.shape[1]
        return rotated

    def extra_repr(self):
        return (
            f"{self.n_head}, {self.head_dim}, base={self.base:g}, learnable={self.learnable}, "
            f"share_across_heads={self.share_across_heads}, log_freq_scale={self.log_freq_scale:g}"
        )


class GrapeMContext(GrapeM):
    """GRAPE-M whose position is a phase that the tokens themselves advance.

    Phi_t = sum_{s<t} omega_s and plane p turns by Phi_t theta_p, so that G_t^T G_j =
    exp((Phi_j - Phi_t) L): arXiv 2512.07805, the contextual form of eqs. 3 to 8. omega comes from
    the layer's input through `omega_proj`, whose weight starts at 0:

        gate        omega                        first value
        "sigmoid"   sigmoid((w x + b) / 16)      0.3937, as the repository computes it
        "softplus"  softplus(w x + b)            1e-3, as its comments say
        "none"      w x + b, of any sign         1: the position

    An omega other than 1 changes the wavelengths of the first base accordingly. omega and the phase
    are computed in float32 and int64, also under autocast.

    Args:
        n_head, head_dim, base, learnable, share_across_heads, log_freq_scale, interleaved,
            clockwise: as for `GrapeM`. The repository's contextual checkpoints hold log theta
            itself: load them with log_freq_scale=1.
        hidden_size: width of the input that omega is computed from.
        gate: "sigmoid", "softplus" or "none".
        per_head: omega for each of the n_head heads instead of one for all.
        omega_scale: the 16 of the sigmoid.

    Raises:
        ValueError: as `GrapeM`; another gate, omega_scale not positive.
    """

    def __init__(
        self,
        n_head,
        head_dim,
        hidden_size,
        base=10000.0,
        learnable=True,
        share_across_heads=True,
        log_freq_scale=16,
        *,
        gate="sigmoid",
        per_head=False,
        omega_scale=16.0,
        **rotation,
    ):
        frequencies = (base, learnable, share_across_heads, log_freq_scale)
        super().__init__(n_head, head_dim, *frequencies, **rotation)
        op = "GrapeMContext"
        expect_sizes(op, hidden_size=hidden_size)
        expect_choice(op, "gate", gate, GATES)
        if not omega_scale > 0:
            _checks.fail(op, f"omega_scale must be above 0, got {omega_scale}")
        self.hidden_size, self.gate, self.per_head = hidden_size, gate, per_head
        self.omega_scale = float(omega_scale)
        self.omega_proj = nn.Linear(hidden_size, n_head if per_head else 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The frequencies of RoPE, and an omega that does not depend on its input."""
        self._reset_frequencies()
        self.omega_proj.weight.zero_()
        first = 1.0 if self.gate == "none" else math.log(math.expm1(FIRST_OMEGA))
        self.omega_proj.bias.fill_(first)

    def omega(self, hidden):
        """[..., hidden_size] -> [...], or [..., n_head] with per_head; float32 at least."""
        weight, bias = self.omega_proj.weight, self.omega_proj.bias
        device = hidden.device.type
        lowered = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if lowered else contextlib.nullcontext():
            z = F.linear(hidden.to(weight.dtype), weight, bias)
            if self.gate == "sigmoid":
                z = torch.sigmoid(z / self.omega_scale)
            elif self.gate == "softplus":
                z = F.softplus(z)
        return z if self.per_head else z.squeeze(-1)

    def forward(self, q, k, hidden, cache=None, *, cu_seqlens=None):
        """q and k, rotated by the phases of their tokens.

        Args:
            q, k: as for `GrapeM`.
            hidden: [B, T, hidden_size], or packed [total, hidden_size]; any float dtype.
            cache: `GrapeCache`; the tokens continue its stream and its phase.
            cu_seqlens: [N + 1], where packed sequences, and their phases, begin.

        Returns:
            (q, k), or q alone where k is None.

        Raises:
            ValueError: shapes that do not fit, cache together with cu_seqlens; on the CPU a phase
                of 2^23 or more.
            TypeError: tensors that are not floating point.
        """
        op = "GrapeMContext"
        _expect_alone(op, cache, cu_seqlens=cu_seqlens)
        expected = (*q.shape[:-2], self.hidden_size)
        _checks.expect_shape(op, "hidden", hidden, expected, "[B, T, hidden_size] with those of q")
        omega, packed = self.omega(hidden), q.dim() == 3
        initial = None if cache is None else cache.phase
        omega = omega.unsqueeze(0) if packed else omega
        phase, final = cumulative_phase(omega, cu_seqlens, initial)
        phase = phase.squeeze(0) if packed else phase
        where = {"phase": phase, "cu_seqlens": cu_seqlens}
        rotated = rotary_qk(q, k, freqs=self.freq, **where, **self.rotation)
        if cache is not None:
            cache.phase = final
            cache.position += q.shape[1]
        return rotated

    def extra_repr(self):
        return super().extra_repr() + f", gate={self.gate!r}, per_head={self.per_head}"


class GrapeMixture(WideModule):
    """Rotation of q and k by exp(t L) with a learned L = sum_k omega_k (a_k b_k^T - b_k a_k^T).

    The planes of a, b [n_head, rank, head_dim] may overlap and then do not commute (arXiv
    2512.07805, Section 2 and Appendix D). It starts as RoPE on the first 2 rank channels: a_k =
    e_k, b_k = e_{k + rank}, omega_k = base^(-k / rank), turned clockwise.

    Args:
        n_head: heads of a, b and omega; those of k where k has fewer than q.
        head_dim: D.
        rank: planes, at least 1 and at most D / 2.
        base: of the first omega.

    Raises:
        ValueError: sizes below 1, 2 rank > head_dim.
    """

    def __init__(self, n_head, head_dim, rank, *, base=10000.0):
        super().__init__()
        op = "GrapeMixture"
        expect_sizes(op, n_head=n_head, head_dim=head_dim, rank=rank)
        if 2 * rank > head_dim:
            _checks.fail(op, f"2 rank must be at most head_dim = {head_dim}, got rank {rank}")
        self.n_head, self.head_dim, self.rank, self.base = n_head, head_dim, rank, float(base)
        self.a = nn.Parameter(torch.empty(n_head, rank, head_dim))
        self.b = nn.Parameter(torch.empty(n_head, rank, head_dim))
        self.omega = nn.Parameter(torch.empty(n_head, rank))
        for p in self.parameters():
            p._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """RoPE on the first 2 rank channels."""
        axes = torch.eye(self.head_dim)
        self.a.copy_(axes[: self.rank])
        self.b.copy_(axes[self.rank : 2 * self.rank])
        self.omega.copy_(rotary_frequencies(2 * self.rank, self.base)[0])

    def forward(self, q, k=None, positions=None, *, offset=0, cu_seqlens=None, cache=None):
        """q and k, rotated; see `mixture_rotate`. Arguments as for `GrapeM`, D = head_dim.

        The heads of q and k are multiples of n_head: groups of them share the planes of a head.

        Returns:
            (q, k), or q alone; shapes and dtypes of the inputs, contiguous.

        Raises:
            ValueError: shapes that do not fit, a cache together with positions of other kinds.
            TypeError: tensors that are not floating point.
        """
        op = "GrapeMixture"
        _expect_alone(op, cache, positions=positions, offset=offset, cu_seqlens=cu_seqlens)
        if positions is None:
            start = offset if cache is None else cache.position
            start, starts = (0, start) if isinstance(start, torch.Tensor) else (start, None)
            T = q.shape[0 if q.dim() == 3 else 1]
            positions = token_positions(T, q.device, start, starts, cu_seqlens)
            positions = positions.squeeze(0) if q.dim() == 3 else positions
            positions = positions.double()  # once for q and k
        frame = self._frame(cache)
        rotated = tuple(self._rotate(op, x, positions, frame) for x in (q, k) if x is not None)
        if cache is not None:
            cache.position += q.shape[1]
        return rotated[0] if k is None else rotated

    def _frame(self, cache):
        """The frame of the planes; of a stream without gradients the one that it began with."""
        kept = None if cache is None or torch.is_grad_enabled() else cache.frame
        if kept is None:
            kept = prepare_frame(self.a, self.b, self.omega)
            if cache is not None:
                cache.frame = kept
        return kept

    def _rotate(self, op, x, positions, frame):
        H = x.shape[-2]
        if H == 0 or H % self.n_head:
            _checks.fail(op, f"heads must be a multiple of n_head = {self.n_head}, got {H}")
        planes = (self.a, self.b, self.omega)
        if self.n_head != H:
            group = H // self.n_head
            planes, frame = (
                tuple(t.repeat_interleave(group, 0) for t in ts) for ts in (planes, frame)
            )
        return mixture_rotate(x, *planes, positions, frame=frame)

    def extra_repr(self):
        return f"{self.n_head}, {self.head_dim}, rank={self.rank}, base={self.base:g}"
