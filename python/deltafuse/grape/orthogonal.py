"""Orthogonal bases from unconstrained parameters, exact by construction."""

import torch

from .. import _checks


def _expect(op, name, tensor, ok, meaning):
    _checks.expect_float(op, name, tensor)
    if not ok:
        _checks.fail(op, f"{name} must be {meaning}, got shape {tuple(tensor.shape)}")


def _wide(t):
    return t if t.dtype == torch.float64 else t.float()


def cayley_basis(A):
    """B = (I + S)^-1 (I - S) with S = (A - A^T) / 2: det B = 1, no eigenvalue -1. Differentiable.

    The Cayley map, for the learned basis of arXiv 2512.07805, Section 2; zeros give I.

    Args:
        A: [..., D, D], any float dtype; only its skew part counts.

    Returns:
        B [..., D, D] in float32, or float64 where A is.

    Raises:
        ValueError: A is not square.
        TypeError: A is not real floating point.
    """
    square = A.dim() >= 2 and A.shape[-1] == A.shape[-2]
    _expect("cayley_basis", "A", A, square, "[..., D, D]")
    S = _wide(A)
    S = (S - S.mT) / 2
    eye = torch.eye(A.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve(eye + S, eye - S)


def householder_basis(V):
    """B = H_1 ... H_m with H_i = I - 2 v_i v_i^T / |v_i|^2. Differentiable.

    m even gives det B = 1; m = D reaches every orthogonal matrix of determinant (-1)^D. Rows of
    zeros give NaN: there is no such reflection.

    Args:
        V: [..., m, D] with m <= D, any float dtype.

    Returns:
        B [..., D, D] in float32, or float64 where V is.

    Raises:
        ValueError: V has another shape.
        TypeError: V is not real floating point.
    """
    _expect(
        "householder_basis",
        "V",
        V,
        V.dim() >= 2 and V.shape[-2] <= V.shape[-1],
        "[..., m, D] with m <= D",
    )
    V = _wide(V)
    V = V / V.norm(dim=-1, keepdim=True)
    # the compact form I - V^T F V: F^-1 is upper triangular, 1/2 on the diagonal and V V^T above
    m, D = V.shape[-2:]
    gram = V @ V.mT
    half = torch.eye(m, dtype=V.dtype, device=V.device) / 2
    factor = gram.triu(1) + half
    inner = torch.linalg.solve_triangular(factor, V, upper=True)
    return torch.eye(D, dtype=V.dtype, device=V.device) - V.mT @ inner
