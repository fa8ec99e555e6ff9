"""Benchmarks of the gated delta rule: chunked, token by token, decode."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import gated_delta
from ..gated_delta.reference_decode import naive_decode
from .case import Benchmark, Case
from .eager import eager_chunk, transformers_chunk

CHUNK = 64  # the default chunk_size, which the counts assume
EAGER = "eager chunk form"
TRANSFORMERS = "transformers"  # the eager chunk form that users have, if it is installed


def sequence_inputs(shape, device, T=None):
    """q, k of norm 1, v, mild gates: no product becomes subnormal, which would slow PyTorch."""
    B, H, K, V = (shape[name] for name in "BHKV")
    T = shape["T"] if T is None else T
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    q, k = (F.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    g = -0.1 * torch.rand(B, T, H, generator=generator, device=device)
    return q, k, normal(B, T, H, V), g, normal(B, T, H).sigmoid()


def chunk_of(shape):
    """The eager form takes whole chunks only."""
    return CHUNK if shape["T"] % CHUNK == 0 else shape["T"]


def others(call):
    """Chunk forms of installed packages, each wrapped by `call`."""
    function = transformers_chunk()
    return {TRANSFORMERS: call(function)} if function else {}


def heads(shape):
    return shape["B"] * shape["T"] * shape["H"]


def forward_flops(shape):
    """3KV + 2CV + 2CK + C^2/3 multiply-adds a token and head: gated_delta.md's count, C = 64."""
    K, V, C = shape["K"], shape["V"], CHUNK
    return 2 * heads(shape) * (3 * K * V + 2 * C * V + 2 * C * K + C * C / 3)


def training_flops(shape):
    """Forward, backward 7KV + 5CV + 5CK, and the states once more: 2KV + CV."""
    K, V, C = shape["K"], shape["V"], CHUNK
    return forward_flops(shape) + 2 * heads(shape) * (9 * K * V + 6 * C * V + 5 * C * K)


def forward_bytes(shape):
    """q, k, v, g, beta read and o written once, float32."""
    return 4 * heads(shape) * (2 * shape["K"] + 2 * shape["V"] + 2)


def training_bytes(shape):
    """Forward, then the inputs and do read, the inputs' gradients written."""
    return forward_bytes(shape) + 4 * heads(shape) * (4 * shape["K"] + 3 * shape["V"] + 4)


def recurrent_flops(shape):
    """3KV multiply-adds (S^T k, k u^T, S^T q) and the decay's KV products a token and head."""
    return heads(shape) * 7 * shape["K"] * shape["V"]


def recurrent_bytes(shape):
    """The state read and written once, float32, and the tokens."""
    return forward_bytes(shape) + 8 * shape["B"] * shape["H"] * shape["K"] * shape["V"]


def forward_case(shape, device):
    inputs = sequence_inputs(shape, device)
    plain = gated_delta.naive_chunk_gated_delta_rule
    eager = partial(eager_chunk, *inputs, C=chunk_of(shape))

    def check():
        o, _ = gated_delta.chunk_gated_delta_rule(*inputs)
        return [("o", o, plain(*inputs)[0], 1e-5), ("o of the eager", o, eager(), 1e-5)]

    return Case(
        ours=lambda: gated_delta.chunk_gated_delta_rule(*inputs),
        reference=lambda: plain(*inputs),
        baselines={EAGER: eager, **others(lambda function: lambda: function(*inputs))},
        check=check,
        compiled=lambda wrap: partial(wrap(plain), *inputs),
    )


def training_case(shape, device):
    inputs = [x.requires_grad_() for x in sequence_inputs(shape, device)]
    d_o = torch.randn_like(inputs[2])
    plain = gated_delta.naive_chunk_gated_delta_rule

    def eager(*tensors):
        return (eager_chunk(*tensors, C=chunk_of(shape)),)

    def step(function):
        return torch.autograd.grad(function(*inputs)[0], inputs, d_o)

    def check():
        pairs = zip(step(gated_delta.chunk_gated_delta_rule), step(plain), strict=True)
        names = ("dq", "dk", "dv", "dg", "dbeta")
        return [(name, *pair, 4e-5) for name, pair in zip(names, pairs, strict=True)]

    return Case(
        ours=lambda: step(gated_delta.chunk_gated_delta_rule),
        reference=lambda: step(plain),
        baselines={
            EAGER: lambda: step(eager),
            **others(lambda function: lambda: step(function)),
        },
        check=check,
        compiled=lambda wrap: partial(step, wrap(plain)),
    )


def recurrent_case(shape, device):
    q, k, v, g, beta = sequence_inputs(shape, device)
    state = torch.randn(shape["B"], shape["H"], shape["K"], shape["V"], device=device)
    options = dict(g=g, beta=beta, initial_state=state, output_final_state=True)

    def run(function):
        return function(q, k, v, **options)

    def check():
        pairs = zip(
            run(gated_delta.fused_recurrent_gated_delta_rule),
            run(gated_delta.naive_recurrent_gated_delta_rule),
            strict=True,
        )
        return [(name, *pair, 1e-5) for name, pair in zip(("o", "S"), pairs, strict=True)]

    return Case(
        ours=lambda: run(gated_delta.fused_recurrent_gated_delta_rule),
        reference=lambda: run(gated_delta.naive_recurrent_gated_delta_rule),
        baselines={"eager chunk form": lambda: run(gated_delta.naive_chunk_gated_delta_rule)},
        check=check,
    )


