"""A decoder language model whose sequence mixer is the Gated DeltaNet layer."""

import torch
from torch import nn
from torch.nn import functional as F

from ..gated_delta.nn import GatedDeltaNet, GatedDeltaNetCache, GatedRMSNorm


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), x [..., hidden_size] (arXiv 2002.05202, equation 6)."""

    def __init__(self, hidden_size, mlp_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + GatedDeltaNet(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mixer_norm = GatedRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = GatedDeltaNet(
            hidden_size=config.hidden_size,
            expand_v=config.expand_v,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_v_heads=config.num_v_heads,
            conv_size=config.conv_size,
            layer_idx=layer_idx,
            norm_eps=config.norm_eps,
        )
        self.mlp_norm = GatedRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x, cache=None):
        mixed, _, _ = self.mixer(
            self.mixer_norm(x), past_key_values=cache, use_cache=cache is not None
        )
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class GatedDeltaLM(nn.Module):
    """Gated DeltaNet language model (arXiv 2412.06464) with tied input and output embedding.

    Args:
        config: a `ModelConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = GatedRMSNorm(config.hidden_size, config.norm_eps)
        self._reset_projections()

    def _reset_projections(self):
        """Normal(0, 0.02); what is added to the residual stream shrinks with the depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
            for last in (block.mixer.o_proj, block.mlp.down_proj):
                with torch.no_grad():
                    last.weight.div_((2 * self.config.num_layers) ** 0.5)

    def new_cache(self):
        """An empty cache for `forward`; holds each layer's state and last inputs."""
        return GatedDeltaNetCache()

    def forward(self, tokens, cache=None):
        """Logits of the next token at each position.

        Args:
            tokens: [B, T] int64 in [0, vocab_size).
            cache: from `new_cache`; continues where the last call with it ended, and is updated.

        Returns:
            logits [B, T, vocab_size] in the parameters' dtype.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        # one matrix product for the whole batch; the head shares the embedding's weight
        return F.linear(self.norm(x), self.embedding.weight)
