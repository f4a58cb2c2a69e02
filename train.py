"""Trains Masked-HWM (Sec. 3.1) or Flow-HWM (Sec. 3.2): a straight script, for one process or many.

    python train.py --model flow --variant full                         # on a laptop: the built-in robot
    torchrun --nproc_per_node=2 train.py --model flow --variant full    # the same run on two processes
    python train.py --model masked --variant base --data 1x             # the paper's model, on a GPU

In come clips: video as ids (T, H, W) or latents (C, T, H, W), and actions (17, A), one per frame. Into the
folder OUT go ckpt.pt, ckpt_best.pt (lowest validation loss), log.jsonl, loss.png and samples/*.gif.

Everything random is a function of the seed and a position p = step * batch + i, which names a clip and all
noise in its loss. So a run is the same however its batch is divided, and resuming reads on at n * batch.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import socket
import time
from dataclasses import dataclass, field, fields
from statistics import mean
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blocks import VARIANTS, count_flops, distribute, knob
from data import PAST, SOURCE, DataError, action_statistics, open_clips, prepare_data, split_folders
from examples.speed import compile_checked, faster_on, to_device
from sample import MODELS, describe, last_checkpoint, restore, save_best, save_checkpoint, show, spread
from tokenizer import (Writer, command, count_parameters, device_of, from_rank_0, ignore_signals,
                       join_processes, peak_gb, rank_and_world, remembered_signals, reuse_memory,
                       sum_over_processes, write_whole)

# ---- the knobs of a run --------------------------------------------------------------------------

@dataclass
class TrainConfig:
    """What can be asked of a run. The preset decides what is left empty, at 0 or at -1 (see `settle`)."""
    model: str = knob("", "which of the two models", choices=tuple(MODELS))
    variant: str = knob("", "how its four streams share weights", choices=tuple(VARIANTS))
    preset: str = knob("auto", "auto: paper for 1X data on a GPU, or tiny", choices=("auto", "paper", "tiny"))
    data: str = knob("", "folder of tokens, latents or raw video; default: the built-in robot, in data/robot")
    tokenizer: str = knob("", "file or folder; default: what the data was encoded with, or the shipped one")
    out: str = knob("", "folder of the run; default: out/MODEL_VARIANT")
    resume: bool = knob(False, "go on from OUT/ckpt.pt; a larger --steps prolongs the run")
    # how long, and how much at a time
    steps: int = knob(0, "optimiser steps; default: the preset's", low=1)
    stop_after: int = knob(0, "end after this step as if interrupted, with the schedule of --steps", low=0)
    batch: int = knob(0, "clips a step, over all processes and micro-batches; default: the preset's", low=1)
    accum: int = knob(0, "micro-batches that a process divides its share into; default: what fits", low=0)
    seed: int = knob(0, "of the first weights, the order of clips and all noise", low=0, below=2**23)
    lr: float = knob(0.0, "peak learning rate; default: the preset's", low=1e-9)
    warmup: int = knob(-1, "steps of linear warm-up; default: the preset's", low=0)
    decay: str = knob("", "how the rate falls to 0; default: the preset's", choices=("linear", "cosine"))
    weight_decay: float = knob(0.01, "of AdamW", low=0)
    grad_clip: float = knob(1.0, "largest norm of the gradient", low=1e-12)
    ema: float = knob(0.999, "decay of the averaged weights, which are sampled from; 0: none", low=0, below=1)
    # speed and memory
    device: str = knob("", "mps: Apple's GPU, yet untried; default: a CUDA GPU or CPU", choices=("mps",))
    dtype: str = knob("auto", "auto: whichever is faster here", choices=("auto", "float32", "bfloat16"))
    compile: bool = knob(None, "torch.compile the blocks; default: for the paper preset on a GPU")
    checkpoint_activations: str = knob(
        "", "hold less for the backward pass: matrix products, or (the flag alone) inputs of blocks only",
        choices=("products", "inputs"), alone="inputs")
    shard: bool = knob(False, "FSDP2: divide parameters, gradients and optimiser among the processes")
    workers: int = knob(-1, "processes that read clips ahead; default: four on a GPU, none on a CPU", low=-1)
    # data that is made first
    encode: bool = knob(False, "encode raw video in --data into DATA_discrete or DATA_continuous")
    stride: int = knob(0, "of that: frames from one clip to the next; default: about 5000 clips", low=0)
    recolour: bool = knob(None, "of that: most clips in other colours; default: of less than 5000 frames")
    camera: str = knob("", SOURCE["camera"])
    fit: str = knob("", SOURCE["fit"], choices=("crop", "pad"))
    actions: str = knob("", SOURCE["actions"])
    frames: int = knob(20_000, "frames of the built-in robot, drawn where it is missing", low=1)
    # what is written
    val_every: int = knob(0, "steps from one validation to the next; default: 14 in a run; -1: none", low=-1)
    log_every: int = knob(20, "steps from one line of log.jsonl to the next", low=1)
    save_every: int = knob(0, "steps from one checkpoint to the next; default: by time", low=0)
    save_minutes: float = knob(5.0, "minutes from one checkpoint to the next, without --save_every", low=0)
    sample_every: int = knob(1000, "steps from one GIF to the next; 0: only at the end, -1: never", low=-1)
    options: dict = field(default_factory=dict)  # of the model, unlike its preset: {"n_layer": 8}

# ---- the stream of clips and noise ---------------------------------------------------------------

class Stream(Dataset):
    """The endless training stream. Item p is the p-th clip trained on, with everything random in its loss."""

    def __init__(self, clips, draw, seed):
        self.clips, self.draw, self.seed = clips, draw, seed
        self.epoch, self.order = -1, None

    def clip_index(self, p):
        epoch, i = divmod(p, len(self.clips))
        if epoch != self.epoch:  # every epoch is a permutation of its own
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.clips), generator=generator)
        return int(self.order[i])

    def __getitem__(self, p):
        clip = self.clips[self.clip_index(p)]
        generator = torch.Generator().manual_seed((self.seed << 40) + p)
        return clip["video"], clip["actions"], self.draw(generator)

def positions(config, step, rank, world):
    """The positions of each micro-batch of one process, from `step` on and without end: [p, ...], ..."""
    share = config.batch // (world * config.accum)
    while True:
        for micro in range(config.accum):
            first = step * config.batch + (micro * world + rank) * share
            yield list(range(first, first + share))
        step += 1

def micro_batches(stream, config, step, device):
    """Micro-batches of this process, on its device and without end: video, actions, draws."""
    on_gpu = device.type == "cuda"
    workers = 4 * on_gpu if config.workers < 0 else config.workers  # a CPU's cores are busy with the model
    loader = DataLoader(stream, batch_sampler=positions(config, step, *rank_and_world()), num_workers=workers,
                        pin_memory=on_gpu, worker_init_fn=ignore_signals)
    yield from (to_device(batch, device) for batch in loader)

# ---- the run -------------------------------------------------------------------------------------

def learning_rate(config, step):
    """Rate of the update from `step` to step + 1. Update number `steps`, which never comes, would have 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    left = (config.steps - step) / max(1, config.steps - config.warmup)  # from 1 to 0
    if config.decay == "cosine":
        left = math.sin(math.pi / 2 * left) ** 2
    return config.lr * left

