"""LeRobot folders as they lie, written here by pyarrow and PyAV alone, never by the reader's own code.

    python tests/test_lerobot.py data/robot data/robot_v3      # not a test: writes a raw folder as a LeRobot dataset
"""
import glob
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from conftest import TOY_PRESET

import data
from examples import robot

av, pa = pytest.importorskip("av"), pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LENGTHS, FPS, H, W = (40, 25, 36), 30, 64, 96
CAMERAS = ("observation.images.wrist", "observation.images.head")
CODECS = {"h264": ("libx264", {"crf": "10", "g": "12", "bf": "2"}), "av1": ("libsvtav1", {"crf": "20", "g": "2", "preset": "12"})}


def has_av1():
    try:
        return bool(av.codec.Codec("libsvtav1", "w"))
    except ValueError:
        return False


CODEC_NAMES = ["h264", pytest.param("av1", marks=pytest.mark.skipif(not has_av1(), reason="this PyAV does not write AV1"))]


def numbered(numbers):
    """Frames that show their number through compression: bit b is the colour of stripe b. Only the centre square does."""
    frames = np.zeros((len(numbers), H, W, 3), np.uint8)
    for frame, k in zip(frames, numbers):
        for b in range(8):
            frame[8 * b:8 * b + 8, 16:80] = 200 if k >> b & 1 else 30
    return frames


def shown(video):
    """The numbers that square frames (n, 64, 64, 3) show at their left and right edges, which must agree."""
    left, right = ((np.asarray(video)[:, 4::8, x, :].mean(-1) > 115) @ (2 ** np.arange(8)) for x in (2, -3))
    assert (left == right).all()
    return left


