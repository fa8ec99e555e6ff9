"""One pytest-benchmark measurement of a benchmark's implementation."""

import pytest

from deltafuse.bench import environment, timing
from deltafuse.bench.measure import backend, correctness
from deltafuse.bench.registry import REGISTRY


@pytest.fixture(params=[1, 2], ids=["threads1", "threads2"])
def pool(request):
    with timing.threads(request.param):
        yield request.param


@pytest.fixture
def run(benchmark, pool):
    """run(op, shape, name): times "ours", "reference" or a baseline; a wrong kernel fails."""

    def measure(op, shape, name):
        entry = REGISTRY[op]
        case = entry.make(shape, "cpu")
        if name == "ours":
            assert correctness(case)["ok"], f"{op} differs from its reference"
        place = environment.describe("cpu")
        benchmark.group = f"{op} {shape} {pool} thread(s)"
        benchmark.extra_info.update(
            flops=entry.flops(shape),
            bytes=entry.bytes(shape),
            threads=pool,
            backend=backend(entry, "cpu"),
            isa=place["isa"],
            git=place["git"],
        )
        functions = {"ours": case.ours, "reference": case.reference, **case.baselines}
        benchmark(functions[name])

    return measure
