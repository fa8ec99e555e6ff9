"""Modules of multiplicative GRAPE: what they rotate by, streams, casts, copies, compilation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltafuse import grape
from deltafuse.grape import GrapeCache, GrapeM, GrapeMContext, GrapeMixture, RotaryEmbedding
from grape_rotary_cases import BF16, F32, F64, error, heads, normal, thetas, turned

H, D, C = 2, 16, 24
MODULES = {
    "m": lambda: GrapeM(H, D),
    "m frozen": lambda: GrapeM(H, D, learnable=False),
    "m of heads": lambda: GrapeM(H, D, share_across_heads=False),
    "ctx": lambda: GrapeMContext(H, D, C),
    "ctx of heads": lambda: GrapeMContext(H, D, C, gate="softplus", per_head=True),
    "mixture": lambda: GrapeMixture(H, D, 3),
}


def randomised(module, seed=0):
    """Parameters that no initialisation gives, frequencies near their own."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            p.add_(normal(*p.shape, seed=seed + i), alpha=3.0 if name == "log_freq" else 0.3)
    return module


def inputs(T=7, B=2, dtype=F32):
    """q, k and the input that a phase is computed from."""
    return *heads(B, T, 2 * H, H, D, dtype), normal(B, T, C, seed=5, dtype=dtype)


def rotate(module, q, k, hidden, cache=None):
    extra = (hidden,) if isinstance(module, GrapeMContext) else ()
    return module(q, k, *extra, cache=cache)


def logits(q, k):
    return torch.einsum("bihgd,bjhd->bhgij", q.unflatten(2, (k.shape[2], -1)), k) * D**-0.5


