"""The room of the built-in robot, and the picture that a camera takes in it, in numpy alone.

`take_picture` casts four rays a pixel at the walls and the table, paints arms and objects over them as soft
capsules, the far ones first, and blurs the whole a little. Lengths are metres; x and y lie on the floor, z
points up. Depth is counted along the optical axis. See examples/robot.py for what lives here.
"""
import functools
import math

import numpy as np

ROOM = np.array([6.0, 5.0, 2.8], np.float32)  # the room spans 0 .. ROOM
TABLE = np.array([[3.0, 1.8, 0.70], [3.9, 3.2, 0.76]], np.float32)  # low and high corner of the table's top
PEDESTAL = np.array([[3.3, 2.2, 0.0], [3.6, 2.8, 0.70]], np.float32)

# ---- what the room looks like --------------------------------------------------------------------
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
    texture = np.zeros((6, TEXELS, TEXELS, 3), np.float32)
    for face, (colour, *pictures) in enumerate(DECOR):
        texture[face] = colour
        sizes = np.delete(ROOM, face // 2).repeat(2)
        for *ends, colour in pictures:
            u0, u1, v0, v1 = np.round(np.minimum(ends / sizes, 1) * TEXELS).astype(int)
            texture[face, u0:u1, v0:v1] = colour
    if room:
        rng, tile = np.random.default_rng(room), TEXELS // 16
        tiles = rng.uniform(70, 210, (6, 1, 1, 3)) + rng.normal(0, 35, (6, 16, 16, 3))
        texture[:] = tiles.clip(0, 255).repeat(tile, axis=1).repeat(tile, axis=2)
    texture = (140 + 0.7 * (texture - 140)) * FACE_LIGHT[:, None, None, None]  # a little pale
    return texture.reshape(-1, 3)

# ---- the camera ----------------------------------------------------------------------------------
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
    -> colours (size, size, 3) and depth (size, size), float32."""
    # 1. Each ray of depth 1 ends at the nearest of the three walls ahead of it.
    rays = axes.T @ pixel_rays(size)  # (3, P)
    inverse = 1 / np.copysign(np.maximum(np.abs(rays), np.float32(1e-6)), rays)
    ahead = inverse > 0
    walls = (np.where(ahead, ROOM[:, None], 0) - eye) * inverse
    depth, on_x, on_z = walls.min(0), walls[0] <= walls[1:].min(0), walls[2] < walls[:2].min(0)
    # 2. The colour of the texel at that end.
    x, y, z = ((eye + rays * depth) * (TEXELS / ROOM)[:, None]).astype(np.int32).clip(0, TEXELS - 1)
    face = np.where(on_x, ahead[0], np.where(on_z, 4 + ahead[2], 2 + ahead[1]))
    u, v = np.where(on_x, y, x), np.where(on_z, y, z)
    colour = room_texture(room).take((face * TEXELS + u) * TEXELS + v, axis=0)  # (P, 3)
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
    # 4. Far things are a little darker. A pixel is the mean of its four rays.
    colour *= (1 / (1 + np.float32(0.06) * depth))[:, None]
    return colour.reshape(4, size, size, 3).mean(0), depth.reshape(4, size, size).mean(0)

def draw_capsule(image, depth, ends, radius, colour):
    """Paints one capsule over `image` in place, with soft edges. ends (2, 3) in camera axes (right, down,
    forward). Radius over depth and 1 over depth are linear on the screen, so that a 2D distance is enough."""
    # 1. Its ends on the screen, the far one first, the other cut off at the near plane; pixels it may touch.
    size = len(image)
    a, b = ends[np.argsort(-ends[:, 2])]
    b = a + (b - a) * min(1, (a[2] - NEAR) / max(a[2] - b[2], 1e-6))
    inverse = 1 / np.array([a[2], b[2]])
    scale = FOCAL / 2 * size * inverse
    xy = np.stack([a[:2], b[:2]]) * scale[:, None] + (size - 1) / 2
    r = radius * scale
    x0, y0 = (xy - r[:, None] - 1).min(0).clip(0, size).astype(int)
    x1, y1 = (xy + r[:, None] + 2).max(0).clip(0, size).astype(int)
    # 2. Of each pixel: the nearest point of the axis, its distance, and radius and depth there.
    (ax, ay), (dx, dy) = np.float32([xy[0], xy[1] - xy[0]])
    (r, n), (dr, dn) = np.float32([(r[0], inverse[0]), (r[1] - r[0], inverse[1] - inverse[0])])
    px = np.arange(x0, x1, dtype=np.float32) - ax
    py = np.arange(y0, y1, dtype=np.float32)[:, None] - ay
    along = ((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
    away = np.hypot(px - along * dx, py - along * dy)
    r = r + along * dr
    # 3. Paint where it covers the pixel; what lies behind the table or a wall fades.
    behind = depth[y0:y1, x0:x1] - 1 / (n + along * dn) + np.float32(radius)
    cover = (r - away + 0.5).clip(0, 1) * (behind * 20 + 1).clip(0, 1)
    shade = 1 - 0.5 * ((away / r) ** 2).clip(0, 1)
    part = image[y0:y1, x0:x1]
    part += cover[..., None] * (shade[..., None] * np.float32(colour) - part)

def take_picture(eye, axes, capsules, room, size):
    """(size, size, 3) uint8. eye (3,); axes (3, 3) with rows right, down, forward; capsules are a list of
    (one end, the other end, radius, colour) in the room's coordinates."""
    image, depth = cast_room(np.float32(eye)[:, None], np.float32(axes), size, room)
    seen = [((np.stack(ends) - eye) @ axes.T, radius, colour) for *ends, radius, colour in capsules]
    for ends, radius, colour in sorted(seen, key=lambda c: -c[0][:, 2].mean()):  # far ones first
        if ends[:, 2].max() >= NEAR:
            draw_capsule(image, depth, ends, radius, colour)
    # A soft lens: each pixel spreads over its neighbours, 1 2 1 along both axes. Soft edges tokenize better.
    for _ in range(2):
        image = np.swapaxes(image, 0, 1)
        padded = np.concatenate([image[:1], image, image[-1:]])
        image = 0.25 * (padded[:-2] + padded[2:]) + 0.5 * image
    return (image + 0.5).clip(0, 255).astype(np.uint8)
