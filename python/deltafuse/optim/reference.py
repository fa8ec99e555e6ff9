"""MARS-AdamW in plain PyTorch, one tensor after another: the oracle of the compiled kernels.

Works in float64 for float64 parameters, else in float32, on every device, and is differentiable.
"""

import torch

MIN_AGREEMENT = 1e-3
MAX_STEP = 2.0**24  # float32 counts no further


def variance_reduced(grad, last_grad, gamma, beta1):
    """c = g + s (g - h), s = gamma beta1 / (1 - beta1) (arXiv 2411.10438, eq. 2.5 and 2.6)."""
    s = _double(gamma) * beta1 / (1 - beta1)
    return (1 + s) * grad - s * last_grad


def _double(x):  # a 0-dim float64 tensor takes the other operand's dtype
    return x.double() if isinstance(x, torch.Tensor) else x


def _unscaled(grad, dtype, maximize, grad_scale):
    g = grad.to(dtype)
    if grad_scale is not None:
        g = g * (1.0 / grad_scale.double()).to(dtype)
    return -g if maximize else g


def _norm(c):  # the squares of large float32 numbers overflow
    return c.double().square().sum().sqrt()


def _cautious(u, m, g, caution):
    mask = (m * g > 0).to(u.dtype)
    agreeing = torch.clamp(mask.mean(), min=MIN_AGREEMENT) if caution == "mean" else 1
    return u * mask / agreeing


def _bias_correction(beta, step):
    return -torch.expm1(step.double() * torch.log(torch.tensor(beta, dtype=torch.float64)))


def mars_norm_reference_(
    grads, last_grads, *, gamma, beta1, maximize=False, negate_last_grad=False, grad_scale=None
):
    """||c||_2 of each tensor, float64 [n]."""
    norms = []
    for g, h in zip(grads, last_grads, strict=True):
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        h = -h.to(dtype) if negate_last_grad else h.to(dtype)
        g = _unscaled(g, dtype, maximize, grad_scale)
        norms.append(_norm(variance_reduced(g, h, gamma, beta1)))
    return torch.stack(norms)


def mars_reference_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    last_grads,
    max_exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    gamma,
    clip,
    lr_1d,
    beta1_1d,
    beta2_1d,
    weight_decay_1d,
    caution="off",
    maximize=False,
    update_last_grad=True,
    norm=None,
    grad_scale=None,
    found_inf=None,
):
    """One step in place; arguments as in `deltafuse.optim.functional.mars_`."""
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, p in enumerate(params):
        matrix = i < len(last_grads)
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        g = c = _unscaled(grads[i], dtype, maximize, grad_scale)
        b1, b2 = (beta1, beta2) if matrix else (beta1_1d, beta2_1d)
        rate, decay = (lr, weight_decay) if matrix else (lr_1d, weight_decay_1d)
        if matrix:
            h = last_grads[i].to(dtype)
            h = -h if maximize and not update_last_grad else h
            c = variance_reduced(g, h, gamma, beta1)
            if clip is not None:
                size = _norm(c) if norm is None else norm
                c = c / torch.clamp(size / clip, min=1).to(dtype)
        state_steps[i].copy_(torch.clamp(state_steps[i] + 1, max=MAX_STEP))
        m = b1 * exp_avgs[i] + (1 - b1) * c
        v = w = b2 * exp_avg_sqs[i] + (1 - b2) * c * c
        if max_exp_avg_sqs:
            w = torch.maximum(max_exp_avg_sqs[i], v)
            max_exp_avg_sqs[i].copy_(w)
        bias1, bias2 = (_bias_correction(b, state_steps[i]).to(dtype) for b in (b1, b2))
        u = (m / bias1) / ((w / bias2).sqrt() + eps)
        if matrix and caution != "off":
            u = _cautious(u, m, g, caution)
        old = p.to(dtype)
        p.copy_(old - _double(rate) * (_double(decay) * old + u))
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        if matrix and update_last_grad:
            last_grads[i].copy_(g)
