"""Training and checking a tokenizer: what `python tokenizer.py train` and `python tokenizer.py check` run.

The paper takes NVIDIA's tokenizers as they are, so this is no part of the course. It makes the tiny ones of
weights/ and those for a robot of one's own: raw video of data.py in, a tokenizer.pt out.

    python tokenizer.py train --data data/robot --kind discrete --out out/tokenizer [--resume]
    torchrun --nproc_per_node=2 tokenizer.py train ...      # each process does its share of the batch
    python tokenizer.py check --data data/robot --tokenizer out/tokenizer
"""
import argparse
import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import SOURCE, add_source_flags, open_clips
from tokenizer import (PRESETS, CausalConv3d, DataError, Downsample, Tokenizer, Upsample, count_parameters,
                       load_tokenizer, psnr, rank_and_world, reason, save_tokenizer, to_uint8, to_video,
                       write_whole)

# ---- scores --------------------------------------------------------------------------------------
def raw_clips(args, split, stride=None):
    source = {name: getattr(args, name) for name in SOURCE}
    clips = open_clips(args.data, split, stride=stride, size=args.size, **source)
    if clips.kind != "raw":
        raise DataError(f"{args.data} holds {clips.kind} latents: a tokenizer needs raw video")
    return clips

@torch.no_grad()
def round_trip(tokenizer, clips, n):
    """Encodes and decodes n clips from all over `clips` -> (scores, latents (n, ...)). Scores: mean PSNRs in
    dB, of the decoded frames and of frame 8 repeated over frames 9..16, and the share of ids in use."""
    device = next(tokenizer.parameters()).device
    decoded, repeated, latents = [], [], []
    # Clips of one recording follow one another, so that the first n would be nearly the same pictures.
    for i in np.linspace(0, len(clips) - 1, min(n, len(clips))).astype(int):
        frames = clips[i]["video"]  # (17, H, W, 3) uint8
        z = tokenizer.encode(to_video(frames[None]).to(device))
        again = to_uint8(tokenizer.decode(z).cpu())[0]
        decoded.append(psnr(again, frames))
        repeated.append(psnr(frames[8:9], frames[9:]))
        latents.append(z.cpu())
    latents = torch.cat(latents)
    scores = {"val_psnr": np.mean(decoded).item(), "copy_last": np.mean(repeated).item()}
    if tokenizer.kind == "discrete":
        scores["ids_in_use"] = len(latents.unique()) / tokenizer.vocab_size
    return scores, latents

def explain(scores):
    print(f"round trip {scores['val_psnr']:.2f} dB, copy-last {scores['copy_last']:.2f} dB")
    if scores["val_psnr"] < scores["copy_last"] + 3:
        print("warning: the round trip is less than 3 dB above copy-last, too poor to judge any dream by: "
              "train the tokenizer for longer, on more video, or with less compression")

# ---- starting weights ----------------------------------------------------------------------------
@torch.no_grad()
def start_simple(tokenizer):
    """Starting weights, worth 1.2 dB after two hundred seconds of training. PyTorch's own mix frames and
    channels at random and take all wavelet bands for equally strong, which has to be unlearned. Here time is
    left alone, resampling is copying and averaging, residual branches are quiet, and the picture is grey."""
    def quiet(conv, scale, identity=0.0):
        weight = conv.conv3d.weight.mul_(scale)
        conv.conv3d.bias.zero_()
        middle = weight.shape[-1] // 2
        now = weight[:, :, -1, middle, middle]  # the tap of a causal kernel at the frame itself
        now.diagonal().add_(identity)

    for name, module in tokenizer.named_modules():
        if isinstance(module, (Downsample, Upsample)):
            quiet(module.conv1, 0.1)
            quiet(module.conv2, 0.1)
            quiet(module.conv3, 0.1, identity=1.0)
        elif isinstance(module, CausalConv3d) and module.in_time and "sample" not in name:
            quiet(module, 0.1, identity=1.0)
    quiet(tokenizer.decoder.conv_out[0], 0.05)

