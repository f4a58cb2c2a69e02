"""The built-in robot: what a small humanoid sees while it drives about a room and handles things on a table.

A robot of yours takes its place with four functions: a world to start from (`robot_world`), its motion
(`robot_plan`), what a state does to the world (`robot_step`) and what the camera sees of it (`robot_view`,
drawn by examples/room.py). `synth` makes a data folder of them; play and planning step this true world beside
a model's dream of it.

A state is the 25 numbers of the 1X data (data.JOINTS), in radians and metres a second. State k belongs to
frame k; its velocities carry the base from frame k - 1 to frame k. Lengths are metres; x and y lie on the
floor, z points up. In the body frame x points forward and y to the left. Images are uint8 RGB.
"""
import copy
import functools
import math
from dataclasses import dataclass, field

import numpy as np

from data import FRAMES, DataError
from examples.room import ROOM, TABLE, take_picture
from examples.shards import make_split

HZ = 10
NECK, LEFT_HAND, RIGHT_HAND, DRIVE, TURN = range(20, 25)  # columns of a state
HANDS, ARMS = [LEFT_HAND, RIGHT_HAND], [list(range(6, 13)), list(range(13, 20))]  # left, right

# ---- the body ------------------------------------------------------------------------------------
EYE, SHOULDER = (0.08, 0.0, 1.45), (0.0, 0.21, 1.22)  # in the body frame; the right shoulder lies at -y
UPPER_ARM, FOREARM, PALM, FINGER = 0.27, 0.25, 0.09, 0.06
GRIP = np.array([0, 0, 0.06])  # an object is held this far above its base
STANDING = np.array([0, 0, -0.20, 0.40, 0, -0.20] + 19 * [0])  # a state: hip, knee and ankle bent, all else 0
ARM_REST = np.array([0.45, 0.10, 0.15, 1.15, 0, 0.10, 0])  # of the seven joints, from the shoulder down
ARM_RANGE = np.array([0.55, 0.35, 0.55, 0.60, 0, 0.45, 0])  # half the range of their random targets
ARM_MOVES = np.flatnonzero(ARM_RANGE)

def rotation(axis, angle):
    """Rotation matrices (..., 3, 3) about body axis 0, 1 or 2 by angles (...)."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((*np.shape(angle), 3, 3))
    matrix[..., axis, axis] = 1
    matrix[..., i, i] = matrix[..., j, j] = np.cos(angle)
    matrix[..., j, i] = np.sin(angle)
    matrix[..., i, j] = -matrix[..., j, i]
    return matrix

def arm_points(angles, side):
    """Forward kinematics. angles (..., 7), side (...) +1 left, -1 right -> (..., 6, 3) in the body frame:
    shoulder, elbow, wrist, palm, grip point, and the hand's sideways unit vector. At angle 0 an arm hangs."""
    pitch, roll, yaw, elbow, elbow_yaw, wrist, wrist_roll = np.moveaxis(angles, -1, 0)
    upper = rotation(1, -pitch) @ rotation(0, side * roll) @ rotation(2, -side * yaw)
    lower = upper @ rotation(1, -elbow) @ rotation(2, -side * elbow_yaw)
    hand = lower @ rotation(1, -wrist) @ rotation(0, side * wrist_roll)
    x, y, z = SHOULDER
    points = [np.stack(np.broadcast_arrays(x, side * y, z), -1)]
    for turned, length in ((upper, UPPER_ARM), (lower, FOREARM), (hand, PALM), (hand, FINGER)):
        points.append(points[-1] - length * turned[..., 2])
    return np.stack([*points, hand[..., 1]], -2)

# ---- the world, and one step of it ---------------------------------------------------------------
OBJECTS = [(0.075, 0.00, (214, 44, 44)), (0.055, 0.16, (40, 84, 210)),  # radius, length, colour: upright
           (0.065, 0.06, (240, 200, 40)), (0.070, 0.00, (44, 170, 80))]  # capsules, so balls and bottles

