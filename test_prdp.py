"""PRDP against closed forms, plain loops, torch.distributions, diffusers and plain autograd."""

import ast
import copy
import gc
import importlib
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here must be missed at once
import open_clip
import pyarrow.parquet
import safetensors.torch
import torch
import torchvision
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
)

import prdp
import prompts.sets
from prdp import Config, Policy
from rewards import Reward, load_reward

with warnings.catch_warnings():  # the mark is registered nowhere: it would take a file of its own
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
ROOT = Path(__file__).parent
CPU = torch.device("cpu")
SD_SCHEDULE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
DEMO = [
    "--preset",
    "demo",
    "--prompts_per_epoch",
    "2",
    "--images_per_prompt",
    "4",
    "--num_steps",
    "4",
    "--micro_batch_size",
    "5",
]


@pytest.fixture(autouse=True)
def in_the_repository(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    if request.node.get_closest_marker("slow") and "slow" not in request.config.option.markexpr:
        pytest.skip("pytest -m slow")


@pytest.fixture
def demo_models():
    return prdp.load_models(prdp.parse_config(DEMO), CPU)


def ddim(num_steps: int, **options) -> DDIMScheduler:
    scheduler = DDIMScheduler(**SD_SCHEDULE, **options)
    scheduler.set_timesteps(num_steps)
    return scheduler


# ---------------------------------------------------------------------------- zero at the optimum


def test_loss_is_zero_at_the_optimum_of_a_discrete_chain_and_positive_elsewhere():
    """All 3^4 trajectories of a Markov chain over 3 states; pi* = pi_ref exp(r / beta) / Z."""
    torch.manual_seed(0)
    T, beta = 4, 0.7
    chains = torch.tensor(list(itertools.product(range(3), repeat=T)))  # (81, T)
    transitions = torch.randn(T, 3, 3, dtype=torch.float64).log_softmax(-1)
    previous = torch.cat([torch.zeros(81, 1, dtype=torch.long), chains[:, :-1]], 1)
    log_ref = transitions[torch.arange(T), previous, chains]  # (81, T)
    rewards = torch.randn(81, dtype=torch.float64)

    optimum = (log_ref.sum(1) + rewards / beta).log_softmax(0)  # joint over trajectories
    prefix = [torch.zeros(81, dtype=torch.float64)]  # log-probability of the first t states
    for t in range(1, T + 1):
        same = (chains[:, None, :t] == chains[None, :, :t]).all(-1)
        prefix.append(optimum.expand(81, 81).masked_fill(~same, -math.inf).logsumexp(1))
    log_optimum = torch.stack(prefix, 1).diff(dim=1)  # (81, T), its conditionals

    # The loss takes the mean over T, so a KL weight of beta nats is kl_weight = beta * T.
    at_optimum = prdp.prdp_loss(log_optimum, log_optimum, log_ref, rewards, 1e-4, beta * T)
    assert at_optimum.item() < 1e-25
    for _ in range(10):
        other = (transitions + 0.1 * torch.randn_like(transitions)).log_softmax(-1)
        log_other = other[torch.arange(T), previous, chains]
        assert prdp.prdp_loss(log_other, log_other, log_ref, rewards, 1e-4, beta * T) > 1e-4


class LinearUNet(torch.nn.Module):
    """noise_pred = slope_i * x + bias_i at step i: every chain it makes is Gaussian."""

    def __init__(self, scheduler: DDIMScheduler, shape: tuple[int, ...]):
        super().__init__()
        self.timesteps = scheduler.timesteps
        slopes = torch.linspace(0.8, 0.3, len(scheduler.timesteps))
        self.register_buffer("slopes", slopes.view(-1, 1, 1, 1))
        self.bias = torch.nn.Parameter(torch.zeros(len(slopes), *shape))
        at_0, at_1 = (self.step(scheduler, 0, torch.full((1, 1, 1, 1), x)) for x in (0.0, 1.0))
        per_noise = (self.step(scheduler, 0, torch.zeros(1, 1, 1, 1), 1.0) - at_0).item()
        slopes[0] -= (at_1 - at_0).item() / per_noise  # the first step forgets x_T

    def step(self, scheduler, i, x, extra_noise=0.0):
        noise_pred = self.slopes[i] * x + extra_noise
        return prdp.ddim_mean_std(scheduler, noise_pred, x, self.timesteps[i].view(1))[0]

    def forward(self, latents, timesteps, prompt_embeds):
        steps = (self.timesteps == timesteps.view(-1, 1)).nonzero()[:, 1]
        return SimpleNamespace(sample=self.slopes[steps] * latents + self.bias[steps])


class GaussianToy:
    """A Gaussian chain with the linear reward w . x_0, whose optimum is known in closed form."""

    def __init__(self, beta: float):
        torch.manual_seed(0)
        self.latent_shape, self.num_steps = (1, 2, 3), 5
        self.direction = torch.randn(self.latent_shape)
        scheduler = ddim(self.num_steps)
        self.reference = Policy(
            LinearUNet(scheduler, self.latent_shape), scheduler, torch.empty(0), 1.0
        )
        self.policy = Policy(
            LinearUNet(scheduler, self.latent_shape), scheduler, torch.empty(0), 1.0
        )
        self.reference.unet.requires_grad_(False)
        self.reward = Reward({"linear": lambda images, prompts: images}, {"linear": 1.0})
        self.reward.terms = lambda images, prompts: {"linear": images}
        # Tilting by exp(w . x_0 / beta) moves a mean by variance * d log E[exp] / d x_{t-1},
        # and E[x_0 | x_{t-1}] is linear in x_{t-1}, with the product of the later steps' slopes.
        slopes, per_noise, variances = [], [], []
        unet = self.reference.unet
        for i, t in enumerate(scheduler.timesteps):
            zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
            base = unet.step(scheduler, i, zero)
            slopes.append((unet.step(scheduler, i, one) - base).item())
            per_noise.append((unet.step(scheduler, i, zero, 1.0) - base).item())
            variances.append(prdp.ddim_mean_std(scheduler, zero, zero, t.view(1))[1].item() ** 2)
        self.optimal_bias = torch.stack(
            [
                variances[i] * math.prod(slopes[i + 1 :]) * self.direction / beta / per_noise[i]
                for i in range(self.num_steps)
            ]
        )
        # Log-probs are means over elements and steps, so in nats beta = kl_weight / (T * D).
        self.kl_weight = beta * self.num_steps * self.direction.numel()

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def decode(self, latents):
        return (latents * self.direction).sum((1, 2, 3))

    def config(self, **options):
        return Config(
            num_steps=self.num_steps,
            kl_weight=self.kl_weight,
            prompts_per_epoch=2,
            images_per_prompt=16,
            micro_batch_size=256,
            weight_decay=0,
            **options,
        )


def test_loss_is_zero_at_the_optimum_of_a_gaussian_chain():
    toy = GaussianToy(beta=0.8)
    config = toy.config(clip_range=1e-3)
    toy.policy.unet.bias.data = toy.optimal_bias
    trajectories = prdp.collect_epoch(config, toy, ["x"], 0, {})
    at_optimum = prdp.objective_loss(config, trajectories.log_probs_old, trajectories).item()
    at_reference = prdp.objective_loss(config, trajectories.log_probs_ref, trajectories).item()
    assert at_optimum < 1e-9 * at_reference

    for scale in (0.0, 0.9, 1.1):
        toy.policy.unet.bias.data = scale * toy.optimal_bias
        trajectories = prdp.collect_epoch(config, toy, ["x"], 0, {})
        assert (
            prdp.objective_loss(config, trajectories.log_probs_old, trajectories)
            > 1e-3 * at_reference
        )


@pytest.mark.parametrize("clip_range, updates", [(math.inf, 1), (1e-1, 4)])
def test_the_online_loop_trains_a_policy_to_the_closed_form_optimum(clip_range, updates):
    toy = GaussianToy(beta=0.8)
    config = toy.config(clip_range=clip_range, updates_per_epoch=updates, max_grad_norm=1e9)
    optimizer = torch.optim.Adam(toy.policy.unet.parameters(), 0.03)
    start = (toy.policy.unet.bias - toy.optimal_bias).norm()
    for epoch in range(300 // updates):
        trajectories = prdp.collect_epoch(config, toy, ["x"], epoch, {})
        prdp.update_policy(config, toy.policy, optimizer, trajectories)
    assert (toy.policy.unet.bias - toy.optimal_bias).norm() < 0.01 * start


# ------------------------------------------------------------------------------------ the objective


def plain_loop_loss(log_probs, old, ref, rewards, clip_range, kl_weight):
    """Appendix G for one prompt, pair by pair in Python floats; returns (loss, plain loss)."""

    def predicted(image, clipped):
        terms = []
        for t in range(len(log_probs[image])):
            term = log_probs[image][t] - ref[image][t]
            if clipped:
                centre = old[image][t] - ref[image][t]
                term = min(max(term, centre - clip_range), centre + clip_range)
            terms.append(term)
        return sum(terms) / len(terms)

    losses, plain = [], []
    for a, b in itertools.combinations(range(len(rewards)), 2):
        if rewards[a] != rewards[b]:
            target = (rewards[a] - rewards[b]) / kl_weight
            errors = [(predicted(a, c) - predicted(b, c) - target) ** 2 for c in (False, True)]
            losses.append(max(errors))
            plain.append(errors[0])
    return (sum(losses) / len(losses), sum(plain) / len(plain)) if losses else (0.0, 0.0)


@st.composite
def loss_inputs(draw):
    N, B, T = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    old, ref, moved = torch.randn(3, N, B, T, generator=generator, dtype=torch.float64)
    log_probs = old + draw(st.sampled_from([0.0, 1e-3, 1.0])) * moved
    levels = draw(st.sampled_from([1, 2, 1000]))  # one level: all rewards tie
    rewards = torch.randint(levels, (N, B), generator=generator).double() / levels
    clip_range = draw(st.sampled_from([0.0, 1e-3, 0.5, math.inf]))
    return log_probs, old, ref, rewards, clip_range, draw(st.sampled_from([0.01, 1.0]))


@settings(deadline=None, max_examples=200)
@given(loss_inputs())
def test_loss_equals_a_plain_loop_over_pairs(inputs):
    *tensors, clip_range, kl_weight = inputs
    prompts = [[x.tolist() for x in prompt] for prompt in zip(*tensors, strict=True)]
    expected = [plain_loop_loss(*prompt, clip_range, kl_weight) for prompt in prompts]
    loss = prdp.prdp_loss(*inputs).item()
    assert loss == pytest.approx(sum(e[0] for e in expected) / len(expected), rel=1e-9, abs=1e-12)
    assert loss >= sum(e[1] for e in expected) / len(expected) * (1 - 1e-12)
    one_by_one = [
        prdp.prdp_loss(*prompt, clip_range, kl_weight) for prompt in zip(*tensors, strict=True)
    ]
    assert loss == pytest.approx(torch.stack(one_by_one).mean().item(), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(loss_inputs(), st.randoms())
def test_loss_ignores_a_prompts_reward_offset_and_the_order_of_its_images(inputs, rng):
    log_probs, old, ref, rewards, clip_range, kl_weight = inputs
    loss = prdp.prdp_loss(*inputs)
    offsets = torch.tensor([[rng.choice([-4.0, 0.5, 8.0])] for _ in rewards], dtype=torch.float64)
    shifted = prdp.prdp_loss(log_probs, old, ref, (rewards + offsets), clip_range, kl_weight)
    assume((prdp.pair_differences(rewards + offsets) > 0).equal(prdp.pair_differences(rewards) > 0))
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)
    order = rng.sample(range(rewards.shape[1]), rewards.shape[1])
    permuted = prdp.prdp_loss(
        *(x[:, order] for x in (log_probs, old, ref, rewards)), clip_range, kl_weight
    )
    torch.testing.assert_close(permuted, loss)


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [0.3]])
def test_without_a_pair_loss_and_gradient_are_zero(rewards):
    log_probs = torch.randn(len(rewards), 4, dtype=torch.float64, requires_grad=True)
    loss = prdp.prdp_loss(
        log_probs,
        log_probs.detach(),
        torch.randn(len(rewards), 4).double(),
        torch.tensor(rewards),
        1e-6,
        1e-5,
    )
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_clipped_entries_have_exactly_no_gradient():
    old = torch.zeros(2, 3, dtype=torch.float64)
    # The better image's steps rose towards the target, the first two beyond the clip range.
    log_probs = torch.tensor([[0.2, 0.3, 0.05], [0.0, 0.0, 0.0]]).double().requires_grad_()
    loss = prdp.prdp_loss(log_probs, old, old, torch.tensor([1.0, 0.0]), 0.1, 1.0)
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert (grad[0, :2] == 0).all() and (grad[0, 2] < 0) and (grad[1] > 0).all()


