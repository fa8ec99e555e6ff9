"""TC, EC and the token shift against float64, and what must not leak or change between calls."""

import pytest
import torch
import torch.nn.functional as F

from ddl_time_cases import (
    LARGE,
    OPS,
    PACKED,
    SHAPES,
    SHIFTS,
    ec,
    make_ec,
    make_shift,
    make_tc,
    packed,
    piece,
    shift,
    tc,
)
from deltafuse import _library
from deltafuse.ddl import ddl_compress_tc, ddl_expand
from deltafuse.testing import assert_close
from layer_cases import DTYPES, LIMITS, compare, leaves, normal, run

each_op = pytest.mark.parametrize("name", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SINGLE = [torch.float32, torch.bfloat16]


@each_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions(device, name, dtype):
    for function, make in ((tc, make_tc), (ec, make_ec)):
        compare(function, [t.to(device) for t in make(SHAPES[name], dtype)])


@each_dtype
@pytest.mark.parametrize("name", LARGE)
def test_convolutions_beyond_blocks(name, dtype):
    compare(tc, make_tc(LARGE[name], dtype))
    compare(ec, make_ec(LARGE[name], dtype))


@each_dtype
@pytest.mark.parametrize("name", SHIFTS)
def test_shift(device, name, dtype):
    compare(shift, [t.to(device) for t in make_shift(SHIFTS[name], dtype)])


@each_op
def test_without_a_state(device, name):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make(shape)[:count]]
    compare(function, x)
    option = "output_cache" if name == "shift" else "output_final_state"
    compare(lambda *t: function(*t, **{option: False}), x)


@each_op
def test_without_sequences(device, name):
    function, make, shape, count = OPS[name]
    option = {"output_cache" if name == "shift" else "output_final_state": False}
    none = [t.to(device) for t in make((0, 5, *shape[2:]))[:count]]
    (y,), grads = compare(lambda *t: function(*t, **option), none)
    assert y.shape[:2] == (0, 5) and all(d.eq(0).all() for d in grads)
    padding = [t.to(device) for t in make((1, 5, *shape[2:]))[:count]]
    offsets = torch.tensor([0], device=device)
    (y,), grads = compare(lambda *t: function(*t, None, offsets, **option), padding)
    assert y.eq(0).all() and all(d.eq(0).all() for d in grads)


MIXED = {
    "float32 state": (torch.float32, torch.bfloat16),
    "bfloat16 state": (torch.bfloat16, torch.float32),
    "float64 weights": (torch.float16, torch.float64),
}


@each_op
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_mixed_dtypes(device, name, dtypes):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make(shape, dtypes[0])]
    x = [x[0], *(t.to(dtypes[1]) for t in x[1:count]), x[count].to(dtypes[1])]
    outputs, grads = run(function, x)
    with _library.use("reference"):
        expected, expected_grads = run(function, leaves(x, torch.float64))
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == dtypes[0]
        assert_close("output", a, b, LIMITS[dtypes[0]][0])
    for a, b, t in zip(grads, expected_grads, x, strict=True):
        assert a.dtype == t.dtype
        assert_close("gradient", a, b, max(LIMITS[t.dtype][1], LIMITS[dtypes[0]][1]))


def reference_tc(x, weight, read):
    """By torch's convolution, channels first."""
    B, T, d, dv = x.shape
    padded = F.pad(x.flatten(2).mT, (weight.shape[1] - 1, 0))
    mixed = F.conv1d(padded, weight[:, None], groups=d * dv).mT
    return mixed.reshape(B, T, d, dv) @ read


def test_reference_is_torchs_convolution():
    x, weight, read, _ = make_tc((2, 30, 6, 4, 4), torch.float64)
    e, taps, _ = make_ec((2, 30, 6, 3, 5), torch.float64)
    expected = F.conv1d(F.pad(e.mT, (4, 0)), taps, groups=6).mT.unflatten(2, (6, 3))
    with _library.use("reference"):
        torch.testing.assert_close(tc(x, weight, read)[0], reference_tc(x, weight, read))
        torch.testing.assert_close(ec(e, taps)[0], expected)


def test_reference_of_shift_is_the_two_token_sum():
    x, previous, current, cache = make_shift((2, 5, 3, 4), torch.float64)
    before = torch.cat([cache[:, None], x[:, :-1]], 1)
    expected = previous[..., None] * before + current[..., None] * x
    with _library.use("reference"):
        y, last = shift(x, previous, current, cache)
    torch.testing.assert_close(y, expected)
    assert torch.equal(last, x[:, -1])


