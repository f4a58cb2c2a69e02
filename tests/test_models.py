"""blocks.py, masked_hwm.py, flow_hwm.py: properties whose answers can be worked out by hand (numbers: TRAPS.md)."""
import inspect
import math
import os
import runpy
import shutil
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import blocks
import flow_hwm
import masked_hwm
from blocks import VARIANTS, FlowBlock, Layout, MaskedBlock, compile_blocks
from flow_hwm import FlowConfig, FlowHWM, integrate, interpolate, target_velocity
from masked_hwm import LinearCrossEntropy, MaskedConfig, MaskedHWM, choose_ids, draw_ids, mean_ids, n_fixed, probabilities
from tokenizer import DataError
from train import count_flops

JOINT = ("base", "modality", "full")
FAMILIES = ("masked", "flow")
LAYOUT = Layout(T_p=2, T_f=1, H=2, W=3, temporal=8)
D, C, V, A = 24, 8, 11, 5  # width, time embedding, vocabulary, action dimensions of the toys


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shake(module, std=0.3, seed=0):
    """Random numbers in every parameter, biases and gates too, so that no equality below holds because of a zero."""
    g = generator(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g) * std
    return module


def toy_model(family, variant="base", **changes):
    shape = dict(dict(n_layer=3, n_head=2, width=D, hidden=32, action_dim=A, variant=variant), **changes)
    if family == "masked":
        model = MaskedHWM(MaskedConfig(**dict(dict(vocab_size=V, H=2, W=3), **shape)))
    else:
        model = FlowHWM(FlowConfig(**dict(dict(time_width=C, channels=3, H=4, W=6), **shape)))
    return shake(model, 0.2).eval()


def toy_clips(family, B=2, T=3, seed=0):
    """(video, actions) as the data reader gives them."""
    g = generator(seed)
    actions = torch.randn(B, 1 + 8 * (T - 1), A, generator=g)
    if family == "masked":
        return torch.randint(V, (B, T, 2, 3), generator=g), actions
    return torch.randn(B, 3, T, 4, 6, generator=g), actions


def toy_draws(model, B=2, seed=0):
    g = generator(seed)
    return torch.utils.data.default_collate([model.draw(g) for _ in range(B)])


def toy_block(family, variant, last=False):
    return shake(MaskedBlock(D, 2, 32, variant, last) if family == "masked" else FlowBlock(D, 2, 32, C, variant, last))


def rope_of(family, positions, layout=LAYOUT):
    if family == "flow":
        return blocks.rope_table(positions, blocks.axis_dims(D // 2))
    d = D // 2
    space = blocks.rope_table(positions[: layout.S, 1:], (d // 2, d // 2))
    return space, blocks.rope_table(positions[:, :1], (d,))


def run_block(family, block, x, layout=LAYOUT, positions=None):
    rope = rope_of(family, layout.positions() if positions is None else positions, layout)
    if family == "masked":
        return block(x, layout, rope)
    return block(x, torch.linspace(-1, 1, C)[None], layout, rope)


def tokens(layout=LAYOUT, B=2, seed=0):
    return torch.randn(B, sum(layout.lengths), D, generator=generator(seed))


both = pytest.mark.parametrize("family", FAMILIES)
all_eight = [pytest.mark.parametrize("variant", VARIANTS), both]


def eight(test):
    for mark in all_eight:
        test = mark(test)
    return test


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- TRAPS 1: the path of flow matching, Eq. 1 to 3


def test_path_starts_at_noise_and_ends_at_data():
    X_0, X_1 = torch.full((3, 1, 1, 1, 1), 5.0), torch.full((3, 1, 1, 1, 1), 2.0)
    X = interpolate(X_0, X_1, torch.tensor([0.0, 0.5, 1.0]), sigma_min=0.1)
    close(X.flatten(), torch.tensor([5.0, 1.0 + 0.55 * 5, 2.0 + 0.1 * 5]))  # t X_1 + (1 - 0.9 t) X_0
    close(target_velocity(X_0, X_1, 0.1).flatten(), torch.full((3,), 2 - 0.9 * 5))


def test_target_velocity_is_the_derivative_of_the_path():
    X_0, X_1 = torch.randn(2, 4, 3, 1, 2, 2, generator=generator(), dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    slope = (interpolate(X_0, X_1, t + 0.1, 0.01) - interpolate(X_0, X_1, t, 0.01)) / 0.1
    close(slope, target_velocity(X_0, X_1, 0.01))


def test_loss_of_a_known_velocity_by_time(monkeypatch):
    """With X_1 = 0, sigma_min = 0.1 and a model that answers X_t, the loss is (1.9 - 0.9 t)^2 mean(X_0^2)."""
    model, asked = toy_model("flow", sigma_min=0.1, T_f=1), []

    def answer_X_t(X_t, t, *_, **__):
        asked.append(t)
        return X_t

    monkeypatch.setattr(model, "velocity", answer_X_t)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    X_0 = torch.randn(1, 3, 1, 4, 6, generator=generator()).expand(4, -1, -1, -1, -1)
    losses = []
    for i in range(4):
        draws = {"t": t[i : i + 1], "X_0": X_0[i : i + 1], "kept": torch.tensor([True])}
        losses.append(model(torch.zeros(1, 3, 3, 4, 6), torch.zeros(1, 17, A), draws)[0])
    # X_t - V_t = (1 - 0.9 t) X_0 + 0.9 X_0
    close(torch.stack(losses), (1.9 - 0.9 * t) ** 2 * X_0[0].square().mean())
    assert torch.equal(torch.cat(asked), t), "the network must be told the time that the path was cut at"


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_times_drawn_in_training_cover_noise_and_data(sampling):
    model, g = toy_model("flow", t_sampling=sampling), generator()
    t = torch.stack([model.draw(g)["t"] for _ in range(2000)])
    assert abs(t.mean() - 0.5) < 0.03 and t.min() < 0.1 and t.max() > 0.9 and 0 <= t.min() and t.max() <= 1
    if sampling == "uniform":
        assert abs(t.std() - 12**-0.5) < 0.02


# ---- TRAPS 2: the sampler of flow matching


MU, SD = 0.7, 0.3


def gaussian_velocity(x, t):
    """E[X_1 - X_0 | X_t = x] for X_1 ~ N(MU, SD^2), X_0 ~ N(0, 1), sigma_min = 0. Its flow is X_1 = MU + SD X_0."""
    return MU + (t * SD**2 - (1 - t)) / (t**2 * SD**2 + (1 - t) ** 2) * (x - t * MU)


@pytest.mark.parametrize("method, factor", [("euler", 1 + 0.25), ("midpoint", 1 + 0.25 + 0.25**2 / 2)])
def test_integrate_by_hand(method, factor):
    """dX/dt = X in four steps multiplies by 1 + h, or by 1 + h + h^2 / 2, each time."""
    close(integrate(lambda X, t: X, torch.tensor([3.0]), 4, method), torch.tensor([3 * factor**4]))


@pytest.mark.parametrize("method, low, high", [("euler", 0.8, 1.2), ("midpoint", 1.8, 3.2)])
def test_integrate_converges_at_its_order_to_the_gaussian(method, low, high):
    X_0 = torch.randn(4000, generator=generator(), dtype=torch.float64)
    error = {}
    for steps in (80, 160, 320):
        X_1 = integrate(gaussian_velocity, X_0, steps, method)
        error[steps] = (X_1 - (MU + SD * X_0)).abs().mean().item()
    assert abs(X_1.mean() - MU) < 0.01 and abs(X_1.std() / SD - 1) < 0.05
    for steps in (80, 160):
        assert low < math.log2(error[steps] / error[2 * steps]) < high, error


def test_every_step_asks_at_the_state_it_moved_to():
    trace, asked = [], []

    def velocity(X, t):
        asked.append((t, X.item()))
        return torch.tensor([X.item() + 1])  # dX/dt = X + 1: Euler multiplies X + 1 by 1 + 1 / 4

    integrate(velocity, torch.tensor([0.0]), 4, trace=trace)
    assert [t for t, _ in asked] == [0, 0.25, 0.5, 0.75]
    close(torch.tensor([x for _, x in asked]), torch.tensor([1.25**i - 1 for i in range(4)]))
    close(torch.cat(trace), torch.tensor([1.25**i - 1 for i in range(5)]))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sample_with_the_exact_velocity_returns_the_data_distribution(monkeypatch, cfg):
    """Mean and standard deviation of the latents come back in the tokenizer's units, not standardised."""
    model = toy_model("flow")
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 1.0])
    model.set_statistics(torch.zeros(A), torch.ones(A), mean, std)
    monkeypatch.setattr(model, "velocity", lambda X, t, *_, **__: gaussian_velocity(X, t))
    X_1 = model.sample(torch.zeros(100, 3, 2, 4, 6), torch.zeros(100, 17, A), steps=100, cfg=cfg, generator=generator())
    assert X_1.shape == (100, 3, 1, 4, 6)
    close(X_1.mean((0, 2, 3, 4)), mean + MU * std, 0.03)
    close(X_1.std((0, 2, 3, 4)), SD * std, 0.03)


# ---- TRAPS 3: nothing writes into the caller's tensors


def unchanged(call, *inputs):
    flat = [v for x in inputs for v in (x.values() if isinstance(x, dict) else [x])]
    before = [x.clone() for x in flat]
    call(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, flat))


@eight
def test_loss_leaves_its_inputs(family, variant):
    model = toy_model(family, variant)
    draws = toy_draws(model)
    if family == "flow":
        draws["kept"] = torch.tensor([False, True])
    unchanged(model, *toy_clips(family), draws)


@both
def test_samplers_leave_their_inputs(family):
    model, (video, actions) = toy_model(family), toy_clips(family)
    past = video.narrow(video.ndim - 3, 0, 2)
    for settings in [dict(order="random"), dict(order="confidence")] if family == "masked" else [dict(steps=2, cfg=3.0)]:
        unchanged(lambda p, a: model.sample(p, a, generator=generator(), **settings), past, actions)


# ---- TRAPS 4: every condition reaches the future


@eight
@pytest.mark.parametrize("n_layer", [1, 3])
def test_actions_and_past_reach_the_predicted_future(family, variant, n_layer):
    model, (video, actions) = toy_model(family, variant, n_layer=n_layer), toy_clips(family)
    actions.requires_grad_()
    if family == "masked":
        seen = []
        model.embed.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad_()) or o)
        out = model.logits(video, torch.ones(2, 1, 2, 3, dtype=torch.bool), actions)
        by_action, by_video = torch.autograd.grad(out.square().sum(), [actions, seen[0]])
        by_past = by_video[:, :2].abs().sum((0, 2, 3, 4))
    else:
        v_p = video[:, :, :2].clone().requires_grad_()
        out = model.velocity(video[:, :, 2:], torch.tensor([0.3]), v_p, actions)
        by_action, by_video = torch.autograd.grad(out.square().sum(), [actions, v_p])
        by_past = by_video.abs().sum((0, 1, 3, 4))
    assert (by_action.abs().sum((0, 2)) > 1e-7).all(), "every one of the 9 + 8 actions must matter"
    assert (by_past > 1e-7).all() and len(by_past) == 2


