"""Data: clips of F video frames and F actions (Sec. 2.1), of the 1X set or of a robot of your own.

    python data.py                                                  # a walk: what a clip is
    python data.py synth --out data/robot --frames 20000            # draw the built-in robot
    python data.py encode --data data/robot --tokenizer weights/tokenizer_dv_tiny.pt --out data/robot_dv
    python data.py info data/robot_dv                               # check a folder, say what it holds
    hf download 1x-technologies/worldmodel --repo-type dataset --local-dir 1x
                --include "train_v2.0/*" --include "val_v2.0/*"     # the 1X set without its older versions

A data folder holds train_v2.0 and val_v2.0, each in the layout of 1X v2.0, nested as here or flat:

    metadata.json                           {"num_shards", "query", "hz", "num_images"}
    metadata/metadata_{i}.json              {"shard_num_frames": N}
    videos/video_{i}.bin | .npy | .mp4      ids int32 (ceil(N/17), 3, 32, 32) | uint8 (N, H, W, 3) | RGB video
    robot_states/states_{i}.bin             float32 (N, A): action k is the robot's state at frame k
    segment_indices/segment_idx_{i}.bin     int32 (N,): the frames of one uninterrupted recording share an id

For a robot of your own, write the raw form (.npy or .mp4, square frames) with your "hz", and add to
metadata.json "action_dim": A, "names": [A strings], "keep": [states to leave unstandardised, such as a
gripper's 0..1], and "segment_ids": "per shard" if segment ids begin anew in every shard, else "global".
Or give a LeRobot dataset (v2.0, v2.1, v3.0; with --camera, --fit, --actions) as it lies.
`encode` makes the same layout with .bin files: clip k is frames 17k..17k+16 of states and segments.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

from tokenizer import (DataError, barrier, command, fingerprint, load_tokenizer, rank_and_world, reason,
                       to_video, write_whole)

FRAMES, PAST, FUTURE = 17, 9, 8  # a clip is 9 past and 8 future frames, 1 + 2 x 8, so 3 latent frames
VOCAB_SIZE = 64_000  # of the 1X files (Cosmos DV): 8 * 8 * 8 * 5 * 5 * 5
STORED = {"discrete": "<i4", "continuous": "<f2"}  # number type of ids and of latents in files
ARM = ("SHOULDER_PITCH", "SHOULDER_ROLL", "SHOULDER_YAW", "ELBOW_PITCH", "ELBOW_YAW", "WRIST_PITCH",
       "WRIST_ROLL")
JOINTS = ("HIP_YAW", "HIP_ROLL", "HIP_PITCH", "KNEE_PITCH", "ANKLE_ROLL", "ANKLE_PITCH",
          *("LEFT_" + joint for joint in ARM), *("RIGHT_" + joint for joint in ARM), "NECK_PITCH",
          "LEFT_HAND_CLOSURE", "RIGHT_HAND_CLOSURE", "LINEAR_VELOCITY", "ANGULAR_VELOCITY")
HERE = os.path.dirname(os.path.abspath(__file__))

# ---- bad input: every error is one sentence that names the file ----------------------------------

def check(ok, sentence):
    if not ok:
        raise DataError(sentence)

@contextlib.contextmanager
def reading(file, trouble="cannot be read", way_out="fetch or write it again"):
    """What json, numpy, PyAV, torch or the file system say against a file is passed on as one sentence."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{file} is missing: fetch it, or finish the command that writes it") from None
    except ImportError as error:
        raise DataError(f"{file} needs another package to be read: pip install {error.name}") from None
    except Exception as error:  # a damaged header can raise nearly anything
        raise DataError(f"{file} {trouble} ({reason(error)}): {way_out}") from None

# What metadata files of 1X and LeRobot hold, [type] being a list of it. Other keys are checked where used.
METADATA = {"num_shards": int, "num_images": int, "shard_num_frames": int, "action_dim": int, "hz": float,
            "names": [str], "keep": [int], "clip_shape": [int], "tokenizer": dict, "fps": float,
            "chunks_size": int, "features": dict, "data_path": str}

def is_of(kind, value):
    """Is a value of a JSON file of this type and, if it is a number, positive? True is no number."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(item, kind[0]) for item in value)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 < value < math.inf
    return isinstance(value, kind)

def read_json(file, *needed):
    """A metadata file as a dict that holds the needed keys, of METADATA's types; its numbers are positive."""
    with reading(file):
        meta = dict(json.loads(Path(file).read_text(encoding="utf-8")))
    for key in METADATA.keys() & {*needed, *meta}:
        value = meta.get(key)
        check(is_of(METADATA[key], value),
              f"{file} says {key} = {value!r:.100}, not of its type or not positive: correct it")
    return meta

# ---- folders and files ---------------------------------------------------------------------------

