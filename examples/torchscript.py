"""NVIDIA's encoder.jit and decoder.jit: the weights in a TorchScript file, without running any code of it.

The archive is a zip: data.pkl is the tree of modules, data/0, data/1 ... are the tensors' bytes. A pickle
can call anything, so that the reader here knows the names of tensors and plain containers alone.
"""
import os
import pickle
import re
import zipfile
from dataclasses import replace

import torch

from tokenizer import PRESETS, DataError

class ScriptModule:
    """The stand-in for every class of a TorchScript file: it only holds the attributes."""

class TorchScriptReader(pickle.Unpickler):
    def __init__(self, file):
        self.archive = zipfile.ZipFile(file)
        tree = next(name for name in self.archive.namelist() if name.endswith("/data.pkl"))
        self.folder = tree.removesuffix("data.pkl")
        super().__init__(self.archive.open(tree))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return ScriptModule
        if module == "torch.jit._pickle":  # typed lists of numbers, which are no weights
            return lambda *numbers: None
        if name.endswith("Storage"):  # FloatStorage
            return getattr(torch, name.removesuffix("Storage").lower())
        if name == "_rebuild_tensor_v2":  # as_strided refuses what reaches out of its storage
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset).clone()
        if name == "OrderedDict":
            return dict
        raise DataError(f"it calls {module}.{name}, which no file of weights needs: do not trust it")

    def persistent_load(self, about):
        _, dtype, key, _, _ = about  # the others are a word, the device it was saved from, and the length
        data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

def read_torchscript(file):
    """The tensors of a TorchScript archive by their dotted names, on the CPU, as stored."""
    found, seen, waiting = {}, set(), [("", TorchScriptReader(file).load())]
    while waiting:
        prefix, module = waiting.pop()
        seen.add(module)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
            elif isinstance(value, ScriptModule) and value not in seen:  # a module may hold itself
                waiting.append((f"{prefix}{name}.", value))
    return found

def config_of_cosmos(state, path):
    """Which released tokenizer is it? The files do not state their compression. The paper's are 8x16x16 when
    continuous and 8x8x8 when discrete; a suffix of the folder's name, as in CV4x8x8, overrides that."""
    discrete = any(name.endswith("quantizer._levels") for name in state)
    config, name = PRESETS["dv8x8x8" if discrete else "cv8x16x16"], os.path.basename(os.path.abspath(path))
    for temporal, spatial in re.findall(r"(\d+)x(\d+)x\2(?!\d)", name):
        config = replace(config, temporal_compression=int(temporal), spatial_compression=int(spatial))
    return config
