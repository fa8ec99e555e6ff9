"""Sections: tensors of one step that share a rule and its constants; how they reach a kernel."""

import dataclasses
import math
from typing import Any

import torch

from .. import _library
from . import reference

RULES = ("adamw", "lion", "sgd", "momentum", "given")  # in the order of csrc/mars/mars.h
CAUTIONS = ("off", "elementwise", "mean")
MASTERS = (None, "fp32", "split16")
FLAGS = ("corrected", "stateless", "update_last_grad", "maximize", "stochastic", "amsgrad")
# the operator's lists; a section has entries in those that its rule and flags need
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "last_grads", "masters")
_RATES = ("lr", "weight_decay", "gamma")  # float or 0-dim tensor
_NUMBERS = ("beta1", "beta2", "eps", "clip", "factor")


@dataclasses.dataclass
class Section:
    """n parameters with what their rule needs; see csrc/mars/mars.h for the update.

    Attributes:
        rule: "adamw", "lion", "sgd"; "momentum" writes the direction to params instead; "given"
            takes grads as the update.
        corrected: c = g + s (g - last_grads), clipped; else c = g.
        stateless: the last gradient is folded into exp_avgs, which are m - gamma g then.
        update_last_grad: write g to last_grads.
        factor: multiplies lr, but not in the weight decay.
        masters: float32 values, or int16 low halves, that params are rounded from.
        absmaxes: a dict for each tensor, {name of a list: float32 factors of its uint8 array}.
    """

    params: list
    grads: list
    exp_avgs: list = dataclasses.field(default_factory=list)
    exp_avg_sqs: list = dataclasses.field(default_factory=list)
    max_exp_avg_sqs: list = dataclasses.field(default_factory=list)
    last_grads: list = dataclasses.field(default_factory=list)
    masters: list = dataclasses.field(default_factory=list)
    absmaxes: list = dataclasses.field(default_factory=list)
    state_steps: list = dataclasses.field(default_factory=list)
    rule: str = "adamw"
    lr: Any = 0.0
    weight_decay: Any = 0.0
    gamma: Any = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    clip: float | None = None
    factor: float = 1.0
    caution: str = "off"
    master: str | None = None
    corrected: bool = False
    stateless: bool = False
    update_last_grad: bool = True
    maximize: bool = False
    stochastic: bool = False

    @property
    def amsgrad(self):
        return len(self.max_exp_avg_sqs) > 0

    @property
    def device(self):
        return self.params[0].device

    def only(self, keep):
        """The section of some of its tensors."""
        lists = {name: getattr(self, name) for name in (*LISTS, "absmaxes", "state_steps")}
        return dataclasses.replace(
            self, **{name: [x[i] for i in keep] if x else [] for name, x in lists.items()}
        )

    def integers(self):
        flags = sum(getattr(self, name) << i for i, name in enumerate(FLAGS))
        rule, caution = RULES.index(self.rule), CAUTIONS.index(self.caution)
        return [len(self.params), rule, caution, MASTERS.index(self.master), flags]

    def numbers(self):
        rates = [0.0 if isinstance(x, torch.Tensor) else float(x) for x in self.rates()]
        clip = math.inf if self.clip is None else self.clip
        return [*rates, self.beta1, self.beta2, self.eps, clip, self.factor]

    def rates(self):
        return [getattr(self, name) for name in _RATES]


def schedule_of(sections):
    """[sections, 3] float64 of lr, weight_decay, gamma if any is a tensor, else None."""
    rates = [x for section in sections for x in section.rates()]
    if not any(isinstance(x, torch.Tensor) for x in rates):
        return None
    device = sections[0].device
    # torch.full, unlike torch.tensor, is traced by torch.compile
    tensors = [
        _on(x.double().reshape(()), device)
        if isinstance(x, torch.Tensor)
        else torch.full((), x, dtype=torch.float64, device=device)
        for x in rates
    ]
    return torch.stack(tensors)


def _encoded(sections):
    integers = [n for section in sections for n in section.integers()]
    return integers, [x for section in sections for x in section.numbers()]