TABLE_X, TABLE_Y = 3.45, 2.5  # the middle of the table

def is_free_floor(x, y):
    """May the base stand here? Away from the walls, and from the table by less than an arm's length."""
    near_table = abs(x - TABLE_X) < 0.77 and abs(y - TABLE_Y) < 1.02
    near_wall = abs(x - 3) >= 2.3 or abs(y - 2.5) >= 1.8
    return not near_table and not near_wall

@dataclass
class RobotWorld:
    """All that changes: pose (x, y, yaw), objects (4, 3) their bases, held: the object in each hand or -1."""
    pose: np.ndarray
    objects: np.ndarray
    room: int = 0
    held: list = field(default_factory=lambda: [-1, -1])
    closed: list = field(default_factory=lambda: [False, False])

def robot_world(rng, room=0):
    """A start: an object in each quarter of the table, the base anywhere free and turned to the table."""
    quarters = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[rng.permutation(4)]
    parts = (quarters + rng.uniform(0.25, 0.75, (4, 2))) / 2  # of the table's sides, 0..1
    low, high = TABLE[:, :2]
    xy = low + parts * (high - low)
    world = RobotWorld(np.zeros(3), np.insert(xy, 2, TABLE[1, 2], axis=1), room)
    while not is_free_floor(*world.pose[:2]):
        world.pose[:2] = rng.uniform((0, 0), ROOM[:2])
    world.pose[2] = bearing_of_table(world) + rng.normal(0, 0.9)
    return world

def bearing_of_table(world):
    x, y, _ = world.pose
    return math.atan2(TABLE_Y - y, TABLE_X - x)

def moved(pose, v, w):
    """The pose a frame later: the base turns at w radians a second, then drives at v metres a second."""
    x, y, yaw = pose
    yaw += w / HZ
    step = v / HZ
    return np.array([x + step * math.cos(yaw), y + step * math.sin(yaw), yaw])

def robot_step(world, state):
    """Moves `world` on by one frame, in place. Returns (2, 6, 3): the arms' points in world coordinates."""
    # 1. The base moves, and the arms with it (their last row is a direction, which only turns).
    world.pose[:] = moved(world.pose, state[DRIVE], state[TURN])
    arms = arm_points(state[ARMS], np.array([1.0, -1.0])) @ rotation(2, world.pose[2]).T
    arms[:, :5, :2] += world.pose[:2]
    # 2. A hand that closes near a free object takes it; an open hand lets go.
    for hand, closed in enumerate(state[HANDS] > 0.5):
        distance = np.linalg.norm(world.objects + GRIP - arms[hand, 4], axis=1)
        nearest = int(distance.argmin())
        is_free = nearest not in world.held and distance[nearest] < 0.18
        if not closed:
            world.held[hand] = -1
        elif is_free and not world.closed[hand]:
            world.held[hand] = nearest
        world.closed[hand] = bool(closed)
    # 3. What is held moves with its hand; what is not falls at 3 m/s, onto the table or the floor.
    low, high = TABLE
    for i, base in enumerate(world.objects):
        if i in world.held:
            base[:] = arms[world.held.index(i), 4] - GRIP
        else:
            over_table = np.all((low - (0, 0, 0.1) < base) & (base < high + (0, 0, 9)))
            floor = high[2] if over_table else 0.0
            base[2] = max(base[2] - 0.3, floor)
    return arms

# ---- motion --------------------------------------------------------------------------------------
def reach_target(rng, world, hand):
    """The best of 64 random settings of an arm (7 angles) to reach an object, and how far that misses."""
    tries = np.zeros((64, 7))
    for j in ARM_MOVES:
        tries[:, j] = ARM_REST[j] + rng.uniform(-ARM_RANGE[j], ARM_RANGE[j], 64)
    grips = arm_points(tries, np.full(64, 1.0 - 2 * hand))[:, 4] @ rotation(2, world.pose[2]).T
    gap = grips[:, None] + (*world.pose[:2], 0) - world.objects - GRIP
    distance = np.linalg.norm(gap, axis=-1).min(1)  # (64,)
    best = distance.argmin()
    return tries[best], distance[best]

