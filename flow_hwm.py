"""Flow-HWM (Sec. 2.3): flow matching on continuous latents, with a transformer over the four streams.

Flow matching learns to move from noise to data. Draw noise X_0, take the latents X_1 of a real future, and
join them by a straight line: a point X_t travels along it, from X_0 at time t = 0 to X_1 at t = 1. A network
sees X_t, t, the past and the actions, and learns the velocity V_t at which the point travels. To dream, start
from new noise, ask the network for the velocity, take a small step that way, and ask again, until t = 1.

    X_0, X_1, X_t, V_t   noise, future latents, the point at time t, its velocity: all (B, C, T_f, H, W)
    v_p, actions         the conditions P: past latents (B, C, T_p, H, W), actions (B, F, A), one per frame
    sigma_min            how much of the noise is left at t = 1

`python flow_hwm.py` follows two toy clips through path, network, loss and sampler, and prints the shapes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from einops import rearrange
from torch.utils.data import default_collate

from blocks import (VARIANTS, AtPlace, FlowBlock, Layout, Modulate, Modulation, Standardise, check_knobs,
                    flow_rope, initialize, knob, layer_variants, modulate, run_block, show)
from tokenizer import DataError

KIND = "continuous"  # the latents that this model dreams

@dataclass
class FlowConfig:
    """Sizes and options; the defaults are the paper's (Sec. 3.2, Table 2)."""
    variant: str = knob("full", "how the four streams share weights", choices=VARIANTS)
    n_layer: int = knob(17, "transformer blocks")
    n_head: int = knob(4, "attention heads of a block")
    width: int = knob(1172, "numbers in a token, D")
    hidden: int = knob(4688, "hidden units of an MLP")
    time_width: int = knob(256, "numbers in the embedding of the flow time t")
    channels: int = knob(16, "channels of a latent, C")
    patch: int = knob(2, "rows and columns of latent pixels in a token")
    T_p: int = knob(2, "latent frames of the past")
    T_f: int = knob(1, "latent frames of the future")
    H: int = knob(16, "rows of a latent frame")
    W: int = knob(16, "columns of a latent frame")
    temporal: int = knob(8, "video frames in a latent frame")
    action_dim: int = knob(25, "numbers in an action, A")
    sigma_min: float = knob(1e-4, "share of the noise that is left at t = 1")
    t_sampling: str = knob("uniform", "how training draws t", choices=("uniform", "logit-normal"))
    p_drop: float = knob(0.15, "how often training drops the conditions, so that a sampler can guide")
    drop: str = knob("both", "which conditions it drops", choices=("actions", "past", "both"))
    at_place: bool = knob(False, "learned vectors of positions, and blocks.AtPlace for future tokens")
    checkpoint_activations: str = knob("", "what a block stores for its backward pass (blocks.run_block)",
                                       choices=("products", "inputs"))

    def __post_init__(self):
        check_knobs(self)
        if self.width % self.n_head:
            raise DataError(f"{self.n_head} heads cannot share a width of {self.width}: change one of them")
        if self.time_width % 2:
            raise DataError(f"time_width cannot be {self.time_width}: give an even number")
        if self.H % self.patch or self.W % self.patch:
            raise DataError(f"patch {self.patch} does not divide {self.H} x {self.W} latents: give another")
        if not 0 <= self.p_drop < 1:
            raise DataError(f"p_drop cannot be {self.p_drop}: give a probability from 0 to below 1")

PRESETS = {
    "paper": dict(),
    "tiny": dict(n_layer=5, n_head=4, width=128, hidden=512, time_width=64, H=8, W=8, patch=1, at_place=True),
}
TRAINING = {  # paper: Sec. 3.2; micro: the clips that a GPU takes at once
    "paper": dict(steps=150_000, batch=128, lr=1e-4, warmup=0, decay="cosine", micro=32),
    "tiny": dict(steps=3600, batch=8, lr=2e-3, warmup=50, decay="cosine"),
}
SAMPLING = {  # paper: Sec. 3.2; tiny: the best of those measured (tests/RESULTS.md)
    "paper": dict(steps=50, cfg=3.0),
    "tiny": dict(steps=5, cfg=1.5, temperature=0.0),
}

