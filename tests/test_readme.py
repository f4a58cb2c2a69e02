"""Every command of README, RESULTS and CONTRIBUTING is run, at toy size, in the order in which it stands there; and what they
show is there: pictures, files, anchors, the code of lesson 3."""
import argparse
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
PAGES = ("README.md", "tests/RESULTS.md", "CONTRIBUTING.md")
STARTS = ("pip ", "python ", "torchrun ", "pytest ", "hf ")
DOWNLOADS = {"1x-technologies/worldmodel", "1x-technologies/worldmodel_raw_data", "nvidia/Cosmos-0.1-Tokenizer-DV8x8x8",
             "nvidia/Cosmos-0.1-Tokenizer-CV8x16x16", "unitreerobotics/G1_Dex3_PickApple_Dataset"}
TOY = {  # what is added to a command; argparse takes the last of a flag that is given twice
    "train.py": "--preset tiny --steps 2 --batch 4 --warmup 1 --frames 340 --log_every 1",
    "sample.py": "--num 2 --rollout 2",
    "evaluate.py": "--num 2 --no_fid --rollout 0",
    "evaluate.py --plan": "--episodes 2",
    "data.py synth": "--frames 340",
    "data.py encode": "--size 32 --stride 17",
    "tokenizer.py train": "--steps 2 --batch 2 --eval_every 2",
    "tests/tables.py": "--only masked:base --steps 2 --num 4 --inception random --frames 340 --batch 4",
    "tests/bench.py": "--preset tiny --batch 1 --repeats 1 --dtype float32",
    "assets/draw.py": "clock",
}
FREE = {"--steps", "--num", "--frames", "--seed", "--out", "--json", "--inception", "--rollout", "--batch"}  # numbers and files


def commands():
    """Commands of the pages in the order to be run in: of each page the indented lines, then those within `...` in tables and
    text, of which some need what the lines have made. `torchrun --max-restarts` and the like are words, not commands."""
    found = []
    for page in PAGES:
        text = (MAIN / page).read_text().replace("\\\n", " ")
        lines = text.splitlines()
        found += [line.strip() for line in lines if line.startswith("    ")]
        found += [piece for line in lines if not line.startswith("    ") for piece in re.findall(r"`([^`]+)`", line)]
    found = [re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", command)) for command in found]
    found = [c for c in found if c.startswith(STARTS) and (".py" in c or not c.startswith(("python", "torchrun", "pytest")))
             or c.startswith("python -m pytest")]
    for i, command in enumerate(found):
        if command.startswith("pip install ") and " && " in command:
            found[i : i + 1] = command.split(" && ")
    return list(dict.fromkeys(found))


def kind_of(words):
    """What TOY calls a command: its program, and the word that says which of its commands."""
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for more in [*words[program + 1 : program + 2], "--plan"]:
        if more in words and f"{words[program]} {more}" in TOY:
            return f"{words[program]} {more}"
    return words[program]


def shape(command):
    """What two commands share that differ in numbers and files alone."""
    words = shlex.split(command)
    kept = [word for flag, word in zip(["", *words], words) if flag not in FREE and word not in FREE]
    family = [] if "--plan" in words else re.findall("masked|flow", command)
    program = words.index(next(word for word in words if word.endswith(".py")))
    about = [*words[: program + 1], *(word for word in words[program + 1 : program + 2] if word[0] != "-")]
    return tuple(about), tuple(sorted(word for word in kept if word.startswith("--"))), tuple(sorted({*family}))


COMMANDS = commands()
PARSED, shapes = set(), {}  # commands whose flags alone are looked at: of the same shape as one that is run, or slow
for c in COMMANDS:
    is_slow = c.startswith(("python tests/bench.py", "python tests/tables.py")) and re.search("--defaults|bench.py$|--part (?!one)|flow|checkpoint", c)
    if is_slow or ".py" in c and shapes.setdefault(shape(c), c) != c:
        PARSED.add(c)


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
    if {"--export", "--sizes", "--help"} & set(words):
        return words
    return words + shlex.split(TOY.get(kind_of(words), ""))


def test_the_pages_have_their_commands():
    assert len(COMMANDS) > 30
    assert "torchrun --nproc_per_node=2 train.py --model flow --variant full" in COMMANDS
    assert len(PARSED) < len(COMMANDS) / 2


def test_no_number_is_missing():
    for page in PAGES:
        assert "{{" not in (MAIN / page).read_text(), f"{page} waits for a number"


def test_what_the_pages_show_is_there():
    for page in PAGES:
        text = (MAIN / page).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", text):
            file = (MAIN / page).parent / link[0] if link[0] else MAIN / page
            assert file.exists(), f"{page} names {link[0]}"
            if link[1]:
                headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
                assert link[1][1:] in [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
    for picture in (MAIN / "assets").glob("*.png"):
        assert picture.stat().st_size < 60_000, f"{picture.name} is too large for a README"


def test_the_readme_is_a_lesson():
    lines = (MAIN / "README.md").read_text().splitlines()
    assert len(lines) < 300
    assert not [line for line in lines if len(line) > 110 and not line.startswith(("|", "$$"))], "lines to 110 columns"
    code = re.findall(r"(?s)```python\n(.*?)```", (MAIN / "README.md").read_text())
    own = [line.strip() for line in (MAIN / "flow_hwm.py").read_text().splitlines()]
    assert code and all(line.strip() in own for block in code for line in block.splitlines()), "lesson 3 is flow_hwm.py's code"


@pytest.mark.parametrize("command", COMMANDS)
def test_command(clone, command, monkeypatch, capfd):
    monkeypatch.chdir(clone)
    words = shlex.split(command)
    if words[0] == "pip":
        allowed = {"-r", "requirements.txt", "av", "pyarrow", "selenium", "huggingface_hub"}
        assert words[1] == "install" and set(words[2:]) <= allowed, "pip may only install what is listed"
        return
    if words[0] == "hf":
        assert words[1] == "download" and words[2] in DOWNLOADS
        return
    if "--play" in words:
        pytest.skip("a game has no end: tests/test_play.py plays it")
    if "g1" in words and not os.path.exists("g1"):
        test_lerobot = pytest.importorskip("test_lerobot")
        test_lerobot.lerobot("g1", "v3.0", 29, cameras=["observation.images.cam_right_high", "observation.images.cam_left_high"])
    if command in PARSED:
        only_parse(monkeypatch)
        words = ["python", *words[words.index(next(w for w in words if w.endswith(".py"))) :]]
    if words[:3] == ["python", "-m", "pytest"]:
        assert subprocess.run([sys.executable, *words[1:], "--collect-only"], capture_output=True, timeout=100).returncode == 0
    elif words[0] == "pytest":
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "1 failed" in done.stdout, "an exercise fails until it is solved"
    elif words[0] == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *small(words[1:])]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=400, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", words[1:] if command in PARSED else small(words[1:]))
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as e:
            assert not e.code, e.code


def only_parse(monkeypatch):
    """From here on a program ends as soon as it has understood its command line."""
    parse = argparse.ArgumentParser.parse_known_args

    def then_end(parser, args=None, namespace=None):
        known, rest = parse(parser, args, namespace)
        if parser.add_help:  # not the first of evaluate.py's two parsers
            assert not rest or parser.prog == "tables.py", f"{parser.prog} does not know {rest}"
            raise SystemExit(0)
        return known, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", then_end)