def test_ddpo_loss_is_ppo_on_every_step():
    torch.manual_seed(0)
    old, advantages = torch.randn(2, 3, 4).double(), torch.randn(2, 3).double()
    log_probs = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    expected = []
    for n, b, t in itertools.product(range(2), range(3), range(4)):
        ratio = math.exp(log_probs[n, b, t].item() - old[n, b, t].item())
        gain = advantages[n, b].item()
        expected.append(-min(ratio * gain, min(max(ratio, 0.9), 1.1) * gain))
    loss = prdp.ddpo_loss(log_probs, old, advantages, 0.1)
    assert loss.item() == pytest.approx(sum(expected) / len(expected))
    (grad,) = torch.autograd.grad(
        prdp.ddpo_loss(old.requires_grad_(), old.detach(), advantages, 0.1), old
    )
    torch.testing.assert_close(grad, -advantages[..., None].expand_as(grad) / grad.numel())


# ------------------------------------------------------------------------------- the policy's step


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [50, 30])
def test_every_step_equals_diffusers_ddim_with_eta_1(prediction_type, num_steps):
    torch.manual_seed(0)
    scheduler = ddim(num_steps, prediction_type=prediction_type)
    latents, prediction, noise = torch.randn(3, num_steps, 4, 8, 8, dtype=torch.float64)
    mean, std = prdp.ddim_mean_std(
        scheduler, prediction, latents, scheduler.timesteps
    )  # mixed steps
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(
            prediction[i], t, latents[i], eta=1.0, variance_noise=noise[i]
        ).prev_sample
        torch.testing.assert_close((mean + std * noise)[i], expected, rtol=1e-6, atol=1e-6)
    assert std.shape == (num_steps, 1, 1, 1) and std.min() > 0.02


def test_log_prob_equals_torch_distributions_and_resolves_1e_7_nats():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 5, 4, 8, 8)
    std = torch.rand(5, 1, 1, 1) + 0.02
    expected = (
        torch.distributions.Normal(mean.double(), std.double()).log_prob(x.double()).mean((1, 2, 3))
    )
    log_prob = prdp.gaussian_log_prob(x, mean, std)
    assert log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)

    gradient = (-(x - mean).double() / std.double() ** 2 / x[0].numel())[0]
    step = 1e-7 / gradient.square().sum() * gradient  # to first order it adds 1e-7 nats
    moved = prdp.gaussian_log_prob(x[:1].double() + step, mean[:1], std[:1])
    assert (moved - log_prob[:1]).item() == pytest.approx(1e-7, rel=1e-3)


def test_guidance_is_linear_between_the_two_predictions(demo_models):
    unet, negative = demo_models.reference.unet, demo_models.reference.negative_embeds
    latents, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    embeds = demo_models.encode_prompts(["A painting of a cat", "A painting of a bat", "a"])
    with torch.no_grad():
        unconditional = unet(latents, t, negative.expand(3, -1, -1)).sample
        conditional = unet(latents, t, embeds).sample
        for scale in (1, 5):
            guided = prdp.predict_noise(unet, latents, t, embeds, negative, scale)
            expected = unconditional + scale * (conditional - unconditional)
            torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- the online loop


def gradient(config, policy, trajectories, dtype, micro_batch_size=None) -> torch.Tensor:
    """d loss / d weights, by two passes, or without a micro-batch size by plain autograd."""
    policy = replace(
        policy,
        unet=copy.deepcopy(policy.unet).to(dtype),
        negative_embeds=policy.negative_embeds.to(dtype),
    )
    embeds, latents = trajectories.prompt_embeds.to(dtype), trajectories.latents.to(dtype)
    trajectories = replace(trajectories, prompt_embeds=embeds, latents=latents)
    if micro_batch_size is None:
        steps = []
        for i, t in enumerate(policy.scheduler.timesteps):
            mean, std = policy.mean_std(latents[:, i], t.expand(len(latents)), embeds)
            steps.append(prdp.gaussian_log_prob(latents[:, i + 1], mean, std))
        log_probs = torch.stack(steps, 1).view_as(trajectories.log_probs_old)
        prdp.objective_loss(config, log_probs, trajectories).backward()
    else:
        log_probs = prdp.trajectory_log_probs(policy, embeds, latents, micro_batch_size)
        log_probs = log_probs.view_as(trajectories.log_probs_old).requires_grad_()
        loss = prdp.objective_loss(config, log_probs, trajectories)
        (grad,) = torch.autograd.grad(loss, log_probs)
        assert (0 < (grad == 0).sum() < grad.numel()) == math.isfinite(config.clip_range)
        prdp.backward_log_probs(policy, trajectories, grad.flatten(0, 1), micro_batch_size)
    return torch.cat([parameter.grad.flatten() for parameter in policy.unet.parameters()]).double()


@pytest.mark.parametrize(
    "objective, clip_range", [("prdp", math.inf), ("prdp", 2e-3), ("ddpo", 2e-3)]
)
def test_two_pass_gradient_equals_plain_autograd(demo_models, objective, clip_range):
    """Through all T steps and all pairs at once, with guidance, at a policy that has moved."""
    config = Config(
        **prdp.PRESETS["demo"]
        | dict(
            objective=objective,
            clip_range=clip_range,
            num_steps=4,
            prompts_per_epoch=2,
            images_per_prompt=3,
        )
    )
    prompts = ["A painting of a cat", "A painting of a bat"]
    trajectories = prdp.collect_epoch(config, demo_models, prompts, 0, {})
    trajectories.rewards = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.9]])
    torch.manual_seed(1)
    for parameter in demo_models.policy.unet.parameters():
        parameter.data += 2e-4 * torch.randn_like(parameter)

    def error(dtype, micro_batch_size=None):
        actual = gradient(config, demo_models.policy, trajectories, dtype, micro_batch_size)
        return (actual - exact).norm() / exact.norm()

    exact = gradient(config, demo_models.policy, trajectories, torch.float64)
    for micro_batch_size in (1, 7, 100):
        assert error(torch.float64, micro_batch_size) < 1e-12
    # In float32 plain autograd itself is 2e-5 off the exact gradient; two passes add nothing.
    assert error(torch.float32, 7) < 1.2 * error(torch.float32) + 1e-6 < 1e-4


def test_before_the_first_update_of_every_epoch_the_policy_is_exactly_the_old_one(
    tmp_path, monkeypatch
):
    differences, update_policy = [], prdp.update_policy

    def checked(config, policy, optimizer, trajectories):
        log_probs = prdp.trajectory_log_probs(
            policy, trajectories.prompt_embeds, trajectories.latents, config.micro_batch_size
        )
        differences.append(
            (log_probs.view_as(trajectories.log_probs_old) - trajectories.log_probs_old).abs().max()
        )
        return update_policy(config, policy, optimizer, trajectories)

    monkeypatch.setattr(prdp, "update_policy", checked)
    train(tmp_path / "run", "--num_epochs", "3", "--updates_per_epoch", "2")
    assert len(differences) == 3 and max(differences) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["kl"] == 0 and metrics[2]["kl"] != 0  # the weights did move


def demo_flags(run: Path, *flags: str) -> list[str]:
    """The demo with two prompts, small enough for a test."""
    prompts = run.parent / "two.txt"
    prompts.write_text("A painting of a cat\nA painting of a bat\n")
    return [*DEMO, "--prompts", str(prompts), "--run_dir", str(run), *flags]


def train(run: Path, *flags: str) -> None:
    prdp.train(prdp.parse_config(demo_flags(run, *flags)), CPU)


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_measurements(metrics: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds") and k != "peak_gib"}
        for line in metrics
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(run / "unet").state_dict()


def test_a_stopped_run_continues_to_the_bit_identical_end(tmp_path):
    train(tmp_path / "whole", "--num_epochs", "2", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "1", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "2", "--updates_per_epoch", "2")
    whole, stopped = (
        without_measurements(read_metrics(tmp_path / run)) for run in ("whole", "stopped")
    )
    assert whole == stopped and [line["epoch"] for line in whole] == [1, 2]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[name])
    for file in (
        "config.json",
        "metrics.jsonl",
        "reward.png",
        "samples/epoch_0000.png",
        "samples/epoch_0002.png",
        "checkpoints/epoch_000002.pt",
    ):
        assert (tmp_path / "whole" / file).stat().st_size > 0
    assert not list((tmp_path / "whole").rglob("*.tmp"))


def test_equal_rewards_leave_the_weights_as_they_are(tmp_path):
    constant = tmp_path / "constant.py"
    constant.write_text("def one(images, prompts):\n    return images.new_ones(len(images))\n")
    train(tmp_path / "run", "--num_epochs", "1", "--reward", f"{constant}:one")
    base = prdp.load_pipeline("demo/model").unet.state_dict()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, base[name])
    assert read_metrics(tmp_path / "run")[0]["loss"] == 0


@pytest.mark.parametrize("flags", [["--offline"], ["--objective", "ddpo"], ["--clip_range", "inf"]])
def test_each_of_the_papers_comparisons_is_one_flag(tmp_path, flags):
    train(tmp_path / "run", "--num_epochs", "2", *flags)
    metrics = read_metrics(tmp_path / "run")
    assert (metrics[0]["reward_mean"] == metrics[1]["reward_mean"]) == (flags == ["--offline"])
    assert (metrics[1]["kl"] is None) == ("inf" not in flags)


