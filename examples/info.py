"""What `python data.py info` runs: a full check of a data folder, and what it holds.

Opening a folder looks at its files' sizes alone, since it must be quick. Here all states, ids and latents are
read, and how many frames a video file has and how fast; what is wrong ends in a sentence that names the file.
"""
import itertools
import os
from json import dumps

import numpy as np

from data import FRAMES, Clips, check, is_constant, moments, open_reader, split_folders

def info(path, **source):
    """Reads all of a data folder but the pixels: counts, what the clips leave out, ranges of the states."""
    splits, about, recordings = {}, {}, []
    for split, folder in split_folders(path).items():
        splits[split] = clips = Clips(open_reader(folder, split, **source))
        first = splits[min(splits)]
        for key in ("kind", "hz", "names", "shape"):
            own, other = getattr(clips, key), getattr(first, key)
            check(own == other, f"{clips.path} has {key} = {own}, {first.path} has {other}: make them agree")
        # 1. What opening does not look at: all ids or latents, and how many frames a video has.
        for i in range(len(clips.reader.files)):
            video = clips.reader.video(i)
            if clips.kind != "raw":
                for k in range(len(video)):
                    clips.stored(i, k)
            elif hasattr(video, "check_times"):
                video.check_times(clips.hz)
        # 2. What it holds. Windows of 17 frames do not overlap here.
        about[split] = {"clips": len(clips), "frames": int(clips.edges[-1]), "crossing": clips.crossing,
                        "shards": len(clips.reader.files), "segment_ids": clips.reader.segment_ids}
        recordings.append(map(clips.recording, range(len(clips.edges) - 1)))
    # 3. All splits together.
    total = {key: sum(s[key] for s in about.values()) for key in ("clips", "frames", "shards", "crossing")}
    dropped = {"clips over a segment border": total.pop("crossing"),
               "frames in no clip": total["frames"] - FRAMES * total["clips"]}
    ranges = moments(itertools.chain(*recordings))
    states = {}
    for name, row in zip(first.names, np.stack(ranges, axis=1).tolist()):
        states[name] = dict(zip(("min", "max", "mean", "std"), row))
    constant = np.flatnonzero(is_constant(*ranges[:2]))
    return {"path": os.fspath(path), "kind": first.kind, "hz": first.hz, "action_dim": first.action_dim,
            "clip_shape": list(first.shape), **total, "dropped": dropped, "splits": about, "states": states,
            "constant": [first.names[j] for j in constant]}

def show(path, json=False, **source):
    """What `python data.py info` prints: one JSON object, or lines to read."""
    found = info(path, **source)
    if json:
        return print(dumps(found))
    print("{path}: {kind}, a clip's video is {clip_shape}, {hz:g} Hz, {action_dim} states".format(**found))
    for split, about in found["splits"].items():
        print(split, "has {clips} usable clips, {frames} frames in {shards} shards".format(**about))
        if about["segment_ids"] != "global" and about["shards"] > 1:
            print("    segment ids begin anew in every shard: no recording runs on into the next shard")
    print("left out:", ", ".join(f"{n} {what}" for what, n in found["dropped"].items()))
    print(f"{'state':24}{'min':>10}{'max':>10}{'mean':>10}{'std':>10}")
    for name, values in found["states"].items():
        print(f"{name:24}{'{min:10.3f}{max:10.3f}{mean:10.3f}{std:10.3f}'.format(**values)}",
              "constant" * (name in found["constant"]))
