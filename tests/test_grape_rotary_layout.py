"""Memory layouts, neighbours, order of batch and heads, threads: the same bits (check 6)."""

import pytest
import torch

from deltafuse import grape
from grape_rotary_cases import BF16, CASES, DTYPES, F16, F32, heads, made, normal, tables, uniform

STYLES = [{}, {"interleaved": True}]
by_style = pytest.mark.parametrize("style", STYLES, ids=["half", "interleaved"])


def canaries(x, rotary):
    """x as a view with other numbers all around it, and a check that they are as they were."""
    B, T, H, D = x.shape
    buffer = torch.full((B, T + 2, H + 3, D + 5), 77.0).to(x.dtype)
    view = buffer[:, 1:-1, 1:-2, 3:-2]
    view.copy_(x)

    def untouched():
        rest = buffer.clone()
        rest[:, 1:-1, 1:-2, 3:-2][..., :rotary] = 77
        kept = x[..., rotary:]
        assert torch.equal(view[..., rotary:], kept)
        rest[:, 1:-1, 1:-2, 3:-2][..., rotary:] = 77
        return (rest == 77).all()

    return view, untouched


LAYOUTS = {
    "contiguous": torch.clone,
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
    "strided last": lambda t: torch.stack([t, t], -1)[..., 0],
    "odd offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@by_style
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_6_strides(layout, dtype, style):
    q, k = heads(D=48, T=5, dtype=dtype)
    plain = grape.rotary_qk(q, k, rotary_dim=40, **style)
    made = [LAYOUTS[layout](t) for t in (q, k)]
    got = grape.rotary_qk(*made, rotary_dim=40, **style)
    assert all(map(torch.equal, got, plain))
    assert torch.equal(made[0], q), "out of place leaves its inputs"
    same = grape.rotary_qk(*made, rotary_dim=40, inplace=True, **style)
    assert all(a is b for a, b in zip(same, made, strict=True))
    assert all(map(torch.equal, made, plain))


@by_style
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, width", [(16, 16), (21, 14), (40, 2), (13, 12)])
def test_6_nothing_around_is_touched(D, width, dtype, style):
    q, k = heads(D=D, dtype=dtype)
    plain = grape.rotary_qk(q, k, rotary_dim=width, **style)
    views, checks = zip(*(canaries(t, width) for t in (q, k)), strict=True)
    grape.rotary_qk(*views, rotary_dim=width, inplace=True, **style)
    assert all(map(torch.equal, views, plain))
    assert all(check() for check in checks)


def test_strides_of_gradients():
    q, k = heads(D=20)
    weights = [normal(*t.shape, seed=9) for t in (q, k)]
    results = []
    for change in LAYOUTS.values():
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        y = grape.rotary_qk(*leaves, freqs=uniform(8))
        results.append(torch.autograd.grad(y, leaves, [change(w) for w in weights]))
    ones = [t.clone().requires_grad_() for t in (q, k)]
    sum(t.sum() for t in grape.rotary_qk(*ones)).backward()  # expanded gradients
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", CASES)
def test_6_in_place_equals_out_of_place(name):
    for dtype in DTYPES:
        q, k, options = made(name, dtype)
        out = grape.rotary_qk(q, k, **options)
        grape.rotary_qk(q, k, **options, inplace=True)
        assert all(map(torch.equal, out, (q, k)))


@pytest.mark.parametrize("name", [n for n in CASES if n != "tables of two"])
def test_6_q_alone(name):
    q, k, options = made(name)
    assert torch.equal(grape.rotary_qk(q, **options), grape.rotary_qk(q, k, **options)[0])


@by_style
def test_6_varlen_is_sequence_by_sequence(style):
    q, k = heads(B=1, T=37)
    bounds = [0, 10, 10, 11, 37]
    packed = grape.rotary_qk(q, k, cu_seqlens=torch.tensor(bounds), **style)
    unbatched = grape.rotary_qk(q[0], k[0], cu_seqlens=torch.tensor(bounds), **style)
    assert all(torch.equal(a[0], b) for a, b in zip(packed, unbatched, strict=True))
    for start, end in zip(bounds, bounds[1:], strict=False):
        one = grape.rotary_qk(q[:, start:end], k[:, start:end], **style)
        assert all(torch.equal(a[:, start:end], b) for a, b in zip(packed, one, strict=True))


def test_6_order_of_batch_and_heads():
    q, k = heads(B=3, Hk=4)
    whole = grape.rotary_qk(q, k)
    back = grape.rotary_qk(q.flip(0).flip(2), k.flip(0).flip(2))
    assert all(torch.equal(a, b.flip(0).flip(2)) for a, b in zip(whole, back, strict=True))


def test_6_threads(threads):
    q, k = heads(B=2, T=200, D=64)
    runs = []
    for count in (1, 2, 5):
        threads(count)
        runs.append(grape.rotary_qk(q, k))
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))


