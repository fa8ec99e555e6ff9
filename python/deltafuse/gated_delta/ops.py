"""The chunked gated delta rule as an operator: fake kernels, gradient, and the public function."""

import functools
import math
import os
import warnings
from typing import NamedTuple

import torch

from .. import _library
from .._checks import cast
from . import reference, segments
from .context_parallel import offsets_of, run_parallel
from .validation import (
    MAX_HEAD,
    check_gate,
    check_inputs,
    check_options,
    check_sequences,
    check_sigmoid,
    check_states,
    check_values,
)

OP = "chunk_gated_delta_rule"
_HOST_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_debug = os.environ.get("DELTAFUSE_DEBUG", "0") not in ("", "0")


class Call(NamedTuple):
    """The raw operators' arguments, the forward's without output_final_state and save; see csrc."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    scale: float
    l2norm: bool
    sigmoid_scale: float
    state_v_first: bool
    chunk_size: int
    high_precision: bool
    split: int
    batch_invariant: bool


NOTHING, INVERSES, STATES = range(3)  # what the forward saves


def _saved(call, save):
    """Shape and dtype of what the forward leaves to the backward, a chunk and value head.

    CPU: S^T and E, padded to 16, or nothing. CUDA: T' (of 16 bits: as the sum of two) and,
    if asked for, S^T, padded to 64; chunks have 64 tokens, or 32 in float32.
    """
    K, V = call.q.shape[3], call.v.shape[3]
    if _library.runs_cuda(call.q):
        dtype, C = call.q.dtype, cuda_chunk(call.q.dtype)
        inverse = C * C if dtype == torch.float32 else 2 * C * C
        elements = inverse + (_pad(K, 64) * _pad(V, 64) if save == STATES else 0)
    else:
        dtype, C = reference.compute_dtype(call.q), call.chunk_size
        elements = _pad(K, 16) * _pad(V, 16) + C * _pad(V, 16)
        save = save if save == STATES else NOTHING
    return (_slots(call, C), call.v.shape[2], elements) if save else (0,), dtype


def cuda_chunk(dtype):
    """Tokens of a chunk of the CUDA kernels."""
    return 32 if dtype == torch.float32 else 64


def _pad(n, to):
    return -(-n // to) * to


def _slots(call, C):
    B, T = call.q.shape[:2]
    if call.cu_seqlens is None:
        return B * -(-T // C)
    return T // C + call.cu_seqlens.shape[0] - 1


def _fwd_fake(*args):
    *call, output_final_state, save = args
    call = Call(*call)
    N = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    shape = (N, call.v.shape[2], call.q.shape[3], call.v.shape[3])
    if call.state_v_first:
        shape = (*shape[:2], shape[3], shape[2])
    state = call.q.new_empty(
        shape if output_final_state else (0,), dtype=reference.compute_dtype(call.q)
    )
    shape, dtype = _saved(call, save)
    saved = call.q.new_empty(shape, dtype=dtype)
    return call.v.new_empty(call.v.shape), state, saved


def _bwd_fake(d_o, d_final_state, saved, *args):
    call = Call(*args)
    dtype = reference.compute_dtype(call.q)
    inputs = (*call[:6], call.A_log, call.dt_bias)
    return tuple(
        call.q.new_empty((0,), dtype=dtype) if t is None else t.new_empty(t.shape) for t in inputs
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *_, saved = output
    ctx.mark_non_differentiable(saved)
    *inputs, ctx.output_final_state, save = inputs
    ctx.save_for_backward(*inputs[:9], saved if save else None)
    ctx.options = inputs[9:]


def _backward(ops, ctx, d_o, d_final_state, _d_saved):
    *tensors, saved = ctx.saved_tensors
    call = Call(*tensors, *ctx.options)
    if d_o is None:
        d_o = call.v.new_zeros(call.v.shape)
    if not ctx.output_final_state:
        d_final_state = None
    *grads, dA_log, ddt_bias = ops.gated_delta_bwd(d_o, d_final_state, saved, *call)
    grads = (*grads, None, dA_log, ddt_bias)
    needed = ctx.needs_input_grad[:9]
    options = [None] * (len(ctx.options) + 2)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), *options


_library.register("gated_delta_fwd", _fwd_fake, _setup_context, _backward)
_library.register_backward("gated_delta_bwd", _bwd_fake, OP)
_library.not_on_cuda(torch.float64, "gated_delta_fwd", "gated_delta_bwd")


def _reference(call, output_final_state):
    return reference.naive_chunk_gated_delta_rule(
        *call[:5],
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
        chunk_size=call.chunk_size,
    )


def _warn(message, category=UserWarning):
    """Once a caller, by the filter of warnings; a warning would break a compiled graph."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, category, stacklevel=4)


