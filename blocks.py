"""The transformer block of Sec. 2.4, for both models and in all four variants.

All tokens of a sample are one tensor (B, N, D), which holds four streams one after the other:

    v_p  past video      T_p * S tokens     S = H * W positions of a latent frame
    v_f  future video    T_f * S tokens
    a_p  past actions    F_p tokens         one per video frame
    a_f  future actions  F_f tokens

A set of weights therefore serves one contiguous slice, and which streams share weights is a table (SHARING).
MaskedBlock is Figure 2 and FlowBlock is Figure 3. A model reads v_f alone after its last block, so that block
(`last=True`) returns v_f alone, (B, T_f * S, D); every other block returns all tokens.

`python blocks.py` prints which streams share weights, what a layer weighs, and the shapes inside a layer.
"""
import functools
import inspect
import math
from dataclasses import field, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokenizer import DataError, count_parameters, rank_and_world

VARIANTS = ("split", "base", "modality", "full")
SHARING = {  # which weight set serves v_p, v_f, a_p, a_f
    "base": (0, 1, 2, 3),
    "modality": (0, 0, 1, 1),
    "full": (0, 0, 0, 0),
}

def layer_variants(variant, n_layer):
    """The variant of each layer. modality and full keep their first four layers as base (Sec. 2.4), or, with
    fewer layers than the paper's 17, the same share of them."""
    if variant in ("split", "base"):
        return [variant] * n_layer
    n_base = min(4, max(1, round(n_layer * 4 / 17)))
    return ["base"] * n_base + [variant] * (n_layer - n_base)

# ---- the four streams ----------------------------------------------------------------------------

