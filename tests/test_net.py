"""A net under the suite: deliberate defects that train, sample and score without an error, and what notices
each of them.

Every test names the defect it catches; each was put in for real and seen to fail here (TRAPS.md, rows 3, 4
and 24 to 29). Names that belong to other files' internals are used in the first section only.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import blocks
import data
import flow_hwm
import masked_hwm
import sample
import tokenizer as tok
from examples import train_tokenizer
import train as training
from blocks import VARIANTS
from conftest import TOY_PRESET
from examples import robot
from train import TrainConfig

TESTS = os.path.dirname(os.path.abspath(__file__))
MAIN = os.path.dirname(TESTS)
FAMILIES = ("masked", "flow")
ONE_STEP = {"masked": dict(K=1), "flow": dict(steps=1)}  # of a sampler
both = pytest.mark.parametrize("family", FAMILIES)


# ---- names of other files ------------------------------------------------------------------------

MODULES = {"masked": masked_hwm, "flow": flow_hwm}
CLASSES = {family: (module.Model, module.Config) for family, module in MODULES.items()}
SIZES = {family: module.PRESETS for family, module in MODULES.items()}


def paper_sampling(family):
    """The sampler's settings at the paper's preset."""
    return MODULES[family].SAMPLING["paper"]


def paper_training(family):
    """Steps, batch, learning rate, warm-up and decay at the paper's preset."""
    return MODULES[family].TRAINING["paper"]


def compile_blocks(model):
    blocks.compile_blocks(model)


def velocity(model, X_t, t, past, actions):
    """u(X_t, P, t) of Flow-HWM, at one time t for all clips."""
    return model.velocity(X_t, torch.tensor([t]), past, actions)


def logits(model, ids, actions):
    """Masked-HWM's logits of all future tokens, all hidden."""
    return model.logits(ids, torch.ones_like(ids[:, 2:], dtype=torch.bool), actions)


def position_table(model):
    """The learned vectors of positions: masked (3, S, D), of each latent pixel of a clip; flow (S, D), of
    each place."""
    return model.position if hasattr(model, "position") else model.place


def modulation_weights(model):
    """Of the blocks alone, not of the final layer: what turns the time embedding into shift, scale and
    gate."""
    return [p for name, p in model.blocks.named_parameters()
            if "modulation" in name and name.endswith("weight")]


def set_tiny_sizes(set_item):
    """Makes the tiny preset as small as the toy data; set_item as monkeypatch.setitem."""
    set_item(SIZES["masked"], "tiny", dict(TOY_PRESET, vocab_size=64))
    set_item(SIZES["flow"], "tiny", dict(TOY_PRESET, patch=1))


def settings_of(saved, cfg):
    """What sample.py --cfg makes of a checkpoint (None: the flag is not given)."""
    args = SimpleNamespace(steps=None, cfg=cfg, temperature=None, order=None, method=None)
    return sample.settings_of(saved, args)


# ---- toys ----------------------------------------------------------------------------------------

V, A = 11, 5  # vocabulary, action dimensions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(family, variant="full", **changes):
    """A model with random numbers in every parameter, so that nothing below holds because of a zero."""
    sizes = dict(variant=variant, n_layer=3, n_head=2, width=24, hidden=32, action_dim=A)
    if family == "masked":
        sizes.update(vocab_size=V, H=2, W=3)
    else:
        sizes.update(time_width=8, channels=3, H=4, W=6)
    Model, Config = CLASSES[family]
    model, g = Model(Config(**{**sizes, **changes})).eval(), generator()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.2
    return model


def small_clips(family, B=2):
    """(ids or latents of three latent frames, 17 actions) of B clips."""
    g = generator(1)
    actions = torch.randn(B, 17, A, generator=g)
    if family == "masked":
        return torch.randint(V, (B, 3, 2, 3), generator=g), actions
    return torch.randn(B, 3, 3, 4, 6, generator=g), actions


def past_of(family, clips):
    return clips[:, :2] if family == "masked" else clips[:, :, :2]


def draws_of(model, B=2):
    g = generator(2)
    return torch.utils.data.default_collate([model.draw(g) for _ in range(B)])


# ---- Flow-HWM hears the time (TRAPS 24) ----------------------------------------------------------


