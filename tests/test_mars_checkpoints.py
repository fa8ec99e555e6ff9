"""MARS: checkpoints of its own, of torch.optim.AdamW and of the authors, copies and pickles."""

import copy
import io
import pickle

import pytest
import torch

from deltafuse import MARS
from test_mars import assert_same, everything, gradients, parameters, train

SHAPES = [(37, 53), (1025,), (), (300, 401)]  # both paths, tails, more than one chunk
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"is_approx": False}], ids=str)
def test_resuming_equals_going_on(dtype, options):
    def iterate(params, optimizer, step):
        if options.get("is_approx") is False:
            for p, g in zip(params, gradients(params, step + 1), strict=True):
                p.grad = g
            optimizer.update_previous_grad()
        train(params, optimizer, 1, first=step)

    params = parameters(dtype, SHAPES)
    optimizer = MARS(params, lr=1e-2, **options)
    for step in range(3):
        optimizer.update_last_grad()
        iterate(params, optimizer, step)  # in the exact variant the checkpoint has staged gradients
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, values = torch.load(file)
    twins = [torch.nn.Parameter(v) for v in values]
    resumed = MARS(twins, lr=1.0, **options)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        for p, o in ((params, optimizer), (twins, resumed)):
            o.update_last_grad()
            iterate(p, o, step)
    assert_same(everything(params, optimizer), everything(twins, resumed))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loads_an_adamw_checkpoint(dtype):
    params = parameters(dtype, SHAPES)
    adamw = torch.optim.AdamW(params, lr=2e-3)
    train(params, adamw, 3)
    optimizer = MARS(params, gamma=0.05)
    optimizer.load_state_dict(adamw.state_dict())
    group, state = optimizer.param_groups[0], optimizer.state[params[0]]
    assert group["lr"] == 2e-3 and group["gamma"] == 0.05 and set(group) >= set(optimizer.defaults)
    assert state["step"] == 3 and "last_grad" not in state
    assert state["exp_avg"].dtype == torch.float32
    g = next(gradients(params, 3)).float()
    m = state["exp_avg"].clone()
    group["clip"] = None
    train(params, optimizer, 1, first=3)
    s = 0.05 * 0.9 / 0.1
    torch.testing.assert_close(state["exp_avg"], 0.9 * m + 0.1 * (1 + s) * g)


def test_unknown_state_is_dropped_and_integer_steps_are_read():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params)
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"], state["is_grad_2d"] = int(state["step"]), torch.ones(())
    other = MARS(params)
    other.load_state_dict(saved)
    state = other.state[params[0]]
    assert "is_grad_2d" not in state and state["step"].dtype == torch.float32 and state["step"] == 2


def test_copies_and_pickles():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, amsgrad=True)
    train(params, optimizer, 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(params, optimizer, 2, first=2)
    for other in copies:
        twins = other.param_groups[0]["params"]
        train(twins, other, 2, first=2)
        assert_same(everything(params, optimizer), everything(twins, other))
