"""The members of the MARS family: against the oracle, torch.optim.Muon and Lion, and each other."""

import pytest
import torch

from deltafuse import MARS, _library
from deltafuse.bench.mars import parameter_sizes
from deltafuse.optim import MARS_M, MARSAdamW, MARSLion, MARSShampoo, matrix
from test_mars import LIMIT, LR, assert_close, assert_same, gradients, parameters, train

ELEMENTWISE = ["mars-adamw", "mars-lion", "mars-sgd"]
MATRIX = ["mars-shampoo", "mars-m"]
SHAPES = [(37, 53), (53, 37), (1025,), (), (300, 401), (0, 3), (37, 53)]
OPTIONS = {
    "defaults": {},
    "no clip": {"clip": None},
    "tight clip, gamma, maximize": {"clip": 0.1, "gamma": 0.05, "maximize": True},
    "cautious": {"caution": "elementwise"},
    "cautious mean, no clip": {"caution": "mean", "clip": None},
    "all tensors, amsgrad": {"optimize_1d": True, "amsgrad": True},
    "global clip": {"clip_scope": "global", "weight_decay": 0.1},
    "first gradient, no clip": {"first_step": "grad", "clip": None, "maximize": True},
    "exact": {"is_approx": False, "clip": None},
}
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def exact_matrices(kind):
    """Newton-Schulz in float64, so that only the elementwise part has a precision."""
    return {"ns_dtype": torch.float64} if kind in MATRIX else {}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ELEMENTWISE + MATRIX)
def test_step_equals_float64_oracle(kind, options):
    options = {"lr": LR, "mars_type": kind, **exact_matrices(kind), **options}
    params, exact = (parameters(torch.float64, SHAPES) for _ in range(2))
    ours, oracle = MARS(params, **options), MARS(exact, **options)
    for step in range(6):
        train(params, ours, 1, first=step)
        with _library.use("reference"):
            train(exact, oracle, 1, first=step)
        for optimizer in (ours, oracle):
            optimizer.update_previous_grad()
            optimizer.update_last_grad()
    assert_close(params, exact, torch.float64)


