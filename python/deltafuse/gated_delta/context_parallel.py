"""Sequences over several processes: each holds a contiguous span of the tokens.

`ContextParallel` describes a process's span; the gated delta rule and the short convolution compose
the spans exactly (chained.py), with one all-gather in the forward and one in the backward.
"""

import functools
from bisect import bisect_right

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once

from .. import _checks
from .chained import Link, run_chained
from .ops_layer import causal_conv1d
from .reference import compute_dtype
from .segments import transition


class ContextParallel:
    """A process's contiguous span of packed sequences, or of each row of a batch.

    Reads cu_seqlens on the host, once. Objects of other packages with the same attributes are
    taken as well: group, cu_seqlens, pre_num_ranks, post_num_ranks, optional cu_seqlens_cpu.

    Args:
        cu_seqlens: global offsets [N + 1]; None: the ranks hold successive parts of each row of a
            batch, of any lengths.
        group: process group, in the order of the spans; None is the default group.
        bounds: [world + 1], rank r holds the tokens bounds[r] to bounds[r + 1]; spans may be
            empty. By default the tokens are split evenly, the first ranks taking one more.

    Attributes:
        tokens: slice of the packed tokens that this process holds.
        sequences: range of the sequences that have tokens here, or lie between tokens here; an
            empty sequence belongs to the rank of the token after it.
        cu_seqlens, cu_seqlens_cpu: their offsets within the span.
        pre_num_ranks: ranks before this one that hold earlier tokens of the first of them.
        post_num_ranks: ranks after this one that hold later tokens of the last of them.
        For a batch the first three are None.

    Raises:
        ValueError: bounds that do not rise from 0, one a rank and one more, to the last offset.
    """

    def __init__(self, cu_seqlens=None, group=None, bounds=None):
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.tokens = self.sequences = self.cu_seqlens = self.cu_seqlens_cpu = None
        if cu_seqlens is None:
            self.pre_num_ranks, self.post_num_ranks = rank, world - 1 - rank
            return
        offsets = cu_seqlens.tolist()
        bounds = _even(offsets[-1], world) if bounds is None else list(bounds)
        if (
            len(bounds) != world + 1
            or bounds[0] != 0
            or bounds != sorted(bounds)
            or bounds[-1] < offsets[-1]
        ):
            _checks.fail(
                "ContextParallel",
                f"bounds must be {world + 1} numbers that rise from 0 to at least "
                f"{offsets[-1]}, got {bounds}",
            )
        ranks = [_ranks_of(*offsets[n : n + 2], bounds) for n in range(len(offsets) - 1)]
        here = [n for n, (first, last) in enumerate(ranks) if first <= rank <= last]
        start, end = bounds[rank : rank + 2]
        self.tokens = slice(start, end)
        self.sequences = range(here[0], here[-1] + 1) if here else range(0)
        self.pre_num_ranks = rank - ranks[here[0]][0] if here else 0
        self.post_num_ranks = ranks[here[-1]][1] - rank if here else 0
        ends = [min(offsets[n + 1], end) - start for n in here]
        self.cu_seqlens_cpu = torch.tensor([0, *ends], dtype=cu_seqlens.dtype)
        self.cu_seqlens = self.cu_seqlens_cpu.to(cu_seqlens.device)


def _even(total, world):
    size, rest = divmod(total, world)
    return [rank * size + min(rank, rest) for rank in range(world + 1)]


def _ranks_of(start, end, bounds):
    """The first and the last rank of a sequence; empty spans between them belong to it."""
    first = min(bisect_right(bounds, start) - 1, len(bounds) - 2)
    return first, max(first, bisect_right(bounds, end - 1) - 1)


def offsets_of(op, context, cu_seqlens, auto_cp):
    """The offsets of a span's sequences: the context's, if there is one; checks what it is."""
    if context is None:
        return cu_seqlens
    for name in ("group", "cu_seqlens", "pre_num_ranks", "post_num_ranks"):
        if not hasattr(context, name):
            raise TypeError(f"{op}: cp_context must be a ContextParallel, got {type(context)}")
    layout = getattr(context, "layout", "contiguous")
    if layout != "contiguous":
        _checks.fail(op, f"cp_context must have contiguous spans, got layout {layout!r}")
    if auto_cp:
        _checks.fail(op, "auto_cp=True and cp_context exclude each other")
    return context.cu_seqlens


