"""A trained model dreams: nine past frames and the actions of your choice become eight frames never filmed.

    python sample.py --ckpt weights/flow_full_tiny.pt                      # four clips, as GIF and PNG
    python sample.py --ckpt weights/flow_full_tiny.pt --actions turn_left  # what if the robot turned left?
    python sample.py --ckpt weights/flow_full_tiny.pt --rollout 6          # dream on from the dream itself
    python sample.py --ckpt weights/flow_full_tiny.pt --trace --steps 8    # how a frame comes about
    python sample.py --ckpt weights/flow_full_tiny.pt --plan --num 3       # drive to where an image was taken
    python sample.py --ckpt weights/flow_full_tiny.pt --play               # drive through it, in a browser

The pictures show context | truth | prediction | the same context with other actions. The heart of the file is
`continue_video` (Sec. 3.1, 3.2): past latents (B, [C,] T_p, H, W) and actions (B, F, A) pass the model's
sampler and the tokenizer's decoder and become frames (B, 8, H, W, 3), uint8.
"""
import argparse
import copy
import functools
import json
import math
import os
import re
import zipfile
from dataclasses import asdict

import numpy as np
import torch

import flow_hwm
import masked_hwm
from data import HERE, JOINTS, PAST, ROBOT, is_lerobot, open_clips, read_json, split_folders, synth
from examples import robot
from examples.pictures import picture_rows, save_curve, save_gif, save_png, save_trace
from examples.speed import in_bfloat16, set_dtype
from tokenizer import (DataError, barrier, command, fingerprint, from_rank_0, load_tokenizer, rank_and_world,
                       reuse_memory, to_uint8, to_video, write_whole)

MODELS = {"masked": masked_hwm, "flow": flow_hwm}

AT_ONCE = 8  # dreams in a batch: more are no faster on a CPU, and would take the memory of a GPU

# ---- checkpoints: saving and loading -------------------------------------------------------------

PARTS = {"ema": dict, "config": dict, "model_config": dict, "tokenizer": dict, "data": dict, "step": int}
MAY_CHANGE = {  # options that may differ when a run is resumed, because its losses do not depend on them ...
    "resume", "stop_after", "log_every", "save_every", "save_minutes", "sample_every", "val_every", "workers",
    "compile", "out", "shard", "dtype", "device", "encode", "accum", "preset", "checkpoint_activations",
    "tokenizer", "data", "steps", "options"}  # ... or because train.py compares what they stand for

def whole(state):
    """{name: tensor} as it is saved: a copy on the CPU, gathered where --shard has divided it."""
    pieces = {name: t.full_tensor() for name, t in state.items() if hasattr(t, "full_tensor")}
    return {name: t.detach().to("cpu", copy=True) for name, t in {**state, **pieces}.items()}

def describe(config, sizes, folder, clips, tokenizer):
    """What a checkpoint says of its model, data and tokenizer, by which sample.py and others find them."""
    meta = clips.meta
    data = dict(path=folder, source=meta.get("source", ""), size=meta.get("size"), names=list(clips.names),
                hz=clips.hz, frame_stride=meta.get("frame_stride", 1), clips=len(clips),
                opened=meta.get("opened", {}),
                sha256=fingerprint(os.path.join(clips.path, "metadata.json")))
    if not config.data:
        data.update(source=ROBOT, built_in={"frames": config.frames})
    if tokenizer and os.path.abspath(tokenizer).startswith(HERE + os.sep):
        tokenizer = os.path.relpath(tokenizer, HERE)  # so that the checkpoint can move to another clone
    tokenizer = {**meta.get("tokenizer", {}), "path": tokenizer}
    return {"model_config": asdict(sizes), "data": data, "tokenizer": tokenizer}

