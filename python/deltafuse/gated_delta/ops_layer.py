"""Operators around the gated delta rule: short convolution, gated RMS norm, l2norm, gate.

Each is a raw operator pair (forward, backward) on rows, and a public function that checks, brings
the arguments into the raw shape, and falls back on the reference.
"""

import torch

from .. import _checks, _library
from .._checks import cast
from . import reference_layer as reference
from .reference import compute_dtype

MAX_CONV_WIDTH = 8


def _register(name, public, fwd_fake, bwd_fake, setup_context, backward):
    _library.register(f"{name}_fwd", fwd_fake, setup_context, backward)
    _library.register_backward(f"{name}_bwd", bwd_fake, public)


def _needed(ctx, grads):
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


def _last_size(op, name, tensor):
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        _checks.fail(op, f"{name} must have a last dimension, got shape {tuple(tensor.shape)}")
    return tensor.shape[-1]


# Short convolution


def _conv_fwd_fake(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, x.shape[2], weight.shape[1] - 1) if output_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(state)


def _conv_bwd_fake(dy, d_final_state, x, weight, bias, initial_state, cu_seqlens, silu):
    absent = x.new_empty((0,), dtype=compute_dtype(x))
    return tuple(
        absent if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state)
    )


def _conv_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.silu, ctx.output_final_state = inputs[5:]


def _conv_backward(ops, ctx, dy, d_final_state):
    saved = ctx.saved_tensors  # once: a checkpoint computes them again for every look
    dy = saved[0].new_zeros(saved[0].shape) if dy is None else dy
    if not ctx.output_final_state:
        d_final_state = None
    grads = ops.causal_conv1d_bwd(dy, d_final_state, *saved, ctx.silu)
    return _needed(ctx, (*grads, None, None, None))


_register(
    "causal_conv1d", "causal_conv1d", _conv_fwd_fake, _conv_bwd_fake, _conv_setup, _conv_backward
)
_library.register("causal_conv1d_update", lambda x, state, weight, bias, silu: x.new_empty(x.shape))
_library.not_on_cuda(torch.float64, "causal_conv1d_fwd", "causal_conv1d_update")


def _check_conv(op, x, weight, bias, state, state_name, N, activation):
    """x [B, T, D], weight [D, W] with W in 2..8, bias [D], states [N, D, W - 1]."""
    _checks.expect_floats(op, x=x, weight=weight, bias=bias, **{state_name: state})
    _checks.expect_dim(op, "x", x, 3, "[B, T, D]")
    _checks.expect_dim(op, "weight", weight, 2, "[D, W]")
    D, W = x.shape[2], weight.shape[1]
    _checks.expect_shape(op, "weight", weight, (D, W), "[D, W] with the D of x")
    if not 2 <= W <= MAX_CONV_WIDTH:
        _checks.fail(op, f"weight [D, W] must have W in 2..{MAX_CONV_WIDTH}, got {W}")
    if bias is not None:
        _checks.expect_shape(op, "bias", bias, (D,), "[D]")
    if state is not None:
        _checks.expect_shape(op, state_name, state, (N, D, W - 1), "[N, D, W - 1]")
    if activation not in (None, "silu"):
        _checks.fail(op, f"activation must be 'silu' or None, got {activation!r}")


