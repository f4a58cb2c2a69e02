"""How fast is it, and how far from what the machine can do? A benchmark, not a test.

    python tests/bench.py                                    # tiny preset, play, paper preset, tokenizer, in both number types
    python tests/bench.py --part tiny --repeats 3            # one part, or several: --part tiny play
    python tests/bench.py --part tables --dtype bfloat16     # Tables 1 and 2: all eight models sample at paper size (a GPU's work)
    python tests/bench.py --part one --model flow --variant full --preset paper --batch 32 --compile     # training and sampling of one model
    python tests/bench.py --part one --data data/robot_continuous --model flow                           # and the share of waiting for data
    python tests/bench.py --part curves --model flow         # cost against batch, size, length

Every measurement has a process of its own, so that its peak memory is its own, and begins and ends with the machine's rate of products
of 2048-cube matrices in the same number type: shares are of the mean of the two, and where they differ the machine was busy. Times are
the best and the median of --repeats. Weights are random, but for play. GFLOP are those of matrix products and attentions in
the forward pass, tripled for a training step. --repeats 1 tries out whether everything runs.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.utils.data import DataLoader, default_collate

import tokenizer as tok
from blocks import VARIANTS, compile_blocks, count_flops
from data import JOINTS
from sample import MODELS, load_model, load_tokenizer_for, settings_of
from train import Stream, TrainConfig, positions, to_device

MAIN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAPERS = {  # samples a second and peak GB on an A6000, Tables 1 and 2
    "masked": dict(split=(2.09, 2.22), base=(2.27, 2.63), modality=(2.25, 2.30), full=(2.36, 2.12)),
    "flow": dict(split=(1.11, 4.37), base=(1.69, 5.94), modality=(1.89, 4.41), full=(1.91, 3.25))}


def seconds(f, repeats):
    """The times of f(), after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def product_rate(dtype):
    """GFLOP/s of matrix products. A processor without bfloat16 units would need minutes for large ones in it."""
    rate = 0
    for n in (256, 2048):
        a, b = torch.randn(2, n, n, device=DEVICE).to(dtype).unbind()
        rate = 2 * n**3 / min(seconds(lambda: a @ b, 3)) / 1e9
        if rate < 10:
            break
    return rate


def build(args):
    """The model of the arguments and one batch of random clips: model, video, actions, draws."""
    module = MODELS[args.model]
    sizes = dict(module.PRESETS[args.preset], variant=args.variant, checkpoint_activations=args.checkpoint_activations)
    if args.latent_size:
        sizes.update(H=args.latent_size, W=args.latent_size)
    if args.future:
        sizes.update(T_f=args.future)
    torch.manual_seed(0)
    model = module.Model(module.Config(**sizes)).to(DEVICE)
    c, T = model.config, model.layout.T
    if args.model == "masked":
        video = torch.randint(c.vocab_size, (args.batch, T, c.H, c.W), device=DEVICE)
    else:
        video = torch.randn(args.batch, c.channels, T, c.H, c.W, device=DEVICE)
    actions = torch.randn(args.batch, sum(model.layout.lengths[2:]), c.action_dim, device=DEVICE)
    draws = default_collate([model.draw(torch.Generator().manual_seed(i)) for i in range(args.batch)])
    if args.compile:
        compile_blocks(model)
    return model, video, actions, to_device(draws, DEVICE)


# ---- parts: each gives rows of (what, times, GFLOP, clips or frames of one run)


def train_part(args, autocast):
    model, video, actions, draws = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    flops = 3 * count_flops(lambda: model(video, actions, draws)) / 1e9

    def both():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss, count = model(video, actions, draws)
        (loss / count).backward()

    def step():
        both()
        optimizer.step()

    yield "forward + backward", seconds(both, args.repeats), flops, args.batch
    yield "training step", seconds(step, args.repeats), flops, args.batch
    if args.data:
        yield "waiting for data, in 20 steps", data_wait(args, model, step), 0, 20 * args.batch