class Layout(NamedTuple):
    """The sizes of the four streams. T latent frames stand for 1 + temporal * (T - 1) video frames."""
    T_p: int  # latent frames of the past
    T_f: int  # latent frames of the future
    H: int  # rows of tokens in a latent frame
    W: int  # columns
    temporal: int  # video frames per latent frame

    @property
    def S(self):
        return self.H * self.W

    @property
    def T(self):
        return self.T_p + self.T_f

    @property
    def lengths(self):
        """Numbers of tokens of v_p, v_f, a_p, a_f."""
        F_p = 1 + self.temporal * (self.T_p - 1)
        return (self.T_p * self.S, self.T_f * self.S, F_p, self.temporal * self.T_f)

    @property
    def future(self):
        """The slice of v_f among the tokens."""
        return slice(self.T_p * self.S, self.T * self.S)

    def for_actions(self, F):
        """The same layout with as many future latents as F actions cover, the past ones included."""
        return self._replace(T_f=1 + (F - 1) // self.temporal - self.T_p)

    def positions(self):
        """(N, 3) time in video frames, row and column of every token. Video and actions share one clock:
        latent i ends with frame temporal * i, action j belongs to frame j. Actions get row 0 and column 0."""
        t, h, w = (torch.arange(n) for n in (self.T, self.H, self.W))
        video = torch.cartesian_prod(t * self.temporal, h, w)
        frames, zero = torch.arange(sum(self.lengths[2:])), torch.arange(1)
        return torch.cat([video, torch.cartesian_prod(frames, zero, zero)]).float()

def per_set(functions, x, sharing, lengths):
    """Each weight set has a function; it is applied to the slice of tokens that the set serves. x (B, N, D)
    holds streams of the given lengths -> (B, N, E), what the functions made of them, in the same order."""
    sizes = [0] * len(functions)
    for i, n in zip(SHARING[sharing], lengths):
        sizes[i] += n
    slices = x.split(sizes, dim=1)
    return torch.cat([f(tokens) for f, tokens in zip(functions, slices)], dim=1)

# ---- rotary position embedding (Su et al., 2023), for any number of axes -------------------------

def rope_table(positions, dims, theta=10000.0):
    """positions (N, axes); dims: how many dimensions of a head each axis rotates, even numbers
    -> (2, N, sum(dims) / 2), cosines and sines."""
    angles = []
    for position, d in zip(positions.T, dims):
        frequencies = theta ** (-torch.arange(0, d, 2) / d)
        angles.append(position.outer(frequencies))
    angles = torch.cat(angles, dim=1)
    return torch.stack([angles.cos(), angles.sin()])

def rotate(x, rope):
    """x (..., N, d) rotated by rope (2, N, R / 2). Dimension i pairs with i + R / 2; those from R on stay."""
    cos, sin = rope.to(x.dtype)
    n = cos.shape[1]
    a, b, rest = x.tensor_split([n, 2 * n], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)

def axis_dims(d):
    """How many dimensions of a head rotate by time, row and column: of 293 it is 100, 96, 96; one stays."""
    space = d // 3 // 2 * 2
    time = (d - 2 * space) // 2 * 2
    return (time, space, space)

@functools.lru_cache
def flow_rope(layout, d, device):
    """Flow-HWM rotates by time, row and column at once: (2, N, d / 2). Computed once for a layout."""
    return rope_table(layout.positions(), axis_dims(d)).to(device)

@functools.lru_cache
def masked_rope(layout, d, device):
    """Masked-HWM has two tables: of row and column for spatial attention, (2, S, d / 2), and of time for
    temporal attention, (2, N, d / 2)."""
    time, row_and_column = layout.positions().split([1, 2], dim=1)
    half = d // 2
    space = rope_table(row_and_column[: layout.S], (half, half))
    return space.to(device), rope_table(time, (d,)).to(device)

# ---- parts of both blocks ------------------------------------------------------------------------

def heads(x, parts, n_head):
    """(B, N, parts * D) -> a list of `parts` tensors (B, h, N, d): D is divided into h heads of width d."""
    return [rearrange(y, "b n (h d) -> b h n d", h=n_head) for y in x.chunk(parts, dim=2)]

def merge(x):
    """(B, h, N, d) -> (B, N, D), the inverse of `heads`."""
    return rearrange(x, "b h n d -> b n (h d)")

def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, h, N, d). The fast kernels of a GPU want d to be a multiple of 8,
    and Flow-HWM has d = 293. So heads are filled up with zeros, which add nothing to any product."""
    d = q.shape[3]
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # Here torch's kernel is half as fast as plain products. The scores of 256 queries fit a cache.
        chunks = q.split(256, dim=2)
        return torch.cat([(q / math.sqrt(d) @ k.mT).softmax(dim=3) @ v for q in chunks], dim=2)
    zeros = -d % 8
    if zeros == 0:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (F.pad(x, (0, zeros)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]

class SelfAttention(nn.Module):
    """Attention of all given tokens to each other."""

    def __init__(self, D, n_head):
        super().__init__()
        self.qkv, self.out, self.n_head = nn.Linear(D, 3 * D), nn.Linear(D, D), n_head

    def project(self, x, rope):
        """(B, N, D) -> queries, keys, values (B, h, N, d)"""
        q, k, v = heads(self.qkv(x), 3, self.n_head)
        return rotate(q, rope), rotate(k, rope), v

    def forward(self, x, rope):
        q, k, v = self.project(x, rope)
        return self.out(merge(attention(q, k, v)))

class MLP(nn.Sequential):
    def __init__(self, D, hidden):
        super().__init__(nn.Linear(D, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, D))

def initialize(model):
    """Weights from N(0, 0.02), biases zero. AtPlace keeps PyTorch's wider weights: it shall count at once."""
    for name, p in model.named_parameters():
        if name.startswith("at_place"):
            continue
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)

# ---- the block of Masked-HWM (Fig. 2) ------------------------------------------------------------

def by_position(x, S):
    return rearrange(x, "b h (t s) d -> b h s t d", s=S)

def temporal_attention(q, k, v, k_a, v_a, S):
    """Video attends to video and actions. For each position s: attention(q_s, [k_s; k_a], [v_s; v_a]), where
    q_s, k_s and v_s belong to the tokens at position s of all latent frames. The actions are the same at
    every position, so each product with them is taken once, not S times.
    q (B, h, T_q * S, d), k and v (B, h, T * S, d), k_a and v_a (B, h, A, d) -> (B, h, T_q * S, d)."""
    q = q / math.sqrt(q.shape[3])
    q_s, k_s, v_s = (by_position(x, S) for x in (q, k, v))
    to_video = q_s @ k_s.mT  # (B, h, S, T_q, T)
    to_actions = by_position(q @ k_a.mT, S)  # (B, h, S, T_q, A)
    weights = torch.cat([to_video, to_actions], dim=4).softmax(dim=4)
    to_video, to_actions = weights.split([k_s.shape[3], k_a.shape[2]], dim=4)
    from_video = rearrange(to_video @ v_s, "b h s t d -> b h (t s) d")
    from_actions = rearrange(to_actions, "b h s t a -> b h (t s) a") @ v_a
    return from_video + from_actions

