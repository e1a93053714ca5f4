"""What is claimed, and what it is compared with.

    zero at the optimum     a discrete chain and a Gaussian one, whose optima are closed forms
    §2 the policy           diffusers' DDIM with eta 1, torch.distributions.Normal
    §3 the objective        plain loops over pairs and prompts, DDPO's rule, RLOO's gradient
    §4 the online loop      plain autograd, a run that was never stopped, diffusers' own pipeline
    §5 models               weights that are missing, misshapen or halved, files with code in them
    §7 processes            one process against several, in float64; two machines (slow)
    §8 runs on disk         SIGKILL at any moment, a full disk, damaged files, numbers not finite
    rewards.py              the package hpsv2, the code of PickScore's authors, the published head
    the hub                 what it answers, and what is told of that
    §9 flags and documents  one sentence for a mistake; the README's commands and paths

demo/ and prompts/ have tests of their own. `pytest -m slow` adds full sizes and 60 killed runs.
"""

import collections
import copy
import gc
import importlib
import itertools
import json
import logging
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
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here must be missed at once
import huggingface_hub
import open_clip
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel

import prdp
import prompts.sets
from prdp import Config, Policy
from prompts.sets import explain, read_prompts
from rewards import Reward, load_reward, parse_reward

with warnings.catch_warnings():  # the mark is registered nowhere: it would take a file of its own
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
ROOT = Path(__file__).parent
CPU = torch.device("cpu")
SD_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                   clip_sample=False, set_alpha_to_one=False, steps_offset=1)
DEMO = "--preset demo --prompts_per_epoch 2 --images_per_prompt 4 --num_steps 4".split()
DEMO += "--micro_batch_size 5 --reward clip:demo/clip --learning_rate 2e-4".split()


@pytest.fixture(autouse=True)
def in_the_repository(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    if request.node.get_closest_marker("slow") and "slow" not in request.config.option.markexpr:
        pytest.skip("pytest -m slow")


@pytest.fixture
def demo_models():
    return prdp.load_models(prdp.parse_config(DEMO), CPU)


def load_pipeline(model: str | Path) -> StableDiffusionPipeline:
    return prdp.load_pipeline(prdp.parse_config([*DEMO, "--model", str(model)]))


def ddim(num_steps: int, **options) -> DDIMScheduler:
    scheduler = DDIMScheduler(**SD_SCHEDULE, **options)
    scheduler.set_timesteps(num_steps)
    return scheduler


# ------------------------------------------------------------------------------ zero at the optimum


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
        self.reference = Policy(LinearUNet(scheduler, self.latent_shape), scheduler, torch.empty(0),
                                1.0)
        self.policy = Policy(LinearUNet(scheduler, self.latent_shape), scheduler, torch.empty(0),
                             1.0)
        self.reference.unet.requires_grad_(False)
        self.reward = Reward({"linear": None}, {"linear": 1.0})
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

    def score(self, latents, prompts, size):
        return {"linear": (latents * self.direction).sum((1, 2, 3))}

    def config(self, **options):
        return Config(num_steps=self.num_steps, kl_weight=self.kl_weight, prompts_per_epoch=2,
                      images_per_prompt=16, micro_batch_size=256, weight_decay=0, **options)


def test_loss_is_zero_at_the_optimum_of_a_gaussian_chain():
    toy = GaussianToy(beta=0.8)
    config = toy.config(clip_range=1e-3)
    toy.policy.unet.bias.data = toy.optimal_bias
    trajectories = prdp.collect_epoch(config, toy, ["x"], 0, {})
    at_optimum = prdp.objective_loss(config, trajectories.log_probs_old, trajectories, None).item()
    at_reference = prdp.objective_loss(config, trajectories.log_probs_ref, trajectories,
                                       None).item()
    assert at_optimum < 1e-9 * at_reference

    for scale in (0.0, 0.9, 1.1):
        toy.policy.unet.bias.data = scale * toy.optimal_bias
        trajectories = prdp.collect_epoch(config, toy, ["x"], 0, {})
        assert (prdp.objective_loss(config, trajectories.log_probs_old, trajectories,
                                    None) > 1e-3 * at_reference)


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


# ------------------------------------------------------------------------------------ §2 the policy


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
        expected = scheduler.step(prediction[i], t, latents[i], eta=1.0,
                                  variance_noise=noise[i]).prev_sample
        torch.testing.assert_close((mean + std * noise)[i], expected, rtol=1e-6, atol=1e-6)
    assert std.shape == (num_steps, 1, 1, 1) and std.min() > 0.02


def test_log_prob_equals_torch_distributions_and_resolves_1e_7_nats():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 5, 4, 8, 8)
    std = torch.rand(5, 1, 1, 1) + 0.02
    expected = (torch.distributions.Normal(mean.double(),
                                           std.double()).log_prob(x.double()).mean((1, 2, 3)))
    log_prob = prdp.gaussian_log_prob(x, mean, std)
    assert log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)

    gradient = (-(x - mean).double() / std.double() ** 2 / x[0].numel())[0]
    step = 1e-7 / gradient.square().sum() * gradient  # to first order it adds 1e-7 nats
    moved = prdp.gaussian_log_prob(x[:1].double() + step, mean[:1], std[:1])
    assert (moved - log_prob[:1]).item() == pytest.approx(1e-7, rel=1e-3)


def test_guidance_is_linear_between_the_two_predictions(demo_models):
    unet, negative = demo_models.reference.unet, demo_models.reference.negative_embeds
    latents, t = torch.randn(3, *demo_models.latent_shape), torch.tensor([1, 500, 999])
    embeds = demo_models.encode_prompts(["A painting of a cat", "A painting of a bat", "a"])
    with torch.no_grad():
        unconditional = unet(latents, t, negative.expand(3, -1, -1)).sample
        conditional = unet(latents, t, embeds).sample
        for scale in (0, 1, 5):
            guided = prdp.predict_noise(unet, latents, t, embeds, negative, scale)
            expected = unconditional + max(scale, 1) * (conditional - unconditional)
            torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- §3 the objective


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
    one_by_one = [prdp.prdp_loss(*prompt, clip_range, kl_weight)
                  for prompt in zip(*tensors, strict=True)]
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
    permuted = prdp.prdp_loss(*(x[:, order] for x in (log_probs, old, ref, rewards)), clip_range,
                              kl_weight)
    torch.testing.assert_close(permuted, loss)


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [0.3]])
def test_without_a_pair_loss_and_gradient_are_zero(rewards):
    log_probs = torch.randn(len(rewards), 4, dtype=torch.float64, requires_grad=True)
    loss = prdp.prdp_loss(log_probs, log_probs.detach(), torch.randn(len(rewards), 4).double(),
                          torch.tensor(rewards), 1e-6, 1e-5)
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


def test_the_gradient_at_the_old_policy_is_reinforce_with_leave_one_out_and_a_kl_reward():
    """4 / (B-1) [(d_i - mean d) - (r_i - mean r) / beta] at image i's mean log-prob."""
    torch.manual_seed(0)
    log_probs, ref = torch.randn(2, 3, 5, 4, dtype=torch.float64)  # (N, B, T) each
    rewards, beta = torch.rand(3, 5, dtype=torch.float64), 0.3
    shift = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)  # of the mean log-prob
    loss = prdp.prdp_loss(log_probs + shift[..., None], log_probs, ref, rewards, 1e-6, beta)
    (grad,) = torch.autograd.grad(loss, shift)
    for n in range(3):
        d = [(log_probs[n, i] - ref[n, i]).mean().item() for i in range(5)]
        r = rewards[n].tolist()
        for i in range(5):
            baseline = sum(r[j] for j in range(5) if j != i) / 4  # leave-one-out
            baseline_d = sum(d[j] for j in range(5) if j != i) / 4
            assert prdp.rloo_advantages(rewards)[n, i].item() == pytest.approx(r[i] - baseline)
            advantage = (r[i] - baseline) / beta - (d[i] - baseline_d)
            expected = -4 / 5 * advantage / 3  # (B-1)/B of it is the difference to the mean
            assert grad[n, i].item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([0, 4, 32]), st.integers(1, 3))
