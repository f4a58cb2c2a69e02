"""Exercise 16: rounding and its gradient. The project's own: tokenizer.FSQ.quantize.

Finite scalar quantisation squashes a number with tanh and rounds it to one of a few levels. The decoder trains on the rounded
numbers and gets better, so the loss falls. The encoder stays as it was born. What is the slope of a staircase?
"""
import torch


def quantize(z, levels):
    """z, any real numbers -> codes in [-1, 1] on a grid of `levels`, an odd number of them, values."""
    half = levels // 2
    return (torch.tanh(z) * half).round() / half


def test_codes_lie_on_the_grid_and_pass_the_gradient(quantize=quantize, levels=5):
    z = torch.linspace(-4, 4, 201, requires_grad=True)
    codes = quantize(z, levels)
    assert sorted(set((codes * 2).tolist())) == [-2, -1, 0, 1, 2]
    codes.sum().backward()
    slope = 1 - torch.tanh(z.detach()) ** 2
    assert z.grad.abs().max() > 0, "no gradient reaches the encoder"
    assert torch.allclose(z.grad, slope, atol=1e-2), "pass it as if nothing had been rounded (straight-through)"
