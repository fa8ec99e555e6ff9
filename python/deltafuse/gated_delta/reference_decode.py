"""Decode with the gated delta rule in plain PyTorch, in place on an indexed pool of states."""

import torch

from .reference import naive_recurrent_gated_delta_rule


@torch.no_grad()
def naive_decode(
    q,
    k,
    v,
    state,
    A_log,
    a,
    dt_bias,
    b,
    scale,
    output,
    l2norm,
    state_indices,
    output_state_indices,
    state_v_first,
    snapshots,
):
    """What the kernels do; arguments as in `gated_delta_rule_decode`, none of them optional.

    All states are gathered before any is written. Writes output [B, T, HV, V], the pool and, if
    given, snapshots; the recurrence is that of `naive_recurrent_gated_delta_rule`.
    """
    B, T = q.shape[:2]
    read = torch.arange(B, device=q.device) if state_indices is None else state_indices.long()
    write = read if output_state_indices is None else output_state_indices.long()
    live = read >= 0
    current = state[read.clamp(min=0)]
    for t in range(T):
        token = slice(t, t + 1)
        o, current = naive_recurrent_gated_delta_rule(
            q[:, token],
            k[:, token],
            v[:, token],
            a[:, token],
            b[:, token],
            scale,
            current,
            output_final_state=True,
            use_qk_l2norm_in_kernel=l2norm,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=state_v_first,
            use_gate_in_kernel=True,
            A_log=A_log,
            dt_bias=dt_bias,
        )
        output[:, token] = o.masked_fill(~live.view(B, 1, 1, 1), 0)
        if snapshots is not None:
            snapshots[live, t] = current[live].to(snapshots.dtype)
    written = live & (write >= 0)
    state[write[written]] = current[written].to(state.dtype)