def save_pipeline(folder: Path, unet: dict, text: dict, vae: dict | None = None, **schedule):
    """A Stable Diffusion of the given shapes with random weights, the rest from the demo's."""
    demo = prdp.load_pipeline("demo/model")
    demo.tokenizer.model_max_length = text["max_position_embeddings"]
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**vae) if vae else demo.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=demo.tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(**SD_SCHEDULE, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def test_a_model_built_like_stable_diffusion_2_trains_and_scores_like_its_sampler(tmp_path):
    """v prediction, a wide text encoder with gelu, linear projections, heads of equal width."""
    unet = dict(
        sample_size=6,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    text = dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=16,
    )
    save_pipeline(tmp_path / "v2", unet, text, prediction_type="v_prediction")
    run = tmp_path / "run"
    train(run, "--num_epochs", "1", "--model", str(tmp_path / "v2"), "--gradient_checkpointing")
    metrics = read_metrics(run)[0]
    assert metrics["kl"] == 0 and metrics["grad_norm"] > 0
    before = UNet2DConditionModel.from_pretrained(tmp_path / "v2/unet").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in weights(run).items())
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_schedule_without_an_offset_still_has_a_deviation_at_its_last_step(tmp_path):
    shutil.copytree("demo/model", tmp_path / "model")
    file = tmp_path / "model/scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    del config["steps_offset"]
    file.write_text(json.dumps(config))
    policy = prdp.load_models(prdp.parse_config([*DEMO, "--model", str(file.parent.parent)]), CPU)
    assert policy.policy.scheduler.timesteps[-1] == 1


def test_a_copy_that_holds_only_half_precision_files_loads_in_float32(tmp_path):
    pipeline = prdp.load_pipeline("demo/model")
    expected = {k: v.half().float() for k, v in pipeline.unet.state_dict().items()}
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half/unet").glob("diffusion_pytorch_model.safetensors"))
    loaded = prdp.load_pipeline(str(tmp_path / "half")).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_diffusers_own_pipeline_draws_the_same_images_with_a_runs_unet(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1", "--learning_rate", "1e-3")
    config = prdp.parse_config(["--evaluate", str(tmp_path / "run"), "--num_steps", "6"])
    models = prdp.load_models(config, CPU, tmp_path / "run")
    prompt, (C, H, W) = "A painting of a cat", models.latent_shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(1, C, H, W, generator=generator) for _ in range(7)])[None]
    embeds = models.encode_prompts([prompt])
    latents, _ = prdp.sample_trajectories(models.policy, embeds, noise, 1)
    ours = models.decode(latents[:, -1])

    pipeline = StableDiffusionPipeline.from_pretrained(
        "demo/model",
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "run/unet"),
        safety_checker=None,
    )
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    generator.manual_seed(0)  # which draws x_T, and then every step's noise
    theirs = pipeline(
        prompt,
        num_inference_steps=6,
        guidance_scale=config.guidance_scale,
        eta=1.0,
        generator=generator,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    train(tmp_path / "plain", "--num_epochs", "1")
    train(tmp_path / "checkpointing", "--num_epochs", "1", "--gradient_checkpointing")
    plain, checkpointing = weights(tmp_path / "plain"), weights(tmp_path / "checkpointing")
    assert all(torch.equal(checkpointing[name], value) for name, value in plain.items())


def test_lora_learns_in_adapters_alone_and_its_reference_is_the_untouched_model(tmp_path):
    flags = ["--lora_rank", "2", "--learning_rate", "1e-2", "--updates_per_epoch", "2"]
    train(tmp_path / "whole", "--num_epochs", "2", *flags)
    train(tmp_path / "run", "--num_epochs", "1", *flags)
    train(tmp_path / "run", "--num_epochs", "2", *flags)
    whole, stopped = (without_measurements(read_metrics(tmp_path / r)) for r in ("whole", "run"))
    assert whole == stopped and stopped[0]["kl"] == 0 != stopped[1]["kl"]
    adapters = "lora/pytorch_lora_weights.safetensors"
    assert (tmp_path / "whole" / adapters).read_bytes() == (
        tmp_path / "run" / adapters
    ).read_bytes()
    assert (tmp_path / "run/checkpoints/epoch_000002.pt").stat().st_size < 1e6

    config = prdp.parse_config(["--evaluate", str(tmp_path / "run"), "--samples_per_prompt", "2"])
    models = prdp.load_models(config, CPU, tmp_path / "run")
    channels_last = dict(memory_format=torch.channels_last)  # for the same kernels
    untouched = prdp.load_pipeline("demo/model").unet.to(**channels_last)
    untouched = replace(models.policy, unet=untouched)
    embeds = models.encode_prompts(["A painting of a cat", "A painting of a bat"])
    noise = torch.randn(2, config.num_steps + 1, *models.latent_shape)
    latents, log_probs = prdp.sample_trajectories(models.policy, embeds, noise, 5)
    expected = prdp.trajectory_log_probs(untouched, embeds, latents, 5)
    assert torch.equal(prdp.trajectory_log_probs(models.reference, embeds, latents, 5), expected)
    assert torch.equal(prdp.trajectory_log_probs(models.policy, embeds, latents, 5), log_probs)
    assert not torch.isclose(log_probs, expected, atol=1e-5).all()

    pipeline = prdp.load_pipeline("demo/model")
    pipeline.load_lora_weights(tmp_path / "run/lora", weight_name=Path(adapters).name)
    loaded = replace(models.policy, unet=pipeline.unet.to(**channels_last))
    assert torch.equal(prdp.trajectory_log_probs(loaded, embeds, latents, 5), log_probs)
    prdp.evaluate(config, CPU)
    assert (tmp_path / "run/evaluation-two.json").exists()


@slow
def test_a_compiled_policy_scores_what_it_drew_exactly_as_it_drew_it():
    """With a last micro-batch of another size; compiling takes minutes."""
    flags = ["--compile", "--images_per_prompt", "5", "--micro_batch_size", "4"]
    config = prdp.parse_config([*DEMO, *flags])
    models = prdp.load_models(config, CPU)
    optimizer = torch.optim.AdamW(models.policy.trained.values(), 1e-4)
    for epoch in range(2):
        trajectories = prdp.collect_epoch(config, models, ["A painting of a cat"], epoch, {})
        log_probs = prdp.trajectory_log_probs(
            models.policy, trajectories.prompt_embeds, trajectories.latents, 4
        )
        assert torch.equal(
            log_probs.view_as(trajectories.log_probs_old), trajectories.log_probs_old
        )
        prdp.update_policy(config, models.policy, optimizer, trajectories)
    assert (log_probs.view_as(trajectories.log_probs_ref) != trajectories.log_probs_ref).any()


@slow
def test_a_model_of_stable_diffusion_1_4s_size_trains_saves_and_loads(tmp_path):
    """860 million random weights, latents of 16 x 16: 20 GB of memory and of disk, 10 minutes."""
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    text = dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    unet = dict(sample_size=16, cross_attention_dim=768, attention_head_dim=8)
    save_pipeline(tmp_path / "sd", unet, text, vae)
    flags = demo_flags(tmp_path / "run", "--num_epochs", "1", "--model", str(tmp_path / "sd"))
    flags += "--images_per_prompt 2 --num_steps 2 --micro_batch_size 2".split()
    flags += "--reward jpeg_compressibility --learning_rate 1e-5".split()
    for _ in range(2):  # the second finds the checkpoint and only writes unet/ again
        subprocess.run([sys.executable, "prdp.py", *flags], check=True)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["kl"] == 0 and metrics[0]["grad_norm"] > 0
    print(metrics)
    saved = torch.load(tmp_path / "run/checkpoints/epoch_000001.pt", mmap=True)["unet"]
    before = UNet2DConditionModel.from_pretrained(tmp_path / "sd/unet").state_dict()
    assert sum(value.numel() for value in saved.values()) == 859_520_964
    moved = [not torch.equal(value, before[name]) for name, value in saved.items()]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(value, saved[name]) for name, value in weights(tmp_path / "run").items())


def test_a_run_that_goes_on_has_no_finished_weights_until_it_is_finished_again(
    tmp_path, monkeypatch
):
    train(tmp_path / "run", "--num_epochs", "1")
    monkeypatch.setattr(prdp, "collect_epoch", lambda *_: exec("raise ValueError('stop')"))
    with pytest.raises(ValueError, match="stop"):
        train(tmp_path / "run", "--num_epochs", "2", "--gradient_checkpointing")
    for flags, message in (([], "is not finished"), (["--lora_rank", "2"], "must be the run's, 0")):
        with pytest.raises(ValueError, match=message):
            prdp.evaluate(prdp.parse_config(["--evaluate", str(tmp_path / "run"), *flags]), CPU)


