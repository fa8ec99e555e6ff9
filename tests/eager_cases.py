"""Differentiable functions with inputs, run by the shortcut of eager mode and without it."""

import pytest
import torch

from deltafuse import _eager, ddl, gated_delta, grape


def normal(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def boundary(x, k, v, beta, read, norm, W_v, W_beta):
    return ddl.ddl_boundary(x, k, v, beta, read, norm, W_v, None, W_beta, None)


def mixture(x, a, b, omega):
    with torch.no_grad():
        frame = grape.prepare_frame(a, b, omega)
    return (grape.mixture_rotate(x, a, b, omega, torch.arange(3.0), frame=frame),)


def rotary(q, k, freqs):
    return grape.rotary_qk(q, k, freqs=freqs)


def chunk(q, k, v, g, beta):
    return gated_delta.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)


def recurrent(q, k, v, g, beta):
    return gated_delta.fused_recurrent_gated_delta_rule(
        q, k, v, g, beta=beta, output_final_state=True
    )


def one(function):
    return lambda *inputs: (function(*inputs),)


RULE = ((2, 3, 2, 8), (2, 3, 2, 8), (2, 3, 2, 4), (2, 3, 2), (2, 3, 2))
# name: (function of tensors that returns a tuple, the tensors' shapes)
CASES = {
    "ddl_boundary": (
        boundary,
        ((2, 3, 8, 2), (2, 3, 8), (2, 3, 2), (2, 3), (8, 2), (8,), (2, 8), (1, 8)),
    ),
    "ddl_compress_tc": (one(ddl.ddl_compress_tc), ((2, 3, 4, 2), (8, 3), (2,))),
    "ddl_expand": (one(lambda x, w: ddl.ddl_expand(x, w, 2)), ((2, 3, 4), (8, 1, 3))),
    "token_shift": (one(ddl.token_shift), ((2, 3, 2, 4), (2, 3, 2), (2, 3, 2))),
    "rotary_qk": (rotary, ((2, 3, 4, 8), (2, 3, 2, 8), (4,))),
    "mixture_rotate": (mixture, ((2, 3, 2, 8), (2, 2, 8), (2, 2, 8), (2, 2))),
    "cumulative_phase": (lambda omega: grape.cumulative_phase(omega)[:1], ((2, 3),)),
    "causal_conv1d": (
        lambda x, w, b: gated_delta.causal_conv1d(x, w, b, output_final_state=True),
        ((2, 3, 8), (8, 4), (8,)),
    ),
    "gated_rms_norm": (one(gated_delta.gated_rms_norm), ((2, 3, 8), (8,), (2, 3, 8))),
    "l2norm": (one(gated_delta.l2norm), ((2, 3, 8),)),
    "fused_gdn_gate": (one(gated_delta.fused_gdn_gate), ((2, 3, 4), (4,), (4,))),
    "chunk_gated_delta_rule": (chunk, RULE),
    "fused_recurrent_gated_delta_rule": (recurrent, RULE),
}
every_case = pytest.mark.parametrize("name", CASES)


def inputs_of(name, requires_grad=True):
    return [normal(*shape).requires_grad_(requires_grad) for shape in CASES[name][1]]


def call(name, inputs):
    return CASES[name][0](*inputs)


def both(registered, function):
    """function() by the shortcut, then as torch.library has it."""
    assert not _eager._is_heard(())
    ours = function()
    registered()
    return ours, function()


def no_grad(name):
    """The results without gradients, of inputs that require them."""
    with torch.no_grad():
        return call(name, inputs_of(name))


def gradients(outputs, inputs, **options):
    incoming = [normal(*out.shape).to(out.dtype) for out in outputs]
    return torch.autograd.grad(outputs, inputs, incoming, **options)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def error_of(function):
    """Type and message of what a call raises, None if it raises nothing."""
    try:
        function()
    except Exception as error:  # any of them: they are compared
        return type(error), str(error)
