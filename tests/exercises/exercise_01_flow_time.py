"""Exercise 1: flow time. The project's own: flow_hwm.interpolate (Eq. 1 of the paper).

The trainer draws t in (0, 1). Someone remembers that the sampler counts steps, and turns step numbers into times here
as well. Every training example then lies within a fiftieth of pure noise; the loss falls all the same.
"""
import torch


def interpolate(X_0, X_1, t, sigma_min):
    """The point at time t, (B,) in [0, 1], on the straight path from noise X_0 to data X_1."""
    t = (t / 50).view(-1, *[1] * (X_1.ndim - 1))
    return t * X_1 + (1 - (1 - sigma_min) * t) * X_0


def test_the_path_begins_at_noise_and_ends_at_data(interpolate=interpolate):
    X_0, X_1 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.allclose(interpolate(X_0, X_1, torch.zeros(3), 1e-4), X_0)
    assert torch.allclose(interpolate(X_0, X_1, torch.ones(3), 1e-4), X_1, atol=1e-3)
    half = interpolate(X_0, X_1, torch.full((3,), 0.5), 0.0)
    assert torch.allclose(half, (X_0 + X_1) / 2)
