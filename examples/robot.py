"""The built-in robot: what a small humanoid sees while it drives about a room and handles things on a table.

A robot of yours takes its place with four functions: a world to start from (`robot_world`), its motion
(`robot_plan`), what a state does to the world (`robot_step`) and what the camera sees of it (`robot_view`).
`synth` makes a data folder of them; play and planning step this true world beside a model's dream of it.

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

# ---- the room ------------------------------------------------------------------------------------
ROOM = np.array([6.0, 5.0, 2.8], np.float32)  # the room spans 0 .. ROOM
TABLE = np.array([[3.0, 1.8, 0.70], [3.9, 3.2, 0.76]], np.float32)  # low and high corner of the table's top
PEDESTAL = np.array([[3.3, 2.2, 0.0], [3.6, 2.8, 0.70]], np.float32)
OBJECTS = [(0.075, 0.00, (214, 44, 44)), (0.055, 0.16, (40, 84, 210)),  # radius, length, colour: upright
           (0.065, 0.06, (240, 200, 40)), (0.070, 0.00, (44, 170, 80))]  # capsules, so balls and bottles
HAND_COLOURS = (240, 140, 40), (60, 200, 220)
TEXELS = 256  # of a texture, along each side
FACE_LIGHT = np.float32([0.92, 0.92, 0.82, 0.82, 1, 1])
BOX_LIGHT = np.array([0.55, 0.75, 1.0])  # of the sides of a box across x, y and z
DECOR = [  # of the faces x=0, x=max, y=0, y=max, floor, ceiling: colour, pictures (u0, u1, v0, v1, colour)
    [(196, 120, 92), (0.8, 2, 0, 2.1, (92, 58, 40)), (3, 4.4, 1, 2.1, (238, 222, 170))],
    [(112, 150, 186), (1.3, 3.3, 0.9, 2.2, (232, 244, 252)), (4, 5, 0, 1.6, (70, 78, 130))],
    [(206, 196, 128), (4.2, 5.4, 0, 2.1, (226, 226, 216)), (1, 2.6, 1.1, 2.1, (72, 92, 140))],
    [(128, 168, 124), (0.8, 1.8, 0, 1.9, (196, 84, 72)), (2.8, 4.6, 1, 2, (44, 56, 70))],
    [(146, 136, 128), (0.4, 2.4, 1.2, 3.8, (160, 86, 84)), (4.5, 6, 0, 5, (112, 118, 134))],
    [(200, 200, 204), (1, 2.2, 1, 4, (255, 255, 250)), (3.8, 5, 1, 4, (255, 255, 250))]]

@functools.lru_cache(maxsize=4)
def room_texture(room):
    """Colours (6 * TEXELS * TEXELS, 3) float32 in the order (face, u, v). Room 0 is DECOR: plain, so that a
    small model can learn it. Any other number is a hard room of its own, tiled all over."""
    texture, rng = np.zeros((6, TEXELS, TEXELS, 3), np.float32), np.random.default_rng(room)
    for face, (colour, *pictures) in enumerate(DECOR):
        texture[face] = colour
        for *ends, colour in pictures:
            sizes = np.delete(ROOM, face // 2).repeat(2)
            u0, u1, v0, v1 = np.round(np.minimum(ends / sizes, 1) * TEXELS).astype(int)
            texture[face, u0:u1, v0:v1] = colour
    if room:
        tiles = rng.uniform(70, 210, (6, 1, 1, 3)) + rng.normal(0, 35, (6, 16, 16, 3))
        texture[:] = tiles.clip(0, 255).repeat(TEXELS // 16, axis=1).repeat(TEXELS // 16, axis=2)
    texture = (140 + 0.7 * (texture - 140)) * FACE_LIGHT[:, None, None, None]  # a little pale
    return texture.reshape(-1, 3)

def is_free_floor(x, y):
    """May the base stand here? Away from the walls, and from the table by less than an arm's length."""
    near_table = abs(x - 3.45) < 0.77 and abs(y - 2.5) < 1.02
    return abs(x - 3) < 2.3 and abs(y - 2.5) < 1.8 and not near_table

# ---- the world, and one step of it ---------------------------------------------------------------
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
    low, high = TABLE[:, :2]
    xy = low + (quarters + rng.uniform(0.25, 0.75, (4, 2))) / 2 * (high - low)
    world = RobotWorld(np.zeros(3), np.insert(xy, 2, TABLE[1, 2], axis=1), room)
    while not is_free_floor(*world.pose[:2]):
        world.pose[:2] = rng.uniform((0, 0), ROOM[:2])
    world.pose[2] = bearing_of_table(world) + rng.normal(0, 0.9)
    return world

def bearing_of_table(world):
    return math.atan2(2.5 - world.pose[1], 3.45 - world.pose[0])

