"""Scores a checkpoint: how good are its dreams, do they obey the actions, what would a lazy guess score?

    python evaluate.py --ckpt out/flow_full/ckpt.pt --json scores.json      # 64 validation clips
    torchrun --nproc_per_node=2 -- evaluate.py --ckpt out/flow_full/ckpt.pt --num 95    # the clips divided
    python evaluate.py --sizes                                              # the eight models, counted

One evaluator for both families (Tables 1 and 2): one list of validation clips, evenly spread, no two of them
overlapping; one target, the eight future frames after a trip through the model's own tokenizer (the paper's
protocol). Rows beside the model's say what its number means: copying the last frame, the tokenizer's ceiling,
the same dream with another clip's actions. A clip's noise comes from the seed and the clip alone and is the
same in every row, so no score depends on how the work is divided. (The -- keeps torchrun from taking --num
for an option of its own.)

In this order: frames compared (PSNR, SSIM), sets of frames compared (FID, KID), one clip, all clips, tables.
Frames are (n, H, W, 3) uint8 arrays, scores of frames (n,), features (n, d) float64 with d = 2048.
"""
import argparse
import json
import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import tokenizer as tokenizers
from blocks import VARIANTS
from data import FRAMES, DataError, fingerprint, to_uint8
from flow_hwm import interpolate, target_velocity
from sample import (MODELS, CheckpointError, add_sampling_flags, change_actions, check_fit,
                    check_sampling_flags, compile_blocks, continue_video, load_model, load_tokenizer_for,
                    replace, settings_of, to_latents, validation_clips)
from tokenizer import TokenizerError
from train import barrier, device_of, peak_gb, rank_and_world

PAPER_SIZES = {  # billions, Tables 1 and 2
    "masked": {"split": 0.220, "base": 0.321, "modality": 0.237, "full": 0.195},
    "flow": {"split": 0.944, "base": 1.36, "modality": 0.886, "full": 0.648}}
ROWS = {  # row: (its line in the table, what is compared, with what); "" is the model
    "": ("model", "prediction", "target"),
    "shuffled_actions": ("with another clip's actions", "shuffled", "target"),
    "frozen_actions": ("with frozen actions", "frozen", "target"),  # the robot stands still
    "copy_last": ("copy the last frame", "copy_last", "target"),
    "raw": ("model against raw frames", "prediction", "raw"),
    "ceiling": ("tokenizer against raw: ceiling", "target", "raw"),  # no dream can be expected to score more
    "oracle": ("true latents: equals the ceiling", "oracle", "raw"),  # in place of the model's: a self-check
}
T_BINS = (torch.arange(10) + 0.5) / 10  # of velocity_error: the middles of ten bins of t


# -----------------------------------------------------------------------------------------------------------
# Frame against frame


def psnr(a, b):
    """Peak signal-to-noise ratio of each frame in dB, (n, H, W, 3) uint8 twice -> (n,). A mean squared error
    below 0.01 counts as 0.01, as in tokenizer.py: equal frames score 68.1 dB, and means stay finite."""
    mse = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(mse, 0.01))


