"""Exercise 20: a mean of ratios. The project's own: regret of examples/plan.py.

R = (E_model - E_oracle) / (E_still - E_oracle) says how much worse a planner does in a model's dream than in the true world (0)
and how much better than doing nothing (1). E are mean errors over episodes. Here the ratio is taken episode by episode; one
episode whose goal lies nearly where the robot stands already is enough, and R is anything.
"""
import numpy as np


def regret(model, still, oracle):
    """Errors (episodes,) of three planners, in the same episodes -> R."""
    return float(((model - oracle) / (still - oracle)).mean())


def test_one_easy_episode_does_not_decide(regret=regret):
    oracle, still = np.array([1.0, 2.0, 1.0, 1.0]), np.array([9.0, 10.0, 9.0, 1.001])
    assert abs(regret(oracle, still, oracle)) < 1e-9, "as good as the true world"
    assert abs(regret(still, still, oracle) - 1) < 1e-9, "as good as doing nothing"
    model = np.array([3.0, 4.0, 3.0, 2.0])
    assert abs(regret(model, still, oracle) - 7 / 24.001) < 1e-6
