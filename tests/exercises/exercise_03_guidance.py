"""Exercise 3: classifier-free guidance. The project's own: the `guided` velocity in flow_hwm.FlowHWM.sample.

Guidance asks the model twice, with and without its conditions, and goes further in the direction in which they differ. The
second of two calls returns something else than the first. Guidance of scale 1 should be no guidance at all; is it?
"""
import torch


def guided(model, X, t, past, actions, cfg):
    """Velocity u_0 + cfg (u - u_0), u with the conditions and u_0 with zeros in their place."""
    conditions = {"past": past, "actions": actions}
    u = model(X, t, **conditions)
    for c in conditions.values():
        c.zero_()
    u_0 = model(X, t, **conditions)
    return u_0 + cfg * (u - u_0)


def test_asking_twice_gives_the_same_answer(guided=guided):
    model = lambda X, t, past, actions: X * t + past + 2 * actions
    X, past, actions = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    kept = past.clone(), actions.clone()
    first, second = (guided(model, X, 0.5, past, actions, cfg=3.0) for _ in range(2))
    assert torch.equal(past, kept[0]) and torch.equal(actions, kept[1]), "the caller's tensors were changed"
    assert torch.equal(first, second)
    assert torch.allclose(first, X * 0.5 + 3 * (kept[0] + 2 * kept[1]))