def change_from_noise_to_data(model):
    latents, actions = small_clips("flow")
    early, late = (velocity(model, latents[:, :, 2:], t, latents[:, :, :2], actions) for t in (0.1, 0.9))
    return (early - late).abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_velocity_depends_on_the_time(variant):
    """Caught: a time embedding that ignores t."""
    assert change_from_noise_to_data(small_model("flow", variant)) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_final_layer_alone_hears_the_time(variant):
    """Caught: the final layer's modulation zeroed or cut. With that of the blocks at zero nothing else hears
    t."""
    model = small_model("flow", variant)
    for p in modulation_weights(model):
        p.data.zero_()
    assert change_from_noise_to_data(model) > 1e-2
    model.modulation.weight.data.zero_()
    assert change_from_noise_to_data(model) == 0, "this test no longer finds all that hears the time"


# ---- bfloat16: branches that float32 never enters (TRAPS 25) -------------------------------------


def test_masked_loss_and_gradients_under_bfloat16():
    """Caught: a branch for bfloat16 that leaves the output table's gradient out. The last features are
    replaced by given ones, all 1,152 future tokens are hidden, and the reference is the plain loss in
    float64."""
    B, S, D, vocab = 2, 24 * 24, 16, 200
    model, g = small_model("masked", width=D, n_layer=1, vocab_size=vocab, H=24, W=24), generator(3)
    hidden = torch.randn(B, S, D, generator=g).requires_grad_()
    model.norm_out.register_forward_hook(lambda *_: hidden)
    ids, draws = torch.randint(vocab, (B, 3, 24, 24), generator=g), draws_of(model, B)
    draws["r"].zero_()  # nothing of the future is shown
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = model(ids, torch.randn(B, 17, A, generator=g), draws)
    (3 * loss).backward()
    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, model.out.weight, model.out.bias))
    exact = F.cross_entropy(h.flatten(0, 1) @ w.T + b, ids[:, 2].flatten(), reduction="sum")
    (3 * exact).backward()
    assert count == B * S and loss.item() == pytest.approx(exact.item(), rel=2e-3)
    pairs = {"hidden": (hidden, h), "weight": (model.out.weight, w), "bias": (model.out.bias, b)}
    for name, (ours, theirs) in pairs.items():
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.02, f"gradient of {name}: {error:.3f} off"


@both
@pytest.mark.parametrize("variant", ["full", "split"])
def test_what_blocks_add_up_stays_in_float32_under_autocast(family, variant):
    """Caught: a residual stream in bfloat16, in training or in the sampler, where every block's share is
    rounded to 8 bits of what the blocks before have said."""
    model, (clips, actions) = small_model(family, variant), small_clips(family)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    if family == "masked":  # what split's sampler adds up does not pass through the blocks' forward
        model.norm_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(clips, actions, draws_of(model))
        model.sample(past_of(family, clips), actions, generator=generator(), **ONE_STEP[family])
    assert len(seen) >= 2 * len(model.blocks) and set(seen) == {torch.float32}


# ---- positions, order of unmasking (TRAPS 26, 27) ------------------------------------------------


@both
def test_every_row_of_the_position_table_matters(family):
    """Caught: every latent (or every place) takes row 0: the output changes with each row alone."""
    model, (clips, actions) = small_model(family, at_place=family == "flow"), small_clips(family)
    if family == "masked":
        output = lambda: logits(model, clips, actions)
    else:
        output = lambda: velocity(model, clips[:, :, 2:], 0.3, clips[:, :, :2], actions)
    rows = position_table(model).data.flatten(0, -2)
    assert len(rows) == (3 * 2 * 3 if family == "masked" else 2 * 3)
    with torch.no_grad():
        before = output()
        for i, row in enumerate(rows):
            row[0] += 3  # one number, for what is added to all of them the norms take away
            assert (output() - before).abs().max() > 1e-4, f"row {i} changes nothing"
            row[0] -= 3


def test_the_order_of_unmasking_is_random():
    """Caught: tokens are kept in raster order. What stays after the first of two steps differs between clips
    that are alike, between seeds and between frames, and does not come in one piece."""
    model, kept = small_model("masked", n_layer=1, H=8, W=8), []
    past, actions = torch.zeros(2, 2, 8, 8, dtype=torch.long), torch.zeros(2, 25, A)
    for seed in (0, 1):
        trace = []
        model.sample(past, actions, K=2, generator=generator(seed), trace=trace)
        for latent in (0, 1):
            still_hidden = trace[2 * latent][1][:, latent].flatten(1)
            kept += [tuple((~clip).nonzero().flatten().tolist()) for clip in still_hidden]
    assert len(kept) == 8 == len(set(kept)), "two clips x two frames x two seeds"
    assert all(max(k) - min(k) > len(k) for k in kept), "in one piece"


