"""The MARS family in plain PyTorch, one tensor after another: the oracle of the compiled kernels.

Works in float64 for float64 parameters, else in float32, on every device, and is differentiable.
"""

import torch

from . import reference_low_bits as low_bits

MIN_AGREEMENT = 1e-3
MAX_STEP = 2.0**24  # float32 counts no further


def _double(x):  # a 0-dim float64 tensor takes the other operand's dtype
    return x.double() if isinstance(x, torch.Tensor) else x


def _compute_dtype(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _bias_correction(beta, step):
    return -torch.expm1(step.double() * torch.log(torch.tensor(beta, dtype=torch.float64)))


def _read(section, name, i, dtype):
    """Array i of a list, as dtype; 8-bit ones with their factors."""
    array = getattr(section, name)[i]
    if array.dtype == torch.uint8:
        factors = section.absmaxes[i][name]
        array = low_bits.dequantize(array, factors, name in low_bits.SIGNED)
    return array.to(dtype)


def _write(section, name, i, x):
    array = getattr(section, name)[i]
    if array.dtype == torch.uint8:
        low_bits.quantize(x, array, section.absmaxes[i][name], name in low_bits.SIGNED)
    else:
        array.copy_(x)


def _gradient(section, i, dtype, grad_scale):
    g = section.grads[i].to(dtype)
    if grad_scale is not None:
        g = g * (1.0 / grad_scale.double()).to(dtype)
    return -g if section.maximize else g


def _corrected(section, g, h):
    """c = g + s (g - h), s = gamma beta1 / (1 - beta1) (arXiv 2411.10438, eq. 2.5 and 2.6)."""
    s = _double(section.gamma) * section.beta1 / (1 - section.beta1)
    h = -h if section.maximize and not section.update_last_grad else h
    return (1 + s) * g - s * h


def _square(c):  # the squares of large float32 numbers overflow
    return c.double().square().sum()


def squares(sections, grad_scale=None):
    """||c||^2 of the tensors of corrected sections, float64 [n]."""
    found = []
    for section in sections:
        for i, grad in enumerate(section.grads):
            dtype = _compute_dtype(grad)
            g = _gradient(section, i, dtype, grad_scale)
            found.append(_square(_corrected(section, g, _read(section, "last_grads", i, dtype))))
    return torch.stack(found)


def _second_moment(section, i, c, key):
    """v, or with amsgrad the largest so far; updates both."""
    v = section.exp_avg_sqs[i]
    largest = new = (
        section.beta2 * _read(section, "exp_avg_sqs", i, c.dtype) + (1 - section.beta2) * c * c
    )
    if section.amsgrad:
        largest = torch.maximum(_read(section, "max_exp_avg_sqs", i, c.dtype), new)
        _write(section, "max_exp_avg_sqs", i, largest)
    if v.dtype == torch.bfloat16:
        low_bits.store_stochastic(new, v, *key, low_bits.SECOND_MOMENT)
    else:
        _write(section, "exp_avg_sqs", i, new)
    return largest


def _adam(section, i, c, d, key):
    bias1, bias2 = (
        _bias_correction(b, section.state_steps[i]).to(c.dtype)
        for b in (section.beta1, section.beta2)
    )
    v = _second_moment(section, i, c, key)
    return (d / bias1) / ((v / bias2).sqrt() + section.eps)


def _cautious(section, u, d, g):
    mask = d * g > 0
    if section.caution == "mean":
        u = u / torch.clamp(mask.to(u.dtype).mean(), min=MIN_AGREEMENT)
    return torch.where(mask, u, 0)


def _direction(section, i, g, norm, key):
    """u of tensor i; updates its state."""
    c = g
    if section.corrected:
        c = _corrected(section, g, _read(section, "last_grads", i, g.dtype))
        c = _clipped(section, c, norm)
    elif section.stateless:
        c = (1 - section.gamma) * g
    m = section.beta1 * _read(section, "exp_avgs", i, g.dtype) + (1 - section.beta1) * c
    _write(section, "exp_avgs", i, m)
    u = d = m + section.gamma * g if section.stateless else m
    if section.rule == "adamw":
        u = _adam(section, i, c, d, key)
    elif section.rule == "lion":
        u = torch.where(d.isnan(), d, d.sign())
    if section.corrected and section.update_last_grad:
        _write(section, "last_grads", i, g)
    return u if section.caution == "off" else _cautious(section, u, d, g)


def _clipped(section, c, norm):
    if section.clip is None:
        return c
    size = _square(c).sqrt() if norm is None else norm
    return c / torch.clamp(size / section.clip, min=1).to(c.dtype)


def _read_parameter(section, i, dtype):
    p = section.params[i]
    if section.master == "split16":
        return low_bits.join(p, section.masters[i])
    return (p if section.master is None else section.masters[i]).to(dtype)


def _write_parameter(section, i, x, key):
    p = section.params[i]
    if section.master == "split16":
        high, low = low_bits.split(x)
        p.copy_(high)
        section.masters[i].copy_(low)
    elif section.stochastic:
        low_bits.store_stochastic(x, p, *key, low_bits.PARAMETER)
    else:
        if section.master == "fp32":
            section.masters[i].copy_(x)
        p.copy_(x)


def _step(section, i, norm, grad_scale, seed, number):
    dtype = _compute_dtype(section.params[i])
    u = g = _gradient(section, i, dtype, grad_scale)
    step = section.state_steps[i] if section.state_steps else 0
    if section.rule != "given":
        step.copy_(torch.clamp(step + 1, max=MAX_STEP))
        u = _direction(section, i, g, norm, (seed, step, number))
    if section.rule == "momentum":
        section.params[i].copy_(u)
        return
    old = _read_parameter(section, i, dtype)
    new = old - _double(section.lr) * (_double(section.weight_decay) * old + section.factor * u)
    _write_parameter(section, i, new, (seed, step, number))


def run(sections, norms=None, grad_scale=None, found_inf=None, seed=0):
    """One step of all sections in place; as the operator `mars_`."""
    if found_inf is not None and found_inf.item() != 0:
        return
    number = 0
    for section in sections:
        for i in range(len(section.params)):
            norm = None if norms is None else norms[number]
            _step(section, i, norm, grad_scale, seed, number)
            number += 1