def save_checkpoint(file, model, optimizer, ema, step, config, about, writer=write_whole):
    """Write all that resuming, sampling and scoring need to one file; the one before is kept as _previous.pt.
    ema: {name: averaged weight}. config: the run's dataclass. about: {"model_config", "tokenizer", "data"};
    "data" holds "names" and "hz" of the states. Every process must call this; rank 0 writes. With a
    tokenizer.Writer it does so while the training goes on, so that what is written must be a copy."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # it takes a second
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if next(model.parameters()).is_cpu:
        weights, moments = copy.deepcopy((weights, moments))
    saved = {"model": weights, "ema": whole(ema), "optimizer": moments, "step": step,
             "rng": torch.get_rng_state(), "config": asdict(config), **about}

    def write(temporary):
        torch.save(saved, temporary)
        if os.path.exists(file):  # it may give way only now that its successor is complete
            os.replace(file, file.replace(".pt", "_previous.pt"))

    if rank_and_world()[0] == 0:
        writer(file, write)

def save_best(file, ema, step, config, about, writer=write_whole):
    """`save_checkpoint` without what resuming needs."""
    saved = {"ema": whole(ema), "step": step, "config": asdict(config), **about}
    if rank_and_world()[0] == 0:
        writer(file, lambda temporary: torch.save(saved, temporary))

def read_checkpoint(file):
    """What `save_checkpoint` or `export` wrote, on the CPU. DataError where the file is anything else.
    Only tensors and plain values are read, so that a file cannot run code. Every byte is compared with its
    CRC, because torch.load would take a flipped bit for another weight."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no checkpoint {file}: give one by train.py or of weights/") from None
    except Exception as e:  # a damaged or hostile file can raise nearly anything
        raise DataError(f"{file} is no readable checkpoint ({type(e).__name__}): give another") from None
    if damaged:
        raise DataError(f"{file} is damaged at {damaged}: use an older checkpoint")
    content = saved if isinstance(saved, dict) else {}
    for part, kind in PARTS.items():
        if not isinstance(content.get(part), kind):
            raise DataError(f"{file} has no {part}, so it is no world model: give a ckpt.pt by train.py")
    return content

ANEW = "train it anew, or check out the commit that made it"

def check_names(saved_in, names, model):
    """DataError where the saved parameters have other names than the model's."""
    differ = sorted(set(names) ^ model.state_dict().keys())
    if differ:
        raise DataError(f"{saved_in} was made by another version of this code: {differ[0]} is one of "
                        f"{len(differ)} parameters that only its model or ours has; {ANEW}")

def last_checkpoint(file):
    """The checkpoint to resume from: `file`, or the previous one where `file` is missing or damaged. Rank 0
    reads it, and the others get it without its tensors, which `restore` hands on."""
    saved, previous = None, file.replace(".pt", "_previous.pt")
    if rank_and_world()[0] == 0:
        try:
            saved = read_checkpoint(file)
        except DataError as e:
            if not os.path.exists(previous):
                raise
            saved = read_checkpoint(previous)
            print(f"{e}; going on from {previous}")
            if os.path.exists(file):  # else the next save would put it in the place of the good one
                os.replace(file, file + ".damaged")
    light = from_rank_0(saved and {**saved, "model": {}, "ema": {}, "optimizer": {}})
    return saved or light

def restore(saved, model, optimizer, ema, config, about):
    """Put a checkpoint's state back into model, optimizer and ema, in place -> the step to go on from.
    Every process must call this. DataError where an option differs that would change the run's losses."""
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, set_model_state_dict,
                                                         set_optimizer_state_dict)
    # 1. It must be the same run. An option that the checkpoint does not know is younger and is not compared.
    if "optimizer" not in saved:
        raise DataError(f"the checkpoint in {config.out} was made by --export: it cannot be resumed")
    was, now = saved["config"] | saved["model_config"], asdict(config) | about["model_config"]
    for name, value in now.items():
        if name not in MAY_CHANGE and was.get(name, value) != value:
            raise DataError(f"the checkpoint in {config.out} is of another run: {name} was {was[name]!r}, is "
                            f"{value!r}; give the same flags, or another --out")
    # 2. The averaged weights. They are loaded into the model, which knows what part of each this process
    # holds (--shard), and copied from there.
    check_names(f"the checkpoint in {config.out}", from_rank_0([*saved["ema"]]), model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=rank_and_world()[1] > 1)
    set_model_state_dict(model, saved["ema"], options=options)
    for name, tensor in model.state_dict().items():
        ema[name].copy_(tensor)
    # 3. The weights themselves, and the moments of AdamW.
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    # 4. The losses draw their noise by position (train.Stream), so this generator serves only other code.
    torch.set_rng_state(saved["rng"])
    return saved["step"]

