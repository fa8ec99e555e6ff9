"""The gated delta rule token by token: operator, gradient, and the one-step form."""

import warnings
from typing import NamedTuple

import torch

from .. import _checks, _library
from .._checks import cast
from . import reference
from .ops import autocast, gate_dtype, legacy_layout
from .validation import (
    MAX_HEAD,
    check_gate,
    check_qkv,
    check_sequences,
    check_sigmoid,
    check_states,
)

OP = "fused_recurrent_gated_delta_rule"


class Call(NamedTuple):
    """The raw operator's arguments but its last, output_final_state; see csrc for the schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    gk: torch.Tensor | None
    gv: torch.Tensor | None
    beta: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    scale: float
    l2norm: bool
    sigmoid_scale: float
    state_v_first: bool


TENSORS = Call._fields.index("scale")


def _fwd_fake(*args):
    call, output_final_state = Call(*args[:-1]), args[-1]
    N = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    K, V = call.q.shape[3], call.v.shape[3]
    shape = (N, call.v.shape[2], *((V, K) if call.state_v_first else (K, V)))
    state = call.q.new_empty(
        shape if output_final_state else (0,), dtype=reference.compute_dtype(call.q)
    )
    return call.v.new_empty(call.v.shape), state


def _bwd_fake(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, *_):
    dtype = reference.compute_dtype(q)
    needed = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    return tuple(
        q.new_empty((0,), dtype=dtype) if t is None else t.new_empty(t.shape) for t in needed
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:-1]
    ctx.output_final_state = inputs[-1]


def _backward(ops, ctx, d_o, d_final_state):
    call = Call(*ctx.saved_tensors, *ctx.options)
    if call.gk is not None or call.gv is not None:
        raise NotImplementedError(f"{OP}: no gradient with gk or gv, use g or torch.no_grad()")
    if d_o is None:
        d_o = call.v.new_zeros(call.v.shape)
    if not ctx.output_final_state:
        d_final_state = None
    inputs = call._asdict()
    del inputs["gk"], inputs["gv"]
    dq, dk, dv, dg, dbeta, dh0, dA_log, ddt_bias = ops.gated_delta_recurrent_bwd(
        d_o, d_final_state, *inputs.values()
    )
    grads = (dq, dk, dv, dg, None, None, dbeta, dh0, None, dA_log, ddt_bias)
    needed = ctx.needs_input_grad[:TENSORS]
    options = [None] * (len(ctx.options) + 1)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), *options


_library.register("gated_delta_recurrent_fwd", _fwd_fake, _setup_context, _backward)
_library.register_backward("gated_delta_recurrent_bwd", _bwd_fake, OP)
_library.not_on_cuda(torch.float64, "gated_delta_recurrent_fwd")


def _reference(*args):
    call, output_final_state = Call(*args[:-1]), args[-1]
    return reference.naive_recurrent_gated_delta_rule(
        call.q,
        call.k,
        call.v,
        call.g,
        call.beta,
        scale=call.scale,
        initial_state=call.initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=call.l2norm,
        use_beta_sigmoid_in_kernel=call.sigmoid_scale > 0,
        allow_neg_eigval=call.sigmoid_scale == 2,
        state_v_first=call.state_v_first,
        cu_seqlens=call.cu_seqlens,
        use_gate_in_kernel=call.A_log is not None,
        A_log=call.A_log,
        dt_bias=call.dt_bias,
        gk=call.gk,
        gv=call.gv,
    )


def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    gk=None,
    gv=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    **legacy,
):
    """Gated delta rule token by token, for short sequences; differentiable.

    For each value head, with state S [K, V] (arXiv 2412.06464, equation 10):
      S~ = exp(g_t) S_{t-1};  S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T;  o_t = scale S_t^T q_t.
    `chunk_gated_delta_rule` computes the same function, faster for long sequences.

    Args:
        q, k: [B, T, H, K], float32, bfloat16, float16 or float64 (CPU); the last dimension should
            have stride 1 (else it is copied), other strides are free.
        v: [B, T, HV, V] of the same dtype; value head h reads key head h // (HV / H). Above
            K, V = 256 the reference runs, with a warning. Autocast casts q, k and v only.
        g: log-decay [B, T, HV] in any float dtype, or None (no decay); below -88 it counts as -88,
            -inf is a reset.
        gk, gv: further log-decays [B, T, HV, K] of the state's rows and [B, T, HV, V] of its
            columns; without gradients: a backward through a call that has them is an error.
        beta: write strength [B, T, HV] or [B, T, HV, V] in any float dtype; None is 1.
        scale: of the output; None is K^-1/2.
        initial_state: [N, HV, K, V]; N is B, or the number of packed sequences. None is zero.
        use_qk_l2norm_in_kernel: normalises q and k: x (sum x^2 + 1e-6)^-1/2.
        use_gate_in_kernel: g is the pre-activation: -exp(A_log) softplus(g + dt_bias); A_log [HV],
            dt_bias [HV] or None.
        use_beta_sigmoid_in_kernel: beta is a logit; allow_neg_eigval: beta = 2 sigmoid(logit), so
            that a transition can have eigenvalues down to -1 (arXiv 2411.12537).
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: offsets [N + 1] of sequences packed along T, int32 or int64, B = 1. Sequences
            may be empty; tokens after the last offset give o = 0 and zero gradients.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state (float32; float64 for float64
        inputs), a fresh tensor, or None unless output_final_state.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, named in the message.
        TypeError: unknown keywords, tensors that are not floating point.
    """
    state_v_first = legacy_layout(OP, state_v_first, legacy)
    q, k, v = autocast(q, k, v)
    _check_arguments(q, k, v, g, gk, gv, beta)
    if use_gate_in_kernel and g is None:
        _checks.fail(OP, "use_gate_in_kernel=True needs g [B, T, HV], got None")
    if use_beta_sigmoid_in_kernel and beta is None:
        _checks.fail(OP, "use_beta_sigmoid_in_kernel=True needs beta [B, T, HV], got None")
    check_gate(OP, v, use_gate_in_kernel, A_log, dt_bias)
    sigmoid_scale = check_sigmoid(OP, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    N = check_sequences(OP, q, cu_seqlens)
    check_states(OP, q, v, N, initial_state, None, None, state_v_first)
    g, gk, gv, beta = (t if t is None else gate_dtype(q, t) for t in (g, gk, gv, beta))
    if initial_state is not None:
        initial_state = cast(initial_state, reference.compute_dtype(q))
    call = Call(
        q=q,
        k=k,
        v=v,
        g=g,
        gk=gk,
        gv=gv,
        beta=beta,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        A_log=A_log,
        dt_bias=dt_bias,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        l2norm=use_qk_l2norm_in_kernel,
        sigmoid_scale=sigmoid_scale,
        state_v_first=state_v_first,
    )
    o, final_state = (_kernel(call) or _reference)(*call, output_final_state)
    return o, final_state if output_final_state else None


fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def gated_delta_rule_step(
    q, k, v, g, beta, state, scale=None, use_qk_l2norm=False, state_v_first=False
):
    """One token of the gated delta rule, as a function of the state; differentiable.

    Args:
        q, k: [B, H, K]; v: [B, HV, V]; one dtype.
        g: log-decay [B, HV], or None (no decay).
        beta: write strength [B, HV] or [B, HV, V]; None is 1.
        state: [B, HV, K, V], or [B, HV, V, K] if state_v_first; None is zero.
        scale: of the output; None is K^-1/2.
        use_qk_l2norm: normalises q and k: x (sum x^2 + 1e-6)^-1/2.

    Returns:
        o [B, HV, V] in the dtype of q, and the new state (float32; float64 for float64 inputs).

    Raises:
        ValueError, TypeError: as `fused_recurrent_gated_delta_rule`, whose messages name the
            shapes with T = 1.
    """
    q, k, v, g, beta = (t if t is None else t.unsqueeze(1) for t in (q, k, v, g, beta))
    o, state = fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
        state_v_first=state_v_first,
    )
    return o.squeeze(1), state


def _check_arguments(q, k, v, g, gk, gv, beta):
    check_qkv(OP, q, k, v, g=g, gk=gk, gv=gv, beta=beta)
    heads, K, V = v.shape[:3], q.shape[3], v.shape[3]
    if g is not None:
        _checks.expect_shape(OP, "g", g, heads, "[B, T, HV]")
    if beta is not None and beta.dim() == 4:
        _checks.expect_shape(OP, "beta", beta, (*heads, V), "[B, T, HV, V]")
    elif beta is not None:
        _checks.expect_shape(OP, "beta", beta, heads, "[B, T, HV]")
    if gk is not None:
        _checks.expect_shape(OP, "gk", gk, (*heads, K), "[B, T, HV, K]")
    if gv is not None:
        _checks.expect_shape(OP, "gv", gv, (*heads, V), "[B, T, HV, V]")


def _kernel(call):
    """The compiled operator, or None: the backend is the reference, or a head is too wide."""
    op = _library.kernel("gated_delta_recurrent_fwd", call.q)
    K, V = call.q.shape[3], call.v.shape[3]
    if op is None or max(K, V) <= MAX_HEAD:
        return op
    # the warnings filter shows it once a caller
    warnings.warn(
        f"{OP}: K = {K}, V = {V} is beyond the kernels' {MAX_HEAD}, using the PyTorch reference",
        stacklevel=3,
    )
    return None