def data_wait(args, model, step):
    """The seconds of 20 steps that are spent waiting for the next batch of a data folder."""
    from data import open_clips
    stream, waited = Stream(open_clips(args.data, "train"), model.draw, 0), 0.0
    loader = iter(DataLoader(stream, num_workers=args.workers, pin_memory=CUDA,
                             batch_sampler=positions(TrainConfig(batch=args.batch, accum=1), 0, 0, 1)))
    next(loader)
    for _ in range(20):
        before = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - before
        step()
    return [waited]


@torch.no_grad()
def sample_part(args, autocast):
    """Of flow, whose steps are alike, one guided step is measured and taken as often as the preset has steps."""
    model, video, actions, _ = build(args)
    model.eval()
    past = video.narrow(video.ndim - 3, 0, model.layout.T_p)
    settings = dict(MODELS[args.model].SAMPLING[args.preset])
    steps = settings.get("steps", 1)

    def run():
        with autocast():
            model.sample(past, actions, **dict(settings, **({"steps": 1} if "steps" in settings else {})))

    times = [steps * t for t in seconds(run, args.repeats)]
    yield "sampling, " + ", ".join(f"{k} {v:g}" for k, v in settings.items()), times, steps * count_flops(run) / 1e9, args.batch


@torch.no_grad()
def tokenizer_part(args, autocast):
    """One clip of 17 frames through tokenizers of NVIDIA's full size."""
    for name in ("cv8x16x16", "dv8x8x8"):
        torch.manual_seed(0)
        tokenizer = tok.Tokenizer(tok.PRESETS[name]).to(DEVICE, getattr(torch, args.dtype)).eval()
        video = torch.rand(1, 3, 17, args.frame_size, args.frame_size, device=DEVICE) * 2 - 1
        z = tokenizer.encode(video)
        for what, f in (("encode", lambda: tokenizer.encode(video)), ("decode", lambda: tokenizer.decode(z))):
            yield f"{name} {what}", seconds(f, args.repeats), count_flops(f) / 1e9, 1


def play_part(args, autocast):
    """A frame of play with the shipped weights: with another command at every frame, and with one that is held for eight."""
    from examples.play import Game
    model, saved = load_model(f"{MAIN}/weights/{args.model}_{args.variant}_tiny.pt", DEVICE)
    settings = settings_of(saved, None) | ({"steps": 3} if args.model == "flow" else {})  # as sample.py --play has it
    class Clips:  # of the built-in robot, without its frames: play asks for no more
        path, names, meta, frame_stride = "", list(JOINTS), {"robot": "built-in"}, 1

    clips = Clips()
    game = Game([(model, load_tokenizer_for(saved["tokenizer"], DEVICE), settings, clips)])
    game.reset()

    def frames(turns):
        with autocast():
            for turn in turns:
                game.step(drive=0.5, turn=turn, look=0.0, grip=0.0)

    yield "play, 8 frames, a new command at each", seconds(lambda: frames([i / 8 for i in range(8)]), args.repeats), 0, 8
    yield "play, 8 frames, one command", seconds(lambda: frames([0.1] * 8), args.repeats), 0, 8


# ---- one process a measurement


def child(args):
    """Measures one part, prints its rows."""
    dtype = getattr(torch, args.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py does
    tok.reuse_memory()
    autocast = functools.partial(torch.autocast, DEVICE.type, dtype=dtype, enabled=dtype != torch.float32)
    about = "tokenizer" if args.child == "tokenizer" else f"{args.model} {args.variant} {args.preset}, {args.batch} clips"
    before, rows = product_rate(dtype), []
    for what, times, gflop, n in globals()[f"{args.child}_part"](args, autocast):
        rows.append(dict(part=about, what=what, dtype=args.dtype, best_s=min(times), n=n, times=times,
                         median_s=statistics.median(times), gflop=gflop, peak_gb=tok.peak_gb(DEVICE.type)))
    after = product_rate(dtype)
    for row in rows:
        row.update(rate_before=before, rate_after=after, compile=args.compile,
                   device=torch.cuda.get_device_name() if CUDA else f"cpu, {torch.get_num_threads()} threads")
    print("\nROWS " + json.dumps(rows))


def measure(part, args, **changes):
    """The rows of a part, from a process of its own."""
    given = {**vars(args), **changes, "child": part, "part": "one"}
    argv = [f"--{name}={value}" for name, value in given.items() if value not in (None, False, "") and value is not True]
    argv += [f"--{name}" for name, value in given.items() if value is True]
    done = subprocess.run([sys.executable, os.path.abspath(__file__), *argv], capture_output=True, text=True)
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("ROWS ")]
    if not lines:
        reason = (done.stderr.strip() or "killed, out of memory?").splitlines()[-1][:150]
        print(f"| {given['model']} {given['variant']} {given['preset']}: {part} | {given['dtype']} | failed: {reason} |", flush=True)
        return []
    rows = json.loads(lines[0])
    for row in rows:
        print(line_of(row), flush=True)
    return rows