def load_model(file, device="cpu", weights="ema"):
    """-> the model, ready to sample, and all else that the checkpoint says.
    weights: "ema", averaged over the training, or "last", those of the last step."""
    saved = read_checkpoint(file)
    state = saved["ema"] if weights == "ema" else saved.get("model")
    if state is None:
        raise DataError(f"{file} holds averaged weights alone (--export): leave out --weights {weights}")
    try:
        module = MODELS[saved["config"]["model"]]
        sizes = {**saved["model_config"], "checkpoint_activations": ""}  # that is a matter of training
        model = module.Model(module.Config(**sizes))
        check_names(file, state, model)
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as e:
        raise DataError(f"{file} was made by another version of this code ({e!r:.99}): {ANEW}") from None
    reuse_memory()
    return model.to(device).eval().requires_grad_(False), saved

def export(saved, file):
    """Write what sampling and scoring need, with matrices in half precision: the form of weights/."""
    small = {part: saved[part] for part in PARTS}
    small["ema"] = {name: t.half() if t.ndim > 1 else t for name, t in saved["ema"].items()}
    write_whole(file, lambda temporary: torch.save(small, temporary))

# ---- what a checkpoint needs beside it: its tokenizer, and data that fits ------------------------

def find(path):
    """A path that a checkpoint names: as it is, or inside this repository, or "" where there is neither."""
    for candidate in (path, f"{HERE}/{path}"):
        if path and os.path.exists(candidate):
            return candidate
    return ""

def load_tokenizer_for(about, device="cpu", path="", required=True):
    """The tokenizer that made a checkpoint's latents: at `path`, or where the checkpoint says (`about`).
    It is refused if its SHA-256 differs. Where there is none: DataError, or None if it is not `required`."""
    path = path or about.get("path", "")
    found = find(path)
    if not found and required:
        raise DataError(f"the checkpoint's tokenizer {path!r} is not there: say where with --tokenizer")
    if found and about.get("sha256", "") not in ("", fingerprint(found)):
        raise DataError(f"{found} is not the tokenizer that the checkpoint's data was encoded with (their "
                        "SHA-256 differ): give that one with --tokenizer")
    return load_tokenizer(found, device) if found else None

def built_in_robot(settings):
    """The folder of the built-in robot. If its validation split is missing, synth(**settings) draws it."""
    metadata = find(f"{ROBOT}/val_v2.0/metadata.json")
    if metadata:
        folder = metadata.removesuffix("/val_v2.0/metadata.json")
        if read_json(metadata).get("motion") != robot.MOTION:
            raise DataError(f"{folder} was drawn by another version of examples/robot.py: delete it and its "
                            "latents, and it is drawn anew")
        return folder
    folder = f"{HERE}/{ROBOT}"
    if not os.access(HERE, os.W_OK):  # the repository belongs to somebody else
        folder = os.path.expanduser("~/.cache/humanoid_world_models/robot")
        print(f"{HERE} may not be written: the built-in robot is drawn in {folder}")
    return synth(folder, splits=("val",), **settings)

def validation_clips(saved, path=""):
    """The validation clips of the folder `path`, or else of the checkpoint's own data: raw video if it is
    there, else latents. DataError where the states are not those that the model was trained on."""
    about = saved["data"]
    if not path and "built_in" in about:
        path = built_in_robot(about["built_in"])
    path = path or find(about.get("source", "")) or find(about.get("path", ""))
    if not path:
        raise DataError(f"the checkpoint's data {about.get('path')!r} is not there: say where with --data")
    opened = about.get("opened", {}) if is_lerobot(path) else {}
    clips = open_clips(path, "val", **opened)
    if clips.kind == "raw":
        # As it was encoded. 1X's tokens do not say from which size: then the size of the latents tells.
        size = about.get("size") or saved["model_config"]["W"] * saved["tokenizer"].get("spatial", 8)
        clips = open_clips(path, "val", size=size, frame_stride=about.get("frame_stride", 1), **opened)
    check_states(about, clips)
    return clips

