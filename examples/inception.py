"""Inception-v3, the network whose features FID compares (Heusel et al., 2017), as pytorch-fid has it.

Frames (n, H, W, 3) uint8 go in, features (n, 2048) float64 come out: `load_inception()(frames)`. Its names
are those of pytorch-fid's file, which holds TensorFlow's weights of 2015. See evaluate.py for what is done
with the features.
"""
import os
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import DataError, fingerprint

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # how its SHA-256 begins: the digits that its publisher states, in the name
POOLS = {"average": nn.AvgPool2d(3, 1, 1, count_include_pad=False),  # no zeros from beyond the border
         "largest": nn.MaxPool2d(3, 1, 1), "halve": nn.MaxPool2d(3, 2)}

def conv(c_in, c_out, kernel, stride=1, padding="same"):
    """Convolution, batch norm by running statistics, ReLU. With a stride there is no padding."""
    padding = padding if stride == 1 else 0
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU()))

class Mixed(nn.Module):
    """An Inception block: branches side by side, their channels concatenated. A branch is a chain of layers,
    {name: (channels, kernel[, stride])}, {name: ()} for a pool. Two branches may share their first layers."""

    def __init__(self, c_in, *branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            c = c_in
            for name, sizes in branch.items():
                self.add_module(name, conv(c, *sizes) if sizes else POOLS[name])
                c = sizes[0] if sizes else c

    def forward(self, x):
        out = []
        for branch in self.branches:
            y = x
            for name in branch:
                y = self.get_submodule(name)(y)
            out.append(y)
        return torch.cat(out, dim=1)

def mixed_5(c_in, pooled):
    return Mixed(c_in, {"branch1x1": (64, 1)},
                 {"branch5x5_1": (48, 1), "branch5x5_2": (64, 5)},
                 {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
                 {"average": (), "branch_pool": (pooled, 1)})

def mixed_6(c):
    return Mixed(768, {"branch1x1": (192, 1)},
                 {"branch7x7_1": (c, 1), "branch7x7_2": (c, (1, 7)), "branch7x7_3": (192, (7, 1))},
                 {"branch7x7dbl_1": (c, 1), "branch7x7dbl_2": (c, (7, 1)), "branch7x7dbl_3": (c, (1, 7)),
                  "branch7x7dbl_4": (c, (7, 1)), "branch7x7dbl_5": (192, (1, 7))},
                 {"average": (), "branch_pool": (192, 1)})

def mixed_7(c_in, pool):
    double = {"branch3x3dbl_1": (448, 1), "branch3x3dbl_2": (384, 3)}
    return Mixed(c_in, {"branch1x1": (320, 1)},
                 {"branch3x3_1": (384, 1), "branch3x3_2a": (384, (1, 3))},
                 {"branch3x3_1": (384, 1), "branch3x3_2b": (384, (3, 1))},
                 {**double, "branch3x3dbl_3a": (384, (1, 3))},
                 {**double, "branch3x3dbl_3b": (384, (3, 1))},
                 {pool: (), "branch_pool": (192, 1)})

class Inception(nn.Sequential):
    """All of it but the classifier. Frames (n, H, W, 3) uint8, resized to `size` -> features (n, 2048)."""

    def __init__(self, size=299):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, stride=2), Conv2d_2a_3x3=conv(32, 32, 3, padding=0),
            Conv2d_2b_3x3=conv(32, 64, 3), pool_2=POOLS["halve"], Conv2d_3b_1x1=conv(64, 80, 1),
            Conv2d_4a_3x3=conv(80, 192, 3, padding=0), pool_4=POOLS["halve"],  # (n, 192, 35, 35) for size 299
            Mixed_5b=mixed_5(192, 32), Mixed_5c=mixed_5(256, 64), Mixed_5d=mixed_5(288, 64),
            Mixed_6a=Mixed(288, {"branch3x3": (384, 3, 2)}, {  # (n, 768, 17, 17)
                "branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3, 2)},
                {"halve": ()}),
            Mixed_6b=mixed_6(128), Mixed_6c=mixed_6(160), Mixed_6d=mixed_6(160), Mixed_6e=mixed_6(192),
            Mixed_7a=Mixed(768, {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3, 2)}, {  # (n, 1280, 8, 8)
                "branch7x7x3_1": (192, 1), "branch7x7x3_2": (192, (1, 7)),
                "branch7x7x3_3": (192, (7, 1)), "branch7x7x3_4": (192, 3, 2)}, {"halve": ()}),
            Mixed_7b=mixed_7(1280, "average"), Mixed_7c=mixed_7(2048, "largest")))
        self.size = size
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames):
        x = torch.as_tensor(frames).to(self.Conv2d_1a_3x3.conv.weight.device)
        x = x.permute(0, 3, 1, 2) / 255
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        x = super().forward(2 * x - 1)  # (n, 2048, 8, 8)
        return x.mean((2, 3)).cpu().double().numpy()

def load_inception(file="", say=print):
    """-> (network, "inception" | "random_inception"). file: its weights; "": those in torch hub's cache,
    which are fetched if need be. "random", or where they cannot be fetched: the same network with weights of
    a fixed seed, on smaller frames. Distances of its features rise with blur and noise, but are not FID."""
    if not file:
        file = f"{torch.hub.get_dir()}/checkpoints/{INCEPTION_FILE}"
        try:
            if not os.path.exists(file):
                torch.hub.load_state_dict_from_url(INCEPTION_URL, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as e:
            say(f"FID needs Inception-v3, and {INCEPTION_URL} cannot be had ({e}): put that file at {file} "
                "or name it with --inception; for now there is fd_random_inception and no FID")
            file = "random"
    if file == "random":
        net, generator = Inception(size=96), torch.Generator().manual_seed(0)
        for p in net.parameters():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p, generator=generator)
        return net, "random_inception"
    if not os.path.isfile(file) or not fingerprint(file).startswith(INCEPTION_SHA256):
        raise DataError(f"{file} is not the Inception of the FID literature, a file whose SHA-256 begins "
                        f"with {INCEPTION_SHA256}: get {INCEPTION_URL}, or give --inception random")
    net, state = Inception(), torch.load(file, map_location="cpu", weights_only=True)
    net.load_state_dict({k: state[k] for k in net.state_dict()})  # all but the classifier
    return net, "inception"
