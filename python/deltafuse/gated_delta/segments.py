"""Exact split of a sequence into segments that run side by side (a chain becomes a batch).

A segment maps the state S entering it to M S + H: H is its final state from S = 0, and M its final
state from the K x K identity with v = 0, because the columns of S do not mix. Three passes: H and M
of every segment, a scan S <- M S + H over the segments of each sequence, and the op itself with the
scanned states. Nothing is approximated, and gradients follow by autograd through the passes.
"""

import torch

from .reference import compute_dtype

SEGMENTS = 8  # at most, for a sequence
GRID = 64  # cuts depend on the sequence's own length only, so results do not depend on the batch


def bounds_of(B, T, cu_seqlens, cu_seqlens_cpu):
    """Offsets [N + 1] of the sequences in the flattened tokens, as integers on the host."""
    if cu_seqlens is None:
        return list(range(0, B * T + 1, T)) if T else [0] * (B + 1)
    return (cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()


def cut(bounds):
    """Segment offsets, and how many segments each sequence has (one if it is empty)."""
    offsets, counts = [bounds[0]], []
    for start, end in zip(bounds, bounds[1:], strict=False):
        length = GRID * max(1, -(-(end - start) // (GRID * SEGMENTS)))
        ends = [*range(start + length, end, length), end]
        offsets += ends
        counts.append(len(ends))
    return offsets, counts


def compose(M, state, H):
    """M state + H in their own precision, which autocast would lower."""
    with torch.autocast(M.device.type, enabled=False):
        return M @ state + H


def transition(run, call, N):
    """M [N, HV, K, K] of the call's N sequences; call is the named tuple of `ops`."""
    K, HV = call.q.shape[3], call.v.shape[2]
    eye = torch.eye(K, dtype=compute_dtype(call.q), device=call.q.device).expand(N, HV, K, K)
    zero = call.v.new_zeros(K).expand(*call.v.shape[:3], K)
    return run(call._replace(v=zero, initial_state=eye), True)[1]


def scan(initial, M, H, counts):
    """The state that enters each segment: initial [N, ...], M and H a segment, all [HV, ...]."""
    entering, segment = [], 0
    for state, count in zip(initial.unbind(0), counts, strict=True):
        for last in [False] * (count - 1) + [True]:
            entering.append(state)
            if not last:
                state = compose(M[segment], state, H[segment])
            segment += 1
    return torch.stack(entering) if entering else initial


def run_split(run, call, output_final_state, cu_seqlens_cpu=None):
    """run(call, output_final_state) in segments; call is the named tuple of `ops`."""
    B, T, HV, V = call.v.shape
    K = call.q.shape[-1]
    bounds = bounds_of(B, T, call.cu_seqlens, cu_seqlens_cpu)
    offsets, counts = cut(bounds)
    if len(offsets) == len(bounds):  # every sequence is one segment
        return run(call, output_final_state)
    q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in call[:5])
    cu = torch.tensor(offsets, dtype=torch.int64, device=q.device)
    packed = call._replace(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=None,
        cu_seqlens=cu,
        state_v_first=False,
    )
    H = run(packed, True)[1]
    M = transition(run, packed, len(offsets) - 1)
    initial = H.new_zeros(len(counts), HV, K, V)
    if call.initial_state is not None:
        initial = call.initial_state.mT if call.state_v_first else call.initial_state
    o, final = run(packed._replace(initial_state=scan(initial, M, H, counts)), output_final_state)
    if output_final_state:
        last = torch.tensor(counts, device=q.device).cumsum(0) - 1
        final = final[last]
        final = final.mT.contiguous() if call.state_v_first else final
    return o.view(B, T, HV, V), final