# ---- training: clipping, decay, average, shards --------------------------------------------------


@pytest.fixture
def tiny_sizes(monkeypatch):
    """The tiny preset as small as the toy data, and afterwards the signal handlers that training replaces."""
    set_tiny_sizes(monkeypatch.setitem)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def train_config(toy, out, family="masked", **changes):
    folder = f"{toy}/{'dv' if family == 'masked' else 'cv'}"
    fields = dict(model=family, variant="full", preset="tiny", data=folder, out=str(out), steps=1, batch=4,
                  warmup=0, lr=0.01, dtype="float32", log_every=1, sample_every=-1)
    return TrainConfig(**{**fields, **changes})


def read_run(out):
    """What ckpt.pt holds, and the losses of log.jsonl."""
    with open(f"{out}/log.jsonl") as f:
        losses = [json.loads(line)["loss"] for line in f]
    return torch.load(f"{out}/ckpt.pt", weights_only=True), losses


def train(toy, out, *args, **changes):
    training.train(train_config(toy, out, *args, **changes))
    return read_run(out)


def first_weights(saved):
    """The weights from which the run of a checkpoint began."""
    torch.manual_seed(saved["config"]["seed"])
    Model, Config = CLASSES[saved["config"]["model"]]
    return Model(Config(**saved["model_config"])).state_dict()


def first_moments(saved):
    """{name: exp_avg} of AdamW: after one step a tenth of the gradient that it was given."""
    return {k: v["exp_avg"] for k, v in saved["optimizer"]["state"].items()}


@both
def test_gradients_are_clipped(toy, tmp_path, tiny_sizes, family):
    """Caught: clipping off. AdamW divides a gradient by its size, so a limit shows in the moments, and in the
    weights only when it comes below the 1e-8 that is added to that size."""
    moved = {}
    for limit in (1e-11, 1e6):
        saved, _ = train(toy, tmp_path / str(limit), family, grad_clip=limit, weight_decay=0.0)
        start, moments = first_weights(saved), first_moments(saved)
        norm = torch.stack([10 * m.norm() for m in moments.values()]).norm()
        assert norm == pytest.approx(limit, rel=1e-3) if limit < 1 else 1e-3 < norm < limit
        moved[limit] = max((saved["model"][k] - start[k]).abs().max().item() for k in moments)
    assert moved[1e-11] < 0.01 * 0.01 and moved[1e6] == pytest.approx(0.01, rel=0.01), "lr is 0.01"


