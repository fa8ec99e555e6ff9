"""pytest bench/bench_mars.py: an optimizer step on GPT-2 small, by pytest-benchmark."""

import pytest

from deltafuse.bench.registry import REGISTRY


@pytest.mark.parametrize("name", ["ours", "reference", "torch AdamW fused", "torch AdamW foreach"])
def test_mars(run, name):
    run("mars", REGISTRY["mars"].shapes[0], name)