# ---- flow matching: the path, its velocity, and how to follow it ---------------------------------

def interpolate(X_0, X_1, t, sigma_min):
    """Eq. 1: X_t = t X_1 + (1 - (1 - sigma_min) t) X_0, with one time per clip, t (B,)."""
    t = t.view(-1, *[1] * (X_1.ndim - 1))
    return t * X_1 + (1 - (1 - sigma_min) * t) * X_0

def target_velocity(X_0, X_1, sigma_min):
    """Eq. 2: V_t = dX_t / dt = X_1 - (1 - sigma_min) X_0. The line is straight, so t does not appear."""
    return X_1 - (1 - sigma_min) * X_0

def integrate(velocity, X_0, steps, method="euler", trace=None):
    """Follows dX / dt = velocity(X, t) from X_0 at t = 0 -> X at t = 1. Euler's method goes by the velocity
    at the beginning of each step; midpoint goes by a second one, asked for in the middle of the step.
    trace: a list that receives X_0, and X after every step."""
    X, dt = X_0, 1 / steps
    trace = [] if trace is None else trace
    trace.append(X)
    for i in range(steps):
        t = i * dt
        u = velocity(X, t)
        if method == "midpoint":
            u = velocity(X + u * dt / 2, t + dt / 2)
        # The next velocity is that at the new X, not at X_0: many small steps follow a curved flow.
        X = X + u * dt
        trace.append(X)
    return X

# ---- the model -----------------------------------------------------------------------------------

