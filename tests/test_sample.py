"""sample.py: checkpoints, the actions of "what if?", dreaming, pictures, and what bad input ends in."""
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import data
import flow_hwm
import masked_hwm
import sample
from conftest import TOY_PRESET
from examples import speed
from examples.robot import robot_episode
from tokenizer import fingerprint, load_tokenizer, psnr, write_whole

MAIN = os.path.dirname(os.path.abspath(sample.__file__))
both = pytest.mark.parametrize("model", ["masked", "flow"])
TOY = {"masked": dict(TOY_PRESET, vocab_size=64, H=4, W=4, at_place=True, share_digits=True, levels=(4, 4, 4)),
       "flow": dict(TOY_PRESET, channels=4, H=4, W=4, patch=1, at_place=True)}
TOKENIZER = {"masked": "dv", "flow": "cv"}


@dataclass
class Config:
    """What sample.py reads of a run's configuration, and two settings more."""
    model: str
    variant: str = "base"
    preset: str = "tiny"
    out: str = "out/toy"
    lr: float = 0.01
    log_every: int = 20


def world_model(toy, model, **changes):
    """A small random model after one step of AdamW -> what save_checkpoint takes."""
    module, clips = sample.MODELS[model], data.open_clips(f"{toy}/{TOKENIZER[model]}", "train")
    torch.manual_seed(0)
    sizes = module.Config(variant="base", **{**TOY[model], **changes})
    net = module.Model(sizes)
    actions = data.action_statistics(clips)
    latents = [torch.tensor(clips.meta[f"latent_{key}"]) for key in ("mean", "std")] if model == "flow" else []
    net.set_statistics(actions["mean"], actions["std"], *latents)
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    draws = torch.utils.data.default_collate([net.draw(torch.Generator().manual_seed(i)) for i in range(2)])
    loss, _ = net(torch.stack([clips[i]["video"] for i in range(2)]), torch.stack([clips[i]["actions"] for i in range(2)]), draws)
    loss.backward()
    optimizer.step()
    tokenizer = f"{toy}/{TOKENIZER[model]}.pt"
    about = {"model_config": vars(sizes),
             "data": {"path": f"{toy}/{TOKENIZER[model]}", "source": f"{toy}/raw", "size": 32, "frame_stride": 1,
                      "names": clips.names, "hz": clips.hz},
             "tokenizer": {"path": tokenizer, "sha256": fingerprint(tokenizer), "spatial": 8}}
    return net, optimizer, ema, about


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """{"masked": folder, "flow": folder}, each with a ckpt.pt."""
    out = {}
    for model in ("masked", "flow"):
        out[model] = str(tmp_path_factory.mktemp("trained") / model)
        net, optimizer, ema, about = world_model(toy, model)
        sample.save_checkpoint(f"{out[model]}/ckpt.pt", net, optimizer, ema, 1, Config(model), about)
    return out


def read(file):
    return torch.load(file, weights_only=True)


def changed(trained, tmp_path, model="flow", **changes):
    """A copy of a checkpoint in which parts say something else: data={"hz": 30} -> its file"""
    saved = read(f"{trained[model]}/ckpt.pt")
    for part, values in changes.items():
        saved[part].update(values)
    torch.save(saved, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def ends(*argv):
    """Runs sample.py, which must end with one sentence and a non-zero code; returns the sentence."""
    with pytest.raises(SystemExit) as e:
        sample.main([str(a) for a in argv])
    assert isinstance(e.value.code, str) and "\n" not in e.value.code.strip() and e.value.code.startswith("sample.py: ")
    return e.value.code


def dreams(file, out, *more):
    """Runs sample.py for one clip in few steps; returns the folder that it wrote."""
    sample.main(["--ckpt", str(file), "--out", str(out), "--num", "1", "--steps", "1", "--device", "cpu", *map(str, more)])
    return out


# ---- checkpoints


@both
def test_a_checkpoint_holds_all_that_is_needed(trained, model):
    saved = read(f"{trained[model]}/ckpt.pt")
    assert set(saved) == {"model", "ema", "optimizer", "step", "rng", "config", "model_config", "data", "tokenizer"}
    assert os.listdir(trained[model]) == ["ckpt.pt"], "nothing half-written stays"


@both
def test_restore_undoes_what_came_after(toy, tmp_path, model):
    net, optimizer, ema, about = world_model(toy, model)
    sample.save_checkpoint(f"{tmp_path}/ckpt.pt", net, optimizer, ema, 7, Config(model), about)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    moments = {k: v["exp_avg"].clone() for k, v in optimizer.state_dict()["state"].items()}
    random = torch.rand(3)
    for p in net.parameters():
        p.data.add_(1)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    for v in ema.values():
        v.zero_()
    saved = sample.read_checkpoint(f"{tmp_path}/ckpt.pt")
    assert sample.restore(saved, net, optimizer, ema, Config(model, log_every=1), about) == 7
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v["exp_avg"], moments[k]) for k, v in optimizer.state_dict()["state"].items())
    assert all(torch.equal(v, saved["ema"][k]) for k, v in ema.items())
    assert torch.equal(torch.rand(3), random)