@eight
def test_which_stream_learns_of_which(family, variant):
    """Joint attention is bidirectional: all of all. split: each of itself, and v_f of all."""
    block, x = toy_block(family, variant), tokens().requires_grad_()
    out = run_block(family, block, x).split(LAYOUT.lengths, dim=1)
    learns = torch.stack([torch.stack([g.abs().max() > 1e-7 for g in torch.autograd.grad(
        o.square().sum(), x, retain_graph=True)[0].split(LAYOUT.lengths, dim=1)]) for o in out])
    expected = torch.ones(4, 4, dtype=torch.bool) if variant != "split" else torch.eye(4, dtype=torch.bool)
    expected[1] = True  # v_f
    assert torch.equal(learns, expected)


def test_at_place_hears_its_own_frames_and_its_surroundings():
    layout = LAYOUT._replace(T_f=2, H=1, W=7)
    layer, S = shake(blocks.AtPlace(A, D, temporal=8)), 7
    a_f = torch.randn(2, 16, A, generator=generator()).requires_grad_()
    p = torch.randn(2, S, D, generator=generator(1)).requires_grad_()
    y = layer(p, a_f, layout)
    assert y.shape == (2, 2 * S, D)
    for t in range(2):
        for s in range(S):  # future latent t is of the future frames 8 t .. 8 t + 7, at every place
            by_p, by_a = torch.autograd.grad(y[:, t * S + s].sum(), [p, a_f], retain_graph=True)
            assert (by_a.abs().amax((0, 2)) > 0).tolist() == [8 * t <= j < 8 * t + 8 for j in range(16)]
            assert (by_p.abs().amax((0, 2)) > 0).tolist() == [abs(s - other) <= 3 for other in range(S)]


def test_digits_are_those_of_fsq():
    """Row i of the table holds a one for each digit of id i, as the tokenizer counts them; and ids that share all but one
    digit differ by one vector only."""
    from tokenizer import FSQ
    levels = (4, 3, 5)
    table, ids = shake(masked_hwm.DigitTable(levels, D)), torch.arange(60)
    codes = FSQ(levels).ids_to_codes(ids.view(60, 1, 1, 1))[:, :, 0, 0, 0]  # (60, 3) in [-1, 1]
    digits = (codes * torch.tensor(levels).div(2, rounding_mode="floor") + torch.tensor(levels).div(2, rounding_mode="floor")).round().long()
    ones = torch.cat([F.one_hot(d, n) for d, n in zip(digits.unbind(1), levels)], dim=1)
    assert torch.equal(table.digits.long(), ones)
    difference = table()[1] - table()[0]  # first level fastest
    close(difference, table.weight[1] - table.weight[0])