def action_attention(q_a, k, v, k_a, v_a, S):
    """Actions attend to video and actions. For each position s: attention(q_a, [k_s; k_a], [v_s; v_a]); then
    the mean over positions -> (B, h, A, d). The scores among actions are the same at every position, and in a
    softmax they weigh as much as one key whose score is their logsumexp: that key stands in for them."""
    q_a = q_a / math.sqrt(q_a.shape[3])
    to_actions = (q_a @ k_a.mT).float()  # (B, h, A, A)
    to_video = rearrange(q_a @ k.mT, "b h a (t s) -> b h a t s", s=S)
    one_key = to_actions.logsumexp(dim=3)
    one_key = repeat(one_key, "b h a -> b h a 1 s", s=S)
    weights = torch.cat([to_video, one_key], dim=3).softmax(dim=3) / S  # (B, h, A, T + 1, S)
    to_video, one_key = weights.split([to_video.shape[3], 1], dim=3)
    to_video = rearrange(to_video, "b h a t s -> b h a (t s)")
    to_actions = to_actions.softmax(dim=3) * one_key.sum(dim=4)
    return to_video.type_as(v) @ v + to_actions.type_as(v) @ v_a

class MaskedBlock(nn.Module):
    """All streams share the attentions; the variant decides how many MLPs there are, as Table 1's sizes
    imply. split has one MLP, and attentions for video, for actions, and from v_f to the other streams."""

    def __init__(self, D, n_head, hidden, variant, last=False):
        super().__init__()
        self.split, self.last, self.n_head = variant == "split", last, n_head
        self.sharing = "full" if self.split else variant
        self.norm_s, self.spatial = nn.LayerNorm(D), SelfAttention(D, n_head)
        self.norm_t, self.temporal = nn.LayerNorm(D), SelfAttention(D, n_head)
        if self.split:
            self.action = SelfAttention(D, n_head)
            self.norm_c = nn.LayerNorm(D)
            self.cross_q = nn.Linear(D, D)
            self.cross_kv = nn.Linear(D, 2 * D)
            self.cross_out = nn.Linear(D, D)
        self.norm_m = nn.LayerNorm(D)
        self.mlp = nn.ModuleList(MLP(D, hidden) for _ in set(SHARING[self.sharing]))

    def forward(self, x, layout, rope):
        """x (B, N, D), rope from `masked_rope` -> (B, N, D), in the last layer v_f alone (B, T_f * S, D)."""
        if self.split:
            return self.forward_split(x, layout, rope)
        rope_space, rope_time = rope
        n_vp, n_vf, n_ap, n_af = lengths = layout.lengths
        sizes = [n_vp + n_vf, n_ap + n_af]

        # 1. Spatial attention, of the video only.
        video, actions = x.split(sizes, dim=1)
        video = self.attend_in_space(video, layout.S, rope_space)
        x = torch.cat([video, actions], dim=1)

        # 2. Temporal attention, of all streams jointly. It has no causal mask: in this sequence actions come
        # after the video, so a mask would hide every action from every frame.
        q, k, v = self.temporal.project(self.norm_t(x), rope_time)
        (q, q_a), (k, k_a), (v, v_a) = (y.split(sizes, dim=2) for y in (q, k, v))
        if self.last:
            # The model reads v_f alone after this layer, so v_f alone attends; other streams end here.
            x, q, q_a = x[:, layout.future], q[:, :, layout.future], q_a[:, :, :0]
            lengths = (0, n_vf, 0, 0)
        y = temporal_attention(q, k, v, k_a, v_a, layout.S)
        y_a = action_attention(q_a, k, v, k_a, v_a, layout.S)
        x = x + self.temporal.out(merge(torch.cat([y, y_a], dim=2)))

        # 3. The MLP of each weight set.
        return x + per_set(self.mlp, self.norm_m(x), self.sharing, lengths)

    def attend_in_space(self, video, S, rope_space):
        """Within a latent frame, its S tokens attend to each other. (B, T * S, D) -> the same shape"""
        frames = rearrange(self.norm_s(video), "b (t s) d -> (b t) s d", s=S)
        y = self.spatial(frames, rope_space)
        return video + rearrange(y, "(b t) s d -> b (t s) d", b=len(video))

    def attend_in_time(self, video, S, rope_time):
        """Over time, the tokens at one position attend to each other. (B, T * S, D) -> the same shape"""
        columns = rearrange(self.norm_t(video), "b (t s) d -> (b s) t d", s=S)
        y = self.temporal(columns, rope_time[:, ::S])
        return video + rearrange(y, "(b s) t d -> b (t s) d", s=S)

    # The split variant. Call v_p, a_p and a_f the context. v_f attends to the context, but the context never
    # to v_f. A sampler, which changes only v_f, can therefore update the context once and v_f again and
    # again.

    def forward_split(self, x, layout, rope):
        v_p, v_f, a_p, a_f = x.split(layout.lengths, dim=1)
        context, keys_values = self.update_context((v_p, a_p, a_f), layout, rope)
        v_f = self.update_future(v_f, keys_values, layout, rope)
        v_p, a_p, a_f = context
        return v_f if self.last else torch.cat([v_p, v_f, a_p, a_f], dim=1)

    def update_context(self, context, layout, rope):
        """v_p, a_p, a_f (B, n, D) -> the three after this layer; the keys and values that v_f attends to."""
        v_p, a_p, a_f = context
        n_vp, _, n_ap, n_af = layout.lengths
        rope_space, rope_time = rope
        rope_vp, _, rope_ap, rope_af = rope_time.split(layout.lengths, dim=1)

        # 1. Each stream attends to itself.
        v_p = self.attend_in_space(v_p, layout.S, rope_space)
        v_p = self.attend_in_time(v_p, layout.S, rope_vp)
        a_p = a_p + self.action(self.norm_t(a_p), rope_ap)
        a_f = a_f + self.action(self.norm_t(a_f), rope_af)
        context = torch.cat([v_p, a_p, a_f], dim=1)

        # 2. Keys and values of the cross-attention.
        k, v = heads(self.cross_kv(self.norm_c(context)), 2, self.n_head)
        k = rotate(k, torch.cat([rope_vp, rope_ap, rope_af], dim=1))
        (k, k_a), (v, v_a) = (y.split([n_vp, n_ap + n_af], dim=2) for y in (k, v))

        # 3. The MLP. After the last layer nobody reads the context.
        if not self.last:
            context = context + self.mlp[0](self.norm_m(context))
        return context.split([n_vp, n_ap, n_af], dim=1), (k, v, k_a, v_a)

    def update_future(self, v_f, keys_values, layout, rope):
        """v_f (B, T_f * S, D) -> v_f after this layer: self-attention, cross-attention to the context, MLP"""
        rope_space, rope_time = rope
        rope_vf = rope_time[:, layout.future]
        v_f = self.attend_in_space(v_f, layout.S, rope_space)
        v_f = self.attend_in_time(v_f, layout.S, rope_vf)
        (q,) = heads(self.cross_q(self.norm_c(v_f)), 1, self.n_head)
        y = temporal_attention(rotate(q, rope_vf), *keys_values, layout.S)
        v_f = v_f + self.cross_out(merge(y))
        return v_f + self.mlp[0](self.norm_m(v_f))