def test_weights_decay_without_a_gradient(toy, tmp_path, tiny_sizes):
    """Caught: weight_decay is not handed on. A row of the embedding whose id is not in the batch gets no
    gradient, and is multiplied by 1 - lr * weight_decay."""
    saved, _ = train(toy, tmp_path, lr=0.1, weight_decay=0.5)
    start = first_weights(saved)["embed.weight"]
    absent = (first_moments(saved)["embed.weight"] == 0).all(dim=1)
    assert absent.any() and not absent.all()
    torch.testing.assert_close(saved["model"]["embed.weight"][absent], start[absent] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("ema, steps", [(0.999, 2), (0.8, 50)])
def test_the_average_by_hand(toy, tmp_path, tiny_sizes, ema, steps):
    """Caught: the decay of the average fixed after step 1. It is (1 + step) / (10 + step), at most --ema."""
    weights = []

    def remember(optimizer, *_):
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())

    hook = register_optimizer_step_post_hook(remember)
    try:
        saved, _ = train(toy, tmp_path, steps=steps, ema=ema, log_every=steps)
    finally:
        hook.remove()
    assert len(weights) == steps
    (name,) = [k for k, w in saved["model"].items() if torch.equal(w, weights[-1])]
    average = first_weights(saved)[name]
    for step, w in enumerate(weights, start=1):
        decay = min(ema, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    torch.testing.assert_close(saved["ema"][name], average)
    assert not torch.allclose(average, weights[-1], atol=1e-4)


DRIVER = """
    import json, os, sys
    sys.path[:0] = [{main!r}, {tests!r}]
    import torch, test_net, train
    torch.set_num_threads(1)
    test_net.set_tiny_sizes(dict.__setitem__)
    for port, config in json.load(open(sys.argv[1])):
        os.environ["MASTER_PORT"] = str(port)
        train.train(train.TrainConfig(**config))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_shards(toy, tmp_path_factory):
    """Both models, --shard with two micro-batches, on two processes with torchrun's environment. -> folder of
    the runs"""
    root = tmp_path_factory.mktemp("shards")
    runs = []
    for family in FAMILIES:
        config = train_config(toy, root / family, family, steps=3, lr=1e-3, accum=2, shard=True)
        runs.append((free_port(), vars(config)))
    (root / "driver.py").write_text(textwrap.dedent(DRIVER).format(main=MAIN, tests=TESTS))
    (root / "runs.json").write_text(json.dumps(runs))
    world = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost")
    jobs = []
    for rank in "01":
        own = dict(world, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1")
        command = [sys.executable, root / "driver.py", root / "runs.json"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        jobs.append(subprocess.Popen(command, env=own, **quiet))
    try:
        said = [job.communicate(timeout=240)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said[0][-2000:] + said[1][-2000:]
    return root


@both
def test_shards_with_micro_batches_are_one_process(toy, two_shards, tmp_path, tiny_sizes, family):
    """Caught: gradients are summed over the processes after the wrong micro-batch."""
    one, losses = train(toy, tmp_path, family, steps=3, lr=1e-3)
    two, sharded_losses = read_run(two_shards / family)
    np.testing.assert_allclose(sharded_losses, losses, atol=1e-5)
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        for name, w in one[part].items():
            torch.testing.assert_close(two[part][name], w, rtol=0, atol=1e-4, msg=f"{part} {name}")


# ---- rollouts go on from their own dream (TRAPS 28) ----------------------------------------------


@both
def test_every_window_of_a_rollout_has_its_own_actions_and_past(toy, monkeypatch, family):
    """Caught: later windows reuse the first window's actions, or start from its first nine frames. A spy on
    the sampler sees, for window k, the actions of frames 8k to 8k + 16, and the dream's last nine frames
    encoded."""
    sizes = dict(vocab_size=64) if family == "masked" else dict(channels=4, patch=1)
    model = small_model(family, H=4, W=4, action_dim=25, **sizes)
    tokenizer = tok.load_tokenizer(f"{toy}/{'dv' if family == 'masked' else 'cv'}.pt")
    clips, dreamt, seen = data.open_clips(f"{toy}/raw", "val"), model.sample, []

    def spy(past, actions, **settings):
        future = dreamt(past, actions, **settings)
        seen.append((past, actions, future))
        return future

    monkeypatch.setattr(model, "sample", spy)
    sample.dream(model, tokenizer, clips, num=1, windows=3, **ONE_STEP[family])
    assert len(seen) == 3, "three windows, of the prediction and of that with other actions at once"
    own = torch.cat([clips[0]["actions"], clips[1]["actions"]])  # one recording, without a gap
    for i, row in enumerate(("prediction", "other")):
        calls = [[x[i : i + 1] for x in call] for call in seen]
        for k in range(3):
            past, actions, _ = calls[k]
            same = torch.equal(actions[0], own[8 * k : 8 * k + 17])
            assert same == (row == "prediction"), f"{row}: actions of window {k}"
            if k:
                before, _, future = calls[k - 1]
                video = tokenizer.decode(torch.cat([before, future], dim=-3))
                expected = tokenizer.encode(video[:, :, -9:].clamp(-1, 1))
                torch.testing.assert_close(past, expected, msg=f"{row}: past of window {k}")
        assert not torch.equal(calls[1][1], calls[0][1]) and not torch.equal(calls[2][1], calls[1][1])


# ---- conditions: the caller's tensors, obedience, guidance (TRAPS 3, 4, 29) ----------------------


@both
def test_statistics_do_not_write_into_the_callers_tensors(family):
    """Caught: actions or latents standardised in place: the second dream of a clip starts from other actions.
    With mean 0 and deviation 1, as other tests have them, that would not show."""
    model, (clips, actions) = small_model(family), small_clips(family)
    latents = [torch.full((3,), 2.0), torch.full((3,), 3.0)] if family == "flow" else []
    model.set_statistics(torch.full((A,), 2.0), torch.full((A,), 3.0), *latents)
    kept = clips.clone(), actions.clone()
    model(clips, actions, draws_of(model))
    model.sample(past_of(family, clips), actions, **({"steps": 2, "cfg": 3.0} if family == "flow" else {}))
    assert torch.equal(clips, kept[0]) and torch.equal(actions, kept[1])


@pytest.mark.parametrize("name", ["masked_base", "flow_full"])
def test_shipped_models_obey_their_actions(name):
    """Caught: actions that reach the video in a gradient, but not in what a trained model says (delta_psnr >
    0)."""
    model, saved = sample.load_model(f"{MAIN}/weights/{name}_tiny.pt")
    tokenizer = sample.load_tokenizer_for(saved["tokenizer"])
    episodes = [robot.robot_episode(900 + i, 17) for i in range(6)]
    video = data.to_video(torch.stack([torch.from_numpy(frames) for frames, _ in episodes]))
    actions = torch.stack([torch.from_numpy(states) for _, states in episodes])
    others = torch.cat([actions[:, :9], actions.roll(1, dims=0)[:, 9:]], dim=1)
    with torch.no_grad():
        latents = tokenizer.encode(video)
        past = latents.narrow(latents.ndim - 3, 0, 2)
        scores = []
        for a in (actions, others):
            future = model.sample(past, a, generator=generator(), **settings_of(saved, None))
            frames = tokenizer.decode(torch.cat([past, future], dim=-3))[:, :, 9:]
            error = (frames.clamp(-1, 1) - video[:, :, 9:]).square().mean((1, 2, 3, 4))
            scores.append(-10 * error.log10().mean())
    assert scores[0] - scores[1] > 1, f"{scores[0] - scores[1]:.2f} dB"


def test_the_default_guidance_fits_a_model_that_never_dropped_its_conditions():
    """Caught: guidance of a model that has never seen a dropped condition, which answers at random there."""
    saved = {"config": {"model": "flow", "preset": "tiny"}, "model_config": {"p_drop": 0.0}}
    assert settings_of(saved, None)["cfg"] == 1


# ---- the paper's numbers -------------------------------------------------------------------------

PAPER = {  # each with where it stands: a section of the paper, or of DESIGN.md what the paper leaves open
    "masked": [
        ("Sec. 3.1", "model", dict(n_layer=24, n_head=8, width=512, hidden=2048, rho_max=0.2)),
        ("Sec. 3.1, DV8x8x8", "model", dict(vocab_size=64_000, H=32, W=32, temporal=8, T_p=2, T_f=1)),
        ("Sec. 3.1, K = 2", "sampler", dict(K=2)),
        ("Sec. 2.2.2: p(L), as it is", "sampler", dict(temperature=1.0)),
        ("Sec. 3.1", "training", dict(steps=60_000, batch=16, lr=3e-5, warmup=100, decay="linear")),
        ("DESIGN 5: tiny only", "model", dict(at_place=False, share_digits=False)),
    ],
    "flow": [
        ("Sec. 3.2", "model", dict(n_layer=17, width=1172, patch=2)),
        ("Sec. 3.2, CV8x16x16", "model", dict(channels=16, H=16, W=16, temporal=8, T_p=2, T_f=1)),
        ("DESIGN 2a, from Table 2", "model", dict(n_head=4, hidden=4 * 1172, time_width=256)),
        ("Sec. 2.3: small and positive", "model", dict(sigma_min=1e-4)),
        ("DESIGN 2c", "model", dict(p_drop=0.15, drop="both", t_sampling="uniform")),
        ("Sec. 3.2", "sampler", dict(steps=50, cfg=3.0)),
        ("Sec. 3.2", "training", dict(steps=150_000, batch=128, lr=1e-4, warmup=0, decay="cosine")),
        ("DESIGN 5: tiny only", "model", dict(at_place=False)),
    ],
}


@both
def test_the_papers_numbers(family):
    """Caught: a constant of the paper changed: K, temperature, steps, guidance, rho_max, p_drop, heads,
    sigma_min, rates."""
    _, Config = CLASSES[family]
    ours = {"model": vars(Config(**SIZES[family]["paper"])), "sampler": paper_sampling(family),
            "training": paper_training(family)}
    for section, part, numbers in PAPER[family]:
        for name, value in numbers.items():
            assert ours[part][name] == value, f"{part} {name} ({section})"
    assert ours["model"]["action_dim"] == 25, "DESIGN 3"


def test_the_optimisers_settings(toy, tmp_path, tiny_sizes):
    """Caught: AdamW's settings changed, by default or on the way to the optimiser. Sec. 3.1 and 3.2 say
    AdamW; its numbers, the limit of the gradient and the average are this project's (README, deviations)."""
    default = TrainConfig()
    assert (default.weight_decay, default.grad_clip, default.ema, default.seed) == (0.01, 1.0, 0.999, 0)
    saved, _ = train(toy, tmp_path)
    (group,) = saved["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.95) and group["eps"] == 1e-8 and group["weight_decay"] == 0.01
    assert not group["amsgrad"] and not group["maximize"]


# ---- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family, variant, what", [("masked", "base", "loss"), ("masked", "split", "sampler"),
                                                   ("flow", "full", "loss"), ("flow", "full", "sampler")])
