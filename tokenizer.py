"""Video <-> latents: the Cosmos tokenizer (NVIDIA et al., 2025), written out once for both of its kinds.

Flow-HWM works on the continuous latents of CV8x16x16, Masked-HWM on the discrete ids of DV8x8x8 (Sec. 3.1, 3.2).
Both are one causal autoencoder: a frame's latent never depends on a later frame, so the past can be encoded
without the future, and the first frame is a latent of its own (T latents hold 1 + temporal * (T - 1) frames).

    video (B, 3, F, H, W) in [-1, 1]  --encode-->  continuous: latents (B, C, T, H/s, W/s)
                                                   discrete:   ids (B, T, H/s, W/s), 0 .. vocab_size - 1
    latents | ids                     --decode-->  video (B, 3, F, H, W)

The tiny tokenizers in weights/ and NVIDIA's 112.5 M parameters are instances of this one class; module names
follow NVIDIA's files, so that loading them is a load_state_dict.

    python tokenizer.py train --data data/robot --kind discrete --out out/tokenizer   # train one
    python tokenizer.py check --tokenizer weights/tokenizer_dv_tiny.pt --data data/robot    # round trip: PSNR, statistics
"""
import argparse
import functools
import hashlib
import io
import json
import math
import os
import pickle
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm


@dataclass
class TokenizerConfig:
    channels: int = 128  # width before the levels' multipliers
    channels_mult: tuple = (2, 4, 4)
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    z_channels: int = 16
    latent_channels: int = 16  # continuous: channels of a latent
    levels: tuple = ()  # discrete: FSQ levels, their product is the vocabulary; empty means continuous
    spatial_compression: int = 16
    temporal_compression: int = 8
    patch_size: int = 4  # two levels of Haar wavelets, in time and space


PRESETS = {
    "cv8x16x16": TokenizerConfig(),
    "dv8x8x8": TokenizerConfig(spatial_compression=8, levels=(8, 8, 8, 5, 5, 5)),
    "continuous": TokenizerConfig(channels=16, channels_mult=(2, 4, 4), z_channels=32, latent_channels=32, spatial_compression=8),
    "discrete": TokenizerConfig(channels=16, channels_mult=(2, 4, 4), z_channels=32, spatial_compression=8, levels=(7, 5, 5, 5, 5)),
}


class DataError(ValueError):
    """Bad input. The message is one sentence that names the file, the value and the way out."""


TokenizerError = DataError


# ---- What every module uses ------------------------------------------------------------------------


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def command(main):
    @functools.wraps(main)
    def wrapped(argv=None):
        name = os.path.basename(sys.modules[main.__module__].__file__)
        try:
            return main(argv)
        except DataError as e:
            sentence = f"{name}: {e}"
        except OSError as e:
            sentence = f"{name}: {e.filename}: {e.strerror}"
        sys.exit(sentence if rank_and_world()[0] == 0 else 1)
    return wrapped


def write_whole(file, write):
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    try:
        write(file + ".tmp")
        os.replace(file + ".tmp", file)
    except (OSError, RuntimeError) as e:
        if os.path.exists(file + ".tmp"):
            os.remove(file + ".tmp")
        raise DataError(f"{file} could not be written ({str(e).splitlines()[0]})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Wavelet patches: 4 x 4 x 4 pixels become one place of 64 x 3 channels, losslessly


def haar(x):
    """One level of the 3D Haar transform. (B, C, T, H, W) -> (B, 8C, T/2, H/2, W/2), bands outermost in the channels,
    time slowest and width fastest. The all-low band is the mean of each 2 x 2 x 2 cell."""
    x = rearrange(x, "b c (t p) (h q) (w r) -> p q r b c t h w", p=2, q=2, r=2)
    for axis in range(3):
        a, b = x.unbind(axis)
        x = torch.stack([a + b, a - b], axis)  # low, high
    return rearrange(x / 8, "p q r b c t h w -> b (p q r c) t h w")


def inverse_haar(x):
    """Exact inverse of `haar`."""
    x = rearrange(x, "b (p q r c) t h w -> p q r b c t h w", p=2, q=2, r=2)
    for axis in range(3):
        low, high = x.unbind(axis)
        x = torch.stack([low + high, low - high], axis)
    return rearrange(x, "p q r b c t h w -> b c (t p) (h q) (w r)")


def patch(video):
    """(B, 3, F, H, W) with F = 1 + 4n -> (B, 192, 1 + n, H/4, W/4). The first frame stands four times, so that it
    fills a cell of its own and stays independent of the frames after it."""
    return haar(haar(torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)))


