"""A checkpoint dreams: GIF and PNG strips with the rows context | truth | prediction | the same with other actions.

    python sample.py --ckpt out/flow_full/ckpt.pt                          # four validation clips
    python sample.py --ckpt out/flow_full/ckpt.pt --actions turn_left      # what if it turned left?
    python sample.py --ckpt out/flow_full/ckpt.pt --rollout 6              # go on: window after window, on its own frames
    python sample.py --ckpt out/flow_full/ckpt.pt --trace --steps 8        # how a frame comes about, step by step

`dream` is the whole of it: past frames -> latents -> the model's sampler, with the actions of your choice -> frames.
Also here: reading checkpoints (`load_model`), which train.py and evaluate.py share.
"""
import argparse
import contextlib
import json
import os
import pickle
import sys
import time
import zipfile
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import flow_hwm
import masked_hwm
from data import PAST, DataError, fingerprint, open_clips, synth, to_uint8, to_video
from blocks import compile_blocks
from tokenizer import TokenizerError, load_tokenizer, rank_and_world

MODELS = {"masked": masked_hwm, "flow": flow_hwm}
ACTIONS = ("true", "shuffled", "frozen", "drive", "turn_left", "turn_right", "look_up", "reach")
HERE = os.path.dirname(os.path.abspath(__file__))


CheckpointError = DataError


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def read_checkpoint(file):
    """What train.py saved, as plain tensors and containers (never code); every byte is checked against its CRC."""
    if not os.path.isfile(file):
        raise CheckpointError(f"there is no checkpoint {file}: train one with train.py, or give one of weights/")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{file} is damaged at {damaged}: use an older checkpoint")
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        if isinstance(e, CheckpointError):
            raise
        why = "it asks for more than tensors and plain values, do not trust it" if isinstance(e, pickle.UnpicklingError) else (
            f"truncated, damaged, or not a checkpoint: {type(e).__name__}")
        raise CheckpointError(f"{file} cannot be used ({why}): give a ckpt.pt made by train.py") from None
    parts = ("ema", "config", "model_config", "tokenizer", "data")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), dict) for k in parts):
        raise CheckpointError(f"{file} is not a checkpoint of a world model (is it a tokenizer?): give a ckpt.pt made by "
                              "train.py")
    return saved


def load_model(file, device="cpu", weights="ema"):
    """-> the model, ready to sample, and all else that the checkpoint says. weights: the average ("ema"), or "last"."""
    saved = read_checkpoint(file)
    name = saved["config"].get("model")
    if name not in MODELS:
        raise CheckpointError(f"{file} is of a model {name!r}, which is none of {', '.join(MODELS)}")
    Model, Config = MODELS[name].Model, MODELS[name].Config
    part = {"ema": "ema", "last": "model"}[weights]
    if part not in saved:
        raise CheckpointError(f"{file} holds averaged weights only (it was made by --export): leave out --weights {weights}")
    try:
        model = Model(Config(**saved["model_config"]))
        model.load_state_dict({k: v.float() for k, v in saved[part].items()})
    except (TypeError, RuntimeError) as e:
        raise CheckpointError(f"{file} does not fit its own configuration ({str(e).splitlines()[0]}): it was made by other "
                              "code") from None
    return model.to(device).eval().requires_grad_(False), saved


def barrier():
    if dist.is_initialized():
        dist.barrier()


