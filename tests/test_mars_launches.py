"""The optimizer on the emulated CUDA kernels: the CPU's steps, and how many launches they take."""

import pytest
import torch

from deltafuse import MARS, _library
from test_mars import LR, assert_close, gradients, parameters

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0"),
]
SHAPES = [(37, 53), (1025,), (), (300, 401), (64, 16), (0, 3)]
# options, and launches of a step with a group for each two tensors
CASES = {
    "defaults": ({}, 1),
    "amsgrad, cautious": ({"amsgrad": True, "caution": "mean"}, 1),
    "global clip": ({"clip_scope": "global"}, 2),
    "lion without clip": ({"mars_type": "mars-lion", "clip": None}, 1),
    "schedule": ({"lr": torch.tensor(LR), "gamma": torch.tensor(0.05)}, 1),
    "first gradient": ({"first_step": "grad", "maximize": True}, 1),
    "matrices": ({"mars_type": "mars-m", "ns_dtype": torch.float32}, 2),
}


def groups(params):
    return [{"params": params[i : i + 2]} for i in range(0, len(params), 2)]


@pytest.mark.parametrize("name", CASES)
def test_steps_and_launches(emulated, threads, name):
    threads(1)
    options, expected = CASES[name]
    params, twins = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    options = {"lr": LR, **options}
    ours, native = MARS(groups(params), **options), MARS(groups(twins), **options)
    for step in range(3):
        for p, q, g in zip(params, twins, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.clone()
        with emulated.profile() as launches:
            ours.step()
        assert len(launches) == expected
        with _library.use("native"):
            native.step()
    assert_close(params, twins, torch.float32)


@pytest.mark.parametrize("count, expected", [(172, 1), (174, 3), (400, 4)])
def test_long_lists_take_a_launch_more_for_every_173_tensors(emulated, count, expected):
    """Their table does not fit the kernel's arguments: 184 bytes a tensor, 32000 at most."""
    params = parameters(shapes=[(2, 3)] * count)
    optimizer = MARS(params)
    for step in range(2):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        with emulated.profile() as launches:
            optimizer.step()
        assert len(launches) == expected


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"rounding": "stochastic"}], ids=str)
def test_formats_are_those_of_the_cpu(emulated, threads, options):
    threads(1)
    shapes = [(130, 40), (999,)]
    params, twins = (parameters(torch.bfloat16, shapes) for _ in range(2))
    options = dict(lr=LR, state_dtype=torch.bfloat16, seed=3, **options)
    ours, native = MARS(params, **options), MARS(twins, **options)
    for p, q, g in zip(params, twins, gradients(params, 0), strict=True):
        p.grad, q.grad = g, g.clone()
    ours.step()
    with _library.use("native"):
        native.step()
    for p, q in zip(params, twins, strict=True):
        for name, array in ours.state[p].items():
            other = native.state[q][name]
            assert array.dtype == other.dtype
            # a decision about the last bit that another order of operations makes otherwise
            assert (array != other).double().mean() < 0.01, name
        assert (p != q).double().mean() < 0.01