def unpatch(x):
    """Exact inverse of `patch`."""
    return inverse_haar(inverse_haar(x))[:, :, 3:]


# ---------------------------------------------------------------------------------------------------------------------
# Causal layers. All tensors are (B, C, T, H, W).


class CausalConv3d(nn.Module):
    """A convolution over space (1, k, k) or over time (k, 1, 1) that sees no later frame: time is padded in front only,
    by repeating the first frame. Either is a 2D convolution in disguise, and runs as one."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=None):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel)  # holds the parameters, under NVIDIA's names
        self.in_time, self.stride = kernel[0] > 1, stride
        self.pad = kernel[1] // 2 if pad is None else pad  # in space
        self.front = kernel[0] - stride if self.in_time else 0  # frames to repeat in front

    def forward(self, x):
        B, C, T, H, W = x.shape
        weight, bias = self.conv3d.weight, self.conv3d.bias
        if self.in_time:
            x = torch.cat([x[:, :, :1]] * self.front + [x], dim=2).flatten(3)  # (B, C, T + front, H*W)
            return F.conv2d(x, weight[..., 0], bias, stride=(self.stride, 1)).unflatten(3, (H, W))
        x = x.transpose(1, 2).flatten(0, 1)  # (B*T, C, H, W)
        x = F.conv2d(x, weight[:, :, 0], bias, stride=self.stride, padding=self.pad)
        return x.unflatten(0, (B, T)).transpose(1, 2)


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
        y = self.norm(x.transpose(1, 2).flatten(0, 1))  # (B*T, C, H, W)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c_in), factorised_conv(c_in, c_out)
        self.norm2, self.conv2 = FrameNorm(c_out), factorised_conv(c_out, c_out)
        self.nin_shortcut = pointwise(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """One-head attention over the places of a frame, or over the earlier frames of a place."""

    def __init__(self, c, temporal):
        super().__init__()
        self.norm, self.temporal = FrameNorm(c), temporal
        self.q, self.k, self.v, self.proj_out = (pointwise(c, c) for _ in range(4))

    def forward(self, x):
        B, C, T, H, W = x.shape
        over = "b c t h w -> (b h w) 1 t c" if self.temporal else "b c t h w -> (b t) 1 (h w) c"
        back = "(b h w) 1 t c -> b c t h w" if self.temporal else "(b t) 1 (h w) c -> b c t h w"
        y = self.norm(x)
        q, k, v = (rearrange(m(y), over) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.temporal)  # scale is width ** -0.5
        return x + self.proj_out(rearrange(y, back, b=B, t=T, h=H, w=W))


def average(x, cell):
    """In float32: there is no bfloat16 average pool for CPUs."""
    return F.avg_pool3d(x.float(), cell, cell).to(x.dtype)


class Downsample(nn.Module):
    """Halves space and / or time: strided convolution plus average pool, then 1 x 1 x 1.
    With nothing to do it is the identity, but keeps its weights as NVIDIA's files do."""

    def __init__(self, c, spatial, temporal):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv1 = CausalConv3d(c, c, (1, 3, 3), stride=2, pad=0)
        self.conv2 = CausalConv3d(c, c, (3, 1, 1), stride=2)
        self.conv3 = pointwise(c, c)

    def forward(self, x):
        if self.spatial:
            x = F.pad(x, (0, 1, 0, 1))  # one column and one row at the end
            x = self.conv1(x) + average(x, (1, 2, 2))
        if self.temporal:
            x = torch.cat([x[:, :, :1], x], dim=2)  # the first frame twice: T is odd, 1 + 2n -> 1 + n
            x = self.conv2(x) + average(x, (2, 1, 1))
        return self.conv3(x) if self.spatial or self.temporal else x


