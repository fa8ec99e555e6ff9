"""States recomputed in the backward: X = Y - beta k e^T needs no division and holds for any beta.

Autograd would keep each sub-layer's state [d, d_v]. Here it keeps the last one; beside it each
boundary keeps its k [d] and the d_v numbers u = beta (v - k^T X), and gives the state before it to
the boundary before it. The order is safe: a boundary's state and logits are made by the one before,
whose backward therefore runs later.
"""

import contextlib

import torch

from .. import _checks
from .ops import delta_rewrite
from .reference import autocast_off, compute_dtype, direction


class Tape:
    """The state that the backward has reached; empty before it and after it.

    Attributes:
        end: index of the last boundary, whose result autograd keeps.
    """

    def __init__(self, end):
        self.end = end
        self._state, self._index = None, None

    def put(self, index, state):
        self._state, self._index = state, index

    def take(self, index):
        """The state that boundary `index` made; RuntimeError if the backward skipped one."""
        state, at = self._state, self._index
        self._state = self._index = None
        if at != index or state is None:
            raise RuntimeError(
                'ddl: save="invert" needs the backward of the whole stack, in one go'
            )
        return state

    def head(self, step, x, weights):
        return _Head.apply(step, self, x, *weights)

    def boundary(self, step, index, x, tensors):
        return _Boundary.apply(step, self, index, x, *tensors)


def tape_for(x, targets):
    """A tape, or None where nothing is saved: without gradients, or while compiling.

    torch.compile decides itself what the backward keeps.

    Raises:
        ValueError: a state of 16 bits, or a read-out that mixes tokens.
    """
    if x.dtype not in (torch.float32, torch.float64):
        _checks.fail(
            "DDLStack",
            f'save="invert" needs a float32 or float64 state, got {x.dtype}, '
            "whose rounding the inversions add up",
        )
    if any(t.over_time for t in targets):
        _checks.fail("DDLStack", 'save="invert" needs a read-out of each token, not mode "tc"')
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return Tape(sum(t.layer is not None for t in targets) - 1)


def _written(step, x, k, v_logits, beta_logits):
    """u = beta (v - k^T X) [..., d_v], what the boundary adds along k."""
    ddl, dtype = step.ddl, compute_dtype(x, k)
    k = direction(k.to(dtype), ddl.k_eps)
    with autocast_off(x):
        read = (k.unsqueeze(-2) @ x.to(dtype)).squeeze(-2)
    if ddl.v_constant is not None:
        v = ddl.v_constant
    else:
        v = v_logits if ddl.v_activation is None else ddl.v_scale * torch.sigmoid(v_logits)
    return 2 * torch.sigmoid(beta_logits.to(dtype)).unsqueeze(-1) * (v - read)


def _autocast_of(x):
    """Makes the context in which the forward runs, for the backward."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    options = {
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }
    return lambda: torch.autocast(device, **options)


def _gradients(ctx, x, tensors, needed, grads):
    """Gradients of the step, which is run again, for those of its inputs that need one."""
    inputs = [t if t is None else t.detach() for t in (x, *tensors)]
    wanted = [i for i, need in enumerate(needed) if need]
    for i in wanted:
        inputs[i].requires_grad_()
    with torch.enable_grad(), ctx.autocast():
        outputs = ctx.step(*inputs)
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    results = [None] * len(inputs)
    if pairs and wanted:
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [inputs[i] for i in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        for i, grad in zip(wanted, found, strict=True):
            results[i] = grad
    return results


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, tape, index, x, *tensors):
        outputs = step(x, *tensors)
        written = _written(step, x, *tensors[:3])
        last = outputs[0] if index == tape.end else None
        ctx.save_for_backward(last, written, *tensors)
        ctx.step, ctx.tape, ctx.index, ctx.autocast = step, tape, index, _autocast_of(x)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        y, written, *tensors = ctx.saved_tensors
        y = ctx.tape.take(ctx.index) if y is None else y
        k, k_eps = tensors[0], ctx.step.ddl.k_eps
        one = written.new_ones(()).expand(written.shape[:-1])
        x = delta_rewrite(y, k, -written, one, k_eps=k_eps, erase=False)
        ctx.tape.put(ctx.index - 1, x)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *_gradients(ctx, x, tensors, needed, grads)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, tape, x, *weights):
        ctx.save_for_backward(*weights)
        ctx.step, ctx.tape, ctx.autocast = step, tape, _autocast_of(x)
        ctx.set_materialize_grads(False)
        return tuple(step(x, *weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x = ctx.tape.take(-1)
        needed = ctx.needs_input_grad[2:]
        return None, None, *_gradients(ctx, x, ctx.saved_tensors, needed, grads)
