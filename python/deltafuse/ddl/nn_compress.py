"""The way from d channels to a state and back: expander and compressor of Deep Delta Learning."""

import torch
from torch import nn

from .. import _checks
from .nn import INITS, expect_sizes
from .ops import cc_weight, ddl_compress
from .ops_time import ddl_compress_tc, ddl_expand
from .validation import expect_choice

READ_OUTS = ("cc", "tc", "linear", "mean")
EXPANSIONS = ("ec", "repeat")


def last_columns(attention_mask, x):
    """The mask of the tokens of x [B, T, ...]: a cache's mask covers those before them, too."""
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    return attention_mask[:, max(attention_mask.shape[1] - x.shape[1], 0) :]


class Taps(nn.Module):
    """Holds the weight of a depthwise convolution under the name that checkpoints have."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def extra_repr(self):
        return ", ".join(map(str, self.weight.shape))


class ResidualCompressor(nn.Module):
    """Read-out of a state: x [..., d, d_v] -> [..., d] (arXiv 2601.00417, appendix A.2).

    Args:
        hidden_size, value_channels: d and d_v.
        mode: "cc" (convolution along the channels, then a read vector: `weight` [d, K], `read`
            [d_v]), "tc" (causal convolution over time: `shortconv.weight` [d d_v, K], `read`),
            "linear" (`weight` [d, d_v]) or "mean".
        kernel_size: K; for "cc" d_v, for "tc" 4 by default.
        causal: of "cc": zeros before the channels only.

    Raises:
        ValueError: sizes out of range, unknown mode, K != d_v for "cc".
    """

    def __init__(self, hidden_size, value_channels, mode="cc", kernel_size=None, causal=False):
        super().__init__()
        op = "ResidualCompressor"
        expect_choice(op, "mode", mode, READ_OUTS)
        expect_sizes(op, hidden_size=hidden_size, value_channels=value_channels)
        if kernel_size is None:
            kernel_size = 4 if mode == "tc" else value_channels
        expect_sizes(op, kernel_size=kernel_size)
        if mode == "cc" and kernel_size != value_channels:
            _checks.fail(
                op, f"kernel_size must be value_channels = {value_channels}, got {kernel_size}"
            )
        self.hidden_size, self.value_channels = hidden_size, value_channels
        self.mode, self.kernel_size, self.causal = mode, kernel_size, causal
        if mode == "tc":
            self.shortconv = Taps(hidden_size * value_channels, kernel_size)
        elif mode == "cc":
            self.weight = nn.Parameter(torch.empty(hidden_size, kernel_size))
        elif mode == "linear":
            self.weight = nn.Parameter(torch.empty(hidden_size, value_channels))
        if mode in ("cc", "tc"):
            self.read = nn.Parameter(torch.empty(value_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="repo"):
        """read = 1 / d_v; taps normal with std 0.5 / sqrt(d), or those of the mean ("identity").

        The weight of "linear" is the mean with either.
        """
        expect_choice("ResidualCompressor", "init", init, INITS)
        if self.mode == "linear":
            self.weight.fill_(1 / self.value_channels)
        if self.mode not in ("cc", "tc"):
            return
        self.read.fill_(1 / self.value_channels)
        taps = self.weight if self.mode == "cc" else self.shortconv.weight
        if init == "repo":
            nn.init.normal_(taps, std=0.5 * self.hidden_size**-0.5)
            return
        K = self.kernel_size
        taps.zero_()[:, K - 1 if self.mode == "tc" or self.causal else (K - 1) // 2] = 1

    def read_weight(self):
        """[d, d_v] of a read-out that is linear in each token's state; None is the mean.

        Raises:
            ValueError: mode "tc", which mixes tokens.
        """
        if self.mode == "tc":
            _checks.fail("ResidualCompressor", 'mode "tc" mixes tokens: it has no read weight')
        if self.mode == "cc":
            return cc_weight(self.weight, self.read, causal=self.causal)
        return self.weight if self.mode == "linear" else None

    def forward(
        self,
        x,
        *,
        cu_seqlens=None,
        attention_mask=None,
        initial_state=None,
        output_final_state=False,
    ):
        """Reads out a state; all options but the first argument are for "tc" alone.

        Args:
            x: [..., d, d_v]; "tc": [B, T, d, d_v].
            cu_seqlens, initial_state, output_final_state: as `ddl_compress_tc`.
            attention_mask: [B, T or more], of which the last T columns count.

        Returns:
            [..., d] in the dtype of x; with output_final_state also the state, which is None for
            the other modes.

        Raises:
            ValueError: shapes that do not fit.
        """
        expected = (self.hidden_size, self.value_channels)
        if tuple(x.shape[-2:]) != expected:
            _checks.fail(
                "ResidualCompressor",
                f"x must be [..., d, d_v] with d, d_v = {expected}, got {tuple(x.shape)}",
            )
        if self.mode != "tc":
            read = ddl_compress(x, self.read_weight())
            return (read, None) if output_final_state else read
        return ddl_compress_tc(
            x,
            self.shortconv.weight,
            self.read,
            cu_seqlens=cu_seqlens,
            attention_mask=last_columns(attention_mask, x),
            initial_state=initial_state,
            output_final_state=output_final_state,
        )

    def extra_repr(self):
        return f"{self.hidden_size}, {self.value_channels}, mode={self.mode!r}"


class InputEmbedExpander(nn.Module):
    """The first state of a token: x [B, T, d] -> [B, T, d, d_v] (arXiv 2601.00417, appendix A).

    Args:
        hidden_size, value_channels: d and d_v.
        mode: "ec" (a causal convolution over time a feature, `conv.weight` [d d_v, 1, K]) or
            "repeat".
        kernel_size: K of "ec".

    Raises:
        ValueError: sizes out of range, unknown mode.
    """

    def __init__(self, hidden_size, value_channels, mode="ec", kernel_size=4):
        super().__init__()
        op = "InputEmbedExpander"
        expect_choice(op, "mode", mode, EXPANSIONS)
        expect_sizes(
            op, hidden_size=hidden_size, value_channels=value_channels, kernel_size=kernel_size
        )
        self.hidden_size, self.value_channels, self.mode = hidden_size, value_channels, mode
        if mode == "ec":
            self.conv = Taps(hidden_size * value_channels, 1, kernel_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="repo"):
        """The convolution that repeats x, whatever `init`; call it after a global initialisation.

        A model's own loop over all weights otherwise leaves random taps here.
        """
        if self.mode == "ec":
            self.conv.weight.zero_()[..., -1] = 1

    def forward(
        self,
        x,
        *,
        cu_seqlens=None,
        attention_mask=None,
        initial_state=None,
        output_final_state=False,
    ):
        """x [B, T, d] -> [B, T, d, d_v] in the dtype of x; options as `ddl_expand`.

        With output_final_state also the state. Of a mask [B, T or more] the last T columns count.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            _checks.fail(
                "InputEmbedExpander",
                f"x must be [B, T, {self.hidden_size}], got {tuple(x.shape)}",
            )
        return ddl_expand(
            x,
            self.conv.weight if self.mode == "ec" else None,
            self.value_channels,
            cu_seqlens=cu_seqlens,
            attention_mask=last_columns(attention_mask, x),
            initial_state=initial_state,
            output_final_state=output_final_state,
        )

    def extra_repr(self):
        return f"{self.hidden_size}, {self.value_channels}, mode={self.mode!r}"
