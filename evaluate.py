"""Scores a checkpoint: how good are its dreams, do they obey the actions, what would a lazy guess score?

    python evaluate.py --ckpt out/flow_full/ckpt.pt --json scores.json      # 64 validation clips
    torchrun --nproc_per_node=2 -- evaluate.py --ckpt out/flow_full/ckpt.pt --num 95    # the clips divided
    python evaluate.py --ckpt out/flow_full/ckpt.pt --plan                  # does acting by its dreams work?
    python evaluate.py --sizes                                              # the eight models, counted

One evaluator serves both families (Tables 1 and 2): one list of validation clips that do not overlap, and one
target, the eight future frames after a trip through the model's own tokenizer (the paper's protocol). Rows
beside the model's say what its number means: copying the last frame, the tokenizer's ceiling, the same dream
with another clip's actions. A clip's noise comes from the seed and the clip alone and is the same in every
row, so no score depends on how the work is divided. (The -- keeps torchrun from taking --num for its own.)

Frames are (n, H, W, 3) uint8, scores of frames (n,), features of frames (n, d) float64 with d = 2048.
"""
import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from blocks import VARIANTS
from data import FRAMES, FUTURE, JOINTS, PAST, open_clips
from examples.inception import load_inception
from examples.speed import set_dtype
from flow_hwm import interpolate, target_velocity
from sample import (AT_ONCE, MODELS, add_sampling_flags, change_actions, check_sampling_flags, continue_video,
                    load_fitting, noise_of, spread, to_latents)
from tokenizer import (PRESETS, DataError, Tokenizer, barrier, command, count_parameters, device_of,
                       peak_gb, psnr, rank_and_world, to_uint8, to_video, write_whole)

PAPER_SIZES = {  # billions, Tables 1 and 2
    "masked": {"split": 0.220, "base": 0.321, "modality": 0.237, "full": 0.195},
    "flow": {"split": 0.944, "base": 1.36, "modality": 0.886, "full": 0.648}}
ROWS = {  # how a row's keys end: (its line in the table, which frames are compared, with which)
    "": ("model against tokenized frames", "prediction", "target"),
    "_shuffled_actions": ("with another clip's actions", "shuffled", "target"),
    "_frozen_actions": ("with frozen actions", "frozen", "target"),  # the robot stands still
    "_copy_last": ("copy the last frame", "copy_last", "target"),
    "_raw": ("model against raw frames", "prediction", "raw"),
    "_ceiling": ("tokenizer against raw: ceiling", "target", "raw"),  # no dream can be expected to score more
    "_oracle": ("true latents: equals the ceiling", "oracle", "raw"),  # a self-check: it knew the answer
}
JOINT_GROUPS = {  # of the built-in robot and of 1X: how the names of a group's joints begin
    "drive": "LINEAR", "turn": "ANGULAR", "neck": "NECK", "left_arm": "LEFT", "right_arm": "RIGHT"}

# ---- frame against frame -------------------------------------------------------------------------

def ssim(a, b):
    """Structural similarity of each frame (Wang et al., 2004), (n, H, W, 3) uint8 twice -> (n,): from moments
    under a Gaussian window of 11 x 11 pixels, sigma 1.5, wherever it fits; the mean over positions and
    colours."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    moments = gaussian_filter([a, b, a * a, b * b, a * b], (0, 0, 1.5, 1.5, 0), radius=5)
    mean_a, mean_b, aa, bb, ab = moments[:, :, 5:-5, 5:-5]
    product = mean_a * mean_b
    squares = mean_a**2 + mean_b**2
    covariance = ab - product
    variances = aa + bb - squares
    c_1, c_2 = 6.5025, 58.5225  # (0.01 * 255)^2 and (0.03 * 255)^2
    brightness = (2 * product + c_1) / (squares + c_1)
    structure = (2 * covariance + c_2) / (variances + c_2)
    similarity = brightness * structure
    return similarity.mean((1, 2, 3))

def interval(values, recordings, n=10_000, seed=0):
    """95 % bootstrap interval [low, high] of the mean of values (clips,); None below eight clips. Clips of
    one recording resemble one another, so whole recordings are drawn again, with replacement. recordings
    (clips,) numbers the one that each clip belongs to."""
    if len(values) < 8:
        return None
    _, recordings = np.unique(recordings, return_inverse=True)
    total = np.bincount(recordings, values)
    count = np.bincount(recordings)
    drawn = np.random.default_rng(seed).integers(len(total), size=(n, len(total)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    return np.percentile(means, [2.5, 97.5]).tolist()

# ---- set against set: FID (Heusel et al., 2017) and KID (Binkowski et al., 2018) -----------------

FID_IS = {  # what it is that is printed, for each network
    "inception": """FID is that of pytorch-fid: TensorFlow's Inception of 2015, frames resized bilinearly;