@pytest.mark.parametrize("dtype", SINGLE, ids=str)
def test_expansion_with_identity_taps_is_the_copy(device, dtype):
    x = normal(2, 9, 20, dtype=dtype).to(device)
    weight = torch.zeros(80, 1, 4, device=device)
    weight[..., -1] = 1
    copy = ddl_expand(x)
    assert copy.shape == (2, 9, 20, 4) and copy.is_contiguous()
    assert torch.equal(copy, x[..., None].expand(2, 9, 20, 4))
    assert torch.equal(ddl_expand(x, weight), copy)
    # and the exact mean of the copies is what they were made of
    average = torch.full((4,), 0.25, device=device)
    assert torch.equal(ddl_compress_tc(copy, weight[:, 0], average), x)


def test_copy_has_an_empty_state_and_zeros_behind_the_last_sequence(device):
    x = normal(1, 9, 5).to(device)
    offsets = torch.tensor([0, 4, 7], device=device)
    y, state = ddl_expand(x, value_channels=3, cu_seqlens=offsets, output_final_state=True)
    assert y[:, :7].eq(x[:, :7, :, None]).all() and y[:, 7:].eq(0).all()
    assert state.shape == (2, 5, 0)


def test_one_tap_is_a_linear_read_out(device):
    x, weight, read, _ = (t.to(device) for t in make_tc((2, 9, 20, 4, 1)))
    W = weight.view(20, 4) * read
    assert_close("y", tc(x, weight, read)[0], torch.einsum("btij,ij->bti", x, W), 1e-6)


@each_op
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_packed_sequences(device, name, dtype, offsets):
    x = [t.to(device) for t in packed(name, dtype)]
    (y, _), (dx, *_) = compare(OPS[name][0], (*x, PACKED.to(device, offsets)))
    assert y[0, 24:].eq(0).all() and dx[0, 24:].eq(0).all()


@each_op
def test_packed_sequences_equal_single_calls(device, name):
    function, _, _, count = OPS[name]
    x = [t.to(device) for t in packed(name)]
    (y, final), (dx, *_) = run(function, (*x, PACKED.to(device)))
    for n, (a, b) in enumerate(zip(PACKED[:-1], PACKED[1:], strict=True)):
        y_n, final_n = function(*piece(name, x[:count], a, b), x[count][n : n + 1])
        assert torch.equal(y[:, a:b], y_n) and torch.equal(final[n : n + 1], final_n)


@each_op
def test_input_gradients_of_packed_sequences_equal_single_calls(device, name):
    function, _, _, count = OPS[name]
    x = [t.to(device) for t in packed(name)[:count]]
    y, d = function(*x, None, PACKED.to(device))[0], None
    d = normal(*y.shape).to(device)

    def gradient(tensors, d, **options):
        leaf = tensors[0].clone().requires_grad_()
        return torch.autograd.grad(function(leaf, *tensors[1:], **options)[0], leaf, d)[0]

    whole = gradient(x, d, cu_seqlens=PACKED.to(device))
    for a, b in zip(PACKED[:-1], PACKED[1:], strict=True):
        assert torch.equal(whole[:, a:b], gradient(piece(name, x, a, b), d[:, a:b]))


@each_op
def test_nan_stays_in_its_sequence_and_reach(device, name):
    function, _, _, count = OPS[name]
    x = [t.to(device) for t in packed(name)[:count]]
    clean = function(*x, None, PACKED.to(device))[0]
    for t, reach in ((5, 4), (20, 1)):  # within a sequence; its last token
        reach = min(reach, 2) if name == "shift" else reach
        dirty = x[0].clone()
        dirty[0, t, 1] = torch.nan
        y = function(dirty, *x[1:], None, PACKED.to(device))[0]
        hit = torch.zeros_like(y, dtype=torch.bool)
        hit[0, t : t + reach, 1] = True
        assert y[hit].isnan().all() and torch.equal(y[~hit], clean[~hit])


@each_op
@pytest.mark.parametrize("dtype", SINGLE, ids=str)
@pytest.mark.parametrize("first", [1, 2, 7])
def test_decoding_equals_the_whole(device, name, dtype, first):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make((2, 12, *shape[2:]), dtype)[:count]]
    whole, final = function(*x)
    parts, state = [], None
    for a, b in zip([0, *range(first, 12)], range(first, 13), strict=True):
        y, state = function(*piece(name, x, a, b), state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, final)


