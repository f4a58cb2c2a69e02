"""Masked-HWM (Sec. 2.2): a transformer that fills in masked video tokens, and dreams by unmasking them.

    ids (B, T, H, W) of a discrete tokenizer + actions (B, F, A), one per frame  ->  logits over the vocabulary

The objective (`corrupt`, `forward`) and the sampler (`sample`) stand a screen apart, so that their conventions cannot
drift. A clip has T = T_p + T_f latent frames: 2 past and 1 future in the paper; the sampler takes any number of future
latents and fills them frame by frame.

    L    true ids          r, gamma(r)  how much of a frame is masked, gamma(r) = cos(pi r / 2)
    M    mask, True where  rho          rate of random ids among the tokens, U(0, rho_max)
         a token is hidden K            refinement steps per frame of the sampler

Run me: `python masked_hwm.py` walks a toy batch through embedding, one block, loss and sampler, printing shapes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import AtPlace, Layout, MaskedBlock, Rope, layer_variants, masked_rope, run_block, split_at


@dataclass
class MaskedConfig:
    """Sec. 3.1 and Table 1; `tiny` in PRESETS is for the built-in robot."""
    variant: str = "base"
    n_layer: int = 24
    n_head: int = 8
    width: int = 512  # D
    hidden: int = 2048  # of the MLPs
    vocab_size: int = 64_000
    T_p: int = 2  # latent frames of the past
    T_f: int = 1  # and of the future
    H: int = 32  # latent height and width, one token each
    W: int = 32
    temporal: int = 8  # frames per latent
    action_dim: int = 25
    rho_max: float = 0.2
    at_place: bool = False  # give future tokens blocks.AtPlace
    share_digits: bool = False  # ids that agree in a digit of `levels` share a part of their vectors (DigitTable)
    levels: tuple = ()  # of the tokenizer's FSQ, if share_digits
    checkpoint_activations: str = ""  # hold less for the backward pass, see blocks.run_block: products, or inputs


PRESETS = {
    "paper": dict(),
    "tiny": dict(n_layer=5, n_head=4, width=128, hidden=512, vocab_size=4375, H=8, W=8, at_place=True,
                 share_digits=True, levels=(7, 5, 5, 5, 5)),
}


def gamma(r):
    """Share of a frame that is masked, for r in [0, 1]: everything at 0, nothing at 1 (cosine schedule of MaskGIT)."""
    return torch.cos(math.pi / 2 * r)


class DigitTable(nn.Module):
    """For small models: an id of FSQ is a number of several digits, a level for each channel of the code, and ids that
    agree in a digit look alike. This adds to the vector of every id one vector for each of its digits. A table of
    4,375 rows could learn that from many more clips than a laptop sees; 27 rows learn it at once."""

    def __init__(self, levels, D):
        super().__init__()
        ids, basis, columns = torch.arange(math.prod(levels)), 1, []
        for n in levels:  # mixed radix, first level fastest
            columns.append(F.one_hot(ids // basis % n, n))
            basis *= n
        self.register_buffer("digits", torch.cat(columns, dim=1).float(), persistent=False)  # (vocab, sum(levels))
        self.weight = nn.Parameter(torch.empty(sum(levels), D))

    def forward(self):
        """-> (vocab, D), to be added to a table of one row an id"""
        return self.digits @ self.weight


class MaskedHWM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        D = c.width
        self.layout = Layout(c.T_p, c.T_f, c.H, c.W, c.temporal)
        self.embed = nn.Embedding(c.vocab_size, D)
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.position = nn.Parameter(torch.empty(c.T_p + c.T_f, c.H * c.W, D))  # of each latent pixel of a clip
        self.embed_action = nn.Sequential(nn.Linear(c.action_dim, D), nn.Linear(D, c.hidden), nn.GELU(approximate="tanh"),
                                          nn.Linear(c.hidden, D))
        self.at_place = AtPlace(c.action_dim, D, c.temporal) if c.at_place else None
        self.blocks = nn.ModuleList(MaskedBlock(D, c.n_head, c.hidden, variant, last=i == c.n_layer - 1)
                                    for i, variant in enumerate(layer_variants(c.variant, c.n_layer)))
        self.norm_out, self.out = nn.LayerNorm(D), nn.Linear(D, c.vocab_size)
        self.digits_in, self.digits_out = (DigitTable(c.levels, D) if c.share_digits else None for _ in range(2))
        self.register_buffer("action_mean", torch.zeros(c.action_dim))  # of the training split; travel with the weights
        self.register_buffer("action_std", torch.ones(c.action_dim))
        self.ropes = {}
        self.initialize_weights()

    def initialize_weights(self):
        """Sec. 3.1: N(0, 0.02) for all weights, Xavier for the mask token and the output projection."""
        for name, p in self.named_parameters():
            if name.startswith("at_place"):
                continue  # PyTorch's own, wider: to be heard from the first step
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.xavier_normal_(self.mask_token)
        nn.init.xavier_normal_(self.out.weight)

    def set_statistics(self, action_mean, action_std):
        self.action_mean.copy_(action_mean)
        self.action_std.copy_(action_std)

    # ---- the network -----------------------------------------------------------------------------------------------

    def features(self, L, M, actions, memory=None):
        """ids L (B, T, H, W), M (B, T_f, H, W) True where hidden, actions (B, F, A) as recorded
        -> v_f after the last layer (B, T_f * S, D). Sec. 2.2.1. memory: see `sample`."""
        c, layout = self.config, self.layout._replace(T_f=L.shape[1] - self.config.T_p)
        rope = self.rope(layout, L.device)
        x = self.embed(L)  # (B, T, H, W, D)
        if c.share_digits:
            x = x + F.embedding(L, self.digits_in())
        x_f = torch.where(M[..., None], self.mask_token.to(x.dtype), x[:, c.T_p :])
        x = torch.cat([x[:, : c.T_p], x_f], dim=1).flatten(2, 3)  # (B, T, S, D)
        rows = torch.arange(layout.T, device=L.device).clamp(max=len(self.position) - 1)
        x = (x + self.position[rows]).flatten(1, 2)  # (B, T*S, D); latents beyond the trained ones share its last row
        actions = (actions - self.action_mean) / self.action_std
        a = self.embed_action(actions)  # (B, F, D)
        if c.at_place:
            v_p, v_f = split_at(x, layout.future.start, dim=1)
            v_f = v_f + self.at_place(v_p[:, -layout.S :], actions[:, layout.lengths[2] :], layout)
            x = torch.cat([v_p, v_f], dim=1)
        if memory is not None:
            v_p, v_f = split_at(x, layout.future.start, dim=1)
            rest = torch.cat([v_p, a], dim=1)
            for i, block in enumerate(self.blocks):
                if len(memory) == i:
                    rest, seen = block.context(rest, layout, rope)
                    memory.append(seen)
                v_f = block.future(v_f, memory[i], layout, rope)
            return self.norm_out(v_f)
        x = torch.cat([x, a], dim=1)  # (B, N, D) in the order v_p, v_f, a_p, a_f
        for block in self.blocks:
            x = run_block(block, self.config.checkpoint_activations, x, layout, rope)
        return self.norm_out(x)

    def rope(self, layout, device):
        """Rotary tables, built once per layout and device."""
        key = (layout, str(device))
        if key not in self.ropes:
            tables = masked_rope(layout, self.config.width // self.config.n_head)
            self.ropes[key] = Rope(*(tuple(t.to(device) for t in table) for table in tables))
        return self.ropes[key]

    def logits(self, L, M, actions, where=None, memory=None):
        """Logits (n, vocab) of the future tokens where `where` (B, T_f, H, W) is True (default: where M is), in order."""
        h = self.features(L, M, actions, memory)[(M if where is None else where).flatten(1)]
        return F.linear(h, self.out_weight(), self.out.bias)

    def out_weight(self):
        return self.out.weight + self.digits_out() if self.config.share_digits else self.out.weight

    # ---- the objective ---------------------------------------------------------------------------------------------

    def draw(self, generator):
        """All that is random in the loss of one clip; the trainer seeds it by step and clip."""
        c, rand = self.config, lambda *shape: torch.rand(shape, generator=generator)
        T = c.T_p + c.T_f
        return {"rho": c.rho_max * rand(), "u_noise": rand(T, c.H, c.W),
                "random_ids": torch.randint(c.vocab_size, (T, c.H, c.W), generator=generator),
                "r": rand(c.T_f), "u_mask": rand(c.T_f, c.H, c.W)}

    def corrupt(self, L, draws):
        """Sec. 2.2: random ids at a rate rho ~ U(0, rho_max) everywhere (Copilot-4D), then a mask on the future, per
        frame with threshold gamma(r), r ~ U(0, 1). -> corrupted ids, M. L itself is left as it is."""
        noisy = draws["u_noise"] < draws["rho"][:, None, None, None]
        M = draws["u_mask"] < gamma(draws["r"])[..., None, None]
        return torch.where(noisy, draws["random_ids"], L), M

    def forward(self, L, actions, draws):
        """The masked loss of Sec. 2.2, - E_M [ sum_i M_i log p(L_i) ], over hidden future tokens only.
        -> (sum, count): the mean is taken by the caller, so that it is the same however a batch is divided."""
        L_noisy, M = self.corrupt(L, draws)
        h = self.features(L_noisy, M, actions)[M.flatten(1)]  # (n, D): logits only where the loss looks
        targets = L[:, self.config.T_p :][M]
        return LinearCrossEntropy.apply(h, self.out_weight(), self.out.bias, targets), M.sum()

    # ---- the sampler -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, L_p, actions, K=2, temperature=1.0, order="random", generator=None, trace=None):
        """Dreams the future latents L_f (B, T_f, H, W) of the past ids L_p (B, T_p, H, W); the number of actions
        (B, F, A) says how many. Frame by frame; a frame starts hidden, and in K steps all its hidden tokens are drawn in
        parallel and a part of them kept, so that after step k a share 1 - gamma(k / K) is fixed; the rest is masked and
        drawn again. order: which are kept, at "random" or those of greatest "confidence" (MaskGIT).
        In the split variant nothing but v_f changes between two questions: the rest is computed once, into `memory`.
        trace: a list that receives (L, M) after every step."""
        B, T_p, H, W = L_p.shape
        T_f = (actions.shape[1] - 1) // self.config.temporal + 1 - T_p
        L = torch.cat([L_p, torch.zeros_like(L_p[:, :1]).expand(-1, T_f, -1, -1)], dim=1)
        M = torch.ones(B, T_f, H, W, dtype=torch.bool, device=L.device)
        memory = [] if self.config.variant == "split" else None
        for t in range(T_f):
            current = torch.zeros_like(M)
            current[:, t] = True
            rank = torch.rand(B, H * W, generator=generator).argsort(dim=1).argsort(dim=1).to(L.device)
            for k in range(1, K + 1):
                hidden = M & current
                logits = self.logits(L, M, actions, where=hidden, memory=memory)
                few = len(logits) if logits.is_cuda else 64  # rows that fit a processor's cache
                ids = torch.cat([draw_ids(probabilities(rows, temperature), generator) for rows in logits.split(few)])
                L = L.clone()
                L[:, T_p:][hidden] = ids
                if order == "confidence":  # certain tokens first; what is fixed already stays in front
                    score = torch.full((B, H * W), 2.0, device=L.device)
                    score[hidden[:, t].flatten(1)] = probabilities(logits, 1.0).gather(1, ids[:, None])[:, 0]
                    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                M[:, t] = (rank >= n_fixed(k, K, H * W)).unflatten(1, (H, W))
                if trace is not None:
                    trace.append((L.clone(), M.clone()))
        return L[:, T_p:]


def n_fixed(k, K, n):
    """How many of a frame's n tokens are fixed after step k of K: a share 1 - gamma(k / K), all after the last."""
    return round(n * (1 - math.cos(math.pi * k / (2 * K))))


