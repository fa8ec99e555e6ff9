"""Repeated steps of MARS: the kernel keeps the tensors, and whatever changes is noticed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from deltafuse import MARS, _library
from test_mars import assert_same, everything, gradients, parameters

SHAPES = [(37, 53), (1025,), (), (30, 41)]
OPTIONS = {
    "defaults": {},
    "amsgrad, cautious": {"amsgrad": True, "caution": "mean"},
    "lion without clip": {"mars_type": "mars-lion", "clip": None},
    "8 bits": {"state_bits": 8, "optimize_1d": True},
    "finite or nothing": {"nonfinite": "skip_step", "maximize": True},
    "rates as tensors": {"lr": torch.tensor(1e-3), "gamma": torch.tensor(0.05)},
}
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def full_steps(monkeypatch):
    """How many steps there were that looked everything up."""
    seen = []
    full = MARS._full_step
    monkeypatch.setattr(MARS, "_full_step", lambda *args: seen.append(1) or full(*args))
    return seen


def take(params, optimizer, step):
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g
    optimizer.step()


def change_and_compare(change, options):
    """Five steps, `change(optimizer, params)` after the second, against steps without plans."""
    results = []
    for planned in (True, False):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params, **{"lr": 1e-3, **copy.deepcopy(options)})
        for step in range(5):
            if not planned:
                optimizer._plan = None
            if step == 2:
                change(optimizer, params)
            take(params, optimizer, step)
        results.append(everything(params, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("name", OPTIONS)
def test_repeated_steps_look_nothing_up(name, full_steps):
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, **OPTIONS[name])
    for step in range(4):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 * step
        take(params, optimizer, step)
    assert len(full_steps) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_repeated_steps_are_the_same_steps(name):
    change_and_compare(lambda optimizer, params: None, OPTIONS[name])


def _rates(optimizer, params):
    optimizer.param_groups[0]["lr"] = 5e-3
    optimizer.param_groups[0]["betas"] = [0.8, 0.9]


def _group_replaced(optimizer, params):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 5e-3}


def _options(optimizer, params):
    optimizer.param_groups[0].update(amsgrad=True, clip=None)


def _dtype(optimizer, params):
    params[0].data = params[0].data.bfloat16()
    params[0].grad = None


def _memory(optimizer, params):
    params[0].data = params[0].data.clone()


def _state_cleared(optimizer, params):
    optimizer.state.clear()


def _group_added(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones(3, 4)))
    optimizer.add_param_group({"params": params[-1:], "lr": 1e-2})


def _parameter_replaced(optimizer, params):
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(37, 53))


CHANGES = [
    _rates,
    _group_replaced,
    _options,
    _dtype,
    _memory,
    _state_cleared,
    _group_added,
    _parameter_replaced,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    change_and_compare(change, {})


@pytest.mark.parametrize("name", ["lr", "weight_decay", "weight_decay_1d"])
def test_rates_written_in_place_are_noticed(name):
    """As schedules of captured graphs do: the tensor stays, its value changes."""

    def write(optimizer, params):
        optimizer.param_groups[0][name].fill_(5e-2)

    change_and_compare(write, {name: torch.tensor(1e-3)})


def test_state_replaced_behind_the_optimizers_back_is_noticed():
    """Someone kept a parameter's dict. Equal values are not the same tensor."""
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    take(params, optimizer, 0)
    kept = [optimizer.state[p] for p in params]
    take(params, optimizer, 1)
    before = [state["step"] for state in kept]
    for state in kept:
        state["step"] = state["step"].clone()
    take(params, optimizer, 2)
    assert all(state["step"] == 3 for state in kept) and all(step == 2 for step in before)


def test_absent_gradients_are_noticed():
    results = []
    for planned in (True, False):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params)
        for step, absent in enumerate([{}, {}, {0}, {0}, {1}, {}]):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = None if i in absent else g
            if not planned:
                optimizer._plan = None
            optimizer.step()
        results.append(everything(params, optimizer))
    assert_same(*results)


def test_gradients_in_another_layout_are_noticed():
    results = []
    for planned in (True, False):
        params = parameters(shapes=SHAPES)
        optimizer = MARS(params)
        for step in range(4):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g.t().contiguous().t() if g.ndim == 2 and step == 2 else g
            if not planned:
                optimizer._plan = None
            optimizer.step()
        results.append(everything(params, optimizer))
    assert_same(*results)


def test_sparse_gradients_are_named_after_dense_ones():
    params = parameters(shapes=[(5, 6)])
    optimizer = MARS(params)
    take(params, optimizer, 0)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients: params.0."):
        optimizer.step()


def test_another_backend_is_noticed(full_steps):
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    take(params, optimizer, 0)
    with _library.use("reference"):
        take(params, optimizer, 1)
    assert len(full_steps) == 2


def test_copies_have_no_plan():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    take(params, optimizer, 0), take(params, optimizer, 1)
    together = pickle.dumps((params, optimizer))
    for others, twin in (copy.deepcopy((params, optimizer)), pickle.loads(together)):
        take(others, twin, 2)
        assert all(twin.state[p]["step"] == 3 for p in others)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_memory_of_replaced_state_and_old_gradients_is_freed():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    take(params, optimizer, 0), take(params, optimizer, 1)
    gone = [weakref.ref(params[0].grad)]
    optimizer.zero_grad()
    for state in optimizer.state.values():
        gone.append(weakref.ref(state["exp_avg"].untyped_storage()))
        for name in state:
            state[name] = state[name].clone()
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_backward_after_a_step_raises_where_it_needs_old_values():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    for step in range(2):
        loss = params[0].square().sum()
        take(params, optimizer, step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
