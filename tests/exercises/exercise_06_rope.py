"""Exercise 6: rotary frequencies. The project's own: blocks.rope_table.

Dimension pair k of d should turn by position * theta ** (-2k / d): from once a token to hardly at all. Operators bind as they
bind. With this table nearly no dimension carries a position, and attention cannot tell left from right; nothing crashes.
"""
import torch


def rope_angles(n, d, theta=10_000.0):
    """Angles (n, d / 2) of n positions."""
    k = torch.arange(0, d, 2, dtype=torch.float64)
    return torch.arange(n, dtype=torch.float64)[:, None] * (1 / theta**k / d)


def test_every_dimension_turns(rope_angles=rope_angles, d=32):
    angles = rope_angles(101, d)
    assert torch.allclose(angles[1, 0], torch.tensor(1.0, dtype=angles.dtype)), "the fastest pair turns one radian a token"
    slowest = 10_000.0 ** (-(d - 2) / d)
    assert abs(angles[100, -1].item() - 100 * slowest) < 1e-5, "the slowest has visibly turned after a hundred tokens"
    ratio = angles[1, 1:] / angles[1, :-1]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4), "frequencies form a geometric series"