def test_shared_digits_only_add():
    """With zero digit vectors the model is the one without them; with others, input and output change."""
    plain, shared = toy_model("masked", vocab_size=12), toy_model("masked", vocab_size=12, share_digits=True, levels=(4, 3))
    shared.load_state_dict(plain.state_dict(), strict=False)
    (L, actions), M = toy_clips("masked"), torch.ones(2, 1, 2, 3, dtype=torch.bool)
    expected = plain.logits(L, M, actions)
    for table in (shared.digits_in, shared.digits_out):
        kept = table.weight.data.clone()
        table.weight.data.zero_()
        other = shared.digits_out if table is shared.digits_in else shared.digits_in
        other_kept, other.weight.data = other.weight.data.clone(), torch.zeros_like(other.weight)
        close(shared.logits(L, M, actions), expected)
        table.weight.data = kept
        assert (shared.logits(L, M, actions) - expected).abs().max() > 1e-3
        other.weight.data = other_kept


# ---- TRAPS 5: residuals


@eight
@pytest.mark.parametrize("last", [False, True])
def test_block_with_closed_outputs_is_the_identity(family, variant, last):
    block, x = toy_block(family, variant, last), tokens()
    closed = 0
    for name, m in block.named_modules():
        if name.endswith("out") or isinstance(m, blocks.MLP):
            for p in (m[2] if isinstance(m, blocks.MLP) else m).parameters():
                p.data.zero_()
            closed += 1
    assert closed >= 2
    assert torch.equal(run_block(family, block, x), x[:, LAYOUT.future] if last else x)


# ---- TRAPS 7: rotary position embedding


def test_rope_angles_by_hand():
    cos, sin = blocks.rope_table(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), (4, 2), theta=100.0)
    angle = torch.tensor([[0, 0, 0], [1.0, 0.1, 3.0]])  # axis 0: 1 * 100^0, 1 * 100^(-2/4); axis 1: 3 * 100^0
    close(cos, angle.cos())
    close(sin, angle.sin())


def test_rope_keeps_norms_and_depends_on_offsets_only():
    dims, g = (4, 4, 2), generator()  # of 11: one dimension stays
    positions = torch.rand(7, 3, generator=g) * 20
    q, k = torch.randn(2, 7, 11, generator=g)

    def scores(p):
        table = blocks.rope_table(p, dims)
        return blocks.rotate(q, table) @ blocks.rotate(k, table).T

    table = blocks.rope_table(positions, dims)
    close(blocks.rotate(q, table).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(blocks.rotate(q, table)[:, 10], q[:, 10])
    close(scores(positions + torch.tensor([5.0, -3.0, 11.0])), scores(positions), 1e-4)
    for axis in range(3):
        moved = positions.clone()
        moved[0, axis] += 1
        change = (scores(moved) - scores(positions)).abs()
        assert (change[0, 1:] > 1e-4).all() and (change[1:, 0] > 1e-4).all() and change[1:, 1:].max() < 1e-5


def test_every_rotated_pair_carries_position():
    """Each pair of dimensions turns by its own angle, from 1 down towards 1 / theta, on every axis."""
    for axis in range(2):
        step = torch.eye(2)[axis][None]
        sin = blocks.rope_table(step, (8, 8))[1][0].view(2, 4)
        close(sin[axis], torch.tensor([1, 0.1, 0.01, 0.001]).sin())
        assert (sin[1 - axis] == 0).all()


def test_a_head_of_293_shares_out_as_documented():
    assert blocks.axis_dims(293) == (100, 96, 96)
    for d in (6, 12, 40, 64, 293):
        assert sum(blocks.axis_dims(d)) in (d, d - 1) and all(n % 2 == 0 and n > 0 for n in blocks.axis_dims(d))


# ---- TRAPS 8: one clock


def test_positions_by_hand():
    p = Layout(T_p=2, T_f=1, H=1, W=2, temporal=8).positions()
    video = [[t, 0, w] for t in (0, 8, 16) for w in (0, 1)]
    assert p.tolist() == video + [[j, 0, 0] for j in range(17)]
    p = Layout(T_p=1, T_f=2, H=2, W=1, temporal=4).positions()
    assert p.tolist() == [[t, h, 0] for t in (0, 4, 8) for h in (0, 1)] + [[j, 0, 0] for j in range(9)]


def test_layout_by_hand():
    layout = Layout(T_p=2, T_f=3, H=2, W=3, temporal=8)
    assert (layout.S, layout.T, layout.lengths, layout.future) == (6, 5, (12, 18, 9, 24), slice(12, 30))


@eight
@pytest.mark.parametrize("last", [False, True])
def test_block_sees_differences_of_time_only(family, variant, last):
    block, x, position = toy_block(family, variant, last), tokens(), LAYOUT.positions()
    y = run_block(family, block, x, positions=position)
    close(run_block(family, block, x, positions=position + torch.tensor([40.0, 0, 0])), y, 1e-4)
    if family == "flow":
        close(run_block(family, block, x, positions=position + torch.tensor([0, 3.0, -2.0])), y, 1e-4)


@eight
@pytest.mark.parametrize("moved", ["v_p", "v_f", "a_p", "a_f"])
def test_a_stream_at_another_time_changes_the_future(family, variant, moved):
    """Also in split, where v_f is alone at its time and only the cross-attention can notice."""
    block, x, position = toy_block(family, variant, last=True), tokens(), LAYOUT.positions()
    y = run_block(family, block, x, positions=position)
    starts = [0, *torch.tensor(LAYOUT.lengths).cumsum(0).tolist()]
    i = ["v_p", "v_f", "a_p", "a_f"].index(moved)
    position[starts[i] : starts[i + 1], 0] += 5
    assert (run_block(family, block, x, positions=position) - y).abs().max() > 1e-4


@both
@pytest.mark.parametrize("T_f", [1, 3])
def test_models_take_their_rope_from_the_positions(family, T_f):
    """For the patched size, and for as many future latents as there are."""
    model, (video, actions), seen = toy_model(family), toy_clips(family, T=2 + T_f), []
    layout = model.layout._replace(T_f=T_f)
    assert (layout.H, layout.W) == (2, 3) and layout == model.layout.for_actions(actions.shape[1])
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-2:]))
    past = video.narrow(video.ndim - 3, 0, 2)
    model.sample(past, actions, generator=generator(), **(dict(K=1) if family == "masked" else dict(steps=1)))
    want = rope_of(family, layout.positions(), layout)
    assert len(seen) >= 3
    for got_layout, got in seen:
        assert got_layout == layout
        torch.testing.assert_close(got, want)


# ---- TRAPS 9: temperature


def test_temperature_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])
    close(probabilities(logits, 1.0), torch.tensor([[0.25, 0.75]]))
    close(probabilities(logits, 0.5), torch.tensor([[0.1, 0.9]]))
    assert choose_ids(logits, 0).tolist() == [1]
    logits = torch.randn(150, 20, generator=generator())
    entropy = []
    for T in (0.001, 0.01, 0.5, 1, 2):
        p = probabilities(logits, T)
        entropy.append(-(p * p.clamp(min=1e-30).log()).sum(-1))
    assert all((a < b + 1e-6).all() for a, b in zip(entropy, entropy[1:])) and (entropy[2] < entropy[3] - 0.1).all()


