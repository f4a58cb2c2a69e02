"""Pictures of dreams and of a run, by Pillow: what sample.py and train.py write into samples/ and loss.png.

A dream's frames are (clips, n, H, W, 3) uint8. Files are written whole or not at all.
"""
import json
import math
import os
from glob import escape, glob

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw

from tokenizer import write_whole

LEAST, GAP, TOP, LEFT = 128, 4, 14, 90  # pixels: least width of a picture, gaps, labels above and beside
COLOURS = {"loss": "#1f77b4", "val_loss": "#ff7f0e"}  # blue and orange

def sheet(pictures, above=(), beside=()):
    """Pictures (rows, columns, H, W, 3) uint8 on white paper, with labels above columns or beside rows."""
    zoom = max(1, LEAST // pictures.shape[3])
    pictures = pictures.repeat(zoom, axis=2).repeat(zoom, axis=3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    paper = rearrange(pictures, "rows columns h w rgb -> (rows h) (columns w) rgb")
    margins = (TOP if above else 0, 0), (LEFT if beside else 0, 0), (0, 0)
    paper = Image.fromarray(np.pad(paper, margins, constant_values=255))
    draw = ImageDraw.Draw(paper)
    height, width = pictures.shape[2:4]
    for column, label in enumerate(above):
        draw.text((column * width + 2, 1), label, fill="black")
    for row, label in enumerate(beside):
        draw.text((4, (row + 0.5) * height - 8), label, fill="black")
    return paper

def picture_rows(dreams, other="other actions"):
    """The dict of `dream` with its last row called `other`: {label: frames (clips, n, H, W, 3)}."""
    return dict(zip(("context", "truth", "prediction", other), dreams.values()))

def save_gif(rows, file, hz=10):
    """Each clip is a line of pictures, each entry of `rows` a column. All play the context first; then the
    context stands still, and so does the truth where a rollout is longer. The GIF plays in true time."""
    context, *futures = rows.values()
    films = [context, *(np.concatenate([context, future], axis=1) for future in futures)]
    n = max(film.shape[1] for film in films)
    # A GIF counts in hundredths of a second. Its delays are differences of rounded times, so that errors do
    # not add up. Browsers slow down delays below two hundredths: above 50 Hz not every frame is shown.
    shown = range(0, n, math.ceil(hz / 50))
    starts = [round(100 * t / hz) for t in shown]
    delays = 10 * np.diff(starts, append=starts[-1] + 100)
    pictures = []
    for t in shown:
        columns = [film[:, min(t, film.shape[1] - 1)] for film in films]  # (clips, H, W, 3) each
        pictures.append(sheet(np.stack(columns, axis=1), above=rows).quantize(255))
    write_whole(file, lambda temporary: pictures[0].save(
        temporary, format="GIF", save_all=True, append_images=pictures[1:], loop=0, duration=delays.tolist()))

def save_png(rows, file):
    """Each clip is four lines of pictures, time to the right: the three lower ones follow the context."""
    films = [*rows.values()]
    clips, _, *picture = films[0].shape
    longest = max(film.shape[1] for film in films)
    lines = np.full((clips, len(rows), longest, *picture), 255, np.uint8)
    for i, film in enumerate(films):
        lines[:, i, : film.shape[1]] = film
    paper = sheet(lines.reshape(-1, *lines.shape[2:]), beside=[*rows] * clips)
    write_whole(file, lambda temporary: paper.save(temporary, format="PNG"))

def save_trace(strips, file, flow):
    """Each clip is a line of pictures, one for each step of the sampler, under its time t or its number."""
    n = strips.shape[1]
    labels = [f"t = {t:.2f}" for t in np.linspace(0, 1, n)] if flow else [f"step {k + 1}" for k in range(n)]
    paper = sheet(strips, above=labels)
    write_whole(file, lambda temporary: paper.save(temporary, format="PNG"))

def save_curve(folder):
    """FOLDER/loss.png: the losses of log.jsonl over the steps, and below them what was dreamt on the way."""
    with open(f"{folder}/log.jsonl") as f:
        log = [json.loads(line) for line in f]
    curves = {}
    for key in ("loss", "val_loss"):
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            curves[key] = np.array(points)
    losses = np.concatenate([*curves.values()])[:, 1]
    gifs = sorted(glob(f"{escape(folder)}/samples/step_*.gif"))
    if len(gifs) > 5:  # five, with the first and the last
        gifs = [gifs[i] for i in np.linspace(0, len(gifs) - 1, 5).astype(int)]
    canvas = Image.new("RGB", (760, 450 if gifs else 300), "white")
    draw = ImageDraw.Draw(canvas)
    last = ", ".join(f"last {key} {points[-1, 1]:.4g}" for key, points in curves.items())
    title = f"{folder} up to step {log[-1]['step']}: loss (blue), val_loss (orange); {last}"
    draw.text((60, 4), title, fill="black")
    # 1. The curves. The few largest losses are those of the start: they leave the picture at its top.
    low, high = min(losses), np.quantile(losses, 0.98) + 1e-9
    for height, loss in zip((276, 150, 24), np.linspace(low, high, 3)):
        draw.line([(60, height), (748, height)], fill=(225, 225, 225))
        draw.text((4, height - 6), f"{loss:.4g}", fill="black")
    for key, points in curves.items():
        x = np.interp(points[:, 0], [0, log[-1]["step"]], [60, 748])
        y = np.interp(points[:, 1], [low, high], [276, 24])
        draw.line([*zip(x, y)], fill=COLOURS[key], width=2)
        if len(x) < 20:  # a lone point makes no line
            for px, py in zip(x, y):
                draw.ellipse([px - 3, py - 3, px + 3, py + 3], fill=COLOURS[key])
    # 2. The last frame of each GIF. Its third column is the prediction.
    for left, file in zip(range(60, 760, 138), gifs):
        with Image.open(file) as gif:
            gif.seek(gif.n_frames - 1)
            column = gif.width // 4
            frame = gif.convert("RGB").crop((2 * column, TOP, 3 * column - GAP, TOP + column - GAP))
        canvas.paste(frame.resize((128, 128)), (left, 302))
        draw.text((left, 432), os.path.basename(file), fill="black")
    write_whole(f"{folder}/loss.png", lambda temporary: canvas.save(temporary, format="PNG"))
