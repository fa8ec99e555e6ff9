"""One step of one path of a group: tensors to a section, and back."""

from operator import is_

import torch

from . import matrix, sharded
from .layout import as_real, is_dense, is_finite, like
from .paths import constants_of, is_corrected, kind_of, rounding_of, uses_loop
from .sections import LISTS, Section, squares

FILLED = (*LISTS, "absmaxes", "state_steps")  # what MARS._init_group fills, in its order
_ORDINARY = (torch.nn.Parameter, torch.Tensor)


class GroupStep:
    """The tensors of one path of one group that have gradients.

    Attributes:
        section: what the kernel gets; a matrix member's params are buffers for the directions.
    """

    def __init__(self, optimizer, group, path):
        self.group, self.path = group, path
        filled = [[] for _ in FILLED]
        optimizer._init_group(group, path, *filled)
        lists = dict(zip(FILLED, filled, strict=True))
        lists["absmaxes"] = _by_tensor(lists)
        self._given = {name: lists[name] for name in ("params", "grads", "last_grads")}
        if group["nonfinite"] == "skip_tensor":
            lists = _only_finite(lists)
        self.whole = lists["params"]  # DTensors as they are
        if not all(type(p) in _ORDINARY and not p.is_complex() for p in self.whole):
            for name in (*LISTS, "state_steps"):
                lists[name] = as_real([sharded.local(t) for t in lists[name]])
        self.params, self.masters = lists["params"], lists["masters"]
        self.targets = [p if is_dense(p) else p.contiguous() for p in self.params]
        for name in ("grads", "last_grads"):
            pairs = zip(lists[name], self.targets, strict=False)
            lists[name] = [like(t, p) for t, p in pairs]
        lists["params"] = self.targets
        if path.startswith("matrix"):
            lists["params"] = [torch.empty_like(p, dtype=self._dtype(p)) for p in self.targets]
            lists["masters"] = []
        self.section = Section(**lists, **constants_of(group, path))

    def is_plain(self):
        """Whether the kernel gets the parameters, gradients and state themselves."""
        return all(
            all(map(is_, tensors, getattr(self.section, name)))
            for name, tensors in self._given.items()
        )

    def _dtype(self, p):
        """Of the direction: what the products of Newton-Schulz start from."""
        if p.dtype == torch.float64:
            return p.dtype
        half = self.group["ns_steps"] is not None and self.group["ns_dtype"] == torch.bfloat16
        return torch.bfloat16 if half else torch.float32

    def matrix_updates(self):
        """The sections that apply the functions of the directions, one for each factor on lr."""
        if not self.path.startswith("matrix"):
            return []
        found = {}
        for i, direction in enumerate(self._orthogonalized()):
            factor = self._factor(self.whole[i])
            if factor not in found:
                found[factor] = self._apply(factor)
            section = found[factor]
            section.params.append(self.targets[i])
            section.grads.append(direction)
            if section.master:
                section.masters.append(self.masters[i])
            if section.stochastic:
                section.state_steps.append(self.section.state_steps[i])
        return list(found.values())

    def _apply(self, factor):
        group = self.group
        rates = dict(lr=group["lr"], weight_decay=group["weight_decay"], factor=factor)
        return Section([], [], rule="given", **rates, **rounding_of(group, self.path))

    def _factor(self, p):
        default = "original" if kind_of(self.group) == "shampoo" else "match_rms_adamw"
        rows, cols = matrix.flat(p).shape
        return matrix.adjustment(self.group["adjust_lr_fn"] or default, rows, max(cols, 1))

    def _orthogonalized(self):
        steps, dtype = self.group["ns_steps"], self.group["ns_dtype"]
        whole = [
            sharded.gathered(d, p) if sharded.is_sharded(p) else d
            for d, p in zip(self.section.params, self.whole, strict=True)
        ]
        results = matrix.orthogonalized(whole, steps, dtype, loop=uses_loop(self.group))
        return [
            like(sharded.shard_of(r, p) if sharded.is_sharded(p) else r, t)
            for r, p, t in zip(results, self.whole, self.targets, strict=True)
        ]

    def finish(self):
        for p, target in zip(self.params, self.targets, strict=True):
            if target is not p:
                p.copy_(target)


def _by_tensor(lists):
    """absmaxes as dicts: of each tensor's arrays that are in 8 bits, in the order of the lists."""
    left = iter(lists["absmaxes"])
    if not lists["absmaxes"]:
        return []
    return [
        {
            name: next(left)
            for name in LISTS[2:]
            if i < len(lists[name]) and lists[name][i].dtype == torch.uint8
        }
        for i in range(len(lists["params"]))
    ]


def _only_finite(lists):
    """The lists without the tensors whose gradient has NaN or inf; looks at them on the host."""
    keep = [i for i, g in enumerate(lists["grads"]) if is_finite(sharded.local(g))]
    return {name: [x[i] for i in keep] if x else [] for name, x in lists.items()}


def norms_of(steps, grad_scale):
    """||c|| that each tensor's clip compares, float64 [tensors of all steps]; None: its own.

    Needed where it covers more than the tensor on this rank: a group, everything, all shards.
    """
    clipped = [s for s in steps if s.group["clip"] is not None and is_corrected(s.group, s.path)]
    scopes = {s.group["clip_scope"] for s in clipped}
    shards = any(
        type(p) not in _ORDINARY and sharded.is_sharded(p) for s in clipped for p in s.whole
    )
    if not shards and scopes <= {"tensor"}:
        return None
    tensors = [p for s in clipped for p in s.whole]
    found = squares([s.section for s in clipped], grad_scale)
    if shards:
        found = sharded.add_shards(found, tensors)
    found = _in_scope(clipped, found)
    # in the places of the other steps' tensors stands what nothing looks at
    left = dict(zip(map(id, clipped), found.split([len(s.whole) for s in clipped]), strict=True))
    parts = [left[id(s)] if id(s) in left else found.new_zeros(len(s.whole)) for s in steps]
    return torch.cat(parts).sqrt()


def _in_scope(steps, found):
    """The squares of single tensors, summed over a group or over all where the clip is."""
    parts = list(found.split([len(s.whole) for s in steps]))
    everything = [
        part for s, part in zip(steps, parts, strict=True) if s.group["clip_scope"] == "global"
    ]
    for i, s in enumerate(steps):
        if s.group["clip_scope"] == "global":
            parts[i] = torch.cat(everything).sum().expand(len(s.whole))
        elif s.group["clip_scope"] == "group":
            same = [
                p
                for t, p in zip(steps, found.split([len(t.whole) for t in steps]), strict=True)
                if t.group is s.group
            ]
            parts[i] = torch.cat(same).sum().expand(len(s.whole))
    return torch.cat(parts)