N dreamt frames against N targets. The paper's scripts use clean-fid (masked: "clean"; flow:
"legacy_pytorch", the first frame only), so its tables and ours do not compare.""",
    "random_inception": "fd and kd are distances between features of Inception with random weights."}

def frechet(x, y):
    """Frechet distance of two sets of features ([clips,] n, d), each taken for a Gaussian of mean m and
    covariance S: |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^1/2. With S = R'R, where R holds the
    centred features, of QR if they are many, the last trace is the sum of the singular values of R_1 R_2'."""
    def moments(x):  # m and R; where n < d, a QR decomposition would make R no smaller
        mean = x.mean(0)
        R = (x - mean) / math.sqrt(len(x) - 1)
        return mean, np.linalg.qr(R, mode="r") if len(R) > len(mean) else R

    m_1, R_1 = moments(np.vstack(x))
    m_2, R_2 = moments(np.vstack(y))
    between = np.square(m_1 - m_2).sum()
    traces = np.square(R_1).sum() + np.square(R_2).sum()
    root = scipy.linalg.svdvals(R_1 @ R_2.T).sum()
    return float(between + traces - 2 * root)

def kid(x, y):
    """Squared maximum mean discrepancy of two sets of as many features, kernel (x.y / d + 1)^3, unbiased: no
    frame is compared with itself."""
    def kernel(a, b):
        return (a @ b.T / len(a.T) + 1) ** 3

    x, y = np.vstack(x), np.vstack(y)
    n = len(x)
    within = kernel(x, x) + kernel(y, y)
    others = (within.sum() - np.trace(within)) / (n * (n - 1))
    return float(others - 2 * kernel(x, y).mean())

