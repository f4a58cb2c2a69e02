"""Trains Masked-HWM or Flow-HWM: a straight script, for one process or many.

    python train.py --model flow --variant full                                # laptop, the built-in robot
    torchrun --nproc_per_node=2 train.py --model flow --variant full           # the same on two processes
    python train.py --model masked --variant base --preset paper --data 1x     # the paper's, on a GPU

With no data it draws the built-in robot, encodes it with the shipped tokenizer, and trains the `tiny` preset; with a
1X folder and a GPU it trains the paper's model. OUT receives ckpt.pt (replaced atomically), log.jsonl, loss.png and samples/*.gif.

Everything random is a function of (seed, position): position p = step * batch + i names one clip and its noise (class
Stream). So a run is the same however its batch is divided among processes and micro-batches, and resuming at step n is
reading on at position n * batch.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from blocks import VARIANTS
from data import DataError, action_statistics, encode, fingerprint, open_clips, split_folders, synth
from sample import (MODELS, SAMPLING, CheckpointError, compile_blocks, dream, load_tokenizer_for, picture_rows, read_checkpoint,
                    replace, save_curve, save_gif)
from tokenizer import TokenizerError


@dataclass
class TrainConfig:
    model: str = ""  # masked or flow
    variant: str = ""  # base, split, modality or full
    preset: str = "auto"  # tiny, paper, or auto: paper where a CUDA device and a 1X data folder are found, else tiny
    set: str = ""  # other sizes or options of the model, as in n_layer=8,width=256 or t_sampling=logit-normal,drop=actions
    data: str = ""  # folder of tokens, latents or raw video; default: the built-in robot in data/robot
    tokenizer: str = ""  # file or folder; default: the one the data was encoded with, or the shipped one
    out: str = ""  # default: out/MODEL_VARIANT
    steps: int = 0  # optimiser steps; 0: the preset's
    batch: int = 0  # clips per step, over all processes and micro-batches; 0: the preset's
    accum: int = 0  # micro-batches that each process divides its share of a batch into; 0: so that they fit (MICRO)
    lr: float = 0.0  # peak learning rate; 0: the preset's
    warmup: int = -1  # steps of linear warm-up; -1: the preset's
    decay: str = ""  # linear or cosine, to zero at the last step; default: the preset's
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights that samples are drawn from; 0: no average
    seed: int = 0
    dtype: str = "auto"  # float32, bfloat16, or auto: whichever this machine multiplies faster
    compile: bool = False  # torch.compile the blocks
    checkpoint_activations: str = ""  # hold less for the backward pass: products, or (the flag alone) inputs of the blocks
    shard: bool = False  # FSDP2: parameters, gradients and optimiser divided among the processes
    encode: bool = False  # allow encoding a raw --data folder into DATA_discrete or DATA_continuous first
    resume: bool = False  # continue OUT/ckpt.pt
    stop_after: int = 0  # end after this step as if interrupted; the schedule stays that of --steps
    workers: int = -1  # processes that load data ahead; -1: four on a GPU, none on a CPU, whose cores are busy already
    log_every: int = 20
    save_every: int = 500
    keep: int = 0  # of the last checkpoints that are also kept as ckpt_STEP.pt, beside ckpt.pt and ckpt_previous.pt
    sample_every: int = 1000  # steps between sample GIFs; 0: only at the end, -1: never
    frames: int = 20_000  # of the built-in robot, drawn when it is missing


PRESETS = {  # Sec. 3.1 and 3.2 for `paper`; `tiny` takes six minutes on two cores
    ("paper", "masked"): dict(steps=60_000, batch=16, lr=3e-5, warmup=100, decay="linear"),
    ("paper", "flow"): dict(steps=150_000, batch=128, lr=1e-4, warmup=0, decay="cosine"),
    ("tiny", "masked"): dict(steps=1400, batch=8, lr=2e-3, warmup=50, decay="cosine"),
    ("tiny", "flow"): dict(steps=2000, batch=8, lr=2e-3, warmup=50, decay="cosine"),
}
MICRO = {("paper", "masked"): 4, ("paper", "flow"): 32}  # clips of a micro-batch on a GPU; on a CPU 1. --accum decides instead
KIND = {"masked": "discrete", "flow": "continuous"}
SHIPPED = {"masked": "weights/tokenizer_dv_tiny.pt", "flow": "weights/tokenizer_cv_tiny.pt"}
ROBOT, ROBOT_STRIDE = "data/robot", 4
HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------------------------------------
# Data: position -> clip and noise


class Stream(Dataset):
    """The endless training stream. Item p is the p-th clip trained on, and everything random in its loss."""

    def __init__(self, clips, draw, seed):
        self.clips, self.draw, self.seed, self.epoch, self.order = clips, draw, seed, -1, None

    def clip_index(self, p):
        epoch, i = divmod(p, len(self.clips))
        if epoch != self.epoch:  # every epoch is a permutation of its own
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.clips), generator=generator)
        return int(self.order[i])

    def __getitem__(self, p):
        clip = self.clips[self.clip_index(p)]
        noise = torch.Generator().manual_seed((self.seed << 40) + p)
        return clip["video"], clip["actions"], self.draw(noise)


def positions(config, step, rank, world):
    """Positions of every micro-batch of one process, from `step` on: [[p, ...], ...], one list a micro-batch."""
    share = config.batch // (world * config.accum)
    while True:
        for m in range(config.accum):
            first = step * config.batch + (m * world + rank) * share
            yield list(range(first, first + share))
        step += 1


def prepare_data(config, say):
    """Makes what is missing and returns the folder of tokens or latents to train on, with its tokenizer's path."""
    kind, folder = KIND[config.model], config.data or ROBOT
    if config.tokenizer and not os.path.exists(config.tokenizer):
        raise TokenizerError(f"there is no tokenizer at {config.tokenizer}: give a file made by `python tokenizer.py train`")
    tokenizer = config.tokenizer or os.path.join(HERE, SHIPPED[config.model])
    if not config.data and rank_and_world()[0] == 0:
        synth(folder, frames=config.frames)
    barrier()
    clips = open_clips(folder, "train")
    if clips.kind == "raw":
        cache = f"{folder.rstrip('/')}_{kind}"
        if config.data and not config.encode:
            raise DataError(f"{folder} holds raw video: add --encode to have it encoded into {cache} with {tokenizer}, or run "
                            f"`python data.py encode --data {folder} --tokenizer {tokenizer} --out {cache}` and train on that")
        say(f"encoding {folder} with {tokenizer} into {cache}")
        for split, stride in (("train", None if config.data else ROBOT_STRIDE), ("val", None)):
            encode(folder, tokenizer, cache, stride=stride, splits=(split,), device=device_of()[0],
                   progress=rank_and_world()[0] == 0)
        barrier()
        folder, clips = cache, open_clips(cache, "train")
    if clips.kind != kind:
        raise DataError(f"{folder} holds {clips.kind} latents, but --model {config.model} is trained on {kind} ones: give a "
                        f"folder encoded with a {kind} tokenizer, or --model {'flow' if config.model == 'masked' else 'masked'}")
    made_with = clips.meta.get("tokenizer", {})
    if config.tokenizer and made_with.get("sha256", "") not in ("", fingerprint(config.tokenizer)):
        raise TokenizerError(f"{folder} was not encoded with {config.tokenizer} (the SHA-256 of its tokenizer, "
                             f"{made_with.get('path')}, differs): give that one, or leave --tokenizer out")
    return folder, config.tokenizer or clips.meta.get("tokenizer", {}).get("path", "")