def test_ddpo_advantages_follow_the_rule_of_its_authors(data, tracker_size, images):
    history, queues = {}, {}
    for _ in range(data.draw(st.integers(1, 6))):
        prompts = data.draw(st.lists(st.sampled_from("abcde"), min_size=2, max_size=12))
        numbers = st.floats(-5, 5, width=32)
        rewards = [data.draw(st.lists(numbers, min_size=images, max_size=images)) for _ in prompts]
        for prompt in dict.fromkeys(prompts):  # first this epoch's rewards of each distinct prompt
            queue = queues.setdefault(prompt, collections.deque(maxlen=tracker_size))
            for of_prompt, values in zip(prompts, rewards, strict=True):
                if of_prompt == prompt:
                    queue.extend(values)
        expected = []
        for prompt, values in zip(prompts, rewards, strict=True):
            sample = queues[prompt]
            if tracker_size == 0 or len(sample) < tracker_size / 2:
                sample = list(itertools.chain(*rewards))
            mean, std = statistics.fmean(sample), statistics.pstdev(sample)
            expected.append([min(max((r - mean) / (std + 1e-6), -10), 10) for r in values])
        actual = prdp.ddpo_advantages(torch.tensor(rewards), prompts, history, tracker_size)
        assert actual.tolist() == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected]


def test_ddpo_advantages_end_at_10():
    rewards = torch.zeros(200, 1)
    rewards[7] = 1  # (200 - 1) ** 0.5 = 14 deviations above the mean
    for sign in (1, -1):
        advantages = prdp.ddpo_advantages(sign * rewards, ["x"] * 200, {}, 0)
        assert advantages[7].item() == sign * 10 and advantages.abs().sum() < 10 + 200 * 0.08


def test_grpo_advantages_have_mean_0_and_deviation_1_of_each_prompt():
    advantages = prdp.grpo_advantages(torch.rand(4, 6) * 10 + 3)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(4).double())
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(4).double(), rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize("sizes", [(12, 2, 4), (64, 1, 4), (8, 4, 3), (7, 1, 3)])
def test_the_updates_of_policy_gradients_take_disjoint_parts(sizes):
    """Parts differ by at most an image, and processes have equal shares of them."""
    prompts, images, updates = sizes
    options = dict(prompts_per_epoch=prompts, images_per_prompt=images, updates_per_epoch=updates)
    for objective in ("ddpo", "grpo", "rloo"):
        config = Config(objective=objective, **options)
        parts = torch.stack([prdp.images_of_update(config, k) for k in range(updates)])  # (K, N, B)
        assert parts.shape == (updates, prompts, images)
        assert (parts.sum(0) == 1).all()
        counts = parts.sum((1, 2))
        assert counts.max() - counts.min() <= 1
        if counts[0] % 2 == 0 == prompts % 2:
            assert torch.equal(parts[:, ::2].sum((1, 2)), parts[:, 1::2].sum((1, 2)))
    assert prdp.images_of_update(Config(objective="prdp", **options), 1).all()

    shape = prompts, images, 3
    old = torch.randn(shape, dtype=torch.float64)
    log_probs, advantages = old + 0.01 * torch.randn_like(old), torch.randn(shape[:2]).double()
    trajectories = SimpleNamespace(log_probs_old=old, advantages=advantages)
    losses = [prdp.objective_loss(config, log_probs, trajectories, part) for part in parts]
    whole = prdp.ddpo_loss(log_probs, old, advantages, config.clip_range)
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_metrics_are_what_the_readme_says():
    old, ref = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rewards = torch.rand(3, 4)
    rewards[2] = 0.5  # a prompt without a pair
    config = Config(kl_weight=0.1, images_per_prompt=4)
    given = dict(log_probs_old=old, log_probs_ref=ref, rewards=rewards, seconds={})
    given |= dict(reward_terms={"clip": rewards.flatten()})
    metrics = prdp.summarise(config, SimpleNamespace(**given), {"loss": 2.0})
    errors, targets, r_hat = [], [], (old - ref).mean(-1)
    for n, a, b in itertools.product(range(3), range(4), range(4)):
        if rewards[n, a] > rewards[n, b]:
            targets.append((rewards[n, a].item() - rewards[n, b].item()) / 0.1)
            errors.append((r_hat[n, a] - r_hat[n, b]).item() - targets[-1])
    explained = 1 - sum(e**2 for e in errors) / sum(t**2 for t in targets)
    assert metrics["explained_variance"] == pytest.approx(explained)
    assert metrics["kl"] == pytest.approx((old.mean() - ref.mean()).item())
    assert metrics["pairless_prompts"] == pytest.approx(1 / 3)
    assert metrics["reward_mean"] == pytest.approx(rewards.mean().item())
    given["log_probs_old"] = ref + (rewards.double() / 0.1)[..., None]
    metrics = prdp.summarise(config, SimpleNamespace(**given), {"loss": 2.0})
    assert metrics["explained_variance"] == pytest.approx(1)


def test_the_between_prompt_share_of_the_variance_is_estimated_without_bias():
    torch.manual_seed(0)
    rewards = 2 * torch.randn(4000, 1) + torch.randn(4000, 2)  # 4 of 5
    given = dict(log_probs_ref=None, rewards=rewards, seconds={}, reward_terms={})
    metrics = prdp.summarise(Config(images_per_prompt=2), SimpleNamespace(**given), {"loss": 0.0})
    assert metrics["between_prompt_variance"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("objective", ["prdp", "ddpo"])
def test_the_clip_fraction_counts_what_the_objectives_loss_clips(demo_models, monkeypatch,
                                                                 objective):
    flags = ["--objective", objective, "--updates_per_epoch", "2", "--clip_range", "0.1"]
    config = prdp.parse_config([*DEMO, *flags, "--images_per_prompt", "4", "--tracker_size", "0"])
    prompts = ["A painting of a cat", "A painting of a bat"]
    trajectories = prdp.collect_epoch(config, demo_models, prompts, 0, {})
    # e^0.098 - 1 is above 0.1: it is outside of DDPO's range, and its log inside of PRDP's.
    monkeypatch.setattr(prdp, "trajectory_log_probs",
                        lambda policy, embeds, latents, size: old_of(latents) + 0.098)

    def old_of(latents):
        rows = [(trajectories.latents == x).flatten(1).all(1).nonzero()[0, 0] for x in latents]
        return trajectories.log_probs_old.flatten(0, 1)[torch.stack(rows)]

    optimizer = torch.optim.SGD(demo_models.policy.unet.parameters(), 0.0)
    updates = prdp.update_policy(config, demo_models.policy, optimizer, trajectories)
    assert updates["clip_fraction"] == {"prdp": 0, "ddpo": 0.5}[objective]  # of updates 1 and 2


# ---------------------------------------------------------------- §4 the online loop, §9 evaluation


def gradient(config, policy, trajectories, dtype, micro_batch_size=None) -> torch.Tensor:
    """d loss / d weights, by two passes, or without a micro-batch size by plain autograd."""
    policy = replace(policy, unet=copy.deepcopy(policy.unet).to(dtype),
                     negative_embeds=policy.negative_embeds.to(dtype))
    embeds, latents = trajectories.prompt_embeds.to(dtype), trajectories.latents.to(dtype)
    trajectories = replace(trajectories, prompt_embeds=embeds, latents=latents)
    part = prdp.images_of_update(config, 0)
    if micro_batch_size is None:
        steps = []
        for i, t in enumerate(policy.scheduler.timesteps):
            mean, std = policy.mean_std(latents[:, i], t.expand(len(latents)), embeds)
            steps.append(prdp.gaussian_log_prob(latents[:, i + 1], mean, std))
        log_probs = torch.stack(steps, 1).view_as(trajectories.log_probs_old)
        prdp.objective_loss(config, log_probs, trajectories, part).backward()
    else:
        log_probs = prdp.trajectory_log_probs(policy, embeds, latents, micro_batch_size)
        log_probs = log_probs.view_as(trajectories.log_probs_old).requires_grad_()
        loss = prdp.objective_loss(config, log_probs, trajectories, part)
        (grad,) = torch.autograd.grad(loss, log_probs)
        assert (0 < (grad == 0).sum() < grad.numel()) == math.isfinite(config.clip_range)
        prdp.backward_log_probs(policy, trajectories, grad.flatten(0, 1), micro_batch_size)
    return torch.cat([parameter.grad.flatten() for parameter in policy.unet.parameters()]).double()


@pytest.mark.parametrize("objective, clip_range",
                         [("prdp", math.inf), ("prdp", 2e-3), ("grpo", 2e-3)])
def test_two_pass_gradient_equals_plain_autograd(demo_models, objective, clip_range):
    """Through all T steps and all pairs at once, with guidance, at a policy that has moved."""
    config = Config(**prdp.PRESETS["demo"]
                    | dict(objective=objective, clip_range=clip_range, num_steps=4,
                           prompts_per_epoch=2, images_per_prompt=3))
    prompts = ["A painting of a cat", "A painting of a bat"]
    trajectories = prdp.collect_epoch(config, demo_models, prompts, 0, {})
    trajectories.rewards = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.9]])
    trajectories.advantages = prdp.grpo_advantages(trajectories.rewards)
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


