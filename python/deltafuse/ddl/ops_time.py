"""Deep Delta Learning along time: TC read-out, EC expansion, token shift.

Each is a raw operator pair (forward, backward) and a public function that checks, brings the
arguments into the raw shape, and falls back on the reference. The raw operators of the two
convolutions take their taps as one tensor [K, d, d_v] in the compute dtype, the tap of the current
token first: what a read-out vector does to the taps is left to autograd. float64 tensors on CUDA
run the reference.
"""

import torch

from .. import _checks, _library
from .._checks import cast
from . import reference_time as reference
from .reference_time import compute_dtype
from .validation import MAX_CHANNELS


def _register(name, public, fwd_fake, bwd_fake, setup_context, backward):
    _library.register(f"{name}_fwd", fwd_fake, setup_context, backward)
    _library.register_backward(f"{name}_bwd", bwd_fake, public)


def _needed(ctx, grads):
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


def _sequences(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _bwd_fake(dy, d_final_state, x, w, initial_state, cu_seqlens):
    state = x.new_empty((0,)) if initial_state is None else initial_state
    return tuple(t.new_empty(t.shape) for t in (x, w, state))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])
    ctx.output_final_state = inputs[-1]


def _register_convolution(name, public, output_shape):
    """fwd(x, w, initial_state, cu_seqlens, output_final_state), bwd(dy, d_final_state, ...)."""

    def fwd_fake(x, w, initial_state, cu_seqlens, output_final_state):
        state = (_sequences(x, cu_seqlens), x.shape[2:].numel(), w.shape[0] - 1)
        y = x.new_empty(output_shape(x, w))
        return y, x.new_empty(state if output_final_state else (0,))

    def backward(ops, ctx, dy, d_final_state):
        saved = ctx.saved_tensors  # once: a checkpoint computes them again for every look
        x, w, *_ = saved
        dy = x.new_zeros(output_shape(x, w)) if dy is None else dy
        if not ctx.output_final_state:
            d_final_state = None
        grads = getattr(ops, f"{name}_bwd")(dy, d_final_state, *saved)
        return _needed(ctx, (*grads, None, None))

    _register(name, public, fwd_fake, _bwd_fake, _setup, backward)


_register_convolution("ddl_tc", "ddl_compress_tc", lambda x, w: x.shape[:3])
_register_convolution("ddl_ec", "ddl_expand", lambda x, w: (*x.shape, w.shape[2]))


def _shift_fwd_fake(x, prev_weight, curr_weight, cache, cu_seqlens, output_cache):
    state = (_sequences(x, cu_seqlens), *x.shape[2:]) if output_cache else (0,)
    return x.new_empty(x.shape), x.new_empty(state)


def _shift_bwd_fake(dy, d_cache, x, prev_weight, curr_weight, cache, cu_seqlens):
    cache = x.new_empty((0,)) if cache is None else cache
    return tuple(t.new_empty(t.shape) for t in (x, prev_weight, curr_weight, cache))


def _shift_backward(ops, ctx, dy, d_cache):
    saved = ctx.saved_tensors
    dy = saved[0].new_zeros(saved[0].shape) if dy is None else dy
    d_cache = d_cache if ctx.output_final_state else None
    grads = ops.token_shift_bwd(dy, d_cache, *saved)
    return _needed(ctx, (*grads, None, None))


_register("token_shift", "token_shift", _shift_fwd_fake, _shift_bwd_fake, _setup, _shift_backward)
_library.not_on_cuda(torch.float64, "ddl_tc_fwd", "ddl_ec_fwd", "token_shift_fwd")


# Checks