def test_temperature_zero_is_the_limit_of_low_temperatures():
    """The fast path asks for no random number, and draws what a temperature just above zero draws."""
    logits = torch.randn(150, 20, generator=generator())
    assert torch.equal(choose_ids(logits, 0), logits.argmax(-1))
    assert torch.equal(choose_ids(logits, 1e-4, generator()), logits.argmax(-1))
    g = generator()
    choose_ids(logits, 0, g)
    assert torch.equal(torch.rand(3, generator=g), torch.rand(3, generator=generator()))


def test_a_flow_at_half_temperature_starts_from_half_the_noise():
    model, (latents, actions), first = toy_model("flow"), toy_clips("flow"), {}
    for T in (1.0, 0.5, 0.0):
        trace = []
        model.sample(latents[:, :, :2], actions, steps=1, temperature=T, generator=generator(), trace=trace)
        first[T] = model.standardise_latents(trace[0])
    close(first[0.5], first[1.0] / 2)
    assert not first[0.0].any() and first[1.0].std() > 0.5


def test_the_mean_of_codes_by_hand():
    """Digits of levels (5, 3): id = first + 5 * second. Two likely ids far apart, and one alone."""
    p = torch.zeros(2, 15)
    p[0, 0 + 5 * 2], p[0, 3 + 5 * 2], p[0, 3 + 5 * 0] = 0.4, 0.3, 0.3  # mean digits 1.8 and 1.4
    p[1, 14] = 1
    assert mean_ids(p, (5, 3)).tolist() == [2 + 5 * 1, 14]
    logits = p.log().repeat(50, 1)  # more rows than are taken at a time
    assert choose_ids(logits, 1.0, levels=(5, 3)).tolist() == [7, 14] * 50
    assert choose_ids(logits, 0.1, levels=(5, 3)).tolist() == [10, 14] * 50, "a low temperature leaves the likeliest"


def test_the_sampler_takes_means_where_digits_are_known(monkeypatch):
    model = toy_model("masked", vocab_size=15, share_digits=True, levels=(5, 3))
    row = torch.full((15,), -100.0)
    row[10], row[13], row[3] = math.log(0.4), math.log(0.3), math.log(0.3)
    monkeypatch.setattr(model, "logits", lambda L, M, actions, where, memory: row.expand(int(where.sum()), -1))
    past, actions = torch.zeros(2, 2, 2, 3, dtype=torch.long), torch.zeros(2, 17, A)
    assert (model.sample(past, actions, mean=True) == 7).all()
    assert not (model.sample(past, actions, generator=generator()) == 7).any(), "without it ids are drawn"
    with pytest.raises(DataError, match="digits"):
        toy_model("masked").sample(past, actions, mean=True)


def test_ids_are_chosen_in_rows_as_in_one_table():
    logits = torch.randn(150, 20, generator=generator())  # more rows than are taken at a time
    together = draw_ids(probabilities(logits, 0.7), generator(1))
    assert torch.equal(choose_ids(logits, 0.7, generator(1)), together)


def test_draws_follow_the_distribution():
    p = torch.tensor([0.4, 0.3, 0.0, 0.2, 0.1, 0.0])
    counts = torch.bincount(draw_ids(p.expand(20_000, -1), generator()), minlength=6)
    assert counts[2] == 0 and counts[5] == 0
    live = p > 0
    chi_square = ((counts - 20_000 * p)[live] ** 2 / (20_000 * p[live])).sum()
    assert chi_square < 16.3, counts  # 99.9 % of chi-square with 3 degrees of freedom


def test_an_id_of_probability_zero_is_never_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.zeros(shape))  # one uniform number in 2^24
    assert draw_ids(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.5, 0.5]])).tolist() == [2, 1]


def test_sampled_ids_sharpen_as_temperature_falls(monkeypatch):
    """Through the sampler itself: two ids with odds 1 : 3 have odds 1 : 9 at T = 0.5, and none at T = 0."""
    model = toy_model("masked")
    row = torch.full((V,), -100.0)
    row[2], row[7] = 0.0, math.log(3)
    monkeypatch.setattr(model, "logits", lambda L, M, actions, where, memory: row.expand(int(where.sum()), -1))
    past, actions = torch.zeros(500, 2, 2, 3, dtype=torch.long), torch.zeros(500, 17, A)
    for T, share in ((1.0, 0.75), (0.5, 0.9), (0, 1.0)):
        L_f = model.sample(past, actions, temperature=T, generator=generator())
        assert ((L_f == 2) | (L_f == 7)).all()
        assert abs((L_f == 7).float().mean() - share) < 0.025  # 3000 draws: 3 standard deviations


# ---- TRAPS 10: the unmasking schedule


