"""How a data folder is written: shard by shard, so that whatever dies, the same command goes on from there.

`data.save` writes a file beside and renames it, `data.save_shard` a shard's metadata after its files, and
here metadata.json is written after all shards: what is there is whole. All cores of a machine, or all ranks
of torchrun, share the work. `data.py synth` and `data.py encode` write so, and so may a robot of yours.
"""
import contextlib
import functools
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import check, read_json, reading, save, save_shard, shard_files

def is_whole(folder, i, video_bytes, state_bytes):
    """Shard i has its metadata, which is written last, and files of the right sizes."""
    for suffix, header in ((".npy", 128), (".bin", 0)):
        files = shard_files(folder, i, suffix)
        if all(map(os.path.isfile, files)):
            return [os.path.getsize(file) for file in files[:2]] == [video_bytes + header, state_bytes]
    return False

def make_one(folder, make_shard, i):
    video, states, segments = make_shard(i)
    save_shard(folder, i, ".npy" if video.dtype == np.uint8 else ".bin", video, states, segments)
    return i

def end_with_parent():
    """Without this a pool's processes would wait for work for ever after their parent was killed."""
    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait_and_end, daemon=True).start()

def make_split(folder, settings, shards, make_shard, meta, shard_bytes, share=None, progress=True,
               unit="frame", title="drawing"):
    """Makes the shards of one split that are not whole on disk yet, and then its metadata.json.

    settings     what the folder is made with, a dict; a folder that was made with others is refused
    shards       pairs (i, number of units), the units being what the progress bar counts
    make_shard   i -> (video, states, segments), uint8 video for .npy, any other for .bin; it is picklable
    meta         content of metadata.json, or a function that returns it when all shards are whole
    shard_bytes  i -> (bytes of the video's array, bytes of the states)
    share        (rank, world): this process makes every world-th shard, torchrun's others the rest.
                 None: processes on all cores of this machine divide the shards"""
    # 1. Settings are written first, so that only what began a folder can go on with it.
    file, units = f"{folder}/settings.json", dict(shards)
    if not os.path.exists(file):
        check(not os.path.exists(f"{folder}/metadata.json"), f"{folder} holds other data: give another --out")
        save(file, settings)
    old = read_json(file)
    for key in sorted(settings.keys() | old.keys()):  # what was asked for then and is not now differs, too
        then, now = old.get(key), settings.get(key)
        check(then == now, f"{file} says {key} = {then!r}, not {now!r}: give another --out, or delete "
                           f"{folder} to make it anew")

    # 2. What is missing, and whether the disk can take it.
    def missing():
        return [i for i in units if not is_whole(folder, i, *shard_bytes(i))]

    todo = missing()
    need = sum(sum(shard_bytes(i)) for i in todo) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    check(free > need + 0.02, f"{folder} needs {need:.2f} GB, its disk has {free:.2f} GB free: make room")
    # 3. Make our share, here or on all cores.
    rank, world = share or (0, 1)
    mine = [i for i in todo if i % world == rank]
    workers = 1 if share else min(os.cpu_count(), len(mine), 60)
    make = functools.partial(make_one, folder, make_shard)
    bar = tqdm(total=sum(units[i] for i in mine), unit=unit, desc=f"{title} {folder}",
               disable=rank > 0 or not progress or not mine)
    with bar, reading(folder, "is not whole", "run this again"), contextlib.ExitStack() as stack:
        made = map(make, mine)
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=end_with_parent))
            made = pool.map(make, mine)
        for i in made:
            bar.update(units[i])
    # 4. Other ranks may still be at theirs. metadata.json, written last, makes this a data folder.
    metadata = f"{folder}/metadata.json"
    if rank == 0:
        while missing():
            time.sleep(0.2)
        for left in Path(folder).rglob("*.tmp"):  # by a process that was killed
            left.unlink()
        save(metadata, meta() if callable(meta) else meta)
    while not os.path.exists(metadata):
        time.sleep(0.2)
