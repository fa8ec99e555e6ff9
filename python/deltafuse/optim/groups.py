"""Parameter groups and their hyper-parameters: splitting and checking."""

import math
import warnings

import torch

from .matrix import ADJUSTMENTS
from .sharded import check_placements, is_sharded

_TYPES = {
    name: "mars-" + name.removeprefix("mars-")
    for short in ("adamw", "lion", "shampoo", "sgd", "m")
    for name in (short, "mars-" + short)
}
_CHOICES = {
    "clip_scope": ("tensor", "group", "global"),
    "caution": (False, "elementwise", "mean"),
    "first_step": ("zero", "grad"),
    "matrix_ndim": ("eq2", "ge2", "none"),
    "last_grad_mode": ("copy", "steal"),
    "nonfinite": ("propagate", "skip_tensor", "skip_step", "error"),
    "master": (None, "fp32", "split16"),
    "rounding": ("nearest", "stochastic"),
    "state_bits": (32, 8),
    "adjust_lr_fn": (None, *ADJUSTMENTS),
    "ns_dtype": (torch.bfloat16, torch.float32, torch.float64),
    "state_dtype": (None, torch.float32, torch.bfloat16),
}


def split_decay_groups(model, weight_decay):
    """Two parameter groups of a module: matrices decay; biases, norms and embeddings do not.

    Nor do parameters whose attribute `_no_weight_decay` is true, such as learned frequencies.

    Args:
        model: nn.Module; frozen parameters are left out, tied ones appear once.
        weight_decay: float for the first group; the second one has 0, also on the 1-D path.

    Returns:
        list of at most two dicts for an optimizer's `params`; an empty group is left out.
    """
    embeddings = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    decayed, others = [], []
    for p in model.parameters():
        if p.requires_grad:
            kept = id(p) in embeddings or getattr(p, "_no_weight_decay", False)
            (decayed if p.ndim >= 2 and not kept else others).append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "weight_decay_1d": 0.0},
    ]
    return [group for group in groups if group["params"]]


def takes_mars_path(group, p):
    """Matrices ("ge2" counts convolution weights, "none" nothing), or all with optimize_1d."""
    counts = {"eq2": p.ndim == 2, "ge2": p.ndim >= 2, "none": False}
    return group["optimize_1d"] or counts[group["matrix_ndim"]]


def check_flags(foreach, fused, differentiable):
    conflicts = [("foreach", "fused", foreach and fused)]
    conflicts.append(("foreach", "differentiable", foreach and differentiable))
    conflicts.append(("fused", "differentiable", fused and differentiable))
    for one, other, both in conflicts:
        if both:
            raise ValueError(f"MARS: {one} and {other} cannot both be True")


def _check_number(group, name, low, strict=False):
    value = group[name]
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"MARS: {name} must be a number or have one element, got {value}")
        return
    if not (math.isfinite(value) and (value > low if strict else value >= low)):
        bound = f"{'>' if strict else '>='} {low}"
        raise ValueError(f"MARS: {name} must be a finite number {bound}, got {value}")


def check_group(group):
    """ValueError for a bad hyper-parameter; the type's full name in its place."""
    for name in ("lr", "eps", "weight_decay", "gamma", "lr_1d"):
        _check_number(group, name, 0.0)
    for name in ("clip", "weight_decay_1d"):
        if group[name] is not None:
            _check_number(group, name, 0.0, strict=name == "clip")
    for name in ("betas", "betas_1d"):
        if len(group[name]) != 2 or not all(0.0 <= beta < 1.0 for beta in group[name]):
            raise ValueError(f"MARS: {name} must be two numbers in [0, 1), got {group[name]}")
    if group["mars_type"] not in _TYPES:
        raise ValueError(
            f"MARS: mars_type must be one of {sorted(_TYPES)}, got {group['mars_type']!r}"
        )
    group["mars_type"] = _TYPES[group["mars_type"]]
    for name, values in _CHOICES.items():
        # `0 == False` and `1 == True`: compare the types, too
        if not any(group[name] == v and type(group[name]) is type(v) for v in values):
            raise ValueError(f"MARS: {name} must be one of {values}, got {group[name]!r}")
    dtype = group["last_grad_dtype"]
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"MARS: last_grad_dtype must be a floating dtype, got {dtype}")
    steps = group["ns_steps"]
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"MARS: ns_steps must be a positive integer or None, got {steps!r}")
    if group["master"] is not None and group["rounding"] == "stochastic":
        raise ValueError("MARS: rounding='stochastic' and a master exclude each other")


def check_params(group):
    """Rejects what no update can be done on; names the parameter."""
    if len({id(p) for p in group["params"]}) != len(group["params"]):
        raise ValueError("MARS: a parameter appears twice in one group")
    for i, p in enumerate(group["params"]):
        name = parameter_name(group, i)
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(f"MARS: {name} must be floating point or complex, got {p.dtype}")
        if p.dtype == torch.complex32:
            raise NotImplementedError(f"MARS: {name} is complex32")
        if is_sharded(p):
            check_placements(name, p)
        if type(p).__name__ == "FlatParameter":
            raise ValueError(
                f"MARS: {name} is a FlatParameter of FullyShardedDataParallel, which has lost the"
                " shapes of its tensors; pass use_orig_params=True, or use fully_shard"
            )
        if group["mars_type"] in ("mars-shampoo", "mars-m") and takes_mars_path(group, p):
            _check_matrix(group, p, name)
        if group["master"] == "split16" and p.dtype == torch.float16:
            raise ValueError(f"MARS: {name} is float16; master='split16' takes bfloat16")
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"MARS: {name} has elements that share memory (expanded), shape {tuple(p.shape)},"
                f" strides {p.stride()}"
            )


def _check_matrix(group, p, name):
    if p.is_complex():
        raise ValueError(f"MARS: {name} is complex; {group['mars_type']} takes real matrices")
    if p.ndim > 2 and not group["flatten"] and not group["optimize_1d"]:
        raise ValueError(
            f"MARS: {name} has shape {tuple(p.shape)}; {group['mars_type']} takes matrices, and"
            " with flatten=True such tensors as [dim 0, the rest]"
        )


def check_step(group, i, p):
    """RuntimeError for a gradient that no update can be done with; names the parameter."""
    if p.grad.layout != torch.strided:
        raise RuntimeError(f"MARS does not support sparse gradients: {parameter_name(group, i)}")


def warn_decay(group):
    """Warns, and returns True, if vectors decay although weight_decay is 0."""
    plain = group["weight_decay"]
    silent = isinstance(plain, torch.Tensor) or plain != 0 or not group["weight_decay_1d"]
    if silent or all(takes_mars_path(group, p) for p in group["params"]):
        return False
    warnings.warn(
        f"MARS: weight_decay is 0, but vectors decay with weight_decay_1d ="
        f" {group['weight_decay_1d']}; weight_decay_1d=None follows weight_decay",
        stacklevel=5,
    )
    return True


def parameter_name(group, i):
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"params[{i}]"
