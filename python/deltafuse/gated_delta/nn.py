"""The Gated DeltaNet layer (arXiv 2412.06464, section 3.4) and its parts as modules.

Parameters have the names that fla-org/flash-linear-attention gives them, so its checkpoints load.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from .context_parallel import conv_parallel
from .ops import chunk_gated_delta_rule
from .ops_layer import MAX_CONV_WIDTH, causal_conv1d, causal_conv1d_update, gated_rms_norm
from .ops_recurrent import fused_recurrent_gated_delta_rule

SHORT = 64  # tokens up to which inference uses the recurrent form


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU; `weight` [D, 1, W] as nn.Conv1d has it.

    Args:
        dim: D, the number of channels.
        conv_size: W, 2 to 8 taps.
        bias: whether to add a bias [D].

    Raises:
        ValueError: conv_size out of range.
    """

    def __init__(self, dim, conv_size=4, bias=False):
        super().__init__()
        if not 2 <= conv_size <= MAX_CONV_WIDTH:
            raise ValueError(f"conv_size must be in 2..{MAX_CONV_WIDTH}, got {conv_size}")
        self.weight = nn.Parameter(torch.empty(dim, 1, conv_size))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """As nn.Conv1d: uniform in +-1/sqrt(W)."""
        bound = self.weight.shape[2] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x, state=None, output_final_state=False, cu_seqlens=None):
        """x [B, T, D] -> (y [B, T, D], final state [N, D, W - 1] or None); see `causal_conv1d`."""
        return causal_conv1d(
            x, self.weight.squeeze(1), self.bias, state, cu_seqlens, "silu", output_final_state
        )

    def step(self, x, state):
        """The next tokens x [B, T, D]; state [B, D, W - 1] is replaced in place, no gradient."""
        return causal_conv1d_update(x, state, self.weight.squeeze(1), self.bias)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, conv_size={self.weight.shape[2]}"


