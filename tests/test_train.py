"""train.py: the loop, its checkpoints, resuming, several processes, and what bad input ends in."""
import functools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import flow_hwm
import masked_hwm
import sample
import tokenizer as tok
import train as training
from blocks import VARIANTS
from conftest import TOY_PRESET
from examples import speed
from sample import MODELS
from train import TrainConfig, learning_rate, positions

MAIN = os.path.dirname(os.path.abspath(training.__file__))
PAIRS = [(model, variant) for model in ("masked", "flow") for variant in VARIANTS]
both = pytest.mark.parametrize("model", ["masked", "flow"])


TINY = {"masked": dict(TOY_PRESET, vocab_size=64, at_place=True, share_digits=True, levels=(4, 4, 4)),
        "flow": dict(TOY_PRESET, patch=1, at_place=True)}


@pytest.fixture(autouse=True)
def small_and_quick(request, monkeypatch):
    """The tiny preset smaller, and no sample pictures where a test does not ask for `pictures`."""
    for model, sizes in TINY.items():
        monkeypatch.setitem(MODELS[model].PRESETS, "tiny", sizes)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(training, "show", lambda *_: None)


@pytest.fixture
def pictures():
    pass


def config(toy, out, model="masked", variant="base", **changes):
    fields = dict(model=model, variant=variant, preset="tiny", data=f"{toy}/{'dv' if model == 'masked' else 'cv'}", out=str(out),
                  steps=2, batch=4, warmup=1, dtype="float32", log_every=1, sample_every=0)
    return TrainConfig(**{**fields, **changes})


def run(toy, out, *args, **changes):
    """Trains, and returns what log.jsonl then says."""
    training.train(config(toy, out, *args, **changes))
    return log(out)