class Upsample(nn.Module):
    """Mirror of Downsample: each frame twice (the first once), each pixel 2 x 2, with residual convolutions."""

    def __init__(self, c, spatial, temporal):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv1 = CausalConv3d(c, c, (3, 1, 1))
        self.conv2 = CausalConv3d(c, c, (1, 3, 3))
        self.conv3 = pointwise(c, c)

    def forward(self, x):
        if self.temporal:
            if x.shape[2] > 1:
                x = x.repeat_interleave(2, dim=2)[:, :, 1:]  # 1 + n -> 1 + 2n
            x = x + self.conv1(x)
        if self.spatial:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.conv2(x)
        return self.conv3(x) if self.spatial or self.temporal else x


class Level(nn.Module):
    """Residual blocks of one width; `downsample` or `upsample` is set by the encoder or decoder."""

    def __init__(self, c_in, c_out, n_block):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(n_block))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(c, c), ResBlock(c, c)
        self.attn_1 = nn.Sequential(Attention(c, temporal=False), Attention(c, temporal=True))

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


def sampling_steps(c):
    """How often each axis is still to be halved after the wavelets -> (n_spatial, n_temporal)."""
    return tuple(int(math.log2(f // c.patch_size)) for f in (c.spatial_compression, c.temporal_compression))


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, (n_s, n_t) = [c.channels * m for m in c.channels_mult], sampling_steps(c)
        self.conv_in = factorised_conv(3 * c.patch_size**3, c.channels)
        self.down = nn.ModuleList(Level(i, o, c.num_res_blocks) for i, o in zip([c.channels] + widths, widths))
        for i, level in enumerate(self.down[:-1]):
            level.downsample = Downsample(widths[i], i < n_s, i < n_t)
        self.mid, self.norm_out = Middle(widths[-1]), FrameNorm(widths[-1])
        self.conv_out = factorised_conv(widths[-1], c.z_channels)

    def forward(self, video):
        x = patch(video).contiguous(memory_format=torch.channels_last_3d)  # what CPUs and tensor cores convolve fastest
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, (n_s, n_t) = [c.channels * m for m in c.channels_mult], sampling_steps(c)
        self.conv_in = factorised_conv(c.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(Level(i, o, c.num_res_blocks + 1) for i, o in zip(widths[1:] + widths[-1:], widths))
        for j, level in enumerate(reversed(self.up[1:])):  # j-th step from the coarsest; time starts at the second
            temporal = 0 < j < 1 + n_t
            width = level.block[-1].conv2[1].conv3d.out_channels
            level.upsample = Upsample(width, n_s > 0 and (temporal or (j < n_s and n_s > n_t)), temporal)
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = factorised_conv(widths[0], 3 * c.patch_size**3)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return unpatch(self.conv_out(F.silu(self.norm_out(x))))


# ---------------------------------------------------------------------------------------------------------------------
# Finite scalar quantisation


class FSQ:
    """Finite scalar quantisation (Mentzer et al., 2023, appendix A): every channel is squashed to a few integer levels;
    the codebook is the grid of all their combinations, so it has no parameters and cannot collapse."""

    def __init__(self, levels):
        self.levels = levels
        self.basis = [math.prod(levels[:i]) for i in range(len(levels))]  # mixed radix, first level fastest

    def _row(self, values, like):
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)

    def quantize(self, z, eps=1e-3):
        """(B, C, T, H, W) any real -> codes in [-1, 1] on the grid; gradients pass straight through the rounding."""
        dtype, z = z.dtype, z.float()  # a rounding in low precision would flip ids
        levels = self._row(self.levels, z)
        half = (levels - 1) * (1 + eps) / 2
        offset = 0.5 * (levels % 2 == 0)  # an even number of levels has no middle one
        z = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        z = z + (z.round() - z).detach()
        return (z / (levels // 2)).to(dtype)

    def codes_to_ids(self, codes):
        codes = codes.float()
        half = self._row(self.levels, codes) // 2
        return (((codes * half).round() + half) * self._row(self.basis, codes)).sum(1).long()

    def ids_to_codes(self, ids):
        levels, basis = self._row(self.levels, ids), self._row(self.basis, ids)
        digits = ids.unsqueeze(1) // basis % levels
        return (digits - levels // 2).float() / (levels // 2)


# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """`kind` "continuous" or "discrete"; `spatial`, `temporal` compression; `channels` or `vocab_size`."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.kind = "discrete" if c.levels else "continuous"
        self.spatial, self.temporal = c.spatial_compression, c.temporal_compression
        n_s, n_t = sampling_steps(c)
        if n_t > 1 or n_s > len(c.channels_mult) - 1:
            raise TokenizerError(f"compression {self.temporal}x{self.spatial}x{self.spatial} cannot be built from patches of "
                                 f"{c.patch_size} and {len(c.channels_mult)} levels: use temporal 4 or 8, spatial 4, 8 or 16")
        if c.levels:
            self.fsq, self.levels, self.vocab_size = FSQ(c.levels), tuple(c.levels), math.prod(c.levels)
            code_channels = len(c.levels)
        else:
            self.channels = code_channels = c.latent_channels
        self.encoder, self.quant_conv = Encoder(c), pointwise(c.z_channels, code_channels)
        self.post_quant_conv, self.decoder = pointwise(code_channels, c.z_channels), Decoder(c)

    def latent_frames(self, n_frame):
        """Number of latent frames of n_frame video frames; an error names the next valid lengths."""
        if n_frame < 1 or (n_frame - 1) % self.temporal:
            low = 1 + max(n_frame - 1, 0) // self.temporal * self.temporal
            raise TokenizerError(f"a clip of {n_frame} frames cannot be tokenized: the tokenizer takes 1 + {self.temporal}n "
                                 f"frames, the next lengths are {low} and {low + self.temporal}")
        return 1 + (n_frame - 1) // self.temporal

    def _latents(self, video):
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % self.spatial or video.shape[4] % self.spatial:
            raise TokenizerError(f"the tokenizer takes video (B, 3, F, H, W) with H and W divisible by {self.spatial}, "
                                 f"not {tuple(video.shape)}")
        self.latent_frames(video.shape[2])
        z = self.quant_conv(self.encoder(video))
        return self.fsq.quantize(z) if self.kind == "discrete" else z

    def encode(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, T, H', W') or ids (B, T, H', W') int64."""
        z = self._latents(video.to(self.dtype))
        return self.fsq.codes_to_ids(z) if self.kind == "discrete" else z

    def decode(self, z):
        """Inverse of encode, up to what the bottleneck lost; values may leave [-1, 1] a little."""
        z = self.fsq.ids_to_codes(z) if self.kind == "discrete" else z
        return self.decoder(self.post_quant_conv(z.to(self.dtype)))

    def forward(self, video):
        """The autoencoder with straight-through gradients: video -> reconstruction."""
        return self.decoder(self.post_quant_conv(self._latents(video)))

    @property
    def dtype(self):
        return self.post_quant_conv.conv3d.weight.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_tokenizer(path, device="cpu", dtype=torch.float32):
    """A frozen Tokenizer from a file made by `tokenizer.py train` (or the folder it is in), a .pt with `config` and
    `state_dict`, or a folder with NVIDIA's encoder.jit and decoder.jit."""
    if not os.path.exists(path):
        raise TokenizerError(f"there is no tokenizer at {path}: give a file made by `python tokenizer.py train`, or a folder with "
                             "encoder.jit and decoder.jit")
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "tokenizer.pt")):
        path = os.path.join(path, "tokenizer.pt")
    if os.path.isdir(path):
        state = {}
        for name in ("encoder.jit", "decoder.jit"):
            state.update(read_torchscript(os.path.join(path, name)))
        config = config_of_cosmos(state, path)
    else:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state = saved["state_dict"]
            config = TokenizerConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items()})
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as e:
            raise TokenizerError(f"{path} is not a tokenizer file, or is damaged ({type(e).__name__}): give one made by "
                                 "`python tokenizer.py train`") from None
    tokenizer = Tokenizer(config)
    wanted = tokenizer.state_dict()
    wrong = [k for k in wanted if k not in state or state[k].shape != wanted[k].shape]
    if wrong:
        raise TokenizerError(f"{path} does not hold the tokenizer its sizes announce: tensor {wrong[0]} is missing or misshaped "
                             f"({len(wrong)} in all); get the file again")
    tokenizer.load_state_dict({k: state[k] for k in wanted})
    return tokenizer.to(device, dtype).eval().requires_grad_(False)


def config_of_cosmos(state, path):
    """Which released tokenizer is it? The files differ in the bottleneck only, and do not state their compression: the
    released continuous one that the paper uses is 8x16x16, the discrete one 8x8x8; a suffix in the folder's name
    (CV4x8x8, DV8x16x16, ...) overrides that."""
    discrete = any(k.endswith("quantizer._levels") for k in state)
    base = PRESETS["dv8x8x8" if discrete else "cv8x16x16"]
    config = TokenizerConfig(**asdict(base))
    digits = "".join(c if c.isdigit() or c == "x" else " " for c in os.path.basename(os.path.abspath(path))).split()
    for word in digits:
        parts = word.strip("x").split("x")
        if len(parts) == 3 and all(p.isdigit() for p in parts) and parts[1] == parts[2]:
            config.temporal_compression, config.spatial_compression = int(parts[0]), int(parts[1])
    return config


class _Module:
    """Stands for any TorchScript class while reading its tensors."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


def read_torchscript(file):
    """Tensors of a TorchScript archive by name, without running any of the code in it: the archive is a zip whose
    data.pkl holds the module tree; the unpickler below knows tensors and plain containers and refuses all else.
    Whatever device or type the module was traced with, tensors come out on the CPU as stored."""
    try:
        archive = zipfile.ZipFile(file)
        pickled = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
    except (OSError, zipfile.BadZipFile, StopIteration):
        raise TokenizerError(f"{file} is not a readable TorchScript file: download it again") from None
    root = pickled[: -len("data.pkl")]

    def tensor(storage, offset, size, stride, *_):
        flat = storage[offset:]
        return torch.as_strided(flat, size, stride).clone() if flat.numel() else torch.empty(size, dtype=storage.dtype)

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return _Module
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return tensor
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if module == "torch" and name.endswith("Storage"):
                return name
            if module == "torch.jit._pickle":  # typed lists of numbers; they are not tensors
                return lambda *args: args[0] if args else None
            raise TokenizerError(f"{file} asks for {module}.{name}, which a file of weights has no use for: do not trust it")

        def persistent_load(self, pid):
            _, storage, key, _, numel = pid  # the fourth is the device it was saved from
            dtype = getattr(torch, storage.removesuffix("Storage").lower(), None)
            data = archive.read(f"{root}data/{key}")
            if dtype is None or len(data) != numel * dtype.itemsize:
                raise TokenizerError(f"{file}: tensor storage {key} has {len(data)} bytes instead of {numel} numbers; download "
                                     "it again")
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

    try:
        module = Reader(io.BytesIO(archive.read(pickled))).load()
    except (pickle.UnpicklingError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, IndexError, TypeError,
            RuntimeError) as e:
        raise TokenizerError(f"{file} is damaged or no TorchScript module ({type(e).__name__}): download it again") from None
    if not isinstance(module, _Module):
        raise TokenizerError(f"{file} holds a {type(module).__name__}, not a TorchScript module: download it again")
    found, stack = {}, [("", module)]
    while stack:
        prefix, node = stack.pop()
        for name, value in vars(node).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module):
                stack.append((f"{prefix}{name}.", value))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Training and checking


def psnr(a, b):
    """Mean over frames of the PSNR of two videos (B, 3, F, H, W) in [-1, 1], on rounded uint8, in dB."""
    a, b = (((v.float().clamp(-1, 1) + 1) * 127.5).round() for v in (a, b))
    mse = (a - b).square().mean((1, 3, 4)).clamp(min=1e-2)
    return (10 * torch.log10(255**2 / mse)).mean().item()


def batches(clips, batch, seed=0):
    """Endless shuffled batches of raw video (B, 3, F, H, W) in [-1, 1]."""
    from data import to_video
    order = torch.Generator().manual_seed(seed)
    while True:
        for chunk in torch.randperm(len(clips), generator=order).split(batch):
            if len(chunk) == min(batch, len(clips)):
                yield to_video(torch.stack([clips[i]["video"] for i in chunk.tolist()]))


@torch.no_grad()
def round_trip(tokenizer, clips, n=32):
    """Mean PSNR (dB) of n clips through encode and decode, with the latents (as encode returns them)."""
    from data import to_video
    scores, latents = [], []
    device = next(tokenizer.parameters()).device
    for i in torch.linspace(0, len(clips) - 1, min(n, len(clips))).long().tolist():
        video = to_video(clips[i]["video"][None]).to(device)
        z = tokenizer.encode(video)
        scores.append(psnr(tokenizer.decode(z), video))
        latents.append(z.cpu())
    return sum(scores) / len(scores), torch.cat(latents)


def save(tokenizer, file, **about):
    """Weights in half precision, written beside and renamed."""
    state = {k: v.half() for k, v in tokenizer.state_dict().items()}
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    torch.save({"config": asdict(tokenizer.config), "state_dict": state, "kind": tokenizer.kind, **about}, file + ".tmp")
    os.replace(file + ".tmp", file)


save_tokenizer = save


def fingerprint(path):
    """SHA-256 of a tokenizer: of its file, or of a Cosmos folder's encoder.jit and decoder.jit."""
    digest = hashlib.sha256()
    for file in ([path] if not os.path.isdir(path) else [f"{path}/tokenizer.pt"] if os.path.exists(f"{path}/tokenizer.pt")
                 else [f"{path}/encoder.jit", f"{path}/decoder.jit"]):
        try:
            with open(file, "rb") as f:
                while block := f.read(2 ** 24):
                    digest.update(block)
        except OSError as e:
            raise DataError(f"{file} cannot be read ({e.strerror}): give a tokenizer's file, or a folder "
                            f"with encoder.jit and decoder.jit") from None
    return digest.hexdigest()


def raw_clips(args, split, stride=None):
    from data import DataError, open_clips
    kind = open_clips(args.data, split).kind
    if kind != "raw":
        raise DataError(f"{args.data} holds {kind} latents: a tokenizer is trained and checked on raw video, give its folder")
    return open_clips(args.data, split, stride=stride, size=args.size)


@torch.no_grad()
def start_simple(tokenizer):
    """Starting weights for training. PyTorch's own make every layer mix frames and channels at random, and every band of
    the wavelets equally strong, which all has to be unlearned. Here time is left alone (the newest tap of a causal
    kernel is one), resampling is copying and averaging, residual branches are quiet, and the picture starts grey.
    Worth 1.2 dB after the same two hundred seconds."""
    def quiet(conv, factor, identity=0.0):
        weight = conv.conv3d.weight.mul_(factor)
        i = torch.arange(min(weight.shape[:2]))
        weight[i, i, -1, weight.shape[3] // 2, weight.shape[4] // 2] += identity
        conv.conv3d.bias.zero_()

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
    """Starting weights from a trained tokenizer. Where the bottleneck differs (a discrete tokenizer from a continuous one),
    it becomes the principal components of the old latents on `video`, scaled to the spread that FSQ's levels cover."""
    old = load_tokenizer(file)
    skip = [k for k, v in tokenizer.state_dict().items() if k not in old.state_dict() or v.shape != old.state_dict()[k].shape]
    outside = [k for k in skip if "quant_conv" not in k]
    if outside:
        raise TokenizerError(f"--init {file}: its {outside[0]} has another shape; give the sizes it was made with")
    tokenizer.load_state_dict({k: v for k, v in old.state_dict().items() if k not in skip}, strict=False)
    if skip:
        z = rearrange(old.quant_conv(old.encoder(video)), "b c t h w -> (b t h w) c").double()
        n, mean = tokenizer.quant_conv.conv3d.out_channels, z.mean(0)
        if n > len(mean):
            raise TokenizerError(f"--init {file}: its {len(mean)} latent channels cannot start {n}; start from a wider one")
        variance, axes = torch.linalg.eigh(torch.cov(z.T))
        axes, spread = axes[:, -n:].flip(1), variance[-n:].flip(0).sqrt()  # (C, n), (n,)
        into, back = (axes / spread).T, axes * spread  # code = into (z - mean), z = back code + mean
        a, b, c, d = (m.conv3d for m in (old.quant_conv, tokenizer.quant_conv, old.post_quant_conv, tokenizer.post_quant_conv))
        flat = lambda conv: conv.weight[..., 0, 0, 0].double()
        b.weight.copy_((into @ flat(a)).view_as(b.weight))
        b.bias.copy_(into @ (a.bias - mean))
        d.weight.copy_((flat(c) @ back).view_as(d.weight))
        d.bias.copy_(flat(c) @ mean + c.bias)
        if tokenizer.kind == "discrete":  # tanh of a unit Gaussian, in levels: codes come back in [-1, 1]
            d.weight.mul_(1.5)


def train(args):
    torch.manual_seed(args.seed)
    config = TokenizerConfig(**{**asdict(PRESETS[args.kind]), **{f.name: getattr(args, f.name) for f in fields(TokenizerConfig)
                                                                  if getattr(args, f.name, None) is not None}})
    tokenizer = Tokenizer(config)
    start_simple(tokenizer)
    clips, held_out = (raw_clips(args, split, stride=stride) for split, stride in (("train", 3), ("val", None)))
    if args.init:
        start_from(tokenizer, args.init, next(batches(clips, min(16, len(clips)), args.seed)))
    tokenizer.to(args.device)
    n = sum(p.numel() for p in tokenizer.parameters())
    print(f"{args.kind} tokenizer, {n / 1e6:.2f} M parameters, {config.temporal_compression}x{config.spatial_compression}x"
          f"{config.spatial_compression}, on {len(clips)} clips of {args.data}")
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(100, args.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / args.steps)))))
    file, start = os.path.join(args.out, "tokenizer.pt"), time.time()
    bar = tqdm(zip(range(1, args.steps + 1), batches(clips, args.batch, args.seed)), total=args.steps, desc="tokenizer")
    for step, video in bar:
        video = video.to(args.device)
        error = tokenizer(video) - video
        loss = error.square().mean() + 0.03 * error.abs().mean()  # the first is the PSNR, the second keeps edges sharp
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % args.eval_every == 0 or step == args.steps:
            score = round_trip(tokenizer.eval(), held_out)[0]
            save(tokenizer.train(), file, step=step, psnr=score)
            bar.write(json.dumps({"step": step, "loss": round(loss.item(), 5), "val_psnr": round(score, 3),
                                  "minutes": round((time.time() - start) / 60, 1)}))
    print(f"wrote {file}: {os.path.getsize(file) / 1e6:.1f} MB, {score:.2f} dB on held-out clips")


