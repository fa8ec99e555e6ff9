"""The chunk form as PyTorch users write it: the baseline of the gated delta benchmarks.

The package's own reference does the same arithmetic and avoids what makes this slow under autograd:
indexing a chunk in the loop, whose gradient is a tensor of full size a chunk.
"""

import importlib.util

import torch


def eager_chunk(q, k, v, g, beta, C=64):
    """o of the gated delta rule; q, k [B, T, H, K], v [B, T, H, V], T a multiple of C."""
    B, T, H, K = q.shape

    def chunks(x):  # [B, T, H, ...] to [B, H, n, C, ...]
        return x.reshape(B, T // C, C, H, *x.shape[3:]).movedim(3, 1)

    q, k, v, g, beta = (chunks(x) for x in (q * K**-0.5, k, v, g, beta))
    G = g.cumsum(-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    decay = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    gam, rest = G.exp().unsqueeze(-1), (G[..., -1:] - G).exp().unsqueeze(-1)
    identity = torch.eye(C, dtype=q.dtype, device=q.device)
    L = (decay * (k @ k.mT)).tril(-1)
    T_ = torch.linalg.solve_triangular(
        identity + L * beta.unsqueeze(-2), identity.expand_as(L), upper=False, unitriangular=True
    )
    P = decay * (q @ k.mT)
    state = q.new_zeros(B, H, K, v.shape[-1])
    outputs = []
    for i in range(T // C):
        E = T_[:, :, i] @ (v[:, :, i] - gam[:, :, i] * (k[:, :, i] @ state))
        U = beta[:, :, i, :, None] * E
        outputs.append(gam[:, :, i] * (q[:, :, i] @ state) + P[:, :, i] @ U)
        state = gam[:, :, i, -1:] * state + k[:, :, i].mT @ (rest[:, :, i] * U)
    return torch.stack(outputs, 2).movedim(1, 3).reshape(B, T, H, -1)


def transformers_chunk():
    """The fallback that Hugging Face transformers runs on a CPU, if the package is installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next.torch_chunk_gated_delta_rule
