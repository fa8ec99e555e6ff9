"""pytest bench/bench_host.py: what a call costs on the host, by pytest-benchmark."""

import pytest

from deltafuse.bench import host
from deltafuse.bench.registry import REGISTRY


@pytest.mark.parametrize("name", ("ours", host.ALONE))
@pytest.mark.parametrize("op", host.ENTRIES)
def test_host(run, op, name):
    run(op, REGISTRY[op].shapes[0], name)
