"""Play: drive through a model's dream in a browser, beside the true world of the built-in robot.

    python sample.py --ckpt weights/masked_base_tiny.pt weights/flow_full_tiny.pt --play

`steer` makes states of the player's commands, `Game` makes frames of the states (Sec. 3.1, 3.2), and
`Handler` serves them to assets/play.html, by the standard library alone and to this machine alone:

    GET  /       the page
    POST /step   {"drive": -1..1, "turn": -1..1, "look": -1..1, "grip": 0..1}, of several models "model": 0..
                 -> {"dream": [PNG in base64], "truth": [PNG] or null, "psnr": [dB] or null, "ms": time}
    POST /reset  likewise, from another start; the command may be missing

What is wrong gets a 4xx and a sentence in plain text, and play goes on.
"""
import base64
import contextlib
import io
import itertools
import json
import math
import os
import re
import socket
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from data import HERE
from examples import robot
from sample import continue_video, to_frames, to_latents, velocities
from tokenizer import DataError, psnr, reason

# ---- commands become states ----------------------------------------------------------------------

STEERED = {  # joint: the command that moves it, and which way
    "LINEAR_VELOCITY": ("drive", 1), "ANGULAR_VELOCITY": ("turn", 1), "NECK_PITCH": ("look", -1),
    "LEFT_HAND_CLOSURE": ("grip", 1), "RIGHT_HAND_CLOSURE": ("grip", 1)}
LEAST = {"drive": -1, "turn": -1, "look": -1, "grip": 0}  # 1, the greatest, is forward, left, up, closed

def steer(state, command, model, clips):
    """The state (A,) a frame after `state`. Joints hold and velocities go to 0, but those of STEERED go where
    the command says: at most to two standard deviations from the training data's mean, and no faster than
    from the mean to there in four frames, as in sample.change_actions."""
    mean, std = model.standardise_actions.mean.cpu().numpy(), model.standardise_actions.std.cpu().numpy()
    goal, most = state.copy(), std / 2
    goal[velocities(clips)] = 0
    for joint in STEERED.keys() & set(clips.names):
        j, (name, sign) = clips.names.index(joint), STEERED[joint]
        wish = sign * command[name]
        if name == "grip":  # a closure goes from 0 to 1, and is not standardised
            goal[j], most[j] = wish, 0.25
        elif name != "look":
            goal[j] = abs(wish) * mean[j] + 2 * wish * std[j]
        elif wish:
            goal[j], most[j] = mean[j] + math.copysign(2, wish) * std[j], abs(wish) * most[j]
    return state + np.clip(goal - state, -most, most)

# ---- states become frames ------------------------------------------------------------------------