def test_number_fixed_by_hand():
    assert [n_fixed(k, 2, 64) for k in (1, 2)] == [19, 64]  # 64 (1 - cos 45 deg) = 18.7
    assert [n_fixed(k, 3, 100) for k in (1, 2, 3)] == [13, 50, 100]  # 30 and 60 degrees
    assert n_fixed(1, 1, 7) == 7


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("K", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_share_fixed_after_every_step(order, K, temperature):
    model, (L, actions), trace = toy_model("masked", n_layer=1), toy_clips("masked", T=4), []
    L_f = model.sample(L[:, :2], actions, K=K, order=order, temperature=temperature, generator=generator(), trace=trace)
    assert len(trace) == 2 * K and torch.equal(trace[-1][0][:, 2:], L_f) and not trace[-1][1].any()
    assert torch.equal(trace[-1][0][:, :2], L[:, :2])
    for t in range(2):
        for k in range(1, K + 1):
            ids, M = trace[t * K + k - 1]
            fixed = round(6 * (1 - math.cos(math.pi * k / (2 * K))))
            assert ((~M[:, t]).sum((1, 2)) == fixed).all(), "the same share in every clip"
            assert not M[:, :t].any() and M[:, t + 1 :].all(), "frame by frame"
            settled = ~M
            assert torch.equal(ids[:, 2:][settled], L_f[settled]), "what is fixed stays"


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_confidence_order_keeps_the_most_certain(monkeypatch, temperature):
    model, trace = toy_model("masked"), []
    strength = torch.tensor([1.0, 60, 3, 2, 50, 4])  # of the six places; 50 and 60 are drawn in any case

    def logits(L, M, actions, where, memory):
        table = torch.zeros(*where.shape, V)
        table[..., 4] = strength.view(1, 1, 2, 3)
        return table[where]

    monkeypatch.setattr(model, "logits", logits)
    model.sample(torch.zeros(1, 2, 2, 3, dtype=torch.long), torch.zeros(1, 17, A), K=2, temperature=temperature,
                 order="confidence", generator=generator(), trace=trace)
    assert (~trace[0][1]).flatten().tolist() == [False, True, False, False, True, False]  # round(6 * 0.29) = 2


def test_what_is_hidden_cannot_be_seen():
    """Ids under the mask change nothing: so a frame cannot depend on what later frames will be."""
    model, (L, actions) = toy_model("masked"), toy_clips("masked", T=5)
    M = torch.zeros(2, 3, 2, 3, dtype=torch.bool)
    M[:, 1:] = True
    other = L.clone()
    other[:, 3:] = (L[:, 3:] + 1) % V
    assert torch.equal(model.logits(L, M, actions), model.logits(other, M, actions))
    other[:, 2] = (L[:, 2] + 1) % V
    assert not torch.equal(model.logits(L, M, actions), model.logits(other, M, actions))


# ---- TRAPS 18: variants differ in what is documented


@both
def test_paper_presets_differ_in_the_variant_only(family):
    Config, presets = (MaskedConfig, masked_hwm.PRESETS) if family == "masked" else (FlowConfig, flow_hwm.PRESETS)
    for preset in presets.values():
        configs = [asdict(Config(**dict(preset, variant=v))) for v in VARIANTS]
        assert [c.pop("variant") for c in configs] == list(VARIANTS)
        assert all(c == configs[0] for c in configs)


SETS = {"base": 4, "modality": 2, "full": 1}
PAPER = {"masked": {"split": 0.220, "base": 0.321, "modality": 0.237, "full": 0.195},
         "flow": {"split": 0.944, "base": 1.36, "modality": 0.886, "full": 0.648}}  # Tables 1 and 2, billions


@eight
def test_paper_sizes_and_what_a_layer_holds(family, variant):
    Model, Config = (MaskedHWM, MaskedConfig) if family == "masked" else (FlowHWM, FlowConfig)
    with torch.device("meta"):
        model = Model(Config(variant=variant))
    layers = [dict(b.named_parameters()) for b in model.blocks]
    kinds = ["base"] * 4 + [variant] * (len(layers) - 4) if variant in ("modality", "full") else [variant] * len(layers)
    for layer, kind in zip(layers, kinds):
        tops = {n.split(".")[0] for n in layer}
        if family == "masked":
            h = 512
            assert tops == {"norm_s", "spatial", "norm_t", "temporal", "norm_m", "mlp"} | (
                {"action", "norm_c", "cross_q", "cross_kv", "cross_out"} if kind == "split" else set())
            weights = (4 * 4 + 8 if kind == "split" else 2 * 4 + 8 * SETS[kind]) * h * h
        else:
            h = 1172
            assert tops == {"sets"} | ({"cross"} if kind == "split" else set())
            weights = (2 if kind == "split" else SETS[kind]) * (12 * h * h + 256 * 6 * h) + (
                8 * h * h + 256 * 3 * h if kind == "split" else 0)
        assert sum(p.numel() for p in layer.values() if p.ndim > 1) == weights
    assert layers[-1].keys() == layers[-2].keys() and layers[0].keys() == layers[1].keys()
    outside = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("blocks.")}
    with torch.device("meta"):
        base = Model(Config(variant="base", n_layer=1))
    assert outside == {n: tuple(p.shape) for n, p in base.named_parameters() if not n.startswith("blocks.")}
    billions = sum(p.numel() for p in model.parameters()) / 1e9 + (0.1125 if family == "flow" else 0)
    assert abs(billions / PAPER[family][variant] - 1) < 0.005


@eight
def test_no_attention_normalises_its_queries(family, variant):
    """Longer queries make every attention sharper: in none of the variants is there a QK-norm."""
    block, x = toy_block(family, variant), tokens()
    y = run_block(family, block, x)
    queries = [m for n, m in block.named_modules() if n.split(".")[-1] in ("q", "cross_q", "qkv")]
    assert len(queries) == ({"split": 4}.get(variant, 2) if family == "masked" else {"split": 3, **SETS}[variant])
    for m in queries:
        for p in (m.weight, m.bias):
            p.data[:D] *= 3
        assert (run_block(family, block, x) - y).abs().max() > 1e-3
        for p in (m.weight, m.bias):
            p.data[:D] /= 3


def test_layers_left_unshared():
    for variant in ("modality", "full"):
        for n, n_base in ((24, 4), (17, 4), (6, 1), (12, 3), (1, 1)):
            assert blocks.layer_variants(variant, n) == ["base"] * n_base + [variant] * (n - n_base)
    assert blocks.layer_variants("split", 5) == ["split"] * 5 and blocks.layer_variants("base", 5) == ["base"] * 5


# ---- configurations: wrong options end in a sentence


WRONG = [("masked", dict(width=40, n_head=4), "4 heads cannot share a width of 40"), ("masked", dict(rho_max=1.5), "rho_max"),
         ("masked", dict(rho_max=-0.1), "rho_max"), ("masked", dict(share_digits=True, levels=(4, 4)), "levels"),
         ("flow", dict(width=25), "heads"), ("flow", dict(time_width=7), "time_width"), ("flow", dict(patch=3), "patch"),
         ("flow", dict(p_drop=1.0), "p_drop"), ("flow", dict(p_drop=-0.1), "p_drop"), ("flow", dict(p_drop=math.nan), "p_drop"),
         ("flow", dict(t_sampling="normal"), "t_sampling.*uniform or logit-normal"), ("flow", dict(drop="none"), "drop"),
         *[(family, wrong, "|".join(wrong)) for family in FAMILIES for wrong in (
             dict(variant="joint"), dict(n_layer=0), dict(n_head=-2), dict(T_f=0), dict(checkpoint_activations="all"))]]


@pytest.mark.parametrize("family, wrong, sentence", WRONG)
def test_wrong_options_end_in_a_sentence(family, wrong, sentence):
    with pytest.raises(DataError, match=sentence):
        toy_model(family, **wrong)


@both
def test_every_option_says_what_it_is(family):
    """train.py makes a flag of each field: its help text, and its choices where the values are words."""
    module = masked_hwm if family == "masked" else flow_hwm
    for f in fields(module.Config):
        assert f.metadata["help"] and isinstance(f.default, f.type)
        if f.type is str:
            assert f.default == "" or f.default in f.metadata["choices"]


# ---- TRAPS 19: initialisation


def is_std(p, std):
    """Standard deviation within five of its standard errors, mean likewise."""
    n = p.numel()
    return abs(p.std() / std - 1) < 5 / math.sqrt(2 * n) and abs(p.mean()) < 5 * std / math.sqrt(n)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_statistics_masked(variant):
    torch.manual_seed(0)
    model = MaskedHWM(MaskedConfig(variant=variant, n_layer=2, n_head=2, width=128, hidden=256, vocab_size=500, H=4, W=4))
    special = {"mask_token": math.sqrt(2 / (1 + 128)), "out.weight": math.sqrt(2 / (128 + 500))}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            assert is_std(p, special.pop(name, 0.02)), name
        else:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
    assert not special


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_statistics_flow(variant):
    torch.manual_seed(0)
    model = FlowHWM(FlowConfig(variant=variant, n_layer=2, n_head=2, width=128, hidden=256, H=4, W=4, time_width=16, at_place=True))
    special, gates = {"out.weight": math.sqrt(2 / (128 + 64))}, 0
    for name, p in model.named_parameters():
        if name.startswith("at_place"):
            continue
        if p.ndim > 1:
            assert is_std(p, special.pop(name, 0.02)), name
        elif "modulation.linear.bias" in name:  # shift, scale, gate of each sub-layer
            for shift, scale, gate in p.view(-1, 3, 128):
                assert (shift == 0).all() and (scale == 0).all() and (gate == 1).all()
                gates += 1
        else:
            assert (p == 0).all(), name
    assert not special and gates == {"split": 2 * 2 * 2 + 2, "base": 16, "modality": 12, "full": 10}[variant]


