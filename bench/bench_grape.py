"""pytest bench/bench_grape.py: rotations by pytest-benchmark; -m slow has the large shapes."""

import pytest
import torch

from deltafuse.bench import grape
from deltafuse.bench.registry import REGISTRY

ROWS = ("ours", "reference", grape.EAGER, grape.COPY)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("op", grape.ENTRIES)
def test_grape(run, op, name):
    run(op, REGISTRY[op].shapes[0], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("ours", grape.COPY))
@pytest.mark.parametrize("shape", grape.LARGE)
@pytest.mark.parametrize(
    "case", [grape.forward_case, grape.training_case], ids=["forward", "train"]
)
def test_large(benchmark, case, shape, name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = case(grape.LARGE[shape], device, torch.bfloat16)
    benchmark.group = f"{case.__name__} {shape} {device}"
    functions = {"ours": made.ours, **made.baselines}

    def call():
        functions[name]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
