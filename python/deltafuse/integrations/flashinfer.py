"""The gated delta rule with the arguments of flashinfer's prefill function."""

import torch

from .. import _checks, gated_delta

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

    Returns:
        o [total, HO, V]; with output_final_state the pair of it and the states [N, HO, V, K]
        (float32; float64 for float64 inputs, or output_state).

    Raises:
        ValueError: shapes that do not fit together, or cu_seqlens=None.
    """
    if cu_seqlens is None:
        _checks.fail(OP, "cu_seqlens [N + 1] is required")
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