def eager_step(q, k, v, S, A_log, a, dt_bias, b):
    """One token in plain PyTorch, in place on S [B, H, V, K]; q, k, v [B, 1, H, D]."""
    q, k, v = q[:, 0], k[:, 0], v[:, 0].unsqueeze(-1)
    decay = (-A_log.exp() * F.softplus(a[:, 0] + dt_bias)).exp()[..., None, None]
    beta = b[:, 0].sigmoid()[..., None, None]
    q = q * ((q.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5)
    k = k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    S.mul_(decay)
    u = beta * (v - S @ k.unsqueeze(-1))
    S.addcmul_(u, k.unsqueeze(-2))
    return (S @ q.unsqueeze(-1)).squeeze(-1).unsqueeze(1)


def decode_case(shape, device):
    q, k, v, a, b = sequence_inputs(shape | {"T": 1}, device)
    HV, K, V = shape["H"], shape["K"], shape["V"]
    state = torch.randn(shape["B"], HV, V, K, device=device)
    # a gate of almost 1: with the same token again and again a smaller one makes S subnormal
    A_log, dt_bias = torch.full((HV,), -12.0, device=device), torch.zeros(HV, device=device)
    o = torch.empty_like(v)

    def ours(S):
        return gated_delta.gated_delta_rule_decode(q, k, v, S, A_log, a, dt_bias, b)

    def reference(S):
        scale, none = q.shape[3] ** -0.5, (None, None, True, None)
        naive_decode(q, k, v, S, A_log, a, dt_bias, b, scale, o, True, *none)
        return o

    def check():
        states = [state.clone() for _ in range(3)]
        outputs = [ours(states[0]), reference(states[1]), None]
        outputs[2] = eager_step(q, k, v, states[2], A_log, a, dt_bias, b)
        return [
            (f"{name} against {other}", values[0], values[i], 1e-5)
            for i, other in ((1, "the reference"), (2, "the eager step"))
            for name, values in (("o", outputs), ("S", states))
        ]

    # a state each: as in use, a token finds it where the token before left it
    states = [state.clone() for _ in range(4)]
    return Case(
        ours=lambda: ours(states[0]),
        reference=lambda: reference(states[1]),
        baselines={
            "eager step": lambda: eager_step(q, k, v, states[2], A_log, a, dt_bias, b),
        },
        check=check,
        compiled=lambda wrap: partial(wrap(eager_step), q, k, v, states[3], A_log, a, dt_bias, b),
    )


LONG = {"B": 1, "T": 2048, "H": 16, "K": 128, "V": 128}
TINY = {"B": 1, "T": 70, "H": 2, "K": 16, "V": 20}
CHUNK_FORM = "eager chunk form (naive_chunk_gated_delta_rule)"

ENTRIES = {
    "gated_delta_fwd": Benchmark(
        title="chunk_gated_delta_rule, forward",
        reference=CHUNK_FORM,
        kernel="gated_delta_fwd",
        shapes=(LONG,),
        tiny=TINY,
        make=forward_case,
        flops=forward_flops,
        bytes=forward_bytes,
        targets=((TRANSFORMERS, 4.0),),
    ),
    "gated_delta_fwd_bwd": Benchmark(
        title="chunk_gated_delta_rule, forward and backward",
        reference=CHUNK_FORM + " with autograd",
        kernel="gated_delta_bwd",
        shapes=(LONG,),
        tiny=TINY,
        make=training_case,
        flops=training_flops,
        bytes=training_bytes,
        targets=((TRANSFORMERS, 8.0),),
    ),
    "gated_delta_recurrent": Benchmark(
        title="fused_recurrent_gated_delta_rule, a few tokens, forward",
        reference="eager loop over tokens (naive_recurrent_gated_delta_rule)",
        kernel="gated_delta_recurrent_fwd",
        shapes=tuple(LONG | {"T": T} for T in (1, 4, 16)),
        tiny=TINY | {"T": 3},
        make=recurrent_case,
        flops=recurrent_flops,
        bytes=recurrent_bytes,
        targets=(("reference", 1.0),),
    ),
    "gated_delta_decode": Benchmark(
        title="gated_delta_rule_decode, one token, gate, sigmoid and l2norm fused, in place",
        reference="eager, with the pool of states (naive_decode)",
        kernel="gated_delta_decode",
        shapes=({"B": 1, "T": 1, "H": 16, "K": 128, "V": 128},),
        tiny=TINY | {"T": 1},
        make=decode_case,
        flops=recurrent_flops,
        bytes=recurrent_bytes,
        targets=(("eager step", 2.0),),
    ),
}
