"""Flow-HWM (Sec. 2.3): flow matching on continuous latents. A velocity field carries noise to the future video.

    noise X_0 (B, C, T_f, H, W), past latents v_p, actions a, time t  ->  velocity u = dX_t / dt, of the same shape

The objective (`interpolate`, `target_velocity`, `forward`) and the sampler (`sample`) stand a screen apart, so that
their conventions cannot drift: t = 0 is noise, t = 1 is data, and the sampler walks from 0 to 1.

    X_1  latents of the future video, standardised      V_t        velocity along the path from X_0 to X_1
    X_0  noise, N(0, I)                                 sigma_min  what is left of the noise at t = 1
    X_t  the point at time t between them               P          the conditions: past video v_p, actions a_p and a_f

Run me: `python flow_hwm.py` walks a toy batch through embedding, one block, loss and sampler, printing shapes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from einops import rearrange

from blocks import AtPlace, FlowBlock, Layout, Modulate, Modulation, axis_dims, layer_variants, modulate, rope_table, run_block


@dataclass
class FlowConfig:
    """Sec. 3.2 and Table 2; `tiny` in PRESETS is for the built-in robot."""
    variant: str = "full"
    n_layer: int = 17
    n_head: int = 4
    width: int = 1172  # D
    hidden: int = 4688  # of the MLPs
    time_width: int = 256  # of the embedding of t
    channels: int = 16  # of a latent
    patch: int = 2  # latent pixels across a token, in space; one latent frame in time
    T_p: int = 2  # latent frames of the past
    T_f: int = 1  # and of the future
    H: int = 16  # latent height and width
    W: int = 16
    temporal: int = 8  # frames per latent
    action_dim: int = 25
    sigma_min: float = 1e-4
    t_sampling: str = "uniform"  # or logit-normal
    p_drop: float = 0.15  # how often conditions are dropped in training, for guidance
    drop: str = "both"  # which: actions, past, or both
    at_place: bool = False  # give video tokens a vector of their place, and future ones blocks.AtPlace
    checkpoint_activations: str = ""  # hold less for the backward pass, see blocks.run_block: products, or inputs


PRESETS = {
    "paper": dict(),
    "tiny": dict(n_layer=5, n_head=4, width=128, hidden=512, time_width=64, H=8, W=8, patch=1, at_place=True),
}


def interpolate(X_0, X_1, t, sigma_min):
    """Eq. 1: X_t = t X_1 + (1 - (1 - sigma_min) t) X_0. t (B,)."""
    t = t.view(-1, *[1] * (X_1.ndim - 1))
    return t * X_1 + (1 - (1 - sigma_min) * t) * X_0


def target_velocity(X_0, X_1, sigma_min):
    """Eq. 2: V_t = dX_t / dt = X_1 - (1 - sigma_min) X_0, the same at every t."""
    return X_1 - (1 - sigma_min) * X_0


def integrate(velocity, X_0, steps, method="euler", trace=None):
    """Solves dX/dt = velocity(X, t) from t = 0 to 1, starting at X_0. euler asks once a step, midpoint twice.
    trace: a list that receives X_0, and X after every step."""
    X, dt = X_0, 1 / steps
    if trace is not None:
        trace.append(X)
    for i in range(steps):
        t = i * dt
        u = velocity(X, t)
        if method == "midpoint":
            u = velocity(X + u * dt / 2, t + dt / 2)
        X = X + u * dt  # the state moves, and the next question is asked about the state it moved to
        if trace is not None:
            trace.append(X)
    return X


def time_embedding(t, width):
    """Sinusoids of t in [0, 1], on the scale of a thousand steps (DDPM). (B,) -> (B, width)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class FlowHWM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        D, C = c.width, c.time_width
        self.layout = Layout(c.T_p, c.T_f, c.H // c.patch, c.W // c.patch, c.temporal)
        self.embed_p, self.embed_f = (nn.Linear(c.channels * c.patch**2, D) for _ in range(2))
        self.embed_action = nn.Sequential(nn.Linear(c.action_dim, D), nn.Linear(D, 2 * D), nn.GELU(approximate="tanh"),
                                          nn.Linear(2 * D, D))
        self.place = nn.Parameter(torch.empty(self.layout.S, D)) if c.at_place else None
        self.at_place = AtPlace(c.action_dim, D, c.temporal) if c.at_place else None
        self.embed_time = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C), nn.SiLU())
        self.blocks = nn.ModuleList(FlowBlock(D, c.n_head, c.hidden, C, variant, last=i == c.n_layer - 1)
                                    for i, variant in enumerate(layer_variants(c.variant, c.n_layer)))
        self.modulation, self.out = nn.Linear(C, 2 * D), nn.Linear(D, c.channels * c.patch**2)
        for name, size in (("action", c.action_dim), ("latent", c.channels)):  # statistics of the training split
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.ropes = {}
        self.initialize_weights()

    def initialize_weights(self):
        """N(0, 0.02), gates open; Xavier for the final linear layer (zero was unstable, Sec. 3.2)."""
        for name, p in self.named_parameters():
            if name.startswith("at_place"):
                continue  # PyTorch's own, wider: to be heard from the first step
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for module in self.modules():
            if isinstance(module, Modulate):
                module.open_gates()
        nn.init.xavier_normal_(self.out.weight)

    def set_statistics(self, action_mean, action_std, latent_mean, latent_std):
        for name, value in zip(("action_mean", "action_std", "latent_mean", "latent_std"),
                               (action_mean, action_std, latent_mean, latent_std)):
            getattr(self, name).copy_(value)

    def standardise(self, latents):
        """(B, C, T, H, W) of the tokenizer -> zero mean, unit variance per channel over the training split."""
        return (latents - self.latent_mean.view(1, -1, 1, 1, 1)) / self.latent_std.view(1, -1, 1, 1, 1)

    def unstandardise(self, X):
        """Inverse of `standardise`."""
        return X * self.latent_std.view(1, -1, 1, 1, 1) + self.latent_mean.view(1, -1, 1, 1, 1)

    # ---- the network: u_theta(X_t, P, t) -----------------------------------------------------------------------------

    def patchify(self, X):
        """(B, C, T, H, W) -> (B, T*S, C * patch^2), one token a patch"""
        return rearrange(X, "b c t (h p) (w q) -> b (t h w) (c p q)", p=self.config.patch, q=self.config.patch)

    def unpatchify(self, tokens):
        """Inverse of `patchify`."""
        return rearrange(tokens, "b (t h w) (c p q) -> b c t (h p) (w q)", h=self.layout.H, w=self.layout.W,
                         p=self.config.patch, q=self.config.patch)

    def velocity(self, X_t, t, v_p, actions, keep_past=None, keep_actions=None):
        """X_t (B, C, T_f, H, W), t (B,) or (1,), v_p (B, C, T_p, H, W) standardised, actions (B, F, A) as recorded
        -> u (B, C, T_f, H, W). keep_* (B,) True or False: a condition that is not kept enters as zeros. Sec. 2.3.1."""
        c, layout = self.config, self.layout._replace(T_f=X_t.shape[2])
        time = self.embed_time(time_embedding(t, c.time_width))  # (B or 1, C)
        p = self.embed_p(self.patchify(v_p))  # (B, T_p*S, D)
        actions = (actions - self.action_mean) / self.action_std
        a, a_f = self.embed_action(actions), actions[:, layout.lengths[2] :]  # (B, F, D), (B, F_f, A)
        if keep_past is not None:
            p = p * keep_past.view(-1, 1, 1).to(p.dtype)
        if keep_actions is not None:
            a, a_f = (y * keep_actions.view(-1, 1, 1).to(y.dtype) for y in (a, a_f))
        x = self.embed_f(self.patchify(X_t))  # (B, T_f*S, D)
        if c.at_place:
            p, x = p + self.place.repeat(layout.T_p, 1), x + self.place.repeat(layout.T_f, 1)
            x = x + self.at_place(p[:, -layout.S :], a_f, layout)
        x = torch.cat([p, x, a], dim=1).float()  # (B, N, D): v_p, v_f, a_p, a_f; what blocks add up stays in float32
        rope = self.rope(layout, X_t.device)
        for block in self.blocks:
            x = run_block(block, self.config.checkpoint_activations, x, time, layout, rope)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)  # of the final layer
        return self.unpatchify(self.out(modulate(x, Modulation(shift, scale, gate=None))))

    def rope(self, layout, device):
        """Rotary table over (time, row, column), built once per layout and device."""
        key = (layout, str(device))
        if key not in self.ropes:
            table = rope_table(layout.positions(), axis_dims(self.config.width // self.config.n_head))
            self.ropes[key] = tuple(t.to(device) for t in table)
        return self.ropes[key]

    # ---- the objective ---------------------------------------------------------------------------------------------

    def draw(self, generator):
        """All that is random in the loss of one clip; the trainer seeds it by step and clip."""
        c = self.config
        t = torch.rand((), generator=generator)
        if c.t_sampling == "logit-normal":
            t = torch.sigmoid(torch.randn((), generator=generator))
        return {"t": t, "X_0": torch.randn(c.channels, c.T_f, c.H, c.W, generator=generator),
                "keep": torch.rand((), generator=generator) >= c.p_drop}

    def forward(self, latents, actions, draws):
        """Eq. 3: E || u_theta(X_t, P, t) - V_t ||^2, latents (B, C, T, H, W) as the tokenizer makes them.
        -> (sum over clips of the mean square, number of clips): the mean is taken by the caller."""
        c = self.config
        v_p, X_1 = self.standardise(latents).split([c.T_p, c.T_f], dim=2)
        X_t = interpolate(draws["X_0"], X_1, draws["t"], c.sigma_min)
        V_t = target_velocity(draws["X_0"], X_1, c.sigma_min)
        u = self.velocity(X_t, draws["t"], v_p, actions, **self.kept(draws["keep"]))
        error = (u.float() - V_t).square().flatten(1).mean(1)
        return error.sum(), torch.tensor(len(error), device=error.device)

    def kept(self, keep):
        """keep (B,) False where conditions are dropped -> which of them, by config.drop."""
        which = self.config.drop
        return {"keep_past": keep if which in ("past", "both") else None,
                "keep_actions": keep if which in ("actions", "both") else None}

    # ---- the sampler -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, latents_p, actions, steps=50, cfg=1.0, method="euler", generator=None, trace=None):
        """Dreams the future latents (B, C, T_f, H, W) of the past ones (B, C, T_p, H, W); the number of actions
        (B, F, A) says how many. Euler from noise to data; classifier-free guidance goes from what the model expects
        without conditions towards, and for cfg > 1 beyond, what it expects with them: u_0 + cfg (u - u_0).
        trace: a list that receives the noise, and the latents after every step."""
        c, (B, C, T_p, H, W) = self.config, latents_p.shape
        T_f = (actions.shape[1] - 1) // c.temporal + 1 - T_p
        v_p = self.standardise(latents_p)
        X_0 = torch.randn(B, C, T_f, H, W, generator=generator).to(v_p)
        keep = torch.arange(2 * B, device=v_p.device) < B  # conditional half, unconditional half

        def guided(X, t):
            t = torch.full((1,), t, device=X.device)
            if cfg == 1:
                return self.velocity(X, t, v_p, actions).float()
            two = lambda x: torch.cat([x, x])
            u, u_0 = self.velocity(two(X), t, two(v_p), two(actions), **self.kept(keep)).float().chunk(2)
            return u_0 + cfg * (u - u_0)

        X_1 = integrate(guided, X_0, steps, method, trace)
        if trace is not None:
            trace[:] = [self.unstandardise(X) for X in trace]
        return self.unstandardise(X_1)


KIND = "continuous"
SAMPLING = {"paper": dict(steps=50, cfg=3.0), "tiny": dict(steps=5, cfg=2.0)}
TRAINING = {"paper": dict(steps=150_000, batch=128, lr=1e-4, warmup=0, decay="cosine", micro=32),
            "tiny": dict(steps=2000, batch=8, lr=2e-3, warmup=50, decay="cosine", micro=8)}
Model, Config = FlowHWM, FlowConfig


def main():
    """One step on a toy batch, with the shape of everything on the way."""
    torch.manual_seed(0)
    model, B = FlowHWM(FlowConfig(n_layer=2, n_head=4, width=64, hidden=256, H=8, W=8)), 2
    latents, actions = torch.randn(B, 16, 3, 8, 8), torch.randn(B, sum(model.layout.lengths[2:]), 25)
    show = lambda what, x: print(f"{what:58s} {tuple(x.shape) if hasattr(x, 'shape') else x}")
    show("latents of a clip, 2 past + 1 future latent frames", latents)
    show("actions, 9 past + 8 future frames", actions)
    drawn = [model.draw(torch.Generator().manual_seed(i)) for i in range(B)]
    draws = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
    show("drawn for the loss", ", ".join(f"{k} {tuple(v.shape)}" for k, v in draws.items()))
    v_p, X_1 = latents.split([2, 1], dim=2)
    X_t = interpolate(draws["X_0"], X_1, draws["t"], model.config.sigma_min)
    show("X_t between noise and data (Eq. 1)", X_t)
    show("V_t, what the network shall say there (Eq. 2)", target_velocity(draws["X_0"], X_1, model.config.sigma_min))
    show("streams v_p, v_f, a_p, a_f, in tokens", model.layout.lengths)
    x = torch.cat([model.embed_p(model.patchify(v_p)), model.embed_f(model.patchify(X_t)),
                   model.embed_action(actions)], dim=1)
    show("embedded tokens, one tensor (B, N, D)", x)
    time = model.embed_time(time_embedding(draws["t"], model.config.time_width))
    show("time embedding, which modulates every block", time)
    show("after one block (modulated attention, modulated MLP)",
         model.blocks[0](x, time, model.layout, model.rope(model.layout, x.device)))
    show("velocity u(X_t, P, t)", model.velocity(X_t, draws["t"], v_p, actions))
    total, count = model(latents, actions, draws)
    show("loss: mean square of u - V_t (Eq. 3)", f"{total.item() / count.item():.3f}")
    trace = []
    model.sample(latents[:, :, :2], actions, steps=4, cfg=3.0, trace=trace)
    show("sampled future latents, guided, 4 Euler steps", trace[-1])


if __name__ == "__main__":
    main()