# ---- two ways to the same answer


def test_temporal_attention_equals_copying_the_actions_to_every_place():
    B, h, T, S, N_a, d, g = 2, 2, 3, 4, 5, 6, generator()
    q, k, v = torch.randn(3, B, h, T * S, d, generator=g)
    q_a, k_a, v_a = torch.randn(3, B, h, N_a, d, generator=g)
    video, action = torch.zeros(B, h, T * S, d), torch.zeros(B, h, N_a, d)
    for s in range(S):
        at = slice(s, None, S)
        y = F.scaled_dot_product_attention(*(torch.cat([x[:, :, at], a], 2) for x, a in ((q, q_a), (k, k_a), (v, v_a))))
        video[:, :, at] = y[:, :, :T]
        action += y[:, :, T:] / S
    close(blocks.temporal_attention(q, k, v, k_a, v_a, S), video)
    close(blocks.temporal_attention(q[:, :, 2 * S :], k, v, k_a, v_a, S), video[:, :, 2 * S :])
    close(blocks.action_attention(q_a, k, v, k_a, v_a, S), action)


@pytest.mark.parametrize("n, d", [(209, 293), (600, 64)])
def test_attention_in_bfloat16_on_a_cpu(n, d):
    """In pieces, and to what bfloat16 can say: values and gradients against float64."""
    q, k, v, w = torch.randn(4, 1, 2, n, d, generator=generator())
    outs = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        y = blocks.attention(*leaves)
        assert y.dtype == dtype and y.shape == q.shape
        outs.append([y, *torch.autograd.grad((y * w.to(dtype)).sum(), leaves)])
    for a, b in zip(*outs):
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_action_attention_with_scores_that_exp_cannot_take():
    """Scores of several hundred: the logsumexp of the actions overflows nothing."""
    T, S, N_a, d, g = 2, 3, 4, 8, generator()
    q_a, k, v, k_a, v_a = (torch.randn(1, 1, n, d, generator=g) for n in (N_a, T * S, T * S, N_a, N_a))
    for scale_v, scale_a in ((400, 1), (1, 400), (400, 400)):
        expected = 0
        for s in range(S):
            keys, values = torch.cat([scale_v * k[:, :, s::S], scale_a * k_a], 2), torch.cat([v[:, :, s::S], v_a], 2)
            expected = expected + (q_a @ keys.mT / d**0.5).softmax(-1) @ values / S
        close(blocks.action_attention(q_a, scale_v * k, v, scale_a * k_a, v_a, S), expected, 1e-4)


def test_attention_within_frames_and_within_positions_by_the_plain_loop():
    """The split variant's spatial and temporal attention fold frames, or positions, into the batch."""
    block, layout = toy_block("masked", "split"), LAYOUT._replace(T_f=2)
    space, time = rope_of("masked", layout.positions(), layout)
    S, T = layout.S, layout.T
    video = torch.randn(2, T * S, D, generator=generator())
    in_space, in_time = video.clone(), video.clone()
    for t in range(T):
        at = slice(t * S, (t + 1) * S)
        in_space[:, at] += block.spatial(block.norm_s(video[:, at]), space)
    for s in range(S):
        at = slice(s, T * S, S)
        in_time[:, at] += block.temporal(block.norm_t(video[:, at]), time[:, at])
    close(block.attend_in_space(video, S, space), in_space)
    close(block.attend_in_time(video, S, time[:, : T * S]), in_time)


@pytest.mark.parametrize("sharing", ["base", "modality", "full"])
def test_per_set_by_hand(sharing):
    """Stream i of four, of length i, holds ones: set j multiplies them by j + 1."""
    x, sets = torch.ones(1, 6, 2), blocks.SHARING[sharing]
    functions = [lambda tokens, j=j: tokens * (j + 1) for j in range(max(sets) + 1)]
    expected = [sets[i] + 1.0 for i in range(4) for _ in range(i)]
    assert blocks.per_set(functions, x, sharing, (0, 1, 2, 3))[0, :, 0].tolist() == expected


@eight
@pytest.mark.parametrize("T_f", [1, 2])
def test_last_layer_is_the_future_of_a_full_layer(family, variant, T_f):
    layout = LAYOUT._replace(T_f=T_f)
    block, last, x = toy_block(family, variant), toy_block(family, variant, last=True), tokens(layout)
    last.load_state_dict(block.state_dict())
    close(run_block(family, last, x, layout), run_block(family, block, x, layout)[:, layout.future])


@both
@pytest.mark.parametrize("variant", ["modality", "full"])
@pytest.mark.parametrize("last", [False, True])
def test_sharing_is_base_with_equal_weights(family, variant, last):
    shared, base, x = toy_block(family, variant, last), toy_block(family, "base", last), tokens()
    name = "mlp" if family == "masked" else "sets"
    for i, j in enumerate(blocks.SHARING[variant]):
        getattr(base, name)[i].load_state_dict(getattr(shared, name)[j].state_dict())
    for m, part in base.named_children():
        if m != name:
            part.load_state_dict(getattr(shared, m).state_dict())
    close(run_block(family, shared, x), run_block(family, base, x))


@both
def test_base_has_a_set_of_weights_for_each_stream(family):
    """Changing one set changes, of a closed-attention block, that stream only."""
    block, x = toy_block(family, "base"), tokens()
    sets = block.mlp if family == "masked" else [w.mlp for w in block.sets]
    y = run_block(family, block, x).split(LAYOUT.lengths, dim=1)
    for i in range(4):
        sets[i][2].bias.data += 1
        z = run_block(family, block, x).split(LAYOUT.lengths, dim=1)
        assert [torch.equal(a, b) for a, b in zip(y, z)] == [j != i for j in range(4)]
        y = z


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
@pytest.mark.parametrize("n", [0, 7])
def test_linear_cross_entropy_is_the_plain_one(chunk, n):
    g = generator()
    h, w, b = (torch.randn(*s, generator=g).requires_grad_() for s in ((n, 4), (9, 4), (9,)))
    y = torch.randint(9, (n,), generator=g)
    ours = LinearCrossEntropy.apply(h, w, b, y, chunk)
    plain = F.cross_entropy(h @ w.T + b, y, reduction="sum")
    close(ours, plain)
    for a, e in zip(torch.autograd.grad(2.5 * ours, (h, w, b)), torch.autograd.grad(2.5 * plain, (h, w, b))):
        close(a, e)
    with torch.no_grad():
        close(LinearCrossEntropy.apply(h, w, b, y, chunk), plain)


@pytest.mark.parametrize("d", [8, 5, 293])
def test_filled_up_heads_attend_alike(d):
    q, k, v = torch.randn(3, 2, 2, 6, d, generator=generator(), requires_grad=True).unbind()
    plain = (q @ k.transpose(-1, -2) / d**0.5).softmax(-1) @ v
    close(blocks.attention(q, k, v), plain)


