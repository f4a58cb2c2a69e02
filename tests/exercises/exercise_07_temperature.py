"""Exercise 7: temperature. The project's own: masked_hwm.probabilities.

Low temperature, sure choices; high temperature, wild ones. This sampler draws the same at every temperature. Print the
probabilities at 0.1 and at 10 and look at what the last line does to the one before.
"""
import torch


def probabilities(logits, temperature):
    """logits (n, vocab) -> the distribution that tokens are drawn from."""
    p = logits.softmax(-1) / temperature
    return p / p.sum(-1, keepdim=True)


def test_entropy_falls_with_the_temperature(probabilities=probabilities):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    entropy = []
    for T in (0.05, 0.5, 1.0, 2.0):
        p = probabilities(logits, T)
        assert torch.allclose(p.sum(-1), torch.ones(6))
        entropy.append(-(p * p.clamp(min=1e-30).log()).sum(-1).mean().item())
    assert entropy[0] + 0.1 < entropy[1] and entropy[1] + 0.1 < entropy[2] < entropy[3]
    assert torch.equal(probabilities(logits, 0.05).argmax(-1), logits.argmax(-1))