def test_compile_blocks_compiles(monkeypatch, family, variant, what):
    """Caught: compile_blocks leaves every block as it is. A backend that changes nothing counts the compiled
    graphs that run: one for each block but the last, which stays plain (torch 2.13)."""
    ran, real = [], torch.compile

    def counting(graph, _):
        def run(*inputs):
            ran.append(graph)
            return graph(*inputs)
        return run

    def compile(f, *args, **options):
        return real(f, *args, **{**options, "backend": counting})

    def answer():
        if what == "loss":
            return model(clips, actions, draws_of(model, 1))[0]
        return model.sample(past_of(family, clips), actions, generator=generator(), **ONE_STEP[family])

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile)
    model, (clips, actions) = small_model(family, variant, n_layer=2), small_clips(family, B=1)
    with torch.no_grad():
        plain = answer()
        compile_blocks(model)
        torch.testing.assert_close(answer(), plain)
    assert len(ran) >= len(model.blocks) - 1


# ---- the built-in robot: its states move its world -----------------------------------------------

J = {name: i for i, name in enumerate(data.JOINTS)}
HZ = 10


def world(x=2.0, y=1.0, yaw=0.0, objects=None):
    return robot.RobotWorld(np.array([x, y, yaw]), np.zeros((4, 3)) + 9 if objects is None else objects)


