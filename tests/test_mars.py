"""MARS-AdamW: the compiled step against the reference, and its special cases."""

import pytest
import torch

from deltafuse import MARS, _library
from deltafuse.optim import functional

LR = 1e-3
SHAPES = {
    "empty": (0,),
    "scalar": (),
    "vector of one": (1,),
    "a vector less one": (1023,),
    "whole vectors": (1024,),
    "a vector more": (1025,),
    "one row": (1, 5000),
    "one column": (5000, 1),
    "odd matrix": (37, 53),
    "several chunks": (300, 401),
    "empty matrix": (0, 3),
    "three dimensions": (3, 4, 5),
}
OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "no clip, amsgrad, maximize": {"clip": None, "amsgrad": True, "maximize": True},
    "tight clip, gamma": {"clip": 0.1, "gamma": 0.05},
    "gamma 0": {"gamma": 0.0, "weight_decay": 0.1},
    "all tensors": {"optimize_1d": True, "clip": 0.1},
    "cautious": {"caution": "elementwise", "matrix_ndim": "ge2"},
    "cautious mean": {"caution": "mean", "optimize_1d": True},
    "group clip, first gradient": {"clip_scope": "group", "first_step": "grad"},
    "global clip, maximize": {"clip_scope": "global", "maximize": True},
    "half last_grad": {"last_grad_dtype": torch.bfloat16},
    "tensor rates": {
        "lr": torch.tensor(LR),
        "gamma": torch.tensor(0.05),
        "weight_decay": torch.tensor(0.1),
        "weight_decay_1d": None,
    },
}
# ten steps, absolute and relative to max|p|: float32 rounds p by up to two ulp a step
LIMIT = {torch.float64: (1e-12, 1e-15), torch.float32: (2e-5 * LR, 20 * 2.0**-23)}
ALL_SHAPES = tuple(SHAPES.values())
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """No fork for each of many small operations; the thread count has tests of its own."""
    threads(1)


def parameters(dtype=torch.float32, shapes=ALL_SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        yield g.to(p.dtype)


def train(params, optimizer, steps=10, first=0, scale=1.0):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(params, step, scale), strict=True):
            p.grad = g
        optimizer.step()
    return params


