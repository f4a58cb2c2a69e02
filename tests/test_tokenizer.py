"""tokenizer.py: wavelets, FSQ, causality, agreement with the reference implementation, and files."""
import errno
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn

import tokenizer as tok
from examples import robot, train_tokenizer as training
from examples.torchscript import read_torchscript
from tokenizer import FSQ, DataError, Tokenizer, TokenizerConfig, haar, inverse_haar, load_tokenizer, patch, unpatch

COSMOS = os.path.join(os.path.dirname(os.path.abspath(tok.__file__)), "..", "shared", "fixtures", "cosmos")
needs_cosmos = pytest.mark.skipif(not os.path.isdir(COSMOS), reason="../shared/fixtures/cosmos is not here")
FULL = {"continuous": dict(spatial_compression=16), "discrete": dict(spatial_compression=8, levels=(8, 8, 8, 5, 5, 5))}
KINDS = tuple(FULL)


def small(kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = TokenizerConfig(**dict(dict(channels=8, channels_mult=(1, 2, 2), num_res_blocks=1), **FULL[kind], **changes))
    tokenizer = Tokenizer(config)
    for p in tokenizer.parameters():  # lively enough that every input matters
        p.data = torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    for name, p in tokenizer.named_parameters():
        p.data += "norm" in name and name.endswith("weight")
    tokenizer.quant_conv.conv3d.weight.data *= 3  # ids of many levels
    return tokenizer.eval().requires_grad_(False)


def clip(F=17, size=32, seed=0):
    return torch.rand(1, 3, F, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- wavelets


def test_haar_by_hand():
    """Eight numbers of one cell: band (p, q, r) is their mean with the signs of a high pass on time, height, width."""
    x = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128]).view(1, 1, 2, 2, 2)
    signs = [[(-1) ** (p * t + q * h + r * w) for t, h, w in itertools.product((0, 1), repeat=3)]
             for p, q, r in itertools.product((0, 1), repeat=3)]
    expected = (torch.tensor(signs) * x.flatten()).sum(1) / 8
    torch.testing.assert_close(haar(x).flatten(), expected)
    assert haar(x)[0, 0].item() == x.mean() and haar(x)[0, 1].item() == (1 - 2 + 4 - 8 + 16 - 32 + 64 - 128) / 8


def test_haar_puts_bands_outside_and_colours_inside():
    x = clip(4, 8)
    low = haar(x)[:, :3]  # the first three channels: the all-low band of red, green, blue
    torch.testing.assert_close(low, x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((-1, -2, -3)))


