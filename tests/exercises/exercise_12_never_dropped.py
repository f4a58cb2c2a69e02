"""Exercise 12: guidance without a lesson in it. The project's own: sample.settings_of, and FlowHWM.sample, which refuses.

Guidance compares a model's answer with its conditions to the answer without them. A model whose training never dropped its
conditions (p_drop 0) has no answer without them: zeros are an input that it has never seen. The preset's scale of 2 then
pushes every dream away from nonsense, which looks like a somewhat worse model and like nothing else.
"""


def scale(p_drop, asked=None, preset=2.0):
    """The guidance scale to sample with: the one asked for, or else the preset's. ValueError where it makes no sense."""
    return preset if asked is None else asked


def test_a_model_that_never_dropped_is_not_guided(scale=scale):
    assert scale(0.15) == 2 and scale(0.15, asked=3.0) == 3 and scale(0.15, asked=1.0) == 1
    assert scale(0.0) == 1, "unless asked, sample it without guidance"
    assert scale(0.0, asked=1.0) == 1
    refused = False
    try:
        scale(0.0, asked=3.0)
    except ValueError:
        refused = True
    assert refused, "who asks for guidance that the model cannot give should be told, not served"
