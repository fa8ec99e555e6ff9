"""Benchmarks of what a call costs on the host: one token, so that Python is most of the time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _library, ddl, grape
from .. import gated_delta as gd
from .case import Benchmark, Case

ALONE = "operators alone"  # the same compiled operators, called without the package around them
AUTOGRAD = "empty Function"  # the same tensors through an autograd.Function that does nothing
SHAPE = {"B": 1, "T": 1, "H": 2, "D": 16}
_normal = torch.randn


class Call(NamedTuple):
    """A function of tensors that returns a tuple of tensors, and what makes the tensors.

    changed: how many of the last tensors the function writes into; it is not differentiable then.
    """

    title: str
    kernel: str
    make: Callable
    changed: int = 0


class _Recorder(TorchDispatchMode):
    """The package's operators that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _library.NATIVE:
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((func, plain))
        return func(*args, **(kwargs or {}))


def alone(function):
    """Calls the operators again that function() calls."""
    with _Recorder() as recorded:
        function()

    def replay():
        with torch.inference_mode():
            for operator, args in recorded.calls:
                operator(*args)

    return replay


def on_reference(function):
    def run():
        with _library.use("reference"):
            return function()

    return run


class _Hand(torch.autograd.Function):
    """A number whose gradient is given to the outputs: torch.autograd.grad looks at one tensor."""

    @staticmethod
    def forward(ctx, grads, *outputs):
        ctx.grads = grads
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.grads


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, grads, *inputs):
        ctx.grads = grads
        return outputs

    @staticmethod
    def backward(ctx, *_):
        return None, None, *ctx.grads


def forward_case(call, shape, device):
    torch.manual_seed(0)
    function, inputs = call.make(shape, device)
    kept = len(inputs) - call.changed

    def run(tensors=inputs):
        with torch.no_grad():
            return function(*tensors)

    def fresh():
        tensors = [*inputs[:kept], *(t.clone() for t in inputs[kept:])]
        return [*run(tensors), *tensors[kept:]]

    return Case(
        ours=run,
        reference=on_reference(run),
        baselines={ALONE: alone(run)},
        check=lambda: compared(fresh(), on_reference(fresh)()),
    )


