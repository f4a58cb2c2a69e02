"""Video <-> latents: the Cosmos tokenizer (NVIDIA et al., 2025), one causal autoencoder of two kinds.

Flow-HWM works on the continuous latents of CV8x16x16, Masked-HWM on the discrete ids of DV8x8x8 (Sec. 3).
Causal means that a latent never depends on a later frame, so the past can be encoded without the future.
The first frame is a latent of its own: T latents hold F = 1 + temporal * (T - 1) frames.

    video (B, 3, F, H, W) in [-1, 1]  --encode-->  continuous: latents (B, C, T, H/s, W/s)
                                                   discrete:   ids (B, T, H/s, W/s), 0 .. vocab_size - 1
    latents or ids                    --decode-->  video (B, 3, F, H, W)

    python tokenizer.py                                        # a walk through the shapes
    python tokenizer.py train --data data/robot --kind discrete --out out/tokenizer
    python tokenizer.py check --data data/robot --tokenizer weights/tokenizer_dv_tiny.pt
"""
import contextlib
import ctypes
import errno
import hashlib
import math
import os
import platform
import signal
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

# Axes that are halved after encoder levels 0 and 1, and doubled after decoder levels 2 and 1. So NVIDIA's
# weights were trained: the encoder halves as early as it can, the decoder doubles time in its second step.
RESAMPLING = {  # (temporal, spatial) compression
    (4, 4): ("", "", "", ""),
    (4, 8): ("space", "", "space", ""),
    (4, 16): ("space", "space", "space", "space"),
    (8, 4): ("time", "", "", "time"),
    (8, 8): ("space, time", "", "", "space, time"),
    (8, 16): ("space, time", "space", "space", "space, time"),
}

@dataclass
class TokenizerConfig:
    channels: int = 128  # width before the multipliers of the three levels
    channels_mult: tuple = (2, 4, 4)
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    z_channels: int = 16  # width on both sides of the bottleneck
    latent_channels: int = 16  # continuous: channels C of a latent
    levels: tuple = ()  # discrete: FSQ levels, whose product is the vocabulary; empty means continuous
    spatial_compression: int = 16
    temporal_compression: int = 8
    patch_size: int = 4  # of the wavelets; files state it, and it is always 4

    def __post_init__(self):
        self.channels_mult, self.levels = tuple(self.channels_mult), tuple(self.levels)  # of a list
        for name, value in vars(self).items():
            numbers = value if type(value) is tuple else (value,)
            if not all(type(n) is int and 0 < n <= 4096 for n in numbers):
                raise DataError(f"{name} = {value!r:.50} makes no sense: give whole numbers of 1..4096")
        known = (self.temporal_compression, self.spatial_compression) in RESAMPLING
        if not known or self.patch_size != 4 or len(self.channels_mult) != 3 or 1 in self.levels:
            raise DataError(f"{self} cannot be built: give temporal compression 4 or 8, spatial 4, 8 or 16, "
                            "three channels_mult, patch_size 4 and levels above 1")

PRESETS = {
    "cv8x16x16": TokenizerConfig(),
    "dv8x8x8": TokenizerConfig(spatial_compression=8, levels=(8, 8, 8, 5, 5, 5)),
    "continuous": TokenizerConfig(channels=16, z_channels=32, latent_channels=32, spatial_compression=8),
    "discrete": TokenizerConfig(channels=16, z_channels=32, levels=(7, 5, 5, 5, 5), spatial_compression=8),
}

# ---- wavelet patches: 4 x 4 x 4 pixels become one position of 64 x 3 channels, losslessly --------
def sums_and_differences(x):
    for axis in range(3):
        a, b = x.unbind(axis)
        x = torch.stack([a + b, a - b], axis)
    return x

def haar(x):
    """One level of the 3D Haar transform, (B, C, T, H, W) -> (B, 8C, T/2, H/2, W/2). Channels are ordered by
    band, then colour; bands by time, height, width: the first is the mean of each 2 x 2 x 2 cell."""
    x = rearrange(x, "b c (t p) (h q) (w r) -> p q r b c t h w", p=2, q=2, r=2)
    return rearrange(sums_and_differences(x) / 8, "p q r b c t h w -> b (p q r c) t h w")