def _check_tensors(op, x, cu_seqlens, attention_mask, **others):
    """Types, devices, offsets and mask; the number of sequences."""
    _checks.expect_floats(op, error=TypeError, x=x, **others)
    if cu_seqlens is not None or attention_mask is not None:
        given = {"x": x, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        _checks.expect_same_device(op, error=TypeError, **given)
    if attention_mask is not None:
        _checks.expect_shape(op, "attention_mask", attention_mask, x.shape[:2], "[B, T]")
    N = _checks.expect_offsets(op, x, cu_seqlens)
    visible = cu_seqlens is not None and _checks.has_values(cu_seqlens)
    if visible and not _library.runs_cuda(x):  # CUDA kernels find out by themselves
        _checks.expect_rising(op, cu_seqlens, x.shape[1])
    return N


def _check_channels(op, x, d, value_channels):
    if d < 1 or not 1 <= value_channels <= MAX_CHANNELS:
        _checks.fail(
            op,
            f"d must be at least 1 and d_v in 1..{MAX_CHANNELS}, "
            f"got d {d} and d_v {value_channels} with x {tuple(x.shape)}",
        )


def _check_taps(op, weight, dim, rows, meaning):
    """K of weight [rows, K] or [rows, 1, K]."""
    _checks.expect_dim(op, "weight", weight, dim, meaning)
    K = weight.shape[-1]
    _checks.expect_shape(op, "weight", weight, (rows, *[1] * (dim - 2), K), meaning)
    if K < 1:
        _checks.fail(op, f"weight must have K >= 1 taps, got {tuple(weight.shape)}")
    return K


# Masks, kernels


def _hidden(attention_mask, x):
    """Where tokens are masked, as wide as x; None without a mask."""
    if attention_mask is None:
        return None
    return (attention_mask == 0).view(*x.shape[:2], *[1] * (x.dim() - 2))


def _filled(x, hidden):
    """x with zeros at masked tokens, whatever they hold."""
    return x if hidden is None else x.masked_fill(hidden, 0)


# Public functions


def ddl_compress_tc(
    x,
    weight,
    read,
    *,
    cu_seqlens=None,
    initial_state=None,
    output_final_state=False,
    attention_mask=None,
):
    """TC read-out of the residual state: a causal convolution over time, then a read vector.

    y_{t,i} = sum_j read_j sum_{s<K} weight[(i, j), K-1-s] x_{t-s,i,j} (Deep Delta Learning, arXiv
    2601.00417, App. A.2), with zeros or the initial state before a sequence. Differentiable once.

    Args:
        x: [B, T, d, d_v], 1 <= d_v <= 16, float32, bfloat16, float16 or float64; computed in
            float32 (float64 for float64, which on CUDA runs the reference). Tokens whose d * d_v
            numbers are contiguous are read in place, another layout is copied.
        weight: [d * d_v, K], K >= 1, any float dtype; weight[:, K - 1] multiplies the current
            token.
        read: [d_v], any float dtype.
        cu_seqlens: offsets [S + 1] of sequences packed along T, int32 or int64, B = 1. Sequences
            may be empty; tokens after the last offset give zeros and get zero gradients.
        initial_state: the K - 1 tokens before each sequence, oldest first, [N, d * d_v, K - 1];
            N is B, or the number of packed sequences. Rounded to the dtype of x.
        output_final_state: also return the last K - 1 tokens of each sequence.
        attention_mask: [B, T], 0 where a token is padding: a zero input with a zero output.

    Returns:
        y [B, T, d] in the dtype of x; with output_final_state y and the final state
        [N, d * d_v, K - 1] in the dtype of x, with zeros where there was no token.

    Raises:
        ValueError: shapes or cu_seqlens that do not fit, named in the message.
        TypeError: a tensor that is not floating point, or tensors on several devices.
    """
    op = "ddl_compress_tc"
    _checks.expect_dim(op, "x", x, 4, "[B, T, d, d_v]")
    d, dv = x.shape[2:]
    _check_channels(op, x, d, dv)
    K = _check_taps(op, weight, 2, d * dv, "[d * d_v, K] with the d, d_v of x")
    _checks.expect_shape(op, "read", read, (dv,), "[d_v] with the d_v of x")
    N = _check_tensors(
        op, x, cu_seqlens, attention_mask, weight=weight, read=read, initial_state=initial_state
    )
    if initial_state is not None:
        shape = (N, d * dv, K - 1)
        _checks.expect_shape(op, "initial_state", initial_state, shape, "[N, d * d_v, K - 1]")
    hidden = _hidden(attention_mask, x)
    x = _filled(x, hidden)
    kernel = _library.kernel("ddl_tc_fwd", x)
    if kernel is None:
        y, final = reference.naive_compress_tc(x, weight, read, cu_seqlens, initial_state)
    else:
        dtype = compute_dtype(x)
        taps = cast(weight, dtype).unflatten(0, (d, dv)) * cast(read, dtype)[:, None]
        w = taps.flip(2).permute(2, 0, 1)
        y, final = kernel(x, w, initial_state, cu_seqlens, output_final_state)
    y = _filled(y, None if hidden is None else hidden[..., 0])
    return (y, final) if output_final_state else y


def ddl_expand(
    x,
    weight=None,
    value_channels=4,
    *,
    cu_seqlens=None,
    initial_state=None,
    output_final_state=False,
    attention_mask=None,
):
    """The residual state from embeddings: a copy a channel, or (EC) a causal convolution over time.

    X_{t,i,j} = sum_{s<K} weight[(i, j), 0, K-1-s] x_{t-s,i} (Deep Delta Learning, arXiv 2601.00417,
    App. A.2), with zeros or the initial state before a sequence; x_{t,i} without a weight. With
    weight[..., K - 1] = 1 and zeros before it, it equals the copy. Differentiable once.

    Args:
        x: [B, T, d], float32, bfloat16, float16 or float64; computed in float32 (float64 for
            float64). The last stride should be 1, else x is copied.
        weight: [d * value_channels, 1, K], K >= 1, any float dtype, or None for the copy.
        value_channels: d_v, 1..16.
        cu_seqlens, attention_mask: as for `ddl_compress_tc`.
        initial_state: the K - 1 inputs before each sequence, oldest first, [N, d, K - 1] (the copy
            has K = 1). Rounded to the dtype of x.
        output_final_state: also return the last K - 1 inputs of each sequence.

    Returns:
        X [B, T, d, value_channels] in the dtype of x; with output_final_state X and the final
        state [N, d, K - 1] in the dtype of x.

    Raises:
        ValueError, TypeError: as `ddl_compress_tc`.
    """
    op = "ddl_expand"
    _checks.expect_dim(op, "x", x, 3, "[B, T, d]")
    d, dv = x.shape[2], value_channels
    _check_channels(op, x, d, dv)
    meaning = "[d * value_channels, 1, K] with the d of x"
    K = 1 if weight is None else _check_taps(op, weight, 3, d * dv, meaning)
    N = _check_tensors(
        op, x, cu_seqlens, attention_mask, weight=weight, initial_state=initial_state
    )
    if initial_state is not None:
        _checks.expect_shape(op, "initial_state", initial_state, (N, d, K - 1), "[N, d, K - 1]")
    hidden = _hidden(attention_mask, x)
    x = _filled(x, hidden)
    kernel = None if weight is None else _library.kernel("ddl_ec_fwd", x)
    if weight is None:
        if cu_seqlens is not None:  # zeros behind the last sequence, as the convolution has
            behind = torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1]
            x = x.masked_fill(behind[:, None], 0)
        y = x[..., None].expand(*x.shape, dv).contiguous()
        final = x.new_zeros(N, d, 0)
    elif kernel is None:
        y, final = reference.naive_expand(x, weight, dv, cu_seqlens, initial_state)
    else:
        taps = cast(weight, compute_dtype(x)).squeeze(1).unflatten(0, (d, dv))
        w = taps.flip(2).permute(2, 0, 1)
        y, final = kernel(x, w, initial_state, cu_seqlens, output_final_state)
    y = _filled(y, None if hidden is None else hidden[..., None])
    return (y, final) if output_final_state else y