def test_what_blocks_add_up_stays_in_float32():
    """Under bfloat16 autocast products are bfloat16; 34 of them added in bfloat16 would lose what the first ones said."""
    model, (latents, actions) = toy_model("flow", "full"), toy_clips("flow")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(latents, actions, toy_draws(model))
    assert set(seen) == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("family, variant", [("masked", "base"), ("masked", "split")])
def test_compiled_blocks_have_the_same_loss_and_gradient(family, variant):
    """Compiled for real: torch 2.13 makes wrong kernels of attention over two frames in five dimensions, and of the last
    masked block's gradient, and says nothing."""
    torch.compiler.reset()
    model, clips = toy_model(family, variant, n_layer=2, width=64, n_head=4, hidden=128), toy_clips(family)
    found = []
    for step in (lambda: None, lambda: compile_blocks(model)):
        step()
        model.zero_grad()
        loss, _ = model(*clips, toy_draws(model))
        loss.backward()
        found.append([loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-6


def test_flops_are_those_of_the_textbook():
    """A layer more costs qkv, out, MLP and attention; the masked loss one product with the table where nobody asks for
    gradients. On the CPU, too, whose attention torch's own counter leaves out."""
    cost = {}
    for n in (3, 4):
        model, clips = toy_model("flow", "full", n_layer=n, n_head=3), toy_clips("flow")
        cost[n] = count_flops(lambda: model(*clips, toy_draws(model)))
    B, N, c = len(clips[0]), sum(model.layout.lengths), model.config
    layer = B * (2 * N * 4 * D * D + 4 * N * D * c.hidden + 4 * N * N * D + 2 * C * 6 * D)
    assert cost[4] - cost[3] == layer
    h, w, b = (torch.randn(*s).requires_grad_() for s in ((7, 4), (9, 4), (9,)))
    y = torch.zeros(7, dtype=torch.long)
    assert count_flops(lambda: LinearCrossEntropy.apply((h * 1), w, b, y)) == 2 * 7 * 4 * 9


def test_logits_where_asked_are_rows_of_the_full_table():
    model, (L, actions) = toy_model("masked"), toy_clips("masked", T=4)
    M = torch.rand(2, 2, 2, 3, generator=generator()) < 0.5
    table = model.out(model.features(L, M, actions)).view(2, 2, 2, 3, V)
    some = torch.rand(2, 2, 2, 3, generator=generator(1)) < 0.3
    close(model.logits(L, M, actions, where=some), table[some])
    close(model.logits(L, M, actions), table[M])


def test_masked_loss_is_cross_entropy_of_hidden_future_tokens():
    model, (L, actions) = toy_model("masked"), toy_clips("masked")
    draws = toy_draws(model)
    noisy, M = model.corrupt(L, draws)
    assert 0 < M.sum() < M.numel()
    total, count = model(L, actions, draws)
    close(total, F.cross_entropy(model.logits(noisy, M, actions), L[:, 2:][M], reduction="sum"), 1e-4)
    assert count == M.sum()


def test_corruption_by_hand():
    model, L = toy_model("masked"), torch.zeros(2, 3, 2, 3, dtype=torch.long)
    u = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.95]).view(2, 3)
    draws = {"rho": torch.tensor([0.1, 0.5]), "u_noise": u.expand(2, 3, 2, 3), "random_ids": torch.full((2, 3, 2, 3), 9),
             "r": torch.tensor([[0.0], [2 / 3]]), "u_mask": u.expand(2, 1, 2, 3)}
    noisy, M = model.corrupt(L, draws)
    assert (noisy == 9).sum((2, 3)).tolist() == [[1] * 3, [3] * 3], "past and future alike, at the rate rho"
    assert M.sum((1, 2, 3)).tolist() == [6, 3]  # gamma(0) = 1, gamma(2 / 3) = cos 60 deg = 0.5
    close(masked_hwm.gamma(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1, math.sqrt(0.5), 0]))


def test_masked_draws_have_the_documented_ranges():
    model, g = toy_model("masked", rho_max=0.2), generator()
    draws = [model.draw(g) for _ in range(500)]
    rho, r = (torch.stack([d[k] for d in draws]) for k in ("rho", "r"))
    assert rho.min() >= 0 and 0.19 < rho.max() <= 0.2 and abs(rho.mean() - 0.1) < 0.01
    assert r.min() < 0.01 and r.max() > 0.99
    ids = torch.stack([d["random_ids"] for d in draws])
    assert ids.min() == 0 and ids.max() == V - 1


@eight
def test_loss_is_the_same_however_the_batch_is_divided(family, variant):
    model, (video, actions) = toy_model(family, variant), toy_clips(family, B=3)
    draws = toy_draws(model, 3)
    total, count = model(video, actions, draws)
    parts = [model(video[i : i + 1], actions[i : i + 1], {k: v[i : i + 1] for k, v in draws.items()}) for i in range(3)]
    close(sum(p[0] for p in parts), total)
    assert sum(int(p[1]) for p in parts) == int(count)


@eight
def test_recomputing_activations_changes_nothing(family, variant):
    model, clips = toy_model(family, variant), toy_clips(family)
    draws, grads, flops = toy_draws(model), [], []
    for keep in ("", "products", "inputs"):
        model.config.checkpoint_activations = keep
        model.zero_grad()
        loss = model(*clips, draws)[0]
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))
    assert flops[0] == flops[1] < flops[2], "`products` multiplies no matrix twice, `inputs` does"
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused and all(p.requires_grad for p in model.parameters()), "DDP stops at a parameter without a gradient"


@eight
def test_weights_that_nobody_reads_get_a_zero_gradient(family, variant):
    """In the last layer only v_f goes on. What served the other streams from there counts in the paper's sizes, but does not
    learn: its slice of tokens is empty."""
    model, clips = toy_model(family, variant), toy_clips(family)
    model(*clips, toy_draws(model))[0].backward()
    still = {n.split(".", 2)[2] for n, p in model.named_parameters() if n.startswith("blocks.2.") and not p.grad.any()}
    parts = {"masked": {"base": ["mlp.0", "mlp.2", "mlp.3"], "modality": ["mlp.1"], "full": [], "split": []},
             "flow": {"base": [f"sets.{i}.{part}" for i in (0, 2, 3) for part in ("out", "mlp")],
                      "modality": ["sets.1.out", "sets.1.mlp"], "full": [], "split": ["sets.1.mlp"]}}[family][variant]
    assert {n for n in still if not n.endswith("qkv.bias")} == {
        n for n, _ in model.blocks[2].named_parameters() if any(n.startswith(part + ".") for part in parts)}


def test_the_split_sampler_computes_the_past_once(monkeypatch):
    """What v_f cannot change is remembered between questions: the same tokens as without a memory, from fewer products."""
    model, (L, actions) = toy_model("masked", "split"), toy_clips("masked", T=4)
    dream = lambda: model.sample(L[:, :2], actions, K=3, generator=generator())
    flops, remembered = count_flops(dream), dream()
    forgetful = model.features
    monkeypatch.setattr(model, "features", lambda L, M, actions, memory: forgetful(L, M, actions))
    assert torch.equal(dream(), remembered)
    assert count_flops(dream) > 1.3 * flops
    memory, M = [], torch.ones(2, 2, 2, 3, dtype=torch.bool)
    once = forgetful(L, M, actions, memory)
    close(once, forgetful(L, M, actions))
    assert len(memory) == len(model.blocks) and torch.equal(forgetful(L, M, actions, memory), once)