def causal_conv1d(
    x,
    weight,
    bias=None,
    initial_state=None,
    cu_seqlens=None,
    activation="silu",
    output_final_state=False,
):
    """Depthwise causal convolution over time with SiLU, in one pass; differentiable.

    y_t = silu(bias + sum_i weight[:, i] x_{t-W+1+i}), with zeros or the initial state before a
    sequence (the short convolution of arXiv 2412.06464, section 3.4).

    Args:
        x: [B, T, D], float32, bfloat16, float16 or float64; the last stride should be 1 (else x is
            copied), the others are free. Computed in float32 (float64 for float64).
        weight: [D, W], 2 <= W <= 8, any float dtype; weight[:, W - 1] multiplies x_t.
        bias: [D] or None.
        initial_state: the W - 1 inputs before each sequence, oldest first, [N, D, W - 1]; N is B,
            or the number of packed sequences. Rounded to the dtype of x.
        cu_seqlens: offsets [N + 1] of sequences packed along T, int32 or int64, B = 1. Sequences
            may be empty; tokens after the last offset give y = 0 and zero gradients.
        activation: "silu" or None.
        output_final_state: also return the last W - 1 inputs of each sequence.

    Returns:
        y [B, T, D] and the final state [N, D, W - 1] in the dtype of x (None unless asked for).

    Raises:
        ValueError: shapes or options that do not fit, named in the message.
        TypeError: a tensor that is not floating point.
    """
    op = "causal_conv1d"
    _checks.expect_dim(op, "x", x, 3, "[B, T, D]")
    N = _checks.expect_offsets(op, x, cu_seqlens)
    _check_conv(op, x, weight, bias, initial_state, "initial_state", N, activation)
    if cu_seqlens is not None and _checks.has_values(cu_seqlens):
        _checks.expect_rising(op, cu_seqlens, x.shape[1])
    kernel = _library.kernel("causal_conv1d_fwd", x)
    if kernel is None:
        return reference.naive_causal_conv1d(
            x, weight, bias, initial_state, cu_seqlens, activation, output_final_state
        )
    y, final_state = kernel(
        x, weight, bias, initial_state, cu_seqlens, activation == "silu", output_final_state
    )
    return y, final_state if output_final_state else None


def causal_conv1d_update(x, state, weight, bias=None, activation="silu"):
    """`causal_conv1d` of the next few tokens, the state replaced in place; no gradient.

    Args:
        x: [B, T, D], T small.
        state: [B, D, W - 1] in the dtype of x; receives the last W - 1 inputs.
        weight, bias, activation: as for `causal_conv1d`.

    Returns:
        y [B, T, D].

    Raises:
        ValueError, TypeError: as `causal_conv1d`; state of another dtype than x.
    """
    op = "causal_conv1d_update"
    _check_conv(op, x, weight, bias, state, "state", x.shape[0], activation)
    if state.dtype != x.dtype:
        _checks.expect_same_dtype(op, x=x, state=state)
    x, state, weight, bias = (
        t.detach() if t is not None and t.requires_grad else t for t in (x, state, weight, bias)
    )
    kernel = _library.kernel(op, x)
    if kernel is not None:
        return kernel(x, state, weight, bias, activation == "silu")
    y, final = reference.naive_causal_conv1d(x, weight, bias, state, None, activation, True)
    state.copy_(final)
    return y


# Gated RMS norm


def _norm_backward(ops, ctx, dy):
    grads = ops.gated_rms_norm_bwd(dy, *ctx.saved_tensors, ctx.eps)
    return _needed(ctx, (*grads, None))


def _norm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _norm_bwd_fake(dy, x, weight, gate, eps):
    dgate = x.new_empty((0,)) if gate is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dgate


_register(
    "gated_rms_norm",
    "gated_rms_norm",
    lambda x, weight, gate, eps: x.new_empty(x.shape),
    _norm_bwd_fake,
    _norm_setup,
    _norm_backward,
)