def robot_plan(rng, world, n_frames):
    """Smooth random motion from `world`, which is left as it is: states (n_frames, 25) float32. Targets jump
    every 0.5 to 1.1 s, each group of joints at its own times, and the joints follow like damped springs."""
    world = copy.deepcopy(world)
    angle, target, speed = STANDING.copy(), STANDING.copy(), np.zeros(25)
    angle[NECK] = 0.4
    angle[ARMS] = target[ARMS] = [reach_target(rng, world, hand)[0] for hand in (0, 1)]
    v = w = goal_v = goal_w = 0.0  # of the base: metres and radians a second
    closes = [False, False]  # does a hand close next, because it reaches for an object?
    jump = np.zeros(4, int)  # the frame of the next jump of each group: two arms, neck, base
    states = np.zeros((n_frames, 25), np.float32)
    for k in range(n_frames):
        # 1. New targets where it is time: an object in reach or any pose, an open or a closed hand, a nod, a
        #    drive that more often than not turns towards the table.
        due = jump <= k
        jump[due] = k + rng.integers(5, 12, due.sum())
        for hand in np.flatnonzero(due[:2]):
            closure, arm = HANDS[hand], ARMS[hand]
            if closes[hand]:  # the arm has arrived; it waits for the hand
                target[closure], closes[hand] = 1.0, False
                continue
            target[arm], distance = reach_target(rng, world, hand)
            closes[hand] = distance < 0.17 and world.held[hand] < 0
            if closes[hand]:  # it opens while the arm reaches out, and the base waits
                target[closure] = goal_v = goal_w = 0.0
                jump[3] = k + rng.integers(10, 16)
                continue
            if distance > 0.2 or rng.random() < 0.4:
                for j in ARM_MOVES:
                    target[arm[j]] = rng.uniform(-1, 1) * ARM_RANGE[j] + ARM_REST[j]
            if rng.random() < 0.6:  # a closed hand opens, an open one closes
                target[closure] = 1.0 - round(target[closure])
        if due[2]:
            target[NECK] = rng.uniform(0.25, 0.6)
        if due[3]:
            aside = math.remainder(bearing_of_table(world) - world.pose[2], 2 * math.pi)
            goal_w = rng.normal(0, 0.3)
            if rng.random() < 0.6:
                goal_w += np.clip(aside, -0.8, 0.8) * 0.3
            goal_v = rng.uniform(-0.25, 0.4)
            if rng.random() < 1 / 3:  # a longer and faster drive, almost straight
                goal_v = rng.uniform(0.4, 0.9) * rng.choice([-1, 1, 1])
                goal_w *= 0.3
                jump[3] = k + rng.integers(10, 20)
        # 2. The joints follow their targets, the base its goals; where the floor ends it backs off.
        speed = 0.6 * speed + 0.08 * (target - angle)
        angle = angle + speed
        angle[HANDS] = np.clip(angle[HANDS], 0, 1)
        w += 0.4 * (goal_w - w)
        v += 0.4 * (goal_v - v)
        if not is_free_floor(*moved(world.pose, v, w)[:2]):
            v, goal_v = 0.0, -goal_v
        angle[-2:] = target[-2:] = v, w
        speed[-2:] = 0.0
        states[k] = angle
        robot_step(world, states[k])
    return states

# ---- what the camera sees ------------------------------------------------------------------------
HAND_COLOURS = (240, 140, 40), (60, 200, 220)

