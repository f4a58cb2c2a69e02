"""Exercise 9: action statistics. The project's own: data.moments and data.action_statistics.

Of a humanoid's 25 states some never move while the data is recorded. One of them is enough for the first loss to be nan;
and "just add an epsilon" turns the noise of a float into an action of size one.
"""
import torch


def standardise(actions, train):
    """actions (n, A) with mean and deviation of the training split (N, A); what is constant there becomes 0."""
    return (actions - train.mean(0)) / (train.std(0) + 1e-8)


def test_constant_joints_become_zero(standardise=standardise):
    train = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    train[:, 2] = 0.1
    y = standardise(train, train)
    assert torch.isfinite(y).all()
    assert y[:, 2].abs().max() < 1e-3
    assert torch.allclose(y[:, :2].std(0), torch.ones(2), atol=1e-2) and y[:, :2].mean(0).abs().max() < 1e-3
    moved = train[:1].clone()
    moved[:, 2] += 0.01  # a joint that training never saw moving, off by a hundredth of a radian in validation
    assert standardise(moved, train)[:, 2].abs().max() < 1, "a hundredth became a thousand standard deviations"