def train(config):
    """A run, from its knobs to its last checkpoint. Unusable input raises DataError, in one sentence."""
    # 1. Processes. One that runs alone is a group of one, so that nothing below asks whether a group exists.
    rank, world = rank_and_world()
    kind, device = device_of(config.device)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    reuse_memory()
    join_processes("nccl" if kind == "cuda" and (world > 1 or config.shard) else "gloo")
    say = print if rank == 0 else (lambda *_: None)

    # 2. Data. What is missing is made: the built-in robot, or the latents of raw video.
    settle(config, say)
    module = MODELS[config.model]
    folder, tokenizer = prepare_data(module.KIND, config.data, config.tokenizer, config.frames, config.encode,
                                     kind, say, config.stride or None, config.recolour, **source_of(config))
    clips = open_clips(folder, "train")
    sizes = model_config(config, clips)
    about = describe(config, sizes, folder, clips, tokenizer)
    if about["data"]["sha256"] != from_rank_0(about["data"]["sha256"]):
        raise DataError(f"{folder} on {socket.gethostname()} is not the first machine's: copy that one")

    # 3. The folder of the run, which rank 0 locks and makes ready, and the checkpoint to go on from.
    lock = open_run_folder(config, say)
    file = f"{config.out}/ckpt.pt"
    saved = last_checkpoint(file) if from_rank_0(config.resume) else None

    # 4. The model with the statistics of its data.
    torch.manual_seed(config.seed)
    model = module.Model(sizes)
    statistics = list(action_statistics(clips).values())
    if module.KIND == "continuous":
        statistics += torch.tensor([clips.meta["latent_mean"], clips.meta["latent_std"]])
    model.set_statistics(*statistics)

    # 5. The first micro-batch, and the number type that it is to be computed in.
    light = SimpleNamespace(config=sizes, layout=model.layout)  # no weights, for readers of clips get a copy
    stream = Stream(clips, functools.partial(module.Model.draw, light), config.seed)
    batches = micro_batches(stream, config, saved["step"] if saved else 0, device)
    batch = next(batches)
    if config.dtype == "auto":  # why that of before: other types give other losses
        config.dtype = saved["config"]["dtype"] if saved else faster_on(device, model, batch)
    autocast = torch.autocast(kind, getattr(torch, config.dtype), enabled=config.dtype != "float32")

    # 6. The model as this process trains it, the optimiser, and the running average of the weights.
    runner = distribute(model, config.shard, device)  # the same, in what averages gradients over processes
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    ema = {name: x.detach().clone() for name, x in model.state_dict().items()}
    step = restore(saved, model, optimizer, ema, config, about) if saved else 0
    flops = 3 * count_flops(lambda: model(*batch)) / len(batch[0])  # backward costs twice what forward does
    epochs, millions = config.steps * config.batch / len(clips), count_parameters(model) / 1e6
    say(f"{len(clips)} clips, each seen {epochs:.1f} times: {config.model} {config.variant}, {millions:.1f} M"
        f" parameters, {config.steps} steps of {config.batch} clips on {world} x {kind} in {config.dtype}")
    if saved:
        check_resumed(config, saved, about, say)
    if config.compile:
        config.compile = compile_right(config, model, runner, batch, autocast, say)
    del saved

    # 7. Validation, the log, and the step to end with.
    validation = Validation(config, model, folder, clips, device, say)
    log = Log(config, step, flops, kind)
    last = min(config.steps, config.stop_after or config.steps)
    save_at = time.perf_counter() + 60 * config.save_minutes
    asked = 0  # by how many signals, on all processes together, the run was asked to stop

    with lock, remembered_signals() as signals, Writer() as writer:
        while step < last and not asked:
            # Forward and backward, for every micro-batch. The model returns a sum of losses and their number
            # (of clips, or of hidden tokens): a mean of means would give the tokens unequal weights.
            total = torch.zeros(4, device=device)  # losses, their number, signals, votes for a checkpoint
            for micro in range(config.accum):
                average_gradients(runner, config, micro == config.accum - 1)  # once a step
                with autocast:
                    loss, count = runner(*batch)
                loss.backward()
                total[0] += loss.detach()
                total[1] += count
                batch = next(batches)  # of the next round, while a GPU is at work on this one
            total[2] = len(signals)
            total[3] = not config.save_every and time.perf_counter() > save_at
            sum_over_processes(total)
            loss, count, asked, votes = total.tolist()
            count = max(count, 1)  # in a small batch no token at all may be hidden
            loss /= count

            # The gradient of the mean loss. backward() left that of the sum, averaged over processes.
            torch._foreach_mul_([p.grad for p in trained if p.grad is not None], world / count)
            norm = clip_gradient(trained, config.grad_clip)
            if not math.isfinite(loss + norm):
                refuse(config, step, loss, norm, stream)

            # The update, and the running average of the weights, which forgets quickly while it is young.
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(config.ema, (1 + step) / (10 + step))
            average(ema, model, decay)

            # What is written. All processes take part, for with --shard each of them holds a piece.
            ends, found = step == last or asked > 0, {}
            log.bar.update()
            if is_due(config.val_every, step, step == config.steps):
                found = validation.measure(ema, autocast)
                log.start += found["val_seconds"]  # this was no training
            if found or is_due(config.log_every, step, ends):
                log.write(step, loss=loss, lr=lr, grad_norm=norm, **found)
            if found and log.best().get("step") == step:
                save_best(f"{config.out}/ckpt_best.pt", ema, step, config, about, writer)
            if is_due(config.save_every, step, ends or votes > 0):
                writer.wait()  # why before: two copies of the state may be too many for the memory
                save_checkpoint(file, model, optimizer, ema, step, config, about, writer)
                save_at = time.perf_counter() + 60 * config.save_minutes
            writer.check()
            if is_due(config.sample_every, step, step == config.steps):
                show(config, about, ema, step, device)

    log.bar.close()
    log.conclude(config, step, file, say)
    dist.destroy_process_group()

