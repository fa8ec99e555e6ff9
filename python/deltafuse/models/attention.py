"""Causal attention as a sequence mixer; q and k are normalised, then rotated."""

import collections

import torch
from torch import nn
from torch.nn import functional as F

from ..gated_delta.nn import GatedRMSNorm
from ..grape import GrapeCache, GrapeM, GrapeMContext, GrapeMixture, rotary_qk


class AttentionCache(collections.defaultdict):
    """A `GrapeCache` for each layer, by `layer_idx`; its memory grows with the tokens."""

    def __init__(self):
        super().__init__(GrapeCache)


def make_rotation(config):
    """The module that rotates q and k; None is RoPE, which has no parameters."""
    sizes = config.num_heads, config.head_dim
    if config.position == "grape-m":
        return GrapeM(*sizes)
    if config.position == "grape-m-ctx":
        return GrapeMContext(*sizes, config.hidden_size)
    if config.position == "grape-mixture":
        # half of the channels turn at first, as in models with partial rotary embeddings
        return GrapeMixture(*sizes, max(1, config.head_dim // 4))
    return None


class CausalAttention(nn.Module):
    """softmax(G q . G k / sqrt(head_dim)) v with a rotation G of the token's position.

    Heads have the sizes that a GatedDeltaNet of the same configuration has: q and k [num_heads,
    head_dim]; v is num_v_heads heads of head_dim * expand_v channels, num_v_heads / num_heads of
    them behind the same attention map. q and k pass an RMSNorm before they are rotated, so that
    logits depend on what lies between two tokens alone (arXiv 2512.07805).

    Args:
        config: a `ModelConfig` with mixer "attention".
        layer_idx: the layer's key in a cache.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.position, self.layer_idx = config.position, layer_idx
        key_dim = config.num_heads * config.head_dim
        value_dim = config.num_v_heads * config.head_dim * config.expand_v
        self.q_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        self.q_rms = GatedRMSNorm(config.head_dim, config.norm_eps)
        self.k_rms = GatedRMSNorm(config.head_dim, config.norm_eps)
        self.grape = make_rotation(config)
        self.o_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

    def forward(self, x, past_key_values=None, use_cache=False):
        """Mixes tokens; continues the cache's stream and adds to it if use_cache.

        Args:
            x: [B, T, hidden_size].
            past_key_values: `AttentionCache`; None with use_cache makes one.

        Returns:
            (output [B, T, hidden_size], None, past_key_values).
        """
        if use_cache and past_key_values is None:
            past_key_values = AttentionCache()
        cache = past_key_values[self.layer_idx] if use_cache else None
        q = self.q_rms(self.q_proj(x).unflatten(-1, (self.num_heads, -1)))
        k = self.k_rms(self.k_proj(x).unflatten(-1, (self.num_heads, -1)))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        q, k = self._rotated(q, k, x, cache)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v).flatten(-2)), None, past_key_values

    def _rotated(self, q, k, x, cache):
        if self.position == "grape-m-ctx":
            return self.grape(q, k, x, cache)
        if self.grape is not None:
            return self.grape(q, k, cache=cache)
        if cache is None:
            return rotary_qk(q, k)
        rotated = rotary_qk(q, k, offsets=cache.position)
        cache.position += q.shape[1]
        return rotated


def attend(q, k, v):
    """Attention of q [B, T, H, D], the last T of the tokens of k [B, S, H, D], v [B, S, H, Dv]."""
    T, S = q.shape[1], k.shape[1]
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S and T > 1)
    return o.transpose(1, 2)
