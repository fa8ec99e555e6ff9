"""MARS as a torch.optim.Optimizer: groups, checkpoints, schedulers, GradScaler, bad input."""

import pytest
import torch

from deltafuse import MARS
from deltafuse.optim import split_decay_groups
from deltafuse.optim.sections import Section, by_device
from test_mars import assert_same, everything, gradients, parameters, train

SHAPES = [(37, 53), (1025,), (), (300, 401)]  # both paths, tails, more than one chunk
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_gradients_are_not_modified():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, maximize=True)
    train(params, optimizer, 1)
    assert_same([p.grad for p in params], list(gradients(params, 0)))


def test_zeroed_and_flat_gradient_buffers_equal_fresh_ones():
    """last_grad is a copy: writing into the old gradient's memory must not change it."""
    results = []
    for kind in ("fresh", "zeroed", "flat"):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params)
        flat = torch.zeros(sum(p.numel() for p in params))
        for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view(p.shape) if kind == "flat" else torch.zeros_like(p)
        for step in range(4):
            optimizer.zero_grad(set_to_none=kind == "fresh")
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g if kind == "fresh" else p.grad.add_(g)
            optimizer.step()
        results.append(everything(params, optimizer))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_stolen_gradients_equal_copied_ones():
    results = []
    for mode in ("copy", "steal"):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params, last_grad_mode=mode, maximize=True)
        train(params, optimizer, 4)
        results.append([p.detach() for p in params])
    assert_same(*results)
    assert optimizer.state[params[0]]["last_grad"].data_ptr() == params[0].grad.data_ptr()


def test_steal_notices_reused_memory():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, last_grad_mode="steal")
    train(params, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        optimizer.step()


def test_groups_have_hyper_parameters_of_their_own():
    values = {"lr": 1e-2, "gamma": 0.1, "clip": None, "betas": (0.8, 0.9), "eps": 1e-3}
    params, twins = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    grouped = MARS([{"params": params[:2]}])
    grouped.add_param_group({"params": params[2:], **values})
    train(params, grouped, 3)
    for part, options in ((twins[:2], {}), (twins[2:], {**values, "lr_1d": 1e-2})):
        optimizer = MARS(part, **options)
        for step in range(3):
            wanted = list(gradients(twins, step))
            for p, g in zip(part, wanted[2:] if options else wanted[:2], strict=True):
                p.grad = g
            optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_scheduler_scales_both_paths():
    params = parameters(torch.float64, [(5, 6), (7,)])
    optimizer = MARS(params, lr=1e-2, lr_1d=4e-3, weight_decay_1d=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    before = [p.detach().clone() for p in params]
    train(params, optimizer, 1)
    scheduler.step()
    # the first step of Adam is lr sign(g)
    for p, q, lr in zip(params, before, (5e-3, 2e-3), strict=True):
        torch.testing.assert_close((p - q).abs().max().item(), lr, rtol=1e-3, atol=0)


def test_rates_as_tensors_equal_numbers():
    results = []
    for wrap in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params, lr=wrap(1e-3), gamma=wrap(0.05), weight_decay=wrap(0.1))
        train(params, optimizer, 3)
        results.append(everything(params, optimizer))
    assert_same(*results)


def test_zero_constructor_lr_leaves_lr_1d_absolute():
    params = parameters(torch.float64, [(5, 6), (7,)])
    before = [p.detach().clone() for p in params]
    train(params, MARS(params, lr=0.0, lr_1d=1e-3), 1)
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])


def test_closure_returns_the_loss_and_absent_gradients_are_skipped():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    before = params[1].detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert params[1] not in optimizer.state and torch.equal(params[1], before)


