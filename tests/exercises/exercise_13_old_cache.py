"""Exercise 13: a cache older than its data. The project's own: data.made_of, which make_split keeps in settings.json.

Encoding takes hours, so what is encoded is kept, with a note of what it was made of. Somebody records the same routine again,
with a repaired gripper and for just as long. The note still fits: training goes on with last week's robot.
"""
import json

import numpy as np


def note(video, states):
    """What a cache remembers of its source, so that it can tell whether it is still good: anything that json can hold."""
    return {"frames": len(video), "size": video.shape[1], "actions": states.shape[1]}


def test_a_new_recording_of_the_same_length_is_noticed(note=note):
    rng = np.random.default_rng(0)
    video, states = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), rng.normal(size=(40, 25)).astype(np.float32)
    kept = json.dumps(note(video, states))
    assert json.dumps(note(video.copy(), states.copy())) == kept, "the same recording is the same"
    assert len(kept) < 1000, "a note, not a copy"
    assert json.dumps(note(video, states + 1)) != kept, "other states"
    assert json.dumps(note(255 - video, states)) != kept, "other pictures"