# ---- samplers: any number of future latents, guidance, determinism


@eight
@pytest.mark.parametrize("T_f", [1, 2, 3])
def test_sample_as_many_latents_as_there_are_actions_for(family, variant, T_f):
    model, (video, actions) = toy_model(family, variant), toy_clips(family, T=2 + T_f)
    past = video.narrow(video.ndim - 3, 0, 2)
    few = dict(K=2) if family == "masked" else dict(steps=2)
    first, again, other = (model.sample(past, actions, generator=generator(s), **few) for s in (0, 0, 1))
    assert first.shape == video.narrow(video.ndim - 3, 2, T_f).shape and first.dtype == video.dtype
    assert torch.equal(first, again) and not torch.equal(first, other)
    if family == "masked":
        assert 0 <= first.min() and first.max() < V


@pytest.mark.parametrize("drop", ["both", "past", "actions"])
def test_guidance_goes_from_unconditional_to_conditional(drop):
    model, (video, actions) = toy_model("flow", drop=drop, at_place=True), toy_clips("flow")
    past = video[:, :, :2]
    g = generator()
    X_0 = torch.stack([torch.randn(3, 1, 4, 6, generator=g) for _ in range(2)])  # each clip draws its own
    no, t = torch.zeros(2, dtype=torch.bool), torch.zeros(1)
    u = model.velocity(X_0, t, past, actions)
    u_0 = model.velocity(X_0, t, past, actions, no)
    assert (u - u_0).abs().max() > 1e-3
    for cfg in (0.0, 1.0, 3.0):
        X_1 = model.sample(past, actions, steps=1, cfg=cfg, generator=generator())
        close(X_1, X_0 + u_0 + cfg * (u - u_0), 1e-4)


@pytest.mark.parametrize("which", ["past", "actions"])
def test_a_dropped_condition_is_gone(which):
    """Of both clips only the second keeps it: the first then does not depend on it, the second does."""
    model, (video, actions) = toy_model("flow", at_place=True, drop=which), toy_clips("flow")
    kept, t, X_t = torch.tensor([False, True]), torch.tensor([0.2, 0.7]), video[:, :, 2:]

    def velocity(factor):
        p, a = (video[:, :, :2] * factor, actions) if which == "past" else (video[:, :, :2], actions * factor)
        return model.velocity(X_t, t, p, a, kept)

    change = (velocity(1.0) - velocity(-2.0)).abs().amax((1, 2, 3, 4))
    assert change[0] == 0 and change[1] > 1e-3
    model.config.drop = "both"
    assert (velocity(1.0)[0] - model.velocity(X_t, t, video[:, :, :2], actions, kept)[0]).abs().max() == 0
    model.config.drop = {"past": "actions", "actions": "past"}[which]
    assert (velocity(1.0) - velocity(-2.0)).abs().amax((1, 2, 3, 4))[0] > 1e-3, "the other condition is dropped now"


def test_conditions_are_dropped_at_the_documented_rate():
    model, g = toy_model("flow", p_drop=0.15), generator()
    kept = torch.stack([model.draw(g)["kept"] for _ in range(4000)]).float().mean()
    assert abs(kept - 0.85) < 0.02
    assert torch.stack([toy_model("flow", p_drop=0.0).draw(g)["kept"] for _ in range(20)]).all()


def test_a_model_that_never_dropped_its_conditions_is_not_guided():
    model, (video, actions) = toy_model("flow", p_drop=0.0), toy_clips("flow")
    model.sample(video[:, :, :2], actions, steps=1, cfg=1.0)
    with pytest.raises(DataError, match="p_drop 0"):
        model.sample(video[:, :, :2], actions, steps=1, cfg=3.0)


# ---- statistics and shapes


@both
def test_actions_enter_standardised(family):
    model, (video, actions) = toy_model(family, at_place=True), toy_clips(family)
    draws = toy_draws(model)
    expected = model(video, actions, draws)[0]
    mean, std = torch.arange(A) * 1.0, torch.tensor([2.0, 0.5, 1, 3, 1])
    model.set_statistics(mean, std, *([torch.zeros(3), torch.ones(3)] if family == "flow" else []))
    close(model(video, actions * std + mean, draws)[0], expected, 1e-4)
    assert torch.equal(model.state_dict()["standardise_actions.std"], std), "statistics travel with the weights"


def test_latents_are_standardised_per_channel():
    model, (video, actions) = toy_model("flow"), toy_clips("flow")
    draws, mean, std = toy_draws(model), torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 2, 4])
    expected = model(video, actions, draws)[0]
    model.set_statistics(torch.zeros(A), torch.ones(A), mean, std)
    raw = video * std.view(1, 3, 1, 1, 1) + mean.view(1, 3, 1, 1, 1)
    close(model.standardise_latents(raw), video)
    close(model.standardise_latents.inverse(model.standardise_latents(raw)), raw)
    close(model(raw, actions, draws)[0], expected, 1e-4)


def test_patchify_by_hand():
    model = toy_model("flow")
    X = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    y = model.patchify(X)
    assert y.shape == (2, 2 * 2 * 3, 12)
    assert torch.equal(y[1, 6 + 3 + 2], X[1, :, 1, 2:4, 4:6].flatten())  # frame 1, patch row 1, column 2
    assert torch.equal(model.unpatchify(y), X)


class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes a float64, as Apple's GPU does."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        assert not any(torch.is_tensor(x) and x.dtype == torch.float64 for x in tree_leaves(out)), f
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@both
def test_nothing_is_float64(family, variant):
    """Loss, gradient, update and sampler, with all that the tiny presets add."""
    extra = dict(share_digits=True, levels=(11,)) if family == "masked" else {}
    model, (video, actions) = toy_model(family, variant, at_place=True, **extra), toy_clips(family)
    optimizer, draws = torch.optim.AdamW(model.parameters(), fused=True), toy_draws(model)
    blocks.flow_rope.cache_clear(), blocks.masked_rope.cache_clear()
    with NoFloat64():
        model(video, actions, draws)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        past = video[:, :2] if family == "masked" else video[:, :, :2]
        model.sample(past, actions, **(dict(order="confidence") if family == "masked" else dict(steps=2, cfg=2.0)))
    with pytest.raises(AssertionError), NoFloat64():
        torch.ones(1).double()


@pytest.mark.parametrize("module", [blocks, masked_hwm, flow_hwm])
def test_run_me(module, capsys):
    """Their docstrings promise a walk through the file, with shapes."""
    assert f"`python {os.path.basename(module.__file__)}`" in inspect.getdoc(module)
    runpy.run_path(os.path.abspath(module.__file__), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compile_without_a_graph_break(family, variant):
    """fullgraph=True makes a graph break an error; the backend that changes nothing keeps the test quick."""
    torch.compiler.reset()
    for last in (False, True):
        block, x = toy_block(family, variant, last), tokens()
        plain = run_block(family, block, x)
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
        close(run_block(family, block, x), plain)