def state(**joints):
    s = np.zeros(25, np.float32)
    for name, value in joints.items():
        s[J[name]] = value
    return s


def test_turning_left_moves_the_scene_to_the_right():
    """Caught: the sign of the angular velocity. Positive is to the left: what was in the middle of the view
    is right of it after a turn, by FOCAL tan(angle) half widths."""
    turn = 0.2  # radians in one frame
    states = np.stack([state(), state(ANGULAR_VELOCITY=turn * HZ)])
    first, second = robot.robot_render(states, world(), size=64)
    far = slice(0, 24)  # rows above the arms
    shifts = {}
    for shift in range(-12, 13):
        moved = np.roll(first, shift, axis=1)[far, 12:-12].astype(float)
        shifts[shift] = abs(moved - second[far, 12:-12]).mean()
    assert min(shifts, key=shifts.get) == pytest.approx(32 * np.tan(turn) / np.tan(np.radians(85 / 2)), abs=2)


@pytest.mark.parametrize("yaw", [0.0, 0.5, 2.0, -2.5])
def test_driving_moves_the_base_ahead(yaw):
    """Caught: the linear velocity ignored. v metres a second are v / hz in a frame, the way that the base
    looks, after its turn of that frame."""
    w = world(yaw=yaw)
    robot.robot_step(w, state(LINEAR_VELOCITY=0.5, ANGULAR_VELOCITY=0.3))
    heading = yaw + 0.3 / HZ
    expected = [2 + 0.05 * np.cos(heading), 1 + 0.05 * np.sin(heading), heading]
    np.testing.assert_allclose(w.pose, expected, atol=1e-6)


