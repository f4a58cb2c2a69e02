"""Draws the pictures of the README: what the words say, from the modules' own functions where that can be.

    python assets/draw.py                   # all of them, in some ten seconds
    python assets/draw.py masking flow      # some of them

A picture is a card of opaque paper, so that it can be read on dark and on light pages. Its frames are those
of the built-in robot, and its dreams those of the shipped weights: draw it again when these have changed.
(Pillow's own font knows no Greek and no arrows. So names are spelled as in the code, and arrows are drawn.)
"""
import math
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from blocks import SHARING, Layout
from examples.robot import TURN, robot_episode
from flow_hwm import integrate, interpolate
from masked_hwm import gamma
from sample import load_model, load_tokenizer_for, settings_of
from tokenizer import to_uint8, to_video

ZOOM, COLOURS = 2, 64  # pixels of the file to one of the card; colours of the file
PAPER, INK, FAINT, GREY = "#fbfaf6", "#24292f", "#c9c6bd", "#8c8c8c"
SAND, LILAC, WHITE = "#ece7da", "#e4dcf1", "#ffffff"
STREAMS = {"v_p": "#4c78a8", "v_f": "#e8850c", "a_p": "#54a24b", "a_f": "#d65a58"}
BLUE, ORANGE, GREEN, RED = STREAMS.values()

class Card:
    """A drawing of width x height, whose functions take coordinates in its own pixels."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * ZOOM * width, 2 * ZOOM * height), PAPER)  # drawn twice as large
        self.draw = ImageDraw.Draw(self.image)
        self.box(1, 1, width - 1, height - 1, None, FAINT)

    def scaled(self, *numbers):
        return [round(2 * ZOOM * x) for x in numbers]

    def box(self, left, top, right, bottom, fill, outline=None, label="", size=13, ink=INK, radius=4):
        corners = self.scaled(left, top, right, bottom)
        self.draw.rounded_rectangle(corners, *self.scaled(radius), fill, outline, 4)
        self.text((left + right) / 2, (top + bottom) / 2, label, size, ink)

    def text(self, x, y, label, size=13, ink=INK, anchor="mm"):
        """anchor: left, middle or right; top, middle or bottom of the text, as Pillow names them."""
        font = ImageFont.load_default(2 * ZOOM * size)
        for i, line in enumerate(label.split("\n")):
            down = y + 1.25 * size * (i - (label.count("\n") / 2 if anchor[1] == "m" else 0))
            self.draw.text(self.scaled(x, down), line, ink, font, anchor)

    def line(self, points, ink=INK, width=1.2):
        self.draw.line(self.scaled(*np.ravel(points)), ink, *self.scaled(width), joint="curve")

    def arrow(self, *points, ink=INK, width=1.5):
        """A line through the points, with a head at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        sides = [(x1 - 8 * math.cos(angle + d), y1 - 8 * math.sin(angle + d)) for d in (-0.4, 0.4)]
        self.line([*points[:-1], np.mean(sides, axis=0)], ink, width)
        self.draw.polygon(self.scaled(x1, y1, *np.ravel(sides)), ink)

    def dot(self, x, y, ink, radius=2.5):
        self.draw.ellipse(self.scaled(x - radius, y - radius, x + radius, y + radius), ink)

    def picture(self, x, y, frame, side, ink=None):
        """A frame (H, W, 3) uint8 as a square, its upper left corner at x, y."""
        paper = Image.fromarray(np.asarray(frame)).resize(self.scaled(side, side), Image.Resampling.BOX)
        self.image.paste(paper, self.scaled(x, y))
        if ink:
            self.draw.rectangle(self.scaled(x, y, x + side, y + side), None, ink, 6)

    def save(self, name):
        image = self.image.reduce(2).quantize(COLOURS, dither=Image.Dither.NONE)
        image.save(f"{HERE}/{name}.png", optimize=True)
        print(f"wrote assets/{name}.png, {os.path.getsize(f'{HERE}/{name}.png') / 1e3:.0f} kB")