def test_evaluate_refuses_prompt_files_whose_results_would_overwrite_each_other(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1")
    prompts = f"{tmp_path}/a/two.txt,{tmp_path}/b/two.txt"
    flags = ["--evaluate", str(tmp_path / "run"), "--prompts", prompts]
    with pytest.raises(ValueError, match="--prompts .*files of one name"):
        prdp.evaluate(prdp.parse_config(flags), CPU)


def test_the_template_belongs_to_the_default_list_even_when_that_is_named():
    for flags, template in (
        ([], "A painting of a {}"),
        (["--prompts", "prompts/animals.txt"], "A painting of a {}"),
        (["--prompts", "prompts/unseen.txt"], "{}"),
        (["--prompts=prompts/unseen.txt", "--prompt_template", "{}, oil"], "{}, oil"),
        (["--preset", "large"], "{}"),
        (["--preset", "large", "--prompts", "prompts/animals.txt"], "A painting of a {}"),
    ):
        assert prdp.parse_config(flags).prompt_template == template


def test_loading_a_model_gives_no_warning():
    with warnings.catch_warnings(action="error"):
        prdp.load_pipeline("demo/model")


def test_evaluate_compares_base_and_finetuned_from_the_same_noise(tmp_path, capsys):
    train(tmp_path / "run", "--num_epochs", "1")
    shutil.rmtree(tmp_path / "run/unet")
    shutil.copytree("demo/model/unet", tmp_path / "run/unet")  # finetuned = base
    flags = [
        "--evaluate",
        str(tmp_path / "run"),
        "--prompts",
        str(tmp_path / "two.txt"),
        "--samples_per_prompt",
        "3",
    ]
    config = prdp.parse_config(flags)
    assert config.prompt_template == "{}" and config.num_steps == 4
    prdp.evaluate(config, CPU)
    result = json.loads((tmp_path / "run/evaluation-two.json").read_text())["results"]["clip"]
    assert result["difference"] == {"mean": 0, "standard_error": 0}
    assert result["base"] == result["finetuned"] and result["base"]["standard_error"] > 0
    assert result["prompts_improved"] == 0
    assert (tmp_path / "run/evaluation-two.png").exists() and "clip" in capsys.readouterr().out
    file = tmp_path / "run/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="--evaluate .*run: its weights cannot be loaded"):
        prdp.evaluate(config, CPU)


# ------------------------------------------------------------ kills, full disks, bad numbers, files


class Killed(BaseException):
    """As SIGKILL is for what is on disk: nothing handles it and nothing cleans up."""


class EightWeights(torch.nn.Linear):
    """In the UNet's place where only files and their order matter."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        safetensors.torch.save_file(self.state_dict(), folder / "weights.safetensors")
        (folder / "config.json").write_text("{}")


@pytest.fixture
def quick_loop(monkeypatch):
    """Training in milliseconds: everything but the updates and the files is left out."""

    def load_models(config, device):
        policy = Policy(EightWeights(4, 2), None, torch.empty(0), 1.0)
        torch.nn.init.constant_(policy.unet.weight, 1.0)
        torch.nn.init.zeros_(policy.unet.bias)
        return SimpleNamespace(policy=policy, pipeline=SimpleNamespace(tokenizer=None))

    def collect_epoch(config, models, prompts, epoch, seconds):
        started.append(epoch)
        return SimpleNamespace(epoch=epoch)

    def update_policy(config, policy, optimizer, trajectories):
        generator = torch.Generator().manual_seed(trajectories.epoch)
        for weight in policy.trained.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        return {"loss": sum(weight.sum().item() for weight in policy.trained.values())}

    started = []
    figure = SimpleNamespace(
        subplots=lambda: SimpleNamespace(plot=lambda *_: None, set=lambda **_: None),
        savefig=lambda file, **_: file.write_bytes(b"a picture"),
    )
    monkeypatch.setattr(prdp, "load_models", load_models)
    monkeypatch.setattr(prdp, "report_long_prompts", lambda *_: None)
    monkeypatch.setattr(prdp, "collect_epoch", collect_epoch)
    monkeypatch.setattr(prdp, "update_policy", update_policy)
    monkeypatch.setattr(
        prdp, "summarise", lambda _, trajectories, updates: {"reward_mean": 0.5, **updates}
    )
    monkeypatch.setattr(prdp, "Figure", lambda **_: figure)
    monkeypatch.setattr(prdp, "save_grid", lambda *given: write_picture(*given[-2:]))

    def write_picture(run, name):
        with run.replacing(name) as file:
            file.write_bytes(b"a picture")

    return started


def ending(run: Path) -> tuple:
    """What a finished run must have in common with one that was never stopped."""
    assert not list(run.rglob("*.tmp"))
    unet = {file.name: file.read_bytes() for file in (run / "unet").iterdir()}
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*"))
    return unet, names, without_measurements(read_metrics(run))


def fail_at(patch: pytest.MonkeyPatch, call: int, fault: str) -> None:
    """The given call of fsync or rename meets a full disk, or the process is killed there."""
    calls = itertools.count()

    def failing(original, path, *arguments):
        if next(calls) != call:
            return original(path, *arguments)
        if fault == "a full disk":
            raise OSError(28, "No space left on device")
        if fault == "a kill after half of a file" and Path(path).is_file():
            os.truncate(path, Path(path).stat().st_size // 2)
        raise Killed

    patch.setattr(prdp, "flush", partial(failing, prdp.flush))
    patch.setattr(prdp.os, "replace", partial(failing, os.replace))


@pytest.mark.parametrize("fault", ["a full disk", "a kill", "a kill after half of a file"])
def test_at_every_fsync_and_rename_a_fault_costs_at_most_the_epoch_in_progress(
    tmp_path, monkeypatch, quick_loop, fault
):
    flags = ["--num_epochs", "3", "--keep_checkpoints", "2"]
    train(tmp_path / "whole", *flags)
    for call in itertools.count():
        run = tmp_path / str(call)
        quick_loop.clear()
        try:
            with monkeypatch.context() as patch:
                fail_at(patch, call, fault)
                train(run, *flags)
            break  # no call was left to fail
        except Killed:
            pass
        except ValueError as error:
            assert "cannot be written (OSError: [Errno 28] No space left" in str(error)
        train(run, *flags)
        assert ending(run) == ending(tmp_path / "whole")
        assert len(quick_loop) <= 3 + 1
    assert call > 40


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: the real writers meet a failing write."""
    train(tmp_path / "whole", "--num_epochs", "2")
    train(tmp_path / "run", "--num_epochs", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="epoch_000002.pt cannot be written .*File too large"):
            train(tmp_path / "run", "--num_epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # the folder's lock is held as long as the error's frames live
    train(tmp_path / "run", "--num_epochs", "2")
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


def test_a_folder_is_refused_while_another_process_is_at_work_on_it(tmp_path):
    config = prdp.parse_config(demo_flags(tmp_path / "run"))
    first, second = prdp.Run(config.run_dir), prdp.Run(config.run_dir)
    first.claim(config)
    with pytest.raises(ValueError, match="--run_dir .*run: another process is at work on it"):
        second.claim(config)
    first.lock.close()
    second.claim(config)
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/run"):
        with pytest.raises(ValueError, match=f"--run_dir .*{folder}: not a folder that can"):
            prdp.Run(str(tmp_path / folder)).claim(config)


def test_a_run_holds_its_folder_until_it_ends(tmp_path, monkeypatch, quick_loop):
    collect_epoch = prdp.collect_epoch

    def refused(config, *rest):
        with pytest.raises(ValueError, match="another process is at work on it"):
            prdp.Run(config.run_dir).claim(config)
        return collect_epoch(config, *rest)

    monkeypatch.setattr(prdp, "collect_epoch", refused)
    train(tmp_path / "run", "--num_epochs", "2")
    assert quick_loop == [0, 1]


def test_finished_weights_appear_whole_or_not_at_all(tmp_path, monkeypatch, quick_loop):
    def killed(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise Killed

    train(tmp_path / "whole", "--num_epochs", "1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(EightWeights, "save_pretrained", killed)
        train(tmp_path / "run", "--num_epochs", "1")
    assert not (tmp_path / "run/unet").exists()
    gc.collect()  # the folder's lock is held as long as the error's frames live
    (tmp_path / "run/unet").symlink_to(tmp_path / "whole/unet")
    train(tmp_path / "run", "--num_epochs", "1")
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path, quick_loop, capsys
):
    run = tmp_path / "run"
    train(tmp_path / "whole", "--num_epochs", "6")
    train(run, "--num_epochs", "5", "--keep_checkpoints", "3")
    saved = sorted((run / "checkpoints").iterdir())
    assert [file.name for file in saved] == [f"epoch_{epoch:06}.pt" for epoch in (3, 4, 5)]
    for file in saved[1:]:
        content = bytearray(file.read_bytes())
        content[content.index(torch.load(file)["unet"]["bias"].numpy().tobytes())] ^= 1
        file.write_bytes(content)
    train(run, "--num_epochs", "4")
    assert re.search(r"passing over .*5.pt.*\npassing over .*4.pt", capsys.readouterr().out)
    train(run, "--num_epochs", "6")
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["epoch_000006.pt"]
    metrics = [without_measurements(read_metrics(folder)) for folder in (run, tmp_path / "whole")]
    assert metrics[0] == metrics[1]


class Trap:
    """A pickle of it, when loaded without care, makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_checkpoint_of_another_network_or_with_code_in_it_is_refused(tmp_path, quick_loop):
    train(tmp_path / "run", "--num_epochs", "1")
    file = tmp_path / "run/checkpoints/epoch_000001.pt"
    state = torch.load(file)
    assert {"config", "epoch", "metrics", "unet", "optimizer"} == state.keys()
    other = {"unet": {"weight": torch.zeros(3, 3)}}
    for change, message in (
        (other, "another network"),
        ({"trap": Trap(tmp_path / "sprung")}, "UnpicklingError"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "parameter groups"),
        ({"unet": None}, "AttributeError"),
        ({"metrics": [{"epoch": 2}]}, "not those of its epochs"),
        ({"metrics": None}, "TypeError"),
        ({"unet": {k: v.to("meta") for k, v in state["unet"].items()}}, "NotImplementedError"),
    ):
        torch.save(state | change, file)
        with pytest.raises(ValueError, match=f"no checkpoint is whole: .*{message}") as error:
            train(tmp_path / "run", "--num_epochs", "2")
        assert "\n" not in str(error.value)
        del error
        gc.collect()
    assert not (tmp_path / "sprung").exists()


def test_a_pipeline_that_lacks_a_weight_or_has_code_in_it_is_refused(tmp_path):
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom diffusers import {{}} as Mine\n"
    for number, (part, file, change, message) in enumerate(
        (
            ("unet", "diffusion_pytorch_model", "a weight less", "conv_in.weight"),
            ("vae", "diffusion_pytorch_model", "other shapes", "decoder.conv_in.bias"),
            ("text_encoder", "model", "a weight less", "final_layer_norm.bias"),
            ("unet", "diffusion_pytorch_model", "a pickle", "Unable to load weights"),
            ("text_encoder", "pytorch_model", "a pickle", "UnpicklingError"),
            ("scheduler", "PNDMScheduler", "a script", None),
            ("feature_extractor", "CLIPImageProcessor", "a script", None),
        )
    ):
        model = tmp_path / str(number)
        shutil.copytree("demo/model", model)
        if change == "a script":
            index = json.loads((model / "model_index.json").read_text())
            (model / "model_index.json").write_text(json.dumps(index | {part: ["mine", "Mine"]}))
            (model / part).mkdir(exist_ok=True)
            (model / part / "mine.py").write_text(code.format(file))
        elif change == "a pickle":
            next((model / part).glob("*.safetensors")).unlink()
            torch.save({"trap": Trap(tmp_path / "sprung")}, model / part / f"{file}.bin")
        else:
            content = safetensors.torch.load_file(model / part / f"{file}.safetensors")
            weight = content.pop(message)
            if change == "other shapes":
                content[message] = weight[1:].clone()
            safetensors.torch.save_file(content, model / part / f"{file}.safetensors")
        if message is None:  # it is not asked for
            prdp.load_pipeline(str(model))
            continue
        with pytest.raises(ValueError, match=f"--model .* cannot be loaded .*{message}") as error:
            prdp.load_pipeline(str(model))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "part, change",
    [
        ("unet", {"cross_attention_dim": 32}),
        ("unet", {"in_channels": 8}),
        ("unet", {"sample_size": None}),
        ("vae", {"latent_channels": 8}),
        ("text_encoder", {"vocab_size": 100}),
        ("tokenizer", None),
    ],
)
def test_a_pipeline_whose_parts_do_not_fit_each_other_is_refused(tmp_path, part, change):
    shutil.copytree("demo/model", tmp_path / "model")
    folder = tmp_path / "model" / part
    if part == "tokenizer":
        shutil.rmtree(folder)
    elif part == "text_encoder":
        config = CLIPTextConfig.from_pretrained(folder)
        config.update(change)
        CLIPTextModel(config).save_pretrained(folder)
    else:
        kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
        kind.from_config({**kind.load_config(folder), **change}).save_pretrained(folder)
    config = prdp.parse_config([*DEMO, "--model", str(tmp_path / "model")])
    refusal = "--model .*model(: its parts do not work together| cannot be loaded)"
    with pytest.raises(ValueError, match=refusal) as e:
        prdp.load_models(config, CPU)
    assert "\n" not in str(e.value)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Cut short, flip bits, zero a stretch, put bytes in, or take some out."""
    content, at = bytearray(content), rng.randrange(len(content))
    stretch = slice(at, at + rng.choice([1, 4, 100, 5000]))
    match rng.randrange(6):
        case 0:
            del content[at:]
        case 1:
            content[at] ^= 1 << rng.randrange(8)
        case 2:
            content[stretch] = bytes(len(content[stretch]))
        case 3:
            content[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        case 4:
            del content[stretch]
        case 5:
            for _ in range(20):
                content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@settings(deadline=None, max_examples=500, database=None)
@given(st.randoms(use_true_random=False))
def test_a_damaged_checkpoint_is_refused_or_was_not_harmed(checkpointed, rng):
    run, policy, optimizer, expected = checkpointed
    (file,) = run.checkpoints()
    whole = file.read_bytes()
    try:
        file.write_bytes(mutate(whole, rng))
        with torch.no_grad():
            policy.unet.weight.zero_()
        metrics = run.load_checkpoint(policy, optimizer)
        assert metrics == expected["metrics"]
        assert torch.equal(policy.unet.weight, expected["unet"]["weight"])
        moment = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(moment, expected["optimizer"]["state"][0]["exp_avg"])
    except ValueError as error:
        assert str(error).startswith("no checkpoint is whole") and "\n" not in str(error)
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A run's folder with one checkpoint, what it is of, and its content."""
    run = prdp.Run(str(tmp_path_factory.mktemp("run")))
    policy = Policy(EightWeights(4, 2), None, torch.empty(0), 1.0)
    optimizer = torch.optim.AdamW(policy.trained.values())
    policy.unet(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    run.save_checkpoint(policy, optimizer, [{"epoch": 1}], Config())
    return run, policy, optimizer, torch.load(run.checkpoints()[0])


def test_whatever_is_at_the_end_of_metrics_jsonl_the_run_goes_on_with_whole_lines(
    tmp_path, quick_loop
):
    train(tmp_path / "whole", "--num_epochs", "2")
    train(tmp_path / "one", "--num_epochs", "1")
    lines = (tmp_path / "one/metrics.jsonl").read_bytes()
    rng = random.Random(0)
    for trial in range(200):
        run = tmp_path / str(trial)
        shutil.copytree(tmp_path / "one", run)
        (run / "metrics.jsonl").write_bytes(mutate(lines + lines, rng))
        train(run, "--num_epochs", "2")
        assert without_measurements(read_metrics(run)) == ending(tmp_path / "whole")[2]


prompt_bytes = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from([b"a cat", b" ", b"\n", b"\r\n", b"\0", b"\xff", "é\u2028".encode()])
    ).map(b"".join),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(max_size=60).map(lambda text: text.encode("utf-16", "surrogatepass")),
    st.integers(9_990, 10_010).map(lambda length: b"cat\n" + b"a" * length),
)


@settings(deadline=None, max_examples=2000, database=None)
@given(prompt_bytes)
def test_a_prompt_file_of_any_bytes_is_read_or_refused_in_a_sentence(prompt_file, content):
    prompt_file.write_bytes(content)
    try:
        read = prdp.read_prompts(str(prompt_file), "{}")
    except ValueError as error:
        assert str(error).startswith("--prompts ") and "\n" not in str(error)
        return
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    assert read == list(dict.fromkeys(line for line in lines if 0 < len(line) <= 10_000))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts") / "any.txt"


def test_numbers_that_are_not_finite_stop_the_run_by_name_and_change_no_weight(
    tmp_path, demo_models
):
    config = prdp.parse_config([*DEMO, "--updates_per_epoch", "2"])
    policy = demo_models.policy
    optimizer = torch.optim.AdamW(policy.trained.values())
    trajectories = prdp.collect_epoch(config, demo_models, ["a cat", "a bat"], 4, {})
    before = {name: weight.clone() for name, weight in policy.trained.items()}
    names = sorted(trajectories.prompts)
    assert names == ["a bat", "a cat"]

    ref = trajectories.log_probs_ref.clone()
    ref[1, 2, 3] = math.nan
    bad = replace(trajectories, log_probs_ref=ref)
    with pytest.raises(ValueError, match="epoch 5: update 1: the loss's gradient is nan for ") as e:
        prdp.update_policy(config, policy, optimizer, bad)
    assert repr(trajectories.prompts[1]) in str(e.value)
    latents = trajectories.latents.clone()
    latents[0, 2] = math.inf
    bad = replace(trajectories, latents=latents)
    with pytest.raises(ValueError, match="epoch 5: update 1: the gradient's norm is nan; nothing"):
        prdp.update_policy(config, policy, optimizer, bad)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.trained.items())

    with pytest.MonkeyPatch.context() as patch:
        optimizer.zero_grad()
        nan = torch.full_like(trajectories.log_probs_old, math.nan)
        patch.setattr(prdp, "trajectory_log_probs", lambda *_: nan)
        with pytest.raises(ValueError, match="update 2: the loss's gradient is nan for 'a [bc]at'"):
            prdp.update_policy(config, policy, optimizer, trajectories)

    for part, message in (
        (demo_models.pipeline.vae.decoder.conv_out, "--reward clip:demo/clip is nan"),
        (demo_models.reference.unet.conv_out, "a log-prob of the reference is nan"),
        (policy.unet.conv_out, "a log-prob of sampling is nan"),
    ):
        part.bias.data[0] = math.nan
        with pytest.raises(ValueError, match=f"epoch 5: {message} for 'a [bc]at'"):
            prdp.collect_epoch(config, demo_models, ["a cat", "a bat"], 4, {})


# ------------------------------------------------------------------------------- several processes


def a_rank(rank: int, environment: dict, flags: list[str], log: Path, fault: str) -> None:
    """What torchrun starts, forked from a process that has imported everything already."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["prdp.py", *flags]
    FAULTS[fault](rank)
    prdp.end_on_signals()
    prdp.main()


def in_float64(rank: int) -> None:
    """So that what is left of a difference is no rounding; every epoch's latents are saved."""
    load_models, draw_noise, collect_epoch = prdp.load_models, prdp.draw_noise, prdp.collect_epoch

    def load_double(config, device):
        models = load_models(config, device)
        for network in (models.policy.unet, models.reference.unet):
            network.double()
        models.pipeline.to(torch.float64)
        negative_embeds = models.encode_prompts([""])
        models.policy.negative_embeds = models.reference.negative_embeds = negative_embeds
        return models

    def collect_and_save(config, models, prompts, epoch, seconds):
        trajectories = collect_epoch(config, models, prompts, epoch, seconds)
        torch.save(trajectories.latents, f"{config.run_dir}/{epoch}.{rank}.pt")
        return trajectories

    prdp.load_models, prdp.collect_epoch = load_double, collect_and_save
    prdp.draw_noise = lambda *key: draw_noise(*key).double()
    prdp.save_grid = lambda *_: None  # to save time


def raise_on_rank_1(phase: str, rank: int) -> None:
    def failing(*_):
        raise KeyError("a mistake in this phase")

    if rank == 1:
        setattr(prdp, phase, failing)


PHASES = ["read_prompts", "load_reward", "sample_trajectories", "score_images", "objective_loss"]
FAULTS = {"none": lambda rank: None, "float64": in_float64}
FAULTS |= {phase: partial(raise_on_rank_1, phase) for phase in PHASES}


class Launch:
    """Processes of one run, with torchrun's rule: if one fails, the others get SIGTERM."""

    def __init__(self, run: Path, world: int, *flags: str, fault="none"):
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["test_prdp"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.run, self.log = run, run.with_suffix(".log")
        self.log.write_text("")
        flags = demo_flags(run, *flags)
        self.processes = [
            forks.Process(target=a_rank, args=(rank, environment, flags, self.log, fault))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, name: str) -> None:
        while not (self.run / name).exists() and self.processes[0].is_alive():
            time.sleep(0.01)

    def end(self, within=60) -> list[int]:
        """The exit codes; fails unless every process ended in time."""
        alive, deadline = set(self.processes), time.monotonic() + within
        while alive and time.monotonic() < deadline:
            multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)
            ended = {process for process in alive if not process.is_alive()}
            alive -= ended
            for process in alive if any(process.exitcode for process in ended) else ():
                process.terminate()
        for process in alive:
            process.kill()
        assert not alive, self.log.read_text()
        return [process.exitcode for process in self.processes]


TWELVE = "--num_epochs 3 --prompts_per_epoch 12 --images_per_prompt 2 --num_steps 2".split()


def test_1_2_3_and_4_processes_draw_the_same_and_follow_the_same_curve(tmp_path):
    """In float64: Adam's first step makes a whole step even of a gradient that is rounding."""
    flags = [*TWELVE, "--keep_checkpoints", "3"]
    flags += ["--reward", "jpeg_incompressibility"]  # the others round to float32
    for run, world in (("1", 1), ("2", 2), ("3", 3), ("4", 4), ("3 to 2", 2)):
        if run == "3 to 2":
            shutil.copytree(tmp_path / "3", tmp_path / run)
            for later in (2, 3):
                (tmp_path / run / f"checkpoints/epoch_{later:06}.pt").unlink()
        launch = Launch(tmp_path / run, world, *flags, fault="float64")
        assert set(launch.end(within=150)) == {0}, launch.log.read_text()
    assert "after epoch 1" in launch.log.read_text()
    for epoch, world in itertools.product(range(3), (2, 3, 4)):
        one = torch.load(tmp_path / f"1/{epoch}.0.pt").unflatten(0, (12, -1))
        parts = [torch.load(tmp_path / f"{world}/{epoch}.{rank}.pt") for rank in range(world)]
        several = torch.stack([part.unflatten(0, (12 // world, -1)) for part in parts], 1)
        several = several.flatten(0, 1)  # rank r has the prompts r, r + world, ...
        assert torch.equal(one[:, :, 0], several[:, :, 0])
        torch.testing.assert_close(one, several, rtol=1e-7, atol=1e-7)
    expected = without_measurements(read_metrics(tmp_path / "1"))
    for run in ("2", "3", "4", "3 to 2"):
        metrics = without_measurements(read_metrics(tmp_path / run))
        for line, other in zip(expected, metrics, strict=True):
            assert line == pytest.approx(other, rel=1e-6, abs=1e-8), run


@slow
def test_two_machines_of_two_processes_are_one_of_four_bit_for_bit(tmp_path):
    """Two torchrun agents on this machine."""
    assert set(Launch(tmp_path / "4", 4, *TWELVE).end(within=150)) == {0}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launch = "-m torch.distributed.run --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d".split()
    launch += ["--rdzv_endpoint", endpoint, "prdp.py"]
    command = [sys.executable, *launch, *demo_flags(tmp_path / "2x2", *TWELVE)]
    agents = [subprocess.Popen(command) for _ in range(2)]
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    four, two_by_two = (read_metrics(tmp_path / run) for run in ("4", "2x2"))
    assert without_measurements(four) == without_measurements(two_by_two)
    expected = weights(tmp_path / "4")
    assert all(torch.equal(value, expected[k]) for k, value in weights(tmp_path / "2x2").items())


def check_one_rank_raising(run: Path, phase: str) -> None:
    launch = Launch(run, 2, "--num_epochs", "2", fault=phase)
    codes, log = launch.end(within=60), launch.log.read_text()
    assert codes[1] == 1 and codes[0] != 0
    assert log.count("Traceback (most recent call last)") == 1, log
    assert log.count("prdp.py: error on rank 1: KeyError: 'a mistake in this phase'") == 1, log


def test_what_one_process_raises_ends_all_and_is_told_once(tmp_path):
    check_one_rank_raising(tmp_path / "run", "score_images")


@slow
def test_what_one_process_raises_ends_all_20_times_in_every_phase(tmp_path):
    for trial, phase in enumerate(PHASES * 4):
        check_one_rank_raising(tmp_path / str(trial), phase)


def test_a_signal_ends_all_processes_at_once_in_one_sentence(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        launch = Launch(tmp_path / number.name, 2, "--num_epochs", "1000")
        launch.wait_for("metrics.jsonl")
        for process in launch.processes:
            os.kill(process.pid, number)
        assert launch.end(within=5) == [128 + number] * 2
        log = launch.log.read_text()
        assert log.count(f"stopped by {number.name}") == log.count("the same command goes on") == 1
        assert "Traceback" not in log and "error" not in log


def test_the_end_of_a_rewards_worker_is_not_the_runs(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import multiprocessing, signal, time\n"
        "def f(images, prompts):\n"
        "    signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "    signal.raise_signal(signal.SIGALRM)\n"
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    worker.start()\n"
        "    time.sleep(1)\n"
        "    worker.terminate()\n"
        "    worker.join()\n"
        "    return images.mean((1, 2, 3))\n"
    )
    flags = ["--num_epochs", "1", "--reward", f"{tmp_path}/mine.py:f"]
    launch = Launch(tmp_path / "run", 1, *flags)
    assert launch.end() == [0], launch.log.read_text()


def check_kills(folder: Path, count: int, *flags: str) -> None:
    """SIGKILL to a rank or all, at a moment while a run is at work; then the same command."""
    rng = random.Random(0)
    whole = Launch(folder / "whole", 2, *flags)
    whole.wait_for("config.json")
    started = time.monotonic()
    assert whole.end(within=300) == [0, 0]
    seconds, cut_short = time.monotonic() - started, 0
    while cut_short < count:  # a run that ended before its moment came is drawn again
        launch = Launch(folder / "killed", 2, *flags)
        launch.wait_for("config.json")
        time.sleep(rng.uniform(0, seconds))
        for process in rng.choice([launch.processes, launch.processes[:1], launch.processes[1:]]):
            process.kill()
        cut_short += any(launch.end())
        again = Launch(folder / "killed", 2, *flags)
        assert again.end(within=300) == [0, 0], again.log.read_text()
        assert ending(again.run) == ending(whole.run)
        shutil.rmtree(again.run)


def test_a_run_killed_at_any_moment_ends_bit_equal_to_one_that_was_not(tmp_path):
    check_kills(tmp_path, 3, "--num_epochs", "3")


@slow
def test_60_runs_killed_at_any_moment_end_bit_equal_to_one_that_was_not(tmp_path):
    check_kills(tmp_path, 60, "--num_epochs", "3")


@slow
def test_torchrun_starts_again_what_was_killed(tmp_path):
    flags = demo_flags(tmp_path / "run", "--num_epochs", "2")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, pathlib, prdp, time\n"
        "once, collect_epoch = pathlib.Path(__file__).with_suffix('.once'), prdp.collect_epoch\n"
        "def killed(config, models, prompts, epoch, seconds):\n"
        "    if epoch == 1 and prdp.rank() == 1 and not once.exists():\n"
        "        once.touch()\n"
        "        while not pathlib.Path(config.run_dir, 'metrics.jsonl').exists():\n"
        "            time.sleep(0.01)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return collect_epoch(config, models, prompts, epoch, seconds)\n"
        "prdp.collect_epoch = killed\n"
        "prdp.main()\n"
    )
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=2".split()
    process = subprocess.run(
        [sys.executable, *launch, str(script), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert process.returncode == 0 and "after epoch 1" in process.stdout, process.stderr
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/unet").is_dir()


# ------------------------------------------------------------------------------ prompts and rewards


def test_prompts_are_distinct_lines_in_order_and_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("cat\n\n  dog  \ncat\n   \nbat")
    assert prdp.read_prompts(str(tmp_path / "list.txt"), "a {}!") == ["a cat!", "a dog!", "a bat!"]
    assert "3 prompts; left out 2 blank and 1 repeated" in capsys.readouterr().out
    assert len(prdp.read_prompts("prompts/animals.txt", "{}")) == 45


def test_named_sets_are_read_from_the_files_that_the_hub_has(tmp_path, monkeypatch, capsys):
    """Files in the formats of the datasets, in place of those."""
    hub = tmp_path / "hub"
    for folder in ("benchmark", "data"):
        (hub / folder).mkdir(parents=True)
    train = [{"prompt": f"p{i // 2}", "image_path": ["a.jpg"]} for i in range(1200)]
    train[0] = {"prompt": "  two\n lines "}
    (hub / "train.json").write_text(json.dumps(train))
    (hub / "benchmark/paintings.json").write_text(json.dumps(["ä", "", "b", "ä"]))
    (hub / "PartiPrompts.tsv").write_text('Prompt\tCategory\n"A" sign\tArts\na "b"\t\n')
    for part, captions in enumerate((["x", "y"], ["y", "z"])):
        table = pyarrow.table({"caption": captions, "jpg": [b"", b""]})
        pyarrow.parquet.write_table(table, hub / f"data/train-0000{part}-of-00002-f00.parquet")
    asked = []

    def snapshot_download(dataset, repo_type, allow_patterns):
        asked.append((dataset, repo_type, allow_patterns))
        return str(hub)

    monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts.sets, "snapshot_download", snapshot_download)
    hpdv2 = prdp.read_prompts("hpdv2", "{}")
    assert hpdv2 == ["two lines", *(f"p{i}" for i in range(600))]
    assert prdp.read_prompts("hpdv2-painting", "{}") == ["ä", "b"]
    assert prdp.read_prompts("partiprompts", "{}") == ['"A" sign', 'a "b"']
    assert prdp.read_prompts("pickapic", "{}") == ["x", "y", "z"]
    assert len(asked) == 4 and asked[0] == ("ymhao/HPDv2", "dataset", "train.json")
    sample = prdp.read_prompts("hpdv2-500", "{}")
    assert len(set(sample)) == 500 and set(sample) <= set(hpdv2)
    prdp.read_prompts("hpdv2", "{}")
    assert len(asked) == 4  # kept

    monkeypatch.setattr(sys, "argv", ["sets.py", "hpdv2-painting", str(tmp_path / "copy.txt")])
    prompts.sets.main()
    assert prdp.read_prompts(str(tmp_path / "copy.txt"), "{}") == ["ä", "b"]
    with pytest.raises(ValueError, match="animation cannot be had .*no benchmark/anime.json"):
        prdp.read_prompts("hpdv2-animation", "{}")


def test_200_000_prompts_are_read_quickly_and_drawn_alike_by_every_process(tmp_path):
    subjects = [f"{a} {b}" for a in ("red", "old", "tiny", "sad") for b in ("fox", "car", "hat")]
    (tmp_path / "many.txt").write_text(
        "".join(
            f"{subjects[i % 12]} number {i}, oil on canvas, soft light{', detailed' * (i % 9)}\n"
            for i in range(200_000)
        )
    )
    (tmp_path / "draw.py").write_text(
        "import resource, sys, time, prdp\n"
        "tokenizer = prdp.load_pipeline('demo/model').tokenizer\n"
        "tokenizer.model_max_length = 77\n"
        "prdp.start_distributed()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, started = peak(), time.perf_counter()\n"
        "prompts = prdp.read_prompts(sys.argv[1], '{}')\n"
        "prdp.report_long_prompts(prompts, tokenizer)\n"
        "seconds, mib = time.perf_counter() - started, peak() - before\n"
        "drawn = [prdp.draw_prompts(prompts, 64, f'0/{epoch}') for epoch in range(3)]\n"
        "with open(f'{sys.argv[1]}.{prdp.rank()}', 'w') as file:\n"
        "    file.write(repr((seconds, mib, drawn)))\n"
    )
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *launch, tmp_path / "draw.py", tmp_path / "many.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=100)
    prompts = prdp.read_prompts(str(tmp_path / "many.txt"), "{}")
    expected = [prdp.draw_prompts(prompts, 64, f"0/{epoch}") for epoch in range(3)]
    for rank in range(2):
        seconds, mib, drawn = ast.literal_eval((tmp_path / f"many.txt.{rank}").read_text())
        assert drawn == expected and seconds < 5 and mib < 200, (seconds, mib)


def test_long_prompts_are_counted_and_cut(demo_models, capsys):
    long = "A painting of a cat " * 20
    prdp.report_long_prompts(["A painting of a cat", long], demo_models.pipeline.tokenizer)
    assert "1 of 2 prompts are longer than 16 tokens" in capsys.readouterr().out
    assert demo_models.encode_prompts([long]).shape == (1, 16, 64)


def test_draws_are_functions_of_their_key():
    names = [str(i) for i in range(5)]
    assert sorted(prdp.draw_prompts(names, 5, "0/1")) == names
    assert prdp.draw_prompts(names, 4, "0/1") != prdp.draw_prompts(names, 4, "0/2")
    assert len(prdp.draw_prompts(names, 12, "0/1")) == 12
    assert torch.equal(prdp.draw_noise("a", 3, (4, 8, 8)), prdp.draw_noise("a", 3, (4, 8, 8)))
    assert not torch.equal(prdp.draw_noise("a", 3, (4, 8, 8)), prdp.draw_noise("b", 3, (4, 8, 8)))


TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
PROMPTS = ["a cat", "a bat in a hat", "a " + "very " * 90 + "long prompt"]


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth pictures (3, H, W) with a bit of noise, in multiples of 1/255."""
    torch.manual_seed(0)
    smooth = [torch.rand(1, 3, 4, 4) for _ in sizes]
    smooth = [
        torch.nn.functional.interpolate(image, size, mode="bicubic")[0]
        for image, size in zip(smooth, sizes, strict=True)
    ]
    noisy = [(image + 0.1 * torch.randn_like(image)).clamp(0, 1) for image in smooth]
    return [(image * 255).round() / 255 for image in noisy]


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture
def official_hpsv2(tmp_path, monkeypatch):
    """The scoring module of the package hpsv2.

    Its wheel lacks the tokenizer's vocabulary, which open_clip has, and it imports a progress bar
    for the downloads, which no test makes.
    """
    package = importlib.util.find_spec("hpsv2")
    if package is None:
        pytest.skip("pip install --no-deps hpsv2==1.2.0")
    shutil.copytree(Path(package.origin).parent, tmp_path / "hpsv2")
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(vocabulary, tmp_path / "hpsv2/src/open_clip")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("clint", "clint.textui"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(progress=None))
    yield importlib.import_module("hpsv2.img_score")
    for module in [name for name in sys.modules if name.partition(".")[0] == "hpsv2"]:
        del sys.modules[module]


@pytest.mark.parametrize("size", ["tiny", pytest.param("ViT-H-14", marks=slow)])
def test_hpsv2_is_the_official_packages_score(tmp_path, monkeypatch, official_hpsv2, size):
    if size == "tiny":
        theirs = importlib.import_module("hpsv2.src.open_clip.factory")
        for factory in (theirs, open_clip.factory):
            monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", TINY_CLIP)
    torch.manual_seed(0)
    options = dict(precision="amp", light_augmentation=True, output_dict=True)  # as the package's
    network, _, preprocess = official_hpsv2.create_model_and_transforms("ViT-H-14", None, **options)
    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": {k: v.half() for k, v in network.state_dict().items()}}, file)
    official_hpsv2.model_dict.update(model=network, preprocess_val=preprocess)

    sizes = (64, 64), (32, 32), (48, 30), (30, 61), (224, 224), (90, 250), (512, 512), (768, 512)
    images = pictures(*sizes)
    files = [pil(image) for image in images]
    expected = [official_hpsv2.score(files, prompt, cp=file) for prompt in PROMPTS]
    # By torchvision's default before 0.17 the same package had no antialiasing in its resize.
    resize = torchvision.transforms.functional.resize
    without = partial(resize, antialias=False)
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.transforms.functional, "resize", without)
        older = official_hpsv2.score(files, PROMPTS[0], cp=file)
    official_hpsv2.model_dict.clear()
    del network

    reward = load_reward(f"hpsv2:{tmp_path if size == 'tiny' else file}", CPU)
    for prompt, scores in zip(PROMPTS, expected, strict=True):
        actual = [reward(image[None], [prompt]).item() for image in images]
        print("largest difference", max(abs(a - b) for a, b in zip(actual, scores, strict=True)))
        assert actual == pytest.approx(scores, rel=0, abs=1e-5)
    differences = [abs(a - b) for a, b in zip(older, expected[0], strict=True)]
    print("without antialiasing", differences)
    assert differences[1 if size == "tiny" else 4] == 0  # 32 x 32, 224 x 224: as large as needed
    assert max(differences) > 1e-4


def save_clip(folder: Path, size: str) -> None:
    """A transformers CLIP with random weights and the demo's tokenizer, or as "tiny" the demo's."""
    shutil.copytree("demo/clip", folder)
    if size == "tiny":
        return
    sides = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision, text, width = {
        "ViT-L-14": ((1024, 4096, 24, 16), (768, 3072, 12, 12), 768),
        "ViT-H-14": ((1280, 5120, 32, 16), (1024, 4096, 24, 16), 1024),
    }[size]
    vision = dict(zip(sides, vision, strict=True), patch_size=14, projection_dim=width)
    text = dict(zip(sides, text, strict=True), projection_dim=width)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    ).save_pretrained(folder)
    tokenizer = CLIPProcessor.from_pretrained("demo/clip").tokenizer
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


@pytest.mark.parametrize(
    "name, size",
    [("clip", "tiny"), ("pickscore", "tiny"), pytest.param("pickscore", "ViT-H-14", marks=slow)],
)
def test_clip_and_pickscore_are_the_cosine_that_pickscores_authors_compute(tmp_path, name, size):
    save_clip(tmp_path / "clip", size)
    network = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    options = dict(padding=True, truncation=True, return_tensors="pt")
    options["max_length"] = 16 if size == "tiny" else 77
    reward = load_reward(f"{name}:{tmp_path}/clip", CPU)
    for image, prompt in itertools.product(pictures((48, 48), (32, 32), (300, 512)), PROMPTS):
        with torch.no_grad():
            output = network(**processor(images=pil(image), text=[prompt], **options))
        expected = (output.text_embeds @ output.image_embeds.T)[0]  # both of length 1
        torch.testing.assert_close(reward(image[None], [prompt]), expected, rtol=0, atol=1e-6)


def save_aesthetic_head(file: Path, width: int) -> torch.nn.Sequential:
    """The published layers with random weights, which the file gets under their published names."""
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    ).eval()
    torch.save({f"layers.{name}": weight for name, weight in head.state_dict().items()}, file)
    return head


@pytest.mark.parametrize("size", ["tiny", pytest.param("ViT-L-14", marks=slow)])
def test_aesthetic_is_its_published_network(tmp_path, size):
    save_clip(tmp_path / "clip", size)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    torch.manual_seed(1)
    file = tmp_path / "clip/sac+logos+ava1-l14-linearMSE.pth"
    published = save_aesthetic_head(file, clip.config.projection_dim)
    assert [*torch.load(file)][::2] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]  # as its own

    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    reward = load_reward(f"aesthetic:{tmp_path}/clip", CPU)
    for image in pictures((48, 48), (32, 32), (300, 512)):
        inputs = processor(pil(image), return_tensors="pt")
        with torch.no_grad():
            features = clip.visual_projection(clip.vision_model(**inputs).pooler_output)
            expected = published(features / features.norm(dim=-1, keepdim=True))[0]
        torch.testing.assert_close(reward(image[None], ["a"]), expected, rtol=0, atol=1e-6)


@pytest.fixture
def reward_folder(tmp_path, monkeypatch):
    """Weights of every reward, small: hps.pt, and CLIP with an aesthetic predictor's head."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", TINY_CLIP)
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model("ViT-H-14").state_dict()}, tmp_path / "hps.pt")
    shutil.copytree("demo/clip", tmp_path / "clip")
    save_aesthetic_head(tmp_path / "clip/aesthetic-model.pth", width=64)
    return tmp_path


SCORERS = ["hpsv2:{}/hps.pt", "hpsv2.1:{}/hps.pt", "pickscore:{}/clip", "aesthetic:{}/clip"]


@pytest.mark.parametrize("scorer", SCORERS)
def test_rewards_are_float32_under_any_autocast_and_the_same_in_any_batch(reward_folder, scorer):
    reward = load_reward(scorer.format(reward_folder), CPU)
    images = torch.stack(pictures((48, 48), (48, 48), (48, 48)))
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(
                load_reward(scorer.format(reward_folder), CPU)(images, PROMPTS), scores
            )
            assert torch.equal(reward(images, PROMPTS), scores)
    alone = [reward(image[None], [p]) for image, p in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=0, atol=1e-6)


def test_a_prompt_is_encoded_once_for_all_of_its_images(reward_folder, monkeypatch):
    encoded, encode_text = [], open_clip.CLIP.encode_text

    def counted(self, text):
        encoded.append(len(text))
        return encode_text(self, text)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", counted)
    reward = load_reward(f"hpsv2:{reward_folder}/hps.pt", CPU)
    for _ in range(3):
        reward(torch.rand(6, 3, 32, 32), ["a cat", "a bat"] * 3)
    assert encoded == [1, 1]


def test_a_reward_imports_only_what_it_needs():
    script = (
        "import sys, torch; from rewards import load_reward\n"
        "load_reward('jpeg_compressibility', 'cpu')(torch.rand(1, 3, 8, 8), ['']);"
        "print('open_clip' in sys.modules, 'transformers' in sys.modules)\n"
        "load_reward('clip:demo/clip', 'cpu'); print('open_clip' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout.split() == ["False", "False", "False"]


def test_weights_that_do_not_fit_are_refused_by_name_and_code_in_them_does_not_run(reward_folder):
    folder = reward_folder

    def refusal(spec):
        with pytest.raises(ValueError, match=re.escape(f"--reward {spec}: ")) as error:
            load_reward(spec, CPU)
        assert "\n" not in str(error.value)
        return str(error.value)

    state = torch.load(folder / "hps.pt")["state_dict"]
    wider = {**state, "visual.proj": torch.zeros(64, 33)}
    torch.save({"state_dict": wider}, folder / "wider.pt")
    assert "visual.proj is (64, 33)" in refusal(f"hpsv2:{folder}/wider.pt")
    torch.save({"state_dict": state | {"score.weight": torch.zeros(1)}}, folder / "more.pt")
    assert "score.weight is (1,)" in refusal(f"hpsv2:{folder}/more.pt")
    del state["ln_final.bias"]
    torch.save({"state_dict": state}, folder / "less.pt")
    assert "ln_final.bias is missing" in refusal(f"hpsv2:{folder}/less.pt")
    torch.save(state, folder / "bare.pt")
    assert "KeyError" in refusal(f"hpsv2:{folder}/bare.pt")
    whole = (folder / "hps.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated.pt" in refusal(f"hpsv2:{folder}/truncated.pt")

    class Code:
        def __reduce__(self):
            return Path.touch, (folder / "ran",)

    torch.save({"state_dict": Code()}, folder / "code.pt")
    assert "UnpicklingError" in refusal(f"hpsv2:{folder}/code.pt")
    torch.save(Code(), folder / "clip/aesthetic-model.pth")
    assert "UnpicklingError" in refusal(f"aesthetic:{folder}/clip")
    assert not (folder / "ran").exists()

    file = folder / "clip/model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = "vision_model.post_layernorm.weight"
    safetensors.torch.save_file(weights | {name: torch.zeros(3)}, file, {"format": "pt"})
    assert name in refusal(f"pickscore:{folder}/clip")
    del weights[name]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert name in refusal(f"pickscore:{folder}/clip") and name in refusal(f"clip:{folder}/clip")
    file.write_bytes(file.read_bytes()[:1000])
    assert "/clip cannot be loaded" in refusal(f"pickscore:{folder}/clip")


def test_jpeg_rewards_are_the_size_of_the_file(tmp_path):
    images = torch.stack([torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.5)])
    sizes = []
    for i, image in enumerate(images):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(
            tmp_path / f"{i}.jpg", quality=95
        )
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert load_reward("jpeg_incompressibility", CPU)(images, ["", ""]).tolist() == pytest.approx(
        sizes
    )
    assert load_reward("jpeg_compressibility", CPU)(images, ["", ""]).tolist() == pytest.approx(
        [-s for s in sizes]
    )


def test_a_weighted_sum_is_the_sum_of_its_parts(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
    )
    images, prompts = torch.rand(3, 3, 32, 32), ["A painting of a cat"] * 3
    specs = {f"{tmp_path}/mine.py:red": 3.0, "jpeg_compressibility": 0.05, "clip:demo/clip": 10.0}
    parts = [weight * load_reward(spec, CPU)(images, prompts) for spec, weight in specs.items()]
    whole = load_reward(",".join(f"{spec}={weight}" for spec, weight in specs.items()), CPU)
    torch.testing.assert_close(whole(images, prompts), sum(parts))
    assert list(whole.terms(images, prompts)) == ["red", "jpeg_compressibility", "clip"]


def test_the_multi_reward_gives_table_3s_base_row_from_table_2s():
    """Unseen Pick-a-Pic, animation, concept art, painting, photo; A is the aesthetic score."""
    pickscore = torch.tensor([0.2082, 0.2111, 0.2062, 0.2059, 0.2172])
    hpsv2 = torch.tensor([0.2665, 0.2737, 0.2656, 0.2654, 0.2750])
    published = torch.tensor([2.888, 2.927, 2.877, 2.883, 2.984])
    spec = prdp.parse_config(["--preset", "multi"]).reward
    weights = {name: float(weight) for name, weight in (p.split("=") for p in spec.split(","))}
    aesthetic = torch.full((5,), 5.5)  # published for this model on other prompts: 5.49
    reward = Reward({}, weights)
    total = reward.total(dict(pickscore=pickscore, hpsv2=hpsv2, aesthetic=aesthetic))
    torch.testing.assert_close(total, published, rtol=0, atol=0.05 * 0.4)


# ----------------------------------------------------------------------- flags, mistakes, documents


def test_presets_are_table_4():
    table = {  # epochs, updates, prompts, images, kl_weight, clip_range, learning_rate
        "small": (100, 10, 32, 16, 3e-5, 1e-6, 1e-5),
        "large": (1000, 1, 64, 8, 3e-6, 1e-4, 7e-6),
        "multi": (1000, 1, 64, 8, 3e-5, 1e-4, 1e-5),
    }
    for preset, values in table.items():
        c = prdp.parse_config(["--preset", preset])
        assert values == (
            c.num_epochs,
            c.updates_per_epoch,
            c.prompts_per_epoch,
            c.images_per_prompt,
            c.kl_weight,
            c.clip_range,
            c.learning_rate,
        )
        assert (c.num_steps, c.guidance_scale, c.weight_decay, c.max_grad_norm) == (
            50,
            5.0,
            1e-4,
            1.0,
        )
        assert (
            c.model == "CompVis/stable-diffusion-v1-4" and c.objective == "prdp" and not c.offline
        )
    assert prdp.parse_config([]) == Config(run_dir="runs/small-hpsv2")
    assert prdp.parse_config(["--preset", "multi"]).reward == "pickscore=10,hpsv2=2,aesthetic=0.05"
    assert prdp.parse_config(["--preset", "large", "--learning_rate", "1"]).learning_rate == 1


MISTAKES = {
    "no prompt file": (["--prompts", "nowhere.txt"], "--prompts nowhere.txt"),
    "empty prompt file": (["--prompts", "EMPTY"], "no prompt in it"),
    "unknown reward": (["--reward", "beauty"], "unknown reward 'beauty'"),
    "bad weight": (["--reward", "jpeg_compressibility=much"], "'much' is not a number"),
    "no reward file": (["--reward", "nowhere.py:f"], "no file nowhere.py"),
    "no reward model": (["--reward", "clip:nowhere"], "--reward clip:nowhere"),
    "no model": (["--model", "./nowhere"], "--model ./nowhere"),
    "no such set": (["--prompts", "hpdv3"], "not one of the sets hpdv2, .*, hpdv2-500"),
    "no network for prompts": (["--prompts", "hpdv2-photo"], "hpdv2-photo .*sets.py.*HF_HOME"),
    "no network for HPSv2": (["--reward", "hpsv2"], "xswu/HPSv2 .*hpsv2:PATH.*HF_HOME"),
    "no network for PickScore": (
        ["--reward", "pickscore"],
        "PickScore_v1 .*pickscore:PATH.*HF_HOME",
    ),
    "no network for aesthetic": (["--reward", "aesthetic"], "openai/clip.*aesthetic:PATH.*HF_HOME"),
    "no network for the model": (["--model", "a/b"], "--model a/b.*local folder.*HF_HOME"),
    "negative rank": (["--lora_rank", "-1"], "--lora_rank -1"),
    "too many steps": (
        ["--num_steps", "1000"],
        "--num_steps 1000: the model was trained with 1000",
    ),
    "truncated UNet": (
        ["--model", "TRUNCATED"],
        "--model .*TRUNCATED cannot be loaded .*unet.diffusion_pytorch_model",
    ),
    "weight NaN": (["--reward", "jpeg_compressibility=nan"], "'nan' is not a number"),
    "no reward given": (["--reward", "pickscore:"], "name the model, pickscore:FOLDER"),
    "reward None": (["--reward", "BAD:none"], "'none' returned a NoneType"),
    "SDXL": (["--model", "XL"], "StableDiffusionXLPipeline"),
    "sample prediction": (["--model", "SAMPLE"], "predicts 'sample'"),
    "one image": (["--images_per_prompt", "1"], "--images_per_prompt 1"),
    "no epochs": (["--num_epochs", "0"], "--num_epochs 0"),
    "negative clip": (["--clip_range", "-1"], "--clip_range -1"),
    "not a run": (["--evaluate", "nowhere"], "nowhere is not the folder of a run: its config.json"),
    "a run without a name": (["--evaluate", ""], "not the folder of a run"),
    "not a number": (["--learning_rate", "fast"], "--learning_rate.*: invalid float value: 'fast'"),
    "unknown flag": (["--learning", "1"], "--learning"),
    "no place for the prompt": (["--prompt_template", "A dog"], "--prompt_template 'A dog': "),
    "a step to nowhere": (["--learning_rate", "inf"], "epoch 1: an update left weights that are"),
    "a function without a name": (["--reward", "BAD"], "give FILE.py:FUNCTION"),
    "reward of a wrong shape": (["--reward", "BAD:shape"], "'shape' returned shape"),
    "reward NaN": (["--reward", "BAD:nan"], "epoch 1: --reward .*:nan is nan for 'A painting"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_that_names_it(tmp_path, mistake):
    flags, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.py").write_text(
        "def shape(images, prompts):\n    return images\n"
        "def nan(images, prompts):\n    return images.mean((1, 2, 3)).log() * float('nan')\n"
        "def none(images, prompts):\n    return None\n"
    )
    for name, file, key, value in (
        ("XL", "model_index.json", "_class_name", "StableDiffusionXLPipeline"),
        ("SAMPLE", "scheduler/scheduler_config.json", "prediction_type", "sample"),
    ):
        if name in flags:
            shutil.copytree("demo/model", tmp_path / name)
            config = tmp_path / name / file
            config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    if "TRUNCATED" in flags:
        shutil.copytree("demo/model", tmp_path / "TRUNCATED")
        for file in (tmp_path / "TRUNCATED/unet").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:100_000])
    stand_ins = {
        "TRUNCATED": tmp_path / "TRUNCATED",
        "EMPTY": tmp_path / "empty.txt",
        "XL": tmp_path / "XL",
        "SAMPLE": tmp_path / "SAMPLE",
        "BAD": f"{tmp_path}/bad.py",
        "BAD:shape": f"{tmp_path}/bad.py:shape",
        "BAD:nan": f"{tmp_path}/bad.py:nan",
        "BAD:none": f"{tmp_path}/bad.py:none",
    }
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        train(tmp_path / "run", *[str(stand_ins.get(flag, flag)) for flag in flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_config_json_of_anything_is_read_or_refused_in_a_sentence(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"seed": 7, "clip_range": Infinity}')
    config = prdp.parse_config(["--evaluate", str(tmp_path), "--lora_rank", "0"])
    assert (config.seed, config.clip_range, config.model) == (7, math.inf, Config().model)
    for content in (
        "",
        "[1]",
        "nonsense",
        '{"sed": 7}',
        '{"num_steps": null}',
        '{"prompt_template": 5}',
        '{"reward": ["hpsv2"]}',
        "\xff",
    ):
        file.write_text(content, "latin-1")
        with pytest.raises(ValueError, match="is not the folder of a run: its config.json") as e:
            prdp.parse_config(["--evaluate", str(tmp_path)])
        assert "\n" not in str(e.value)


def test_a_function_that_fails_is_named_and_its_traceback_kept(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def broken(images, prompts):\n    return float('much')\n")
    reward = load_reward(f"{file}:broken", CPU)
    with pytest.raises(RuntimeError, match="reward 'broken' failed: ValueError: could not") as e:
        reward(torch.rand(1, 3, 8, 8), ["a cat"])
    assert isinstance(e.value.__cause__, ValueError)
    file.write_text("float('much')")
    with pytest.raises(RuntimeError, match="mine.py failed: ValueError: could not convert"):
        load_reward(f"{file}:broken", CPU)


def test_finished_weights_are_not_deleted_where_there_is_no_checkpoint(tmp_path, quick_loop):
    train(tmp_path / "run", "--num_epochs", "1")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match="--run_dir .*run: has finished weights but no checkpoint"):
        train(tmp_path / "run", "--num_epochs", "1")
    assert (tmp_path / "run/unet").is_dir()


def test_a_run_made_with_other_flags_is_refused_and_kept(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="--learning_rate 0.0002 and not 1.0"):
        train(tmp_path / "run", "--num_epochs", "1", "--learning_rate", "1")
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    }


def test_without_peft_lora_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delattr("peft.LoraConfig")
    with pytest.raises(ValueError, match="--lora_rank needs the package peft: pip install peft"):
        train(tmp_path / "run", "--lora_rank", "2")


def test_out_of_memory_names_the_flags_that_need_less(monkeypatch, capsys):
    def overflow(config, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(prdp, "train", overflow)
    monkeypatch.setattr(prdp.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["prdp.py", "--micro_batch_size", "16"])
    with pytest.raises(SystemExit, match="1"):
        prdp.main()
    assert "out of memory; lower --micro_batch_size (it is 16)" in capsys.readouterr().err


def test_prompts_that_the_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(prdp, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--prompts_per_epoch 32 .* 3 processes"):
        prdp.train(prdp.parse_config([]), CPU)


def test_on_the_command_line_a_mistake_is_one_line_and_a_failure():
    command = [sys.executable, "prdp.py", "--preset", "demo", "--prompts", "nowhere.txt"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert (
        process.stderr.strip().splitlines()[-1].startswith("prdp.py: error: --prompts nowhere.txt")
    )


def test_the_readmes_commands_parse_and_its_paths_exist(monkeypatch):
    monkeypatch.setattr(prdp, "read_config", lambda run: vars(Config()))
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    .*prdp\.py.*$", readme, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.split("&&")[-1], comments=True)
        config = prdp.parse_config(words[words.index("prdp.py") + 1 :])
        assert not config.prompts.endswith(".txt") or (ROOT / config.prompts).exists(), command
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", readme):
        path = "".join(link)
        assert path.startswith("http") or (ROOT / path).exists(), path
