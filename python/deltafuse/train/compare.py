"""Speed of whole training steps with the compiled kernels and with the reference backend."""

import copy
import time

from .. import _library
from .loop import make_optimizer


def time_backends(run, steps=3):
    """{"native": seconds, "reference": seconds} a step, the best of `steps`, on copies.

    The run itself is unchanged: model and optimizer are copied, the batch is one of its own.
    """
    batch = run.corpus.train[: run.settings.batch * (run.settings.context + 1)]
    if batch.numel() < run.settings.batch * (run.settings.context + 1):
        batch = batch[: run.settings.context + 1]
    batch = batch.long().view(-1, run.settings.context + 1)
    return {name: _best(run, batch, name, steps) for name in ("native", "reference")}


def _best(run, batch, backend, steps):
    trial = copy.copy(run)
    trial.model = copy.deepcopy(run.model)
    trial.forward = trial.model
    trial.optimizer = make_optimizer(run.settings, trial.model)
    best = float("inf")
    with _library.use(backend):
        for _ in range(steps + 1):  # the first one also warms up
            start = time.perf_counter()
            trial.update(batch, run.settings.steps)
            best = min(best, time.perf_counter() - start)
    return best