def test_grad_scaler_skips_and_unscales():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    train(params, optimizer, 2)
    before = everything(params, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for first_step in ("zero", "grad"):
        optimizer.param_groups[0]["first_step"] = first_step
        scaler.scale(torch.zeros(()))  # creates the scale
        for p, g in zip(params, gradients(params, 2), strict=True):
            p.grad = g * 2.0**12
        params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        assert_same(everything(params, optimizer), before)
        scaler.update(2.0**12)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    plain = MARS(twins)
    plain.load_state_dict(optimizer.state_dict())
    for p, g in zip(params, gradients(params, 2), strict=True):
        p.grad = g * 2.0**12
    scaler.step(optimizer)
    train(twins, plain, 1, first=2)
    assert_same(everything(params, optimizer), everything(twins, plain))


@pytest.mark.parametrize("power", [-8, 3, 16])
def test_powers_of_two_as_loss_scale_change_no_bit(power):
    results = []
    for scale in (0, power):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params, first_step="grad")
        optimizer.grad_scale = torch.tensor(2.0**scale)
        train(params, optimizer, 3, scale=2.0**scale)
        results.append(everything(params, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("options", [{}, {"clip_scope": "group"}, {"caution": "mean"}], ids=str)
def test_bits_do_not_depend_on_threads_order_or_grouping(threads, options):
    results = []
    for count, arrange in ((1, "list"), (2, "list"), (16, "list"), (2, "reversed"), (2, "groups")):
        threads(count)
        params = parameters(shapes=SHAPES)
        given = params[::-1] if arrange == "reversed" else params
        if arrange == "groups" and not options.get("clip_scope"):
            given = [{"params": [p]} for p in params]
        optimizer = MARS(given, amsgrad=True, **options)
        train(params, optimizer, 3)
        results.append(everything(params, optimizer))
    for other in results[1:-2] if options.get("clip_scope") else results[1:]:
        assert_same(results[0], other)


def test_huge_gradients_are_clipped_to_norm_one():
    params = parameters(shapes=[(37, 53)])
    optimizer = MARS(params, betas=(0.0, 0.99), optimize_1d=True)
    train(params, optimizer, 1, scale=1e25)
    state = optimizer.state[params[0]]
    assert state["exp_avg"].isfinite().all() and params[0].isfinite().all()
    assert abs(state["exp_avg"].double().norm() - 1) < 1e-5


def bad_gradient(mode, **options):
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, nonfinite=mode, **options)
    train(params, optimizer, 1)
    before = [everything([p], optimizer) for p in params]
    for p, g in zip(params, gradients(params, 1), strict=True):
        p.grad = g
    params[0].grad[3, 4] = torch.nan
    return params, optimizer, before


def test_nan_stays_in_its_tensor():
    params, optimizer, _ = bad_gradient("propagate")
    optimizer.step()
    assert params[0].isnan().all() and all(p.isfinite().all() for p in params[1:])


@pytest.mark.parametrize("mode", ["copy", "steal"])
def test_nan_skips_its_tensor(mode):
    params, optimizer, before = bad_gradient("skip_tensor", last_grad_mode=mode)
    optimizer.step()
    assert_same(everything(params[:1], optimizer), before[0])
    assert all(optimizer.state[p]["step"] == 2 and p.isfinite().all() for p in params[1:])


def test_nan_skips_the_step():
    params, optimizer, before = bad_gradient("skip_step")
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert_same(everything([p], optimizer), b)


def test_nan_is_an_error():
    _, optimizer, _ = bad_gradient("error")
    with pytest.raises(RuntimeError, match=r"params\[0\] has NaN"):
        optimizer.step()


def test_dense_layouts_give_the_same_numbers():
    """Transposed, channels_last and strided parameters, gradients of other strides."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 5)
    wide = torch.randn(6, 10)
    makers = [
        (torch.randn(7, 5), lambda t: t.t().contiguous().t()),
        (image, lambda t: t.contiguous(memory_format=torch.channels_last)),
        (wide, lambda t: torch.cat([t, t], 1)[:, :10]),
    ]
    for values, layout in makers:
        results = []
        for make in (torch.clone, layout):
            p = torch.nn.Parameter(make(values))
            optimizer = MARS([p], optimize_1d=True)
            for step in range(3):
                g = next(gradients([p], step))
                p.grad = g if make is torch.clone else make(g)
                if step == 2:
                    p.grad = g.contiguous()
                optimizer.step()
            results.append(p.detach().contiguous())
        torch.testing.assert_close(*results, rtol=0, atol=2e-7)  # the norm's order differs


def test_complex_parameters_are_pairs():
    values = torch.randn(4, 5, dtype=torch.complex64)
    p, q = (
        torch.nn.Parameter(values.clone()),
        torch.nn.Parameter(torch.view_as_real(values).clone()),
    )
    options = dict(amsgrad=True, optimize_1d=True)
    ours, pairs = MARS([p], **options), MARS([q], **options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = torch.view_as_real(p.grad)
        ours.step(), pairs.step()
    assert torch.equal(torch.view_as_real(p.detach()), q)


def test_no_parameter_of_an_empty_tensor_is_touched_but_steps_count():
    params = parameters(shapes=[(0, 3), (0,)])
    optimizer = MARS(params)
    train(params, optimizer, 2)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_split_decay_groups():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.linear = torch.nn.Linear(4, 4)
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
            self.head = torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    decayed, others = split_decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert decayed["weight_decay"] == 0.1
    assert len(others["params"]) == 4 and others["weight_decay"] == others["weight_decay_1d"] == 0
    MARS(split_decay_groups(model, 0.1))
    assert len(split_decay_groups(torch.nn.LayerNorm(3), 0.1)) == 1


def test_operators_are_well_formed():
    p, g, m, v, h = ([torch.rand(5, 6)] for _ in range(5))
    section = Section(
        params=p,
        grads=g,
        exp_avgs=m,
        exp_avg_sqs=v,
        last_grads=h,
        state_steps=[torch.zeros(())],
        corrected=True,
        caution="mean",
        lr=1e-3,
        beta1=0.95,
        beta2=0.99,
        eps=1e-8,
        clip=1.0,
    )
    encoded = section.integers(), section.numbers()
    lists = p, g, m, v, [], h, [], [], section.state_steps
    opcheck = torch.library.opcheck
    opcheck(torch.ops.deltafuse.mars_, (*lists, *encoded, None, None, None, None, 0))
    opcheck(torch.ops.deltafuse.mars_squares, (g, h, [], *encoded, None, None))


def test_stolen_gradients_with_inf_are_not_kept():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, last_grad_mode="steal")
    train(params, optimizer, 1)
    before = everything(params, optimizer)
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, 1, scale=float("inf"))
    assert_same(everything(params, optimizer), before)


def test_sections_are_cut_by_device():
    def section(devices, name):
        tensors = [torch.zeros(2, device=device) for device in devices]
        return Section(params=tensors, grads=list(tensors), last_grads=list(tensors), rule=name)

    mixed, other = section(["cpu", "meta", "cpu"], "lion"), section(["meta"], "sgd")
    ((first, first_places), (second, second_places)) = by_device([mixed, other])
    assert [s.rule for s in first] == ["lion"] and [s.rule for s in second] == ["lion", "sgd"]
    assert first_places == [0, 2] and second_places == [1, 3]
    assert [s.device.type for s in (*first, *second)] == ["cpu", "meta", "meta"]
    assert all(len(s.params) == len(s.grads) == len(s.last_grads) for s in (*first, *second))
    assert first[0].params[1] is mixed.params[2] and not first[0].exp_avgs
    assert by_device([mixed.only([0])]) == [([mixed.only([0])], None)]
    assert by_device([]) == []


@pytest.mark.parametrize("options", [{"is_approx": False}, {"last_grad_mode": "steal"}], ids=str)
def test_grad_scaler_with_gradients_that_are_kept(options):
    """Scaled gradients that the state keeps are unscaled with the scale of their own step."""
    results = []
    for scaled in (False, True):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params, **options)
        for step in range(4):
            scale = 2.0 ** (step + 3) if scaled else 1.0
            if not options.get("is_approx", True):
                for p, g in zip(params, gradients(params, step + 1), strict=True):
                    p.grad = g * scale
                optimizer.update_previous_grad(grad_scale=scale if scaled else None)
            optimizer.grad_scale = torch.tensor(scale) if scaled else None
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g * scale
            optimizer.step()
            optimizer.update_last_grad()
        results.append([p.detach() for p in params])
    assert_same(*results)
