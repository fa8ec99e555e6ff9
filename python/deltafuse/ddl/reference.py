"""Deep Delta Learning (arXiv 2601.00417) in plain PyTorch: rewrite, read-out, norm, projections.

All compute in float32 (float64 for float64 inputs) and round once; autograd differentiates them.
"""

import contextlib

import torch


def autocast_off(tensor):
    """Within it products keep the dtype of their factors, as they do in the kernels."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def compute_dtype(*tensors):
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def direction(k, k_eps):
    """k / sqrt(|k|^2 + k_eps^2), without overflow or underflow of the square; 0 for 0 / 0."""
    size = k.detach().abs().amax(-1, keepdim=True).clamp(min=k_eps)
    size = torch.where(size == 0, 1, size)
    scaled = k / size
    square = scaled.square().sum(-1, keepdim=True) + (k_eps / size) ** 2
    zero = square == 0
    return torch.where(zero, 0, scaled / torch.where(zero, 1, square).sqrt())


def read_out(x, read):
    """sum_j read_ij x_ij of x [N, d, d_v]; the mean over channels without read."""
    return x.mean(-1) if read is None else (x * read.to(x.dtype)).sum(-1)


def cc_weight(weight, read, causal=False):
    """[d, d_v] of the channel convolution weight [d, K], K = d_v, with the read vector [d_v].

    R_ij = sum_k read_k weight_{i, j - k + P}, P = K - 1 if causal else (K - 1) // 2.
    """
    K = weight.shape[1]
    before = K - 1 if causal else (K - 1) // 2
    taps = torch.nn.functional.pad(weight, (K - 1 - before, before)).unfold(1, K, 1)
    return (taps * read.to(weight.dtype).flip(0)).sum(-1)


def naive_boundary(
    x,
    k,
    v,
    beta,
    beta_erase,
    read,
    norm,
    W_v,
    b_v,
    W_beta,
    b_beta,
    *,
    k_eps=1e-5,
    norm_eps=1e-5,
    v_scale=4.0,
    v_logits=False,
    beta_logits=False,
    normalize_k=True,
    v_from_context=False,
    out_dtype=None,
):
    """One boundary on rows: x [N, d, d_v], k [N, d] or None, v [N, d_v], beta and beta_erase [N].

    Returns y, x_in, c, z_v, z_beta; see csrc/ddl/boundary.h for the equations. The last two are
    None without their weights, and so is y without k.
    """
    dtype = compute_dtype(x, k)
    out_dtype = out_dtype or (x.dtype if k is None else k.dtype)
    y = None
    if k is not None:
        direct = direction(k.to(dtype), k_eps) if normalize_k else k.to(dtype)
        v = v_scale * torch.sigmoid(v) if v_logits else v
        beta = 2 * torch.sigmoid(beta) if beta_logits else beta
        erase = beta if beta_erase is None else beta_erase
        wide = x.to(dtype)
        p = (direct.unsqueeze(-1) * wide).sum(-2)
        u = beta.unsqueeze(-1) * v.to(dtype) - erase.unsqueeze(-1) * p
        y = (wide + direct.unsqueeze(-1) * u.unsqueeze(-2)).to(x.dtype)
    x_in = read_out((x if y is None else y).to(dtype), read)
    c = x_in * (x_in.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    c = c if norm is None else c * norm.to(dtype)
    z_v = _project(c if v_from_context else x_in, W_v, b_v)
    z_beta = _project(c, W_beta, b_beta)
    z_beta = None if z_beta is None else z_beta.squeeze(-1)
    return y, x_in.to(out_dtype), c.to(out_dtype), z_v, z_beta


def _project(x, weight, bias):
    if weight is None:
        return None
    z = x @ weight.to(x.dtype).T
    return z if bias is None else z + bias.to(x.dtype)
