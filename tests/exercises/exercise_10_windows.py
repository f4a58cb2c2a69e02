"""Exercise 10: windows. The project's own: data.Clips._lay_windows, with data.Clips.segment.

A clip must not jump from one recording to another. It is cheap to compare its first frame's segment with its last one's, and
nearly always right: until a recording is cut and joined again, and its segment id comes back. (The project's line looks just like this
one, but its `segment` is the number of the uninterrupted run, not the id in the file: every change of id begins a new run.)
"""
import numpy as np


def clip_starts(segments, length):
    """Starts of the windows of `length` frames, one after the other, that lie in one uninterrupted recording."""
    starts = np.arange(0, len(segments) - length + 1, length)
    return starts[segments[starts] == segments[starts + length - 1]]


def test_every_frame_of_a_clip_is_of_one_segment(clip_starts=clip_starts):
    segments = np.array([0] * 6 + [1] * 2 + [0] * 4 + [2] * 9)
    starts = clip_starts(segments, 4)
    assert starts.tolist() == [0, 8, 12, 16]
    assert all(len(set(segments[s : s + 4])) == 1 for s in starts)
    joined = np.array([7, 7, 3, 7, 7, 7, 7, 7])
    assert clip_starts(joined, 4).tolist() == [4], "7 7 3 7 begins and ends in segment 7, and is not of segment 7"