# ---- the block of Flow-HWM (Fig. 3) --------------------------------------------------------------

class Modulation(NamedTuple):
    """What the time does to a sub-layer f (Peebles & Xie, 2023): gate * f((1 + scale) * norm(x) + shift)."""
    shift: torch.Tensor  # beta in the paper, (B or 1, 1, D)
    scale: torch.Tensor  # alpha
    gate: torch.Tensor  # gamma

class Modulate(nn.Module):
    """Time embedding c (B or 1, C) -> n Modulations."""

    def __init__(self, C, D, n):
        super().__init__()
        self.linear, self.n = nn.Linear(C, 3 * n * D), n

    def forward(self, c):
        parts = rearrange(self.linear(c), "b (n three d) -> n three b 1 d", n=self.n, three=3)
        return [Modulation(*part) for part in parts]

    def open_gates(self):
        """Gates start at one: at first every block is a plain transformer layer."""
        self.linear.bias.data.view(self.n, 3, -1)[:, 2] = 1

def norm(x):
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

def modulate(x, m):
    return norm(x) * (1 + m.scale) + m.shift

class StreamWeights(nn.Module):
    """One weight set of a FlowBlock."""

    def __init__(self, D, hidden, C):
        super().__init__()
        self.modulation = Modulate(C, D, 2)
        self.qkv, self.out, self.mlp = nn.Linear(D, 3 * D), nn.Linear(D, D), MLP(D, hidden)

    def forward(self, c):
        """Time embedding c -> the three functions of the set at that time. m_0 is alpha_0, beta_0 and gamma_0
        of Fig. 3, m_1 is alpha_1, beta_1 and gamma_1."""
        m_0, m_1 = self.modulation(c)
        project = lambda x: self.qkv(modulate(x, m_0))
        output = lambda y: m_0.gate * self.out(y)
        feed_forward = lambda x: m_1.gate * self.mlp(modulate(x, m_1))
        return project, output, feed_forward