def test_another_run_and_an_export_are_not_restored(toy, trained, tmp_path):
    net, optimizer, ema, about = world_model(toy, "flow")
    saved = sample.read_checkpoint(f"{trained['flow']}/ckpt.pt")
    with pytest.raises(data.DataError, match="lr was 0.01, is 0.5"):
        sample.restore(saved, net, optimizer, ema, Config("flow", lr=0.5), about)
    sample.export(saved, f"{tmp_path}/small.pt")
    with pytest.raises(data.DataError, match="--export"):
        sample.restore(sample.read_checkpoint(f"{tmp_path}/small.pt"), net, optimizer, ema, Config("flow"), about)


def test_the_previous_checkpoint_is_kept_and_fallen_back_to(toy, tmp_path, capsys):
    file, made = f"{tmp_path}/ckpt.pt", world_model(toy, "flow")
    for step in (1, 2, 3):
        sample.save_checkpoint(file, *made[:3], step, Config("flow"), made[3])
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_previous.pt"]
    assert sample.last_checkpoint(file)["step"] == 3
    with open(file, "r+b") as f:
        f.truncate(3000)
    assert sample.last_checkpoint(file)["step"] == 2 and "ckpt_previous.pt" in capsys.readouterr().out
    sample.save_checkpoint(file, *made[:3], 4, Config("flow"), made[3])
    assert read(f"{tmp_path}/ckpt_previous.pt")["step"] == 2, "a damaged file must not take the place of the good one"


def test_a_failed_save_leaves_both_checkpoints(toy, tmp_path, monkeypatch):
    file, made = f"{tmp_path}/ckpt.pt", world_model(toy, "flow")
    for step in (1, 2):
        sample.save_checkpoint(file, *made[:3], step, Config("flow"), made[3])

    def full(saved, name):
        with open(name, "w") as f:
            f.write("half")
        raise RuntimeError("disk is full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.DataError, match="ckpt.pt"):
        sample.save_checkpoint(file, *made[:3], 3, Config("flow"), made[3])
    assert read(file)["step"] == 2 and read(f"{tmp_path}/ckpt_previous.pt")["step"] == 1 and len(os.listdir(tmp_path)) == 2


@both
def test_weights_of_another_version_are_refused(toy, trained, tmp_path, model):
    """Sampling and resuming say in one sentence whose file it is, what differs, and both ways out."""
    saved = read(f"{trained[model]}/ckpt.pt")
    for part in ("model", "ema"):
        saved[part]["readout.weight"] = saved[part].pop("out.weight")
    torch.save(saved, tmp_path / "other.pt")
    net, optimizer, ema, about = world_model(toy, model)
    with pytest.raises(data.DataError) as e:
        sample.restore(sample.read_checkpoint(tmp_path / "other.pt"), net, optimizer, ema, Config(model), about)
    said = ends("--ckpt", tmp_path / "other.pt", "--out", tmp_path / "out", "--device", "cpu")
    assert f"{tmp_path}/other.pt" in said and "out/toy" in str(e.value)
    for sentence in (said, str(e.value)):
        assert all(words in sentence for words in ("out.weight is one of 2", "train it anew", "check out the commit"))


@pytest.mark.parametrize("file", ["flow_full_tiny.pt", "masked_base_tiny.pt"])
def test_the_shipped_weights_load(file):
    model, saved = sample.load_model(os.path.join(MAIN, "weights", file))
    assert saved["data"]["built_in"] and model.standardise_actions.std.min() > 0


def test_last_weights_and_averaged_ones(trained, tmp_path):
    file = f"{trained['flow']}/ckpt.pt"
    saved = read(file)
    for which, part in (("ema", "ema"), ("last", "model")):
        net, _ = sample.load_model(file, weights=which)
        assert all(torch.equal(v, saved[part][k]) for k, v in net.state_dict().items())
    sample.main(["--ckpt", file, "--export", str(tmp_path / "small.pt")])
    assert "averaged" in ends("--ckpt", tmp_path / "small.pt", "--weights", "last")


@both
def test_export_samples_alike(trained, tmp_path, model):
    whole, small = f"{trained[model]}/ckpt.pt", f"{tmp_path}/{model}.pt"
    sample.main(["--ckpt", whole, "--export", small])
    assert os.path.getsize(small) < 0.5 * os.path.getsize(whole)
    dreams(small, tmp_path / model)
    a, b = (sample.load_model(f)[0].state_dict() for f in (whole, small))
    assert all(torch.allclose(v, b[k], atol=1e-3, rtol=1e-3) for k, v in a.items())


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def bad_checkpoint(name, good, toy, tmp_path):
    file = tmp_path / f"{name}.pt"
    with open(good, "rb") as f:
        content = bytearray(f.read())
    if name == "tokenizer":
        shutil.copy(f"{toy}/dv.pt", file)
    elif name == "truncated":
        file.write_bytes(content[:20_000])
    elif name == "flipped":
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    elif name == "text":
        file.write_text("hello")
    elif name == "empty":
        file.write_bytes(b"")
    elif name == "evil":
        torch.save({**read(good), "rng": Evil(str(tmp_path / "run"))}, file)
    elif name == "folder":
        file.mkdir()
    elif name != "missing":
        saved = read(good)
        if name == "other model":
            saved["config"]["model"] = "flow"
        elif name == "unknown model":
            saved["config"]["model"] = "diffusion"
        elif name == "no weights":
            saved["ema"] = {}
        elif name == "not a dict":
            saved["config"] = [1, 2]
        elif name == "a list":
            saved = [saved]
        torch.save(saved, file)
    return file


@pytest.mark.parametrize("name", ["tokenizer", "truncated", "flipped", "text", "empty", "evil", "folder", "missing", "other model",
                                  "unknown model", "no weights", "not a dict", "a list"])
def test_a_bad_checkpoint_is_one_sentence(toy, trained, tmp_path, name):
    file = bad_checkpoint(name, f"{trained['masked']}/ckpt.pt", toy, tmp_path)
    assert str(file) in ends("--ckpt", file, "--out", tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "run").exists(), "code in a checkpoint must not run"
    assert not (tmp_path / "out").exists()


# ---- what a checkpoint needs beside it: a tokenizer, and data whose joints it knows (TRAPS 30)


def test_another_tokenizer_is_refused(toy, trained, tmp_path):
    assert "SHA-256" in ends("--ckpt", f"{trained['masked']}/ckpt.pt", "--tokenizer", f"{toy}/cv.pt", "--out", tmp_path)


def test_raw_frames_beside_tokens_that_do_not_say_their_size(toy, trained):
    """1X's tokens come without the size of their frames: it follows from the model's latents."""
    _, saved = sample.load_model(f"{trained['masked']}/ckpt.pt")
    saved = dict(saved, data=dict(saved["data"], size=None), tokenizer={"path": ""})
    saved["model_config"] = dict(saved["model_config"], W=2)
    assert sample.validation_clips(saved, f"{toy}/raw").size == 16


def robot(toy, tmp_path, **says):
    """The toy's raw validation split with other words in its metadata.json -> folder"""
    folder = tmp_path / "robot"
    shutil.copytree(f"{toy}/raw/val_v2.0", folder / "val_v2.0")
    file = folder / "val_v2.0" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **says}))
    return folder


