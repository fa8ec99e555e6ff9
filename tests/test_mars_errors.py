"""Bad input to MARS: every error says what is wrong."""

import warnings

import pytest
import torch

import deltafuse
from deltafuse import MARS
from deltafuse.optim import MARS_M, MARSAdamW, MARSLion, MARSShampoo, functional
from test_mars import parameters

pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas_1d": (0.9, -0.1)}, "betas_1d"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"clip_scope": "layer"}, "clip_scope"),
        ({"caution": True}, "caution"),
        ({"first_step": "none"}, "first_step"),
        ({"matrix_ndim": 2}, "matrix_ndim"),
        ({"mars_type": "mars-adam"}, "mars_type"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"last_grad_dtype": torch.int8}, "last_grad_dtype"),
        ({"state_dtype": torch.float16}, "state_dtype"),
        ({"state_bits": 4}, "state_bits"),
        ({"master": "bf16"}, "master"),
        ({"rounding": "up"}, "rounding"),
        ({"master": "split16", "rounding": "stochastic"}, "exclude"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"ns_dtype": torch.float16}, "ns_dtype"),
        ({"adjust_lr_fn": "muon"}, "adjust_lr_fn"),
        ({"foreach": True, "fused": True}, "foreach and fused"),
        ({"fused": True, "differentiable": True}, "fused and differentiable"),
        ({"foreach": True, "differentiable": True}, "foreach and differentiable"),
    ],
    ids=str,
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        MARS(parameters(shapes=[(2, 3)]), **options)
    optimizer = MARS(parameters(shapes=[(2, 3)]))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(shapes=[(2, 3)]), **options})
    assert len(optimizer.param_groups) == 1


def test_members_have_names():
    assert MARSAdamW is MARS is deltafuse.MARS
    params = parameters(shapes=[(2, 3)])
    assert MARSLion(params).param_groups[0]["mars_type"] == "mars-lion"
    assert MARSShampoo(params, 1e-2).param_groups[0]["mars_type"] == "mars-shampoo"
    assert MARS(params, mars_type="m").param_groups[0]["mars_type"] == "mars-m"
    assert MARS_M(muon_params=params).param_groups[0]["mars_type"] == "mars-m"


def test_bad_parameters():
    p = torch.nn.Parameter(torch.ones(2, 3))
    integer = torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    expanded = torch.ones(1, 3).expand(2, 3).requires_grad_()
    for bad, message in (
        ([], "empty"),
        ([p, p], "twice"),
        ([{"params": [p]}, {"params": [p]}], "more than one"),
        ([integer], r"params\[0\].*int64"),
        ([expanded], r"params\[0\].*share memory.*\(2, 3\)"),
        ([("w", expanded)], "'w'"),
    ):
        with pytest.raises(ValueError, match=message):
            MARS(bad)
    with pytest.raises(TypeError, match="Tensors"):
        MARS([1.0])
    with pytest.raises(ValueError, match="use_orig_params=True"):
        MARS([type("FlatParameter", (torch.nn.Parameter,), {})(torch.ones(6))])
    half = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"params\[0\] is float16.*bfloat16"):
        MARS([half], master="split16")
    pairs = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"params\[0\] is complex"):
        MARS([pairs], mars_type="mars-m")


def test_sparse_gradients_name_the_parameter():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients: params\[0\]"):
        MARS([p]).step()
    with pytest.raises(RuntimeError, match="parameter 'weight'"):
        MARS([("weight", p)]).step()


def test_functional_checks_its_lists():
    p, m, v, h = ([torch.zeros(2, 3)] for _ in range(4))
    t = [torch.zeros(())]
    good = (p, [torch.ones(2, 3)], m, v, h, [], t)
    functional.mars_(*good, lr=1e-3)
    for place, bad, message in (
        (1, [torch.ones(3, 2)], r"grads\[0\].*\(2, 3\).*\(3, 2\)"),
        (2, [], "exp_avgs must have 1"),
        (4, [*h, *h], "2 last_grads for 1 params"),
        (5, [torch.ones(1)], "max_exp_avg_sqs"),
        (6, [], "state_steps"),
    ):
        arguments = list(good)
        arguments[place] = bad
        with pytest.raises(ValueError, match=message):
            functional.mars_(*arguments, lr=1e-3)
    with pytest.raises(ValueError, match="caution"):
        functional.mars_(*good, lr=1e-3, caution="always")
    with pytest.raises(TypeError, match=r"exp_avgs\[0\] must be torch.float32, got torch.float64"):
        functional.mars_(p, good[1], [m[0].double()], v, h, [], t, lr=1e-3)
    with pytest.raises(ValueError, match="mars_norm_"):
        functional.mars_norm_([], [], gamma=0.1, beta1=0.9)


def test_warns_once_about_decay_of_vectors():
    with pytest.warns(UserWarning, match="weight_decay_1d") as caught:
        optimizer = MARS(parameters(shapes=[(3,)]))
        optimizer.add_param_group({"params": parameters(shapes=[(3,)])})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MARS(parameters(shapes=[(3,)]), weight_decay_1d=None)
        MARS(parameters(shapes=[(3, 2)]))