def moved(pose, v, w):
    """The pose a frame later: the base turns at w radians a second, then drives at v metres a second."""
    x, y, yaw = pose
    yaw += w / HZ
    return np.array([x + v / HZ * math.cos(yaw), y + v / HZ * math.sin(yaw), yaw])

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
        if not closed:
            world.held[hand] = -1
        elif not world.closed[hand] and distance[nearest] < 0.18 and nearest not in world.held:
            world.held[hand] = nearest
        world.closed[hand] = bool(closed)
    # 3. What is held moves with its hand; what is not falls at 3 m/s, onto the table or the floor.
    for i, base in enumerate(world.objects):
        if i in world.held:
            base[:] = arms[world.held.index(i), 4] - GRIP
        else:
            over_table = np.all((TABLE[0] - (0, 0, 0.1) < base) & (base < TABLE[1] + (0, 0, 9)))
            base[2] = max(base[2] - 0.3, TABLE[1, 2] if over_table else 0.0)
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
            if closes[hand]:
                target[HANDS[hand]], closes[hand] = 1.0, False  # the arm has arrived; it waits for the hand
                continue
            target[ARMS[hand]], distance = reach_target(rng, world, hand)
            closes[hand] = distance < 0.17 and world.held[hand] < 0
            if closes[hand]:
                target[HANDS[hand]] = goal_v = goal_w = 0.0
                jump[3] = k + rng.integers(10, 16)  # the base waits, too
            elif distance > 0.2 or rng.random() < 0.4:
                for j in ARM_MOVES:
                    target[ARMS[hand][j]] = rng.uniform(-1, 1) * ARM_RANGE[j] + ARM_REST[j]
            if not closes[hand] and rng.random() < 0.6:
                target[HANDS[hand]] = 1.0 - round(target[HANDS[hand]])
        if due[2]:
            target[NECK] = rng.uniform(0.25, 0.6)
        if due[3]:
            aside = math.remainder(bearing_of_table(world) - world.pose[2], 2 * math.pi)
            goal_w = rng.normal(0, 0.3)
            if rng.random() < 0.6:
                goal_w += np.clip(aside, -0.8, 0.8) * 0.3
            goal_v = rng.uniform(-0.25, 0.4)
            if rng.random() < 1 / 3:  # a longer and faster drive, almost straight
                goal_v, goal_w = rng.uniform(0.4, 0.9) * rng.choice([-1, 1, 1]), goal_w * 0.3
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

# ---- the camera: ray casting for room and table, soft capsules for arms and objects --------------
FOCAL = 1 / math.tan(math.radians(85) / 2)  # 85 degrees of view, in half image widths
NEAR = 0.12  # nothing nearer to the eye is drawn

@functools.lru_cache(maxsize=4)
def pixel_rays(size):
    """(3, 4 * size * size) camera rays (right, down, forward = 1), 2 x 2 a pixel, sub-pixels outermost."""
    edge = ((np.arange(2 * size) + 0.5) / size - 1) / FOCAL
    rays = np.stack([*np.meshgrid(edge, edge), np.ones((2 * size, 2 * size))])
    rays = rays.reshape(3, size, 2, size, 2).transpose(0, 2, 4, 1, 3)
    return rays.reshape(3, -1).astype(np.float32)

def cast_room(eye, axes, size, room):
    """The room and its table. eye (3, 1), axes (3, 3) with rows right, down, forward; float32.
    -> colours (size, size, 3) and depth along the optical axis (size, size), float32."""
    # 1. Each ray of depth 1 ends at the nearest of the three walls ahead of it.
    rays = axes.T @ pixel_rays(size)  # (3, P)
    inverse = 1 / np.copysign(np.maximum(np.abs(rays), np.float32(1e-6)), rays)
    ahead = inverse > 0
    walls = (np.where(ahead, ROOM[:, None], 0) - eye) * inverse
    depth, on_x, on_z = walls.min(0), walls[0] <= walls[1:].min(0), walls[2] < walls[:2].min(0)
    # 2. The colour of the texel at that end.
    x, y, z = ((eye + rays * depth) * (TEXELS / ROOM)[:, None]).astype(np.int32).clip(0, TEXELS - 1)
    face = np.where(on_x, ahead[0], np.where(on_z, 4 + ahead[2], 2 + ahead[1]))
    texel = (face * TEXELS + np.where(on_x, y, x)) * TEXELS + np.where(on_z, y, z)
    colour = room_texture(room).take(texel, axis=0)  # (P, 3)
    # 3. A box covers it where the ray has entered the box along all three axes before it leaves along any.
    for (low, high), paint in ((PEDESTAL, (70, 52, 44)), (TABLE, (170, 112, 62))):
        enters = (np.where(ahead, low[:, None], high[:, None]) - eye) * inverse
        leaves = (np.where(ahead, high[:, None], low[:, None]) - eye) * inverse
        enter = enters.max(0)
        on = np.flatnonzero((enter < leaves.min(0)) & (enter > 0) & (enter < depth))
        depth[on] = enter[on]
        light = BOX_LIGHT[enters[:, on].argmax(0)]
        if room:  # stripes across y
            light = light * (1 + 0.25 * np.sign(np.sin(25 * (eye[1] + rays[1, on] * enter[on]))))
        colour[on] = light[:, None] * np.float32(paint)
    colour *= (1 / (1 + np.float32(0.06) * depth))[:, None]  # far things are a little darker
    return colour.reshape(4, size, size, 3).mean(0), depth.reshape(4, size, size).mean(0)

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

