"""A reader of another layout: LeRobot datasets as they lie, with the interface of data.Reader1X.

A reader of yours takes its place in data.open_reader. Nothing of the lerobot package is needed, whose
versions come and go: pyarrow reads the tables, PyAV the videos. See the README, "Your own robot".
"""
import json
import os
import re
from pathlib import Path

import numpy as np

from data import VOCAB_SIZE, check, is_lerobot, only, read_json, reading, say_once
from examples.mp4 import Mp4

PARTS = {"base": r"base|wheel|odom|linear|angular|^(x|y|theta)\b", "head": "head|neck",  # the first counts
         "waist": "waist|torso", "leg": "leg|hip|knee|ankle", "hand": "hand|grip|finger|claw", "arm": ""}

class ReaderLeRobot:
    """One split of a LeRobot dataset of version 2.0, 2.1 or 3.0 as it lies, see Reader1X. Every episode is a
    shard and a recording; the last tenth of them, but at least one, is for validation. SOURCE says what can
    be chosen. A camera's name, or the last part of it, is a feature's. Of `actions` that begin with "action"
    the command of frame k takes effect at frame k + 1, whose state it is here; an episode's frame 0 has none
    and is left out."""
    kind, keep, vocab_size, segment_ids, on_grid = "raw", (), VOCAB_SIZE, "global", False

    def __init__(self, path, split, camera="", fit="crop", actions="observation.state"):
        self.path, self.column, self.fit, self.late = path, actions, fit, int(actions.startswith("action"))
        self.tables, self.mp4s, self.file = {}, {}, only(is_lerobot(path))
        version = read_json(self.file).get("codebase_version")
        check(version in ("v2.0", "v2.1", "v3.0"), f"{self.file} says codebase_version = {version!r}: bring "
                                                   "the data to v2.1 or v3.0 with lerobot's own converters")
        check(fit in ("crop", "pad"), f"{path} cannot be read with --fit {fit}: give crop or pad")
        self.info = read_json(self.file, "fps", "features", "data_path")
        self.hz = float(self.info["fps"])
        with reading(self.file):
            self.camera, self.names = self._find_camera(camera), self._find_names()
            self._find_episodes(version, split)
        self.meta = {"robot": self.info.get("robot_type") or "LeRobot",
                     "opened": {"camera": self.camera, "fit": fit, "actions": actions}}
        for j, name in enumerate(map(str.lower, self.names)):
            if name != f"state_{j}":  # a name that says its group
                part = next(part for part, words in PARTS.items() if re.search(words, name))
                group = "_".join([*re.findall("left|right", name)[:1], part])
                self.meta.setdefault("groups", {}).setdefault(group, []).append(j)

    def _find_camera(self, name):
        """The feature of the camera. Of two on one head it is the first."""
        cameras = [key for key, about in self.info["features"].items()
                   if about["dtype"] == "video" and "depth" not in key]
        if name:
            found = [key for key in cameras if name in (key, key.rpartition(".")[2])]
        else:
            heads = [key for key in cameras if re.search("(?<![a-z])(head|ego)", key)]
            found = heads or cameras[:len(cameras) == 1]
        check(found, f"{self.file} lists as videos: {', '.join(cameras) or 'none'}. Give one of them as "
                     "--camera, or write the set with use_videos: pictures are not read")
        return found[0]

    def _find_names(self):
        """Names of the states, listed as [names], [[names]], {"motors": [names]} or {name: number}."""
        features = self.info["features"]
        about = features.get(self.column, {"shape": ()})
        check(len(about["shape"]) == 1, f"{self.file} lists no vectors {self.column}, but "
                                        f"{', '.join(features)}: choose one by --actions")
        A, parts = about["shape"][0], about.get("names") or []
        if isinstance(parts, dict):
            parts = [part for part in parts.values() if isinstance(part, list)] or parts
        names = [str(name) for part in parts for name in np.ravel(part)]
        if len(names) != A:
            names = [f"STATE_{j}" for j in range(A)]
        return tuple(f"{name}_{j}" if names.count(name) > 1 else name for j, name in enumerate(names))

    def _find_episodes(self, version, split):
        """Finds the split's `rows`, a dict for each episode with its number and length and, in v3.0, where in
        which file its states and its frames are; and checks that all files are there."""
        # 1. All episodes, in order of their numbers.
        fields = ["chunk_index", "file_index", "from_timestamp", "to_timestamp"]
        columns = [f"{place}/{field}" for place in ("data", f"videos/{self.camera}") for field in fields]
        files, rows, frames = [f"{self.path}/meta/episodes.jsonl"], [], 0
        if version == "v3.0":
            files = sorted(map(str, Path(self.path, "meta/episodes").rglob("*.parquet")))
        for file in files:
            with reading(file):
                if version == "v3.0":
                    rows += read_parquet(file, ["episode_index", "length", *columns]).to_pylist()
                else:
                    rows += map(json.loads, Path(file).read_text().splitlines())
                rows.sort(key=lambda row: row["episode_index"])
                frames = sum(row["length"] for row in rows)
        for key, number in {"total_episodes": len(rows), "total_frames": frames}.items():
            want = self.info.get(key, number)
            check(number == want, f"{self.path}/meta/episodes lists {key} = {number}, info.json says {want}: "
                                  "finish the download")
        # 2. Those of the split that have a frame.
        rows = [row for row in rows if row["length"] > self.late]
        n_val = max(1, len(rows) // 10)
        check(len(rows) > n_val, f"{self.path} has {len(rows)} episode, but one is to validate: record more")
        say_once(f"{self.path}: camera {self.camera} ({self.fit}), states {self.column}; the last {n_val} of "
                 f"{len(rows)} episodes validate")
        self.rows = rows = rows[-n_val:] if split == "val" else rows[:-n_val]
        self.lengths = [row["length"] - self.late for row in rows]
        self.edges = np.cumsum([0, *self.lengths])
        # 3. Their files.
        self.files = [self._locate("video_path", f"videos/{self.camera}", row) for row in rows]
        self.data_files = [self._locate("data_path", "data", row) for row in rows]
        numbers = [row["episode_index"] for row in rows]
        self.state_files = [f"{file}, episode {k}," for file, k in zip(self.data_files, numbers)]

    def _locate(self, key, place, row):
        """The file of an episode: version 2 counts episodes, version 3 says chunk and file of each."""
        number, size = row["episode_index"], self.info.get("chunks_size", 1000)
        fields = {"video_key": self.camera, "episode_index": number, "episode_chunk": number // size}
        for name in ("chunk_index", "file_index"):
            fields[name] = row.get(f"{place}/{name}")
        return only([os.path.join(self.path, self.info[key].format(**fields))])

    def rows_of(self, i):
        """Times in seconds (n,) and states (n, A) of all rows of episode i, in the order of their times."""
        file, columns = self.data_files[i], ["episode_index", "timestamp", self.column]
        # 1. The whole table, whose columns come in the file's order.
        if file not in self.tables:
            with reading(file):
                table = read_parquet(file, columns)
                episodes, times, states = [np.array(table[name].to_pylist()) for name in columns]
                self.tables[file] = episodes, times, np.float32(states).reshape(-1, len(self.names))
        episodes, times, states = self.tables[file]
        # 2. The episode's own rows.
        n, own = self.rows[i]["length"], np.flatnonzero(episodes == self.rows[i]["episode_index"])
        own = own[np.argsort(times[own])]
        steps = np.diff(times[own]) * self.hz
        odd = np.flatnonzero(abs(steps - 1) >= 0.5)
        check(own.size == n and odd.size == 0,
              f"{self.state_files[i]} has {own.size} rows where {n} are listed, or does not go on at "
              f"{self.hz:g} Hz after rows {odd[:5]}: fetch or record that episode again")
        return times[own], states[own]

    def states(self, i):
        return self.rows_of(i)[1][:self.lengths[i]]

    def video(self, i):
        file = self.files[i]
        if file not in self.mp4s:
            self.mp4s[file] = Mp4(file)  # with its times, for all episodes in it
        return EpisodeVideo(self, i, self.mp4s[file])

class EpisodeVideo:
    """The square frames of an episode: `video[array of numbers]` -> uint8 (n, S, S, 3)."""

    def __init__(self, reader, i, mp4):
        self.reader, self.i, self.mp4 = reader, i, mp4
        sides = mp4.shape[1:3]
        side = max(sides) if reader.fit == "pad" else min(sides)
        self.shape = (reader.lengths[i], side, side, 3)

    def index(self):
        """Numbers of the episode's frames in the file. The plain way is to count from its first frame on,
        which after a missing or doubled one is wrong in silence. Here a row's frame is the one at its time,
        or less than half a frame before or after it, and there are no others."""
        reader, row = self.reader, self.reader.rows[self.i]
        start, stop = (row.get(f"videos/{reader.camera}/{end}_timestamp") for end in ("from", "to"))
        half, seconds = 0.5 / reader.hz, self.mp4.index().times * self.mp4.tick
        want = (start or 0) + reader.rows_of(self.i)[0]
        first, last = np.searchsorted(seconds, [want[0] - half, (stop or np.inf) - half])
        found = seconds[first:last]
        check(found.size == want.size and max(abs(found - want)) < half,
              f"{self.mp4.file} has {found.size} frames for {want.size} rows of {reader.state_files[self.i]} "
              "or not at their times: fetch or record that episode again")
        return np.arange(first, last)[reader.late:]

    def check_times(self, _):
        self.index()

    def __getitem__(self, frames):
        video, side = self.mp4[self.index()[frames]], self.shape[1]
        height, width = video.shape[1:3]
        top, left = abs(height - side) // 2, abs(width - side) // 2
        if self.reader.fit == "crop":
            return video[:, top:top + side, left:left + side]
        bars = [(0, 0), (top, side - height - top), (left, side - width - left), (0, 0)]
        return np.pad(video, bars)

def read_parquet(file, columns):
    from pyarrow import parquet
    return parquet.ParquetFile(file).read(columns)