# GRAPE-M


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("learnable", [True, False])
def test_frequencies_start_as_those_of_rope(learnable, share):
    m = GrapeM(3, D, 500.0, learnable, share)
    scale = 16 if learnable else 1
    assert m.log_freq.shape == ((D // 2,) if share else (3, D // 2))
    assert m.log_freq.requires_grad is learnable
    expected = (thetas(D, 500.0).log() * scale).expand_as(m.log_freq)
    assert error(m.log_freq, expected) < 1e-7
    assert error(m.freq, thetas(D, 500.0).expand_as(m.freq)) < 1e-7


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("flags", [{}, {"clockwise": False}, {"interleaved": True}], ids=str)
def test_m_turns_every_plane_by_position_times_frequency(share, flags):
    m = randomised(GrapeM(H, D, share_across_heads=share, **flags)).double()
    q, k, _ = inputs(dtype=F64)
    theta = torch.exp(m.log_freq / 16).detach()
    flags = {"clockwise": True, **flags}
    for x, y in zip((q, k), m(q, k, offset=5), strict=True):
        rows = theta if share else theta.repeat_interleave(x.shape[2] // H, 0)
        angle = torch.arange(5, 12)[:, None, None] * rows
        assert error(y, turned(x, angle.expand(2, 7, -1, -1), **flags)) < 1e-12
    assert torch.equal(m(q, offset=5), m(q, k, offset=5)[0])
    assert torch.equal(m(q, positions=torch.arange(5, 12)), m(q, offset=5))


def test_gradient_of_log_freq():
    m = randomised(GrapeM(H, D)).double()
    q, k, _ = inputs(dtype=F64)
    loss = sum((y * normal(*y.shape, seed=9)).sum() for y in m(q, k))
    log_freq = m.log_freq.detach().clone().requires_grad_()
    angle = (torch.arange(7)[:, None, None] * torch.exp(log_freq / 16)).expand(2, 7, 1, -1)
    expected = sum(
        (turned(x, angle, clockwise=True) * normal(*x.shape, seed=9)).sum() for x in (q, k)
    )
    assert abs(loss - expected) < 1e-11
    wanted, got = (
        torch.autograd.grad(e, p)[0] for e, p in ((expected, log_freq), (loss, m.log_freq))
    )
    assert error(got, wanted) < 1e-12


def test_packed_sequences_are_the_sequences():
    m, q = GrapeM(H, D), normal(11, H, D)
    y = m(q, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    for start, end in ((0, 4), (4, 11)):
        assert torch.equal(y[start:end], m(q[None, start:end])[0])


@pytest.mark.parametrize("name", ["m", "m of heads", "mixture"])
def test_check_3_logits_stay_under_a_common_shift(name):
    m = randomised(MODULES[name](), 3)
    q, k, _ = inputs()
    with torch.no_grad():
        near, far = (logits(*m(q, k, offset=offset)) for offset in (0, 1_000_000))
    assert (near - far).abs().max() < 2e-5


def test_norm_with_a_gain_belongs_before_the_rotation():
    m, gain = GrapeM(H, D), 1 + normal(D).abs()
    q, k, _ = inputs()

    def norm(x):
        return F.rms_norm(x, (D,), gain)

    def moved(order):
        return (logits(*order(0)) - logits(*order(3))).abs().max()

    with torch.no_grad():
        assert moved(lambda start: m(norm(q), norm(k), offset=start)) < 5e-6
        assert moved(lambda start: map(norm, m(q, k, offset=start))) > 0.1


# contextual phase


@pytest.mark.parametrize(
    "gate, first",
    [("sigmoid", 1 / (1 + math.exp(6.9072 / 16))), ("softplus", 1e-3), ("none", 1.0)],
)
def test_gates_start_where_the_repository_does(gate, first):
    m = GrapeMContext(H, D, C, gate=gate)
    hidden = normal(2, 5, C)
    assert m.omega(hidden).shape == (2, 5)
    assert (m.omega(hidden) / first - 1).abs().max() < 1e-4
    m = randomised(GrapeMContext(H, D, C, gate=gate, per_head=True, omega_scale=2.0))
    z = hidden.double() @ m.omega_proj.weight.double().T + m.omega_proj.bias.double()
    wanted = {"sigmoid": torch.sigmoid(z / 2), "softplus": F.softplus(z), "none": z}[gate]
    assert m.omega(hidden).shape == (2, 5, H) and error(m.omega(hidden), wanted) < 1e-6


def test_check_7_omega_of_one_is_the_position():
    q, k, hidden = inputs(40)
    turned_by_phase = GrapeMContext(H, D, C, gate="none")(q, k, hidden)
    for x, y in zip(turned_by_phase, GrapeM(H, D)(q, k), strict=True):
        assert error(x, y) < 2e-7


@pytest.mark.parametrize("per_head", [False, True])
def test_phase_is_the_sum_of_what_lies_before(per_head):
    m = randomised(GrapeMContext(H, D, C, gate="softplus", per_head=per_head)).double()
    q, k, hidden = inputs(dtype=F64)
    omega = m.omega(hidden) if per_head else m.omega(hidden)[..., None]
    angle = (omega.cumsum(1) - omega)[..., None] * m.freq
    for x, y in zip((q, k), m(q, k, hidden), strict=True):
        repeated = angle.repeat_interleave(x.shape[2] // angle.shape[2], 2)
        assert error(y, turned(x, repeated, clockwise=True)) < 1e-11


def test_phase_starts_anew_with_every_packed_sequence():
    m = randomised(GrapeMContext(H, D, C))
    q, hidden = normal(11, H, D), normal(11, C)
    y = m(q, None, hidden, cu_seqlens=torch.tensor([0, 4, 11]))
    for start, end in ((0, 4), (4, 11)):
        assert torch.equal(y[start:end], m(q[None, start:end], None, hidden[None, start:end])[0])


def test_gradient_of_the_gate_is_the_finite_difference():
    m = randomised(GrapeMContext(H, D, C, gate="softplus")).double()
    q, k, hidden = inputs(4, 1, dtype=F64)

    def f(hidden, weight, log_freq):
        values = {"omega_proj.weight": weight, "log_freq": log_freq}
        return torch.func.functional_call(m, values, (q, k, hidden))

    given = (hidden, m.omega_proj.weight, m.log_freq)
    # the phase is rounded to 2^-40: its slope is not seen below some step
    given = [t.detach().clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(f, given, eps=1e-4, atol=1e-4)


def test_phase_is_computed_in_float32_under_autocast():
    m, (q, k, hidden) = randomised(GrapeMContext(H, D, C)), inputs()
    plain = m(q, k, hidden)
    with torch.autocast("cpu", dtype=BF16):
        for x, y in zip(m(q, k, hidden), plain, strict=True):
            assert torch.equal(x, y)


# mixture


@pytest.mark.parametrize("rank", [1, 3, D // 2])
def test_mixture_starts_as_clockwise_rope_on_its_channels(rank):
    q, k, _ = inputs()
    wanted = grape.rotary_qk(q, k, rotary_dim=2 * rank, clockwise=True)
    for x, y in zip(GrapeMixture(H, D, rank)(q, k), wanted, strict=True):
        assert error(x, y) < 1e-6


def test_mixture_is_the_matrix_exponential_of_its_planes():
    m = randomised(GrapeMixture(H, D, 3)).double()
    q, k, _ = inputs(dtype=F64)
    L = torch.einsum("hr,hri,hrj->hij", m.omega, m.a, m.b)
    t = torch.arange(4, 11)[:, None, None, None]
    G = torch.linalg.matrix_exp(t * (L - L.mT))
    loss = 0
    for x, y in zip((q, k), m(q, k, offset=4), strict=True):
        full = torch.einsum("thij,bthj->bthi", G.repeat_interleave(x.shape[2] // H, 1), x)
        assert error(y, full) < 1e-12
        loss = loss + torch.stack([y.square().tanh().sum(), full.square().tanh().sum()])
    names, params = zip(*m.named_parameters(), strict=True)
    ours, wanted = (torch.autograd.grad(e, params, retain_graph=True) for e in loss)
    for name, x, y in zip(names, ours, wanted, strict=True):
        assert error(x, y) < 1e-9, name


# streams


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", MODULES)
def test_check_12_a_stream_has_the_numbers_of_one_call(name, chunk):
    """The rotated q and k, and what attention makes of them from the cache."""
    m, T = randomised(MODULES[name]()), 66
    q, k, hidden = inputs(T)
    v = normal(2, T, H, 5)
    with torch.no_grad():
        full_q, full_k = rotate(m, q, k, hidden)
        cache, rotated, out = GrapeCache(), [], []
        for start in range(0, T, chunk):
            part = slice(start, start + chunk)
            q_part, k_part = rotate(m, q[:, part], k[:, part], hidden[:, part], cache)
            kept_k, kept_v = cache.append(k_part, v[:, part])
            rotated.append(q_part)
            assert len(cache) == cache.position == min(start + chunk, T)
            out.append(attend(q_part, kept_k, kept_v))
    # omega of one token, or of many, is a matrix product, and so is the reference of a mixture
    limit = 1e-6 if name.startswith(("ctx", "mixture")) else 0
    assert error(torch.cat(rotated, 1), full_q) <= limit
    assert error(kept_k, full_k) <= limit and torch.equal(kept_v, v)
    assert error(torch.cat(out, 1), attend(full_q, full_k, v)) < 2e-6


def attend(q, k, v):
    """Causal attention of the last tokens of k."""
    scores = logits(q, k)
    T, S = scores.shape[-2:]
    hide = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    weights = scores.masked_fill(hide, -math.inf).softmax(-1)
    return torch.einsum("bhgij,bjhd->bihgd", weights, v).flatten(2, 3)


def test_check_7_phase_of_a_stream_is_bitwise_that_of_one_call(monkeypatch):
    omega = normal(2, 66).sigmoid()
    q, hidden = normal(2, 66, H, D), torch.arange(66.0).expand(2, 66)[..., None].expand(-1, -1, C)
    m = GrapeMContext(H, D, C)
    monkeypatch.setattr(m, "omega", lambda h: omega[:, int(h[0, 0, 0]) :][:, : h.shape[1]])
    full = m(q, None, hidden)
    for chunk in (1, 7, 64):
        cache, parts = GrapeCache(), []
        for start in range(0, 66, chunk):
            part = slice(start, start + chunk)
            parts.append(m(q[:, part], None, hidden[:, part], cache))
        assert torch.equal(torch.cat(parts, 1), full)


def test_cache_keeps_gradients_and_grows_without_them():
    k, v = (normal(2, 5, H, D, seed=s).requires_grad_() for s in (0, 1))
    cache = GrapeCache()
    cache.append(k[:, :2], v[:, :2])
    both = cache.append(k[:, 2:], v[:, 2:])
    assert all(torch.equal(x, y) for x, y in zip(both, (k, v), strict=True))
    assert torch.autograd.grad(both[0].sum(), k)[0].eq(1).all()
    with torch.no_grad():
        more = cache.append(k[:, :1], v[:, :1])[0]
        assert torch.equal(more, torch.cat((k, k[:, :1]), 1))
        grown = {cache.append(k[:, i : i + 1], v[:, :1])[0].data_ptr() for i in (1, 2, 3)}
    assert len(grown) == 1 and len(cache) == 9
    cache.position, cache.phase = 3, torch.zeros(2)
    cache.reset()
    assert len(cache) == cache.position == 0 and cache.phase is None


# casts, copies, checkpoints


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("cast", [lambda m: m.to(BF16), lambda m: m.half()], ids=["to", "half"])
def test_check_15_parameters_stay_float32_without_a_detour(name, cast):
    m = randomised(MODULES[name]())
    before = copy.deepcopy(m.state_dict())
    parent = cast(nn.ModuleList([m, nn.Linear(2, 2)]))
    assert parent[1].weight.dtype in (BF16, torch.float16)
    for key, value in m.state_dict().items():
        assert value.dtype == F32 and torch.equal(value, before[key]), key
    q, k, hidden = (t.to(parent[1].weight.dtype) for t in inputs())
    for x, y in zip(rotate(m, q, k, hidden), (q, k), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
    assert all(p.dtype == F64 for p in m.double().parameters())


@pytest.mark.parametrize("name", MODULES)
def test_check_15_copies_and_checkpoints(name):
    m, given = randomised(MODULES[name]()), inputs()
    wanted = rotate(m, *given)
    fresh = MODULES[name]()
    fresh.load_state_dict(m.state_dict())
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), fresh):
        for x, y in zip(rotate(other, *given), wanted, strict=True):
            assert torch.equal(x, y)
        assert repr(other) == repr(m)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("m", ["log_freq"]),
        ("ctx", ["log_freq", "omega_proj.weight", "omega_proj.bias"]),
        ("mixture", ["a", "b", "omega"]),
    ],
)
def test_parameters_have_the_repositorys_names(name, keys):
    assert list(MODULES[name]().state_dict()) == keys


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"m frozen"}))
def test_gradients_reach_every_parameter(name):
    m = randomised(MODULES[name]())
    q, k = rotate(m, *inputs())
    logits(q, k).square().sum().backward()
    for key, p in m.named_parameters():
        assert p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["m", "ctx", "mixture"])
def test_check_15_compiles_as_one_graph(name):
    torch._dynamo.reset()
    m = randomised(MODULES[name]())
    compiled = torch.compile(lambda *a: rotate(m, *a), fullgraph=True, backend="aot_eager")
    for T in (7, 9, 11):
        given = inputs(T)
        got, wanted = compiled(*given), rotate(m, *given)
        assert all(error(x, y) < 1e-6 for x, y in zip(got, wanted, strict=True))
        grads = [
            torch.autograd.grad(logits(*y).square().sum(), list(m.parameters()))
            for y in (got, wanted)
        ]
        assert all(error(x, y) < 1e-5 for x, y in zip(*grads, strict=True))


Q, K, X = inputs()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GrapeM(0, D), "n_head must be at least 1, got 0"),
        (lambda: GrapeM(H, 15), "head_dim must be even, got 15"),
        (lambda: GrapeM(H, D, log_freq_scale=0), "log_freq_scale must be above 0, got 0"),
        (lambda: GrapeM(H, D)(Q, K, offset=2, cache=GrapeCache()), "give cache or offset"),
        (lambda: GrapeM(H, D)(Q, positions=torch.ones(7), offset=2), "position_ids or offsets"),
        (lambda: GrapeM(3, D, share_across_heads=False)(Q, K), "3 heads, which do not divide"),
        (lambda: GrapeMContext(H, D, 0), "hidden_size must be at least 1"),
        (lambda: GrapeMContext(H, D, C, gate="relu"), "gate must be 'sigmoid' or"),
        (lambda: GrapeMContext(H, D, C, omega_scale=-1), "omega_scale must be above 0, got -1"),
        (lambda: GrapeMContext(H, D, C)(Q, K, X[:, 1:]), "hidden must be"),
        (lambda: GrapeMixture(H, D, 9), "2 rank must be at most head_dim = 16, got rank 9"),
        (lambda: GrapeMixture(3, D, 2)(Q, K), "heads must be a multiple of n_head = 3, got 4"),
        (lambda: GrapeMixture(H, D, 2)(Q, positions=Q[0, :, 0, 0], cache=GrapeCache()), "not both"),
        (lambda: RotaryEmbedding(7), "dim must be even"),
        (lambda: RotaryEmbedding(8, scale_base=0), "scale_base must be above 0, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cache_names_what_does_not_continue_it():
    cache = GrapeCache()
    cache.append(K, K)
    for k, v in ((K[:1], K[:1]), (K.double(), K), (K[:, :, :1], K), (K, K[:, :2])):
        with pytest.raises(ValueError, match=r"GrapeCache: (k|v) must"):
            cache.append(k, v)
    assert len(cache) == 7
