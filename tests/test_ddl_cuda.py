"""The CUDA kernels of Deep Delta Learning's boundary: results, gradients, bits, edge cases."""

import pytest
import torch

from conftest import DEVICES
from ddl_cuda_cases import (
    BF16,
    F16,
    F32,
    FULL,
    GATES,
    OUTPUTS,
    call,
    check,
    make,
    on,
    relative,
    tracked,
)
from deltafuse import _library
from deltafuse.ddl import (
    ddl_boundary,
    ddl_compress,
    ddl_head,
    ddl_tail,
    delta_rewrite,
    delta_rewrite_,
    raw,
)

pytestmark = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)

# N, d, d_v
SHAPES = {
    "no tokens": (0, 8, 4),
    "one number": (1, 1, 1),
    "one feature, all channels": (2, 1, 16),
    "tail of one item, 3 channels": (2, 3, 3),
    "two warps of items": (33, 64, 1),
    "rows of 4 bytes": (2, 97, 2),
    "half an item": (3, 68, 4),
    "a feature an item": (2, 40, 8),
    "a feature with 16 channels": (2, 36, 16),
    "channels padded to 8": (2, 33, 5),
    "channels padded to 16": (2, 20, 11),
    "paper": (3, 768, 4),
    "eight warps": (2, 2048, 4),
    "one channel, wide": (2, 4096, 1),
}
PAIRS = [(state, act) for state in (F32, BF16, F16) for act in (F32, BF16, F16)]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_results_and_gradients(device, shape, dtype):
    check(device, make(*shape, dtype, dtype, dtype))


@pytest.mark.parametrize("state, act", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(2, 72, 4), (3, 97, 3), (2, 64, 1), (2, 24, 8)], ids=str)
def test_dtypes(device, shape, state, act):
    weights = {F32: BF16, BF16: F32, F16: F16}[state]
    check(device, make(*shape, state, act, weights))


OPTIONS = {
    "from context": (raw.Options(norm=True, v_from_context=True, **GATES), ()),
    "given gates": (raw.Options(norm=True, x_in=True), ("beta_erase",)),
    "k as it is": (raw.Options(norm=True, normalize_k=False, **GATES), ("beta_erase",)),
    "large k_eps": (raw.Options(norm=True, k_eps=0.7, v_scale=2.0, **GATES), ()),
    "rewrite alone": (
        raw.Options(),
        ("read", "norm", "W_v", "b_v", "W_beta", "b_beta", "beta_erase"),
    ),
    "compress": (
        raw.Options(x_in=True),
        ("k", "norm", "W_v", "b_v", "W_beta", "b_beta"),
    ),
    "mean": (raw.Options(x_in=True), ("k", "read", "norm", "W_v", "b_v", "W_beta", "b_beta")),
    "head": (raw.Options(norm=True), ("k",)),
    "head from context": (raw.Options(norm=True, v_from_context=True), ("k", "norm")),
    "tail": (raw.Options(norm=True, **GATES), ("W_v", "b_v", "W_beta", "b_beta")),
    "no weights": (
        raw.Options(norm=True, x_in=True, **GATES),
        ("read", "norm", "W_v", "b_v", "W_beta", "b_beta"),
    ),
    "no biases": (raw.Options(norm=True, **GATES), ("b_v", "b_beta", "norm")),
    "only beta is projected": (raw.Options(norm=True, **GATES), ("read", "W_v", "b_v")),
}