def check_states(about, clips):
    """DataError where names, order or rate of the states are not those of the checkpoint's data (`about`)."""
    if "built_in" in about:
        about = {"names": JOINTS, "hz": 10, **about}  # older checkpoints do not say
    pairs = zip(range(clips.action_dim), clips.names, about.get("names", clips.names))
    differ = [f"column {j} is {name}, not {known}" for j, name, known in pairs if name != known]
    if differ:
        raise DataError(f"{clips.path} has other states than the model was trained on, or in another order "
                        f"({'; '.join(differ)}): bring columns, and names in metadata.json, to the model's")
    hz = about.get("hz", clips.hz)
    if not math.isclose(hz, clips.hz, rel_tol=0.01):  # 29.97 passes for 30
        raise DataError(f"{clips.path} has {clips.hz:g} states a second, the model was trained on {hz:g}: "
                        "give data of that rate; raw video gets it, by whole numbers alone, with data.py "
                        f"encode --frame_stride {clips.frame_stride * clips.hz / hz:.3g}")

def check_fit(model, tokenizer, clips, sha256=""):
    """DataError, before the work, where model, tokenizer (`sha256`: its file's) and clips do not fit."""
    c, kind = model.config, "discrete" if hasattr(model.config, "vocab_size") else "continuous"
    raw = clips.kind == "raw"
    size = clips.shape[1] // tokenizer.spatial if raw else clips.shape[-1]  # height and width of the latents
    encoded_with = clips.meta.get("tokenizer", {}).get("sha256", sha256)
    for what, given, needed, flag in (
            ("the tokenizer is", tokenizer.kind, kind, "tokenizer"),
            (f"{clips.path} holds", clips.kind, "raw" if raw else kind, "data"),
            (f"{clips.path} was encoded by the tokenizer with SHA-256", encoded_with, sha256, "data"),
            (f"{clips.path} gives latents of", f"{size} x {size}", f"{c.H} x {c.W}", "data"),
            (f"{clips.path} gives actions of dimension", clips.action_dim, c.action_dim, "data")):
        if given != needed:
            raise DataError(f"{what} {given}, the model was trained on {needed}: give a fitting --{flag}")

# ---- actions: what if? ---------------------------------------------------------------------------

MOTIONS = {  # joint: its goal, in standard deviations of the training data from its mean
    "drive": {"LINEAR_VELOCITY": 2},
    "turn_left": {"ANGULAR_VELOCITY": 2},
    "turn_right": {"ANGULAR_VELOCITY": -2},
    "look_up": {"NECK_PITCH": -2},
    "reach": {"LEFT_SHOULDER_PITCH": 2, "LEFT_ELBOW_PITCH": -1,
              "RIGHT_SHOULDER_PITCH": 2, "RIGHT_ELBOW_PITCH": -1}}
ACTIONS = ("true", "shuffled", "frozen", *MOTIONS)

def change_actions(name, actions, model, clips, n_past=PAST, another=None):
    """Actions (F, A) with those after the past replaced; `name` is one of ACTIONS.
    shuffled: by those of `another` clip (F, A). frozen: every joint keeps its last past position and every
    velocity is 0. MOTIONS: as frozen, but the named joints move to their goals within four frames."""
    changed = actions.clone()
    future = changed[n_past:]  # a view: what is written to it is written to `changed`
    if name == "shuffled":
        future.copy_(another[n_past : len(actions)])
    if name in ("true", "shuffled"):
        return changed
    future.copy_(actions[n_past - 1])
    future[:, velocities(clips)] = 0
    motion = MOTIONS.get(name, {})
    if not motion.keys() <= set(clips.names):
        raise DataError(f"--actions {name} moves {', '.join(motion)}, but the states of {clips.path} are "
                        f"{', '.join(clips.names)}: give true, shuffled or frozen")
    ramp = torch.linspace(0.25, len(future) / 4, len(future)).clamp(max=1)
    for joint, deviations in motion.items():
        j, statistics = clips.names.index(joint), model.standardise_actions
        goal = statistics.mean[j] + deviations * statistics.std[j]
        future[:, j] += ramp * (goal.cpu() - future[:, j])
    return changed

