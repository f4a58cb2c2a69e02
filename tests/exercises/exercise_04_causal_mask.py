"""Exercise 4: who sees whom. The project's own: blocks.temporal_attention, and MaskedBlock.forward around it.

Attention over time should be causal, thinks everyone who has written a language model. Here the tokens of one place stand in
the order video, then actions. Draw the mask: which column would carry an action to a frame? Published code trained
all its models like this, and its world model never knew what the robot did.
"""
import torch
import torch.nn.functional as F


def temporal_attention(q, k, v):
    """q, k, v (B, heads, T + A, d): T video tokens of one place, then A action tokens -> (B, heads, T + A, d)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_video_sees_the_actions(temporal_attention=temporal_attention, T=3, A=17):
    q, k, v = torch.randn(3, 1, 2, T + A, 8, generator=torch.Generator().manual_seed(0)).unbind()
    v.requires_grad_()
    temporal_attention(q, k, v)[:, :, :T].square().sum().backward()
    assert v.grad[:, :, T:].abs().min() > 0, "no gradient from the video's output to the actions' values"
    assert v.grad[:, :, :T].abs().min() > 0