def draw_capsule(image, depth, ends, radius, colour):
    """Paints one capsule over `image` in place, with soft edges. ends (2, 3) in camera axes (right, down,
    forward). Radius over depth and 1 over depth are linear on the screen, so that a 2D distance is enough."""
    # 1. Its ends on the screen, the far one first, the other cut off at the near plane; pixels it may touch.
    a, b = ends[np.argsort(-ends[:, 2])]
    b = a + (b - a) * min(1, (a[2] - NEAR) / max(a[2] - b[2], 1e-6))
    inverse = 1 / np.array([a[2], b[2]])
    scale = FOCAL / 2 * len(image) * inverse
    xy = np.stack([a[:2], b[:2]]) * scale[:, None] + (len(image) - 1) / 2
    r = radius * scale
    x0, y0 = (xy - r[:, None] - 1).min(0).clip(0, len(image)).astype(int)
    x1, y1 = (xy + r[:, None] + 2).max(0).clip(0, len(image)).astype(int)
    # 2. Of each pixel: the nearest point of the axis, its distance, and radius and depth there.
    (ax, ay), (dx, dy) = np.float32([xy[0], xy[1] - xy[0]])
    (r, n), (dr, dn) = np.float32([(r[0], inverse[0]), (r[1] - r[0], inverse[1] - inverse[0])])
    px, py = np.arange(x0, x1, dtype=np.float32) - ax, np.arange(y0, y1, dtype=np.float32)[:, None] - ay
    along = ((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
    away = np.hypot(px - along * dx, py - along * dy)
    r = r + along * dr
    # 3. Paint where it covers the pixel; what lies behind the table or a wall fades.
    part, behind = image[y0:y1, x0:x1], depth[y0:y1, x0:x1] - 1 / (n + along * dn) + np.float32(radius)
    cover = (r - away + 0.5).clip(0, 1) * (behind * 20 + 1).clip(0, 1)
    shade = 1 - 0.5 * ((away / r) ** 2).clip(0, 1)
    part += cover[..., None] * (shade[..., None] * np.float32(colour) - part)

def robot_view(world, arms, state, size=64):
    """What the head camera sees once `robot_step` has returned `arms`: (size, size, 3) uint8."""
    turn = rotation(2, world.pose[2])
    forward, left, up = (turn @ rotation(1, state[NECK])).T
    axes, eye = np.stack([-left, -up, forward]), turn @ EYE + (*world.pose[:2], 0)
    image, depth = cast_room(np.float32(eye)[:, None], np.float32(axes), size, world.room)
    capsules = robot_capsules(world, arms, state[HANDS])
    capsules = [((np.stack(ends) - eye) @ axes.T, radius, colour) for *ends, radius, colour in capsules]
    for ends, radius, colour in sorted(capsules, key=lambda c: -c[0][:, 2].mean()):  # far ones first
        if ends[:, 2].max() >= NEAR:
            draw_capsule(image, depth, ends, radius, colour)
    # A soft lens: each pixel spreads over its neighbours, 1 2 1 along both axes. Soft edges tokenize better.
    for _ in range(2):
        image = np.swapaxes(image, 0, 1)
        padded = np.concatenate([image[:1], image, image[-1:]])
        image = 0.25 * (padded[:-2] + padded[2:]) + 0.5 * image
    return (image + 0.5).clip(0, 255).astype(np.uint8)

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
    first, n, parts = i * SHARD // EPISODE, lengths[i], []
    for e in range(first, first + math.ceil(n / EPISODE)):
        room = 1 + e % 16 + 16 * is_val if about["robot"] == "hard" else 0
        seed = 1_000_000 * (2 * about["seed"] + is_val) + e
        parts.append(robot_episode(seed, EPISODE, about["size"], room))
    frames, states = (np.concatenate(part)[:n] for part in zip(*parts))
    return frames, states, first + np.arange(n) // EPISODE