def training_case(call, shape, device):
    torch.manual_seed(0)
    function, inputs = call.make(shape, device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    incoming = [torch.randn_like(out) for out in function(*leaves)]
    found = tuple(torch.empty_like(t) for t in leaves)
    outputs = tuple(torch.empty_like(t) for t in incoming)

    def step(function=function):
        return torch.autograd.grad(_Hand.apply(incoming, *function(*leaves)), leaves)

    return Case(
        ours=step,
        reference=on_reference(step),
        baselines={
            ALONE: alone(step),
            AUTOGRAD: lambda: step(partial(_Empty.apply, outputs, found)),
        },
        check=lambda: compared(step(), on_reference(step)()),
    )


def compared(ours, expected):
    pairs = zip(ours, expected, strict=True)
    return [(f"result {i}", *pair, 1e-4) for i, pair in enumerate(pairs)]


# What is called: (function, tensors) of a shape


def _boundary(s, device):
    token, d, d_v = (s["B"], s["T"]), s["D"], 2
    rewrite = (*token, d, d_v), (*token, d), (*token, d_v), token
    weights = (d, d_v), (d,), (d_v, d), (d_v,), (1, d), (1,)
    return ddl.ddl_boundary, [_normal(*shape, device=device) for shape in rewrite + weights]


def _rotary(s, device):
    q, k = (_normal(s["B"], s["T"], H, s["D"], device=device) for H in (s["H"], 1))
    return (lambda q, k, f: grape.rotary_qk(q, k, freqs=f)), [q, k, _normal(s["D"] // 2)]


def _mixture(s, device):
    x = _normal(s["B"], s["T"], s["H"], s["D"], device=device)
    a, b = (_normal(s["H"], 2, s["D"], device=device) for _ in range(2))
    omega, t = _normal(s["H"], 2, device=device), torch.arange(s["T"], device=device)
    frame = grape.prepare_frame(a, b, omega)
    return (lambda *given: (grape.mixture_rotate(*given, t, frame=frame),)), [x, a, b, omega]


def _convolution(s, device):
    x, weight = _normal(s["B"], s["T"], s["D"], device=device), _normal(s["D"], 4, device=device)
    return (lambda x, weight: gd.causal_conv1d(x, weight)[:1]), [x, weight]


def _norm(s, device):
    x, gate = (_normal(s["B"], s["T"], s["D"], device=device) for _ in range(2))
    return (lambda *given: (gd.gated_rms_norm(*given),)), [x, _normal(s["D"], device=device), gate]


def _rule(s, device):
    """q, k, v, g, beta."""
    q, k, v = (_normal(s["B"], s["T"], s["H"], s["D"], device=device) for _ in range(3))
    gates = [_normal(s["B"], s["T"], s["H"], device=device).sigmoid() for _ in range(2)]
    return q, k, v, -gates[0], gates[1]


def _chunk(s, device):
    return (lambda *given: gd.chunk_gated_delta_rule(*given)[:1]), list(_rule(s, device))


def _recurrent(s, device):
    def call(q, k, v, g, beta):
        return gd.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta)[:1]

    return call, list(_rule(s, device))


def _decode(s, device):
    A_log, dt_bias = (_normal(s["H"], device=device) for _ in range(2))
    state = _normal(s["B"], s["H"], s["D"], s["D"], device=device)

    def call(q, k, v, a, b, state):
        return (gd.gated_delta_rule_decode(q, k, v, state, A_log, a, dt_bias, b),)

    return call, [*_rule(s, device), state]


def _layer(s, device):
    options = {"head_dim": s["D"], "num_heads": s["H"], "expand_v": 1}
    layer = gd.GatedDeltaNet(s["D"], **options).to(device).requires_grad_(False)
    return (lambda x: layer(x)[:1]), [_normal(s["B"], s["T"], s["D"], device=device)]


def _stack(s, device):
    wrappers = [ddl.DDLWrapper(nn.Identity(), s["D"], 2) for _ in range(4)]
    stack = ddl.DDLStack(wrappers).to(device).requires_grad_(False)
    return (lambda x: (stack(x),)), [_normal(s["B"], s["T"], s["D"], 2, device=device)]


CALLS = {
    "ddl_boundary": Call("ddl_boundary", "ddl_boundary_fwd", _boundary),
    "rotary": Call("rotary_qk", "grape_rotary_fwd", _rotary),
    "mixture": Call("mixture_rotate", "grape_mixture_fwd", _mixture),
    "short_conv": Call("causal_conv1d", "causal_conv1d_fwd", _convolution),
    "gated_norm": Call("gated_rms_norm", "gated_rms_norm_fwd", _norm),
    "chunk": Call("chunk_gated_delta_rule", "gated_delta_fwd", _chunk),
    "recurrent": Call("fused_recurrent_gated_delta_rule", "gated_delta_recurrent_fwd", _recurrent),
    "decode": Call("gated_delta_rule_decode", "gated_delta_decode", _decode, changed=1),
    "layer": Call("a GatedDeltaNet layer", "gated_delta_fwd", _layer),
    "ddl_stack": Call("a DDLStack of four empty layers", "ddl_boundary_fwd", _stack),
}


def _entry(call, make, what):
    return Benchmark(
        title=f"{call.title}, {what}, one token: the time of a call on the host",
        reference="the same call on the reference backend",
        kernel=call.kernel,
        shapes=(SHAPE,),
        tiny=SHAPE,
        make=partial(make, call),
        flops=lambda s: None,
        bytes=lambda s: None,
        devices=("cpu",),
    )


ENTRIES = {
    **{f"host_{name}": _entry(call, forward_case, "forward") for name, call in CALLS.items()},
    **{
        f"host_{name}_train": _entry(call, training_case, "forward and backward")
        for name, call in CALLS.items()
        if not call.changed
    },
}