def probabilities(logits, temperature):
    """Softmax of logits / temperature (n, vocab); at 0 all on the largest."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits.float() / temperature).softmax(-1)


def draw_ids(p, generator=None):
    """One id for each row of p (n, vocab), by inverting the distribution: one uniform number a row, whatever the device."""
    u = torch.rand(len(p), 1, generator=generator).to(p.device, p.dtype)
    c = p.cumsum(-1)
    return torch.searchsorted(c, u * c[:, -1:], right=True).clamp(max=p.shape[1] - 1)[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(h_i W^T + b)[target_i], in chunks of rows: exactly the plain loss, but logits exist for one
    chunk at a time (64,000 classes: the full table would be the largest tensor of the model). The gradient is taken in
    the same visit, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets, chunk=512):
        work = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        w, total = weight.to(work), h.new_zeros((), dtype=torch.float32)
        need = ctx.needs_input_grad[0]  # not where nobody will ask for a gradient
        grad_h = torch.zeros_like(h) if need else None
        grad_w, grad_b = (torch.zeros_like(p, dtype=torch.float32) if need else None for p in (weight, bias))
        for rows in range(0, len(h), chunk):
            x, y = h[rows : rows + chunk].to(work), targets[rows : rows + chunk, None]
            e = (x @ w.t()).float().add_(bias)  # logits; from here on, in place, what becomes of them
            largest = e.amax(-1, keepdim=True)
            target = e.gather(1, y)
            z = e.sub_(largest).exp_().sum(-1, keepdim=True)
            total = total + (z.log() + largest - target).sum()
            if need:
                p = e.div_(z)  # softmax; its difference to the one-hot target is the gradient
                p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype))
                grad_b += p.sum(0)
                p = p.to(work)
                grad_h[rows : rows + chunk] = (p @ w).to(h.dtype)
                grad_w.addmm_(p.t(), x) if work == torch.float32 else grad_w.add_(p.t() @ x)
        if need:
            ctx.save_for_backward(grad_h, grad_w.to(weight.dtype), grad_b.to(bias.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None, None


KIND = "discrete"
SAMPLING = {"paper": dict(K=2, temperature=1.0), "tiny": dict(K=2, temperature=0.0)}
TRAINING = {"paper": dict(steps=60_000, batch=16, lr=3e-5, warmup=100, decay="linear", micro=4),
            "tiny": dict(steps=1400, batch=8, lr=2e-3, warmup=50, decay="cosine", micro=8)}
Model, Config = MaskedHWM, MaskedConfig


def main():
    """One step on a toy batch, with the shape of everything on the way."""
    torch.manual_seed(0)
    config = MaskedConfig(n_layer=2, n_head=4, width=64, hidden=256, vocab_size=512, H=8, W=8)
    model, B = MaskedHWM(config), 2
    F_all = sum(model.layout.lengths[2:])
    L, actions = torch.randint(512, (B, 3, 8, 8)), torch.randn(B, F_all, 25)
    show = lambda what, x: print(f"{what:58s} {tuple(x.shape) if hasattr(x, 'shape') else x}")
    show("ids L of a clip, 2 past + 1 future latent frames", L)
    show("actions, 9 past + 8 future frames", actions)
    drawn = [model.draw(torch.Generator().manual_seed(i)) for i in range(B)]
    draws = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
    show("drawn for the loss", ", ".join(f"{k} {tuple(v.shape)}" for k, v in draws.items()))
    L_noisy, M = model.corrupt(L, draws)
    show("mask M over the future (Sec. 2.2)", M)
    show("    tokens replaced at random / hidden", f"{int((L_noisy != L).sum())} / {int(M.sum())} of {L.numel()}")
    show("streams v_p, v_f, a_p, a_f, in tokens", model.layout.lengths)
    x = torch.cat([model.embed(L_noisy).flatten(1, 3), model.embed_action(actions)], 1)
    show("embedded tokens, one tensor (B, N, D)", x)
    show("after one block (spatial, temporal attention, MLP)",
         model.blocks[0](x, model.layout, model.rope(model.layout, x.device)))
    show("v_f after the last block", model.features(L_noisy, M, actions))
    show("logits, hidden future tokens only", model.logits(L_noisy, M, actions))
    total, count = model(L, actions, draws)
    show("loss: cross-entropy of hidden tokens, beside ln(512)", f"{total.item() / count.item():.3f}, {math.log(512):.3f}")
    trace = []
    show("sampled future ids", model.sample(L[:, :2], actions, K=4, trace=trace))
    show("    tokens still hidden after each of K = 4 steps", [int(M[0].sum()) for _, M in trace])


if __name__ == "__main__":
    main()