def test_large_outputs_go_past_the_caches():
    """From 16 MB on, results are stored by other instructions: the same bits."""
    q, k = heads(B=1, T=1100, Hq=32, Hk=32, D=128)
    q[0, 5], k[0, 7] = 3, 4
    y = grape.rotary_qk(q, k)
    for part in (slice(0, 3), slice(1090, 1100)):
        small = grape.rotary_qk(q[:, part], k[:, part], offsets=part.start)
        assert all(torch.equal(a[:, part], b) for a, b in zip(y, small, strict=True))


@pytest.mark.parametrize("name", ["wide", "wide interleaved", "odd D", "real axes", "tables"])
def test_every_element_is_written(name, nan_filled_memory):
    q, k, options = made(name)
    assert all(t.isfinite().all() for t in grape.rotary_qk(q, k, **options))


@by_style
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("D", [128, 64, 32, 24, 6])
def test_16_bits_are_float32_rounded_once(D, dtype, style, cpu_isa):
    """Also where two elements go through a register as one word, special values included."""
    q, _ = heads(D=D, T=50, dtype=dtype)
    q[0, 1, 2, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    q[0, 2, 3, 1] = 1e-40
    wide = grape.rotary_qk(q.float(), **style)
    torch.testing.assert_close(
        grape.rotary_qk(q, **style), wide.to(dtype), rtol=0, atol=0, equal_nan=True
    )


def test_expanded_inputs_out_of_place():
    q, k = heads(B=1)
    many = grape.rotary_qk(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))
    one = grape.rotary_qk(q, k)
    assert all(torch.equal(a, b.expand(a.shape)) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (1, 0)])
def test_no_tokens(B, T):
    q, k = (t.requires_grad_() for t in heads(B=B, T=T))
    freqs = uniform(8).requires_grad_()
    y = grape.rotary_qk(q, k, freqs=freqs)
    assert [t.shape for t in y] == [q.shape, k.shape]
    grads = torch.autograd.grad(sum(t.sum() for t in y), (q, freqs))
    assert grads[0].shape == q.shape and grads[1].eq(0).all()
    empty = torch.zeros(T + 1, dtype=torch.int64)
    if B == 1:
        assert grape.rotary_qk(q, k, cu_seqlens=empty)[0].shape == q.shape
    assert (
        grape.rotary_qk(q, k, **tables(3, 8), position_ids=torch.zeros(1, T).long())[0].numel() == 0
    )


def test_shapes_of_one():
    """One head, one token: strides say nothing, shapes decide."""
    x = normal(1, 1, 1, 4)
    odd = x.as_strided((1, 1, 1, 4), (99, 98, 97, 1))
    assert torch.equal(grape.rotary_qk(odd, offsets=3), grape.rotary_qk(x, offsets=3))
    assert torch.equal(grape.rotary_qk(normal(2, 3, 1, 1), rotary_dim=0), normal(2, 3, 1, 1))


def test_nan_stays_in_its_plane():
    q, k = heads()
    q[0, 3, 1, 2] = float("nan")
    y, _ = grape.rotary_qk(q, k)
    assert y.isnan().sum() == 2 and y[0, 3, 1, [2, 10]].isnan().all()