@torch.no_grad()
def start_from(tokenizer, file, video):
    """Starting weights from a trained tokenizer. Where the bottleneck has another width (a discrete tokenizer
    from a continuous one), it becomes the principal components of the old latents on `video`."""
    # 1. Copy what fits, which must be all but the two convolutions of the bottleneck.
    old, ours = load_tokenizer(file), tokenizer.state_dict()
    fits = {k: v for k, v in old.state_dict().items() if k in ours and v.shape == ours[k].shape}
    for name in ours:
        if name not in fits and "quant_conv" not in name:
            raise DataError(f"--init {file}: its {name} has another shape, give the sizes it was made with")
    tokenizer.load_state_dict(fits, strict=False)
    if len(fits) == len(ours):
        return
    # 2. The n directions in which the old latents vary most, and how much they do.
    old_in, old_out = old.quant_conv.conv3d, old.post_quant_conv.conv3d
    new_in, new_out = tokenizer.quant_conv.conv3d, tokenizer.post_quant_conv.conv3d
    z = rearrange(old.quant_conv(old.encoder(video)), "b c t h w -> (b t h w) c")
    n, mean = new_in.out_channels, z.mean(0)
    if n > len(mean):
        raise DataError(f"--init {file}: its {len(mean)} latent channels cannot start {n}, give a wider one")
    _, size, axes = torch.linalg.svd(z - mean, full_matrices=False)
    axes, spread = axes[:n].T, size[:n] / math.sqrt(len(z) - 1)  # (C, n), (n,)
    # 3. code = (latent - mean) @ axes / spread, and back. FSQ's tanh takes a code to about two thirds of it.
    into, back = axes / spread, axes * spread
    back = back * 1.5 if tokenizer.kind == "discrete" else back
    new_in.weight.copy_(torch.einsum("cn, cz... -> nz...", into, old_in.weight))
    new_in.bias.copy_((old_in.bias - mean) @ into)
    new_out.weight.copy_(torch.einsum("zc..., cn -> zn...", old_out.weight, back))
    new_out.bias.copy_(old_out.bias + old_out.weight.flatten(1) @ mean)