def test_wavelets_invert_exactly():
    x = torch.randint(-64, 64, (2, 3, 4, 8, 8)).float()  # integers: every sum is exact in float32
    assert torch.equal(inverse_haar(haar(x)), x)
    for F in (1, 5, 17):
        video = torch.randint(-64, 64, (2, 3, F, 8, 8)).float()
        y = patch(video)
        assert y.shape == (2, 192, 1 + (F - 1) // 4, 2, 2)
        assert torch.equal(unpatch(y), video)


def test_patch_of_a_grey_video():
    y = patch(torch.full((1, 3, 5, 8, 8), 0.25))
    assert (y[:, :3] == 0.25).all() and (y[:, 3:] == 0).all()  # all-low of all-low, and nothing else


# ---- FSQ


@pytest.mark.parametrize("levels", [(8, 5, 3), (4, 4), (2, 7)])
def test_every_id_has_its_own_code_and_comes_back(levels):
    fsq, n = FSQ(levels), torch.tensor(levels).prod().item()
    ids = torch.arange(n).view(1, n, 1, 1)
    codes = fsq.ids_to_codes(ids)
    assert codes.shape == (1, len(levels), n, 1, 1) and codes.abs().max() <= 1
    assert len(torch.unique(codes[0, :, :, 0, 0], dim=1).T) == n
    assert torch.equal(fsq.codes_to_ids(codes), ids)
    # mixed radix, first level fastest
    first, second = codes[0, 0, :, 0, 0], codes[0, 1, :, 0, 0]
    assert len(set(first[: levels[0]].tolist())) == levels[0] and len(set(second[: levels[0]].tolist())) == 1
    assert first[0] == first[levels[0]] and second[0] < second[levels[0]]


def test_codes_by_hand():
    codes = FSQ((8, 5)).ids_to_codes(torch.arange(40).view(1, 40, 1, 1))[0, :, :, 0, 0]
    assert codes[0, :8].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert codes[1, ::8].tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("levels", [(8, 5, 3), (2, 7)])
def test_quantize_reaches_every_level_and_nothing_else(levels):
    z = torch.linspace(-6, 6, 4001).view(1, 1, -1, 1, 1).expand(1, len(levels), -1, 1, 1)
    codes = FSQ(levels).quantize(z)[0, :, :, 0, 0]
    for row, n in zip(codes, levels):
        on_grid = (row * (n // 2)).round()
        torch.testing.assert_close(on_grid, row * (n // 2))
        assert sorted(set(on_grid.int().tolist())) == list(range(-(n // 2), n - n // 2))
        assert (row.diff() >= -1e-6).all()
    ids = FSQ(levels).codes_to_ids(FSQ(levels).quantize(z))
    assert ids.min() >= 0 and ids.max() < torch.tensor(levels).prod()
    zero = FSQ(levels).quantize(torch.zeros(1, len(levels), 1, 1, 1))
    assert zero.abs().max() == 0, "zero is a code, for even levels too"


def test_gradients_pass_straight_through_the_rounding():
    """As if the rounding were not there: the derivative of tanh(z + shift) (levels - 1) (1 + eps) / 2, over levels // 2."""
    z = torch.tensor([0.3, -0.7]).view(1, 2, 1, 1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(FSQ((8, 5)).quantize(z).sum(), z)
    half = torch.tensor([7 * 1.001 / 2, 4 * 1.001 / 2])
    shift = torch.atanh(torch.tensor([0.5, 0.0]) / half)
    expected = (1 - torch.tanh(z.detach().flatten() + shift) ** 2) * half / torch.tensor([4, 2])
    torch.testing.assert_close(grad.flatten(), expected)


def test_discrete_tokenizer_trains_its_encoder():
    tokenizer = small("discrete").requires_grad_(True)
    tokenizer(clip(9)).square().mean().backward()
    assert all(p.grad is not None for n, p in tokenizer.named_parameters() if "downsample" not in n and "upsample" not in n)
    assert tokenizer.encoder.conv_in[0].conv3d.weight.grad.abs().sum() > 0


# ---- shapes, lengths (TRAPS 22), causality (TRAPS 23)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("F", [1, 9, 17])
def test_shapes(kind, F):
    tokenizer, T, s = small(kind), 1 + (F - 1) // 8, FULL[kind]["spatial_compression"]
    z = tokenizer.encode(clip(F))
    if kind == "discrete":
        assert z.shape == (1, T, 32 // s, 32 // s) and z.dtype == torch.int64
        assert 0 <= z.min() and z.max() < tokenizer.vocab_size == 64_000
    else:
        assert z.shape == (1, 16, T, 32 // s, 32 // s) and tokenizer.channels == 16
    assert (tokenizer.kind, tokenizer.spatial, tokenizer.temporal) == (kind, s, 8)
    assert tokenizer.decode(z).shape == (1, 3, F, 32, 32)


@pytest.mark.parametrize("F, next_lengths", [(16, "9 or 17"), (10, "9 or 17"), (2, "1 or 9"), (8, "1 or 9"), (18, "17 or 25")])
def test_other_lengths_are_refused_by_naming_the_next(F, next_lengths):
    with pytest.raises(DataError, match=rf"1, 3, {F}, 32.*F as {next_lengths}"):
        small("continuous").encode(clip(F))


@pytest.mark.parametrize("shape", [(1, 3, 9, 40, 32), (1, 1, 9, 32, 32), (3, 9, 32, 32)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DataError, match="divisible by 16"):
        small("continuous").encode(torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_does_not_know_the_future(kind):
    tokenizer, video = small(kind), clip(17)
    z = tokenizer.encode(video)
    other = video.clone()
    other[:, :, 9:] = clip(8, seed=1)
    changed = tokenizer.encode(other)
    time = z.ndim - 3
    torch.testing.assert_close(tokenizer.encode(video[:, :, :9]), z.narrow(time, 0, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokenizer.encode(video[:, :, :1]), z.narrow(time, 0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed.narrow(time, 0, 2), z.narrow(time, 0, 2), rtol=1e-4, atol=1e-4)
    assert not torch.equal(changed.narrow(time, 2, 1), z.narrow(time, 2, 1))
    recon = tokenizer.decode(z)
    torch.testing.assert_close(tokenizer.decode(z.narrow(time, 0, 2)), recon[:, :, :9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("F", [9, 17])
def test_every_frame_matters_to_its_latent(F):
    tokenizer, video = small("continuous"), clip(F).requires_grad_()
    z = tokenizer.encode(video)
    for t in range(z.shape[2]):
        (g,) = torch.autograd.grad(z[:, :, t].square().sum(), video, retain_graph=True)
        seen = g.abs().amax((0, 1, 3, 4)) > 1e-9
        last = 8 * t  # latent t covers the frames up to 8 t
        assert seen[max(0, last - 7) : last + 1].all() and not seen[last + 1 :].any()


@pytest.mark.parametrize("spatial, temporal", [(4, 4), (8, 4), (16, 4), (16, 8), (8, 8), (4, 8)])
def test_compressions(spatial, temporal):
    tokenizer = Tokenizer(TokenizerConfig(channels=4, channels_mult=(1, 1, 1), num_res_blocks=1,
                                          spatial_compression=spatial, temporal_compression=temporal))
    z = tokenizer.encode(clip(9))
    assert z.shape[2:] == (1 + 8 // temporal, 32 // spatial, 32 // spatial)
    assert tokenizer.decode(z).shape == (1, 3, 9, 32, 32)


@pytest.mark.parametrize("spatial, temporal", [(8, 16), (32, 8)])
def test_impossible_compressions_are_refused(spatial, temporal):
    with pytest.raises(DataError, match="cannot be built"):
        Tokenizer(TokenizerConfig(channels=4, spatial_compression=spatial, temporal_compression=temporal))


# ---- the reference implementation


@needs_cosmos
@pytest.mark.parametrize("kind, name", [("continuous", "cv8x16x16"), ("discrete", "dv8x8x8")])
def test_agrees_with_the_reference(kind, name):
    file = os.path.join(COSMOS, f"{name}_tiny.pt")
    tokenizer, saved = load_tokenizer(file), torch.load(file, weights_only=True)
    assert tokenizer.kind == kind and not any(p.requires_grad for p in tokenizer.parameters())
    for T in (17, 9, 1):
        expected = saved[f"video{T}"]
        z = tokenizer.encode(expected["video"].float())
        if kind == "discrete":
            assert (z == expected["indices"]).float().mean() >= 0.99
            codes = tokenizer.fsq.ids_to_codes(expected["indices"].long())
            torch.testing.assert_close(codes, expected["codes"], rtol=1e-5, atol=1e-5)
            assert torch.equal(tokenizer.fsq.codes_to_ids(expected["codes"]), expected["indices"].long())
            latents = expected["indices"].long()
        else:
            assert relative(z, expected["latents"]) < 1e-4
            latents = expected["latents"]
        assert relative(tokenizer.decode(latents), expected["recon"]) < 1e-4


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def listed_keys(name):
    """{file: {tensor: shape}} of keys_*.txt"""
    found = {}
    with open(os.path.join(COSMOS, f"keys_{name}.txt")) as f:
        for line in map(str.strip, f):
            if line.startswith("#"):
                shapes = found.setdefault(line.split()[1], {})
            elif line:
                key, rest = line.split(" ", 1)
                shapes[key] = tuple(int(n) for n in rest[1 : rest.index(")")].replace(",", " ").split())
    return found


@needs_cosmos
@pytest.mark.parametrize("name, preset", [("CV8x16x16", "cv8x16x16"), ("DV8x8x8", "dv8x8x8")])
def test_full_size_has_the_names_and_shapes_of_nvidias_files(name, preset):
    with torch.device("meta"):
        tokenizer = Tokenizer(tok.PRESETS[preset])
    keys = {k: s for shapes in listed_keys(name).values() for k, s in shapes.items()}
    ours = {k: tuple(v.shape) for k, v in tokenizer.state_dict().items()}
    assert all(keys.get(k) == s for k, s in ours.items())
    left = {k for k in keys if k not in ours}  # constants of the wavelets and of FSQ
    assert all("patcher3d" in k or "quantizer" in k for k in left), left
    assert abs(sum(p.numel() for p in tokenizer.parameters()) / 1e6 - 112.5) < 0.1


# ---- TorchScript folders


class Constants(nn.Module):
    """The buffers that NVIDIA's files hold beside the weights."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def fsq_constants(levels):
    holder = nn.Module()
    n = torch.tensor(levels).prod().item()
    holder.quantizer = Constants(_levels=torch.tensor(levels, dtype=torch.int32),
                                 _basis=torch.tensor(FSQ(levels).basis, dtype=torch.int32),
                                 implicit_codebook=FSQ(levels).ids_to_codes(torch.arange(n).view(1, n, 1, 1))[0, :, :, 0, 0].T)
    return holder


class EncoderFile(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.encoder, self.quant_conv = t.encoder, t.quant_conv
        self.encoder.patcher3d = Constants(wavelets=torch.full((2,), 0.7), _arange=torch.arange(2),
                                           patch_size_buffer=torch.tensor([4], dtype=torch.int32))
        if t.kind == "discrete":
            self.quantizer = fsq_constants(t.config.levels).quantizer

    def forward(self, x):
        z = self.quant_conv(self.encoder(x))
        return z, z.new_zeros(1)


class DecoderFile(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.post_quant_conv, self.decoder = t.post_quant_conv, t.decoder
        self.decoder.unpatcher3d = Constants(wavelets=torch.full((2,), 0.7), _arange=torch.arange(2))
        if t.kind == "discrete":
            self.inv_quant = fsq_constants(t.config.levels)

    def forward(self, z):
        return self.decoder(self.post_quant_conv(z))


def narrow(kind):
    torch.manual_seed(1)
    return Tokenizer(TokenizerConfig(channels=4, num_res_blocks=1, **FULL[kind])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(kind, dtype): a folder as NVIDIA's that holds narrow(kind)}"""
    made = {}
    for kind, name in (("continuous", "CV8x16x16"), ("discrete", "DV8x8x8")):
        tokenizer, root = narrow(kind), tmp_path_factory.mktemp("cosmos")
        example = {"encoder.jit": clip(9), "decoder.jit": tokenizer.post_quant_conv.conv3d.weight[0].expand(-1, 2, 2, 2)[None]}
        for file, File in (("encoder.jit", EncoderFile), ("decoder.jit", DecoderFile)):
            traced = torch.jit.trace(File(tokenizer).eval(), example[file], check_trace=False)
            for dtype in (torch.float32, torch.bfloat16):
                folder = made[kind, dtype] = str(root / str(dtype) / f"Cosmos-0.1-Tokenizer-{name}")
                os.makedirs(folder, exist_ok=True)
                torch.jit.save(traced.to(dtype), os.path.join(folder, file))
    return made


@pytest.fixture
def narrow_presets(monkeypatch):
    """The released tokenizers are 128 channels wide; here as narrow as `narrow` makes them."""
    for name, kind in (("cv8x16x16", "continuous"), ("dv8x8x8", "discrete")):
        monkeypatch.setitem(tok.PRESETS, name, TokenizerConfig(channels=4, num_res_blocks=1, **FULL[kind]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_a_torchscript_folder(folders, narrow_presets, monkeypatch, kind, dtype):
    folder, original = folders[kind, dtype], narrow(kind).to(dtype)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the file's code must not run"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.kind == kind and {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    read = tokenizer.state_dict()
    assert read.keys() == original.state_dict().keys()
    assert all(torch.equal(read[k], v.float()) for k, v in original.state_dict().items())
    reference, video = narrow(kind), clip(9)
    if dtype == torch.float32:
        assert torch.equal(tokenizer.encode(video), reference.encode(video))


@pytest.mark.parametrize("kind", KINDS)
def test_works_in_bfloat16(kind):
    """On the CPU too, and close to float32: the tokens of DV are told apart in float32 whatever the weights are."""
    exact, half, video = small(kind), small(kind).to(torch.bfloat16), clip(9)
    z = exact.encode(video)
    if kind == "discrete":
        assert half.encode(video).dtype == torch.int64
    else:
        assert half.encode(video).dtype == torch.bfloat16 and relative(half.encode(video).float(), z) < 0.1
    assert half.decode(z).dtype == torch.bfloat16 and relative(half.decode(z).float(), exact.decode(z)) < 0.1


@needs_cosmos
@pytest.mark.parametrize("name", ["CV8x16x16", "DV8x8x8"])
def test_the_folders_of_these_tests_have_the_listed_names(name):
    tokenizer = Tokenizer(TokenizerConfig(channels=4, **FULL["continuous" if name[0] == "C" else "discrete"]))
    ours = {"encoder.jit": set(EncoderFile(tokenizer).state_dict()), "decoder.jit": set(DecoderFile(tokenizer).state_dict())}
    for file, keys in listed_keys(name).items():
        constants = ("wavelets", "_arange", "patch_size_buffer", "_levels", "_basis", "implicit_codebook")
        assert {k for k in set(keys) ^ ours[file] if not k.endswith(constants)} == set()


def test_the_folders_name_states_the_compression(folders, narrow_presets, tmp_path):
    folder = folders["continuous", torch.float32]
    for name, expected in (("Cosmos-0.1-Tokenizer-CV8x8x8", (8, 8)), ("CV4x8x8", (4, 8)), ("renamed", (8, 16))):
        os.symlink(folder, tmp_path / name)
        t = load_tokenizer(str(tmp_path / name))
        assert (t.temporal, t.spatial) == expected


def copy_folder(folder, to):
    os.makedirs(to)
    for name in ("encoder.jit", "decoder.jit"):
        with open(os.path.join(folder, name), "rb") as a, open(os.path.join(to, name), "wb") as b:
            b.write(a.read())
    return str(to)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_jit_file_is_one_sentence(folders, narrow_presets, tmp_path, keep):
    folder = copy_folder(folders["continuous", torch.float32], tmp_path / "x")
    file = os.path.join(folder, "decoder.jit")
    os.truncate(file, keep if keep >= 1 else int(os.path.getsize(file) * keep))
    with pytest.raises(DataError) as e:
        load_tokenizer(folder)
    assert "decoder.jit" in one_sentence(e)


def rewrite(file, change):
    """The zip again, with change(name, bytes) -> bytes."""
    with zipfile.ZipFile(file) as z:
        content = [(n, change(n, z.read(n))) for n in z.namelist()]
    with zipfile.ZipFile(file, "w") as z:
        for n, data in content:
            z.writestr(n, data)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_jit_file_is_refused_and_not_run(folders, narrow_presets, tmp_path, protocol):
    folder = copy_folder(folders["continuous", torch.float32], tmp_path / "x")
    trap = str(tmp_path / "run")
    rewrite(os.path.join(folder, "encoder.jit"),
            lambda n, b: pickle.dumps(Evil(trap), protocol) if n.endswith("/data.pkl") else b)
    with pytest.raises(DataError) as e:
        load_tokenizer(folder)
    assert "encoder.jit" in one_sentence(e) and "do not trust" in str(e.value) and not os.path.exists(trap)


@pytest.mark.parametrize("damage", ["short storage", "no storage", "flipped", "not a module"])
def test_a_damaged_jit_file_is_one_sentence(folders, narrow_presets, tmp_path, damage):
    folder = copy_folder(folders["continuous", torch.float32], tmp_path / "x")
    file = os.path.join(folder, "encoder.jit")
    if damage == "flipped":  # one byte of the largest tensor: the zip's checksum notices
        with zipfile.ZipFile(file) as z:
            at = max((i for i in z.infolist() if "/data/" in i.filename), key=lambda i: i.file_size).header_offset
        with open(file, "r+b") as f:
            f.seek(at + 2000)
            byte = f.read(1)
            f.seek(at + 2000)
            f.write(bytes([byte[0] ^ 255]))
    elif damage == "no storage":
        with zipfile.ZipFile(file) as z:
            content = [(n, z.read(n)) for n in z.namelist() if not n.endswith("/data/3")]
        with zipfile.ZipFile(file, "w") as z:
            for n, data in content:
                z.writestr(n, data)
    else:
        rewrite(file, lambda n, b: b[:-4] if damage == "short storage" and n.endswith("/data/3") else
                pickle.dumps([1, 2]) if damage == "not a module" and n.endswith("/data.pkl") else b)
    with pytest.raises(DataError) as e:
        load_tokenizer(folder)
    assert "encoder.jit" in one_sentence(e)


@pytest.mark.parametrize("size", [(10**6, 4), (-1, 4)])
def test_a_tensor_beyond_its_storage_is_one_sentence(tmp_path, size):
    """A view that reaches out of its storage must not be taken."""
    class View:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, (4, 1), False, None)

    class Storage:
        pass

    class Writer(pickle._Pickler):
        def persistent_id(self, x):
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(x, Storage) else None

    stream = io.BytesIO()
    Writer(stream, 2).dump(View())
    with zipfile.ZipFile(tmp_path / "x.jit", "w") as z:
        z.writestr("x/data.pkl", stream.getvalue())
        z.writestr("x/data/0", bytes(64))
    os.rename(tmp_path / "x.jit", tmp_path / "encoder.jit")
    with pytest.raises(DataError) as e:
        load_tokenizer(str(tmp_path))
    assert "encoder.jit" in one_sentence(e) and "RuntimeError" in str(e.value)  # torch's, of as_strided


def test_a_folder_without_decoder_is_one_sentence(folders, narrow_presets, tmp_path):
    folder = copy_folder(folders["continuous", torch.float32], tmp_path / "x")
    os.remove(os.path.join(folder, "decoder.jit"))
    with pytest.raises(DataError) as e:
        load_tokenizer(folder)
    assert "decoder.jit" in one_sentence(e)


def test_weights_of_another_width_are_refused(folders):
    with pytest.raises(DataError) as e:  # presets as released: 128 channels; the file has 4
        load_tokenizer(folders["continuous", torch.float32])
    one_sentence(e)


# ---- our own files


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    original = narrow(kind).half().float()
    tok.save_tokenizer(original, str(tmp_path / "sub" / "tokenizer.pt"), step=3)
    for path in (tmp_path / "sub" / "tokenizer.pt", tmp_path / "sub"):
        loaded = load_tokenizer(str(path))
        assert loaded.config == original.config
        assert torch.equal(loaded.encode(clip(9)), original.encode(clip(9)))
    assert os.listdir(tmp_path / "sub") == ["tokenizer.pt"]


def test_bad_files_are_one_sentence(tmp_path):
    good = tmp_path / "good.pt"
    tok.save_tokenizer(narrow("continuous"), str(good))
    saved = torch.load(good, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    trap = tmp_path / "run"
    torch.save(Evil(str(trap)), tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "config": {}}, tmp_path / "other.pt")
    torch.save(dict(saved, config=dict(saved["config"], colour=1)), tmp_path / "field.pt")
    torch.save(dict(saved, config=dict(saved["config"], channels=6)), tmp_path / "width.pt")
    torch.save(dict(saved, state_dict={}), tmp_path / "none.pt")
    for name in ("cut", "empty", "text", "evil", "list", "other", "field", "width", "none", "missing"):
        with pytest.raises(DataError) as e:
            load_tokenizer(str(tmp_path / f"{name}.pt"))
        assert f"{name}.pt" in one_sentence(e)
    assert not trap.exists()
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path))  # a folder with neither


# ---- training and checking


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_check_commands(toy, tmp_path, kind, capsys):
    size = ["--channels", "4", *(["--levels", "4,4,4"] if kind == "discrete" else ["--latent_channels", "4"])]
    tok.main(["train", "--data", f"{toy}/raw", "--kind", kind, "--out", str(tmp_path), "--steps", "2", "--batch", "2", *size])
    tok.main(["check", "--data", f"{toy}/raw", "--tokenizer", f"{tmp_path}/tokenizer.pt", "--num", "2"])
    out = capsys.readouterr().out
    assert "tokenizer.pt" in out and " dB" in out
    assert load_tokenizer(str(tmp_path)).kind == kind


def test_commands_end_in_a_sentence(toy, tmp_path):
    for argv, word in ((["check", "--data", f"{toy}/raw", "--tokenizer", f"{tmp_path}/no.pt"], "no.pt"),
                       (["check", "--data", f"{tmp_path}/no", "--tokenizer", f"{toy}/cv.pt"], "no"),
                       (["train", "--data", f"{toy}/cv", "--kind", "continuous", "--out", str(tmp_path), "--steps", "1"], "cv")):
        with pytest.raises(SystemExit) as e:
            tok.main(argv)
        assert isinstance(e.value.code, str) and word in e.value.code and "\n" not in e.value.code


def test_psnr_by_hand():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] += 1  # one grey level off in one of two frames
    np.testing.assert_allclose(tok.psnr(a, b), [68.13, 48.13], atol=0.01)  # 10 log10(255^2 / 0.01), 10 log10(255^2)
    assert (tok.psnr(torch.from_numpy(a), torch.from_numpy(b)) == tok.psnr(a, b)).all()


# ---- where training starts


def test_a_start_that_is_simple():
    """Quiet, and free of time: a frame of a standing video is coded like any other, whatever the causal kernels will learn."""
    torch.manual_seed(0)
    config = TokenizerConfig(channels=8, channels_mult=(1, 2, 2), num_res_blocks=1, **FULL["continuous"])
    plain, simple = Tokenizer(config), Tokenizer(config)
    training.start_simple(simple)
    video, still = clip(), clip(1).expand(-1, -1, 17, -1, -1)
    assert simple(video).std() < 0.3 * plain(video).std()
    z = simple.encode(still)
    assert z.std() > 0 and (z - z[:, :, :1]).abs().max() < 0.3 * z.std()


def test_a_start_from_a_trained_one_keeps_its_principal_components(tmp_path):
    """A narrower bottleneck is the projection of the old latents on their directions of greatest variance: what a
    linear code of that many numbers keeps at best."""
    old = small("continuous", latent_channels=6, z_channels=6)
    tok.save_tokenizer(old, str(tmp_path / "old.pt"))
    old = load_tokenizer(str(tmp_path / "old.pt"))
    new, video = Tokenizer(TokenizerConfig(**{**vars(old.config), "latent_channels": 3})), clip(17, 64)
    training.start_from(new, str(tmp_path / "old.pt"), video)
    z = old.encode(video).movedim(1, -1)
    flat = z.reshape(-1, 6)
    _, _, V = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    kept = (z - flat.mean(0)) @ V[:3].T @ V[:3] + flat.mean(0)
    torch.testing.assert_close(new(video), old.decode(kept.movedim(-1, 1)), rtol=1e-3, atol=1e-3)
    code = new.encode(video).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(torch.cov(code.T), torch.eye(3), rtol=1e-3, atol=1e-3)


def test_a_discrete_start_from_a_continuous_one_uses_its_levels(tmp_path):
    old = small("continuous", latent_channels=6, z_channels=6)
    tok.save_tokenizer(old, str(tmp_path / "old.pt"))
    new = Tokenizer(TokenizerConfig(**{**vars(old.config), "levels": (5, 5, 5)}))
    video = clip(17, 192)  # 432 places
    training.start_from(new, str(tmp_path / "old.pt"), video)
    ids = new.encode(video)
    used = [torch.unique(ids // n % 5).numel() for n in (1, 5, 25)]
    assert used == [5, 5, 5] and ids.unique().numel() > 60, "of 125 ids"


@pytest.mark.parametrize("change, word", [(dict(channels=4), "shape"), (dict(latent_channels=9), "9")])
def test_a_start_that_does_not_fit_is_one_sentence(tmp_path, change, word):
    tok.save_tokenizer(small("continuous", latent_channels=6, z_channels=6), str(tmp_path / "old.pt"))
    config = TokenizerConfig(**{**vars(small("continuous", latent_channels=6, z_channels=6).config), **change})
    with pytest.raises(DataError, match=word):
        training.start_from(Tokenizer(config), str(tmp_path / "old.pt"), clip())


def test_tokens_of_the_shipped_tokenizer_survive_a_trip_through_video():
    """tokens -> video -> tokens: most ids come back, and nearly all digits are those of before."""
    file = os.path.join(os.path.dirname(os.path.abspath(tok.__file__)), "weights", "tokenizer_dv_tiny.pt")
    tokenizer = load_tokenizer(file)
    video = torch.stack([torch.from_numpy(robot.robot_episode(900 + i, 17)[0]) for i in range(4)])
    with torch.no_grad():
        ids = tokenizer.encode(tok.to_video(video))
        again = tokenizer.encode(tok.to_video(tok.to_uint8(tokenizer.decode(ids))))
    before, after = (tokenizer.fsq.ids_to_codes(x) for x in (ids, again))
    assert (ids == again).float().mean() > 0.5 and (before == after).float().mean() > 0.85
    decoded = tok.to_uint8(tokenizer.decode(ids))
    assert tok.psnr(decoded.flatten(0, 1), video.flatten(0, 1)).mean() > 26


# ---- odd files


def test_a_module_that_holds_itself_is_read_once(tmp_path, monkeypatch):
    """TorchScript pickles classes of a package __torch__; this one's instance is its own child."""
    package = types.ModuleType("__torch__")
    Loop = type("Loop", (), {"__module__": "__torch__"})
    package.Loop = Loop
    monkeypatch.setitem(sys.modules, "__torch__", package)
    outer, inner = Loop(), Loop()
    outer.itself, outer.child, inner.parent = outer, inner, outer
    with zipfile.ZipFile(tmp_path / "encoder.jit", "w") as z:
        z.writestr("x/data.pkl", pickle.dumps(outer, 2))
    assert read_torchscript(str(tmp_path / "encoder.jit")) == {}


@pytest.mark.parametrize("change", [
    dict(channels="8"), dict(channels=4.0), dict(channels=-4), dict(channels=0), dict(channels=None), dict(channels=10**12),
    dict(num_res_blocks=10**9), dict(num_res_blocks=True), dict(channels_mult=2), dict(channels_mult=(2, 4)), dict(channels_mult="244"),
    dict(levels=(8, 1)), dict(levels=(8.0, 8)), dict(levels=8), dict(spatial_compression=12), dict(temporal_compression=12),
    dict(spatial_compression=(8,)), dict(spatial_compression=8.0), dict(patch_size=2), dict(channels=(4,)), dict(z_channels=float("nan"))])
def test_a_config_that_makes_no_sense_is_one_sentence(tmp_path, change):
    tok.save_tokenizer(narrow("continuous"), str(tmp_path / "t.pt"))
    saved = torch.load(tmp_path / "t.pt", weights_only=True)
    torch.save(dict(saved, config=dict(saved["config"], **change)), tmp_path / "t.pt")
    with pytest.raises(DataError) as e:
        load_tokenizer(str(tmp_path / "t.pt"))
    assert "t.pt" in one_sentence(e)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(tmp_path, value):
    file, tokenizer = str(tmp_path / "t.pt"), narrow("continuous")
    tok.save_tokenizer(tokenizer, file)
    before = open(file, "rb").read()
    saved = torch.load(file, weights_only=True)
    saved["state_dict"]["quant_conv.conv3d.bias"][3] = value
    torch.save(saved, tmp_path / "bad.pt")
    with pytest.raises(DataError, match="finite") as e:
        load_tokenizer(str(tmp_path / "bad.pt"))
    assert "bad.pt" in one_sentence(e)
    tokenizer.quant_conv.conv3d.bias.data[3] = 1e30  # finite, but not in half precision
    with pytest.raises(DataError, match="finite"):
        tok.save_tokenizer(tokenizer, file)
    assert open(file, "rb").read() == before


# ---- what every module uses


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = str(tmp_path / "sub" / "x.txt")

    def write(text, error=None):
        def to(name):
            assert name.endswith(".tmp") and os.path.dirname(name) == os.path.dirname(file)
            with open(name, "w") as f:
                f.write(text)
            if error:
                raise error
        return to

    tok.write_whole(file, write("good"))
    full, forbidden = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EROFS, os.strerror(errno.EROFS))
    for error, word, other in ((full, "room", "permission"), (RuntimeError("PytorchStreamWriter failed"), "room", "permission"),
                               (forbidden, "permission", "room")):
        with pytest.raises(DataError) as e:
            tok.write_whole(file, write("half", error))
        assert "x.txt" in one_sentence(e) and word in str(e.value) and other not in str(e.value)
    with pytest.raises(KeyboardInterrupt):
        tok.write_whole(file, write("half", KeyboardInterrupt()))
    assert open(file).read() == "good" and os.listdir(tmp_path / "sub") == ["x.txt"]
    with pytest.raises(DataError, match="a file is where a folder should be"):
        tok.write_whole(file + "/y.txt", write("new"))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error, words", [(DataError("the file x is bad"), "the file x is bad"),
                                          (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; permission is"),
                                          (OSError(errno.ENOSPC, "No space left", "x"), "x: No space left; make room")])
def test_commands_say_one_sentence_on_rank_0(monkeypatch, rank, error, words):
    monkeypatch.setenv("RANK", rank)

    @tok.command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 1 if rank == "1" else e.value.code.startswith(f"test_tokenizer.py: {words}")


def test_walk_shows_every_shape(capsys):
    tok.main([])
    out = capsys.readouterr().out
    for shape in ("(1, 3, 17, 64, 64)", "(1, 192, 5, 16, 16)", "(1, 5, 3, 8, 8)", "(1, 3, 8, 8)"):
        assert shape in out
    assert "True" in out


# ---- training that is interrupted, shared, or goes wrong


SMALL = ["--kind", "discrete", "--channels", "4", "--levels", "4,4,4", "--steps", "4", "--batch", "2", "--eval_every", "2"]


def train(toy, out, *more):
    tok.main(["train", "--data", f"{toy}/raw", "--out", str(out), *SMALL, *more])


def state_of(out):
    return torch.load(f"{out}/train_state.pt", weights_only=True)


def same_state(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same_state(a[k], b[k]) for k in keys)
    return a == b


@pytest.mark.parametrize("more, steps", [([], 5000), (["--init", "cv.pt"], 1500), (["--init", "cv.pt", "--steps", "7"], 7)])
def test_a_tokenizer_that_has_a_start_needs_fewer_steps(toy, tmp_path, monkeypatch, capsys, more, steps):
    monkeypatch.setattr(training, "new_tokenizer", lambda *_: tok.Tokenizer(tok.TokenizerConfig(channels=4, levels=(4, 4, 4))))
    monkeypatch.setattr(training, "tqdm", lambda **about: killed(about))  # the loop's bar: here it would begin
    with pytest.raises(KeyError):
        tok.main(["train", "--data", f"{toy}/raw", "--out", str(tmp_path), "--kind", "discrete", *more])
    assert f"from step 0 of {steps}\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    train(toy, out)
    return out


@pytest.fixture(autouse=True)
def usual_signals():
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def interfere(monkeypatch, at, act):
    """Calls act() when the batch of step `at` is drawn."""
    draw = training.draw_batch

    def interfering(clips, batch, seed, step, *more):
        video = draw(clips, batch, seed, step, *more)
        return act(video) if step == at else video

    monkeypatch.setattr(training, "draw_batch", interfering)


def killed(video):
    raise KeyError("killed")


def test_the_log_has_copy_last_and_the_ids_in_use(toy, whole, capsys):
    log = [json.loads(line) for line in open(whole / "log.jsonl")]
    assert [line["step"] for line in log] == [2, 4]
    import data
    clips = data.open_clips(f"{toy}/raw", "val")
    video = np.stack([clips[i]["video"].numpy() for i in range(len(clips))]).astype(float)
    mse = ((video[:, 9:] - video[:, 8:9]) ** 2).mean((2, 3, 4))
    assert log[0]["copy_last"] == pytest.approx((10 * np.log10(255**2 / mse)).mean())
    tokenizer, best = load_tokenizer(str(whole)), max(log, key=lambda line: line["val_psnr"])
    assert torch.load(whole / "tokenizer.pt", weights_only=True)["psnr"] == best["val_psnr"]
    with torch.no_grad():
        ids = [tokenizer.encode(tok.to_video(clips[i]["video"][None])) for i in range(len(clips))]
        decoded = [tok.to_uint8(tokenizer.decode(z))[0] for z in ids]
    expected = np.mean([tok.psnr(d, clips[i]["video"]) for i, d in enumerate(decoded)])
    assert best["val_psnr"] == pytest.approx(expected, abs=0.02)  # the file is in half precision
    scores, z = training.round_trip(tokenizer, clips, 32)
    assert torch.equal(z, torch.cat(ids)) and scores["ids_in_use"] == len(z.unique()) / 64
    tok.main(["check", "--data", f"{toy}/raw", "--tokenizer", str(whole)])
    out = capsys.readouterr().out
    assert f"copy-last {log[0]['copy_last']:.2f} dB" in out and "too poor to judge" in out


@pytest.mark.parametrize("val_psnr, warned", [(22.9, True), (23.1, False)])
def test_reconstructions_that_are_too_poor_are_named(capsys, val_psnr, warned):
    training.explain({"val_psnr": val_psnr, "copy_last": 20.0})
    assert ("too poor" in capsys.readouterr().out) == warned


def test_training_learns(toy, whole):
    import data
    clips = data.open_clips(f"{toy}/raw", "val")
    torch.manual_seed(0)
    start = Tokenizer(load_tokenizer(str(whole)).config)
    training.start_simple(start)
    before, after = (training.round_trip(t, clips, 5)[0]["val_psnr"] for t in (start, load_tokenizer(str(whole))))
    assert after > before + 0.5, f"{before} dB before, {after} dB after four steps"


def test_batches_are_whole_and_shared(toy):
    import data
    clips = data.open_clips(f"{toy}/raw", "train")
    batch = training.draw_batch(clips, 7, 0, 3)  # 7 does not divide the 12 clips
    parts = [training.draw_batch(clips, 7, 0, 3, rank, 2) for rank in (0, 1)]
    assert batch.shape == (7, 3, 17, 32, 32) and torch.equal(torch.cat([parts[0], parts[1]]), batch[[0, 2, 4, 6, 1, 3, 5]])
    assert torch.equal(training.draw_batch(clips, 7, 0, 3), batch)
    assert not torch.equal(training.draw_batch(clips, 7, 0, 4), batch) and not torch.equal(training.draw_batch(clips, 7, 1, 3), batch)


def test_only_the_best_is_kept(toy, tmp_path, monkeypatch):
    scores = iter([3.0, 5.0, 4.0, 5.0])
    monkeypatch.setattr(training, "round_trip", lambda *_: ({"val_psnr": next(scores), "copy_last": 1.0}, None))
    train(toy, tmp_path, "--eval_every", "1")
    saved = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert (saved["step"], saved["psnr"]) == (2, 5.0)


def test_a_killed_run_resumes_to_the_same_numbers(toy, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interfere(patched, 3, killed)
        with pytest.raises(KeyError):
            train(toy, tmp_path)
    assert state_of(tmp_path)["step"] == 2
    train(toy, tmp_path, "--resume")
    assert same_state(state_of(tmp_path), state_of(whole))
    assert (tmp_path / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert same_state(*(torch.load(f"{out}/tokenizer.pt", weights_only=True) for out in (tmp_path, whole)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_state(toy, whole, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patched:
        interfere(patched, 0, lambda video: os.kill(os.getpid(), number) or video)
        train(toy, tmp_path)
    assert state_of(tmp_path)["step"] == 1 and "--resume goes on" in capsys.readouterr().out
    train(toy, tmp_path, "--resume")
    assert same_state(state_of(tmp_path), state_of(whole))


def test_resuming_another_run_is_refused(toy, tmp_path, capsys):
    for argv, words in ((["--resume"], "leave out --resume"), ([], None), (["--resume", "--lr", "0.5"], "lr was 0.0015, is 0.5")):
        if words is None:
            train(toy, tmp_path)
            continue
        with pytest.raises(SystemExit) as e:
            train(toy, tmp_path, *argv)
        assert words in e.value.code and "\n" not in e.value.code


def test_a_loss_that_is_not_finite_spares_the_good_file(toy, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interfere(patched, 3, killed)
        with pytest.raises(KeyError):
            train(toy, tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("tokenizer.pt", "train_state.pt", "log.jsonl")]
    with monkeypatch.context() as patched:
        interfere(patched, 3, lambda video: video * float("nan"))
        with pytest.raises(SystemExit) as e:
            train(toy, tmp_path, "--resume")
    assert "--lr" in e.value.code and "nan" in e.value.code and "\n" not in e.value.code
    with pytest.raises(SystemExit, match="will not be overwritten"):
        train(toy, tmp_path, "--lr", "1e9")
    assert before == [(tmp_path / name).read_bytes() for name in ("tokenizer.pt", "train_state.pt", "log.jsonl")]


@pytest.mark.parametrize("eval_every", ["1", "50"])
def test_a_rate_that_is_too_high_writes_nothing_bad(toy, tmp_path, eval_every):
    with pytest.raises(SystemExit) as e:
        train(toy, tmp_path, "--lr", "1e30", "--steps", "50", "--eval_every", eval_every)
    assert "--lr" in e.value.code and not (tmp_path / "tokenizer.pt").exists()


@pytest.mark.parametrize("more", [
    ["--steps", "0"], ["--steps", "-3"], ["--batch", "0"], ["--batch", "-1"], ["--eval_every", "0"], ["--lr", "0"], ["--lr", "nan"],
    ["--lr", "inf"], ["--channels", "0"], ["--channels", "99999"], ["--size", "0"], ["--size", "-8"], ["--spatial_compression", "12"],
    ["--temporal_compression", "3"], ["--levels", "4,1"], ["--levels", "0"], ["--seed", "-5"], ["--seed", "99999999999999999999"],
    ["--device", "abacus"], ["--kind", "continuous"], ["--init", "no.pt"]])
def test_flags_that_make_no_sense_end_before_any_work(toy, tmp_path, monkeypatch, more):
    monkeypatch.setattr(training, "draw_batch", lambda *_, **__: torch.zeros(1, 3, 17, 32, 32) if "--init" in more else pytest.fail("work"))
    with pytest.raises(SystemExit) as e:
        train(toy, tmp_path, *more)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and e.value.code.startswith("tokenizer.py: ")


def test_out_that_is_a_file_and_num_0_are_sentences(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as e:
        train(toy, tmp_path / "file")
    assert "file" in e.value.code and "give another name" in e.value.code
    with pytest.raises(SystemExit) as e:
        tok.main(["check", "--data", f"{toy}/raw", "--tokenizer", f"{toy}/cv.pt", "--num", "0"])
    assert "--num 0" in e.value.code


def test_two_processes_train_as_one(toy, whole, tmp_path):
    """Through torchrun and as a script: also that tokenizer.py run as a program shares its DataError with data.py."""
    folder = os.path.dirname(os.path.abspath(tok.__file__))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tokenizer.py", "train",
            "--data", f"{toy}/raw", "--out", str(tmp_path), *SMALL, "--device", "cpu"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("M parameters") == 1
    a, b = state_of(tmp_path), state_of(whole)
    assert a["step"] == 4 and [line["step"] for line in a["log"]] == [2, 4]
    for key in a["tokenizer"]:
        torch.testing.assert_close(a["tokenizer"][key], b["tokenizer"][key], rtol=1e-3, atol=2e-4)
    done = subprocess.run([sys.executable, "tokenizer.py", "check", "--data", "no", "--tokenizer", str(tmp_path)], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("tokenizer.py: no is no folder") and "Traceback" not in done.stderr