def test_driving_ahead_makes_what_is_ahead_larger():
    """Caught: the linear velocity ignored, or backwards, in the picture: half a metre nearer to the wall at
    two metres, a window on it is wider."""
    frames = robot.robot_render(np.stack([state(), state(LINEAR_VELOCITY=5.0)]), world(x=1.0, y=4.2), size=64)
    scales = {}
    grid = torch.stack(torch.meshgrid(*2 * [(torch.arange(64) + 0.5) / 32 - 1], indexing="xy"), dim=-1)[None]
    first, second = (torch.from_numpy(f).permute(2, 0, 1)[None].float() for f in frames)
    for scale in (0.9, 1.0, 1.0 + 0.5 / 4.42):  # the wall x = 6 is 4.92 m before the eye, then 4.42
        resized = F.grid_sample(first, grid / scale, align_corners=False, padding_mode="border")
        scales[scale] = (resized - second)[..., 16:32, 16:48].abs().mean().item()
    assert min(scales, key=scales.get) > 1, scales


@pytest.mark.parametrize("hand, side", [(0, "LEFT"), (1, "RIGHT")])
def test_a_hand_that_closes_near_an_object_carries_it(hand, side):
    """Caught: hands never grab. What was near is at the grip from then on, wherever the arm goes, until the
    hand opens."""
    pose = {f"{side}_ELBOW_PITCH": 1.2}
    grip = robot.robot_step(world(), state(**pose))[hand, 4]
    objects = np.array([[4.0, 4, 0]] * 4)
    objects[2] = grip - (0, 0, 0.06) + (0.04, 0.03, 0)
    w = world(objects=objects.copy())
    closed = {f"{side}_HAND_CLOSURE": 1.0}
    for step in (pose, {f"{side}_ELBOW_PITCH": 0.8}, {f"{side}_SHOULDER_PITCH": 0.6, "LINEAR_VELOCITY": 1.0}):
        arms = robot.robot_step(w, state(**step, **closed))
        np.testing.assert_allclose(w.objects[2], arms[hand, 4] - (0, 0, 0.06), atol=1e-6)
    height = w.objects[2, 2]
    robot.robot_step(w, state(**step))
    assert w.objects[2, 2] < height, "what is let go falls"
    np.testing.assert_array_equal(w.objects[[0, 1, 3]], objects[[0, 1, 3]])


@pytest.mark.parametrize("joint, change", [
    ("LINEAR_VELOCITY", 2.0), ("ANGULAR_VELOCITY", 1.0), ("NECK_PITCH", 0.2), ("LEFT_ELBOW_PITCH", 0.4),
    ("RIGHT_SHOULDER_PITCH", 0.4)])
def test_frame_k_shows_the_state_of_frame_k(joint, change):
    """Caught: the base (or anything else) some frames late. A change of state 6 shows in frame 6 and in none
    before."""
    seed, n, k = 3, 9, 6
    frames, states = robot.robot_episode(seed, n, 32)
    start = robot.robot_world(np.random.default_rng(seed))
    np.testing.assert_array_equal(frames, robot.robot_render(states, start, 32))
    states[k, J[joint]] += change
    changed = robot.robot_render(states, start, 32)
    np.testing.assert_array_equal(changed[:k], frames[:k])
    assert abs(changed[k].astype(int) - frames[k]).mean() > 0.5


def test_hands_take_hold_in_one_clip_of_eight_or_so():
    """Caught: hands that open and close anywhere, so that a model hardly ever sees an object carried."""
    carried = []
    for seed in range(30):
        rng = np.random.default_rng(1_000_000 + seed)
        world = robot.robot_world(rng)
        held = []
        for state in robot.robot_plan(rng, world, 153):
            robot.robot_step(world, state)
            held.append(max(world.held) >= 0)
        carried += np.reshape(held, (9, 17)).any(axis=1).tolist()
    assert 0.07 < np.mean(carried) < 0.2


# ---- training and scoring a tokenizer ------------------------------------------------------------


def test_training_a_tokenizer_improves_it(toy, tmp_path):
    """Caught: the loss with the wrong sign, or no step of the optimiser. Scored on the recording that it is
    trained on."""
    shutil.copytree(f"{toy}/raw/val_v2.0", tmp_path / "raw" / "train_v2.0")
    shutil.copytree(f"{toy}/raw/val_v2.0", tmp_path / "raw" / "val_v2.0")
    command = ["train", "--data", f"{tmp_path}/raw", "--kind", "continuous", "--device", "cpu"]
    command += ["--batch", "2", "--channels", "4", "--latent_channels", "4"]
    scores = {}
    for steps in (1, 20):
        tok.main([*command, "--out", f"{tmp_path}/{steps}", "--steps", f"{steps}"])
        scores[steps] = torch.load(f"{tmp_path}/{steps}/tokenizer.pt", weights_only=True)["psnr"]
    assert scores[20] > scores[1] + 1, scores


