"""Runs sub-layers on a state: one boundary between any two, a head before and a tail after."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from .. import _checks
from . import invert
from .nn import DeepDeltaResidual, RMSNorm
from .nn_compress import ResidualCompressor
from .ops_boundary import ddl_boundary, ddl_head

SAVES = ("output", "invert")


class ReadOut(NamedTuple):
    """What is taken from a state: read-out, norm, and the logits of the gates where there are any.

    Attributes:
        norm, compress: the RMSNorm, and the compressor (None where d_v = 1: the state itself).
        ddl: the connection whose gates are projected, or None after the last sub-layer.
        layer: the sub-layer that takes the normed read-out; takes_options: as keywords, too.
        key: of the compressor's state in a cache.
    """

    norm: RMSNorm
    compress: ResidualCompressor | None
    ddl: DeepDeltaResidual | None = None
    layer: Callable | None = None
    takes_options: bool = False
    key: object = "read_out"

    @property
    def over_time(self):
        return self.compress is not None and self.compress.mode == "tc"


class Sequences(NamedTuple):
    """What compressors over time need beside a state.

    Attributes:
        states: dict that keeps their last inputs from call to call, or None.
        cu_seqlens, attention_mask: as `ddl_compress_tc`.
    """

    states: dict | None = None
    cu_seqlens: object = None
    attention_mask: object = None

    def compress(self, target, x):
        options = {"cu_seqlens": self.cu_seqlens, "attention_mask": self.attention_mask}
        if self.states is None:
            return target.compress(x, **options)
        past = self.states.get(target.key)
        read, self.states[target.key] = target.compress(
            x, initial_state=past, output_final_state=True, **options
        )
        return read


class Runner(NamedTuple):
    """How boundaries are computed.

    Attributes:
        fuse: one `ddl_boundary` each, where the read-out is one of each token; else rewrite and
            `ddl_head`, with the same numbers.
        save: "output" lets autograd keep each state, "invert" recomputes them from the last one.
    """

    fuse: bool = True
    save: str = "output"

    def run(self, targets, x, sequences=None, options: Mapping | None = None):
        """The state after the sub-layers `targets`, and what a last target without layer reads.

        Returns:
            (y, c), c None if every target has a layer.
        """
        sequences = sequences or Sequences()
        options = options or {}
        x, flat = with_channels(x, targets[0])
        tape = invert.tape_for(x, targets) if self.save == "invert" else None
        read = read_weight(targets[0])
        if tape is None:
            c, *logits = open_state(x, targets[0], sequences, read)
        else:
            step = Step(None, targets[0], self.fuse)
            c, *logits = tape.head(step, x, step.weights(read))
        for index, (target, following) in enumerate(_pairs(targets)):
            extra = options if target.takes_options else {}
            k = target.layer(c, **extra)
            k = k[0] if isinstance(k, tuple) else k
            if following is None:
                x, c = self._last(x, k, logits, target.ddl, tape, index), None
                break
            if following.compress is not target.compress:
                read = read_weight(following)
            step = Step(target.ddl, following, self.fuse)
            x, c, *logits = self._between(x, k, logits, step, read, sequences, (tape, index))
        return (x.squeeze(-1) if flat else x), c

    def _between(self, x, k, logits, step, read, sequences, taped):
        if step.target.over_time:
            y = step.ddl.rewrite(x, k, *logits)
            return y, *over_time(y, step.target, sequences, k.dtype)
        tape, index = taped
        inputs = (k, *logits, *step.weights(read))
        if tape is None:
            return step(x, *inputs)
        return tape.boundary(step, index, x, inputs)

    def _last(self, x, k, logits, ddl, tape, index):
        if tape is None:
            return ddl.rewrite(x, k, *logits)
        return tape.boundary(Step(ddl, None, self.fuse), index, x, (k, *logits))[0]


class Step(NamedTuple):
    """One boundary as a function of tensors alone: state, k, logits, weights of the read-out.

    Attributes:
        ddl: the connection that ends, None for the head.
        target: what is read out, None for the last rewrite.
        fuse: one call.
    """

    ddl: DeepDeltaResidual | None
    target: ReadOut | None
    fuse: bool

    def weights(self, read):
        """(read, norm weight, W_v, b_v, W_beta, b_beta), a two-layer gate flattened."""
        ddl = self.target.ddl
        W_v, b_v, W_beta, b_beta = (None,) * 4 if ddl is None else ddl.projections()
        if isinstance(W_beta, tuple):
            W_beta, b_beta = W_beta, b_beta[1:]
        else:
            W_beta, b_beta = (W_beta,), (b_beta,)
        return read, self.target.norm.weight, W_v, b_v, *W_beta, *b_beta

    def __call__(self, x, *tensors):
        """(y, c, v_logits, beta_logits); without y for the head, y alone without a target."""
        if self.ddl is None:
            dtype = _narrower(self.target.norm.weight.dtype, x.dtype)
            return ddl_head(x, *self._gates(tensors), **self._reading(), out_dtype=dtype)
        k, v_logits, beta_logits, *weights = tensors
        if self.target is None:
            return (self.ddl.rewrite(x, k, v_logits, beta_logits),)
        weights = self._gates(weights)
        if self.fuse:
            options = {**self.ddl.rewrite_options(), **self._reading()}
            return ddl_boundary(x, k, v_logits, beta_logits, *weights, **options)
        y = self.ddl.rewrite(x, k, v_logits, beta_logits)
        return y, *ddl_head(y, *weights, **self._reading(), out_dtype=k.dtype)

    def _gates(self, weights):
        if len(weights) == 6:
            return weights
        *others, inner, outer, bias = weights
        return *others, (inner, outer), (None, bias)

    def _reading(self):
        ddl = self.target.ddl
        source = "input" if ddl is None else ddl.v_source
        return {"norm_eps": self.target.norm.eps, "v_source": source}


def with_channels(x, target):
    """x [..., d, d_v], and whether it came as [..., d]."""
    d = target.norm.weight.shape[0]
    flat = target.compress is None and x.shape[-1] == d
    if flat and d == 1:
        flat = tuple(x.shape[-2:]) != (1, 1)
    return (x.unsqueeze(-1) if flat else x), flat


def open_state(x, target, sequences, read):
    """(c, v_logits, beta_logits): what a sub-layer and its gates take from a state."""
    if target.over_time:
        dtype = _narrower(target.norm.weight.dtype, x.dtype)
        return over_time(x, target, sequences, dtype)
    step = Step(None, target, fuse=True)
    return step(x, *step.weights(read))


def over_time(x, target, sequences, dtype):
    """(c, v_logits, beta_logits) of a read-out that mixes tokens."""
    x_in = sequences.compress(target, x).to(dtype)
    c = target.norm(x_in)
    return (c, None, None) if target.ddl is None else (c, *target.ddl.logits(x_in, c))


def read_weight(target):
    """[d, d_v] of the target's compressor, or None: the mean, no compressor, or one over time."""
    if target.compress is None or target.over_time:
        return None
    return target.compress.read_weight()


def _narrower(weight, state):
    """The dtype of a sub-layer's input: the state's, or that of narrower weights."""
    return weight if weight.itemsize < state.itemsize else state


def _pairs(targets):
    """Each sub-layer with what follows it, None after the last one."""
    ends = [*targets[1:], None]
    return [pair for pair in zip(targets, ends, strict=True) if pair[0].layer is not None]


def expect_targets(op, targets):
    """Targets of one stack have one width and one number of channels."""
    sizes = {(t.ddl.hidden_size, t.ddl.value_channels) for t in targets}
    if len(sizes) > 1:
        _checks.fail(op, f"sub-layers of several (hidden_size, value_channels): {sorted(sizes)}")


def read_outs_of(blocks):
    """The read-outs of all blocks in the order in which they run, with the keys of their states."""
    targets = []
    for index, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or not hasattr(block, "read_outs"):
            _checks.fail("DDLStack", f"a block must be a DDLBlock or DDLWrapper, got {type(block)}")
        for place, target in enumerate(block.read_outs()):
            targets.append(target._replace(key=(index, place)))
    return targets
