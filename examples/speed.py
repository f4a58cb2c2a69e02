"""The number type and the compiler: what makes a model faster, and shall change nothing else.

`set_dtype` prepares a model for sampling. Training asks `faster_on` for its number type, and has compiled
blocks checked by `compile_checked`. Both models are treated alike: by their first block and its inputs.
"""
import copy
import math
import time

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

from blocks import compile_blocks, plain_blocks
from tokenizer import DataError, from_rank_0, sum_over_processes

def cast_products(module):
    """Weights of Linear in bfloat16, for good: autocast casts those of a frozen model at every call."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.bfloat16()

def to_device(batch, device):
    """The same tensors on a device, in the same containers."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), batch)

class Enough(Exception):
    """Ends a call of a model that is made for the inputs of its first block."""

@torch.no_grad()
def first_inputs(model, batch):
    """What the model's first block is given when the model is given a batch (video, actions, draws)."""
    def stop(_, inputs):
        raise Enough(*inputs)

    hook = model.blocks[0].register_forward_pre_hook(stop)
    try:
        model(*to_device(batch, next(model.parameters()).device))
    except Enough as found:
        return found.args
    finally:
        hook.remove()

def faster_dtype(block, x, *rest, training=True):
    """The number type in which a block of the model is faster on real inputs, forward and back; for sampling
    forward alone, with weights that are cast once."""
    if x.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        print("this GPU computes no bfloat16: float32 is taken")
        return "float32"
    blocks = {"float32": block, "bfloat16": block}
    if not training:
        blocks["bfloat16"] = copy.deepcopy(block)
        cast_products(blocks["bfloat16"])
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    for name in [*seconds] * 4:  # in turn, for a machine may be busy for a while; the first two warm up
        start = time.perf_counter()
        autocast = torch.autocast(x.device.type, getattr(torch, name), enabled=name != "float32")
        with autocast, torch.set_grad_enabled(training):
            y = blocks[name](x.detach().requires_grad_(training), *rest)
        if training:
            y.float().sum().backward()
        if x.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=seconds.get)

def faster_on(device, model, batch, training=True):
    """The number type in which a block of the model is faster on a device, with a batch as `forward` takes
    it. The model itself may still be on the CPU."""
    block = copy.deepcopy(model.blocks[0]).to(device)
    inputs = to_device(first_inputs(model, batch), device)
    return from_rank_0(faster_dtype(block, *inputs, training=training))

def in_bfloat16(model, tokenizer):
    """Makes the model sample and the tokenizer decode in bfloat16, by weights that are cast once, here. What
    the model's layers add up stays in float32, and so does encoding, where rounding would change ids."""
    tokenizer.decode = copy.deepcopy(tokenizer).bfloat16().decode
    cast_products(model)
    autocast = torch.autocast(model.standardise_actions.mean.device.type, torch.bfloat16)
    network = getattr(model, model.network)
    setattr(model, model.network, autocast(network))

def set_dtype(model, tokenizer, args, at_once):
    """Makes both compute as --dtype and --compile ask -> the name of the type. auto is the type in which a
    block of the model is faster for `at_once` clips."""
    dtype = args.dtype
    if dtype == "auto":
        dtype = faster_on(args.device, model, model.example(at_once), training=False)
    if dtype == "bfloat16":
        in_bfloat16(model, tokenizer)
    if args.compile:
        compile_blocks(model)
    return dtype

ROUNDING = {"float32": 1e-3, "bfloat16": 1e-2}  # relative difference; that of wrong kernels was larger

def compile_checked(model, loss_and_norm, dtype, say):
    """Compiles the blocks of a model in training -> True, if its loss and gradient norm stay as they are.
    Else the blocks stay plain. why: compilers have made wrong kernels of them, and said nothing. Every
    process must call this: what one of them cannot use, none does."""
    plain = loss_and_norm()
    compile_blocks(model)
    try:
        compiled = loss_and_norm()
        differs = not torch.allclose(compiled, plain, rtol=ROUNDING[dtype])
        about = "loss and gradient norm of the first batch "
        about += f"{compiled.tolist()}, of plain blocks {plain.tolist()}"
    except RuntimeError as e:
        differs, about = True, f"the compiler fails ({e!r:.150})"
        if hasattr(model, "reshard"):  # with --shard pieces are in disorder now, and other processes may wait
            raise DataError(f"--compile cannot be used here, {about}: give --no-compile") from None
    failed = torch.tensor(float(differs), device=next(model.parameters()).device)
    sum_over_processes(failed)
    if failed:
        plain_blocks(model)
    say(f"the blocks are {'not ' if failed else ''}compiled: {about}")
    return not failed
