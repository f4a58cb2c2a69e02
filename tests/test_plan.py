"""examples/plan.py: the search, its problems, what the planner sees, and the numbers of evaluate.py --plan."""
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from conftest import TOY_PRESET
from data import open_clips
from examples import pictures, plan as planning, robot
from examples.plan import COMMANDS, commanded, distance, follow, plan, plan_by_model, plan_problem, regret
from flow_hwm import FlowConfig, FlowHWM
from masked_hwm import MaskedConfig, MaskedHWM
from sample import change_actions
from tokenizer import load_tokenizer

SETTINGS = {"masked": dict(K=1, temperature=0.0), "flow": dict(steps=1, cfg=1.0)}


def toy_parts(name, toy):
    torch.manual_seed(0)
    if name == "masked":
        model = MaskedHWM(MaskedConfig(**TOY_PRESET, variant="base", vocab_size=64, H=4, W=4))
    else:
        model = FlowHWM(FlowConfig(**TOY_PRESET, time_width=16, channels=4, patch=1, H=4, W=4))
    model = model.eval().requires_grad_(False)
    return model, load_tokenizer(f"{toy}/{dict(masked='dv', flow='cv')[name]}.pt")


class EveryEighth:
    """A tokenizer whose latents are the frames 0, 8, 16 .. themselves."""
    kind, spatial = "continuous", 1

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, video):
        return video[:, :, ::8]

    def decode(self, latents):
        return latents.repeat_interleave(8, dim=2)[:, :, 7:]


class Stub:
    """A model of EveryEighth's latents (B, 3, T, 16, 16) that knows the true world, or is blind."""
    config = SimpleNamespace(W=16, T_p=2)
    layout = SimpleNamespace(T_p=2, lengths=(0, 0, 9, 8))

    def __init__(self, knows):
        self.knows, self.told = knows, []

    def parameters(self):
        return iter([torch.zeros(1)])

    def sample(self, past, actions, generator):
        assert len({noise.initial_seed() for noise in generator}) == 1, "the tries differ by their commands alone"
        assert past.shape[2] == 2 and actions.shape[1:] == (17, 25)
        self.told.append(actions.numpy())
        if not self.knows:
            return past[:, :, -1:]
        frames = [follow(self.world, a[9:].numpy(), 16)[1] for a in actions]
        return sample.to_video(torch.from_numpy(np.stack(frames))[:, None])


def stub_episodes(stub, monkeypatch, n, **kw):
    def problem_of(*args):
        problem = plan_problem(*args)
        stub.world, _ = problem[1]
        return problem

    monkeypatch.setattr(planning, "plan_problem", problem_of)
    return planning.evaluate_plans(stub, EveryEighth(), n, **kw)


# ---- problems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2])
def test_standing_still_never_succeeds_and_goals_are_reachable(horizon):
    for seed in range(12):
        (frames, states, goal), (start, there) = plan_problem(seed, horizon, 16)
        at_rest, _ = follow(start, commanded(np.zeros((1, horizon, 2)), states)[0])
        assert max(distance(at_rest, there)) >= 5
        assert distance(start, there)[0] <= 28 * horizon  # 0.35 m/s for less than 0.8 s a window
        assert robot.is_free_floor(*there.pose[:2])
        assert frames.shape == (9, 16, 16, 3) and goal.shape == (16, 16, 3) and states.shape == (9, 25)


def test_a_problem_continues_its_own_past_and_is_fixed_by_its_seed():
    (seen, _), (again, _), (other, _) = (plan_problem(seed, 1, 16) for seed in (3, 3, 4))
    assert all((a == b).all() and (a != c).any() for a, b, c in zip(seen, again, other))
    (frames, states, _), (start, _) = plan_problem(3, 1, 16)
    _, view = follow(start, commanded(np.zeros((1, 1, 2)), states)[0])  # at rest the view stays
    assert np.abs(view - frames[-1].astype(int)).mean() < 3


def test_distance_by_hand():
    at = lambda *pose: SimpleNamespace(pose=np.array(pose))
    assert distance(at(1, 2, 0.1), at(1.03, 2.04, 0.1)) == pytest.approx((5, 0))
    assert distance(at(0, 0, 3.1), at(0, 0, -3.1)) == pytest.approx((0, np.degrees(2 * np.pi - 6.2)))


def test_commands_are_the_motions_of_change_actions(toy):
    """Rest is "frozen", a turn is "turn_left": the ramp, the other joints, and two windows."""
    model, _ = toy_parts("flow", toy)
    clips = open_clips(f"{toy}/raw", "val")
    model.standardise_actions.mean.zero_()
    model.standardise_actions.std.fill_(0.2)
    actions = clips[0]["actions"]
    for command, name in (((0, 0), "frozen"), ((0, 0.4), "turn_left"), ((0.4, 0), "drive")):
        want = change_actions(name, actions, model, clips)[9:]
        got = commanded(np.array([[command]]), actions[:9].numpy())
        np.testing.assert_allclose(got[0], want, atol=1e-6)
    two = commanded(np.array([[(0.2, 0), (0.4, 0)]]), actions[:9].numpy())[0, :, robot.DRIVE]
    np.testing.assert_allclose(two, [.05, .1, .15, .2, .2, .2, .2, .2, .25, .3, .35, .4, .4, .4, .4, .4],
                               atol=1e-6)


