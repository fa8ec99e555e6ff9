"""The residual connection of Deep Delta Learning as a module, its norm and its initialisation.

Parameters have the names that the paper's repository gives them, so its checkpoints load.
"""

import math
import warnings

import torch
from torch import nn

from .. import _checks
from .ops import delta_rewrite_logits, project
from .ops_boundary import _two_layers, ddl_head
from .validation import V_SOURCES, expect_choice, expect_eps

INITS = ("identity", "repo")
IDENTITY_BETA = 0.05
FROZEN_BETA = 1e-3  # below, d beta / d logit is so small that the gate hardly learns


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, statistics in float32.

    Args:
        dim: width of x; `weight` [dim] starts as ones.
        eps: at least 0.
    """

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        expect_eps("RMSNorm", eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def reset_parameters(self, init="repo"):
        """Ones, whatever `init`."""
        self.weight.fill_(1)

    def forward(self, x):
        """x [..., dim] -> [..., dim] in the dtype of x."""
        return ddl_head(x.unsqueeze(-1), None, self.weight, norm_eps=self.eps)[0]

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DeepDeltaResidual(nn.Module):
    """X + beta k (v - k^T X): the residual connection with its two gates.

    Deep Delta Learning (arXiv 2601.00417), equations 2.1 and 2.2. k is the sub-layer's output,
    normalised; beta = 2 sigmoid(W_beta context + b_beta) and v = v_scale sigmoid(W_v v_in + b_v).

    Args:
        hidden_size: d.
        value_channels: d_v in 1..16.
        k_eps: added to the squared norm of k as k_eps^2.
        v_source: "input" projects v from v_in (the paper's repository), "context" from context
            (the paper).
        v_activation: "sigmoid" (the repository), or None for a linear v (the paper).
        v_scale: bound of v under a sigmoid.
        v_constant: a number that takes the place of v, None for the projection. Its parameters
            stay, frozen, because the repository's checkpoints have them.
        beta_hidden_size: None for `beta`, or the width of a two-layer gate `beta_in`, `beta_out`.
        beta_init: beta of the first step, clamped to [2e-6, 2 - 2e-6].

    Raises:
        ValueError: sizes or options out of range.
    """

    def __init__(
        self,
        hidden_size,
        value_channels=1,
        *,
        k_eps=1e-5,
        v_source="input",
        v_activation="sigmoid",
        v_scale=4.0,
        v_constant=None,
        beta_hidden_size=None,
        beta_init=1.0,
    ):
        super().__init__()
        op = "DeepDeltaResidual"
        expect_sizes(op, hidden_size=hidden_size, value_channels=value_channels)
        expect_choice(op, "v_source", v_source, V_SOURCES)
        expect_choice(op, "v_activation", v_activation, ("sigmoid", None))
        expect_eps(op, k_eps=k_eps)
        self.hidden_size, self.value_channels = hidden_size, value_channels
        self.k_eps, self.v_source, self.v_activation = k_eps, v_source, v_activation
        self.v_scale, self.v_constant, self.beta_init = v_scale, v_constant, beta_init
        if beta_hidden_size is None:
            self.beta = nn.Linear(hidden_size, 1)
        else:
            expect_sizes(op, beta_hidden_size=beta_hidden_size)
            self.beta_in = nn.Linear(hidden_size, beta_hidden_size, bias=False)
            self.beta_out = nn.Linear(beta_hidden_size, 1)
        self.two_layers = beta_hidden_size is not None
        self.v_proj = nn.Linear(hidden_size, value_channels)
        self.v_proj.requires_grad_(v_constant is None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init="repo"):
        """Weights normal with std 0.5 / sqrt(d), b_beta = logit(beta_init / 2).

        With init="identity" beta does not depend on its input at first: W_beta = 0.
        """
        expect_choice("DeepDeltaResidual", "init", init, INITS)
        std = 0.5 * self.hidden_size**-0.5
        nn.init.normal_(self.v_proj.weight, std=std)
        nn.init.uniform_(self.v_proj.bias, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        last = self.beta_out if self.two_layers else self.beta
        if self.two_layers:
            nn.init.normal_(self.beta_in.weight, std=std)
        nn.init.normal_(last.weight, std=0 if init == "identity" else std)
        share = min(max(self.beta_init / 2, 1e-6), 1 - 1e-6)
        last.bias.fill_(math.log(share) - math.log1p(-share))
        if self.beta_init < FROZEN_BETA:
            warnings.warn(
                f"DeepDeltaResidual: with beta_init = {self.beta_init} the gate hardly learns: its "
                f"slope is at most {FROZEN_BETA} (identity preset: {IDENTITY_BETA})",
                stacklevel=3,
            )

    def projections(self):
        """W_v, b_v, W_beta, b_beta as `ddl_boundary` takes them; v_proj is None for a constant."""
        v = (None, None)
        if self.v_constant is None:
            v_proj = self.v_proj
            v = (v_proj.weight, v_proj.bias)
        if self.two_layers:
            outer = self.beta_out
            return *v, (self.beta_in.weight, outer.weight), (None, outer.bias)
        beta = self.beta
        return *v, beta.weight, beta.bias

    def rewrite_options(self):
        """The keyword arguments of `ddl_boundary` that belong to this connection's rewrite."""
        return {
            "k_eps": self.k_eps,
            "v_scale": self.v_scale,
            "v_activation": self.v_activation,
            "v_constant": self.v_constant,
        }

    def logits(self, v_in, context):
        """v_logits [..., d_v], or None for a constant v, and beta_logits [...], never rounded."""
        W_v, b_v, W_beta, b_beta = self.projections()
        source = context if self.v_source == "context" else v_in
        v_logits = None if W_v is None else project(source, W_v, b_v)
        if self.two_layers:
            gate = (W_beta[0], b_beta[0], W_beta[1], b_beta[1])
            return v_logits, _two_layers("DeepDeltaResidual", context, gate)
        return v_logits, project(context, W_beta, b_beta).squeeze(-1)

    def rewrite(self, x, k, v_logits, beta_logits):
        """The state after this connection, from the gates' logits."""
        activation = self.v_activation
        if self.v_constant is not None:
            v_logits = beta_logits.new_full((), self.v_constant)
            v_logits = v_logits.expand(*beta_logits.shape, self.value_channels)
            activation = None
        return delta_rewrite_logits(
            x,
            k,
            v_logits,
            beta_logits,
            v_scale=self.v_scale,
            v_activation=activation,
            k_eps=self.k_eps,
        )

    def forward(self, x, *, k_in, v_in=None, context):
        """The state after the sub-layer.

        Args:
            x: state [..., d, d_v], or [..., d] where d_v = 1; any float dtype.
            k_in: the sub-layer's output [..., d].
            v_in: what v is projected from, [..., d]: the read-out of x. Not needed where d_v = 1
                (it is x), nor for v_source="context" or a constant v.
            context: what beta is projected from, [..., d]: the sub-layer's input.

        Returns:
            the shape and dtype of x.

        Raises:
            ValueError: shapes that do not fit, no v_in where it is needed.
            TypeError: tensors that are not real floating point, or on several devices.
        """
        op = "DeepDeltaResidual"
        if v_in is None and self.v_source == "input" and self.v_constant is None:
            if self.value_channels > 1:
                _checks.fail(op, f"v_in is needed for value_channels = {self.value_channels}")
            v_in = x.reshape(k_in.shape) if x.numel() == k_in.numel() else x
        for name, source in (("v_in", v_in), ("context", context)):
            if source is not None:
                _checks.expect_shape(op, name, source, k_in.shape, "the shape of k_in, [..., d]")
        return self.rewrite(x, k_in, *self.logits(v_in, context))

    def extra_repr(self):
        chosen = "" if self.v_constant is None else f", v_constant={self.v_constant}"
        return f"{self.hidden_size}, value_channels={self.value_channels}{chosen}"


DeepDeltaResidualVdim1 = DeepDeltaResidual
DeepDeltaResidualExpanded = DeepDeltaResidual


def expect_sizes(op, **sizes):
    for name, size in sizes.items():
        if size < 1:
            _checks.fail(op, f"{name} must be at least 1, got {size}")
