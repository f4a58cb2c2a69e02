"""The tables of RESULTS.md: all eight models under one budget, one evaluator; and the defaults, each measured.

    python tests/tables.py                            # trains and scores what is missing under out/tables, then prints
    python tests/tables.py --steps 300 --num 32       # a quicker look
    python tests/tables.py --defaults                 # the settings that the paper leaves open

Every cell is one of its commands; this file only runs them one after the other, skips what is there already, and
writes the results as Markdown. About six minutes a model on two cores. Other flags, as --batch 4, are passed on to train.py.
"""
import argparse
import json
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from blocks import VARIANTS
from evaluate import choose_clips, speed
from flow_hwm import TRAINING
from sample import load_model, load_tokenizer_for, settings_of, validation_clips

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


TRAIN = []  # flags that this file does not know go to train.py


def run(*argv):
    print("$", " ".join(str(a).replace(sys.executable, "python") for a in argv), flush=True)
    subprocess.run([str(a) for a in argv], check=True, cwd=HERE)


def trained(out, model, variant, *flags):
    """The checkpoint of a run, which is made, or finished, if need be."""
    ckpt = f"{out}/ckpt.pt"
    if not os.path.exists(f"{out}/done"):
        resume = ["--resume"] if os.path.exists(ckpt) else []
        run(*TORCHRUN, f"{HERE}/train.py", "--model", model, "--variant", variant, "--out", out, "--sample_every", 0,
            *flags, *TRAIN, *resume)
        open(f"{out}/done", "w").close()
    return ckpt


def scored(ckpt, file, num, *flags):
    if not os.path.exists(file):
        run(*PYTHON, "evaluate.py", "--ckpt", ckpt, "--num", num, "--rollout", 0, "--json", file, *flags)
    with open(file) as f:
        return json.load(f)


def peak_of(out):
    """GB of a training process, from the run's log."""
    with open(f"{out}/log.jsonl") as f:
        return json.loads(f.readlines()[-1])["peak_gb"]


def interval(pair):
    """Half the width of a 95 % interval, which fewer than eight clips do not have."""
    return "" if pair is None else f"± {(pair[1] - pair[0]) / 2:.2f}"


def speeds(ckpts):
    """Samples per second of each checkpoint: all in this process, three rounds in turn, the best of each."""
    best = [0.0] * len(ckpts)
    for _ in range(3):
        for i, ckpt in enumerate(ckpts):
            model, saved = load_model(ckpt)
            clips, settings = validation_clips(saved), settings_of(saved)
            rate, _ = speed(model, load_tokenizer_for(saved["tokenizer"]), clips, choose_clips(clips, 8), **settings)
            best[i] = max(best[i], rate)
    return best