def only(paths):
    """The one of these paths that exists."""
    found = [path for path in paths if os.path.exists(path)]
    check(found, f"{paths[0]} is missing: fetch it again")
    check(len(found) == 1, f"{' and '.join(found)} are both there: keep the one you mean")
    return found[0]

def is_lerobot(path):
    """The file that makes a folder a LeRobot dataset, of version 2 or 3 or, to be refused, of 1; or []."""
    return [*filter(os.path.exists, (f"{path}/meta/info.json", f"{path}/meta_data/info.json"))]

def split_folders(path):
    """{"train": folder, "val": folder} of a data folder, or the one split that `path` itself is."""
    path, found = os.fspath(path), {}
    if is_lerobot(path):  # its reader divides the episodes
        return {"train": path, "val": path}
    if os.path.exists(f"{path}/metadata.json"):
        # A link is judged by what it points to, and a robot called "valkyrie" is no validation split.
        name = os.path.basename(os.path.realpath(path))
        return {"val" if re.match("val([_-]|$)", name) else "train": path}
    for split in ("train", "val"):
        spellings = [f"{path}/{split}_v2.0", f"{path}/{split}_v2.0_raw"]
        if any(map(os.path.isdir, spellings)):
            found[split] = only(spellings)
    check(found, f"{path} is no folder with train_v2.0, val_v2.0, metadata.json or meta/info.json: give the "
                 "folder above them, or finish the download")
    return found

def split_folder(path, split):
    """The folder of one split; where `path` is the other split, the folder of the same spelling beside it."""
    path, found = os.fspath(path), split_folders(path)
    if split not in found and path in found.values():
        other, folder = "train" if split == "val" else "val", Path(path).absolute()
        beside = folder.with_name(folder.name.replace(other, split))
        found = split_folders(beside) if beside.is_dir() else found
    check(split in found, f"{path} holds no {split} split, only {list(found.values())}: add {split}_v2.0")
    return found[split]

def open_array(file, dtype, shape):
    """A flat binary file as a read-only memory map. It is opened for every access, as in nanoGPT: nothing is
    pickled, nothing leaks, and a file that was cut meanwhile is an error here instead of a dead process."""
    with reading(file):
        return np.memmap(file, dtype, "r").reshape(shape)

# ---- one split folder: the reader of the 1X layout -----------------------------------------------

FOLDERS = {"metadata": ["metadata", ""], "video": ["videos", ""], "states": ["robot_states", "states", ""],
           "segment_idx": ["segment_indices", "segment_idx", ""]}  # where the files of a shard may lie