@pytest.mark.parametrize("shape", [(5, 48, 4), (3, 33, 1), (3, 21, 3)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, name, shape):
    options, without = OPTIONS[name]
    check(device, make(*shape, without=without), options)


@pytest.mark.parametrize("used", [*((name,) for name in OUTPUTS), ("c", "z_beta"), ("y", "x_in")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_absent_gradients(device, used, dtype):
    check(device, make(5, 48, 4, dtype, dtype), FULL, used)
    check(
        device, make(5, 48, 4, dtype, dtype, without=("k",)), FULL, used if used != ("y",) else ()
    )


def test_the_public_functions(device):
    given = on(device, make(6, 40, 4, BF16, BF16, without=("beta_erase",)))
    x, k, v, beta, _, *weights = given.values()
    bare = [x.view(2, 3, 40, 4), k.view(2, 3, 40), v.view(2, 3, 4), beta.view(2, 3)]
    calls = [
        lambda: (delta_rewrite(*bare, erase=False),),
        lambda: (ddl_compress(bare[0], weights[0]), ddl_compress(bare[0])),
        lambda: ddl_boundary(*bare, *weights, v_source="context", return_x_in=True),
        lambda: ddl_head(bare[0], *weights, out_dtype=F32),
        lambda: ddl_tail(bare[0], bare[1], None, bare[3], *weights[:2], v_constant=2.0),
    ]
    for run in calls:
        got = run()
        with _library.use("reference"):
            want = run()
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert relative(a.cpu(), b.double().cpu()) <= 5e-3
    y = delta_rewrite(*bare)
    assert delta_rewrite_(*bare) is bare[0] and torch.equal(bare[0], y)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(3, 768, 4), (4, 97, 3), (2, 40, 8), (1, 16384, 4)], ids=str)
def test_the_rewrite_has_the_same_bits_fused_and_alone(device, shape, dtype):
    given = on(device, make(*shape, dtype, dtype))
    fused = call(given)[0]
    alone = {**given, **dict.fromkeys(list(given)[5:])}
    assert torch.equal(call(alone, raw.Options(**GATES))[0], fused)
    out = torch.empty_like(fused)
    x, k, *gates = list(given.values())[:5]
    raw.rewrite_out(x, k, *gates, out, raw.Options(**GATES))
    assert torch.equal(out, fused)
    raw.rewrite_out(x, k, *gates, x, raw.Options(**GATES))
    assert torch.equal(x, fused)


@pytest.mark.parametrize("shape", [(700, 64, 4), (300, 384, 2)], ids=str)
def test_a_token_has_the_same_bits_anywhere(device, shape):
    given = on(device, make(*shape, BF16, BF16))
    everywhere, by_token = call(given), list(given)[:5]
    for rows in (slice(5, 6), slice(5, 260, 5), slice(200, None)):
        part = {name: t[rows] if name in by_token else t for name, t in given.items()}
        for got, want in zip(call(part), everywhere, strict=True):
            assert want.numel() == 0 or torch.equal(got, want[rows])


def test_more_tokens_than_the_grid_holds(device):
    check(device, make(6000, 8, 1))
    check(device, make(1100, 64, 4, BF16, BF16))


@pytest.mark.parametrize(
    "state, act, d, d_v", [(F32, F32, 16384, 4), (BF16, F32, 16384, 4), (F32, BF16, 9001, 11)]
)
def test_tokens_that_do_not_fit_into_shared_memory(device, state, act, d, d_v):
    check(device, make(2, d, d_v, state, act))


def test_too_many_features_are_an_error(device):
    with pytest.raises(RuntimeError, match="too large for the shared memory"):
        call(on(device, make(1, 70000, 1)))


@pytest.mark.parametrize("names", [("x",), ("k",), ("v", "beta", "beta_erase"), ("x", "k")])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_with_strides(device, names, offset):
    given = make(3, 48, 4, BF16, BF16)
    spaced = dict(given)
    for name in names:
        rows = given[name].view(3, -1)
        buffer = torch.full((3, rows.shape[1] + 24), float("nan")).to(rows.dtype)
        view = buffer[:, offset : offset + rows.shape[1]]
        view.copy_(rows)
        sizes = given[name].shape[1:]
        spaced[name] = view.unflatten(1, sizes) if sizes else view[:, 0]
    for got, want in zip(call(on(device, spaced)), call(on(device, given)), strict=True):
        assert torch.equal(got, want)
    check(device, spaced)


def test_expanded_and_transposed_inputs_and_gradients(device):
    given = make(5, 24, 4, F32, F32)
    shared = {**given, "v": given["v"][:1].expand(5, 4), "beta": given["beta"][:1].expand(5)}
    check(device, shared)
    first = {**given, "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    check(device, first)
    ours = tracked(on(device, given))
    y = raw.boundary(tuple(ours.values()), FULL)[0]
    (one,) = torch.autograd.grad(y.sum(), ours["x"], retain_graph=True)
    (other,) = torch.autograd.grad(y, ours["x"], torch.ones_like(y))
    assert torch.equal(one, other)


# ---- edge cases


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(3, 96, 4), (3, 31, 3)], ids=str)
def test_nothing_changes_where_k_or_beta_is_zero(device, shape, dtype):
    given = make(*shape, dtype, dtype, without=("beta_erase",))
    zero_k = {**given, "k": torch.zeros_like(given["k"])}
    for k_eps in (1e-2, 0.0):
        options = raw.Options(k_eps=k_eps, norm=True)
        ours = tracked(on(device, zero_k))
        results = raw.boundary(tuple(ours.values()), options)
        assert torch.equal(results[0], ours["x"])
        names = ("k", "v", "beta")
        grads = torch.autograd.grad(results[0].float().square().sum(), [ours[n] for n in names])
        assert grads[0].isfinite().all() and not grads[1].any() and not grads[2].any()
        assert k_eps > 0 or not grads[0].any()
    still = on(device, {**given, "beta": torch.zeros_like(given["beta"])})
    assert torch.equal(call(still, raw.Options())[0], still["x"])