class CrossAttention(nn.Module):
    """v_f attends to v_p, a_p and a_f, each with its own projection to keys and values."""

    def __init__(self, D, n_head, C):
        super().__init__()
        self.modulation, self.n_head = Modulate(C, D, 1), n_head
        self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.kv = nn.ModuleList(nn.Linear(D, 2 * D) for _ in range(3))

    def forward(self, streams, c, ropes):
        """The four streams (B, n, D) and the rotary tables of their tokens -> the update of v_f."""
        v_p, v_f, a_p, a_f = streams
        rope_vp, rope_vf, rope_ap, rope_af = ropes
        (m,) = self.modulation(c)
        keys_values = [kv(norm(stream)) for kv, stream in zip(self.kv, [v_p, a_p, a_f])]
        k, v = heads(torch.cat(keys_values, dim=1), 2, self.n_head)
        (q,) = heads(self.q(modulate(v_f, m)), 1, self.n_head)
        q, k = rotate(q, rope_vf), rotate(k, torch.cat([rope_vp, rope_ap, rope_af], dim=1))
        return m.gate * self.out(merge(attention(q, k, v)))

class FlowBlock(nn.Module):
    """Attention and MLP, with a weight set for each stream, for each modality, or for all. split shares like
    modality; its streams attend to themselves, and a cross-attention from v_f to the others follows."""

    def __init__(self, D, n_head, hidden, C, variant, last=False):
        super().__init__()
        self.n_head, self.last, self.split = n_head, last, variant == "split"
        self.sharing = "modality" if self.split else variant
        self.sets = nn.ModuleList(StreamWeights(D, hidden, C) for _ in set(SHARING[self.sharing]))
        self.cross = CrossAttention(D, n_head, C) if self.split else None

    def forward(self, x, c, layout, rope):
        """x (B, N, D), time embedding c (B or 1, C), rope from `flow_rope`
        -> (B, N, D), or v_f alone (B, T_f * S, D) in the last layer."""
        lengths = remaining = layout.lengths
        if self.last:  # the model reads v_f alone after this layer, so the other streams end in it
            remaining = (0, lengths[1], 0, 0)
        functions = [weights(c) for weights in self.sets]
        project, output, feed_forward = zip(*functions)  # each is a tuple with one function per weight set

        # 1. Each weight set modulates its tokens and projects them to queries, keys and values.
        q, k, v = heads(per_set(project, x, self.sharing, lengths), 3, self.n_head)
        q, k = rotate(q, rope), rotate(k, rope)

        # 2. Attention: joint, or in the split variant within each stream and then from v_f to the others.
        if self.split:
            streams = zip(*[y.split(lengths, dim=2) for y in (q, k, v)])
            y = torch.cat([attention(*stream) for stream in streams], dim=2)
            x = x + per_set(output, merge(y), self.sharing, lengths)
            v_p, v_f, a_p, a_f = streams = x.split(lengths, dim=1)
            v_f = v_f + self.cross(streams, c, rope.split(lengths, dim=1))
            x = v_f if self.last else torch.cat([v_p, v_f, a_p, a_f], dim=1)
        else:
            if self.last:
                x, q = x[:, layout.future], q[:, :, layout.future]
            x = x + per_set(output, merge(attention(q, k, v)), self.sharing, remaining)

        # 3. The MLP of each weight set, modulated again.
        return x + per_set(feed_forward, x, self.sharing, remaining)

