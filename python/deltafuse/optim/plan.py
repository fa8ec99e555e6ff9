"""A step like the one before it: the kernel keeps every tensor but the gradients, nothing is looked
up again. Handing over the five other tensors of each parameter takes several times as long."""

import dataclasses
from operator import itemgetter

import torch
from torch.overrides import TorchFunctionMode

from .. import _library
from .paths import constants_of, keeps_copy, uses_loop
from .sections import by_device, call_again, kept_by_kernel

# options that schedules change; they reach the kernel as numbers
_RATES = ("lr", "lr_1d", "weight_decay", "weight_decay_1d", "eps")
_BETAS = ("betas", "betas_1d")
_rates, _betas = itemgetter(*_RATES), itemgetter(*_BETAS)


class _ByIdentity(TorchFunctionMode):
    """Within it `==` of two tensors is False. That of containers looks at identity first: so they
    are equal if they hold the same tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return False


class Plan:
    """What a step was made from, and the sections and the kernel that it led to.

    Holds the optimizer's state: MARS drops the plan when someone else may replace that.
    """

    def __init__(self, optimizer, steps, op):
        self._op = op
        # without the gradients, whose memory has to go
        self._sections = [dataclasses.replace(step.section, grads=[]) for step in steps]
        places = {id(group): i for i, group in enumerate(optimizer.param_groups)}
        self._origins = [(places[id(step.group)], step.path) for step in steps]
        self._params = [p for section in self._sections for p in section.params]
        self._handle = kept_by_kernel(self._sections)
        self._structure = itemgetter(*(set(optimizer.defaults) - {*_RATES, *_BETAS}))
        self._groups = [(self._structure(g), list(g["params"])) for g in optimizer.param_groups]
        states = optimizer.__dict__["state"]
        self._states = list(states), [dict(kept) for kept in states.values()]
        used = set(map(id, self._params))
        self._idle = [p for _, params in self._groups for p in params if id(p) not in used]
        self._known_rates = None

    def _is_current(self, optimizer):
        states = optimizer.__dict__["state"]
        groups = [(self._structure(g), g["params"]) for g in optimizer.param_groups]
        found = list(states), list(states.values())
        with _ByIdentity():
            return groups == self._groups and found == self._states

    def _set_rates(self, optimizer):
        groups = optimizer.param_groups
        rates = [(_rates(group), *map(tuple, _betas(group))) for group in groups]
        # a tensor may hold another value by now, and the 1-D path's lr is computed from it: also
        # within a captured graph, whose replays have to follow it
        if not any(isinstance(x, torch.Tensor) for numbers, *_ in rates for x in numbers):
            with _ByIdentity():
                if rates == self._known_rates:
                    return
        self._known_rates = rates
        for section, (i, path) in zip(self._sections, self._origins, strict=True):
            for name, value in constants_of(groups[i], path).items():
                setattr(section, name, value)
        self._numbers = [x for section in self._sections for x in section.numbers()]

    def step(self, optimizer, **scalars):
        """Does the step, or returns False if it is not like the plan's."""
        if _kernel(self._params) is not self._op or not self._is_current(optimizer):
            return False
        grads = [g for p in self._params if (g := p.grad) is not None]
        if len(grads) < len(self._params) or any(p.grad is not None for p in self._idle):
            return False
        self._set_rates(optimizer)
        kept = self._sections, self._params, grads, self._handle, self._numbers
        return call_again(self._op, *kept, **scalars)


def _kernel(params):
    return _library.kernel("mars_planned_", params[0])


def plan_of(optimizer, steps, norms):
    """A plan for steps like this one; None where they need more than one call of the kernel."""
    groups = optimizer.param_groups
    changing = any(not keeps_copy(g) or g["nonfinite"] == "skip_tensor" for g in groups)
    if not steps or norms is not None or changing or any(uses_loop(group) for group in groups):
        return None
    if not all(step.is_plain() for step in steps):
        return None
    sections = [step.section for step in steps]
    op = _kernel(sections[0].params)
    if op is None or len(by_device(sections)) > 1:
        return None
    return Plan(optimizer, steps, op)
