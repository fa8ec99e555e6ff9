"""pytest bench/bench_ddl.py: the DDL boundary by pytest-benchmark; -m slow has the large shapes."""

import pytest
import torch

from deltafuse.bench import ddl
from deltafuse.bench.registry import REGISTRY

ROWS = ("ours", "reference", ddl.EAGER, ddl.YARDSTICK)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("op", ddl.ENTRIES)
def test_ddl(run, op, name):
    run(op, REGISTRY[op].shapes[0], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("ours", ddl.YARDSTICK))
@pytest.mark.parametrize("shape", ddl.LARGE)
@pytest.mark.parametrize("case", [ddl.forward_case, ddl.training_case], ids=["forward", "train"])
def test_large(benchmark, case, shape, name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = case(ddl.LARGE[shape], device, torch.bfloat16)
    benchmark.group = f"{case.__name__} {shape} {device}"
    functions = {"ours": made.ours, **made.baselines}

    def call():
        functions[name]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