@pytest.mark.parametrize("kind", ELEMENTWISE + MATRIX)
def test_list_of_a_gpt_in_mixed_groups(kind, threads):
    """The 148 tensors of GPT-2 small, narrow, in groups of other options; and one large matrix."""
    threads(2)
    narrow = {"layers": 12, "width": 16, "vocabulary": 67, "context": 33}
    shapes = [*parameter_sizes(narrow), (2048, 4097)]
    results = []
    for backend in ("native", "reference"):
        params = parameters(torch.float64, shapes)
        groups = [
            {"params": params[::3], "weight_decay": 0.1, "clip": 0.2},
            {"params": params[1::3], "lr": 3e-3, "clip": None, "gamma": 0.05},
            {"params": params[2::3], "maximize": True, "optimize_1d": True},
        ]
        optimizer = MARS(groups, lr=LR, mars_type=kind, **exact_matrices(kind))
        params[-1].requires_grad_(kind in ELEMENTWISE)  # its products would take a minute
        with _library.use(backend):
            for step in range(2):
                for p, g in zip(params, gradients(params, step), strict=True):
                    p.grad = g if p.requires_grad else None
                optimizer.step()
        results.append(params)
    assert len(shapes) == 149
    assert_close(*results, torch.float64)


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_float32_step_is_within_the_bound_of_the_oracle(kind):
    params, exact = parameters(torch.float32, SHAPES), parameters(torch.float64, SHAPES)
    for p, q in zip(params, exact, strict=True):
        q.data.copy_(p.data)
    train(params, MARS(params, lr=LR, mars_type=kind))
    oracle = MARS(exact, lr=LR, mars_type=kind)
    for step in range(10):
        for q, g in zip(exact, gradients(params, step), strict=True):
            q.grad = g.double()
        oracle.step()
    absolute, relative = LIMIT[torch.float32]
    for p, q in zip(params, exact, strict=True):
        far = (p.double() - q).abs() > absolute + relative * q.abs().max() if q.numel() else q > 0
        # a momentum next to zero may have the other sign in float32
        assert far.sum() <= (q.numel() // 10_000 if kind == "mars-lion" else 0)


@pytest.mark.parametrize("kind", [*ELEMENTWISE[1:], *MATRIX])
def test_without_clip_the_last_gradient_is_folded_into_the_momentum(kind):
    """m_t = gamma g_t + b_t, b_t = b1 b_{t-1} + (1 - gamma) (1 - b1) g_t: the same steps."""
    shape = [(37, 53)]
    folded, stored = parameters(torch.float64, shape), parameters(torch.float64, shape)
    options = dict(lr=LR, mars_type=kind, gamma=0.05, **exact_matrices(kind))
    ours = MARS(folded, clip=None, **options)
    other = MARS(stored, clip=1e30, **options)
    train(folded, ours), train(stored, other)
    assert set(ours.state[folded[0]]) == {"step", "exp_avg_base"}
    assert set(other.state[stored[0]]) == {"step", "exp_avg", "last_grad"}
    torch.testing.assert_close(*folded, *stored, rtol=0, atol=1e-13)


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, written out."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                u = (b1 * m + (1 - b1) * p.grad).sign()
                p.sub_(group["lr"] * (group["weight_decay"] * p + u))
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


@pytest.mark.parametrize("b", [0.99, 0.9])
def test_lion_is_mars_lion_without_clip(b):
    gamma = 1 / 11
    params, twins = parameters(torch.float64, [(40, 7)]), parameters(torch.float64, [(40, 7)])
    options = dict(lr=LR, weight_decay=0.1)
    train(params, MARSLion(params, betas=(b, 0.0), gamma=gamma, clip=None, **options), 60)
    train(twins, Lion(twins, betas=(b * (1 - gamma), b), **options), 60)
    torch.testing.assert_close(*params, *twins, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_mars_m_without_clip(nesterov, rule):
    """gamma = 1 - mu is Nesterov momentum, gamma = 0 none: the same bfloat16 products follow."""
    mu, shapes = 0.95, [(37, 53), (64, 16)]
    params, twins = parameters(shapes=shapes), parameters(shapes=shapes)
    options = dict(lr=1e-2, weight_decay=0.1, adjust_lr_fn=rule)
    ours = MARS(
        params,
        betas=(mu, 0.99),
        gamma=1 - mu if nesterov else 0.0,
        clip=None,
        mars_type="mars-m",
        **options,
    )
    muon = torch.optim.Muon(twins, momentum=mu, nesterov=nesterov, **options)
    before = [p.detach().clone() for p in params]
    train(params, ours, 5), train(twins, muon, 5)
    for p, q, start in zip(params, twins, before, strict=True):
        # five iterations in bfloat16 on momenta that differ in the last bits of float32
        assert (p - q).norm() <= 2e-2 * (q - start).norm()


def test_muon_before_newton_schulz():
    mu = 0.95
    params = parameters(torch.float64, [(13, 17)])
    ours = MARS(
        params, betas=(mu, 0.99), gamma=1 - mu, clip=None, mars_type="m", ns_dtype=torch.float64
    )
    buffer, p = torch.zeros_like(params[0]), params[0].detach().clone()
    for step in range(8):
        g = next(gradients(params, step))
        train(params, ours, 1, first=step)
        buffer = mu * buffer + (1 - mu) * g
        u = matrix.newton_schulz((1 - mu) * g + mu * buffer, dtype=torch.float64)
        p = p - 3e-3 * 0.2 * 17**0.5 * u
        torch.testing.assert_close(params[0].detach(), p, rtol=0, atol=1e-14)


def test_sgd_without_gamma_and_clip_is_the_averaged_gradient():
    params, p = parameters(torch.float64, [(5, 7)]), None
    p, m = params[0].detach().clone(), torch.zeros(5, 7, dtype=torch.float64)
    optimizer = MARS(params, lr=0.1, mars_type="sgd", gamma=0.0, clip=None, weight_decay=0.2)
    for step in range(10):
        g = next(gradients(params, step))
        train(params, optimizer, 1, first=step)
        m = 0.95 * m + 0.05 * g
        p = p - 0.1 * (0.2 * p + m)
    torch.testing.assert_close(params[0].detach(), p, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 9, 11)], ids=str)
def test_newton_schulz_of_known_singular_values(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.01, 1, u.shape[-1], dtype=torch.float64)
    values = values / values.norm()
    x = matrix.newton_schulz(u * values @ vh, dtype=torch.float64)
    # the same singular vectors, and values between 0.68 and 1.14 from a hundredth of the norm on
    inner = u.mT @ x @ vh.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=1e-12)
    large = diagonal[..., values >= 0.01]
    assert (large > 0.67).all() and (large < 1.15).all()
    assert torch.equal(matrix.newton_schulz(torch.zeros(shape)), torch.zeros(shape).bfloat16())
    torch.testing.assert_close(matrix.polar(u * values @ vh), u @ vh, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [5, 256, 257, 300])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_symmetric_products_in_parts(batch, n):
    x = torch.randn(*batch, n, 40, dtype=torch.float64)
    product = matrix.symmetric_product(x, x.mT)
    torch.testing.assert_close(product, x @ x.mT, rtol=0, atol=1e-11)
    assert torch.equal(product, product.mT) or n < matrix.SMALLEST_HALVED


