"""The optimizer state of one parameter: its arrays, their formats, and what checkpoints bring.

Keys: step, exp_avg, exp_avg_sq, max_exp_avg_sq, last_grad, previous_grad as in the authors' code;
exp_avg_base (m - gamma g) where the last gradient is folded into the momentum; master (float32) or
master_lo (int16); <name>_absmax beside an 8-bit array.
"""

import math

import torch

from . import reference_low_bits as low_bits
from .layout import like, state_dtype, step_device
from .paths import moments_of
from .sharded import is_sharded, local

# names in a parameter's state, and the operator's lists that they go to
LIST_OF = {
    "exp_avg": "exp_avgs",
    "exp_avg_base": "exp_avgs",
    "exp_avg_sq": "exp_avg_sqs",
    "max_exp_avg_sq": "max_exp_avg_sqs",
    "last_grad": "last_grads",
}
MASTERS = {"fp32": "master", "split16": "master_lo"}
SMALLEST_8_BIT = 4096  # elements; smaller arrays stay as they are
_KNOWN = (*LIST_OF, "previous_grad", *MASTERS.values())


def absmax_key(name):
    return name + "_absmax"


def is_8_bit(group, p):
    narrow = p.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return group["state_bits"] == 8 and p.numel() >= SMALLEST_8_BIT and narrow


def moment_dtype(group, p):
    """Of exp_avg and exp_avg_sq, where they are not in 8 bits."""
    narrow = p.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return group["state_dtype"] or torch.float32 if narrow else state_dtype(p)


def last_grad_dtype(group, p):
    return state_dtype(p) if p.is_complex() else group["last_grad_dtype"] or moment_dtype(group, p)


def new_array(group, p, kept, name):
    """A zero array in the format that the group asks for."""
    if is_8_bit(group, p):
        blocks = math.ceil(local(p).numel() / low_bits.QUANTUM)
        kept[name] = torch.zeros_like(p, dtype=torch.uint8)
        kept[absmax_key(name)] = torch.zeros(blocks, device=p.device)
        return
    dtype = last_grad_dtype(group, p) if name == "last_grad" else moment_dtype(group, p)
    kept[name] = torch.zeros_like(p, dtype=dtype)


def fill_array(group, p, kept, name, values):
    """An array that holds the values, in the format that the group asks for."""
    new_array(group, p, kept, name)
    array = local(kept[name])
    values = like(local(values), array)
    if array.dtype == torch.uint8:
        factors = kept[absmax_key(name)]
        low_bits.quantize(values, array, factors, LIST_OF[name] in low_bits.SIGNED)
    else:
        array.copy_(values)


def new_master(group, p, kept):
    """The values that a half-precision parameter is rounded from."""
    if group["master"] == "fp32":
        kept["master"] = p.detach().to(torch.float32, copy=True)
    else:
        kept["master_lo"] = torch.zeros_like(p, dtype=torch.int16)


def loaded(saved, p):
    """A parameter's state from a checkpoint: known keys only, in their stored formats."""
    state = {}
    for name, value in saved.items():
        if name == "step":
            value = torch.as_tensor(value, dtype=torch.float32)
            state[name] = value.detach().clone().to(step_device(p))
        elif name in _KNOWN and value is not None:
            value = value.detach().to(p.device, copy=True)
            state[name] = value if is_sharded(value) else like(value, p)
        elif name.removesuffix("_absmax") in LIST_OF and value is not None:
            state[name] = value.detach().to(p.device, copy=True)
    return state


def fit(group, p, kept, path):
    """Brings what a checkpoint brought into the formats and the kind of state of this group."""
    for name in [name for name in LIST_OF if name in kept]:
        wanted = torch.uint8 if is_8_bit(group, p) else _wide(group, p, name, kept[name])
        if kept[name].dtype != wanted:
            fill_array(group, p, kept, name, _values(kept, name))
    base = moments_of(group, path)[0]
    if base == "exp_avg_base" and "exp_avg" in kept:
        values = _values(kept, "exp_avg")
        if "last_grad" in kept:
            values = values - group["gamma"] * _values(kept, "last_grad").to(values.dtype)
        for name in ("exp_avg", "last_grad"):
            kept.pop(name, None), kept.pop(absmax_key(name), None)
        fill_array(group, p, kept, base, values)
    if base == "exp_avg" and "exp_avg_base" in kept:
        fill_array(group, p, kept, base, _values(kept, "exp_avg_base"))
        kept.pop("exp_avg_base"), kept.pop(absmax_key("exp_avg_base"), None)


def _wide(group, p, name, array):
    """The dtype of an array that is not in 8 bits; a stored gradient keeps that it came in."""
    if name != "last_grad":
        return moment_dtype(group, p)
    return last_grad_dtype(group, p) if array.dtype == torch.uint8 else array.dtype


def _values(kept, name):
    """An array's numbers, whatever its format."""
    array = local(kept[name])
    if array.dtype != torch.uint8:
        return array
    return low_bits.dequantize(array, kept[absmax_key(name)], LIST_OF[name] in low_bits.SIGNED)
