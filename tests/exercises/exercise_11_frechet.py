"""Exercise 11: the distance of two Gaussians. The project's own: evaluate.frechet.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The product of two symmetric matrices is not symmetric, and `eigvalsh` reads
only one triangle of what it is given: its answer is that of another matrix. Which product has the same eigenvalues as S1 S2,
and is symmetric?
"""
import numpy as np


def frechet(m1, S1, m2, S2):
    """Squared Frechet distance of N(m1, S1) and N(m2, S2), float64."""
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(S1 @ S2), 0)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * root


def test_closed_forms(frechet=frechet, d=6):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, d, d))
    S1, S2, m = a @ a.T, b @ b.T, rng.normal(size=d)
    assert abs(frechet(m, S1, m, S1)) < 1e-6, "a Gaussian is at no distance from itself"
    assert abs(frechet(m, S1, m + 1, S1) - d) < 1e-6, "equal spread: the squared distance of the means"
    assert abs(frechet(m, S1, m, 4 * S1) - np.trace(S1)) < 1e-6, "twice the spread: tr S1 (2 - 1)^2"
    eigen = np.linalg.eigvals(S1 @ S2)  # of the product, whatever its symmetry: they are real and positive
    expected = np.trace(S1) + np.trace(S2) - 2 * np.sqrt(eigen.real).sum()
    assert abs(frechet(m, S1, m, S2) - expected) < 1e-6 * abs(expected)
