"""Every command of the README is run, at toy size, in the order in which it stands there: none can rot unnoticed."""
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

MAIN = pathlib.Path(__file__).parent.parent
STARTS = ("pip ", "python ", "torchrun ", "pytest ", "hf ")
DOWNLOADS = {"1x-technologies/worldmodel", "1x-technologies/worldmodel_raw_data", "nvidia/Cosmos-0.1-Tokenizer-DV8x8x8",
             "nvidia/Cosmos-0.1-Tokenizer-CV8x16x16"}
TOY = {  # what is added to a command; argparse takes the last of a flag that is given twice
    "train.py": "--preset tiny --steps 2 --batch 4 --warmup 1 --frames 340 --log_every 1",
    "sample.py": "--num 2",
    "evaluate.py": "--num 2 --no_fid --rollout 0",
    "data.py synth": "--frames 340",
    "data.py encode": "--size 32",
    "tokenizer.py train": "--steps 2 --batch 2 --eval_every 2",
    "tokenizer.py check": "--num 2",
    "tests/tables.py": "--only masked:base --steps 2 --num 4 --inception random --frames 340 --batch 4",
    "tests/bench.py": "--preset tiny --batch 1 --repeat 1 --frame_size 32",
}


def commands():
    """Commands of the README in the order to be run in: the indented lines, then those within `...` in tables and text, of
    which some need what the lines have made. `torchrun --max-restarts` and the like are words, not commands."""
    lines = (MAIN / "README.md").read_text().splitlines()
    found = [line.strip() for line in lines if line.startswith("    ")]
    found += [piece for line in lines if not line.startswith("    ") for piece in re.findall(r"`([^`]+)`", line)]
    found = [re.sub(r"\s+#.*", "", command) for command in found]
    return list(dict.fromkeys(c for c in found if c.startswith(STARTS) and (".py" in c or not c.startswith(("python", "torchrun")))
                              or c.startswith("python -m")))


COMMANDS = commands()


@pytest.fixture(scope="module")
def clone(toy, tmp_path_factory):
    """A copy of the repository as a user has it, and beside it small stand-ins for what cannot be downloaded here."""
    root = tmp_path_factory.mktemp("clone") / "hwm"
    shutil.copytree(MAIN, root, ignore=shutil.ignore_patterns(".git", "data", "out", "__pycache__", ".pytest_cache"))
    for name, source in (("1x", "dv"), ("1x_raw", "raw")):
        shutil.copytree(toy / source, root / name)
    for name, source in (("Cosmos-0.1-Tokenizer-DV8x8x8", "dv.pt"), ("Cosmos-0.1-Tokenizer-CV8x16x16", "cv.pt")):
        os.makedirs(root / name)
        shutil.copy(toy / source, root / name / "tokenizer.pt")
    return root


def small(words):
    """The words of a command, with what makes it small."""
    program = next(w for w in words if w.endswith(".py"))
    name = program if program in TOY else f"{program} {words[words.index(program) + 1]}" if len(words) > words.index(program) + 1 else program
    extra = shlex.split(TOY.get(name, ""))
    if "--export" in words or "--sizes" in words:
        extra = []
    if program == "evaluate.py" and "--plan" in words:
        extra = ["--episodes", "1"]
    if "--nnodes=2" in words:  # one node stands for two
        words = [w.replace("=8", "=2") for w in words if not w.startswith(("--nnodes", "--rdzv"))]
    return words + extra


def test_the_readme_has_its_commands():
    assert len(COMMANDS) > 15
    assert any(c.startswith("pip install -r requirements.txt && torchrun") for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(clone, command, monkeypatch, capfd):
    monkeypatch.chdir(clone)
    if command.startswith("pip install "):
        assert command.startswith(("pip install -r requirements.txt", "pip install av", "pip install huggingface_hub")), "pip may only install what is listed"
        command = command.partition(" && ")[2]
        if not command:
            return
    words = shlex.split(command)
    if "--play" in words:
        pytest.skip("a game has no end: tests/test_play.py plays it")
    if words[0] == "hf":
        assert words[1] == "download" and words[2] in DOWNLOADS
        return
    if words[:3] == ["python", "-m", "pytest"]:
        assert subprocess.run([sys.executable, *words[1:], "--collect-only"], capture_output=True, timeout=100).returncode == 0
    elif words[0] == "pytest":
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "1 failed" in done.stdout, "an exercise fails until it is solved"
    elif words[0] == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *small(words[1:])]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", small(words[1:]))
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as e:
            assert not e.code, e.code