def write_video(file, frames, codec="h264", times=None):
    name, options = CODECS[codec]
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with av.open(str(file), "w") as out:
        stream = out.add_stream(name, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = k if times is None else times[k]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def join_videos(files, lengths, out):
    """The packets of several files one after the other, not encoded again, as LeRobot joins episodes."""
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with av.open(str(out), "w") as target:
        stream, begin = None, 0
        for file, n in zip(files, lengths):
            with av.open(str(file)) as source:
                video = source.streams.video[0]
                if stream is None and video.codec_context.name == "libdav1d":   # PyAV has no template for it
                    stream = target.add_stream(CODECS["av1"][0], rate=FPS, options=CODECS["av1"][1])
                    stream.height, stream.width, stream.pix_fmt = video.height, video.width, "yuv420p"
                stream = stream or target.add_stream_from_template(video)
                tick = video.time_base
                for packet in source.demux(video):
                    if packet.dts is not None:
                        packet.pts += round(begin / FPS / tick)
                        packet.dts += round(begin / FPS / tick)
                        packet.stream = stream
                        target.mux(packet)
            begin += n


def rows_of(episode, A, lengths=LENGTHS):
    """Columns of an episode: state 0 of frame k is its number over all episodes, command 0 is 1000 more."""
    n, first = lengths[episode], sum(lengths[:episode])
    states = np.random.default_rng(episode).normal(size=(n, A)).astype(np.float32)
    states[:, 0] = first + np.arange(n)
    commands = states + np.float32([1000] + [0] * (A - 1))
    return {"observation.state": list(states), "action": list(commands), "timestamp": np.float32(np.arange(n) / FPS),
            "frame_index": np.arange(n), "episode_index": np.full(n, episode), "index": first + np.arange(n)}


def write_table(file, columns):
    os.makedirs(os.path.dirname(file), exist_ok=True)
    pq.write_table(pa.table(columns), str(file))


SIDES = [f"{side}_{joint}" for side in ("left", "right")
         for joint in ("shoulder_pitch", "shoulder_roll", "elbow", "wrist_roll", "wrist_yaw", "gripper")]
NAMES = {14: [*SIDES, "base.x_velocity", "base.theta_velocity"], 29: [[*SIDES, *(f"k{i}" for i in range(17))]]}


def lerobot(root, version="v2.1", A=14, codec="h264", lengths=LENGTHS, names=None, pixels=numbered, cameras=CAMERAS, rows=rows_of):
    """A data set whose frame k shows k and whose state 0 is k; the second camera shows it, the first 255 - k."""
    root = str(root)
    parts, videos, v3 = [], {camera: [] for camera in cameras}, version == "v3.0"
    for e, n in enumerate(lengths):
        parts.append(rows(e, A, lengths))
        numbers = sum(lengths[:e]) + np.arange(n)
        for camera in cameras:
            where = f"{root}/pieces/{camera}" if v3 else f"{root}/videos/chunk-000/{camera}"
            videos[camera].append(f"{where}/episode_{e:06d}.mp4")
            write_video(videos[camera][-1], pixels(numbers if camera == cameras[-1] else 255 - numbers), codec)
    listed = []
    for e, n in enumerate(lengths):
        listed.append({"episode_index": e, "tasks": ["x"], "length": n})
        begin = sum(lengths[:e])
        if v3:
            listed[e].update({"data/chunk_index": 0, "data/file_index": e // 2, "dataset_from_index": begin, "dataset_to_index": begin + n})
            for camera in cameras:
                listed[e].update({f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0,
                                  f"videos/{camera}/from_timestamp": begin / FPS, f"videos/{camera}/to_timestamp": (begin + n) / FPS})
        else:
            write_table(f"{root}/data/chunk-000/episode_{e:06d}.parquet", parts[e])
    listed = listed[1:] + listed[:1]                                      # episodes out of order
    if v3:
        for f in range(-(-len(lengths) // 2)):
            columns = {name: [x for part in parts[2 * f:2 * f + 2] for x in part[name]] for name in parts[0]}
            order = np.random.default_rng(f).permutation(len(columns["index"]))     # rows may lie in any order
            write_table(f"{root}/data/chunk-000/file-{f:03d}.parquet", {name: [x[k] for k in order] for name, x in columns.items()})
        for camera in cameras:
            join_videos(videos[camera], lengths, f"{root}/videos/{camera}/chunk-000/file-000.mp4")
        write_table(f"{root}/meta/episodes/chunk-000/file-000.parquet", {name: [row[name] for row in listed] for name in listed[0]})
        shutil.rmtree(f"{root}/pieces")
    else:
        os.makedirs(f"{root}/meta")
        with open(f"{root}/meta/episodes.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in listed)
    vector = {"dtype": "float32", "shape": [A], "names": NAMES.get(A, None) if names is None else names}
    info = {"codebase_version": version, "robot_type": "toy", "fps": FPS, "total_episodes": len(lengths), "total_frames": sum(lengths),
            "chunks_size": 1000, "splits": {"train": f"0:{len(lengths)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet" if v3 else
                         "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if v3 else
                          "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
            "features": {**{camera: {"dtype": "video", "shape": [H, W, 3], "names": ["height", "width", "channels"]} for camera in cameras},
                         "observation.state": vector, "action": vector, "timestamp": {"dtype": "float32", "shape": [1], "names": None}}}
    json.dump(info, open(f"{root}/meta/info.json", "w"))
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Makes a data set once for all tests that only read it."""
    made, root = {}, tmp_path_factory.mktemp("lerobot")

    def get(version="v2.1", A=14, codec="h264"):
        key = f"{version}_{A}_{codec}"
        if key not in made:
            made[key] = lerobot(root / key, version, A, codec)
        return made[key]
    return get


# ---- one clock (TRAPS 36)

@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("A", [14, 29])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_pixel_k_and_state_k_agree_in_every_window(sets, version, A, codec):
    folder = sets(version, A, codec)
    for stride, frame_stride in ((1, 1), (3, 2)):
        seen = []
        for split, episodes in (("train", (0, 1)), ("val", (2,))):
            clips = data.open_clips(folder, split, stride=stride, frame_stride=frame_stride)
            assert clips.kind == "raw" and clips.hz == FPS / frame_stride and clips.action_dim == A and clips.shape == (17, 64, 64, 3)
            for clip in clips:
                numbers = clip["actions"][:, 0].numpy()
                assert (shown(clip["video"]) == numbers).all() and (np.diff(numbers) == frame_stride).all()
                seen.append(int(numbers[0]))
        span = 16 * frame_stride
        begins = np.cumsum([0, *LENGTHS])
        assert seen == [k for a, b in zip(begins, begins[1:]) for k in range(a, b - span, stride)]


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_both_versions_give_bitwise_equal_clips(sets, codec):
    for split in ("train", "val"):
        a, b = (data.open_clips(sets(version, 14, codec), split, stride=5) for version in ("v2.1", "v3.0"))
        assert len(a) == len(b) > 0
        for x, y in zip(a, b):
            assert torch.equal(x["video"], y["video"]) and torch.equal(x["actions"], y["actions"])


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_command_belongs_to_the_frame_after_it(sets, version):
    clips = data.open_clips(sets(version), stride=1, actions="action")
    for clip in clips:
        assert (clip["actions"][:, 0].numpy() == 1000 + shown(clip["video"]) - 1).all()
    assert int(clips[0]["actions"][0, 0]) == 1000, "frame 0 of an episode has no command, so that clips begin with frame 1"
    assert len(clips) == (39 - 16) + (24 - 16)


def test_frames_of_one_video_belong_to_their_episodes(sets):
    """Where a v3.0 file holds all episodes, reading validation clips first changes nothing."""
    val, train = (data.open_clips(sets("v3.0"), split, stride=2) for split in ("val", "train"))
    for clips, i in ((val, 3), (train, 0), (val, 0), (train, len(train) - 1), (train, 2)):
        clip = clips[i]
        assert (shown(clip["video"]) == clip["actions"][:, 0].numpy()).all()


# ---- what is chosen, and what is said

def test_cameras(sets, capsys):
    folder = sets()
    data.say_once.cache_clear()
    assert (shown(data.open_clips(folder)[0]["video"]) == np.arange(17)).all()
    said = capsys.readouterr()
    assert CAMERAS[1] in said.err and "the last 1 of 3 episodes" in said.err and said.out == ""
    for camera in ("wrist", CAMERAS[0]):
        clips = data.open_clips(folder, camera=camera)
        assert (shown(clips[0]["video"]) == 255 - np.arange(17)).all() and clips.meta["opened"]["camera"] == CAMERAS[0]
    assert CAMERAS[0] in capsys.readouterr().err
    with pytest.raises(data.DataError, match="observation.images.wrist, observation.images.head.*--camera"):
        data.open_clips(folder, camera="left")


def set_info(folder, **changes):
    file = f"{folder}/meta/info.json"
    info = json.load(open(file))
    for key, value in changes.items():
        info[key] = value(info[key]) if callable(value) else value
    json.dump(info, open(file, "w"))


@pytest.mark.parametrize("names, chosen", [
    (["observation.image"], 0), (["observation.images.ego_view", "observation.images.side"], 0), (["a.lego", "a.b"], None),
    (["a.wrist", "a.head_left", "a.head_right"], 1), (["a.side", "a.depth_head"], 0)])
def test_the_camera_that_is_meant(sets, tmp_path, names, chosen):
    folder = shutil.copytree(sets(), tmp_path / "set")
    cameras = {name: {"dtype": "video", "shape": [H, W, 3]} for name in names}
    set_info(folder, features=lambda f: {**cameras, "observation.state": f["observation.state"]}, video_path=lambda p: p.replace("{video_key}", CAMERAS[1]))
    if chosen is None:
        with pytest.raises(data.DataError, match="--camera"):
            data.open_clips(folder)
    else:
        assert data.open_clips(folder).meta["opened"]["camera"] == names[chosen]


def test_pad_keeps_all_of_a_frame(sets):
    crop, pad = (data.open_clips(sets(), fit=fit)[1] for fit in ("crop", "pad"))
    assert pad["video"].shape == (17, 96, 96, 3) and torch.equal(pad["actions"], crop["actions"])
    assert torch.equal(pad["video"][:, 16:80, 16:80], crop["video"])
    assert not pad["video"][:, :16].any() and not pad["video"][:, 80:].any()
    assert data.open_clips(sets(), fit="pad", size=32)[0]["video"].shape == (17, 32, 32, 3)
    with pytest.raises(data.DataError, match="--fit stretch"):
        data.open_clips(sets(), fit="stretch")


def test_names_and_groups(sets, tmp_path):
    clips = data.open_clips(sets())
    assert clips.names == tuple(NAMES[14])
    assert clips.meta["groups"] == {"left_arm": [0, 1, 2, 3, 4], "left_hand": [5], "right_arm": [6, 7, 8, 9, 10],
                                    "right_hand": [11], "base": [12, 13]}
    assert data.open_clips(sets(A=29)).names == tuple(NAMES[29][0])
    folder = shutil.copytree(sets(), tmp_path / "set")
    letters = [chr(97 + j) for j in range(14)]
    for names, want in (({"motors": letters}, letters), (dict(zip(letters, range(14))), letters), ({"left": letters[:7], "right": letters[7:]}, letters),
                        (["g"] * 2 + letters[:12], ["g_0", "g_1", *letters[:6], "g_8", *letters[7:12]]), (["a"], None), ([], None)):
        set_info(folder, features=lambda f: {**f, "observation.state": {**f["observation.state"], "names": names}})
        clips = data.open_clips(folder)
        assert clips.names == tuple(want or (f"STATE_{j}" for j in range(14))) and ("groups" in clips.meta) == bool(want)


def test_train_and_validation_share_no_episode(tmp_path):
    folder = lerobot(tmp_path / "set", "v3.0", lengths=(17,) * 21, cameras=CAMERAS[:1])
    train, val = (data.open_clips(folder, split) for split in ("train", "val"))
    assert len(train) == 19 and len(val) == 2 and int(val[0]["actions"][0, 0]) == 19 * 17
    found = data.info(folder)
    assert found["splits"]["train"]["clips"] == 19 and found["frames"] == 21 * 17


def test_info_as_json_is_json(sets, capsys):
    data.say_once.cache_clear()
    data.main(["info", sets("v3.0"), "--json", "--camera", "wrist"])
    found = json.loads(capsys.readouterr().out)
    assert (found["clips"], found["frames"], found["hz"], found["action_dim"]) == (2 + 1 + 2, 101, 30, 14)


# ---- broken folders: each one sentence that names the file

def drop_row(folder, keep=lambda t: t.take([k for k in range(len(t)) if k != 9])):
    file = f"{folder}/data/chunk-000/episode_000000.parquet"
    pq.write_table(keep(pq.read_table(file)), file)


def change_column(name, change):
    def apply(table):
        values = table[name].to_pylist()
        change(values)
        return table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
    return lambda folder: drop_row(folder, apply)


def set_item(k, value):
    return lambda values: values.__setitem__(k, value)


def set_state(values):
    values[7] = [float("nan")] * 14


def retake(numbers, times=None):
    file = f"videos/chunk-000/{CAMERAS[1]}/episode_000000.mp4"
    return lambda folder: write_video(f"{folder}/{file}", numbered(numbers), times=times)


def remove(file):
    return lambda folder: os.remove(f"{folder}/{file}")


def write(file, content):
    def change(folder):
        os.makedirs(os.path.dirname(f"{folder}/{file}"), exist_ok=True)
        open(f"{folder}/{file}", "w").write(content)
    return change


def version_1(folder):
    os.rename(f"{folder}/meta", f"{folder}/meta_data")
    file = f"{folder}/meta_data/info.json"
    json.dump({"codebase_version": "v1.6", "fps": 30, "video": True}, open(file, "w"))


def pictures(folder):
    set_info(folder, features=lambda f: {k: {**v, "dtype": v["dtype"].replace("video", "image")} for k, v in f.items()}, video_path=None)


VIDEO, TABLE = f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4", "data/chunk-000/episode_000001.parquet"
BROKEN = {
    "version 1": (version_1, "meta_data/info.json", "v1.6"),
    "a later version": (lambda f: set_info(f, codebase_version="v9.0"), "meta/info.json", "v9.0"),
    "pictures": (pictures, "meta/info.json", "use_videos"),
    "video missing": (remove(VIDEO), VIDEO, "missing"),
    "video a pointer of git lfs": (write(VIDEO, "version https://git-lfs.github.com/spec/v1"), VIDEO, "cannot be read"),
    "table missing": (remove(TABLE), TABLE, "missing"),
    "table cut": (write(TABLE, "PAR1"), TABLE, "cannot be read"),
    "no list of episodes": (remove("meta/episodes.jsonl"), "episodes.jsonl", "missing"),
    "list cut": (lambda f: set_info(f, total_episodes=5), "meta/episodes", "total_episodes = 3"),
    "frames in total": (lambda f: set_info(f, total_frames=99), "meta/episodes", "total_frames = 101"),
    "list no JSON": (write("meta/episodes.jsonl", '{"episode_index": 0,'), "episodes.jsonl", "cannot be read"),
    "list without lengths": (write("meta/episodes.jsonl", '{"episode_index": 0}\n' * 3), "episodes.jsonl", "length"),
    "one episode": (lambda f: (write("meta/episodes.jsonl", '{"episode_index": 0, "length": 40}')(f), set_info(f, total_episodes=1, total_frames=40)),
                    "1 episode", "record"),
    "a row missing": (drop_row, "episode_000000.parquet", "39 rows"),
    "a row doubled": (change_column("timestamp", set_item(9, 8 / FPS)), "episode_000000.parquet", "30 Hz after rows [8 9]"),
    "rows of another rate": (change_column("timestamp", lambda v: v.__setitem__(slice(None), [2 * x for x in v])), "episode_000000.parquet", "30 Hz"),
    "NaN": (change_column("observation.state", set_state), "episode_000000.parquet", "not finite at frames [7]"),
    "a state too few": (lambda f: set_info(f, features=lambda x: {**x, "observation.state": {"dtype": "float32", "shape": [13]}}),
                        "episode_000000.parquet", "cannot be read"),
    "no states": (lambda f: set_info(f, features=lambda x: {k: v for k, v in x.items() if k != "observation.state"}), "info.json", "--actions"),
    "no such column": (lambda f: drop_row(f, lambda t: t.drop_columns("observation.state")), "episode_000000.parquet", "observation.state"),
    "a frame missing at the end": (retake(range(39)), "episode_000000.mp4", "39 frames"),
    "a frame missing within": (retake([*range(9), *range(10, 41)], [*range(9), *range(10, 41)]), "episode_000000.mp4", "40 frames"),
    "a frame doubled": (retake([*range(9), *range(8, 40)]), "episode_000000.mp4", "41 frames"),
    "fps 0": (lambda f: set_info(f, fps=0), "info.json", "fps = 0"),
    "path pattern": (lambda f: set_info(f, video_path="videos/{nothing}.mp4"), "info.json", "nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(sets, tmp_path, case):
    change, *wanted = BROKEN[case]
    folder = shutil.copytree(sets(), tmp_path / "set")
    change(folder)
    with pytest.raises(SystemExit) as e:
        data.main(["info", str(folder)])
    message = e.value.code
    assert isinstance(message, str) and message.startswith("data.py: ") and "\n" not in message and 40 < len(message) < 600
    assert all(word in message for word in wanted), message


def test_broken_v3(sets, tmp_path):
    for change, want in ((lambda f: shutil.rmtree(f"{f}/meta/episodes"), "meta/episodes"),
                         (remove(f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4"), "file-000.mp4 is missing"),
                         (remove("data/chunk-000/file-001.parquet"), "file-001.parquet is missing")):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        folder = shutil.copytree(sets("v3.0"), tmp_path / "set")
        change(folder)
        with pytest.raises(data.DataError, match=want):
            data.info(folder)


def test_flags_that_a_1x_folder_does_not_know(toy):
    with pytest.raises(data.DataError, match="no LeRobot dataset, to which --camera head"):
        data.open_clips(f"{toy}/raw", camera="head")


def test_short_episodes_hold_no_clip(tmp_path):
    folder = lerobot(tmp_path / "set", lengths=(40, 3, 1, 20), cameras=CAMERAS[:1])
    assert len(data.open_clips(folder)) == 2 and len(data.open_clips(folder, "val")) == 1
    assert len(data.open_clips(folder, actions="action")) == 2 and data.info(folder)["clips"] == 3
    with pytest.raises(data.DataError, match="no clip of 17 frames"):
        data.open_clips(folder, "val", frame_stride=2)


# ---- the built-in robot as a LeRobot dataset

def episodes_of(raw, split):
    """Yields (frames, states) of every recording of a raw split of .npy files, none of which runs over a border of shards."""
    for i in range(len(glob.glob(f"{raw}/{split}_v2.0/videos/*.npy"))):
        video = np.load(f"{raw}/{split}_v2.0/videos/video_{i}.npy", mmap_mode="r")
        ids = np.fromfile(f"{raw}/{split}_v2.0/segment_indices/segment_idx_{i}.bin", "<i4")
        states = np.fromfile(f"{raw}/{split}_v2.0/robot_states/states_{i}.bin", "<f4").reshape(len(ids), -1)
        for k in np.unique(ids):
            yield video[ids == k], states[ids == k]


def export_v3(raw, root, camera="observation.images.head", per_file=8):
    """A raw folder as LeRobot v3.0, without loss: H.264 of RGB pixels (libx264rgb, crf 0). The episodes of the training split,
    then the first of the validation split, as many as make the reader's last tenth: both folders train on the same frames."""
    with open(f"{raw}/train_v2.0/metadata.json") as f:
        fps = json.load(f)["hz"]
    episodes = [*episodes_of(raw, "train")]
    n_val = max(1, len(episodes) // 9)
    episodes += [episode for episode, _ in zip(episodes_of(raw, "val"), range(n_val))]
    rows, total = [], 0
    for file in range(-(-len(episodes) // per_file)):
        columns = {key: [] for key in ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index")}
        video = f"{root}/videos/{camera}/chunk-000/file-{file:03d}.mp4"
        os.makedirs(os.path.dirname(video), exist_ok=True)
        with av.open(video, "w") as out:
            stream = out.add_stream("libx264rgb", rate=int(fps), options={"crf": "0", "g": "20", "preset": "fast"})
            stream.height, stream.width, stream.pix_fmt = *episodes[0][0].shape[1:3], "rgb24"
            for frames, states in episodes[file * per_file:][:per_file]:
                n, first, begin = len(frames), total, len(columns["index"]) / fps
                columns["observation.state"] += [*states]
                columns["action"] += [*states[1:], states[-1]]       # the command of frame k is the state at k + 1
                columns["timestamp"] += [*np.float32(np.arange(n) / fps)]
                columns["frame_index"] += [*range(n)]
                columns["episode_index"] += [len(rows)] * n
                columns["index"] += [*range(first, first + n)]
                columns["task_index"] += [0] * n
                for pixels in frames:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
                where = {f"{place}/{key}": value for place in ("data", f"videos/{camera}")
                         for key, value in (("chunk_index", 0), ("file_index", file))}
                rows.append({"episode_index": len(rows), "tasks": ["move"], "length": n, "dataset_from_index": first,
                             "dataset_to_index": first + n, **where, f"videos/{camera}/from_timestamp": begin,
                             f"videos/{camera}/to_timestamp": begin + n / fps})
                total += n
            out.mux(stream.encode())
        write_table(f"{root}/data/chunk-000/file-{file:03d}.parquet", columns)
    write_table(f"{root}/meta/episodes/chunk-000/file-000.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    vector = {"dtype": "float32", "shape": [25], "names": list(data.JOINTS)}
    scalars = {key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
               for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")}
    info = {"codebase_version": "v3.0", "robot_type": "built-in", "total_episodes": len(rows), "total_frames": total, "total_tasks": 1,
            "chunks_size": 1000, "fps": fps, "splits": {"train": f"0:{len(rows)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": {camera: {"dtype": "video", "shape": list(episodes[0][0].shape[1:]), "names": ["height", "width", "channels"]},
                         "observation.state": vector, "action": vector, **scalars}}
    with open(f"{root}/meta/info.json", "w") as f:
        json.dump(info, f)
    return str(root)


def test_the_built_in_robot_exported_to_v3_gives_the_raw_clips(tmp_path):
    """Every clip of the training split, pixels and actions alike, and those of the first validation episodes."""
    for split, lengths in (("train", (40, 25, 17)), ("val", (30, 20))):
        for i, n in enumerate(lengths):
            video, states = robot.robot_episode(10 * i + (split == "val"), n, 32)
            data.save_shard(f"{tmp_path}/raw/{split}_v2.0", i, ".npy", video, states, [i] * n)
        data.save(f"{tmp_path}/raw/{split}_v2.0/metadata.json", {"num_shards": len(lengths), "hz": 10, "num_images": sum(lengths)})
    folder = export_v3(tmp_path / "raw", tmp_path / "v3", per_file=3)
    for split, count in (("train", 24 + 9 + 1), ("val", 14)):
        raw, exported = (data.open_clips(path, split, stride=1) for path in (tmp_path / "raw", folder))
        assert len(exported) == count and exported.names == raw.names and exported.hz == raw.hz == 10
        for i in range(count):
            assert torch.equal(exported[i]["video"], raw[i]["video"]) and torch.equal(exported[i]["actions"], raw[i]["actions"])
    commands = data.open_clips(folder, actions="action")
    assert torch.equal(commands[0]["actions"], data.open_clips(tmp_path / "raw", stride=1)[1]["actions"])


# ---- from such a folder to numbers

def test_train_sample_and_score(sets, toy, tmp_path, monkeypatch):
    """Every command on one v3.0 folder: what was chosen when it was encoded holds wherever it is opened again."""
    import evaluate
    import sample
    import tokenizer
    import train

    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(sets("v3.0"), tmp_path / "set")
    chosen = ["--camera", "wrist", "--fit", "pad", "--actions", "action"]
    tokenizer.main(["check", "--tokenizer", f"{toy}/dv.pt", "--data", str(folder), "--num", "1", *chosen])
    model = [word for key, value in TOY_PRESET.items() for word in (f"--{key}", str(value))]
    train.main(["--model", "masked", "--variant", "base", "--data", str(folder), "--encode", "--tokenizer", f"{toy}/dv.pt", "--stride", "3",
                "--steps", "1", "--batch", "2", "--out", "run", "--sample_every", "-1", "--dtype", "float32", *model, *chosen])
    cache = data.open_clips(f"{folder}_discrete")
    raw = data.open_clips(folder, stride=3, camera="wrist", fit="pad", actions="action")
    assert len(cache) == len(raw) == 8 + 3 and cache.meta["groups"] == raw.meta["groups"] and cache.meta["robot"] == "toy"
    assert all(torch.equal(a["actions"], b["actions"]) for a, b in zip(cache, raw))
    about = {"data": {**torch.load("run/ckpt.pt")["data"]}, "model_config": {"W": 12}, "tokenizer": {}}
    val = sample.validation_clips(about)
    assert val.kind == "raw" and val.meta["opened"] == raw.meta["opened"] == cache.meta["opened"] and val.shape == (17, 96, 96, 3)
    sample.main(["--ckpt", "run/ckpt.pt", "--out", "dreams", "--num", "1", "--steps", "1"])
    assert os.listdir("dreams")
    evaluate.main(["--ckpt", "run/ckpt.pt", "--num", "2", "--steps", "1", "--json", "scores.json", "--data", str(folder)])
    assert np.isfinite(json.load(open("scores.json"))["psnr"])


if __name__ == "__main__":
    print(export_v3(*sys.argv[1:]))
