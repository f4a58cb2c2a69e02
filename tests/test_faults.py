"""Faults, injected for real: killed processes, full disks, broken shards. What a run loses is at most the steps since its last
checkpoint, and what it logs in the end is what the undisturbed run logs, number for number.

    python tests/test_faults.py 20      # not a test: 20 kills at random moments of a two-process run, and a table
"""
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

TESTS = os.path.dirname(os.path.abspath(__file__))
MAIN = os.path.dirname(TESTS)
STEPS, SAVE = 24, 4

# train.py with a toy model, and slow enough to be hit while it runs
WRAPPER = """
import sys, time
sys.path[:0] = [{main!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import masked_hwm, train
from conftest import TOY_PRESET
masked_hwm.PRESETS["tiny"] = dict(TOY_PRESET, vocab_size=64)
train.show = lambda *_: None
rate = train.learning_rate
train.learning_rate = lambda config, step: time.sleep({pause}) or rate(config, step)
train.main()
"""


class Runs:
    """Starts two-process runs over one data folder."""

    def __init__(self, data, root, pause=0.08):
        self.data, self.root = data, str(root)
        os.makedirs(self.root, exist_ok=True)
        with open(f"{root}/wrapper.py", "w") as f:
            f.write(textwrap.dedent(WRAPPER).format(main=MAIN, tests=TESTS, pause=pause))

    def start(self, name, *more, restarts=0, processes=2):
        argv = ["--model", "masked", "--variant", "base", "--preset", "tiny", "--data", self.data, "--out", f"{self.root}/{name}",
                "--steps", STEPS, "--batch", 4, "--warmup", 1, "--dtype", "float32", "--log_every", 1, "--save_every", SAVE,
                "--sample_every", 0, *more]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
                  f"--max_restarts={restarts}", "--monitor_interval", "0.2"] if processes > 1 else [sys.executable]
        self.err = open(f"{self.root}/err.txt", "w")
        return subprocess.Popen([*launch, f"{self.root}/wrapper.py", *map(str, argv)], stdout=self.err, stderr=subprocess.STDOUT,
                                start_new_session=True, env=dict(os.environ, OMP_NUM_THREADS="1"))

    def finish(self, job, limit=120):
        """Waits for the end; nothing is left running. -> exit status"""
        try:
            return job.wait(limit)
        finally:
            for pid in [*workers(job.pid), job.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def log(self, name):
        file = f"{self.root}/{name}/log.jsonl"
        if not os.path.exists(file):
            return []
        with open(file) as f:
            return [json.loads(line) for line in f if line.endswith("\n")]

    def until(self, name, step, job, limit=90):
        """Waits until the log has reached a step."""
        end = time.time() + limit
        while not any(line["step"] >= step for line in self.log(name)):
            assert time.time() < end and job.poll() is None, open(f"{self.root}/err.txt").read()[-3000:]
            time.sleep(0.02)

    def said(self):
        with open(f"{self.root}/err.txt") as f:
            return f.read()


def workers(parent):
    """Process ids of the direct children."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(stat) as f:
                pid, rest = f.read().split(" ", 1)
            if int(rest.rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return sorted(found)


def course(lines):
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    return Runs(f"{toy}/dv", tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def straight(runs):
    """What the undisturbed two-process run logs."""
    assert runs.finish(runs.start("straight")) == 0, runs.said()[-3000:]
    return course(runs.log("straight"))


def test_a_killed_rank_ends_the_other_and_resumes(runs, straight):
    job = runs.start("rank")
    runs.until("rank", 6, job)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    hit = time.time()
    assert runs.finish(job, 60) != 0 and time.time() - hit < 60
    assert torch.load(f"{runs.root}/rank/ckpt.pt", weights_only=True)["step"] >= SAVE
    assert runs.finish(runs.start("rank", "--resume")) == 0
    assert course(runs.log("rank")) == straight


def test_torchrun_begins_again_from_the_checkpoint(runs, straight):
    job = runs.start("restart", restarts=1)
    runs.until("restart", 2 * SAVE + 1, job)  # the checkpoint after the first has waited for it
    os.kill(workers(job.pid)[0], signal.SIGKILL)
    assert runs.finish(job) == 0 and "resuming" in runs.said()
    assert course(runs.log("restart")) == straight
    assert not os.path.exists(f"{runs.root}/restart.1"), "the first attempt's folder was moved away"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_loses_no_step(runs, straight, number):
    name = number.name
    job = runs.start(name)
    runs.until(name, 6, job)
    os.kill(job.pid, number)
    runs.finish(job, 60)
    done = runs.log(name)[-1]["step"]
    assert 6 <= done < STEPS and torch.load(f"{runs.root}/{name}/ckpt.pt", weights_only=True)["step"] == done
    assert runs.finish(runs.start(name, "--resume")) == 0
    assert course(runs.log(name)) == straight


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_with_data_workers(runs, straight, processes):
    """Ctrl-C in a terminal reaches every process of the group, those that load data too: the step is saved all the same."""
    name = f"ctrl_c_{processes}"
    job = runs.start(name, "--workers", 2, processes=processes)
    runs.until(name, 6, job)
    os.killpg(job.pid, signal.SIGINT)
    runs.finish(job, 60)
    done = runs.log(name)[-1]["step"]
    assert 6 <= done < STEPS and torch.load(f"{runs.root}/{name}/ckpt.pt", weights_only=True)["step"] == done
    assert "DataLoader worker" not in runs.said()
    assert runs.finish(runs.start(name, "--resume", processes=processes)) == 0
    np.testing.assert_allclose(np.array(course(runs.log(name))), np.array(straight), rtol=1e-4)


def test_two_processes_resume_on_one(runs, straight):
    """The data order is a function of the position, not of the process: only the order of sums differs."""
    assert runs.finish(runs.start("fewer", "--stop_after", 6)) == 0
    assert runs.finish(runs.start("fewer", "--resume", processes=1)) == 0
    np.testing.assert_allclose(np.array(course(runs.log("fewer"))), np.array(straight), rtol=1e-4)


def test_a_full_disk_keeps_the_last_checkpoint(toy, tmp_path, runs):
    """No file may grow beyond 64 kB: the checkpoint, of some 200 kB, cannot be written."""
    once = Runs(f"{toy}/dv", tmp_path, pause=0)
    assert once.finish(once.start("full", "--stop_after", 3, processes=1)) == 0
    before = (tmp_path / "full" / "ckpt.pt").read_bytes()
    assert len(before) > 65536
    job = subprocess.run([sys.executable, tmp_path / "wrapper.py", "--model", "masked", "--variant", "base", "--preset", "tiny",
                          "--data", f"{toy}/dv", "--out", tmp_path / "full", "--steps", str(STEPS), "--batch", "4", "--warmup", "1",
                          "--dtype", "float32", "--log_every", "1", "--save_every", str(SAVE), "--sample_every", "0", "--resume"],
                         capture_output=True, text=True, timeout=120,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)))
    assert job.returncode == 1 and "Traceback" not in job.stderr, job.stderr[-2000:]
    assert "ckpt.pt" in job.stderr and "written" in job.stderr
    assert (tmp_path / "full" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "full").glob("*.tmp"))


def test_a_broken_shard_in_the_middle_is_named_with_its_clip(toy, tmp_path):
    shutil.copytree(f"{toy}/dv", tmp_path / "dv")
    file = tmp_path / "dv" / "train_v2.0" / "videos" / "video_0.bin"
    ids = np.memmap(file, "<i4", "r+").reshape(-1, 3, 4, 4)
    ids[5, 1] = 9999  # neither the first nor the last clip, which are read when the folder is opened
    ids.flush()
    once = Runs(str(tmp_path / "dv"), tmp_path, pause=0)
    assert once.finish(once.start("broken", processes=1)) == 1
    said = once.said()
    assert "video_0.bin" in said and "clip 5" in said and "Traceback" not in said, said[-2000:]


# ---- many kills, by hand


def torture(kills):
    """Kills a two-process run at random moments in random ways, resuming each time; the losses must be the undisturbed run's."""
    import tempfile
    import conftest
    from types import SimpleNamespace
    import pathlib
    root = pathlib.Path(tempfile.mkdtemp())
    toy = conftest.toy.__wrapped__(SimpleNamespace(mktemp=lambda name: root)) if hasattr(conftest.toy, "__wrapped__") else (
        conftest.toy._fixture_function(SimpleNamespace(mktemp=lambda name: root)))
    runs, rng = Runs(f"{toy}/dv", root / "runs", pause=0.05), random.Random(0)
    steps = ["--steps", 40 * kills]  # argparse keeps the last of a flag
    assert runs.finish(runs.start("straight", *steps), 3000) == 0, runs.said()[-2000:]
    straight, table, lost = course(runs.log("straight")), [], []
    job = runs.start("hit", *steps)
    for kill in range(kills):
        begun = len(runs.log("hit"))
        runs.until("hit", max((line["step"] for line in runs.log("hit")), default=0) + 1, job)
        time.sleep(rng.uniform(0, 3))
        if job.poll() is not None:
            break
        how = rng.choice(["rank 0", "rank 1", "all", "torchrun asked (SIGTERM)"])
        targets = {"rank 0": workers(job.pid)[:1], "rank 1": workers(job.pid)[1:], "all": [*workers(job.pid), job.pid],
                   "torchrun asked (SIGTERM)": [job.pid]}[how]
        for pid in targets:
            try:
                os.kill(pid, signal.SIGTERM if "asked" in how else signal.SIGKILL)
            except ProcessLookupError:
                pass
        start = time.time()
        runs.finish(job, 90)
        ended, at = time.time() - start, max(line["step"] for line in runs.log("hit"))
        saved = [f for f in ("ckpt.pt", "ckpt_previous.pt") if os.path.exists(f"{runs.root}/hit/{f}")]
        kept = torch.load(f"{runs.root}/hit/{saved[0]}", weights_only=True)["step"] if saved else 0
        lost.append(at - kept)
        table.append((how, at, kept, ended))
        print(f"kill {kill + 1:2d}: {how:26s} at step {at:4d}, checkpoint of step {kept:4d}, ended after {ended:4.1f} s", flush=True)
        job = runs.start("hit", *steps, *(["--resume"] if saved else []))
    assert runs.finish(job, 3000) == 0, runs.said()[-2000:]
    same = course(runs.log("hit")) == straight
    print(f"{len(table)} kills, at most {max(lost)} steps lost (a checkpoint every {SAVE}), final losses of {len(straight)} steps "
          f"{'equal' if same else 'DIFFER FROM'} those of the undisturbed run")
    shutil.rmtree(root)
    sys.exit(not same)


if __name__ == "__main__":
    sys.path[:0] = [MAIN, TESTS]
    torture(int(sys.argv[1]))