def test_commands_lie_within_the_training_data():
    rng, driven = np.random.default_rng(0), []
    for _ in range(20):
        driven.append(robot.robot_plan(rng, robot.robot_world(rng), 100)[:, [robot.DRIVE, robot.TURN]])
    low, high = np.percentile(np.concatenate(driven), [1, 99], axis=0)
    assert (low <= COMMANDS[0] + 0.03).all() and (COMMANDS[1] <= high + 0.03).all()


# ---- the search and what it sees -------------------------------------------------------------------------


def test_the_search_finds_a_command_and_rests_where_all_look_the_same():
    seen = []

    def imagine(tries):
        """An image (1, horizon, 2) that is the commands themselves."""
        seen.append(tries)
        return 100 * tries[:, None]

    for hidden in ([(0.35, -0.5)], [(0.2, -0.3)], [(0.1, 0.2), (-0.1, 0.4)]):
        found = plan(imagine, 100 * np.array([hidden]), len(hidden))
        assert np.abs(found - hidden).max() < 0.05 * len(hidden) ** 2
        assert (found == plan(imagine, 100 * np.array([hidden]), len(hidden))).all()
    assert all((COMMANDS[0] <= tries).all() and (tries <= COMMANDS[1]).all() for tries in seen)
    rest = plan(lambda tries: np.zeros((len(tries), 4, 4, 3), np.uint8), np.full((4, 4, 3), 9), 2)
    assert (rest == 0).all()


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_the_planner_sees_images_and_past_actions_only(name, toy, monkeypatch):
    """The world is out of its reach, and a change of the world that no pixel shows changes nothing."""
    model, tokenizer = toy_parts(name, toy)
    seen, worlds = plan_problem(0, 1, 32)
    taken = lambda: plan_by_model(model, tokenizer, *seen, 1, 5, **SETTINGS[name])
    commands, dreamt = taken()
    for forbidden in ("robot_step", "robot_view", "robot_render", "RobotWorld"):
        monkeypatch.setattr(robot, forbidden, None)
    for world in worlds:
        world.pose += 1
        world.objects += 1
    again, _ = taken()
    assert (again == commands).all(), "same seed, same plan"
    assert commands.shape == (1, 2) and dreamt.shape == (8, 32, 32, 3) and dreamt.dtype == np.uint8
    assert (COMMANDS[0] <= commands).all() and (commands <= COMMANDS[1]).all()


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_candidates_of_an_episode_share_their_noise(name, toy):
    """So the copies of one command look the same, in every round; without that noise they do not."""
    model, tokenizer = toy_parts(name, toy)
    (frames, *_), _ = plan_problem(0, 1, 32)
    past = sample.to_latents(torch.from_numpy(frames), tokenizer)
    past, actions = past.expand(5, *past.shape[1:]), torch.full((5, 17, 25), 0.3)

    def dreams(noise):
        return model.sample(past, actions, generator=noise, **{**SETTINGS[name], **warm}).float()

    warm = dict(temperature=1.0) if name == "masked" else {}
    same, other = dreams(sample.noise_of([0] * 5)), dreams(torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, same[:1].expand_as(same))
    assert (other - other[:1]).abs().max() > 0.1


def test_two_windows(toy):
    model, tokenizer = toy_parts("masked", toy)
    seen, _ = plan_problem(0, 2, 32)
    commands, dreamt = plan_by_model(model, tokenizer, *seen, 2, **SETTINGS["masked"])
    assert commands.shape == (2, 2) and dreamt.shape == (16, 32, 32, 3)


# ---- the rows and their numbers --------------------------------------------------------------------------


def test_a_model_that_knows_the_world_has_no_regret(monkeypatch):
    monkeypatch.setattr(planning, "ROUNDS", 2)
    monkeypatch.setattr(planning, "TRIES", 8)
    stub = Stub(knows=True)
    s = stub_episodes(stub, monkeypatch, 8)
    assert [s["regret_position"], s["regret_heading"]] == pytest.approx([0, 0], abs=0.05)
    assert s["success"]["still"] == 0 and s["success"]["model"] == s["success"]["oracle"] > 0
    told = np.concatenate(stub.told)[:, 9:, [robot.DRIVE, robot.TURN]]
    assert (COMMANDS[0] - 1e-6 <= told).all() and (told <= COMMANDS[1] + 1e-6).all()