def set_scores(features, recordings, seed=0, n_halves=50):
    """features (clips, 8 + 8 + 1, d) of dreamt frames, target frames and the last past frame -> FD and KID
    with 95 % intervals, and the floor of FD: between the targets of every other clip, two halves that show
    different scenes. (Dreams and targets show the same scenes, so FD may lie below the floor.)"""
    n = len(features)
    dreamt, real, last = np.split(features, [FUTURE, 2 * FUTURE], axis=1)
    some = np.arange(0, n, math.ceil(n / 128))  # KID and the halves look at 128 clips at most
    fd = frechet(dreamt, real)
    kd = kid(dreamt[some], real[some])
    out = {"fid": fd, "fid_ci": None, "fid_frames": n * FUTURE,
           "fid_copy_last": frechet(last.repeat(FUTURE, axis=1), real),
           "fid_floor": frechet(real[::2], real[1::2]), "fid_floor_frames": n // 2 * FUTURE,
           "kid": kd, "kid_ci": None, "kid_frames": len(some) * FUTURE}
    if n < 8:
        return out

    # The intervals. why halves: recordings drawn with replacement come twice, which inflates both distances.
    # Random halves of the recordings spread around their mean as the whole does around the truth.
    names = np.unique(recordings[some])
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(n_halves):
        drawn = rng.permutation(names)[: len(names) // 2]
        half = some[np.isin(recordings[some], drawn)]
        x, y = dreamt[half], real[half]
        halves.append([frechet(x, y), kid(x, y)])
    halves -= np.mean(halves, axis=0)
    fd_around, kd_around = np.percentile(halves, [2.5, 97.5], axis=0).T  # (low, high) each
    narrower = math.sqrt(len(some) / n)  # FD looks at all clips, so it varies less than the halves say
    out["fid_ci"] = (fd + narrower * fd_around).tolist()
    out["kid_ci"] = (kd + kd_around).tolist()
    return out

# ---- what is scored ------------------------------------------------------------------------------

def choose_clips(clips, num):
    """`num` clips evenly spread over those of which none overlaps another, in the order of the recording."""
    step = 1
    if clips.meta.get("windows"):  # stored latents of clips that overlap
        step = math.ceil(FRAMES * clips.meta["frame_stride"] / clips.meta["stride"])
    apart = range(0, len(clips), step)
    if num > len(apart):
        raise DataError(f"--num {num} is more than the {len(apart)} validation clips of {clips.path} (two at "
                        "least, for one lends the other its actions): give a smaller --num")
    return [apart[i] for i in spread(apart, num)]

def clip_list(clips, chosen):
    """-> (SHA-256 of the recording, first frame and stride of every chosen clip; the recordings (clips,)).
    Scores of other lists do not compare. Raw video and latents made of it give the same list: stored clips
    follow one another every 17 frames, however far apart they were cut."""
    segments = clips.segment(clips.starts)
    _, recordings = np.unique(segments, return_inverse=True)  # counted without those that hold no clip
    first = (clips.starts - clips.edges[segments]) * clips.meta.get("stride", FRAMES) // FRAMES
    first = np.array(clips.meta.get("first", first))  # as encode wrote it where clips do not follow on
    stride = np.full_like(first, clips.meta.get("frame_stride", clips.frame_stride))
    rows = np.stack([recordings, first, stride], axis=1)[chosen]
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(), recordings[chosen]

def action_groups(clips, chosen):
    """{group: its columns of an action}, eight at most: as metadata.json says ("groups": {name: [columns]}),
    else JOINT_GROUPS, else a group for each beginning of a name, up to its first "." or "_". Groups that do
    not change within the chosen clips are left out."""
    groups = {}
    for column, name in enumerate(clips.names):
        beginning = name.replace(".", "_").partition("_")[0]
        groups.setdefault(beginning, []).append(column)
    if clips.names == JOINTS:
        groups = {group: groups[beginning] for group, beginning in JOINT_GROUPS.items()}
    groups = clips.meta.get("groups", groups)

    frames = [clips.starts[i] + clips.frame_stride * np.arange(clips.frames) for i in chosen]
    moves = np.ptp(clips.states(np.concatenate(frames)), axis=0) > 1e-6  # (A,)
    try:
        groups = [(group, columns) for group, columns in groups.items() if moves[columns].any()]
    except (AttributeError, IndexError):
        raise DataError(f"{clips.path}/metadata.json says groups = {groups!r:.100}: give {{name: [columns]}} "
                        f"with columns of 0..{clips.action_dim - 1}") from None
    return dict(groups[:8])

# ---- one clip ------------------------------------------------------------------------------------

def actions_told(model, clips, actions, another, groups):
    """{name: actions (F, A)}, what each dream of a clip is told. All begin with the clip's own nine. The
    eight that follow are its own ("prediction"), those of `another` clip ("shuffled"), that clip's
    in the columns of one group ("only drive"), or those of a robot that stands still ("frozen")."""
    told = {"prediction": actions}
    for name in ("shuffled", "frozen"):
        told[name] = change_actions(name, actions, model, clips, PAST, another)
    for group, columns in groups.items():
        told[f"only {group}"] = actions.clone()
        told[f"only {group}"][PAST:, columns] = another[PAST:, columns]
    return told

@torch.no_grad()
def through_windows(model, tokenizer, clip):
    """A clip of nine frames and n windows of eight -> ({name: frames (8 n, H, W, 3)} of what its dreams are
    compared with; the latents of each window (n, [C,] T, H, W), as they went through the tokenizer)."""
    video = clip["video"]
    device = next(tokenizer.parameters()).device
    is_raw = video.dtype == torch.uint8
    if is_raw:  # with each window the nine frames before it
        windows = video.unfold(0, FRAMES, FUTURE).permute(0, 4, 1, 2, 3)  # (n, 17, H, W, 3)
        z = tokenizer.encode(to_video(windows.to(device)))
    else:
        z = video[None].to(device)
    decoded = to_uint8(tokenizer.decode(z).cpu())  # (n, 17, H, W, 3)
    target = decoded[:, PAST:].flatten(0, 1)
    shown = {"target": target, "copy_last": decoded[0, PAST - 1].expand_as(target)}
    if is_raw:
        shown["raw"] = video[PAST:]
    return shown, z

def dream_clip(model, tokenizer, clip, told, seed=0, **settings):
    """A clip of 17 frames -> as `through_windows`, with a dream for each name in `told`, all from the same
    noise; "oracle" is that of a model that knows the latents of the future."""
    shown, z = through_windows(model, tokenizer, clip)
    past, future = z.tensor_split([model.layout.T_p], dim=-3)
    pasts = torch.cat([past] * len(told))
    courses = torch.stack([*told.values()])
    noise = noise_of([seed + clip["index"]] * len(told))
    films = continue_video(model, tokenizer, pasts, courses, noise=noise, **settings)
    oracle = SimpleNamespace(layout=model.layout, parameters=model.parameters, sample=lambda *_, **__: future)
    known = continue_video(oracle, tokenizer, past, courses[:1])
    return {**shown, **dict(zip(told, films)), "oracle": known[0]}, z

def compare(shown, rows, **measures):
    """Frames as of `dream_clip` -> {"psnr_copy_last": scores (frames,), ...}: each measure of each row of
    which both sides are there."""
    scores = {}
    for row, (_, a, b) in rows.items():
        if {a, b} <= shown.keys():
            for name, measure in measures.items():
                scores[f"{name}{row}"] = measure(shown[a], shown[b])
    return scores

def token_scores(model, L, actions, seed):
    """Masked-HWM, all of the future hidden: cross-entropy in nats, and how often the likeliest id is the
    true one."""
    L_p, L_f = L.tensor_split([model.config.T_p], dim=1)
    hidden = torch.ones_like(L_f, dtype=torch.bool)
    truth = L_f.flatten()
    logits = model.logits(L, hidden, actions).float()  # (T_f * S, vocab)
    right = logits.argmax(-1) == truth
    copied = L_p[:, -1:] == L_f
    return {"cross_entropy": F.cross_entropy(logits, truth).item(),
            "ln_vocab": math.log(model.config.vocab_size),
            "token_accuracy": right.float().mean().item(),
            "copy_last_token_accuracy": copied.float().mean().item()}

def velocity_scores(model, latents, actions, seed):
    """Flow-HWM: mean squared error of the velocity (Eq. 3) at t = 0.05, 0.15 .. 0.95 from the same noise."""
    t = torch.arange(0.05, 1, 0.1).to(latents)
    sigma_min = model.config.sigma_min
    v_p, X_1 = model.standardise_latents(latents).tensor_split([model.config.T_p], dim=2)
    X_0 = torch.randn(X_1.shape, generator=torch.Generator().manual_seed(seed)).to(X_1)
    X_t = interpolate(X_0, X_1, t, sigma_min)  # (10, C, T_f, H, W)
    v_p = v_p.repeat_interleave(10, dim=0)
    actions = actions.repeat_interleave(10, dim=0)
    error = model.velocity(X_t, t, v_p, actions) - target_velocity(X_0, X_1, sigma_min)
    error = error.square()
    return {"velocity_error": error.flatten(1).mean(1).cpu().numpy()}

@torch.no_grad()
def speed(model, tokenizer, clips, chosen, **settings):
    """-> (clips a second, peak memory in GB so far) of one process that dreams the chosen clips in one batch.
    Timed: sampling and decoding, from past latents to eight frames. Not timed: encoding, as in the paper (its
    models are given latents: "samples/s", "video latent decoding speed"), and a first batch that warms up."""
    z = torch.cat([to_latents(clips[i]["video"], tokenizer) for i in chosen])
    past = z.narrow(-3, 0, model.layout.T_p)
    actions = torch.stack([clips[i]["actions"] for i in chosen])
    if z.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        start = time.perf_counter()
        continue_video(model, tokenizer, past, actions, **settings)
        seconds = time.perf_counter() - start  # the frames are on the CPU by now
    return len(chosen) / seconds, peak_gb(z.device.type)

# ---- all clips -----------------------------------------------------------------------------------

def evaluate(model, tokenizer, clips, num=64, seed=0, net=None, **settings):
    """All numbers of one model as a dict, the keys as in --json; {} on ranks other than 0. net: the feature
    network of FID (None: no FID); the settings are the sampler's."""
    rank, world = rank_and_world()
    listed = choose_clips(clips, max(num, 2))
    chosen = listed[:num]
    groups = action_groups(clips, chosen)
    group_rows = {f" of {group}": ("", f"only {group}", "target") for group in groups}
    name_of_list, recordings = clip_list(clips, chosen)
    out = {"params": count_parameters(model), "tokenizer_params": count_parameters(tokenizer),
           "clips": num, "frames": num * FUTURE, "clip_list": name_of_list, "data": clips.path,
           "recordings": len(np.unique(recordings)), "settings": {**settings, "seed": seed}}
    if out["recordings"] == 1:  # then clips are all there is to be drawn again
        recordings = np.arange(num)

    # 1. Speed, while the other ranks wait: processes that share a machine would time one another.
    if rank == 0:
        out["batch"] = min(num, AT_ONCE)
        out["samples_per_s"], out["peak_gb"] = speed(model, tokenizer, clips, chosen[:AT_ONCE], **settings)
    barrier()

    # 2. Every rank dreams its share of the clips. The clip that lends its actions is half the list away: a
    # neighbour would move much the same.
    found, own_scores = {}, token_scores if tokenizer.kind == "discrete" else velocity_scores
    for j in tqdm(range(rank, num, world), desc="evaluating", unit="clip", disable=rank > 0):
        lender = listed[(j + len(listed) // 2) % len(listed)]
        clip = clips[chosen[j]]
        another = clips[lender]["actions"]
        told = actions_told(model, clips, clip["actions"], another, groups)
        shown, z = dream_clip(model, tokenizer, clip, told, seed, **settings)
        own = own_scores(model, z, clip["actions"][None].to(z.device), seed + chosen[j])
        by_row = compare(shown, ROWS, psnr=psnr, ssim=ssim)
        by_group = compare(shown, group_rows, psnr=psnr)
        found[j] = own | by_row | by_group
        if net:
            frames = [shown["prediction"], shown["target"], shown["copy_last"][:1]]
            found[j]["features"] = net(torch.cat(frames))

    # 3. Rank 0 puts the shares together.
    table = gather(found)
    if rank > 0:
        return {}
    out |= {key: table[key].mean(0).tolist() for key in own}
    out |= summarise(table, groups, recordings)
    if net:
        out |= set_scores(table["features"], recordings, seed)
    return out

def gather(found):
    """{number: {key: scores}} of this process -> {key: scores (all numbers, ...)} of all processes."""
    _, world = rank_and_world()
    parts, together = [found], {}
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found)
    for part in parts:
        together |= part
    rows = [together[j] for j in sorted(together)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

def summarise(table, groups, recordings):
    """{key: scores (clips, 8)} -> the numbers of --json: means, intervals, curves over the eight frames; None
    in rows that need raw frames where none are."""
    out = {"delta_psnr_groups": {}}
    for row in ROWS:
        for key in (f"psnr{row}", f"ssim{row}"):
            out[key] = float(table[key].mean()) if key in table else None
            out[f"{key}_per_frame"] = table[key].mean(0).tolist() if key in table else None

    def gain_over(key):
        by_clip = (table["psnr"] - table[key]).mean(1)
        return float(by_clip.mean()), interval(by_clip, recordings)

    out["psnr_ci"] = interval(table["psnr"].mean(1), recordings)
    out["gain_psnr"], out["gain_psnr_ci"] = gain_over("psnr_copy_last")
    out["delta_psnr"], out["delta_psnr_ci"] = gain_over("psnr_shuffled_actions")
    delta = table["psnr"] - table["psnr_shuffled_actions"]
    out["delta_psnr_per_frame"] = delta.mean(0).tolist()
    for group in groups:
        delta, ci = gain_over(f"psnr of {group}")
        out["delta_psnr_groups"][group] = {"delta_psnr": delta, "ci": ci}
    return out

def rollout(model, tokenizer, clips, windows, seed=0, say=print, **settings):
    """{"rollout": PSNR by window of eight frames}, the mean of 16 long clips at most, in which every window
    is dreamt from the frames of the one before; {} after a sentence where there are no such clips."""
    rank, world = rank_and_world()
    frames = PAST + FUTURE * windows
    span = (frames - 1) * clips.frame_stride + 1
    if clips.kind != "raw" or np.diff(clips.edges).max() < span:
        say(f"no rollout of {windows} windows: it takes raw video, and recordings of {span} frames, which "
            f"{clips.path} does not hold; a smaller --rollout takes shorter ones")
        return {}
    opened, found = clips.meta.get("opened", {}), {}
    clips = open_clips(clips.path, "val", frames, None, clips.size, clips.frame_stride, **opened)
    chosen = spread(clips, min(len(clips), 16))
    batches = range(rank * AT_ONCE, len(chosen), world * AT_ONCE)  # the same for any number of processes
    for first in tqdm(batches, desc="rollouts", unit="batch", disable=rank > 0):
        some = [clips[i] for i in chosen[first : first + AT_ONCE]]
        through = [through_windows(model, tokenizer, clip) for clip in some]
        pasts = torch.cat([z[:1] for _, z in through]).narrow(-3, 0, model.layout.T_p)
        actions = torch.stack([clip["actions"] for clip in some])
        noise = noise_of(seed + clip["index"] for clip in some)
        films = continue_video(model, tokenizer, pasts, actions, windows, noise, **settings)
        for j, film in enumerate(films):
            shown, _ = through[j]
            shown["prediction"] = film
            found[first + j] = compare(shown, ROWS, psnr=psnr)
    curves = {}
    for key, scores in gather(found).items():
        curves[key] = scores.reshape(-1, windows, FUTURE).mean((0, 2)).tolist()
    return {"rollout": {**curves, "clips": len(chosen)}}

def sizes():
    """Parameters of the eight models at the paper preset, in billions, counted from the real modules on the
    meta device (shapes without memory). Flow includes its tokenizer, as Table 2 does."""
    counted = {}
    with torch.device("meta"):
        tokenizer = Tokenizer(PRESETS["cv8x16x16"])
        for name, module in MODELS.items():
            extra = count_parameters(tokenizer) if name == "flow" else 0
            counted[name] = {}
            for variant in VARIANTS:
                config = module.Config(**{**module.PRESETS["paper"], "variant": variant})
                n = count_parameters(module.Model(config)) + extra
                counted[name][variant] = n / 1e9
    return counted

# ---- tables and the command line -----------------------------------------------------------------

LINES = [  # label, key of the number (and KEY_ci, of its interval), what follows them
    ("PSNR", "psnr", ""),
    ("gain over copying the last frame", "gain_psnr", ""),
    ("delta_psnr: gain by true actions", "delta_psnr", ""),
    ("{fd}", "fid", "N = {fid_frames}"),
    ("  copying the last frame", "fid_copy_last", "N = {fid_frames}"),
    ("  real against real, disjoint", "fid_floor", "N = {fid_floor_frames}"),
    ("{kd}", "kid", "N = {kid_frames}"),
    ("cross-entropy, future hidden", "cross_entropy", "nats; ln(vocabulary) {ln_vocab:.2f}"),
    ("token accuracy", "token_accuracy", "copying the last latent: {copy_last_token_accuracy:.4f}"),
    ("velocity error, t = 0.05 .. 0.95", "velocity_error", ""),
    ("samples/s", "samples_per_s",
     "sampling and decoding {batch} at once on {device} in {dtype}, {peak_gb:.2f} GB"),
]

def text(value):
    """A number or a list of numbers, to four digits; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "[" + ", ".join(text(v) for v in value) + "]"
    return f"{value:#.4g}"

def print_row(label, *cells):
    print(f"{label:34}" + "".join(f" {text(cell):>7}" for cell in cells))

def print_scores(s):
    """All numbers; a dash where there are no raw frames, or too few clips for an interval."""
    print(f"\n{s['clips']} clips of {s['recordings']} recordings (list {s['clip_list'][:8]}), {s['frames']} "
          "frames; PSNR in dB, by frame to the right")
    print(f"{'':38}PSNR    SSIM      +1      +2  ..")
    for row, (label, *_) in ROWS.items():
        curve = s[f"psnr{row}_per_frame"] or []
        print_row(label, s[f"psnr{row}"], s[f"ssim{row}"], *curve)
    if s["psnr_ceiling"] is None:
        print("(the data folder holds latents only: no rows against raw frames; --data takes a raw folder)")

    print(f"\n95 % intervals over {'recordings' if s['recordings'] > 1 else 'clips'} in brackets")
    net = s["fid_features"]
    fd, kd = ("FID", "KID") if net == "inception" else (f"fd_{net}", f"kd_{net}")
    for label, key, note in LINES:
        if key in s:
            ci = text(s[f"{key}_ci"]) + " " if f"{key}_ci" in s else ""
            print(f"{label.format(fd=fd, kd=kd):34} {text(s[key]):>7}   {ci}{note.format(**s)}")
    if net:
        print(s["fid_is"])
    for group, delta in s["delta_psnr_groups"].items():
        print_row(f"delta_psnr of {group} alone", *delta.values())
    print(f"{'parameters':34} {s['params']:,}, and the tokenizer's {s['tokenizer_params']:,}")
    if "rollout" in s:
        print(f"\nrollouts of {s['rollout']['clips']} clips: PSNR by window of eight frames")
        for row in ("", "_copy_last", "_ceiling"):
            print_row(ROWS[row][0], *s["rollout"][f"psnr{row}"])

def print_sizes(counted):
    print(f"{'billion parameters':20}" + "".join(f"{v:>18}" for v in VARIANTS) + "     (the paper's)")
    for name, row in counted.items():
        cells = [f"{row[v]:.4f} ({PAPER_SIZES[name][v]:g})" for v in VARIANTS]
        label = "flow + tokenizer" if name == "flow" else name
        print(f"{label:20}" + "".join(f"{cell:>18}" for cell in cells))

def run(args):
    """What the command line asks for -> the dict of --json; a part of it on ranks other than 0."""
    check_sampling_flags(args)
    if args.windows < 0:
        raise DataError(f"--rollout {args.windows} makes no sense: give at least 0")
    rank, world = rank_and_world()
    say = print if rank == 0 else lambda *_: None
    if args.device == "cuda":
        args.device = str(device_of()[1])
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if world > 1:
        dist.init_process_group("gloo")

    # 1. What is scored. Rank 0 goes first: it draws the built-in robot and fetches Inception if need be.
    if rank > 0:
        barrier()
    model, tokenizer, settings, clips, saved = load_fitting(args.ckpt, args)
    net, features = None, None
    wants_fid = not (args.no_fid or args.plan)
    if wants_fid and args.num < 4:
        say(f"FID and KID are left out: they take at least four clips, and --num is {args.num}")
    elif wants_fid:
        net, features = load_inception(args.inception, say)
        net.to(args.device)
    if rank == 0:
        barrier()
    dtype = set_dtype(model, tokenizer, args, AT_ONCE)
    config = saved["config"]
    out = {"model": config["model"], "variant": config["variant"], "step": saved["step"],
           "device": args.device, "dtype": dtype}
    about = f"{config['model']} {config['variant']}, step {saved['step']}, on {args.device} in {dtype}:"

    # 2. The scores.
    if args.plan:
        from examples.plan import evaluate_plans  # not above, for it takes its helpers from here
        say(f"{about} {args.episodes} episodes, {json.dumps(settings)}, seed {args.seed}")
        return out | evaluate_plans(model, tokenizer, args.episodes, args.horizon, args.seed, **settings)
    say(f"{about} {args.num} clips of {clips.path}, {json.dumps(settings)}, seed {args.seed}")
    out |= {"fid_features": features, "fid_is": FID_IS.get(features)}
    out |= evaluate(model, tokenizer, clips, args.num, args.seed, net, **settings)
    if args.windows:
        out |= rollout(model, tokenizer, clips, args.windows, args.seed, say, **settings)
    return out

@command
def main(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--sizes", action="store_true", help="only count the parameters of the eight models")
    first.add_argument("--plan", action="store_true", help="only drive the built-in robot to goals")
    first.add_argument("--json", default="", metavar="FILE", help="write all numbers to FILE")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                parents=[first], epilog=FID_IS["inception"])
    if not first.parse_known_args(argv)[0].sizes:
        add_sampling_flags(p)
        p.add_argument("--num", type=int, default=64, help="validation clips (default 64)")
        p.add_argument("--rollout", dest="windows", type=int, default=8, metavar="N",
                       help="windows of eight frames dreamt one after the other (default 8; 0: no rollout)")
        p.add_argument("--inception", default="", metavar="FILE", help="Inception-v3 weights for FID, or: "
                       "random; default: torch hub's cache, else a download")
        p.add_argument("--no_fid", action="store_true", help="leave FID and KID out")
        p.add_argument("--episodes", type=int, default=40, help="of --plan (default 40)")
        p.add_argument("--horizon", type=int, default=1, help="of --plan: windows (default 1)")
    args = p.parse_args(argv)
    if os.path.isdir(args.json):  # said before the work, not after it
        raise DataError(f"--json {args.json} is a folder: give a file")
    out = sizes() if args.sizes else run(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank_and_world()[0] > 0:
        return
    if args.sizes:
        print_sizes(out)
    elif args.plan:
        from examples.plan import print_plans
        print_plans(out)
    else:
        print_scores(out)
    if args.json:
        write_whole(args.json, lambda file: Path(file).write_text(json.dumps(out, indent=1)))
        print(f"wrote {args.json}")

if __name__ == "__main__":
    main()