class Game:
    """A dream that is steered, and where the robot is the built-in one, the true world beside it."""

    def __init__(self, players, seed=0):
        """players: for each checkpoint (model, tokenizer, settings of its sampler, clips)."""
        self.players, self.seed, self.number = players, seed, itertools.count()
        self.generator = torch.Generator()
        model, tokenizer, _, self.clips = players[0]
        self.side = model.config.H * tokenizer.spatial  # of a frame, in pixels
        for model, tokenizer, _, clips in players[1:]:
            if clips.path != self.clips.path or model.config.H * tokenizer.spatial != self.side:
                raise DataError(f"--ckpt names models of {self.clips.path} and of {clips.path}, or of "
                                "several frame sizes: play them one by one")
        self.is_robot = self.clips.meta.get("robot") == "built-in" and self.clips.frame_stride == 1

    def reset(self, model=0, **_):
        """Another start: an episode of the built-in robot that is in no file, or a validation clip."""
        start = self.seed + next(self.number)
        self.generator.manual_seed(start)
        self.held, self.ahead, self.truth, self.world = None, [], None, None
        model, tokenizer, _, clips = self.players[model]
        n_p = model.layout.lengths[2]
        if self.is_robot:
            rng = np.random.default_rng([start, len("play")])
            self.world = robot.robot_world(rng)
            self.states = robot.robot_plan(rng, self.world, n_p)
            self.frames = np.stack([self.true_frame(state) for state in self.states])
            self.truth = self.frames[-1]
        else:
            clip = clips[start % len(clips)]
            self.states = clip["actions"][:n_p].numpy()
            self.frames = to_frames(clip["video"], tokenizer)[:n_p].numpy()
        return self.shown()

    def true_frame(self, state):
        arms = robot.robot_step(self.world, state)
        return robot.robot_view(self.world, arms, state, self.side)

    def step(self, model=0, **command):
        """A frame later. The model dreams eight frames with the command held, and they are shown one by one;
        when they are used up or the command changes, it dreams on from the last nine frames shown.

        Dreaming anew at every frame answers a command no sooner, but sends what was dreamt through the
        tokenizer eight times as often, which blurs: over 32 frames it lost 0.5 dB (masked) and 0.8 dB (flow).
        No part of an old dream serves a new one. In a window that has moved by a frame, latent 0 is another
        frame and latent 1 eight others, so all nine are encoded, a tenth of the time. The decoder is causal,
        but each future frame looks back over all of the past before the last layers."""
        if not self.ahead or (model, command) != self.held:
            self.held, self.ahead = (model, command), self.dream(model, command)
        state, frame = self.ahead.pop(0)
        self.states = np.append(self.states[1:], [state], axis=0)
        self.frames = np.append(self.frames[1:], [frame], axis=0)
        if self.is_robot:
            self.truth = self.true_frame(state)
        return self.shown()

    def dream(self, model, command):
        """[(state, frame)] of the next eight frames. Where the floor ends the base stops, as in the data."""
        model, tokenizer, settings, clips = self.players[model]
        states, pose = [*self.states], self.world and self.world.pose
        for _ in range(model.layout.lengths[3]):
            state = steer(states[-1], command, model, clips)
            if self.is_robot:
                if not robot.is_free_floor(*robot.moved(pose, *state[-2:])[:2]):
                    state[robot.DRIVE] = 0
                pose = robot.moved(pose, *state[-2:])
            states.append(state)
        past = to_latents(torch.from_numpy(self.frames), tokenizer)
        actions = torch.from_numpy(np.stack(states))[None]
        frames = continue_video(model, tokenizer, past, actions, noise=[self.generator], **settings)
        return list(zip(states[len(self.states):], frames[0].numpy()))

    def shown(self):
        """The last frame of the dream and of the truth, as /step and /reset answer them."""
        dream = self.frames[-1]
        if self.truth is None:
            return {"dream": [png(dream)], "truth": None, "psnr": None}
        difference = psnr(dream[None], self.truth[None])
        return {"dream": [png(dream)], "truth": [png(self.truth)], "psnr": difference.tolist()}