def everything(params, optimizer):
    """Copies of all parameters and state, for bitwise comparison."""
    tensors = [p.detach().clone() for p in params]
    for p in params:
        tensors += [optimizer.state[p][k].clone() for k in sorted(optimizer.state[p])]
    return tensors


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def assert_close(ours, expected, dtype):
    absolute, relative = LIMIT[dtype]
    for a, b in zip(ours, expected, strict=True):
        if a.numel():
            limit = absolute + relative * b.abs().max().item()
            assert (a.double() - b.double()).abs().max().item() <= limit, tuple(a.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_equals_float64_oracle(options, dtype):
    options = {"lr": LR, **options}
    params, exact = parameters(dtype), parameters(torch.float64)
    for p, q in zip(params, exact, strict=True):
        q.data.copy_(p.data)
    train(params, MARS(params, **options))
    oracle = MARS(exact, **options)
    with _library.use("reference"):
        for step in range(10):
            for q, g in zip(exact, gradients(params, step), strict=True):
                q.grad = g.double()
            oracle.step()
    assert_close(params, exact, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_float32_state(options, dtype):
    params, twins = parameters(dtype), parameters(dtype)
    ours, reference = MARS(params, **{"lr": LR, **options}), MARS(twins, **{"lr": LR, **options})
    train(params, ours)
    with _library.use("reference"):
        train(twins, reference)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=torch.finfo(dtype).eps, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = ours.state[p][name], reference.state[q][name]
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p_type", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("g_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(p_type, g_type):
    lists = []
    for _ in range(2):
        p = [q.detach() for q in parameters(p_type, [(37, 53), (1025,)])]
        state = torch.float64 if p_type == torch.float64 else torch.float32
        m, v = ([torch.zeros_like(q, dtype=state) for q in p] for _ in range(2))
        h = [torch.zeros_like(p[0], dtype=state)]
        steps = [torch.zeros(()) for _ in p]
        lists.append((p, [g.to(g_type) for g in gradients(p, 0)], m, v, h, [], steps))
    functional.mars_(*lists[0], lr=LR)
    functional.mars_reference_(
        *lists[1],
        **dict(lr=LR, beta1=0.95, beta2=0.99, eps=1e-8, weight_decay=0.0, gamma=0.025, clip=1.0),
        **dict(lr_1d=3e-3, beta1_1d=0.9, beta2_1d=0.95, weight_decay_1d=0.1),
    )
    for ours, expected in zip(lists[0], lists[1], strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1.6e-2 if a.dtype.itemsize == 2 else 1e-5, atol=1e-8
            )


def test_every_instruction_set(cpu_isa):
    params, twins = parameters(), parameters()
    train(params, MARS(params, lr=LR, amsgrad=True, caution="mean"))
    with _library.use("reference"):
        train(twins, MARS(twins, lr=LR, amsgrad=True, caution="mean"))
    assert_close(params, twins, torch.float32)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_gamma_and_clip_it_is_adamw(dtype, amsgrad, maximize):
    common = dict(lr=LR, betas=(0.9, 0.99), weight_decay=0.1, amsgrad=amsgrad, maximize=maximize)
    for options in ({"gamma": 0.0, "clip": None, "optimize_1d": True}, {"gamma": 0.0}):
        shapes = [(37, 53), (5000, 1), (7,) if "clip" in options else (3, 5)]
        params, twins = parameters(dtype, shapes), parameters(dtype, shapes)
        scale = 1.0 if "clip" in options else 1e-3  # norms below 1: the clip does nothing
        train(params, MARS(params, **common, **options), scale=scale)
        train(twins, torch.optim.AdamW(twins, **common), scale=scale)
        if dtype == torch.float64:
            for p, q in zip(params, twins, strict=True):
                assert (p - q).abs().max().item() <= 1e-14
        else:
            assert_close(params, twins, dtype)


def test_vectors_take_adamw_with_their_own_rates():
    params, twins = parameters(torch.float64, [(50,), ()]), parameters(torch.float64, [(50,), ()])
    train(params, MARS(params, lr=1e-2, lr_1d=2e-3, betas_1d=(0.8, 0.9), weight_decay_1d=0.3))
    train(twins, torch.optim.AdamW(twins, lr=2e-3, betas=(0.8, 0.9), weight_decay=0.3))
    for p, q in zip(params, twins, strict=True):
        assert (p - q).abs().max().item() <= 1e-14


def test_momentum_without_clip_is_a_mix_of_gradient_and_its_average():
    """m_t = gamma g_t + (1 - gamma) EMA(g)_t for the approximate variant."""
    params = parameters(torch.float64, [(13, 17)])
    gamma, beta = 0.05, 0.95
    optimizer = MARS(params, lr=LR, gamma=gamma, clip=None, betas=(beta, 0.99))
    average = torch.zeros_like(params[0])
    for step in range(20):
        g = next(gradients(params, step))
        train(params, optimizer, steps=1, first=step)
        average = beta * average + (1 - beta) * g
        mixed = gamma * g + (1 - gamma) * average
        assert (optimizer.state[params[0]]["exp_avg"] - mixed).abs().max() <= 1e-15


def test_constant_gradient_is_its_own_correction():
    """g_t = h_t gives c = g from the second step on, and from the first with first_step="grad"."""
    params = parameters(torch.float64, [(13, 17)])
    g = next(gradients(params, 0))
    for first in ("zero", "grad"):
        optimizer = MARS(params, lr=LR, clip=None, first_step=first)
        m = torch.zeros_like(g)
        for step in range(3):
            params[0].grad = g.clone()
            optimizer.step()
            factor = 1 + 0.025 * 0.95 / 0.05 if first == "zero" and step == 0 else 1
            m = 0.95 * m + 0.05 * factor * g
            assert (optimizer.state[params[0]]["exp_avg"] - m).abs().max() <= 1e-15


@pytest.mark.parametrize("maximize", [False, True])
def test_norm_of_the_corrected_gradient(maximize):
    """||c||^2 = (1+s)^2 ||g||^2 - 2 s (1+s) <g,h> + s^2 ||h||^2, in float64 for float32 tensors."""
    g, h = (torch.randn(301, 401) for _ in range(2))
    s = 0.025 * 0.95 / 0.05
    options = dict(gamma=0.025, beta1=0.95, maximize=maximize)
    ours = functional.mars_norm_([g, g[:0]], [h, h[:0]], **options)
    a, b = (-g.double() if maximize else g.double()), h.double()
    square = (
        (1 + s) ** 2 * a.square().sum() + s**2 * b.square().sum() - 2 * s * (1 + s) * (a * b).sum()
    )
    assert ours.dtype == torch.float64 and ours[1] == 0
    assert abs(ours[0] / square.sqrt() - 1) < 1e-6
    with _library.use("reference"):
        torch.testing.assert_close(
            ours, functional.mars_norm_([g, g[:0]], [h, h[:0]], **options), rtol=1e-6, atol=0
        )


def test_exact_variant_on_a_quadratic():
    """f = x'Ax/2 - xi'x: the staged gradient at the old weights gives c - g = s A (x_t - x_old)."""
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T
    x = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    optimizer = MARS([x], lr=1e-2, is_approx=False, clip=None)
    noise = [torch.randn(6, 5, dtype=torch.float64) for _ in range(6)]
    s, m, before = 0.025 * 0.95 / 0.05, torch.zeros_like(x), None
    for t in range(5):
        g = a @ x.detach() - noise[t]
        correction = torch.zeros_like(x) if before is None else a @ (x.detach() - before)
        c = (1 + s) * g if before is None else g + s * correction
        x.grad = a @ x.detach() - noise[t + 1]
        optimizer.update_previous_grad()
        assert x.grad is None
        before = x.detach().clone()
        x.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.update_last_grad()
        m = 0.95 * m + 0.05 * c
        assert (optimizer.state[x]["exp_avg"] - m).abs().max() < 1e-12


@pytest.mark.parametrize("maximize", [False, True])
def test_exact_variant_equals_reference(maximize):
    results = []
    for backend in ("native", "reference"):
        params = parameters(shapes=[(37, 53), (7,)])
        optimizer = MARS(params, lr=LR, is_approx=False, maximize=maximize)
        with _library.use(backend):
            for step in range(4):
                for p, g in zip(params, gradients(params, step + 1), strict=True):
                    p.grad = g.bfloat16().float()
                optimizer.update_previous_grad()
                train(params, optimizer, steps=1, first=step)
                optimizer.update_last_grad()
        results.append(params)
    assert_close(*results, torch.float32)


def test_staging_does_nothing_in_the_approximate_variant():
    params = parameters(shapes=[(3, 5)])
    optimizer = MARS(params)
    train(params, optimizer, 1)
    before = everything(params, optimizer)
    optimizer.update_previous_grad()
    optimizer.update_last_grad()
    assert params[0].grad is not None
    assert_same(everything(params, optimizer), before)


def test_differentiable_step_has_the_gradient_of_the_formula():
    def loss(lr, g):
        p = torch.ones(3, 2, dtype=torch.float64, requires_grad=True).clone()
        p.retain_grad()
        p.grad = g
        optimizer = MARS([p], lr=lr, differentiable=True)
        optimizer.step()
        return p

    g = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: loss(0.1, g), (g,))
    assert torch.autograd.gradcheck(lambda lr: loss(lr, g.detach()), (lr,))


def test_learns_a_regression():
    torch.manual_seed(0)
    x, target = torch.randn(256, 16), torch.randn(16, 4)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = MARS(model.parameters(), lr=1e-2, lr_1d=1e-2, weight_decay_1d=0.0)
    losses = []
    for _ in range(150):
        loss = (model(x) - (x @ target).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
