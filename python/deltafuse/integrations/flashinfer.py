"""The gated delta rule with the arguments of flashinfer's functions: prefill, decode, verify.

Keywords that choose among flashinfer's kernels, and its checkpoints of states, are not known here.
"""

import warnings

import torch

from .. import _checks, gated_delta
from ..gated_delta.ops import write_states

OP = "integrations.flashinfer.chunk_gated_delta_rule"
MIN_ALPHA = 1e-10


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    use_qk_l2norm_in_kernel=False,
    output=None,
    output_state=None,
    *,
    use_cp="auto",
    state_indices=None,
    max_seqlen=None,
):
    """Gated delta rule on packed sequences, with a linear decay; differentiable in its inputs.

    Args:
        q, k, v: [total, Hq, K], [total, Hk, K], [total, HV, V] of one dtype. Either Hq = Hk divides
            HV, or Hk = HV divides Hq (grouped queries); a head h of the larger count uses head
            h // group of the other. Below, HO = max(Hq, HV).
        g: decay alpha = exp(log-decay) [total, HO], in (0, 1] and at least 1e-10; None is 1.
        beta: write strength [total, HO]; None is 1.
        scale: of the output; None is K^-1/2.
        initial_state: [N, HO, V, K] or None for zero.
        cu_seqlens: offsets [N + 1] of the sequences, int32 or int64; required.
        use_qk_l2norm_in_kernel: normalises q and k.
        output: [total, HO, V], receives o and is returned in its place, without a gradient.
        output_state: [N, HO, V, K], receives the final states.
        use_cp: "auto", or whether a sequence runs as segments side by side (`auto_cp`).
        state_indices: [N] int32 or int64: initial_state and output_state are pools [P, HO, V, K] of
            which sequence n uses row state_indices[n]; -1 starts from zero and writes nothing.
        max_seqlen: without effect.

    Returns:
        o [total, HO, V]; with output_final_state the pair of it and the states [N, HO, V, K]
        (float32; float64 for float64 inputs, or output_state).

    Raises:
        ValueError: shapes that do not fit together, cu_seqlens=None, or state_indices without the
            pool that receives the final states.
    """
    if cu_seqlens is None:
        _checks.fail(OP, "cu_seqlens [N + 1] is required")
    if state_indices is not None and output_final_state and output_state is None:
        _checks.fail(OP, "state_indices with output_final_state=True needs the pool output_state")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.expect_dim(OP, name, tensor, 3, "[total, heads, size]")
    if q.shape[1] > k.shape[1]:
        k, v = _one_per_query_head(q, k, v)
    heads = (v.shape[0], v.shape[1])
    g = q.new_zeros(heads, dtype=torch.float32) if g is None else _log(g)
    beta = torch.ones_like(g) if beta is None else beta
    o, state = gated_delta.chunk_gated_delta_rule(
        *(x.unsqueeze(0) for x in (q, k, v, g, beta)),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=True,
        cu_seqlens=cu_seqlens,
        output_state=output_state,
        state_indices=state_indices,
        auto_cp=None if use_cp == "auto" else use_cp,
    )
    o = o.squeeze(0)
    if output is not None:
        _checks.expect_shape(OP, "output", output, o.shape, "[total, HO, V]")
        o = output.copy_(o.detach())
    return (o, state) if output_final_state else o


