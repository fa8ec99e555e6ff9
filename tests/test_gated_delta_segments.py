"""Segments of a sequence on CUDA: how many the model picks, and the scan over their states."""

import heapq
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import MODES
from deltafuse.gated_delta import chunk_gated_delta_rule
from deltafuse.testing import assert_close
from gated_delta_cases import Case, make

ROOT = Path(__file__).parents[1]
SMS, ROOM = 132, 32 << 20

# microseconds, roughly those of bfloat16 and K = V = 128: a chunk of a CTA with 128 rows of V and
# with 64, the start of a CTA, a kernel more, the scan and a step of it for 16 columns an SM
WIDE, NARROW, START, LAUNCH, SCAN, STEP = 2.4, 2.2, 2.4, 3.0, 2.0, 1.2


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """choose(chains, chunks, most parts, forced): chunks of a segment, or 0."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("cpp") / "segment_choice"
    source = ROOT / "tests/cpp/segment_choice.cpp"
    subprocess.run([compiler, "-std=c++20", "-I", ROOT / "csrc", source, "-o", program], check=True)

    def run(chains, chunks, most=1 << 30, forced=False):
        line = f"{chains} {chunks} 1 1 {SMS} {most} {int(forced)}"
        return int(subprocess.run([program], input=line, capture_output=True, text=True).stdout)

    return run


def finished(ctas):
    """When CTAs that take so long are done: each starts, in order, on the first SM to be free."""
    free = [0.0] * SMS
    for time in ctas:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def one_pass(tiles):
    """Of CTAs with 128 rows of V and so many chunks, or of twice as many with 64."""
    wide = 2 * len(tiles) > SMS
    times = [n and START + n * (WIDE if wide else NARROW) for n in tiles]
    return LAUNCH + finished(t for t in times for _ in range(1 if wide else 2))


def simulate(heads, chunks, length):
    """Microseconds of sequences of so many chunks, whole or in segments of `length` chunks."""
    if not length:
        return one_pass([n for n in chunks for _ in range(heads)])
    sequences = [[min(length, n - i) for i in range(0, n, length)] for n in chunks]
    outputs = [n for segments in sequences for n in segments for _ in range(heads)]
    summaries = []
    for segments in sequences:
        for j, n in enumerate(segments):
            states = n if j + 1 < len(segments) else 0
            summaries += [states, states if j else 0] * heads
    groups = -(-heads * len(chunks) * 8 // SMS)
    steps = max(len(segments) for segments in sequences) - 2
    scan = LAUNCH + SCAN + max(steps, 0) * groups * STEP
    return one_pass(summaries) + scan + one_pass(outputs)


@pytest.mark.parametrize(
    "heads, lengths",
    [
        (64, [32768]),
        (48, [32768]),
        (24, [8192]),
        (32, [32768]),
        (32, [8192]),
        (16, [32768]),
        (8, [32768]),
        (8, [8192]),
        (2, [8192]),
        (64, [12288, 4096]),
        (16, [8192, 8192]),
        (20, [4096]),
        (1, [65536]),
    ],
    ids=str,
)
def test_choice_is_near_the_best(choose, heads, lengths):
    chunks = [-(-length // 64) for length in lengths]
    mean, chains = -(-sum(chunks) // len(chunks)), heads * len(chunks)
    most = ROOM // (chains * 256 * 128 * 4)
    times = {0: simulate(heads, chunks, 0)}
    for parts in range(2, min(most, mean) + 1):
        length = -(-mean // parts)
        times[length] = simulate(heads, chunks, length)
    assert times[choose(chains, mean, most)] <= 1.05 * min(times.values())


def test_limits_of_the_choice(choose):
    assert choose(1, 1) == choose(1, 1, forced=True) == 0
    assert choose(1, 2, forced=True) == choose(500, 2, forced=True) == 1
    assert choose(2, 128, most=1) == 0 and choose(2, 128, most=3) == 43
    assert choose(64, 128) == 0 and 0 < choose(64, 128, forced=True) < 128


def check_scan(K, sequences):
    """No gate hides an error of M; keys longer than one."""
    case = Case(T=150, HV=1, K=K, V=64, lengths=(150, *[0] * (sequences - 1)))
    x = {name: t.detach() for name, t in make(case, torch.float32).items()}
    x = {**x, "g": torch.zeros_like(x["g"]), "k": 3 * x["k"], "beta": 0.2 * x["beta"]}
    cut = chunk_gated_delta_rule(**x, output_final_state=True, auto_cp=True)
    whole = chunk_gated_delta_rule(**x, output_final_state=True, auto_cp=False)
    for name, a, b in zip(("o", "ht"), cut, whole, strict=True):
        assert_close(name, a, b, 1e-5)


@pytest.mark.emulated
@pytest.mark.parametrize("K", [64, 128, 192, 256])
@pytest.mark.parametrize("sequences, groups", [(1, 1), (56, 2)])
def test_scan(emulated, K, sequences, groups):
    """A CTA has 16 columns of V, or 32 where sequences are many, be they empty. 5 segments."""
    with emulated.profile() as launches:
        check_scan(K, sequences)
    (scan,) = (launch for launch in launches if "chunk_scan" in launch["kernel"])
    assert f"Li{K}ELi{groups}E" in scan["kernel"]
    states, transitions, offsets = 4 * 4 * 64 * K, 3 * 4 * K * K, 8 * (sequences + 1)
    assert 0 <= scan["unique_bytes_read"] - states - transitions <= offsets
    assert scan["unique_bytes_written"] == states
    for kind in ("load", "store"):
        assert scan[f"shared_{kind}_wavefronts"] == scan[f"shared_{kind}_wavefronts_ideal"]
    assert scan["global_load_sectors"] == scan["global_load_sectors_ideal"]
    assert scan["local_loads"] == scan["local_stores"] == 0


@pytest.mark.emulated
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_scan_in_every_mode(emulated_with, mode):
    with emulated_with(**mode):
        check_scan(64, 56)