@pytest.mark.parametrize("steps", [5, None])
def test_shampoo_takes_a_function_of_the_momentum(steps):
    params = parameters(torch.float64, [(30, 12)])
    p, m = params[0].detach().clone(), torch.zeros(30, 12, dtype=torch.float64)
    optimizer = MARSShampoo(
        params, lr=0.1, clip=None, gamma=0.0, ns_steps=steps, ns_dtype=torch.float64
    )
    for step in range(3):
        m = 0.95 * m + 0.05 * next(gradients(params, step))
        train(params, optimizer, 1, first=step)
        u = matrix.polar(m) if steps is None else matrix.newton_schulz(m, 5, torch.float64)
        p = p - 0.1 * (30 / 12) ** 0.5 * u
    torch.testing.assert_close(params[0].detach(), p, rtol=0, atol=1e-12)


def test_matrix_members_take_adamw_for_other_tensors():
    shapes = [(7,), (2, 3, 4), (5, 6)]
    for kind in MATRIX:
        params, twins = parameters(torch.float64, shapes), parameters(torch.float64, shapes)
        train(params, MARS(params, mars_type=kind, optimize_1d=True))
        train(twins, MARSAdamW(twins, optimize_1d=True))
        assert_same([p.detach() for p in params[:2]], [q.detach() for q in twins[:2]])
        assert not torch.equal(params[2], twins[2])


def test_convolutions_are_flattened_if_asked():
    shape = (8, 3, 2, 2)
    params = parameters(torch.float64, [shape])
    twins = [torch.nn.Parameter(params[0].detach().flatten(1).clone())]
    options = dict(mars_type="mars-m", ns_dtype=torch.float64)
    train(params, MARS(params, matrix_ndim="ge2", flatten=True, **options), 3)
    train(twins, MARS(twins, **options), 3)
    torch.testing.assert_close(params[0].flatten(1), twins[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(8, 3, 2, 2\).*flatten"):
        MARS(params, matrix_ndim="ge2", **options)


@pytest.mark.parametrize("clip_c", [None, False])
def test_mars_m_is_two_groups(clip_c):
    shapes = [(6, 8), (8, 6), (7,), (9, 4)]
    params, twins = parameters(torch.float64, shapes), parameters(torch.float64, shapes)
    ours = MARS_M(lr=1e-2, muon_params=params[:2], adamw_params=params[2:], clip_c=clip_c, wd=0.2)
    clip = None if clip_c is False else 1.0
    options = dict(lr=1e-2, weight_decay=0.2)
    muon = MARS(twins[:2], mars_type="mars-m", betas=(0.95, 0.99), clip=clip, **options)
    adamw = torch.optim.AdamW(twins[2:], betas=(0.9, 0.95), eps=1e-8, **options)
    for step in range(4):
        train(params, ours, 1, first=step)
        for q, g in zip(twins, gradients(twins, step), strict=True):
            q.grad = g
        muon.step(), adamw.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
    assert len(MARS_M(adamw_params=params[2:]).param_groups) == 1


@pytest.mark.parametrize("kind", MATRIX)
def test_nothing_happens_to_matrices_when_the_scaler_found_inf(kind):
    params = parameters(shapes=[(6, 8), (5,)])
    optimizer = MARS(params, mars_type=kind)
    train(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, 1)
    assert_same([p.detach() for p in params], before)
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("kind", [*ELEMENTWISE[1:], *MATRIX])
@pytest.mark.parametrize("clip", [1.0, None])
def test_checkpoints_go_between_folded_and_stored_gradients(kind, clip):
    """A run that is resumed with the other kind of state goes on as if it had been so before."""
    options = dict(mars_type=kind, gamma=0.05, **exact_matrices(kind))
    huge = 1e30 if clip is None else None
    params, twins = parameters(torch.float64, [(6, 8)]), parameters(torch.float64, [(6, 8)])
    ours, other = MARS(params, clip=huge, **options), MARS(twins, clip=None, **options)
    train(params, ours, 3), train(twins, other, 3)
    resumed = MARS(params, clip=None, **options)
    resumed.load_state_dict(ours.state_dict())
    for group in resumed.param_groups:
        group["clip"] = None
    resumed.load_state_dict(resumed.state_dict() | {"state": ours.state_dict()["state"]})
    train(params, resumed, 3, first=3), train(twins, other, 3, first=3)
    torch.testing.assert_close(params[0], twins[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ELEMENTWISE + MATRIX)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_step_is_one_graph(kind, backend):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = parameters(shapes=[(37, 53), (7,)])
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 1e-2}]
        optimizer = MARS(groups, mars_type=kind, ns_dtype=torch.float32)
        step = optimizer.step
        if compiled:
            step = torch.compile(step, backend=backend, fullgraph=True)
        for i in range(3):
            for p, g in zip(params, gradients(params, i), strict=True):
                p.grad = g
            step()
        results.append([p.detach() for p in params])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if kind in ELEMENTWISE else 1e-5)
