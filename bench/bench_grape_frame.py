"""pytest bench/bench_grape_frame.py: learned rotations by pytest-benchmark."""

import pytest

from deltafuse.bench import grape_frame
from deltafuse.bench.registry import REGISTRY

ROWS = ("ours", "reference", grape_frame.FRAME)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("op", grape_frame.ENTRIES)
def test_grape_frame(run, op, name):
    run(op, REGISTRY[op].shapes[0], name)