def test_before_the_first_update_of_every_epoch_the_policy_is_exactly_the_old_one(tmp_path,
                                                                                  monkeypatch):
    differences, update_policy = [], prdp.update_policy

    def checked(config, policy, optimizer, trajectories):
        log_probs = prdp.trajectory_log_probs(policy, trajectories.prompt_embeds,
                                              trajectories.latents, config.micro_batch_size)
        differences.append((log_probs.view_as(trajectories.log_probs_old)
                            - trajectories.log_probs_old).abs().max())
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
    return [{k: v for k, v in line.items() if not k.startswith("seconds") and k != "peak_gib"}
            for line in metrics]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(run / "unet").state_dict()


def test_a_stopped_run_continues_to_the_bit_identical_end(tmp_path):
    train(tmp_path / "whole", "--num_epochs", "2", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "1", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "2", "--updates_per_epoch", "2")
    whole, stopped = (without_measurements(read_metrics(tmp_path / run))
                      for run in ("whole", "stopped"))
    assert whole == stopped and [line["epoch"] for line in whole] == [1, 2]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[name])
    for file in ("config.json", "metrics.jsonl", "reward.png", "samples/epoch_0000.png",
                 "samples/epoch_0002.png", "checkpoint.pt"):
        assert (tmp_path / "whole" / file).stat().st_size > 0
    assert not list((tmp_path / "whole").rglob("*.tmp"))


def test_equal_rewards_leave_the_weights_as_they_are(tmp_path):
    constant = tmp_path / "constant.py"
    constant.write_text("def one(images, prompts):\n    return images.new_ones(len(images))\n")
    flags = ["--weight_decay", "1", "--reward", f"{constant}:one"]  # a decay that would be seen
    train(tmp_path / "run", "--num_epochs", "1", *flags)
    base = load_pipeline("demo/model").unet.state_dict()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, base[name])
    assert read_metrics(tmp_path / "run")[0]["loss"] == 0


@pytest.mark.parametrize("flags",
                         ["--offline", "--objective ddpo", "--objective grpo --updates_per_epoch 3",
                          "--clip_range inf"])
def test_each_of_the_papers_comparisons_is_one_flag(tmp_path, flags):
    train(tmp_path / "run", "--num_epochs", "2", *flags.split())
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["reward_mean"] != metrics[1]["reward_mean"]
    assert (metrics[1]["kl"] is None) == ("inf" not in flags)


def test_offline_training_samples_each_epochs_prompts_and_noise_from_the_reference(demo_models):
    prompts = ["A painting of a cat", "A painting of a bat"]
    online, offline = (prdp.parse_config([*DEMO, *flags]) for flags in ([], ["--offline"]))
    fresh = [prdp.collect_epoch(online, demo_models, prompts, epoch, {}) for epoch in (0, 1)]
    torch.manual_seed(1)
    for parameter in demo_models.policy.unet.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    for epoch, expected in enumerate(fresh):
        pool = prdp.collect_epoch(offline, demo_models, prompts, epoch, {})
        assert torch.equal(pool.latents, expected.latents)
        assert torch.equal(pool.log_probs_ref, expected.log_probs_old)
        assert not torch.equal(pool.log_probs_old, expected.log_probs_old)
    assert not torch.equal(fresh[0].latents, fresh[1].latents)


def save_pipeline(folder: Path, unet: dict, text: dict, vae: dict | None = None, **schedule):
    """A Stable Diffusion of the given shapes with random weights, the rest from the demo's."""
    demo = load_pipeline("demo/model")
    demo.tokenizer.model_max_length = text["max_position_embeddings"]
    torch.manual_seed(0)
    vae = AutoencoderKL(**vae) if vae else demo.vae
    channels = vae.config.latent_channels
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=demo.tokenizer,
        unet=UNet2DConditionModel(in_channels=channels, out_channels=channels, **unet),
        scheduler=DDIMScheduler(**SD_SCHEDULE, **schedule), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)


def test_a_model_built_like_stable_diffusion_2_trains_and_scores_like_its_sampler(tmp_path):
    """v prediction, a wide text encoder with gelu, linear projections, heads of equal width."""
    unet = dict(sample_size=6, block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4),
                cross_attention_dim=48, use_linear_projection=True, norm_num_groups=8)
    text = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                hidden_act="gelu", max_position_embeddings=16)
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


def test_diffusers_own_pipeline_draws_the_same_images_with_a_runs_unet(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1", "--learning_rate", "1e-3")
    config = prdp.parse_config(["--evaluate", str(tmp_path / "run"), "--num_steps", "6"])
    models = prdp.load_models(config, CPU)
    models.policy.unet.load_state_dict(weights(tmp_path / "run"))
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
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False,
                                                   set_alpha_to_one=False)
    generator.manual_seed(0)  # which draws x_T, and then every step's noise
    theirs = pipeline(prompt, num_inference_steps=6, guidance_scale=config.guidance_scale, eta=1.0,
                      generator=generator, output_type="pt").images
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
    assert (tmp_path / "run/checkpoint.pt").stat().st_size < 1e6

    config = prdp.parse_config(["--evaluate", str(tmp_path / "run"), "--samples_per_prompt", "2"])
    models = prdp.load_models(config, CPU)
    prdp.Run(str(tmp_path / "run")).load(config, models.policy.unet)
    channels_last = dict(memory_format=torch.channels_last)  # for the same kernels
    untouched = load_pipeline("demo/model").unet.to(**channels_last)
    untouched = replace(models.policy, unet=untouched)
    embeds = models.encode_prompts(["A painting of a cat", "A painting of a bat"])
    noise = torch.randn(2, config.num_steps + 1, *models.latent_shape)
    latents, log_probs = prdp.sample_trajectories(models.policy, embeds, noise, 5)
    expected = prdp.trajectory_log_probs(untouched, embeds, latents, 5)
    assert torch.equal(prdp.trajectory_log_probs(models.reference, embeds, latents, 5), expected)
    assert torch.equal(prdp.trajectory_log_probs(models.policy, embeds, latents, 5), log_probs)
    assert not torch.isclose(log_probs, expected, atol=1e-5).all()

    pipeline = load_pipeline("demo/model")
    pipeline.load_lora_weights(tmp_path / "run/lora", weight_name=Path(adapters).name)
    loaded = replace(models.policy, unet=pipeline.unet.to(**channels_last))
    assert torch.equal(prdp.trajectory_log_probs(loaded, embeds, latents, 5), log_probs)
    prdp.evaluate(config, CPU)
    assert (tmp_path / "run/evaluation-two.json").exists()


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
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77)
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
    saved = torch.load(tmp_path / "run/checkpoint.pt", mmap=True)["weights"]
    before = UNet2DConditionModel.from_pretrained(tmp_path / "sd/unet").state_dict()
    assert sum(value.numel() for value in saved.values()) == 859_520_964
    moved = [not torch.equal(value, before[name]) for name, value in saved.items()]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(value, saved[name]) for name, value in weights(tmp_path / "run").items())


def test_a_run_that_goes_on_is_evaluated_from_its_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "run", "--num_epochs", "1")
    monkeypatch.setattr(prdp, "collect_epoch", lambda *_: exec("raise ValueError('stop')"))
    with pytest.raises(ValueError, match="stop"):
        train(tmp_path / "run", "--num_epochs", "2", "--gradient_checkpointing")
    flags = ["--evaluate", str(tmp_path / "run"), "--samples_per_prompt", "2"]
    prdp.evaluate(prdp.parse_config(flags), CPU)
    results = json.loads((tmp_path / "run/evaluation-two.json").read_text())["results"]
    assert results["clip"]["difference"]["mean"] != 0
    with pytest.raises(ValueError, match="--lora_rank"):
        prdp.evaluate(prdp.parse_config([*flags, "--lora_rank", "2"]), CPU)