# ---- what is shown: one clip, and what the shipped models dream after its past ---------------------

def clip():
    """17 frames (17, 64, 64, 3) and states (17, 25) of the built-in robot, where it turns most in the future."""
    video, states = robot_episode(seed=5, n_frames=80, size=64)
    turned = [abs(states[k + 9 : k + 17, TURN].sum()) for k in range(64)]
    k = int(np.argmax(turned))
    return video[k : k + 17], states[k : k + 17]

def dreamt(file, **changed):
    """A model of weights/ dreams with the settings of its preset, but for those that are `changed` -> the
    clip's latents, its past, the sampler's trace, the tokenizer."""
    video, states = clip()
    model, saved = load_model(f"{HERE}/../weights/{file}")
    tokenizer = load_tokenizer_for(saved["tokenizer"])
    latents = tokenizer.encode(to_video(torch.from_numpy(video)[None]))
    past, actions, steps = latents.narrow(-3, 0, 2), torch.from_numpy(states).float()[None], []
    settings = {**settings_of(saved), **changed}
    model.sample(past, actions, generator=torch.Generator().manual_seed(0), trace=steps, **settings)
    return latents, past, steps, tokenizer

def frames_of(tokenizer, latents):
    return to_uint8(tokenizer.decode(latents))[0].numpy()

def tokens_hidden(frame, M):
    """The frame with grey squares where M (8, 8) is True."""
    frame = frame.copy()
    frame[np.kron(M, np.ones((8, 8))) > 0] = 140
    return frame

# ---- the pictures ----------------------------------------------------------------------------------

