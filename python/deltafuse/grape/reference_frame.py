"""Rotations in learned planes in plain PyTorch (arXiv 2512.07805, Section 2 and Appendix D).

With a frame W [D, 2r] of orthonormal columns and angles theta [r], in heads of their own:
    y = x + W (Rc(t theta) - I) W^T x,  Rc(f) = [[cos f, sin f], [-sin f, cos f]] a plane.
"""

import torch

F64 = torch.float64


def compute_dtype(x):
    return F64 if x.dtype == F64 else torch.float32


def _two_product(a, b):
    """What rounding a b to float64 loses, exactly (Dekker's product with Veltkamp's split)."""

    def split(v):
        big = v * 134217729.0  # 2^27 + 1
        high = big - (big - v)
        return high, v - high

    (a1, a2), (b1, b2), product = split(a), split(b), a * b
    lost = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    return torch.where(lost.isfinite(), lost, 0)


def half_angles(t, theta):
    """sin and cos of t theta / 2 in float64; t [B, T], theta [H, r], result [B, T, H, r]."""
    t, theta = t.to(F64)[..., None, None], theta.to(F64)
    high, low = t * theta / 2, _two_product(t.detach(), theta.detach()) / 2
    sin, cos = high.sin(), high.cos()
    return sin + cos * low, cos - sin * low


def coordinates(x, W):
    """W^T x as planes [B, T, H, r, 2]; without W the planes are neighbouring channels."""
    if W is not None:
        x = torch.einsum("bthd,hdk->bthk", x, W.to(x.dtype))
    return x.unflatten(-1, (-1, 2))


def naive_frame_rotate(x, W, theta, t):
    """x [B, T, H, D], W [H, D, 2r] or None (D = 2r, W = I), theta [H, r], t [B, T].

    Computed in float32 (angles and float64 inputs in float64), rounded once.
    """
    wide = x.to(compute_dtype(x))
    s, c = half_angles(t, theta)
    turn, less_one = ((2 * s * c).to(wide.dtype), (-2 * s * s).to(wide.dtype))
    c0, c1 = coordinates(wide, W).unbind(-1)
    delta = torch.stack((c0 * less_one + c1 * turn, c1 * less_one - c0 * turn), -1).flatten(-2)
    if W is not None:
        delta = torch.einsum("bthk,hdk->bthd", delta, W.to(wide.dtype))
    return (wide + delta).to(x.dtype)


def _integral(omega, t):
    """int_0^t exp(-i s omega) ds, which is I(omega, t) of a plane as a complex number."""
    half = t * omega / 2
    ratio = torch.sinc(half / torch.pi)
    return torch.complex(t * ratio * half.cos(), -t * ratio * half.sin())


def naive_frame_bwd(dy, x, W, theta, t, generator):
    """Gradients of naive_frame_rotate for any W.

    Returns:
        dx; dt of each head [B, T, H]; dW, transposed [H, 2r, D]; K; dtheta [H, r]. With
        `generator`, dW is P^T and dtheta zero, where the gradient of the generator's planes goes
        through N = P + W K, K [H, 2r, 2r] (otherwise K is zero); see `plane_gradients`.
    """
    dtype = compute_dtype(x)
    wide, g = x.to(dtype), dy.to(dtype)
    s, c = half_angles(t, theta)
    phase = torch.complex(1 - 2 * s * s, -2 * s * c)  # a plane's Rc, on v0 + i v1
    point = torch.view_as_complex(coordinates(wide, W).to(F64).contiguous())
    slope = torch.view_as_complex(coordinates(g, W).to(F64).contiguous())
    back = phase.conj() * slope
    rate = (back.real * point.imag - back.imag * point.real).to(dtype)
    dx = naive_frame_rotate(g, W, theta, -t).to(x.dtype)
    dt = (rate * theta.to(dtype)).sum(-1)
    dtheta = (rate * t.to(dtype)[..., None, None]).sum((0, 1))
    H, r = theta.shape
    K = point.new_zeros(H, 2 * r, 2 * r, dtype=dtype)
    if W is None:
        return dx, dt, None, K, dtheta
    if generator:
        integral = _integral(theta.to(F64), t.to(F64)[..., None, None])
        left, right = integral * point, -integral * back
        K = (_inside(point, back, theta, t) - _outside(slope, left) - _outside(point, right)).to(
            dtype
        )
        dtheta = torch.zeros_like(dtheta)
    else:
        left, right = phase * point - point, back - slope
    left, right = (torch.view_as_real(v).flatten(-2).to(dtype) for v in (left, right))
    dW = torch.einsum("bthk,bthd->hkd", left, g) + torch.einsum("bthk,bthd->hkd", right, wide)
    return dx, dt, dW, K, dtheta


def _outside(u, v):
    """sum over tokens of u v^T as [H, 2r, 2r]."""
    u, v = (torch.view_as_real(w).flatten(-2) for w in (u, v))
    return torch.einsum("bthj,bthk->hjk", u, v)


