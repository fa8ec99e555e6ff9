"""The names of flash-linear-attention (fla) for the gated delta rule, with its argument orders.

Import from here instead of `fla.ops.gated_delta_rule`, `fla.modules` and `fla.layers`; or
`register` the operator in fla's own registry of backends; or `convert` a layer. Unlike fla's, these
functions run on the CPU, trace into a compiled graph, and reject keywords that they do not know.
Convolution caches hold the last W inputs [N, D, W] here, as fla's do.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks, _library, gated_delta
from ..gated_delta import (
    GatedDeltaNet,
    chunk_gated_delta_rule,
    chunk_gdn,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
)
from ..gated_delta.context_parallel import conv_parallel
from ..gated_delta.nn import GatedRMSNorm
from ..gated_delta.validation import MAX_HEAD

__all__ = [
    "FusedRMSNormGated",
    "GatedDeltaNet",
    "L2Norm",
    "ShortConvolution",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "convert",
    "fused_gdn_gate",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "l2_norm",
    "l2norm",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
    "register",
]


def naive_recurrent_gated_delta_rule(
    q, k, v, beta, g, scale=None, initial_state=None, output_final_state=False
):
    """`gated_delta.naive_recurrent_gated_delta_rule` with beta before g."""
    return gated_delta.naive_recurrent_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state
    )


def naive_chunk_gated_delta_rule(
    q, k, v, g, beta, chunk_size=64, scale=None, initial_state=None, output_final_state=False
):
    """`gated_delta.naive_chunk_gated_delta_rule` with chunk_size before scale."""
    return gated_delta.naive_chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size=chunk_size
    )


def fused_gdn_gate(g, A_log, dt_bias=None, output_dtype=torch.float32):
    """`gated_delta.fused_gdn_gate` in float32 unless told otherwise."""
    return gated_delta.fused_gdn_gate(g, A_log, dt_bias, output_dtype)


def l2norm(x, eps=1e-6, output_dtype=None):
    """`gated_delta.l2norm`; output_dtype None is the dtype of x."""
    if output_dtype in (None, x.dtype):
        return gated_delta.l2norm(x, eps)
    return gated_delta.l2norm(x.to(torch.promote_types(x.dtype, output_dtype)), eps).to(
        output_dtype
    )


l2_norm = l2norm


class L2Norm(nn.Module):
    """`l2norm` as a module."""

    def __init__(self, eps=1e-6, output_dtype=None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x):
        """x [..., K] divided by its norm over K."""
        return l2norm(x, self.eps, self.output_dtype)


def _silu(activation):
    return "silu" if activation == "swish" else activation


def _with_oldest(weight):
    """One more tap, of weight 0: the state then has W inputs instead of W - 1."""
    return F.pad(weight, (1, 0))


def causal_conv1d(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    backend="triton",
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
):
    """`gated_delta.causal_conv1d`, plus a residual [B, T, D]; states are [N, D, W].

    W is at most 7 with a state. backend, cu_seqlens_cpu and chunk_indices are without effect.
    """
    op = "integrations.fla.causal_conv1d"
    if weight is None:
        _checks.fail(op, "weight [D, W] is required, got None")
    if cp_context is not None:
        if initial_state is not None or output_final_state:
            _checks.fail(op, "cp_context excludes initial_state and output_final_state")
        y, state = conv_parallel(x, weight, bias, cp_context, _silu(activation)), None
    else:
        stateful = initial_state is not None or output_final_state
        y, state = gated_delta.causal_conv1d(
            x,
            _with_oldest(weight) if stateful else weight,
            bias,
            initial_state,
            cu_seqlens,
            _silu(activation),
            output_final_state,
        )
    return y if residual is None else y + residual, state


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """The next token x [N, 1, D], [1, N, D] or [N, D]; cache [N, D, W] is replaced in place."""
    if weight is None:
        _checks.fail("integrations.fla.causal_conv1d_update", "weight [D, W] is required, got None")
    y = gated_delta.causal_conv1d_update(
        x.view(-1, 1, x.shape[-1]), cache, _with_oldest(weight), bias, _silu(activation)
    ).view(x.shape)
    return y if residual is None else y + residual, cache


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution with fla's constructor and call; backend is without effect."""

    def __init__(
        self,
        hidden_size,
        kernel_size,
        bias=False,
        activation="silu",
        backend="triton",
        device=None,
        dtype=None,
    ):
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    def forward(
        self,
        x,
        residual=None,
        mask=None,
        cache=None,
        output_final_state=False,
        cu_seqlens=None,
        chunk_indices=None,
        cp_context=None,
    ):
        """x [B, T, D] -> (y, cache [N, D, W] or None); mask [B, T] zeroes inputs.

        One token a row without autograd: the cache is replaced in place.
        """
        if mask is not None:
            if cu_seqlens is not None:
                _checks.fail("ShortConvolution", "mask and cu_seqlens exclude each other")
            x = x * mask.unsqueeze(-1)
        if (
            cache is not None
            and cu_seqlens is None
            and x.shape[1] == 1
            and not torch.is_grad_enabled()
        ):
            return self.step(x, residual, cache, output_final_state)
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            residual,
            cache,
            output_final_state,
            self.activation,
            cu_seqlens=cu_seqlens,
            cp_context=cp_context,
        )

    def step(self, x, residual, cache, output_final_state=False, cu_seqlens=None):
        """One token a sequence, [N, 1, D] or packed [1, N, D]; cache is replaced in place."""
        if cache is None:
            rows = x.shape[0] * x.shape[1]
            cache = x.new_zeros(rows, self.hidden_size, self.kernel_size[0])
        weight = self.weight.squeeze(1)
        y, cache = causal_conv1d_update(x, cache, residual, weight, self.bias, self.activation)
        return y, cache if output_final_state else None

    @property
    def state_size(self):
        """Elements of a sequence's cache."""
        return self.hidden_size * self.kernel_size[0]