class Reader1X:
    """One split folder in the layout of 1X v2.0. A reader of another layout has what this one has:

    path, meta          the folder, and its metadata.json as a dict
    hz, names, keep     frames a second; names of the A states; numbers of those that are never standardised
    kind                "raw" | "discrete" | "continuous"; of a stored clip also `shape` and `vocab_size`
    lengths             frames of every shard; its video and states are in `files` and `state_files`
    edges               where each recording begins, in frames counted over all shards; last, their number
    segment_ids         "global", or "per shard" where no recording runs on into the next shard
    on_grid             clips are frames 17k..17k+16 of a shard, as in 1X's tokens, not of a recording
    video(i)            shard i's video, indexed by an array of frames (raw) or by a clip's number
    states(i)           shard i's states, float32 (N, A)"""

    def __init__(self, path, split):
        self.path, self.file, self.mp4s = path, f"{path}/metadata.json", {}
        self.meta = meta = read_json(self.file, "num_shards", "num_images", "hz")
        # 1. The states. The hand closures of 1X's robot are kept as they are.
        self.hz, A = float(meta["hz"]), meta.get("action_dim", len(JOINTS))
        names = JOINTS if A == len(JOINTS) else [f"STATE_{j}" for j in range(A)]
        self.names = tuple(meta.get("names", names))
        self.keep = tuple(meta.get("keep", (21, 22) if self.names == JOINTS else ()))
        self._demand("names", len({*self.names}) == A, f"{A} different strings")
        self._demand("keep", {*self.keep} <= {*range(A)}, f"numbers of states, 0..{A - 1}")
        # 2. The shards. All have the kind of the first.
        self.lengths, self.files, self.state_files, ids = [], [], [], []
        suffixes = [".bin", ".npy", ".mp4"]
        for i in range(meta["num_shards"]):
            file = self._find("metadata", i, ".json")
            about = read_json(file, "shard_num_frames")
            n = about["shard_num_frames"]
            check(about.get("shard_ind", i) == i, f"{file} is not of shard {i}, as its name: fetch it again")
            self.lengths.append(n)
            self.files.append(self._find("video", i, *suffixes))
            self.state_files.append(self._find("states", i, ".bin"))
            self.states(i)  # an error here if its size is not right
            ids.append(open_array(self._find("segment_idx", i, ".bin"), "<i4", n))
            suffixes = [self.files[0][-4:]]
        ends = np.cumsum(self.lengths)
        self._demand("num_images", meta["num_images"] == ends[-1], f"{ends[-1]}, the frames of all shards")
        # 3. Recordings. In the 1X set ids count over all shards, and one may run on into the next shard.
        #    Where all shards begin with 0 and metadata.json does not tell, none does, lest a clip mix two.
        count_on = any(shard[0] for shard in ids)
        self.segment_ids = meta.get("segment_ids", "global" if count_on else "per shard")
        if self.segment_ids == "global":
            ends = ends[-1:]
        changes = np.flatnonzero(np.diff(np.concatenate(ids))) + 1
        self.edges = np.unique([0, *changes, *ends])
        # 4. What a stored clip is. Windows of 1X's raw validation split lie on the grid of its tokens, too.
        self.kind = meta.get("kind", "discrete") if suffixes == [".bin"] else "raw"
        is_1x = self.names == JOINTS and self.hz == 30 and "robot" not in meta
        self.on_grid = self.kind != "raw" or is_1x and split == "val"
        self.shape = tuple(meta.get("clip_shape", (3, 32, 32)))
        self.vocab_size = meta.get("tokenizer", {}).get("vocab_size", VOCAB_SIZE)
        axes = {"raw": 3, "discrete": 3, "continuous": 4}
        self._demand("kind", self.kind in axes, f"one of {[*axes]}")
        fits = len(self.shape) == axes[self.kind] and min(self.shape) > 0 and self.shape[-3] in (3, 5)
        self._demand("clip_shape", fits, "[channels if continuous, T = 3 or 5, height, width]")

    def _demand(self, key, ok, want):
        check(ok, f"{self.file} says {key} = {self.meta.get(key)!r:.100}, not {want}: correct it")

    def _find(self, kind, i, *suffixes):
        names = [f"{kind}_{i}{suffix}" for suffix in suffixes]
        return only([os.path.join(self.path, folder, name) for folder in FOLDERS[kind] for name in names])

    def video(self, i):
        file, n = self.files[i], self.lengths[i]
        if self.kind != "raw":
            return open_array(file, STORED[self.kind], (math.ceil(n / FRAMES), *self.shape))
        if file.endswith(".mp4"):
            from examples.mp4 import Mp4  # frames by number, upright and exact: no part of this course
            if file not in self.mp4s:
                self.mp4s[file] = Mp4(file, n)  # kept for its table of times
            return self.mp4s[file]
        with reading(file):
            video = np.lib.format.open_memmap(file, mode="r")
        check((video.dtype, video.ndim, *video.shape[::3]) == (np.uint8, 4, n, 3),
              f"{file} holds {video.dtype} {video.shape}: write uint8 ({n}, H, W, 3), a frame per state")
        return video

    def states(self, i):
        return open_array(self.state_files[i], "<f4", (self.lengths[i], len(self.names)))

# ---- clips ---------------------------------------------------------------------------------------

SOURCE = {"camera": "of a LeRobot folder: which camera (default: the only one, or the head's)",
          "fit": "crop: the centre square of its frames (default); pad: all of them, with black bars",
          "actions": "observation.state (default), or action: commands, told where they take effect"}

@functools.cache
def say_once(sentence):
    """Says what was chosen for the user, on rank 0, beside the output of `info --json`."""
    if rank_and_world()[0] == 0:
        print(sentence, file=sys.stderr)

