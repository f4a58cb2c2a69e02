"""Exercise 2: the Euler loop. The project's own: flow_hwm.integrate.

For data of one mean and variance the exact velocity is known, so a sampler can be tested without any training: it must
return that mean *and* that spread. This one returns something of about the right size. Why is it a one-step method?
"""
import torch


def integrate(velocity, X_0, steps):
    """Solves dX/dt = velocity(X, t) from t = 0 to 1, starting at X_0."""
    X, dt = X_0, 1 / steps
    for i in range(steps):
        X = X + velocity(X_0, i * dt) * dt
    return X


def test_exact_velocity_of_a_gaussian_gives_that_gaussian(integrate=integrate):
    mean, std = 2.0, 0.3

    def velocity(X, t):  # E[X_1 - X_0 | X_t] when X_1 ~ N(mean, std^2) and X_0 ~ N(0, 1)
        variance = t**2 * std**2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (X - t * mean)

    X_0 = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X_1 = integrate(velocity, X_0, 200)
    assert abs(X_1.mean().item() - mean) < 0.02
    assert abs(X_1.std().item() - std) < 0.02
