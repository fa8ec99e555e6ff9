"""The step of csrc/mars/mars.h in float64, on tensors as they are stored, and calls of mars_."""

from dataclasses import astuple, dataclass

import numpy as np
import torch

from deltafuse import _library

RULES = ("adamw", "lion", "sgd", "momentum", "given")
CAUTION = ("off", "elementwise", "mean")
MASTER = ("none", "fp32", "split16")
# flags of csrc/mars/mars_host.h, in the order of their bits
FLAGS = ("corrected", "stateless", "write_h", "maximize", "stochastic", "amsgrad")


@dataclass
class Numbers:
    lr: float = 3e-3
    weight_decay: float = 0.1
    gamma: float = 0.025
    beta1: float = 0.95
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0
    factor: float = 1.0


@dataclass
class Section:
    params: list
    rule: str = "adamw"
    caution: str = "off"
    master: str = "none"
    flags: tuple = ("corrected", "write_h")
    numbers: Numbers = None

    def __post_init__(self):
        self.numbers = self.numbers or Numbers()

    def __contains__(self, flag):
        return flag in self.flags

    def ints(self):
        flags = sum(1 << FLAGS.index(flag) for flag in self.flags)
        kinds = RULES.index(self.rule), CAUTION.index(self.caution), MASTER.index(self.master)
        return [len(self.params), *kinds, flags]


def levels(signed):
    """What the 256 codes stand for."""
    k = torch.arange(1, 128 if signed else 256, dtype=torch.float64)
    e = torch.floor(torch.log2(k))
    x = 10 ** (e + 1 - (7 if signed else 8)) * (0.1 + 0.9 * (k + 1 - 2**e) / 2**e)
    x = torch.cat([torch.zeros(1, dtype=torch.float64), x])
    return torch.cat([x, -x]) if signed else x


class Codes:
    """An 8-bit array: codes and a factor for each 256 of them."""

    def __init__(self, x, signed):
        self.signed, n = signed, x.numel()
        blocks = torch.nn.functional.pad(x.double().flatten(), (0, -n % 256)).view(-1, 256)
        self.absmax = blocks.abs().amax(1).float()
        unit = blocks / self.absmax.double()[:, None].clamp_min(1e-300)
        code = (unit[..., None] - levels(signed)).abs().argmin(-1)
        self.codes = code.to(torch.uint8).flatten()[:n].view(x.shape).contiguous()

    def double(self):
        factors = self.absmax.double().repeat_interleave(256)[: self.codes.numel()]
        return levels(self.signed)[self.codes.long()] * factors.view(self.codes.shape)