class FusedRMSNormGated(GatedRMSNorm):
    """`GatedRMSNorm` with fla's constructor and call."""

    def __init__(
        self,
        hidden_size,
        elementwise_affine=True,
        eps=1e-5,
        activation="swish",
        device=None,
        dtype=None,
    ):
        super().__init__(hidden_size, eps, activation)
        self.hidden_size, self.elementwise_affine = hidden_size, elementwise_affine
        self.to(device=device, dtype=dtype)
        if not elementwise_affine:
            ones = self.weight.detach()
            del self.weight
            self.register_buffer("weight", ones, persistent=False)

    def forward(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
        """norm(x + residual) * act(g), and with prenorm also x + residual."""
        wide = x
        if residual is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) + residual
        y = super().forward(wide, g).to(x.dtype)
        if not prenorm:
            return y
        if residual is not None:
            return y, wide.to(residual.dtype)
        return y, x.float() if residual_in_fp32 else x


def convert(layer):
    """Our GatedDeltaNet with the parameters, the same tensors, of fla's `GatedDeltaNet`.

    A cache that the one has filled does not fit the other (states K first, W - 1 inputs).
    """
    copied = (
        *("hidden_size", "expand_v", "head_dim", "num_heads", "num_v_heads", "mode", "use_gate"),
        *("use_short_conv", "allow_neg_eigval", "conv_size", "conv_bias", "layer_idx"),
    )
    with torch.device("meta"):
        ours = GatedDeltaNet(
            **{name: getattr(layer, name) for name in copied},
            norm_eps=layer.o_norm.eps,
            output_gate_activation=getattr(layer.o_norm, "activation", "swish"),
        )
    trained = {name: p.requires_grad for name, p in layer.named_parameters()}
    ours.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(trained[name])
    return ours.train(layer.training)


def register(priority=2):
    """Offers `chunk_gated_delta_rule` to fla's registry of backends (fla 0.6 and later).

    fla asks the backends of a function in the order of their priority, low numbers first (5 is
    common), whether they take a call, and uses its own kernels otherwise: for other devices than
    ours and heads above 256, for example. FLA_DELTAFUSE=0 in the environment turns it off.

    Raises:
        ImportError: no fla, or one whose gated delta rule asks no registry.
    """
    from fla import backends

    @backends.register("gated_delta_rule")
    class DeltafuseBackend(_Backend, backends.BaseBackend):
        pass

    DeltafuseBackend.priority = priority


class _Backend:
    backend_type = "deltafuse"
    package_name = "deltafuse"
    env_var = "FLA_DELTAFUSE"
    default_enable = True

    def chunk_gated_delta_rule_verifier(self, *args, **kwargs):
        """Whether this call is ours, and why not; fla also takes an exception for a no."""
        return _verify(*args, **kwargs)

    def chunk_gated_delta_rule(self, *args, **kwargs):
        return chunk_gated_delta_rule(*args, **kwargs)


def _verify(*args, **kwargs):
    call = inspect.signature(chunk_gated_delta_rule).bind(*args, **kwargs)
    call.apply_defaults()
    q, v, context = (call.arguments[name] for name in ("q", "v", "cp_context"))
    if not _library.has_kernel("gated_delta_fwd", q):
        return False, f"no kernel for {q.dtype} on {q.device.type}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD:
        return False, f"K = {q.shape[-1]}, V = {v.shape[-1]} above {MAX_HEAD}"
    if getattr(context, "layout", "contiguous") != "contiguous":
        return False, "cp_context with another layout than contiguous"
    if call.arguments["A_log"] is not None and not call.arguments["use_gate_in_kernel"]:
        return False, "A_log without use_gate_in_kernel"
    return True, None