# ---- running blocks ------------------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention")  # torch's names of matrix products and attentions

def run_block(block, stored, x, *args):
    """block(x, *args), which normally stores all that its gradient will need. stored="products": it stores
    results of matrix products and attentions, and repeats norms, rotations and GELUs in the backward pass;
    stored="inputs": it stores x alone and repeats everything."""
    if not stored or not torch.is_grad_enabled():
        return block(x, *args)
    if stored == "inputs":
        return checkpoint(block, x, *args, use_reentrant=False)
    products = [getattr(torch.ops.aten, name).default for name in PRODUCTS]
    store_products = functools.partial(create_selective_checkpoint_contexts, products)
    return checkpoint(block, x, *args, use_reentrant=False, context_fn=store_products)

COMPILED = ("forward", "update_context", "update_future")  # the sampler of masked split calls the latter two

def compile_blocks(model):
    """Compiles block by block: they are alike, so the compiler's work is done once. The last one differs, and
    torch 2.13 compiles its gradient wrongly on CPUs (masked: several percent off), so it stays as it is."""
    for block in model.blocks[:-1]:
        for name in COMPILED:
            if hasattr(block, name):
                setattr(block, name, torch.compile(getattr(block, name)))

def plain_blocks(model):
    """Undoes `compile_blocks`."""
    for block in model.blocks:
        for name in COMPILED:
            vars(block).pop(name, None)  # its class has the plain one

def distribute(model, shard, device):
    """The model as it is trained: whole on every process (DDP), or if `shard` in pieces (FSDP2)."""
    if shard:
        from torch.distributed.fsdp import fully_shard
        for block in model.blocks:  # block by block: the whole need not fit on one device
            fully_shard(block)
        return fully_shard(model)
    model.to(device)
    if rank_and_world()[1] == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Buffers, equal everywhere, are not sent anew with every step. Torch 2.13 has renamed that argument.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **{sync: False})

