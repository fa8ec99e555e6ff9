"""Which rule a parameter takes, and what state that rule has."""

import torch

from .groups import takes_mars_path

# half: bfloat16 (or float16) parameters with a master, or rounded at random
PATHS = tuple(path + half for path in ("mars", "matrix", "vector") for half in ("", " half"))


def kind_of(group):
    return group["mars_type"].removeprefix("mars-")


def path_of(group, p):
    """One of PATHS. A matrix member takes tensors of two dimensions, or flattened ones."""
    half = " half" if _is_half(group, p) else ""
    if not takes_mars_path(group, p):
        return "vector" + half
    is_matrix = p.ndim == 2 or (p.ndim > 2 and group["flatten"])
    return ("matrix" if is_matrix and kind_of(group) in ("shampoo", "m") else "mars") + half


def options_of(group):
    """Everything but the parameters that path_of looks at."""
    names = ("mars_type", "optimize_1d", "matrix_ndim", "flatten", "master", "rounding")
    return [group[name] for name in names]


def places(group):
    """{path: indices of the parameters on it}, for all of PATHS."""
    found = {path: [] for path in PATHS}
    for i, p in enumerate(group["params"]):
        found[path_of(group, p)].append(i)
    return found


def _is_half(group, p):
    if group["master"] == "fp32":
        return p.dtype in (torch.bfloat16, torch.float16)
    stochastic = group["rounding"] == "stochastic"
    return p.dtype == torch.bfloat16 and (group["master"] == "split16" or stochastic)


def has_master(group, path):
    return group["master"] is not None and path.endswith("half")


def rule_of(group, path):
    """The rule of csrc/mars/mars.h."""
    if path.startswith("matrix"):
        return "momentum"
    elementwise = path.startswith("mars") and kind_of(group) in ("lion", "sgd")
    return kind_of(group) if elementwise else "adamw"


def is_stateless(group, path):
    """Whether the last gradient is folded into the momentum, which the approximate variant without
    a clip allows for every rule that does not square c."""
    number = not isinstance(group["gamma"], torch.Tensor)
    plain = group["is_approx"] and group["clip"] is None and number
    return plain and rule_of(group, path) != "adamw"


def is_corrected(group, path):
    return not path.startswith("vector") and not is_stateless(group, path)


def moments_of(group, path):
    """Names of the moments in a parameter's state."""
    if rule_of(group, path) != "adamw":
        return ["exp_avg_base" if is_stateless(group, path) else "exp_avg"]
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]


def keeps_copy(group):
    """Whether the step itself writes last_grad."""
    return group["is_approx"] and group["last_grad_mode"] == "copy"


def uses_loop(group):
    """Whether the PyTorch loop was asked for."""
    return group["differentiable"] or (group["fused"] is False and not group["foreach"])


def rates_of(group, path):
    """lr, weight_decay, betas and gamma as a section names them."""
    if not path.startswith("vector"):
        b1, b2 = group["betas"]
        names = ("lr", "weight_decay", "gamma")
        return dict({name: group[name] for name in names}, beta1=b1, beta2=b2)
    base, (b1, b2) = group["lr_constructor"], group["betas_1d"]
    lr = group["lr"] * (group["lr_1d"] / base) if base else group["lr_1d"]
    decay = group["weight_decay_1d"]
    decay = group["weight_decay"] if decay is None else decay
    return dict(lr=lr, weight_decay=decay, beta1=b1, beta2=b2)


def constants_of(group, path):
    """Every field of a section that is not a list of tensors."""
    constants = rates_of(group, path)
    constants.update(rule=rule_of(group, path), eps=group["eps"], maximize=group["maximize"])
    if not path.startswith("vector"):
        constants.update(
            corrected=is_corrected(group, path),
            stateless=is_stateless(group, path),
            clip=group["clip"],
            caution=group["caution"] or "off",
            update_last_grad=keeps_copy(group),
        )
    if not path.startswith("matrix"):
        constants.update(rounding_of(group, path))
    return constants


def rounding_of(group, path):
    half = path.endswith("half")
    stochastic = half and group["master"] is None
    return dict(master=group["master"] if half else None, stochastic=stochastic)