def compile_right(config, model, runner, batch, autocast, say):
    """Compiles the blocks -> True, if loss and gradient of the first batch stay as they are."""
    def loss_and_norm():
        model.zero_grad(set_to_none=True)
        with autocast:
            loss, _ = runner(*batch)
        loss.backward()
        return torch.tensor([loss.item(), clip_gradient(model.parameters(), config.grad_clip)])

    average_gradients(runner, config, config.shard)  # DDP need not, so that each process can fail by itself
    is_right = compile_checked(model, loss_and_norm, config.dtype, say)
    model.zero_grad(set_to_none=True)
    return is_right

def average_gradients(runner, config, yes):
    """Whether the next backward pass averages gradients over processes."""
    if config.shard:
        runner.set_requires_gradient_sync(yes)
    else:
        runner.require_backward_grad_sync = yes  # DDP's; a model alone does not look at it

def clip_gradient(trained, limit):
    """Scales the gradient to the norm `limit` if it is larger -> its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(trained, limit)
    if hasattr(norm, "full_tensor"):  # with --shard
        norm = norm.full_tensor()
    return norm.item()

@torch.no_grad()
def average(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * weights. Buffers hold statistics of the data and never change."""
    for name, p in model.named_parameters():
        ema[name].lerp_(p, 1 - decay)

