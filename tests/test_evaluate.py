"""evaluate.py: numbers that can be worked out by hand, and TRAPS rows 4, 14 to 17 and 32 to 34. Downloads nothing."""
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import evaluate
import sample
from conftest import TOY_PRESET
from data import JOINTS, DataError, open_clips
from evaluate import frechet, kid
from examples import inception
from examples.inception import Inception
from flow_hwm import FlowConfig, FlowHWM, interpolate, target_velocity
from masked_hwm import MaskedConfig, MaskedHWM
from tokenizer import fingerprint, load_tokenizer, to_uint8, to_video

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def toy_model(name):
    torch.manual_seed(0)
    if name == "masked":
        model = MaskedHWM(MaskedConfig(**TOY_PRESET, variant="base", vocab_size=64, H=4, W=4))
    else:
        model = FlowHWM(FlowConfig(**TOY_PRESET, time_width=16, channels=4, patch=1, H=4, W=4))
    return model.eval().requires_grad_(False)


def parts(name, toy):
    kind = {"masked": "dv", "flow": "cv"}[name]
    return toy_model(name), load_tokenizer(f"{toy}/{kind}.pt"), open_clips(f"{toy}/raw", "val")


SETTINGS = {"masked": dict(K=2, temperature=1.0), "flow": dict(steps=3, cfg=1.0)}


def numpy_psnr(a, b):
    return float(np.mean([10 * np.log10(255**2 / max(0.01, np.mean((x.astype(float) - y.astype(float)) ** 2)))
                          for x, y in zip(a, b)]))


# ---- frames ----------------------------------------------------------------------------------------------


def test_ssim_of_one_window_by_the_formula():
    r = np.random.default_rng(1)
    a, b = r.integers(0, 256, (2, 1, 11, 11, 3), dtype=np.uint8)  # one window fits
    w = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(w, w) / np.outer(w, w).sum()
    want = []
    for c in range(3):
        x, y = a[0, :, :, c].astype(float), b[0, :, :, c].astype(float)
        m, n = (w * x).sum(), (w * y).sum()
        v_x, v_y, cov = (w * (x - m) ** 2).sum(), (w * (y - n) ** 2).sum(), (w * (x - m) * (y - n)).sum()
        want.append((2 * m * n + 6.5025) / (m * m + n * n + 6.5025)  # (0.01 * 255)^2, (0.03 * 255)^2
                    * (2 * cov + 58.5225) / (v_x + v_y + 58.5225))
    assert evaluate.ssim(a, b)[0] == pytest.approx(np.mean(want), abs=1e-9)
    assert evaluate.ssim(a, a)[0] == pytest.approx(1)


def test_ssim_equals_convolutions_with_the_window():
    r = np.random.default_rng(2)
    a = r.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    b = (a + r.normal(0, 20, a.shape)).clip(0, 255).astype(np.uint8)
    g = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(g, g) / g.sum() ** 2)[None, None]
    blur = lambda x: F.conv2d(x, window)
    x, y = (torch.from_numpy(v).double().permute(0, 3, 1, 2).reshape(9, 1, 24, 20) for v in (a, b))
    m, n = blur(x), blur(y)
    v_x, v_y, cov = blur(x * x) - m * m, blur(y * y) - n * n, blur(x * y) - m * n
    want = (2 * m * n + 6.5025) * (2 * cov + 58.5225) / ((m * m + n * n + 6.5025) * (v_x + v_y + 58.5225))
    np.testing.assert_allclose(evaluate.ssim(a, b), want.reshape(3, -1).mean(1), rtol=1e-12)


def test_bootstrap_interval():
    x, each = np.random.default_rng(2).normal(3, 2, 100), np.arange(100)
    low, high = evaluate.interval(x, each)
    assert (low, high) == tuple(evaluate.interval(x, each)) and low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 10, rel=0.05)  # 95 %: neither 90 (1.64) nor 99 (2.58)
    assert np.mean([low, high]) == pytest.approx(x.mean(), abs=0.1 * (high - low))
    assert evaluate.interval([2.5] * 8, range(8)) == [2.5, 2.5]
    assert evaluate.interval(x[:7], each[:7]) is None


def test_intervals_resample_recordings():
    """TRAPS 33: ten clips of a recording that say the same are one piece of evidence, not ten."""
    x, recordings = np.random.default_rng(3).normal(0, 1, 30), np.arange(300) // 10
    low, high = evaluate.interval(np.repeat(x, 10), recordings)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 30**0.5, rel=0.1)
    low_clips, high_clips = evaluate.interval(np.repeat(x, 10), np.arange(300))
    assert high_clips - low_clips == pytest.approx((high - low) / 10**0.5, rel=0.1)
    uneven = np.r_[np.zeros(20), np.ones(10)]  # a long recording counts for its clips: the mean is 1/3
    assert evaluate.interval(uneven, [0] * 20 + [1] * 10) == [0, 1]
    assert np.mean(evaluate.interval(np.tile(uneven, 50), np.repeat(np.arange(100), [20, 10] * 50))
                   ) == pytest.approx(1 / 3, abs=0.02)


