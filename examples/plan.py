"""Plan: drive to the place where an image was taken, by dreaming of many commands and carrying out the best.

    python sample.py --ckpt weights/masked_base_tiny.pt --plan --num 3  # three problems, as pictures
    python evaluate.py --ckpt weights/masked_base_tiny.pt --plan        # forty, and their regret

A *problem* is nine past frames, their states and the image of a goal (`plan_problem`). A *command* is a speed
of driving and one of turning, held for a window of eight frames (`commanded`). The *cross-entropy method*
tries commands, keeps the best six, its elite, and draws the next tries around them (`plan`). A try is judged
by its last frame, which the model dreams (`plan_by_model`) and an oracle looks up in the true world. Then the
best command is carried out in the true world, and *regret* compares what is left of the way with what the
oracle and a robot at rest leave (`regret`). Commands are (n, horizon, 2), images (H, W, 3) uint8.
"""
import copy
import math

import numpy as np
import torch
from tqdm import tqdm

from data import FRAMES, FUTURE, PAST
from evaluate import gather, print_row
from examples import robot
from sample import continue_video, noise_of, to_latents
from tokenizer import DataError, rank_and_world, to_uint8, to_video

# ---- commands, and what they do to the true world ------------------------------------------------

COMMANDS = np.array([(-0.25, -0.5), (0.35, 0.5)])  # least and greatest drive (m/s) and turn (radians/s)

def commanded(commands, states):
    """Commands (n, horizon, 2) of drive and turn, each for eight frames -> the states (n, 8 horizon, 25) that
    follow the past `states` (9, 25). As in sample.change_actions, the base starts from rest and ramps to its
    command within four frames; all other joints hold still."""
    ramp = np.linspace(0.25, 2, FUTURE).clip(max=1)[:, None]
    n, horizon, _ = commands.shape
    commands = np.pad(commands, ((0, 0), (1, 0), (0, 0)))[:, :, None]  # rest comes first
    before, now = commands[:, :-1], commands[:, 1:]
    velocity = before + ramp * (now - before)  # (n, horizon, 8, 2)
    future = np.tile(states[-1], (n, horizon * FUTURE, 1))
    future[:, :, [robot.DRIVE, robot.TURN]] = velocity.reshape(n, -1, 2)
    return future

def follow(world, states, size=16):
    """-> a copy of the true world after `states` (n, 25), and what is then seen (size, size, 3)."""
    world = copy.deepcopy(world)
    for state in states:
        arms = robot.robot_step(world, state)
    return world, robot.robot_view(world, arms, state, size)

def distance(world, goal):
    """Between the bases of two true worlds: (centimetres, degrees)."""
    turned = math.remainder(world.pose[2] - goal.pose[2], 2 * math.pi)
    return 100 * math.dist(world.pose[:2], goal.pose[:2]), abs(math.degrees(turned))

# ---- a problem: where the robot is, and what it shall see ----------------------------------------

FIRST_PROBLEM = 3_000_000_000  # as a seed, it lies above those of all recordings

def plan_problem(seed, horizon=1, size=64):
    """-> what a planner sees: nine past frames, their states and the image of the goal; and what it does not
    see: the true worlds at the start and at the goal, to which hidden commands lead. They are drawn again
    while it lies within 5 cm and 5 degrees of the start, or where the floor has ended."""
    rng = np.random.default_rng(FIRST_PROBLEM + seed)
    world = robot.robot_world(rng)
    states = robot.robot_plan(rng, world, 40)
    before, states = states[:-PAST], states[-PAST:]
    world, _ = follow(world, before)
    frames = robot.robot_render(states, world, size)
    start, _ = follow(world, states)
    near = floor = True
    while near or not floor:
        hidden = rng.uniform(*COMMANDS, (1, horizon, 2))
        there, goal = follow(start, commanded(hidden, states)[0], size)
        near, floor = max(distance(start, there)) < 5, robot.is_free_floor(*there.pose[:2])
    return (frames, states, goal), (start, there)

def check_built_in(saved):
    """DataError where the true world of the checkpoint's robot is not known."""
    if "built_in" not in saved["data"]:
        raise DataError("--plan acts in the true world of the built-in robot, but the checkpoint was trained "
                        f"on {saved['data'].get('path')}: give one that was trained without --data")

