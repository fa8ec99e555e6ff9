"""A decoder language model; its sequence mixer is the Gated DeltaNet layer, or attention."""

import types

import torch
from torch import nn
from torch.nn import functional as F

from ..ddl.nn import IDENTITY_BETA
from ..ddl.nn_compress import InputEmbedExpander, ResidualCompressor
from ..ddl.nn_stack import DDLBlock, DDLStack
from ..ddl.nn_wrapper import reset_ddl_parameters
from ..gated_delta.nn import GatedDeltaNet, GatedDeltaNetCache, GatedRMSNorm
from ..grape.nn import WideModule
from .attention import AttentionCache, CausalAttention


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), x [..., hidden_size] (arXiv 2002.05202, equation 6)."""

    def __init__(self, hidden_size, mlp_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_mixer(config, layer_idx):
    if config.mixer == "attention":
        return CausalAttention(config, layer_idx)
    return GatedDeltaNet(
        hidden_size=config.hidden_size,
        expand_v=config.expand_v,
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_v_heads=config.num_v_heads,
        conv_size=config.conv_size,
        layer_idx=layer_idx,
        norm_eps=config.norm_eps,
    )


def make_ddl_block(config, layer_idx):
    """The same two sub-layers, each with the residual of Deep Delta Learning (2601.00417)."""
    names = types.SimpleNamespace(
        hidden_size=config.hidden_size,
        ddl_value_channels=config.value_channels,
        ddl_norm_eps=config.norm_eps,
        ddl_beta_init=IDENTITY_BETA,
    )
    mlp = SwiGLU(config.hidden_size, config.mlp_size)
    return DDLBlock(make_mixer(config, layer_idx), mlp, names)


class Block(nn.Module):
    """x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mixer_norm = GatedRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = make_mixer(config, layer_idx)
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

    With mixer "attention" the layers are causal attention, whose positions are rotations of GRAPE
    (arXiv 2512.07805); see `CausalAttention`.

    With residual "ddl" each sub-layer rewrites the residual state along its output instead of
    adding to it (Deep Delta Learning, arXiv 2601.00417); the state is [hidden_size,
    value_channels] a token, its channels start as copies of the embedding.

    Args:
        config: a `ModelConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.expand = self.read_out = None
        if config.residual == "plain":
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        else:
            self.blocks = DDLStack(make_ddl_block(config, i) for i in range(config.num_layers))
            if config.value_channels > 1:
                sizes = config.hidden_size, config.value_channels
                self.expand = InputEmbedExpander(*sizes, mode="repeat")
                self.read_out = ResidualCompressor(*sizes)
        self.norm = GatedRMSNorm(config.hidden_size, config.norm_eps)
        self._reset_projections()

    def _reset_projections(self):
        """Normal(0, 0.02); what is added to the residual stream shrinks with the depth.

        DDL starts near the identity: with gates of 0.05, 500 steps of the tiny preset end at 1.446
        nats, with the repository's gates of 1 at 1.471.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
            mixer = block.mixer if self.config.residual == "plain" else block.attn
            for last in (mixer.o_proj, block.mlp.down_proj):
                with torch.no_grad():
                    last.weight.div_((2 * self.config.num_layers) ** 0.5)
        reset_ddl_parameters(self, "identity")
        for module in self.modules():
            if isinstance(module, WideModule):  # a rotation starts in its own way
                module.reset_parameters()

    def new_cache(self):
        """An empty cache for `forward`: each layer's state and last inputs, or keys and values."""
        return AttentionCache() if self.config.mixer == "attention" else GatedDeltaNetCache()

    def forward(self, tokens, cache=None):
        """Logits of the next token at each position.

        Args:
            tokens: [B, T] int64 in [0, vocab_size).
            cache: from `new_cache`; continues where the last call with it ended, and is updated.

        Returns:
            logits [B, T, vocab_size] in the parameters' dtype.
        """
        x = self.embedding(tokens)
        if self.config.residual == "plain":
            for block in self.blocks:
                x = block(x, cache)
            x = self.norm(x)
        else:
            x = x if self.expand is None else self.expand(x)
            options = {"past_key_values": cache, "use_cache": cache is not None}
            _, x = self.blocks(x, read_out=self.read_out, norm=self.norm, **options)
        # one matrix product for the whole batch; the head shares the embedding's weight
        return F.linear(x, self.embedding.weight)
