"""Gated delta rule in plain PyTorch: the recurrence that defines it, and its chunk form.

Gated Delta Networks (arXiv 2412.06464). Per value head, with state S [K, V], decay exp(g_t):
  S~ = exp(g_t) S_{t-1};  u_t = beta_t (v_t - S~^T k_t);  S_t = S~ + k_t u_t^T;
  o_t = scale S_t^T q_t.
Both forms run in float32 (float64 for float64 inputs) and autograd differentiates them. The chunk
form is the backend where no kernel was compiled; the recurrence is what the tests trust.
"""

import torch
import torch.nn.functional as F

MIN_GATE = -88.0  # exp of it is the smallest that float32 tells from 0: -inf resets the state


def compute_dtype(tensor):
    """The dtype of states and arithmetic: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def l2norm(x):
    """x / sqrt(sum x^2 + 1e-6) over the last dimension; the 1e-6 is inside the root."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def gate(a, A_log, dt_bias=None):
    """Log-decay -exp(A_log) softplus(a + dt_bias) for a [..., HV] and A_log, dt_bias [HV]."""
    a = a if dt_bias is None else a + dt_bias.to(a.dtype)
    return -A_log.to(a.dtype).exp() * F.softplus(a)


def clamp_gate(g):
    """g with values below -88 raised to it; their gradient is zero."""
    return g.clamp(min=MIN_GATE)


def preactivate(q, k, g, beta, *, l2norm_qk=False, A_log=None, dt_bias=None, sigmoid_scale=0.0):
    """What the kernels fuse: q, k, g, beta in the compute dtype, ready for the recurrence.

    Args:
        q, k: [..., K]; normalised over K if l2norm_qk.
        g: log-decay [..., HV], or the pre-activation `a` of `gate` if A_log [HV] is given; or None.
        beta: write strength, or its logit if sigmoid_scale (1 or 2) > 0; or None.
    """
    dtype = compute_dtype(q)
    q, k = q.to(dtype), k.to(dtype)
    if l2norm_qk:
        q, k = l2norm(q), l2norm(k)
    if g is not None:
        g = g.to(dtype)
        g = clamp_gate(g if A_log is None else gate(g, A_log, dt_bias))
    if beta is not None:
        beta = beta.to(dtype)
        beta = sigmoid_scale * beta.sigmoid() if sigmoid_scale else beta
    return q, k, g, beta