def _saves(call, save_states):
    """What the forward keeps for a backward; "auto": states, too, while they take little memory."""
    tensors = (t for t in call if isinstance(t, torch.Tensor))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return NOTHING
    if save_states == "auto":
        shape, dtype = _saved(call, STATES)
        save_states = math.prod(shape) * dtype.itemsize <= _most_saved(call.q.device)
    if save_states:
        return STATES
    return INVERSES if _library.runs_cuda(call.q) else NOTHING


def _most_saved(device):
    """Bytes of one call's saved states: a stack of thirty such layers takes half of the memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    return _HOST_MEMORY // 64


def _run(save_states, call, output_final_state):
    """(o, final state or None) of a checked call, by the kernel or the reference."""
    op = _library.kernel("gated_delta_fwd", call.q)
    if op is not None and max(call.q.shape[3], call.v.shape[3]) > MAX_HEAD:
        _warn(
            f"{OP}: K = {call.q.shape[3]}, V = {call.v.shape[3]} is beyond the kernels' "
            f"{MAX_HEAD}, using the PyTorch reference"
        )
        op = None
    if op is None:
        o, final_state = _reference(call, output_final_state)
    else:
        o, final_state, _ = op(*call, output_final_state, _saves(call, save_states))
    return o, final_state if output_final_state else None


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
    *,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    chunk_size=64,
    output_state=None,
    state_indices=None,
    batch_invariant=None,
    save_states="auto",
    precision=None,
    auto_cp=None,
    enable_fwd_cp_cache=False,
    **legacy,
):
    """Gated delta rule over whole sequences, in chunks of matrix products; differentiable.

    For each value head, with state S [K, V] (arXiv 2412.06464, equation 10):
      S~ = exp(g_t) S_{t-1};  S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T;  o_t = scale S_t^T q_t.

    Args:
        q, k: [B, T, H, K], float32, bfloat16, float16 or float64 (CPU); the last dimension should
            have stride 1 (else it is copied), other strides are free.
        v: [B, T, HV, V] of the same dtype; value head h reads key head h // (HV / H). Above
            K, V = 256 the reference runs, with a warning. Autocast casts q, k and v only.
        g: log-decay [B, T, HV] in any float dtype; below -88 it counts as -88, -inf is a reset.
        beta: write strength [B, T, HV] in any float dtype.
        scale: of the output; None is K^-1/2.
        initial_state: [N, HV, K, V]; N is B, or the number of packed sequences. None is zero.
        use_qk_l2norm_in_kernel: normalises q and k: x (sum x^2 + 1e-6)^-1/2.
        use_beta_sigmoid_in_kernel: beta is a logit; allow_neg_eigval: beta = 2 sigmoid(logit), so
            that a transition can have eigenvalues down to -1 (arXiv 2411.12537).
        use_gate_in_kernel: g is the pre-activation: -exp(A_log) softplus(g + dt_bias); A_log [HV],
            dt_bias [HV] or None.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: offsets [N + 1] of sequences packed along T, int32 or int64, B = 1. Sequences
            may be empty; tokens after the last offset give o = 0 and zero gradients.
            cu_seqlens_cpu, its copy on the host, saves auto_cp=True a wait for the device.
        cp_context: `ContextParallel`: the sequences are spread over the processes of a group, all
            of which make the call; cu_seqlens is the context's, states are those of this span's
            sequences (the initial state of one that began earlier is not read).
        chunk_size: 16, 32 or 64; it changes speed and rounding only.
        output_state: receives the final states, in its dtype, and is returned; not differentiable.
        state_indices: [N] int32 or int64; initial_state and output_state are pools [P, ...] of
            which sequence n uses row state_indices[n]; -1 starts from zero and writes nothing.
        auto_cp: True runs each sequence as segments side by side, which is exact; False forbids
            it; None decides: on the CPU against it (heads fill the cores).
        save_states: True keeps, for the backward, the state that enters each chunk (and, on the
            CPU, the errors E: 4 (K V + C V) bytes a chunk of C tokens and value head in
            float32); False computes them again there, another forward; "auto" keeps them
            while a call's take at most 1/64 of the device's memory. The gradients are the same,
            bit for bit.
        batch_invariant: True makes CUDA results independent of what else is in the batch, bit for
            bit; those of the CPU always are.
        precision: of 16-bit inputs on CUDA: "fast" keeps the chunk's inverse as a sum of two
            16-bit numbers, "high" also its other small operands; None is "high" with
            allow_neg_eigval. The CPU computes in float32 (float64 for float64).
        chunk_indices, enable_fwd_cp_cache: accepted and without effect.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state (float32; float64 for float64
        inputs), a fresh tensor, or None unless output_final_state or output_state is given.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, named in the message.
        TypeError: unknown keywords, tensors that are not floating point, another cp_context.
    """
    state_v_first = legacy_layout(OP, state_v_first, legacy)
    check_options(OP, chunk_size, save_states, precision, auto_cp)
    cu_seqlens = offsets_of(OP, cp_context, cu_seqlens, auto_cp)
    q, k, v = autocast(q, k, v)
    check_inputs(OP, q, k, v, g, beta)
    check_gate(OP, v, use_gate_in_kernel, A_log, dt_bias)
    sigmoid_scale = check_sigmoid(OP, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    N = check_sequences(OP, q, cu_seqlens)
    _check_values(g, cu_seqlens)
    check_states(OP, q, v, N, initial_state, output_state, state_indices, state_v_first)
    g, beta = gate_dtype(q, g), gate_dtype(q, beta)
    state = _read_states(initial_state, state_indices, reference.compute_dtype(q))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = (q, k, v, g, beta, state, cu_seqlens, A_log, dt_bias)
    options = (scale, use_qk_l2norm_in_kernel, sigmoid_scale, state_v_first, chunk_size)
    choices = cuda_choices(precision, allow_neg_eigval, auto_cp, batch_invariant)
    call = Call(*tensors, *options, *choices)
    want_state = output_final_state or output_state is not None
    run = functools.partial(_run, save_states)
    if cp_context is not None:
        run = functools.partial(run_parallel, OP, run, context=cp_context)
    elif auto_cp and not _library.runs_cuda(q):  # the CUDA kernels split by themselves
        run = functools.partial(segments.run_split, run, cu_seqlens_cpu=cu_seqlens_cpu)
    o, final_state = run(call, want_state)
    if output_state is None:
        return o, final_state
    write_states(output_state, state_indices, final_state)
    return o, output_state


chunk_gdn = chunk_gated_delta_rule


def _check_values(g, cu_seqlens):
    if _debug:
        check_values(OP, g, cu_seqlens, g.shape[1])


def cuda_choices(precision, allow_neg_eigval, auto_cp, batch_invariant):
    """The raw operators' high_precision, split and batch_invariant."""
    high = allow_neg_eigval if precision is None else precision == "high"
    return high, {None: 0, True: 1, False: -1}[auto_cp], bool(batch_invariant)


