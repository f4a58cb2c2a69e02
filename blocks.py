"""The transformer block of Sec. 2.4, for both models and in all four variants.

All tokens of a sample are one tensor (B, N, D), in the order of the four streams

    v_p  past video      T_p * S tokens     S = H * W places of a latent frame
    v_f  future video    T_f * S tokens
    a_p  past actions    F_p tokens         one per frame
    a_f  future actions  F_f tokens

so that a set of weights always serves one contiguous slice, and *sharing is a table* (SHARING): `base` has a set for
each stream, `modality` one for video and one for actions, `full` one for all. `split` replaces joint attention by
self-attention inside each stream, followed by cross-attention from v_f to the other three.

    MaskedBlock (Fig. 2)   x = x + spatial attention (video) + temporal attention (all streams) + MLP     (B, N, D)
    FlowBlock   (Fig. 3)   x = x + gate_0 * attention (all streams) + gate_1 * MLP, modulated by time     (B, N, D)

In the last layer (`last=True`) only v_f is read, so a block then computes, and returns, v_f alone: (B, T_f * S, D).
Run me: `python blocks.py` prints the four variants and the parameters of a layer.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

VARIANTS = ("split", "base", "modality", "full")
SHARING = {  # which weight set serves v_p, v_f, a_p, a_f
    "base": (0, 1, 2, 3),
    "modality": (0, 0, 1, 1),
    "full": (0, 0, 0, 0),
}


def layer_variants(variant, n_layer):
    """The variant of each layer: modality and full keep the first four layers as base (Sec. 2.4); a model of fewer than
    17 layers, the smallest of the paper, keeps n_layer * 4 / 17 rounded, at least one. base and split are uniform."""
    n_base = min(4, max(1, round(n_layer * 4 / 17))) if variant in ("modality", "full") else 0
    return ["base"] * n_base + [variant] * (n_layer - n_base)


class Layout(NamedTuple):
    """The sizes of a sample's four streams. T latent frames hold 1 + temporal * (T - 1) frames, one action each."""
    T_p: int  # latent frames of the past
    T_f: int  # and of the future
    H: int  # tokens across a latent frame
    W: int
    temporal: int  # frames per latent

    @property
    def S(self):
        return self.H * self.W

    @property
    def T(self):
        return self.T_p + self.T_f

    @property
    def lengths(self):
        """Tokens of v_p, v_f, a_p, a_f."""
        return (self.T_p * self.S, self.T_f * self.S, 1 + self.temporal * (self.T_p - 1), self.temporal * self.T_f)

    @property
    def future(self):
        """Where v_f stands among the tokens."""
        return slice(self.T_p * self.S, self.T * self.S)

    def positions(self):
        """(N, 3) time in frames, row, column of every token. Latent i covers the frames up to temporal * i, action j is
        that of frame j: one clock for both. Actions have no place; they stand at row 0, column 0."""
        t, h, w = (torch.arange(n, dtype=torch.float32) for n in (self.T, self.H, self.W))
        video = torch.cartesian_prod(t * self.temporal, h, w)  # (T*S, 3)
        actions = F.pad(torch.arange(sum(self.lengths[2:]), dtype=torch.float32)[:, None], (0, 2))
        return torch.cat([video, actions])


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding (Su et al., 2023), for any number of axes


def rope_table(positions, dims, theta=10000.0):
    """positions (N, axes), dims: how many (even) dimensions each axis rotates -> cos, sin (N, sum(dims) / 2)."""
    angles = [positions[:, i, None] * theta ** (-torch.arange(0, d, 2) / d) for i, d in enumerate(dims)]
    angles = torch.cat(angles, dim=1)
    return angles.cos(), angles.sin()


