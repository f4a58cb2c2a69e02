"""What the tests share: the import path, one thread, and a toy world made once."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_stays_switched():
    """A switch of the whole process that a test leaves turned would fail thirty others far away: it fails this one."""
    threads = torch.get_num_threads()
    yield
    grad, torch_threads = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)
    assert grad and torch_threads == threads, "gradients are off, or the number of threads is another, after this test"


TOY_PRESET = dict(n_layer=2, n_head=2, width=24, hidden=32)  # of either model


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with raw/ (12 + 5 clips of the built-in robot, 32 x 32), tiny random tokenizers dv.pt and cv.pt, and raw
    encoded with them, in dv/ and cv/."""
    import data
    import tokenizer
    from examples import robot

    root = tmp_path_factory.mktemp("toy")
    for split, seed, frames in (("train", 1, 204), ("val", 2, 85)):
        video, states = robot.robot_episode(seed, frames, 32)
        folder = f"{root}/raw/{split}_v2.0"
        data.save_shard(folder, 0, ".npy", video, states, [0] * frames)
        data.save(f"{folder}/metadata.json", {"num_shards": 1, "query": None, "hz": 10, "num_images": frames})
    torch.manual_seed(0)
    for name, levels in (("dv", (4, 4, 4)), ("cv", ())):
        config = tokenizer.TokenizerConfig(channels=8, channels_mult=(1, 1, 1), num_res_blocks=1, z_channels=4,
                                           latent_channels=4, spatial_compression=8, levels=levels)
        tokenizer.save_tokenizer(tokenizer.Tokenizer(config), f"{root}/{name}.pt")
        data.encode(f"{root}/raw", f"{root}/{name}.pt", f"{root}/{name}", stride=17, device="cpu", progress=False)
    return root