@each_op
def test_a_short_first_call_leaves_a_full_state(device, name):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make((2, 1, *shape[2:]))]
    state = function(*x[:count])[1]
    assert state.shape == x[count].shape
    if name != "shift":
        assert state[..., :-1].eq(0).all()
        assert torch.equal(state[..., -1], x[0].flatten(2)[:, 0])


@each_op
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding_mask(device, name, kind):
    function, make, shape, _ = OPS[name]
    x = [t.to(device) for t in make(shape)]
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, :3] = mask[1, 4] = False
    broken = x[0].clone()
    broken[~mask] = torch.nan  # whatever padding holds
    zeroed = x[0].masked_fill(~mask.view(2, 9, *[1] * (x[0].dim() - 2)), 0)
    y, state = function(broken, *x[1:], attention_mask=mask.to(kind))
    expected, expected_state = function(zeroed, *x[1:])
    assert y[~mask].eq(0).all() and torch.equal(y[mask], expected[mask])
    assert torch.equal(state, expected_state)


@each_op
def test_result_of_a_row_does_not_depend_on_the_others(device, name):
    function, make, shape, count = OPS[name]
    x = [t.to(device) for t in make((3, 9, *shape[2:]))]
    for results, single in zip(
        function(*x),
        function(*(t[1:2] if t.shape[0] == 3 else t for t in x)),
        strict=True,
    ):
        assert torch.equal(results[1:2], single)


def strided(t):
    """The same values in every layout that the operators have to take."""
    last, wide = t.mT.contiguous().mT, torch.cat([t, t], -1)
    yield "transposed", t.transpose(0, 1).contiguous().transpose(0, 1)
    yield "last dimension strided", last
    yield "slice", wide[..., : t.shape[-1]]
    yield "odd offset", torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    yield "every other", torch.stack([t, t], 1).flatten(0, 1)[::2]
    yield "channels first", t.movedim(2, 1).contiguous().movedim(1, 2)


@each_op
@pytest.mark.parametrize("dtype", SINGLE, ids=str)
def test_layouts(device, name, dtype):
    function, make, shape, count = OPS[name]
    tensors = [t.to(device) for t in make(shape, dtype)]
    outputs, grads = run(function, tensors)
    for i, t in enumerate(tensors):
        if t.dim() > 2:
            for layout, view in strided(t):
                assert torch.equal(view, t)
                got = run(function, [*tensors[:i], view, *tensors[i + 1 :]])
                for a, b in zip([*got[0], *got[1]], [*outputs, *grads], strict=True):
                    assert torch.equal(a, b), layout


@each_op
def test_layouts_of_gradients(device, name):
    function, make, shape, _ = OPS[name]
    tensors = [t.to(device).requires_grad_() for t in make(shape)]
    y, state = function(*tensors)
    dy, d_state = normal(*y.shape).to(device), normal(*state.shape).to(device)

    def gradients(*ds):
        return torch.autograd.grad((y, state), tensors, ds, retain_graph=True)

    expected = gradients(dy, d_state)
    for (layout, a), (_, b) in zip(strided(dy), strided(d_state), strict=True):
        assert all(map(torch.equal, gradients(a, b), expected)), layout
    ones = torch.ones_like(y), torch.ones_like(state)
    summed = torch.autograd.grad(y.sum() + state.sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, summed, gradients(*ones)))


@each_op
def test_expanded_inputs(device, name):
    function, make, shape, count = OPS[name]
    tensors = [t.to(device) for t in make(shape)]
    tensors[0] = tensors[0][:1].expand(2, *tensors[0].shape[1:])
    expected = function(tensors[0].contiguous(), *tensors[1:])
    assert all(map(torch.equal, function(*tensors), expected))


@each_op
def test_outputs_that_the_loss_ignores(device, name):
    function, make, shape, _ = OPS[name]
    tensors = [t.to(device).requires_grad_() for t in make(shape)]
    y, state = function(*tensors)
    both, only_y, only_state = (
        torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        for loss in (y.sum() + state.sum(), y.sum(), state.sum())
    )
    for a, b, c in zip(both, only_y, only_state, strict=True):
        torch.testing.assert_close(a, b if c is None else b + c)
    needed = torch.autograd.grad(function(tensors[0].detach(), *tensors[1:])[0].sum(), tensors[1])
    torch.testing.assert_close(needed[0], only_y[1])