# ---- training ------------------------------------------------------------------------------------
def learning_rate(step, steps, peak):
    """Warm-up over at most 100 steps, then a cosine down to 2 % of the peak."""
    warmup = min(100, steps // 10 + 1)
    cosine = math.cos(math.pi * step / steps)
    return peak * min(1, (step + 1) / warmup) * (0.51 + 0.49 * cosine)

def draw_batch(clips, batch, seed, step, rank=0, world=1):
    """This process's share of a batch, (B, 3, F, H, W): a function of seed and step, for exact resuming."""
    order = torch.Generator().manual_seed(1_000_003 * seed + step)
    chosen = torch.randint(len(clips), (batch,), generator=order).tolist()
    return to_video(torch.stack([clips[i]["video"] for i in chosen[rank::world]]))

def read_state(file, about):
    """The state that an earlier run with the same flags left."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        old = saved["about"]
        differ = [f"{key} was {old[key]}, is {value}" for key, value in about.items() if old[key] != value]
    except Exception as e:  # a damaged file can raise nearly anything
        raise DataError(f"{file} cannot be resumed ({reason(e)}): leave out --resume") from None
    if differ:
        raise DataError(f"{file} is of another run ({'; '.join(differ)}): give its flags or another --out")
    return saved

def best_of(log):
    return max(log, key=lambda line: line["val_psnr"])  # the earliest of equals

def stop_signals():
    """A list, empty until Ctrl-C or SIGTERM asks to stop; the second such signal ends the process at once."""
    asked = []
    def note(number, _):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return asked

def new_tokenizer(args, clips):
    """The preset's sizes, except those given as flags, and the weights that training starts from."""
    preset = PRESETS[args.kind]
    given = {k: v for k, v in vars(args).items() if k in asdict(preset) and v is not None}
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(replace(preset, **given))  # on the CPU, so that a seed means the same everywhere
    if tokenizer.kind != args.kind:
        raise DataError(f"--levels {args.levels} is for --kind discrete: leave one of them out")
    start_simple(tokenizer)
    if args.init and not args.resume:
        start_from(tokenizer, args.init, draw_batch(clips, 16, args.seed, step=0))
    return tokenizer

def validate(tokenizer, clips, out, log, **facts):
    """Adds the scores on held-out clips to the log. The best tokenizer so far becomes OUT/tokenizer.pt."""
    scores, _ = round_trip(tokenizer, clips, 32)
    log.append({**facts, **scores})
    if best_of(log) is log[-1]:
        save_tokenizer(tokenizer, f"{out}/tokenizer.pt", step=facts["step"], psnr=scores["val_psnr"])
    lines = "".join(json.dumps(line) + "\n" for line in log)
    write_whole(f"{out}/log.jsonl", lambda name: Path(name).write_text(lines))
    return json.dumps(log[-1])

def train(args):
    """Trains on raw video. OUT gets tokenizer.pt, the best by validation PSNR; log.jsonl, its scores; and
    train_state.pt, from which --resume goes on to the same numbers as if the run had never stopped."""
    # 1. Setup. Every process does its share of each batch; rank 0 validates and writes.
    rank, world = rank_and_world()
    args.steps = args.steps or (1500 if args.init else 5000)
    if args.batch % world:
        raise DataError(f"--batch {args.batch} cannot be shared by {world} processes: give a multiple")
    os.makedirs(args.out, exist_ok=True)
    file, state_file = f"{args.out}/tokenizer.pt", f"{args.out}/train_state.pt"
    if os.path.exists(file) and not args.resume:
        raise DataError(f"{file} is there and will not be overwritten: give another --out, or --resume")
    clips, held_out = raw_clips(args, "train", stride=3), raw_clips(args, "val")
    if world > 1:
        dist.init_process_group()
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    tokenizer = new_tokenizer(args, clips).to(args.device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=0.01)

    # 2. What an earlier run has done.
    step, log, runner = 0, [], tokenizer
    about = {**asdict(tokenizer.config), "clips": len(clips)}
    about.update({key: vars(args)[key] for key in ("steps", "batch", "lr", "seed", "size")})
    if args.resume:
        saved = read_state(state_file, about)
        step, log = saved["step"], saved["log"]
        tokenizer.load_state_dict(saved["tokenizer"])
        optimizer.load_state_dict(saved["optimizer"])
    if world > 1:
        runner = DistributedDataParallel(tokenizer, find_unused_parameters=True)  # idle resamplers have some
    if rank == 0:
        print(f"{args.kind} tokenizer, {count_parameters(tokenizer) / 1e6:.2f} M parameters, on {len(clips)} "
              f"clips of {args.data}, from step {step} of {args.steps}")

    # 3. The loop.
    asked, stopping = stop_signals(), False
    bar = tqdm(total=args.steps, initial=step, desc="tokenizer", disable=rank > 0)
    while step < args.steps and not stopping:
        video = draw_batch(clips, args.batch, args.seed, step, rank, world).to(args.device)
        error = runner(video) - video
        loss = error.square().mean() + 0.03 * error.abs().mean()  # the first is the PSNR, the second sharpens
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        # Every process acts on the same numbers, so that all stop, or fail, together.
        shared = torch.tensor([loss.item(), norm.item(), len(asked)], device=args.device) / world
        if world > 1:
            dist.all_reduce(shared)
        loss, norm, stopping = shared.tolist()
        if not math.isfinite(loss + norm):
            raise DataError(f"the loss is {loss} and its gradient's norm {norm} at step {step}: lower --lr; "
                            f"what is in {args.out} stays as it was")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}")
        validating = step % args.eval_every == 0 or step == args.steps
        if rank == 0 and validating:
            bar.write(validate(tokenizer, held_out, args.out, log, step=step, loss=loss))
        if rank == 0 and (validating or stopping):
            state = {"about": about, "step": step, "log": log, "tokenizer": tokenizer.state_dict(),
                     "optimizer": optimizer.state_dict()}
            write_whole(state_file, lambda name: torch.save(state, name))
    bar.close()

    # 4. How it went.
    if rank == 0 and step < args.steps:
        print(f"stopped after step {step}: the same command with --resume goes on from there")
    elif rank == 0:
        print(f"{file} holds step {best_of(log)['step']}, the best of {len(log)} validations")
        explain(best_of(log))
    if world > 1:
        dist.destroy_process_group()

