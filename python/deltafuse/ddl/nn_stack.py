"""Blocks of two sub-layers on one state, and the stack that fuses what lies between them."""

from torch import nn

from .. import _checks
from .nn import DeepDeltaResidual, RMSNorm
from .nn_compress import ResidualCompressor
from .sub_layers import SAVES, ReadOut, Runner, Sequences, expect_targets, read_outs_of
from .validation import expect_choice


def residual_from_config(config):
    """A `DeepDeltaResidual` from a configuration with the attribute names of the repository.

    Args:
        config: any object; hidden_size is needed, the others are ddl_value_channels (4),
            ddl_k_eps, ddl_v_sigmoid, ddl_v_sigmoid_scale, ddl_v_constant and
            ddl_v_constant_value (for one channel ddl_v_dim1_constant and
            ddl_v_dim1_constant_value), ddl_beta_single_linear, ddl_beta_hidden_size (128),
            ddl_beta_init, and our own ddl_v_source.
    """
    channels = value_channels_of(config)
    constant = "ddl_v_dim1_constant" if channels == 1 else "ddl_v_constant"
    single = getattr(config, "ddl_beta_single_linear", True)
    fixed = getattr(config, constant, False)
    return DeepDeltaResidual(
        config.hidden_size,
        channels,
        k_eps=getattr(config, "ddl_k_eps", 1e-5),
        v_source=getattr(config, "ddl_v_source", "input"),
        v_activation="sigmoid" if getattr(config, "ddl_v_sigmoid", True) else None,
        v_scale=getattr(config, "ddl_v_sigmoid_scale", 4.0),
        v_constant=getattr(config, constant + "_value", 2.0) if fixed else None,
        beta_hidden_size=None if single else getattr(config, "ddl_beta_hidden_size", 128),
        beta_init=getattr(config, "ddl_beta_init", 1.0),
    )


def compressor_from_config(config):
    """A `ResidualCompressor` from a configuration, None for one channel.

    Args:
        config: as for `residual_from_config`; ddl_state_shortconv_kernel_size and
            ddl_state_dv_shortconv_causal are the repository's, ddl_read_out ("cc") is our own
            because there each mode is a file.
    """
    channels = value_channels_of(config)
    if channels == 1:
        return None
    return ResidualCompressor(
        config.hidden_size,
        channels,
        getattr(config, "ddl_read_out", "cc"),
        getattr(config, "ddl_state_shortconv_kernel_size", None),
        getattr(config, "ddl_state_dv_shortconv_causal", False),
    )


def value_channels_of(config):
    return getattr(config, "ddl_value_channels", 4)


class DDLBlock(nn.Module):
    """Attention and MLP, each with its Delta rewrite; one compressor for both.

    Deep Delta Learning (arXiv 2601.00417), the block of the paper's repository:
    X = ddl_attn(X, attn(ln_1(C X))), then X = ddl_mlp(X, mlp(ln_2(C X))).

    Args:
        attn, mlp: modules [..., d] -> [..., d]; of a tuple the first entry counts.
        config: any object with the repository's attribute names; those that it lacks have the
            modules' defaults. See `residual_from_config` and `compressor_from_config`; norms take
            ddl_norm_eps (1e-5).

    Raises:
        ValueError: sizes or options out of range.
    """

    def __init__(self, attn, mlp, config):
        super().__init__()
        eps = getattr(config, "ddl_norm_eps", 1e-5)
        self.ln_1 = RMSNorm(config.hidden_size, eps)
        self.ln_2 = RMSNorm(config.hidden_size, eps)
        self.attn, self.mlp = attn, mlp
        self.compress = compressor_from_config(config)
        self.ddl_attn = residual_from_config(config)
        self.ddl_mlp = residual_from_config(config)

    def read_outs(self):
        """Its two sub-layers for a `DDLStack`."""
        return (
            ReadOut(self.ln_1, self.compress, self.ddl_attn, self.attn, takes_options=True),
            ReadOut(self.ln_2, self.compress, self.ddl_mlp, self.mlp),
        )

    def forward(self, x, *, states=None, cu_seqlens=None, attention_mask=None, **options):
        """As a `DDLStack` of this block alone."""
        return _run(Runner(), [self], x, None, None, states, cu_seqlens, attention_mask, options)


class DDLStack(nn.ModuleList):
    """Blocks in a row, with one fused pass over the state between any two sub-layers.

    The pass (`ddl_boundary`) is the rewrite of the sub-layer that ended, and the read-out, norm
    and gate projections of the next one. It is a list of blocks: parameters are "0.attn...". Their
    `forward` is not called, so hooks of blocks do not run: shard (FSDP2) the blocks' attn and mlp
    and the stack itself, and checkpoint these or call the blocks one by one.

    Args:
        blocks: `DDLBlock` and `DDLWrapper` of one width.
        fuse_boundaries: False takes the same steps one by one. Compressors over time always do.
        save: "output" lets autograd keep the state after each sub-layer; "invert" keeps the last
            one alone and recomputes the others from it in the backward, for states in float32 or
            float64 (the gradients' error stays below 1e-4). It has no effect under torch.compile,
            which decides itself what to keep.

    Raises:
        ValueError: unknown save.
    """

    def __init__(self, blocks=None, fuse_boundaries=True, save="output"):
        super().__init__(blocks)
        expect_choice("DDLStack", "save", save, SAVES)
        self.fuse_boundaries, self.save = fuse_boundaries, save

    def __getitem__(self, index):
        """A block, or the stack of some of them with the same options."""
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.fuse_boundaries, part.save = self.fuse_boundaries, self.save
        return part

    def forward(
        self,
        x,
        *,
        read_out=None,
        norm=None,
        states=None,
        cu_seqlens=None,
        attention_mask=None,
        **options,
    ):
        """The state after all blocks, and with `norm` the model's output, too.

        Args:
            x: state [..., d, d_v], or [..., d] where d_v = 1.
            norm, read_out: the RMSNorm and the `ResidualCompressor` (None where d_v = 1) after the
                last block.
            states: dict in which compressors over time keep their last inputs from call to call.
            cu_seqlens, attention_mask: for compressors over time, and as keywords for the blocks'
                attention.
            options: further keywords of the blocks' attention (of a `DDLWrapper` its layer).

        Returns:
            the state like x; with norm (state, c), c [..., d].

        Raises:
            ValueError: shapes that do not fit; save="invert" with a state of 16 bits or a
                compressor over time.
        """
        runner = Runner(self.fuse_boundaries, self.save)
        return _run(runner, self, x, read_out, norm, states, cu_seqlens, attention_mask, options)

    def extra_repr(self):
        return f"fuse_boundaries={self.fuse_boundaries}, save={self.save!r}"


def _run(runner, blocks, x, read_out, norm, states, cu_seqlens, attention_mask, options):
    targets = read_outs_of(blocks)
    expect_targets("DDLStack", targets)
    if norm is not None:
        targets.append(ReadOut(norm, read_out))
    elif read_out is not None:
        _checks.fail("DDLStack", "read_out is given without norm")
    if not targets:
        return x
    for name, value in (("cu_seqlens", cu_seqlens), ("attention_mask", attention_mask)):
        if value is not None:
            options = {**options, name: value}
    sequences = Sequences(states, cu_seqlens, attention_mask)
    y, c = runner.run(targets, x, sequences, options)
    return y if norm is None else (y, c)