def by_device(sections):
    """(sections, places of their tensors) of each device; places are None if there is only one."""
    sections = [section for section in sections if section.params]
    devices = {p.device: None for section in sections for p in section.params}
    if len(devices) <= 1:
        return [(sections, None)] if devices else []
    found = []
    for device in devices:
        parts, places, before = [], [], 0  # places count the tensors of all sections
        for section in sections:
            keep = [i for i, p in enumerate(section.params) if p.device == device]
            parts.append(section.only(keep))
            places += [before + i for i in keep]
            before += len(section.params)
        found.append(([part for part in parts if part.params], places))
    return found


def _on(x, device):
    if not isinstance(x, torch.Tensor) or x.device == device:
        return x
    return x.to(device, non_blocking=device.type != "cpu")  # the host has to wait for its values


def run(sections, *, norms=None, grad_scale=None, found_inf=None, seed=0, loop=False):
    """One step of all sections in place: one call of the operator a device, or the loop."""
    for parts, places in by_device(sections):
        scalars = norms, grad_scale, found_inf
        if places is not None:
            scalars = tuple(_on(x, parts[0].device) for x in (_at(norms, places), *scalars[1:]))
        _run(parts, *scalars, seed, loop)


def _at(norms, places):
    return None if norms is None else torch.stack([norms[i] for i in places])


def _run(sections, norms, grad_scale, found_inf, seed, loop):
    op = None if loop else _library.kernel("mars_", sections[0].params[0])
    if op is None:
        reference.run(sections, norms, grad_scale, found_inf, seed)
        return
    integers, numbers = _encoded(sections)
    params, *states = _lists(sections)
    grads = [g for section in sections for g in section.grads]
    scalars = schedule_of(sections), norms, grad_scale, found_inf, seed
    op(params, grads, *states, integers, numbers, *scalars)
    _library.written(*params)


def _lists(sections):
    """The operator's lists but the gradients, in its order."""
    lists = [
        [t for section in sections for t in getattr(section, name)]
        for name in LISTS
        if name != "grads"
    ]
    steps = [t for section in sections for t in section.state_steps]
    return *lists, _absmaxes(sections, LISTS), steps


def kept_by_kernel(sections):
    """A handle on the kernel's side for everything but the gradients and numbers of a step."""
    plan = _library.kernel("mars_plan", sections[0].params[0])
    return plan(*_lists(sections), _encoded(sections)[0])


def call_again(op, sections, params, grads, handle, numbers, *, grad_scale, found_inf, seed):
    """One step with such a handle; False: these gradients need other sections, nothing is done."""
    try:
        done = op(grads, handle, numbers, schedule_of(sections), grad_scale, found_inf, seed)
    except NotImplementedError:  # no kernel for the kind of tensor that a gradient is: sparse
        return False
    if done:
        _library.written(*params)
    return done


def squares(sections, grad_scale=None):
    """||c||^2 of the tensors of corrected sections, float64 [n], on the first one's device."""
    found = [
        (_squares(parts, _on(grad_scale, parts[0].device)), places)
        for parts, places in by_device(sections)
    ]
    if len(found) == 1:
        return found[0][0]
    single = {}
    for part, places in found:
        single.update(zip(places, _on(part, found[0][0].device).unbind(), strict=True))
    return torch.stack([single[i] for i in range(len(single))])


def _squares(sections, grad_scale):
    grads = [g for section in sections for g in section.grads]
    op = _library.kernel("mars_squares", grads[0])
    if op is None:
        return reference.squares(sections, grad_scale)
    last_grads = [h for section in sections for h in section.last_grads]
    absmaxes = _absmaxes(sections, ["last_grads"])
    return op(grads, last_grads, absmaxes, *_encoded(sections), schedule_of(sections), grad_scale)


def _absmaxes(sections, lists):
    """The factors as the kernels draw them: tensor by tensor, in the order of the lists."""
    of_tensors = [factors for section in sections for factors in section.absmaxes]
    return [factors[name] for factors in of_tensors for name in lists if name in factors]
