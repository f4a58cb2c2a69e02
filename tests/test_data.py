"""data.py: what a clip is, that video and actions stay aligned, and that broken input ends in a sentence."""
import functools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
from fractions import Fraction

import numpy as np
import pytest
import torch

import data
import evaluate
import tokenizer as tok
from examples import robot, shards
from examples.mp4 import Mp4

MAIN = os.path.dirname(os.path.abspath(data.__file__))
FIXTURES = os.path.join(MAIN, "..", "shared", "fixtures")


def frame(k, size=16):
    """Frame k of the test video: uniform, and its red, green and blue spell k."""
    return np.broadcast_to(np.uint8([k % 251, k // 251, 7]), (size, size, 3))


def raw_split(folder, segments=((0, 60), (1, 45)), shards=(50, 55), A=25, size=16, flat=False, **meta):
    """A raw split whose frame k shows k and whose state 0 is k; segments are (id, length)."""
    n = sum(shards)
    ids = np.concatenate([np.full(length, i) for i, length in segments])
    assert len(ids) == n
    states = np.random.default_rng(0).normal(size=(n, A)).astype(np.float32)
    states[:, 0], states[:, 3 % A] = np.arange(n), 0.1
    start = 0
    for i, length in enumerate(shards):
        own = slice(start, start + length)
        video = np.stack([frame(k, size) for k in range(start, start + length)])
        data.save_shard(folder, i, ".npy", video, states[own], ids[own])
        start += length
    meta = {"num_shards": len(shards), "query": None, "hz": 30, "num_images": n, "segment_ids": "global", **meta}
    data.save(f"{folder}/metadata.json", meta)
    if flat:
        for sub in ("videos", "robot_states", "segment_indices", "metadata"):
            for name in os.listdir(f"{folder}/{sub}"):
                os.rename(f"{folder}/{sub}/{name}", f"{folder}/{name}")
            os.rmdir(f"{folder}/{sub}")
    return folder


def token_split(folder, segments=((0, 30), (1, 44), (2, 19)), shards=(53, 40), **meta):
    raw_split(folder, segments, shards, **meta)
    for i, n in enumerate(shards):
        os.remove(f"{folder}/videos/video_{i}.npy")
        ids = np.random.default_rng(i).integers(0, 64_000, (-(-n // 17), 3, 32, 32))
        ids[:, 0, 0, 0] = 1000 * i + np.arange(len(ids))
        ids.astype("<i4").tofile(f"{folder}/videos/video_{i}.bin")
    return folder


def shown(video):
    """The frame numbers that a raw clip shows."""
    return video[:, 0, 0, 0].long() + 251 * video[:, 0, 0, 1].long()


# ---- alignment (TRAPS 6) and windows (TRAPS 13)

@pytest.mark.parametrize("stride, frame_stride", [(None, 1), (1, 1), (5, 2), (None, 3), (40, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_frame_k_comes_with_action_k(tmp_path, stride, frame_stride, flat):
    raw_split(tmp_path / "train_v2.0", flat=flat)
    clips = data.open_clips(tmp_path, stride=stride, frame_stride=frame_stride)
    assert clips.hz == 30 / frame_stride
    starts = []
    for batch in torch.utils.data.DataLoader(clips, batch_size=3):
        for video, actions, i in zip(batch["video"], batch["actions"], batch["index"]):
            assert torch.equal(shown(video), actions[:, 0].long())
            assert (actions[:, 0].diff() == frame_stride).all()
            starts.append(int(actions[0, 0]))
            after = clips.more_actions(int(i), 1000)[:, 0]
            end = 60 if starts[-1] < 60 else 105                       # of its segment
            assert after.tolist() == list(range(starts[-1] + 17 * frame_stride, end, frame_stride))
            assert torch.equal(clips.more_actions(int(i), 2)[:, 0], after[:2])
    span, step = 16 * frame_stride + 1, stride or 17 * frame_stride
    # frames 50.. are in the second shard, so that a window of the first segment crosses the border of files
    assert starts == [*range(0, 60 - span + 1, step), *range(60, 105 - span + 1, step)]


def test_workers_and_pickling_read_the_same(tmp_path):
    clips = data.open_clips(raw_split(tmp_path / "val_v2.0"), "val")
    copy = pickle.loads(pickle.dumps(clips))
    for a, b in zip(torch.utils.data.DataLoader(clips, num_workers=2), torch.utils.data.DataLoader(copy)):
        assert torch.equal(a["video"], b["video"]) and torch.equal(a["actions"], b["actions"])


def test_token_clips_lie_in_one_segment(tmp_path):
    """Segment 1 runs over the shard border, clips 1 cross a border of segments, last clips are padded."""
    clips = data.open_clips(token_split(tmp_path / "train_v2.0"))
    assert clips.kind == "discrete" and clips.shape == (3, 32, 32) and clips.vocab_size == 64_000
    assert [int(c["video"][0, 0, 0]) for c in clips] == [0, 2, 1000]
    assert [int(c["actions"][0, 0]) for c in clips] == [0, 34, 53]
    assert data.info(tmp_path)["dropped"] == {"clips over a segment border": 2, "frames in no clip": 42}
    assert clips.where(2) == "shard 1, frames 0..16"
    assert clips.more_actions(1, 99)[:, 0].tolist() == list(range(51, 74))


def test_same_id_at_both_ends_is_not_one_segment(tmp_path):
    clips = data.open_clips(token_split(tmp_path / "train_v2.0", ((4, 5), (9, 3), (4, 26)), (34,)))
    assert [int(c["video"][0, 0, 0]) for c in clips] == [1]


def test_raw_and_token_sets_of_1x_validate_on_the_same_clips(tmp_path, fake):
    """TRAPS 32: segments that end within shards, and one that runs on over their border; latents say where theirs begin."""
    layout = dict(segments=((0, 30), (1, 44), (2, 70)), shards=(53, 91))
    for split in ("train", "val"):
        token_split(tmp_path / f"tokens/{split}_v2.0", **layout)
        raw_split(tmp_path / f"raw/{split}_v2.0", **layout)
    tokens, raw = (data.open_clips(tmp_path / kind, "val") for kind in ("tokens", "raw"))
    assert raw.starts.tolist() == tokens.starts.tolist() == [0, 34, 53, 87, 104, 121] and raw.kind == "raw"
    assert evaluate.clip_list(raw, range(6))[0] == evaluate.clip_list(tokens, range(6))[0] != evaluate.clip_list(raw, range(5))[0]
    for a, b in zip(tokens, raw):
        assert torch.equal(a["actions"], b["actions"]) and torch.equal(shown(b["video"]), b["actions"][:, 0].long())
    assert data.info(tmp_path / "raw")["splits"]["val"]["clips"] == 6
    # Where nothing is to be compared, windows begin with the recording: training, own strides, other robots.
    assert data.open_clips(tmp_path / "raw").starts.tolist() == [0, 30, 47, 74, 91, 108, 125]
    assert data.open_clips(tmp_path / "raw", "val", stride=17).starts.tolist() == [0, 30, 47, 74, 91, 108, 125]
    assert data.open_clips(tmp_path / "raw", "val", frame_stride=2).starts.tolist() == [30, 74, 108]
    own = raw_split(tmp_path / "own/val_v2.0", **layout, hz=10)
    assert data.open_clips(own, "val").starts.tolist() == [0, 30, 47, 74, 91, 108, 125]
    # What is encoded from the raw set has lost the places, so that metadata.json holds them.
    data.encode(str(tmp_path / "raw"), str(fake / "continuous"), str(tmp_path / "out"), progress=False)
    cache = data.open_clips(tmp_path / "out", "val")
    assert len(cache) == 6 and cache.meta["first"] == [0, 4, 23, 13, 30, 47] and "first" not in data.open_clips(tmp_path / "out").meta
    assert all(torch.equal(a["actions"], b["actions"]) for a, b in zip(cache, raw))
    assert len(raw.more_actions(1, 9)) == 9 and len(cache.more_actions(1, 9)) == 0, "its next clip begins two frames after this one"


def test_opening_reads_no_tokens(tmp_path, monkeypatch):
    """All but the first and last clip of a shard may be anything: they are checked when they are read."""
    folder = token_split(tmp_path / "train_v2.0", ((0, 68),), (68,))
    ids = np.memmap(f"{folder}/videos/video_0.bin", "<i4", "r+", shape=(4, 3, 32, 32))
    ids[1, 2, 3, 4] = 64_000
    clips = data.open_clips(tmp_path)
    clips[0], clips[2]
    with pytest.raises(data.DataError, match="video_0.bin has values outside 0..63999 in clip 1"):
        clips[1]


@pytest.mark.skipif(not os.path.isdir(f"{FIXTURES}/1x_tokens"), reason="shared fixtures are not here")
def test_shared_tokens():
    found = data.info(f"{FIXTURES}/1x_tokens")
    assert found["splits"]["train"]["clips"] == 3 and found["splits"]["val"]["clips"] == 2
    assert (found["clips"], found["frames"], found["shards"], found["hz"]) == (5, 127, 3, 30)
    assert found["constant"] == ["KNEE_PITCH", "ANKLE_ROLL", "ANKLE_PITCH"]


@pytest.mark.skipif(not os.path.isdir(f"{FIXTURES}/raw_mp4"), reason="shared fixtures are not here")
def test_shared_mp4():
    av = pytest.importorskip("av")
    with av.open(f"{FIXTURES}/raw_mp4/val_v2.0/video_0.mp4") as file:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    clips = data.open_clips(f"{FIXTURES}/raw_mp4", "val", stride=1)
    assert len(clips) == 24 + 17
    for i in random.Random(0).sample(range(len(clips)), 10):
        a = i if i < 24 else i + 16
        assert (clips[i]["video"].numpy() == frames[a:a + 17]).all()
    assert data.open_clips(f"{FIXTURES}/raw_mp4", "val", size=64)[0]["video"].shape == (17, 64, 64, 3)


# ---- mp4 as a player shows it

def mp4_split(folder, frames, **options):
    """A raw split of one mp4."""
    raw_split(folder, ((0, len(frames)),), (len(frames),))
    os.remove(f"{folder}/videos/video_0.npy")
    write_mp4(f"{folder}/videos/video_0.mp4", frames, **options)
    return f"{folder}/videos/video_0.mp4"


def patch_box(file, name, offset, form, *values):
    """Overwrites numbers in the first box of this name of an mp4."""
    content = bytearray(open(file, "rb").read())
    struct.pack_into(form, content, content.find(name) + 4 + offset, *values)
    open(file, "wb").write(content)


def number(frames):
    return (frames[:, 4::8, 32, :].mean(-1) > 115) @ (2 ** np.arange(8))


def test_mp4_in_a_process_forked_after_a_read(tmp_path):
    """Closing a decoder that came by the fork waits for threads that did not come along."""
    mp4_split(tmp_path / "train_v2.0", numbered(90))
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {MAIN!r})
        import data, multiprocessing, torch
        clips = data.open_clips({str(tmp_path)!r})
        first = clips[1]["video"]
        multiprocessing.set_start_method("fork")
        for i, clip in enumerate(torch.utils.data.DataLoader(clips, num_workers=2)):
            assert i != 1 or torch.equal(clip["video"][0], first)
        from examples.mp4 import Mp4
        print(i, len(Mp4.last))""")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout == "4 1\n", out.stderr[-500:]


def test_mp4_trimmed_by_an_edit_list(tmp_path):
    """The first five frames are cut away, keyframe 0 among them: what remains is read, from its first frame on."""
    write_mp4(tmp_path / "a.mp4", numbered(90), g="12", bf="2")
    ticks = 512                                                          # of a frame, in the track's time
    patch_box(tmp_path / "a.mp4", b"elst", 12, ">i", (2 + 5) * ticks)    # B-frames begin two frames late
    video = Mp4(str(tmp_path / "a.mp4"), 85)
    for index in (np.arange(3), np.arange(3, 20), np.array([2]), np.arange(0, 85, 7)):
        assert (number(video[index]) == index + 5).all()


def test_mp4_with_tags_in_another_encoding(tmp_path):
    file = mp4_split(tmp_path / "train_v2.0", numbered(20))
    content = open(file, "rb").read()
    assert b"Lavf" in content
    open(file, "wb").write(content.replace(b"Lavf", b"L\xe4vf"))
    assert data.info(tmp_path)["clips"] == 1


@pytest.mark.parametrize("rate", [30, 25, 60])
def test_mp4_of_another_rate(tmp_path, rate):
    """25 and 60 frames a second, where metadata.json says 30."""
    mp4_split(tmp_path / "train_v2.0", numbered(40), rate=rate)
    if rate == 30:
        return data.info(tmp_path) and None
    with pytest.raises(data.DataError, match=r"video_0.mp4 plays 40 frames in .* s, not all at hz = 30"):
        data.info(tmp_path)


def test_mp4_whose_rate_changes(tmp_path):
    """60 frames a second, then 20: 30 on the whole, as metadata.json says, and yet the clips are of two speeds."""
    times = np.concatenate([np.arange(20) * 1500, 30_000 + np.arange(20) * 4500])
    mp4_split(tmp_path / "train_v2.0", numbered(40), times=times * 117_000 // times[-1])
    with pytest.raises(data.DataError, match=r"video_0.mp4 plays 40 frames in 1.3 s, not all at hz = 30"):
        data.info(tmp_path)


@pytest.mark.parametrize("degrees, matrix, corner", [(0, None, (0, 0)), (90, (0, 1, -1, 0), (0, -1)),
                                                     (180, (-1, 0, 0, -1), (-1, -1)), (270, (0, -1, 1, 0), (-1, 0))])
def test_mp4_is_turned_as_its_header_says(tmp_path, degrees, matrix, corner):
    """A red patch in the upper left corner goes clockwise."""
    frames = np.full((20, 64, 64, 3), 128, np.uint8)
    frames[:, :16, :16] = (255, 0, 0)
    file = mp4_split(tmp_path / "train_v2.0", frames)
    if matrix:
        a, b, c, d = (65536 * x for x in matrix)
        patch_box(file, b"tkhd", 40, ">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video = data.open_clips(tmp_path)[0]["video"].int()
    red = [(y, x) for y in (0, -1) for x in (0, -1) if video[0, y, x, 0] > 200 > 100 > video[0, y, x, 1]]
    assert red == [corner]


def test_mp4_whose_pixels_are_not_square_is_refused(tmp_path):
    av = pytest.importorskip("av")
    mp4_split(tmp_path / "train_v2.0", numbered(20), **{"x264-params": "sar=2/1"})
    with av.open(str(tmp_path / "train_v2.0/videos/video_0.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    with pytest.raises(data.DataError, match="video_0.mp4 has pixels 2 times as wide as high"):
        data.open_clips(tmp_path)


@pytest.mark.parametrize("bf", ["0", "3"])
def test_mp4_with_a_damaged_packet_is_never_read_wrongly(tmp_path, bf):
    """Six bits of one packet: every clip is what it was, or a sentence that names file and frames, unless the
    decoder notices nothing at all."""
    av = pytest.importorskip("av")
    base = np.random.default_rng(1).integers(0, 255, (8, 25, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = mp4_split(tmp_path / "train_v2.0", [base[:, k:k + 64] for k in range(85)], g="12", bf=bf)
    good, whole = [c["video"].int() for c in data.open_clips(tmp_path)], open(file, "rb").read()
    with av.open(file) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    refused, noticed = 0, 0
    for seed in range(12):
        content, rng = bytearray(whole), np.random.default_rng(seed)
        at, size = packets[20 + seed]
        for j in rng.integers(12, size, 6):
            content[at + j] ^= 1 << int(rng.integers(8))
        open(file, "wb").write(content)
        try:
            with av.open(file) as container:
                if not any(frame.is_corrupt for frame in container.decode(video=0)):
                    continue
        except av.error.InvalidDataError:
            pass
        noticed += 1
        clips = data.open_clips(tmp_path)
        for i in range(len(clips)):
            try:
                assert (clips[i]["video"].int() - good[i]).abs().float().mean((1, 2, 3)).max() < 3
            except data.DataError as e:
                refused += 1
                assert f"video_0.mp4 does not decode at frames {17 * i}.." in str(e)
    assert refused >= noticed >= 8


# ---- whose recording a frame is of

def episodes_as_shards(folder, n=4, **meta):
    """A recording a shard; their segment ids begin with 0 in every file."""
    for k in range(n):
        data.save_shard(folder, k, ".npy", np.full((40, 16, 16, 3), 50 * k, np.uint8), np.full((40, 25), k), np.zeros(40))
    data.save(f"{folder}/metadata.json", {"num_shards": n, "hz": 10, "num_images": 40 * n, **meta})
    return data.open_clips(folder)


def test_segment_ids_that_begin_anew_in_every_shard(tmp_path, capsys):
    clips = episodes_as_shards(tmp_path / "train_v2.0")
    assert len(clips) == 8 and all(len(c["actions"].unique()) == 1 for c in clips)
    data.main(["info", str(tmp_path)])
    assert "segment ids begin anew in every shard" in capsys.readouterr().out
    assert len(episodes_as_shards(tmp_path / "train_v2.0", segment_ids="per shard")) == 8
    assert len(episodes_as_shards(tmp_path / "train_v2.0", segment_ids="global")) == 9    # one recording of 160
    data.main(["info", str(tmp_path)])
    assert "anew" not in capsys.readouterr().out


def test_shard_ind_may_be_missing(tmp_path):
    folder = raw_split(tmp_path / "train_v2.0")
    set_key("metadata/metadata_1.json", "shard_ind", KeyError)(folder)
    assert len(data.open_clips(tmp_path)) == 5


# ---- pixels: RGB stays RGB (TRAPS 20), the range, the resize

def write_mp4(file, frames, rate=30, times=None, **options):
    """times: of the frames, in 1/90000 s, where they are not rate a second."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "10", **options})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90_000)
        for k, f in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[k]), Fraction(1, 90_000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def numbered(n, size=64):
    """Frames that show their number through compression: bit b of k is the colour of stripe b."""
    frames = np.zeros((n, size, size, 3), np.uint8)
    for k in range(n):
        for b in range(8):
            frames[k, 8 * b:8 * b + 8] = 200 if k >> b & 1 else 30
    return frames


@pytest.mark.parametrize("options", [{"g": "12", "bf": "3"}, {"g": "250", "bf": "2"}, {"g": "1"},
                                     {"g": "10", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"},
                                     {"g": "2", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}])
def test_mp4_frames_by_number(tmp_path, options):
    """B-frames; long, short, open groups of pictures: frame k is frame k in order, at random, in steps."""
    write_mp4(tmp_path / "a.mp4", numbered(90), **options)
    video, rng = Mp4(str(tmp_path / "a.mp4"), 90), random.Random(0)
    reads = [np.arange(a, min(a + 17, 90)) for a in range(0, 90, 17)]
    for _ in range(25):
        first, step = rng.randrange(80), rng.choice([1, 2, 3])
        reads.append(np.arange(first, min(90, first + 17 * step), step))
    for index in reads:
        bits = video[index][:, 4::8, 32, :].mean(-1) > 115
        assert (bits @ (2 ** np.arange(8)) == index).all()


@pytest.mark.parametrize("suffix", ["npy", "mp4", "png"])
def test_red_stays_red(tmp_path, suffix):
    folder = raw_split(tmp_path / "train_v2.0", ((0, 17),), (17,), size=64)
    red = np.zeros((17, 64, 64, 3), np.uint8)
    red[..., 0] = 220
    os.remove(f"{folder}/videos/video_0.npy")
    if suffix == "mp4":
        write_mp4(f"{folder}/videos/video_0.mp4", red)
    else:
        np.save(f"{folder}/videos/video_0.npy", red)
    video = data.open_clips(tmp_path, size=32)[0]["video"][None]
    tensor = tok.to_video(video)                                        # (1, 3, 17, 32, 32)
    assert tensor[0, 0].min() > 0.6 and tensor[0, 1:].max() < -0.8
    pixels = tok.to_uint8(tensor)[0, 0].numpy()
    if suffix == "png":
        from PIL import Image
        Image.fromarray(pixels).save(tmp_path / "a.png")
        pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels[..., 0].min() > 205 and pixels[..., 1:].max() < 20


def test_to_uint8_inverts_to_video():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    assert torch.equal(tok.to_uint8(tok.to_video(frames)), frames)
    assert tok.to_video(frames).min() == -1 and tok.to_video(frames).max() == 1
    assert tok.to_uint8(torch.full((1, 3, 1, 1, 1), 7.0)).unique().tolist() == [255]


def test_resize_is_antialiased():
    lines = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    lines[:, ::4] = 255                                                  # a quarter of the rows is white
    small = data.resize(lines, 16)[0, 2:-2, 2:-2].float()
    assert small.std() < 25 and abs(small.mean() - 64) < 8


# ---- statistics (TRAPS 12)

def test_statistics_are_those_of_usable_segments(tmp_path):
    folder = raw_split(tmp_path / "train_v2.0", ((0, 60), (7, 10), (1, 40)), (50, 60))
    files = [f"{folder}/robot_states/states_{i}.bin" for i in (0, 1)]
    states = np.concatenate([np.fromfile(file, "<f4").reshape(-1, 25) for file in files])
    states[:, 21:23] = np.abs(states[:, 21:23]) % 1
    states[:, 5] = 1000 + np.float32(1e-4) * np.arange(110) % 2e-4       # constant up to float noise
    states[60:70, 1] = 1e6                                               # a segment too short for a clip
    for file, part in zip(files, (states[:50], states[50:])):
        part.tofile(file)
    clips = data.open_clips(tmp_path)
    stats = data.action_statistics(clips)
    used = np.delete(states, np.s_[60:70], 0).astype(np.float64)
    usual = [j for j in range(25) if j not in (3, 5, 21, 22)]
    assert np.allclose(stats["mean"][usual], used.mean(0)[usual], rtol=1e-5, atol=1e-6)
    assert np.allclose(stats["std"][usual], used.std(0)[usual], rtol=1e-5)
    actions = clips[0]["actions"]
    z = (actions - stats["mean"]) / stats["std"]
    assert (z[:, 3] == 0).all() and z[:, 5].abs().max() < 1e-2           # constant dimensions
    assert torch.equal(z[:, 21:23], actions[:, 21:23])                   # hand closures


def test_own_robot(tmp_path):
    """7 states at 12.5 Hz with a gripper, from metadata alone."""
    raw_split(tmp_path / "train_v2.0", A=7, hz=12.5, action_dim=7, names=list("abcdefg"), keep=[6])
    clips = data.open_clips(tmp_path, frame_stride=2)
    assert (clips.action_dim, clips.hz, clips.keep, clips.names) == (7, 6.25, (6,), tuple("abcdefg"))
    stats = data.action_statistics(clips)
    assert stats["mean"].shape == (7,) and stats["mean"][6] == 0 and stats["std"][6] == 1
    assert data.info(tmp_path)["constant"] == ["d"]


# ---- the built-in robot

def test_synth_is_the_same_for_a_seed_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(robot, "EPISODE", 40)
    monkeypatch.setattr(robot, "SHARD", 320)
    arguments = dict(frames=400, size=16, progress=False)
    a = data.synth(str(tmp_path / "a"), **arguments, splits=("train",))
    whole = tree(a)
    shutil.copytree(a, tmp_path / "b")
    os.remove(tmp_path / "b/train_v2.0/metadata.json")                   # as a kill leaves it
    os.remove(tmp_path / "b/train_v2.0/videos/video_1.npy")
    open(tmp_path / "b/train_v2.0/videos/video_1.npy.123.tmp", "w").close()
    with pytest.raises(data.DataError, match="metadata.json is missing"):
        data.open_clips(tmp_path / "b")
    data.synth(str(tmp_path / "b"), **arguments, splits=("train",))
    assert tree(tmp_path / "b") == whole
    with pytest.raises(data.DataError, match="seed = 0, not 1"):
        data.synth(str(tmp_path / "b"), **{**arguments, "seed": 1}, splits=("train",))
    clips = data.open_clips(a)
    assert clips.kind == "raw" and clips.hz == robot.HZ and clips.names == data.JOINTS
    assert len(clips) == 10 * 2 and clips.meta["robot"] == "built-in"
    data.synth(str(tmp_path / "c"), **arguments, splits=("val",))
    val = data.open_clips(tmp_path / "c", "val")
    assert val.meta["num_images"] == 1700 and not np.array_equal(clips[0]["video"], val[0]["video"])


def a_shard(i, n=17):
    if i == 3:
        raise data.DataError("shard 3: cannot be drawn")
    return np.full((n, 16, 16, 3), i, np.uint8), np.full((n, 25), i), np.full(n, i)


def split_of(folder, n, **options):
    meta = {"num_shards": n, "hz": 10, "num_images": 17 * n}
    shards.make_split(str(folder), {"n": n}, [(i, 17) for i in range(n)], a_shard, meta,
                    lambda i: (17 * 16 * 16 * 3, 17 * 100), progress=False, **options)
    return [int(clip["actions"][0, 0]) for clip in data.open_clips(folder)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shards_are_made_by_processes(tmp_path, monkeypatch, method):
    """Also where there is no fork; what fails in a process is the caller's error."""
    monkeypatch.setattr(multiprocessing, "get_context", functools.partial(multiprocessing.get_context, method))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert split_of(tmp_path / "train", 2) == [0, 1]
    if method == "fork":
        with pytest.raises(data.DataError, match="shard 3"):
            split_of(tmp_path / "other", 4)
        assert not (tmp_path / "other/metadata.json").exists()


def begun(tmp_path, rank, last):
    """A thread that makes the share of one of two ranks in three shards, once its last shard is there."""
    job = threading.Thread(target=split_of, args=(tmp_path / "train", 3), kwargs={"share": (rank, 2)})
    job.start()
    while not (tmp_path / f"train/metadata/metadata_{last}.json").exists():
        time.sleep(0.01)
    return job


def test_shards_are_divided_among_ranks(tmp_path):
    """Rank 1 of 2 makes shard 1 alone; rank 0 finds it whole, makes the rest, and writes metadata.json."""
    job = begun(tmp_path, rank=1, last=1)
    time.sleep(0.1)
    assert os.listdir(tmp_path / "train/metadata") == ["metadata_1.json"]
    assert split_of(tmp_path / "train", 3, share=(0, 2)) == [0, 1, 2]
    job.join(5)
    assert not job.is_alive()


def test_rank_0_waits_for_the_shards_of_the_others(tmp_path):
    """metadata.json makes a folder one of data: it is written when every shard is there, whoever makes it."""
    job = begun(tmp_path, rank=0, last=2)
    time.sleep(0.3)
    assert not (tmp_path / "train/metadata.json").exists()
    assert split_of(tmp_path / "train", 3, share=(1, 2)) == [0, 1, 2]
    job.join(5)
    assert not job.is_alive()


def test_processes_end_with_their_parent(tmp_path):
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {MAIN!r})
        import os, time, numpy as np
        from examples import shards
        def slow(i):
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(0.5)
            return np.zeros((17, 16, 16, 3), np.uint8), np.zeros((17, 25)), np.zeros(17)
        os.cpu_count = lambda: 2
        if __name__ == "__main__":
            shards.make_split({str(tmp_path / 'train')!r}, {{}}, [(i, 1) for i in range(99)], slow, {{}}, lambda i: (1, 1))""")
    (tmp_path / "script.py").write_text(code)
    job = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    children = {int(job.stdout.readline()) for _ in range(2)}
    job.kill()
    job.stdout.read()                                                    # ends when no process holds the pipe
    assert len(children) == 2


def test_prepare_data_draws_and_encodes_once(tmp_path, fake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synth", functools.partial(robot.synth, size=16))
    for kind in ("discrete", "continuous"):
        monkeypatch.setitem(data.SHIPPED_TOKENIZERS, kind, str(fake / kind))
        said = []
        folder, tokenizer = data.prepare_data(kind, robot_frames=340, say=said.append)
        assert (folder, tokenizer) == (f"data/robot_{kind}", str(fake / kind)) and len(said) == 1
        clips = data.open_clips(folder)
        assert clips.kind == kind and clips.meta["windows"] and clips.meta["stride"] == 4
        assert data.prepare_data(kind, data=folder, tokenizer=str(fake / kind)) == (folder, str(fake / kind))
    for options, message in ((dict(data="data/robot"), "--encode"), (dict(tokenizer="nothing.pt"), "nothing.pt"),
                             (dict(data="data/robot_continuous"), "continuous latents"),
                             (dict(data="data/robot_discrete", tokenizer=str(fake / "continuous")), "not encoded with")):
        with pytest.raises(data.DataError, match=message):
            data.prepare_data("discrete", **options)


# ---- encode

FAKE_TOKENIZER = """
import os, time, torch
class Fake:
    spatial, temporal = 8, 8
    def __init__(self, path):
        self.kind = open(path).read().strip()
        self.vocab_size, self.channels = 1000, 2
    def encode(self, video):               # (B, 3, 17, H, W) -> a colour per 8 x 8 cell of frames 0, 8, 16
        time.sleep(float(os.environ.get("SLOW", 0)))
        x = video[:, :, ::8, ::8, ::8]
        return ((x[:, 0] + 1) * 127.5).round().long() if self.kind == "discrete" else x[:, :2]
def load_tokenizer(path, device="cpu", dtype=torch.float32):
    torch.empty(0, device=device)
    return Fake(path)
"""


def tree(folder):
    """{relative path: bytes} of all files."""
    return {os.path.relpath(os.path.join(d, f), folder): open(os.path.join(d, f), "rb").read()
            for d, _, files in os.walk(folder) for f in files}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function in load_tokenizer's place, for this process and for subprocesses, and files of its two kinds."""
    os.makedirs(tmp_path / "fake")
    (tmp_path / "fake/fake_tokenizer.py").write_text(FAKE_TOKENIZER)
    for kind in ("discrete", "continuous"):
        (tmp_path / f"fake/{kind}").write_text(kind)
    names = {}
    exec(FAKE_TOKENIZER, names)
    monkeypatch.setattr(data, "load_tokenizer", names["load_tokenizer"])
    return tmp_path / "fake"


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("stride, frame_stride", [(17, 1), (7, 1), (34, 2)])
def test_cache_reads_like_a_data_folder(tmp_path, fake, monkeypatch, kind, stride, frame_stride):
    """Every latent frame 0, 1, 2 shows the number that actions 0, 8, 16 of its clip say."""
    monkeypatch.setattr(data, "CLIPS_PER_SHARD", 3)
    raw_split(tmp_path / "raw/train_v2.0", ((0, 60), (1, 5), (0, 40)), (50, 55), keep=[2], size=16)
    data.encode(str(tmp_path / "raw"), str(fake / kind), str(tmp_path / "out"), stride=stride,
                frame_stride=frame_stride, batch=2, progress=False)
    raw = data.open_clips(tmp_path / "raw", stride=stride, frame_stride=frame_stride)
    clips = data.open_clips(tmp_path / "out", frame_stride=frame_stride)
    assert (clips.kind, len(clips), clips.hz, clips.keep) == (kind, len(raw), 30 / frame_stride, (2,))
    for a, b in zip(raw, clips):
        assert torch.equal(a["actions"], b["actions"])
        shows = b["video"][:, 0, 0] if kind == "discrete" else (b["video"][0, :, 0, 0] + 1) * 127.5
        assert torch.allclose(shows.float(), b["actions"][::8, 0], atol=0.1)
        more = clips.more_actions(b["index"], 9)                         # never over a border or an overlap
        assert torch.equal(more, raw.more_actions(b["index"], 9)[:len(more)])
    assert len(clips.more_actions(0, 9)) == (9 if stride == 17 else 0)
    assert data.info(tmp_path / "out")["clips"] == len(raw)
    if kind == "continuous":
        x = torch.stack([c["video"] for c in clips])
        assert np.allclose(clips.meta["latent_mean"], x.mean((0, 2, 3, 4)), atol=1e-3)
        std = x.std((0, 2, 3, 4), correction=0)
        assert std[1] == 0, "the second channel never changes: it is divided by 1, not by 0"
        assert np.allclose(clips.meta["latent_std"], torch.where(std == 0, 1, std), atol=1e-3)


@pytest.mark.parametrize("frames, enough, frame_stride, stride", [
    (105, 5000, 1, 1), (105, 35, 1, 3), (105, 4, 1, 17), (105, 4, 2, 26), (105, 2, 2, 34)])
def test_windows_of_little_data_overlap(tmp_path, fake, monkeypatch, capsys, frames, enough, frame_stride, stride):
    """About as many clips as are enough to train on; those for validation never overlap, whatever is asked."""
    monkeypatch.setattr(data, "ENOUGH", enough)
    for split in ("train", "val"):
        raw_split(tmp_path / f"raw/{split}_v2.0")
    data.encode(str(tmp_path / "raw"), str(fake / "discrete"), str(tmp_path / "out"), frame_stride=frame_stride)
    assert data.open_clips(tmp_path / "out").meta["stride"] == stride
    assert data.open_clips(tmp_path / "out").meta.get("recoloured", False) == (105 < enough * frame_stride)
    assert data.open_clips(tmp_path / "out", "val").meta["stride"] == 17 * frame_stride
    said = capsys.readouterr().out
    assert f"{len(data.open_clips(tmp_path / 'raw', stride=stride, frame_stride=frame_stride))} clips, one every {stride} of 105 frames" in said and "GB" in said
    data.encode(str(tmp_path / "raw"), str(fake / "discrete"), str(tmp_path / "five"), stride=5, progress=False)
    assert [data.open_clips(tmp_path / "five", split).meta["stride"] for split in ("train", "val")] == [5, 17]


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_clips_of_little_data_get_other_colours(tmp_path, fake, monkeypatch, capsys, kind):
    """Of less than 5,000 frames two of three, each as its number says, and it is said. Clips for validation stay as they
    are, and those of a stride that was asked for, if no other colours are asked for."""
    monkeypatch.setattr(data, "CLIPS_PER_SHARD", 20)
    for split in ("train", "val"):
        raw_split(tmp_path / f"raw/{split}_v2.0")
    encode, said = functools.partial(data.encode, str(tmp_path / "raw"), str(fake / kind)), {}
    for name, options in (("few", {}), ("again", dict(batch=3)), ("plain", dict(recolour=False)), ("one", dict(stride=1)),
                          ("asked", dict(stride=1, recolour=True))):
        encode(str(tmp_path / name), **options)
        said[name] = capsys.readouterr().out.count("two of three in other colours (--no-recolour: as they are)")
    assert said == {"few": 1, "again": 1, "plain": 0, "one": 0, "asked": 1}
    videos = {name: [clip["video"] for clip in data.open_clips(tmp_path / name)] for name in said}
    same = lambda a, b: [torch.equal(x, y) for x, y in zip(videos[a], videos[b], strict=True)]
    assert all(same("few", "again")) and all(same("plain", "one")) and all(same("few", "asked"))
    assert 0 < sum(same("few", "plain")) < len(videos["few"]) / 2
    few, plain = (data.open_clips(tmp_path / name) for name in ("few", "plain"))
    assert all(torch.equal(a["actions"], b["actions"]) for a, b in zip(few, plain))
    assert few.meta["recoloured"] and "recoloured" not in plain.meta
    with pytest.raises(data.DataError, match="recoloured = True, not None"):
        encode(str(tmp_path / "few"), recolour=False)  # not what is there
    a, b = (data.open_clips(tmp_path / name, "val") for name in ("few", "plain"))
    assert all(torch.equal(x["video"], y["video"]) for x, y in zip(a, b)) and "recoloured" not in a.meta


def test_a_clip_is_recoloured_as_a_whole():
    """All its frames get the same colours; a third of the clips stay as they are, and no two others are alike."""
    frame, ways = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8), []
    for i in range(90):
        video = data.recoloured(frame.repeat(17, 1, 1, 1), i)
        assert video.shape == (17, 32, 32, 3) and video.dtype == torch.uint8 and (video == video[:1]).all()
        ways.append(video[0].numpy().tobytes())
    kept = ways.count(frame.numpy().tobytes())
    assert 15 < kept < 45 and len(set(ways)) == 90 - kept + 1


def test_85000_frames_do_not_overlap():
    clips = types.SimpleNamespace(frame_stride=1, edges=np.array([0, 84_999]))
    assert data.training_stride(clips) == 16
    clips.edges[1] = 85_000
    assert data.training_stride(clips) == 17


@pytest.mark.parametrize("change", ["pixels", "states", "segments", "nothing"])
def test_a_cache_knows_what_it_was_made_of(tmp_path, fake, change):
    """TRAPS 31: recorded again with as many frames, the old latents are not taken for the new data's."""
    folder = raw_split(tmp_path / "raw/train_v2.0")
    encode = functools.partial(data.encode, str(tmp_path / "raw"), str(fake / "discrete"), str(tmp_path / "out"), progress=False)
    encode()
    if change == "pixels":
        video = np.load(f"{folder}/videos/video_1.npy")
        np.save(f"{folder}/videos/video_1.npy", 255 - video)
    elif change == "states":
        set_value("robot_states/states_1.bin", "<f4", 777, 5)(folder)
    elif change == "segments":
        set_value("segment_indices/segment_idx_0.bin", "<i4", slice(30, None), 7)(folder)
    else:
        os.utime(f"{folder}/videos/video_1.npy")
        encode()
        return
    with pytest.raises(data.DataError, match="(source_sha256|clips) .* delete .*out/train_v2.0 to make it anew"):
        encode()


def test_encode_may_leave_a_split_out(tmp_path, fake):
    for split in ("train", "val"):
        raw_split(tmp_path / f"raw/{split}_v2.0")
    data.encode(str(tmp_path / "raw"), str(fake / "discrete"), str(tmp_path / "out"), splits=("val",), progress=False)
    assert os.listdir(tmp_path / "out") == ["val_v2.0"]


def test_velocities_and_groups_reach_the_cache(tmp_path, fake):
    raw_split(tmp_path / "raw/train_v2.0", velocities=[3], groups={"arm": [0, 1]})
    data.encode(str(tmp_path / "raw"), str(fake / "discrete"), str(tmp_path / "out"), progress=False)
    meta = data.open_clips(tmp_path / "out").meta
    assert meta["velocities"] == [3] and meta["groups"] == {"arm": [0, 1]}


def encode_process(fake, raw, out, rank=0, world=1, slow=0.0):
    code = textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(fake)!r}, {MAIN!r}]
        import data, fake_tokenizer; data.CLIPS_PER_SHARD = 4; data.load_tokenizer = fake_tokenizer.load_tokenizer
        data.main(["encode", "--data", {str(raw)!r}, "--tokenizer", {str(fake / 'discrete')!r},
                   "--out", {str(out)!r}, "--stride", "2", "--batch", "2"])""")
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "SLOW": str(slow)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)


def test_encode_survives_kill_9_and_two_ranks(tmp_path, fake):
    """Killed twice in the middle and finished, and done by two ranks: the bytes of an undisturbed run."""
    raw_split(tmp_path / "raw/train_v2.0")
    whole, killed, ranks = (tmp_path / d for d in ("whole", "killed", "ranks"))
    jobs = [encode_process(fake, tmp_path / "raw", whole),
            encode_process(fake, tmp_path / "raw", ranks, rank=1, world=2),
            encode_process(fake, tmp_path / "raw", ranks, rank=0, world=2)]
    for seen in (1, 4):
        job = encode_process(fake, tmp_path / "raw", killed, slow=0.1)
        while len(list(killed.glob("*/metadata/*.json"))) < seen and job.poll() is None:
            time.sleep(0.02)
        time.sleep(0.13)
        job.kill()
        job.wait()
        assert not (killed / "train_v2.0/metadata.json").exists()
        with pytest.raises(data.DataError, match="metadata.json is missing"):
            data.open_clips(killed)
    (killed / "train_v2.0/videos/video_9.bin.1.tmp").write_text("what a kill in the middle of a write leaves")
    jobs.append(encode_process(fake, tmp_path / "raw", killed))
    assert [job.wait(60) for job in jobs] == [0, 0, 0, 0]
    assert tree(killed) == tree(whole) and tree(ranks) == tree(whole)
    assert len(data.open_clips(whole)) == len(data.open_clips(tmp_path / "raw", stride=2))


def test_a_cache_may_move_with_its_source(tmp_path, fake, monkeypatch):
    """The project's folder renamed: the cache is still that of the data beside it; other data are still refused."""
    raw_split(tmp_path / "a/raw/train_v2.0")
    data.encode(str(tmp_path / "a/raw"), str(fake / "discrete"), str(tmp_path / "a/out"))
    before = tree(tmp_path / "a/out")
    os.rename(tmp_path / "a", tmp_path / "b")
    data.encode(str(tmp_path / "b/raw"), str(fake / "discrete"), str(tmp_path / "b/out"))
    after = tree(tmp_path / "b/out")
    assert {name for name in before if after[name] != before[name]} <= {"train_v2.0/metadata.json"}  # it names the source
    os.rename(tmp_path / "b/raw", tmp_path / "b/other")
    with pytest.raises(data.DataError, match="source = '../../raw/train_v2.0'"):
        data.encode(str(tmp_path / "b/other"), str(fake / "discrete"), str(tmp_path / "b/out"))


class Cuda(str):
    """A device that says it is a GPU, and is none."""
    def startswith(self, _):
        return True


@pytest.mark.parametrize("suffix", ["npy", "mp4"])
def test_reading_beside_encoding_changes_no_byte(tmp_path, fake, monkeypatch, suffix):
    """For a GPU threads read ahead, of an mp4 each with a decoder of its own; what they fail at is the same sentence."""
    monkeypatch.setattr(data, "CLIPS_PER_SHARD", 9)
    folder = raw_split(tmp_path / "raw/train_v2.0", ((0, 85),), (85,), size=64)
    if suffix == "mp4":
        os.remove(f"{folder}/videos/video_0.npy")
        write_mp4(f"{folder}/videos/video_0.mp4", numbered(85), g="12", bf="2")
    encode = functools.partial(data.encode, str(tmp_path / "raw"), str(fake / "discrete"), stride=3, batch=2, progress=False)
    readers, read = set(), data.Clips.__getitem__

    def spy(clips, i):
        readers.add(threading.get_ident())
        time.sleep(0.005)
        return read(clips, i)

    monkeypatch.setattr(data.Clips, "__getitem__", spy)
    encode(str(tmp_path / "one"), device="cpu")
    assert readers == {threading.get_ident()}, "on a CPU the cores are busy encoding"
    encode(str(tmp_path / "two"), device=Cuda("cpu"))
    assert len(readers) > 2
    assert tree(tmp_path / "one") == tree(tmp_path / "two") and len(data.open_clips(tmp_path / "one")) == 23
    set_value("robot_states/states_0.bin", "<f4", 25 * 80, np.nan)(folder)
    with pytest.raises(data.DataError, match=r"states_0.bin has states that are not finite at frames \[80\]"):
        encode(str(tmp_path / "three"), device=Cuda("cpu"))


def test_jobs_ahead_are_few():
    """As many as there are threads, and not one more, are begun before the first result is taken."""
    begun = []
    results = data.ahead(data.ThreadPoolExecutor(2), 2, lambda job: begun.append(job) or -job, range(9))
    assert next(results) == 0
    time.sleep(0.1)
    assert begun == [0, 1, 2] and [*results] == [-k for k in range(1, 9)]


def encode_message(tmp_path, fake, *options, tokenizer="discrete"):
    with pytest.raises(SystemExit) as e:
        data.main(["encode", "--data", str(tmp_path / "raw"), "--tokenizer", str(fake / tokenizer),
                   "--out", str(tmp_path / "out"), *options])
    return one_sentence(e.value.code)


def test_encode_refuses(tmp_path, fake, monkeypatch):
    raw_split(tmp_path / "raw/train_v2.0", ((0, 17),), (17,), size=24)
    encode = ["encode", "--data", str(tmp_path / "raw"), "--tokenizer", str(fake / "discrete"),
              "--out", str(tmp_path / "out")]
    data.main(encode)
    data.main(encode)                                                    # nothing left to do
    assert "tokenizer_sha256" in encode_message(tmp_path, fake, tokenizer="continuous")
    assert "--batch" in encode_message(tmp_path, fake, "--batch", "0")
    assert "--device" in encode_message(tmp_path, fake, "--device", "abacus")
    assert "no clip of 17 frames" in encode_message(tmp_path, fake, "--frame_stride", "2")
    assert "size = 24, not 16" in encode_message(tmp_path, fake, "--size", "16")
    assert "ask for size 16 or 24" in encode_message(tmp_path, fake, "--size", "20")
    assert "nothing.pt cannot be read" in encode_message(tmp_path, fake, tokenizer="nothing.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    shutil.rmtree(tmp_path / "out")
    assert "GB free" in encode_message(tmp_path, fake)
    monkeypatch.undo()


# ---- broken input: each one sentence that names the file

def one_sentence(message):
    assert isinstance(message, str) and message.startswith("data.py: ")
    assert "\n" not in message and "Traceback" not in message
    assert ": " in message[9:] and 40 < len(message) < 600                # what is wrong: the way out
    return message


def set_key(file, key, value):
    def change(folder):
        meta = json.load(open(f"{folder}/{file}"))
        meta[key] = value
        json.dump({k: v for k, v in meta.items() if v is not KeyError}, open(f"{folder}/{file}", "w"))
    return change


def set_value(file, dtype, position, value):
    def change(folder):
        np.memmap(f"{folder}/{file}", dtype, "r+")[position] = value
    return change


def append(file, content=b"\0\0\0\0"):
    return lambda folder: open(f"{folder}/{file}", "ab").write(content)


def cut(file, n=4):
    return lambda folder: os.truncate(f"{folder}/{file}", os.path.getsize(f"{folder}/{file}") - n)


def replace(file, content):
    return lambda folder: open(f"{folder}/{file}", "wb").write(content)


def remove(file):
    return lambda folder: os.remove(f"{folder}/{file}")


def video_of(shape, dtype=np.uint8):
    return lambda folder: np.save(f"{folder}/videos/video_0.npy", np.zeros(shape, dtype))


def pickled(folder):
    np.save(f"{folder}/videos/video_0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


BROKEN_TOKENS = {
    "tokens cut": (cut("videos/video_0.bin"), "video_0.bin"),
    "tokens too long": (append("videos/video_1.bin"), "video_1.bin"),
    "tokens empty": (replace("videos/video_1.bin", b""), "video_1.bin"),
    "id 64000": (set_value("videos/video_0.bin", "<i4", 3072 + 5, 64_000), "video_0.bin"),
    "id -1": (set_value("videos/video_1.bin", "<i4", -1, -1), "video_1.bin"),
    "states cut": (cut("robot_states/states_0.bin"), "states_0.bin"),
    "NaN state": (set_value("robot_states/states_1.bin", "<f4", 777, np.nan), "states_1.bin"),
    "infinite state": (set_value("robot_states/states_0.bin", "<f4", 3, np.inf), "states_0.bin"),
    "segments cut": (cut("segment_indices/segment_idx_0.bin"), "segment_idx_0.bin"),
    "segments missing": (remove("segment_indices/segment_idx_1.bin"), "segment_idx_1.bin"),
    "shard missing": (remove("videos/video_1.bin"), "video_1.bin"),
    "states missing": (remove("robot_states/states_0.bin"), "states_0.bin"),
    "shard metadata missing": (remove("metadata/metadata_1.json"), "metadata_1.json"),
    "shard metadata of another": (set_key("metadata/metadata_1.json", "shard_ind", 0), "metadata_1.json"),
    "shard path leaves": (set_key("metadata/metadata_1.json", "shard_ind", "../../x"), "metadata_1.json"),
    "shard length": (set_key("metadata/metadata_0.json", "shard_num_frames", 54), "states_0.bin"),
    "negative length": (set_key("metadata/metadata_0.json", "shard_num_frames", -53), "metadata_0.json"),
    "length a string": (set_key("metadata/metadata_0.json", "shard_num_frames", "53"), "metadata_0.json"),
    "length missing": (set_key("metadata/metadata_0.json", "shard_num_frames", KeyError), "metadata_0.json"),
    "one shard too many": (set_key("metadata.json", "num_shards", 3), "metadata_2.json"),
    "one shard too few": (set_key("metadata.json", "num_shards", 1), "metadata.json"),
    "negative shards": (set_key("metadata.json", "num_shards", -1), "metadata.json"),
    "frames in total": (set_key("metadata.json", "num_images", 92), "metadata.json"),
    "hz 0": (set_key("metadata.json", "hz", 0), "metadata.json"),
    "hz a string": (set_key("metadata.json", "hz", "30"), "metadata.json"),
    "hz NaN": (set_key("metadata.json", "hz", float("nan")), "metadata.json"),
    "hz missing": (set_key("metadata.json", "hz", KeyError), "metadata.json"),
    "not JSON": (replace("metadata.json", b"{'num_shards': 1}"), "metadata.json"),
    "not text": (replace("metadata.json", b"\xff\xfe\x00"), "metadata.json"),
    "JSON but a list": (replace("metadata.json", b"[1, 2]"), "metadata.json"),
    "other kind": (set_key("metadata.json", "kind", "analog"), "metadata.json"),
    "clip shape": (set_key("metadata.json", "clip_shape", [3, -32, 32]), "metadata.json"),
    "clip shape of words": (set_key("metadata.json", "clip_shape", ["3", 32, 32]), "metadata.json"),
    "T not 1 + 8n": (set_key("metadata.json", "clip_shape", [2, 32, 48]), "metadata.json"),
    "raw beside tokens": (append("videos/video_0.npy"), "video_0.npy"),
}
BROKEN_RAW = {
    "npy cut": (cut("videos/video_0.npy"), "video_0.npy"),
    "npy no header": (replace("videos/video_0.npy", b"abc"), "video_0.npy"),
    "npy empty": (replace("videos/video_0.npy", b""), "video_0.npy"),
    "npy pickle": (pickled, "video_0.npy"),
    "npy float": (video_of((50, 16, 16, 3), np.float32), "video_0.npy"),
    "npy grey": (video_of((50, 16, 16)), "video_0.npy"),
    "npy short": (video_of((49, 16, 16, 3)), "video_0.npy"),
    "not square": (video_of((50, 16, 24, 3)), "video_0.npy"),
    "shards of two sizes": (video_of((50, 24, 24, 3)), "video_1.npy"),
    "action_dim": (set_key("metadata.json", "action_dim", 7), "states_0.bin"),
    "action_dim negative": (set_key("metadata.json", "action_dim", -25), "metadata.json"),
    "names": (set_key("metadata.json", "names", ["a", "b"]), "metadata.json"),
    "names that are numbers": (set_key("metadata.json", "names", [*range(25)]), "metadata.json"),
    "names in a list": (set_key("metadata.json", "names", [["a"]] * 25), "metadata.json"),
    "keep": (set_key("metadata.json", "keep", [25]), "metadata.json"),
    "keep in a list": (set_key("metadata.json", "keep", [[21, 22]]), "metadata.json"),
    "keep 21.0": (set_key("metadata.json", "keep", [21.0]), "metadata.json"),
    "hz true": (set_key("metadata.json", "hz", True), "metadata.json"),
}


@pytest.mark.parametrize("make, case", [*((token_split, case) for case in BROKEN_TOKENS),
                                        *((raw_split, case) for case in BROKEN_RAW)])
def test_broken_folder(tmp_path, make, case):
    change, name = {**BROKEN_TOKENS, **BROKEN_RAW}[case]
    folder = make(tmp_path / "train_v2.0")
    data.main(["info", str(tmp_path), "--json"])                         # whole before
    change(folder)
    with pytest.raises(SystemExit) as e:
        data.main(["info", str(tmp_path)])
    assert name in one_sentence(e.value.code)


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_broken_mp4(tmp_path, content):
    """Empty, no video at all, and one frame fewer than states."""
    folder = raw_split(tmp_path / "train_v2.0", ((0, 20),), (20,))
    os.remove(f"{folder}/videos/video_0.npy")
    file = f"{folder}/videos/video_0.mp4"
    write_mp4(file, numbered(19))
    if content is not None:
        open(file, "wb").write(content)
    with pytest.raises(SystemExit) as e:
        data.main(["info", str(tmp_path)])
    assert "video_0.mp4" in one_sentence(e.value.code)


def test_mp4_damaged_in_the_middle(tmp_path):
    folder = raw_split(tmp_path / "train_v2.0", ((0, 80),), (80,))
    os.remove(f"{folder}/videos/video_0.npy")
    file = f"{folder}/videos/video_0.mp4"
    write_mp4(file, np.random.default_rng(0).integers(0, 255, (80, 64, 64, 3), dtype=np.uint8), g="10")
    clips = data.open_clips(tmp_path)
    with open(file, "r+b") as f:
        f.seek(os.path.getsize(file) // 4)
        f.write(bytes(os.path.getsize(file) // 2))
    with pytest.raises(data.DataError, match="video_0.mp4"):
        [clips[i] for i in range(len(clips))]


def test_paths_that_are_no_data_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    raw_split(tmp_path / "both/train_v2.0")
    raw_split(tmp_path / "both/train_v2.0_raw")
    for path in ("nothing", "file", "empty", "both"):
        with pytest.raises(SystemExit) as e:
            data.main(["info", str(tmp_path / path)])
        assert str(tmp_path / path) in one_sentence(e.value.code)


def test_split_is_never_taken_for_the_other(tmp_path):
    train = raw_split(tmp_path / "train_v2.0_raw")
    with pytest.raises(data.DataError, match="holds no val split"):
        data.open_clips(train, "val")
    val = raw_split(tmp_path / "val_v2.0_raw")
    for path in (train, val, tmp_path):
        assert data.open_clips(path, "val").path == str(val)


def test_only_val_is_the_validation_split(tmp_path):
    """Not a robot called Valkyrie; and a link is what it points to."""
    for name, split in (("valkyrie", "train"), ("val", "val"), ("val_v2.0", "val"), ("val-b", "val"), ("robonaut", "train")):
        raw_split(tmp_path / name)
        os.symlink(tmp_path / name, tmp_path / f"{name}_link")
        assert [*data.split_folders(tmp_path / name)] == [*data.split_folders(tmp_path / f"{name}_link")] == [split]


@pytest.mark.parametrize("options, message", [
    (dict(frames=16), "9 or 17"), (dict(frames=18), "17 or 25"), (dict(frames=0), "frames is 0"),
    (dict(size=20), "16 or 24"), (dict(size=-8), "size is -8"), (dict(stride=-3), "stride is -3"),
    (dict(frame_stride=0), "frame_stride is 0"), (dict(frame_stride=50), "no clip of 17 frames")])
def test_open_options(tmp_path, options, message):
    raw_split(tmp_path / "train_v2.0")
    with pytest.raises(data.DataError, match=message):
        data.open_clips(tmp_path, **options)


def test_token_clips_cannot_be_cut_again(tmp_path):
    token_split(tmp_path / "train_v2.0")
    for options in (dict(frames=9), dict(frame_stride=2)):
        with pytest.raises(data.DataError, match="encode the raw video again"):
            data.open_clips(tmp_path, **options)


def test_a_shard_that_breaks_later_is_named(tmp_path):
    folder = token_split(tmp_path / "train_v2.0")
    clips = data.open_clips(tmp_path)
    cut("videos/video_1.bin", 5000)(folder)
    clips[0]
    with pytest.raises(data.DataError, match="video_1.bin cannot be read .* reshape"):
        clips[2]


def test_walk_prints_a_clip(capsys):
    data.main([])
    out = capsys.readouterr().out
    assert "(17, 64, 64, 3)" in out and out.count("past") == 9 and out.count("future") == 8


def test_help_shows_an_example(capsys):
    for command in ([], ["synth"], ["encode"], ["info"]):
        with pytest.raises(SystemExit) as e:
            data.main([*command, "--help"])
        assert e.value.code == 0 and "data.py" in capsys.readouterr().out