@functools.cache
def velocities(clips):
    """The states' columns that are velocities: "velocities" of metadata.json, or those named so."""
    columns, numbers = clips.meta.get("velocities"), range(len(clips.names))
    if columns is None:
        # "vel" after a vowel is the end of another word: level, swivel, travel.
        columns = [j for j in numbers if re.search("velocity|(?<![aeiou])vel", clips.names[j].lower())]
        if not columns and "STATE_0" in clips.names and rank_and_world()[0] == 0:
            print(f'{clips.path} does not name its states, so "frozen" cannot know which are velocities and '
                  'must become 0: add "velocities": [columns] to metadata.json')
    if not isinstance(columns, list) or not all(j in numbers for j in columns):
        raise DataError(f"{clips.path}/metadata.json says velocities = {columns!r:.99}: give a list of "
                        f"columns, 0..{numbers[-1]}")
    return columns

# ---- dreaming ------------------------------------------------------------------------------------

def spread(clips, num):
    """Indices of `num` clips, from the first to the last."""
    if num > len(clips):
        raise DataError(f"--num {num} is more than the {len(clips)} clips of {clips.path}: ask for fewer")
    return np.linspace(0, len(clips) - 1, num).round().astype(int).tolist()

def to_latents(video, tokenizer):
    """A clip as the reader gives it -> its latents or ids with a batch axis. Raw frames are encoded."""
    batch = video[None].to(next(tokenizer.parameters()).device)
    return tokenizer.encode(to_video(batch)) if video.dtype == torch.uint8 else batch

def to_frames(video, tokenizer):
    """A clip as the reader gives it -> its frames (F, H, W, 3), uint8."""
    if video.dtype == torch.uint8:
        return video
    return to_uint8(tokenizer.decode(to_latents(video, tokenizer)).cpu())[0]