def check(args):
    tokenizer = load_tokenizer(args.tokenizer, args.device)
    clips = raw_clips(args, args.split)
    score, z = round_trip(tokenizer, clips, args.num)
    print(f"{tokenizer.kind} {tokenizer.temporal}x{tokenizer.spatial}x{tokenizer.spatial}: round trip of {min(args.num, len(clips))} "
          f"clips {score:.2f} dB; latents of a clip {tuple(z.shape[1:])}")
    if tokenizer.kind == "discrete":
        share = torch.bincount(z.flatten(), minlength=tokenizer.vocab_size).float() / z.numel()
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        print(f"ids: {int((share > 0).sum())} of {tokenizer.vocab_size} in use, perplexity {perplexity:.0f}")
    else:
        for name, stat in (("mean", z.mean((0, 2, 3, 4))), ("std ", z.std((0, 2, 3, 4)))):
            print(f"latent {name} by channel: " + " ".join(f"{v:+.2f}" for v in stat.tolist()))


def main(argv=None):
    from data import DataError
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train a tokenizer on raw video", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    t.add_argument("--kind", required=True, choices=["discrete", "continuous"])
    t.add_argument("--out", required=True, help="folder for tokenizer.pt")
    t.add_argument("--steps", type=int, default=5000)
    t.add_argument("--batch", type=int, default=4)
    t.add_argument("--lr", type=float, default=1.5e-3)
    t.add_argument("--init", default="", help="tokenizer file to start from, a continuous one for either kind; default: nothing")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--eval_every", type=int, default=500, help="steps between scores, each followed by a save")
    t.add_argument("--channels", type=int, help="width; default: the tiny preset's")
    t.add_argument("--spatial_compression", type=int, choices=[4, 8, 16])
    t.add_argument("--temporal_compression", type=int, choices=[4, 8])
    t.add_argument("--latent_channels", type=int, help="continuous: channels of a latent")
    t.add_argument("--levels", type=lambda s: tuple(map(int, s.split(","))), help="discrete: FSQ levels, as in 8,8,8,8")
    c = commands.add_parser("check", help="round trip and latent statistics", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("--tokenizer", required=True, help="file, or folder with encoder.jit and decoder.jit")
    c.add_argument("--split", default="val", choices=["train", "val"])
    c.add_argument("--num", type=int, default=32, help="clips")
    for q in (t, c):
        q.add_argument("--data", required=True, help="folder of raw video, see data.py")
        q.add_argument("--size", type=int, help="resize frames to this; default: as stored")
        q.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    try:
        {"train": train, "check": check}[args.command](args)
    except (TokenizerError, DataError) as e:
        sys.exit(f"tokenizer.py: {e}")


if __name__ == "__main__":
    main()