def png(frame):
    """A frame (H, W, 3) uint8 as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()

# ---- the server ----------------------------------------------------------------------------------

PATHS = {"/": "GET", "/step": "POST", "/reset": "POST"}
SILENCE = 10  # seconds until a silent player's place is free, and a silent connection is given up

class Refused(DataError):
    """Refused(status, sentence): a request that is not served."""

def demand(ok, status, sentence):
    if not ok:
        raise Refused(status, sentence)

class Handler(BaseHTTPRequestHandler):
    """Other pages in the same browser can reach this port, too: a foreign Host, Origin or Sec-Fetch-Site is
    refused, and so is a body that is not declared as JSON, for that a foreign page could send unasked."""
    timeout, default_request_version = SILENCE, "HTTP/1.0"

    def do_GET(self):
        try:
            kind, text = self.serve()
            self.reply(200, kind, text)
        except Refused as e:
            status, sentence = e.args
            self.reply(status, "text/plain", sentence)

    do_POST = do_GET

    def serve(self):
        """-> type and text of the answer."""
        hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        origins = [None, *(f"http://{host}" for host in hosts)]
        site = self.headers["Sec-Fetch-Site"]
        demand(self.headers["Host"] in hosts, 403, f"This game is played at http://{hosts[0]}/ alone.")
        demand(self.headers["Origin"] in origins, 403, "Another page may not play here.")
        demand(site in (None, "none", "same-origin"), 403, "Another site may not play here.")
        demand(self.path in PATHS, 404, f"There is nothing here but {', '.join(PATHS)}.")
        demand(self.command == PATHS[self.path], 405, f"{self.path} takes {PATHS[self.path]} alone.")
        if self.path == "/":
            with open(f"{HERE}/assets/play.html", encoding="utf-8") as f:
                return "text/html", f.read().replace("ABOUT", json.dumps(self.server.about))
        # One thread computes for all connections, so that nothing is stepped twice at once.
        player, command = self.headers["X-Player"] or "a program", self.read_command()
        turn = self.server.worker.submit(self.turn, player, command)
        return "application/json", json.dumps(turn.result())

    def read_command(self):
        """The command in the body, checked. NaN lies in no range, and `true` is no number."""
        kind, length = self.headers.get_content_type(), self.headers["Content-Length"] or ""
        demand(kind == "application/json", 415, f"The body is {kind}: send application/json.")
        demand(re.fullmatch("[0-9]{1,9}", length), 411, "The body's length is missing: send Content-Length.")
        demand(int(length) <= 4096, 413, f"A body of {length} bytes is too long: send at most 4096.")
        try:
            command = json.loads(self.rfile.read(int(length)) or "{}")
        except (ValueError, RecursionError, OSError):  # an OSError: it does not come, or breaks off
            command = None
        demand(isinstance(command, dict), 400, f"The body is no JSON object: send {', '.join(LEAST)}.")
        last = len(self.server.game.players) - 1
        unknown, missing = command.keys() - LEAST.keys() - {"model"}, LEAST.keys() - command.keys()
        demand(not unknown, 400, f"Unknown: {', '.join(unknown):.99}. Send {', '.join(LEAST)} and model.")
        demand(not missing or self.path == "/reset", 400, f"Missing: {', '.join(missing)}.")
        for name, value in command.items():
            low, high, kinds = (0, last, [int]) if name == "model" else (LEAST[name], 1, [int, float])
            ok = type(value) in kinds and low <= value <= high
            demand(ok, 400, f"{name} is {value!r:.50}: send a number from {low} to {high}.")
        return command

    def turn(self, player, command):
        """Who asks first is the player until it is silent. The page names itself, by a number of its own."""
        server, begin = self.server, time.monotonic()
        known = player == server.player
        demand(known or begin - server.last > SILENCE, 409,
               f"Another page plays: close it, or wait until it has been silent for {SILENCE} s.")
        if self.path == "/reset" or not known:
            answer = server.game.reset(**command)
        if self.path == "/step":
            answer = server.game.step(**command)
        server.player, server.last = player, time.monotonic()
        return {**answer, "ms": round(1000 * (server.last - begin), 1)}

    def reply(self, status, kind, text):
        body = text.encode()
        with contextlib.suppress(OSError):  # the page may have been closed while it waited
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", len(body))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)
            # A client that is still sending its body would miss the answer if the connection closed now.
            self.connection.shutdown(socket.SHUT_WR)
            while status >= 400 and self.rfile.read1(65536):
                pass

    def send_error(self, code, message=None, explain=None):
        """What http.server finds wrong, as a sentence: 501 is a method that it does not know."""
        self.reply({501: 405, 505: 400}.get(code, code), "text/plain", f"{message or 'Bad request'}.")

    def log_message(self, *about):
        """Ten requests a second are not worth a line each."""

def open_server(game, port):
    """The game's server, not yet serving. DataError where the port cannot be had."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as e:
        raise DataError(f"--port {port} cannot be had ({reason(e)}): give another, or 0 for any") from None
    server.game, server.player, server.last = game, None, -math.inf
    server.worker = ThreadPoolExecutor(1)
    models = [f"{type(model).__name__} {model.config.variant}" for model, *_ in game.players]
    server.about = {"models": models, "hz": game.clips.hz, "truth": game.is_robot}
    return server

def play(players, seed=0, port=8000):
    """Serves a game until Ctrl-C."""
    server = open_server(Game(players, seed), port)
    address = f"http://127.0.0.1:{server.server_port}/"
    # Without a display a browser would take over the terminal; without a terminal nobody waits for one.
    display = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    try:
        print(f"play at {address}, end with Ctrl-C", flush=True)
        if display and sys.stdout.isatty():
            webbrowser.open(address)
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nthe game has ended")
    finally:
        server.server_close()