def noise_of(seeds):
    """A generator for each dream; those of one seed begin with the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]

def continue_video(model, tokenizer, past, actions, windows=1, noise=None, **settings):
    """Past latents (B, [C,] T_p, H, W), actions (B, 9 + 8 windows, A) -> frames (B, 8 windows, H, W, 3).
    noise: a generator for each of the B dreams, so that none depends on those beside it in its batch."""
    films = []
    for first in range(0, len(actions), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        films.append(continue_batch(model, tokenizer, past[some], actions[some], windows,
                                    generator=noise and noise[some], **settings))
    return torch.cat(films)

@torch.no_grad()
def continue_batch(model, tokenizer, past, actions, windows, **settings):
    """The same for one batch. Every window after the first starts from the last nine frames of the dream
    itself, encoded again."""
    device = next(model.parameters()).device
    n_p, n_f = model.layout.lengths[2:]  # frames of the past and of the future: 9 and 8
    frames = []
    for window in range(windows):
        if window > 0:
            past = tokenizer.encode(video[:, :, -n_p:].clamp(-1, 1))
        first = window * n_f
        course = actions[:, first : first + n_p + n_f].to(device)
        future = model.sample(past, course, **settings)
        # The decoder is causal: it draws the future from the past and the future.
        video = tokenizer.decode(torch.cat([past, future], dim=-3))
        frames.append(to_uint8(video[:, :, -n_f:].cpu()))
    return torch.cat(frames, dim=1)

def longer(model, clips, i, n):
    """The actions of clip i and the n after them (F + n, A). After its recording the robot holds still."""
    known = torch.cat([clips[i]["actions"], clips.more_actions(i, n)])
    missing = clips.frames + n - len(known)
    if missing == 0:
        return known
    print(f"clip {i}: its recording ends {missing} frames before the rollout; the robot then holds still")
    still = known[-1:].expand(missing, -1)
    return change_actions("frozen", torch.cat([known, still]), model, clips, n_past=len(known))

def dream(model, tokenizer, clips, num=4, seed=0, actions="shuffled", windows=1, **settings):
    """Dream on from `num` clips -> {"context" (num, 9, H, W, 3), "truth" (num, 8, H, W, 3), "prediction" and
    "other" (num, 8 windows, H, W, 3)}, uint8. The last two share their noise: only their actions differ."""
    n_p, n_f = model.layout.lengths[2:]
    context, truth, pasts, courses, noise = [], [], [], [], []
    for i in spread(clips, num):
        # 1. Two courses of action: the recorded, and a changed one ("shuffled": that of a clip far away).
        recorded = longer(model, clips, i, (windows - 1) * n_f)
        another = longer(model, clips, (i + len(clips) // 2) % len(clips), (windows - 1) * n_f)
        changed = change_actions(actions, recorded, model, clips, n_p, another)
        # 2. What both start from, and what really happened.
        video = clips[i]["video"]
        frames = to_frames(video, tokenizer)
        context.append(frames[:n_p])
        truth.append(frames[n_p:])
        past = to_latents(video, tokenizer).narrow(-3, 0, model.layout.T_p)
        # 3. Two dreams. The noise of a clip is its own, whichever clips are dreamt beside it.
        pasts += [past, past]
        courses += [recorded, changed]
        noise += noise_of([seed + i] * 2)
    pasts, courses = torch.cat(pasts), torch.stack(courses)
    films = continue_video(model, tokenizer, pasts, courses, windows, noise, **settings)
    rows = {"context": torch.stack(context), "truth": torch.stack(truth),
            "prediction": films[0::2], "other": films[1::2]}
    return {row: frames.numpy() for row, frames in rows.items()}

@torch.no_grad()
def trace(model, tokenizer, clips, num=4, seed=0, **settings):
    """How the last predicted frame of `num` clips comes about -> (num, steps, H, W, 3) uint8. Flow-HWM: the
    noise, then the latents after each step. Masked-HWM: the ids after each step, grey where still hidden."""
    strips = []
    for i in spread(clips, num):
        past = to_latents(clips[i]["video"], tokenizer).narrow(-3, 0, model.layout.T_p)
        actions = clips[i]["actions"].to(past.device)
        steps, strip = [], []
        model.sample(past, actions[None], generator=noise_of([seed + i]), trace=steps, **settings)
        for step in steps:
            if tokenizer.kind == "discrete":
                latents, hidden = step
                token = np.ones((tokenizer.spatial, tokenizer.spatial), bool)
                grey = np.kron(hidden[0, -1].cpu(), token)  # (H, W) -> the pixels that hidden tokens cover
            else:
                latents, grey = torch.cat([past, step], dim=-3), []
            frame = to_uint8(tokenizer.decode(latents).cpu())[0, -1].numpy()
            frame[grey] = 128
            strip.append(frame)
        strips.append(strip)
    return np.array(strips)

# ---- pictures of a run ---------------------------------------------------------------------------

def show(config, about, ema, step, device):
    """Of a run that is being trained: OUT/loss.png, and in OUT/samples/step_N.gif the dreams of four
    validation clips. The rest is as in `save_checkpoint`."""
    weights, module, folder = whole(ema), MODELS[config.model], about["data"]["path"]
    if rank_and_world()[0] == 0:
        tokenizer = load_tokenizer_for(about["tokenizer"], device, required=False)
        if tokenizer and "val" in split_folders(folder):
            model = module.Model(module.Config(**about["model_config"])).to(device).eval()
            model.load_state_dict(weights)
            if config.dtype == "bfloat16":
                in_bfloat16(model, tokenizer)
            clips = open_clips(folder, "val")
            settings = settings_of({"config": asdict(config), **about})
            dreams = dream(model, tokenizer, clips, min(4, len(clips)), **settings)
            save_gif(picture_rows(dreams), f"{config.out}/samples/step_{step:06d}.gif", clips.hz)
        else:
            print(f"no sample pictures: {folder} has no val split, or --tokenizer is missing")
        save_curve(config.out)
    barrier()

# ---- the command line ----------------------------------------------------------------------------

SETTINGS = {  # for each model, what a flag is called by its sampler
    "masked": {"steps": "K", "temperature": "temperature", "order": "order", "mean": "mean"},
    "flow": {"steps": "steps", "cfg": "cfg", "method": "method", "temperature": "temperature"}}

def settings_of(saved, args=None):
    """The sampler's settings as a dict: the preset's, replaced by what the flags `args` ask for. A flow model
    trained with p_drop 0 has never seen its conditions dropped, so it is not guided (its sampler refuses);
    ids whose digits are not known have no mean."""
    kind, preset = saved["config"]["model"], saved["config"]["preset"]
    settings = dict(MODELS[kind].SAMPLING[preset])
    if saved["model_config"].get("p_drop") == 0:
        settings["cfg"] = 1.0
    if settings.get("mean") and not saved["model_config"].get("levels"):
        settings.update(mean=False, temperature=0.0)
    for flag in ("steps", "cfg", "method", "temperature", "order", "mean"):
        value = getattr(args, flag, None)
        if value is None:
            continue
        if flag not in SETTINGS[kind]:
            raise DataError(f"--{flag} means nothing to a {kind} model: leave it out")
        settings[SETTINGS[kind][flag]] = value
    return settings

def add_sampling_flags(p, nargs=None):
    p.add_argument("--ckpt", required=True, nargs=nargs, help="a ckpt.pt by train.py, or a file of weights/")
    p.add_argument("--data", default="", help="data folder; default: the checkpoint's own")
    p.add_argument("--tokenizer", default="", help="default: the one that the checkpoint names")
    p.add_argument("--steps", type=int, help="masked: K of a latent frame; flow: the solver's steps")
    p.add_argument("--cfg", type=float, help="flow: scale of classifier-free guidance, 1 for none")
    p.add_argument("--temperature", type=float, help="masked: of the ids' probabilities; flow: scale of the "
                   "noise to start from; at 0 nothing is drawn")
    p.add_argument("--mean", action=argparse.BooleanOptionalAction, help="masked: take the id nearest to the "
                   "mean code, and draw none; with --no-mean ids are drawn")
    p.add_argument("--order", choices=["random", "confidence"], help="masked: which ids stay first")
    p.add_argument("--method", choices=["euler", "midpoint"], help="flow: the solver")
    p.add_argument("--weights", choices=["ema", "last"], default="ema", help="averaged, or the last")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of the model's products and of decoding; auto: whichever is faster here")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: slow to begin")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

def load_fitting(file, args):
    """-> model, tokenizer, the sampler's settings, clips and what else the checkpoint says, as the flags ask.
    DataError where they do not fit together."""
    model, saved = load_model(file, args.device, args.weights)
    settings, clips = settings_of(saved, args), None
    tokenizer = load_tokenizer_for(saved["tokenizer"], args.device, args.tokenizer)
    if args.plan:  # its problems are drawn, not recorded
        from examples.plan import check_built_in  # not above, for it takes its dreams from here
        check_built_in(saved)
    else:
        clips = validation_clips(saved, args.data)
        check_fit(model, tokenizer, clips, saved["tokenizer"].get("sha256", ""))
    return model, tokenizer, settings, clips, saved

def load_player(file, args):
    """What examples/play.py takes of a checkpoint: a dream at a time, and soon."""
    model, tokenizer, settings, clips, _ = load_fitting(file, args)
    set_dtype(model, tokenizer, args, at_once=1)
    if args.steps is None and "cfg" in settings:
        settings["steps"] = 3
        print(f"{file} is played with 3 Euler steps, for ten frames a second; --steps asks for more")
    return model, tokenizer, settings, clips

def check_sampling_flags(args):
    """DataError for numbers that make no sense, and for a device that is not there."""
    least = {"steps": 1, "num": 1, "rollout": 1, "horizon": 1, "episodes": 1, "seed": 0, "temperature": 0,
             "cfg": 0}
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < math.inf:
            raise DataError(f"--{name} {value} makes no sense: give at least {low}")
    torch.backends.cuda.matmul.allow_tf32 = True  # where a GPU computes float32
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:  # torch's ways to say: no such device
        raise DataError(f"--device {args.device} cannot be used here ({e!r:.99}): give cpu") from None

@command
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(p, nargs="+")
    p.add_argument("--out", default="", help="folder; default: samples/ beside the checkpoint")
    p.add_argument("--num", type=int, default=4, help="validation clips (default 4)")
    p.add_argument("--rollout", type=int, default=1, help="windows of eight frames in a row (default 1)")
    p.add_argument("--actions", choices=ACTIONS, default="shuffled", help="of the last row (else shuffled)")
    p.add_argument("--plan", action="store_true", help="write plan.gif and plan.png instead: drive to a goal")
    p.add_argument("--horizon", type=int, default=1, help="of --plan: windows of eight frames (default 1)")
    p.add_argument("--trace", action="store_true", help="write trace.png instead: a frame, step by step")
    p.add_argument("--export", default="", metavar="FILE", help="only write FILE, what sampling needs")
    p.add_argument("--play", action="store_true", help="serve a page to play on (of one or more --ckpt)")
    p.add_argument("--port", type=int, default=8000, help="of that page (default 8000), 0 for any")
    args = p.parse_args(argv)
    check_sampling_flags(args)
    [ckpt, *others] = args.ckpt
    if others and not args.play:
        raise DataError(f"--ckpt {others[0]} is one too many: only --play takes several")
    if args.export:
        export(read_checkpoint(ckpt), args.export)
        print(f"wrote {args.export}: {os.path.getsize(args.export) / 1e6:.1f} MB")
        return
    if args.play:
        from examples.play import play
        return play([load_player(file, args) for file in args.ckpt], args.seed, args.port)
    # 1. The model, its tokenizer and clips, and that they fit together.
    model, tokenizer, settings, clips, saved = load_fitting(ckpt, args)
    dtype = set_dtype(model, tokenizer, args, AT_ONCE)
    config = saved["config"]
    about = (f"{config['model']} {config['variant']}, step {saved['step']}, on {args.device} in {dtype}: "
             f"{args.num}")
    what = "problems of planning" if args.plan else f"clips of {clips.path}, other actions: {args.actions}"
    print(f"{about} {what}, {json.dumps(settings)}")
    # 2. The pictures go beside the checkpoint, but those of shipped weights go to out/.
    folder, name = os.path.split(ckpt)
    out = args.out or os.path.join(folder, "samples")
    if folder.endswith("weights") and not args.out:
        out = f"out/samples_{name[:-3]}"
    # 3. The dreams.
    if args.trace and not args.plan:
        strips = trace(model, tokenizer, clips, args.num, args.seed, **settings)
        save_trace(strips, f"{out}/trace.png", flow=tokenizer.kind == "continuous")
        print(f"wrote {out}/trace.png")
        return
    if args.plan:
        from examples.plan import plan_rows
        name, hz = "plan", robot.HZ
        rows = plan_rows(model, tokenizer, args.num, args.horizon, args.seed, **settings)
    else:
        name, hz = "dream", clips.hz
        if args.actions != "shuffled":
            name += f"_{args.actions}"
        if args.rollout > 1:
            name += f"_rollout{args.rollout}"
        dreams = dream(model, tokenizer, clips, args.num, args.seed, args.actions, args.rollout, **settings)
        rows = picture_rows(dreams, other=args.actions)
    save_gif(rows, f"{out}/{name}.gif", hz)
    save_png(rows, f"{out}/{name}.png")
    print(f"wrote {out}/{name}.gif and {out}/{name}.png")

if __name__ == "__main__":
    main()