def test_the_base_alone_is_the_column_of_a_comparison(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1")
    flags = ["--samples_per_prompt", "2", "--prompts", str(tmp_path / "two.txt")]
    prdp.evaluate(prdp.parse_config(["--evaluate", str(tmp_path / "run"), *flags]), CPU)
    base = [*DEMO, "--evaluate", "base", "--run_dir", str(tmp_path / "base"), *flags]
    prdp.evaluate(prdp.parse_config(base), CPU)
    run, base = (
        json.loads((tmp_path / folder / "evaluation-two.json").read_text())["results"]["clip"]
        for folder in ("run", "base")
    )
    assert base["base"] == run["base"] and "finetuned" not in base


def test_presets_are_table_4_and_ddpo_has_defaults_of_its_own(capsys):
    names = ("num_epochs", "updates_per_epoch", "prompts_per_epoch", "images_per_prompt",
             "kl_weight", "clip_range", "learning_rate")
    table = {"small": (100, 10, 32, 16, 3e-5, 1e-6, 1e-5),
             "large": (1000, 1, 64, 8, 3e-6, 1e-4, 7e-6),
             "multi": (1000, 1, 64, 8, 3e-5, 1e-4, 1e-5)}
    for preset, expected in table.items():
        c = prdp.parse_config(["--preset", preset])
        assert tuple(getattr(c, name) for name in names) == expected
        assert (c.num_steps, c.guidance_scale, c.weight_decay, c.max_grad_norm) == (50, 5, 1e-4, 1)
        assert c.model == "CompVis/stable-diffusion-v1-4" and c.objective == "prdp"
        for flags, count in (([], 512), (["--prompts_per_epoch", "8"], 8)):
            c = prdp.parse_config(["--preset", preset, "--objective", "ddpo", *flags])
            assert (c.prompts_per_epoch, c.images_per_prompt, c.updates_per_epoch) == (count, 1, 4)
            assert (c.clip_range, c.learning_rate, c.tracker_size) == (1e-4, 1e-5, 32)
        c = prdp.parse_config(["--preset", preset, "--objective", "grpo"])
        assert (c.prompts_per_epoch, c.images_per_prompt, c.clip_range) == (*expected[2:4], 1e-4)
    demo, ddpo = (prdp.parse_config(["--preset", "demo", *flags])
                  for flags in ([], ["--objective", "ddpo"]))
    assert ddpo.prompts_per_epoch == demo.prompts_per_epoch * demo.images_per_prompt
    assert demo.run_dir == "runs/demo-clip"  # without those that are only watched
    assert prdp.parse_config([]) == Config(run_dir="runs/small-hpsv2")
    assert prdp.parse_config(["--preset", "multi"]).reward == "pickscore=10,hpsv2=2,aesthetic=0.05"
    assert prdp.parse_config(["--preset", "large", "--learning_rate", "1"]).learning_rate == 1
    with pytest.raises(SystemExit):
        prdp.parse_config(["--preset", "demo", "--help"])
    assert f"E: epochs (default: {demo.num_epochs})" in capsys.readouterr().out


def test_loading_a_model_gives_no_warning():
    with warnings.catch_warnings(action="error"):
        load_pipeline("demo/model")


def test_evaluate_compares_base_and_finetuned_from_the_same_noise(tmp_path, capsys):
    train(tmp_path / "run", "--num_epochs", "1")
    run = prdp.Run(str(tmp_path / "run"))
    state = torch.load(run.checkpoint)
    base = load_pipeline("demo/model").unet.state_dict()
    run.save(**state | {"weights": base})  # finetuned = base
    flags = ["--evaluate", str(tmp_path / "run"), "--prompts", str(tmp_path / "two.txt")]
    config = prdp.parse_config([*flags, "--samples_per_prompt", "3"])
    assert config.num_steps == 4
    prdp.evaluate(config, CPU)
    result = json.loads((tmp_path / "run/evaluation-two.json").read_text())["results"]["clip"]
    assert result["difference"] == {"mean": 0, "standard_error": 0}
    assert result["base"] == result["finetuned"] and result["base"]["standard_error"] > 0
    assert result["better"]["mean"] == 0
    assert (tmp_path / "run/evaluation-two.png").exists() and "clip" in capsys.readouterr().out
    models = prdp.load_models(config, CPU)
    scores, cat_and_bat = torch.zeros(2), ["A painting of a cat", "A painting of a bat"]
    for index, prompt in enumerate(cat_and_bat):
        latents = prdp.sample_latents(config, models, models.policy, cat_and_bat, [index], 3)
        scores[index] = models.score(latents, [prompt] * 3, 8)["clip"].mean()
    error = scores.std() / math.sqrt(2)
    assert result["base"]["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert result["base"]["standard_error"] == pytest.approx(error.item(), abs=1e-5)


# ---------------------------------------------------------------------------------------- §5 models


class Trap:
    """A pickle of it, when loaded without care, makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pipeline_that_lacks_a_weight_or_has_code_in_it_is_refused(tmp_path):
    for number, (part, file, change, message) in enumerate(
        (
            ("unet", "diffusion_pytorch_model", "a weight less", "conv_in.weight"),
            ("vae", "diffusion_pytorch_model", "other shapes", "decoder.conv_in.bias"),
            ("text_encoder", "model", "a weight less", "final_layer_norm.bias"),
            ("unet", "diffusion_pytorch_model", "a pickle", "Unable to load weights"),
            ("text_encoder", "pytorch_model", "a pickle", "UnpicklingError"),
            ("scheduler", "PNDMScheduler", "a script", None),
        )
    ):
        model = tmp_path / str(number)
        shutil.copytree("demo/model", model)
        if change == "a script":
            index = json.loads((model / "model_index.json").read_text())
            (model / "model_index.json").write_text(json.dumps(index | {part: ["mine", "Mine"]}))
            code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom diffusers import {file}\n"
            code += f"Mine = {file}\n"
            (model / part / "mine.py").write_text(code)
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
            load_pipeline(model)
            continue
        with pytest.raises(ValueError, match=f"--model .* cannot be used .*{message}") as error:
            load_pipeline(model)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_half_precision_is_taken_where_there_is_no_float32_and_never_for_a_broken_one(tmp_path,
                                                                                      capsys):
    shutil.copytree("demo/model", tmp_path / "model")
    whole = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    half = whole.with_suffix(".fp16.safetensors")
    weights = {name: w.half() for name, w in safetensors.torch.load_file(whole).items()}
    safetensors.torch.save_file(weights, half)
    whole.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="--model .* cannot be used .*Unable to load weights"):
        load_pipeline(tmp_path / "model")
    whole.unlink()
    unet = load_pipeline(tmp_path / "model").unet
    assert torch.equal(unet.conv_in.weight, weights["conv_in.weight"].float())
    assert "half precision" in capsys.readouterr().out


@pytest.mark.parametrize("part, change, message",
                         [("unet", {"time_cond_proj_dim": 16}, "consistency model"),
                          ("tokenizer", None, ""),
                          ("scheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
                          ("scheduler", {"beta_schedule": None}, "betas")])
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, part, change, message):
    shutil.copytree("demo/model", tmp_path / "model")
    folder = tmp_path / "model" / part
    if part == "tokenizer":
        shutil.rmtree(folder)
    elif part == "scheduler":
        file = folder / "scheduler_config.json"
        schedule = json.loads(file.read_text()) | change
        schedule = {name: value for name, value in schedule.items() if value is not None}
        file.write_text(json.dumps(schedule))
    else:
        config = UNet2DConditionModel.load_config(folder)
        UNet2DConditionModel.from_config({**config, **change}).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"--model .*model cannot be used .*{message}") as e:
        load_pipeline(tmp_path / "model")
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------- §7 processes


def a_rank(rank: int, environment: dict, flags: list[str], log: Path, fault: str) -> None:
    """What torchrun starts, forked from a process that has imported everything already."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["prdp.py", *flags]
    ON_A_RANK[fault](rank)
    prdp.main()


def in_float64(rank: int) -> None:
    """So that what is left of a difference is no rounding; every epoch's latents are saved."""
    load_models, make_noise, collect_epoch = prdp.load_models, prdp.make_noise, prdp.collect_epoch

    def load_double(config, device):
        models = load_models(config, device)
        for network in (models.policy.unet, models.reference.unet):
            network.double()
        models.pipeline.to(torch.float64)
        negative_embeds = models.encode_prompts([""])
        models.policy.negative_embeds = models.reference.negative_embeds = negative_embeds
        return models

    def collect_and_save(config, models, prompts, epoch, history):
        trajectories = collect_epoch(config, models, prompts, epoch, history)
        torch.save(trajectories.latents, f"{config.run_dir}/{epoch}.{rank}.pt")
        return trajectories

    prdp.load_models, prdp.collect_epoch = load_double, collect_and_save
    prdp.make_noise = lambda *key: make_noise(*key).double()
    prdp.save_grid = lambda *_: None  # to save time


def nan_on_rank_1(rank: int) -> None:
    score = prdp.Models.score
    prdp.Models.score = lambda *given: {name: term * (math.nan if rank == 1 else 1)
                                        for name, term in score(*given).items()}


def raise_on_rank_1(rank: int) -> None:
    def failing(*_):
        raise KeyError("a mistake")

    if rank == 1:
        prdp.objective_loss = failing


ON_A_RANK = {"none": lambda rank: None, "float64": in_float64}
ON_A_RANK |= {"nan": nan_on_rank_1, "raise": raise_on_rank_1}


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
        environment |= {"TORCHELASTIC_RUN_ID": "none"}
        self.run, self.log = run, run.with_suffix(".log")
        self.log.write_text("")
        flags = demo_flags(run, *flags)
        self.processes = [forks.Process(target=a_rank,
                                        args=(rank, environment, flags, self.log, fault))
                          for rank in range(world)]
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


@pytest.mark.parametrize("objective", ["prdp", "ddpo"])
def test_1_2_3_and_4_processes_sample_the_same_and_follow_the_same_curve(tmp_path, objective):
    """In float64: Adam's first step makes a whole step even of a gradient that is rounding."""
    flags = [*TWELVE, "--reward", "jpeg_incompressibility"]  # the others round to float32
    flags += ["--objective", objective, "--tracker_size", "8"]
    worlds = [("1", 1), ("2", 2), ("3", 3), ("4", 4)][: 4 if objective == "prdp" else 2]
    for run, world in worlds:
        epochs = ["--num_epochs", "1"] if run == "2" else []  # and a resume by as many
        for more in (epochs, []) if epochs else ([],):
            launch = Launch(tmp_path / run, world, *flags, *more, fault="float64")
            assert set(launch.end(within=150)) == {0}, launch.log.read_text()
    for epoch, (run, world) in itertools.product(range(3), worlds[1:]):
        one = torch.load(tmp_path / f"1/{epoch}.0.pt").unflatten(0, (12, -1))
        parts = [torch.load(tmp_path / f"{run}/{epoch}.{rank}.pt") for rank in range(world)]
        several = torch.stack([part.unflatten(0, (12 // world, -1)) for part in parts], 1)
        several = several.flatten(0, 1)  # rank r has the prompts r, r + world, ...
        assert torch.equal(one[:, :, 0], several[:, :, 0])
        torch.testing.assert_close(one, several, rtol=1e-7, atol=1e-7)

    def drop_none(line: dict) -> dict:  # ddpo has no kl
        return {key: value for key, value in line.items() if value is not None}

    expected = without_measurements(read_metrics(tmp_path / "1"))
    for run, _ in worlds[1:]:
        metrics = without_measurements(read_metrics(tmp_path / run))
        for line, other in zip(expected, metrics, strict=True):
            assert drop_none(line) == pytest.approx(drop_none(other), rel=1e-6, abs=1e-8), run


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


def test_a_reward_that_is_nan_on_one_process_ends_all_and_is_told_once(tmp_path):
    launch = Launch(tmp_path / "run", 2, "--num_epochs", "2", fault="nan")
    assert 0 not in launch.end(), launch.log.read_text()
    log = launch.log.read_text()
    assert log.count("prdp.py: error") == 1 and "on rank 0: epoch 1: --reward" in log, log
    assert "Traceback" not in log


def test_what_one_process_raises_ends_all_and_is_told_with_its_rank(tmp_path):
    launch = Launch(tmp_path / "run", 2, "--num_epochs", "2", fault="raise")
    assert 0 not in launch.end(), launch.log.read_text()
    assert "prdp.py: error on rank 1: KeyError: 'a mistake'" in launch.log.read_text()


def test_ctrl_c_and_sigterm_end_all_processes_at_once_without_a_word(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        launch = Launch(tmp_path / number.name, 2, "--num_epochs", "1000")
        launch.wait_for("metrics.jsonl")
        for process in launch.processes:
            os.kill(process.pid, number)
        assert launch.end(within=5) == [-number] * 2
        assert "Traceback" not in (log := launch.log.read_text()) and "error" not in log


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
        "once, run_epoch = pathlib.Path(__file__).with_suffix('.once'), prdp.run_epoch\n"
        "def killed(config, models, optimizer, prompts, epoch, history):\n"
        "    if epoch == 1 and prdp.rank() == 1 and not once.exists():\n"
        "        once.touch()\n"
        "        while not pathlib.Path(config.run_dir, 'metrics.jsonl').exists():\n"
        "            time.sleep(0.01)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return run_epoch(config, models, optimizer, prompts, epoch, history)\n"
        "prdp.run_epoch = killed\n"
        "prdp.main()\n"
    )
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=2".split()
    process = subprocess.run([sys.executable, *launch, str(script), *flags],
                             env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                             text=True, timeout=150)
    assert process.returncode == 0 and "after epoch 1" in process.stdout, process.stderr
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/unet").is_dir()


# ---------------------------------------------------------------------------------- §8 runs on disk


def ending(run: Path) -> tuple:
    """What a finished run must have in common with one that was never stopped."""
    assert not list(run.rglob("*.tmp"))
    unet = {file.name: file.read_bytes() for file in (run / "unet").iterdir()}
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*"))
    return unet, names, without_measurements(read_metrics(run))


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path):
    """A limit on the size of files stands for the disk: the real writers meet a failing write."""
    train(tmp_path / "whole", "--num_epochs", "2")
    train(tmp_path / "run", "--num_epochs", "1")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limits[1]))
    try:
        with pytest.raises(Exception) as error:
            train(tmp_path / "run", "--num_epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in explain(error.value)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    del error  # the folder's lock is held as long as its frames live
    gc.collect()
    train(tmp_path / "run", "--num_epochs", "2")
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


def test_a_folder_is_refused_while_another_process_is_at_work_on_it(tmp_path):
    first, second = prdp.Run(str(tmp_path / "run")), prdp.Run(str(tmp_path / "run"))
    first.lock()
    with pytest.raises(ValueError, match="--run_dir .*run: another process is at work on it"):
        second.lock()
    first.lock_file.close()
    second.lock()


@settings(deadline=None, max_examples=300, database=None)
@given(st.integers(0, 2**32), st.binary(max_size=4), st.sampled_from([0, 1, 4, 5000, 2**32]))
def test_a_damaged_checkpoint_is_refused_or_was_not_harmed(checkpointed, at, put_in, taken_out):
    run, whole, expected = checkpointed
    at %= len(whole)
    network = torch.nn.Linear(40, 40, bias=False)
    run.checkpoint.write_bytes(whole[:at] + put_in + whole[at + taken_out :])
    try:
        state = run.load(Config(), network)
    except ValueError as error:
        assert "is not a whole checkpoint" in str(error) and "\n" not in str(error)
    else:
        assert state["metrics"] == expected["metrics"]
        assert torch.equal(network.weight, expected["weights"]["weight"])


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A run's folder with a checkpoint, its bytes, and its content."""
    run = prdp.Run(str(tmp_path_factory.mktemp("run")))
    state = {"config": vars(Config()), "metrics": [{"epoch": 1}], "history": {}}
    state |= {"weights": {"weight": torch.randn(40, 40)}, "optimizer": {}}
    run.save(**state)
    return run, run.checkpoint.read_bytes(), state


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    run = prdp.Run(str(tmp_path))
    run.save(config=vars(Config()), trap=Trap(tmp_path / "sprung"))
    with pytest.raises(ValueError, match="checkpoint.pt is not a whole checkpoint") as error:
        run.load(Config(), torch.nn.Linear(1, 1))
    assert "\n" not in str(error.value) and not (tmp_path / "sprung").exists()


def test_between_checkpoints_a_kill_costs_the_epochs_since_the_last_one(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    flags = ["--num_epochs", "5", "--save_every", "2"]
    train(tmp_path / "whole", *flags)
    run_epoch = prdp.run_epoch

    def killed(config, models, optimizer, prompts, epoch, history):
        if epoch == 3:
            raise Killed
        return run_epoch(config, models, optimizer, prompts, epoch, history)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prdp, "run_epoch", killed)
        train(tmp_path / "run", *flags)
    gc.collect()
    assert len(read_metrics(tmp_path / "run")) == 3
    train(tmp_path / "run", *flags)
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")
    (tmp_path / "run/metrics.jsonl").unlink()  # as a kill after the last checkpoint would leave it
    train(tmp_path / "run", *flags)
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


def test_numbers_that_are_not_finite_stop_the_run_by_name_and_change_no_weight(demo_models):
    config = prdp.parse_config([*DEMO, "--updates_per_epoch", "2"])
    policy, prompts = demo_models.policy, ["a cat", "a bat"]
    weights = prdp.trained_weights(policy.unet)
    optimizer = torch.optim.AdamW(weights.values())
    trajectories = prdp.collect_epoch(config, demo_models, prompts, 4, {})
    before = {name: weight.clone() for name, weight in weights.items()}

    ref, latents = trajectories.log_probs_ref.clone(), trajectories.latents.clone()
    ref[1, 2, 3] = math.nan
    latents[0, 2] = math.inf
    for change in ({"log_probs_ref": ref}, {"latents": latents}):
        with pytest.raises(ValueError, match="update 1: the gradient's norm is nan; nothing of"):
            prdp.update_policy(config, policy, optimizer, replace(trajectories, **change))
        optimizer.zero_grad()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())

    for part in (demo_models.pipeline.vae.decoder.conv_out, policy.unet.conv_out):
        part.bias.data[0] = math.nan
        with pytest.raises(ValueError, match="epoch 5: --reward clip:demo/clip is .*nan.* for 'a "):
            prdp.collect_epoch(config, demo_models, prompts, 4, {})


# --------------------------------------------------------------------------------------- rewards.py


httpx = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a cat", "a bat in a hat", "a " + "very " * 90 + "long prompt"]


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth pictures (3, H, W) with a bit of noise, in multiples of 1/255."""
    torch.manual_seed(0)
    smooth = [torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), size, mode="bicubic")[0]
              for size in sizes]
    noisy = [(image + 0.1 * torch.randn_like(image)).clamp(0, 1) for image in smooth]
    return [(image * 255).round() / 255 for image in noisy]


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def copy_clip(folder: Path) -> Path:
    """The demo's, with its image processor in a file and under a name of old, as PickScore_v1's."""
    shutil.copytree("demo/clip", folder)
    old = dict.fromkeys(("image_processor_type", "feature_extractor_type"), "CLIPFeatureExtractor")
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | old))
    (folder / "processor_config.json").unlink()
    return folder


def save_aesthetic_head(file: Path, width: int) -> torch.nn.Sequential:
    """The published layers with random weights, which the file gets under their published names."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    head = torch.nn.Sequential(linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2),
                               linear(128, 64), dropout(0.1), linear(64, 16), linear(16, 1)).eval()
    torch.save({f"layers.{name}": weight for name, weight in head.state_dict().items()}, file)
    return head


@pytest.fixture
def reward_folder(tmp_path, monkeypatch):
    """Weights of every reward, small: hps.pt, and CLIP with an aesthetic predictor's head."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", TINY_CLIP)
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model("ViT-H-14").state_dict()}, tmp_path / "hps.pt")
    save_aesthetic_head(copy_clip(tmp_path / "clip") / "aesthetic-model.pth", width=64)
    return tmp_path


@pytest.fixture
def official_hpsv2(tmp_path, monkeypatch):
    """The package hpsv2's scoring, with what its wheel lacks: a vocabulary, and a progress bar."""
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose answers are those of hub.answer; it notes its requests in hub.requests."""
    hub = SimpleNamespace(requests=[], answer=None)

    def respond(request):
        hub.requests.append((request.method, request.url.path))
        return hub.answer(request)

    def client():
        return httpx.Client(transport=httpx.MockTransport(respond))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT_FACTORY", client)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()


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
    official_hpsv2.model_dict.clear()
    del network

    reward = load_reward(f"hpsv2:{tmp_path if size == 'tiny' else file}", CPU)
    for prompt, scores in zip(PROMPTS, expected, strict=True):
        actual = [reward(image[None], [prompt]).item() for image in images]
        assert actual == pytest.approx(scores, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_clip_and_pickscore_are_the_cosine_that_pickscores_authors_compute(tmp_path, name):
    network = CLIPModel.from_pretrained("demo/clip").eval()
    processor = CLIPProcessor.from_pretrained("demo/clip")
    options = dict(padding=True, truncation=True, return_tensors="pt")
    options["max_length"] = network.config.text_config.max_position_embeddings
    reward = load_reward(f"{name}:{copy_clip(tmp_path / 'clip')}", CPU)
    for image, prompt in zip(pictures((48, 48), (32, 32), (300, 512)), PROMPTS, strict=True):
        with torch.no_grad():
            output = network(**processor(images=pil(image), text=[prompt], **options))
        expected = (output.text_embeds @ output.image_embeds.T)[0]  # both of length 1
        torch.testing.assert_close(reward(image[None], [prompt]), expected, rtol=0, atol=1e-6)


def test_aesthetic_is_its_published_network(tmp_path):
    network = CLIPModel.from_pretrained("demo/clip").eval()
    processor = CLIPProcessor.from_pretrained("demo/clip").image_processor
    file = copy_clip(tmp_path / "clip") / "sac+logos+ava1-l14-linearMSE.pth"
    published = save_aesthetic_head(file, width=64)
    assert [*torch.load(file)][::2] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]  # as its own
    reward = load_reward(f"aesthetic:{tmp_path}/clip", CPU)
    for image in pictures((48, 48), (32, 32), (300, 512)):
        inputs = processor(pil(image), return_tensors="pt")
        with torch.no_grad():
            features = network.visual_projection(network.vision_model(**inputs).pooler_output)
            expected = published(features / features.norm(dim=-1, keepdim=True))[0]
        torch.testing.assert_close(reward(image[None], ["a"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scorer", ["hpsv2:{}/hps.pt", "hpsv2.1:{}/hps.pt", "pickscore:{}/clip", "aesthetic:{}/clip"]
)
def test_rewards_are_float32_under_any_autocast_and_the_same_in_any_batch(reward_folder, scorer):
    reward = load_reward(scorer.format(reward_folder), CPU)
    images = torch.stack(pictures((48, 48), (48, 48), (48, 48)))
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loaded_here = load_reward(scorer.format(reward_folder), CPU)
            assert torch.equal(loaded_here(images, PROMPTS), scores)
            assert torch.equal(reward(images, PROMPTS), scores)
    alone = [reward(image[None], [p]) for image, p in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=0, atol=1e-6)


def test_a_prompt_is_encoded_once_for_all_of_its_images(reward_folder, monkeypatch):
    encoded, encode_text = [], open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text",
                        lambda self, text: encoded.append(len(text)) or encode_text(self, text))
    reward = load_reward(f"hpsv2:{reward_folder}/hps.pt", CPU)
    for _ in range(3):
        reward(torch.rand(6, 3, 32, 32), ["a cat", "a bat"] * 3)
    assert encoded == [1, 1]


def test_a_reward_imports_only_what_it_needs():
    script = ("import sys, torch; from rewards import load_reward\n"
              "load_reward('jpeg_compressibility', 'cpu')(torch.rand(1, 3, 8, 8), ['']);"
              "print('open_clip' in sys.modules, 'transformers' in sys.modules)\n"
              "load_reward('clip:demo/clip', 'cpu'); print('open_clip' in sys.modules)")
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout.split() == ["False", "False", "False"]


def test_weights_that_do_not_fit_are_refused_by_name_and_code_in_them_does_not_run(reward_folder):
    folder = reward_folder

    def refusal(spec):
        with pytest.raises(ValueError, match=f"--reward {re.escape(spec)} cannot be loaded") as e:
            load_reward(spec, CPU)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
        return str(e.value)

    state = torch.load(folder / "hps.pt")["state_dict"]
    whole = (folder / "hps.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(state, folder / "bare.pt")
    torch.save({"state_dict": {**state, "visual.proj": torch.zeros(64, 33)}}, folder / "wider.pt")
    torch.save({"state_dict": state | {"score.weight": torch.zeros(1)}}, folder / "more.pt")
    del state["ln_final.bias"]
    torch.save({"state_dict": state}, folder / "less.pt")
    for name, found in (("wider", "visual.proj: copying a param with shape torch.Size([64, 33])"),
                        ("more", "score.weight"), ("less", "ln_final.bias"), ("bare", "KeyError"),
                        ("truncated", ""), ("nowhere", "No such file")):
        assert found in refusal(f"hpsv2:{folder}/{name}.pt")

    class Code:
        def __reduce__(self):
            return Path.touch, (folder / "ran",)

    torch.save({"state_dict": Code()}, folder / "code.pt")
    assert "code in it" in refusal(f"hpsv2:{folder}/code.pt")
    torch.save(Code(), folder / "clip/aesthetic-model.pth")
    assert "code in it" in refusal(f"aesthetic:{folder}/clip")
    assert not (folder / "ran").exists()

    file = folder / "clip/model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = "vision_model.post_layernorm.weight"
    for changed in (weights | {name: torch.zeros(3)}, weights):
        if changed is weights:
            del weights[name]
        safetensors.torch.save_file(changed, file, {"format": "pt"})
        assert name in refusal(f"pickscore:{folder}/clip")
    file.write_bytes(file.read_bytes()[:1000])
    refusal(f"clip:{folder}/clip")


def test_jpeg_rewards_are_the_size_of_the_file(tmp_path):
    images = torch.stack([torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.5)])
    sizes = []
    for image in images:
        pil(image).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    for name, sign in (("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)):
        scores = load_reward(name, CPU)(images, ["", ""])
        assert (sign * scores).tolist() == pytest.approx(sizes)


def test_a_weighted_sum_is_the_sum_of_its_parts_and_a_weight_of_0_only_watches(tmp_path):
    file = tmp_path / "a, b=c.py"  # a path with every character that the spec's rule uses
    file.write_text("print('imported')\n"
                    "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
                    "def nan(images, prompts):\n    return [float('nan')] * len(prompts)\n")
    images, prompts = torch.rand(3, 3, 32, 32), ["A painting of a cat"] * 3
    red, nan = f'"{file}:red=3"', f'"{file}:nan=0"'
    whole = load_reward(f"{red}, jpeg_compressibility=0.05,clip:demo/clip,{nan}", CPU)
    parts = {red: 1, "jpeg_compressibility": 0.05, "clip:demo/clip": 1}
    expected = sum(weight * load_reward(part, CPU)(images, prompts)
                   for part, weight in parts.items())
    torch.testing.assert_close(whole(images, prompts), expected)
    terms = whole.terms(images, prompts)
    assert list(terms) == list(whole.weights) == ["red", "jpeg_compressibility", "clip", "nan"]
    assert terms["nan"].isnan().all()
    torch.testing.assert_close(terms["red"], images[:, 0].mean((1, 2)), rtol=0, atol=1e-3)
    images[1, 0, 0, 0] = math.nan
    assert whole(images, prompts).isnan().tolist() == [False, True, False]


def test_the_multi_reward_gives_table_3s_base_row_from_table_2s():
    """Unseen Pick-a-Pic, animation, concept art, painting, photo; A is the aesthetic score."""
    pickscore = torch.tensor([0.2082, 0.2111, 0.2062, 0.2059, 0.2172])
    hpsv2 = torch.tensor([0.2665, 0.2737, 0.2656, 0.2654, 0.2750])
    published = torch.tensor([2.888, 2.927, 2.877, 2.883, 2.984])
    aesthetic = torch.full((5,), 5.5)  # published for this model on other prompts: 5.49
    terms = parse_reward("pickscore=10,hpsv2=2,aesthetic=0.05")  # --preset multi
    reward = Reward({}, {name: weight for name, (_, _, weight) in terms.items()})
    total = reward.total(dict(pickscore=pickscore, hpsv2=hpsv2, aesthetic=aesthetic))
    torch.testing.assert_close(total, published, rtol=0, atol=0.05 * 0.4)


@pytest.mark.parametrize("spec, message",
                         {"beauty": "unknown reward 'beauty'",
                          "mine.py": "unknown reward 'mine.py'.*FILE.py:FUNCTION",
                          "nowhere.py:f": "there is no file nowhere.py",
                          "rewards.py:nothing": "there is no function 'nothing' in rewards.py",
                          "hpsv2=much": "'much'", "hpsv2=": "could not convert",
                          "hpsv2=nan": "must be finite", "hpsv2=0,clip:a=0": "one of them not 0",
                          "clip:a,clip:b": "'clip' is given twice", "clip": "'clip' lacks",
                          "pickscore:": "'pickscore:' lacks", "hpsv2,,clip:a": "empty item",
                          "": "empty item", '"hpsv2': "quotes"}.items())
def test_a_spec_that_is_not_clear_is_refused_in_a_sentence(spec, message):
    with pytest.raises(ValueError, match=f"^--reward {re.escape(spec)}: .*{message}") as error:
        load_reward(spec, CPU)
    assert "\n" not in str(error.value)


def test_no_term_can_change_what_another_sees(tmp_path):
    (tmp_path / "rude.py").write_text("""
import os, torch
def spoil():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", True)
    os.chdir("/")
spoil()
def rude(images, prompts):
    images.zero_()
    prompts.reverse()
    spoil()
    return torch.ones(len(prompts), requires_grad=True).float()
def fails(images, prompts):
    spoil()
    raise ValueError
def polite(images, prompts):
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert state == (torch.float32, False, False) and os.getcwd() != "/", state
    return [float(p == "b") + i.max().item() for i, p in zip(images, prompts)]
""")

    def state():
        return (torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"), os.getcwd())

    before, given, images = state(), ["a", "b"], torch.ones(2, 3, 8, 8)
    reward = load_reward(f"{tmp_path}/rude.py:rude=0,{tmp_path}/rude.py:polite", CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(images, given).tolist() == [1, 2] and torch.is_autocast_enabled("cpu")
    assert not reward.terms(images, given)["rude"].requires_grad
    with pytest.raises(RuntimeError, match="reward 'fails' failed: ValueError"):
        load_reward(f"{tmp_path}/rude.py:fails", CPU)(images, given)
    assert state() == before and given == ["a", "b"] and images.min() == 1


def test_a_reward_file_is_a_module_like_others(tmp_path):
    """With dataclasses, pickles and files beside it; it hides neither json nor a namesake."""
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "number.txt").write_text(str(number))
        (tmp_path / folder / "json.py").write_text(
            """
from __future__ import annotations
import dataclasses, json, pathlib, pickle
@dataclasses.dataclass
class Scale:
    by: float
scale = pickle.loads(pickle.dumps(Scale(float(json.dumps(1)))))
with open(pathlib.Path(__file__).with_name("number.txt")) as file:
    scale.by *= float(file.read())
with open(file.name.replace("number", "imports"), "a") as imports:
    imports.write("x")
def red(images, prompts): return images[:, 0].mean((1, 2)) * scale.by
def blue(images, prompts): return images[:, 2].mean((1, 2)) * scale.by
""".replace("red", "red" * number)
        )
    files = [tmp_path / folder / "json.py" for folder in ("one", "two")]
    os.chdir(tmp_path)
    reward = load_reward(f"{files[0]}:red,one/json.py:blue=0,two/json.py:redred", CPU)
    images = torch.ones(1, 3, 8, 8)
    assert reward(images, [""]).tolist() == [3]
    assert list(reward.weights) == ["red", "blue", "redred"]
    assert sys.modules["json"] is json
    assert (tmp_path / "one/imports.txt").read_text() == "x"  # once, for two functions
    files[0].write_text("def red(images, prompts): return [7.5]")
    assert load_reward(f"{files[0]}:red", CPU)(images, [""]).tolist() == [7.5]  # as it is now


FAULTS = {  # what a function does -> the kind and beginning of what is told
    "float('much')": (RuntimeError, "failed: ValueError: could not convert"),
    "sys.exit(0)": (RuntimeError, "failed: SystemExit: 0"),
    "raise BaseException('of any kind')": (RuntimeError, "failed: BaseException: of any kind"),
    "raise KeyboardInterrupt": (KeyboardInterrupt, None),
    "raise torch.OutOfMemoryError('full')": (torch.OutOfMemoryError, "^full"),  # prdp.py's advice
    "return None": (ValueError, "returned a NoneType; it must return one number an image"),
    "return [1, [2]]": (ValueError, "returned a list"),
    "return images": (ValueError, r"returned shape \(2, 3, 8, 8\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_function_that_fails_is_named_and_its_traceback_kept(tmp_path, fault):
    kind, message = FAULTS[fault]
    file = tmp_path / "mine.py"
    file.write_text(f"import sys, torch\ndef broken(images, prompts):\n    {fault}\n")
    with pytest.raises(kind, match=message) as error:
        load_reward(f"{file}:broken", CPU)(torch.rand(2, 3, 8, 8), ["", ""])
    if kind is RuntimeError:
        assert error.match("^reward 'broken'") and error.value.__cause__.__traceback__
        file.write_text(f"import sys\n{fault}  # at import\n")
        with pytest.raises(RuntimeError, match=f"--reward .*mine.py {message}"):
            load_reward(f"{file}:broken", CPU)


# ------------------------------------------------------------------------------------------ the hub


@pytest.mark.parametrize("status, code, reason",
                         [(401, "", "401: it is private or gated.*`hf auth login` or set HF_TOKEN"),
                          (403, "GatedRepo",
                           "403: it is private or gated.*`hf auth login` or set HF_TOKEN"),
                          (404, "RepoNotFound", "404: there is no such repository"),
                          (429, "", "429; try again later"), (503, "", "503; try again later"),
                          (None, "",
                           "no connection to the hub; without a network .*HF_HUB_OFFLINE=1")])
def test_the_hubs_answer_is_told_and_what_helps(hub, status, code, reason):
    def answer(request):
        if status is None:
            raise httpx.ConnectError("[Errno -3] Temporary failure in name resolution")
        return httpx.Response(status, headers={"X-Error-Code": code}, request=request)

    hub.answer = answer
    for spec in ("clip:a/b", "pickscore", "hpsv2", "aesthetic"):
        hint = "" if ":" in spec else f"; a local copy is given as {spec}:PATH"
        with pytest.raises(ValueError, match=rf"^--reward {spec} .*{reason}.*\){hint}$") as error:
            load_reward(spec, CPU)
        assert ("without a network" in str(error.value)) is (status is None)
    with pytest.raises(ValueError, match=rf"--prompts hpdv2 .*{reason}.*python -m prompts.sets"):
        read_prompts("hpdv2")


def test_a_repository_without_safetensors_is_downloaded_once_and_without_a_warning(
    hub, tmp_path, monkeypatch, caplog
):
    folder = copy_clip(tmp_path / "clip")
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"),
               folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def answer(request):
        file = folder / Path(request.url.path).name
        if "/resolve/main/" not in request.url.path or not file.is_file():
            return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": "0" * 40}
        return httpx.Response(200, headers=headers, content=file.read_bytes(), request=request)

    hub.answer, converted = answer, []
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion",
                        lambda *_, **__: converted.append("posted, and downloaded again"))
    for logger in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    with caplog.at_level(logging.WARNING):
        scores = load_reward("pickscore", CPU)(torch.ones(1, 3, 32, 32), ["a cat"])
    expected = load_reward("clip:demo/clip", CPU)(torch.ones(1, 3, 32, 32), ["a cat"])
    torch.testing.assert_close(scores, expected)
    weights = "/yuvalkirstain/PickScore_v1/resolve/main/pytorch_model.bin"
    assert hub.requests.count(("GET", weights)) == 1
    assert not converted and not caplog.records


# --------------------------------------------------------------------------- §9 flags and documents


MISTAKES = {
    "no prompt file": (["--prompts", "nowhere.txt"], "--prompts nowhere.txt"),
    "empty prompt file": (["--prompts", "EMPTY"], "no prompt in it"),
    "unknown reward": (["--reward", "beauty"], "unknown reward 'beauty'"),
    "no reward file": (["--reward", "nowhere.py:f"], "no file nowhere.py"),
    "no reward model": (["--reward", "clip:nowhere"], "--reward clip:nowhere"),
    "no model": (["--model", "./nowhere"], "--model ./nowhere"),
    "no such set": (["--prompts", "hpdv3"], "not one of the sets hpdv2, .*, hpdv2-500"),
    "no network for prompts": (["--prompts", "hpdv2-photo"], "hpdv2-photo .*HF_HUB_OFFLINE"),
    "no network for HPSv2": (["--reward", "hpsv2"], "--reward hpsv2.*HF_HUB_OFFLINE"),
    "no network for the model": (["--model", "a/b"], "--model a/b.*HF_HUB_OFFLINE"),
    "a single file": (["--model", "README.md"], "README.md cannot be used .*; see Models"),
    "negative rank": (["--lora_rank", "-1"], "--lora_rank -1"),
    "too many steps": (["--num_steps", "1000"], "--num_steps 1000: must be less than 1000"),
    "one step": (["--num_steps", "1"], "--num_steps 1: must be at least 2"),
    "SDXL": (["--model", "XL"], "StableDiffusionXLPipeline"),
    "one image": (["--images_per_prompt", "1"], "--images_per_prompt 1"),
    "no epochs": (["--num_epochs", "0"], "--num_epochs 0"),
    "negative clip": (["--clip_range", "-1"], "--clip_range -1"),
    "offline ddpo": (["--offline", "--objective", "ddpo"], "--offline: ddpo is a policy gradient"),
    "not a run": (["--evaluate", "nowhere"], "--evaluate nowhere: not the folder of a run"),
    "a run without a name": (["--evaluate", ""], "not the folder of a run"),
    "not a number": (["--learning_rate", "fast"], "--learning_rate.*: invalid float value: 'fast'"),
    "unknown flag": (["--learning", "1"], "--learning"),
    "reward NaN": (["--reward", "BAD:nan"], r"epoch 1: --reward .*:nan is .*nan.* for 'A painting"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_that_names_it(tmp_path, mistake):
    flags, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.py").write_text(
        "def nan(images, prompts):\n    return images.mean((1, 2, 3)).log() * float('nan')\n"
    )
    if "XL" in flags:
        shutil.copytree("demo/model", tmp_path / "XL")
        file = tmp_path / "XL/model_index.json"
        index = json.loads(file.read_text()) | {"_class_name": "StableDiffusionXLPipeline"}
        file.write_text(json.dumps(index))
    stand_ins = {"EMPTY": tmp_path / "empty.txt", "XL": tmp_path / "XL"}
    stand_ins["BAD:nan"] = f"{tmp_path}/bad.py:nan"
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        train(tmp_path / "run", *[str(stand_ins.get(flag, flag)) for flag in flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_files_are_json_proper(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1", "--clip_range", "inf")

    def refuse(constant):
        raise AssertionError(constant)

    content = (tmp_path / "run/config.json").read_text()
    assert json.loads(content, parse_constant=refuse)["clip_range"] == "Infinity"
    assert prdp.parse_config(["--evaluate", str(tmp_path / "run")]).clip_range == math.inf


def test_final_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        train(tmp_path / "run", "--num_epochs", "1")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "run/unet").iterdir()}
    assert modes == {0o644}


def test_a_run_made_with_other_flags_is_refused_and_kept(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="--learning_rate .* and not 1.0"):
        train(tmp_path / "run", "--num_epochs", "1", "--learning_rate", "1")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*")
                      if file.is_file()}


def test_out_of_memory_names_the_flags_that_need_less(monkeypatch):
    def overflow(config, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(prdp, "train", overflow)
    monkeypatch.setattr(sys, "argv", ["prdp.py", "--micro_batch_size", "16"])
    with pytest.raises(SystemExit, match="out of memory; lower --micro_batch_size, add"):
        prdp.main()


def test_prompts_that_the_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(prdp, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--prompts_per_epoch 32 .* 3 processes"):
        prdp.train(prdp.parse_config([]), CPU)


def test_on_the_command_line_a_mistake_is_one_line_and_a_failure(tmp_path):
    command = [sys.executable, "prdp.py", "--preset", "demo", "--prompts", "nowhere.txt"]
    command += ["--run_dir", str(tmp_path / "run")]  # whatever runs/ holds
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert (
        process.stderr.strip().splitlines()[-1].startswith("prdp.py: error: --prompts nowhere.txt")
    )


def test_the_benchmarks_run_at_their_smallest_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed = importlib.import_module("speed")
    reports = {}
    monkeypatch.setattr(speed, "report", lambda part, rows, **_: reports.update({part: rows}))
    for size in ("PROMPTS", "IMAGES", "STEPS"):
        monkeypatch.setattr(speed, size, 2)
    monkeypatch.setattr(speed, "run_prdp", lambda *flags, **_: read_nothing)
    phases = dict.fromkeys(("seconds_sampling", "seconds_scoring", "seconds_updating"), 1.0)
    read_nothing = [phases | {"peak_gib": 1.0}] * 2
    speed.floor(rounds=1)
    speed.skip(updates=2)
    speed.allreduce(rounds=1)
    speed.memory()
    speed.world(rounds=1)
    assert reports.keys() == {"floor", "skip", "allreduce", "memory", "world"}
    assert reports["skip"][0]["relative difference of gradients"] < 1e-4


def test_the_claims_report_is_made_from_the_logs_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims = importlib.import_module("claims")
    shutil.copytree(claims.LOGS, tmp_path / "claims")
    monkeypatch.setattr(claims, "LOGS", tmp_path / "claims")
    shown = (tmp_path / "claims/README.md").read_text()
    (tmp_path / "claims/README.md").unlink()
    claims.report()
    assert (tmp_path / "claims/README.md").read_text() == shown
    for claim in claims.CLAIMS.values():
        for method in claim.methods:
            prdp.parse_config(claims.flags_of(claim.preset, method))


def test_the_readmes_commands_parse_and_its_paths_exist(tmp_path):
    prdp.Run(str(tmp_path)).write_json("config.json", vars(Config()))
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    .*prdp\.py.*$", readme, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.split("&&")[-1], comments=True)
        words = [str(tmp_path) if word.startswith("runs/") else word for word in words]
        config = prdp.parse_config(words[words.index("prdp.py") + 1 :])
        assert not config.prompts.endswith(".txt") or (ROOT / config.prompts).exists(), command
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", readme):
        path = "".join(link)
        assert path.startswith("http") or (ROOT / path).exists(), path