def test_the_round_trip_is_of_clips_spread_over_the_split(toy):
    """Caught: the score of the first clip given out as that of all."""
    tokenizer, clips = tok.load_tokenizer(f"{toy}/cv.pt"), data.open_clips(f"{toy}/raw", "val")
    scores, latents = train_tokenizer.round_trip(tokenizer, clips, 3)
    alone = [train_tokenizer.round_trip(tokenizer, [clips[i]], 1) for i in (0, 2, 4)]
    assert scores["val_psnr"] == pytest.approx(np.mean([s["val_psnr"] for s, _ in alone]), abs=1e-4)
    assert abs(scores["val_psnr"] - alone[0][0]["val_psnr"]) > 1e-3, "the first clip is not like the others"
    assert torch.equal(latents, torch.cat([z for _, z in alone])) and not torch.equal(latents[0], latents[1])


def test_batches_of_a_tokenizer_are_of_one_size():
    """Caught: ragged batches, and processes that train on the same clips."""
    clips = [{"video": torch.full((9, 8, 8, 3), 10 * i, dtype=torch.uint8)} for i in range(5)]
    for step in range(4):
        whole = train_tokenizer.draw_batch(clips, 8, 0, step)
        shares = torch.cat([train_tokenizer.draw_batch(clips, 8, 0, step, rank, world=2) for rank in (0, 1)])
        assert whole.shape == shares.shape == (8, 3, 9, 8, 8)
        assert torch.equal(whole[:, 0, 0, 0, 0].sort()[0], shares[:, 0, 0, 0, 0].sort()[0])



# ---- the filter of AtPlace -----------------------------------------------------------------------


def filtering():
    """An AtPlace whose filter alone speaks: values and means pass unchanged, kernels are the bias's alone."""
    layer = blocks.AtPlace(action_dim=3, D=16, temporal=8)
    for linear in (layer.value, layer.moved):
        linear.weight.data = torch.eye(16)
        linear.bias.data.zero_()
    layer.kernel.weight.data.zero_()
    return layer, blocks.Layout(2, 1, 8, 8, 8)


def test_the_filter_moves_the_picture():
    """Caught: a kernel that is read across rows and columns in the wrong order, or heads that mix."""
    layer, layout = filtering()
    kernel = torch.full((8, 7, 7), -30.0)  # eight heads, 7 x 7 neighbours
    kernel[:, 3 + 1, 3 - 2] = 30  # a row below, two columns to the left
    layer.kernel.bias.data = kernel.flatten()
    image = torch.randn(1, 8, 8, 16)
    moved = layer.filter(image.flatten(1, 2), torch.randn(1, 1, 1, 24), layout).view(8, 8, 16)
    torch.testing.assert_close(moved[:7, 2:], image[0, 1:, :6])
    assert moved[7].abs().max() < 1e-4 and moved[:, :2].abs().max() < 1e-4, "beyond the edge there is nothing"


def test_every_position_has_a_kernel_of_its_own_that_obeys_the_actions():
    """Caught: kernels made of the actions alone (a drive widens the picture from the middle: every position
    moves in its own direction), or of the position alone."""
    layer, layout = filtering()
    torch.nn.init.normal_(layer.kernel.weight)
    here = torch.randn(1, 64, 16)
    picture = torch.ones(1, 64, 16).cumsum(1) / 64
    layer.value.forward = lambda p: picture  # the same values, whatever stands there
    actions = torch.randn(2, 1, 1, 24)
    a, b = (layer.filter(here, action[None], layout) for action in actions)
    assert (a - b).abs().amax(-1).min() > 1e-4, "some position does not hear the actions"
    swapped = here.clone()
    swapped[:, 20] = here[:, 40]
    other = layer.filter(swapped, actions[:1], layout)
    changed = (other - a).abs().amax(-1)[0, 0] > 1e-6
    assert changed[20] and changed.sum() == 1, "a kernel is made of what stands at its own position"