def colours_of(ids):
    """Ids (H, W) of the discrete tokenizer as colours: the first three digits are red, green and blue."""
    digits = np.stack([ids % 7 / 7, ids // 7 % 5 / 5, ids // 35 % 5 / 5], axis=2)
    return (40 + 210 * digits).astype(np.uint8)

def pipeline():
    card, (video, states) = Card(880, 424), clip()
    _, past, steps, tokenizer = dreamt("masked_base_tiny.pt")
    ids, _ = steps[-1]
    dream = frames_of(tokenizer, torch.cat([past, ids[:, 2:]], dim=1))
    left, step, side = 68, 47, 44
    centre = lambda first, last: left + step * (first + last) / 2 + side / 2

    # 1. Frames, and below them their actions: a bar for each joint that moves.
    for y, label in ((44, "frames"), (90, "actions"), (153, "latents"), (214, "tokens")):
        card.text(60, y, label, anchor="rm")
    moving = states[:, np.ptp(states, axis=0) > 1e-6]
    moving = ((moving - moving.mean(0)) / moving.std(0)).clip(-2, 2)
    for k in range(17):
        x, is_past = left + step * k, k < 9
        card.text(x + 22, 13, str(k), 10)
        card.picture(x, 22, video[k], side, BLUE if is_past else ORANGE)
        for j, value in enumerate(moving[k]):
            bar = x + 3 + j * 38 / len(moving[k])
            top, bottom = 90 - max(7 * value, 0), 90.5 - min(7 * value, 0)
            card.box(bar, top, bar + 2, bottom, GREEN if is_past else RED, radius=0)

    # 2. Latents, each below the frames that it stands for. The future one is what is asked for.
    for i, (first, last) in enumerate(((0, 0), (1, 8), (9, 16))):
        for k in (first, last):
            card.line([(centre(k, k), 108), (centre(first, last), 126)], FAINT)
        picture = colours_of(ids[0, i].numpy()) if i < 2 else np.full((8, 8, 3), 140, np.uint8)
        card.picture(centre(first, last) - 24, 128, picture, 48, BLUE if i < 2 else ORANGE)
    card.text(centre(1, 8) + 34, 153, "tokenizer.encode", 12, anchor="lm")
    card.text(centre(9, 16) + 34, 153, "to be dreamt:\nhidden, or noise", 12, anchor="lm")

    # 3. Tokens, and the model.
    x, scale = left, 796 / 209
    for (name, ink), n in zip(STREAMS.items(), Layout(2, 1, 8, 8, 8).lengths):
        end = x + n * scale
        card.box(x, 200, end - 2, 228, ink)
        if n > 20:
            card.text((x + end) / 2, 214, f"{name}: {n} tokens", 13, WHITE)
        else:
            card.text((x + end) / 2, 191, f"{name}: {n}", 12, ink)
        card.arrow(((x + end) / 2, 230), ((x + end) / 2, 249))
        x = end
    about = "MaskedHWM or FlowHWM: a stack of blocks, in which the four streams of tokens meet"
    card.box(left, 250, left + 796, 286, SAND, FAINT, about, 14)

    # 4. The way back to pixels.
    middle = centre(9, 16)
    card.arrow((middle, 287), (middle, 304))
    card.picture(middle - 24, 305, colours_of(ids[0, 2].numpy()), 48, ORANGE)
    card.text(middle + 34, 330, "the future latent", 12, anchor="lm")
    card.text(middle - 34, 330, "tokenizer.decode", 12, anchor="rm")
    for k in range(9, 17):
        card.picture(left + step * k, 368, dream[k], side, ORANGE)
        if k in (9, 16):
            card.line([(middle, 355), (centre(k, k), 366)], FAINT)
    card.text(left + step * 9 - 12, 390, "eight frames that were never filmed: the dream", 13, anchor="rm")
    card.save("pipeline")

def clock():
    card, left, step = Card(880, 168), 74, 47
    card.text(66, 40, "frames", anchor="rm")
    card.text(66, 82, "latents", anchor="rm")
    card.text(66, 124, "actions", anchor="rm")
    for k in range(17):
        x = left + step * k
        card.box(x, 26, x + 43, 54, BLUE if k < 9 else ORANGE, None, str(k), 13, WHITE)
        card.box(x, 110, x + 43, 138, GREEN if k < 9 else RED, None, str(k), 13, WHITE)
    for i, (first, last) in enumerate([(0, 0), (1, 8), (9, 16)]):
        ends = left + step * first, left + step * last + 43
        card.box(ends[0], 68, ends[1], 96, BLUE if i < 2 else ORANGE)
        card.text(ends[1] - 21, 82, str(i), 13, WHITE)
        card.line([(ends[1] - 21, 14), (ends[1] - 21, 24)], INK)
        card.line([(ends[1] - 21, 140), (ends[1] - 21, 150)], INK)
        card.text(ends[1] - 21, 157, f"time {8 * i}", 11)
    card.text(left + step * 4.5, 82, "stands for frames 1 to 8, has the time of the last", 12, WHITE)
    card.text(left + step * 12.2, 82, "frames 9 to 16", 12, WHITE)
    card.save("clock")

def masking():
    card = Card(880, 318)
    latents, past, steps, tokenizer = dreamt("masked_base_tiny.pt", K=4)
    truth, rng = frames_of(tokenizer, latents), np.random.default_rng(1)
    left, step, side = 84, 116, 100
    card.text(40, 86, "training", 13)
    L, u = latents.clone(), rng.random((8, 8))
    wrong = torch.from_numpy(rng.random((8, 8)) < 0.12)
    L[0, 2][wrong] = torch.from_numpy(rng.integers(4375, size=int(wrong.sum())))
    noisy = frames_of(tokenizer, L)[-1]
    pictures = [("the truth", truth[-1]), ("some ids are wrong", noisy)]
    for r in (0.15, 0.45, 0.75, 0.95):
        share = gamma(torch.tensor(r)).item()
        pictures.append((f"r = {r}: {share:.0%} hidden", tokens_hidden(noisy, u < share)))
    for i, (label, frame) in enumerate(pictures):
        card.picture(left + step * i, 36, frame, side)
        card.text(left + step * i + 50, 24, label, 11)
    card.text(left + step * 6 + 42, 86, "guess the\nhidden ids,\ngiven the past\nand the\nactions", 12)
    card.line([(20, 156), (860, 156)], FAINT)
    card.text(40, 234, "dreaming", 13)
    hidden = [np.ones((8, 8)), *(M[0, 0].numpy() for _, M in steps)]
    shown = [truth[-1], *(frames_of(tokenizer, ids)[-1] for ids, _ in steps)]
    for i, (frame, M) in enumerate(zip(shown, hidden)):
        label = f"step {i}: {64 - M.sum():.0f} of 64 fixed" if i else "all is hidden"
        card.picture(left + step * i, 184, tokens_hidden(frame, M), side)
        card.text(left + step * i + 50, 172, label, 11)
    card.picture(left + step * 5, 184, truth[-1], side)
    card.text(left + step * 5 + 50, 172, "what really happened", 11)
    card.text(left + step * 6 + 42, 234, "draw all, keep\nsome, hide\nthe others\nagain", 12)
    card.text(left, 302, "The last of the eight future frames, cut into the 8 x 8 squares of its tokens; "
              "K = 4 steps instead of 2, to see more of them.", 11, anchor="lm")
    card.save("masking")

def velocity_of_two(X, t, places=(-1.0, 1.0), spread=0.12):
    """The exact velocity E[X_1 - X_0 | X_t = X] where X_1 lies near one of two places."""
    variance = t**2 * spread**2 + (1 - t) ** 2
    weights = torch.stack([(-((X - t * m) ** 2) / (2 * variance)).exp() for m in places])
    means = torch.stack([m + (t * spread**2 - (1 - t)) / variance * (X - t * m) for m in places])
    return (weights * means).sum(0) / weights.sum(0).clamp(min=1e-12)

def flow():
    card, noise = Card(880, 400), torch.Generator().manual_seed(3)
    X_0 = torch.randn(22, generator=noise).clamp(-2, 2)
    X_1 = 0.12 * torch.randn(22, generator=noise) + torch.tensor([1.0, -1.0]).repeat(11)
    small, large = [], []
    integrate(velocity_of_two, X_0, 40, trace=small)
    integrate(velocity_of_two, X_0, 1, trace=large)
    lines = [interpolate(X_0, X_1, torch.full((22,), t), 0.0) for t in (0.0, 1.0)]
    panels = {"training: straight lines join noise and data": lines,
              "dreaming: 40 steps of the mean velocity": small, "one step: it ends between the two": large}
    for i, (title, X) in enumerate(panels.items()):
        left, X = 28 + 286 * i, 118 - 34 * torch.stack(X).numpy()  # (steps, 22), heights in the picture
        t = np.linspace(left + 10, left + 242, len(X))
        card.text(left + 126, 24, title, 12)
        for path in X.T:
            ink = GREY
            if abs(path[-1] - 118) > 10:
                ink = RED if path[-1] < 118 else BLUE
            card.line(np.stack([t, path], axis=1), ink, 1)
            card.dot(t[0], path[0], GREY)
            card.dot(t[-1], path[-1], ink)
        card.text(left + 6, 206, "t = 0: noise X_0", 11, anchor="lm")
        card.text(left + 246, 206, "t = 1: X_1", 11, anchor="rm")
        card.line([(left + 6, 196), (left + 246, 196)], FAINT)
    for y, ink in ((84, RED), (152, BLUE)):
        card.box(left + 236, y - 6, left + 248, y + 6, None, ink)
    card.text(34, 226, "Above: a future that is one number, where only 1 (turned left) and -1 (turned right) "
              "happen. Below: the shipped Flow-HWM in", 11, anchor="lm")
    card.text(34, 242, "5 steps, the last of the eight future frames. (The decoder also sees the past: so "
              "even from noise it makes something of a room.)", 11, anchor="lm")
    latents, past, steps, tokenizer = dreamt("flow_full_tiny.pt", steps=5)
    films = [*(torch.cat([past, X], dim=2) for X in steps), latents]
    labels = [*(f"t = {t / 5:.1f}" for t in range(6)), "what really happened"]
    for i, (label, film) in enumerate(zip(labels, films)):
        card.text(84 + 118 * i, 264, label, 11)
        card.picture(34 + 118 * i, 276, frames_of(tokenizer, film)[-1], 100)
    card.save("flow")

def block_column(card, left, rows):
    """One of the two blocks. Its rows, from the top: (height, [(first stream, last stream, label, fill)])"""
    width, y = 92, 70
    for i, (name, ink) in enumerate(STREAMS.items()):
        card.box(left + i * width, 46, left + i * width + 84, 70, ink, None, name, 13, WHITE)
    for height, boxes in rows:
        for first, last, label, fill in boxes:
            x0, x1 = left + first * width, left + last * width + 84
            for i in range(first, last + 1):
                card.arrow((left + i * width + 42, y), (left + i * width + 42, y + 16), ink=INK, width=1.2)
            card.box(x0, y + 16, x1, y + 16 + height, fill, FAINT, label, 11)
        for i in range(boxes[-1][1] + 1, 4):  # streams that pass by
            card.line([(left + i * width + 42, y), (left + i * width + 42, y + 16 + height)], INK, 1.2)
        y += 16 + height
    for i in range(4):
        card.arrow((left + i * width + 42, y), (left + i * width + 42, y + 18), width=1.2)

def blocks():
    card = Card(880, 452)
    each = lambda label, fill=SAND: [(i, i, label, fill) for i in range(4)]
    card.text(220, 22, "MaskedBlock (Fig. 2)", 15)
    block_column(card, 36, [
        (44, [(0, 1, "norm; spatial attention: within\neach latent frame, 2D RoPE", LILAC)]),
        (22, [(0, 0, "+ input", WHITE), (1, 1, "+ input", WHITE)]),
        (56, [(0, 3, "norm; temporal attention of all streams: a position with\nitself in the other latents "
               "and with all actions, 1D RoPE", LILAC)]),
        (22, each("+ input", WHITE)),
        (44, each("norm;\nMLP")),
        (22, each("+ input", WHITE))])
    card.text(656, 22, "FlowBlock (Fig. 3)", 15)
    block_column(card, 472, [
        (52, each("norm, scaled\nand shifted;\nW_QKV")),
        (40, [(0, 3, "joint attention of all tokens: 3D RoPE for video, 1D for actions", LILAC)]),
        (40, each("W_out;\ngate")),
        (22, each("+ input", WHITE)),
        (52, each("norm, scaled\nand shifted;\nMLP; gate")),
        (22, each("+ input", WHITE))])
    card.text(36, 434, "Sand: weights that the variant divides (in Masked-HWM these are the MLPs alone). "
              "Lilac: attention. Scale, shift and gate are made of the time t.", 11, anchor="lm")
    card.save("blocks")

def variants():
    card, inks = Card(880, 172), list(STREAMS.values())
    notes = {"split": "video, actions; v_f looks at the others", "base": "a weight set for every stream",
             "modality": "one for video, one for actions", "full": "one for all"}
    for i, (variant, note) in enumerate(notes.items()):
        left, is_split = 22 + 214 * i, variant == "split"
        card.text(left + 97, 20, variant, 15)
        for j, (stream, weights) in enumerate(zip(STREAMS, SHARING["modality" if is_split else variant])):
            x = left + 50 * j
            card.box(x, 38, x + 44, 70, inks[weights], None, stream, 13, WHITE)
            card.arrow((x + 22, 101), (x + 22, 72), width=1.2)
            if is_split:
                card.box(x, 102, x + 44, 124, LILAC, FAINT, "self", 11)
            if is_split and stream != "v_f":
                card.arrow((left + 72, 124), (left + 72, 140), (x + 22, 140), (x + 22, 126), width=1.2)
        if not is_split:
            card.box(left, 102, left + 194, 124, LILAC, FAINT, "attention of all to all", 11)
        card.text(left + 97, 156, note, 11)
    card.save("variants")

PICTURES = {f.__name__: f for f in (pipeline, clock, masking, flow, blocks, variants)}

if __name__ == "__main__":
    with torch.no_grad():
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name]()