def portable(path):
    """Paths inside this repository are kept relative to it, so that a checkpoint can move to another clone."""
    inside = os.path.abspath(path).startswith(HERE + os.sep) if path else False
    return os.path.relpath(os.path.abspath(path), HERE) if inside else path


def describe_data(config, folder, clips):
    """What a checkpoint says of its data, so that sample.py and evaluate.py find it, or draw the built-in robot again."""
    about = {"path": folder, "source": clips.meta.get("source", ""), "size": clips.meta.get("size"),
             "frame_stride": clips.meta.get("frame_stride", 1)}
    if not config.data:
        about.update(source=ROBOT, built_in={"frames": config.frames})
    return about


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers: processes, device, number type, schedule


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(backend):
    """init_process_group; after torchrun --max-restarts under a prefix of its own, for the store that the processes meet at
    still holds the addresses of the dead ones (torch 2.13)."""
    attempt, (rank, world) = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), rank_and_world()
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.init_process_group(backend)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=world)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def device_of():
    """("cuda" or "cpu", this process's torch.device)"""
    if not torch.cuda.is_available():
        return "cpu", torch.device("cpu")
    here, n = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > n:
        raise DataError(f"there are {n} CUDA devices for {here} processes: give --nproc_per_node={n}, or hide them with "
                        "CUDA_VISIBLE_DEVICES= to train on the CPU")
    return "cuda", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def faster_dtype(kind, device):
    """bfloat16 where the processor multiplies it at least 1.3 times as fast as float32, by measurement, or the GPU has
    units for it."""
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256, device=device).to(dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(2):
            a = a @ a
        a.sum().item()
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32


def deaf(_):
    """For processes that load data: Ctrl-C reaches them, too, but whether to stop is the trainer's to say."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)


def count_flops(f):
    """Floating point operations of the matrix products and attentions of f(), run as it is written and without gradients."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # which torch's counter leaves out
              lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with torch.compiler.set_stance("force_eager"), counter, torch.no_grad():
        f()
    return counter.get_total_flops()


def learning_rate(config, step):
    """Of the update that makes step -> step + 1; zero would be that of update number `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def peak_gb(kind):
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(file, model, optimizer, ema, step, config, about):
    """One file with all that resuming, sampling and scoring need; written beside and renamed, the previous one kept as
    ckpt_previous.pt. Every process takes part (with --shard each holds a piece), rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=torch.cuda.is_available())  # on a CPU it would copy
    weights, moments = get_state_dict(model, optimizer, options=options)
    averaged = full(ema)
    if rank_and_world()[0] == 0:
        saved = {"model": weights, "ema": averaged, "optimizer": moments, "step": step, "rng": torch.get_rng_state(),
                 "config": asdict(config), **about}
        try:
            torch.save(saved, file + ".tmp")
        except (OSError, RuntimeError) as e:  # a full disk, most of the time
            with contextlib.suppress(OSError):
                os.remove(file + ".tmp")
            raise CheckpointError(f"{file} could not be written at step {step} ({str(e).splitlines()[0]}): what was there is whole; "
                                  "free some space and go on with --resume") from None
        if os.path.exists(file):
            os.replace(file, file.replace(".pt", "_previous.pt"))
        os.replace(file + ".tmp", file)
        if config.keep:
            keep_last(file, step, config.keep)
    barrier()


