"""How fast is it, and how far from what the machine can do? A benchmark, not a test.

    python tests/bench.py --model masked --variant base --preset paper --batch 1       # training step and sampler
    python tests/bench.py --model flow --variant full --preset paper --batch 2 --dtype bfloat16
    python tests/bench.py --part tokenizer                                             # full-size Cosmos, 17 x 256 x 256
    python tests/bench.py --part curves --model flow --preset tiny                     # cost against batch, size, length
    python tests/bench.py --preset tiny --data data/robot_continuous                   # and the share of waiting for data

Every part runs in a process of its own (so that its peak memory is its own), and first measures the machine's rate of a 2048-cube
matrix product in the same number type: fractions are of that. Weights are random; times are medians. GFLOP are counted in
the forward pass (matrix products and attentions), and tripled for a training step.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from blocks import VARIANTS, compile_blocks, count_flops
from sample import MODELS
from train import Stream, TrainConfig, positions

CUDA = torch.cuda.is_available()
torch.backends.cuda.matmul.allow_tf32 = True  # as train.py does
DEVICE = torch.device("cuda" if CUDA else "cpu")


def seconds(f, repeat):
    """Median seconds of f(), after one call that does not count."""
    times = []
    for _ in range(repeat + 1):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def faster_dtype():
    """The number type of the faster product of 256 x 256 matrices; on a GPU bfloat16 where it has units for it."""
    if CUDA:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256).to(dtype)
        taken[dtype] = seconds(lambda: a @ a, 3)
    return torch.bfloat16 if 1.3 * taken[torch.bfloat16] < taken[torch.float32] else torch.float32


def matmul_rate(dtype, n=2048):
    """GFLOP/s of an n-cube matrix product."""
    if not CUDA and dtype == torch.bfloat16 and faster_dtype() != dtype:
        n = 512  # this processor has no bfloat16 units: minutes otherwise
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype).unbind()
    return 2 * n**3 / seconds(lambda: a @ b, 20 if CUDA else 3) / 1e9


def peak_gb():
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
    drawn = [model.draw(torch.Generator().manual_seed(i)) for i in range(args.batch)]
    draws = {k: torch.stack([d[k] for d in drawn]).to(DEVICE) for k in drawn[0]}
    if args.compile:
        compile_blocks(model)
    return model, video, actions, draws


def train_part(args, dtype):
    model, video, actions, draws = build(args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    autocast = lambda: torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32)
    with autocast():
        flops = 3 * count_flops(lambda: model(video, actions, draws))
    loss = []

    def forward():
        loss.clear()  # and with it what it held for its backward pass
        with autocast():
            total, count = model(video, actions, draws)
        loss[:] = [total / count]

    def both():
        optimizer.zero_grad(set_to_none=True)
        forward()
        loss[0].backward()

    def step():
        both()
        optimizer.step()

    two = seconds(both, args.repeat)
    found = {"forward_backward_peak_gb": peak_gb()}
    found.update(step_s=seconds(step, args.repeat), forward_backward_s=two, peak_gb=peak_gb(),
                 forward_s=seconds(forward, args.repeat))
    found["samples_per_s"] = args.batch / found["step_s"]
    found.update(gflop=flops / 1e9, gflop_per_s=flops / found["step_s"] / 1e9,
                 forward_backward_gflop_per_s=flops / found["forward_backward_s"] / 1e9,
                 forward_gflop_per_s=flops / 3e9 / found["forward_s"])
    if args.data:
        found["data_wait"] = data_wait(args, model, step)
    return found


def data_wait(args, model, step):
    """Share of the time of 20 steps that is spent waiting for the next batch of a data folder."""
    from data import open_clips
    config = TrainConfig(batch=args.batch, accum=1)
    loader = iter(DataLoader(Stream(open_clips(args.data, "train"), model.draw, 0), num_workers=args.workers, pin_memory=CUDA,
                             batch_sampler=positions(config, 0, 0, 1)))
    next(loader)
    start, waited = time.perf_counter(), 0.0
    for _ in range(20):
        before = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - before
        step()
    return waited / (time.perf_counter() - start)


@torch.no_grad()
def sample_part(args, dtype):
    model, video, actions, _ = build(args)
    model.eval()
    past = video.narrow(video.ndim - 3, 0, model.layout.T_p)
    settings = dict(MODELS[args.model].SAMPLING[args.preset])
    steps = settings.get("steps", 1)

    def run(n=None):
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
            model.sample(past, actions, **dict(settings, **({"steps": n} if n else {})))

    if args.model == "masked":
        taken = seconds(run, args.repeat)
        found = {"sample_s": taken, "settings": settings}
        flops = count_flops(run)
    else:  # all steps are alike: time one, and say so
        call = seconds(lambda: run(1), args.repeat)
        settings["cfg"], guided = 1.0, call
        call = seconds(lambda: run(1), args.repeat)
        found = {"guided_step_s": guided, "model_call_s": call, "sample_s": steps * guided, "settings": dict(steps=steps)}
        flops = count_flops(lambda: run(1))
        taken = call
    found.update(gflop=flops / 1e9, gflop_per_s=flops / taken / 1e9)
    return dict(found, samples_per_s=args.batch / found["sample_s"], peak_gb=peak_gb())


def plain_convolution(conv, x):
    """What CausalConv3d computes, as its name says it."""
    x = torch.cat([x[:, :, :1]] * conv.front + [x], dim=2)
    pad = (0, 0, 0) if conv.in_time else (0, conv.pad, conv.pad)
    stride = (conv.stride, 1, 1) if conv.in_time else (1, conv.stride, conv.stride)
    return F.conv3d(x, conv.conv3d.weight, conv.conv3d.bias, stride, pad)


@torch.no_grad()
def tokenizer_part(args, dtype):
    """Encode and decode of one clip of 17 frames by a tokenizer of NVIDIA's full size; beside the same with 3D convolutions."""
    import tokenizer as tok
    found, ours = {"frame_size": args.frame_size}, tok.CausalConv3d.forward
    for name in ("cv8x16x16", "dv8x8x8"):
        torch.manual_seed(0)
        tokenizer = tok.Tokenizer(tok.PRESETS[name]).to(DEVICE, dtype).eval()
        video = torch.rand(1, 3, 17, args.frame_size, args.frame_size, device=DEVICE) * 2 - 1
        z = tokenizer.encode(video)
        for what, f in (("encode", lambda: tokenizer.encode(video)), ("decode", lambda: tokenizer.decode(z))):
            taken, y = seconds(f, args.repeat), f()
            found[f"{name}_{what}_s"], found[f"{name}_{what}_gflop_per_s"] = taken, count_flops(f) / taken / 1e9
            tok.CausalConv3d.forward = plain_convolution
            found[f"{name}_{what}_plain_s"] = seconds(f, 1)
            plain = f()  # the largest difference beside the largest value; of ids, the share that differ
            found[f"{name}_{what}_difference"] = (((plain - y).abs().max() / y.abs().max()) if y.is_floating_point() else
                                                  (plain != y).float().mean()).item()
            tok.CausalConv3d.forward = ours
            found[f"{name}_{what}_faster"] = found[f"{name}_{what}_plain_s"] / taken
    return dict(found, peak_gb=peak_gb())