def token_shift(
    x,
    prev_weight,
    curr_weight,
    *,
    cu_seqlens=None,
    cache=None,
    output_cache=False,
    attention_mask=None,
):
    """y_t = prev_t x_{t-1} + curr_t x_t for every head, x_{-1} = 0 or the cache.

    The KV shift of the Deep Delta Learning models (arXiv 2601.00417). One token follows the same
    rule as many, so that decoding equals the full forward. Differentiable once.

    Args:
        x: [B, T, H, D], float32, bfloat16, float16 or float64; computed in float32 (float64 for
            float64). The last stride should be 1, else x is copied.
        prev_weight, curr_weight: [B, T, H], any float dtype.
        cu_seqlens, attention_mask: as for `ddl_compress_tc`.
        cache: the token before each sequence, [N, H, D]; N is B, or the number of packed
            sequences. Rounded to the dtype of x.
        output_cache: also return the last token of each sequence.

    Returns:
        y [B, T, H, D] in the dtype of x; with output_cache y and the cache [N, H, D] in the dtype
        of x, for a sequence without tokens the one given, or zeros.

    Raises:
        ValueError, TypeError: as `ddl_compress_tc`.
    """
    op = "token_shift"
    _checks.expect_dim(op, "x", x, 4, "[B, T, H, D]")
    for name, tensor in (("prev_weight", prev_weight), ("curr_weight", curr_weight)):
        _checks.expect_shape(op, name, tensor, x.shape[:3], "[B, T, H] with those of x")
    weights = {"prev_weight": prev_weight, "curr_weight": curr_weight}
    N = _check_tensors(op, x, cu_seqlens, attention_mask, **weights, cache=cache)
    if cache is not None:
        _checks.expect_shape(op, "cache", cache, (N, *x.shape[2:]), "[N, H, D]")
    hidden = _hidden(attention_mask, x)
    x = _filled(x, hidden)
    kernel = _library.kernel("token_shift_fwd", x)
    if kernel is None:
        y, last = reference.naive_token_shift(x, prev_weight, curr_weight, cu_seqlens, cache)
    else:
        y, last = kernel(x, prev_weight, curr_weight, cache, cu_seqlens, output_cache)
    y = _filled(y, hidden)
    return (y, last) if output_cache else y
