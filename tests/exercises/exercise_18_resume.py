"""Exercise 18: to resume is to read on. The project's own: train.Stream.clip_index.

A run is stopped after 30 clips and resumed. With this stream it begins a new epoch: some clips come twice, others not at all,
and the losses are not those of the run that was never stopped, so no test of resuming can be exact. Saving the generator's
state is one way out. A better one needs no state: what is the 31st clip of seed 0?
"""
import numpy as np


def clips_from(start, count, n, seed):
    """Numbers of the `count` clips that are trained on from position `start` of the endless stream on. Each epoch, n positions
    long, is a permutation of the n clips of its own."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        found += rng.permutation(n).tolist()
    return found[:count]


def test_a_resumed_run_reads_on(clips_from=clips_from, n=20):
    whole = clips_from(0, 60, n, seed=0)
    epochs = [whole[:20], whole[20:40], whole[40:]]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs), "every clip once an epoch"
    assert epochs[0] != epochs[1] != epochs[2]
    for stop in (20, 30, 47):
        assert clips_from(0, stop, n, 0) + clips_from(stop, 60 - stop, n, 0) == whole, f"stopped after {stop} clips"
    assert clips_from(0, 60, n, seed=1) != whole
