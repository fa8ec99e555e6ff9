"""Gradients of rotations: gradcheck, against the reference, in place, equal bits."""

import pytest
import torch

from deltafuse import _library, grape
from grape_rotary_cases import (
    BF16,
    CASES,
    DTYPES,
    F32,
    F64,
    LIMIT,
    PARAMETER,
    error,
    grid,
    heads,
    made,
    normal,
    uniform,
    widened,
)

ROUNDED = {F64: 0, F32: 1e-6, BF16: 8e-3, torch.float16: 1e-3}  # a gradient in its own dtype


def flat(options):
    """Real tensors of the arguments, by name; pairs apart."""
    named = {}
    for name, t in options.items():
        parts = {f"{name}.{i}": x for i, x in enumerate(t)} if isinstance(t, tuple) else {name: t}
        named.update({n: x for n, x in parts.items() if isinstance(x, torch.Tensor)})
    return {name: t for name, t in named.items() if t.is_floating_point()}


def gradients(q, k, options, weights=None, **more):
    """Gradients by name, of all real tensors; tables by position are taken as they are."""
    real = {"q": q, "k": k, **flat(options)}
    real = {name: t.detach().clone().requires_grad_() for name, t in real.items()}
    given = dict(options)
    for name, t in options.items():
        if isinstance(t, tuple):
            given[name] = tuple(real[f"{name}.{i}"] for i in range(len(t)))
        elif name in real:
            given[name] = real[name]
    q, k = real["q"], real["k"]
    if more.get("inplace"):
        q, k = q + 0, k + 0
    y = grape.rotary_qk(q, k, **given, **more)
    if weights is None:
        weights = [normal(*t.shape, seed=3 + i).round().to(t) for i, t in enumerate(y)]
    return dict(zip(real, torch.autograd.grad(y, list(real.values()), weights), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cases_against_the_reference(name, dtype):
    q, k, options = made(name, dtype)
    got = gradients(q, k, options)
    with _library.use("reference"):
        wanted = gradients(q.double(), k.double(), widened(options))
    given = {"q": q, "k": k, **flat(options)}
    for key in wanted:
        limit = max(LIMIT[dtype] if key in "qk" else PARAMETER[dtype], ROUNDED[given[key].dtype])
        assert got[key].dtype == given[key].dtype
        assert error(got[key], wanted[key]) <= limit, key


def double(*shape, seed=0):
    return uniform(*shape, seed=seed, dtype=F64).requires_grad_()


GRADCHECK = {
    "freqs": lambda: {"freqs": double(4)},
    "freqs of heads": lambda: {"freqs": double(2, 4)},
    "axes": lambda: {"freqs": double(4, 2), "position_ids": grid(1, 3, 2).expand(2, 3, 2)},
    "real axes": lambda: {"freqs": double(2, 4, 2), "position_ids": double(2, 3, 2)},
    "phase": lambda: {"phase": double(2, 3), "rotary_dim": 8},
    "phase of heads": lambda: {"phase": double(2, 3, 2), "freqs": double(4, seed=1)},
    "phase, freqs of heads": lambda: {"phase": double(2, 3), "freqs": double(2, 4, seed=1)},
    "shared positions": lambda: {"position_ids": double(3), "freqs": double(4, seed=1)},
    "factor": lambda: {"freqs": double(4), "attention_factor": 1.5},
    "tables": lambda: {"cos": double(5, 4), "sin": double(5, 4, seed=1)},
    "tables at positions": lambda: {
        "cos": double(9, 4),
        "sin": double(9, 4, seed=1),
        "position_ids": torch.tensor([0, 5, 5]),
        "attention_factor": 0.7,
    },
    "tables of tokens": lambda: {"cos": double(2, 3, 4), "sin": double(2, 3, 4, seed=1)},
    "shared tables": lambda: {"cos": double(1, 3, 4), "sin": double(1, 3, 4, seed=1)},
    "tables of two": lambda: {
        "cos": (double(1, 3, 4), double(1, 3, 4, seed=2)),
        "sin": (double(1, 3, 4, seed=1), double(1, 3, 4, seed=3)),
    },
}


BOTH = {"interleaved": True, "clockwise": True}


@pytest.mark.parametrize(
    "style, backend", [({}, "native"), (BOTH, "native"), ({}, "reference")], ids=str
)
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name, style, backend):
    options = GRADCHECK[name]()
    leaves = list(flat(options).values())
    q, k = (t.requires_grad_() for t in heads(B=2, T=3, Hq=4, Hk=2, D=9, dtype=F64))

    def function(q, k, *_):
        return grape.rotary_qk(q, k, **options, **style)

    with _library.use(backend):
        assert torch.autograd.gradcheck(function, (q, k, *leaves), atol=1e-6)


@pytest.mark.parametrize("given", ["q", "k", "freqs"])
def test_gradcheck_alone(given):
    tensors = dict(zip("qk", heads(T=3, D=8, dtype=F64), strict=True), freqs=uniform(4, dtype=F64))
    tensors[given].requires_grad_()

    def function(x):
        return grape.rotary_qk(tensors["q"], tensors["k"], freqs=tensors["freqs"])

    assert torch.autograd.gradcheck(function, (tensors[given],), atol=1e-6)


def test_gradcheck_of_fp32_angles():
    """The tables are float32, so steps are large; the gradient is that of the tables."""
    q, k = heads(T=3, D=8, dtype=F64)
    freqs = uniform(4).requires_grad_()
    y = grape.rotary_qk(q, k, freqs=freqs, angle="fp32")
    z = grape.rotary_qk(q, k, freqs=freqs)
    weights = [normal(*t.shape, dtype=F64) for t in y]
    (a,), (b,) = (torch.autograd.grad(t, freqs, weights) for t in (y, z))
    assert error(a, b) < 1e-5


def test_5_the_frequency_gradient_is_a_finite_difference():
    q, k = heads(T=5, D=8, dtype=F64)
    freqs = uniform(4, dtype=F64)
    options = dict(freqs=freqs.requires_grad_(), offsets=1000)
    loss = sum(t.sin().sum() for t in grape.rotary_qk(q, k, **options))
    (grad,) = torch.autograd.grad(loss, freqs)
    step = 1e-7
    for p in range(4):
        moved = []
        for sign in (1, -1):
            other = freqs.detach().clone()
            other[p] += sign * step
            y = grape.rotary_qk(q, k, freqs=other, offsets=1000)
            moved.append(sum(t.sin().sum() for t in y))
        assert abs((moved[0] - moved[1]) / (2 * step) - grad[p]) <= 1e-4 * abs(grad[p]) + 1e-3


IN_PLACE = [n for n in CASES if "table" not in n and n != "no plane"]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", IN_PLACE)
def test_6_in_place_has_the_gradients_of_out_of_place(name, dtype):
    q, k, options = made(name, dtype)
    out = gradients(q, k, options)
    got = gradients(q, k, options, inplace=True)
    assert all(torch.equal(out[key], got[key]) for key in out)


def test_6_in_place_through_views():
    """A packed projection is rotated in place: what lies beside it keeps its gradient."""
    x = normal(2, 7, 8, 16, seed=4)

    def run(inplace):
        leaf = x.clone().requires_grad_()
        qkv = leaf * 2
        q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
        q, k = grape.rotary_qk(q, k, inplace=inplace)
        q, k = (qkv[:, :, :4], qkv[:, :, 4:6]) if inplace else (q, k)
        loss = (q * q[:, :, :1]).sum() + (k.sin() * v).sum()
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(run(True), run(False))


def test_6_in_place_on_packed_tensors():
    """[total, H, D]: the view with a batch dimension is changed, the tensor itself is returned."""
    leaves = [normal(9, 4, 16).requires_grad_(), normal(9, 2, 16, seed=1).requires_grad_()]
    freqs, cu = uniform(8).requires_grad_(), torch.tensor([0, 4, 9])

    def run(inplace):
        q, k = (t * 1 for t in leaves)
        a, b = grape.rotary_qk(q, k, freqs=freqs, cu_seqlens=cu, inplace=inplace)
        assert not inplace or (a is q and b is k)
        return torch.autograd.grad(a.sin().sum() + b.cos().sum(), (*leaves, freqs))

    for a, b in zip(run(True), run(False), strict=True):
        assert error(a, b) <= 1e-6  # q and k are two calls, whose dfreqs are added afterwards


def test_in_place_changes_the_version():
    """What autograd has saved of q before the rotation must not be used after it."""
    q = normal(1, 3, 1, 4).requires_grad_() * 1
    square = q * q
    grape.rotary_qk(q, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_in_place_without_gradients_changes_the_version_too():
    weight = normal(1, 3, 1, 4).requires_grad_()
    for change in ("inplace", "output_cache"):
        q, k = normal(1, 3, 1, 4), normal(1, 3, 1, 4, seed=1)
        product = weight * k
        with torch.no_grad():
            options = {"inplace": True} if change == "inplace" else {"output_cache": k}
            grape.rotary_qk(q, k, **options)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def saved_bytes(call):
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return total


def test_fixed_frequencies_save_nothing_of_q_and_k():
    q, k = (t.requires_grad_() for t in heads(D=64, T=50))
    freqs = uniform(32)
    assert saved_bytes(lambda: grape.rotary_qk(q, k, freqs=freqs)) == 4 * 32
    learned = freqs.requires_grad_()
    both = 4 * (q.numel() + k.numel() + 32)
    assert saved_bytes(lambda: grape.rotary_qk(q, k, freqs=learned)) == both


def test_only_q_has_a_gradient():
    q, k = heads()
    q.requires_grad_()
    y_q, y_k = grape.rotary_qk(q, k)
    y_q.sum().backward()
    alone = torch.autograd.grad(grape.rotary_qk(q).sum(), q)[0]
    assert torch.equal(q.grad, alone)


def test_frequencies_of_long_sequences():
    """Sums over many tokens, partial sums included, stay accurate."""
    q, k = heads(B=1, T=3000, Hq=2, Hk=1, D=8)
    freqs = uniform(4)
    got = gradients(q, k, {"freqs": freqs})
    with _library.use("reference"):
        wanted = gradients(q.double(), k.double(), {"freqs": freqs.double()})
    assert error(got["freqs"], wanted["freqs"]) <= 1e-5


def test_same_bits_for_any_number_of_threads(threads):
    q, k = heads(B=2, T=300, D=32)
    options = {"freqs": uniform(2, 16), "phase": 9 * uniform(2, 300)}
    runs = []
    for count in (1, 2, 3, 1):
        threads(count)
        runs.append(gradients(q, k, options))
    for other in runs[1:]:
        assert all(torch.equal(other[key], runs[0][key]) for key in other)


@pytest.mark.parametrize("name", ["freqs of heads", "real axes", "tables of two", "odd D"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(cpu_isa, name, dtype):
    test_cases_against_the_reference(name, dtype)


def test_every_element_is_written(nan_filled_memory):
    for name in ("freqs of heads", "real axes", "tables of two", "odd D", "no plane"):
        grads = gradients(*made(name))
        assert all(g.isfinite().all() for g in grads.values())


def on(device, options):
    def move(t):
        if isinstance(t, tuple):
            return tuple(map(move, t))
        return t.to(device) if isinstance(t, torch.Tensor) else t

    return {name: move(t) for name, t in options.items()}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cases_on_a_gpu(name, dtype):
    q, k, options = made(name, dtype)
    got = gradients(q.cuda(), k.cuda(), on("cuda", options))
    with _library.use("reference"):
        wanted = gradients(q.double(), k.double(), widened(options))
    given = {"q": q, "k": k, **flat(options)}
    for key in wanted:
        limit = max(LIMIT[dtype] if key in "qk" else PARAMETER[dtype], ROUNDED[given[key].dtype])
        assert error(got[key].cpu(), wanted[key]) <= limit, key


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_is_captured_on_a_gpu():
    q, k = (t.cuda() for t in heads(D=64))
    freqs, offsets = uniform(32).cuda(), torch.tensor([3, 9], device="cuda")
    graph = torch.cuda.CUDAGraph()
    grape.rotary_qk(q, k, freqs=freqs, offsets=offsets)
    with torch.cuda.graph(graph):
        y = grape.rotary_qk(q, k, freqs=freqs, offsets=offsets)
    offsets.add_(1000)
    graph.replay()
    assert all(map(torch.equal, y, grape.rotary_qk(q, k, freqs=freqs, offsets=offsets)))
