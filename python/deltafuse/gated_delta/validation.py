"""Checks of the arguments that all forms of the gated delta rule share; none reads device data.

Values are read of cu_seqlens and state_indices alone, where they are on the CPU.
"""

import torch

from .. import _checks

MAX_HEAD = 256  # the kernels' largest K and V


def check_inputs(op, q, k, v, g, beta):
    """q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]; HV a multiple of H."""
    check_qkv(op, q, k, v, g=g, beta=beta)
    heads = v.shape[:3]
    _checks.expect_shape(op, "g", g, heads, "[B, T, HV]")
    _checks.expect_shape(op, "beta", beta, heads, "[B, T, HV]")


def check_qkv(op, q, k, v, **gates):
    """q, k [B, T, H, K] and v [B, T, HV, V] of one dtype; HV a multiple of H.

    The gates, given or None, are floating point and on their device; they may be of other types.
    """
    _checks.expect_floats(op, q=q, k=k, v=v, **gates)
    _checks.expect_dim(op, "q", q, 4, "[B, T, H, K]")
    _checks.expect_dim(op, "v", v, 4, "[B, T, HV, V]")
    _checks.expect_shape(op, "k", k, q.shape, "the shape of q, [B, T, H, K]")
    (B, T, H, K), of_v = q.shape, v.shape
    HV, V = of_v[2:]
    if of_v[:2] != (B, T):
        _checks.fail(op, f"v must have the B and T of q {tuple(q.shape)}, got {tuple(of_v)}")
    if min(H, K, HV, V) < 1 or HV % H != 0:
        _checks.fail(
            op,
            f"v's heads must be a positive multiple of q's, got q {tuple(q.shape)} and "
            f"v {tuple(of_v)}",
        )
    if not q.dtype == k.dtype == v.dtype:
        _checks.expect_same_dtype(op, q=q, k=k, v=v)


def check_gate(op, v, use_gate, A_log, dt_bias):
    """A_log [HV] exactly when the gate is computed in the kernel; dt_bias [HV] is optional."""
    if not use_gate and A_log is None and dt_bias is None:
        return
    HV = v.shape[2]
    if use_gate and A_log is None:
        _checks.fail(op, "use_gate_in_kernel=True needs A_log [HV], got None")
    for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
        if tensor is None:
            continue
        if not use_gate:
            _checks.fail(op, f"{name} is only read with use_gate_in_kernel=True")
        _checks.expect_shape(op, name, tensor, (HV,), "[HV]")
    _checks.expect_floats(op, v=v, A_log=A_log, dt_bias=dt_bias)


def check_sigmoid(op, use_sigmoid, allow_neg_eigval):
    """The kernels' sigmoid_scale: 0 if beta is given, else 1, or 2 with allow_neg_eigval."""
    if allow_neg_eigval and not use_sigmoid:
        _checks.fail(op, "allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    return (2.0 if allow_neg_eigval else 1.0) if use_sigmoid else 0.0


def check_sequences(op, q, cu_seqlens):
    """The number N of sequences: B, or that of cu_seqlens [N + 1] with B = 1."""
    if cu_seqlens is None:
        return q.shape[0]
    _check_indices(op, "cu_seqlens", cu_seqlens, "[N + 1]")
    if cu_seqlens.shape[0] < 1:
        _checks.fail(op, f"cu_seqlens must be [N + 1], got {tuple(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        _checks.fail(
            op, f"cu_seqlens needs packed inputs with B = 1, got q of shape {tuple(q.shape)}"
        )
    _checks.expect_same_device(op, q=q, cu_seqlens=cu_seqlens)
    if _checks.has_values(cu_seqlens):
        _checks.expect_rising(op, cu_seqlens, q.shape[1])
    return cu_seqlens.shape[0] - 1


def check_states(op, q, v, N, initial_state, output_state, state_indices, state_v_first):
    """States [N, HV, K, V] (or V first), or pools [P, ...] whose rows state_indices [N] names."""
    if initial_state is None and output_state is None and state_indices is None:
        return
    HV, V = v.shape[2:]
    K = q.shape[3]
    shape = (HV, V, K) if state_v_first else (HV, K, V)
    meaning = "HV, V, K]" if state_v_first else "HV, K, V]"
    for name, state in (("initial_state", initial_state), ("output_state", output_state)):
        if state is None:
            continue
        _checks.expect_float(op, name, state)
        rows = N
        if state_indices is not None and state.dim() == 4:
            rows = state.shape[0]
        _checks.expect_shape(
            op, name, state, (rows, *shape), ("[N, " if state_indices is None else "[P, ") + meaning
        )
    _checks.expect_same_device(
        op, q=q, initial_state=initial_state, output_state=output_state, state_indices=state_indices
    )
    if state_indices is None:
        return
    _check_indices(op, "state_indices", state_indices, "[N]")
    _checks.expect_shape(op, "state_indices", state_indices, (N,), "[N]")
    if initial_state is None and output_state is None:
        _checks.fail(op, "state_indices needs a pool: initial_state or output_state")
    P = min(len(pool) for pool in (initial_state, output_state) if pool is not None)
    if N and _checks.has_values(state_indices) and state_indices.amax() >= P:
        _checks.fail(op, f"state_indices must be below P = {P}, got {state_indices.tolist()}")


def check_options(op, chunk_size, save_states, precision, auto_cp):
    """The options of the chunk form that are a choice among a few values."""
    for name, value, choices in (
        ("chunk_size", chunk_size, (16, 32, 64)),
        ("save_states", save_states, ("auto", True, False)),
        ("precision", precision, (None, "fast", "high")),
        ("auto_cp", auto_cp, (None, True, False)),
    ):
        if value not in choices:
            _checks.fail(op, f"{name} must be one of {choices}, got {value!r}")


def check_values(op, g, cu_seqlens, T):
    """DELTAFUSE_DEBUG=1 only, because it waits for the device: the values of g and cu_seqlens."""
    if torch.isnan(g).any() or (g == torch.inf).any():
        _checks.fail(op, f"g of shape {tuple(g.shape)} holds NaN or +inf")
    if cu_seqlens is not None:
        _checks.expect_rising(op, cu_seqlens, T)


def _check_indices(op, name, tensor, meaning):
    if tensor.dtype not in (torch.int32, torch.int64):
        _checks.fail(op, f"{name} must be int32 or int64, got {tensor.dtype}")
    _checks.expect_dim(op, name, tensor, 1, meaning)
