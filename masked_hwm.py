"""Masked-HWM (Sec. 2.2): a transformer that fills in hidden video tokens, and dreams by filling in all.

A discrete tokenizer turns a clip into ids, one for each position of each latent frame. Training replaces some
ids by random ones, hides a part of the future ids, and asks for the hidden ones. To dream, begin with a
future that is all hidden, and fill in one latent frame after the other, each in K steps: draw all its hidden
ids at once, keep some of them, and hide the others again.

    L            ids (B, T, H, W), of T = T_p + T_f latent frames     rho    rate of random ids
    M            mask (B, T_f, H, W), True where an id is hidden      K      steps of the sampler per frame
    r, gamma(r)  how much of a frame is hidden

`python masked_hwm.py` follows two toy clips through corruption, network, loss and sampler.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import default_collate

from blocks import (VARIANTS, AtPlace, Layout, MaskedBlock, Standardise, check_knobs, initialize, knob,
                    layer_variants, masked_rope, run_block, show)
from tokenizer import FSQ, DataError

KIND = "discrete"  # the latents that this model dreams

@dataclass
class MaskedConfig:
    """Sizes and options; the defaults are the paper's (Sec. 3.1, Table 1)."""
    variant: str = knob("base", "how the four streams share weights", choices=VARIANTS)
    n_layer: int = knob(24, "transformer blocks")
    n_head: int = knob(8, "attention heads of a block")
    width: int = knob(512, "numbers in a token, D")
    hidden: int = knob(2048, "hidden units of an MLP")
    vocab_size: int = knob(64_000, "ids of the tokenizer")
    T_p: int = knob(2, "latent frames of the past")
    T_f: int = knob(1, "latent frames of the future")
    H: int = knob(32, "rows of a latent frame")
    W: int = knob(32, "columns of a latent frame")
    temporal: int = knob(8, "video frames in a latent frame")
    action_dim: int = knob(25, "numbers in an action, A")
    rho_max: float = knob(0.2, "highest rate at which training replaces ids by random ones")
    at_place: bool = knob(False, "blocks.AtPlace for future tokens")
    share_digits: bool = knob(False, "ids share vectors of their digits (DigitTable)")
    levels: tuple = knob((), "levels of the tokenizer's FSQ, for share_digits")
    checkpoint_activations: str = knob("", "what a block stores for its backward pass (blocks.run_block)",
                                       choices=("products", "inputs"))

    def __post_init__(self):
        check_knobs(self)
        if self.width % (4 * self.n_head):
            raise DataError(f"{self.n_head} heads cannot share a width of {self.width} in multiples of 4: "
                            "change one of them")
        if not 0 <= self.rho_max <= 1:
            raise DataError(f"rho_max cannot be {self.rho_max}: give a rate from 0 to 1")
        if self.share_digits and math.prod(self.levels) != self.vocab_size:
            raise DataError(f"levels {self.levels} do not make {self.vocab_size} ids: leave share_digits out")

PRESETS = {
    "paper": dict(),
    "tiny": dict(n_layer=5, n_head=4, width=128, hidden=512, vocab_size=4375, H=8, W=8, at_place=True,
                 share_digits=True, levels=(7, 5, 5, 5, 5)),
}
TRAINING = {  # paper: Sec. 3.1; micro: the clips that a GPU takes at once
    "paper": dict(steps=60_000, batch=16, lr=3e-5, warmup=100, decay="linear", micro=4),
    "tiny": dict(steps=2400, batch=8, lr=2e-3, warmup=50, decay="cosine"),
}
SAMPLING = {  # paper: Sec. 3.1; tiny: the best of those measured (tests/RESULTS.md)
    "paper": dict(K=2, temperature=1.0),
    "tiny": dict(K=2, temperature=0.5, mean=True),
}

# ---- hiding tokens, choosing tokens --------------------------------------------------------------

def gamma(r):
    """Share of a frame that is hidden, for r in [0, 1]: all at 0, nothing at 1 (MaskGIT's cosine
    schedule)."""
    return torch.cos(math.pi / 2 * r)

def n_fixed(k, K, n):
    """How many of a frame's n tokens are fixed after step k of K: a share 1 - gamma(k / K), all after the
    last."""
    return round(n * (1 - math.cos(math.pi * k / (2 * K))))

def ranks(score):
    """score (B, n) -> the rank of each entry in its row, 0 for the smallest."""
    return score.argsort(dim=1, stable=True).argsort(dim=1)

def probabilities(logits, temperature):
    """Softmax of logits / temperature, (n, vocab)."""
    return (logits.float() / temperature).softmax(dim=1)

def draw_ids(p, generator=None):
    """One id for each row of p (n, vocab): the first whose cumulative probability exceeds a random number."""
    u = torch.rand(len(p), 1, generator=generator).to(p.device, p.dtype)
    cumulative = p.cumsum(dim=1)
    ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return ids.clamp(max=p.shape[1] - 1)[:, 0]