def robot_capsules(world, arms, closure):
    """Arms (2, 6, 3) and objects: [(one end, the other end, radius, colour)], in world coordinates."""
    capsules = []
    for (shoulder, elbow, wrist, palm, grip, aside), shut, paint in zip(arms, closure, HAND_COLOURS):
        capsules += [(shoulder, elbow, 0.055, (84, 86, 96)), (elbow, wrist, 0.045, (205, 205, 210))]
        capsules.append((wrist, palm, 0.042, paint))
        for side in (-aside, aside):  # fingers spread when open and meet when closed
            tip = grip + (grip - palm) * (0.5 - shut) + (0.085 - 0.075 * shut) * side
            capsules.append((palm + (0.045 - 0.02 * shut) * side, tip, 0.028, paint))
    for base, (radius, length, paint) in zip(world.objects, OBJECTS):
        capsules.append((base + (0, 0, radius), base + (0, 0, radius + length), radius, paint))
    return capsules

def robot_view(world, arms, state, size=64):
    """What the head camera sees once `robot_step` has returned `arms`: (size, size, 3) uint8."""
    turn = rotation(2, world.pose[2])
    forward, left, up = (turn @ rotation(1, state[NECK])).T
    axes, eye = np.stack([-left, -up, forward]), turn @ EYE + (*world.pose[:2], 0)
    return take_picture(eye, axes, robot_capsules(world, arms, state[HANDS]), world.room, size)

def robot_render(states, start, size=64):
    """Replays states (n, 25) from the world `start`, which is left as it is: (n, size, size, 3) uint8."""
    world = copy.deepcopy(start)
    return np.stack([robot_view(world, robot_step(world, state), state, size) for state in states])

def robot_episode(seed, n_frames, size=64, room=0):
    """An episode, fixed by its arguments: frames (n_frames, size, size, 3), states (n_frames, 25) float32."""
    rng = np.random.default_rng(seed)
    start = robot_world(rng, room)
    states = robot_plan(rng, start, n_frames)
    return robot_render(states, start, size), states

# ---- a data folder -------------------------------------------------------------------------------
EPISODE, SHARD = 160, 8 * 160  # frames
MOTION = 2  # counts up when `robot_plan` changes, so that recordings of before are not taken for new ones

def synth(out, frames=20_000, size=64, seed=0, splits=("train", "val"), hard=False, progress=True):
    """Draws a raw data folder: `frames` to train on, and a tenth, at least 1,700, to validate. Episodes have
    seeds of their own, so that no split depends on the other; hard ones play in 16 rooms, and in 16 others to
    validate. Uses all cores, and goes on where it was when it was ended."""
    if frames < FRAMES or size < 16 or size % 8 or not 0 <= seed < 1000:
        raise DataError(f"{out}: {frames} frames of {size} x {size} with seed {seed} cannot be drawn: give "
                        f"at least {FRAMES} frames, a size divisible by 8 and a seed of 0..999")
    for split in splits:
        total = frames if split == "train" else max(frames // 10, 1700)
        lengths = [min(SHARD, total - first) for first in range(0, total, SHARD)]
        about = {"robot": "hard" if hard else "built-in", "size": size, "seed": seed, "frames": total}
        about |= {"episode": EPISODE, "motion": MOTION}
        meta = {"num_shards": len(lengths), "query": None, "hz": HZ, "num_images": total, **about}
        make_split(f"{out}/{split}_v2.0", about, list(enumerate(lengths)),
                   functools.partial(draw_shard, lengths, about, split == "val"), meta,
                   lambda i: (3 * size**2 * lengths[i], 4 * 25 * lengths[i]), progress=progress)
    return out

def draw_shard(lengths, about, is_val, i):
    """Shard i: frames (N, size, size, 3), states (N, 25), and the episode that each frame belongs to (N,)."""
    first, n = i * SHARD // EPISODE, lengths[i]
    episodes, room = [], 0
    for e in range(first, first + math.ceil(n / EPISODE)):
        if about["robot"] == "hard":
            room = 1 + e % 16 + 16 * is_val
        seed = 1_000_000 * (2 * about["seed"] + is_val) + e
        episodes.append(robot_episode(seed, EPISODE, about["size"], room))
    frames, states = (np.concatenate(parts)[:n] for parts in zip(*episodes))
    return frames, states, first + np.arange(n) // EPISODE
