"""A linear layer whose heads mix each token with the one before (KV shift)."""

import torch
from torch import nn

from .. import _checks
from .nn import expect_sizes
from .nn_compress import last_columns
from .ops import project
from .ops_time import token_shift


class ShiftLinear(nn.Module):
    """y_t = a_t o_{t-1} + (1 - a_t) o_t a head, o = W x, a = sigmoid(W_shift x), o_{-1} = 0.

    The key/value shift of the repository of Deep Delta Learning (arXiv 2601.00417); one token at
    a time follows the same rule as many.

    Args:
        input_dim, output_dim: channels of x and y.
        num_heads: H, divides output_dim; any output_dim / H.
        bias, shift_bias: of `linear` and of `shift_proj`.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(self, input_dim, output_dim, num_heads, bias, shift_bias=False):
        super().__init__()
        op = "ShiftLinear"
        expect_sizes(op, input_dim=input_dim, output_dim=output_dim, num_heads=num_heads)
        if output_dim % num_heads:
            _checks.fail(op, f"output_dim {output_dim} must be a multiple of num_heads {num_heads}")
        self.input_dim, self.output_dim, self.num_heads = input_dim, output_dim, num_heads
        self.linear = nn.Linear(input_dim, output_dim, bias=bias)
        self.shift_proj = nn.Linear(input_dim, num_heads, bias=shift_bias)

    def forward(
        self,
        x,
        shift_state=None,
        *,
        cu_seqlens=None,
        attention_mask=None,
        output_final_state=False,
    ):
        """Projects and shifts.

        Args:
            x: [B, T, input_dim]; with cu_seqlens B = 1.
            shift_state: o_{-1} of each sequence, [B, output_dim] or as it was returned. A given
                state is replaced in place by the last o, as in the paper's repository, unless
                output_final_state asks for a new one.
            cu_seqlens: as `token_shift`.
            attention_mask: [B, T or more], of which the last T columns count.
            output_final_state: also return the last o of each sequence.

        Returns:
            y [B, T, output_dim] in the dtype of W x, and the state if asked for.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_dim:
            _checks.fail("ShiftLinear", f"x must be [B, T, {self.input_dim}], got {tuple(x.shape)}")
        out = self.linear(x)
        alpha = torch.sigmoid(project(x, self.shift_proj.weight, self.shift_proj.bias))
        heads = (self.num_heads, self.output_dim // self.num_heads)
        past = shift_state
        if past is not None:
            # a copy: the state that is replaced below may be kept for the backward
            past = past.reshape(-1, *heads).to(out.dtype, copy=not output_final_state)
        y, state = token_shift(
            out.unflatten(-1, heads),
            alpha,
            1 - alpha,
            cu_seqlens=cu_seqlens,
            attention_mask=last_columns(attention_mask, x),
            cache=past,
            output_cache=True,
        )
        if output_final_state:
            return y.flatten(-2), state
        if shift_state is not None:
            shift_state.copy_(state.detach().reshape(shift_state.shape))
        return y.flatten(-2)

    def extra_repr(self):
        return f"{self.input_dim}, {self.output_dim}, num_heads={self.num_heads}"