def mean_ids(p, levels):
    """The id nearest to the mean code, for each row of p (n, vocab). No id may be likely where many look
    alike: then their mean is a better guess than the likeliest of them."""
    fsq = FSQ(levels)
    ids = torch.arange(p.shape[1], device=p.device)
    codes = fsq.ids_to_codes(ids.view(1, -1, 1, 1)).view(len(levels), -1)  # (C, vocab)
    return fsq.codes_to_ids((p @ codes.T).view(len(p), -1, 1, 1, 1)).flatten()

def choose_ids(logits, temperature, generator=None, levels=()):
    """One id for each row of logits (n, vocab): a drawn one, the likeliest at temperature 0, or, where the
    levels of its digits are given, the one nearest to the mean. Some rows at a time, so that the tables of
    probabilities fit a processor's cache, and a GPU's memory."""
    if temperature == 0:
        return logits.argmax(dim=1)
    chosen = []
    for rows in logits.split(1024 if logits.is_cuda else 64):
        p = probabilities(rows, temperature)
        chosen.append(mean_ids(p, levels) if levels else draw_ids(p, generator))
    return torch.cat(chosen)

class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(F.linear(h, weight, bias), targets, reduction="sum"), for some rows of h at a time: the
    logits of all rows, for 64,000 classes, would be the largest tensor of the model. The gradients of a chunk
    are taken right after its loss, so that its logits can go and nothing is computed twice."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets, chunk=512):
        needed = ctx.needs_input_grad[0]
        inputs = h, weight, bias = [x.detach().requires_grad_(needed) for x in (h, weight, bias)]
        total = torch.zeros((), device=h.device)
        with torch.set_grad_enabled(needed):
            for rows, ids in zip(h.split(chunk), targets.split(chunk)):
                loss = F.cross_entropy(F.linear(rows, weight, bias), ids, reduction="sum")
                if needed:
                    loss.backward()
                total += loss.detach()
        if needed:
            ctx.save_for_backward(*[x.grad for x in inputs])
        return total

    @staticmethod
    def backward(ctx, grad):
        return *[grad * g for g in ctx.saved_tensors], None, None

# ---- not in the paper: what helps small models ---------------------------------------------------