def save_checkpoint(file, model, optimizer, ema, step, config, about):
    """One file with all that resuming, sampling and scoring need; written beside and renamed, the previous one kept as
    ckpt_previous.pt. Every process takes part (with --shard each holds a piece), rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=torch.cuda.is_available())  # on a CPU it would copy
    weights, moments = get_state_dict(model, optimizer, options=options)
    averaged = whole(ema)
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
    barrier()


def whole(state):
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


def restore(saved, model, optimizer, ema, config, about):
    """Puts the state of a checkpoint back; a run that differs in anything that changes its course is refused. What is
    random in training is a function of seed and position; the generator is put back for what else may use it."""
    free = {"resume", "stop_after", "keep", "log_every", "save_every", "sample_every", "workers", "compile", "out", "shard", "dtype",
            "encode", "accum", "preset", "checkpoint_activations", "tokenizer", "data", "steps", "options"}
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


def load_tokenizer_for(about, device="cpu", path="", required=True):
    """The tokenizer that a checkpoint's latents came from: at `path`, or where the checkpoint says, or beside this file."""
    named = about.get("path", "")
    for place in [path] if path else [named, os.path.join(HERE, named)] if named else []:
        if os.path.exists(place):
            if about.get("sha256") and fingerprint(place) != about["sha256"]:
                raise TokenizerError(f"{place} is not the tokenizer that the checkpoint's data was encoded with (its SHA-256 "
                                     "differs): give that one with --tokenizer")
            return load_tokenizer(place, device)
    if required:
        raise TokenizerError(f"the checkpoint's tokenizer {path or about.get('path') or '(none named)'} is not there: give its "
                             "place with --tokenizer")
    return None


def validation_clips(saved, path="", frames=17):
    """The validation clips of --data, or of the checkpoint's own data: raw video if it is there, else its latents. The
    built-in robot is drawn again where it is missing."""
    data = saved["data"]
    for place in [path] if path else [data.get("source", ""), data["path"]]:
        if path or (place and os.path.exists(place)):
            clips = open_clips(place, "val")
            if clips.kind == "raw":  # as it was encoded, or as the model's latents say (1X's own are Cosmos' 8 x 8 x 8)
                size = data.get("size") or saved["model_config"]["W"] * saved["tokenizer"].get("spatial", 8)
                clips = open_clips(place, "val", size=size, frame_stride=data.get("frame_stride", 1))
            return clips
    if data.get("built_in"):
        return open_clips(synth(os.path.join(HERE, "data", "robot"), splits=("val",), **data["built_in"]), "val")
    raise DataError(f"the data of the checkpoint, {data['path']}, is not there: give a folder with --data")


def check_fit(model, tokenizer, clips, sha256=""):
    """One sentence, before the work, where model, tokenizer (`sha256`: of its file) and data do not belong together."""
    c, kind = model.config, "discrete" if hasattr(model.config, "vocab_size") else "continuous"
    size = clips.shape[1] // tokenizer.spatial if clips.kind == "raw" else clips.shape[-1]
    if tokenizer.kind != kind:
        raise TokenizerError(f"the model dreams {kind} latents, but the tokenizer is {tokenizer.kind}: give "
                             "the model's own with --tokenizer")
    if clips.kind not in ("raw", kind) or clips.meta.get("tokenizer", {}).get("sha256", sha256) != sha256:
        raise DataError(f"{clips.path} holds {clips.kind} latents, but the model needs {kind} ones of its "
                        "own tokenizer, or raw video: give other --data")
    if size != c.W or clips.action_dim != c.action_dim:
        raise DataError(f"{clips.path} gives latents of {size} x {size} and {clips.action_dim} actions, the "
                        f"model was trained on {c.H} x {c.W} and {c.action_dim}: give such --data")


# ---------------------------------------------------------------------------------------------------------------------
# Dreaming


def change_actions(name, actions, model, clips, n_past=PAST, another=None):
    """actions (F, A) with those after the past replaced. `another` (F, A) are another clip's, for "shuffled". The motions
    go two standard deviations of the training data away from its mean, over half a window."""
    a = actions.clone()
    index = {joint: i for i, joint in enumerate(clips.names)}
    mean, std = model.action_mean.cpu(), model.action_std.cpu()
    if name == "true":
        return a
    if name == "shuffled":
        a[n_past:] = another[n_past : len(a)]
        return a
    a[n_past:] = a[n_past - 1]  # frozen: every joint stays where it is
    for joint, i in index.items():
        if joint.endswith("VELOCITY"):
            a[n_past:, i] = 0
    targets = {"frozen": {}, "drive": {"LINEAR_VELOCITY": 2}, "turn_left": {"ANGULAR_VELOCITY": 2},
               "turn_right": {"ANGULAR_VELOCITY": -2}, "look_up": {"NECK_PITCH": -2},
               "reach": {side + joint: s for side in ("LEFT_", "RIGHT_")
                         for joint, s in (("SHOULDER_PITCH", 2), ("ELBOW_PITCH", -1))}}[name]
    if targets.keys() - index.keys():
        raise DataError(f"--actions {name} moves {', '.join(sorted(targets))}, but the joints of {clips.path} are "
                        f"{', '.join(clips.names)}: use true, shuffled or frozen, or name the joints in metadata.json")
    ramp = (torch.arange(1, len(a) - n_past + 1) / 4).clamp(max=1)
    for joint, s in targets.items():
        i = index[joint]
        a[n_past:, i] += ramp * (mean[i] + s * std[i] - a[n_past:, i])
    return a


