"""Time mixing of Deep Delta Learning in plain PyTorch: TC read-out, EC expansion, token shift.

Deep Delta Learning (arXiv 2601.00417, App. A.2) leaves open how the state [d, d_v] of a token is
read and how it is made from the embedding; both may look at the K - 1 tokens before it. All
compute in float32 (float64 for float64 inputs) and round once; autograd differentiates them.
"""

import torch


def compute_dtype(tensor):
    """The dtype of arithmetic: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def spans_of(x, cu_seqlens):
    """(row, first token, end) of every sequence of x [B, T, ...]."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    bounds = cu_seqlens.tolist()
    return [(0, *span) for span in zip(bounds[:-1], bounds[1:], strict=True)]


def _joined(outputs, x, cu_seqlens):
    """One [B, T, ...] from an output for each sequence; tokens behind the last one are zero."""
    y = torch.cat(outputs)
    if cu_seqlens is not None:
        y = torch.cat([y, y.new_zeros(x.shape[1] - len(y), *y.shape[1:])])
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _windows(x, K, cu_seqlens, initial_state):
    """Windows [tokens, channels, K] of every sequence, in the compute dtype, and the last inputs.

    x is [B, T, channels], initial_state [N, channels, K - 1]. The current token comes last.
    """
    windows, states = [], []
    for n, (b, begin, end) in enumerate(spans_of(x, cu_seqlens)):
        history = x.new_zeros(K - 1, x.shape[2])
        if initial_state is not None:
            history = initial_state[n].T.to(x.dtype)
        inputs = torch.cat([history, x[b, begin:end]])
        wide = inputs.to(compute_dtype(x))
        empty = wide.new_zeros(0, x.shape[2], K)
        windows.append(wide.unfold(0, K, 1) if end > begin else empty)
        states.append(inputs[end - begin :].T)
    if not windows:  # no sequence: one without tokens keeps the graph
        nothing = x.flatten(0, 1)[:0, :, None].expand(-1, -1, K).to(compute_dtype(x))
        return [nothing], x.new_zeros(0, x.shape[2], K - 1)
    return windows, torch.stack(states)


def naive_compress_tc(x, weight, read, cu_seqlens=None, initial_state=None):
    """y_i = sum_j read_j (causal convolution of channel (i, j) with its taps); arguments as the op.

    Returns:
        y [B, T, d] and the last K - 1 inputs of each sequence.
    """
    dtype, (d, dv) = compute_dtype(x), x.shape[2:]
    windows, final = _windows(x.flatten(2), weight.shape[1], cu_seqlens, initial_state)
    taps = weight.to(dtype).unflatten(0, (d, dv))
    outputs = []
    for window in windows:
        mixed = torch.einsum("tijk,ijk->tij", window.unflatten(1, (d, dv)), taps)
        outputs.append(torch.einsum("tij,j->ti", mixed, read.to(dtype)).to(x.dtype))
    return _joined(outputs, x, cu_seqlens), final


def naive_expand(x, weight, value_channels, cu_seqlens=None, initial_state=None):
    """X_ij = causal convolution of channel i with the taps of (i, j); arguments as the op.

    Returns:
        X [B, T, d, d_v] and the last K - 1 inputs of each sequence.
    """
    dtype, d = compute_dtype(x), x.shape[2]
    windows, final = _windows(x, weight.shape[2], cu_seqlens, initial_state)
    taps = weight.to(dtype).squeeze(1).unflatten(0, (d, value_channels))
    outputs = [torch.einsum("tik,ijk->tij", window, taps).to(x.dtype) for window in windows]
    return _joined(outputs, x, cu_seqlens), final


def naive_token_shift(x, prev_weight, curr_weight, cu_seqlens=None, cache=None):
    """y_t = prev_t x_{t-1} + curr_t x_t; arguments as the op.

    Returns:
        y [B, T, H, D] and the last token of each sequence.
    """
    dtype = compute_dtype(x)
    outputs, states = [], []
    for n, (b, begin, end) in enumerate(spans_of(x, cu_seqlens)):
        before = x.new_zeros(1, *x.shape[2:]) if cache is None else cache[n][None].to(x.dtype)
        inputs = torch.cat([before, x[b, begin:end]])
        wide = inputs.to(dtype)
        previous, current = (w[b, begin:end, :, None].to(dtype) for w in (prev_weight, curr_weight))
        outputs.append((previous * wide[:-1] + current * wide[1:]).to(x.dtype))
        states.append(inputs[-1])
    if not outputs:  # no sequence: one without tokens keeps the graph
        weights = (prev_weight + curr_weight).flatten(0, 1)[:0, :, None]
        nothing = (weights * x.flatten(0, 1)[:0]).to(x.dtype)
        return _joined([nothing], x, cu_seqlens), x.new_zeros(0, *x.shape[2:])
    return _joined(outputs, x, cu_seqlens), torch.stack(states)