class GatedRMSNorm(nn.Module):
    """RMS norm over the last dimension, then a gate if there is one; see `gated_rms_norm`.

    activation: of the gate, "silu" (or "swish", the same) in one pass with the norm, or "sigmoid",
    a second pass.
    """

    def __init__(self, dim, eps=1e-5, activation="silu"):
        super().__init__()
        if activation not in ("silu", "swish", "sigmoid"):
            raise ValueError(f"activation must be 'silu', 'swish' or 'sigmoid', got {activation!r}")
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, gate=None):
        """x, gate [..., dim] -> [..., dim] in the dtype of x."""
        if gate is None or self.activation != "sigmoid":
            return gated_rms_norm(x, self.weight, gate, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = gated_rms_norm(x.to(wide), self.weight, None, self.eps)
        return (y * gate.to(wide).sigmoid()).to(x.dtype)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedDeltaNetCache:
    """Recurrent and convolution states of all layers of a model, by `layer_idx`.

    A layer's entry is a dict: recurrent_state [B, HV, K, V] (float32) and conv_state, the tuple of
    the states of q, k and v [B, D, W - 1], or None without convolution.
    """

    def __init__(self):
        self.states = {}
        self.seen = {}

    def __contains__(self, layer_idx):
        return layer_idx in self.states

    def __getitem__(self, layer_idx):
        return self.states[layer_idx]

    def __len__(self):
        return max(self.states, default=-1) + 1

    def update(self, recurrent_state=None, conv_state=None, layer_idx=0, offset=0):
        """Replaces a layer's states after `offset` more tokens; returns its entry."""
        self.states[layer_idx] = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        self.seen[layer_idx] = self.get_seq_length(layer_idx) + offset
        return self.states[layer_idx]

    def get_seq_length(self, layer_idx=0):
        """Tokens that the layer has seen, padding included."""
        return self.seen.get(layer_idx, 0)


class GatedDeltaNet(nn.Module):
    """Token mixer with a gated delta rule state per value head; O(T) in the sequence length.

    q, k, v = short convolutions of projections of x; g and beta from a = Wa x and b = Wb x;
    o = gated delta rule with l2-normalised q, k; out = Wo (RMSNorm(o) * silu(Wg x)).

    Args:
        hidden_size: width of the input and output.
        expand_v: V / K; V = head_dim * expand_v has to be whole.
        head_dim: K.
        num_heads: H, the heads of q and k.
        num_v_heads: HV, a multiple of H; None is H.
        mode: "chunk" (the recurrent form in inference up to 64 tokens) or "fused_recurrent".
        use_gate: the output gate Wg.
        use_short_conv: convolutions before SiLU; SiLU alone without them.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1) (arXiv 2411.12537).
        conv_size, conv_bias: of the convolutions.
        layer_idx: the layer's key in a cache.
        norm_eps: of the output norm.
        output_gate_activation: "swish", its other name "silu", or "sigmoid".

    Raises:
        ValueError: sizes that do not fit, unknown mode.
    """

    def __init__(
        self,
        hidden_size=2048,
        expand_v=2,
        head_dim=256,
        num_heads=6,
        num_v_heads=None,
        mode="chunk",
        use_gate=True,
        use_short_conv=True,
        allow_neg_eigval=False,
        conv_size=4,
        conv_bias=False,
        layer_idx=None,
        norm_eps=1e-5,
        output_gate_activation="swish",
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        _check_config(hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode)
        self.hidden_size = hidden_size
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_dim, round(head_dim * expand_v)
        self.mode = mode
        self.allow_neg_eigval = allow_neg_eigval
        self.layer_idx = layer_idx
        key_dim, value_dim = num_heads * head_dim, num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True
        self.use_short_conv = use_short_conv
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(value_dim, conv_size, conv_bias)
        self.g_proj = nn.Linear(hidden_size, value_dim, bias=False) if use_gate else None
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps, output_gate_activation)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.reset_gate()

    @torch.no_grad()
    def reset_gate(self):
        """A uniform in (0, 16); dt log-uniform in [1e-3, 1e-1], through the inverse softplus."""
        # not from 0: its logarithm would be -inf
        self.A_log.uniform_(torch.finfo(torch.float32).tiny, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        output_attentions=False,
        cu_seqlens=None,
        cp_context=None,
    ):
        """Mixes tokens; continues from the cache's states and updates them if use_cache.

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: [B, T or more], 1 = token, 0 = padding, on either side; the last T
                columns count. Padding gives 0 and does not touch a state.
            past_key_values: `GatedDeltaNetCache`, or an object with the same `update`, `[]` and
                `len`; None with use_cache makes one.
            output_attentions: there are none; only False.
            cu_seqlens: offsets [N + 1] of sequences packed along T, B = 1; a state then has N rows.
            cp_context: `ContextParallel`: hidden_states is this process's span of the sequences,
                whose convolution and state continue over the ranks; without mask and cache.

        Returns:
            (output [B, T, hidden_size], None, past_key_values).

        Raises:
            ValueError: shapes that do not fit, mask together with cu_seqlens, no layer_idx,
                cp_context together with a mask or a cache.
        """
        _checks.expect_dim("GatedDeltaNet", "hidden_states", hidden_states, 3, "[B, T, hidden]")
        if hidden_states.shape[2] != self.hidden_size or output_attentions:
            _checks.fail(
                "GatedDeltaNet",
                f"hidden_states must be [B, T, {self.hidden_size}] and output_attentions False, "
                f"got {tuple(hidden_states.shape)} and {output_attentions}",
            )
        B, T, _ = hidden_states.shape
        tokens = None
        if cp_context is not None:
            if attention_mask is not None or past_key_values is not None or use_cache:
                _checks.fail("GatedDeltaNet", "cp_context excludes attention_mask and caches")
            return self._mix(hidden_states, None, False, None, T, cp_context)[0], None, None
        if attention_mask is not None:
            hidden_states, cu_seqlens, tokens = _unpad(hidden_states, attention_mask, cu_seqlens)
        if use_cache and past_key_values is None:
            past_key_values = GatedDeltaNetCache()
        past = self._past(past_key_values)
        o, states = self._mix(hidden_states, past, use_cache, cu_seqlens, T)
        if use_cache:
            past_key_values.update(**states, layer_idx=self.layer_idx, offset=T)
        if tokens is not None:
            o = o.new_zeros(B * T, self.hidden_size).index_copy(0, tokens, o[0])
            o = o.view(B, T, self.hidden_size)
        return o, None, past_key_values

    def _past(self, cache):
        """The layer's states in the cache, or None."""
        if cache is None:
            return None
        if self.layer_idx is None:
            _checks.fail("GatedDeltaNet", "a cache needs layer_idx, got None")
        known = (
            self.layer_idx in cache
            if isinstance(cache, GatedDeltaNetCache)
            else self.layer_idx < len(cache)
        )
        return cache[self.layer_idx] if known else None

    def _mix(self, x, past, use_cache, cu_seqlens, T, cp_context=None):
        """(output, new states) for x [B, T, hidden], or packed [1, total, hidden]."""
        conv_states = None if past is None else past["conv_state"]
        if cp_context is None:
            q, k, v, conv_states = self._convolved(x, conv_states, use_cache, cu_seqlens)
        else:
            q, k, v = self._convolved_over_ranks(x, cp_context)
        q = q.view(*q.shape[:2], self.num_heads, self.head_k_dim)
        k = k.view(*k.shape[:2], self.num_heads, self.head_k_dim)
        v = v.view(*v.shape[:2], self.num_v_heads, self.head_v_dim)
        recurrent = self.mode == "fused_recurrent" or (T <= SHORT and not self.training)
        rule = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule
        if cp_context is not None:
            rule = functools.partial(chunk_gated_delta_rule, cp_context=cp_context)
        o, state = rule(
            q,
            k,
            v,
            g=self.a_proj(x),
            beta=self.b_proj(x),
            initial_state=None if past is None else past["recurrent_state"],
            output_final_state=use_cache,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            cu_seqlens=cu_seqlens,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )
        gate = None if self.g_proj is None else self.g_proj(x).view_as(o)
        o = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return o, {"recurrent_state": state, "conv_state": conv_states}

    def _convolved(self, x, states, use_cache, cu_seqlens):
        """q, k, v after convolution and SiLU, and the tuple of the convolutions' new states.

        Decoding replaces the states in the cache in place, which saves its copies.
        """
        inputs = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.use_short_conv:
            return *map(F.silu, inputs), None
        convolutions = self.q_conv1d, self.k_conv1d, self.v_conv1d
        if (
            use_cache
            and states is not None
            and cu_seqlens is None
            and not torch.is_grad_enabled()
            and all(state.dtype == y.dtype for state, y in zip(states, inputs, strict=True))
        ):
            steps = zip(convolutions, inputs, states, strict=True)
            return *(convolution.step(y, state) for convolution, y, state in steps), states
        states = states or (None, None, None)
        outputs, new_states = zip(
            *(
                convolution(y, state, use_cache, cu_seqlens)
                for convolution, y, state in zip(convolutions, inputs, states, strict=True)
            ),
            strict=True,
        )
        return *outputs, new_states if use_cache else None

    def _convolved_over_ranks(self, x, cp_context):
        """q, k, v after convolution and SiLU of this span; one exchange for the three."""
        inputs = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.use_short_conv:
            return map(F.silu, inputs)
        parts = self.q_conv1d, self.k_conv1d, self.v_conv1d
        weight = torch.cat([part.weight.squeeze(1) for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        y = conv_parallel(torch.cat(inputs, -1), weight, bias, cp_context)
        return y.split([y.shape[-1] for y in inputs], -1)


def _check_config(hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode):
    if min(hidden_size, head_dim, num_heads, num_v_heads) < 1:
        raise ValueError(
            f"sizes must be positive, got {hidden_size=}, {head_dim=}, {num_heads=}, {num_v_heads=}"
        )
    if num_v_heads % num_heads:
        raise ValueError(f"num_v_heads {num_v_heads} must be a multiple of num_heads {num_heads}")
    head_v_dim = head_dim * expand_v
    if head_v_dim < 1 or abs(head_v_dim - round(head_v_dim)) > 1e-6:
        raise ValueError(f"expand_v * head_dim must be whole, got {expand_v} * {head_dim}")
    if mode not in ("chunk", "fused_recurrent"):
        raise ValueError(f"mode must be 'chunk' or 'fused_recurrent', got {mode!r}")


def _unpad(x, mask, cu_seqlens):
    """x [B, T, hidden] to (its tokens [1, total, hidden], their offsets, their flat indices)."""
    B, T, _ = x.shape
    if cu_seqlens is not None:
        _checks.fail("GatedDeltaNet", "attention_mask and cu_seqlens exclude each other")
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        _checks.fail(
            "GatedDeltaNet",
            f"attention_mask must be [B, T or more] with B, T = {B}, {T}, got {tuple(mask.shape)}",
        )
    mask = mask[:, mask.shape[1] - T :] != 0
    tokens = mask.flatten().nonzero().flatten()
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return x.flatten(0, 1)[tokens][None], offsets, tokens