def _link(op, context):
    group = context.group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    before, after = context.pre_num_ranks, context.post_num_ranks
    if not (0 <= before <= rank and 0 <= after < world - rank):
        _checks.fail(
            op,
            f"cp_context: rank {rank} of {world} cannot have {before} ranks before it and "
            f"{after} after it",
        )
    offsets = context.cu_seqlens
    if offsets is not None:
        host = getattr(context, "cu_seqlens_cpu", None)
        offsets = (offsets if host is None else host).tolist()
    return Link(group, rank, before, after, offsets)


@_disable_dynamo
def run_parallel(op, run, call, output_final_state, context):
    """run(call, output_final_state) of this process's span; call is the named tuple of `ops`."""
    link = _link(op, context)
    v_first = call.state_v_first
    if v_first and call.initial_state is not None:
        call = call._replace(initial_state=call.initial_state.mT)
    call = call._replace(state_v_first=False)
    N = call.q.shape[0] if link.offsets is None else len(link.offsets) - 1
    names = [
        name
        for name, value in call._asdict().items()
        if isinstance(value, torch.Tensor) and name != "cu_seqlens"
    ]

    def local(entering, *tensors):
        part = call._replace(**dict(zip(names, tensors, strict=True)))
        initial = link.with_entering(entering, part.initial_state, N)
        return run(part._replace(initial_state=initial), True)

    HV, V, K = *call.v.shape[2:], call.q.shape[3]
    R = call.q.shape[0]  # 1 for packed sequences
    blank = call.q.new_zeros(R, HV, K, K + V, dtype=compute_dtype(call.q))
    maps = functools.partial(_maps_of_rule, link, run, call)
    o, final = run_chained(link, local, maps, blank, *(getattr(call, name) for name in names))
    if not output_final_state:
        return o, None
    return o, final.mT.contiguous() if v_first else final


@torch.no_grad()
def _maps_of_rule(link, run, call):
    """[R, HV, K, K + V]: M beside H of the rows that leave this span."""
    R = call.q.shape[0]
    parts = {name: getattr(call, name)[:, link.last] for name in ("q", "k", "v", "g", "beta")}
    state = call.initial_state
    state = None if state is None or link.through else state[-R:]
    call = call._replace(**parts, cu_seqlens=None, initial_state=state)
    H = run(call, True)[1]
    M = transition(run, call, R) if link.through else H.new_zeros(*H.shape[:3], H.shape[2])
    return torch.cat((M, H), -1)


@_disable_dynamo
def conv_parallel(x, weight, bias, context, activation="silu"):
    """`causal_conv1d` of this process's span x [B, T, D], continued over the ranks.

    The state, the last W - 1 inputs [W - 1, D], is linear as well: a span of T tokens shifts it by
    T and writes its own last inputs below.
    """
    op = "causal_conv1d"
    link = _link(op, context)
    N = x.shape[0] if link.offsets is None else len(link.offsets) - 1

    def local(entering, x, weight, *bias):
        state = None
        if entering is not None:
            state = link.with_entering(entering, None, N).mT
        y, final = causal_conv1d(
            x, weight, *(bias or (None,)), state, context.cu_seqlens, activation, True
        )
        return y, final.mT

    R, _, D = x.shape
    size = weight.shape[1] - 1
    maps = functools.partial(_maps_of_conv, link, x, size)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return run_chained(link, local, maps, x.new_zeros(R, size, size + D), *tensors)[0]


@torch.no_grad()
def _maps_of_conv(link, x, size):
    """[R, size, size + D]: the shift beside the last inputs, zeros above them."""
    tail = x[:, link.last]
    kept = min(tail.shape[1], size)
    H = F.pad(tail[:, tail.shape[1] - kept :], (0, 0, size - kept, 0))
    M = F.pad(torch.eye(size - kept, dtype=x.dtype, device=x.device), (kept, 0, 0, kept))
    return torch.cat((M.expand(x.shape[0], size, size), H), -1)