def child(args):
    """Measures one part, prints its JSON."""
    dtype = faster_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    rate = matmul_rate(dtype)
    found = {"train": train_part, "sample": sample_part, "tokenizer": tokenizer_part}[args.child](args, dtype)
    for key in [k for k in found if k.endswith("gflop_per_s")]:
        found[key.replace("gflop_per_s", "fraction")] = found[key] / rate
    about = {"part": args.child, "device": torch.cuda.get_device_name() if CUDA else f"cpu, {torch.get_num_threads()} threads",
             "dtype": str(dtype).removeprefix("torch."), "matmul_gflop_per_s": rate}
    if args.child != "tokenizer":
        about.update(model=args.model, variant=args.variant, preset=args.preset, batch=args.batch, compile=args.compile,
                     checkpoint_activations=args.checkpoint_activations, future_latents=args.future, latent_size=args.latent_size)
    print("\nRESULT " + json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in {**about, **found}.items()}))


def measure(part, argv):
    done = subprocess.run([sys.executable, os.path.abspath(__file__), *argv, "--child", part], capture_output=True, text=True)
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"bench.py: the part {part} ended without a result (out of memory?)\n{done.stderr[-2000:]}")
    return json.loads(lines[0])


def table(result):
    print(f"\n{result['part']}")
    for key, value in result.items():
        if key != "part":
            print(f"    {key:28s} {value}")


def curves(argv):
    """Cost against batch, resolution and number of latents, joint and split attention."""
    print(f"\n{'variant':8s} {'batch':>5s} {'latent':>6s} {'future':>6s} {'step s':>8s} {'per clip':>8s} {'peak GB':>8s}")
    results = []
    for variant in ("full", "split"):
        for batch, size, future in ((1, 8, 1), (4, 8, 1), (16, 8, 1), (1, 16, 1), (1, 32, 1), (1, 8, 2), (1, 8, 4), (1, 16, 4), (1, 32, 4)):
            extra = ["--variant", variant, "--batch", str(batch), "--latent_size", str(size), "--future", str(future)]
            r = measure("train", argv + extra)
            results.append(r)
            print(f"{variant:8s} {batch:5d} {size:6d} {future:6d} {r['step_s']:8.3f} {r['step_s'] / batch:8.3f} {r['peak_gb']:8.2f}",
                  flush=True)
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(MODELS), default="masked")
    p.add_argument("--variant", choices=VARIANTS, default="base")
    p.add_argument("--preset", choices=["tiny", "paper"], default="tiny")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--checkpoint_activations", nargs="?", const="inputs", default="", choices=["products", "inputs"])
    p.add_argument("--part", choices=["train", "sample", "both", "tokenizer", "curves"], default="both")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--data", default="", help="data folder: also measure the share of waiting for it")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--latent_size", type=int, default=0, help="other latent height and width than the preset's")
    p.add_argument("--future", type=int, default=0, help="other number of future latents than one")
    p.add_argument("--frame_size", type=int, default=256, help="of the tokenizer's clip")
    p.add_argument("--json", default="", help="file for the results")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args)
    argv = sys.argv[1:]
    if args.part == "curves":
        results = curves(argv)
    else:
        results = [measure(part, argv) for part in (("train", "sample") if args.part == "both" else (args.part,))]
        for result in results:
            table(result)
    if args.json:
        with open(args.json + ".tmp", "w") as f:
            json.dump(results, f, indent=1)
        os.replace(args.json + ".tmp", args.json)


if __name__ == "__main__":
    main()