def time_embedding(t, width):
    """Sines and cosines of t in [0, 1], as DDPM has them for a thousand steps. (B,) -> (B, width)"""
    exponents = torch.arange(width // 2, device=t.device) / (width // 2)
    angles = torch.outer(1000 * t, torch.exp(-math.log(10_000) * exponents))
    return torch.cat([angles.cos(), angles.sin()], dim=1)

class FlowHWM(nn.Module):
    network = "velocity"  # the method with the products, for speed.in_bfloat16

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        D, C = c.width, c.time_width
        patch_size = c.channels * c.patch**2
        self.layout = Layout(c.T_p, c.T_f, c.H // c.patch, c.W // c.patch, c.temporal)
        self.standardise_actions = Standardise(c.action_dim)
        self.standardise_latents = Standardise(c.channels, trailing=3)

        self.embed_p, self.embed_f = nn.Linear(patch_size, D), nn.Linear(patch_size, D)
        self.embed_action = nn.Sequential(nn.Linear(c.action_dim, D), nn.Linear(D, 2 * D),
                                          nn.GELU(approximate="tanh"), nn.Linear(2 * D, D))
        self.place = nn.Parameter(torch.empty(self.layout.S, D)) if c.at_place else None
        self.at_place = AtPlace(c.action_dim, D, c.temporal) if c.at_place else None
        self.embed_time = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C), nn.SiLU())

        self.blocks = nn.ModuleList()
        for i, variant in enumerate(layer_variants(c.variant, c.n_layer), start=1):
            self.blocks.append(FlowBlock(D, c.n_head, c.hidden, C, variant, last=i == c.n_layer))
        self.modulation, self.out = nn.Linear(C, 2 * D), nn.Linear(D, patch_size)
        self.initialize_weights()

    def initialize_weights(self):
        """Gates open, and Xavier for the final layer, where zeros were unstable (Sec. 3.2)."""
        initialize(self)
        for module in self.modules():
            if isinstance(module, Modulate):
                module.open_gates()
        nn.init.xavier_normal_(self.out.weight)

    def set_statistics(self, action_mean, action_std, latent_mean, latent_std):
        """Mean and standard deviation of the training split: (A,) of the actions, (C,) of the latents."""
        self.standardise_actions.mean.copy_(action_mean)
        self.standardise_actions.std.copy_(action_std)
        self.standardise_latents.mean.copy_(latent_mean)
        self.standardise_latents.std.copy_(latent_std)

    # ---- the network u(X_t, P, t) ----------------------------------------------------------------

    def patchify(self, X):
        """(B, C, T, H, W) -> (B, T * S, C * patch^2), a token for each patch"""
        p = self.config.patch
        return rearrange(X, "b c t (h p) (w q) -> b (t h w) (c p q)", p=p, q=p)

    def unpatchify(self, tokens):
        """Inverse of `patchify`."""
        p, layout = self.config.patch, self.layout
        return rearrange(tokens, "b (t h w) (c p q) -> b c t (h p) (w q)", h=layout.H, w=layout.W, p=p, q=p)

    def velocity(self, X_t, t, v_p, actions, kept=None):
        """Sec. 2.3.1. X_t (B, C, T_f, H, W) and v_p (B, C, T_p, H, W) standardised, t (B,) or (1,), actions
        (B, F, A) as recorded -> the velocity (B, C, T_f, H, W). kept (B,): where it is False, the conditions
        that config.drop names enter as zeros."""
        c, layout = self.config, self.layout._replace(T_f=X_t.shape[2])
        rope = flow_rope(layout, c.width // c.n_head, X_t.device)

        # 1. Everything becomes tokens of width D.
        time = self.embed_time(time_embedding(t, c.time_width))  # (B or 1, time_width)
        past = self.embed_p(self.patchify(v_p))  # (B, T_p * S, D)
        future = self.embed_f(self.patchify(X_t))  # (B, T_f * S, D)
        actions = self.standardise_actions(actions)
        a = self.embed_action(actions)  # (B, F, D)
        if kept is not None:
            kept = kept.view(-1, 1, 1)
            if c.drop != "actions":
                past = past * kept
            if c.drop != "past":
                a, actions = a * kept, actions * kept
        if c.at_place:
            past = past + self.place.repeat(layout.T_p, 1)
            future = future + self.place.repeat(layout.T_f, 1)
            future = future + self.at_place(past[:, -layout.S :], actions[:, layout.lengths[2] :], layout)

        # 2. The blocks. What they add up stays in float32, even where products are bfloat16.
        x = torch.cat([past, future, a], dim=1).float()
        for block in self.blocks:
            x = run_block(block, c.checkpoint_activations, x, time, layout, rope)

        # 3. v_f, modulated a last time, becomes latents.
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=2)
        return self.unpatchify(self.out(modulate(x, Modulation(shift, scale, gate=None))))

    # ---- the objective ---------------------------------------------------------------------------

    def draw(self, generator):
        """All that is random in the loss of one clip. The trainer seeds the generator by step and clip."""
        c = self.config
        t = torch.rand((), generator=generator)
        if c.t_sampling == "logit-normal":
            t = torch.randn((), generator=generator).sigmoid()
        X_0 = torch.randn(c.channels, c.T_f, c.H, c.W, generator=generator)
        kept = torch.rand((), generator=generator) >= c.p_drop
        return {"t": t, "X_0": X_0, "kept": kept}

    def example(self, n):
        """n random clips, shaped like real ones -> what `forward` takes: latents, actions, draws"""
        c, layout = self.config, self.layout
        latents = torch.randn(n, c.channels, layout.T, c.H, c.W)
        actions = torch.randn(n, sum(layout.lengths[2:]), c.action_dim)
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        return latents, actions, default_collate([self.draw(generator) for generator in generators])

    def forward(self, latents, actions, draws):
        """Eq. 3: the mean of || u(X_t, P, t) - V_t ||^2. latents (B, C, T, H, W) from the tokenizer, actions
        (B, F, A) as recorded -> (sum of the clips' errors, number of clips), for the caller to divide"""
        c, X_0, t = self.config, draws["X_0"], draws["t"]
        v_p, X_1 = self.standardise_latents(latents).split([c.T_p, c.T_f], dim=2)
        X_t = interpolate(X_0, X_1, t, c.sigma_min)
        V_t = target_velocity(X_0, X_1, c.sigma_min)
        # The network is told the same time t at which X_t lies on the path.
        u = self.velocity(X_t, t, v_p, actions, draws["kept"])
        error = (u.float() - V_t).square().flatten(1).mean(dim=1)
        return error.sum(), torch.tensor(len(error), device=error.device)

    def known_losses(self, latents):
        """What the loss is to be compared with, as a sentence."""
        return "knowing no more than the mean of all latents has 1 at t = 0"

    # ---- the sampler -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, latents_p, actions, steps=50, cfg=1.0, method="euler", temperature=1.0, generator=None,
               trace=None):
        """Dreams future latents (B, C, T_f, H, W) after the past ones (B, C, T_p, H, W), as many as the
        actions (B, F, A) cover. steps and method: see `integrate`. cfg: scale of classifier-free guidance, 1
        for none. temperature: scale of the noise to start from, below 1 for likelier dreams. generator: of
        the noise; a list holds one for each clip, whose dream then does not depend on those beside it.
        trace: a list that receives the noise, and the latents after every step."""
        if cfg != 1 and self.config.p_drop == 0:
            raise DataError(f"cfg {cfg:g} needs a model that was also trained without its conditions, but "
                            "this one has p_drop 0: leave cfg out, or give 1")
        B, C, _, H, W = latents_p.shape
        T_f = self.layout.for_actions(actions.shape[1]).T_f
        v_p = self.standardise_latents(latents_p)
        generators = generator if isinstance(generator, list) else [generator] * B
        noise = torch.stack([torch.randn(C, T_f, H, W, generator=g) for g in generators])
        X_0 = temperature * noise.to(v_p)
        kept = torch.tensor([True, False], device=v_p.device).repeat_interleave(B)

        def guided(X, t):
            """From the velocity u_0 without conditions to u with them, and for cfg > 1 beyond it."""
            t = torch.full((1,), t, device=X.device)
            if cfg == 1:
                return self.velocity(X, t, v_p, actions).float()
            X, past, action = (torch.cat([x, x]) for x in (X, v_p, actions))
            u, u_0 = self.velocity(X, t, past, action, kept).float().chunk(2)
            return u_0 + cfg * (u - u_0)

        X_1 = integrate(guided, X_0, steps, method, trace)
        if trace is not None:
            trace[:] = [self.standardise_latents.inverse(X) for X in trace]
        return self.standardise_latents.inverse(X_1)

