"""A linear recurrence over the spans of several processes, composed exactly.

A span maps the state S entering it to M S + H (see segments.py, which does it on one device).
Forward: one all-gather of (M, H); the maps of the preceding ranks give the S that enters.
Backward: with dS_out the gradient of the state that leaves, dS_in = M^T dS_out + dH, where dH is
the span's own gradient for dS_out = 0; one all-gather of dH, and the transposed maps of the
following ranks give the dS_out of this one.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .segments import compose


class Link(NamedTuple):
    """A process's place in the chain.

    offsets: of its sequences, on the host; None for a batch, whose rows all pass through.
    before, after: how many ranks the first sequence began earlier, the last one ends later.
    """

    group: dist.ProcessGroup | None
    rank: int
    before: int
    after: int
    offsets: list | None

    @property
    def through(self):
        """Whether what enters also leaves."""
        return self.before and self.after and (self.offsets is None or len(self.offsets) == 2)

    @property
    def rows(self):
        """Where the states that leave stand among the final states of all sequences."""
        return slice(None) if self.offsets is None else slice(-1, None)

    @property
    def last(self):
        """Tokens of the sequences that leave."""
        return slice(None) if self.offsets is None else slice(*self.offsets[-2:])

    def with_entering(self, entering, initial, N):
        """Initial states [N, ...] of all sequences: those that enter in place of the first."""
        if entering is None or self.offsets is None:
            return initial if entering is None else entering
        if initial is None:
            initial = entering.new_zeros(N, *entering.shape[1:])
        return torch.cat((entering, initial[1:]))


def run_chained(link, local, maps, blank, *tensors):
    """local(S, *tensors) with the S that enters this span (None if nothing does).

    Args:
        link: `Link`.
        local: returns (o, S_out [N, ..., n, m]), differentiable.
        maps: returns [R, ..., n, n + m], M beside H of the R rows that leave. Asked where states
            enter as well as leave; where none enters, local comes first and S_out is H.
        blank: zeros of that shape.
        tensors: what is differentiated.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Chained.apply(link, local, maps, blank, *tensors)
    return _forward(link, local, maps, blank, tensors, graph=False)[2]


def _forward(link, local, maps, blank, tensors, graph):
    """(maps of all ranks, S that enters or None, what local returns)."""
    if link.before:
        gathered = _all_gather(maps() if link.after else blank, link.group)
        entering = _entering(link, gathered).requires_grad_(graph)
        return gathered, entering, local(entering, *tensors)
    outputs = local(None, *tensors)
    if link.after:
        M = blank[..., : blank.shape[-2]]
        blank = torch.cat((M, outputs[1].detach()[link.rows]), -1)
    return _all_gather(blank, link.group), None, outputs


class _Chained(torch.autograd.Function):
    """Keeps the graph of `local` for a backward that goes through it once or twice."""

    @staticmethod
    def forward(ctx, link, local, maps, blank, *tensors):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            gathered, entering, outputs = _forward(link, local, maps, blank, leaves, graph=True)
        ctx.link, ctx.maps, ctx.graph = link, gathered, (entering, leaves, outputs)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_out):
        link, maps = ctx.link, ctx.maps
        entering, leaves, outputs = ctx.graph
        wanted = [t for t in leaves if t.requires_grad]

        adjoint, grads = torch.zeros_like(maps[0, ..., maps.shape[-2] :]), None
        if entering is not None:
            adjoint, *grads = _pull(outputs, (d_o, d_out), [entering, *wanted], link.after > 0)
        adjoints = _all_gather(adjoint, link.group)
        if link.after:
            d_out = d_out.clone()
            d_out[link.rows] += _adjoint_of_leaving(link, maps, adjoints)
        if link.after or grads is None:
            grads = _pull(outputs, (d_o, d_out), wanted, keep=False)
        grads = iter(grads)
        needed = ctx.needs_input_grad[4:]
        return None, None, None, None, *(next(grads) if need else None for need in needed)


def _pull(outputs, grads, inputs, keep):
    """Gradients of the inputs, zeros where no output depends on one (an empty span).

    Not None: the collectives of an earlier backward wait for all ranks.
    """
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, retain_graph=keep, materialize_grads=True)


def _all_gather(tensor, group):
    """[world, ...] of the ranks' tensors."""
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group)
    return gathered


def _entering(link, maps):
    """The state that leaves the preceding rank, or None; the chain's first map begins from 0."""
    state = None
    for rank in range(link.rank - link.before, link.rank):
        M, H = maps[rank].tensor_split([maps.shape[-2]], -1)
        state = H.clone() if state is None else compose(M, state, H)
    return state


def _adjoint_of_leaving(link, maps, adjoints):
    """The gradient of the state that leaves: what the following ranks make of it."""
    adjoint = adjoints[link.rank + link.after]
    for rank in range(link.rank + link.after - 1, link.rank, -1):
        M = maps[rank][..., : maps.shape[-2]]
        adjoint = compose(M.mT, adjoint, adjoints[rank])
    return adjoint
