"""Decode with the gated delta rule: a few tokens a row, states updated in place in a pool."""

import torch

from .. import _checks, _library
from .reference_decode import naive_decode

OP = "gated_delta_rule_decode"
MAX_TOKENS = 8
MAX_CUDA_K = 256
MAX_CUDA_HEADS = 65535  # dimensions of a grid

_library.register("gated_delta_decode", lambda *args: None)


def gated_delta_rule_decode(
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
    *,
    state_indices=None,
    output_state_indices=None,
    state_v_first=True,
    snapshots=None,
):
    """One to eight tokens of the gated delta rule (arXiv 2412.06464, equation 10), in place.

    For each row, token and value head, with S the row's state seen as [V, K]:
      g = -exp(A_log) softplus(a + dt_bias), at least -88;  u = sigmoid(b) (v - e^g S k^)
      S <- e^g S + u k^T;  o = S q^        with k^ = k / |k| and q^ = scale q / |q|
    Kernels compute in float32 and keep S there between the tokens; nothing is differentiated. The
    host looks at no value on a device, so the call can be captured in a CUDA graph. On CUDA,
    float64 and K > 256 run the PyTorch reference.

    Args:
        q, k: [B, T, H, K] with T in 1..8, any strides.
        v: [B, T, HV, V], HV a multiple of H, dtype of q (float64 only with a float64 state).
        state: pool [P, HV, V, K] of any float dtype, [P, HV, K, V] unless state_v_first; any
            stride from slot to slot, each slot contiguous. Updated in place.
        A_log: [HV], any float dtype.
        a, b: [B, T, HV], any float dtype: raw logits of the gate and of beta.
        dt_bias: [HV] or None.
        scale: of q; K^-0.5 by default.
        output: [B, T, HV, V] in the dtype of q with a unit last stride, or None: a new tensor.
        use_qk_l2norm: divide q and k by sqrt(sum x^2 + 1e-6).
        state_indices: [B] int32 or int64, the slot each row starts from; default: row b uses slot
            b. A negative index marks a padding row: its output is 0, nothing else is written.
        output_state_indices: [B], the slot each row's last state goes to (negative: nowhere);
            default: state_indices. Written slots must differ from each other and from the slots
            that other rows read; read slots may repeat.
        snapshots: [B, T, ...] like the slots, dtype of state, contiguous: receives the state after
            each token, for verifying drafts of which only some tokens are accepted.

    Returns:
        o [B, T, HV, V] in the dtype of q.

    Raises:
        ValueError, TypeError: for shapes, dtypes, layouts or devices other than these; on the CPU
            also for an index beyond the pool.
    """
    if not _fits(q, k, v, state, A_log, a, dt_bias, b, state_v_first):
        _check(q, k, v, state, A_log, a, dt_bias, b)
        _check_state(q, v, state, state_v_first)
    if state_indices is not None or output_state_indices is not None or state.shape[0] < q.shape[0]:
        _check_indices(q, state, state_indices, output_state_indices)
    if output is None:
        dense = v.is_contiguous()  # asking for a format costs more than the tensor
        output = torch.empty_like(v) if dense else v.new_empty(v.shape)
    else:
        _check_written("output", output, v.shape, "[B, T, HV, V]", q)
    if snapshots is not None:
        shape = (*q.shape[:2], *state.shape[1:])
        _check_written("snapshots", snapshots, shape, "[B, T, HV, ...]", state)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    kernel = _library.kernel("gated_delta_decode", q)
    if _library.runs_cuda(q) and max(q.shape[2], v.shape[2] // q.shape[2]) > MAX_CUDA_HEADS:
        _checks.fail(
            OP,
            f"H and HV / H must be at most {MAX_CUDA_HEADS} on CUDA, got q {tuple(q.shape)} and "
            f"v {tuple(v.shape)}",
        )
    if q.is_cuda and (q.shape[3] > MAX_CUDA_K or q.dtype == torch.float64):
        kernel = None
    (kernel or naive_decode)(
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
        use_qk_l2norm,
        state_indices,
        output_state_indices,
        state_v_first,
        snapshots,
    )
    return output


def _fits(q, k, v, state, A_log, a, dt_bias, b, state_v_first):
    """What `_check` and `_check_state` look for, in half of their time; False where it may not be.

    A step of decoding is the shortest call of all: 3 us count.
    """
    shape, of_v, dtype, device = q.shape, v.shape, q.dtype, q.device
    if len(shape) != 4 or len(of_v) != 4:
        return False
    (B, T, H, K), (HV, V), floats = shape, of_v[2:], _checks.FLOATS
    tokens, heads = (B, T, HV), (HV,)
    slot = (HV, V, K) if state_v_first else (HV, K, V)
    return (
        1 <= T <= MAX_TOKENS
        and min(H, K, HV, V) >= 1
        and HV % H == 0
        and k.shape == shape
        and of_v == (B, T, HV, V)
        and a.shape == b.shape == tokens
        and A_log.shape == heads
        and state.shape[1:] == slot
        and state.is_contiguous()
        and k.dtype == v.dtype == dtype
        and dtype in floats
        and a.dtype in floats
        and b.dtype in floats
        and A_log.dtype in floats
        and state.dtype in floats
        and (dtype == torch.float64) == (state.dtype == torch.float64)
        and device == k.device == v.device == a.device == b.device == A_log.device == state.device
        and (
            dt_bias is None
            or (dt_bias.shape == heads and dt_bias.dtype in floats and dt_bias.device == device)
        )
    )


def _check(q, k, v, state, A_log, a, dt_bias, b):
    _checks.expect_dim(OP, "q", q, 4, "[B, T, H, K]")
    _checks.expect_dim(OP, "v", v, 4, "[B, T, HV, V]")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if min(H, K, HV, V) < 1 or HV % H:
        _checks.fail(
            OP,
            f"v's heads must be a positive multiple of q's H, got q {tuple(q.shape)} and "
            f"v {tuple(v.shape)}",
        )
    if not 1 <= T <= MAX_TOKENS:
        _checks.fail(OP, f"T must be in 1..{MAX_TOKENS}, got q of shape {tuple(q.shape)}")
    _checks.expect_floats(OP, q=q, k=k, v=v, a=a, b=b, A_log=A_log, dt_bias=dt_bias, state=state)
    for name, tensor, shape, meaning in (
        ("k", k, q.shape, "the shape of q, [B, T, H, K]"),
        ("v", v, (B, T, HV, V), "[B, T, HV, V]"),
        ("a", a, (B, T, HV), "[B, T, HV]"),
        ("b", b, (B, T, HV), "[B, T, HV]"),
        ("A_log", A_log, (HV,), "[HV]"),
        ("dt_bias", dt_bias, (HV,), "[HV]"),
    ):
        if tensor is not None and tensor.shape != shape:
            _checks.expect_shape(OP, name, tensor, shape, meaning)
    if not q.dtype == k.dtype == v.dtype:
        _checks.expect_same_dtype(OP, q=q, k=k, v=v)


def _check_state(q, v, state, state_v_first):
    """The shape of a slot: [HV, V, K] or [HV, K, V], contiguous in a pool of any slot stride."""
    K, (HV, V) = q.shape[3], v.shape[2:]
    meaning = "[P, HV, V, K]" if state_v_first else "[P, HV, K, V]"
    _checks.expect_dim(OP, "state", state, 4, meaning)
    slot = (HV, V, K) if state_v_first else (HV, K, V)
    P, strides = state.shape[0], state.stride()
    _checks.expect_shape(OP, "state", state, (P, *slot), meaning)
    apart, dense = strides[0], (slot[1] * slot[2], slot[2], 1)
    # the stride of a dimension of size one means nothing
    if strides[1:] != dense and not all(
        size == 1 or stride == expected
        for size, stride, expected in zip(slot, strides[1:], dense, strict=True)
    ):
        _checks.fail(
            OP,
            f"each slot of state {tuple(state.shape)} must be contiguous, got strides {strides}",
        )
    if P > 1 and apart < HV * K * V:
        _checks.fail(OP, f"the slots of state overlap, got strides {strides}")
    if (q.dtype == torch.float64) != (state.dtype == torch.float64):
        _checks.fail(OP, f"float64 q and state go together, got {q.dtype} and {state.dtype}")


def _check_indices(q, state, state_indices, output_state_indices):
    if state_indices is None and state.shape[0] < q.shape[0]:
        _checks.fail(
            OP, f"state must have a slot a row of q {tuple(q.shape)}, got {state.shape[0]}"
        )
    for name, tensor in (
        ("state_indices", state_indices),
        ("output_state_indices", output_state_indices),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{OP}: {name} must be int32 or int64, got {tensor.dtype}")
        _checks.expect_shape(OP, name, tensor, q.shape[:1], "[B]")
        _checks.expect_same_device(OP, q=q, **{name: tensor})
        _check_slots(name, tensor, state.shape[0])


def _check_slots(name, slots, P):  # a GPU takes an index beyond the pool for padding
    visible = _checks.has_values(slots) and not _library.runs_cuda(slots)
    if visible and any(slot >= P for slot in slots.tolist()):
        _checks.fail(OP, f"{name} must be below P = {P}, got {slots.tolist()}")


def _check_written(name, tensor, shape, meaning, like):
    _checks.expect_shape(OP, name, tensor, shape, meaning)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{OP}: {name} must be {like.dtype}, got {tensor.dtype}")
    _checks.expect_same_device(OP, q=like, **{name: tensor})
    if name == "output":
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            _checks.fail(OP, f"output must have a unit last stride, got {tensor.stride()}")
    elif not tensor.is_contiguous():
        _checks.fail(OP, f"{name} must be contiguous, got strides {tensor.stride()}")