def _inside(point, back, theta, t):
    """M2: the 2 x 2 blocks of planes j and k, as their complex-linear and antilinear parts."""
    H, r = theta.shape
    cj, bj = point.unsqueeze(-1), back.unsqueeze(-1)
    ck, bk = point.unsqueeze(-2), back.unsqueeze(-2)
    t, theta = t.to(F64)[..., None, None, None], theta.to(F64)
    less = theta.unsqueeze(-1) - theta.unsqueeze(-2)
    more = theta.unsqueeze(-1) + theta.unsqueeze(-2)
    linear = (_integral(less, t) * (bj * ck.conj() - cj * bk.conj())).sum((0, 1)) / 2
    other = (_integral(more, t) * (bj * ck - cj * bk)).sum((0, 1)) / 2
    top = torch.stack((linear.real + other.real, other.imag - linear.imag), -1)
    bottom = torch.stack((linear.imag + other.imag, linear.real - other.real), -1)
    return torch.stack((top, bottom), -2).transpose(2, 3).reshape(H, 2 * r, 2 * r)


def plane_gradients(a, b, omega, W, P_t, K):
    """Gradients of a, b [H, r, D] and omega [H, r] in float64, from P^T [H, 2r, D] and K.

    N = P + W K; abar = omega N W^T b, bbar = -omega N W^T a, omegabar = a . N W^T b a plane.
    """
    ab, omega, W = torch.cat((a, b), 1).to(F64), omega[..., None].to(F64), W.to(F64)
    N_t = torch.baddbmm(P_t.to(F64), K.to(F64).mT, W.mT)
    along_a, along_b = torch.bmm(torch.bmm(ab, W), N_t).chunk(2, 1)
    domega = (ab.narrow(1, 0, a.shape[1]) * along_b).sum(-1)
    return omega * along_b, -omega * along_a, domega


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, omega, t, W, theta):
        ctx.save_for_backward(x, a, b, omega, t, W, theta)
        return naive_frame_rotate(x, W, theta, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, a, b, omega, t, W, theta = ctx.saved_tensors
        dx, dt, P_t, K, _ = naive_frame_bwd(dy, x, W, theta, t, generator=True)
        grads = plane_gradients(a, b, omega, W, P_t, K)
        da, db, domega = (g.to(v.dtype) for g, v in zip(grads, (a, b, omega), strict=True))
        return dx, da, db, domega, dt.sum(-1).to(t.dtype), None, None


def naive_mixture_rotate(x, a, b, omega, t, W, theta):
    """exp(t L) x, L = sum_k omega_k (a_k b_k^T - b_k a_k^T), with its frame (W, theta)."""
    return _Mixture.apply(x, a, b, omega, t, W, theta)


def naive_tridiagonal(L):
    """e [H, n - 1] and Q [H, n, n], L = Q A Q^T, A_{i,i+1} = e_i = -A_{i+1,i}; L [H, n, n] skew."""
    n = L.shape[-1]
    A = L.clone()
    Q = torch.eye(n, dtype=L.dtype, device=L.device).expand_as(L).clone()
    for k in range(n - 2):
        v = A[:, k + 1 :, k].clone()
        size = v.abs().amax(-1, keepdim=True)
        v = v / torch.where(size == 0, 1, size)
        norm = v.norm(dim=-1)
        v[:, 0] += torch.where(v[:, 0] < 0, -norm, norm)
        square = v.square().sum(-1)
        v = (v * torch.where(square == 0, 0, 2 / square).sqrt()[:, None])[..., None]
        rest = A[:, k + 1 :]
        rest -= v @ (v.mT @ rest)
        rest = A[:, :, k + 1 :]
        rest -= (rest @ v) @ v.mT
        rest = Q[:, :, k + 1 :]
        rest -= (rest @ v) @ v.mT
    return A.diagonal(1, -2, -1).clone(), Q


def frame_of(a, b, omega, tridiagonal):
    """W [H, D, 2r] and theta [H, r] >= 0 of float64 planes; `tridiagonal` as naive_tridiagonal.

    Householder QR of the planes' vectors, then the real Schur form of what L is in their span: the
    even and odd halves of a skew tridiagonal matrix are a bidiagonal one and its transpose, whose
    singular vectors are orthogonal whatever theta repeats or vanishes.
    """
    E, R = torch.linalg.qr(torch.cat((a, b), 1).mT)
    r = omega.shape[-1]
    half = (R[..., :r] * omega[:, None]) @ R[..., r:].mT
    e, Q = tridiagonal(half - half.mT)
    B = torch.diag_embed(e[:, ::2]) - torch.diag_embed(e[:, 1::2], -1)
    left, theta, right_t = torch.linalg.svd(B)
    W = torch.stack((Q[..., ::2] @ left, Q[..., 1::2] @ right_t.mT), -1).flatten(-2)
    return E @ W, theta
