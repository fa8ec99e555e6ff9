"""Interleaved timing: all implementations take turns, so that a busy machine hits all of them."""

import contextlib
import math
import statistics
import time
from dataclasses import dataclass

import torch

SAMPLE = 5e-3  # seconds a sample lasts at least: short calls are repeated within it
BUDGET = 20.0  # seconds for all samples of one case, if the number of rounds is not given
ROUNDS = {"cpu": (5, 50), "cuda": (30, 100)}  # fewest and most


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: median, minimum, and the middle half's width over the median.

    cores: CPU seconds a second, over all samples; near 1 with two threads, somebody else had the
    second core (or the work was too small for threads).
    """

    median: float
    minimum: float
    spread: float
    cores: float
    rounds: int


@contextlib.contextmanager
def threads(count):
    """Within the block torch's pool has `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_clock(function, calls):
    """Seconds a call; caches stay as the calls leave them."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def cuda_clock(device):
    """A clock by CUDA events, each call with a flushed L2 cache."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)

    def clock(function, calls):
        events = []
        for _ in range(calls):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        return sum(begin.elapsed_time(end) for begin, end in events) * 1e-3 / calls

    return clock


def interleave(functions, device="cpu", rounds=None):
    """Times functions {name: f()} in turns, the first one another in each round.

    Args:
        device: "cpu" or "cuda"; rounds: samples of each function, None for as many as fit BUDGET.

    Returns:
        {name: Sample}.
    """
    clock = cpu_clock if device == "cpu" else cuda_clock(device)
    names = list(functions)
    calls, total = {}, 0.0
    for name in names:
        functions[name]()  # caches, lazy allocation, compilation
        once = clock(functions[name], 1)
        calls[name] = 1 if device != "cpu" else max(1, math.ceil(SAMPLE / max(once, 1e-7)))
        total += once * calls[name]
    if rounds is None:
        fewest, most = ROUNDS[device]
        rounds = min(most, max(fewest, int(BUDGET / max(total, 1e-7))))
    seconds, busy = {name: [] for name in names}, dict.fromkeys(names, 0.0)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.process_time()
            seconds[name].append(clock(functions[name], calls[name]))
            busy[name] += time.process_time() - begin
    return {
        name: summarise(values, busy[name] / (sum(values) * calls[name]))
        for name, values in seconds.items()
    }


def summarise(seconds, cores):
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    return Sample(median, min(seconds), (high - low) / median, cores, len(seconds))