def test_a_blind_model_regrets_all_of_it(monkeypatch):
    monkeypatch.setattr(planning, "ROUNDS", 1)
    monkeypatch.setattr(planning, "TRIES", 20)
    s = stub_episodes(Stub(knows=False), monkeypatch, 8)
    for name in ("position", "heading"):
        low, high = s[f"regret_{name}_ci"]
        assert low <= 1 <= high and s[f"regret_{name}"] == pytest.approx(1)
    assert s["success"]["model"] == 0
    for errors in (s["position_cm"], s["heading_deg"]):
        assert errors["oracle"] < errors["still"] == errors["model"]


def test_regret_by_hand():
    still, oracle = np.array([10.0, 20] * 8), np.array([2.0, 4] * 8)
    R, (low, high) = regret((still + oracle) / 2, still, oracle)
    assert (R, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert regret(still, still, oracle)[0] == 1 and regret(oracle, still, oracle)[0] == 0
    R, (low, high) = regret(oracle + np.tile([8.0, 0], 8), still, oracle)  # means: (8 + 0) / (8 + 16)
    assert R == pytest.approx(1 / 3) and low < R < high < 1
    assert regret(still[:7], still[:7], oracle[:7])[1] is None
    assert regret(still, still, still) == (None, None)


# ---- commands --------------------------------------------------------------------------------------------


def checkpoint(tmp_path, toy, built_in=True):
    model, _ = toy_parts("masked", toy)
    data = {"path": "data/mine", **({"built_in": {"frames": 100}} if built_in else {})}
    saved = {"ema": model.state_dict(), "step": 1, "model_config": asdict(model.config), "data": data,
             "tokenizer": {"path": f"{toy}/dv.pt", "spatial": 8},
             "config": {"model": "masked", "variant": "base", "preset": "tiny"}}
    torch.save(saved, f"{tmp_path}/ckpt.pt")
    return f"{tmp_path}/ckpt.pt"


def test_evaluate_plan_writes_its_keys(tmp_path, toy, monkeypatch, capsys):
    file = checkpoint(tmp_path, toy)
    monkeypatch.setattr(planning, "ROUNDS", 1)
    monkeypatch.setattr(planning, "TRIES", 6)
    evaluate.main(["--ckpt", file, "--plan", "--episodes", "3", "--steps", "1", "--device", "cpu",
                   "--json", f"{tmp_path}/s.json"])
    s = json.load(open(f"{tmp_path}/s.json"))
    assert s["episodes"] == 3 and s["model"] == "masked" and s["regret_position_ci"] is None
    for key in ("position_cm", "heading_deg", "success"):
        assert set(s[key]) == {"model", "still", "random", "oracle", "oracle_tokenizer"}
    assert {"regret_position", "regret_heading", "regret_heading_ci"} <= s.keys()
    assert s["success"]["still"] == 0
    said = capsys.readouterr().out
    assert "do nothing" in said and "R of heading" in said


def test_sample_plan_draws_a_gif_and_a_png(tmp_path, toy, monkeypatch, capsys):
    monkeypatch.setattr(planning, "ROUNDS", 1)
    monkeypatch.setattr(planning, "TRIES", 6)
    sample.main(["--ckpt", checkpoint(tmp_path, toy), "--plan", "--num", "2", "--steps", "1", "--device", "cpu",
                 "--out", f"{tmp_path}/o"])
    with Image.open(f"{tmp_path}/o/plan.gif") as gif:
        assert gif.n_frames == 17 and gif.width == 4 * (128 + pictures.GAP)
    assert Image.open(f"{tmp_path}/o/plan.png").height == 8 * (128 + pictures.GAP)
    assert capsys.readouterr().out.count("after the plan") == 2


@pytest.mark.parametrize("module", [sample, evaluate])
def test_another_robot_is_refused_in_a_sentence(module, tmp_path, toy):
    with pytest.raises(SystemExit, match="built-in robot.*data/mine"):
        module.main(["--ckpt", checkpoint(tmp_path, toy, built_in=False), "--plan", "--device", "cpu"])


@pytest.mark.parametrize("flags", [["--episodes", "0"], ["--horizon", "0"]])
def test_numbers_that_make_no_sense(flags, tmp_path, toy):
    with pytest.raises(SystemExit, match="makes no sense"):
        evaluate.main(["--ckpt", checkpoint(tmp_path, toy), "--plan", "--device", "cpu", *flags])


def test_under_torchrun_each_episode_is_planned_once(monkeypatch):
    planned = []

    def gather(found):
        return {row: np.ones((4, 2)) * (row == "still") for row in planning.PLANS}

    monkeypatch.setattr(planning, "plan_episode", lambda model, tokenizer, seed, horizon: planned.append(seed))
    monkeypatch.setattr(planning, "gather", gather)
    for rank in (0, 1):
        monkeypatch.setattr(planning, "rank_and_world", lambda: (rank, 2))
        planning.evaluate_plans(None, None, 5, seed=10)
    assert sorted(planned) == [10, 11, 12, 13, 14]