def legacy_layout(op, state_v_first, legacy):
    """state_v_first after the keywords of older interfaces; TypeError for any other keyword."""
    if "head_first" in legacy:
        raise TypeError(
            f"{op}: head_first is not supported, transpose the inputs to [B, T, H, K] instead"
        )
    if "transpose_state_layout" in legacy:
        _warn(f"{op}: transpose_state_layout is now state_v_first", DeprecationWarning)
        state_v_first = state_v_first or legacy.pop("transpose_state_layout")
    if legacy:
        raise TypeError(f"{op}: unexpected keyword arguments {sorted(legacy)}")
    return state_v_first


def autocast(*tensors):
    """Follows autocast, as matrix products do; gates, betas and states keep their precision."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def gate_dtype(q, tensor):
    """g and beta may have any float dtype; float64 goes with float64 q only."""
    if (q.dtype == torch.float64) == (tensor.dtype == torch.float64):
        return tensor
    return cast(tensor, reference.compute_dtype(q))


def _read_states(state, indices, dtype):
    """The N initial states, from a pool if there are indices; row -1 is zero, without NaN."""
    if state is None:
        return None
    if indices is not None:
        used = (indices >= 0).view(-1, 1, 1, 1)
        state = torch.where(used, state[indices.clamp(min=0).long()], 0)
    return cast(state, dtype)


def write_states(output, indices, final):
    """output[indices] = final but for indices of -1, which is known on the device only.

    A row to skip writes what the first other row writes, to the same place, or, if all are to be
    skipped, the pool's first row to itself: no wait for the device, and a defined result.
    """
    final = cast(final.detach(), output.dtype)
    with torch.no_grad():
        if indices is None:
            output.copy_(final)
            return
        if final.shape[0] == 0:
            return
        used = indices >= 0
        first = used.int().argmax(0, keepdim=True)
        target = torch.where(used, indices, indices[first].clamp(min=0)).long()
        other = torch.where(used[first].view(1, 1, 1, 1), final[first], output[:1])
        output.index_put_((target,), torch.where(used.view(-1, 1, 1, 1), final, other))
