"""What surrounds the gated delta rule in its layer, in plain PyTorch: convolution, norms, gate.

All compute in float32 (float64 for float64 inputs) and round once; autograd differentiates them.
"""

import torch
import torch.nn.functional as F

from .reference import compute_dtype, gate


def naive_causal_conv1d(
    x,
    weight,
    bias=None,
    initial_state=None,
    cu_seqlens=None,
    activation="silu",
    output_final_state=False,
):
    """y_t = act(bias + sum_i weight[:, i] x_{t-W+1+i}); arguments as `causal_conv1d`."""
    dtype = compute_dtype(x)
    B, T, D = x.shape
    W = weight.shape[1]
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, T) for b in range(B)]
    if bounds is not None:
        spans = [(0, *span) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    outputs, states = [], []
    for n, (b, begin, end) in enumerate(spans):
        zeros = x.new_zeros(W - 1, D)
        history = zeros if initial_state is None else initial_state[n].T.to(x.dtype)
        inputs = torch.cat([history, x[b, begin:end]])
        wide = inputs.to(dtype)
        windows = wide.unfold(0, W, 1) if end > begin else wide.new_zeros(0, D, W)
        z = torch.einsum("tdw,dw->td", windows, weight.to(dtype))
        z = z if bias is None else z + bias.to(dtype)
        outputs.append((F.silu(z) if activation else z).to(x.dtype))
        states.append(inputs[len(inputs) - (W - 1) :].T)
    if bounds is None:
        y = torch.stack(outputs) if outputs else x.new_zeros(B, T, D)
    else:
        padding = x.new_zeros(T - bounds[-1], D)
        y = torch.cat([*outputs, padding])[None]
    final = torch.stack(states) if states else x.new_zeros(0, D, W - 1)
    return y, final if output_final_state else None


def naive_gated_rms_norm(x, weight, gate=None, eps=1e-5):
    """x / sqrt(mean x^2 + eps) * weight * silu(gate) over the last dimension."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(dtype)
    return (y if gate is None else y * F.silu(gate.to(dtype))).to(x.dtype)


def naive_l2norm(x, eps=1e-6):
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    wide = x.to(compute_dtype(x))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def naive_gdn_gate(a, A_log, dt_bias=None):
    """-exp(A_log) softplus(a + dt_bias) in the compute dtype of a."""
    return gate(a.to(compute_dtype(a)), A_log, dt_bias)