def join(high, low):
    """float32 of split16's halves."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def call(sections, schedule=None, norms=None, grad_scale=None, found_inf=None, seed=0):
    """mars_ of the library in use; a parameter is a dict of p, g, m, v, vmax, h, master, step."""
    params = [param for section in sections for param in section.params]
    absmaxes = [
        param[name].absmax
        for param in params
        for name in ("m", "v", "vmax", "h")
        if isinstance(param.get(name), Codes)
    ]

    def tensors(name):
        found = (param[name] for param in params if name in param)
        return [x.codes if isinstance(x, Codes) else x for x in found]

    lists = [tensors(name) for name in ("p", "g", "m", "v", "vmax", "h", "master")]
    ints = [i for section in sections for i in section.ints()]
    constants = [float(x) for section in sections for x in astuple(section.numbers)]
    options = schedule, norms, grad_scale, found_inf, seed
    op = getattr(torch.ops, _library._current).mars_
    op(*lists, absmaxes, tensors("step"), ints, constants, *options)


def squares(sections, schedule=None, grad_scale=None):
    params = [param for section in sections for param in section.params]
    h = [param["h"] for param in params]
    ints = [i for section in sections for i in section.ints()]
    constants = [float(x) for section in sections for x in astuple(section.numbers)]
    op = getattr(torch.ops, _library._current).mars_squares
    absmaxes = [x.absmax for x in h if isinstance(x, Codes)]
    h = [x.codes if isinstance(x, Codes) else x for x in h]
    return op([x["g"] for x in params], h, absmaxes, ints, constants, schedule, grad_scale)


def correction(section, param, grad_scale=1.0):
    """g in its sign and scale, and c before the clip."""
    x = section.numbers
    s = x.gamma * x.beta1 / (1 - x.beta1)
    g = param["g"].double() * (-1 if "maximize" in section else 1) / grad_scale
    if "corrected" in section:
        sign = -1 if "maximize" in section and "write_h" not in section else 1
        return g, (1 + s) * g - s * sign * param["h"].double()
    return g, g * (1 - x.gamma if "stateless" in section else 1)


def caution_mask(section, d, g):
    mask = (d * g > 0).double()
    if section.caution == "mean":
        mask = mask / max(mask.mean().item() if mask.numel() else 0, 1e-3)
    return mask


def expected(section, param, norm=None, grad_scale=1.0):
    """What the step makes of p, m, v, vmax, h and step, in float64."""
    x, y = section.numbers, {}
    g, c = correction(section, param, grad_scale)
    if "step" in param:
        y["step"] = param["step"].double() + (section.rule != "given")
    if "corrected" in section and x.clip != float("inf"):
        c = c / max(1.0, (c.norm().item() if norm is None else norm) / x.clip)
    p = value(section, param)
    size, u = x.lr * x.factor, g
    if section.rule != "given":
        y["m"] = x.beta1 * param["m"].double() + (1 - x.beta1) * c
        d = u = y["m"] + (x.gamma * g if "stateless" in section else 0)
    if section.rule == "adamw":
        w = y["v"] = x.beta2 * param["v"].double() + (1 - x.beta2) * c * c
        if "vmax" in param:
            w = y["vmax"] = torch.maximum(param["vmax"].double(), w)
        step = y["step"].item()
        size /= 1 - x.beta1**step
        u = u / ((w / (1 - x.beta2**step)).sqrt() + x.eps)
    if section.rule == "lion":
        u = u.sign()
    if section.caution != "off":
        u = u * caution_mask(section, d, g)
    if "h" in param:
        y["h"] = g if "write_h" in section else param["h"].double()
    y["p"] = u if section.rule == "momentum" else p - (x.lr * x.weight_decay * p + size * u)
    return y


def value(section, param):
    """The parameter, exactly: that of its master if it has one."""
    if section.master == "split16":
        return join(param["p"], param["master"]).double()
    return param["master" if section.master == "fp32" else "p"].double()


def clone(section):
    def copy(x):
        if not isinstance(x, Codes):
            return x.clone()
        y = Codes.__new__(Codes)
        y.signed, y.codes, y.absmax = x.signed, x.codes.clone(), x.absmax.clone()
        return y

    params = [{name: copy(x) for name, x in param.items()} for param in section.params]
    return Section(
        params, section.rule, section.caution, section.master, section.flags, section.numbers
    )


def bits(sections):
    """All that a call may write, as bytes."""
    tensors = []
    for param in (param for section in sections for param in section.params):
        for x in param.values():
            tensors += [x.codes, x.absmax] if isinstance(x, Codes) else [x]
    return [x.contiguous().view(-1).view(torch.uint8).clone() for x in tensors]


def random_halves(seed, n, step, number, stream):
    """16 bits for each of n elements: Philox4x32-10, counter (element / 8, step, array)."""
    group = np.arange((n + 7) // 8, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    c = [group & mask, group >> np.uint64(32)]
    c += [np.full_like(group, step), np.full_like(group, number * 2 + stream)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (y >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            y & mask,
            (x >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            x & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = np.stack(c, 1)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 2).reshape(-1)
    return torch.from_numpy(halves[:n].astype(np.int64))


def round_stochastic(x, halves):
    """bfloat16 of float32 with the given random bits."""
    bits = x.flatten().view(torch.int32).long() & 0xFFFFFFFF
    upper = ((bits + halves) >> 16) & 0xFFFF
    return upper.to(torch.uint16).view(torch.bfloat16).view(x.shape)
