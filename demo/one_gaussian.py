"""PRDP on one Gaussian, whose optimum is known. It uses the losses of prdp.py and takes seconds.

    python -m demo.one_gaussian        # writes demo/one-gaussian.png; needs no weights

The pretrained model is N(0, 1). The reward is -(x - 2)^2 / 2, beta is 1, and the policy is a
Gaussian whose mean and variance learn. The optimum pi_ref exp(r / beta) / Z is N(1, 1/2).
The picture shows, from left to right:

1. The densities. PRDP ends on the optimum. DDPO moves on to the highest reward.
2. PRDP's predictions. Each dot is a pair (a, b) of 24 samples. PRDP predicts its reward difference
   as beta * (r_hat(a) - r_hat(b)), with r_hat = log pi_theta - log pi_ref. The predictions begin
   at 0 and turn onto the diagonal, where the loss is 0.
3. The KL to the pretrained model. PRDP stays at the optimum's 0.6 nats: every pair's error is 0
   there, so every gradient is 0. DDPO's loss has no KL, so DDPO passes the optimum and goes on.

Stopped at the right epoch, DDPO would be about as good here: its KL to the optimum is then at most
0.01 nats (seeds 0 to 6). The third panel marks this epoch. Both methods have the same settings.

Not shown: that PRDP is more stable than DDPO on many prompts, which the paper claims. A diffusion
model's T Gaussian steps have fixed variances, so in general they only come near its optimum.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import prdp

EPOCHS, K, B, BETA = 300, 4, 16, 1.0  # an epoch has B samples and K updates, each on all of them
CLIP_RANGE = 0.02  # PRDP clips a log ratio in nats, DDPO a likelihood ratio around 1
PRETRAINED, OPTIMUM = Normal(0.0, 1.0), Normal(1.0, 0.5**0.5)


def reward(x: Tensor) -> Tensor:
    return -((x - 2) ** 2) / 2


def log_probs(policy: Normal, x: Tensor) -> Tensor:
    """log policy(x), (B,) -> (1, B, 1): of one prompt, B samples and one step."""
    return prdp.gaussian_log_prob(x.view(-1, 1, 1, 1), policy.mean, policy.stddev).view(1, -1, 1)


def train(objective: str) -> list[Normal]:
    """Algorithm 1 for "prdp" or "ddpo". Returns the policy after 0, 1, ..., EPOCHS epochs."""
    mean, log_std = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_std], lr=0.005)
    policies = [Normal(mean.detach().clone(), log_std.detach().exp())]
    for _ in range(EPOCHS):
        x = policies[-1].sample((B,))
        rewards = reward(x)[None]  # (1, B)
        old, ref = log_probs(policies[-1], x), log_probs(PRETRAINED, x)  # (1, B, 1)
        advantages = prdp.ddpo_advantages(rewards, ["the only prompt"], {}, 0)  # (1, B)
        for _ in range(K):
            now = log_probs(Normal(mean, log_std.exp()), x)  # (1, B, 1)
            if objective == "prdp":
                loss = prdp.prdp_loss(now, old, ref, rewards, CLIP_RANGE, BETA)
            else:
                loss = prdp.ppo_loss(now, old, advantages, CLIP_RANGE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        policies.append(Normal(mean.detach().clone(), log_std.detach().exp()))
    return policies


def draw_densities(axes: Axes, policies: dict[str, list[Normal]]) -> None:
    x = torch.linspace(-3.5, 3.5, 701)
    for policy, style in ((PRETRAINED, "0.6"), (policies["prdp"][-1], "C0"),
                          (policies["ddpo"][100], "C1")):
        axes.plot(x, policy.log_prob(x).exp(), style, linewidth=4)
    axes.plot(x, OPTIMUM.log_prob(x).exp(), "k--")
    axes.text(-0.95, 0.3, "pretrained", color="0.45", ha="right")
    axes.text(0.2, 0.53, f"PRDP after\n{EPOCHS} epochs:\nthe optimum\n(dashed)", color="C0",
              ha="right")
    axes.text(1.3, 0.93, "DDPO after\n100 epochs", color="C1", ha="right")
    axes.set(title="PRDP ends on the optimum", xlabel="x (its reward is highest at 2)",
             ylabel="density", ylim=0, yticks=[])


def draw_pairs(axes: Axes, policies: dict[str, list[Normal]]) -> None:
    x = PRETRAINED.sample((24,))
    true = prdp.pair_differences(reward(x)).flatten()
    for epoch, colour in (0, "0.6"), (30, "skyblue"), (EPOCHS, "C0"):
        r_hat = policies["prdp"][epoch].log_prob(x) - PRETRAINED.log_prob(x)
        axes.plot(true, BETA * prdp.pair_differences(r_hat).flatten(), ".", color=colour,
                  markersize=4, label=f"PRDP, {epoch} epochs")
    axes.axline((0, 0), slope=1, color="k", linestyle="--", label="optimum")
    axes.legend(frameon=False, handlelength=1.2, labelspacing=0.2, markerscale=2)
    axes.set(title="It fits reward differences", xlabel="true: r(a) - r(b)",
             ylabel="predicted from log-probs")


def draw_kls(axes: Axes, policies: dict[str, list[Normal]]) -> None:
    for objective, colour in ("prdp", "C0"), ("ddpo", "C1"):
        axes.plot([kl_divergence(policy, PRETRAINED) for policy in policies[objective]], colour,
                  linewidth=4)
    axes.axhline(kl_divergence(OPTIMUM, PRETRAINED), color="k", linestyle="--")
    axes.text(290, 0.75, "PRDP", color="C0", ha="right")
    axes.text(290, 0.12, "optimum of reward - KL", fontsize=9, ha="right")
    axes.text(150, 4.0, "DDPO", color="C1", ha="right")
    best = min(range(EPOCHS), key=lambda epoch: kl_divergence(policies["ddpo"][epoch], OPTIMUM))
    axes.annotate(f"DDPO is nearest\nto the optimum\nat epoch {best}",
                  (best, kl_divergence(policies["ddpo"][best], PRETRAINED)), (130, 1.2),
                  color="C1", arrowprops=dict(arrowstyle="->", color="C1"))
    axes.set(title="PRDP stays, DDPO does not", xlabel="epoch", xlim=(0, EPOCHS), ylim=0,
             ylabel="KL to pretrained (nats)")


if __name__ == "__main__":
    torch.manual_seed(0)
    policies = {objective: train(objective) for objective in ("prdp", "ddpo")}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (draw_densities, draw_pairs, draw_kls),
                          strict=True):
        draw(axes, policies)
    figure.savefig(Path(__file__).with_name("one-gaussian.png"), dpi=200)