def eight(args):
    steps = ["--steps", args.steps] if args.steps else []
    columns = []
    for model in ("masked", "flow"):
        for variant in VARIANTS:
            if args.only and f"{model}:{variant}" not in args.only.split(","):
                continue
            out = f"{args.out}/{model}_{variant}"
            ckpt = trained(out, model, variant, *steps)
            columns.append((model, variant, scored(ckpt, f"{out}/scores.json", args.num, *args.inception), peak_of(out)))
    for column, rate in zip(columns, speeds([f"{args.out}/{m}_{v}/ckpt.pt" for m, v, *_ in columns])):
        column[2]["samples_per_s"] = rate  # timings are compared in one run
    rows = [
        ("parameters, M", lambda s, _: f"{s['params'] / 1e6:.2f}"),
        ("peak GB in training (a process), sampling", lambda s, gb: f"{gb:.2f}, {s['peak_gb']:.2f}"),
        ("samples/s", lambda s, _: f"{s['samples_per_s']:.1f}"),
        ("distance of " + ("Inception features (FID)" if columns[0][2]["fid_features"] == "inception" else
                           "random Inception features (not FID)") + f", N = {columns[0][2]['fid_frames']}",
         lambda s, _: f"{s['fid']:.4f}"),
        ("the same: copy-last; real against real", lambda s, _: f"{s['fid_copy_last']:.4f}; {s['fid_floor']:.4f}"),
        ("PSNR, dB", lambda s, _: f"**{s['psnr']:.2f}** {interval(s['psnr_ci'])}"),
        ("copy the last frame", lambda s, _: f"{s['psnr_copy_last']:.2f}"),
        ("gain over it", lambda s, _: f"{s['gain_psnr']:.2f} {interval(s['gain_psnr_ci'])}"),
        ("delta_psnr: true against another clip's actions", lambda s, _: f"**{s['delta_psnr']:.2f}** {interval(s['delta_psnr_ci'])}"),
        ("against raw frames; the tokenizer's ceiling", lambda s, _: f"{s['psnr_raw']:.2f}; {s['psnr_ceiling']:.2f}"),
        ("cross-entropy, nats (of ln vocabulary)",
         lambda s, _: f"{s['cross_entropy']:.2f} ({s['ln_vocab']:.2f})" if "cross_entropy" in s else "-"),
        ("token accuracy; copy-last's",
         lambda s, _: f"{s['token_accuracy']:.3f}; {s['copy_last_token_accuracy']:.3f}" if "token_accuracy" in s else "-"),
        ("velocity error at t = 0.05, 0.55, 0.95",
         lambda s, _: " ".join(f"{s['velocity_error'][i]:.2f}" for i in (0, 5, 9)) if "velocity_error" in s else "-"),
    ]
    lines = ["| | " + " | ".join(name for name, _ in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {m} {v} | " + " | ".join(f(*scores) for _, f in rows) + " |" for m, v, *scores in columns]
    return "\n".join(lines)


def defaults(args):
    """One line a choice: what was compared, under which budget, the numbers, which became the default."""
    steps = ["--steps", args.steps] if args.steps else []
    base = {m: trained(f"{args.out}/{m}_{v}", m, v, *steps) for m, v in (("masked", "base"), ("flow", "full"))}
    lines = ["| choice | setting | PSNR | delta_psnr | distance |", "|---|---|---|---|---|"]

    reference = {"masked": ["--steps", 2, "--order", "random", "--no-mean", "--temperature", 0.5],  # every line differs in one thing
                 "flow": ["--steps", 5, "--method", "euler", "--cfg", 1]}

    def line(choice, setting, ckpt, *flags):
        flags = [*reference["flow" if choice.startswith("flow") else "masked"], *flags]  # the last one counts
        name = re.sub(r"[^a-z0-9.]+", "_", f"{choice}_{setting}".lower())
        s = scored(ckpt, f"{os.path.dirname(ckpt)}/{name}.json", args.num, *args.inception, *flags)
        lines.append(f"| {choice} | {setting} | {s['psnr']:.2f} | {s['delta_psnr']:.2f} | {s['fid']:.4f} |")

    for weights in ("ema", "last"):
        for m in base:
            line(f"{m}: weights", weights, base[m], "--weights", weights)
    for method, counts in (("euler", (1, 2, 5, 10, 20)), ("midpoint", (1, 5, 10))):
        for steps in counts:
            line("flow: solver", f"{method}, {steps} steps", base["flow"], "--steps", steps, "--method", method)
    for cfg in (1.0, 1.5, 2.0, 3.0):
        line("flow: guidance, both dropped", cfg, base["flow"], "--cfg", cfg)
    for order in ("random", "confidence"):
        for K in (1, 2, 4, 8):
            line("masked: order, K", f"{order}, {K}", base["masked"], "--order", order, "--steps", K)
    for T in (0.0, 0.5, 1.0):
        line("masked: temperature", T, base["masked"], "--temperature", T)
    options = ("", "--t_sampling=logit-normal", "--drop=actions", "--drop=past", "--p_drop=0")  # a training for each, all alike
    for option in options if args.option_steps else ():
        if not option and args.option_steps == (args.steps or TRAINING["tiny"]["steps"]):
            continue  # that is the model of the lines above
        ckpt = trained(f"{args.out}/option_{option.strip('-') or 'none'}", "flow", "full", "--steps", args.option_steps,
                       *option.split())
        for cfg in (1.0,) if option.startswith(("--t_", "--p_")) else (1.0, 1.5, 2.0):
            line(f"flow, {args.option_steps} steps: {option or 'as it is'}", f"guidance {cfg}", ckpt, "--cfg", cfg)
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/tables")
    p.add_argument("--steps", type=int, default=0, help="of training, for every model; default: the preset's")
    p.add_argument("--option_steps", type=int, default=2000,
                   help="of training, for the choices that need a training of their own; 0: leave these out")
    p.add_argument("--num", type=int, default=64, help="validation clips")
    p.add_argument("--only", default="", help="some of the eight, as in masked:base,flow:full")
    p.add_argument("--inception", default="", help="as of evaluate.py")
    p.add_argument("--defaults", action="store_true", help="the table of defaults in place of that of the eight models")
    args, TRAIN[:] = p.parse_known_args()
    args.inception = ["--inception", args.inception] if args.inception else []
    text = (defaults if args.defaults else eight)(args)
    os.makedirs(f"{HERE}/{args.out}", exist_ok=True)
    with open(f"{HERE}/{args.out}/{'defaults' if args.defaults else 'table'}.md", "w") as f:
        f.write(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