def rotate(x, table):
    """x (..., N, d) turned by the angles of its tokens: dimension i pairs with i + R / 2, those from R on stay."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def axis_dims(d):
    """How a head of width d shares its dimensions among time, row and column: 293 -> 100, 96, 96 (one stays)."""
    space = d // 3 // 2 * 2
    return ((d - 2 * space) // 2 * 2, space, space)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def heads(x, n_head):
    return rearrange(x, "b n (h d) -> b h n d", h=n_head)


def merge(x):
    """Inverse of `heads`."""
    return rearrange(x, "b h n d -> b n (h d)")


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, for (B, h, N, d). Heads are filled up with zeros to a multiple of 8, which changes
    nothing but that a GPU's fast kernels take them: the paper's Flow-HWM has heads of 293."""
    d, spare = q.shape[-1], -q.shape[-1] % 8
    if not spare:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (F.pad(x, (0, spare)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


def split_at(x, n, dim):
    """x -> its first n, and the rest, along a dimension. (torch pads the gradients of slices with zeros and adds them up;
    those of a split it only puts together.)"""
    return x.split([n, x.shape[dim] - n], dim)


def cut(x, variant, lengths):
    """(B, N, D) -> the slice of tokens that each weight set of a variant serves."""
    sets = SHARING[variant]
    return x.split([sum(n for n, s in zip(lengths, sets) if s == i) for i in range(max(sets) + 1)], dim=1)


class AtPlace(nn.Module):
    """For small models: tells every future token what stood around its place in the last past latent, and what the robot
    does in the frames that its own latent covers. The actions open and close the features of what stood around, so that
    one layer can move a picture aside as a turning camera does. Attention could learn all this from the past and action
    tokens; it takes longer than a laptop's patience."""

    def __init__(self, action_dim, D, temporal, reach=2):
        super().__init__()
        self.norm, self.temporal = nn.LayerNorm(D), temporal
        self.around = nn.Conv2d(D, D, 2 * reach + 1, padding=reach)
        self.actions, self.out = nn.Linear(temporal * action_dim, 2 * D), nn.Linear(D, D)

    def forward(self, p, a_f, layout):
        """p (B, S, D) tokens of the last past latent, a_f (B, F_f, A) standardised future actions
        -> (B, T_f * S, D), to be added to v_f"""
        around = self.around(rearrange(self.norm(p), "b (h w) d -> b d h w", h=layout.H))
        around = rearrange(around, "b d h w -> b 1 (h w) d")
        add, gate = self.actions(rearrange(a_f, "b (t f) a -> b t 1 (f a)", f=self.temporal)).chunk(2, dim=-1)
        return (self.out(F.gelu(around * (1 + gate))) + add).flatten(1, 2)


class MLP(nn.Sequential):
    def __init__(self, D, hidden):
        super().__init__(nn.Linear(D, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, D))


PRODUCTS = [getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")]


def run_block(block, keep, x, *args):
    """block(x, *args). Between the forward and the backward pass a block holds all that its gradient needs; with `keep`
    it holds less and computes the rest again: "products" holds what was expensive, matrix products and attentions, and
    does norms, rotations and GELUs twice; "inputs" holds x alone and does everything twice."""
    if not keep or not torch.is_grad_enabled():
        return block(x, *args)
    contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(PRODUCTS)} if keep == "products" else {}
    return checkpoint(block, x, *args, use_reentrant=False, **contexts)


# ---------------------------------------------------------------------------------------------------------------------
# Masked-HWM (Fig. 2)


class Rope(NamedTuple):
    """Rotary tables of Masked-HWM: of the places of a frame (S, d/2), and in time of all tokens (N, d/2)."""
    space: tuple
    time: tuple


def masked_rope(layout, d):
    position = layout.positions()
    return Rope(rope_table(position[: layout.S, 1:], (d // 2, d // 2)), rope_table(position[:, :1], (d,)))


def at_places(x, S):
    """(B, h, T*S, d) -> (B, h, S, T, d)"""
    return rearrange(x, "b h (t s) d -> b h s t d", s=S)


def temporal_attention(q, k, v, S, k_a, v_a):
    """Video asks. q (B, h, T_q*S, d), k, v (B, h, T*S, d): every token attends to the T tokens at its own place and to
    the A action tokens k_a, v_a (B, h, A, d), jointly. Actions are the same at every place, so they are projected and
    multiplied once instead of being copied to S places."""
    T = k.shape[2] // S
    own = at_places(q, S) @ at_places(k, S).transpose(-1, -2)  # (B, h, S, T_q, T)
    acts = at_places(q @ k_a.transpose(-1, -2), S)  # (B, h, S, T_q, A)
    own, acts = split_at((torch.cat([own, acts], -1) * q.shape[-1] ** -0.5).softmax(-1), T, -1)
    y = rearrange(own @ at_places(v, S), "b h s t d -> b h (t s) d")
    return y + rearrange(acts, "b h s t a -> b h (t s) a") @ v_a


def action_attention(q_a, k, v, S, k_a, v_a):
    """Actions ask. q_a (B, h, A, d): what an action would find at each place, averaged over the S places."""
    T = k.shape[2] // S
    video = rearrange(q_a @ k.transpose(-1, -2), "b h a (t s) -> b h s a t", s=S)
    acts = (q_a @ k_a.transpose(-1, -2))[:, :, None].expand(-1, -1, S, -1, -1)  # (B, h, S, A, A)
    video, acts = split_at((torch.cat([video, acts], -1) * q_a.shape[-1] ** -0.5).softmax(-1), T, -1)
    return rearrange(video, "b h s a t -> b h a (t s)") @ v / S + acts.mean(2) @ v_a


class SelfAttention(nn.Module):
    """The projections of one self-attention; what attends to what is the caller's."""

    def __init__(self, D, n_head):
        super().__init__()
        self.qkv, self.out, self.n_head = nn.Linear(D, 3 * D), nn.Linear(D, D), n_head

    def project(self, x, rope=None):
        """(B, N, D) -> q, k, v (B, h, N, d), q and k rotated."""
        q, k, v = (heads(y, self.n_head) for y in self.qkv(x).chunk(3, dim=-1))
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


class MaskedBlock(nn.Module):
    """Spatial attention of the video tokens of each latent frame, temporal attention of all streams at each place, MLP.
    The attentions are shared by all streams; the variant decides how many MLPs there are (that is what makes the
    sizes of Table 1 come out). The split variant has one MLP, and its own attentions for video, actions and crossing."""

    def __init__(self, D, n_head, hidden, variant, last=False):
        super().__init__()
        self.variant, self.last, self.n_head = variant, last, n_head
        self.norm_s, self.spatial = nn.LayerNorm(D), SelfAttention(D, n_head)
        self.norm_t, self.temporal = nn.LayerNorm(D), SelfAttention(D, n_head)
        if variant == "split":
            self.action = SelfAttention(D, n_head)
            self.norm_c = nn.LayerNorm(D)
            self.cross_q, self.cross_kv, self.cross_out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp_variant = "full" if variant == "split" else variant
        self.norm_m = nn.LayerNorm(D)
        self.mlp = nn.ModuleList(MLP(D, hidden) for _ in range(max(SHARING[self.mlp_variant]) + 1))
        if last:  # weights that exist in the paper's count, but whose output nobody reads
            for i, mlp in enumerate(self.mlp):
                mlp.requires_grad_(i == SHARING[self.mlp_variant][1])

    def forward(self, x, layout, rope):
        """x (B, N, D) -> (B, N, D), or only its v_f (B, T_f * S, D) in the last layer."""
        if self.variant == "split":
            v_p, v_f, a_p, a_f = x.split(layout.lengths, dim=1)
            rest, seen = self.context(torch.cat([v_p, a_p, a_f], dim=1), layout, rope)
            v_f = self.future(v_f, seen, layout, rope)
            v_p, actions = split_at(rest, layout.future.start, dim=1)
            return v_f if self.last else torch.cat([v_p, v_f, actions], dim=1)
        video, actions = split_at(x, layout.T * layout.S, dim=1)
        x = self.joint(torch.cat([self.space(video, layout.S, rope.space), actions], dim=1), layout, rope.time)
        if self.last:
            mlp = self.mlp[SHARING[self.mlp_variant][1]]
            return x + mlp(self.norm_m(x))
        parts = cut(self.norm_m(x), self.mlp_variant, layout.lengths)
        return x + torch.cat([mlp(part) for mlp, part in zip(self.mlp, parts)], dim=1)

    def space(self, video, S, rope):
        """Spatial attention: each latent frame by itself."""
        q, k, v = self.spatial.project(rearrange(self.norm_s(video), "b (t s) d -> (b t) s d", s=S), rope)
        y = merge(attention(q, k, v))
        return video + self.spatial.out(rearrange(y, "(b t) s d -> b (t s) d", b=len(video)))

    def joint(self, x, layout, rope):
        """Temporal attention of all four streams (bidirectional: with a causal mask video would never see actions)."""
        n = layout.T * layout.S
        q, k, v = self.temporal.project(self.norm_t(x), rope)
        (q, q_a), (k, k_a), (v, v_a) = (split_at(y, n, dim=2) for y in (q, k, v))
        if self.last:
            return x[:, layout.future] + self.temporal.out(merge(
                temporal_attention(q[:, :, layout.future], k, v, layout.S, k_a, v_a)))
        y = torch.cat([temporal_attention(q, k, v, layout.S, k_a, v_a),
                       action_attention(q_a, k, v, layout.S, k_a, v_a)], dim=2)
        return x + self.temporal.out(merge(y))

    # split: each stream by itself, then v_f asks the other three. Only v_f ever learns of v_f, so that a sampler needs
    # the rest once, however often it asks again.

    def alone(self, stream, weights, rope, S=None):
        """A stream attends to itself; video (S given) at each place, over time."""
        q, k, v = weights.project(self.norm_t(stream), rope)
        if S is None:
            return stream + weights.out(merge(attention(q, k, v)))
        y = attention(*(at_places(y, S).flatten(1, 2) for y in (q, k, v)))
        return stream + weights.out(merge(rearrange(y, "b (h s) t d -> b h (t s) d", s=S)))

    def context(self, rest, layout, rope):
        """rest (B, N - T_f * S, D): v_p, a_p, a_f -> the same after this layer, and the keys and values that v_f will see."""
        lengths, S = layout.lengths, layout.S
        t_p, _, t_ap, t_af = zip(*(t.split(lengths) for t in rope.time))  # each stream's own piece of the one clock
        v_p, a_p, a_f = rest.split((lengths[0], *lengths[2:]), dim=1)
        v_p = self.alone(self.space(v_p, S, rope.space), self.temporal, t_p, S)
        a_p, a_f = self.alone(a_p, self.action, t_ap), self.alone(a_f, self.action, t_af)
        rest = torch.cat([v_p, a_p, a_f], dim=1)
        k, v = (heads(y, self.n_head) for y in self.cross_kv(self.norm_c(rest)).chunk(2, dim=-1))
        k = rotate(k, [torch.cat(t) for t in zip(t_p, t_ap, t_af)])
        (k, k_a), (v, v_a) = (split_at(y, lengths[0], dim=2) for y in (k, v))
        return rest if self.last else rest + self.mlp[0](self.norm_m(rest)), (k, v, S, k_a, v_a)

    def future(self, v_f, seen, layout, rope):
        """v_f (B, T_f * S, D) by itself, then asking what `context` gave it to see -> v_f after this layer."""
        t_f = [t[layout.future] for t in rope.time]
        v_f = self.alone(self.space(v_f, layout.S, rope.space), self.temporal, t_f, layout.S)
        q = rotate(heads(self.cross_q(self.norm_c(v_f)), self.n_head), t_f)
        v_f = v_f + self.cross_out(merge(temporal_attention(q, *seen)))
        return v_f + self.mlp[0](self.norm_m(v_f))


# ---------------------------------------------------------------------------------------------------------------------
# Flow-HWM (Fig. 3)


class Modulation(NamedTuple):
    """What the time does to a sub-layer (Peebles & Xie, 2023): y = gate * f(norm(x) * (1 + scale) + shift)."""
    shift: torch.Tensor  # beta in the paper, (B or 1, 1, D)
    scale: torch.Tensor  # alpha
    gate: torch.Tensor  # gamma


class Modulate(nn.Module):
    """Time embedding c (B, C) -> n Modulations. Gates start at one: an open, plain transformer layer."""

    def __init__(self, C, D, n):
        super().__init__()
        self.linear = nn.Linear(C, 3 * n * D)
        self.n = n

    def forward(self, c):
        parts = self.linear(c)[:, None].chunk(3 * self.n, dim=-1)
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.n)]

    def open_gates(self):
        for gate in self.linear.bias.data.chunk(3 * self.n)[2::3]:
            gate.fill_(1.0)


def modulate(x, m):
    """Layer norm without learned scale, then the time's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + m.scale) + m.shift


class StreamWeights(nn.Module):
    """All that one weight set owns in a FlowBlock."""

    def __init__(self, D, hidden, C):
        super().__init__()
        self.modulation = Modulate(C, D, 2)  # alpha_0, beta_0, gamma_0 and alpha_1, beta_1, gamma_1
        self.qkv, self.out, self.mlp = nn.Linear(D, 3 * D), nn.Linear(D, D), MLP(D, hidden)


class CrossAttention(nn.Module):
    """v_f asks v_p, a_p and a_f, each through a pair of keys and values of its own."""

    def __init__(self, D, n_head, C):
        super().__init__()
        self.modulation, self.n_head = Modulate(C, D, 1), n_head
        self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.kv = nn.ModuleList(nn.Linear(D, 2 * D) for _ in range(3))

    def forward(self, v_f, context, c, rope_f, rope_context):
        """v_f (B, N_f, D), context: v_p, a_p, a_f -> v_f. Every token keeps the position it has everywhere else."""
        (m,) = self.modulation(c)
        context = [F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in context]
        k, v = torch.cat([kv(x) for kv, x in zip(self.kv, context)], dim=1).chunk(2, dim=-1)
        q, k, v = (heads(y, self.n_head) for y in (self.q(modulate(v_f, m)), k, v))
        y = attention(rotate(q, rope_f), rotate(k, rope_context), v)
        return v_f + m.gate * self.out(merge(y))


class FlowBlock(nn.Module):
    """Modulated attention and MLP with a weight set per stream, per modality, or for all. split is modality with the
    attention confined to each stream, and cross-attention between the two sub-layers."""

    def __init__(self, D, n_head, hidden, C, variant, last=False):
        super().__init__()
        self.n_head, self.last, self.split = n_head, last, variant == "split"
        self.sharing = "modality" if self.split else variant
        self.sets = nn.ModuleList(StreamWeights(D, hidden, C) for _ in range(max(SHARING[self.sharing]) + 1))
        self.future_set = SHARING[self.sharing][1]
        self.cross = CrossAttention(D, n_head, C) if self.split else None
        if last and not self.split:  # weights that exist in the paper's count, but whose output nobody reads
            for i, w in enumerate(self.sets):
                w.out.requires_grad_(i == self.future_set)
                w.mlp.requires_grad_(i == self.future_set)
        elif last:
            self.sets[1].mlp.requires_grad_(False)

    def attend(self, q, k, v, layout):
        """(B, h, N, d) -> (B, N, D): all tokens together, or in the split variant each stream by itself."""
        if not self.split:
            return merge(attention(q, k, v))
        streams = zip(*(y.split(layout.lengths, dim=2) for y in (q, k, v)))
        return torch.cat([merge(attention(*s)) for s in streams], dim=1)

    def forward(self, x, c, layout, rope):
        """x (B, N, D), time embedding c (B or 1, C) -> (B, N, D), or only its v_f (B, T_f * S, D) in the last layer."""
        sets, future = list(self.sets), layout.future
        mods = [w.modulation(c) for w in sets]  # (m_0, m_1) of each set
        parts = cut(x, self.sharing, layout.lengths)
        qkv = torch.cat([w.qkv(modulate(part, m_0)) for w, part, (m_0, _) in zip(sets, parts, mods)], dim=1)
        q, k, v = (heads(y, self.n_head) for y in qkv.chunk(3, dim=-1))
        q, k = rotate(q, rope), rotate(k, rope)

        if self.last and not self.split:  # only v_f asks
            y, x = merge(attention(q[:, :, future], k, v)), x[:, future]
            sets, mods, parts, outs = [sets[self.future_set]], [mods[self.future_set]], [x], [y]
        else:
            outs = cut(self.attend(q, k, v, layout), self.sharing, layout.lengths)
        parts = [part + m_0.gate * w.out(y) for w, part, y, (m_0, _) in zip(sets, parts, outs, mods)]

        if self.split:
            v_p, v_f, a_p, a_f = torch.cat(parts, dim=1).split(layout.lengths, dim=1)
            rope_f, rope_context = zip(*((t[future], torch.cat([t[: future.start], t[future.stop :]])) for t in rope))
            v_f = self.cross(v_f, (v_p, a_p, a_f), c, rope_f, rope_context)
            if self.last:
                sets, mods, parts = [sets[self.future_set]], [mods[self.future_set]], [v_f]
            else:
                parts = [torch.cat([v_p, v_f], dim=1), torch.cat([a_p, a_f], dim=1)]
        parts = [part + m_1.gate * w.mlp(modulate(part, m_1)) for w, part, (_, m_1) in zip(sets, parts, mods)]
        return torch.cat(parts, dim=1)


def compile_blocks(model):
    """Block by block: they are alike, so that a compiler's work is done once for all. Not the last, which is unlike them and
    whose gradient torch 2.13 compiles wrongly for CPUs (masked: several percent off; tests/test_models.py looks at it)."""
    for block in model.blocks[:-1]:
        block.compile()
        for part in ("context", "future"):  # what the sampler of masked split asks for instead of the whole
            if hasattr(block, part):
                setattr(block, part, torch.compile(getattr(block, part)))


def main():
    count = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:6.2f} M"
    for variant in VARIANTS:
        layers = layer_variants(variant, 24)
        print(f"{variant:9s} {layers.count('base')} of 24 layers are base; parameters of a layer at the paper's width: masked "
              f"{count(MaskedBlock(512, 8, 2048, variant))}, flow {count(FlowBlock(1172, 4, 4688, 256, variant))}")


if __name__ == "__main__":
    main()