ORDER = np.random.default_rng(0).permutation(25)
OTHER_NAMES = [*data.JOINTS[:24], "TAIL"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("says, words", [
    (dict(action_dim=25, names=[data.JOINTS[j] for j in ORDER]), ["column 0", data.JOINTS[ORDER[0]], "HIP_YAW"]),
    (dict(action_dim=25, names=OTHER_NAMES), ["column 24", "TAIL", "ANGULAR_VELOCITY"]),
    (dict(hz=30), ["30", "10", "--frame_stride 3"]),
    (dict(hz=25), ["25", "10"]),
])
def test_other_joints_and_another_rate_are_refused(toy, trained, tmp_path, says, words, known):
    """Checkpoints that do not say their names and hz are older; of the built-in robot both are known."""
    file = f"{trained['flow']}/ckpt.pt"
    if not known:
        saved = read(file)
        saved["data"] = {"path": "", "built_in": {"frames": 100}, "size": 32}
        file = tmp_path / "older.pt"
        torch.save(saved, file)
    sentence = ends("--ckpt", file, "--data", robot(toy, tmp_path, **says), "--out", tmp_path / "out", "--device", "cpu")
    assert all(w in sentence for w in words), sentence
    assert not (tmp_path / "out").exists()


def test_a_stride_of_the_checkpoint_is_part_of_the_way_out(toy, trained, tmp_path):
    file = changed(trained, tmp_path, data={"frame_stride": 2})
    sentence = ends("--ckpt", file, "--data", robot(toy, tmp_path, hz=60), "--out", tmp_path / "out", "--device", "cpu")
    assert "--frame_stride 6" in sentence


@pytest.mark.parametrize("hz", [10, 10.01])
def test_the_same_joints_and_rate_are_taken(toy, trained, tmp_path, hz):
    dreams(f"{trained['flow']}/ckpt.pt", tmp_path / "out", "--data", robot(toy, tmp_path, hz=hz))


def test_an_older_checkpoint_of_unknown_data_is_not_compared(toy, trained, tmp_path):
    saved = read(f"{trained['flow']}/ckpt.pt")
    saved["data"] = {"path": f"{toy}/cv", "size": 32}
    torch.save(saved, tmp_path / "older.pt")
    dreams(tmp_path / "older.pt", tmp_path / "out", "--data", robot(toy, tmp_path, hz=30))


def test_in_a_read_only_checkout_the_robot_is_drawn_elsewhere(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(sample, "synth", lambda folder, **options: drawn.append((folder, options)) or folder)
    monkeypatch.setattr(sample, "HERE", str(tmp_path / "checkout"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    os.mkdir(tmp_path / "checkout")
    sample.built_in_robot({"frames": 50})
    assert drawn.pop() == (f"{tmp_path}/checkout/data/robot", {"frames": 50, "splits": ("val",)})
    assert not capsys.readouterr().out
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(f"{tmp_path}/checkout"))
    sample.built_in_robot({"frames": 50})
    (folder, _), said = drawn.pop(), capsys.readouterr().out
    assert folder.startswith(f"{tmp_path}/home") and folder in said and "checkout" in said
    os.makedirs(tmp_path / "checkout" / "data" / "robot" / "val_v2.0")
    metadata = tmp_path / "checkout" / "data" / "robot" / "val_v2.0" / "metadata.json"
    metadata.write_text("{}")
    with pytest.raises(data.DataError, match="drawn by another version"):
        sample.built_in_robot({"frames": 50})
    metadata.write_text(json.dumps({"motion": sample.robot.MOTION}))
    assert sample.built_in_robot({"frames": 50}) == f"{tmp_path}/checkout/data/robot" and not drawn, "it is there already"


def test_missing_permission_is_not_called_a_full_disk(tmp_path):
    def denied(name):
        raise PermissionError(13, "Permission denied", name)

    with pytest.raises(data.DataError) as e:
        write_whole(f"{tmp_path}/x.gif", denied)
    assert "room" not in str(e.value) and "ermission" in str(e.value)


# ---- actions: what if?


def test_named_motions_by_hand(toy, trained):
    net, _ = sample.load_model(f"{trained['masked']}/ckpt.pt")
    clips = data.open_clips(f"{toy}/raw", "val")
    a, other = clips[0]["actions"], clips[1]["actions"]
    i = {n: k for k, n in enumerate(clips.names)}
    mean, std = net.standardise_actions.mean, net.standardise_actions.std
    for name in sample.ACTIONS:
        b = sample.change_actions(name, a, net, clips, another=other)
        assert b.shape == a.shape and torch.equal(b[:9], a[:9]), "the past stays"
    changed = lambda name: sample.change_actions(name, a, net, clips, another=other)
    assert torch.equal(changed("true"), a) and torch.equal(changed("shuffled")[9:], other[9:])
    still = a[8].repeat(8, 1)
    still[:, [i["LINEAR_VELOCITY"], i["ANGULAR_VELOCITY"]]] = 0
    assert torch.equal(changed("frozen")[9:], still)
    for name, joint, s in (("drive", "LINEAR_VELOCITY", 2), ("turn_left", "ANGULAR_VELOCITY", 2),
                           ("turn_right", "ANGULAR_VELOCITY", -2), ("look_up", "NECK_PITCH", -2)):
        b = changed(name)
        torch.testing.assert_close(b[12:, i[joint]], (mean + s * std)[i[joint]].expand(5))
        rest = [k for k in range(25) if k != i[joint]]
        assert torch.equal(b[9:, rest], still[:, rest])


class Robot:
    """What change_actions reads of clips."""

    def __init__(self, names, meta, path):
        self.names, self.meta, self.path = tuple(names), meta, path


@pytest.mark.parametrize("names, meta, moving", [
    (["base.vel", "arm.pos", "XVel"], {}, [0, 2]),
    (["ANGULAR_VELOCITY", "SWIVEL", "TRAVEL_LIMIT", "LEVEL", "LinVel", "qvel"], {}, [0, 4, 5]),
    (["a", "b", "c"], {"velocities": [1]}, [1]),
    (["base.vel", "speed", "arm"], {"velocities": [1]}, [1]),
    (["STATE_0", "STATE_1"], {"velocities": []}, []),
    (["hip", "knee"], {}, []),
])
def test_frozen_stops_every_velocity(names, meta, moving, capsys):
    clips = Robot(names=tuple(names), meta=meta, path=f"robot of {names}")
    frozen = sample.change_actions("frozen", torch.ones(17, len(names)), None, clips)
    expected = torch.ones(17, len(names))
    expected[9:, moving] = 0
    assert torch.equal(frozen, expected) and not capsys.readouterr().out


def test_where_columns_have_no_names_frozen_says_once_what_it_cannot_know(capsys):
    clips = Robot(names=("STATE_0", "STATE_1"), meta={}, path="robot without names")
    for _ in range(3):
        sample.change_actions("frozen", torch.ones(17, 2), None, clips)
    said = capsys.readouterr().out
    assert said.count("robot without names") == 1 and '"velocities"' in said


@pytest.mark.parametrize("columns", ["all", [25], [-1], 3])
def test_velocities_that_are_no_columns_are_one_sentence(toy, trained, tmp_path, columns):
    folder = robot(toy, tmp_path, velocities=columns)
    said = ends("--ckpt", f"{trained['flow']}/ckpt.pt", "--data", folder, "--actions", "frozen", "--out", tmp_path / "out", "--device", "cpu")
    assert "velocities" in said and "metadata.json" in said


def test_a_motion_of_joints_that_are_not_there_is_one_sentence():
    clips = Robot(names=("a", "b"), meta={}, path="robot")
    with pytest.raises(data.DataError, match="NECK_PITCH"):
        sample.change_actions("look_up", torch.ones(17, 2), None, clips)


def test_beyond_the_recording_the_robot_holds_still(toy, trained, capsys):
    """Recorded as long as there is a recording, then the last pose, not an earlier one."""
    net, _ = sample.load_model(f"{trained['masked']}/ckpt.pt")
    clips = data.open_clips(f"{toy}/raw", "val")
    i = next(i for i in range(len(clips)) if 0 < len(clips.more_actions(i, 1000)) < 900)
    more = clips.more_actions(i, 1000)
    actions = sample.longer(net, clips, i, len(more) + 5)
    assert "ends 5 frames before" in capsys.readouterr().out
    assert torch.equal(actions[:-5], torch.cat([clips[i]["actions"], more]))
    still = more[-1].clone()
    still[[clips.names.index(f"{x}_VELOCITY") for x in ("LINEAR", "ANGULAR")]] = 0
    assert torch.equal(actions[-5:], still.expand(5, -1))


# ---- dreaming


@pytest.mark.parametrize("model, actions", [("masked", "shuffled"), ("flow", "turn_left")])
def test_sample_command(trained, tmp_path, model, actions):
    argv = ["--ckpt", f"{trained[model]}/ckpt.pt", "--num", "1", "--actions", actions, "--device", "cpu", "--steps", "2",
            "--dtype", "float32"]  # auto may choose another type when the machine is busier
    sample.main([*argv, "--out", f"{tmp_path}/a"])
    sample.main([*argv, "--out", f"{tmp_path}/b"])
    dream = "dream" if actions == "shuffled" else f"dream_{actions}"  # no picture takes another one's place
    assert sorted(os.listdir(tmp_path / "a")) == [f"{dream}.gif", f"{dream}.png"]
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), "the same seed, the same dream"


@both
def test_rollout_goes_on_from_the_dream(toy, trained, model):
    net, saved = sample.load_model(f"{trained[model]}/ckpt.pt")
    tokenizer, clips = load_tokenizer(f"{toy}/{TOKENIZER[model]}.pt"), data.open_clips(f"{toy}/raw", "val")
    few = dict(K=1, temperature=0.0) if model == "masked" else dict(steps=1)
    short, long = (sample.dream(net, tokenizer, clips, num=2, windows=w, **few) for w in (1, 3))
    assert long["prediction"].shape == (2, 24, 32, 32, 3) and short["context"].shape == (2, 9, 32, 32, 3)
    assert np.array_equal(long["prediction"][:, :8], short["prediction"])
    assert np.array_equal(long["truth"], short["truth"])
    same = sample.dream(net, tokenizer, clips, num=2, actions="true", **few)
    assert np.array_equal(same["prediction"], same["other"]), "the same noise: only the actions differ"


@both
def test_dreams_do_not_depend_on_those_beside_them(toy, trained, monkeypatch, model):
    """Batches of 8 and of 1 give the same frames, up to rounding, though the sampler draws all that it draws at random."""
    net, _ = sample.load_model(f"{trained[model]}/ckpt.pt")
    tokenizer, clips = load_tokenizer(f"{toy}/{TOKENIZER[model]}.pt"), data.open_clips(f"{toy}/raw", "val")
    sizes, dreamer, few = [], net.sample, dict(K=2, temperature=1.0) if model == "masked" else dict(steps=2)
    net.sample = lambda past, *args, **settings: sizes.append(len(past)) or dreamer(past, *args, **settings)
    together = sample.dream(net, tokenizer, clips, num=5, **few)
    assert sizes == [8, 2]
    monkeypatch.setattr(sample, "AT_ONCE", 1)
    alone = sample.dream(net, tokenizer, clips, num=5, **few)
    assert sizes == [8, 2] + [1] * 10
    for row, frames in together.items():
        assert abs(frames.astype(int) - alone[row]).max() <= 1, row
    assert (together["prediction"][0] != together["prediction"][1]).any()


@both
def test_a_number_type_is_cast_once_and_its_dreams_stay_near(toy, trained, monkeypatch, model):
    """Weights of products are bfloat16 from then on; embeddings, norms and what the layers add up stay float32."""
    args = sample.argparse.Namespace(dtype="auto", compile=False, device="cpu")
    seen, dreams = [], []
    past = {"masked": torch.randint(64, (2, 2, 4, 4)), "flow": torch.randn(2, 4, 2, 4, 4)}[model]
    for choice in ("float32", "bfloat16"):
        net, _ = sample.load_model(f"{trained[model]}/ckpt.pt")
        monkeypatch.setattr(speed, "faster_dtype", lambda block, x, *rest, training: seen.append((block(x, *rest).shape, training)) or choice)
        tokenizer = load_tokenizer(f"{toy}/{TOKENIZER[model]}.pt")
        assert sample.set_dtype(net, tokenizer, args, at_once=3) == choice
        z = tokenizer.encode(torch.zeros(1, 3, 17, 32, 32))
        assert tokenizer.decode(z).dtype == getattr(torch, choice) and z.dtype in (torch.float32, torch.int64)
        net.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        dreams.append(net.logits(past[:, [0, 0, 1]], torch.ones(2, 1, 4, 4) > 0, torch.ones(2, 17, 25)) if model == "masked"
                      else net.velocity(past[:, :, :1], torch.zeros(1), past, torch.ones(2, 17, 25)))
        types = {type(part).__name__: part.weight.dtype for part in net.blocks.modules() if hasattr(part, "weight")}
        assert types.pop("Linear") == getattr(torch, choice) and set(types.values()) <= {torch.float32}
    assert seen == 2 * [((3, 3 * 16 + 17, 24), False), torch.float32]
    difference = (dreams[0] - dreams[1].float()).abs().max() / dreams[0].abs().max()
    assert 1e-5 < difference < 0.03


@pytest.mark.parametrize("name", ["masked_base", "flow_full"])
def test_bfloat16_costs_the_shipped_models_nothing(name):
    model, saved = sample.load_model(f"{MAIN}/weights/{name}_tiny.pt")
    tokenizer, scores = sample.load_tokenizer_for(saved["tokenizer"]), []
    episodes = [robot_episode(900 + i, 17) for i in range(16)]
    video = sample.to_video(torch.stack([torch.from_numpy(frames) for frames, _ in episodes]))
    actions = torch.stack([torch.from_numpy(states) for _, states in episodes])
    with torch.no_grad():
        latents = tokenizer.encode(video)
        target = sample.to_uint8(tokenizer.decode(latents))[:, 9:].flatten(0, 1)
    for make in (lambda model, tokenizer: None, sample.in_bfloat16):
        make(model, tokenizer)
        frames = sample.continue_video(model, tokenizer, latents.narrow(-3, 0, 2), actions, **sample.settings_of(saved),
                                       noise=[torch.Generator().manual_seed(i) for i in range(16)])
        scores.append(psnr(frames.flatten(0, 1), target).mean())
    assert 0 < abs(scores[0] - scores[1]) < 0.05


@both
def test_each_window_gets_its_own_actions_and_the_last_frames_of_the_dream(toy, trained, model):
    """TRAPS 28, by a spy on the sampler: window k gets actions 8k .. 8k + 16, and the dream's last nine frames, encoded."""
    net, _ = sample.load_model(f"{trained[model]}/ckpt.pt")
    tokenizer, clips = load_tokenizer(f"{toy}/{TOKENIZER[model]}.pt"), data.open_clips(f"{toy}/raw", "val")
    seen, dreamer = [], net.sample

    def spy(past, actions, **settings):
        future = dreamer(past, actions, **settings)
        seen.append((past, actions, future))
        return future

    net.sample = spy
    actions = torch.arange(33.0)[None, :, None].expand(1, 33, 25) / 33
    past = tokenizer.encode(sample.to_video(clips[0]["video"][None, :9]))
    few = dict(K=1, temperature=0.0) if model == "masked" else dict(steps=1)
    frames = sample.continue_video(net, tokenizer, past, actions, windows=3, **few)
    assert torch.equal(seen[0][0], past) and len(seen) == 3
    for k, (window_past, window_actions, future) in enumerate(seen):
        assert torch.equal(window_actions, actions[:, 8 * k : 8 * k + 17])
        video = tokenizer.decode(torch.cat([window_past, future], dim=-3))
        assert torch.equal(frames[:, 8 * k : 8 * k + 8], sample.to_uint8(video[:, :, 9:]))
        if k < 2:
            assert torch.equal(seen[k + 1][0], tokenizer.encode(video[:, :, 8:].clamp(-1, 1)))


@both
def test_trace_shows_every_step_of_the_sampler(trained, tmp_path, model):
    sample.main(["--ckpt", f"{trained[model]}/ckpt.pt", "--out", str(tmp_path), "--num", "2", "--steps", "3", "--trace"])
    steps = {"flow": 4, "masked": 3}[model]  # the flow's strip begins with the noise
    with Image.open(tmp_path / "trace.png") as png:
        assert png.size == (steps * 132, 14 + 2 * 132)
    assert os.listdir(tmp_path) == ["trace.png"]


def test_trace_hides_what_is_hidden(toy, trained):
    """Masked-HWM: grey where a token is still hidden, none left after the last step."""
    net, saved = sample.load_model(f"{trained['masked']}/ckpt.pt")
    strips = sample.trace(net, sample.load_tokenizer_for(saved["tokenizer"]), data.open_clips(f"{toy}/dv", "val"), num=1, K=4)
    grey = [(strip.reshape(4, 8, 4, 8, 3).swapaxes(1, 2) == 128).all((2, 3, 4)).sum() for strip in strips[0]]
    assert grey == [16 - masked_hwm.n_fixed(k, 4, 16) for k in (1, 2, 3, 4)]


# ---- pictures


def pictures_of(colours, n=1):
    """{row: n clips of 32 x 32 frames}, every frame of one colour: colours {row: [(r, g, b), ...]}."""
    return {row: np.array(c, np.uint8)[None, :, None, None].repeat(n, 0).repeat(32, 2).repeat(32, 3) for row, c in colours.items()}


def test_red_stays_red(tmp_path):
    """TRAPS 20: what is written into the pictures is what the clip holds, in RGB."""
    red = [(255, 0, 0)] * 9
    rows = sample.picture_rows(pictures_of({"context": red, "truth": red[:8], "prediction": red[:8], "other": red[:8]}))
    sample.save_png(rows, f"{tmp_path}/x.png")
    sample.save_gif(rows, f"{tmp_path}/x.gif")
    with Image.open(f"{tmp_path}/x.png") as png, Image.open(f"{tmp_path}/x.gif") as gif:
        assert png.convert("RGB").getpixel((150, 60)) == (255, 0, 0)
        r, g, b = gif.convert("RGB").getpixel((60, 60))
        assert r > 250 and g < 5 and b < 5


COLOURS = {"context": [(20 * k, 0, 0) for k in range(9)], "truth": [(0, 30 * k, 0) for k in range(8)],
           "prediction": [(0, 0, 10 * k) for k in range(24)], "other": [(10 * k, 10 * k, 10 * k) for k in range(24)]}


def film(file):
    """The frames of a GIF as it is played: [(start in ms, RGB picture)], and its length."""
    frames, time = [], 0
    with Image.open(file) as gif:
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append((time, np.asarray(gif.convert("RGB")).astype(int)))
            time += gif.info["duration"]
    return frames, time


def test_every_column_of_the_gif_shows_its_own_frames(tmp_path):
    """The context plays in all four columns; then it stands, as the truth does where the rollout is longer."""
    rows = sample.picture_rows(pictures_of(COLOURS, n=2))
    sample.save_gif(rows, f"{tmp_path}/x.gif", hz=10)
    frames, _ = film(f"{tmp_path}/x.gif")
    assert [start for start, _ in frames] == [100 * t for t in range(33)]
    for t, (_, picture) in enumerate(frames):
        for column, row in enumerate(COLOURS):
            k = t if t < 9 else min(t - 9, len(COLOURS[row]) - 1) if row != "context" else 8
            expected = COLOURS["context" if t < 9 else row][k]
            for clip in range(2):
                assert abs(picture[14 + 132 * clip + 64, 132 * column + 64] - expected).max() < 4, (t, row)


def test_the_png_shows_every_frame_once(tmp_path):
    rows = sample.picture_rows(pictures_of(COLOURS, n=2))
    sample.save_png(rows, f"{tmp_path}/x.png")
    with Image.open(f"{tmp_path}/x.png") as png:
        pixels = np.asarray(png.convert("RGB"))
    for line, row in enumerate([*COLOURS] * 2):
        for t in range(24):
            expected = COLOURS[row][t] if t < len(COLOURS[row]) else (255, 255, 255)
            assert tuple(pixels[132 * line + 64, 90 + 132 * t + 64]) == expected, (row, t)


@pytest.mark.parametrize("hz", [0.5, 3, 10, 24, 25, 29.97, 30, 48, 50, 60, 100, 240])
def test_a_gif_plays_in_true_time(tmp_path, hz):
    """As browsers play it: a delay is whole hundredths of a second, and one under 20 ms is played as 100 ms. The n-th frame
    that is shown begins within 5 ms of its true time; above 50 Hz some are left out."""
    n = 40
    context, colours = [(5 * k, 0, 0) for k in range(9)], [(0, 6 * k, 0) for k in range(n - 9)]
    rows = sample.picture_rows(pictures_of({"context": context, "truth": colours, "prediction": colours, "other": colours}))
    sample.save_gif(rows, f"{tmp_path}/x.gif", hz)
    frames, length = film(f"{tmp_path}/x.gif")
    starts = np.array([start for start, _ in frames])
    assert (np.diff(starts) >= 20).all() and length - starts[-1] == 1000
    assert len(frames) == n if hz <= 50 else n / hz * 25 <= len(frames) <= n / hz * 50 + 1
    for start, picture in frames:
        red, green, _ = picture[14 + 64, 132 + 64]
        k = round(red / 5) if green < 3 and red > 0 or start == 0 else 9 + round(green / 6)
        assert abs(start - 1000 * k / hz) <= 5.01, (k, start)


def test_the_curve_is_drawn_from_the_log(tmp_path):
    rows = sample.picture_rows(pictures_of(COLOURS))
    for step in range(10, 80, 10):
        sample.save_gif(rows, f"{tmp_path}/samples/step_{step:06d}.gif")
    shown = {**rows, "prediction": 255 - rows["prediction"]}
    sample.save_gif(shown, f"{tmp_path}/samples/step_000070.gif")
    with open(tmp_path / "log.jsonl", "w") as f:
        f.writelines(json.dumps({"step": s, "loss": 2 - s / 100}) + "\n" for s in range(1, 101))
    sample.save_curve(str(tmp_path))
    with Image.open(tmp_path / "loss.png") as png:
        pixels = np.asarray(png.convert("RGB")).astype(int)
    assert len(pixels) == 450, "the curve, and below it what was dreamt"
    blue = (abs(pixels - (31, 119, 180)).sum(-1) < 60)[:300]
    left, right = (np.flatnonzero(blue[:, x]).mean() for x in (100, 700))
    assert left < 80 and right > 220, "a falling loss falls"
    assert abs(pixels[302 + 64, 60 + 64] - COLOURS["prediction"][-1]).max() < 6, "the last frame of the prediction"
    assert abs(pixels[302 + 64, 60 + 4 * 138 + 64] - (255 - np.array(COLOURS["prediction"][-1]))).max() < 6, "five, with the last one"


def test_a_curve_of_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    sample.save_curve(str(tmp_path))
    with Image.open(tmp_path / "loss.png") as png:
        blue = abs(np.asarray(png.convert("RGB")).astype(int) - (31, 119, 180)).sum(-1) < 60
    assert len(blue) == 300 and blue.sum() > 20, "a lone point is a dot"


# ---- the command line


def settings(trained, tmp_path, model="flow", argv=(), **changes):
    """The sampler's settings that sample.py passes on."""
    seen, module = [], sample.MODELS[model]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sample, "dream", lambda *_, **settings: seen.append(settings) or pictures_of(COLOURS))
        sample.main(["--ckpt", str(changed(trained, tmp_path, model, **changes)), "--out", str(tmp_path), "--device", "cpu", *argv])
    return seen[0]


def test_settings_are_the_presets_unless_asked_otherwise(trained, tmp_path):
    """The paper's: K = 2 (Sec. 3.1), 50 Euler steps and guidance 3.0 (Sec. 3.2)."""
    assert settings(trained, tmp_path, "masked", config={"preset": "paper"}) == {"K": 2, "temperature": 1.0}
    assert settings(trained, tmp_path, "flow", config={"preset": "paper"}) == {"steps": 50, "cfg": 3.0}
    assert settings(trained, tmp_path, "flow", ["--steps", "7"]) == {**flow_hwm.SAMPLING["tiny"], "steps": 7}
    asked = settings(trained, tmp_path, "masked", ["--steps", "7", "--order", "confidence", "--temperature", "0.5"])
    assert asked == {"K": 7, "order": "confidence", "temperature": 0.5, "mean": True}
    assert not settings(trained, tmp_path, "masked", ["--no-mean"])["mean"]


def test_ids_of_unknown_digits_have_no_mean(trained, tmp_path):
    unknown = dict(model_config={"share_digits": False, "levels": ()})
    saved = sample.read_checkpoint(changed(trained, tmp_path, "masked", **unknown))
    assert sample.settings_of(saved) == {"K": 2, "temperature": 0.0, "mean": False}


def test_guidance_of_a_model_that_never_dropped_its_conditions(trained, tmp_path):
    """TRAPS 29: without a velocity that was trained without conditions there is nothing to guide away from."""
    never = dict(model_config={"p_drop": 0.0})
    assert settings(trained, tmp_path, **never)["cfg"] == 1
    assert settings(trained, tmp_path, argv=["--cfg", "1"], **never)["cfg"] == 1
    said = ends("--ckpt", changed(trained, tmp_path, **never), "--cfg", 3, "--out", tmp_path / "out", "--device", "cpu")
    assert "cfg 3" in said and "p_drop" in said and not (tmp_path / "out").exists()
    assert sample.settings_of(sample.read_checkpoint(changed(trained, tmp_path, **never)))["cfg"] == 1, "as train.py asks"


def test_sampling_flags_reach_the_sampler(trained, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(flow_hwm, "integrate", lambda velocity, X_0, steps, method, trace: seen.append((steps, method)) or X_0)
    sample.main(["--ckpt", f"{trained['flow']}/ckpt.pt", "--out", str(tmp_path), "--num", "1", "--steps", "3", "--method", "midpoint"])
    assert set(seen) == {(3, "midpoint")}


@pytest.mark.parametrize("model, flag, value", [("flow", "order", "confidence"), ("masked", "cfg", 2.0),
                                                ("masked", "method", "midpoint")])
def test_flags_of_the_other_model_are_refused(trained, tmp_path, model, flag, value):
    assert f"--{flag}" in ends("--ckpt", f"{trained[model]}/ckpt.pt", "--out", tmp_path, f"--{flag}", value)


@pytest.mark.parametrize("argv, word", [(["--num", "6"], "--num 6"), (["--num", "0"], "--num"), (["--steps", "0"], "--steps"),
                                        (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"),
                                        (["--rollout", "0"], "--rollout"), (["--seed", "-1"], "--seed"),
                                        (["--device", "abacus"], "abacus"), (["--data", "nowhere"], "nowhere"),
                                        (["--tokenizer", "nowhere.pt"], "nowhere.pt")])
def test_bad_sampling_flags_are_one_sentence(trained, tmp_path, argv, word):
    assert word in ends("--ckpt", f"{trained['masked']}/ckpt.pt", "--out", tmp_path / "out", "--device", "cpu", *argv)
    assert not (tmp_path / "out").exists()


def test_pictures_of_shipped_weights_go_to_out(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    os.mkdir("weights")
    for file, out in (("weights/flow.pt", "out/samples_flow"), ("run.pt", "samples")):
        shutil.copy(f"{trained['flow']}/ckpt.pt", file)
        sample.main(["--ckpt", file, "--num", "1", "--steps", "1", "--trace", "--device", "cpu"])
        assert os.listdir(out) == ["trace.png"]