def keep_last(file, step, n):
    """ckpt_STEP.pt as another name of what ckpt.pt is now (no second copy on the disk); the oldest beyond n go."""
    name = lambda s: file.replace(".pt", f"_{s:07d}.pt")
    with contextlib.suppress(FileExistsError):
        os.link(file, name(step))
    kept = sorted(int(f[5:-3]) for f in os.listdir(os.path.dirname(file)) if re.fullmatch(r"ckpt_\d{7}\.pt", f))
    for old in kept[:-n]:
        os.remove(name(old))


def forget_after(file, step):
    """Steps that were logged after the checkpoint will be done, and logged, again."""
    if os.path.exists(file):
        with open(file) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace(file, lambda name: open(name, "w").writelines(kept))


def full(state):
    """Tensors as rank 0 saves them: whole and on the CPU (not copied where they are both already)."""
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().cpu() for k, v in state.items()}


def last_checkpoint(file):
    """The checkpoint to resume from: ckpt.pt, or the one before it where that is damaged."""
    previous = file.replace(".pt", "_previous.pt")
    try:
        return read_checkpoint(file)
    except CheckpointError as e:
        if not os.path.exists(previous):
            raise
        print(f"{e}; going on from {previous}")
        saved = read_checkpoint(previous)
        barrier()
        if rank_and_world()[0] == 0:
            os.replace(previous, file)  # else the next save would put the damaged file in the place of the good one
        barrier()
        return saved