HEAD = ("| | number type | best s | median s | clips (play: frames) a second | GFLOP/s | share of products | peak GB | products before, after |\n"
        "|---|---|---|---|---|---|---|---|---|")


def line_of(row):
    gflop_per_s = row["gflop"] / row["best_s"]
    share = 2 * gflop_per_s / (row["rate_before"] + row["rate_after"])
    done = f"{gflop_per_s:.0f} | {share:.0%}" if row["gflop"] else "- | -"
    return (f"| {row['part']}: {row['what']} | {row['dtype']} | {row['best_s']:.3f} | {row['median_s']:.3f} | {row['n'] / row['best_s']:.2f}"
            f" | {done} | {row['peak_gb']:.2f} | {row['rate_before']:.0f}, {row['rate_after']:.0f} |")


def curves(args):
    """Cost against batch, resolution and number of latents, joint and split attention."""
    rows = []
    for variant in ("full", "split"):
        for batch, size, future in ((1, 8, 1), (4, 8, 1), (16, 8, 1), (1, 16, 1), (1, 32, 1), (1, 8, 2), (1, 8, 4), (1, 16, 4), (1, 32, 4)):
            print(f"{variant}: {batch} clips, latents of {size} x {size}, {future} of them future")
            rows += measure("train", args, variant=variant, batch=batch, latent_size=size, future=future)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", nargs="+", default=["tiny", "play", "paper", "tokenizer"],
                   choices=["tiny", "play", "paper", "tokenizer", "tables", "curves", "one"])
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="", help="default: one after the other")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--model", choices=list(MODELS), default="masked", help="these are for --part one and curves")
    p.add_argument("--variant", choices=VARIANTS, default="base")
    p.add_argument("--preset", choices=["tiny", "paper"], default="tiny")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--checkpoint_activations", nargs="?", const="inputs", default="", choices=["", "products", "inputs"])
    p.add_argument("--data", default="", help="data folder: also measure the time of waiting for it")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--latent_size", type=int, default=0, help="other latent height and width than the preset's")
    p.add_argument("--future", type=int, default=0, help="other number of future latents than one")
    p.add_argument("--frame_size", type=int, default=256, help="of the tokenizer's clip")
    p.add_argument("--json", default="", help="file for the results")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args)

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else f'{torch.get_num_threads()} threads'}{load}\n\n{HEAD}", flush=True)
    rows = []
    pairs = dict(masked=dict(model="masked", variant="base"), flow=dict(model="flow", variant="full"))
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    for part in args.part:
        for args.dtype in dtypes:
            if part == "one":
                rows += measure("train", args) + measure("sample", args)
            elif part == "curves":
                rows += curves(args)
            elif part == "tokenizer":
                rows += measure("tokenizer", args, model="masked", variant="base", preset="paper")
            elif part == "tables":
                for model, papers in PAPERS.items():
                    for variant, (rate, gb) in papers.items():
                        rows += measure("sample", args, model=model, variant=variant, preset="paper", batch=1)
                        print(f"| the paper's, on an A6000 | | | | {rate} | | | {gb} | |", flush=True)
            else:
                for name, pair in pairs.items():
                    if part == "play":
                        rows += measure("play", args, preset="tiny", **pair)
                        continue
                    batch = 8 if part == "tiny" else 1 if name == "masked" else 2
                    rows += measure("train", args, preset=part, batch=batch, **pair)
                    rows += measure("sample", args, preset=part, batch=batch, **pair)
    if args.json:
        tok.write_whole(args.json, lambda name: open(name, "w").write(json.dumps(rows, indent=1)))


if __name__ == "__main__":
    main()
