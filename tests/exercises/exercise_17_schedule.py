"""Exercise 17: who counts steps? The project's own: train.learning_rate, which the loop calls once an update.

A batch that does not fit is divided into `accum` micro-batches, whose gradients add up to one update. The rate shall fall from
`peak` to nearly 0 over `steps` updates. Here somebody counted how often data was loaded. Nothing breaks: with accum = 8 the
run just ends at 96 % of its peak rate, noisy to the last step, and larger batches "do not help".
"""
import math


def learning_rate(step, steps, accum, peak):
    """Rate of update number `step`, 0 .. steps - 1: a half cosine from the peak to 0, which update number `steps` would have."""
    done = step / (steps * accum)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def test_the_rate_falls_to_zero_however_the_batch_is_divided(learning_rate=learning_rate, steps=100, peak=2e-3):
    for accum in (1, 2, 8):
        assert learning_rate(0, steps, accum, peak) == peak
        assert abs(learning_rate(50, steps, accum, peak) - peak / 2) < 1e-9, f"half way, accum {accum}"
        assert learning_rate(99, steps, accum, peak) < peak / 1000, f"the last update, accum {accum}"