def spread(clips, num):
    """Indices of `num` clips, from the first to the last."""
    if num > len(clips):
        raise DataError(f"--num {num} is more than the {len(clips)} validation clips of {clips.path}: give a smaller --num")
    return np.linspace(0, len(clips) - 1, num).round().astype(int).tolist()


def to_latents(video, tokenizer):
    """A clip as the reader gives it -> latents or ids with a batch axis: raw (F, H, W, 3) uint8 is encoded."""
    if video.dtype == torch.uint8:
        return tokenizer.encode(to_video(video[None]).to(next(tokenizer.parameters()).device))
    return video[None].to(next(tokenizer.parameters()).device)


@torch.no_grad()
def continue_video(model, tokenizer, past, actions, windows=1, generator=None, **settings):
    """past latents (B, [C,] T_p, H, W) + actions (B, 9 + 8 windows, A) -> frames (B, 8 windows, H, W, 3) uint8.
    Later windows start from the last nine frames of the dream itself, encoded again."""
    layout, frames, device = model.layout, [], next(model.parameters()).device
    n_p, n_f = layout.lengths[2:]
    for w in range(windows):
        a = actions[:, w * n_f : w * n_f + n_p + n_f].to(device)
        future = model.sample(past, a, generator=generator, **settings)
        video = tokenizer.decode(torch.cat([past, future], dim=-3))
        frames.append(to_uint8(video[:, :, -n_f:].cpu()))
        if w + 1 < windows:
            past = tokenizer.encode(video[:, :, -n_p:].clamp(-1, 1))
    return torch.cat(frames, dim=1)


def longer(model, clips, i, n):
    """The actions of clip i and the n after them -> (F + n, A), and how many of them are not recorded: there the robot
    holds still."""
    known = torch.cat([clips[i]["actions"], clips.more_actions(i, n)]) if n else clips[i]["actions"]
    missing = len(clips[i]["actions"]) + n - len(known)
    return change_actions("frozen", torch.cat([known, known[-1:].expand(missing, -1)]), model, clips, len(known)), missing