def inverse_haar(x):
    x = rearrange(x, "b (p q r c) t h w -> p q r b c t h w", p=2, q=2, r=2)
    return rearrange(sums_and_differences(x), "p q r b c t h w -> b c (t p) (h q) (w r)")

def patch(video):
    """(B, 3, F, H, W), F = 1 + 4n -> (B, 192, 1 + n, H/4, W/4). The first frame is taken four times, to fill
    a cell of its own and stay independent of the frames after it."""
    first = video[:, :, :1]
    return haar(haar(torch.cat([first, first, first, video], dim=2)))

def unpatch(x):
    return inverse_haar(inverse_haar(x))[:, :, 3:]

# ---- causal layers: all tensors are (B, C, T, H, W) ----------------------------------------------
def each_frame(function, x):
    """Applies a function of pictures, (N, C, H, W) -> (N, C', H', W'), to every frame by itself."""
    y = function(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

class CausalConv3d(nn.Module):
    """A convolution over space, kernel (1, k, k), or over time, kernel (k, 1, 1), that sees no later frame.
    Plainly: pad (space with zeros, time by repeating the first frame in front), then `self.conv3d(x)`. Either
    kernel has an axis to spare, so it runs as a 2D convolution, which CPUs do several times faster."""
    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel)  # holds the parameters, under NVIDIA's names
        self.in_time, self.stride = kernel[0] > 1, stride
        self.front = kernel[0] - stride if self.in_time else 0  # frames to repeat
        self.pad = kernel[1] // 2 if stride == 1 else 0  # Downsample pads by itself

    def forward(self, x):
        weight, bias = self.conv3d.weight, self.conv3d.bias
        if not self.in_time:
            return each_frame(lambda f: F.conv2d(f, weight[:, :, 0], bias, self.stride, self.pad), x)
        x = torch.cat([x[:, :, :1]] * self.front + [x], dim=2)
        columns = x.flatten(3)  # (B, C, front + T, H*W): a picture whose columns are the positions
        columns = F.conv2d(columns, weight[..., 0], bias, stride=(self.stride, 1))
        return columns.unflatten(3, x.shape[3:])

def factorised_conv(c_in, c_out):
    return nn.Sequential(CausalConv3d(c_in, c_out, (1, 3, 3)), CausalConv3d(c_out, c_out, (3, 1, 1)))

def pointwise(c_in, c_out):
    return CausalConv3d(c_in, c_out, (1, 1, 1))

class FrameNorm(nn.Module):
    """GroupNorm(1) of each frame by itself: statistics over time would let the future leak into the past."""
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(1, c, eps=1e-6)

    def forward(self, x):
        return each_frame(self.norm, x)

class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c_in), factorised_conv(c_in, c_out)
        self.norm2, self.conv2 = FrameNorm(c_out), factorised_conv(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else pointwise(c_in, c_out)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h

class Attention(nn.Module):
    """Every position attends to its whole frame or, in_time, to itself in this and the earlier frames."""
    def __init__(self, c, in_time):
        super().__init__()
        self.norm, self.in_time = FrameNorm(c), in_time
        self.q, self.k, self.v, self.proj_out = (pointwise(c, c) for _ in range(4))

    def forward(self, x):
        B, C, T, H, W = x.shape
        tokens = "(b h w) 1 t c" if self.in_time else "(b t) 1 (h w) c"
        y = self.norm(x)
        q, k, v = (rearrange(project(y), f"b c t h w -> {tokens}") for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.in_time)  # scaled by C ** -0.5
        return x + self.proj_out(rearrange(y, f"{tokens} -> b c t h w", b=B, t=T, h=H, w=W))

class Downsample(nn.Module):
    """Halves its axes, by a strided convolution plus the average of each pair (in float32, for CPUs have no
    other); then 1 x 1 x 1. Without axes it is the identity, but keeps its weights as NVIDIA's files do."""
    def __init__(self, c, axes):
        super().__init__()
        self.axes, self.conv3 = axes, pointwise(c, c)
        self.conv1 = CausalConv3d(c, c, (1, 3, 3), stride=2)
        self.conv2 = CausalConv3d(c, c, (3, 1, 1), stride=2)

    def forward(self, x):
        if "space" in self.axes:
            x = F.pad(x, (0, 1, 0, 1))  # one column and one row of zeros at the end
            x = self.conv1(x) + F.avg_pool3d(x.float(), (1, 2, 2)).to(x.dtype)
        if "time" in self.axes:
            x = torch.cat([x[:, :, :1], x], dim=2)  # the first frame twice: T = 1 + 2n becomes 1 + n
            x = self.conv2(x) + F.avg_pool3d(x.float(), (2, 1, 1)).to(x.dtype)
        return self.conv3(x) if self.axes else x

class Upsample(nn.Module):
    """The mirror of Downsample: repeats each frame (except the first) and each pixel, then convolves."""
    def __init__(self, c, axes):
        super().__init__()
        self.axes, self.conv3 = axes, pointwise(c, c)
        self.conv1 = CausalConv3d(c, c, (3, 1, 1))
        self.conv2 = CausalConv3d(c, c, (1, 3, 3))

    def forward(self, x):
        if "time" in self.axes:
            twice = x.repeat_interleave(2, dim=2)[:, :, 1:]  # T = 1 + n becomes 1 + 2n
            x = twice + self.conv1(twice)
        if "space" in self.axes:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.conv2(x)
        return self.conv3(x) if self.axes else x

# ---- encoder and decoder -------------------------------------------------------------------------
def level(c_in, c_out, n_block, **resample):
    """Residual blocks of one width, then downsample=... or upsample=... where one is given."""
    blocks = [ResBlock(c_out if i else c_in, c_out) for i in range(n_block)]
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks), **resample))