def naive_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    *,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    gk=None,
    gv=None,
):
    """The gated delta rule token by token: the definition (arXiv 2412.06464, equation 10).

    Arguments as in `chunk_gated_delta_rule`; g and beta may be None (no decay, beta 1), beta may
    be [B, T, HV, V], and gk [B, T, HV, K], gv [B, T, HV, V] are further log-decays a channel.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state (float32, float64 for float64
        inputs) or None.
    """
    preactivated = preactivate(
        q,
        k,
        g,
        v.new_ones(v.shape[:-1]) if beta is None else beta,
        l2norm_qk=use_qk_l2norm_in_kernel,
        A_log=A_log if use_gate_in_kernel else None,
        dt_bias=dt_bias,
        sigmoid_scale=_sigmoid_scale(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )
    channels = (x if x is None else clamp_gate(x.to(compute_dtype(q))) for x in (gk, gv))
    return _by_sequence(
        _recurrent,
        v,
        (*preactivated, *channels),
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
    )


def naive_chunk_gated_delta_rule(
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
    *,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    chunk_size=64,
):
    """The same function in chunks of matrix products (arXiv 2412.06464, section 3.3).

    Arguments as in `chunk_gated_delta_rule`. Everything that does not depend on the state is one
    batched product over all chunks and heads; a loop over chunks carries the state.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state (float32, float64 for float64
        inputs) or None.
    """
    tensors = preactivate(
        q,
        k,
        g,
        beta,
        l2norm_qk=use_qk_l2norm_in_kernel,
        A_log=A_log if use_gate_in_kernel else None,
        dt_bias=dt_bias,
        sigmoid_scale=_sigmoid_scale(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )

    def form(*inputs):
        return _chunk(*inputs, chunk_size)

    return _by_sequence(
        form, v, tensors, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def _sigmoid_scale(use_sigmoid, allow_neg_eigval):
    return (2.0 if allow_neg_eigval else 1.0) if use_sigmoid else 0.0


def _by_sequence(form, v, tensors, scale, state, output_final_state, state_v_first, cu_seqlens):
    """Runs form(q, k, v, ..., state [n, HV, K, V]) on the batch, or on each packed sequence."""
    q, k, *rest = tensors
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    q = q * (K**-0.5 if scale is None else scale)
    tensors = (q, k, v.to(q.dtype), *rest)
    if state is None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        state = q.new_zeros(N, HV, K, V)
    else:
        state = (state.mT if state_v_first else state).to(q.dtype)
    if cu_seqlens is None:
        o, state = form(*tensors, state)
    else:
        bounds = cu_seqlens.tolist()
        outputs, states = [q.new_zeros(B, 0, HV, V)], [state[:0]]
        for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part = (t if t is None else t[:, start:end] for t in tensors)
            o, final = form(*part, state[n : n + 1])
            outputs.append(o)
            states.append(final)
        outputs.append(q.new_zeros(B, T - bounds[-1], HV, V))
        o, state = torch.cat(outputs, 1), torch.cat(states)
    if not output_final_state:
        return o.to(v.dtype), None
    # never the initial state itself, also for T = 0
    state = (state.mT if state_v_first else state).clone(memory_format=torch.contiguous_format)
    return o.to(v.dtype), state


def _recurrent(q, k, v, g, beta, gk, gv, state):
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    G = HV // H
    # a group's value heads read the same key: [B, T, H, G, ...] against [B, T, H, 1, ...]
    q, k = (x.view(B, T, H, 1, K, 1) for x in (q, k))
    v = v.reshape(B, T, H, G, V)
    beta = beta.reshape(B, T, H, G, V if beta.dim() == 4 else 1)
    decays = [
        x.reshape(B, T, H, G, *shape).exp()
        for x, shape in ((g, (1, 1)), (gk, (K, 1)), (gv, (1, V)))
        if x is not None
    ]
    state, outputs = state.reshape(B, H, G, K, V), []
    parts = (x.unbind(1) for x in (q, k, v, beta))
    steps = zip(*(x.unbind(1) for x in decays), strict=True) if decays else [()] * T
    for q_t, k_t, v_t, beta_t, decays_t in zip(*parts, steps, strict=True):
        for decay in decays_t:
            state = state * decay
        u = beta_t * (v_t - (state * k_t).sum(-2))
        state = state + k_t * u.unsqueeze(-2)
        outputs.append((state * q_t).sum(-2))
    o = torch.stack(outputs, 1) if outputs else v
    return o.reshape(B, T, HV, V), state.reshape(B, HV, K, V)


def _chunk(q, k, v, g, beta, state, C):
    """The chunk form: E = T' W with T' = (I + L diag(beta))^-1, no division by beta anywhere.

    G = cumsum(g) in the chunk, Gam_ij = e^(G_i - G_j), L = strictlower(Gam o K K^T),
    W = V - e^G o (K S), U = beta o E, O = e^G o (Q S) + lower(Gam o Q K^T) U,
    S <- e^(G_C) S + K^T (e^(G_C - G) o U).
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if T == 0:
        return v, state
    C = min(C, T)
    G, n = HV // H, -(-T // C)
    # rows after T: k = q = v = 0, beta = 0 and g = 0 leave the state as it is
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, n * C - T)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, 0, 0, n * C - T)) for x in (g, beta))
    q, k = (x.view(B, n, C, H, K).permute(0, 3, 1, 2, 4) for x in (q, k))
    v = v.view(B, n, C, H, G, V).permute(0, 3, 1, 4, 2, 5)
    g, beta = (x.view(B, n, C, H, G).permute(0, 3, 1, 4, 2) for x in (g, beta))

    # [B, H, n, G, C]; float64: float32 has steps of 5e-4 where the sum is 5000
    sums = g.double().cumsum(-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    gaps = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(q.dtype)
    Gam = gaps.masked_fill(~lower, -torch.inf).exp()
    gam = sums.to(q.dtype).exp().unsqueeze(-1)
    rest = (sums[..., -1:] - sums).to(q.dtype).exp().unsqueeze(-1)
    kq = torch.cat((k, q), -2)  # one product with K^T and one with the state
    KK, QK = (kq @ k.mT).unsqueeze(3).chunk(2, -2)
    system = (Gam * KK * beta.unsqueeze(-2)).tril(-1)
    identity = torch.eye(C, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(
        system, identity.expand_as(system), upper=False, unitriangular=True
    )
    beta = beta.unsqueeze(-1)

    # the state's columns are (G, V): one product for all value heads of a key head
    state = state.view(B, H, G, K, V).transpose(2, 3).reshape(B, H, K, G * V)
    total = gam[..., -1, :].squeeze(-1).repeat_interleave(V, -1).unsqueeze(-2)
    updates, inter = [], []
    # unbind: its gradient is one stack, that of indexing in the loop is a full tensor a chunk
    parts = (x.unbind(2) for x in (kq, k.mT, v, beta, inverse, gam, rest, total))
    for kq_i, kT_i, v_i, beta_i, inverse_i, gam_i, rest_i, total_i in zip(*parts, strict=True):
        KS, QS = (kq_i @ state).view(B, H, 2, C, G, V).transpose(3, 4).unbind(2)
        U = beta_i * (inverse_i @ (v_i - gam_i * KS))
        weighted = (rest_i * U).transpose(2, 3).reshape(B, H, C, G * V)
        state = total_i * state + kT_i @ weighted
        updates.append(U)
        inter.append(QS)
    o = gam * torch.stack(inter, 2) + (Gam * QK) @ torch.stack(updates, 2)
    o = o.permute(0, 2, 4, 1, 3, 5).reshape(B, n * C, HV, V)[:, :T]
    return o, state.view(B, H, K, G, V).transpose(2, 3).reshape(B, HV, K, V)
