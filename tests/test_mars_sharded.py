"""MARS on DTensor parameters: two processes with gloo against one process with whole tensors."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from deltafuse import MARS
from processes import in_processes
from test_mars import LIMIT, LR, gradients, parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]
# shards of 19 and 18 rows, one row and none, halves; a vector, whose norm nobody needs
SHAPES = [(37, 53), (1, 40), (64, 16), (7,)]
OPTIONS = {
    "defaults": {"clip": 0.5},
    "global clip": {"clip": 0.5, "clip_scope": "global"},
    "group clip, lion": {"clip": 0.5, "clip_scope": "group", "mars_type": "mars-lion"},
    "cautious, all tensors": {"caution": "elementwise", "optimize_1d": True},
    "no clip": {"clip": None},
    "8 bits": {"state_bits": 8},
    "matrices": {"mars_type": "mars-m", "ns_dtype": torch.float64},
    "matrices by decomposition": {"mars_type": "mars-shampoo", "ns_steps": None, "clip": None},
}
COLLECTIVES = {"no clip": 0, "matrices": None, "matrices by decomposition": None}


def sharded(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Shard(0)])


def run_options(rank, world, results):
    """Three steps with each set of options; results: whole parameters, collectives of a step."""
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    for name, options in OPTIONS.items():
        params = [torch.nn.Parameter(sharded(p.detach(), mesh)) for p in parameters(shapes=SHAPES)]
        optimizer = MARS(params, lr=LR, **options)
        for step in range(3):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = sharded(g, mesh)
            with CommDebugMode() as collectives:
                optimizer.step()
        whole = [p.full_tensor().detach() for p in params]
        if rank == 0:
            results[name] = [p.numpy() for p in whole], collectives.get_total_counts()


@pytest.fixture(scope="module")
def results():
    return in_processes(run_options)


@pytest.mark.parametrize("name", OPTIONS)
def test_shards_take_the_step_of_the_whole(results, name):
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, lr=LR, **OPTIONS[name])
    for step in range(3):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    whole, collectives = results[name]
    absolute, relative = LIMIT[torch.float32]
    for p, q in zip(params, whole, strict=True):
        far = (p.detach() - torch.from_numpy(q)).abs() > absolute + relative * p.abs().max()
        # blocks of 256 codes begin elsewhere, so that other codes round
        assert not far.any() or (name == "8 bits" and far.float().mean() < 0.7)
    expected = COLLECTIVES.get(name, 1)
    assert expected is None or collectives == expected


def train_fsdp(rank, world, results):
    """A small model under FSDP2, its state saved and loaded in between."""
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    model, batches = model_and_batches()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = MARS(model.parameters(), lr=1e-2)
    for i, (x, y) in enumerate(batches):
        if i == 2:
            fresh = MARS(model.parameters(), lr=1.0)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    whole = [p.full_tensor().detach() for p in model.parameters()]
    if rank == 0:
        results["params"] = [p.numpy() for p in whole]


def model_and_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 3))
    return model, [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(4)]


def test_fully_sharded_model_learns_as_a_whole_one():
    model, batches = model_and_batches()
    optimizer = MARS(model.parameters(), lr=1e-2)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    found = in_processes(train_fsdp)["params"]
    for p, q in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(q), rtol=0, atol=1e-5)


def refuse_partial(rank, world, results):
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    partial = DTensor.from_local(torch.ones(3, 2), mesh, [Partial()])
    try:
        MARS([torch.nn.Parameter(partial)])
    except ValueError as error:
        results[rank] = str(error)


def test_partial_placements_are_refused():
    messages = in_processes(refuse_partial)
    assert len(messages) == 2 and all("params[0] is a DTensor" in m for m in messages.values())


def run_zero(rank, world, results):
    """Each process owns the state of half of the parameters (ZeroRedundancyOptimizer)."""
    params = parameters(shapes=SHAPES)
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=MARS, lr=LR)
    for step in range(3):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    if rank == 0:
        results["params"] = [p.detach().numpy() for p in params]
        results["owned"] = len(optimizer.optim.state)


def test_zero_redundancy_optimizer():
    params = parameters(shapes=SHAPES)
    optimizer = MARS(params, lr=LR)
    for step in range(3):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    found = in_processes(run_zero)
    assert 0 < found["owned"] < len(params)
    for p, q in zip(params, found["params"], strict=True):
        assert torch.equal(p.detach(), torch.from_numpy(q))
