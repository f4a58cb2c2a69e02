"""Exercise 14: scores on two clip lists. The project's own: evaluate.clip_list, whose hash stands in every --json.

One model is scored on clips 0 to 63 of the token files, the other on clips 0 to 63 of the raw video, and the tables are set
side by side. But the one folder cuts its clips from where a shard begins and the other from where a recording begins: clip 7
is not clip 7. A clip is which frames of which recording it shows, not its number in a folder.
"""
import hashlib


def name_of_list(clips, chosen):
    """clips: (recording, first frame) of every clip of a folder; chosen: the numbers of those that are scored -> a short name
    of the list, the same for the same list only."""
    return hashlib.sha256(repr(list(chosen)).encode()).hexdigest()[:8]


def test_a_list_is_the_frames_that_it_shows(name_of_list=name_of_list):
    by_recording = [(r, first) for r in range(3) for first in (0, 17, 34, 51)]
    by_shard = [(r, first) for r in range(3) for first in (5, 22, 39, 56)]
    assert name_of_list(by_recording, [0, 5, 9]) == name_of_list(list(by_recording), [0, 5, 9])
    assert name_of_list(by_recording, [0, 5, 9]) != name_of_list(by_recording, [0, 5, 10])
    assert name_of_list(by_recording, [0, 5, 9]) != name_of_list(by_shard, [0, 5, 9]), "same numbers, other frames"
    denser = sorted([*by_recording, (0, 8), (1, 8)])  # a folder with two clips more
    same = [denser.index(by_recording[i]) for i in (0, 5, 9)]
    assert name_of_list(by_recording, [0, 5, 9]) == name_of_list(denser, same), "other numbers, same frames"