# ---- the search: the cross-entropy method --------------------------------------------------------

ROUNDS, TRIES, ELITE = 3, 24, 6

def plan(imagine, goal, horizon=1, seed=0):
    """The cross-entropy method (Rubinstein, 1999) -> the commands (horizon, 2) that lead to the image `goal`.
    imagine: commands (n, horizon, 2) -> the last frame after each (n, H, W, 3). What shall be small is the
    mean square of the pixels' differences. It asks for nothing but tries: no gradient, and no more of the
    world than its picture."""
    # 1. The first tries lie anywhere. One of them is rest: it wins where all look the same.
    rng = np.random.default_rng(seed)
    tries = rng.uniform(*COMMANDS, (TRIES, horizon, 2))
    tries[0] = 0
    tried, errors = [], []
    for _ in range(ROUNDS):
        # 2. What would be seen at the end of each, and how unlike the goal is it?
        difference = np.float32(imagine(tries)) - goal
        tried.extend(tries)
        errors.extend(np.square(difference).mean((1, 2, 3)))
        # 3. The elite: the best of all rounds so far, the very best first.
        best = np.argsort(errors, kind="stable")[:ELITE]
        elite = np.array(tried)[best]
        # 4. The next tries are drawn from a Gaussian with the elite's mean and spread. The better its members
        #    agree, the closer the search looks.
        tries = rng.normal(elite.mean(0), elite.std(0), (TRIES, horizon, 2)).clip(*COMMANDS)
    return elite[0]

# ---- the search in a dream -----------------------------------------------------------------------

def through(tokenizer, films):
    """Films (n, F, H, W, 3) uint8 as they leave the tokenizer."""
    films = torch.from_numpy(films).to(next(tokenizer.parameters()).device)
    latents = tokenizer.encode(to_video(films))
    return to_uint8(tokenizer.decode(latents).cpu()).numpy()

def plan_by_model(model, tokenizer, frames, states, goal, horizon=1, seed=0, **settings):
    """The commands (horizon, 2) by which the model dreams itself nearest to the goal, and that dream
    (8 horizon, H, W, 3). All dreams have the same noise, so that they differ by their commands alone."""
    past, known = to_latents(torch.from_numpy(frames), tokenizer), torch.from_numpy(states)

    def imagine(commands):
        future = torch.from_numpy(commanded(commands, states))
        n = len(future)
        actions = torch.cat([known.expand(n, -1, -1), future], dim=1)
        return continue_video(model, tokenizer, past.expand(n, *past.shape[1:]), actions, horizon,
                              noise_of([seed] * n), **settings).numpy()

    goal = through(tokenizer, goal[None, None])[0, 0]
    commands = plan(lambda tries: imagine(tries)[:, -1], goal, horizon, seed)
    return commands, imagine(commands[None])[0]

def plan_rows(model, tokenizer, num=3, horizon=1, seed=0, **settings):
    """`num` problems -> the rows of a picture: {"start": (num, 9, H, W, 3), "goal": .., "the plan": as it was
    dreamt, "the truth": what came of it}."""
    rows = {"start": [], "goal": [], "the plan": [], "the truth": []}
    for i in range(seed, seed + num):
        seen, (start, there) = plan_problem(i, horizon, model.config.W * tokenizer.spatial)
        frames, states, goal = seen
        commands, dreamt = plan_by_model(model, tokenizer, *seen, horizon, i, **settings)
        future = commanded(commands[None], states)[0]
        end, _ = follow(start, future)
        print("problem {}: {:.1f} cm and {:.1f} degrees from the goal; after the plan {:.1f}, {:.1f}".format(
            i, *distance(start, there), *distance(end, there)))
        happened = robot.robot_render(future, start, len(goal))
        for row, film in zip(rows.values(), (frames, goal[None], dreamt, happened)):
            row.append(film)
    return {row: np.stack(films) for row, films in rows.items()}

# ---- how good are the plans? ---------------------------------------------------------------------