class Clips(Dataset):
    """All usable clips of one split, in order; `open_clips` makes it and says what an item is. `shape` is
    that of a clip's video; `hz` frames make a second (after frame_stride); `starts` are the first frames of
    clips, counted over all shards; `crossing` clips are not among them. All else is the reader's."""

    def __init__(self, reader, frames=FRAMES, stride=None, size=None, frame_stride=1):
        self.reader, self.path, self.meta, self.kind = reader, reader.path, reader.meta, reader.kind
        self.names, self.keep, self.action_dim = reader.names, reader.keep, len(reader.names)
        self.edges, self.vocab_size = reader.edges, reader.vocab_size
        self.bounds = np.cumsum([0, *reader.lengths])  # where each shard begins; last, the end
        if self.kind == "raw":
            self.size = size or reader.video(0).shape[1]
            self.shape = (frames, self.size, self.size, 3)
            for i, file in enumerate(reader.files):
                height, width = reader.video(i).shape[1:3]
                check(height == width and (size or height == self.size),
                      f"{file} has frames of {width} x {height}: bring all frames to squares of one size")
        else:  # as `encode` chose
            frames, stride, frame_stride, self.shape = FRAMES, None, 1, reader.shape
        self.frames, self.frame_stride, self.hz = frames, frame_stride, reader.hz / frame_stride
        self.on_grid = reader.on_grid and (frames, stride, frame_stride) == (FRAMES, None, 1)
        if self.on_grid and self.kind == "raw":
            say_once(f"{self.path}: clips begin where those of 1X's tokens do, every 17 frames of a shard")
        self.find_clips(stride or frames * frame_stride)
        if self.kind != "raw":  # a first look; the rest when it is read
            for i in range(len(reader.lengths)):
                self.stored(i, 0)
                self.stored(i, -1)

    def find_clips(self, step):
        """Windows begin every `step` frames of a recording. Stored clips begin every 17 frames of a shard and
        so do, `on_grid`, those of 1X's raw validation split: both models are scored on the same frames."""
        self.stride = step
        to_last = (self.frames - 1) * self.frame_stride  # from a clip's first frame to its last
        bounds = self.bounds if self.on_grid else self.edges
        starts = np.concatenate([np.arange(a, b - to_last, step) for a, b in zip(bounds, bounds[1:])])
        # A recording's number changes at every edge, also where the same segment id comes back.
        is_whole = self.segment(starts) == self.segment(starts + to_last)
        self.starts = starts[is_whole]
        self.crossing = len(starts) - len(self.starts)

    def segment(self, frame):
        """Number of the recording that a frame belongs to."""
        return np.searchsorted(self.edges, frame, side="right") - 1

    def _by_shard(self, frames):
        """Yields (shard, frames counted within it) for each shard that the ascending frames touch."""
        shards = np.searchsorted(self.bounds, frames, side="right") - 1
        for i in np.unique(shards):
            yield i, frames[shards == i] - self.bounds[i]

    def stored(self, i, k):
        """Clip k of shard i of ids or latents, which are checked where they are read."""
        video = torch.from_numpy(np.array(self.reader.video(i)[k]))
        low, high = -65504, 65504  # of float16
        if self.kind == "discrete":
            video, low, high = video.long(), 0, self.vocab_size - 1
        check(low <= video.min() and video.max() <= high, f"{self.reader.files[i]} has values outside "
              f"{low}..{high} in clip {k}: fetch or encode that shard again")
        return video if self.kind == "discrete" else video.float()

    def states(self, frames):
        """States of these frames of the split, which ascend: (n,) -> float32 (n, A)."""
        parts = [np.zeros((0, self.action_dim), np.float32)]
        for i, local in self._by_shard(frames):
            x = self.reader.states(i)[local]
            bad = local[~np.isfinite(x).all(1)]
            check(bad.size == 0, f"{self.reader.state_files[i]} has states that are not finite at frames "
                                 f"{bad[:5]}: fetch that shard again, or cut those frames out")
            parts.append(x)
        return np.concatenate(parts)

    def recording(self, segment):
        """All states of one recording, (n, A)."""
        return self.states(np.arange(self.edges[segment], self.edges[segment + 1]))

    def __len__(self):
        return len(self.starts)

    def _frames(self, i):
        return self.starts[i] + self.frame_stride * np.arange(self.frames)

    def __getitem__(self, i):
        frames = self._frames(i)
        if self.kind == "raw":
            # A window may run over the border of two shards, whose files are read one after the other.
            parts = [self.reader.video(shard)[local] for shard, local in self._by_shard(frames)]
            video = resize(torch.from_numpy(np.concatenate(parts)), self.size)
        else:
            (shard, local), = self._by_shard(frames)
            video = self.stored(shard, local[0] // FRAMES)
        return {"video": video, "actions": torch.from_numpy(self.states(frames)), "index": i}

    def more_actions(self, i, n):
        """The up to n actions that follow clip i in its recording: float32 (<= n, A). Stored `windows` have
        none, since there the next clip does not begin where this one ends."""
        end = self.edges[self.segment(self.starts[i]) + 1]
        frames = np.arange(self.starts[i], end, self.frame_stride)[self.frames:]
        n = 0 if self.meta.get("windows") else n
        return torch.from_numpy(self.states(frames[:n]))

    def where(self, i):
        """"shard 3, frames 170..186", for messages that name a clip."""
        parts = self._by_shard(self._frames(i))
        return " and ".join(f"shard {shard}, frames {local[0]}..{local[-1]}" for shard, local in parts)

def add_source_flags(parser):
    for name, help in SOURCE.items():
        parser.add_argument(f"--{name}", default="", help=help)

def open_reader(folder, split, **source):
    """The reader of one split. `source` chooses among what a LeRobot dataset holds several of."""
    source = {key: value for key, value in source.items() if value}
    if is_lerobot(folder):
        from examples.lerobot import ReaderLeRobot
        return ReaderLeRobot(folder, split, **source)
    for key, value in source.items():
        raise DataError(f"{folder} is no LeRobot dataset, to which --{key} {value} belongs: leave it out")
    return Reader1X(folder, split)

def open_clips(path, split="train", frames=FRAMES, stride=None, size=None, frame_stride=1, **source):
    """The clips of one split of a data folder, a map-style dataset; DataError for anything inconsistent.

    clips[i] -> {"video": raw uint8 (F, H, W, 3) | ids int64 (T, H, W) | latents float32 (C, T, H, W),
                 "actions": float32 (F, A), "index": i}

    frame_stride  takes every n-th frame and, alike, every n-th action
    stride        frames from one window's start to the next; by default windows do not overlap
    size          raw frames are resized to size x size, antialiased
    source        camera, fit and actions, see SOURCE
    Token and latent files hold a clip per 17 frames; `encode` chose their stride, size and frame_stride."""
    for key, value in dict(frames=frames, stride=stride, size=size, frame_stride=frame_stride).items():
        check(value is None or value > 0, f"{path}: {key} is {value}: give a positive whole number")
    clips = Clips(open_reader(split_folder(path, split), split, **source), frames, stride, size, frame_stride)
    # Tokenizers take 1 + 8n frames and a size of 8n.
    for key, value, rest in (("frames", frames, 1), ("size", getattr(clips, "size", 8), 0)):
        below = value - (value - rest) % 8
        check(value == below,
              f"{clips.path} is not tokenized at {key} {value}: ask for {key} {below or 8} or {below + 8}")
    stored = clips.meta.get("frame_stride", 1)
    check(clips.kind == "raw" or frames == FRAMES and frame_stride in (1, stored),
          f"{clips.path} holds clips of {FRAMES} frames at frame_stride {stored}: encode the raw video again")
    check(len(clips), f"{clips.path} has no clip of {frames} frames within one segment: record for longer")
    return clips

def resize(video, size):
    """uint8 (F, H, W, 3) -> (F, size, size, 3), antialiased."""
    if video.shape[1] == size:
        return video
    video = video.permute(0, 3, 1, 2)
    video = torch.nn.functional.interpolate(video, (size, size), mode="bilinear", antialias=True)
    return video.permute(0, 2, 3, 1).contiguous()

# ---- statistics of the states --------------------------------------------------------------------

def moments(blocks):
    """(low, high, mean, std) per column of the blocks (n, A), float64 (A,) each, in one pass. Sums are of
    differences to the first row, so that a constant has a standard deviation of exactly 0."""
    n, total, square, low, high, first = 0, 0.0, 0.0, np.inf, -np.inf, None
    for x in blocks:
        x = x.astype(np.float64)
        first = x[0] if first is None else first
        n += len(x)
        total += (x - first).sum(0)
        square += ((x - first) ** 2).sum(0)
        low = np.minimum(low, x.min(0))
        high = np.maximum(high, x.max(0))
    variance = square / n - (total / n) ** 2
    return low, high, first + total / n, np.sqrt(np.maximum(variance, 0))

def is_constant(low, high):
    """States that move by no more than float32 rounds them."""
    size = np.maximum(abs(low), abs(high))
    return high - low <= 1e-6 * size.clip(1)

def action_statistics(clips):
    """{"mean": (A,), "std": (A,)}, float32, over the recordings of the training split that hold a clip.
    Constant states get std 1; states of `keep` get mean 0 and std 1, which leaves them as they are."""
    used, keep = np.unique(clips.segment(clips.starts)), list(clips.keep)
    low, high, mean, std = moments(map(clips.recording, used))
    std[is_constant(low, high)] = 1
    mean[keep], std[keep] = 0, 1
    return {"mean": torch.from_numpy(mean).float(), "std": torch.from_numpy(std).float()}

# ---- writing: each file whole or absent, the metadata last ---------------------------------------

def save(file, content):
    """Writes .npy, .json or an array's bytes."""
    def write(temporary):
        with open(temporary, "wb") as f:
            if file.endswith(".npy"):
                np.save(f, content)
            elif file.endswith(".json"):
                f.write(json.dumps(content, indent=1).encode())
            else:
                f.write(np.ascontiguousarray(content))
    write_whole(file, write)

def shard_files(folder, i, suffix):
    return [f"{folder}/videos/video_{i}{suffix}", f"{folder}/robot_states/states_{i}.bin",
            f"{folder}/segment_indices/segment_idx_{i}.bin", f"{folder}/metadata/metadata_{i}.json"]

def save_shard(folder, i, suffix, video, states, segments):
    """Writes shard i: video (suffix ".npy" or ".bin"), states (N, A), segment ids (N,), last its metadata."""
    meta = {"shard_num_frames": len(states), "shard_ind": i}
    contents = video, np.asarray(states, "<f4"), np.asarray(segments, "<i4"), meta
    for file, content in zip(shard_files(folder, i, suffix), contents):
        save(file, content)

def synth(out, **options):
    """The built-in robot as a data folder of raw video; examples/robot.py says how, and takes the options."""
    from examples import robot
    return robot.synth(out, **options)

# ---- encoding raw video with a tokenizer ---------------------------------------------------------

ENOUGH = 5000  # clips to train on, where recordings are so short that they overlap
CLIPS_PER_SHARD = 256
READERS = 6  # threads that read clips for a GPU, some 20 a second each (512 x 512 pixels to 256 x 256)

def training_stride(clips):
    """Frames from one training clip to the next, so that there are about ENOUGH clips: of little data they
    overlap, for a model memorises clips that it sees too often."""
    return int(np.clip(clips.edges[-1] // ENOUGH, 1, FRAMES * clips.frame_stride))

def recoloured(video, i):
    """Frames (F, H, W, 3) of clip i, two clips of three in other colours: what a few rooms look like is soon
    known by heart, and then the model meets another one. Of many rooms it is better to see the true colours
    (tests/RESULTS.md)."""
    rng = np.random.default_rng(i)
    if rng.random() < 1 / 3:
        return video
    brightness = torch.from_numpy(rng.uniform(0.75, 1.25, 3))
    return (video[..., rng.permutation(3)] * brightness).round().clamp(0, 255).to(torch.uint8)

def made_of(clips):
    """A hash of recordings: all states, and of each video's file its length, begin, middle and end."""
    found = hashlib.sha256(repr([*clips.edges]).encode())
    for i in range(len(clips.reader.lengths)):
        found.update(clips.reader.states(i))
    for file in dict.fromkeys(clips.reader.files):
        content = open_array(file, np.uint8, -1)
        n = content.size
        for k in (0, n // 2, max(0, n - 65536)):
            found.update(content[k:k + 65536])
            found.update(b"%d" % n)
    return found.hexdigest()

def ahead(pool, n, function, jobs):
    """map(function, jobs), of which a pool's threads do up to n before their turn."""
    waiting = []
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > n:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()

def encode(data, tokenizer_path, out, size=None, stride=None, frame_stride=1, splits=("train", "val"),
           batch=8, device=None, progress=True, recolour=None, **source):
    """Raw video -> a data folder of ids (int32) or latents (float16), which is read like the 1X set.

    Training clips begin `stride` frames apart, by default as `training_stride` says; those for validation
    never overlap. recolour: whether training clips are `recoloured`; by default, without a stride, where
    there are fewer than ENOUGH frames. Under torchrun shard j belongs to rank j mod WORLD_SIZE. A shard is
    written whole or not at all and always in the same batches: a run that was killed goes on where it was,
    to the same bytes."""
    check(batch > 0, f"{out} cannot be made in batches of {batch}: give a positive --batch")
    # 1. The tokenizer, and what a cache says of it.
    if not device:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    about = {"path": os.path.abspath(tokenizer_path), "sha256": fingerprint(tokenizer_path)}
    with reading(tokenizer_path, f"cannot be put on device {device}", "give another --device"):
        tokenizer = load_tokenizer(tokenizer_path, device)
    for key in ("kind", "spatial", "temporal", "vocab_size", "channels", "levels"):
        if hasattr(tokenizer, key):
            about[key] = getattr(tokenizer, key)
    # 2. Split by split.
    for split in sorted({*split_folders(data)} & {*splits}):
        apart = stride if split == "train" else None
        clips = open_clips(data, split, stride=apart, size=size, frame_stride=frame_stride, **source)
        check(clips.kind == "raw", f"{clips.path} is tokenized already: give the folder of raw video")
        if split == "train" and not stride:
            clips.find_clips(training_stride(clips))
        is_little = not stride and int(clips.edges[-1]) < ENOUGH * frame_stride
        colours = split == "train" and (is_little if recolour is None else recolour)
        encode_split(clips, f"{out}/{split}_v2.0", tokenizer, about, batch, device, progress, colours)
    return out

def encode_split(clips, folder, tokenizer, about, batch, device, progress, recolour):
    """One split of `encode`: says to `make_split` how a shard is made and what metadata.json holds."""
    from examples.shards import make_split

    # 1. How clips are encoded. The first one shows the shape of all.
    def read(numbers):
        items = [clips[i] for i in numbers]
        if recolour:
            for item in items:
                item["video"] = recoloured(item["video"], item["index"])
        return items

    def encoded(items):
        video = to_video(torch.stack([item["video"] for item in items])).to(device)
        with torch.inference_mode():
            latents = tokenizer.encode(video).cpu()
        check(latents.isfinite().all(), f"{about['path']} turns {clips.where(items[0]['index'])} of "
              f"{clips.path} into latents that are not finite: give another tokenizer")
        return latents.numpy().astype(STORED[about["kind"]])

    example = encoded(read([0]))[0]
    clip_bytes = example.nbytes, FRAMES * clips.action_dim * 4  # of its latents, of its states

    # 2. How a shard is made, batch by batch. Threads read the next ones while a GPU encodes; the cores of a
    #    machine without one are busy encoding.
    shards = dict(enumerate(BatchSampler(range(len(clips)), CLIPS_PER_SHARD, drop_last=False)))
    units = {j: len(numbers) for j, numbers in shards.items()}
    quiet = not progress or rank_and_world()[0] > 0
    pool, on_gpu = ThreadPoolExecutor(READERS), device.startswith("cuda")

    def make_shard(j):
        batches = BatchSampler(shards[j], batch, drop_last=False)
        latents, actions = [], []
        items_of = ahead(pool, READERS, read, batches) if on_gpu else map(read, batches)
        for items in tqdm(items_of, f"shard {j}", len(batches), leave=False, disable=quiet):
            latents.append(encoded(items))
            actions += [item["actions"] for item in items]
        segments = clips.segment(clips.starts[shards[j]])
        return np.concatenate(latents), np.concatenate(actions), np.repeat(segments, FRAMES)

    # 3. What the cache is made with. It may move together with its source, so that settings.json holds the
    #    way from one to the other.
    layout = {"source": os.path.abspath(clips.path), "size": clips.size, "stride": clips.stride,
              "frame_stride": clips.frame_stride}
    if recolour:
        layout["recoloured"] = True
    for key in ("groups", "opened", "robot", "velocities"):
        if key in clips.meta:
            layout[key] = clips.meta[key]
    settings = {**layout, "clips": len(clips), "batch": batch, "tokenizer_sha256": about["sha256"],
                "source": os.path.relpath(clips.path, folder), "source_sha256": made_of(clips)}
    # 4. Make it.
    if not quiet:
        colours = ", two of three in other colours (--no-recolour: as they are)" if recolour else ""
        print(f"{folder}: {len(clips)} clips, one every {clips.stride} of {clips.edges[-1]} frames, in "
              f"{len(clips) * sum(clip_bytes) / 1e9:.3g} GB{colours}")
    meta = functools.partial(cache_metadata, clips, folder, layout, about, example, len(shards))
    with pool:
        make_split(folder, settings, units, make_shard, meta, lambda j: [units[j] * n for n in clip_bytes],
                   rank_and_world(), progress, "clip", "encoding")

def cache_metadata(clips, folder, layout, about, example, n_shards):
    """The metadata.json of encoded clips, whose shards are whole. Clips of another stride than their length
    do not follow one another: they are `windows`."""
    meta = {"num_shards": n_shards, "query": None, "hz": clips.hz, "num_images": len(clips) * FRAMES,
            "action_dim": clips.action_dim, "names": clips.names, "keep": clips.keep,
            "segment_ids": "global", "kind": about["kind"], "dtype": str(example.dtype),
            "clip_shape": example.shape, **layout, "tokenizer": about,
            "windows": clips.on_grid or clips.stride != FRAMES * clips.frame_stride}
    if clips.on_grid:  # where in its recording each clip begins, for the list of clips in evaluate.py
        recording_starts = clips.edges[clips.segment(clips.starts)]
        meta["first"] = (clips.starts - recording_starts).tolist()

    def channels_last():
        for j in range(n_shards):
            latents = open_array(f"{folder}/videos/video_{j}.bin", example.dtype, (-1, *example.shape))
            yield np.moveaxis(latents, 1, -1).reshape(-1, len(example))

    if about["kind"] == "continuous":  # Flow-HWM standardises every channel; 1 is of those that never change
        _, _, mean, std = moments(channels_last())
        meta.update(latent_mean=mean.tolist(), latent_std=np.where(std == 0, 1, std).tolist())
    return meta

SHIPPED_TOKENIZERS = {"discrete": "weights/tokenizer_dv_tiny.pt",
                      "continuous": "weights/tokenizer_cv_tiny.pt"}
ROBOT, ROBOT_STRIDE = "data/robot", 4  # the built-in robot's folder; frames between clips that train on it

def prepare_data(kind, data="", tokenizer="", robot_frames=20_000, encode_raw=False, device="cpu", say=print,
                 stride=None, recolour=None, **source):
    """Makes what is missing to train on latents of this kind; returns (their folder, their tokenizer's path).
    Without `data` the built-in robot is drawn and encoded; raw video in `data` is encoded if `encode_raw` is
    True, with `stride`, `recolour` and `source` as `encode` takes them."""
    # 1. The tokenizer and the data that are asked for, or those that come with the house.
    check(not tokenizer or os.path.exists(tokenizer),
          f"there is no tokenizer at {tokenizer}: give a file made by `python tokenizer.py train`")
    encoder = tokenizer or os.path.join(HERE, SHIPPED_TOKENIZERS[kind])
    folder, rank = data or ROBOT, rank_and_world()[0]
    if not data and rank == 0:
        synth(folder, frames=robot_frames)
    barrier()
    clips = open_clips(folder, "train", **source)
    # 2. Raw video becomes latents beside it.
    if clips.kind == "raw":
        cache = f"{folder.rstrip('/')}_{kind}"
        check(encode_raw or not data,
              f"{folder} holds raw video: add --encode to have it encoded, or run `python data.py encode "
              f"--data {folder} --tokenizer {encoder} --out {cache}` and train on that")
        say(f"{cache}: {folder} encoded with {encoder}; what is missing there is encoded now")
        encode(folder, encoder, cache, stride=stride if data else ROBOT_STRIDE, device=device,
               progress=rank == 0, recolour=recolour, **source)
        barrier()
        folder, clips = cache, open_clips(cache, "train")
    # 3. Latents must be of the model's kind, and of the tokenizer that is asked for.
    check(clips.kind == kind, f"{folder} holds {clips.kind} latents, this model is trained on {kind} ones: "
                              f"give a folder encoded with a {kind} tokenizer, or the other --model")
    about = clips.meta.get("tokenizer", {})
    check(not tokenizer or about.get("sha256") in (None, fingerprint(tokenizer)),
          f"{folder} was not encoded with {tokenizer} (the SHA-256 of its tokenizer, {about.get('path')}, "
          f"differs): give that one, or leave --tokenizer out")
    return folder, tokenizer or about.get("path", "")

# ---- what a folder holds, and a walk -------------------------------------------------------------

def info(path, **source):
    """Checks all of a data folder but the pixels, and returns what it holds; examples/info.py says how."""
    from examples import info
    return info.info(path, **source)

def walk():
    """Prints what a clip is, from a few frames of the built-in robot."""
    with tempfile.TemporaryDirectory() as folder:
        clips = open_clips(synth(folder, frames=40, splits=("train",), progress=False))
        clip, stats = clips[0], action_statistics(clips)
    print(f"1. A recording has a state for every frame. Here are 40 frames at {clips.hz:g} Hz.\n"
          f"2. Clips are {FRAMES} frames of it. Here are {len(clips)}; the first is {clips.where(0)}:\n"
          f"   video {tuple(clip['video'].shape)}, actions {tuple(clip['actions'].shape)}.\n"
          "3. One clock: action k is frame k's state; latent 0 is frame 0, latent i is frames 8i-7..8i.\n"
          "    frame  latent          LINEAR_VELOCITY  standardised")
    standardised = (clip["actions"] - stats["mean"]) / stats["std"]
    for k in range(FRAMES):
        part = "past" if k < PAST else "future"
        latent, (speed, z) = math.ceil(k / 8), (clip["actions"][k, 23], standardised[k, 23])
        print(f"{k:9}{latent:8}  {part:8}{speed:15.3f}{z:14.3f}")

# ---- commands ------------------------------------------------------------------------------------

@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    p = commands.add_parser("synth", help="draw the built-in robot",
                            epilog="example: python data.py synth --out data/robot --frames 20000")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--frames", type=int, default=20_000, help="to train on; a tenth, at least 1700, validate")
    p.add_argument("--size", type=int, default=64, help="frames are size x size")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hard", action="store_true", help="textures everywhere, other rooms in validation")
    p = commands.add_parser("encode", help="raw video to token ids or latents",
                            epilog="example: torchrun --nproc_per_node=2 data.py encode --data 1x "
                                   "--tokenizer Cosmos-0.1-Tokenizer-CV8x16x16 --out 1x_cv --size 256")
    p.add_argument("--data", required=True, help="folder of raw video")
    p.add_argument("--tokenizer", required=True, dest="tokenizer_path", metavar="FILE",
                   help="a .pt, or a folder with NVIDIA's .jit files")
    p.add_argument("--out", required=True, help="folder to make, or to go on with")
    p.add_argument("--size", type=int, help="resize frames to size x size")
    p.add_argument("--stride", type=int, help="frames from a training clip to the next (default: 5000 clips)")
    p.add_argument("--recolour", action=argparse.BooleanOptionalAction, default=None,
                   help="two of three training clips in other colours (default: of less than 5000 frames, "
                   "without --stride)")
    p.add_argument("--frame_stride", type=int, default=1, help="take every n-th frame and action")
    p.add_argument("--batch", type=int, default=8, help="clips encoded at a time")
    p.add_argument("--device", help="default: the rank's GPU, or cpu")
    p = commands.add_parser("info", help="check a folder in full and say what it holds",
                            epilog="example: python data.py info data/robot --json")
    p.add_argument("path", metavar="DIR")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    for p in (commands.choices["encode"], commands.choices["info"]):
        add_source_flags(p)
    options = vars(parser.parse_args(argv))
    run = options.pop("command")
    if run == "info":
        from examples.info import show
        show(**options)
    else:
        {None: walk, "synth": synth, "encode": encode}[run](**options)

if __name__ == "__main__":
    main()
