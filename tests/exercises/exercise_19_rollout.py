"""Exercise 19: dreaming on. The project's own: sample.continue_video.

A dream of eight frames becomes a long one by dreaming on from its own last nine frames. The first window is right, so is every
shape, and the pictures go on moving. Push the stick to the left in the second window: nothing happens. Why?
"""
import numpy as np


def rollout(dream, past, actions, windows):
    """past (9,), actions (9 + 8 windows,): one for every frame, the past ones included -> the dreamt frames (8 windows,).
    dream: nine frames and the 17 actions of those and the next eight frames -> the next eight frames."""
    frames = list(past)
    for _ in range(windows):
        frames += list(dream(np.array(frames[-9:]), actions[:17]))
    return np.array(frames[9:])


def test_every_window_has_its_own_actions(rollout=rollout):
    def dream(past, actions):  # a world that is one number, to which each action is added
        assert len(past) == 9 and len(actions) == 17
        return past[-1] + np.cumsum(actions[9:])

    past, actions = np.arange(92, 101), np.concatenate([np.ones(17), -np.ones(8), 2 * np.ones(8)])
    frames = rollout(dream, past, actions, windows=3)
    assert frames[:8].tolist() == list(range(101, 109)), "the first window"
    assert frames[8:16].tolist() == list(range(107, 99, -1)), "the second has other actions"
    assert frames[16:].tolist() == list(range(102, 118, 2)), "and so has the third"
