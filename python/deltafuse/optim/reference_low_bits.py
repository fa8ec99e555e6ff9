"""Parameters and state in few bits, in plain PyTorch; the kernels' formats, bit for bit.

Formats: csrc/mars/mars_random.h (stochastic rounding, split16), mars_quantize.h (8-bit blocks).
"""

import functools

import torch

QUANTUM = 256  # elements of an 8-bit state that share a factor
SIGNED = ("exp_avgs", "last_grads")  # the others are never negative
PARAMETER, SECOND_MOMENT = 0, 1  # which bits


def _multiply(a, b):
    """High and low words of the product of a 32-bit number and a tensor of such, in int64."""
    low, high = b * (a & 0xFFFF), b * (a >> 16)
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16 | low & 0xFFFF)


def random_bits(n, seed, step, number, stream, device=None):
    """16 random bits for each of n elements, int64; Philox4x32-10 (Salmon et al., 2011)."""
    c0 = torch.arange((n + 7) // 8, dtype=torch.int64, device=device)
    c1, c0 = c0 >> 32, c0 & 0xFFFFFFFF
    c2, c3 = torch.full_like(c0, int(step)), torch.full_like(c0, number * 2 + stream)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        (x_high, x_low), (y_high, y_low) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = y_high ^ c1 ^ k0, y_low, x_high ^ c3 ^ k1, x_low
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    words = torch.stack((c0, c1, c2, c3), 1)
    return torch.stack((words & 0xFFFF, words >> 16), 2).flatten()[:n]


def round_stochastic(x, seed, step, number, stream):
    """bfloat16 [n] of a dense float32 tensor's memory: up as often as the cut part says."""
    flat = _linear(x)
    bits = flat.view(torch.int32).long() & 0xFFFFFFFF
    raised = bits + random_bits(flat.numel(), seed, step, number, stream, x.device)
    quiet = bits | torch.where(flat.isnan(), 0x400000, 0)
    high = torch.where(flat.isfinite(), raised, quiet) >> 16 & 0xFFFF
    return _as_int16(high).view(torch.bfloat16)


def _as_int16(bits):
    return torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16)


def _linear(x):
    """The elements in the order of memory; x is dense."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def store_stochastic(x, to, *key):
    """to <- x rounded at random; both dense with the same strides."""
    if x.numel():
        _linear(to).copy_(round_stochastic(like_strides(x, to), *key))


def like_strides(x, to):
    """x in the memory order of `to`."""
    return x if x.stride() == to.stride() else torch.empty_like(to, dtype=x.dtype).copy_(x)


def split(x):
    """(bfloat16 upper half, rounded half up, int16 rest) of a float32 tensor."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    high = torch.where(x.isnan(), bits | 0x400000, bits + 0x8000) >> 16 & 0xFFFF
    low = torch.where(x.isnan(), 0, bits & 0xFFFF)
    return _as_int16(high).view(torch.bfloat16), _as_int16(low)


def join(high, low):
    """The float32 tensor that `split` took apart, bit for bit."""
    bits = ((high.view(torch.int16).long() & 0xFFFF) << 16) + low.long() & 0xFFFFFFFF
    return (
        torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    )


@functools.cache
def levels(signed):
    """What the 256 codes of an 8-bit state stand for, float32."""
    codes = torch.arange(128 if signed else 256)
    exponent = (codes.clamp(min=1).double().log2() + 1e-9).floor()
    count = 2**exponent
    x = 10 ** (exponent - (6 if signed else 7)) * (0.1 + 0.9 * (codes + 1 - count) / count)
    x = torch.where(codes > 0, x, 0).float()
    return torch.cat((x, -x)) if signed else x


def dequantize(codes, absmax, signed):
    """float32 in the shape of codes (uint8, dense)."""
    flat = levels(signed).to(codes.device)[_linear(codes).long()]
    x = torch.empty_like(codes, dtype=torch.float32)
    _linear(x).copy_(flat * absmax.repeat_interleave(QUANTUM)[: flat.numel()])
    return x


def quantize(x, codes, absmax, signed):
    """Writes codes and absmax, float32 [ceil(n / 256)], of a dense tensor."""
    flat = _linear(like_strides(x.float(), codes))
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)
    absmax.copy_(blocks.abs().amax(1))
    unit = (blocks / absmax.clamp(min=1e-45).unsqueeze(1)).flatten()[: flat.numel()]
    magnitude = unit.abs()
    decades = 7 if signed else 8
    exponent = torch.zeros_like(unit)
    for e in range(1, decades):
        exponent += magnitude > 10.0 ** (e - decades)
    count = 2**exponent
    place = (magnitude * 10 ** (decades - 1 - exponent) - 0.1) * (count / 0.9) + 0.5
    code = count - 1 + place.floor().clamp(min=0).minimum(count)
    if signed:
        code = torch.where(unit < 0, code + 128, code)
    else:
        code = torch.where((code == 0) & (unit > 0), 1, code)
    _linear(codes).copy_(code.to(torch.uint8))
