"""Data: clips of F video frames and F actions (Sec. 2.1), of the 1X World Model set or of one's own robot.

    python data.py synth --out data/robot --frames 20000            # the built-in robot, drawn in numpy
    python data.py encode --data data/robot --tokenizer weights/tokenizer_dv_tiny.pt --out data/robot_dv
    python data.py info data/robot_dv                               # what a folder holds, checked in full

A data folder holds train_v2.0 and val_v2.0, each in the layout of 1X v2.0, nested as here or flat:

    metadata.json                           {"num_shards", "query", "hz", "num_images"}
    metadata/metadata_{i}.json              {"shard_num_frames": N, "shard_ind": i}
    videos/video_{i}.bin | .npy | .mp4      ids int32 (ceil(N/17), 3, 32, 32) | uint8 (N, H, W, 3) | RGB video
    robot_states/states_{i}.bin             float32 (N, A): action k is the robot's state at frame k
    segment_indices/segment_idx_{i}.bin     int32 (N,): frames of one uninterrupted recording share an id

Your own robot: write the raw form (.npy or .mp4, square frames) with your "hz", and add to metadata.json
"action_dim": A, "names": [A strings], "keep": [states to leave unstandardised, such as a gripper's 0..1].
`encode` makes the same layout with .bin files; their clip k is frames 17k..17k+16 of states and segments.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from glob import escape, glob
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenizer import DataError, fingerprint, rank_and_world

FRAMES, PAST, FUTURE = 17, 9, 8         # a clip is 9 past and 8 future frames, 1 + 2 x 8, so 3 latent frames
VOCAB_SIZE = 64_000                     # of the 1X files (Cosmos DV): 8 * 8 * 8 * 5 * 5 * 5
ARM = ("SHOULDER_PITCH", "SHOULDER_ROLL", "SHOULDER_YAW", "ELBOW_PITCH", "ELBOW_YAW", "WRIST_PITCH",
       "WRIST_ROLL")
JOINTS = ("HIP_YAW", "HIP_ROLL", "HIP_PITCH", "KNEE_PITCH", "ANKLE_ROLL", "ANKLE_PITCH",
          *("LEFT_" + a for a in ARM), *("RIGHT_" + a for a in ARM), "NECK_PITCH",
          "LEFT_HAND_CLOSURE", "RIGHT_HAND_CLOSURE", "LINEAR_VELOCITY", "ANGULAR_VELOCITY")


def check(ok, sentence):
    if not ok:
        raise DataError(sentence)


# ---- files: where they are, and that each is what its metadata says ----------------------------------------

def split_folders(path):
    """{"train": folder, "val": folder} of a data folder, or the one split that `path` itself is."""
    path = os.fspath(path)
    check(os.path.exists(path), f"{path} does not exist: give a data folder, or make one with data.py synth")
    check(os.path.isdir(path), f"{path} is a file: give the folder that holds train_v2.0 and val_v2.0")
    if os.path.exists(f"{path}/metadata.json"):
        return {"val" if os.path.basename(os.path.abspath(path)).startswith("val") else "train": path}
    found = {}
    for split in ("train", "val"):
        folders = list(filter(os.path.isdir, (f"{path}/{split}_v2.0", f"{path}/{split}_v2.0_raw")))
        check(len(folders) < 2, f"{path} holds both {' and '.join(folders)}: give the one you mean instead")
        found.update({split: folder for folder in folders})
    check(found, f"{path} holds neither train_v2.0, val_v2.0 nor metadata.json: give the folder above them")
    return found


def split_folder(path, split):
    """The folder of one split; where `path` is the other split, the folder of the same spelling beside it."""
    path, found = os.fspath(path), split_folders(path)
    parent, name = os.path.split(os.path.abspath(path))
    beside = os.path.join(parent, split + name.removeprefix("train").removeprefix("val"))
    if split not in found and path in found.values() and os.path.isdir(beside):
        found = split_folders(beside)
    check(split in found, f"{path} holds no {split} split, only {list(found.values())}: add {split}_v2.0")
    return found[split]


def read_json(file):
    try:
        with open(file, encoding="utf-8") as f:
            meta = json.load(f)
    except FileNotFoundError:
        raise DataError(f"{file} is missing: fetch it, or finish the command that writes it") from None
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file} cannot be read as JSON ({e}): fetch or write it again") from None
    check(isinstance(meta, dict), f"{file} holds {meta!r:.50}, not a JSON object: fetch or write it again")
    return meta


def read_key(meta, file, key, valid, want, default=None):
    """meta[key], which must be valid; `default` where the file may leave it out."""
    value = meta.get(key, default)
    check(valid(value), f"{file} says {key} = {value!r:.100}, not {want}: correct it or fetch the file again")
    return value


def is_count(value):
    return type(value) is int and value > 0


def is_list(value, kind):
    return isinstance(value, list) and all(type(v) is kind for v in value)


def locate(folder, i, subfolders, names):
    """The one file of shard i among all accepted spellings, nested or flat."""
    places = [os.path.join(folder, s, name.format(i)) for s in (*subfolders, "") for name in names]
    found = [p for p in places if os.path.isfile(p)]
    check(found, f"{places[0]} is missing (shard {i} of {folder}): fetch that shard again")
    check(len(found) < 2, f"{' and '.join(found)} are both there for shard {i}: keep the one you mean")
    return found[0]


def open_array(file, dtype, shape):
    """A flat binary file as a read-only memory map. It is opened for every access, as in nanoGPT: nothing to
    pickle, nothing leaks, and a file that was cut meanwhile is an error here instead of a dead process."""
    need = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        size = os.path.getsize(file)
        check(size == need, f"{file} has {size} bytes where {np.dtype(dtype).name} {tuple(shape)} takes "
                            f"{need}: fetch or write that shard again, or correct its metadata")
        return np.memmap(file, dtype, "r", shape=tuple(shape))
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e}): fetch that shard again") from None


def open_npy(file, frames):
    """Raw video (N, H, W, 3) uint8 as a read-only memory map."""
    try:
        video = np.lib.format.open_memmap(file, mode="r")
    except Exception as e:                                   # a hostile header can raise nearly anything
        why = " ".join(str(e).split())
        raise DataError(f"{file} cannot be read as .npy ({why}): write it again") from None
    check(video.dtype == np.uint8 and video.ndim == 4 and video.shape[::3] == (frames, 3),
          f"{file} holds {video.dtype} {video.shape}: write uint8 ({frames}, H, W, 3), a frame per state")
    return video


class Mp4:
    """Frames of a video file by number, RGB: `Mp4(file, n)[np.array([3, 5])]` -> uint8 (2, H, W, 3).

    A frame's number is its place among the sorted presentation times of all packets, which stays exact with
    B-frames and edit lists; that table is made at the first read. A read seeks to the keyframe before and
    decodes forward, or goes on where the last read ended. A process keeps one file open at a time and never
    one that it got by a fork."""
    live = None                                              # (the Mp4 that is open, its process)

    def __init__(self, file, frames):
        self.file, self.frames, self.times = file, frames, None
        with self._reading("cannot be read as video"), self._open() as container:
            stream = container.streams.video[0]
            self.shape = (frames, stream.height, stream.width, 3)
            if 0 < stream.frames < frames:                   # what the header says; 0 if it says nothing
                self._check_count(stream.frames)

    def _open(self):
        import av
        return av.open(self.file)

    @contextlib.contextmanager
    def _reading(self, trouble):
        try:
            import av
        except ImportError:
            raise DataError(f"{self.file} needs PyAV to be read: pip install av") from None
        try:
            yield
        except DataError:
            raise
        except (av.error.FFmpegError, OSError, ValueError, IndexError) as e:
            raise DataError(f"{self.file} {trouble} ({e}): fetch that shard again") from None

    def _check_count(self, count):
        check(count == self.frames,
              f"{self.file} has {count} frames where its states have {self.frames}: fetch that shard again, "
              f"or cut video, states and segments to one length")

    def index(self):
        """Fill `times` and `keys`, the sorted presentation times of all frames and of the keyframes."""
        if self.times is None:
            with self._reading("cannot be read as video"), self._open() as container:
                packets = [(p.pts, p.is_keyframe) for p in container.demux(container.streams.video[0])
                           if p.pts is not None and not p.is_discard]
            self._check_count(len(packets))
            self.times = np.sort([t for t, _ in packets])
            self.keys = np.sort([t for t, key in packets if key])
        return self

    def __getitem__(self, frames):
        want = self.index().times[frames]
        with self._reading(f"does not decode at frames {frames[0]}..{frames[-1]}"):
            if Mp4.live is None or Mp4.live[0] is not self or Mp4.live[1] != os.getpid():
                if Mp4.live:
                    Mp4.live[0].container.close()
                self.container, self.at, Mp4.live = self._open(), None, (self, os.getpid())
            key = np.searchsorted(self.keys, want[0], side="right") - 1
            if self.at is None or not self.keys[key] <= self.at < want[0]:
                self.decoder = self._decode_from(key)
            out, wanted, self.at = [], set(want.tolist()), None
            for frame in self.decoder:
                if frame.pts in wanted:
                    out.append(frame.to_ndarray(format="rgb24"))
                if frame.pts >= want[-1]:
                    self.at = frame.pts                      # the next read may go on from here
                    break
            return np.stack(out).reshape(len(want), *self.shape[1:])

    def _decode_from(self, key):
        """Frames from keyframe number `key` on. Files are indexed in decoding order, so that a seek among
        short groups of pictures can land on a later keyframe: then the one before is asked for."""
        stream = self.container.streams.video[0]
        for time in self.keys[key::-1]:
            self.container.seek(int(time), stream=stream)
            decoder = self.container.decode(stream)
            first = next(decoder, None)
            if first is not None and first.pts <= time:
                return itertools.chain([first], decoder)
        raise ValueError("no keyframe before them")

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("container", "decoder")}


# ---- clips -------------------------------------------------------------------------------------------------

class Shard(NamedTuple):
    frames: int                 # N
    start: int                  # number of its first frame within the split
    video: str                  # files
    states: str


class Clips(torch.utils.data.Dataset):
    """All usable clips of one split, in order; `open_clips` makes it and says what an item is.

    kind          "raw" | "discrete" | "continuous"
    shape         of a clip's video: raw (F, H, W, 3) | discrete (T, H, W) | continuous (C, T, H, W)
    frames, hz    frames in a clip, and how many make a second (after frame_stride)
    action_dim    A, with `names`, and `keep`: the dimensions that are never standardised
    dropped       {reason: number} of what the clips leave out
    meta, path    metadata.json as a dict, and the split's folder"""

    def __init__(self, path, frames=FRAMES, stride=None, size=None, frame_stride=1):
        self.path, self.frames, self.frame_stride = path, frames, frame_stride
        self._read_metadata()
        self._read_shards()
        if self.shards[0].video.endswith(".bin"):
            self.frames, self.frame_stride = FRAMES, 1       # as stored
            self._read_token_shape()
        else:
            self.kind, self.hz = "raw", self.hz / frame_stride
            self._read_raw_shape(size)
        self._read_segments()
        self._lay_windows(stride)

    def _read_metadata(self):
        file, number = f"{self.path}/metadata.json", "a positive whole number"
        self.meta = meta = read_json(file)
        for key in ("num_shards", "num_images"):
            read_key(meta, file, key, is_count, number)
        self.hz = float(read_key(meta, file, "hz", lambda v: type(v) in (int, float) and 0 < v < 1e6,
                                 "a positive number"))
        A = self.action_dim = read_key(meta, file, "action_dim", is_count, number, len(JOINTS))
        names = list(JOINTS) if A == len(JOINTS) else [f"STATE_{j}" for j in range(A)]
        self.names = tuple(read_key(
            meta, file, "names", lambda v: is_list(v, str) and len(v) == A == len(set(v)),
            f"{A} different strings", names))
        keep = [21, 22] if self.names == JOINTS else []
        self.keep = tuple(read_key(
            meta, file, "keep", lambda v: is_list(v, int) and all(0 <= j < A for j in v),
            f"a list of numbers 0..{A - 1}", keep))

    def _read_shards(self):
        self.shards, start = [], 0
        for i in range(self.meta["num_shards"]):
            file = locate(self.path, i, ["metadata"], ["metadata_{}.json"])
            meta = read_json(file)
            n = read_key(meta, file, "shard_num_frames", is_count, "a positive whole number")
            read_key(meta, file, "shard_ind", lambda v: v == i, f"{i} as its file name")
            video = locate(self.path, i, ["videos"], ["video_{}.bin", "video_{}.npy", "video_{}.mp4"])
            states = locate(self.path, i, ["robot_states", "states"], ["states_{}.bin"])
            open_array(states, "<f4", (n, self.action_dim))
            self.shards.append(Shard(n, start, video, states))
            start += n
        self.offsets = np.array([s.start for s in self.shards])
        read_key(self.meta, f"{self.path}/metadata.json", "num_images", lambda v: v == start,
                 f"{start}, the sum over its shards")
        tokens = [s.video for s in self.shards if s.video.endswith(".bin")]
        check(len(tokens) in (0, len(self.shards)),
              f"{self.path} mixes raw video with token files such as {tokens[:1]}: keep one kind")

    def _read_raw_shape(self, size):
        """Sets shape and size, from every video's header."""
        self._mp4 = {i: Mp4(s.video, s.frames) for i, s in enumerate(self.shards) if s.video.endswith(".mp4")}
        for i, shard in enumerate(self.shards):
            height, width = self._video(i).shape[1:3]
            self.size = size or (width if i == 0 else self.size)
            check(height == width, f"{shard.video} has frames of {width} x {height}: crop or pad to squares")
            check(size or width == self.size, f"{shard.video} has frames of {width} x {width}, shards before "
                                              f"it {self.size} x {self.size}: bring them to one size")
        self.shape = (self.frames, self.size, self.size, 3)

    def _read_token_shape(self):
        """Sets kind, shape and vocab_size; looks into the first and last clip of every shard."""
        file = f"{self.path}/metadata.json"
        self.kind = read_key(self.meta, file, "kind", lambda v: v in ("discrete", "continuous"),
                             "'discrete' or 'continuous'", "discrete")
        axes = {"discrete": 3, "continuous": 4}[self.kind]
        self.shape = tuple(read_key(
            self.meta, file, "clip_shape",
            lambda v: is_list(v, int) and len(v) == axes and min(v) > 0 and v[-3] in (3, 5),
            "[channels if continuous, 3, height, width] with the 3 latent frames of 17 frames (5 at temporal 4)",
            [3, 32, 32]))
        tokenizer = read_key(self.meta, file, "tokenizer", lambda v: isinstance(v, dict), "a JSON object", {})
        self.vocab_size = read_key(tokenizer, file, "vocab_size", is_count, "a positive number", VOCAB_SIZE)
        for i, shard in enumerate(self.shards):
            video = self._video(i)
            for k in {0, len(video) - 1}:
                self._check_clip(video[k], shard.video, k)

    def _read_segments(self):
        """Sets `edges`, the frames where a recording starts, and the end. It may go on in the next shard."""
        files = [locate(self.path, i, ["segment_indices", "segment_idx"], ["segment_idx_{}.bin"])
                 for i in range(len(self.shards))]
        ids = np.concatenate([open_array(file, "<i4", (s.frames,)) for file, s in zip(files, self.shards)])
        self.edges = np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1, [len(ids)]])

    def _lay_windows(self, stride):
        """Sets `starts`, the first frame of every clip, and `dropped`."""
        span = (self.frames - 1) * self.frame_stride + 1     # from a clip's first frame to its last
        if self.kind == "raw":
            ends = self.edges[1:]
            starts = [np.arange(a, b - span + 1, stride or self.frames * self.frame_stride)
                      for a, b in zip(self.edges, ends)]
            left = [int(b - s[-1]) - span for s, b in zip(starts, ends) if len(s)]
            self.starts = np.concatenate(starts)
            self.dropped = {"segments shorter than a clip": len(starts) - len(left),
                            "frames after a segment's last clip": sum(left)}
        else:
            starts = np.concatenate([s.start + np.arange(0, s.frames - span + 1, span) for s in self.shards])
            self.starts = starts[self.segment(starts) == self.segment(starts + span - 1)]
            self.dropped = {"clips over a segment border": len(starts) - len(self.starts),
                            "padded last clips": sum(s.frames % span > 0 for s in self.shards)}

    def segment(self, frame):
        """Number of the uninterrupted recording that a frame belongs to."""
        return np.searchsorted(self.edges, frame, side="right") - 1

    def shard(self, frame):
        return np.searchsorted(self.offsets, frame, side="right") - 1

    def _video(self, i):
        """Shard i's video, indexed by frame (raw) or by clip (tokens, latents)."""
        shard = self.shards[i]
        if self.kind == "raw":
            return self._mp4[i] if i in self._mp4 else open_npy(shard.video, shard.frames)
        dtype = {"discrete": "<i4", "continuous": "<f2"}[self.kind]
        return open_array(shard.video, dtype, (-(-shard.frames // FRAMES), *self.shape))

    def _check_clip(self, video, file, k):
        if self.kind == "discrete":
            low, high = video.min(), video.max()
            check(low >= 0 and high < self.vocab_size, f"{file} has ids {low}..{high} in clip {k}, outside "
                  f"0..{self.vocab_size - 1}: fetch or encode that shard again")
        else:
            check(np.isfinite(video).all(),
                  f"{file} has latents in clip {k} that are not finite: encode again")

    def states(self, frames):
        """States of these frames of the split, which ascend: (n,) -> float32 (n, A)."""
        parts, shards = [np.zeros((0, self.action_dim), np.float32)], self.shard(frames)
        for i in np.unique(shards):
            shard, local = self.shards[i], frames[shards == i] - self.offsets[i]
            x = open_array(shard.states, "<f4", (shard.frames, self.action_dim))[local]
            for k, j in np.argwhere(~np.isfinite(x))[:1]:
                raise DataError(f"{shard.states} holds {x[k, j]} for {self.names[j]} at frame {local[k]}: "
                                f"fetch that shard again, or cut those frames out")
            parts.append(x)
        return np.concatenate(parts)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        frames = self.starts[i] + self.frame_stride * np.arange(self.frames)
        shards = self.shard(frames)
        if self.kind == "raw":
            video = torch.from_numpy(np.concatenate(
                [self._video(s)[frames[shards == s] - self.offsets[s]] for s in np.unique(shards)]))
            video = resize(video, self.size)                                    # (F, H, W, 3) uint8
        else:
            k = (frames[0] - self.offsets[shards[0]]) // FRAMES
            video = self._video(shards[0])[k]
            self._check_clip(video, self.shards[shards[0]].video, k)
            video = torch.from_numpy(video.astype(np.int64 if self.kind == "discrete" else np.float32))
        return {"video": video, "actions": torch.from_numpy(self.states(frames)), "index": i}

    def more_actions(self, i, n):
        """The up to n actions that follow clip i in its recording: float32 (<= n, A); none for stored clips
        that overlap."""
        n = 0 if self.meta.get("windows") else n
        first = self.starts[i] + self.frames * self.frame_stride
        end = min(first + n * self.frame_stride, self.edges[self.segment(self.starts[i]) + 1])
        return torch.from_numpy(self.states(np.arange(first, end, self.frame_stride)))

    def where(self, i):
        """'shard 3, frames 170..186', for messages that name a clip."""
        first, last = self.starts[i], self.starts[i] + (self.frames - 1) * self.frame_stride
        a, b = self.shard(first), self.shard(last)
        over = f" of shard {b}" if b > a else ""
        return f"shard {a}, frames {first - self.offsets[a]}..{last - self.offsets[b]}{over}"


def open_clips(path, split="train", frames=FRAMES, stride=None, size=None, frame_stride=1):
    """The clips of one split of a data folder, a map-style dataset; DataError for anything inconsistent.

    clips[i] -> {"video": raw uint8 (F, H, W, 3) | ids int64 (T, H, W) | latents float32 (C, T, H, W),
                 "actions": float32 (F, A), "index": i}

    path          root of train_v2.0 and val_v2.0 (also with _raw), or one of those folders
    frame_stride  takes every n-th frame and, alike, every n-th action
    stride        frames from one window's start to the next in a segment; by default windows do not overlap
    size          raw frames are resized to size x size, antialiased
    Token and latent files hold a clip per 17 frames; `encode` chose their stride, size and frame_stride."""
    for key, value in dict(frames=frames, stride=stride, size=size, frame_stride=frame_stride).items():
        check(value is None or is_count(value), f"{path}: {key} is {value!r}: give a positive whole number")
    below = (frames - 1) // 8 * 8 + 1
    check(frames == below, f"{path} cannot be cut into clips of {frames} frames, which is not 1 + 8n: "
                           f"ask for {below} or {below + 8}")
    clips = Clips(split_folder(path, split), frames, stride, size, frame_stride)
    if clips.kind == "raw":
        below = clips.size // 8 * 8
        check(clips.size == below,
              f"{clips.path} gives frames of {clips.size} x {clips.size}, not divisible by the tokenizers' "
              f"factor 8: ask for size {below or 8} or {below + 8}")
    else:
        stored = clips.meta.get("frame_stride", 1)
        check(frames == FRAMES and frame_stride in (1, stored),
              f"{clips.path} is stored in clips of {FRAMES} frames at frame_stride {stored}, not {frames} at "
              f"{frame_stride}: encode the raw video again")
    check(len(clips), f"{clips.path} has no clip of {frames} frames within one segment ({clips.dropped}): "
                      f"record for longer")
    return clips


def resize(video, size):
    """uint8 (F, H, W, 3) -> (F, size, size, 3), antialiased."""
    if video.shape[1] == size:
        return video
    video = F.interpolate(video.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
    return video.permute(0, 2, 3, 1).contiguous()


def to_video(frames):
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1], what tokenizers take."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_uint8(video):
    """float (B, 3, F, H, W) -> uint8 (B, F, H, W, 3), clamped and rounded."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


# ---- action statistics -------------------------------------------------------------------------------------

def state_blocks(clips, segments):
    """The states of these segments of a split, in blocks (n, A)."""
    for a, b in zip(clips.edges[segments], clips.edges[segments + 1]):
        for first in range(a, b, 65536):
            yield clips.states(np.arange(first, min(first + 65536, b)))


def moments(blocks):
    """(low, high, mean, std) per state, float64 (A,) each, in one pass. Sums are of differences to the first
    frame, so that a constant has a standard deviation of exactly 0."""
    n, total, square, low, high, first = 0, 0.0, 0.0, np.inf, -np.inf, None
    for x in blocks:
        x = x.astype(np.float64)
        first = x[0] if first is None else first
        n, total, square = n + len(x), total + (x - first).sum(0), square + ((x - first) ** 2).sum(0)
        low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
    return low, high, first + total / n, np.sqrt(np.maximum(square / n - (total / n) ** 2, 0))


def is_constant(low, high):
    return high - low <= 1e-6 * np.maximum(1, np.maximum(abs(low), abs(high)))         # up to float noise


def action_statistics(clips):
    """{"mean": (A,), "std": (A,)} over the segments that hold a clip of the training split. `keep` dimensions
    get mean 0 and std 1, constant ones std 1."""
    low, high, mean, std = moments(state_blocks(clips, np.unique(clips.segment(clips.starts))))
    std[is_constant(low, high)] = 1
    mean[list(clips.keep)], std[list(clips.keep)] = 0, 1
    return {"mean": torch.from_numpy(mean).float(), "std": torch.from_numpy(std).float()}


def normalise(actions, stats):
    return (actions - stats["mean"]) / stats["std"]


def denormalise(actions, stats):
    return actions * stats["std"] + stats["mean"]


# ---- the built-in robot ------------------------------------------------------------------------------------
# World: metres, x and y on the floor, z up. Body: x forward, y left, z up, its origin on the floor. It is
# drawn by ray casting (room, table) and soft capsules (arms, fingers, objects).

J = {name: i for i, name in enumerate(JOINTS)}
HZ = 10
ROOM = np.array([6.0, 5.0, 2.8], np.float32)                    # the room spans 0 .. ROOM
TABLE = np.array([[3.0, 1.8, 0.70], [3.9, 3.2, 0.76]], np.float32)             # low and high corner of the top
PEDESTAL = np.array([[3.3, 2.2, 0.0], [3.6, 2.8, 0.70]], np.float32)
EYE, SHOULDER = (0.08, 0.0, 1.45), (0.0, 0.21, 1.22)            # body frame; the right shoulder at -y
UPPER_ARM, FOREARM, PALM = 0.27, 0.25, 0.09
FOCAL = 1 / math.tan(math.radians(85) / 2)                      # 85 degrees of view, in half image widths

# Joint: rest angle, half range of the random targets (radians). Joints not listed never move.
MOVES = {"SHOULDER_PITCH": (0.45, 0.55), "SHOULDER_ROLL": (0.10, 0.35), "SHOULDER_YAW": (0.15, 0.55),
         "ELBOW_PITCH": (1.15, 0.60), "WRIST_PITCH": (0.10, 0.45)}
STILL = {"HIP_PITCH": -0.20, "KNEE_PITCH": 0.40, "ANKLE_PITCH": -0.20}
ARMS = [[J[side + a] for a in ARM] for side in ("LEFT_", "RIGHT_")]            # 2 x 7 columns of a state
HANDS = [J["LEFT_HAND_CLOSURE"], J["RIGHT_HAND_CLOSURE"]]

# What the walls show: face (x=0, x=max, y=0, y=max, floor, ceiling), u0, u1, v0, v1 in metres along the two
# other axes, colour. Later entries cover earlier ones. Nothing repeats, so that a view tells where one is.
DECOR = [
    (0, 0, 6, 0, 6, (196, 120, 92)), (0, 0.8, 2.0, 0.0, 2.1, (92, 58, 40)), (0, 3.0, 4.4, 1.0, 2.1, (238, 222, 170)),
    (1, 0, 6, 0, 6, (112, 150, 186)), (1, 1.3, 3.3, 0.9, 2.2, (232, 244, 252)), (1, 4.0, 5.0, 0.0, 1.6, (70, 78, 130)),
    (2, 0, 6, 0, 6, (206, 196, 128)), (2, 4.2, 5.4, 0.0, 2.1, (226, 226, 216)), (2, 1.0, 2.6, 1.1, 2.1, (72, 92, 140)),
    (3, 0, 6, 0, 6, (128, 168, 124)), (3, 0.8, 1.8, 0.0, 1.9, (196, 84, 72)), (3, 2.8, 4.6, 1.0, 2.0, (44, 56, 70)),
    (4, 0, 6, 0, 6, (146, 136, 128)), (4, 0.4, 2.4, 1.2, 3.8, (160, 86, 84)), (4, 4.5, 6, 0, 5, (112, 118, 134)),
    (5, 0, 6, 0, 6, (200, 200, 204)), (5, 1.0, 2.2, 1.0, 4.0, (255, 255, 250)), (5, 3.8, 5.0, 1.0, 4.0, (255, 255, 250))]
OBJECTS = [(0.075, 0.00, (214, 44, 44)), (0.055, 0.16, (40, 84, 210)),          # radius, length, colour: upright
           (0.065, 0.06, (240, 200, 40)), (0.070, 0.00, (44, 170, 80))]         # capsules, so balls and bottles


TEXELS = 256


@functools.cache
def decor_texture(texels=TEXELS):
    """DECOR as one table: (6 * texels * texels, 3) float32 colours, row (face * texels + u) * texels + v."""
    texture = np.zeros((6, texels, texels, 3), np.float32)
    for face, u0, u1, v0, v1, colour in DECOR:
        size_u, size_v = np.delete(ROOM, face // 2)
        rows, columns = (slice(round(min(a / size, 1) * texels), round(min(b / size, 1) * texels))
                         for a, b, size in ((u0, u1, size_u), (v0, v1, size_v)))
        texture[face, rows, columns] = colour
    texture = 140 + 0.7 * (texture - 140)                       # plain and a little pale: small models must learn it
    return (texture * np.float32([0.92, 0.92, 0.82, 0.82, 1, 1])[:, None, None, None]).reshape(-1, 3)


@dataclass
class RobotWorld:
    """All that changes: pose (x, y, yaw), objects (4, 3) centres of the bases, held: object in each hand or -1."""
    pose: np.ndarray
    objects: np.ndarray
    held: list = field(default_factory=lambda: [-1, -1])
    closed: list = field(default_factory=lambda: [False, False])

    def copy(self):
        return RobotWorld(self.pose.copy(), self.objects.copy(), list(self.held), list(self.closed))


def free_floor(x, y):
    """May the base stand here? Away from the walls, and from the table by less than an arm's length."""
    near_table = all(lo - 0.32 < p < hi + 0.32 for p, lo, hi in zip((x, y), *TABLE.tolist()))
    return 0.7 < x < ROOM[0] - 0.7 and 0.7 < y < ROOM[1] - 0.7 and not near_table


def robot_world(rng):
    """A start: objects each in another quarter of the table, the base anywhere free, more or less facing the table."""
    quarter = np.array([[i, j] for i in (0, 1) for j in (0, 1)])[rng.permutation(4)]
    place = TABLE[0, :2] + (quarter + rng.uniform(0.25, 0.75, (4, 2))) / 2 * (TABLE[1] - TABLE[0])[:2]
    x, y = 0.0, 0.0
    while not free_floor(x, y):
        x, y = rng.uniform((0, 0), ROOM[:2])
    yaw = math.atan2(2.5 - y, 3.45 - x) + rng.normal(0, 0.9)
    return RobotWorld(np.array([x, y, yaw]), np.column_stack([place, np.full(4, TABLE[1, 2])]))


def rotation(axis, angle):
    """(...) radians about body axis 0, 1 or 2 -> (..., 3, 3)."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.zeros((*np.shape(angle), 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis], matrix[..., i, i], matrix[..., j, j] = 1, c, c
    matrix[..., i, j], matrix[..., j, i] = -s, s
    return matrix


def arm_points(angles, side):
    """Forward kinematics. angles (..., 7), side (...) +1 left, -1 right -> (..., 6, 3) in the body frame:
    shoulder, elbow, wrist, palm, grip point, and last the hand's sideways unit vector. At 0 an arm hangs."""
    pitch, roll, yaw, elbow, elbow_yaw, wrist, wrist_roll = np.moveaxis(angles, -1, 0)
    upper = rotation(1, -pitch) @ rotation(0, side * roll) @ rotation(2, -side * yaw)
    lower = upper @ rotation(1, -elbow) @ rotation(2, -side * elbow_yaw)
    hand = lower @ rotation(1, -wrist) @ rotation(0, side * wrist_roll)
    p = [np.stack(np.broadcast_arrays(SHOULDER[0], side * SHOULDER[1], SHOULDER[2]), -1)]
    for turned, length in ((upper, UPPER_ARM), (lower, FOREARM), (hand, PALM), (hand, 0.06)):
        p.append(p[-1] - length * turned[..., 2])
    return np.stack([*p, hand[..., 1]], -2)


def robot_step(world, state):
    """Moves `world` on by one frame, in place. Returns (2, 6, 3): the arms' points in world coordinates.
    The velocities of frame k carry the base from frame k-1 to frame k."""
    world.pose[2] += state[J["ANGULAR_VELOCITY"]] / HZ
    heading = world.pose[2]
    world.pose[:2] += state[J["LINEAR_VELOCITY"]] / HZ * np.array([math.cos(heading), math.sin(heading)])
    arms = arm_points(state[ARMS], np.array([1.0, -1.0])) @ rotation(2, heading).T
    arms[:, :5, :2] += world.pose[:2]
    for hand in (0, 1):
        closed, grip = state[HANDS[hand]] > 0.5, arms[hand, 4]
        if closed and not world.closed[hand]:
            reach = np.linalg.norm(world.objects + (0, 0, 0.06) - grip, axis=1)
            if reach.min() < 0.18 and reach.argmin() not in world.held:
                world.held[hand] = int(reach.argmin())
        elif not closed:
            world.held[hand] = -1
        world.closed[hand] = bool(closed)
    for i, o in enumerate(world.objects):
        if i in world.held:
            o[:] = arms[world.held.index(i), 4] - (0, 0, 0.06)
        else:                                                   # what is let go falls, at 3 m/s, on table or floor
            over = all(TABLE[0, :2] < o[:2]) and all(o[:2] < TABLE[1, :2]) and o[2] > TABLE[0, 2] - 0.1
            o[2] = max(o[2] - 0.3, TABLE[1, 2] if over else 0.0)
    return arms


def reach_target(rng, world, hand):
    """The best of 64 random settings of one arm (7 angles) for the object nearest to its hand, and the distance."""
    tries = np.zeros((64, 7))
    for a, (rest, span) in MOVES.items():
        tries[:, ARM.index(a)] = rest + rng.uniform(-span, span, 64)
    grips = arm_points(tries, np.full(64, 1.0 - 2 * hand))[:, 4] @ rotation(2, world.pose[2]).T
    gap = grips[:, None] + (*world.pose[:2], 0) - world.objects - (0, 0, 0.06)
    gap = np.linalg.norm(gap, axis=-1).min(1)                   # (64,)
    return tries[gap.argmin()], gap.min()


def robot_plan(rng, world, n_frames):
    """Smooth random motion from `world` (left as it is): (n_frames, 25) float32 states.
    Targets jump every 0.5 to 1.1 s, each group at its own times, and the joints follow like damped springs."""
    world = world.copy()
    q, speed, target = np.zeros((3, 25))
    for name, angle in STILL.items():
        q[J[name]] = target[J[name]] = angle
    q[J["NECK_PITCH"]] = 0.4
    for hand in (0, 1):
        q[ARMS[hand]] = target[ARMS[hand]] = reach_target(rng, world, hand)[0]
    v, w, goal_v, goal_w = 0.0, 0.0, 0.0, 0.0
    change = np.zeros(4, int)                                   # frame of the next jump: two arms, neck, base
    states = np.zeros((n_frames, 25), np.float32)
    for k in range(n_frames):
        due = change <= k
        change[due] = k + rng.integers(5, 12, due.sum())
        for hand in np.flatnonzero(due[:2]):
            reach, gap = reach_target(rng, world, hand)
            if gap > 0.2 or rng.random() < 0.4:
                reach = [rng.uniform(-1, 1) * MOVES[a][1] + MOVES[a][0] if a in MOVES else 0.0 for a in ARM]
            target[ARMS[hand]] = reach
            target[HANDS[hand]] = 1.0 - round(target[HANDS[hand]]) if rng.random() < 0.6 else target[HANDS[hand]]
        if due[2]:
            target[J["NECK_PITCH"]] = rng.uniform(0.25, 0.6)
        if due[3]:
            x, y, yaw = world.pose
            off = math.remainder(math.atan2(2.5 - y, 3.45 - x) - yaw, 2 * math.pi)      # bearing of the table
            goal_w = rng.normal(0, 0.25) + (np.clip(off, -0.8, 0.8) * 0.3 if rng.random() < 0.6 else 0.0)
            goal_v = rng.uniform(-0.25, 0.4)
        speed = 0.6 * speed + 0.08 * (target - q)
        q = q + speed
        q[HANDS] = np.clip(q[HANDS], 0, 1)
        w += 0.4 * (goal_w - w)
        v += 0.4 * (goal_v - v)
        ahead = world.pose[2] + w / HZ
        if not free_floor(*(world.pose[:2] + v / HZ * np.array([math.cos(ahead), math.sin(ahead)]))):
            v, goal_v = 0.0, -goal_v                            # brakes, and backs off
        q[J["LINEAR_VELOCITY"]], q[J["ANGULAR_VELOCITY"]] = v, w
        target[-2:], speed[-2:] = q[-2:], 0.0
        states[k] = q
        robot_step(world, states[k])
    return states


@functools.cache
def pixel_grid(size):
    """(3, 4 * size * size) camera rays (right, down, forward = 1), 2 x 2 a pixel. The sub-pixels
    are outermost, so that averaging is over axis 0."""
    edge = (2 * np.arange(2 * size, dtype=np.float32) + 1 - 2 * size) / (2 * size * FOCAL)
    edge = edge.reshape(size, 2).T
    right, down = np.broadcast_arrays(edge[None, :, None, :], edge[:, None, :, None])
    return np.stack([right.reshape(-1), down.reshape(-1), np.ones(4 * size * size, np.float32)])


def cast_room(eye, axes, size):
    """The room and the table by ray casting. eye (3,), axes (3, 3): rows right, down, forward; float32.
    -> colours (size, size, 3) and depth along the optical axis (size, size), float32."""
    rays = axes.T @ pixel_grid(size)                            # (3, P), of depth 1
    inverse = 1 / np.copysign(np.maximum(np.abs(rays), np.float32(1e-6)), rays)
    ahead = inverse > 0
    x, y, z = (np.where(ahead[i], ROOM[i] - eye[i], -eye[i]) * inverse[i] for i in range(3))   # of the walls
    depth = np.minimum(np.minimum(x, y), z)
    on_x, on_z = depth == x, depth == z
    rays *= depth
    rays += eye[:, None]
    rays *= (TEXELS / ROOM)[:, None]
    texel = rays.astype(np.int32)                               # (3, P), where the ray ends
    face = np.where(on_x, ahead[0], np.where(on_z, 4 + ahead[2], 2 + ahead[1]))
    u, v = (np.minimum(np.maximum(e, 0), TEXELS - 1)
            for e in (np.where(on_x, texel[1], texel[0]), np.where(on_z & ~on_x, texel[1], texel[2])))
    colour = decor_texture().take((face * TEXELS + u) * TEXELS + v, axis=0, mode="clip")       # (P, 3)
    for box, paint in ((PEDESTAL, (70, 52, 44)), (TABLE, (170, 112, 62))):
        sides = [((lo - eye[i]) * inverse[i], (hi - eye[i]) * inverse[i]) for i, (lo, hi) in enumerate(box.T)]
        x, y, z = (np.minimum(*side) for side in sides)
        enter = np.maximum(np.maximum(x, y), z)
        x1, y1, z1 = (np.maximum(*side) for side in sides)
        on = np.flatnonzero((enter < np.minimum(np.minimum(x1, y1), z1)) & (enter > 0) & (enter < depth))
        depth[on] = enter[on]
        light = np.where(x[on] == enter[on], 0.55, np.where(y[on] == enter[on], 0.75, 1.0))
        colour[on] = light[:, None] * np.float32(paint)
    colour *= (1 / (1 + np.float32(0.06) * depth))[:, None]
    return colour.reshape(4, size, size, 3).mean(0), depth.reshape(4, size, size).mean(0)


def draw_capsules(image, depth, ends, radii, colours, near=0.12):
    """Paints capsules over `image` in place, far ones first, with soft edges. ends (M, 2, 3) in camera axes
    (right, down, forward). Radius over depth and one over depth are linear on the screen, so a 2D
    distance is enough."""
    size = len(image)
    order = np.argsort(-ends[:, :, 2].mean(1))
    order = order[ends[order, :, 2].max(1) >= near]             # not those behind the camera
    ends, radii, colours = ends[order], radii[order], colours[order].astype(np.float32)
    ends = np.where(ends[:, :1, 2:] > ends[:, 1:, 2:], ends, ends[:, ::-1])     # the far end first
    a, b = ends[:, 0], ends[:, 1]
    cut = np.minimum(1, (a[:, 2] - near) / np.maximum(a[:, 2] - b[:, 2], 1e-6))            # at the near plane
    ends = np.stack([a, a + (b - a) * cut[:, None]], 1)
    inverse = 1 / ends[..., 2]                                  # (M, 2)
    centre = (ends[..., :2] * inverse[..., None] * FOCAL + 1) * (size / 2) - 0.5           # (M, 2, 2) pixels
    radius = radii[:, None] * FOCAL * (size / 2) * inverse      # (M, 2) pixels
    low = (centre - radius[..., None] - 1).min(1).clip(0, size).astype(int)
    high = (centre + radius[..., None] + 2).max(1).clip(0, size).astype(int)
    pixel = np.arange(size, dtype=np.float32)
    for m in np.flatnonzero((low < high).all(1)):
        (x0, y0), (x1, y1) = low[m].tolist(), high[m].tolist()  # Python numbers keep float32 arrays so
        ((ax, ay), (bx, by)), (ra, rb), (za, zb) = centre[m].tolist(), radius[m].tolist(), inverse[m].tolist()
        px, py, dx, dy = pixel[x0:x1] - ax, pixel[y0:y1, None] - ay, bx - ax, by - ay
        norm = dx * dx + dy * dy + 1e-6
        along = np.minimum(np.maximum(px * (dx / norm) + py * (dy / norm), 0), 1)
        r = ra + along * (rb - ra)
        away = (px - along * dx) ** 2 + (py - along * dy) ** 2  # squared
        cover = np.minimum(np.maximum(r - np.sqrt(away) + 0.5, 0), 1)
        behind = depth[y0:y1, x0:x1] - 1 / (za + along * (zb - za)) + float(radii[m])
        cover *= np.minimum(np.maximum(behind * 20 + 1, 0), 1)  # fades behind the table or a wall
        shade = (1 - 0.5 * np.minimum(away / (r * r), 1))[..., None] * colours[m]
        shade -= image[y0:y1, x0:x1]
        shade *= cover[..., None]
        image[y0:y1, x0:x1] += shade


def robot_capsules(world, arms, closure):
    """Arms (2, 6, 3) and objects as capsules: ends (M, 2, 3) in world coordinates, radii (M,), colours (M, 3)."""
    capsules = []
    for points, shut, paint in zip(arms, closure, ((240, 140, 40), (60, 200, 220))):
        shoulder, elbow, wrist, palm, grip, sideways = points
        capsules += [(shoulder, elbow, 0.055, (84, 86, 96)), (elbow, wrist, 0.045, (205, 205, 210)),
                     (wrist, palm, 0.042, paint)]
        for side in (-1, 1):                                    # fingers spread when open, meet when closed
            knuckle = palm + side * (0.045 - 0.02 * shut) * sideways
            tip = grip + (grip - palm) * (0.5 - shut) + side * (0.085 - 0.075 * shut) * sideways
            capsules.append((knuckle, tip, 0.028, paint))
    for at, (radius, length, paint) in zip(world.objects, OBJECTS):
        capsules.append((at + (0, 0, radius), at + (0, 0, radius + length), radius, paint))
    a, b, radii, colours = zip(*capsules)
    return np.stack([a, b], 1), np.array(radii), np.array(colours)


def lens(image):
    """A soft lens: each pixel (H, W, 3) spreads over its neighbours, 1 2 1 along both axes. Plain surfaces with soft
    edges are what a tokenizer of two million parameters can learn in half an hour."""
    for axis in (0, 1):
        image = np.swapaxes(image, 0, 1)
        padded = np.concatenate([image[:1], image, image[-1:]])
        image = 0.25 * (padded[:-2] + padded[2:]) + 0.5 * image
    return image


def robot_render(states, start, size=64):
    """Replays states (n, 25) from the world `start` (left as it is): frames uint8 (n, size, size, 3), RGB."""
    world = start.copy()
    frames = np.empty((len(states), size, size, 3), np.uint8)
    for k, state in enumerate(states):
        arms = robot_step(world, state)
        yaw, neck = world.pose[2], state[J["NECK_PITCH"]]
        turn = rotation(2, yaw)
        head = turn @ rotation(1, neck)                         # columns: forward, left, up of the camera
        axes = np.stack([-head[:, 1], -head[:, 2], head[:, 0]])
        eye = turn @ EYE + (*world.pose[:2], 0)
        image, depth = cast_room(eye.astype(np.float32), axes.astype(np.float32), size)
        ends, radii, colours = robot_capsules(world, arms, state[HANDS])
        draw_capsules(image, depth, (ends - eye) @ axes.T, radii, colours)
        frames[k] = (lens(image) + 0.5).clip(0, 255)
    return frames


def robot_episode(seed, n_frames, size=64):
    """An episode, fixed by its arguments: frames uint8 (n_frames, size, size, 3), states float32 (n_frames, 25)."""
    rng = np.random.default_rng(seed)
    start = robot_world(rng)
    states = robot_plan(rng, start, n_frames)
    return robot_render(states, start, size), states


# ---- writing a split: shard by shard, each file beside and renamed, metadata.json last ---------------------

def save(file, content):
    """Write .npy, .json or an array's bytes so that the file is either whole or not there."""
    beside = f"{file}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(beside, "wb") as f:
            if file.endswith(".json"):
                f.write(json.dumps(content, indent=1).encode())
            elif file.endswith(".npy"):
                np.save(f, content)
            else:
                f.write(np.ascontiguousarray(content).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, file)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise DataError(f"{file} cannot be written ({e}): make room and run this again, whole shards are "
                        f"kept") from None


def shard_files(folder, i, suffix):
    return [f"{folder}/videos/video_{i}{suffix}", f"{folder}/robot_states/states_{i}.bin",
            f"{folder}/segment_indices/segment_idx_{i}.bin", f"{folder}/metadata/metadata_{i}.json"]


def save_shard(folder, i, suffix, video, states, segments):
    meta = {"shard_num_frames": len(states), "shard_ind": i}
    contents = video, np.asarray(states, "<f4"), np.asarray(segments, "<i4"), meta
    for file, content in zip(shard_files(folder, i, suffix), contents):
        save(file, content)


def is_whole(folder, i, suffix, video_bytes, state_bytes):
    """Shard i has its metadata, written last, and files of the right sizes (.npy: 128 bytes of header)."""
    files = shard_files(folder, i, suffix)
    return all(map(os.path.isfile, files)) and [os.path.getsize(f) for f in files[:2]] == [
        video_bytes + 128 * (suffix == ".npy"), state_bytes]


def claim(folder, settings):
    """Reserve a split folder for these settings; one that was made with others is refused."""
    file = f"{folder}/settings.json"
    if not os.path.exists(file):
        check(not os.path.exists(f"{folder}/metadata.json"), f"{folder} holds other data: give another --out")
        save(file, settings)
    old = read_json(file)
    for key, value in settings.items():
        check(old.get(key) == value, f"{file} says {key} = {old.get(key)!r}, not {value!r}: give another "
                                     f"--out, or delete {folder} to make it anew")


def check_disk(folder, need):
    free = shutil.disk_usage(folder).free
    check(free > need + 2 ** 24, f"{folder} needs {need / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB "
                                 f"free: make room or give another --out")


def finish(folder, meta):
    """All shards are whole: clear what killed runs left; metadata.json then makes this a data folder."""
    for file in glob(f"{escape(folder)}/**/*.tmp", recursive=True):
        os.remove(file)
    save(f"{folder}/metadata.json", meta)


def synth(out, frames=20_000, size=64, seed=0, splits=("train", "val"), episode=160, workers=None,
          progress=True):
    """The built-in robot as a raw data folder, `frames` to train on and a tenth, at least 1,700, to validate.
    Episodes have their own seeds: one split does not depend on the other. Resumable; uses all cores."""
    check(frames >= FRAMES and episode >= FRAMES and size >= 16 and size % 8 == 0 and 0 <= seed < 1000,
          f"{out}: {frames} frames of {size} x {size} with seed {seed} cannot be drawn: give at least "
          f"{FRAMES} frames, a size divisible by 8 and a seed of 0..999")
    workers = workers or os.cpu_count()
    for split in splits:
        folder, total = f"{out}/{split}_v2.0", frames if split == "train" else max(frames // 10, 1700)
        settings = {"robot": "built-in", "size": size, "seed": seed, "frames": total, "episode": episode}
        claim(folder, settings)
        shards = [(i, min(8 * episode, total - a)) for i, a in enumerate(range(0, total, 8 * episode))]
        todo = [(i, n) for i, n in shards
                if not is_whole(folder, i, ".npy", 3 * n * size ** 2, 4 * n * len(JOINTS))]
        check_disk(folder, sum(n for _, n in todo) * (3 * size ** 2 + 104))
        first_seed = 1_000_000 * (2 * seed + (split == "val"))
        shares = [todo[w::workers] for w in range(min(workers, len(todo)))]
        jobs = [multiprocessing.get_context("fork").Process(target=draw_shards, daemon=True, args=(
                folder, share, size, episode, first_seed, os.getpid())) for share in shares]
        for job in jobs:
            job.start()
        with tqdm(total=total, unit="frame", desc=f"drawing {split}", disable=not progress or not todo) as bar:
            while any(job.is_alive() for job in jobs):
                time.sleep(0.1)
                bar.update(sum(n for i, n in shards if os.path.exists(shard_files(folder, i, "")[3])) - bar.n)
            bar.update(total - bar.n)
        check(all(job.exitcode == 0 for job in jobs),
              f"{folder} is not whole, a process that draws it ended early (see above): run this again")
        finish(folder, {"num_shards": len(shards), "query": None, "hz": HZ, "num_images": total, **settings})
    return out


def draw_shards(folder, shards, size, episode, first_seed, parent):
    """One process's share of `synth`; it ends by itself when the process that started it is gone."""
    for i, n in shards:
        if os.getppid() != parent:
            return
        episodes = range(8 * i, 8 * i + -(-n // episode))
        video, states = zip(*(robot_episode(first_seed + e, episode, size) for e in episodes))
        try:
            save_shard(folder, i, ".npy", np.concatenate(video)[:n], np.concatenate(states)[:n],
                       np.repeat(episodes, episode)[:n])
        except DataError as e:
            sys.exit(f"data.py: {e}")


# ---- encoding raw video with a tokenizer -------------------------------------------------------------------

CLIPS_PER_SHARD = 256


def encode(data, tokenizer_path, out, size=None, stride=None, frame_stride=1, splits=("train", "val"),
           batch=8, device=None, progress=True):
    """Raw video -> a data folder of ids (int32) or latents (float16), which is read like the 1X set.

    Under torchrun shard j belongs to rank j mod WORLD_SIZE. A shard is written whole or not at all and always
    in the same batches, so a run that was killed goes on where it was and ends in the same bytes."""
    from tokenizer import TokenizerError, load_tokenizer
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    check(is_count(batch), f"{out} cannot be made in batches of {batch}: give a positive whole --batch")
    sha256 = fingerprint(tokenizer_path)
    try:
        torch.empty(0, device=device)
        tokenizer = load_tokenizer(tokenizer_path, device)
    except TokenizerError as e:
        raise DataError(str(e)) from None
    except (RuntimeError, AssertionError) as e:              # torch's ways to say: no such device
        raise DataError(f"{tokenizer_path} cannot be put on device {device!r} ({str(e).splitlines()[0]}): "
                        f"give another --device") from None
    about = {"path": os.path.abspath(tokenizer_path), "sha256": sha256,
             **{key: getattr(tokenizer, key) for key in ("kind", "spatial", "temporal")}}
    width = "vocab_size" if tokenizer.kind == "discrete" else "channels"
    about[width] = getattr(tokenizer, width)
    if getattr(tokenizer, "levels", ()):
        about["levels"] = list(tokenizer.levels)
    for split in split_folders(data):
        if split in splits:
            clips = open_clips(data, split, stride=stride, size=size, frame_stride=frame_stride)
            encode_split(clips, f"{out}/{split}_v2.0", tokenizer, about, stride or FRAMES * frame_stride,
                         batch, device, progress)
    return out


def encode_split(clips, folder, tokenizer, about, stride, batch, device, progress):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    factor, kind, size = about["spatial"], about["kind"], clips.size if clips.kind == "raw" else 0
    check(clips.kind == "raw", f"{clips.path} is tokenized already: give the folder of raw video")
    check(size % factor == 0,
          f"{clips.path} gives frames of {size} x {size}, not divisible by the tokenizer's factor {factor}: "
          f"give --size {size // factor * factor or factor}")
    shape = [1 + (FRAMES - 1) // about["temporal"], size // factor, size // factor]
    shape, dtype = (shape, "int32") if kind == "discrete" else ([about["channels"], *shape], "float16")
    clip_bytes, state_bytes = math.prod(shape) * np.dtype(dtype).itemsize, 4 * FRAMES * clips.action_dim
    layout = {"source": os.path.abspath(clips.path), "size": size, "stride": stride,
              "frame_stride": clips.frame_stride, **{k: clips.meta[k] for k in ("robot",) if k in clips.meta}}
    claim(folder, {**layout, "clips": len(clips), "batch": batch, "tokenizer_sha256": about["sha256"],
                   "source": os.path.relpath(clips.path, folder)})     # both may move together

    shards = [range(a, min(a + CLIPS_PER_SHARD, len(clips))) for a in range(0, len(clips), CLIPS_PER_SHARD)]

    def missing():
        return [j for j, ids in enumerate(shards)
                if not is_whole(folder, j, ".bin", len(ids) * clip_bytes, len(ids) * state_bytes)]

    check_disk(folder, sum(len(shards[j]) for j in missing()) * (clip_bytes + state_bytes + 4 * FRAMES))
    mine = [j for j in missing() if j % world == rank]
    with tqdm(total=sum(len(shards[j]) for j in mine), unit="clip", desc=f"encoding {folder}",
              disable=rank > 0 or not progress or not mine) as bar:
        for j in mine:
            latents, actions = [], []
            for a in range(0, len(shards[j]), batch):
                items = [clips[i] for i in shards[j][a:a + batch]]
                with torch.inference_mode():
                    x = tokenizer.encode(to_video(torch.stack([item["video"] for item in items])).to(device))
                x = x.cpu().numpy().astype(dtype)
                check(list(x.shape[1:]) == shape and np.isfinite(x).all(),
                      f"{about['path']} turns {clips.where(shards[j][a])} of {clips.path} into "
                      f"{x.shape[1:]}, not into finite {tuple(shape)}: give another tokenizer")
                latents.append(x)
                actions += [item["actions"].numpy() for item in items]
                bar.update(len(items))
            segments = clips.segment(clips.starts[shards[j].start:shards[j].stop])
            save_shard(folder, j, ".bin", np.concatenate(latents), np.concatenate(actions),
                       np.repeat(segments, FRAMES))
    while missing() or rank > 0 and not os.path.exists(f"{folder}/metadata.json"):
        time.sleep(0.2)                                      # other ranks are still at their shards
    if rank == 0:
        meta = {"num_shards": len(shards), "query": None, "hz": clips.hz, "num_images": len(clips) * FRAMES,
                "action_dim": clips.action_dim, "names": clips.names, "keep": clips.keep,
                "kind": kind, "dtype": dtype, "clip_shape": shape, **layout, "tokenizer": about,
                "windows": stride != FRAMES * clips.frame_stride}     # true: clips do not follow one another
        if kind == "continuous":
            meta.update(latent_statistics(folder, [len(ids) for ids in shards], shape))
        finish(folder, meta)


def latent_statistics(folder, clips_per_shard, shape):
    """Mean and standard deviation of every latent channel, by which Flow-HWM standardises."""
    n, total, square = 0, 0.0, 0.0
    for j, clips in enumerate(clips_per_shard):
        x = open_array(shard_files(folder, j, ".bin")[0], "<f2", (clips, *shape)).astype(np.float64)
        n, total, square = n + x[:, 0].size, total + x.sum((0, 2, 3, 4)), square + (x ** 2).sum((0, 2, 3, 4))
    std = np.sqrt(np.maximum(square / n - (total / n) ** 2, 0))
    std[std == 0] = 1  # a channel that never changes
    return {"latent_mean": (total / n).tolist(), "latent_std": std.tolist()}


# ---- what a folder holds -----------------------------------------------------------------------------------

def info(path):
    """Reads all of a data folder but the pixels: counts, what is dropped and why, state ranges by name."""
    splits = {split: Clips(folder) for split, folder in split_folders(path).items()}
    first = next(iter(splits.values()))
    for clips in splits.values():
        for i, shard in enumerate(clips.shards):
            video = clips._video(i)
            if isinstance(video, Mp4):
                video.index()
            for k in range(len(video) if clips.kind != "raw" else 0):
                clips._check_clip(video[k], shard.video, k)
        for key in ("kind", "hz", "names", "shape"):
            check(getattr(clips, key) == getattr(first, key), f"{clips.path}/metadata.json gives {key} = "
                  f"{getattr(clips, key)}, not {getattr(first, key)} as {first.path}: the splits must agree")
    every = (block for c in splits.values() for block in state_blocks(c, np.arange(len(c.edges) - 1)))
    low, high, mean, std = moments(every)
    counts = {split: {"clips": len(c), "frames": int(c.edges[-1]), "shards": len(c.shards),
                      "dropped": c.dropped} for split, c in splits.items()}
    return {"path": os.fspath(path), "kind": first.kind, "hz": first.hz, "action_dim": first.action_dim,
            "clip_shape": list(first.shape),
            **{key: sum(c[key] for c in counts.values()) for key in ("clips", "frames", "shards")},
            "dropped": {key: sum(c["dropped"][key] for c in counts.values()) for key in first.dropped},
            "splits": counts,
            "constant": [first.names[j] for j in np.flatnonzero(is_constant(low, high))],
            "states": {name: dict(zip(("min", "max", "mean", "std"), map(float, row)))
                       for name, row in zip(first.names, np.stack([low, high, mean, std], 1))}}


def print_info(found):
    print(f"{found['path']}: {found['kind']}, a clip's video is {tuple(found['clip_shape'])}, "
          f"{found['hz']:g} Hz, {found['action_dim']} states a frame")
    for split, c in found["splits"].items():
        dropped = ", ".join(f"{n} {reason}" for reason, n in c["dropped"].items() if n) or "nothing"
        print(f"  {split:5} {c['clips']} usable clips of {FRAMES} frames; {c['frames']} frames in "
              f"{c['shards']} shards; left out: {dropped}")
    print(f"  {'state':22}{'min':>10}{'max':>10}{'mean':>10}{'std':>10}")
    for name, s in found["states"].items():
        values = "".join(f"{x:10.3f}" for x in s.values())
        print(f"  {name:22}{values}" + "  constant" * (name in found["constant"]))


HERE = os.path.dirname(os.path.abspath(__file__))
ROBOT, ROBOT_STRIDE = "data/robot", 4
SHIPPED_TOKENIZERS = {"discrete": "weights/tokenizer_dv_tiny.pt", "continuous": "weights/tokenizer_cv_tiny.pt"}


def barrier():
    import torch.distributed as dist
    if dist.is_initialized():
        dist.barrier()


def prepare_data(kind, data="", tokenizer="", robot_frames=20_000, encode_raw=False, device="cpu", say=print):
    """Makes what is missing and returns the folder of tokens or latents to train on, with its tokenizer's path."""
    given, folder = tokenizer, data or ROBOT
    if given and not os.path.exists(given):
        raise DataError(f"there is no tokenizer at {given}: give a file made by `python tokenizer.py train`")
    tokenizer = tokenizer or os.path.join(HERE, SHIPPED_TOKENIZERS[kind])
    if not data and rank_and_world()[0] == 0:
        synth(folder, frames=robot_frames)
    barrier()
    clips = open_clips(folder, "train")
    if clips.kind == "raw":
        cache = f"{folder.rstrip('/')}_{kind}"
        if data and not encode_raw:
            raise DataError(f"{folder} holds raw video: add --encode to have it encoded into {cache} with {tokenizer}, or run "
                            f"`python data.py encode --data {folder} --tokenizer {tokenizer} --out {cache}` and train on that")
        say(f"encoding {folder} with {tokenizer} into {cache}")
        for split, stride in (("train", None if data else ROBOT_STRIDE), ("val", None)):
            encode(folder, tokenizer, cache, stride=stride, splits=(split,), device=device,
                   progress=rank_and_world()[0] == 0)
        barrier()
        folder, clips = cache, open_clips(cache, "train")
    if clips.kind != kind:
        raise DataError(f"{folder} holds {clips.kind} latents, but the model is trained on {kind} ones: give a folder "
                        f"encoded with a {kind} tokenizer, or the other --model")
    made_with = clips.meta.get("tokenizer", {})
    if given and made_with.get("sha256", "") not in ("", fingerprint(given)):
        raise DataError(f"{folder} was not encoded with {given} (the SHA-256 of its tokenizer, "
                             f"{made_with.get('path')}, differs): give that one, or leave --tokenizer out")
    return folder, given or clips.meta.get("tokenizer", {}).get("path", "")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("synth", help="draw the built-in robot",
                            epilog="example: python data.py synth --out data/robot --frames 20000")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--frames", type=int, default=20_000, help="to train on; a tenth, at least 1700, validate")
    p.add_argument("--size", type=int, default=64, help="frames are size x size")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("encode", help="raw video to token ids or latents",
                            epilog="example: torchrun --nproc_per_node=2 data.py encode --data 1x_raw "
                                   "--tokenizer Cosmos-0.1-Tokenizer-CV8x16x16 --out 1x_cv --size 256")
    p.add_argument("--data", required=True, help="folder of raw video")
    p.add_argument("--tokenizer", required=True, help="a .pt, or a folder with NVIDIA's .jit files")
    p.add_argument("--out", required=True, help="folder to make, or to go on with")
    p.add_argument("--size", type=int, help="resize frames to size x size")
    p.add_argument("--stride", type=int, help="frames from a clip's start to the next (default: no overlap)")
    p.add_argument("--frame_stride", type=int, default=1, help="take every n-th frame and action")
    p.add_argument("--batch", type=int, default=8, help="clips encoded at a time")
    p.add_argument("--device", help="default: the rank's GPU, or cpu")
    p = commands.add_parser("info", help="check a folder in full and say what it holds",
                            epilog="example: python data.py info data/robot --json")
    p.add_argument("path", metavar="DIR")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        if args.command == "synth":
            synth(args.out, args.frames, args.size, args.seed)
        elif args.command == "encode":
            encode(args.data, args.tokenizer, args.out, args.size, args.stride, args.frame_stride,
                   batch=args.batch, device=args.device)
        else:
            found = info(args.path)
            print(json.dumps(found)) if args.json else print_info(found)
    except DataError as e:
        sys.exit(f"data.py: {e}")


if __name__ == "__main__":
    main()
