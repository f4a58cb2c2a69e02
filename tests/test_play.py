"""examples/play.py: a game's steps, what its server refuses, and the page in a real browser."""
import base64
import contextlib
import copy
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from examples import play, robot
from test_sample import MAIN, TOKENIZER, ends, trained  # noqa: F401, trained is a fixture
from tokenizer import load_tokenizer, psnr

STILL = {"drive": 0, "turn": 0, "look": 0, "grip": 0}
RIGHT = {"drive": 0, "turn": -1, "look": 0, "grip": 0}


def player(toy, trained, kind="masked", robot="built-in"):
    model, saved = sample.load_model(f"{trained[kind]}/ckpt.pt")
    clips = data.open_clips(f"{toy}/raw", "val")
    clips.meta = {**clips.meta, "robot": robot}
    return model, load_tokenizer(f"{toy}/{TOKENIZER[kind]}.pt"), dict(sample.settings_of(saved)), clips


@pytest.fixture
def game(toy, trained):
    return play.Game([player(toy, trained, kind) for kind in TOKENIZER])


@contextlib.contextmanager
def serving(game):
    server = play.open_server(game, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(game):
    with serving(game) as server:
        yield server


def ask(server, method, path, body="", kind="application/json", **headers):
    """-> status, type and text of an answer. A header of None is not sent; _ in its name stands for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"Content_Type": kind, **headers}
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers.get_content_type(), text


def picture(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


# ---- a game


def test_a_step_answers_the_last_frame_of_dream_and_truth(server):
    for path, body in (("/reset", ""), ("/step", RIGHT), ("/step", {**RIGHT, "model": 1}), ("/reset", RIGHT)):
        status, kind, text = ask(server, "POST", path, body)
        answer = json.loads(text)
        assert (status, kind) == (200, "application/json") and set(answer) == {"dream", "truth", "psnr", "ms"}
        [dream], [truth] = map(picture, answer["dream"]), map(picture, answer["truth"])
        assert dream.shape == truth.shape == (32, 32, 3) and answer["ms"] > 0
        assert answer["psnr"] == psnr(dream[None], truth[None]).tolist()
        assert (answer["psnr"][0] > 68) == (path == "/reset"), "both start from the same frame"


def test_a_seed_is_a_game_and_every_start_another(toy, trained, game):
    again = play.Game(game.players)
    first, second = game.reset(), game.reset()
    assert first == again.reset() and first["truth"] != second["truth"] == again.reset()["truth"]
    assert [game.step(**RIGHT) for _ in range(3)] == [again.step(**RIGHT) for _ in range(3)]
    assert play.Game(game.players, seed=7).reset() != first


def test_the_truth_is_the_true_world_stepped_by_hand(game):
    game.reset()
    world = copy.deepcopy(game.world)
    for command in [RIGHT] * 3 + [{**STILL, "drive": 1, "grip": 1}] * 9:
        shown = game.step(**command)
        state = game.states[-1]
        arms = robot.robot_step(world, state)
        assert np.array_equal(picture(shown["truth"][0]), robot.robot_view(world, arms, state, 32))
    assert world.pose.tolist() == game.world.pose.tolist()


def test_the_base_stops_where_the_free_floor_ends(game):
    game.reset()
    for _ in range(150):
        game.step(**{**STILL, "drive": 1})
        assert robot.is_free_floor(*game.world.pose[:2])
    assert game.states[-1, robot.DRIVE] == 0, "it came to an end"


def test_motions_ramp_and_stay_within_the_range_of_the_training_data(game):
    model, _, _, clips = game.players[0]
    mean, std = (x.numpy() for x in (model.standardise_actions.mean, model.standardise_actions.std))
    state = mean.copy()
    state[robot.HANDS] = 0
    for command in ({"drive": 1, "turn": 1, "look": 1, "grip": 1}, {"drive": -1, "turn": -1, "look": -1, "grip": 0}):
        for k in range(30):
            after = play.steer(state, {**STILL, **command}, model, clips)
            moved = np.abs(after - state)
            assert np.all(moved <= np.maximum(std / 2, 0.25) + 1e-6), "no more than a quarter of the way"
            state = after
            if k == 4 and command["drive"] == 1:
                goal = mean + 2 * std * play.LEAST["turn"] * -1
                for j, want in ((robot.DRIVE, goal), (robot.TURN, goal), (robot.NECK, mean - 2 * std)):
                    assert state[j] == pytest.approx(want[j], abs=1e-5), "within four frames from the mean, as in change_actions"
            moving = [robot.DRIVE, robot.TURN, robot.NECK]
            assert np.all(np.abs(state - mean)[moving] <= 2 * std[moving] + 1e-6)
            assert np.all((state[robot.HANDS] >= 0) & (state[robot.HANDS] <= 1))
    assert state[robot.TURN] < 0 and state[robot.NECK] > mean[robot.NECK] and not state[robot.HANDS].any()
    held = state.copy()
    for _ in range(9):
        state = play.steer(state, STILL, model, clips)
    assert not state[robot.DRIVE] and not state[robot.TURN], "no command, no velocity"
    assert np.array_equal(state[: robot.DRIVE], held[: robot.DRIVE]), "and the joints hold"


def test_a_dream_is_shown_to_its_end_unless_the_command_changes(game, monkeypatch):
    pasts = []

    def watched(model, tokenizer, past, actions, **settings):
        pasts.append(actions[0, :9].numpy().copy())
        return sample.continue_video(model, tokenizer, past, actions, **settings)

    monkeypatch.setattr(play, "continue_video", watched)
    game.reset()
    for _ in range(8):
        game.step(**STILL)
    assert len(pasts) == 1
    for command, n in ((STILL, 2), (RIGHT, 3), (RIGHT, 3), (STILL, 4)):
        before = game.states.copy()
        game.step(**command)
        assert len(pasts) == n
    assert np.array_equal(pasts[-1], before), "it goes on from the last nine states"
    game.step(model=1, **STILL)
    assert len(pasts) == 5


def test_a_dream_is_what_continue_video_makes_of_the_last_nine_frames(game):
    game.reset()
    model, tokenizer, settings, clips = game.players[0]
    frames, states = game.frames, game.states
    shown = [picture(game.step(**RIGHT)["dream"][0]) for _ in range(8)]
    course = torch.from_numpy(np.concatenate([states, game.states[1:]]))
    past = sample.to_latents(torch.from_numpy(frames), tokenizer)
    plain = sample.continue_video(model, tokenizer, past, course[None], noise=sample.noise_of([0]), **settings)
    assert np.array_equal(plain[0], shown)


def test_a_robot_of_your_own_plays_the_dream_alone(toy, trained):
    for kind, folder in (("masked", "raw"), ("flow", "cv")):
        model, tokenizer, settings, _ = player(toy, trained, kind)
        game = play.Game([(model, tokenizer, settings, data.open_clips(f"{toy}/{folder}", "val"))])
        shown = [game.reset(), game.step(**RIGHT), game.step(**RIGHT)]
        assert all(answer["truth"] is answer["psnr"] is None for answer in shown)
        assert shown[0]["dream"] != shown[1]["dream"] != game.reset()["dream"] != shown[0]["dream"]


def test_models_of_other_data_are_not_played_together(toy, trained):
    first, other = player(toy, trained), player(toy, trained, "flow")
    other[3].path = "elsewhere"
    with pytest.raises(data.DataError, match="elsewhere.*one by one"):
        play.Game([first, other])


# ---- what the server refuses


HUGE, STEP = "x" * 5000, json.dumps(STILL)
BAD = {
    "broken JSON": (400, "POST", "/step", STEP[:-1]),
    "deep JSON": (400, "POST", "/step", "[" * 4000),
    "no object": (400, "POST", "/step", "[1, 2]"),
    "no text": (400, "POST", "/step", b"\xff\xfe\x00"),
    "empty": (400, "POST", "/step", ""),
    "a missing key": (400, "POST", "/step", {"drive": 1}),
    "an unknown key": (400, "POST", "/step", {**STILL, "jump": 1}),
    "out of range": (400, "POST", "/step", {**STILL, "drive": 1.5}),
    "a grip below 0": (400, "POST", "/step", {**STILL, "grip": -1}),
    "NaN": (400, "POST", "/step", STEP.replace("0", "NaN", 1)),
    "infinity": (400, "POST", "/step", STEP.replace("0", "1e999", 1)),
    "a boolean": (400, "POST", "/step", {**STILL, "turn": True}),
    "a string": (400, "POST", "/step", {**STILL, "turn": "1"}),
    "a model that is not there": (400, "POST", "/step", {**STILL, "model": 2}),
    "half a model": (400, "POST", "/reset", {"model": 0.5}),
    "a huge body": (413, "POST", "/step", HUGE * 2000),
    "a body over 4 kB": (413, "POST", "/step", HUGE),
    "no length": (411, "POST", "/step", STEP, {"Transfer_Encoding": "chunked"}),
    "a wrong length": (411, "POST", "/step", STEP, {"Content_Length": "-5"}),
    "another type": (415, "POST", "/step", STEP, {"Content_Type": "text/plain"}),
    "another origin": (403, "POST", "/step", STEP, {"Origin": "http://evil.example"}),
    "no origin": (403, "POST", "/step", STEP, {"Origin": "null"}),
    "another host": (403, "POST", "/step", STEP, {"Host": "evil.example"}),
    "another site": (403, "GET", "/", "", {"Sec_Fetch_Site": "cross-site"}),
    "a path with ..": (404, "GET", "/../sample.py"),
    "another path": (404, "GET", "/assets/play.html"),
    "GET on /step": (405, "GET", "/step"),
    "POST on /": (405, "POST", "/", STEP),
    "PUT": (405, "PUT", "/step", STEP),
    "a long path": (414, "GET", "/" + "x" * 70000),
    "a second player": (409, "POST", "/step", STEP, {"X_Player": "another"}),
}


def test_bad_requests_get_a_sentence_and_play_goes_on(server):
    assert ask(server, "POST", "/step", STILL)[0] == 200
    for name, (status, method, path, *more) in BAD.items():
        body, headers = [*more, *["", {}][len(more):]]
        got, kind, text = ask(server, method, path, body, **headers)
        assert (got, kind) == (status, "text/plain"), (name, got, text)
        assert re.fullmatch(r"[A-Z/a-z].{10,300}\.", text), (name, text)
        states = server.game.states
        assert ask(server, "POST", "/step", STILL)[0] == 200, name
        assert np.array_equal(server.game.states[:-1], states[1:]), f"{name} did not step the game"


def test_what_is_no_http_gets_a_sentence_too(server):
    for request in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /step HTTP/1.1\r\n\r\n"):
        with socket.create_connection(server.server_address, timeout=30) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(9999), b""))
            assert re.match(rb"HTTP/1.0 4\d\d .*\r\n\r\n[^\n]+\.$", answer, re.S), answer


def test_a_place_is_free_when_its_player_is_silent(server, monkeypatch):
    assert ask(server, "POST", "/reset", X_Player="one")[0] == 200
    assert ask(server, "POST", "/reset", X_Player="two")[0] == 409
    assert ask(server, "POST", "/step", STILL, X_Player="one")[0] == 200
    server.last -= play.SILENCE
    truth = server.game.truth
    assert ask(server, "POST", "/step", STILL, X_Player="two")[0] == 200
    assert not np.array_equal(server.game.truth, truth) and server.player == "two"
    assert ask(server, "POST", "/step", STILL, X_Player="one")[0] == 409


def test_the_page_names_the_models_and_is_one_file(server):
    status, kind, text = ask(server, "GET", "/")
    assert (status, kind) == (200, "text/html") and "ABOUT" not in text
    assert '{"models": ["MaskedHWM base", "FlowHWM base"], "hz": 10.0, "truth": true}' in text
    assert not re.search("""(src|href)=["'](?!data:)""", text), "nothing is fetched from elsewhere"


# ---- the command


def test_the_server_is_bound_to_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    port, bound = f":{server.server_port:04X}", set()
    with open("/proc/net/tcp") as f:
        bound = {line.split()[1] for line in f if line.split()[1].endswith(port)}
    assert "0100007F" + port in bound and "00000000" + port not in bound


def test_what_the_command_refuses(toy, trained, server):
    ckpt, raw = f"{trained['flow']}/ckpt.pt", f"{toy}/raw"
    assert "in use" in ends("--ckpt", ckpt, "--play", "--port", server.server_port)
    assert "--port 70000" in ends("--ckpt", ckpt, "--play", "--port", 70000)
    assert "only --play takes several" in ends("--ckpt", ckpt, ckpt)


def test_ctrl_c_ends_it_in_a_sentence(trained):
    file = f"{trained['masked']}/ckpt.pt"
    process = subprocess.Popen(
        [sys.executable, f"{MAIN}/sample.py", "--ckpt", file, file, "--play", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "DISPLAY": ":77"})
    line = process.stdout.readline()
    assert re.fullmatch(r"play at http://127.0.0.1:\d+/, end with Ctrl-C\n", line)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and rest.strip() == "the game has ended"


# ---- the page in a browser


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium to test the page in a browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("install chromium and chromium-driver to test the page in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={tmp_path}/chromium", "window-size=800,760"):
        options.add_argument(f"--{flag}")
    try:
        browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    except Exception as e:  # selenium's word for a browser that does not start here
        pytest.skip(f"chromium does not start: {str(e):.200}")
    yield browser
    browser.quit()


def shipped(toy, name):
    model, saved = sample.load_model(f"{MAIN}/weights/{name}_tiny.pt")
    clips = data.open_clips(f"{toy}/raw", "val")
    clips.meta = {**clips.meta, "robot": "built-in"}
    return model, sample.load_tokenizer_for(saved["tokenizer"]), sample.settings_of(saved), clips


def shift(before, after):
    """By how many columns the walls, above the arms, have moved to the left."""
    before, after = before[: len(before) // 3], after[: len(after) // 3]
    width, errors = before.shape[1], {}
    for n in range(-8, 9):
        a, b = before[:, max(n, 0) : width + min(n, 0)], after[:, max(-n, 0) : width + min(-n, 0)]
        errors[n] = np.abs(a.astype(float) - b).mean()
    return min(errors, key=errors.get)


def watch(browser, frames=15, seconds=2):
    """Looks at the page while it shows that many frames, and that long -> how far each canvas turned right, in columns."""
    grab = "return [differences.length, ...['dream', 'truth'].map(id => document.getElementById(id).toDataURL())]"
    seen, begin = {}, time.time()
    while len(seen) < frames or time.time() - begin < seconds:
        number, *pngs = browser.execute_script(grab)
        if number and number not in seen:
            seen[number] = [picture(png.split(",")[1])[..., :3] for png in pngs]
        assert time.time() - begin < 120, browser.find_element("id", "trouble").text
    pairs = list(zip(seen.values(), list(seen.values())[1:]))
    return [sum(shift(a[i], b[i]) for a, b in pairs) for i in (0, 1)]


def test_in_a_browser_the_right_arrow_turns_the_picture_right(toy, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    with serving(play.Game([shipped(toy, "masked_base"), shipped(toy, "flow_full")])) as server:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        still = watch(browser)
        browser.refresh()  # another start, and no second player
        ActionChains(browser).key_down(Keys.ARROW_RIGHT).perform()
        right = watch(browser)
        ActionChains(browser).key_up(Keys.ARROW_RIGHT).perform()
        numbers = browser.find_element("id", "numbers").text
        if os.environ.get("PLAY_SCREENSHOT"):
            browser.save_screenshot(os.environ["PLAY_SCREENSHOT"])
        for dream_or_truth in (0, 1):
            assert right[dream_or_truth] > still[dream_or_truth] + 8, (still, right)
        assert re.fullmatch(r"[\d.]+ dB between dream and truth, [\d.]+ frames a second, [\d.]+ ms for this one", numbers)
        # P switches the model, R starts anew.
        assert browser.find_element("id", "model").text == "MaskedHWM base"
        before = server.game.world
        ActionChains(browser).send_keys("pr").perform()
        begin = time.time()
        while server.game.world is before or browser.find_element("id", "model").text != "FlowHWM full":
            assert time.time() - begin < 60
        assert not browser.find_element("id", "trouble").text