def resume(saved, model, optimizer, ema, config, about):
    """Puts the state of a checkpoint back; a run that differs in anything that changes its course is refused. What is
    random in training is a function of seed and position; the generator is put back for what else may use it."""
    free = {"resume", "stop_after", "keep", "log_every", "save_every", "sample_every", "workers", "compile", "out", "shard", "dtype",
            "encode", "accum", "preset", "checkpoint_activations", "tokenizer"}
    old, new = {**saved["config"], **saved["model_config"]}, {**asdict(config), **about["model_config"]}
    differ = [f"{k} was {old.get(k)!r}, is {new[k]!r}" for k in new if k not in free and old.get(k) != new[k]]
    if differ:
        raise CheckpointError(f"the checkpoint in {config.out} is of another run: {'; '.join(differ)}; give the same flags, "
                              "or another --out")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
    torch.set_rng_state(saved["rng"])
    for k, v in ema.items():
        if hasattr(v, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            v.copy_(distribute_tensor(saved["ema"][k].to(v.device), v.device_mesh, v.placements))
        else:
            v.copy_(saved["ema"][k])
    return saved["step"]


# ---------------------------------------------------------------------------------------------------------------------


def settle(config, say):
    """Fills in what the preset decides. The first line printed says which preset, and why."""
    has_gpu, why = torch.cuda.is_available(), ""
    if config.preset == "auto":
        is_1x = bool(config.data) and "robot" not in open_clips(config.data, "train").meta
        config.preset = "paper" if has_gpu and is_1x else "tiny"
        why = (f" ({'a' if has_gpu else 'no'} CUDA device, "
               f"{'data in ' + config.data if config.data else 'no --data: the built-in robot'})")
    say(f"preset {config.preset}{why}: --model {config.model} --variant {config.variant}")
    for name, value in PRESETS[config.preset, config.model].items():
        if getattr(config, name) == getattr(TrainConfig, name):  # not given
            setattr(config, name, value)
    check_numbers(config)
    config.out = os.path.normpath(config.out or f"out/{config.model}_{config.variant}")
    _, world = rank_and_world()
    if config.batch % (world * max(config.accum, 1)):
        raise DataError(f"--batch {config.batch} cannot be divided into {world} processes x --accum {max(config.accum, 1)}: give a "
                        f"multiple of {world * max(config.accum, 1)}")
    if not config.accum:
        share, most = config.batch // world, MICRO.get((config.preset, config.model), config.batch)
        most = 1 if config.preset == "paper" and not has_gpu else most
        config.accum = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    if config.preset == "paper" and not has_gpu and not config.checkpoint_activations:
        config.checkpoint_activations = "products"
        say("no GPU: one clip at a time, holding no more than --checkpoint_activations products")


def model_config(config, clips):
    """The preset's sizes, with what the data decides: frame size, vocabulary or channels, number of actions."""
    _, Config, presets = MODELS[config.model]
    chosen = dict(presets[config.preset], variant=config.variant, action_dim=clips.action_dim,
                  checkpoint_activations=config.checkpoint_activations)
    chosen.update(model_options(config))
    shape, tokenizer = clips.shape, clips.meta.get("tokenizer", {})
    chosen.update(H=shape[-2], W=shape[-1], temporal=tokenizer.get("temporal", 8))
    chosen["T_p"] = 1 + (9 - 1) // chosen["temporal"]
    chosen["T_f"] = shape[-3] - chosen["T_p"]
    if config.model == "masked":
        chosen["vocab_size"] = clips.vocab_size
        if "levels" not in tokenizer:  # as of tokens that were not made here
            chosen["share_digits"] = False
        chosen["levels"] = tuple(tokenizer["levels"]) if chosen.get("share_digits") else ()
    else:
        chosen["channels"] = shape[0]
    return Config(**chosen)


def check_numbers(config):
    """Before the work: numbers that make no sense."""
    if config.seed >= 2**23:  # what is random in clip p is seeded with the bits of both
        raise DataError(f"--seed {config.seed} is too large: give less than {2**23}")
    lowest = {"steps": 1, "batch": 1, "accum": 0, "lr": 0, "warmup": 0, "weight_decay": 0, "grad_clip": 0, "ema": 0, "seed": 0,
              "keep": 0, "stop_after": 0, "workers": -1, "log_every": 1, "save_every": 1, "sample_every": -1, "frames": 1}
    for name, low in lowest.items():
        value = getattr(config, name)
        if not low <= value < math.inf or (name in ("lr", "grad_clip") and value == 0) or (name == "ema" and value >= 1):
            raise DataError(f"--{name} {value} makes no sense: give {'more than' if name in ('lr', 'grad_clip') else 'at least'} {low}"
                            f"{' and less than 1' if name == 'ema' else ''}")


def model_options(config):
    """--set: "n_layer=8,drop=actions" -> {"n_layer": 8, "drop": "actions"}, by the types of the configuration's fields."""
    _, Config, presets = MODELS[config.model]
    text, defaults, chosen = config.set, asdict(Config(**presets[config.preset])), {}
    words = {"t_sampling": ("uniform", "logit-normal"), "drop": ("actions", "past", "both")}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        decided = {"variant": "--variant", "checkpoint_activations": "--checkpoint_activations"}
        decided |= dict.fromkeys(("T_p", "T_f", "H", "W", "temporal", "action_dim", "vocab_size", "channels", "levels"), "the data")
        if name in decided and name in defaults:
            raise DataError(f"--set {item}: that is for {decided[name]} to say")
        if name not in defaults:
            raise DataError(f"--set {item}: there is no {name or 'option without a name'}; the options are {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            chosen[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
            if value not in words.get(name, [value]) or kind is int and chosen[name] < 1:
                raise ValueError
        except (KeyError, ValueError, TypeError):
            choice = " or ".join(words.get(name, [f"a {kind.__name__} as {defaults[name]}"]))
            raise DataError(f"--set {item}: {name} takes {choice}") from None
    width, n_head = (chosen.get(k, defaults[k]) for k in ("width", "n_head"))
    if width % (n_head if config.model == "flow" else 2 * n_head):  # masked turns all of a head, in pairs
        raise DataError(f"--set {text}: the width {width} cannot be divided into {n_head} heads of "
                        f"{'one' if config.model == 'flow' else 'an even'} size; give both")
    return chosen


def has_run(folder):
    return any(os.path.exists(os.path.join(folder, f)) for f in ("ckpt.pt", "ckpt_previous.pt"))


def new_run_folder(config, say):
    """An earlier run in --out is kept under another name: nothing on disk is lost."""
    if has_run(config.out) and not config.resume:
        n = next(i for i in range(1, 10_000) if not os.path.exists(f"{config.out}.{i}"))
        os.rename(config.out, f"{config.out}.{n}")
        say(f"{config.out} already held a run; it is now {config.out}.{n}")
    os.makedirs(os.path.join(config.out, "samples"), exist_ok=True)


def train(config):
    rank, world = rank_and_world()
    kind, device = device_of()
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1 or config.shard:
        if world == 1:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
        join_processes("nccl" if kind == "cuda" else "gloo")
    say = print if rank == 0 else (lambda *_: None)

    # what to train on, and what to train
    settle(config, say)
    model_options(config)
    folder, tokenizer_path = prepare_data(config, say)
    clips = open_clips(folder, "train")
    sizes = model_config(config, clips)
    torch.manual_seed(config.seed)
    model = MODELS[config.model][0](sizes)
    if not config.shard:  # else block by block, below: the whole need not fit on one device
        model.to(device)
    actions = action_statistics(clips)
    if config.model == "flow":
        model.set_statistics(actions["mean"], actions["std"], torch.tensor(clips.meta["latent_mean"]),
                             torch.tensor(clips.meta["latent_std"]))
    else:
        model.set_statistics(actions["mean"], actions["std"])
    n = sum(p.numel() for p in model.parameters())
    about = {"model_config": asdict(sizes), "data": describe_data(config, folder, clips),
             "tokenizer": dict(clips.meta.get("tokenizer", {}), path=portable(tokenizer_path))}

    # how
    file = os.path.join(config.out, "ckpt.pt")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and has_run(config.out):
        config.resume = True  # torchrun --max-restarts began this run again
    if config.resume:
        saved = last_checkpoint(file)
        if config.dtype == "auto":  # measured once for a whole run
            config.dtype = saved["config"].get("dtype", "auto")
    dtype = faster_dtype(kind, device) if config.dtype == "auto" else getattr(torch, config.dtype)
    if dist.is_initialized():  # all processes follow rank 0's measurement
        choice = torch.tensor([dtype == torch.bfloat16], device=device, dtype=torch.int)
        dist.broadcast(choice, 0)
        dtype = torch.bfloat16 if choice.item() else torch.float32
    config.dtype = str(dtype).removeprefix("torch.")
    autocast = torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)
    if config.compile:
        compile_blocks(model)
    runner = model
    if config.shard:
        from torch.distributed.fsdp import fully_shard
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif world > 1:
        runner = DistributedDataParallel(model, device_ids=[device.index] if kind == "cuda" else None,
                                         gradient_as_bucket_view=True, broadcast_buffers=False)  # they are constants
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}

    if rank == 0:
        new_run_folder(config, say)
    barrier()
    step = 0
    if config.resume:
        step = resume(saved, model, optimizer, ema, config, about)
        del saved
        say(f"resuming {file} at step {step}")
    if rank == 0:
        forget_after(os.path.join(config.out, "log.jsonl"), step)
    say(f"{config.model} {config.variant}: {n / 1e6:.1f} M parameters, {len(clips)} clips of {folder}, {config.steps} steps of "
        f"{config.batch} clips on {world} x {kind}, {config.dtype}, to {config.out}")

    stream = Stream(clips, model.draw, config.seed)
    workers = config.workers if config.workers >= 0 else 4 if kind == "cuda" else 0
    loader = iter(DataLoader(stream, batch_sampler=positions(config, step, rank, world), num_workers=workers,
                             pin_memory=kind == "cuda", worker_init_fn=deaf))
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: stop.append(True))
    bar = tqdm(total=config.steps, initial=step, desc="training", disable=rank > 0)
    start, waited, flops, logged = time.perf_counter(), 0.0, 0, step
    last = config.stop_after or config.steps

    while step < min(last, config.steps):
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros(3, device=device)  # sum of losses, their number, and whether anyone was asked to stop
        for m in range(config.accum):
            before = time.perf_counter()
            video, action, draws = next(loader)
            video, action = video.to(device, non_blocking=True), action.to(device, non_blocking=True)
            draws = {k: v.to(device, non_blocking=True) for k, v in draws.items()}
            waited += time.perf_counter() - before
            final = m == config.accum - 1
            if config.shard:
                model.set_requires_gradient_sync(final)
            if not flops:  # aside, for counting would change the order of sums in backward
                with autocast:
                    flops = 3 * count_flops(lambda: model(video, action, draws)) / len(video)  # backward is twice the forward
            wait = isinstance(runner, DistributedDataParallel) and not final  # for the last micro-batch, to sum once
            with runner.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    loss, count = runner(video, action, draws)
                loss.backward()
            total[0] += loss.detach()
            total[1] += count
        total[2] = len(stop)
        if dist.is_initialized():
            dist.all_reduce(total)
        count = max(total[1].item(), 1)  # a small batch may hide no token at all
        mean = total[0].item() / count
        # backward made sums, averaged over processes: turn them into the gradient of the mean
        grads = [p.grad for p in trained if p.grad is not None]
        torch._foreach_mul_(grads, world / count)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            first = step * config.batch
            names = ", ".join(clips.where(stream.clip_index(p)) for p in range(first, first + min(config.batch, 4)))
            raise DataError(f"loss {mean} and gradient norm {norm} at step {step}; the checkpoint in {config.out} is left as it "
                            f"was; the batch began with {names}: look at these clips, or lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(config.ema, (1 + step) / (10 + step))  # a young average forgets quickly
        current = dict(model.named_parameters())  # buffers are statistics: they do not change
        torch._foreach_lerp_([ema[k] for k in current], [p.detach() for p in current.values()], 1 - decay)
        bar.update()

        interrupted, done = total[2].item() > 0 or step == config.stop_after, step == config.steps
        if step % config.log_every == 0 or interrupted or done:
            seconds = time.perf_counter() - start
            rate = (step - logged) * config.batch / seconds
            line = {"step": step, "loss": mean, "lr": lr, "grad_norm": norm, "samples_per_s": rate,
                    "tflops": flops * rate / 1e12, "peak_gb": peak_gb(kind), "data_wait": waited / seconds}
            if rank == 0:
                with open(os.path.join(config.out, "log.jsonl"), "a") as f:
                    f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
                bar.set_postfix(loss=f"{mean:.4f}", per_s=f"{rate:.1f}")
            start, waited, logged = time.perf_counter(), 0.0, step
        if step % config.save_every == 0 or interrupted or done:
            save_checkpoint(file, model, optimizer, ema, step, config, about)
        if (config.sample_every > 0 and step % config.sample_every == 0) or (done and config.sample_every >= 0):
            show(config, about, sizes, ema, folder, step, device)
        if interrupted and not done:
            say(f"stopped after step {step}; the same command with --resume goes on from {file}")
            break
    bar.close()
    if step >= config.steps:
        say(f"done: python sample.py --ckpt {file}  and  python evaluate.py --ckpt {file}")
    if dist.is_initialized():
        dist.destroy_process_group()


def show(config, about, sizes, ema, folder, step, device):
    """OUT/samples/step_N.gif: four validation clips, context | truth | prediction | other actions."""
    weights = full(ema)
    if rank_and_world()[0] == 0:
        tokenizer = load_tokenizer_for(about["tokenizer"], device, required=False)
        if "val" not in split_folders(folder):
            print(f"{folder} has no val split: no sample pictures")
        elif tokenizer is None:
            print(f"no tokenizer at {about['tokenizer']['path']!r}: no sample pictures, give --tokenizer")
        else:
            model = MODELS[config.model][0](sizes).to(device).eval()
            model.load_state_dict(weights)
            rows = picture_rows(dream(model, tokenizer, open_clips(folder, "val"), num=min(4, len(open_clips(folder, "val"))),
                                      **SAMPLING[config.preset, config.model]))
            save_gif(rows, os.path.join(config.out, "samples", f"step_{step:06d}.gif"), hz=open_clips(folder, "val").hz)
        save_curve(config.out)
    barrier()


def comments(cls):
    """{field: the comment beside it}: the source of a dataclass is its own documentation."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"model": list(MODELS), "variant": list(VARIANTS), "preset": ["auto", "tiny", "paper"],
               "dtype": ["auto", "float32", "bfloat16"], "decay": ["", "linear", "cosine"],
               "checkpoint_activations": ["products", "inputs"]}
    helps = comments(TrainConfig)
    for f in fields(TrainConfig):
        text = helps.get(f.name, "") + (f" (default {f.default})" if f.default not in ("", 0, -1, False) else "")
        if f.type in (bool, "bool"):
            p.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            alone = dict(nargs="?", const="inputs") if f.name == "checkpoint_activations" else {}
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default, choices=choices.get(f.name), help=text,
                           metavar=None if f.name in choices else f.name.upper(), required=f.name in ("model", "variant"), **alone)
    return TrainConfig(**vars(p.parse_args(argv)))


def main(argv=None):
    config = parse(argv)
    try:
        train(config)
    except (DataError, TokenizerError, CheckpointError) as e:
        sys.exit(f"train.py: {e}" if rank_and_world()[0] == 0 else 1)
    except OSError as e:  # what was renamed is whole, what was not is beside it
        sys.exit(f"train.py: {e.filename or config.out}: {e.strerror}; checkpoints on disk are whole, go on with --resume")


if __name__ == "__main__":
    main()