@pytest.mark.parametrize("size", [1e20, 3e37, 1e-20, 1e-37])
def test_directions_beyond_the_range_of_their_square(device, size):
    given = make(3, 68, 4)
    given["k"][1] *= size
    wide = make(3, 68, 4)
    wide["k"][1] *= 1e3 if size > 1 else 1e-3
    small = raw.Options(k_eps=0.0, norm=True, x_in=True, **GATES)
    got, want = call(on(device, given), small, save=True), call(on(device, wide), small, save=True)
    for a, b in zip(got[:5], want[:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    check(device, {**given, "k": given["k"].clamp(-1e30, 1e30)}, small, ("y", "x_in"))


def test_logits_far_out_are_exact(device):
    given = make(4, 64, 4, without=("beta_erase",))
    given["v"][:2], given["v"][2:] = 1e4, -1e4
    given["beta"] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    ours = tracked(on(device, given))
    y = raw.boundary(tuple(ours.values()), raw.Options(**GATES))[0]
    plain = {**given, "v": (given["v"] > 0) * 4.0, "beta": (given["beta"] > 0) * 2.0}
    assert torch.equal(y, call(on(device, plain), raw.Options())[0])
    for grad in torch.autograd.grad(y.square().sum(), [ours["v"], ours["beta"]]):
        assert not grad.any()


@pytest.mark.parametrize("d_v", [4, 3])
def test_a_token_that_is_not_finite_stays_alone(device, d_v):
    given = make(300, 40, d_v)
    clean = call(on(device, given), save=True)
    for name, bad in (("x", float("inf")), ("k", float("nan")), ("k", float("inf"))):
        broken = {**given, name: given[name].clone()}
        broken[name][5, 7] = bad
        others = torch.arange(300) != 5
        for got, want in zip(call(on(device, broken), save=True), clean, strict=True):
            assert torch.equal(got[others.to(device)], want[others.to(device)])
            assert not got[5].isfinite().all()
        ours = tracked(on(device, broken))
        y, *_ = raw.boundary(tuple(ours.values()), FULL)
        for grad in torch.autograd.grad(y.sum(), list(ours.values())[:5]):
            assert grad[others.to(device)].isfinite().all()


def test_no_tokens_give_zero_gradients_of_the_weights(device):
    ours = tracked(on(device, make(0, 24, 4)))
    results = raw.boundary(tuple(ours.values()), FULL)
    assert [tuple(t.shape) for t in results] == [(0, 24, 4), (0, 24), (0, 24), (0, 4), (0,)]
    for grad in torch.autograd.grad(sum(t.sum() for t in results), list(ours.values())):
        assert not grad.any()


def test_float64_runs_the_reference(device):
    given = on(device, make(3, 4, 2, without=["beta_erase"]))
    rows = [given[name].double() for name in ("x", "k", "v", "beta")]
    y = delta_rewrite(*rows)
    with _library.use("reference"):
        assert torch.equal(y, delta_rewrite(*rows))
    assert torch.equal(delta_rewrite_(rows[0], *rows[1:]), y)


def test_new_memory_is_written_everywhere(device, nan_filled_memory):
    check(device, make(3, 33, 3, BF16, BF16))
    check(device, make(140, 48, 4))
