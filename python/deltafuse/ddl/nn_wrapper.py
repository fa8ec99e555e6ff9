"""Deep Delta Learning around any layer: read-out, norm, the layer, rewrite of the state."""

from torch import nn

from .. import _checks
from .nn import IDENTITY_BETA, INITS, DeepDeltaResidual, RMSNorm
from .nn_compress import InputEmbedExpander, ResidualCompressor
from .sub_layers import ReadOut, Sequences, open_state, read_weight, with_channels
from .validation import expect_choice


class DDLWrapper(nn.Module):
    """Replaces x + layer(norm(x)) by the Delta rewrite (arXiv 2601.00417, equation 2.2).

    c = RMSNorm(C(X)); X' = X + beta k (v - k^T X) with k = layer(c), normalised.

    Args:
        layer: any callable [..., d] -> [..., d]; a tuple's first entry counts, the others are
            passed on. None: the decomposed form alone.
        hidden_size, value_channels: d and d_v.
        read_out, kernel_size, causal: of the `ResidualCompressor` C; there is none for d_v = 1.
        norm: whether the layer gets a normed read-out; norm_eps: of the norm.
        init: "identity": C is the exact mean and beta starts at 0.05 for every input, so the
            wrapped layer starts near the identity. "repo": the paper's repository.
        beta_init: None is 0.05 for "identity" and 1.0 for "repo".
        disable: the plain residual connection x + layer(norm(x)) on [..., d].
        options: k_eps, v_source, v_activation, v_scale, v_constant, beta_hidden_size of
            `DeepDeltaResidual`.

    Raises:
        ValueError: sizes or options out of range.
    """

    def __init__(
        self,
        layer,
        hidden_size,
        value_channels=1,
        *,
        read_out="cc",
        kernel_size=None,
        causal=False,
        norm=True,
        norm_eps=1e-5,
        init="identity",
        beta_init=None,
        disable=False,
        **options,
    ):
        super().__init__()
        expect_choice("DDLWrapper", "init", init, INITS)
        self.init, self.disable = init, disable
        self.layer = layer
        self.norm = RMSNorm(hidden_size, norm_eps) if norm else None
        self.compress = None
        if disable:
            return
        if beta_init is None:
            beta_init = IDENTITY_BETA if init == "identity" else 1.0
        self.ddl = DeepDeltaResidual(hidden_size, value_channels, beta_init=beta_init, **options)
        if value_channels > 1:
            self.compress = ResidualCompressor(
                hidden_size, value_channels, read_out, kernel_size, causal
            )
        reset_ddl_parameters(self, init)

    def read_outs(self):
        """Itself for a `DDLStack`."""
        if self.disable or self.norm is None or self.layer is None:
            _checks.fail("DDLStack", "a wrapper in it needs a layer and a norm, not disabled")
        return (self._read_out(takes_options=True),)

    def _read_out(self, **more):
        return ReadOut(self.norm, self.compress, self.ddl, self.layer, **more)

    def open(self, x, *, states=None, cu_seqlens=None, attention_mask=None):
        """The decomposed form: c, add = wrapper.open(x); x = add(layer(c)).

        Args:
            x: state [..., d, d_v], or [..., d] where d_v = 1 or with disable.
            states: dict in which a compressor over time keeps its last inputs from call to call.
            cu_seqlens, attention_mask: of a compressor over time, as `ddl_compress_tc`.

        Returns:
            c [..., d], what the layer takes, and the function that adds its output to the state.

        Raises:
            ValueError: shapes that do not fit.
        """
        if self.disable:
            return (x if self.norm is None else self.norm(x)), lambda out: x + out
        sequences = Sequences(states, cu_seqlens, attention_mask)
        if self.norm is None:
            c = x
            if self.compress is not None:
                c = sequences.compress(ReadOut(None, self.compress), x)
            elif tuple(x.shape[-2:]) == (self.ddl.hidden_size, 1):
                c = x.squeeze(-1)
            logits = self.ddl.logits(c, c)
        else:
            target = self._read_out()
            wide, _ = with_channels(x, target)
            c, *logits = open_state(wide, target, sequences, read_weight(target))
        return c, lambda out: self.ddl.rewrite(x, out, *logits)

    def forward(self, x, *args, **options):
        """The state after the layer, layer(c, *args, **options) in the middle; see `open`.

        A layer that returns a tuple (out, more...) gives (state, more...); without a layer the
        result is that of `open`. Options cu_seqlens and attention_mask [B, T or more] are for a
        compressor over time, too.
        """
        c, add = self.open(x, **self._sequences(options))
        if self.layer is None:
            return c, add
        out = self.layer(c, *args, **options)
        return (add(out[0]), *out[1:]) if isinstance(out, tuple) else add(out)

    def _sequences(self, options):
        """What a compressor over time takes from the layer's options."""
        if self.compress is None or self.compress.mode != "tc":
            return {}
        names = ("cu_seqlens", "attention_mask")
        return {name: options[name] for name in names if options.get(name) is not None}

    def extra_repr(self):
        return "disabled" if self.disable else f"init={self.init!r}"


def reset_ddl_parameters(model, init="identity"):
    """Initialises every module of Deep Delta Learning in a model, after its own initialisation.

    A loop over all weights of a model, as the paper's repository has one, otherwise leaves random
    taps in the expander and in the compressors.

    Args:
        model: nn.Module.
        init: "identity" or "repo", see `DDLWrapper`; beta starts where its modules were told.

    Raises:
        ValueError: unknown init.
    """
    expect_choice("reset_ddl_parameters", "init", init, INITS)
    for module in model.modules():
        if isinstance(module, (DeepDeltaResidual, ResidualCompressor, InputEmbedExpander)):
            module.reset_parameters(init)
