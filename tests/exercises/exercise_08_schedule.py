"""Exercise 8: the unmasking schedule. The project's own: masked_hwm.n_fixed, and the loop in MaskedHWM.sample.

gamma(r) = cos(pi r / 2) says which share is still hidden when a share r of the steps is done. It is a running total. The
function below is called once a step and its results are added up; after how many of K = 8 steps is nothing left to refine?
"""
import math


def n_fixed(k, K, n):
    """How many of n tokens are fixed after step k of K."""
    return min(n, sum(round(n * (1 - math.cos(math.pi * j / (2 * K)))) for j in range(1, k + 1)))


def test_a_share_of_one_minus_gamma_is_fixed(n_fixed=n_fixed, n=1024):
    for K in (1, 2, 8):
        for k in range(1, K + 1):
            assert n_fixed(k, K, n) == round(n * (1 - math.cos(math.pi * k / (2 * K)))), f"after step {k} of {K}"
        assert n_fixed(K, K, n) == n
