"""Learning rate over the steps."""

import math


def learning_rate(step, steps, warmup, peak, floor=0.1):
    """Linear from 0 to peak over the warm-up, then half a cosine down to floor * peak.

    Args:
        step: 1 .. steps; the first step already has peak / warmup.
        warmup: steps; at most a tenth of a short run.
    """
    warmup = min(warmup, max(1, steps // 10))
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