def log(out):
    with open(f"{out}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def losses(lines):
    return [line["loss"] for line in lines]


def read(out, name="ckpt.pt"):
    return torch.load(f"{out}/{name}", weights_only=True)


def ends(main, *argv):
    """Runs main(argv), which must end with one sentence and a non-zero code; returns the sentence."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert isinstance(e.value.code, str) and "\n" not in e.value.code.strip() and "Traceback" not in e.value.code
    return e.value.code


def flags(toy, out, model="masked", **changes):
    """The same run as command line flags."""
    c = config(toy, out, model, **changes)
    given = {f: v for f, v in vars(c).items() if v != getattr(TrainConfig(), f)}
    given.update(given.pop("options", {}), model=c.model, variant=c.variant)
    return [a for k, v in given.items() for a in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """{"masked": folder, "flow": folder}: a run of two steps each, with pictures."""
    out = {}
    for model in ("masked", "flow"):
        out[model] = str(tmp_path_factory.mktemp("trained") / model)
        with pytest.MonkeyPatch.context() as m:
            m.setitem(MODELS[model].PRESETS, "tiny", TINY[model])
            run(toy, out[model], model)
    return out


# ---- the schedule (TRAPS 21)


def test_learning_rate_by_hand():
    c = TrainConfig(lr=1.0, warmup=4, steps=14, decay="linear")
    assert [learning_rate(c, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(c, 4) == 1.0 and learning_rate(c, 9) == 0.5
    assert learning_rate(c, 13) == pytest.approx(0.1) and learning_rate(c, 14) == 0
    c.decay = "cosine"
    assert learning_rate(c, 9) == pytest.approx(0.5) and learning_rate(c, 14) == pytest.approx(0)
    assert learning_rate(c, 13) == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.9)))
    assert learning_rate(TrainConfig(lr=1.0, warmup=0, steps=10, decay="cosine"), 0) == 1.0


@pytest.mark.parametrize("accum", [1, 4])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_rate_at_the_last_step_is_the_schedules(toy, tmp_path, accum, decay):
    lines = run(toy, tmp_path, accum=accum, decay=decay, steps=5, lr=0.01, warmup=1, log_every=1)
    last = 0.01 * (1 - 3 / 4) if decay == "linear" else 0.01 * 0.5 * (1 + np.cos(np.pi * 3 / 4))
    assert lines[0]["lr"] == 0.01 and lines[-1]["lr"] == pytest.approx(last, abs=1e-6) and len(lines) == 5
    assert read(tmp_path)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(last)


def test_paper_preset_is_the_papers():
    """Sec. 3.1 and 3.2."""
    masked, flow = (MODELS[m].TRAINING["paper"] for m in ("masked", "flow"))
    assert dict(masked, micro=4) == dict(steps=60_000, batch=16, lr=3e-5, warmup=100, decay="linear", micro=4)
    assert dict(flow, micro=32) == dict(steps=150_000, batch=128, lr=1e-4, warmup=0, decay="cosine", micro=32)


@pytest.mark.parametrize("name, value", [("warmup", 0), ("steps", 7), ("batch", 8), ("lr", 0.5), ("decay", "linear")])
def test_a_given_flag_is_not_replaced_by_the_presets(toy, name, value):
    c = config(toy, "x", **{name: value})
    training.settle(c, lambda *_: None)
    assert getattr(c, name) == value


def test_micro_batches_by_themselves(toy, monkeypatch):
    """The paper's batches are divided so that they fit; what is asked for is done."""
    for gpu, world, model, asked, accum in ((True, 1, "masked", {}, 4), (True, 2, "flow", {}, 2), (False, 1, "masked", {}, 16),
                                            (False, 2, "flow", {}, 64), (True, 1, "masked", dict(accum=2), 2),
                                            (True, 1, "masked", dict(batch=6), 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(training, "rank_and_world", lambda: (0, world))
        c = config(toy, "x", model, preset="paper", **{"batch": 0, **asked})
        training.settle(c, lambda *_: None)
        assert c.accum == accum and c.checkpoint_activations == ("" if gpu else "products")


@pytest.mark.parametrize("name, value", [("steps", -5), ("lr", -1), ("lr", float("nan")), ("batch", -2), ("ema", 1.0), ("log_every", 0),
                                         ("save_every", -1), ("save_minutes", -1), ("weight_decay", -0.1), ("grad_clip", -1), ("accum", -1),
                                         ("seed", 2**24), ("seed", -1)])
def test_bad_numbers_are_one_sentence_before_any_work(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    said = ends(training.main, "--model", "flow", "--variant", "full", "--preset", "tiny", f"--{name}", value)
    assert f"--{name} {value}" in said and not os.listdir(tmp_path)


@pytest.mark.parametrize("options, word", [(dict(n_layer=0), "n_layer"), (dict(width=25), "width of 25"), (dict(rho_max=0.1), "--rho_max"),
                                           (dict(n_head=7), "7 heads"), (dict(T_p=3), "--T_p"), (dict(variant="base"), "--variant"),
                                           (dict(drop="most"), "drop"), (dict(patch=3), "patch 3"), (dict(time_width=7), "time_width")])
def test_bad_model_options_are_one_sentence(toy, tmp_path, options, word):
    c = config(toy, tmp_path, "flow", options=options)
    with pytest.raises(data.DataError) as e:
        training.train(c)
    assert word in str(e.value) and not os.listdir(tmp_path)


def test_an_option_of_the_other_model_is_refused_as_a_flag(toy, tmp_path):
    assert "--t_sampling is no option of" in ends(training.main, *flags(toy, tmp_path, options=dict(t_sampling="uniform")))


def test_model_options_are_flags(toy, tmp_path):
    training.main([*flags(toy, tmp_path, "flow", steps=1, options=dict(n_layer=3, t_sampling="logit-normal")), "--no-at_place"])
    made = read(tmp_path)["model_config"]
    assert (made["n_layer"], made["t_sampling"], made["at_place"], made["width"]) == (3, "logit-normal", False, 24)
    assert read(tmp_path)["config"]["options"] == dict(n_layer=3, t_sampling="logit-normal", at_place=False)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        training.parse(["--help"])
    said = capsys.readouterr().out.split("options:\n")[1]
    flags = re.findall(r"^  (--\w+).*?(?=^  --|\Z)", said, re.M | re.S)
    assert {"--model", "--steps", "--n_layer", "--drop", "--share_digits"} <= set(flags) and not {"--T_p", "--levels", "--set", "--keep"} & set(flags)


def test_flags_are_the_dataclass():
    c = training.parse(["--model", "flow", "--variant", "split", "--warmup", "0", "--lr", "0.1", "--resume"])
    assert (c.model, c.variant, c.warmup, c.lr, c.resume, c.steps) == ("flow", "split", 0, 0.1, True, 0)
    for bad in (["--model", "flow"], ["--model", "flow", "--variant", "other"], ["--model", "flow", "--variant", "full", "--x", "1"]):
        with pytest.raises(SystemExit):
            training.parse(bad)


def test_auto_preset(toy, monkeypatch, capsys):
    """paper only with a CUDA device and a 1X folder: the built-in robot stays tiny, encoded or not."""
    meta = {"num_shards": 1, "query": None, "hz": 10, "num_images": 204}
    for gpu, robot, preset in ((False, False, "tiny"), (True, False, "paper"), (True, True, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        c = config(toy, "x", preset="auto", batch=4)
        if robot:
            c.data = str(toy / "robot_dv")
            if not os.path.exists(c.data):
                shutil.copytree(toy / "raw", toy / "robot")
                for split, n in (("train", 204), ("val", 85)):
                    data.save(f"{toy}/robot/{split}_v2.0/metadata.json", dict(meta, num_images=n, robot="built-in"))
                data.encode(f"{toy}/robot", f"{toy}/dv.pt", c.data, device="cpu", progress=False)
        said = []
        training.settle(c, said.append)
        assert c.preset == preset, said
        assert preset in said[0] and "CUDA" in said[0]


# ---- the stream of clips and noise


def test_every_position_is_used_once_by_one_process():
    c = TrainConfig(batch=12, accum=2)
    for step in (0, 5):
        taken = []
        for rank in range(3):
            micro = positions(c, step, rank, 3)
            taken += [next(micro) for _ in range(2)]
        assert all(len(m) == 2 for m in taken)
        assert sorted(p for m in taken for p in m) == list(range(12 * step, 12 * step + 12))


def test_stream_is_a_function_of_its_position():
    clips = [{"video": torch.tensor(i), "actions": torch.tensor(-i)} for i in range(10)]
    draw = lambda g: {"u": torch.rand((), generator=g)}
    one, other = training.Stream(clips, draw, seed=3), training.Stream(clips, draw, seed=3)
    forwards = [one[p] for p in range(25)]
    backwards = [other[p] for p in reversed(range(25))][::-1]
    assert forwards == backwards
    for epoch in (range(10), range(10, 20)):
        assert sorted(int(forwards[p][0]) for p in epoch) == list(range(10)), "an epoch is a permutation"
    assert [f[0] for f in forwards[:10]] != [f[0] for f in forwards[10:20]]
    assert len({float(f[2]["u"]) for f in forwards}) == 25
    assert [training.Stream(clips, draw, seed=4)[p][0] for p in range(10)] != [f[0] for f in forwards[:10]]


# ---- a run and its files


@both
def test_a_run_leaves_its_files(trained, model):
    out = trained[model]
    lines = log(out)
    assert [line["step"] for line in lines] == [1, 2]
    assert {"step", "loss", "lr", "grad_norm", "samples_per_s", "tflops", "peak_gb"} <= set(lines[0])
    assert all(np.isfinite(v) and v >= 0 for line in lines for v in line.values()) and lines[0]["peak_gb"] > 0
    with Image.open(f"{out}/samples/step_000002.gif") as gif:
        assert gif.n_frames == 17
    saved = read(out)
    assert saved["step"] == 2 and set(saved) >= {"model", "ema", "optimizer", "step", "rng", "config", "model_config",
                                                 "data", "tokenizer"}
    for part in ("model", "ema"):
        assert not any(k.startswith("module.") or "_orig_mod" in k for k in saved[part])
    assert not [f for f in os.listdir(out) if f.endswith(".tmp")]


@both
def test_statistics_travel_in_the_checkpoint(toy, trained, model):
    saved, stats = read(trained[model]), data.action_statistics(data.open_clips(f"{toy}/dv", "train"))
    for part in ("model", "ema"):
        for name in ("mean", "std"):
            (buffer,) = (x for key, x in saved[part].items() if "action" in key and key.endswith(name))
            torch.testing.assert_close(buffer, stats[name])
    if model == "flow":
        meta = data.open_clips(f"{toy}/cv", "train").meta
        for name in ("mean", "std"):
            (buffer,) = (x for key, x in saved["ema"].items() if "latent" in key and key.endswith(name))
            torch.testing.assert_close(buffer, torch.tensor(meta[f"latent_{name}"]))


@both
def test_training_learns(toy, tmp_path, model):
    lines = losses(run(toy, tmp_path, model, steps=30, batch=8, lr=0.01, warmup=2))
    assert np.mean(lines[-8:]) < 0.9 * np.mean(lines[:4]), lines


def test_no_average_means_the_weights_themselves(toy, tmp_path):
    run(toy, tmp_path, ema=0.0, lr=0.01)
    saved = read(tmp_path)
    assert all(torch.equal(saved["ema"][k], v) for k, v in saved["model"].items())


def test_average_by_hand(toy, tmp_path):
    """One step from w_0 to w_1: the decay is min(0.999, 2 / 11)."""
    run(toy, tmp_path, steps=1, lr=0.01)
    saved = read(tmp_path)
    torch.manual_seed(0)
    w_0 = masked_hwm.MaskedHWM(masked_hwm.MaskedConfig(**saved["model_config"])).state_dict()
    for k in ("embed.weight", "blocks.0.mlp.0.0.weight"):
        torch.testing.assert_close(saved["ema"][k], 2 / 11 * w_0[k] + 9 / 11 * saved["model"][k])
        assert not torch.equal(saved["model"][k], w_0[k])


def test_a_batch_in_which_nothing_is_hidden(toy, tmp_path, monkeypatch):
    """One small clip with r near 1 may have no hidden token: the step has no loss, and the run goes on."""
    draw = masked_hwm.MaskedHWM.draw
    monkeypatch.setattr(masked_hwm.MaskedHWM, "draw", lambda self, g: dict(draw(self, g), r=torch.ones(self.config.T_f)))
    run(toy, tmp_path, batch=1, steps=2)
    assert read(tmp_path)["step"] == 2


def test_a_small_validation_split_is_no_obstacle(toy, tmp_path, pictures):
    """Sample pictures show what there is: two clips (as in ../shared/fixtures/1x_tokens), or none."""
    shutil.copytree(toy / "raw", tmp_path / "raw")
    video = np.load(f"{toy}/raw/val_v2.0/videos/video_0.npy")[:34]
    states = np.fromfile(f"{toy}/raw/val_v2.0/robot_states/states_0.bin", "<f4").reshape(-1, 25)[:34]
    data.save_shard(f"{tmp_path}/raw/val_v2.0", 0, ".npy", video, states, [0] * 34)
    data.save(f"{tmp_path}/raw/val_v2.0/metadata.json", {"num_shards": 1, "query": None, "hz": 10, "num_images": 34})
    data.encode(f"{tmp_path}/raw", f"{toy}/dv.pt", f"{tmp_path}/dv", device="cpu", progress=False)
    run(toy, tmp_path / "two", data=f"{tmp_path}/dv")
    shutil.rmtree(tmp_path / "dv" / "val_v2.0")
    run(toy, tmp_path / "none", data=f"{tmp_path}/dv")
    assert read(tmp_path / "two")["step"] == read(tmp_path / "none")["step"] == 2


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_earlier_run_is_kept(toy, tmp_path, slash):
    out = f"{tmp_path}/run{slash}"
    run(toy, out, steps=1)
    before = read(out)["model"]
    run(toy, out, steps=2)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]
    assert read(f"{tmp_path}/run.1")["step"] == 1 and all(torch.equal(v, before[k]) for k, v in read(f"{tmp_path}/run.1")["model"].items())
    assert read(out)["step"] == 2 and len(log(out)) == 2


# ---- resuming


@both
@pytest.mark.parametrize("accum", [1, 2])
def test_resuming_is_never_having_stopped(toy, tmp_path, model, accum):
    straight = run(toy, tmp_path / "a", model, steps=6, accum=accum)
    run(toy, tmp_path / "b", model, steps=6, accum=accum, stop_after=3)
    assert len(log(tmp_path / "b")) == 3
    resumed = run(toy, tmp_path / "b", model, steps=6, accum=accum, resume=True)
    same = lambda line: (line["step"], line["loss"], line["lr"], line["grad_norm"])
    assert list(map(same, resumed)) == list(map(same, straight))
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    for part in ("model", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), "bit for bit"


def test_stop_after_keeps_the_schedule_and_says_how_to_go_on(toy, tmp_path, capsys):
    lines = run(toy, tmp_path, steps=11, stop_after=3, log_every=100, decay="linear", warmup=1, lr=0.01)
    assert [line["step"] for line in lines] == [3] and read(tmp_path)["step"] == 3
    assert lines[0]["lr"] == pytest.approx(0.009)  # step 3 of 11 is one of the ten on the way from 0.01 to 0
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_its_checkpoint(toy, tmp_path, monkeypatch, number):
    draw, seen = masked_hwm.MaskedHWM.draw, []

    def draw_and_interrupt(self, g):
        seen.append(1)
        if len(seen) == 9:  # the clips of step 3 are read within step 2
            os.kill(os.getpid(), number)
        return draw(self, g)

    before = signal.getsignal(number)
    monkeypatch.setattr(masked_hwm.MaskedHWM, "draw", draw_and_interrupt)
    run(toy, tmp_path, steps=50, val_every=-1)
    assert read(tmp_path)["step"] == 2
    assert signal.getsignal(number) == before, "as in a notebook, where Ctrl-C must work afterwards"


def test_a_second_ctrl_c_stops_at_once(toy, tmp_path, monkeypatch):
    """But not within a second of the first, for torchrun hands on what the terminal has sent to all."""
    now = []
    monkeypatch.setattr(tok.time, "monotonic", lambda: sum(now))
    before = signal.getsignal(signal.SIGINT)

    def interrupt(config, step):
        for pause in ((0.1, 0.1, 2) if step == 1 else ()):
            now.append(pause)
            os.kill(os.getpid(), signal.SIGINT)
        return 1e-3

    monkeypatch.setattr(training, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path, steps=5)
    assert len(now) == 3 and len(log(tmp_path)) == 1 and signal.getsignal(signal.SIGINT) == before


def test_a_run_under_nohup_outlives_its_terminal(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda *_: os.kill(os.getpid(), signal.SIGHUP) or 1e-3)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(run(toy, tmp_path, steps=2)) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_in_use_is_refused(toy, trained, tmp_path):
    shutil.copytree(trained["masked"], tmp_path / "run")
    code = f"import sys; sys.path.insert(0, {MAIN!r}); import time, train; f = train.hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        for more in (dict(), dict(resume=True, steps=3)):
            sentence = ends(training.main, *flags(toy, tmp_path / "run", **more))
            assert "in use" in sentence and f"process {other.pid} on {socket.gethostname()}" in sentence
    finally:
        other.kill()
        other.wait()
    assert os.listdir(tmp_path) == ["run"] and read(tmp_path / "run")["step"] == 2
    assert len(run(toy, tmp_path / "run", steps=3, resume=True)) == 3, "the lock went with its process"


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("steps", 1), ("seed", 1), ("variant", "full"), ("model", "flow"),
                                         ("batch", 8), ("weight_decay", 0.5), ("ema", 0.5)])
def test_another_flag_with_resume_is_refused_by_name(toy, trained, tmp_path, name, value):
    shutil.copytree(trained["masked"], tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    changes = {name: value}
    sentence = ends(training.main, *flags(toy, tmp_path / "run", **changes, resume=True))
    assert name in sentence and "the run in" in sentence or "another run" in sentence
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_the_same_data_under_another_path_resumes(toy, tmp_path, monkeypatch):
    straight = run(toy, tmp_path / "a", steps=3)
    run(toy, tmp_path / "b", steps=3, stop_after=1)
    monkeypatch.chdir(toy)
    run(toy, tmp_path / "b", steps=3, stop_after=2, resume=True, data="./dv/")
    shutil.copytree(toy / "dv", tmp_path / "moved")
    assert losses(run(toy, tmp_path / "b", steps=3, resume=True, data=f"{tmp_path}/moved")) == losses(straight)


def test_other_data_is_refused(toy, trained, tmp_path):
    shutil.copytree(trained["masked"], tmp_path / "run")
    data.encode(f"{toy}/raw", f"{toy}/dv.pt", f"{tmp_path}/dv", stride=16, device="cpu", progress=False)
    sentence = ends(training.main, *flags(toy, tmp_path / "run", resume=True, data=f"{tmp_path}/dv"))
    assert "another run" in sentence and f"{tmp_path}/dv" in sentence


def test_a_run_is_prolonged_by_a_new_schedule(toy, tmp_path, capsys):
    run(toy, tmp_path, steps=3, lr=0.01, decay="linear", warmup=1)
    lines = run(toy, tmp_path, steps=5, lr=0.01, decay="linear", warmup=1, resume=True)
    assert "prolonged from 3 to 5 steps" in capsys.readouterr().out
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025])


def test_stop_after_a_step_that_is_done(toy, trained, tmp_path):
    shutil.copytree(trained["masked"], tmp_path / "run")
    assert "--stop_after 2" in ends(training.main, *flags(toy, tmp_path / "run", resume=True, steps=9, stop_after=2))


def test_memory_on_other_systems(toy, tmp_path, monkeypatch):
    """macOS counts in bytes, Linux in kilobytes; Windows has no such module."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=600_000_000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    with monkeypatch.context() as m:
        m.setattr(tok.sys, "platform", "darwin")
        assert training.peak_gb("cpu") == 0.6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "peak_gb" not in run(toy, tmp_path, steps=1)[0]


def test_a_machine_without_fork_and_locks(toy, tmp_path, monkeypatch):
    """As Windows: processes that read clips are started anew and get a pickled stream, which is small, for it holds no
    weights; folders cannot be locked."""
    straight = run(toy, tmp_path / "a", "flow", steps=2)
    sizes, dumps = [], pickle.dumps
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(training, "DataLoader", functools.partial(training.DataLoader, multiprocessing_context="spawn"))
    original = training.Stream.__init__

    def measured(stream, *args):
        original(stream, *args)
        sizes.append(len(dumps(stream)))

    monkeypatch.setattr(training.Stream, "__init__", measured)
    for name in ("b", "b"):  # the second run keeps the first
        assert losses(run(toy, tmp_path / name, "flow", steps=2, workers=1, val_every=-1)) == losses(straight)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "b.1"] and "peak_gb" not in log(tmp_path / "b")[0]
    assert max(sizes) < 0.1 * os.path.getsize(tmp_path / "a" / "ckpt.pt")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_that_was_freed_is_used_again(toy, tmp_path):
    """Large tensors are not given new pages, each of which is a fault when it is touched: 2,000 for one of 8 MB."""
    import resource
    run(toy, tmp_path, steps=1)
    faults = []
    for _ in range(3):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        for n in range(10):
            torch.ones(2_000_000 + 100_000 * n)
    assert faults[2] - faults[1] < 1000


def without_compiler(*_):
    raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("No working C++ compiler found"), None)


def off_by(part):
    """A compiler whose kernels are wrong: each block adds a little too much to what it is given."""
    return lambda f: lambda x, *rest: x + (1 + part) * (f(x, *rest) - x)


def without_backward(f):
    """A compiler that gets no further than the forward pass. The last block, which is plain, has its gradient by then."""
    def forward(x, *rest):
        y = f(x, *rest)
        y.register_hook(without_compiler)
        return y
    return forward


@both
@pytest.mark.parametrize("compiler, sentence", [
    (lambda f: f, "the blocks are compiled: loss and gradient norm of the first batch ["),
    (without_backward, "the blocks are not compiled: the compiler fails"),
    (lambda f: without_compiler, "the blocks are not compiled: the compiler fails (BackendCompilerFailed"),
    (off_by(0.05), "the blocks are not compiled: loss and gradient norm of the first batch [")])
def test_compiled_blocks_are_checked_against_the_plain_ones(toy, tmp_path, monkeypatch, capsys, model, compiler, sentence):
    """Whatever becomes of it, the run is that of plain blocks to the last bit: the check takes no step, leaves no gradient
    and draws no number. What it found is kept."""
    plain = run(toy, tmp_path / "plain", model, compile=False, steps=3)
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f: (calls.append(f), compiler(f))[1])
    assert losses(run(toy, tmp_path / "run", model, compile=True, steps=3, stop_after=1)) == losses(plain)[:1]
    assert losses(run(toy, tmp_path / "run", model, compile=True, steps=3, resume=True)) == losses(plain)
    out, a, b = capsys.readouterr().out, read(tmp_path / "plain"), read(tmp_path / "run")
    assert out.count(sentence) == 2 and calls
    assert torch.equal(a["rng"], b["rng"]) and b["config"]["compile"] == ("not" not in sentence)
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_sharded_blocks_that_cannot_be_compiled_end_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: without_compiler)
    assert "--no-compile" in ends(training.main, *flags(toy, tmp_path / "run", compile=True, shard=True))


@pytest.mark.parametrize("preset, gpu, given, expected", [("paper", True, {}, True), ("paper", False, {}, False), ("tiny", True, {}, False),
                                                          ("paper", True, dict(compile=False), False), ("tiny", False, dict(compile=True), True),
                                                          ("paper", True, dict(checkpoint_activations="products"), False)])
def test_the_paper_preset_is_compiled_on_a_gpu(toy, monkeypatch, preset, gpu, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    c = config(toy, "x", preset=preset, batch=16, **given)
    training.settle(c, lambda *_: None)
    assert c.compile is expected
    c = parse_flags("--no-compile")
    assert c.compile is False and parse_flags().compile is None and parse_flags("--compile").compile is True


def parse_flags(*given):
    return training.parse(["--model", "flow", "--variant", "full", *given])


@pytest.mark.parametrize("name, value", [("accum", 2), ("log_every", 5), ("workers", 0), ("save_every", 1)])
def test_flags_that_change_nothing_may_change(toy, tmp_path, name, value):
    straight = run(toy, tmp_path / "a", steps=3)
    run(toy, tmp_path / "b", steps=3, stop_after=2)
    resumed = run(toy, tmp_path / "b", steps=3, resume=True, **{name: value})
    assert losses(resumed)[-1] == pytest.approx(losses(straight)[-1], abs=2e-6)


def test_the_number_type_is_measured_once_for_a_run(toy, tmp_path, monkeypatch):
    """--dtype auto is a stopwatch: a resumed run keeps what the first part used, or its losses would differ."""
    monkeypatch.setattr(speed, "faster_dtype", lambda *_, **__: "float32")
    straight = run(toy, tmp_path / "a", steps=4, dtype="auto")
    run(toy, tmp_path / "b", steps=4, dtype="auto", stop_after=2)
    monkeypatch.setattr(speed, "faster_dtype", lambda *_, **__: "bfloat16")
    assert losses(run(toy, tmp_path / "b", steps=4, dtype="auto", resume=True)) == losses(straight)


def test_a_killed_run_logs_no_step_twice(toy, tmp_path, monkeypatch):
    """Killed between checkpoints: what was logged after the checkpoint is done again, and logged once."""
    calls = []
    original = training.learning_rate

    def killed(config, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(config, step)

    monkeypatch.setattr(training, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path, steps=5, save_every=2)
    assert read(tmp_path)["step"] == 2 and len(log(tmp_path)) == 3
    assert [line["step"] for line in run(toy, tmp_path, steps=5, save_every=2, resume=True)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_an_unusable_checkpoint_falls_back_to_the_previous(toy, tmp_path, capsys, damage):
    straight = run(toy, tmp_path / "a", steps=5)
    run(toy, tmp_path / "b", steps=5, save_every=2, stop_after=4)
    file = tmp_path / "b" / "ckpt.pt"
    assert read(tmp_path / "b", "ckpt_previous.pt")["step"] == 2
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    run(toy, tmp_path / "b", steps=5, save_every=100, resume=True)
    assert "ckpt_previous.pt" in capsys.readouterr().out
    assert losses(log(tmp_path / "b"))[-3:] == losses(straight)[-3:]
    with open(tmp_path / "b" / "ckpt_previous.pt", "rb") as f:
        assert torch.load(f, weights_only=True)["step"] == 2, "the damaged file must not take the good one's place"


@pytest.mark.parametrize("content", ["nothing", "truncated"])
def test_resume_without_a_usable_checkpoint(toy, trained, tmp_path, content):
    os.makedirs(tmp_path / "run")
    if content == "truncated":
        with open(f"{trained['masked']}/ckpt.pt", "rb") as f:
            (tmp_path / "run" / "ckpt.pt").write_bytes(f.read()[:3000])
    assert "ckpt.pt" in ends(training.main, *flags(toy, tmp_path / "run", resume=True))


# ---- checkpoints are written while training goes on


@pytest.fixture
def slow_disk(monkeypatch):
    """What is written waits until the update from step 2 to 3 has begun, which calls all of `then`. -> `then`, `begun`"""
    begun, save, rate, then = threading.Event(), torch.save, training.learning_rate, []

    def slow(*args, **options):
        assert begun.wait(60), "training waits for the disk"
        save(*args, **options)

    def notice(config, step):
        if step == 2:
            [f() for f in then]
            begun.set()
        return rate(config, step)

    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(training, "learning_rate", notice)
    return SimpleNamespace(then=then, begun=begun)


@pytest.mark.parametrize("file, due", [("ckpt_previous.pt", dict(save_every=2, val_every=-1)), ("ckpt_best.pt", dict(val_every=2))])
def test_training_goes_on_while_a_checkpoint_is_written(toy, tmp_path, monkeypatch, request, file, due):
    """And what is written is the state of its step, although the weights move on before it is."""
    run(toy, tmp_path / "a", steps=5, stop_after=2, lr=0.01, **due)
    request.getfixturevalue("slow_disk")
    run(toy, tmp_path / "b", steps=5, stop_after=3, lr=0.01, **due)
    late, straight = read(tmp_path / "b", file), read(tmp_path / "a", file.replace("_previous", ""))
    assert late["step"] == 2 and read(tmp_path / "b")["step"] == 3
    for part in {"model", "ema", "optimizer"} & straight.keys():
        tensors, others = (torch.utils._pytree.tree_leaves(saved[part]) for saved in (late, straight))
        pairs = [(a, b) for a, b in zip(tensors, others, strict=True) if isinstance(a, torch.Tensor)]
        assert len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("last", [20, 500])
def test_a_failure_of_the_writing_thread_ends_the_run(toy, tmp_path, monkeypatch, last):
    """Long before the next checkpoint, and at the end where the last one fails."""
    def full(saved, name):
        raise RuntimeError("disk is full")

    monkeypatch.setattr(torch, "save", full)
    sentence = ends(training.main, *flags(toy, tmp_path, steps=500, save_every=20, stop_after=last, val_every=-1))
    assert "ckpt.pt cannot be written" in sentence and len(log(tmp_path)) < 40


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_while_a_checkpoint_is_written(toy, tmp_path, slow_disk):
    slow_disk.then.append(interrupt)
    run(toy, tmp_path, steps=50, save_every=2, val_every=-1)
    assert read(tmp_path)["step"] == 4 and read(tmp_path, "ckpt_previous.pt")["step"] == 2
    assert len(run(toy, tmp_path, steps=50, stop_after=5, val_every=-1, resume=True)) == 5


def test_a_second_ctrl_c_while_a_checkpoint_is_written(toy, tmp_path, monkeypatch, slow_disk):
    """Training stops at once, but the file that is being written is finished."""
    now = iter([0, 2])
    monkeypatch.setattr(tok.time, "monotonic", lambda: next(now, 4))
    slow_disk.then.extend([interrupt, threading.Timer(0.3, slow_disk.begun.set).start, interrupt])
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path, steps=50, save_every=2, val_every=-1)
    assert read(tmp_path)["step"] == 2 and not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


@pytest.mark.parametrize("due, steps", [(dict(), [3]), (dict(save_minutes=0.0), [1, 2, 3]), (dict(save_minutes=0.0, save_every=2), [2, 3])])
def test_checkpoints_are_due_by_time_or_by_steps(toy, tmp_path, monkeypatch, due, steps):
    seen = []
    monkeypatch.setattr(training, "save_checkpoint", lambda *args: seen.append(args[4]))
    run(toy, tmp_path, steps=3, val_every=-1, **due)
    assert seen == steps


# ---- how a batch is divided changes nothing


@both
def test_accumulation_changes_nothing(toy, tmp_path, model):
    whole, parts = (run(toy, tmp_path / str(n), model, steps=4, accum=n, lr=1e-3) for n in (1, 4))
    np.testing.assert_allclose(losses(whole), losses(parts), atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in whole], [line["grad_norm"] for line in parts], rtol=1e-3)


@both
@pytest.mark.parametrize("accum", [1, 2])
def test_the_first_step_follows_the_gradient_of_the_mean_loss(toy, tmp_path, model, accum):
    """Loss and norm of the gradient, computed here in one piece. For masked the mean is over hidden tokens."""
    (line,) = run(toy, tmp_path, model, steps=1, accum=accum)
    Model, Config = MODELS[model].Model, MODELS[model].Config
    torch.manual_seed(0)
    net, clips = Model(Config(**read(tmp_path)["model_config"])), data.open_clips(config(toy, "", model).data, "train")
    net.set_statistics(*data.action_statistics(clips).values(),
                       *([torch.tensor(clips.meta[f"latent_{k}"]) for k in ("mean", "std")] if model == "flow" else []))
    stream = training.Stream(clips, net.draw, seed=0)
    total, count = net(*torch.utils.data.default_collate([stream[p] for p in range(4)]))
    mean = total / count
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    assert line["loss"] == pytest.approx(mean.item(), rel=1e-5) and line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


DRIVER = """
    import json, os, sys
    sys.path[:0] = [{main!r}, {tests!r}]
    import torch, train, test_train
    torch.set_num_threads(1)
    for model, sizes in test_train.TINY.items():
        train.MODELS[model].PRESETS["tiny"] = sizes
    show = train.show
    with open(sys.argv[1]) as f:
        runs = json.load(f)
    for port, with_pictures, config in runs:
        os.environ["MASTER_PORT"] = str(port)
        train.show = show if with_pictures else lambda *_: None
        os.chdir(f"{{os.path.dirname(sys.argv[1])}}/machine_{{os.environ['RANK']}}")
        train.train(train.TrainConfig(**config))
"""


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("localhost", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def two_processes(toy, tmp_path_factory):
    """All eight pairs, two steps each, and the runs that are compared with one process, on two gloo processes that each
    train them one after the other (the environment is torchrun's). -> folder of the runs"""
    root = tmp_path_factory.mktemp("two")
    configs = [config(toy, root / f"{m}_{v}", m, v) for m, v in PAIRS]
    configs += [config(toy, root / f"four_{m}", m, "full", steps=4, lr=1e-3, val_every=2) for m in ("masked", "flow")]
    configs += [config(toy, root / "accum", "masked", "full", steps=4, lr=1e-3, accum=2, stop_after=2),
                config(toy, root / "accum", "masked", "full", steps=4, lr=1e-3, accum=2, resume=True)]
    configs += [config(toy, root / f"shard_{m}", m, "full", steps=4, lr=1e-3, shard=True, val_every=2) for m in ("masked", "flow")]
    configs += [config(toy, root / "shard_stop", "flow", "full", steps=4, lr=1e-3, shard=True, stop_after=2),
                config(toy, root / "shard_stop", "flow", "full", steps=4, lr=1e-3, shard=True, resume=True)]
    for rank in range(2):
        shutil.copytree(toy / "dv", root / f"machine_{rank}" / "data")
    apart = dict(variant="full", data="data", steps=4, lr=1e-3, val_every=2)
    configs += [config(toy, "run", stop_after=2, **apart), config(toy, "run", resume=True, **apart)]
    (root / "driver.py").write_text(textwrap.dedent(DRIVER).format(main=MAIN, tests=os.path.dirname(os.path.abspath(__file__))))
    (root / "runs.json").write_text(json.dumps([[p, c.out.endswith("flow_split"), vars(c)] for p, c in zip(free_ports(len(configs)), configs)]))
    own = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", OMP_NUM_THREADS="1")
    jobs = [subprocess.Popen([sys.executable, root / "driver.py", root / "runs.json"], env=dict(own, RANK=str(r), LOCAL_RANK=str(r)),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        out = [job.communicate(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (_, err) in zip(jobs, out):
        assert job.returncode == 0, err[-3000:]
    for rank in range(2):
        (root / f"out_{rank}.txt").write_text(out[rank][0])
        (root / f"err_{rank}.txt").write_text(out[rank][1])
    return root


@pytest.mark.parametrize("model, variant", PAIRS)
def test_every_pair_trains_on_two_processes_and_samples(toy, two_processes, model, variant):
    out = two_processes / f"{model}_{variant}"
    assert [line["step"] for line in log(out)] == [1, 2]
    saved = read(out)
    assert not any(k.startswith("module.") or "_orig_mod" in k for k in [*saved["model"], *saved["ema"]])
    net, saved = sample.load_model(f"{out}/ckpt.pt")
    kind = "dv" if model == "masked" else "cv"
    few = dict(K=1) if model == "masked" else dict(steps=1)
    dreams = sample.dream(net, tok.load_tokenizer(f"{toy}/{kind}.pt"), data.open_clips(f"{toy}/{kind}", "val"), num=1, **few)
    assert dreams["prediction"].shape == (1, 8, 32, 32, 3) and dreams["prediction"].std() > 0
    assert os.path.exists(f"{out}/samples/step_000002.gif") == ((model, variant) == ("flow", "split"))


@both
def test_two_processes_are_one(toy, two_processes, tmp_path, model):
    one = run(toy, tmp_path, model, "full", steps=4, lr=1e-3)
    two = log(two_processes / f"four_{model}")
    np.testing.assert_allclose(losses(one), losses(two), atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in one], [line["grad_norm"] for line in two], rtol=1e-3)


@both
def test_sharded_training_is_the_same(two_processes, model):
    """FSDP2: parameters, gradients and moments divided over the processes; checkpoints are whole all the same."""
    np.testing.assert_allclose(losses(log(two_processes / f"shard_{model}")), losses(log(two_processes / f"four_{model}")), atol=1e-5)
    a, b = read(two_processes / f"shard_{model}"), read(two_processes / f"four_{model}")
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.allclose(v, b[part][k], atol=1e-4) for k, v in a[part].items())


def test_a_sharded_run_resumes(two_processes):
    assert losses(log(two_processes / "shard_stop")) == losses(log(two_processes / "shard_flow"))


def test_two_processes_with_accumulation_and_a_stop_are_one(two_processes):
    np.testing.assert_allclose(losses(log(two_processes / "accum")), losses(log(two_processes / "four_masked")), atol=1e-5)


def test_only_the_first_process_prints(two_processes):
    assert not (two_processes / "out_1.txt").read_text()


def test_torch_warns_of_nothing(two_processes):
    """Of no argument that a later torch will not know, say."""
    said = (two_processes / "err_0.txt").read_text()
    assert "training" in said and not re.findall(r".*Warning.*", said)


# ---- bad input


def test_more_processes_than_gpus_are_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(data.DataError, match="--nproc_per_node=1"):
        training.device_of()


@pytest.mark.parametrize("there, world", [(False, 1), (True, 2)])
def test_apples_gpu_is_one_processs_alone(monkeypatch, there, world):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(data.DataError, match="--device mps"):
        training.device_of("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert training.device_of("mps") == ("mps", torch.device("mps"))
    assert training.device_of()[0] != "mps", "it is nobody's default"


@both
def test_training_on_a_device_that_gloo_does_not_know(toy, tmp_path, monkeypatch, model):
    """As with Apple's GPU: the CPU stands in for it, and no tensor may pass between processes, nor through a GPU's functions."""
    straight = run(toy, tmp_path / "a", model, steps=4, val_every=2)
    monkeypatch.setattr(training, "device_of", lambda asked: (asked, torch.device("cpu")))
    for name in ("all_reduce", "broadcast", "_broadcast_coalesced"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("a tensor for other processes"))
    run(toy, tmp_path / "b", model, steps=4, val_every=2, device="mps", stop_after=2)
    resumed = run(toy, tmp_path / "b", model, steps=4, val_every=2, device="mps", resume=True)
    assert losses(resumed) == losses(straight) and resumed[-1]["val_loss"] == straight[-1]["val_loss"]


def test_another_tokenizer_than_the_datas_is_refused_at_once(toy, tmp_path):
    assert "cv.pt" in ends(training.main, *flags(toy, tmp_path / "x", tokenizer=f"{toy}/cv.pt"))


def test_bad_training_input_is_one_sentence(toy, tmp_path):
    (tmp_path / "empty").mkdir()
    for changes, words in ((dict(data=f"{tmp_path}/nowhere"), ["nowhere"]), (dict(data=f"{tmp_path}/empty"), ["empty"]),
                           (dict(data=f"{toy}/cv"), ["cv", "continuous"]), (dict(data=f"{toy}/raw"), ["raw", "--encode"]),
                           (dict(data=f"{toy}/raw", encode=True, tokenizer=f"{tmp_path}/no.pt"), ["no.pt"]),
                           (dict(batch=5, accum=2), ["--batch 5", "multiple of 2"])):
        sentence = ends(training.main, *flags(toy, tmp_path / "run", **changes))
        assert all(w in sentence for w in words), sentence
    assert os.listdir(tmp_path) == ["empty"] and not os.listdir(tmp_path / "empty"), "nothing is written"


def test_a_missing_tokenizer_is_said_before_training(toy, tmp_path):
    assert "no.pt" in ends(training.main, *flags(toy, tmp_path / "run", tokenizer=f"{tmp_path}/no.pt"))


def test_unknown_preset_and_flags(toy, tmp_path, capsys):
    for argv in (["--preset", "huge"], ["--colour", "red"], ["--variant", "none"]):
        with pytest.raises(SystemExit) as e:
            training.main([*flags(toy, tmp_path / "run"), *argv])
        assert e.value.code != 0 and argv[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(toy, tmp_path, monkeypatch):
    run(toy, tmp_path, steps=4, stop_after=2)
    before = (tmp_path / "ckpt.pt").read_bytes()
    forward = masked_hwm.MaskedHWM.forward
    monkeypatch.setattr(masked_hwm.MaskedHWM, "forward", lambda *a: (forward(*a)[0] * float("nan"), forward(*a)[1]))
    sentence = ends(training.main, *flags(toy, tmp_path, steps=4, resume=True))
    assert "nan" in sentence and "shard 0" in sentence and (tmp_path / "ckpt.pt").read_bytes() == before


def test_raw_data_is_encoded_on_request(toy, tmp_path):
    shutil.copytree(toy / "raw", tmp_path / "raw")
    run(toy, tmp_path / "run", data=f"{tmp_path}/raw", encode=True, tokenizer=f"{toy}/dv.pt")
    clips = data.open_clips(f"{tmp_path}/raw_discrete", "train")
    assert clips.kind == "discrete" and clips.meta["stride"] == 1 and read(tmp_path / "run")["step"] == 2
    os.rename(tmp_path / "raw_discrete", tmp_path / "other")
    run(toy, tmp_path / "run", data=f"{tmp_path}/raw", encode=True, tokenizer=f"{toy}/dv.pt", recolour=not clips.meta.get("recoloured"))
    assert data.open_clips(f"{tmp_path}/raw_discrete", "train").meta.get("recoloured") != clips.meta.get("recoloured")


def test_a_tokenizers_folder_is_as_good_as_its_file(toy, tmp_path):
    """`tokenizer.py train --out DIR` makes it, `data.py encode --tokenizer DIR` takes it."""
    os.makedirs(tmp_path / "tokenizer")
    shutil.copy(f"{toy}/dv.pt", tmp_path / "tokenizer" / "tokenizer.pt")
    data.encode(f"{toy}/raw", f"{tmp_path}/tokenizer", f"{tmp_path}/dv", device="cpu", progress=False)
    a, b = (data.open_clips(f, "val")[0]["video"] for f in (f"{toy}/dv", f"{tmp_path}/dv"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("temporal, spatial", [(4, 8), (8, 16)])
def test_any_tokenizer_that_can_be_trained_can_be_used(toy, tmp_path, temporal, spatial):
    """--temporal_compression 4 gives 3 past and 2 future latents."""
    torch.manual_seed(0)
    c = tok.TokenizerConfig(channels=4, channels_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, latent_channels=4,
                            temporal_compression=temporal, spatial_compression=spatial)
    tok.save_tokenizer(tok.Tokenizer(c), f"{tmp_path}/t.pt")
    data.encode(f"{toy}/raw", f"{tmp_path}/t.pt", f"{tmp_path}/cv", device="cpu", progress=False)
    run(toy, tmp_path / "run", "flow", data=f"{tmp_path}/cv")
    sizes = read(tmp_path / "run")["model_config"]
    assert (sizes["temporal"], sizes["T_p"], sizes["T_f"], sizes["H"]) == (temporal, 1 + 8 // temporal, 8 // temporal, 32 // spatial)


# ---- validation


def validation_loss(toy, out, model, shuffled=False):
    """The loss of all five validation clips by the averaged weights, computed here one clip after the other."""
    net, _ = sample.load_model(f"{out}/ckpt.pt")
    clips, total, n = data.open_clips(config(toy, "", model).data, "val"), 0, 0
    for i in range(len(clips)):
        actions = clips[i]["actions"].clone()
        if shuffled:
            actions[9:] = clips[(i + 2) % 5]["actions"][9:]
        item = clips[i]["video"], actions, net.draw(torch.Generator().manual_seed(i))
        loss, count = net(*torch.utils.data.default_collate([item]))
        total, n = total + loss.item(), n + count.item()
    return total / n


@both
def test_validation_loss_is_that_of_the_averaged_weights(toy, tmp_path, model):
    lines = run(toy, tmp_path, model, steps=4, lr=0.01, val_every=2)
    assert ["val_loss" in line for line in lines] == [False, True, False, True]
    loss = validation_loss(toy, tmp_path, model)
    assert lines[3]["val_loss"] == pytest.approx(loss, rel=1e-5) and lines[3]["val_loss"] != lines[1]["val_loss"]
    share = validation_loss(toy, tmp_path, model, shuffled=True) / loss
    assert lines[3]["action_share"] == pytest.approx(share, rel=1e-5) and share != 1


@both
def test_validation_changes_no_training_loss(toy, tmp_path, model):
    with_, without = (run(toy, tmp_path / str(n), model, steps=5, lr=0.01, val_every=n) for n in (1, -1))
    assert losses(with_) == losses(without)
    assert all("val_loss" in line for line in with_) and not any("val_loss" in line for line in without)
    assert not os.path.exists(tmp_path / "-1" / "ckpt_best.pt")
    a, b = read(tmp_path / "1"), read(tmp_path / "-1")
    for part in ("model", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), "bit for bit"


def test_a_resumed_run_validates_as_if_never_stopped(toy, tmp_path):
    """Its best checkpoint, too: step 1 is the best of a run that gets worse, also if it was stopped after step 2."""
    bad = dict(steps=4, lr=3.0, ema=0.0, warmup=0, val_every=1)
    straight = run(toy, tmp_path / "a", **bad)
    run(toy, tmp_path / "b", **bad, stop_after=2)
    resumed = run(toy, tmp_path / "b", **bad, resume=True)
    same = lambda line: (line["loss"], line["val_loss"], line["action_share"])
    assert list(map(same, resumed)) == list(map(same, straight))
    assert read(tmp_path / "a", "ckpt_best.pt")["step"] == read(tmp_path / "b", "ckpt_best.pt")["step"] < 4


def test_the_best_checkpoint_is_the_lowest(toy, tmp_path, capsys):
    lines = run(toy, tmp_path, steps=6, lr=2.0, ema=0.0, warmup=6, val_every=1)  # the rate rises to the end
    best = min(lines, key=lambda line: line["val_loss"])
    assert best["step"] < 6 and read(tmp_path, "ckpt_best.pt")["step"] == best["step"]
    said = capsys.readouterr().out
    assert f"of step {best['step']}, is better than ckpt.pt" in said and f"{best['val_loss']}, not {lines[-1]['val_loss']}" in said
    assert f"--ckpt {tmp_path}/ckpt_best.pt" in said and not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
    net, saved = sample.load_model(f"{tmp_path}/ckpt_best.pt")
    assert saved["step"] == best["step"] and all(torch.equal(v, saved["ema"][k]) for k, v in net.state_dict().items())
    dreams = sample.dream(net, tok.load_tokenizer(f"{toy}/dv.pt"), sample.validation_clips(saved), num=1, K=1)
    assert dreams["prediction"].shape == (1, 8, 32, 32, 3)


def test_the_last_step_may_be_the_best(toy, tmp_path, capsys):
    run(toy, tmp_path, steps=2, lr=1e-3, val_every=1)
    assert "is the lowest" in capsys.readouterr().out and read(tmp_path, "ckpt_best.pt")["step"] == 2


@pytest.mark.parametrize("memorises", [True, False])
def test_memorising_is_said(toy, tmp_path, capsys, memorises):
    """Two clips are soon known by heart; with twelve and a small rate nothing of the kind happens."""
    folder = f"{toy}/dv"
    if memorises:
        folder = f"{tmp_path}/two"
        shutil.copytree(toy / "dv", folder)
        keep_clips(f"{folder}/train_v2.0", 2)
    lines = run(toy, tmp_path / "run", data=folder, steps=60 if memorises else 12, lr=0.01 if memorises else 1e-4, warmup=5,
                val_every=6 if memorises else 1, ema=0.5)
    said = capsys.readouterr().out
    assert said.count("model is memorising") == memorises, [line.get("val_loss") for line in lines]
    if memorises:
        assert "--stride" in said and "--steps" in said and "--recolour" in said
        assert "2 clips, each seen 120.0 times" in said


def keep_clips(split, n):
    """Cuts a split of one shard down to its first n clips."""
    for file, size in (("videos/video_0.bin", None), ("robot_states/states_0.bin", 17 * n * 25 * 4),
                       ("segment_indices/segment_idx_0.bin", 17 * n * 4)):
        content = open(f"{split}/{file}", "rb").read()
        meta = json.load(open(f"{split}/metadata.json"))
        size = size or len(content) // (meta["num_images"] // 17) * n
        open(f"{split}/{file}", "wb").write(content[:size])
    data.save(f"{split}/metadata/metadata_0.json", {"shard_num_frames": 17 * n, "shard_ind": 0})
    data.save(f"{split}/metadata.json", {**meta, "num_images": 17 * n})


@both
def test_actions_help_a_trained_model(toy, tmp_path, model):
    """Clips whose future is what the actions say: the loss under other actions is higher."""
    folder = config(toy, "", model).data
    shutil.copytree(folder, tmp_path / "data")
    for split in ("train", "val"):
        follow_actions(f"{tmp_path}/data/{split}_v2.0")
    last = run(toy, tmp_path / "run", model, data=f"{tmp_path}/data", steps=60, batch=8, lr=0.01, warmup=5)[-1]
    assert last["action_share"] > 1.1


def follow_actions(split):
    """Clips with constant future: the first state says which of two."""
    clips = data.open_clips(os.path.dirname(split), os.path.basename(split)[:-5])
    n, kind = len(clips), clips.kind
    states = np.fromfile(f"{split}/robot_states/states_0.bin", "<f4").reshape(n, 17, 25)
    which = np.arange(n) % 2
    states[:] = np.where(which, 1, -1)[:, None, None]
    states[:, :9] = 0
    states.tofile(f"{split}/robot_states/states_0.bin")
    dtype = np.int32 if kind == "discrete" else np.float16
    video = np.fromfile(f"{split}/videos/video_0.bin", dtype).reshape(n, *clips.shape)
    future = (slice(None), *[slice(None)] * (len(clips.shape) - 3), 2)
    video[future] = (which * 7).reshape(n, *[1] * (len(clips.shape) - 1)) if kind == "discrete" else (
        np.where(which, 1, -1) * 2).reshape(n, *[1] * (len(clips.shape) - 1))
    video.tofile(f"{split}/videos/video_0.bin")


def test_no_validation_split_is_said_once(toy, tmp_path, capsys):
    shutil.copytree(toy / "dv", tmp_path / "dv")
    shutil.rmtree(tmp_path / "dv" / "val_v2.0")
    lines = run(toy, tmp_path / "run", data=f"{tmp_path}/dv")
    assert capsys.readouterr().out.count("no val split") == 1 and not any("val_loss" in line for line in lines)
    assert not os.path.exists(tmp_path / "run" / "ckpt_best.pt")


def test_what_the_validation_loss_is_set_beside(toy, tmp_path, capsys):
    L = torch.stack([clip["video"] for clip in data.open_clips(f"{toy}/dv", "val")])
    p = (L[:, 2] == L[:, 1]).double().mean().item()
    run(toy, tmp_path / "masked", steps=1)
    said = capsys.readouterr().out
    assert "ln 64 = 4.16" in said and f"{p:.0%} of the ids" in said and f"{-p * np.log(p) - (1 - p) * np.log((1 - p) / 63):.2f}" in said
    run(toy, tmp_path / "flow", "flow", steps=1)
    assert "has 1 at t = 0" in capsys.readouterr().out


def test_validation_clips_unlike_the_training_clips_are_refused(toy, tmp_path):
    shutil.copytree(toy / "dv", tmp_path / "dv")
    shutil.rmtree(tmp_path / "dv" / "val_v2.0")
    shutil.copytree(toy / "cv" / "val_v2.0", tmp_path / "dv" / "val_v2.0")
    assert "one tokenizer" in ends(training.main, *flags(toy, tmp_path / "run", data=f"{tmp_path}/dv"))


def test_both_curves_are_drawn(toy, trained, tmp_path):
    """Orange is in loss.png where log.jsonl has validation losses, and only there."""
    orange = {}
    for name in ("with", "without"):
        os.makedirs(tmp_path / name)
        with open(tmp_path / name / "log.jsonl", "w") as f:
            for step in range(1, 30):
                line = {"step": step, "loss": 1 / step, **({"val_loss": 0.5 + 1 / step} if name == "with" and step % 5 == 0 else {})}
                print(json.dumps(line), file=f)
        sample.save_curve(str(tmp_path / name))
        pixels = np.asarray(Image.open(tmp_path / name / "loss.png")).astype(int)
        orange[name] = int(((pixels[..., 0] > 200) & (pixels[..., 2] < 60)).sum())
    assert orange["with"] > 300 and orange["without"] == 0


def test_two_processes_validate_as_one(toy, two_processes, tmp_path):
    """Five clips on two processes, also sharded: one of them takes a clip that does not count."""
    for model in ("masked", "flow"):
        one = run(toy, tmp_path / model, model, "full", steps=4, lr=1e-3, val_every=2)
        for two in (log(two_processes / f"four_{model}"), log(two_processes / f"shard_{model}")):
            for key in ("val_loss", "action_share"):
                np.testing.assert_allclose([line[key] for line in one[1::2]], [line[key] for line in two[1::2]], rtol=1e-5)
        assert read(two_processes / f"shard_{model}", "ckpt_best.pt")["step"] == 4


# ---- number types, options, machines


def test_the_number_type_is_the_faster_one_of_the_models_block():
    """A block that is slow in one type is timed forward and back, on its own inputs, and left as it was."""
    class Block(torch.nn.Module):
        def __init__(self, slow):
            super().__init__()
            self.linear, self.slow, self.seen = torch.nn.Linear(4, 4), slow, []

        def forward(self, x, extra):
            y = self.linear(x) * extra
            self.seen.append((str(y.dtype), x.requires_grad))
            if str(y.dtype) == f"torch.{self.slow}":
                time.sleep(0.02)
            return y

    for slow, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        block = Block(slow)
        assert speed.faster_dtype(block, torch.ones(2, 3, 4), torch.ones((), dtype=torch.bfloat16)) == other
        assert {dtype for dtype, _ in block.seen} == {"torch.float32", "torch.bfloat16"} and all(g for _, g in block.seen)


@both
def test_auto_times_a_copy_of_the_first_block_on_the_first_micro_batch(toy, tmp_path, monkeypatch, model):
    given = []
    monkeypatch.setattr(speed, "faster_dtype", lambda block, *inputs, training: given.append((block, inputs)) or "float32")
    auto = run(toy, tmp_path / "a", model, dtype="auto", accum=2)
    ((block, inputs),) = given
    assert inputs[0].shape[0] == 2 and inputs[0].shape[2] == 24  # half of the batch, width 24
    assert type(block) is type(MODELS[model].Model(MODELS[model].Config(**read(tmp_path / "a")["model_config"])).blocks[0])
    assert losses(auto) == losses(run(toy, tmp_path / "b", model, accum=2)) and read(tmp_path / "a")["config"]["dtype"] == "float32"


def test_a_gpu_without_bfloat16_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert speed.faster_dtype(None, SimpleNamespace(is_cuda=True)) == "float32" and "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("model, options, word", [("flow", dict(p_drop=2.0), "--p_drop 2.0"), ("masked", dict(rho_max=-1.0), "--rho_max -1.0"),
                                                  ("flow", dict(time_width=63), "--time_width 63"), ("masked", dict(width=36), "--width 36"),
                                                  ("flow", dict(patch=5), "--patch 5"), ("flow", dict(drop="none"), "--drop none")])
def test_options_that_make_no_sense_are_refused_before_any_work(tmp_path, monkeypatch, model, options, word):
    """Without --data: the built-in robot would be drawn first."""
    monkeypatch.setattr(training, "prepare_data", lambda *_: pytest.fail("it began to work"))
    c = TrainConfig(model=model, variant="full", preset="tiny", out=f"{tmp_path}/run", options=options)
    with pytest.raises(data.DataError) as e:
        training.train(c)
    assert str(e.value).startswith(word) and not os.listdir(tmp_path)


def test_compiled_blocks_cannot_store_products_only(toy, tmp_path, monkeypatch):
    sentence = ends(training.main, *flags(toy, tmp_path / "run", compile=True, checkpoint_activations="products"))
    assert "--compile" in sentence and "--checkpoint_activations inputs" in sentence and not os.listdir(tmp_path)
    c = config(toy, "x", preset="paper", compile=True)  # a default of the paper preset on a CPU gives way
    training.settle(c, lambda *_: None)
    assert c.checkpoint_activations == "inputs"


def test_pictures_of_a_model_that_cannot_be_guided(toy, tmp_path, pictures):
    run(toy, tmp_path, "flow", steps=1, options=dict(p_drop=0.0))
    assert os.listdir(tmp_path / "samples")


def test_an_epoch_count_is_said_first(toy, tmp_path, capsys):
    run(toy, tmp_path, steps=3, batch=8, accum=2)
    assert "12 clips, each seen 2.0 times" in capsys.readouterr().out


def test_only_the_first_machine_holds_the_run(toy, two_processes):
    """Two processes in folders of their own, as on two machines, each with its own copy of the data. The second never
    has OUT, and goes on all the same; its data must be the first one's."""
    assert losses(log(two_processes / "machine_0" / "run")) == losses(log(two_processes / "four_masked"))
    assert os.listdir(two_processes / "machine_1") == ["data"]


def test_other_data_on_another_machine_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "from_rank_0", lambda x: "another" if isinstance(x, str) and len(x) == 64 else x)
    assert "first machine" in ends(training.main, *flags(toy, tmp_path / "run"))