# ---- commands ------------------------------------------------------------------------------------
def check(args):
    """Round trip of validation clips, and statistics of their latents or ids."""
    tokenizer = load_tokenizer(args.tokenizer, args.device)
    scores, z = round_trip(tokenizer, raw_clips(args, "val"), args.num)
    print(f"{tokenizer.kind} {tokenizer.temporal}x{tokenizer.spatial}x{tokenizer.spatial}, latents of a clip "
          f"{tuple(z.shape[1:])}, {len(z)} clips")
    explain(scores)
    # An id that is never used, or a channel that never varies, is capacity that a model predicts in vain.
    if tokenizer.kind == "discrete":
        share = z.unique(return_counts=True)[1] / z.numel()
        perplexity = torch.exp(-(share * share.log()).sum())
        print(f"ids: {len(share)} of {tokenizer.vocab_size} in use, perplexity {perplexity:.0f}")
    else:
        by_channel = z.transpose(0, 1).flatten(1)
        for name, row in (("mean", by_channel.mean(1)), ("std ", by_channel.std(1))):
            print(f"latent {name} by channel: " + " ".join(f"{v:+.2f}" for v in row))

def main(argv):
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description="Without a command: a walk through the shapes.", **style)
    commands = parser.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train a tokenizer on raw video", **style)
    t.add_argument("--kind", required=True, choices=["discrete", "continuous"])
    t.add_argument("--out", required=True, help="folder for tokenizer.pt, log.jsonl and train_state.pt")
    t.add_argument("--resume", action="store_true", help="go on from train_state.pt in --out")
    t.add_argument("--steps", type=int, help="default: 5000, or 1500 with --init, which has a start already")
    t.add_argument("--batch", type=int, default=4)
    t.add_argument("--lr", type=float, default=1.5e-3)
    t.add_argument("--init", default="", help="tokenizer to start from, continuous or of the same kind")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--eval_every", type=int, default=500, help="steps between validations, which also save")
    for size in ("channels", "spatial_compression", "temporal_compression", "latent_channels"):
        t.add_argument(f"--{size}", type=int, help="see TokenizerConfig; default: the tiny preset's")
    t.add_argument("--levels", type=lambda s: tuple(map(int, s.split(","))), help="FSQ levels, as in 8,8,8,8")
    c = commands.add_parser("check", help="round trip and latent statistics", **style)
    c.add_argument("--tokenizer", required=True, help="a file, or a folder with encoder.jit and decoder.jit")
    c.add_argument("--num", type=int, default=32, help="clips")
    for p in (t, c):
        p.add_argument("--data", required=True, help="folder of raw video, see data.py")
        add_source_flags(p)
        p.add_argument("--size", type=int, help="resize frames to this; default: as stored")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    # Flags that make no sense end here, before any work.
    for name, value in vars(args).items():
        low = -1 if name == "seed" else 0
        if type(value) in (int, float) and not low < value < 2**31:
            raise DataError(f"--{name} {value} makes no sense: give a positive number")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:  # torch's ways to say that there is no such device
        raise DataError(f"--device {args.device} cannot be used ({reason(e)}): give another") from None
    {"train": train, "check": check}[args.command](args)