def count_flops(f):
    """Operations of the matrix products and attentions of f(), run as it is written and without gradients."""
    left_out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # by torch's counter
    more = {left_out: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with torch.compiler.set_stance("force_eager"), counter, torch.no_grad():
        f()
    return counter.get_total_flops()

# ---- what both models and their configurations need ----------------------------------------------

def knob(default, help, **more):
    """A field of a configuration: its default, and the help text and choices of its flag in train.py."""
    return field(default=default, metadata={"help": help, **more})

def check_knobs(config):
    """Raises a DataError for a field that is none of its choices, or for an integer below 1."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in (f.default, *choices):
            raise DataError(f"{f.name} cannot be {value!r}: give {' or '.join(choices)}")
        if f.type is int and value < 1:
            raise DataError(f"{f.name} cannot be {value}: give at least 1")

class Standardise(nn.Module):
    """(x - mean) / std along one dimension of x, by statistics of the training split, which travel with the
    weights. trailing: how many dimensions follow: 0 in actions (B, F, A), 3 in latents (B, C, T, H, W)."""

    def __init__(self, size, trailing=0):
        super().__init__()
        self.shape = [size] + [1] * trailing
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, x):
        return (x - self.mean.view(self.shape)) / self.std.view(self.shape)

    def inverse(self, x):
        return x * self.std.view(self.shape) + self.mean.view(self.shape)

# ---- not in the paper: what helps small models ---------------------------------------------------

class AtPlace(nn.Module):
    """Gives each future token what attention would have to find first: the neighbourhood of its position in
    the last past latent, and the actions of the frames that its latent stands for. They meet in two ways:

    - The actions scale the features of the neighbourhood.
    - A filter moves the picture. Every position has a kernel of its own over its 7 x 7 neighbours, made of
      the products of what the robot does and what stands there. So a turn can shift the whole picture aside,
      and a drive can widen it from the middle, which no kernel that is the same everywhere can do."""

    def __init__(self, action_dim, D, temporal, reach=2, look=3, ranks=(32, 12)):
        super().__init__()
        self.norm, self.temporal = nn.LayerNorm(D), temporal
        self.size = size = 2 * look + 1  # rows and columns that a position's kernel covers
        self.n_head = n_head = math.gcd(8, D)
        self.around = nn.Conv2d(D, D, 2 * reach + 1, padding=reach)
        self.actions, self.out = nn.Linear(temporal * action_dim, 2 * D), nn.Linear(D, D)
        # The filter: a few numbers of the actions and of the position, their products, and a kernel of these.
        done, here = ranks
        self.done, self.here = nn.Linear(temporal * action_dim, done), nn.Linear(D, here)
        self.kernel = nn.Linear((done + 1) * (here + 1), n_head * size**2)
        self.value, self.moved = nn.Linear(D, D), nn.Linear(D, D)
        # A kernel starts as a soft spot around the position itself.
        offset = torch.arange(size) - look
        distance = offset[:, None] ** 2 + offset**2
        self.kernel.bias.data = (-distance / 2).flatten().repeat(n_head)

    def forward(self, p, a_f, layout):
        """Tokens p (B, S, D) of the last past latent, standardised future actions a_f (B, F_f, A)
        -> (B, T_f * S, D), to be added to v_f"""
        p = self.norm(p)
        actions = rearrange(a_f, "b (t f) a -> b t 1 (f a)", f=self.temporal)
        shift, scale = self.actions(actions).chunk(2, dim=3)
        image = rearrange(p, "b (h w) d -> b d h w", h=layout.H)
        around = rearrange(self.around(image), "b d h w -> b 1 (h w) d")
        moved = self.filter(p, actions, layout)
        return (self.out(F.gelu(around * (1 + scale))) + shift + moved).flatten(1, 2)

    def filter(self, p, actions, layout):
        """Tokens p (B, S, D) and actions (B, T_f, 1, E) -> each position's mean of its neighbours' values,
        weighted by its kernel, (B, T_f, S, D)"""
        done = F.pad(self.done(actions), (0, 1), value=1)  # the 1 keeps each factor alone among the products
        here = F.pad(self.here(p), (0, 1), value=1)
        products = torch.einsum("b t o i, b s j -> b t s i j", done, here).flatten(3)
        kernel = self.kernel(products).unflatten(3, (self.n_head, -1)).softmax(dim=4)
        values = rearrange(self.value(p), "b (h w) d -> b d h w", h=layout.H)
        near = F.unfold(values, self.size, padding=self.size // 2)  # (B, D * 49, S), zeros beyond the edge
        near = rearrange(near, "b (h d n) s -> b 1 s h n d", h=self.n_head, n=kernel.shape[4])
        means = kernel[..., None, :] @ near  # (B, T_f, S, h, 1, D / h)
        return self.moved(means.flatten(3))

# ---- a walk --------------------------------------------------------------------------------------

def show(what, x):
    """One line of a walk: what a tensor is, and its shape."""
    print(f"{what:58s} {tuple(x.shape) if torch.is_tensor(x) else x}")

def main():
    layout, x = Layout(T_p=2, T_f=1, H=8, W=8, temporal=8), torch.randn(1, 209, 48)
    show("tokens of v_p, v_f, a_p, a_f", layout.lengths)
    show("all tokens of a sample, one tensor", x)
    show("their times, rows and columns", layout.positions())
    for variant in VARIANTS:
        print(f"\n{variant}: layers 1 to 6 of 24 are {', '.join(layer_variants(variant, 24)[:6])}")
        with torch.device("meta"):  # shapes without numbers
            masked, flow = MaskedBlock(512, 8, 2048, variant), FlowBlock(1172, 4, 4688, 256, variant)
        show("parameters of a layer of the paper's Masked-HWM", count_parameters(masked))
        show("parameters of a layer of the paper's Flow-HWM", count_parameters(flow))
        last, rope = MaskedBlock(48, 2, 96, variant, last=True), masked_rope(layout, 24, x.device)
        show("v_f after a last MaskedBlock", last(x, layout, rope))

if __name__ == "__main__":
    main()
