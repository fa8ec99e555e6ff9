"""The causal short convolution against its float64 reference, and what it must not leak."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from deltafuse import _library
from deltafuse.gated_delta import causal_conv1d, causal_conv1d_update
from layer_cases import DTYPES, compare, normal, require_kernel, run

# B, T, D, W: no token, fewer tokens than taps, steps of 4 tokens cut, tiles of 64 cut; D below,
# at and above vectors, and beyond the channel blocks of 256 and 1024; on CUDA chunks of 16 tokens,
# 128 to 1024 channels a CTA
SHAPES = {
    "no_token": (2, 0, 5, 4),
    "one_token": (3, 1, 16, 4),
    "two_tokens": (1, 2, 37, 4),
    "three_tokens_widest": (2, 3, 7, 8),
    "as_many_as_taps": (2, 4, 33, 4),
    "two_taps_one_channel": (1, 65, 1, 2),
    "three_taps": (2, 67, 40, 3),
    "next_unit": (1, 330, 20, 4),  # two partial sums of the taps' gradients
    "next_block": (1, 9, 1100, 4),
    "whole_vectors_five_taps": (1, 21, 40, 5),
    "whole_vectors_widest": (2, 19, 16, 8),
}
PACKED = torch.tensor([0, 0, 1, 64, 64, 200, 203])  # empty, one token, shorter than the taps


def make(shape, dtype=torch.float32, device="cpu", states=None):
    B, T, D, W = shape
    x = normal(B, T, D, dtype=dtype)
    weight, bias = normal(D, W, dtype=dtype), normal(D, dtype=dtype)
    state = normal(B if states is None else states, D, W - 1, dtype=dtype)
    return [t.to(device) for t in (x, weight, bias, state)]


def conv(x, weight, bias=None, state=None, cu_seqlens=None, activation="silu"):
    return causal_conv1d(x, weight, bias, state, cu_seqlens, activation, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients(device, name, dtype):
    compare(conv, make(SHAPES[name], dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bias_state_and_activation(device, dtype):
    x, weight, *_ = make((2, 70, 20, 4), dtype, device)
    compare(lambda x, w: conv(x, w, activation=None), (x, weight))
    compare(lambda x, w: causal_conv1d(x, w)[0], (x, weight))


def test_parameters_and_states_of_other_types(device):
    x, weight, bias, state = make((2, 9, 24, 4), torch.bfloat16, device)
    bias, state = bias.half(), state.float()  # the state is rounded to the type of x
    (y, final), (dx, *grads) = run(conv, (x, weight.float(), bias, state))
    assert y.dtype == final.dtype == dx.dtype == torch.bfloat16
    expected = compare(conv, make((2, 9, 24, 4), torch.bfloat16, device))
    assert torch.equal(final, expected[0][1])
    for a, e, dtype in zip(
        grads, expected[1][1:], (torch.float, torch.half, torch.float), strict=True
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, e.to(dtype), rtol=2e-2, atol=2e-2)


def test_reference_is_torchs_convolution():
    x, weight, bias, _ = make((2, 30, 6, 4), torch.float64)
    padded = F.pad(x.mT, (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=6)).mT
    with _library.use("reference"):
        torch.testing.assert_close(causal_conv1d(x, weight, bias)[0], expected)


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [37, 40])
def test_packed_sequences(device, D, dtype, offsets):
    x = make((1, 210, D, 4), dtype, device, states=6)
    (y, _), (dx, *_) = compare(conv, (*x, PACKED.to(device, offsets)))
    # the padding behind the last sequence
    assert y[0, 203:].eq(0).all() and dx[0, 203:].eq(0).all()


def test_packed_sequences_equal_single_calls(device):
    x, weight, bias, state = make((1, 203, 20, 4), device=device, states=6)
    y, final = conv(x, weight, bias, state, PACKED.to(device))
    for n, (a, b) in enumerate(zip(PACKED[:-1], PACKED[1:], strict=True)):
        y_n, final_n = conv(x[:, a:b], weight, bias, state[n : n + 1])
        assert torch.equal(y[:, a:b], y_n) and torch.equal(final[n : n + 1], final_n)


@pytest.mark.parametrize("W", [2, 4, 5])
def test_nan_stays_in_its_sequence_channel_and_reach(device, W):
    x, weight, *_ = make((1, 203, 20, W), device=device)
    x[0, 63, 3] = torch.nan  # the last token of a sequence, right before another one
    y = causal_conv1d(x, weight, cu_seqlens=PACKED.to(device))[0]
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, 63, 3] = True
    assert torch.equal(y.isnan(), expected)
    x[0, 80, 5] = torch.nan
    expected[0, 80 : 80 + W, 5] = True
    assert torch.equal(causal_conv1d(x, weight, cu_seqlens=PACKED.to(device))[0].isnan(), expected)


def test_continuing_from_the_state_is_the_whole(device):
    x, weight, bias, state = make((2, 90, 20, 4), device=device)
    whole, final = conv(x, weight, bias, state)
    parts = []
    for a, b in ((0, 1), (1, 3), (3, 67), (67, 90)):
        y, state = conv(x[:, a:b], weight, bias, state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, final)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("W", [2, 4, 7])
def test_update_in_place(device, W, T):
    x, weight, bias, state = make((3, T, 150, W), torch.bfloat16, device)
    expected, final = conv(x, weight, bias, state)
    strided = torch.zeros(3, 150, W + 1, dtype=torch.bfloat16, device=device)[..., 1:W]
    for place in (state.clone(), strided.copy_(state)):
        y = causal_conv1d_update(x, place, weight, bias)
        torch.testing.assert_close(y, expected)
        assert torch.equal(place, final)
    assert torch.equal(causal_conv1d_update(x, state.clone(), weight, bias), y)


def test_update_of_the_reference():
    x, weight, bias, state = make((3, 2, 20, 4), torch.bfloat16)
    expected, final = conv(x, weight, bias, state)
    with _library.use("reference"):
        torch.testing.assert_close(causal_conv1d_update(x, state, weight, bias), expected)
    assert torch.equal(state, final)


@pytest.mark.parametrize("first", [5, 8])
def test_strided_inputs(device, first):
    wide = normal(3, 70, 64).to(device).transpose(0, 1)  # [T, B, ...]: any batch and time strides
    x, weight = wide[:, :, first : first + 20].transpose(0, 1), normal(20, 4).to(device)
    expected = run(conv, (x.contiguous(), weight))
    for a, b in zip(run(conv, (x, weight)), expected, strict=True):
        assert all(map(torch.equal, a, b))
    last = x.mT.contiguous().mT  # the channels are not contiguous
    assert torch.equal(conv(last, weight)[0], expected[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(cpu_isa, dtype):
    for name in ("two_tokens", "three_tokens_widest", "three_taps", "next_block"):
        compare(conv, make(SHAPES[name], dtype))


def test_same_bits_for_any_number_of_threads(threads):
    x = make((2, 700, 40, 4))
    results = []
    for count in (1, 2, 8, 1):
        threads(count)
        outputs, grads = run(conv, x)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_every_element_is_written(device, nan_filled_memory):
    for shape in ((2, 3, 7, 8), (1, 70, 20, 4)):
        tensors = make(shape, device=device)
        outputs, grads = run(conv, tensors)
        assert all(t.isfinite().all() for t in (*outputs, *grads))
    x = make((1, 210, 37, 4), device=device, states=6)
    outputs, grads = run(conv, (*x, PACKED.to(device)))
    assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(activation, threads):
    threads(1)
    offsets = torch.tensor([0, 2, 2, 7])
    x = [t.requires_grad_() for t in make((1, 8, 3, 4), torch.float64, states=3)]
    assert torch.autograd.gradcheck(lambda *t: conv(*t, offsets, activation), x)


def test_activation_checkpointing():
    """It recomputes the saved tensors at the first look, and refuses a second one."""
    x = [t.requires_grad_() for t in make((2, 9, 5, 4))[:3]]
    wanted = torch.autograd.grad(causal_conv1d(*x)[0].sum(), x)
    y = checkpoint(lambda *t: causal_conv1d(*t)[0], *x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), x), wanted))


def test_no_second_derivative():
    x, weight = normal(1, 5, 3).requires_grad_(), normal(3, 4)
    (dx,) = torch.autograd.grad(causal_conv1d(x, weight)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d: the gradient of the gradient"):
        dx.sum().backward()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_opcheck(packed):
    require_kernel("causal_conv1d_fwd")
    ops = torch.ops.deltafuse
    x = [t.requires_grad_() for t in make((1, 9, 5, 4), states=2 if packed else 1)]
    offsets = torch.tensor([0, 4, 8]) if packed else None
    args = (*x, offsets, True)
    torch.library.opcheck(ops.causal_conv1d_fwd.default, (*args, True))
    torch.library.opcheck(
        ops.causal_conv1d_fwd.default, (x[0], x[1], None, None, None, True, False)
    )
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    for d_final in (None, torch.randn_like(args[3])):
        torch.library.opcheck(
            ops.causal_conv1d_bwd.default, (torch.randn_like(args[0]), d_final, *args)
        )
    if not packed:
        update = (args[0], args[3], args[1], args[2], True)
        torch.library.opcheck(ops.causal_conv1d_update.default, update)


BAD = {
    "x is 2-d": (lambda x, w, b, s: (x[0], w, b, s), ValueError, r"x must be \[B, T, D\]"),
    "weight of other channels": (lambda x, w, b, s: (x, w[1:], b, s), ValueError, r"\(4, 4\)"),
    "one tap": (lambda x, w, b, s: (x, w[:, :1], b, None), ValueError, "W in 2..8, got 1"),
    "short bias": (lambda x, w, b, s: (x, w, b[1:], s), ValueError, r"bias must be \[D\]"),
    "state of one row": (lambda x, w, b, s: (x, w, b, s[:1]), ValueError, r"initial_state"),
    "offsets with B = 2": (
        lambda x, w, b, s: (x, w, b, s, torch.tensor([0, 1])),
        ValueError,
        "cu_seqlens",
    ),
    "offsets beyond T": (
        lambda x, w, b, s: (x[:1], w, b, s[:1], torch.tensor([0, 7])),
        ValueError,
        r"cu_seqlens must rise from 0 to at most T = 6, got \[0, 7\]",
    ),
    "relu": (lambda x, w, b, s: (x, w, b, s, None, "relu"), ValueError, "activation"),
    "integers": (lambda x, w, b, s: (x.int(), w, b, s), TypeError, "floating point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        causal_conv1d(*change(*make((2, 6, 5, 4))))


def test_update_needs_the_state_in_the_dtype_of_x():
    x, weight, _, state = make((2, 1, 5, 4), torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype"):
        causal_conv1d_update(x, state.float(), weight)