def is_due(every, step, last):
    """every > 0: whenever so many steps are done, and after the last; 0: only after the last; -1: never."""
    if every > 0 and step % every == 0:
        return True
    return last and every >= 0

# ---- validation ----------------------------------------------------------------------------------

class Validation:
    """The loss of a few clips that are not trained on, by the averaged weights, always under one noise."""

    def __init__(self, config, model, folder, trained_on, device, say):
        self.model, self.batches = model, []
        if "val" not in split_folders(folder):
            config.val_every = -1
            say(f"no validation loss: {folder} has no val split")
        if config.val_every < 0:
            return
        # 1. The clips. By default two passes through them take less than 3 % of the steps' three passes.
        clips = open_clips(folder, "val")
        if (clips.shape, clips.action_dim) != (trained_on.shape, trained_on.action_dim):
            raise DataError(f"{clips.path} is not like {trained_on.path}: encode both with one tokenizer")
        chosen = spread(clips, min(32, len(clips)))
        if config.val_every == 0:
            affordable = 25 * len(chosen) // config.batch
            config.val_every = max(config.steps // 14, affordable)
        # 2. What their losses take. Shuffled actions are those of a clip far away, but for the past.
        items, n_past = [], model.layout.lengths[2]
        for i in chosen:
            clip, other = clips[i], clips[(i + len(clips) // 2) % len(clips)]
            shuffled = torch.cat([clip["actions"][:n_past], other["actions"][n_past:]])
            draws = model.draw(torch.Generator().manual_seed(i))
            items.append((clip["video"], clip["actions"], shuffled, draws))
        known = model.known_losses(torch.stack([item[0] for item in items]))
        say(f"validation loss of {len(chosen)} clips every {config.val_every} steps; {known}")
        # 3. Each process takes its share. With --shard all must take part, so an idle one computes in vain.
        rank, world = rank_and_world()
        loader = DataLoader(items, config.batch // (world * config.accum), generator=torch.Generator())
        batches = [to_device(batch, device) for batch in loader]
        self.batches = [(True, *batch) for batch in batches[rank::world]]
        if len(self.batches) < len(batches[::world]):
            self.batches.append((False, *batches[0]))

    @torch.no_grad()
    def measure(self, ema, autocast):
        """-> {"val_loss", "action_share": the loss under shuffled actions divided by it, "val_seconds"}"""
        start, total = time.perf_counter(), torch.zeros(3, device=self.batches[0][1].device)
        exchange(self.model, ema)
        for counts, video, actions, shuffled, draws in self.batches:
            with autocast:
                true, n = self.model(video, actions, draws)
                other, _ = self.model(video, shuffled, draws)
            if counts:
                total += torch.stack([true.float(), other.float(), n.float()])
        if hasattr(self.model, "reshard"):  # with --shard averaged weights have been gathered: let go of them
            self.model.reshard()
        exchange(self.model, ema)
        sum_over_processes(total)
        true, other, n = total
        found = {"val_loss": (true / n).item(), "action_share": (other / true).item()}
        return {**found, "val_seconds": time.perf_counter() - start}

def exchange(model, ema):
    """The averaged weights become the model's, and the model's the averaged; a second call undoes it."""
    for name, p in model.named_parameters():
        held = p.detach().clone()
        p.copy_(ema[name])
        ema[name].copy_(held)

# ---- what was not given --------------------------------------------------------------------------

def source_of(config):
    """What is chosen of a LeRobot folder."""
    return {name: getattr(config, name) for name in SOURCE}

def settle(config, say):
    """Fills in the preset, and what the preset decides. The first line printed says which preset, and why."""
    has_gpu, why = torch.cuda.is_available(), "as asked"
    if config.preset == "auto":
        is_1x = config.data and "robot" not in open_clips(config.data, "train", **source_of(config)).meta
        config.preset = "paper" if has_gpu and is_1x else "tiny"
        why = f"{'a' if has_gpu else 'no'} CUDA device, {config.data or 'the built-in robot'}"
    say(f"preset {config.preset} ({why}): --model {config.model} --variant {config.variant}")
    preset = MODELS[config.model].TRAINING[config.preset]
    for name in ("steps", "batch", "lr", "warmup", "decay"):
        if getattr(config, name) == getattr(TrainConfig, name):  # it was not given
            setattr(config, name, preset[name])
    if config.compile is None:
        config.compile = has_gpu and config.preset == "paper" and config.checkpoint_activations != "products"
    check_flags(config)
    config.out = os.path.normpath(config.out or f"out/{config.model}_{config.variant}")

    # A process's share of the batch goes into as few micro-batches as fit its memory.
    world, paper_on_cpu = rank_and_world()[1], config.preset == "paper" and not has_gpu
    if not config.accum:
        share, config.accum = config.batch // world, 1
        fits = 1 if paper_on_cpu else preset.get("micro", share)
        while share % config.accum or share // config.accum > fits:
            config.accum += 1
    parts = world * config.accum
    if config.batch % parts:
        raise DataError(f"--batch {config.batch} cannot be divided among {world} processes x --accum "
                        f"{config.accum}: give a multiple of {parts}")
    if paper_on_cpu and not config.checkpoint_activations:
        config.checkpoint_activations = "inputs" if config.compile else "products"
        say(f"no GPU: one clip at a time, with --checkpoint_activations {config.checkpoint_activations}")

def model_options(name):
    """{name: field} of a model's dataclass, without what the data or a knob of TrainConfig decides."""
    decided = {"T_p", "T_f", "H", "W", "temporal", "action_dim", "vocab_size", "channels", "levels"}
    decided.update(f.name for f in fields(TrainConfig))
    return {f.name: f for f in fields(MODELS[name].Config) if f.name not in decided}

def check_flags(config):
    """Options that the model does not have, and numbers that make no sense, are refused before any work."""
    known = model_options(config.model)
    for name in config.options.keys() - known:
        raise DataError(f"--{name} is no option of {config.model}, which has --{', --'.join(known)}")
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        low, below = f.metadata.get("low", -math.inf), f.metadata.get("below", math.inf)
        if isinstance(value, (int, float)) and not low <= value < below:
            raise DataError(f"--{f.name} {value} makes no sense: give {low} or more, but less than {below}")
    if config.compile and config.checkpoint_activations == "products":
        raise DataError("--compile works with --checkpoint_activations inputs, but not products: give that")
    sizes_of(config)

def sizes_of(config, **decided):
    """The preset's sizes, with the options given and what is decided elsewhere."""
    module = MODELS[config.model]
    decided.update(variant=config.variant, checkpoint_activations=config.checkpoint_activations)
    try:
        return module.Config(**{**module.PRESETS[config.preset], **config.options, **decided})
    except DataError as e:
        flags = [f"--{name} {value}" for name, value in config.options.items()]
        raise DataError(f"{' '.join(flags) or config.preset}: {e}") from None

def model_config(config, clips):
    """The sizes of the model, some of which its data decides."""
    tokenizer = clips.meta.get("tokenizer", {})
    *channels, T, H, W = clips.shape  # of latents (C, T, H, W), of ids (T, H, W)
    temporal = tokenizer.get("temporal", 8)
    T_p = 1 + (PAST - 1) // temporal  # the first latent is of one frame
    decided = dict(action_dim=clips.action_dim, temporal=temporal, T_p=T_p, T_f=T - T_p, H=H, W=W)
    if channels:
        decided["channels"] = channels[0]
    else:  # ids of another's making do not say their digits
        digits = "levels" in tokenizer and sizes_of(config).share_digits
        levels = tuple(tokenizer["levels"]) if digits else ()
        decided.update(vocab_size=clips.vocab_size, share_digits=digits, levels=levels)
    return sizes_of(config, **decided)

# ---- the folder of a run -------------------------------------------------------------------------

def open_run_folder(config, say):
    """Makes OUT and returns its lock. An earlier run is kept under another name, so that nothing is lost."""
    if rank_and_world()[0] > 0:
        return contextlib.nullcontext()
    found = any(os.path.exists(f"{config.out}/{name}") for name in ("ckpt.pt", "ckpt_previous.pt"))
    if found and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        config.resume = True  # torchrun --max-restarts has begun this run again
    if config.resume and not found:
        raise DataError(f"there is no {config.out}/ckpt.pt to resume: leave --resume out, or change --out")
    lock = hold(config.out)
    if found and not config.resume:
        n = 1
        while os.path.exists(f"{config.out}.{n}"):
            n += 1
        os.rename(config.out, f"{config.out}.{n}")
        say(f"{config.out} already held a run; it is now {config.out}.{n}")
        lock = hold(config.out)
    return lock

def hold(folder):
    """Locks FOLDER/lock, which says who holds it, until the file returned is closed or this process ends."""
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return contextlib.nullcontext()
    file = open(os.path.join(folder, "lock"), "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise DataError(f"{folder} is in use by {file.read()}: stop that, or give another --out") from None
    file.truncate(0)
    print("process", os.getpid(), "on", socket.gethostname(), end="", file=file, flush=True)
    return file

def check_resumed(config, saved, about, say):
    """Refuses other data than before, but not another path to it. A run may become longer."""
    then, now, step, steps = saved["data"], about["data"], saved["step"], saved["config"]["steps"]
    if any(then.get(key, now[key]) != now[key] for key in ("clips", "sha256")):
        raise DataError(f"the checkpoint in {config.out} is of another run, on {then['path']}, whose clips "
                        f"are not those of {now['path']}: give the same --data, or another --out")
    if config.steps < steps:
        raise DataError(f"--steps {config.steps}: the run in {config.out} has {steps}; give as many or more")
    if 0 < config.stop_after <= step:
        raise DataError(f"--stop_after {config.stop_after}: the run in {config.out} is at {step} already")
    say(f"resuming {config.out}/ckpt.pt at step {step}")
    if config.steps > steps:
        say(f"prolonged from {steps} to {config.steps} steps: the {config.decay} schedule covers them all")

class Log:
    """OUT/log.jsonl, by rank 0, and the progress bar. A line has the loss of its step, and the rate since the
    line before it."""

    def __init__(self, config, step, flops, kind):
        self.file, self.batch = f"{config.out}/log.jsonl", config.batch
        self.flops, self.kind = flops, kind  # operations per clip, and "cuda" or "cpu"
        self.is_writer = rank_and_world()[0] == 0
        self.bar = tqdm(total=config.steps, initial=step, desc="training", disable=not self.is_writer)
        self.step, self.start = step, time.perf_counter()
        self.is_judged, self.val, kept = False, "", []
        if self.is_writer and os.path.exists(self.file):  # steps after the checkpoint will be logged again
            with open(self.file) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_whole(self.file, lambda name: open(name, "w").writelines(kept))
        self.lines = [json.loads(line) for line in from_rank_0(kept)]

    def write(self, step, **measured):
        now = time.perf_counter()
        rate = (step - self.step) * self.batch / (now - self.start)
        self.step, self.start = step, now
        line = {"step": step, **measured, "samples_per_s": rate, "tflops": self.flops * rate / 1e12,
                "peak_gb": peak_gb(self.kind)}
        line = {name: round(x, 6) for name, x in line.items() if not math.isnan(x)}
        self.lines.append(line)
        if self.is_writer:
            with open(self.file, "a") as f:
                print(json.dumps(line), file=f)
            self.val = line.get("val_loss", self.val)
            self.bar.set_postfix(loss=f"{line['loss']:.4f}", val=self.val, per_s=f"{rate:.1f}")
            self.judge()

    def validated(self):
        return [line for line in self.lines if "val_loss" in line]

    def best(self):
        """The line of the lowest validation loss, or {}."""
        return min(self.validated(), key=lambda line: line["val_loss"], default={})

    def judge(self):
        """Says it once when three validations in a row are 1 % above the best while training loss falls."""
        best, late = self.best(), [line["val_loss"] for line in self.validated()[-3:]]
        if self.is_judged or not late or min(late) < 1.01 * best["val_loss"]:
            return
        losses, n = [line["loss"] for line in self.lines], self.lines.index(best) + 1
        if mean(losses[n:]) < mean(losses[:n]):
            self.is_judged = True
            self.bar.write("The model is memorising: training loss falls, but validation loss is "
                           f"{late[-1]:.4g} after {best['val_loss']:.4g} at step {best['step']}. Try more "
                           "clips (data.py encode --stride 4), other colours (--recolour), or fewer --steps.")

    def conclude(self, config, step, file, say):
        """The last words of a run: how to go on, or which of its two checkpoints is the better one."""
        if step < config.steps:
            say(f"stopped after step {step}; the same command with --resume goes on from {file}")
            return
        best, last = self.best(), self.lines[-1]
        if best == last:
            say(f"the last validation loss, {best['val_loss']}, is the lowest")
        elif best:
            file = f"{config.out}/ckpt_best.pt"
            say(f"{file}, of step {best['step']}, is better than ckpt.pt: its validation loss is "
                f"{best['val_loss']}, not {last['val_loss']}")
        say(f"done: python sample.py --ckpt {file}  and  python evaluate.py --ckpt {file}")

def refuse(config, step, loss, norm, stream):
    """Ends a run whose loss is not finite. No checkpoint is written, so that the last good one stays."""
    first = stream.clips.where(stream.clip_index(step * config.batch))
    raise DataError(f"loss {loss} and gradient norm {norm} at step {step}, in a batch that begins with "
                    f"{first}: look at its clips, or lower --lr; {config.out}/ckpt.pt is good")

# ---- the command line ----------------------------------------------------------------------------

def parse(argv=None):
    """The command line -> TrainConfig. Its knobs are flags, and so are the options of both models."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    knobs = [f for f in fields(TrainConfig) if f.name != "options"]
    options = {**model_options("masked"), **model_options("flow")}
    for f in [*knobs, *options.values()]:
        note = f" (default {f.default})" if f.default else ""
        if f.name in options:
            owners = " and ".join(name for name in MODELS if f.name in model_options(name))
            note = f" (of {owners}; default: the preset's)"
        more = {"type": f.type, "choices": f.metadata.get("choices")}
        if f.type is bool:
            more = {"action": argparse.BooleanOptionalAction}
        if "alone" in f.metadata:  # it may be given without a value
            more.update(nargs="?", const=f.metadata["alone"])
        more["required"] = f.name in ("model", "variant")
        help = f.metadata.get("help", "").replace("%", "%%") + note
        p.add_argument(f"--{f.name}", help=help, default=argparse.SUPPRESS, **more)
    given = vars(p.parse_args(argv))  # without the flags that were not given
    own = {f.name: given.pop(f.name) for f in knobs if f.name in given}
    return TrainConfig(**own, options=given)

@command
def main(argv=None):
    train(parse(argv))

if __name__ == "__main__":
    main()