def middle(c):
    attention = nn.Sequential(Attention(c, in_time=False), Attention(c, in_time=True))
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c), attn_1=attention, block_2=ResBlock(c, c)))

class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, n = config.channels, config.num_res_blocks
        c0, c1, c2 = (c * multiplier for multiplier in config.channels_mult)
        axes0, axes1, _, _ = RESAMPLING[config.temporal_compression, config.spatial_compression]
        self.conv_in = factorised_conv(192, c)
        self.down = nn.Sequential(level(c, c0, n, downsample=Downsample(c0, axes0)),
                                  level(c0, c1, n, downsample=Downsample(c1, axes1)),
                                  level(c1, c2, n))
        self.mid, self.norm_out = middle(c2), FrameNorm(c2)
        self.conv_out = factorised_conv(c2, config.z_channels)

    def forward(self, video):
        x = patch(video).contiguous(memory_format=torch.channels_last_3d)  # what devices convolve fastest
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))

class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, n = config.channels, config.num_res_blocks + 1
        c0, c1, c2 = (c * multiplier for multiplier in config.channels_mult)
        _, _, axes2, axes1 = RESAMPLING[config.temporal_compression, config.spatial_compression]
        self.conv_in, self.mid = factorised_conv(config.z_channels, c2), middle(c2)
        self.up = nn.Sequential(level(c1, c0, n),  # numbered as in the encoder, so run from the last
                                level(c2, c1, n, upsample=Upsample(c1, axes1)),
                                level(c2, c2, n, upsample=Upsample(c2, axes2)))
        self.norm_out, self.conv_out = FrameNorm(c0), factorised_conv(c0, 192)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for step in reversed(self.up):
            x = step(x)
        return unpatch(self.conv_out(F.silu(self.norm_out(x))))