def gated_rms_norm(x, weight, gate=None, eps=1e-5):
    """RMS norm, then a SiLU gate, in one pass; differentiable.

    y = x / sqrt(mean(x^2) + eps) * weight * silu(gate) over the last dimension: the output norm
    of Gated DeltaNet (arXiv 2412.06464, section 3.4). Computed in float32 (float64 for float64).

    Args:
        x: [..., V], float32, bfloat16, float16 or float64.
        weight: [V], any float dtype.
        gate: [..., V] or None for no gate; with another dtype than x both are promoted.
        eps: added to the mean square.

    Returns:
        y [..., V] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a tensor that is not floating point.
    """
    op = "gated_rms_norm"
    _checks.expect_floats(op, x=x, weight=weight, gate=gate)
    V = _last_size(op, "x", x)
    _checks.expect_shape(op, "weight", weight, (V,), "[V] with the V of x")
    if gate is not None:
        _checks.expect_shape(op, "gate", gate, x.shape, "the shape of x, [..., V]")
    kernel = _library.kernel("gated_rms_norm_fwd", x)
    if kernel is None:
        return reference.naive_gated_rms_norm(x, weight, gate, eps)
    dtype = x.dtype
    if gate is not None:
        dtype = torch.promote_types(dtype, gate.dtype)
        gate = cast(gate, dtype).reshape(-1, V)
    y = kernel(cast(x, dtype).reshape(-1, V), weight, gate, eps)
    return cast(y.view_as(x), x.dtype)


# l2norm


def _l2norm_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


_register(
    "l2norm",
    "l2norm",
    lambda x, eps: x.new_empty(x.shape),
    lambda dy, x, eps: x.new_empty(x.shape),
    _l2norm_setup,
    lambda ops, ctx, dy: (ops.l2norm_bwd(dy, *ctx.saved_tensors, ctx.eps), None),
)


def l2norm(x, eps=1e-6):
    """x / sqrt(sum(x^2) + eps) over the last dimension of x [..., K]; differentiable.

    Computed in float32 (float64 for float64) and returned in the dtype of x.

    Raises:
        ValueError: x has no last dimension, or one of size 0.
        TypeError: x is not floating point.
    """
    _checks.expect_float("l2norm", "x", x)
    K = _last_size("l2norm", "x", x)
    kernel = _library.kernel("l2norm_fwd", x)
    if kernel is None:
        return reference.naive_l2norm(x, eps)
    return kernel(x.reshape(-1, K), eps).view_as(x)


# Gate


def _gate_bwd_fake(dg, a, A_log, dt_bias):
    ddt_bias = a.new_empty((0,)) if dt_bias is None else dt_bias.new_empty(dt_bias.shape)
    return a.new_empty(a.shape), A_log.new_empty(A_log.shape), ddt_bias


_register(
    "gdn_gate",
    "fused_gdn_gate",
    lambda a, A_log, dt_bias: a.new_empty(a.shape, dtype=compute_dtype(a)),
    _gate_bwd_fake,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ops, ctx, dg: _needed(ctx, ops.gdn_gate_bwd(dg, *ctx.saved_tensors)),
)
_library.not_on_cuda(torch.float64, "gated_rms_norm_fwd", "l2norm_fwd", "gdn_gate_fwd")


def fused_gdn_gate(a, A_log, dt_bias=None, output_dtype=None):
    """Log-decay g = -exp(A_log) softplus(a + dt_bias) of arXiv 2412.06464; differentiable.

    Args:
        a: [..., HV], any float dtype.
        A_log, dt_bias: [HV], any float dtype; dt_bias may be None. Their gradients are summed in
            a fixed order, whatever the number of threads.
        output_dtype: of g; None is float32 (float64 for float64 a), what g is computed in.

    Returns:
        g [..., HV], not clamped.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a tensor that is not floating point.
    """
    op = "fused_gdn_gate"
    _checks.expect_floats(op, a=a, A_log=A_log, dt_bias=dt_bias)
    HV = _last_size(op, "a", a)
    _checks.expect_shape(op, "A_log", A_log, (HV,), "[HV] with the HV of a")
    if dt_bias is not None:
        _checks.expect_shape(op, "dt_bias", dt_bias, (HV,), "[HV] with the HV of a")
    kernel = _library.kernel("gdn_gate_fwd", a)
    if kernel is None:
        g = reference.naive_gdn_gate(a, A_log, dt_bias)
    else:
        g = kernel(a.reshape(-1, HV), A_log, dt_bias).view_as(a)
    return g if output_dtype is None else cast(g, output_dtype)