Model, Config = FlowHWM, FlowConfig

# ---- a walk --------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    model = FlowHWM(FlowConfig(n_layer=2, n_head=4, width=64, hidden=256, H=8, W=8))
    latents, actions, draws = model.example(2)
    show("latents of two clips, 2 past + 1 future latent frames", latents)
    show("actions, 9 past + 8 future ones", actions)
    X_0, t, (v_p, X_1) = draws["X_0"], draws["t"], latents.split([2, 1], dim=2)
    X_t = interpolate(X_0, X_1, t, sigma_min=1e-4)
    show(f"X_t between noise and data (Eq. 1), at t = {t[0]:.2f} and {t[1]:.2f}", X_t)
    show("V_t, what the network shall answer there (Eq. 2)", target_velocity(X_0, X_1, sigma_min=1e-4))
    show("tokens of v_p, v_f, a_p, a_f", model.layout.lengths)
    show("v_f as tokens of width D", model.embed_f(model.patchify(X_t)))
    show("embedding of t, which modulates every block", model.embed_time(time_embedding(t, 256)))
    show("velocity u(X_t, P, t) after all blocks", model.velocity(X_t, t, v_p, actions))
    total, count = model(latents, actions, draws)
    show("loss, the mean square of u - V_t (Eq. 3)", f"{total / count:.3f}")
    trace = []
    model.sample(v_p, actions, steps=4, cfg=3.0, trace=trace)
    show("dreamt latents, after 4 Euler steps with guidance", trace[-1])
    show("    their standard deviation on the way", ", ".join(f"{X.std():.2f}" for X in trace))

if __name__ == "__main__":
    main()