# ---- sets of frames --------------------------------------------------------------------------------------


def gaussian(mean, cov):
    """Features whose mean and covariance are exactly these."""
    x = np.random.default_rng(0).normal(size=(100, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + x @ np.linalg.cholesky(cov).T


def test_closed_form_gaussians():
    one, d = np.eye(7), np.array([1.0, 4, 9, 16, 25, 36, 49])
    zero, two = np.zeros(7), np.full(7, 2.0)
    assert frechet(gaussian(zero, one), gaussian(two, one)) == pytest.approx(7 * 2**2)
    assert frechet(gaussian(zero, one), gaussian(zero, 9 * one)) == pytest.approx(7 * (3 - 1) ** 2)
    assert frechet(gaussian(zero, np.diag(d)), gaussian(zero, np.diag(d[::-1]))) == pytest.approx(
        ((d**0.5 - d[::-1] ** 0.5) ** 2).sum())
    c, s = np.cos(0.7), np.sin(0.7)  # not commuting: tr (A B)^1/2 of 2 x 2 is (tr A B + 2 (det A B)^1/2)^1/2
    R, A = np.array([[c, -s], [s, c]]), np.diag([1.0, 9.0])
    B = R @ A @ R.T
    want = 20 - 2 * np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    assert frechet(gaussian([0, 0], A), gaussian([0, 0], B)) == pytest.approx(want)


def decaying(n, d, seed, shift=0.0):
    """Features like Inception's: positive, most directions narrow."""
    return np.abs(np.random.default_rng(seed).normal(size=(n, d)) * np.exp(-np.arange(d) / (d / 8)) + shift)


def by_eigenvalues(x, y):
    """The textbook's formula: tr (S_1 S_2)^1/2 is the sum of the roots of the eigenvalues of S_1^1/2 S_2 S_1^1/2."""
    S_1, S_2 = np.cov(x.T), np.cov(y.T)
    w, v = scipy.linalg.eigh(S_1)
    root = v * np.sqrt(w.clip(min=0)) @ v.T
    roots = np.sqrt(scipy.linalg.eigvalsh(root @ S_2 @ root).clip(min=0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(S_1) + np.trace(S_2) - 2 * roots.sum()


def test_64_frames_in_2048_dimensions():
    x, y = decaying(64, 2048, 0), decaying(64, 2048, 1, 0.1)
    value = frechet(x, y)
    assert np.isfinite(value) and value > 0 and abs(frechet(x, x)) < 1e-6
    n, gap = 64, x.mean(0) - y.mean(0)  # a second formula, from inner products of frames
    g = (x - x.mean(0)) @ (y - y.mean(0)).T
    spread = np.square(x - x.mean(0)).sum() + np.square(y - y.mean(0)).sum() - 2 * scipy.linalg.svdvals(g).sum()
    assert value == pytest.approx(gap @ gap + spread / (n - 1), rel=1e-9)
    assert frechet(x.reshape(8, 8, -1), y.reshape(8, 8, -1)) == value  # clips of frames


def test_a_matrix_root_agrees():
    x, y = decaying(400, 96, 3), decaying(300, 96, 4, 0.05)
    root = np.trace(scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))).real
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * root
    assert frechet(x, y) == pytest.approx(want, rel=1e-3)
    assert frechet(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-9)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-9)
    assert frechet(x + 1000, y + 1000) == pytest.approx(frechet(x, y), rel=1e-6)  # a large mean costs no digits
    assert abs(frechet(x, x)) < 1e-6


def test_2048_features_in_15_seconds():
    a, b = (decaying(2048, 2048, i, 0.05 * i) for i in (0, 1))
    wall, cpu = time.perf_counter(), time.process_time()
    assert frechet(a, b) > 0
    assert min(time.perf_counter() - wall, time.process_time() - cpu) < 15  # it may be shared


def test_kid_is_unbiased_and_sees_a_shift():
    r = np.random.default_rng(5)
    same = [kid(r.normal(size=(20, 8)), r.normal(size=(20, 8))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20 and min(same) < 0
    assert kid(r.normal(size=(200, 8)), r.normal(size=(200, 8)) + 1) > 1
    x, y = r.normal(size=(2, 5, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = np.mean([k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within - 2 * between, rel=1e-9)


def test_fid_bias_at_small_n():
    """TRAPS 17: two samples of one Gaussian are apart, the less the more of them; KID is not."""
    r = np.random.default_rng(6)
    value = [frechet(*r.normal(size=(2, n, 64))) for n in (50, 500, 5000)]
    assert value[0] > 4 * value[1] > 16 * value[2] > 0


def pictures(n, seed=0, size=48):
    """Smooth colours with a bright square: (n, size, size, 3) uint8."""
    r = np.random.default_rng(seed)
    x = F.interpolate(torch.from_numpy(r.uniform(40, 200, (n, 3, 6, 6))), (size, size), mode="bilinear")
    x = x.permute(0, 2, 3, 1).numpy()
    for i, (top, left) in enumerate(r.integers(0, size - 12, (n, 2))):
        x[i, top : top + 12, left : left + 12] = r.uniform(0, 255, 3)
    return x.round().astype(np.uint8)


@pytest.fixture(scope="module")
def net():
    return inception.load_inception("random")[0]


def test_distance_rises_with_blur_and_noise(net):
    x = pictures(24)
    f = net(x)
    t = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    blurred = [F.avg_pool2d(F.pad(t, (k // 2,) * 4, mode="replicate"), k, 1) for k in (3, 7, 13)]
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(t + s * noise).clamp(0, 255) for s in (5, 15, 45)]
    for spoilt in (blurred, noisy):
        features = [net(s.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()) for s in spoilt]
        for distance in (frechet, kid):
            value = [distance(f, g) for g in features]
            assert value[0] < value[1] < value[2]


def test_golden_value_of_a_fixed_set(net):
    """Features, moments and distance together, on eight computed pictures: if it moves, so do the tables."""
    i, y, x, c = np.meshgrid(np.arange(8), np.arange(32), np.arange(32), np.arange(3), indexing="ij")
    images = ((x * (i + 1) + 3 * y + 40 * c) % 256).astype(np.uint8)
    value = frechet(net(images[:4]), net(images[4:]))
    assert value == pytest.approx(4.151856, rel=1e-3)


def fake_features(n, seed, d=4, shift=0.0):
    """(clips, 8 + 8 + 1, d): frames of a clip are alike, dreams are off by `shift`."""
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, 1, d)) + 0.3 * r.normal(size=(n, 17, d))
    x[:, :8] = 1.3 * r.normal(size=(n, 1, d)) + 0.3 * r.normal(size=(n, 8, d)) + shift
    return x


@pytest.mark.parametrize("key, n, clips_a_recording", [("kid", 64, 1), ("fid", 64, 1), ("fid", 512, 1), ("fid", 128, 4)])
def test_intervals_of_distances_cover_what_other_data_sets_give(key, n, clips_a_recording, monkeypatch):
    """Not so, by far, with halves of n - 1 clips, with 50 % for 95 %, or where the halves of 128 clips speak for an
    FD of 512; and where clips of one recording are the same, only the number of recordings counts."""
    monkeypatch.setattr(evaluate, {"kid": "frechet", "fid": "kid"}[key], lambda x, y: 0.0)  # for speed

    def scores(seed, n_halves):
        features = fake_features(n // clips_a_recording, seed, shift=1.0).repeat(clips_a_recording, axis=0)
        return evaluate.set_scores(features, np.arange(n) // clips_a_recording, n_halves=n_halves)

    intervals = [scores(seed, 60) for seed in range(4)]
    width = np.mean([np.subtract(*s[f"{key}_ci"][::-1]) for s in intervals])
    varies = np.std([scores(seed, 1)[key] for seed in range(60)])
    assert width == pytest.approx(2 * 1.96 * varies, rel=0.35)
    assert all(s[f"{key}_ci"][0] < s[key] < s[f"{key}_ci"][1] for s in intervals)


def test_kid_looks_at_clips_of_the_whole_list():
    x, recordings = fake_features(300, 0), np.arange(300)
    x[150:, :8] += 5
    s = evaluate.set_scores(x, recordings)
    some = x[::3]  # 100 clips; 128 at most
    assert s["kid"] == pytest.approx(kid(some[:, :8], some[:, 8:16]), rel=1e-9) and s["kid_frames"] == 800
    assert s["fid"] == pytest.approx(frechet(x[:, :8], x[:, 8:16])) and s["fid_frames"] == 2400
    assert s["fid_floor"] == pytest.approx(frechet(x[::2, 8:16], x[1::2, 8:16])) and s["fid_floor_frames"] == 1200
    assert s["fid_copy_last"] == pytest.approx(frechet(x[:, 16:].repeat(8, 1), x[:, 8:16]))


def test_few_clips_have_no_interval():
    s = evaluate.set_scores(fake_features(7, 0), np.arange(7))
    assert s["fid"] > 0 and s["fid_ci"] is s["kid_ci"] is None
    assert evaluate.set_scores(fake_features(8, 0), np.arange(8))["fid_ci"][0] is not None


def test_inception_has_the_names_of_the_published_file():
    net = Inception()
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 21_785_568  # Inception-v3 without its classifier
    assert len(state) == 94 * 6
    for key, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
                       "Mixed_5d.branch_pool.bn.running_var": (64,),
                       "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
                       "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
                       "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
                       "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
                       "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1)}.items():
        assert state[key].shape == shape


def test_inception_pools_as_tensorflow_did():
    block = inception.Mixed(4, {"average": (), "branch_pool": (4, 1)})
    with torch.no_grad():
        block.branch_pool.conv.weight.copy_(torch.eye(4)[..., None, None])
        ones = block.eval()(torch.ones(1, 4, 5, 5))
    np.testing.assert_allclose(ones, 1 / np.sqrt(1.001), rtol=1e-6)  # the border too: no zeros around


def test_features_equal_pytorch_fid():
    """Runs where pytorch-fid and torchvision are installed; they are no dependencies."""
    try:
        import pytorch_fid.inception as theirs
    except Exception as e:  # torchvision without its operators raises RuntimeError
        pytest.skip(f"pytorch-fid cannot be imported: {e}")
    net = Inception().eval()
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(m.running_mean, 0, 0.1)
    full = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
    theirs.load_state_dict_from_url = lambda *_, **__: full | net.state_dict()
    x = pictures(2)
    want = theirs.InceptionV3([3]).eval()(torch.from_numpy(x).permute(0, 3, 1, 2) / 255)[0][:, :, 0, 0]
    np.testing.assert_allclose(net(x), want.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_where_inception_comes_from(tmp_path, monkeypatch):
    file, said = f"{tmp_path}/w.pth", []
    torch.save(Inception().state_dict() | {"fc.weight": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="w.pth is not .* SHA-256 begins with 6726825d"):
        inception.load_inception(file)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", fingerprint(file)[:8])
    assert inception.load_inception(file)[1] == "inception"

    monkeypatch.setattr(torch.hub, "get_dir", lambda: f"{tmp_path}/hub")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    net, name = inception.load_inception("", said.append)
    assert name == "random_inception"
    assert "--inception" in said[0] and "pt_inception-2015-12-05-6726825d.pth" in said[0]


# ---- what is scored --------------------------------------------------------------------------------------


def test_clips_are_spread_and_do_not_overlap(toy):
    clips = open_clips(f"{toy}/raw", "val")
    assert evaluate.choose_clips(clips, 5) == [0, 1, 2, 3, 4] and evaluate.choose_clips(clips, 3) == [0, 2, 4]
    clips.meta.update(windows=True, stride=9, frame_stride=1)  # stored windows of 17 frames, every 9
    assert evaluate.choose_clips(clips, 3) == [0, 2, 4]
    with pytest.raises(DataError, match="--num 4 is more than the 3"):
        evaluate.choose_clips(clips, 4)


def test_the_list_of_clips_has_a_hash(toy):
    """TRAPS 32: the same for raw video and for latents made of it, another for other clips or another stride."""
    raw, dv, cv = (open_clips(f"{toy}/{kind}", "val") for kind in ("raw", "dv", "cv"))
    hashes = {evaluate.clip_list(clips, [0, 2, 4])[0] for clips in (raw, dv, cv)}
    assert len(hashes) == 1 and len(hashes.pop()) == 64
    slower = open_clips(f"{toy}/raw", "val", frame_stride=2)
    lists = {evaluate.clip_list(clips, chosen)[0] for clips, chosen in
             ((raw, [0, 1]), (raw, [0, 2]), (raw, [0, 1, 2]), (slower, [0, 1]))}
    assert len(lists) == 4
    cut = open_clips(f"{toy}/raw", "val", stride=9)
    stored = open_clips(f"{toy}/dv", "val")  # as encode stores clips that were cut every nine frames
    stored.starts = 17 * np.arange(len(cut))
    stored.edges, stored.meta["stride"] = np.array([0, 17 * len(cut)]), 9
    assert evaluate.clip_list(cut, [0, 3])[0] == evaluate.clip_list(stored, [0, 3])[0]


def test_recordings_of_clips(toy):
    clips = open_clips(f"{toy}/raw", "val")  # 85 frames
    clips.edges = np.array([0, 17, 20, 54, 85])
    clips.starts = np.array([0, 20, 37, 54])  # the second recording, of three frames, holds no clip
    assert evaluate.clip_list(clips, [0, 1, 2, 3])[1].tolist() == [0, 1, 1, 2]


def test_groups_of_actions(toy):
    clips = open_clips(f"{toy}/raw", "val")
    groups = evaluate.action_groups(clips, range(5))
    names = {group: [JOINTS[i] for i in columns] for group, columns in groups.items()}
    assert names["drive"] == ["LINEAR_VELOCITY"] and names["turn"] == ["ANGULAR_VELOCITY"]
    assert names["neck"] == ["NECK_PITCH"] and "LEFT_HAND_CLOSURE" in names["left_arm"]
    assert len(names["right_arm"]) == 8 and all(name.startswith("RIGHT_") for name in names["right_arm"])
    assert list(groups) == ["drive", "turn", "neck", "left_arm", "right_arm"]

    clips.names = ("wheel.left", "wheel.right", "arm_1", "arm_2.pos", "grip", *(f"j{k}_x" for k in range(20)))
    moves = np.ones((85, 25)) * np.arange(85)[:, None]
    moves[:, 4] = 0.5  # the grip stays as it is
    clips.states = lambda frames: moves[frames]
    groups = evaluate.action_groups(clips, range(5))
    assert groups["wheel"] == [0, 1] and groups["arm"] == [2, 3] and "grip" not in groups and len(groups) == 8
    clips.meta["groups"] = {"front": [2, 3], "hand": [4], "all": [0, 24]}
    assert evaluate.action_groups(clips, range(5)) == {"front": [2, 3], "all": [0, 24]}
    for bad in ({"front": [25]}, {"front": "LEFT"}, {"front": [0.5]}, ["front"], {"front": 1.5}):
        clips.meta["groups"] = bad
        with pytest.raises(DataError, match="metadata.json says groups = .* with columns of 0..24"):
            evaluate.action_groups(clips, range(5))


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_rows_equal_numpy(name, toy):
    model, tokenizer, clips = parts(name, toy)
    s = evaluate.evaluate(model, tokenizer, clips, num=5, **SETTINGS[name])
    rows = {"psnr": [], "psnr_copy_last": [], "psnr_ceiling": [], "psnr_raw": []}
    with torch.no_grad():
        for i in range(5):
            z = tokenizer.encode(to_video(clips[i]["video"][None]))
            target = to_uint8(tokenizer.decode(z))[0].numpy()
            past, raw = z.narrow(z.ndim - 3, 0, 2), clips[i]["video"].numpy()[9:]
            future = model.sample(past, clips[i]["actions"][None], generator=torch.Generator().manual_seed(i),
                                  **SETTINGS[name])
            dream = to_uint8(tokenizer.decode(torch.cat([past, future], dim=-3)))[0].numpy()[9:]
            rows["psnr"].append(numpy_psnr(dream, target[9:]))
            rows["psnr_copy_last"].append(numpy_psnr([target[8]] * 8, target[9:]))
            rows["psnr_ceiling"].append(numpy_psnr(target[9:], raw))
            rows["psnr_raw"].append(numpy_psnr(dream, raw))
    for key, values in rows.items():
        assert s[key] == pytest.approx(np.mean(values), abs=1e-3), key  # sums of a batch are rounded otherwise
        assert np.mean(s[key + "_per_frame"]) == pytest.approx(s[key]) and len(s[key + "_per_frame"]) == 8
    assert s["psnr_oracle"] == s["psnr_ceiling"] and s["ssim_oracle"] == s["ssim_ceiling"]  # TRAPS 14
    assert s["delta_psnr"] == pytest.approx(s["psnr"] - s["psnr_shuffled_actions"])
    assert s["gain_psnr"] == pytest.approx(s["psnr"] - s["psnr_copy_last"])
    assert s["psnr_ci"] is s["delta_psnr_ci"] is s["gain_psnr_ci"] is None  # five clips are too few
    np.testing.assert_allclose(s["delta_psnr_per_frame"], np.subtract(s["psnr_per_frame"],
                                                                      s["psnr_shuffled_actions_per_frame"]))
    assert s["clips"] == 5 and s["frames"] == 40 and s["samples_per_s"] > 0 and s["batch"] == 5
    assert s["recordings"] == 1
    assert s["tokenizer_params"] == sum(p.numel() for p in tokenizer.parameters())


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_scores_do_not_depend_on_the_batch(name, toy, monkeypatch):
    """Batches of 8 and of 1 give the same scores, up to rounding: the noise of a clip is its own."""
    model, tokenizer, _ = parts(name, toy)
    clips, scores = open_clips(f"{toy}/raw", "train"), []
    sizes, dreamer = [], model.sample
    model.sample = lambda past, *args, **settings: sizes.append(len(past)) or dreamer(past, *args, **settings)
    for at_once in (8, 1):
        for module in (sample, evaluate):
            monkeypatch.setattr(module, "AT_ONCE", at_once)
        s = evaluate.evaluate(model, tokenizer, clips, num=2, **SETTINGS[name])
        scores.append({**s, **evaluate.rollout(model, tokenizer, clips, 2, **SETTINGS[name])["rollout"]})
        assert max(sizes) == at_once
        sizes.clear()
    for key in ("psnr", "psnr_shuffled_actions", "psnr_frozen_actions", "psnr_per_frame", "ssim", "psnr_copy_last"):
        assert scores[0][key] == pytest.approx(scores[1][key], abs=2e-3), key


def test_what_the_fid_is(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    said = evaluate.FID_IS["inception"]
    assert said in capsys.readouterr().out
    assert all(words in said for words in ("pytorch-fid", "bilinear", "N dreamt", "clean-fid", "legacy_pytorch", "do not compare"))


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_a_model_blind_to_actions(name, toy):
    """TRAPS 4: with the action input cut, the same noise gives the same dream; open, actions matter."""
    model, tokenizer, clips = parts(name, toy)
    for p in model.blocks.parameters():  # more action at a random start than N(0, 0.02) gives
        p.mul_(8 if p.ndim > 1 else 1)
    open_ = evaluate.evaluate(model, tokenizer, clips, num=5, **SETTINGS[name])
    assert open_["psnr_shuffled_actions"] != open_["psnr"] != open_["psnr_frozen_actions"]
    model.embed_action[-1].weight.zero_()
    blind = evaluate.evaluate(model, tokenizer, clips, num=5, **SETTINGS[name])
    assert blind["delta_psnr"] == 0 and blind["psnr_frozen_actions"] == blind["psnr"]
    assert all(found["delta_psnr"] == 0 for found in blind["delta_psnr_groups"].values())


def test_intervals_where_clips_are_enough(toy):
    model, tokenizer, _ = parts("masked", toy)
    clips = open_clips(f"{toy}/raw", "train")
    s = evaluate.evaluate(model, tokenizer, clips, num=9, **SETTINGS["masked"])
    assert s["psnr_ci"][0] < s["psnr"] < s["psnr_ci"][1] and s["batch"] == 8
    for found in s["delta_psnr_groups"].values():
        assert found["ci"][0] <= found["delta_psnr"] <= found["ci"][1]


def test_who_lends_the_actions(toy, monkeypatch):
    """Neither the clip itself nor the next one; and of a group, the future of its columns alone."""
    model, tokenizer, clips = parts("masked", toy)
    asked, whole = {}, evaluate.actions_told

    def spy(model, clips, actions, another, groups):
        told = whole(model, clips, actions, another, groups)
        asked[len(asked)] = told
        return told

    monkeypatch.setattr(evaluate, "actions_told", spy)
    s = evaluate.evaluate(model, tokenizer, clips, num=5, **SETTINGS["masked"])
    groups = evaluate.action_groups(clips, range(5))
    assert list(s["delta_psnr_groups"]) == list(groups)
    for j, told in asked.items():
        own, lent = clips[j]["actions"], clips[(j + 2) % 5]["actions"]
        torch.testing.assert_close(told["prediction"], own, rtol=0, atol=0)
        torch.testing.assert_close(told["shuffled"], torch.cat([own[:9], lent[9:]]), rtol=0, atol=0)
        assert (own[9:] != lent[9:]).any() and (told["frozen"][:9] == own[:9]).all()
        for group, columns in groups.items():
            rest = [i for i in range(25) if i not in columns]
            torch.testing.assert_close(told[f"only {group}"][:, rest], own[:, rest], rtol=0, atol=0)
            torch.testing.assert_close(told[f"only {group}"][:9], own[:9], rtol=0, atol=0)
            torch.testing.assert_close(told[f"only {group}"][9:, columns], lent[9:, columns], rtol=0, atol=0)

    asked.clear()
    evaluate.evaluate(model, tokenizer, clips, num=1, **SETTINGS["masked"])  # a lone clip has a lender, too
    assert (asked[0]["shuffled"][9:] == clips[4]["actions"][9:]).all()


def test_groups_are_scored_by_their_own_dreams(toy):
    model, tokenizer, clips = parts("flow", toy)
    for p in model.blocks.parameters():
        p.mul_(8 if p.ndim > 1 else 1)
    s = evaluate.evaluate(model, tokenizer, clips, num=3, **SETTINGS["flow"])
    psnr, groups = [], {"turn": [24]}
    for i, lender in ((0, 2), (2, 4), (4, 0)):
        told = evaluate.actions_told(model, clips, clips[i]["actions"], clips[lender]["actions"], groups)
        shown, _ = evaluate.dream_clip(model, tokenizer, clips[i], told, **SETTINGS["flow"])
        psnr.append([numpy_psnr(shown[name].numpy(), shown["target"].numpy()) for name in ("prediction", "only turn")])
    delta = np.mean(psnr, axis=0)
    assert s["psnr"] == pytest.approx(delta[0], abs=1e-3)
    assert s["delta_psnr_groups"]["turn"]["delta_psnr"] == pytest.approx(delta[0] - delta[1], abs=1e-3) != 0


@pytest.mark.parametrize("name", ["masked", "flow"])
def test_rollout(name, toy):
    """Of nine windows, as many as 85 frames hold: truth and copy-last by numpy, the dream by the sampler itself."""
    model, tokenizer, clips = parts(name, toy)
    s = evaluate.rollout(model, tokenizer, clips, 9, seed=3, **SETTINGS[name])["rollout"]
    assert s["clips"] == 1 and all(len(s[key]) == 9 for key in ("psnr", "psnr_copy_last", "psnr_ceiling"))
    long = open_clips(f"{toy}/raw", "val", frames=81)[0]
    video, actions = long["video"], long["actions"]
    with torch.no_grad():
        trips = [to_uint8(tokenizer.decode(tokenizer.encode(to_video(video[None, 8 * w : 8 * w + 17]))))[0].numpy()
                 for w in range(9)]
        past = tokenizer.encode(to_video(video[None, :17])).narrow(-3, 0, 2)
        noise = torch.Generator().manual_seed(3)
        for w, trip in enumerate(trips):
            future = model.sample(past, actions[None, 8 * w : 8 * w + 17], generator=noise, **SETTINGS[name])
            dream = tokenizer.decode(torch.cat([past, future], dim=-3))
            past = tokenizer.encode(dream[:, :, -9:].clamp(-1, 1))
            assert s["psnr"][w] == pytest.approx(numpy_psnr(to_uint8(dream)[0, 9:].numpy(), trip[9:]), abs=0.02)
            assert s["psnr_copy_last"][w] == pytest.approx(numpy_psnr([trips[0][8]] * 8, trip[9:]), abs=0.02)
            raw = video[8 * w + 9 : 8 * w + 17].numpy()
            assert s["psnr_ceiling"][w] == pytest.approx(numpy_psnr(trip[9:], raw), abs=0.02)


def test_no_rollout_says_so(toy):
    model, tokenizer, clips = parts("flow", toy)
    said = []
    assert evaluate.rollout(model, tokenizer, clips, 10, say=said.append, **SETTINGS["flow"]) == {}
    latents = open_clips(f"{toy}/cv", "val")
    assert evaluate.rollout(model, tokenizer, latents, 1, say=said.append, **SETTINGS["flow"]) == {}
    assert len(said) == 2 and "recordings of 89 frames" in said[0] and "raw video" in said[1]


def test_token_scores(toy):
    model, tokenizer, clips = parts("masked", toy)
    model.out.weight.zero_()
    model.out.bias.zero_()
    s = evaluate.evaluate(model, tokenizer, clips, num=5, **SETTINGS["masked"])
    assert s["cross_entropy"] == pytest.approx(np.log(64), abs=1e-5) == s["ln_vocab"]
    L = torch.stack([tokenizer.encode(to_video(clips[i]["video"][None]))[0] for i in range(5)])
    assert s["token_accuracy"] == pytest.approx((L[:, 2] == 0).float().mean().item())  # all alike: the first
    assert s["copy_last_token_accuracy"] == pytest.approx((L[:, 1] == L[:, 2]).float().mean().item())


def test_velocity_error(toy, monkeypatch):
    model, tokenizer, clips = parts("flow", toy)
    z = tokenizer.encode(to_video(clips[0]["video"][None]))
    X_1, X_0 = z[:, :, 2:], torch.randn(z[:, :, 2:].shape, generator=torch.Generator().manual_seed(7))
    V_t = target_velocity(X_0, X_1, model.config.sigma_min)
    asked = []

    def velocity(X_t, t, v_p, actions):  # right in the later half
        asked.append((X_t, t))
        return torch.where((t > 0.5).view(-1, 1, 1, 1, 1), V_t, 0.0)

    monkeypatch.setattr(model, "velocity", velocity)
    error = evaluate.velocity_scores(model, z, clips[0]["actions"][None], seed=7)["velocity_error"]
    np.testing.assert_allclose(error, [V_t.square().mean()] * 5 + [0] * 5, rtol=1e-5)
    X_t, t = asked[0]
    np.testing.assert_allclose(t, np.arange(0.05, 1, 0.1), rtol=1e-6)
    torch.testing.assert_close(X_t[3:4], interpolate(X_0, X_1, t[3:4], model.config.sigma_min))


def test_features_of_a_model(net, toy):
    """FID through evaluate(): moments merged over clips are those of all frames."""
    model, tokenizer, clips = parts("flow", toy)
    s = evaluate.evaluate(model, tokenizer, clips, num=4, net=net, **SETTINGS["flow"])
    shown = [evaluate.dream_clip(model, tokenizer, clips[i], {"prediction": clips[i]["actions"]}, **SETTINGS["flow"])[0]
             for i in evaluate.choose_clips(clips, 4)]
    dreamt, real, copied = (net(torch.cat([x[key] for x in shown])) for key in ("prediction", "target", "copy_last"))
    assert s["fid"] == pytest.approx(frechet(dreamt, real), rel=1e-4)
    assert s["fid_copy_last"] == pytest.approx(frechet(copied, real), rel=1e-4)
    even, odd = real.reshape(4, 8, -1)[::2].reshape(16, -1), real.reshape(4, 8, -1)[1::2].reshape(16, -1)
    assert s["fid_floor"] == pytest.approx(frechet(even, odd), rel=1e-4)
    assert s["kid"] == pytest.approx(kid(dreamt, real), rel=1e-4)
    assert (s["fid_frames"], s["fid_floor_frames"], s["kid_frames"]) == (32, 16, 32)
    assert s["fid_ci"] is s["kid_ci"] is None


# ---- sizes and the command line --------------------------------------------------------------------------


def test_sizes(tmp_path):
    evaluate.main(["--sizes", "--json", f"{tmp_path}/deep/sizes.json"])
    counted = json.load(open(f"{tmp_path}/deep/sizes.json"))
    derived = {"masked": {"split": 0.2205, "base": 0.3214, "modality": 0.2373, "full": 0.1953},  # DESIGN 2a
               "flow": {"split": 0.944, "base": 1.36, "modality": 0.886, "full": 0.648}}
    for name, row in derived.items():
        assert set(counted[name]) == set(row)
        for variant, size in row.items():
            assert counted[name][variant] == pytest.approx(size, rel=3e-3), (name, variant)


@pytest.fixture(scope="module")
def ckpt(toy):
    """Checkpoints of random models, as sample.export leaves them."""
    for name, kind in (("masked", "dv"), ("flow", "cv")):
        model = toy_model(name)
        torch.save({"ema": model.state_dict(), "model_config": asdict(model.config), "step": 3,
                    "config": {"model": name, "variant": model.config.variant, "preset": "tiny"},
                    "tokenizer": {"path": f"{toy}/{kind}.pt", "sha256": fingerprint(f"{toy}/{kind}.pt")},
                    "data": {"path": f"{toy}/{kind}", "source": f"{toy}/raw", "size": 32}},
                   f"{toy}/{name}.ckpt")
    return toy


KEYS = """model variant params tokenizer_params clips frames psnr psnr_ci psnr_raw psnr_copy_last
psnr_ceiling psnr_shuffled_actions delta_psnr psnr_per_frame fid fid_features fid_floor samples_per_s peak_gb
device cross_entropy token_accuracy delta_psnr_groups rollout clip_list data batch dtype fid_is""".split()  # DESIGN 5


def test_command_line(ckpt, capsys):
    command = ["--ckpt", f"{ckpt}/masked.ckpt", "--num", "4", "--device", "cpu", "--inception", "random",
               "--rollout", "2", "--dtype", "bfloat16"]
    evaluate.main(command + ["--json", f"{ckpt}/one.json"])
    s, printed = json.load(open(f"{ckpt}/one.json")), capsys.readouterr().out
    assert set(KEYS) <= set(s)
    assert s["model"] == "masked" and s["variant"] == "base" and s["fid_features"] == "random_inception"
    assert s["data"] == f"{ckpt}/raw/val_v2.0", "lists of two folders can have one hash: it knows frames by number"
    for words in ("fd_random_inception", "N = 32", "N = 16", "the last frame", "clip's actions", "ceiling",
                  f"list {s['clip_list'][:8]}", "4 at once", "in bfloat16", "delta_psnr of turn alone", "by window", s["fid_is"]):
        assert words in printed
    assert "FID" not in printed and s["dtype"] == "bfloat16" and s["batch"] == 4

    # Two processes, clips divided: every number is the same
    with socket.socket() as port:
        port.bind(("localhost", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
    environments = [{**os.environ, **world, "RANK": r, "LOCAL_RANK": r, "OMP_NUM_THREADS": "1"} for r in "01"]
    jobs = [subprocess.Popen([sys.executable, f"{HERE}/evaluate.py", *command, "--json", f"{ckpt}/two.json"],
                             env=environment) for environment in environments]
    assert [job.wait(120) for job in jobs] == [0, 0]
    two = json.load(open(f"{ckpt}/two.json"))
    for key in set(s) - {"samples_per_s", "peak_gb"}:
        same = s[key] if isinstance(s[key], (str, dict, type(None))) else pytest.approx(s[key], rel=1e-6)
        assert two[key] == same, key


def test_latents_without_raw_video(ckpt, capsys):
    evaluate.main(["--ckpt", f"{ckpt}/flow.ckpt", "--data", f"{ckpt}/cv", "--num", "5", "--device", "cpu",
                   "--no_fid", "--json", f"{ckpt}/latents.json"])
    s, printed = json.load(open(f"{ckpt}/latents.json")), capsys.readouterr().out
    assert s["psnr_raw"] is s["psnr_ceiling"] is s["psnr_oracle"] is None and s["psnr"] > 0
    assert "holds latents only" in printed and len(s["velocity_error"]) == 10
    assert "no rollout of 8 windows" in printed and "rollout" not in s


def test_few_clips_say_what_is_missing(ckpt, capsys):
    evaluate.main(["--ckpt", f"{ckpt}/masked.ckpt", "--num", "1", "--device", "cpu", "--rollout", "0", "--inception",
                   "random", "--json", f"{ckpt}/few.json"])
    s, printed = json.load(open(f"{ckpt}/few.json")), capsys.readouterr().out
    assert "FID and KID are left out: they take at least four clips, and --num is 1" in printed
    assert s["fid_features"] is None and "fid" not in s and "rollout" not in s and "rollout" not in printed
    assert s["psnr_ci"] is None and s["batch"] == 1


def test_bad_input_is_one_sentence(ckpt, tmp_path):
    good = ["--ckpt", f"{ckpt}/masked.ckpt", "--device", "cpu", "--no_fid"]
    for extra, want in ((["--num", "6"], "--num 6 is more than the 5"), (["--num", "0"], "--num 0"),
                        (["--rollout", "-1"], "--rollout -1"),
                        (["--ckpt", f"{tmp_path}/none.pt"], "no checkpoint"),
                        (["--tokenizer", f"{ckpt}/cv.pt"], "cv.pt"),
                        (["--data", f"{tmp_path}"], f"{tmp_path}"),
                        (["--data", f"{ckpt}/cv"], "holds continuous"),
                        (["--json", f"{tmp_path}"], "is a folder")):
        with pytest.raises(SystemExit) as e:
            evaluate.main(good + extra)
        assert str(e.value.code).startswith("evaluate.py: ") and want in str(e.value.code), extra
        assert "\n" not in str(e.value.code)
    with pytest.raises(SystemExit) as e:
        evaluate.main(good[:-1] + ["--inception", f"{tmp_path}/none.pth"])
    assert "none.pth" in str(e.value.code)


def test_a_model_with_the_other_tokenizer(toy):
    model, _, clips = parts("masked", toy)
    with pytest.raises(DataError, match="the tokenizer is continuous"):
        sample.check_fit(model, load_tokenizer(f"{toy}/cv.pt"), clips)
    with pytest.raises(DataError, match="4 x 4.* trained on 8 x 8"):
        model.config.H = model.config.W = 8
        sample.check_fit(model, load_tokenizer(f"{toy}/dv.pt"), clips)