def _one_per_query_head(q, k, v):
    """k and v with a head for each of q's: here every query head has a state of its own."""
    if k.shape[1] < 1 or v.shape[1] != k.shape[1] or q.shape[1] % k.shape[1] != 0:
        _checks.fail(
            OP,
            f"q's heads must be a multiple of those of k and v, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _log(alpha):
    wide = alpha if alpha.dtype == torch.float64 else alpha.float()
    return wide.clamp(min=MIN_ALPHA).log()


def gated_delta_rule_decode_pretranspose(
    q,
    k,
    v,
    state,
    A_log,
    a,
    dt_bias,
    b,
    scale=None,
    output=None,
    use_qk_l2norm=True,
    initial_state=None,
    initial_state_indices=None,
    output_state_indices=None,
    intermediate_states_buffer=None,
    disable_state_update=False,
):
    """One to eight tokens a row; states [B, HV, V, K] are updated in place. No gradient.

    Arguments as in `gated_delta.gated_delta_rule_decode`, but for the states:

    Args:
        state: [B, HV, V, K], or None with a pool.
        initial_state, initial_state_indices: pool [P, HV, V, K] and the rows' slots [B] in it. A
            negative index is a padding row: its output is 0 and no state is touched.
        output_state_indices: slots [B] to write to; default: those read.
        intermediate_states_buffer: [B or more, T or more, HV, V, K], receives the state after each
            token; T > 1 only.
        disable_state_update: leaves the states as they were; T > 1 only.

    Returns:
        (output [B, T, HV, V], the states given).

    Raises:
        ValueError, TypeError: as `gated_delta_rule_decode`, or options that exclude each other.
    """
    op = "integrations.flashinfer.gated_delta_rule_decode_pretranspose"
    if (initial_state is None) != (initial_state_indices is None):
        _checks.fail(op, "initial_state and initial_state_indices go together")
    if (state is None) == (initial_state is None):
        _checks.fail(op, "one of state and initial_state must be given")
    if output_state_indices is not None and initial_state is None:
        _checks.fail(op, "output_state_indices needs the pool initial_state")
    if q.shape[1] == 1 and (intermediate_states_buffer is not None or disable_state_update):
        _checks.fail(
            op,
            "intermediate_states_buffer and disable_state_update need T > 1, got q of shape "
            f"{tuple(q.shape)}",
        )
    states = state if initial_state is None else initial_state
    o = _decode(
        op,
        (q, k, v, states, A_log, a, dt_bias, b, scale, output, use_qk_l2norm),
        initial_state_indices,
        output_state_indices,
        intermediate_states_buffer,
        disable_state_update,
    )
    return o, states


def gated_delta_rule_decode(
    q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True
):
    """`gated_delta.gated_delta_rule_decode` of states [B, HV, K, V]; returns (output, state)."""
    o = gated_delta.gated_delta_rule_decode(
        q, k, v, state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, state_v_first=False
    )
    return o, state


def gated_delta_rule_mtp(
    q,
    k,
    v,
    initial_state,
    initial_state_indices,
    A_log,
    a,
    dt_bias,
    b,
    scale=None,
    output=None,
    intermediate_states_buffer=None,
    ssm_state_indices=None,
    disable_state_update=None,
    use_qk_l2norm=True,
    output_state_indices=None,
):
    """Two to eight draft tokens a row, of which later only some are accepted. No gradient.

    Arguments as in `gated_delta_rule_decode_pretranspose`, and:

    Args:
        ssm_state_indices: [B, T] int32 or int64: the pool's slot that the state after each token
            goes to; negative: nowhere. Excludes intermediate_states_buffer, needs
            disable_state_update=False.
        disable_state_update: None is True, as in flashinfer 0.7, with a warning.

    Returns:
        (output [B, T, HV, V], initial_state).

    Raises:
        ValueError, TypeError: as `gated_delta_rule_decode`, or options that exclude each other.
    """
    op = "integrations.flashinfer.gated_delta_rule_mtp"
    if disable_state_update is None:
        message = f"{op}: pass disable_state_update, whose default True will become False"
        warnings.warn(message, FutureWarning, stacklevel=2)
        disable_state_update = True
    snapshots = intermediate_states_buffer
    if ssm_state_indices is not None:
        if snapshots is not None or disable_state_update:
            _checks.fail(
                op,
                "ssm_state_indices excludes intermediate_states_buffer and "
                "disable_state_update=True",
            )
        _checks.expect_shape(op, "ssm_state_indices", ssm_state_indices, q.shape[:2], "[B, T]")
        snapshots = initial_state.new_empty(*q.shape[:2], *initial_state.shape[1:])
    o = _decode(
        op,
        (q, k, v, initial_state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm),
        initial_state_indices,
        output_state_indices,
        snapshots,
        disable_state_update,
    )
    if ssm_state_indices is not None:
        used = (initial_state_indices >= 0).unsqueeze(1)
        slots = torch.where(used, ssm_state_indices, -1).flatten()
        write_states(initial_state, slots, snapshots.flatten(0, 1))
    return o, initial_state


def _decode(op, inputs, indices, output_indices, snapshots, disable_state_update):
    """gated_delta_rule_decode with flashinfer's ways to say where states go."""
    q = inputs[0]
    if disable_state_update:
        output_indices = torch.full(q.shape[:1], -1, dtype=torch.int32, device=q.device)
    if snapshots is not None:
        if (
            snapshots.dim() != 5
            or snapshots.shape[0] < q.shape[0]
            or snapshots.shape[1] < q.shape[1]
        ):
            _checks.fail(
                op,
                f"intermediate_states_buffer must be [B or more, T or more, HV, V, K] with B, T = "
                f"{tuple(q.shape[:2])}, got {tuple(snapshots.shape)}",
            )
        snapshots = snapshots[: q.shape[0], : q.shape[1]]
    dense = None if snapshots is None else snapshots.contiguous()
    o = gated_delta.gated_delta_rule_decode(
        *inputs, state_indices=indices, output_state_indices=output_indices, snapshots=dense
    )
    if snapshots is not None and not snapshots.is_contiguous():
        snapshots.copy_(dense)
    return o