def dream(model, tokenizer, clips, num=4, seed=0, actions="shuffled", windows=1, **settings):
    """For `num` clips spread over `clips`: a dict with context (n, 9, H, W, 3), truth, prediction and other
    (n, 8 windows, H, W, 3), uint8. Same noise for prediction and other: only the actions differ."""
    device = next(model.parameters()).device
    n_p, n_f = model.layout.lengths[2:]
    chosen = spread(clips, num)
    out = {"context": [], "truth": [], "prediction": [], "other": []}
    for j, i in enumerate(chosen):
        clip, further = clips[i], (windows - 1) * n_f
        known, missing = longer(model, clips, i, further)
        if missing:
            print(f"clip {i}: its recording ends {missing} frames before the rollout does; the robot holds still from there")
        another, _ = longer(model, clips, chosen[(j + 1) % num] if num > 1 else (i + len(clips) // 2) % len(clips), further)
        different = change_actions(actions, known, model, clips, n_p, another)
        z = to_latents(clip["video"], tokenizer)
        past = z.narrow(z.ndim - 3, 0, model.layout.T_p).to(device)
        for row, a in (("prediction", known), ("other", different)):
            g = torch.Generator().manual_seed(seed + i)
            out[row].append(continue_video(model, tokenizer, past, a[None], windows, g, **settings)[0])
        raw = clip["video"] if clips.kind == "raw" else to_uint8(tokenizer.decode(z).cpu())[0]
        out["context"].append(raw[:n_p])
        out["truth"].append(raw[n_p:])
    return {k: torch.stack(v).numpy() for k, v in out.items()}


@torch.no_grad()
def trace(model, tokenizer, clips, num=4, seed=0, **settings):
    """How the last predicted frame of `num` clips comes about: (n, steps, H, W, 3) uint8. Flow-HWM: the noise, then the
    latents after every step. Masked-HWM: after every step of every latent frame, tokens still hidden in grey."""
    strips, device = [], next(model.parameters()).device
    for i in spread(clips, num):
        z, steps = to_latents(clips[i]["video"], tokenizer), []
        past, g = z.narrow(z.ndim - 3, 0, model.layout.T_p).to(device), torch.Generator().manual_seed(seed + i)
        model.sample(past, clips[i]["actions"][None].to(device), generator=g, trace=steps, **settings)
        strip = []
        for step in steps:
            latents, hidden = step if isinstance(step, tuple) else (torch.cat([past, step], dim=-3), None)
            frame = to_uint8(tokenizer.decode(latents).cpu())[0, -1]
            if hidden is not None:
                frame[hidden[0, -1].cpu().repeat_interleave(tokenizer.spatial, 0).repeat_interleave(tokenizer.spatial, 1)] = 128
            strip.append(frame)
        strips.append(torch.stack(strip))
    return torch.stack(strips).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


LABELS = {"context": "context", "truth": "truth", "prediction": "prediction", "other": "other actions"}


def picture_rows(dreams, other="other actions"):
    """The dict of `dream` with frames enlarged to at least 128 pixels, and the rows' labels."""
    zoom = max(1, 128 // dreams["context"].shape[2])
    rows = {k: v.repeat(zoom, axis=2).repeat(zoom, axis=3) for k, v in dreams.items()}
    return rows, dict(LABELS, other=other)


def replace(file, write):
    """Writes beside and renames."""
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write(file + ".tmp")
    os.replace(file + ".tmp", file)


def save_gif(rows, file, hz=10):
    """One line a clip: context | truth | prediction | other. All play the context first; the context then stands."""
    frames, labels = rows
    n, n_p, H, W, _ = frames["context"].shape
    n_f, gap, top = frames["prediction"].shape[1], 4, 14
    pictures = []
    for t in range(n_p + n_f):
        canvas = Image.new("RGB", (4 * (W + gap) - gap, top + n * (H + gap) - gap), "white")
        draw = ImageDraw.Draw(canvas)
        for col, key in enumerate(frames):
            draw.text((col * (W + gap) + 2, 1), labels[key], fill="black")
            for j in range(n):
                later = frames[key] if key != "context" else frames["context"][:, -1:]
                picture = frames["context"][j, t] if t < n_p else later[j, min(t - n_p, later.shape[1] - 1)]
                canvas.paste(Image.fromarray(picture), (col * (W + gap), top + j * (H + gap)))
        pictures.append(canvas.quantize(255))
    replace(file, lambda f: pictures[0].save(f, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                                             duration=[round(1000 / hz)] * (len(pictures) - 1) + [1000]))


def save_png(rows, file):
    """A strip for each clip: four rows of frames, time to the right; the last context frame stands above frame 0."""
    frames, labels = rows
    n, n_p, H, W, _ = frames["context"].shape
    n_f, gap, left = frames["prediction"].shape[1], 2, 90
    canvas = Image.new("RGB", (left + max(n_p, n_f) * (W + gap), n * (4 * (H + gap) + 10)), "white")
    draw = ImageDraw.Draw(canvas)
    for j in range(n):
        for r, key in enumerate(frames):
            y = j * (4 * (H + gap) + 10) + r * (H + gap)
            draw.text((4, y + H // 2 - 6), labels[key], fill="black")
            for t, picture in enumerate(frames[key][j]):
                canvas.paste(Image.fromarray(picture), (left + t * (W + gap), y))
    replace(file, lambda f: canvas.save(f, format="PNG"))


def save_trace(strips, file, flow):
    """A line a clip, a picture a step of the sampler, from left to right; above it its time t, or its number."""
    n, steps, H, W, _ = strips.shape
    zoom, gap, top = max(1, 96 // H), 3, 14
    canvas = Image.new("RGB", (steps * (W * zoom + gap) - gap, top + n * (H * zoom + gap) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for k in range(steps):
        draw.text((k * (W * zoom + gap) + 2, 1), f"t = {k / (steps - 1):.2f}" if flow else f"step {k + 1}", fill="black")
        for j in range(n):
            picture = Image.fromarray(strips[j, k]).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            canvas.paste(picture, (k * (W * zoom + gap), top + j * (H * zoom + gap)))
    replace(file, lambda f: canvas.save(f, format="PNG"))


def save_curve(folder, size=(760, 300)):
    """FOLDER/loss.png: the loss of log.jsonl over the steps, and below it what was dreamt on the way, from samples/."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    (width, height), left, top, bottom = size, 60, 24, 24
    steps, losses = (np.array([line[k] for line in log]) for k in ("step", "loss"))
    low, high = losses.min(), np.quantile(losses, 0.98) if len(losses) > 10 else losses.max()  # the first steps may leave it
    x = left + (steps / max(steps[-1], 1)) * (width - left - 12)
    y = height - bottom - ((losses - low) / max(high - low, 1e-9)).clip(0, 1.03) * (height - top - bottom)
    gifs = os.path.join(folder, "samples")
    gifs = sorted(g for g in os.listdir(gifs) if g.startswith("step_") and g.endswith(".gif")) if os.path.isdir(gifs) else []
    shown = []
    for name in gifs[:: max(1, -(-len(gifs) // 5))]:  # of each: the first clip's last predicted frame
        with Image.open(os.path.join(folder, "samples", name)) as gif:
            gif.seek(gif.n_frames - 1)
            w = (gif.width + 4) // 4 - 4
            picture = gif.convert("RGB").crop((2 * (w + 4), 14, 2 * (w + 4) + w, 14 + w))
            shown.append((int(name[5:-4]), picture.resize((128, 128), Image.Resampling.BICUBIC)))
    canvas = Image.new("RGB", (width, height + (150 if shown else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 4), f"loss of {folder} (last {losses[-1]:.4g})", fill="black")
    for part in (0, 0.5, 1):
        v, h = low + part * (high - low), height - bottom - part * (height - top - bottom)
        draw.line([(left, h), (width - 12, h)], fill=(225, 225, 225))
        draw.text((4, h - 6), f"{v:.4g}", fill="black")
        draw.text((left + part * (width - left - 50), height - bottom + 6), f"{round(part * steps[-1])}", fill="black")
    draw.line(list(zip(x.tolist(), y.tolist())), fill=(31, 119, 180), width=2)
    for j, (step, picture) in enumerate(shown):
        canvas.paste(picture, (left + j * 138, height + 2))
        draw.text((left + j * 138, height + 132), f"step {step}", fill="black")
    replace(os.path.join(folder, "loss.png"), lambda f: canvas.save(f, format="PNG"))


def export(saved, file):
    """What sampling and scoring need, in half precision: the form of weights/."""
    small = {k: saved[k] for k in ("config", "model_config", "tokenizer", "data", "step")}
    small["ema"] = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in saved["ema"].items()}
    replace(file, lambda f: torch.save(small, f))


def settings_of(saved, args):
    """The sampler's settings: the preset's, replaced by what was asked for; what the other model has is refused."""
    for name in {"masked": ("cfg", "method"), "flow": ("temperature", "order")}[saved["config"]["model"]]:
        if getattr(args, name) is not None:
            raise DataError(f"--{name} means nothing to a {saved['config']['model']} model: leave it out")
    settings = dict(MODELS[saved["config"]["model"]].SAMPLING[saved["config"]["preset"]])
    asked = {"masked": {"K": args.steps, "temperature": args.temperature, "order": args.order},
             "flow": {"steps": args.steps, "cfg": args.cfg, "method": args.method}}
    settings.update({k: v for k, v in asked[saved["config"]["model"]].items() if v is not None})
    return settings


def add_sampling_flags(p):
    p.add_argument("--ckpt", required=True, help="checkpoint made by train.py, or a file of weights/")
    p.add_argument("--data", default="", help="data folder; default: the checkpoint's own, or the built-in robot")
    p.add_argument("--tokenizer", default="", help="default: the one that the checkpoint names")
    p.add_argument("--steps", type=int, help="masked: refinement steps K per frame; flow: Euler steps; default: the preset's")
    p.add_argument("--cfg", type=float, help="flow: scale of classifier-free guidance; 1 is none; default: the preset's")
    p.add_argument("--temperature", type=float, help="masked: of the token distribution; 0 is argmax; default: the preset's")
    p.add_argument("--order", choices=["random", "confidence"], help="masked: which tokens are kept first; default: random")
    p.add_argument("--method", choices=["euler", "midpoint"], help="flow: the solver; midpoint asks twice a step; default: euler")
    p.add_argument("--weights", choices=["ema", "last"], default="ema", help="averaged over training (default), or the last")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: slow to begin, faster after")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_sampling_flags(args):
    for name, low in (("steps", 1), ("num", 1), ("temperature", 0), ("rollout", 1), ("seed", 0)):
        value = getattr(args, name, None)
        if value is not None and value < low:
            raise DataError(f"--{name} {value} makes no sense: give at least {low}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:  # torch's ways to say: no such device
        raise DataError(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]}): give cpu") from None


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(p)
    p.add_argument("--out", default="", help="folder for dream.gif and dream.png; default: beside the checkpoint")
    p.add_argument("--num", type=int, default=4, help="validation clips (default 4)")
    p.add_argument("--rollout", type=int, default=1, help="windows of eight frames to dream one after the other (default 1)")
    p.add_argument("--actions", default="shuffled", choices=ACTIONS, help="the last row's actions (default shuffled: another clip's)")
    p.add_argument("--trace", action="store_true", help="write trace.png instead: the last frame after each step of the sampler")
    p.add_argument("--export", default="", metavar="FILE", help="only write FILE: the checkpoint without what training needs")
    args = p.parse_args(argv)
    try:
        check_sampling_flags(args)
        start = time.time()
        if args.export:
            export(read_checkpoint(args.ckpt), args.export)
            print(f"wrote {args.export}: {os.path.getsize(args.export) / 1e6:.1f} MB")
            return
        model, saved = load_model(args.ckpt, args.device, args.weights)
        if args.compile:
            compile_blocks(model)
        tokenizer, clips = load_tokenizer_for(saved["tokenizer"], args.device, args.tokenizer), validation_clips(saved, args.data)
        check_fit(model, tokenizer, clips, saved["tokenizer"].get("sha256", ""))
        settings = settings_of(saved, args)
        print(f"{saved['config']['model']} {saved['config']['variant']}, step {saved['step']}, on {args.device}: "
              f"{args.num} clips of {clips.path}, {json.dumps(settings)}, other actions: {args.actions}")
        out = args.out or (os.path.join("out", "samples_" + os.path.basename(args.ckpt).removesuffix(".pt"))
                           if os.path.dirname(os.path.abspath(args.ckpt)) == os.path.join(HERE, "weights") else
                           os.path.join(os.path.dirname(args.ckpt), "samples"))
        if args.trace:
            strips = trace(model, tokenizer, clips, args.num, args.seed, **settings)
            save_trace(strips, os.path.join(out, "trace.png"), flow=tokenizer.kind == "continuous")
            print(f"wrote {out}/trace.png in {time.time() - start:.0f} s")
            return
        rows = picture_rows(dream(model, tokenizer, clips, args.num, args.seed, args.actions, args.rollout, **settings),
                            other=args.actions)
        save_gif(rows, os.path.join(out, "dream.gif"), clips.hz)
        save_png(rows, os.path.join(out, "dream.png"))
        print(f"wrote {out}/dream.gif and {out}/dream.png in {time.time() - start:.0f} s")
    except (DataError, TokenizerError, CheckpointError, OSError) as e:
        sys.exit(f"sample.py: {e}")


if __name__ == "__main__":
    main()