def ssim(a, b):
    """Structural similarity of each frame (Wang et al., 2004) -> (n,): means, variances and covariance under
    a Gaussian window, 11 x 11 pixels, sigma 1.5, wherever it fits into the frame; mean over places and
    colours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planes = lambda x: torch.as_tensor(x).to(device).double().permute(0, 3, 1, 2).flatten(0, 1)[:, None]  # (3n, 1, H, W)
    a, b = planes(a), planes(b)
    g = torch.exp(-((torch.arange(11.0, dtype=torch.float64, device=device) - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()
    blur = lambda x: F.conv2d(F.conv2d(x, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))
    m_a, m_b = blur(a), blur(b)
    v_a, v_b, cov = blur(a * a) - m_a**2, blur(b * b) - m_b**2, blur(a * b) - m_a * m_b
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * m_a * m_b + c_1) * (2 * cov + c_2) / ((m_a**2 + m_b**2 + c_1) * (v_a + v_b + c_2))
    return s.mean((1, 2, 3)).view(-1, 3).mean(1).cpu().numpy()


def interval(per_clip, n=10_000, seed=0):
    """95 % bootstrap interval of the mean of per_clip (clips,): clips drawn again, with replacement. [low,
    high]"""
    x = np.asarray(per_clip, np.float64)
    means = x[np.random.default_rng(seed).integers(len(x), size=(n, len(x)))].mean(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


# -----------------------------------------------------------------------------------------------------------
# Set against set: FID (Heusel et al., 2017) and KID (Binkowski et al., 2018) on features of Inception-v3

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"  # how its SHA-256 begins: the digits that its publisher states, in the name


def block_a(pool):  # {branch: its convolutions, (channels, kernel)}
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]}


def block_c(c):
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            "branch_pool": [(192, 1)]}


BLOCK_B = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3)],
           "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
BLOCK_E = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), (384, "fork")],  # fork: (1, 3) beside (3, 1)
           "branch3x3dbl": [(448, 1), (384, 3), (384, "fork")], "branch_pool": [(192, 1)]}
MIXED = [  # name, channels in, branches, pooling: before branch_pool; "halve": of all, and one more branch
    ("Mixed_5b", 192, block_a(32), "avg"), ("Mixed_5c", 256, block_a(64), "avg"),
    ("Mixed_5d", 288, block_a(64), "avg"), ("Mixed_6a", 288, BLOCK_B, "halve"),
    ("Mixed_6b", 768, block_c(128), "avg"), ("Mixed_6c", 768, block_c(160), "avg"),
    ("Mixed_6d", 768, block_c(160), "avg"), ("Mixed_6e", 768, block_c(192), "avg"),
    ("Mixed_7a", 768, BLOCK_D, "halve"), ("Mixed_7b", 1280, BLOCK_E, "avg"),
    ("Mixed_7c", 2048, BLOCK_E, "max")]


class Conv(nn.Module):
    """Convolution, batch norm with running statistics, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: branches side by side, their channels concatenated."""

    def __init__(self, c_in, branches, pool):
        super().__init__()
        self.pool, self.chains = pool, {}
        for branch, convs in branches.items():
            c, self.chains[branch] = c_in, []
            for n, (c_out, kernel) in enumerate(convs, 1):
                name = branch if len(convs) == 1 else f"{branch}_{n}"
                last = {"stride": 2, "padding": 0} if pool == "halve" and n == len(convs) else {}
                parts = {name + "a": (1, 3), name + "b": (3, 1)} if kernel == "fork" else {name: kernel}
                for part, k in parts.items():
                    self.add_module(part, Conv(c, c_out, k, **last))
                self.chains[branch].append(list(parts))
                c = c_out

    def forward(self, x):
        out = []
        for branch, chain in self.chains.items():
            y = x
            if branch == "branch_pool":
                y = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else (
                    F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            for parts in chain:
                y = torch.cat([getattr(self, part)(y) for part in parts], dim=1)
            out.append(y)
        if self.pool == "halve":
            out.append(F.max_pool2d(x, 3, 2))
        return torch.cat(out, dim=1)


class Inception(nn.Module):
    """Inception-v3 as the FID literature has it, TensorFlow's of 2015: average pools leave the border out,
    the last block pools by maximum. Parameters are named as in pytorch-fid's file. Frames are resized to
    `size`."""

    def __init__(self, size=299):
        super().__init__()
        self.size = size
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(32, 32, 3, padding=0), Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, padding=0)
        for name, c_in, branches, pool in MIXED:
            self.add_module(name, Mixed(c_in, branches, pool))

    @torch.no_grad()
    def forward(self, frames):
        """(n, H, W, 3) uint8 array -> features (n, 2048) float64 array"""
        x = torch.as_tensor(frames).to(next(self.parameters()).device).permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)  # (n, 192, 35, 35) for size 299
        for name, *_ in MIXED:
            x = getattr(self, name)(x)
        return x.mean((2, 3)).double().cpu().numpy()  # (n, 2048, 8, 8) -> (n, 2048)


def random_inception(size=96, seed=0):
    """The same network with He-normal weights of a fixed seed: features without a file. Distances between
    them rise with blur and noise as FID does, but are not FID and compare with no other features. Smaller
    frames, for speed."""
    net, g = Inception(size), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p, generator=g)
    return net


def load_inception(file="", say=print):
    """-> (network, "inception" | "random_inception"). file: the weights, or "random"; "": torch hub's cache,
    else a download into it, else random_inception with a sentence that says what to do."""
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(INCEPTION_URL))
    if not file and not os.path.exists(cached):
        patience = socket.getdefaulttimeout()
        try:
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            socket.setdefaulttimeout(10)
            torch.hub.download_url_to_file(INCEPTION_URL, cached, hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as e:
            say(f"FID needs Inception-v3, and {INCEPTION_URL} cannot be had ({e}): put that file into "
                f"{os.path.dirname(cached)} or name it with --inception; for now fd_random_inception, no FID")
            file = "random"
        finally:
            socket.setdefaulttimeout(patience)
    if file == "random":
        net, name = random_inception(), "random_inception"
    else:
        net, name, file = Inception(), "inception", file or cached
        if not os.path.isfile(file):
            raise DataError(f"there is no file {file}: give Inception's, from {INCEPTION_URL}, or: random")
        if not fingerprint(file).startswith(INCEPTION_SHA256):
            raise DataError(f"{file} is not the Inception of the FID literature (its SHA-256 does not begin "
                            f"with {INCEPTION_SHA256}): get {INCEPTION_URL}")
        state = torch.load(file, map_location="cpu", weights_only=True)
        net.load_state_dict({k: state[k] for k in net.state_dict()})  # all but the classifier
    return net.eval().requires_grad_(False), name


@dataclass
class Moments:
    """Number, mean and scatter (sum of outer products of deviations) of features, in float64. `+` merges
    those of disjoint sets (Chan et al., 1979), so that batches and ranks may come in any order."""
    n: int = 0
    mean: np.ndarray = 0.0  # (d,)
    scatter: np.ndarray = 0.0  # (d, d)

    @classmethod
    def of(cls, x):
        x = np.asarray(x, np.float64)
        return cls(len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)))

    def __add__(self, other):
        n, gap = self.n + other.n, np.asarray(other.mean - self.mean)
        between = np.multiply.outer(gap, gap) * (self.n * other.n / max(n, 1))
        return Moments(n, self.mean + gap * (other.n / max(n, 1)), self.scatter + other.scatter + between)

    @property
    def cov(self):
        return self.scatter / (self.n - 1)


def frechet(a, b):
    """Frechet distance of two Gaussians, as Moments: |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^1/2.
    The last is the sum of the roots of the eigenvalues of R' S_2 R with R R' = S_1: symmetric, so they are
    real. The square root of S_1 would do for R; a pivoted Cholesky factor (d, rank) is faster and leaves out
    directions in which S_1 has no width (n frames span n - 1): the roots of their rounding would add up."""
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(a.cov, lower=1)
    R = np.zeros((len(factor), rank))
    R[order - 1] = np.tril(factor)[:, :rank]
    roots = np.sqrt(scipy.linalg.eigvalsh(R.T @ b.cov @ R).clip(min=0))
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * roots.sum())


def grams(x, y):
    """Inner products over d of two sets of features: xx, xy, yy. FD and KID of any part of them need no
    more."""
    return x @ x.T / x.shape[1], x @ y.T / x.shape[1], y @ y.T / x.shape[1]


def gram_frechet(xx, xy, yy, d):
    """`frechet` of two sets of one size n by a second formula, fast for n < d: tr (S_1 S_2)^1/2 is the sum of
    the singular values of the centred xy, over n - 1."""
    centred = lambda g: g - g.mean(0) - g.mean(1, keepdims=True) + g.mean()
    spread = np.trace(centred(xx)) + np.trace(centred(yy)) - 2 * scipy.linalg.svdvals(centred(xy)).sum()
    return d * float(xx.mean() + yy.mean() - 2 * xy.mean() + spread / (len(xx) - 1))


def kid(xx, xy, yy):
    """Squared maximum mean discrepancy, kernel (x.y / d + 1)^3, unbiased: no frame is compared with
    itself."""
    k_xx, k_xy, k_yy = ((g + 1) ** 3 for g in (xx, xy, yy))
    others = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(others(k_xx) + others(k_yy) - 2 * k_xy.mean())


def set_scores(moments, features, seed=0, n_halves=50):
    """moments {"model", "copy_last", 0, 1}, the last two of the targets of every other clip; features
    (clips, 2, 8, d) of the dreamt and target frames of some clips -> FD and KID with 95 % intervals over
    clips. Clips drawn with replacement would come twice, which inflates both; random halves spread around
    their mean as the whole would. Dreams and targets show the same scenes: FD may lie below the floor, which
    is between two halves that do not, each with half the frames."""
    real, (n, _, n_f, d) = moments[0] + moments[1], features.shape
    by_clip = [g.reshape(n, n_f, n, n_f) for g in grams(*features.swapaxes(0, 1).reshape(2, n * n_f, d))]
    part = lambda some: [g[some][:, :, some].reshape(len(some) * n_f, -1) for g in by_clip]
    rng = np.random.default_rng(seed)
    halves = (part(rng.permutation(n)[: n // 2]) for _ in range(n_halves))
    spread = np.array([(gram_frechet(*g, d), kid(*g)) for g in halves])
    low, high = np.percentile(spread - spread.mean(0), [2.5, 97.5], axis=0)
    narrower = math.sqrt(n * n_f / real.n)  # FD looks at all clips, where KID and the halves look at some
    fid, k = frechet(moments["model"], real), kid(*part(np.arange(n)))
    return {"fid": fid, "fid_ci": [fid + low[0] * narrower, fid + high[0] * narrower], "fid_frames": real.n,
            "fid_copy_last": frechet(moments["copy_last"], real),
            "fid_floor": frechet(moments[0], moments[1]), "fid_floor_frames": moments[1].n,
            "kid": k, "kid_ci": [k + low[1], k + high[1]], "kid_frames": n * n_f}


# -----------------------------------------------------------------------------------------------------------
# One clip


def choose_clips(clips, num):
    """`num` clips evenly spread over those of which none overlaps another, in the order of the recording."""
    span, stride = FRAMES * clips.meta.get("frame_stride", 1), clips.meta.get("stride")
    apart = range(0, len(clips), -(-span // stride) if clips.meta.get("windows") else 1)
    if num > len(apart):
        raise DataError(f"--num {num} is more than the {len(apart)} validation clips of {clips.path}: give a "
                        "smaller --num")
    if len(clips) < 2:
        raise DataError(f"{clips.path} holds one validation clip: a second is needed, for its actions")
    return [apart[i] for i in np.linspace(0, len(apart) - 1, num).round().astype(int)]


@torch.no_grad()
def dream_clip(model, tokenizer, clips, i, other, seed=0, **settings):
    """Clip i: its frames in every form that ROWS compares, {name: (8, H, W, 3)}, and the model's own scores.
    `other` is the clip whose actions are borrowed; all dreams start from the same noise."""
    n_p, n_f = model.layout.lengths[2:]
    clip = clips[i]
    z = to_latents(clip["video"], tokenizer)
    past, future = z.split([model.layout.T_p, z.shape[-3] - model.layout.T_p], dim=-3)

    def frames(source, name):  # what the dreamer `source` makes of the actions of that name
        actions = change_actions(name, clip["actions"], model, clips, n_p, clips[other]["actions"])
        g = torch.Generator().manual_seed(seed + i)
        return continue_video(source, tokenizer, past, actions[None], generator=g, **settings)[0].numpy()

    oracle = SimpleNamespace(layout=model.layout, parameters=model.parameters, sample=lambda *_, **__: future)
    video = to_uint8(tokenizer.decode(z).cpu())[0].numpy()  # (F, H, W, 3)
    shown = {"target": video[n_p:], "copy_last": video[n_p - 1 : n_p].repeat(n_f, 0),
             "prediction": frames(model, "true"), "shuffled": frames(model, "shuffled"),
             "frozen": frames(model, "frozen"), "oracle": frames(oracle, "true")}
    if clips.kind == "raw":
        shown["raw"] = clip["video"][n_p:].numpy()
    own = token_scores if tokenizer.kind == "discrete" else velocity_scores
    return shown, own(model, z, clip["actions"][None].to(z.device), seed + i)


def token_scores(model, L, actions, seed):
    """Masked-HWM, all of the future hidden: cross-entropy in nats, and how often the likeliest id is the true
    one."""
    T_p = model.config.T_p
    truth = L[:, T_p:]
    logits = model.logits(L, torch.ones_like(truth, dtype=torch.bool), actions).float()  # (T_f*S, vocab)
    return {"cross_entropy": F.cross_entropy(logits, truth.flatten()).item(),
            "ln_vocab": math.log(model.config.vocab_size),
            "token_accuracy": (logits.argmax(-1) == truth.flatten()).float().mean().item(),
            "copy_last_token_accuracy": (L[:, T_p - 1 : T_p] == truth).float().mean().item()}


def velocity_scores(model, latents, actions, seed):
    """Flow-HWM: mean squared error of the velocity (Eq. 3) at each of T_BINS, all from the same noise."""
    c = model.config
    v_p, X_1 = model.standardise(latents).split([c.T_p, latents.shape[2] - c.T_p], dim=2)
    X_0 = torch.randn(X_1.shape, generator=torch.Generator().manual_seed(seed)).to(X_1)
    t, ten = T_BINS.to(X_1), lambda x: x.expand(len(T_BINS), *x.shape[1:])
    u = model.velocity(interpolate(ten(X_0), ten(X_1), t, c.sigma_min), t, ten(v_p), ten(actions))
    error = (u - target_velocity(X_0, X_1, c.sigma_min)).square().flatten(1).mean(1)
    return {"velocity_error": error.cpu().numpy()}


@torch.no_grad()
def speed(model, tokenizer, clips, chosen, **settings):
    """-> (clips a second, peak memory in GB so far) of one process that dreams the chosen clips in one batch.
    Timed: sampling and decoding, from past latents to eight frames. Not timed: encoding, as in the paper (its
    models are given latents: "samples/s", "video latent decoding speed"), and a first batch that warms up."""
    z = torch.cat([to_latents(clips[i]["video"], tokenizer) for i in chosen])
    past, actions = z.narrow(-3, 0, model.layout.T_p), torch.stack([clips[i]["actions"] for i in chosen])
    if z.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        start, g = time.perf_counter(), torch.Generator().manual_seed(0)
        continue_video(model, tokenizer, past, actions, generator=g, **settings)
        seconds = time.perf_counter() - start  # the frames are on the CPU by now
    return len(chosen) / seconds, peak_gb(z.device.type)


# -----------------------------------------------------------------------------------------------------------
# All clips


def evaluate(model, tokenizer, clips, num=64, seed=0, net=None, **settings):
    """All numbers of one model as a dict, the keys as in --json; None on ranks other than 0. net: the feature
    network of FID (None: no FID); the settings are the sampler's."""
    rank, world = rank_and_world()
    chosen, n_f = choose_clips(clips, num), model.layout.lengths[3]
    count = lambda module: sum(p.numel() for p in module.parameters())
    out = {"params": count(model), "tokenizer_params": count(tokenizer), "clips": num, "frames": num * n_f,
           "settings": {**settings, "seed": seed}}
    if rank == 0:  # the others wait: processes that share a machine would time one another
        out["samples_per_s"], out["peak_gb"] = speed(model, tokenizer, clips, chosen[:8], **settings)
    barrier()
    net = net and net.to(next(model.parameters()).device)
    scores, features, moments = {}, {}, {name: Moments() for name in ("model", "copy_last", 0, 1)}
    for j in tqdm(range(rank, num, world), desc="evaluating", unit="clip", disable=rank > 0):
        other = chosen[(j + num // 2) % num] if num > 1 else (chosen[j] + len(clips) // 2) % len(clips)
        shown, own = dream_clip(model, tokenizer, clips, chosen[j], other, seed, **settings)
        scores[j] = own, {row: {"psnr": psnr(shown[a], shown[b]), "ssim": ssim(shown[a], shown[b])}
                          for row, (_, a, b) in ROWS.items() if a in shown and b in shown}
        if net:
            f = net(np.concatenate([shown["prediction"], shown["target"], shown["copy_last"][:1]]))
            for name, x in (("model", f[:n_f]), (j % 2, f[n_f:-1]), ("copy_last", f[-1:].repeat(n_f, 0))):
                moments[name] += Moments.of(x)
            if j % -(-num // 128) == 0:  # KID and the intervals look at 128 clips at most
                features[j] = f[:-1].reshape(2, n_f, -1)
    parts = [None] * world
    if world > 1:
        dist.all_gather_object(parts, (scores, features, moments))
    else:
        parts = [(scores, features, moments)]
    if rank > 0:
        return None
    scores, features = ({j: x for part in parts for j, x in part[k].items()} for k in (0, 1))
    out |= summarise([scores[j] for j in range(num)])
    if net and num >= 4:  # two clips in each half
        moments = {name: sum((part[2][name] for part in parts), Moments()) for name in moments}
        out |= set_scores(moments, np.stack([features[j] for j in sorted(features)]), seed)
    return out


def summarise(scores):
    """A list over clips of (the model's own scores, {row: {"psnr": (8,), "ssim": (8,)}}) -> the numbers of
    --json: means, intervals over clips, curves over the eight frames; None in rows that need raw frames where
    none are."""
    out, per_clip = {}, {}
    for row in ROWS:
        for key in ("psnr", "ssim"):
            name = f"{key}_{row}".rstrip("_")
            out[name] = out[f"{name}_per_frame"] = None
            if row in scores[0][1]:
                x = np.stack([rows[row][key] for _, rows in scores])  # (clips, 8)
                out[name], out[f"{name}_per_frame"] = float(x.mean()), x.mean(0).tolist()
                per_clip[name] = x.mean(1)
    out["psnr_ci"] = interval(per_clip["psnr"])
    for name, row in (("delta_psnr", "psnr_shuffled_actions"), ("gain_psnr", "psnr_copy_last")):
        difference = per_clip["psnr"] - per_clip[row]
        out[name], out[f"{name}_ci"] = float(difference.mean()), interval(difference)
    return out | {key: np.mean([own[key] for own, _ in scores], axis=0).tolist() for key in scores[0][0]}


def sizes():
    """Parameters of the eight models at the paper preset, in billions, counted from the real modules on the
    meta device (shapes without memory). Flow includes its tokenizer, as Table 2 does."""
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e9
    with torch.device("meta"):
        extra = {"masked": 0, "flow": count(tokenizers.Tokenizer(tokenizers.PRESETS["cv8x16x16"]))}
        return {name: {variant: count(Model(Config(**{**presets["paper"], "variant": variant}))) + extra[name]
                       for variant in PAPER_SIZES[name]} for name, m in MODELS.items() for Model, Config, presets in [(m.Model, m.Config, m.PRESETS)]}


# -----------------------------------------------------------------------------------------------------------
# Tables and the command line


def print_scores(s):
    """The table, every row in it; a dash where there are no raw frames."""
    number = lambda v, width, digits: "-".rjust(width) if v is None else f"{v:{width}.{digits}f}"
    ci = lambda key, form: f"[{s[key + '_ci'][0]:{form}}, {s[key + '_ci'][1]:{form}}]"
    line = lambda label, value, note, form=".2f": print(f"{label:34}{value:7{form}}   {note}")
    horizon = range(len(s["psnr_per_frame"]))
    print(f"\n{s['clips']} clips, {s['frames']} frames; PSNR in dB, by frame to the right")
    print(f"{'':37}PSNR    SSIM    " + "".join(f"{f'+{k + 1}':>7}" for k in horizon))
    for row, (label, *_) in ROWS.items():
        mean, curve = (f"_{row}{end}".rstrip("_") for end in ("", "_per_frame"))
        curve = s["psnr" + curve.replace("__", "_")] or [None for _ in horizon]
        print(f"{label:34}{number(s['psnr' + mean], 7, 2)}{number(s['ssim' + mean], 8, 4)}    "
              + "".join(number(v, 7, 2) for v in curve))
    if s["psnr_ceiling"] is None:
        print("(the data folder holds latents only: no rows against raw frames; --data takes a raw folder)")
    print("\n95 % intervals over clips in brackets")
    line("PSNR", s["psnr"], ci("psnr", ".2f"))
    line("gain over copying the last frame", s["gain_psnr"], ci("gain_psnr", ".2f"))
    line("delta_psnr: gain by true actions", s["delta_psnr"], ci("delta_psnr", ".2f"))
    if "fid" in s:
        net = s["fid_features"]
        fd, kd = ("FID", "KID") if net == "inception" else (f"fd_{net}", f"kd_{net}")
        line(fd, s["fid"], f"{ci('fid', '.4g')} N = {s['fid_frames']}", ".4g")
        line("  copying the last frame", s["fid_copy_last"], f"N = {s['fid_frames']}", ".4g")
        line("  real against real, disjoint", s["fid_floor"], f"N = {s['fid_floor_frames']}", ".4g")
        line(kd, s["kid"], f"{ci('kid', '.2g')} N = {s['kid_frames']}", ".2g")
    if "cross_entropy" in s:
        line("cross-entropy, future hidden", s["cross_entropy"], f"nats; ln(vocabulary) {s['ln_vocab']:.2f}")
        line("token accuracy, %", 100 * s["token_accuracy"],
             f"copying the last latent: {100 * s['copy_last_token_accuracy']:.2f}")
    else:
        print(f"{'velocity error, t = 0.05 .. 0.95':36}" + "  ".join(f"{v:.3f}" for v in s["velocity_error"]))
    line("samples/s", s["samples_per_s"], f"sampling and decoding on {s['device']}, {s['peak_gb']:.2f} GB")
    line("million parameters", s["params"] / 1e6, f"and the tokenizer's {s['tokenizer_params'] / 1e6:.2f}")


def print_sizes(counted):
    print(f"{'billion parameters':20}" + "".join(f"{v:>18}" for v in VARIANTS) + "     (the paper's)")
    for name, row in counted.items():
        print(f"{name + (' + tokenizer' if name == 'flow' else ''):20}"
              + "".join(f"{f'{row[v]:.4f} ({PAPER_SIZES[name][v]:g})':>18}" for v in VARIANTS))


def run(args):
    """What the command line asks for -> the dict of --json, None on ranks other than 0."""
    check_sampling_flags(args)
    rank, world = rank_and_world()
    say = print if rank == 0 else lambda *_: None
    if args.device == "cuda":
        args.device = str(device_of()[1])
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if world > 1:
        dist.init_process_group("gloo")
    model, saved = load_model(args.ckpt, args.device, args.weights)
    if args.compile:
        compile_blocks(model)
    tokenizer = load_tokenizer_for(saved["tokenizer"], args.device, args.tokenizer)
    if rank > 0:  # rank 0 goes first: it draws the built-in robot and fetches Inception if they are missing
        barrier()
    clips = validation_clips(saved, args.data)
    net, features = (None, None) if args.no_fid else load_inception(args.inception, say)
    if rank == 0:
        barrier()
    check_fit(model, tokenizer, clips, saved["tokenizer"].get("sha256", ""))
    settings, config = settings_of(saved, args), saved["config"]
    say(f"{config['model']} {config['variant']}, step {saved['step']}, on {args.device}: {args.num} clips of "
        f"{clips.path}, {json.dumps(settings)}, seed {args.seed}")
    scores = evaluate(model, tokenizer, clips, args.num, args.seed, net, **settings)
    about = {"model": config["model"], "variant": config["variant"], "step": saved["step"],
             "device": args.device, "fid_features": features}
    return {**about, **scores} if scores else None


def main(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--sizes", action="store_true", help="only count the parameters of the eight models")
    first.add_argument("--json", default="", metavar="FILE", help="write all numbers to FILE")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                parents=[first])
    if not first.parse_known_args(argv)[0].sizes:
        add_sampling_flags(p)
        p.add_argument("--num", type=int, default=64, help="validation clips (default 64)")
        p.add_argument("--inception", default="", metavar="FILE", help="Inception-v3 weights for FID, or: "
                       "random; default: torch hub's cache, else a download")
        p.add_argument("--no_fid", action="store_true", help="leave FID and KID out")
    args = p.parse_args(argv)
    rank = rank_and_world()[0]
    try:
        if os.path.isdir(args.json):
            raise DataError(f"--json {args.json} is a folder: give a file")
        out = sizes() if args.sizes else run(args)
        if rank == 0:
            (print_sizes if args.sizes else print_scores)(out)
            if args.json:
                replace(args.json, lambda file: Path(file).write_text(json.dumps(out, indent=1)))
                print(f"wrote {args.json}")
    except (DataError, TokenizerError, CheckpointError, OSError) as e:
        sys.exit(f"evaluate.py: {e}" if rank == 0 else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
