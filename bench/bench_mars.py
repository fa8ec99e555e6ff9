"""pytest bench/bench_mars.py: an optimizer step on GPT-2 small, by pytest-benchmark."""

import pytest

from deltafuse.bench.registry import REGISTRY

ADAMW = [f"torch AdamW {kind}" for kind in ("fused", "foreach", "loop")]


@pytest.mark.parametrize("name", ["ours", "reference", *ADAMW])
def test_mars(run, name):
    run("mars", REGISTRY["mars"].shapes[0], name)


@pytest.mark.parametrize("name", ["ours", "reference", "torch Muon"])
def test_mars_m(run, name):
    run("mars_m", REGISTRY["mars_m"].shapes[0], name)
