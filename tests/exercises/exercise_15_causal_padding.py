"""Exercise 15: causal in time. The project's own: tokenizer.CausalConv3d.

A world model encodes nine past frames and dreams on. It was trained on latents of seventeen, so the latents of the past must
not depend on the frames that follow. This convolution keeps the length, as everybody's does; what does frame 3 see?
"""
import torch
import torch.nn.functional as F


def convolve(x, weight):
    """x (B, C, T) over time, weight (C', C, k) with k odd -> (B, C', T)."""
    k = weight.shape[2]
    return F.conv1d(F.pad(x, (k // 2, k // 2)), weight)


def test_no_frame_sees_a_later_one(convolve=convolve):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 2, 17, generator=g), torch.randn(2, 2, 3, generator=g)
    y = convolve(x, weight)
    assert y.shape == x.shape
    assert torch.allclose(convolve(x[:, :, :9], weight), y[:, :, :9], atol=1e-5), "nine frames alone, and nine of seventeen"
    still = convolve(torch.ones(1, 2, 5), weight)
    assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5), "a still video begins dark: pad with its first frame"