# ---- finite scalar quantisation ------------------------------------------------------------------
class FSQ:
    """Finite scalar quantisation (Mentzer et al., 2023, appendix A): a channel is squashed to a few integer
    levels. The codebook is the grid of all combinations: it has no parameters and cannot collapse."""
    def __init__(self, levels):
        self.levels = levels
        self.basis = [math.prod(levels[:i]) for i in range(len(levels))]  # mixed radix, first level fastest

    def per_channel(self, values, like):
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)

    def quantize(self, z, eps=1e-3):
        """(B, C, T, H, W), any real numbers -> codes on the grid, in [-1, 1]."""
        dtype, z = z.dtype, z.float()  # why float32: a rounding in low precision would flip ids
        levels = self.per_channel(self.levels, z)
        # 1. Squash to the range of the levels. An even number of levels has no middle one: the range moves by
        #    half a level, and zero inside tanh is shifted as far, so that zero stays a code.
        half = (levels - 1) * (1 + eps) / 2
        offset = (1 - levels % 2) / 2
        z = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        # 2. Round, with the gradient of no rounding (straight-through).
        z = z + (z.round() - z).detach()
        return (z / (levels // 2)).to(dtype)

    def codes_to_ids(self, codes):
        codes = codes.float()
        half = self.per_channel(self.levels, codes) // 2
        digits = (codes * half).round() + half
        return (digits * self.per_channel(self.basis, codes)).sum(1).long()

    def ids_to_codes(self, ids):
        levels, basis = self.per_channel(self.levels, ids), self.per_channel(self.basis, ids)
        digits, half = ids.unsqueeze(1) // basis % levels, levels // 2
        return (digits - half).float() / half

# ---- the tokenizer -------------------------------------------------------------------------------
class Tokenizer(nn.Module):
    """`kind` is "continuous" or "discrete", `spatial` and `temporal` are the compressions. A continuous one
    has `channels`, a discrete one has `fsq`, `levels` and `vocab_size`."""
    def __init__(self, config):
        super().__init__()
        self.config, self.kind = config, "discrete" if config.levels else "continuous"
        self.spatial, self.temporal = config.spatial_compression, config.temporal_compression
        if self.kind == "discrete":
            self.levels, self.fsq = config.levels, FSQ(config.levels)
            self.vocab_size, code_channels = math.prod(config.levels), len(config.levels)
        else:
            self.channels = code_channels = config.latent_channels
        self.encoder, self.quant_conv = Encoder(config), pointwise(config.z_channels, code_channels)
        self.post_quant_conv, self.decoder = pointwise(code_channels, config.z_channels), Decoder(config)

    def bottleneck(self, video):
        """video -> continuous latents, or codes on the FSQ grid; DataError for shapes that do not fit."""
        frames = video.shape[-3]
        below = frames - (frames - 1) % self.temporal  # the valid length below this one
        fits = video.ndim == 5 and video.shape[1] == 3 and frames == below
        if not fits or any(side % self.spatial for side in video.shape[3:]):
            raise DataError(f"video of shape {tuple(video.shape)} cannot be tokenized: give (B, 3, F, H, W), "
                            f"H and W divisible by {self.spatial}, F as {below} or {below + self.temporal}")
        z = self.quant_conv(self.encoder(video.to(self.quant_conv.conv3d.weight)))
        return self.fsq.quantize(z) if self.kind == "discrete" else z

    def encode(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, T, H/s, W/s) or ids (B, T, H/s, W/s) int64."""
        z = self.bottleneck(video)
        return self.fsq.codes_to_ids(z) if self.kind == "discrete" else z

    def decode(self, z):
        """The inverse of encode, up to what the bottleneck lost; values may leave [-1, 1] a little."""
        z = self.fsq.ids_to_codes(z) if self.kind == "discrete" else z
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.conv3d.weight)))

    def forward(self, video):
        """The whole autoencoder with straight-through gradients: video -> its reconstruction."""
        return self.decoder(self.post_quant_conv(self.bottleneck(video)))

# ---- files ---------------------------------------------------------------------------------------
def tokenizer_files(path):
    """A tokenizer is a file, a folder with tokenizer.pt, or NVIDIA's with encoder.jit and decoder.jit."""
    if not os.path.isdir(path):
        return [os.fspath(path)]
    ours = os.path.join(path, "tokenizer.pt")
    return [ours] if os.path.exists(ours) else [f"{path}/encoder.jit", f"{path}/decoder.jit"]

def load_tokenizer(path, device="cpu", dtype=torch.float32):
    """A frozen Tokenizer from any of `tokenizer_files`; DataError says what is wrong with a file."""
    file, state = path, {}
    try:
        # 1. Read tensors and sizes. NVIDIA's files do not state their sizes.
        for file in tokenizer_files(path):
            if file.endswith(".jit"):
                from examples.torchscript import config_of_cosmos, read_torchscript
                state.update(read_torchscript(file))
                config = config_of_cosmos(state, path)
            else:
                saved = torch.load(file, map_location="cpu", weights_only=True)
                state = saved["state_dict"]
                config = TokenizerConfig(**saved["config"])
        # 2. Build the module without memory ("meta"), then give it those tensors that it has names for.
        with torch.device("meta"):
            tokenizer = Tokenizer(config)
        state = {name: state[name] for name in tokenizer.state_dict()}
        tokenizer.load_state_dict(state, assign=True)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise DataError("its weights are not finite")
    except Exception as e:  # a damaged or hostile file can raise nearly anything
        raise DataError(f"{file} cannot be used as a tokenizer ({type(e).__name__}: {reason(e)}): get it "
                        "again, or make one with `python tokenizer.py train`") from None
    return tokenizer.to(device, dtype).eval().requires_grad_(False)

def save_tokenizer(tokenizer, file, **about):
    """Writes the weights in half precision. What is not finite is refused, so that a good file stays."""
    state = {name: tensor.half() for name, tensor in tokenizer.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise DataError(f"{file} is not written, because the weights are not finite: lower --lr")
    content = {"config": asdict(tokenizer.config), "state_dict": state, "kind": tokenizer.kind, **about}
    write_whole(file, lambda name: torch.save(content, name))

def fingerprint(path):
    """The SHA-256 of a tokenizer's files, by which encoded data knows what it was made with."""
    try:
        content = [Path(file).read_bytes() for file in tokenizer_files(path)]
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read ({reason(e)}): give a tokenizer") from None
    return hashlib.sha256(b"".join(content)).hexdigest()

# ---- what every module uses ----------------------------------------------------------------------
class DataError(ValueError):
    """Bad input. The message is one sentence that names the file, the value and the way out."""

def reason(error):
    """What an exception says, in one line."""
    words = getattr(error, "strerror", None) or str(error).strip()
    return words.split("\n")[-1].strip()[:150]

def way_out(error):
    """What to do about an OSError, or about the RuntimeError that is torch.save's word for a full disk."""
    number = getattr(error, "errno", errno.ENOSPC)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room on the disk, then give the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission is missing, give a place where you may write"
    if number in (errno.EEXIST, errno.ENOTDIR):
        return "a file is where a folder should be, give another name"
    return "look at that path and its disk"

def command(main):
    """Decorates every module's main(argv): bad input ends in exit code 1 and a sentence, once a machine."""
    def run(argv=None):
        try:
            return main(argv)
        except DataError as e:
            sentence = e
        except OSError as e:
            sentence = f"{e.filename or 'a file'}: {reason(e)}; {way_out(e)}"
        program = os.path.basename(main.__code__.co_filename)
        is_first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
        sys.exit(f"{program}: {sentence}" if is_first else 1)
    return run

def write_whole(file, write):
    """Calls write(name) with a temporary name beside `file`, then renames it. Whenever the process or the
    machine dies, `file` is whole, old or new. Makes the folder. DataError if writing fails."""
    beside = f"{file}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        open(beside, "wb").close()  # why: it names a missing permission, which torch.save would not
        write(beside)
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(beside, file)
    except (OSError, RuntimeError) as e:
        raise DataError(f"{file} cannot be written ({reason(e)}): {way_out(e)}") from None
    finally:
        if os.path.exists(beside):
            os.remove(beside)

def rank_and_world():
    """(number of this process, number of processes) under torchrun; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def count_parameters(module):
    return sum(p.numel() for p in module.parameters())

def to_video(frames):
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1], what tokenizers take."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1

def to_uint8(video):
    """float (B, 3, F, H, W) -> uint8 (B, F, H, W, 3), clamped and rounded."""
    pixels = (video.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 4, 1)

def psnr(a, b):
    """Peak signal-to-noise ratio of each frame in dB: uint8 (n, H, W, 3) twice -> float64 (n,). A mean
    squared error below 0.01 counts as 0.01: equal frames score 68.1 dB, and means stay finite."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mse = (difference**2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(mse, 0.01))

# ---- what every long run uses: processes, devices, signals ---------------------------------------
def join_processes(backend):
    """Meets the processes that torchrun started. One that runs alone needs no port, for that may be taken."""
    if dist.is_initialized():
        dist.destroy_process_group()  # of a run that ended with an error, as happens in a notebook
    rank, world = rank_and_world()
    store = dist.HashStore() if world == 1 else next(dist.rendezvous("env://"))[0]
    # The store still holds addresses of processes that died before torchrun --max-restarts: use other names.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)

def barrier():
    if dist.is_initialized():
        dist.barrier()

def device_of(asked=""):
    """("cuda", "cpu" or, where it is asked for, "mps"; this process's torch.device)"""
    if asked == "mps":
        if not torch.backends.mps.is_available() or rank_and_world()[1] > 1:
            raise DataError("--device mps needs Apple's GPU, and no other process: leave one of them out")
        return "mps", torch.device("mps")
    if not torch.cuda.is_available():
        return "cpu", torch.device("cpu")
    here, n = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > n:
        raise DataError(f"there are {n} CUDA devices for {here} processes: give --nproc_per_node={n}, or "
                        "train on the CPU with CUDA_VISIBLE_DEVICES=")
    return "cuda", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

def reuse_memory():
    """Tells glibc to keep the memory that is freed. Otherwise every large tensor gets new pages, and each
    page is a fault when it is first touched: that takes a seventh of a step of Flow-HWM on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back before the process ends

def sum_over_processes(x):
    """Adds up a tensor in place. gloo knows no tensors on Apple's GPU, but there the process is alone."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x)

def from_rank_0(x):
    """What x is in the first process, in all of them: others may run on machines that lack its files."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]

def peak_gb(kind):
    """The most memory that was held, on the GPU or by this process; nan where that is not known."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

@contextlib.contextmanager
def remembered_signals():
    """A list that grows with every Ctrl-C, SIGTERM or SIGHUP (a closed terminal), so that the loop can finish
    its step. A second Ctrl-C stops at once, unless within a second: torchrun hands on the first."""
    arrived = []

    def remember(number, _):
        if number == signal.SIGINT and arrived and time.monotonic() > arrived[0] + 1:
            raise KeyboardInterrupt
        arrived.append(time.monotonic())

    ignored = [s for s in STOPPING[1:] if signal.getsignal(s) == signal.SIG_IGN]  # as nohup ignores SIGHUP
    before = {s: signal.signal(s, remember) for s in STOPPING if s not in ignored}
    try:
        yield arrived
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

class Writer:
    """`write_whole` in a thread, one file at a time, while the caller goes on. What fails there is raised by
    the next call of any method. Leaving the with statement waits for the last file."""
    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.writing = self.thread.submit(int)  # at first, nothing

    def __call__(self, file, write):
        self.wait()
        self.writing = self.thread.submit(write_whole, file, write)

    def wait(self):
        self.writing.result()

    def check(self):
        if self.writing.done():
            self.wait()

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        self.thread.shutdown()
        if failure is None:
            self.wait()

def ignore_signals(_):
    """For processes that read clips: Ctrl-C reaches them, too, but when to stop is for the loop to say."""
    for s in STOPPING:
        signal.signal(s, signal.SIG_IGN)

# ---- commands ------------------------------------------------------------------------------------
def walk():
    """Follows a toy video, a bright square that moves over grey, through the tokenizer of Masked-HWM."""
    video = torch.full((1, 3, 17, 64, 64), -0.2)
    for t in range(17):
        video[:, :, t, 20:40, 2 * t : 2 * t + 20] = 0.6
    tokenizer = load_tokenizer(Path(__file__).parent / "weights/tokenizer_dv_tiny.pt")
    z = tokenizer.quant_conv(tokenizer.encoder(video))
    codes, ids = tokenizer.fsq.quantize(z), tokenizer.encode(video)
    decoded, past = tokenizer.decode(ids), tokenizer.encode(video[:, :, :9])
    for name, x in (("video", video), ("wavelet patches", patch(video)), ("encoder, quant_conv", z),
                    ("FSQ codes", codes), ("ids, what a model sees", ids), ("decoded video", decoded)):
        print(f"{name:24}{tuple(x.shape)}")
    first, fsq = ids[0, 0, 0, 0].item(), tokenizer.fsq
    digits = [first // base % n for base, n in zip(fsq.basis, fsq.levels)]
    print(f"the first id, {first}, has the digits {digits} in the bases {list(fsq.levels)}, first fastest")
    quality = psnr(*to_uint8(torch.cat([decoded, video]))).mean()
    print(f"the decoded video has {quality:.1f} dB")
    print(f"9 frames alone give the same first 2 latents as all 17 frames: {torch.equal(past, ids[:, :2])}")

@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return walk()
    from examples import train_tokenizer  # not above, for it takes its clips from data.py, a later module
    train_tokenizer.main(argv)

if __name__ == "__main__":
    import tokenizer  # under its own name, so that its DataError is the one that data.py raises
    tokenizer.main()