class DigitTable(nn.Module):
    """An id of FSQ is a number with one digit for each channel of the code, and ids that agree in a digit
    look alike. Here every value of every digit has a vector, and an id gets the sum of the vectors of its
    digits: 27 rows say at once what a table with a row for each of 4,375 ids has to learn from many clips."""

    def __init__(self, levels, D):
        super().__init__()
        ids, basis, one_hots = torch.arange(math.prod(levels)), 1, []
        for n in levels:  # the first digit counts fastest
            one_hots.append(F.one_hot(ids // basis % n, n).float())
            basis *= n
        self.register_buffer("digits", torch.cat(one_hots, dim=1), persistent=False)  # (vocab, sum(levels))
        self.weight = nn.Parameter(torch.empty(sum(levels), D))

    def forward(self):
        """-> (vocab, D)"""
        return self.digits @ self.weight

# ---- the model -----------------------------------------------------------------------------------

class MaskedHWM(nn.Module):
    network = "logits"  # the method with the products, for speed.in_bfloat16

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        D = c.width
        self.layout = Layout(c.T_p, c.T_f, c.H, c.W, c.temporal)
        self.standardise_actions = Standardise(c.action_dim)

        self.embed = nn.Embedding(c.vocab_size, D)
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.position = nn.Parameter(torch.empty(self.layout.T, self.layout.S, D))
        self.embed_action = nn.Sequential(nn.Linear(c.action_dim, D), nn.Linear(D, c.hidden),
                                          nn.GELU(approximate="tanh"), nn.Linear(c.hidden, D))
        self.at_place = AtPlace(c.action_dim, D, c.temporal) if c.at_place else None

        self.blocks = nn.ModuleList()
        for i, variant in enumerate(layer_variants(c.variant, c.n_layer), start=1):
            self.blocks.append(MaskedBlock(D, c.n_head, c.hidden, variant, last=i == c.n_layer))
        self.norm_out, self.out = nn.LayerNorm(D), nn.Linear(D, c.vocab_size)
        self.digits_in = DigitTable(c.levels, D) if c.share_digits else None
        self.digits_out = DigitTable(c.levels, D) if c.share_digits else None
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for the mask token and the output projection (Sec. 3.1)."""
        initialize(self)
        nn.init.xavier_normal_(self.mask_token)
        nn.init.xavier_normal_(self.out.weight)

    def set_statistics(self, action_mean, action_std, latent_mean=None, latent_std=None):
        """Mean and standard deviation (A,) of the training split's actions. Ids have none."""
        self.standardise_actions.mean.copy_(action_mean)
        self.standardise_actions.std.copy_(action_std)

    # ---- the network -----------------------------------------------------------------------------

    def tokens(self, L, M, actions, layout):
        """The input of the first block (B, N, D): v_p, v_f, a_p, a_f. Sec. 2.2.1."""
        v = self.embed(L)  # (B, T, H, W, D)
        if self.digits_in is not None:
            v = v + F.embedding(L, self.digits_in())
        v_p, v_f = v.split([layout.T_p, layout.T_f], dim=1)
        v_f = torch.where(M[..., None], self.mask_token.to(v.dtype), v_f)

        # Add the vector of each position in the clip. Latents beyond the trained ones share the last row.
        row = torch.arange(layout.T, device=L.device).clamp(max=len(self.position) - 1)
        v = torch.cat([v_p, v_f], dim=1).flatten(2, 3) + self.position[row]  # (B, T, S, D)
        v_p, v_f = v.flatten(1, 2).split(layout.lengths[:2], dim=1)

        actions = self.standardise_actions(actions)
        if self.at_place is not None:
            v_f = v_f + self.at_place(v_p[:, -layout.S :], actions[:, layout.lengths[2] :], layout)
        return torch.cat([v_p, v_f, self.embed_action(actions)], dim=1)

    def features(self, L, M, actions, memory=None):
        """ids L (B, T, H, W), M (B, T_f, H, W), actions (B, F, A) as recorded -> v_f after the last block
        (B, T_f * S, D). memory: see `future_from_memory`."""
        c, layout = self.config, self.layout.for_actions(actions.shape[1])
        x = self.tokens(L, M, actions, layout)
        rope = masked_rope(layout, c.width // c.n_head, L.device)
        if memory is not None:
            return self.norm_out(self.future_from_memory(x, layout, rope, memory))
        for block in self.blocks:
            x = run_block(block, c.checkpoint_activations, x, layout, rope)
        return self.norm_out(x)

    def future_from_memory(self, x, layout, rope, memory):
        """v_f after all blocks of the split variant. No other stream depends on v_f, so all that v_f attends
        to is computed in the first call and kept in `memory`, a list that the caller passes again."""
        v_p, v_f, a_p, a_f = x.split(layout.lengths, dim=1)
        if not memory:
            context = [v_p, a_p, a_f]
            for block in self.blocks:
                context, keys_values = block.update_context(context, layout, rope)
                memory.append(keys_values)
        for block, keys_values in zip(self.blocks, memory):
            v_f = block.update_future(v_f, keys_values, layout, rope)
        return v_f

    def out_weight(self):
        """(vocab, D)"""
        return self.out.weight if self.digits_out is None else self.out.weight + self.digits_out()

    def logits(self, L, M, actions, where=None, memory=None):
        """Logits (n, vocab) of the future tokens at which `where` (B, T_f, H, W), by default M, is True."""
        where = M if where is None else where
        h = self.features(L, M, actions, memory)[where.flatten(1)]
        return F.linear(h, self.out_weight(), self.out.bias)

    # ---- the objective ---------------------------------------------------------------------------

    def draw(self, generator):
        """All that is random in the loss of one clip. The trainer seeds the generator by step and clip."""
        c, T = self.config, self.layout.T
        rho = c.rho_max * torch.rand((), generator=generator)
        u_noise = torch.rand(T, c.H, c.W, generator=generator)
        random_ids = torch.randint(c.vocab_size, (T, c.H, c.W), generator=generator)
        r = torch.rand(c.T_f, generator=generator)
        u_mask = torch.rand(c.T_f, c.H, c.W, generator=generator)
        return {"rho": rho, "u_noise": u_noise, "random_ids": random_ids, "r": r, "u_mask": u_mask}

    def example(self, n):
        """n random clips, shaped like real ones -> what `forward` takes: L, actions, draws"""
        c, layout = self.config, self.layout
        L = torch.randint(c.vocab_size, (n, layout.T, c.H, c.W))
        actions = torch.randn(n, sum(layout.lengths[2:]), c.action_dim)
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        return L, actions, default_collate([self.draw(generator) for generator in generators])

    def corrupt(self, L, draws):
        """Sec. 2.2: ids everywhere become random ones at a rate rho ~ U(0, rho_max), as in Copilot-4D; then
        ids of each future frame are hidden at the rate gamma(r), r ~ U(0, 1). -> noisy ids, M"""
        noisy = draws["u_noise"] < draws["rho"].view(-1, 1, 1, 1)
        M = draws["u_mask"] < gamma(draws["r"])[..., None, None]
        return torch.where(noisy, draws["random_ids"], L), M

    def forward(self, L, actions, draws):
        """The loss of Sec. 2.2, - sum_i M_i log p(L_i): the cross-entropy of hidden future tokens alone.
        -> (sum, number of hidden tokens), for the caller to divide"""
        L_noisy, M = self.corrupt(L, draws)
        h = self.features(L_noisy, M, actions)[M.flatten(1)]  # (n, D)
        targets = L[:, self.config.T_p :][M]
        return LinearCrossEntropy.apply(h, self.out_weight(), self.out.bias, targets), M.sum()

    def known_losses(self, L):
        """What the loss is to be compared with, as a sentence about the ids L (B, T, H, W)."""
        V, T_p = self.config.vocab_size, self.config.T_p
        p = (L[:, T_p:] == L[:, T_p - 1 : T_p]).float().mean()
        copying = F.binary_cross_entropy(p, p) + (1 - p) * math.log(V - 1)
        return (f"guessing has ln {V} = {math.log(V):.2f}, and copying the last past latent, right for "
                f"{p:.0%} of the ids, {copying:.2f}")

    # ---- the sampler -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, L_p, actions, K=2, temperature=1.0, order="random", mean=False, generator=None,
               trace=None):
        """Dreams future ids (B, T_f, H, W) after the past ids L_p (B, T_p, H, W), as many as the actions
        (B, F, A) cover. K: steps per frame. order: which of the drawn ids are kept, "random" ones or those of
        greatest "confidence" (MaskGIT). mean: ids are not drawn, but are those nearest to the mean code.
        generator: of the noise; a list holds one for each clip, whose dream then does not depend on those
        beside it. trace: a list that receives (L, M) after every step."""
        levels = self.config.levels if mean else ()
        if mean and not levels:
            raise DataError("a mean takes the digits of ids, which this model does not know: give --no-mean")
        B, _, H, W = L_p.shape
        T_p, T_f, *_ = self.layout.for_actions(actions.shape[1])
        L = torch.cat([L_p, L_p.new_zeros(B, T_f, H, W)], dim=1)
        M = torch.ones(B, T_f, H, W, dtype=torch.bool, device=L.device)
        memory = [] if self.config.variant == "split" else None
        generators = generator if isinstance(generator, list) else [generator] * B

        for t in range(T_f):
            noise = torch.stack([torch.rand(H * W, generator=g) for g in generators])
            rank = ranks(noise).to(L.device)
            for k in range(1, K + 1):
                # 1. Draw all hidden tokens of frame t at once.
                hidden = torch.zeros_like(M)
                hidden[:, t] = M[:, t]
                logits = self.logits(L, M, actions, where=hidden, memory=memory)
                each = zip(logits.chunk(B), generators)  # as many tokens are hidden in every clip
                ids = torch.cat([choose_ids(rows, temperature, g, levels) for rows, g in each])
                L[:, T_p:][hidden] = ids

                # 2. By confidence: what is fixed already comes first, with a score above all probabilities.
                if order == "confidence":
                    confidence = torch.full((B, H * W), 2.0, device=L.device)
                    chosen = probabilities(logits, 1.0).gather(1, ids[:, None])
                    confidence[hidden[:, t].flatten(1)] = chosen[:, 0]
                    rank = ranks(-confidence)

                # 3. Fix the first in rank, and hide the others again.
                M[:, t] = (rank >= n_fixed(k, K, H * W)).view(B, H, W)
                if trace is not None:
                    trace.append((L.clone(), M.clone()))
        return L[:, T_p:]

Model, Config = MaskedHWM, MaskedConfig

# ---- a walk --------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    model = MaskedHWM(MaskedConfig(n_layer=2, n_head=4, width=64, hidden=256, vocab_size=512, H=8, W=8))
    L, actions, draws = model.example(2)
    show("ids L of two clips, 2 past + 1 future latent frames", L)
    show("actions, 9 past + 8 future ones", actions)
    L_noisy, M = model.corrupt(L, draws)
    show("ids replaced by random ones (Sec. 2.2)", f"{(L_noisy != L).sum()} of {L.numel()}")
    show("mask M over the future", M)
    show("tokens of v_p, v_f, a_p, a_f", model.layout.lengths)
    show("all tokens, one tensor", model.tokens(L_noisy, M, actions, model.layout))
    show("v_f after the last block", model.features(L_noisy, M, actions))
    show("logits of the hidden tokens", model.logits(L_noisy, M, actions))
    total, count = model(L, actions, draws)
    show("loss, their cross-entropy; ln(512) is 6.238", f"{total / count:.3f}")
    trace = []
    show("dreamt ids", model.sample(L[:, :2], actions, K=4, trace=trace))
    show("    hidden tokens of a clip after each of K = 4 steps", [int(M[0].sum()) for _, M in trace])

if __name__ == "__main__":
    main()