PLANS = {  # a row's key: its line in the table
    "model": "model", "still": "do nothing", "random": "a random command",
    "oracle": "oracle: searches in the true world",  # as the model searches in its dreams
    "oracle_tokenizer": "oracle behind the tokenizer"}  # no model of these latents should do better

def plan_episode(model, tokenizer, seed, horizon=1, **settings):
    """{row of PLANS: (centimetres, degrees) from the goal once its commands were carried out in the true
    world}. All that search do so with the same tries."""
    seen, (start, there) = plan_problem(seed, horizon, model.config.W * tokenizer.spatial)
    frames, states, goal = seen

    def true_last(tries):
        return np.stack([follow(start, future, len(goal))[1] for future in commanded(tries, states)])

    def true_last_through_tokenizer(tries):
        films = []
        for future in commanded(tries, states):
            film = np.concatenate([frames, robot.robot_render(future, start, len(goal))])
            films.append(film[-FRAMES:])  # the last window
        return through(tokenizer, np.stack(films))[:, -1]

    goal_through = through(tokenizer, goal[None, None])[0, 0]
    chosen = {"model": plan_by_model(model, tokenizer, *seen, horizon, seed, **settings)[0],
              "still": np.zeros((horizon, 2)),
              "random": np.random.default_rng(seed).uniform(*COMMANDS, (horizon, 2)),
              "oracle": plan(true_last, goal, horizon, seed),
              "oracle_tokenizer": plan(true_last_through_tokenizer, goal_through, horizon, seed)}
    errors = {}
    for row, commands in chosen.items():
        end, _ = follow(start, commanded(commands[None], states)[0])
        errors[row] = np.array(distance(end, there))
    return errors

def regret(model, still, oracle, n=10_000, seed=0):
    """Errors (episodes,) of three rows -> R = (E_model - E_oracle) / (E_still - E_oracle), E being means, and
    its 95 % bootstrap interval over episodes (None below eight). R is 0 for a model that serves as well as
    the true world, 1 for one that serves no better than doing nothing; None where both are the same."""
    drawn = np.random.default_rng(seed).integers(len(model), size=(n, len(model)))
    drawn[0] = range(len(model))  # the first row is the episodes themselves
    lost, possible = (model - oracle)[drawn].mean(1), (still - oracle)[drawn].mean(1)
    if possible[0] == 0:
        return None, None
    R = lost[possible != 0] / possible[possible != 0]
    return float(R[0]), np.percentile(R, [2.5, 97.5]).tolist() if len(model) >= 8 else None

def evaluate_plans(model, tokenizer, episodes=40, horizon=1, seed=0, **settings):
    """All numbers of planning as a dict, the keys as in --json. The episodes are divided among the ranks."""
    rank, world = rank_and_world()
    found = {}
    for j in tqdm(range(rank, episodes, world), desc="planning", unit="episode", disable=rank > 0):
        found[j] = plan_episode(model, tokenizer, seed + j, horizon, **settings)
    table = gather(found)  # {row: (episodes, 2)}
    out = {"episodes": episodes, "horizon": horizon, "settings": {**settings, "seed": seed}}
    for column, quantity in enumerate(("position_cm", "heading_deg")):
        errors = {row: table[row][:, column] for row in PLANS}
        out[quantity] = {row: float(errors[row].mean()) for row in PLANS}
        name = f"regret_{quantity.split('_')[0]}"
        out[name], out[f"{name}_ci"] = regret(errors["model"], errors["still"], errors["oracle"])
    out["success"] = {row: float((table[row].max(1) < 5).mean()) for row in PLANS}  # 5 cm and 5 degrees
    return out

def print_plans(s):
    print(f"\n{s['episodes']} episodes, goals {FUTURE * s['horizon']} frames away; mean errors, and how "
          f"often they were below 5 cm and 5 degrees\n{'':37}  cm degrees success")
    for row, label in PLANS.items():
        print_row(label, s["position_cm"][row], s["heading_deg"][row], s["success"][row])
    print("regret, 0: as good as the true world, 1: as doing nothing; with 95 % intervals over episodes")
    for name in ("position", "heading"):
        print_row(f"R of {name}", s[f"regret_{name}"], s[f"regret_{name}_ci"])
