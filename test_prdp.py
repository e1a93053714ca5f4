"""The loss is zero at the optimum on toy distributions, and training reaches this optimum:

    test_the_loss_is_zero_at_the_optimum_of_a_discrete_chain
    test_the_loss_is_zero_at_the_optimum_of_a_gaussian_chain
    test_training_reaches_the_optimum_of_the_gaussian_chain

`pytest --collect-only -q` prints every claim. Each is compared with something trusted: Table 4,
diffusers' DDIM and pipeline, torch.distributions, plain loops, plain autograd, one process, a run
that was never stopped, the package hpsv2, the code of PickScore's authors. The sections are those
of prdp.py; then come rewards, the hub's answers and documents.

demo/, prompts/ and benchmarks/ have tests of their own. `SLOW=1 pytest` adds HPSv2's full size, 4
processes, 2 machines of 2, and 60 killed runs.
"""

import collections
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # bits are a CPU's; ask no hub
import huggingface_hub
import open_clip
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributions import Normal
from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import prdp
import prompts.sets
from prdp import Config, Policy
from rewards import Reward, load_reward

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 pytest")
multiprocessing.set_forkserver_preload(["test_prdp"])  # as `Launch` forks processes of a run
ROOT = Path(__file__).parent
CPU = torch.device("cpu")
CAT_AND_BAT = ["A painting of a cat", "A painting of a bat"]
DEMO = ("--preset demo --prompts_per_epoch 2 --images_per_prompt 4 --num_steps 4 "
        "--updates_per_epoch 2 --micro_batch_size 5 --reward clip:demo/clip "
        "--learning_rate 2e-4").split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    multiprocessing.forkserver.ensure_running()  # it imports what it forks beside the first tests
    monkeypatch.chdir(ROOT)


@pytest.fixture
def demo_models():
    return prdp.load_models(prdp.parse_config(DEMO), CPU)


# ----------------------------------------------------------------- The loss is zero at the optimum

def test_the_loss_is_zero_at_the_optimum_of_a_discrete_chain():
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


class GaussianPolicy(Policy):
    """Step i goes from x to N(slope_i * x + bias_i + c, std_i^2), c being the prompt's number."""

    def mean_std(self, latents, timesteps, embeds):
        mean = self.scheduler.slopes[timesteps] * latents + self.unet.bias[timesteps]
        return mean + embeds.unsqueeze(-1), self.scheduler.stds[timesteps]


class GaussianToy:
    """In place of `prdp.Models`: a Gaussian chain whose biases learn. A prompt is a number c, and
    the reward is w . x_0 + c.

    The optimum is pi_ref exp(w . x_0 / beta) / Z. Let a_i be the product of the slopes after step
    i. Given the outcome x of step i, pi_ref's x_0 has the mean a_i * x + constant and a variance
    that does not depend on x. So log E[exp(w . x_0 / beta) | x] is a_i * w . x / beta + constant.
    The optimal step i is pi_ref's step times the exponential of that. A Gaussian times exp(v . x)
    is a Gaussian with the same variance, and its mean is larger by variance * v. So the optimum
    only adds std_i^2 * a_i * w / beta to each bias. The first slope is 0: then Z does not depend on
    x_T, which no policy can choose.
    """

    def __init__(self, beta: float = 0.8):
        torch.manual_seed(0)
        self.latent_shape, self.num_steps = (1, 2, 3), 5
        self.direction = torch.randn(self.latent_shape)  # w
        slopes = torch.tensor([0, 0.9, 0.8, 0.9, 0.7]).view(-1, 1, 1, 1)
        stds = torch.tensor([1, 0.8, 0.7, 0.5, 0.3]).view(-1, 1, 1, 1)
        chain = SimpleNamespace(timesteps=torch.arange(self.num_steps), slopes=slopes, stds=stds)
        self.policy, self.reference = (
            GaussianPolicy(torch.nn.ParameterDict(
                {"bias": torch.zeros(self.num_steps, *self.latent_shape)}), chain,
                negative_embeds=torch.empty(0), guidance_scale=1.0) for _ in range(2))
        self.bias = self.policy.unet.bias
        self.reward = Reward({"linear": None}, {"linear": 1.0})
        after = torch.stack([slopes[i + 1 :].prod(0) for i in range(self.num_steps)])  # a_i
        self.optimal_bias = stds**2 * after * self.direction / beta
        # Log-probs are means over elements and steps, so in nats beta = kl_weight / (T * D).
        self.kl_weight = beta * self.num_steps * self.direction.numel()

    def encode_prompts(self, prompts):
        return torch.tensor([[[float(prompt)]] for prompt in prompts])

    def score(self, latents, prompts, size):
        level = torch.tensor([float(prompt) for prompt in prompts])
        return {"linear": (latents * self.direction).sum((1, 2, 3)) + level}

    def config(self, **options):
        return Config(**dict(num_steps=self.num_steps, kl_weight=self.kl_weight, max_grad_norm=1e9,
                             prompts_per_epoch=2, micro_batch_size=256) | options)


def test_the_loss_is_zero_at_the_optimum_of_a_gaussian_chain():
    toy = GaussianToy()
    config = toy.config(clip_range=1e-3)

    def loss(scale: float) -> float:
        toy.bias.data = scale * toy.optimal_bias
        trajectories = prdp.collect_epoch(config, toy, ["1", "2"], 0, {})
        return prdp.objective_loss(config, trajectories.log_probs_old, trajectories).item()

    at_reference = loss(0)
    assert loss(1) < 1e-9 * at_reference
    assert min(loss(0.9), loss(1.1)) > 1e-3 * at_reference


@pytest.mark.parametrize("clip_range, updates", [(math.inf, 1), (1e-1, 4)])
def test_training_reaches_the_optimum_of_the_gaussian_chain(clip_range, updates):
    toy = GaussianToy()
    config = toy.config(clip_range=clip_range, updates_per_epoch=updates)
    optimizer = torch.optim.Adam([toy.bias], 0.03)
    start = (toy.bias - toy.optimal_bias).norm()
    for epoch in range(300 // updates):
        prdp.run_epoch(config, toy, optimizer, ["1", "2"], epoch, {})
    assert (toy.bias - toy.optimal_bias).norm() < 0.01 * start


# --------------------------------------------------------------------------------------- §1 Config

def test_presets_are_table_4_and_an_objective_has_its_own_defaults():
    names = ("prompts", "reward", "num_epochs", "updates_per_epoch", "prompts_per_epoch",
             "images_per_prompt", "kl_weight", "clip_range", "learning_rate")
    shared = dict(num_steps=50, guidance_scale=5, weight_decay=1e-4, max_grad_norm=1)
    table = {"small": ("prompts/animals.txt", "hpsv2", 100, 10, 32, 16, 3e-5, 1e-6, 1e-5),
             "large": ("hpdv2", "hpsv2", 1000, 1, 64, 8, 3e-6, 1e-4, 7e-6),
             "multi": ("pickapic", "pickscore=10,hpsv2=2,aesthetic=0.05", 1000, 1, 64, 8, 3e-5,
                       1e-4, 1e-5)}
    for preset, column in table.items():
        c = prdp.parse_config(["--preset", preset])
        assert vars(c).items() >= (dict(zip(names, column, strict=True)) | shared).items()
        c = prdp.parse_config(["--preset", preset, "--objective", "ddpo"])
        assert (c.prompts_per_epoch, c.images_per_prompt, c.updates_per_epoch) == (512, 1, 4)
        assert (c.clip_range, c.learning_rate, c.tracker_size) == (1e-4, 1e-5, 32)
        for objective in ("grpo", "rloo"):
            c = prdp.parse_config(["--preset", preset, "--objective", objective])
            assert (c.updates_per_epoch, c.images_per_prompt, c.clip_range) == (2, column[5], 1e-4)
    for preset in ("demo", "demo-large"):  # K > 1: it shows proximal updates
        c = prdp.parse_config(["--preset", preset])
        assert (c.updates_per_epoch, c.clip_range) == (4, 1e-4)
        assert c.run_dir == f"runs/{preset}-clip"  # without the rewards of weight 0
    assert prdp.parse_config(["--preset", "large", "--learning_rate", "1"]).learning_rate == 1
    assert prdp.parse_config([]) == Config(run_dir="runs/small-hpsv2")


# ------------------------------------------------------------------------ §2 Denoising as a policy

@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [50, 30])
def test_every_step_equals_diffusers_ddim_with_eta_1(prediction_type, num_steps):
    torch.manual_seed(0)
    scheduler = DDIMScheduler.from_pretrained("demo/model", subfolder="scheduler",  # as SD v1.4's
                                              prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    latents, prediction, noise = torch.randn(3, num_steps, 4, 8, 8, dtype=torch.float64)
    mean, std = prdp.ddim_mean_std(scheduler, prediction, latents, scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(prediction[i], t, latents[i], eta=1.0,
                                  variance_noise=noise[i]).prev_sample
        torch.testing.assert_close((mean + std * noise)[i], expected, rtol=1e-6, atol=1e-6)
    assert std.shape == (num_steps, 1, 1, 1) and std.min() > 0.02


def test_log_prob_equals_torch_distributions():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 5, 4, 8, 8)
    std = torch.rand(5, 1, 1, 1) + 0.02
    expected = Normal(mean.double(), std.double()).log_prob(x.double()).mean((1, 2, 3))
    log_prob = prdp.gaussian_log_prob(x, mean, std)  # float64 too
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)


def test_noise_is_standard_normal_and_a_function_of_its_key():
    noise = torch.stack([prdp.make_noise(f"{i}", 9, (4, 8, 8)) for i in range(40)])
    assert noise.shape == (40, 10, 4, 8, 8) and len(noise.unique(dim=0)) == 40
    assert torch.equal(prdp.make_noise("7", 9, (4, 8, 8)), noise[7])
    moments = [(noise**power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)


def test_a_pass_in_bf16_casts_a_weight_once_and_forgets_it_at_its_end(demo_models):
    """So that the bf16 weights of one network at a time take memory."""
    policy, embeds = replace(demo_models.policy, is_bf16=True), demo_models.encode_prompts(["a"])
    latents = torch.randn(1, 5, *demo_models.latent_shape)  # of DEMO's 4 steps
    score = lambda: prdp.trajectory_log_probs(policy, embeds, latents, 1)
    expected, weight = score(), policy.unet.conv_out.weight
    forget = lambda *_: setattr(weight, "data", torch.zeros_like(weight))  # after step 0
    hook = policy.unet.register_forward_hook(forget)
    assert torch.equal(score(), expected)
    hook.remove()
    assert not torch.isclose(score(), expected).any()


# -------------------------------------------------------------------------------- §3 The objective

def plain_loop_loss(log_probs, old, ref, rewards, clip_range, kl_weight):
    """Appendix G for one prompt, pair by pair in Python floats."""

    def r_hat(image, clip):
        steps = zip(log_probs[image], old[image], ref[image], strict=True)
        return statistics.fmean(min(max(now - base, before - base - clip), before - base + clip)
                                for now, before, base in steps)

    losses = []
    for a, b in itertools.combinations(range(len(rewards)), 2):
        if rewards[a] != rewards[b]:
            target = (rewards[a] - rewards[b]) / kl_weight
            losses.append(max((r_hat(a, clip) - r_hat(b, clip) - target) ** 2
                              for clip in (math.inf, clip_range)))
    return statistics.fmean(losses) if losses else 0.0


@settings(deadline=None, max_examples=200)
@given(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)), st.integers(0, 2**32),
       st.sampled_from([0.0, 1e-3, 1.0]), st.sampled_from([1, 2, 1000]),
       st.sampled_from([0.0, 1e-3, 0.5, math.inf]), st.sampled_from([0.01, 1.0]))
def test_loss_equals_a_plain_loop_over_pairs(shape, seed, change, levels, clip_range, kl_weight):
    generator = torch.Generator().manual_seed(seed)
    old, ref, moved = torch.randn(3, *shape, generator=generator, dtype=torch.float64)  # (N, B, T)
    rewards = torch.randint(levels, shape[:2], generator=generator) / levels  # at 1 level all tie
    tensors = old + change * moved, old, ref, rewards.double()
    prompts = [[x.tolist() for x in prompt] for prompt in zip(*tensors, strict=True)]
    expected = statistics.fmean(plain_loop_loss(*prompt, clip_range, kl_weight)
                                for prompt in prompts)
    loss = prdp.prdp_loss(*tensors, clip_range, kl_weight).item()
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gradient_at_the_old_policy_is_rloo_with_a_kl_reward():
    """4 / (B-1) [(d_i - mean d) - (r_i - mean r) / beta] at image i's mean log-prob."""
    torch.manual_seed(0)
    log_probs, ref = torch.randn(2, 3, 5, 4, dtype=torch.float64)  # (N, B, T) each
    rewards, beta = torch.rand(3, 5, dtype=torch.float64), 0.3
    shift = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)  # of the mean log-prob
    loss = prdp.prdp_loss(log_probs + shift[..., None], log_probs, ref, rewards, 1e-6, beta)
    (grad,) = torch.autograd.grad(loss, shift)

    def less_the_others(values):  # (N, B), each less the mean of the B - 1 others
        means = [[statistics.fmean(row[:i] + row[i + 1 :]) for i in range(5)] for row in values]
        return torch.tensor(values, dtype=torch.float64) - torch.tensor(means, dtype=torch.float64)

    of_r = less_the_others(rewards.tolist())
    torch.testing.assert_close(prdp.rloo_advantages(rewards), of_r)
    of_d = less_the_others((log_probs - ref).mean(-1).tolist())
    # The difference to the mean of all is (B-1) / B of that to the mean of the others.
    torch.testing.assert_close(grad, -4 / 5 * (of_r / beta - of_d) / 3, rtol=1e-12, atol=1e-12)


def test_ppo_loss_is_the_plain_loop_over_steps():
    torch.manual_seed(0)
    old, advantages = torch.randn(2, 3, 4).double(), torch.randn(2, 3).double()
    log_probs = old + 0.2 * torch.randn_like(old)
    expected = []
    for n, b, t in itertools.product(range(2), range(3), range(4)):
        ratio = math.exp(log_probs[n, b, t].item() - old[n, b, t].item())
        gain = advantages[n, b].item()
        expected.append(-min(ratio * gain, min(max(ratio, 0.9), 1.1) * gain))
    loss = prdp.ppo_loss(log_probs, old, advantages, 0.1)
    assert loss.item() == pytest.approx(statistics.fmean(expected))


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


def test_ddpos_advantages_end_at_10_and_grpos_are_normalised():
    rewards = torch.zeros(200, 1)
    rewards[7] = 1  # (200 - 1) ** 0.5 = 14 deviations above the mean
    for sign in (1, -1):
        assert prdp.ddpo_advantages(sign * rewards, ["x"] * 200, {}, 0)[7] == sign * 10
    advantages = prdp.grpo_advantages(torch.rand(4, 6) * 10 + 3)
    assert advantages.mean(1).tolist() == pytest.approx([0] * 4, abs=1e-7)
    assert advantages.std(1, correction=0).tolist() == pytest.approx([1] * 4, rel=1e-5)


# ------------------------------------------------------------------------------ §4 The online loop

@pytest.mark.parametrize("options", [dict(offline=True), dict(objective="ddpo"),
                                     dict(objective="grpo"), dict(objective="rloo")])
def test_each_comparison_raises_the_reward(options):
    toy, history = GaussianToy(), {}
    config = toy.config(clip_range=0.1, updates_per_epoch=2, **options)
    optimizer = torch.optim.Adam([toy.bias], 0.03)
    before = prdp.collect_epoch(toy.config(), toy, ["0"], 0, {}).rewards.mean()
    for epoch in range(20):
        metrics = prdp.run_epoch(config, toy, optimizer, ["0"], epoch, history)
    after = prdp.collect_epoch(toy.config(), toy, ["0"], 0, {}).rewards.mean()
    assert after > before + 1 and metrics["grad_norm"] > 0
    assert (metrics["kl"] is None) == config.offline  # whose samples are not the policy's
    assert len(history.get("0", [])) == (config.tracker_size if config.objective == "ddpo" else 0)


def test_an_epoch_picks_its_prompts_by_seed_and_scores_images_for_them():
    toy, prompts, picked, noises = GaussianToy(), [f"{i}" for i in range(6)], set(), set()
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        config = toy.config(seed=seed, prompts_per_epoch=5)
        trajectories = prdp.collect_epoch(config, toy, prompts, epoch, {})
        numbers = trajectories.prompt_embeds.view(5, 16)  # what conditions each image
        of_image = toy.score(trajectories.latents[:, -1], ["0"] * 80, 80)["linear"].view(5, 16)
        torch.testing.assert_close(trajectories.rewards - of_image, numbers)
        assert (numbers == numbers[:, :1]).all() and len(numbers.unique()) == 5
        assert len(trajectories.latents[:, 0].unique(dim=0)) == 80  # each has noise of its own
        picked.add(tuple(numbers[:, 0].tolist()))
        noises.add(trajectories.latents[0, 0].sum().item())
    assert len(picked) == len(noises) == 4


def test_offline_training_samples_each_epochs_noise_from_the_reference():
    toy = GaussianToy()
    fresh = [prdp.collect_epoch(toy.config(), toy, ["0"], epoch, {}) for epoch in (0, 1)]
    toy.bias.data += 0.1
    for epoch, expected in enumerate(fresh):
        pool = prdp.collect_epoch(toy.config(offline=True), toy, ["0"], epoch, {})
        assert torch.equal(pool.latents, expected.latents)
        assert torch.equal(pool.log_probs_ref, expected.log_probs_old)
        assert not torch.equal(pool.log_probs_old, expected.log_probs_old)
    assert not torch.equal(fresh[0].latents, fresh[1].latents)


@pytest.mark.parametrize("images, updates", [(1, 6), (4, 3), (2, 1)])
def test_an_update_of_a_policy_gradient_takes_its_part_of_the_prompts(images, updates):
    toy = GaussianToy()
    config = toy.config(objective="grpo", prompts_per_epoch=6, images_per_prompt=images,
                        updates_per_epoch=updates)
    whole = prdp.collect_epoch(config, toy, [f"{i}" for i in range(6)], 0, {})
    parts = prdp.batches_of_updates(config, whole)
    assert [len(part.rewards) for part in parts] == [6 // updates] * updates
    for name, values in vars(whole).items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(torch.cat([vars(part)[name] for part in parts]), values), name
    moved = [part.log_probs_old + 0.01 * torch.randn_like(part.log_probs_old) for part in parts]
    losses = [prdp.objective_loss(config, *pair) for pair in zip(moved, parts, strict=True)]
    expected = prdp.ppo_loss(torch.cat(moved), whole.log_probs_old, whole.advantages,
                             config.clip_range)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)
    for regression in ("prdp", "a fork's"):  # takes all pairs in every update
        batches = prdp.batches_of_updates(replace(config, objective=regression), whole)
        assert len(batches) == updates and all(batch is whole for batch in batches)
    with pytest.raises(AttributeError):  # what has neither a loss nor advantages trains nothing
        prdp.objective_loss(replace(config, objective="a fork's"), moved[0],
                            replace(parts[0], advantages=None))


@pytest.mark.parametrize("objective", ["prdp", "grpo"])
def test_clip_fraction_is_the_share_that_moved_beyond_clip_range(monkeypatch, objective):
    toy = GaussianToy()
    config = toy.config(objective=objective, prompts_per_epoch=4, updates_per_epoch=4,
                        clip_range=0.1)
    trajectories = prdp.collect_epoch(config, toy, ["0"], 0, {})
    trajectories.log_probs_old = torch.zeros_like(trajectories.log_probs_old)
    moved = torch.tensor([0, 0.098, 0.11, -0.098, -0.11], dtype=torch.float64)  # at each step
    monkeypatch.setattr(prdp, "trajectory_log_probs",
                        lambda policy, embeds, latents, size: moved.repeat(len(latents), 1))
    optimizer = torch.optim.SGD([toy.bias], 0.0)
    updates = prdp.update_policy(config, toy.policy, optimizer, trajectories)
    assert updates["clip_fraction"] == pytest.approx(3 / 4 * 2 / 5)  # the first update is at 0


def test_gradients_are_clipped_to_max_grad_norm_and_logged_unclipped():
    toy = GaussianToy()
    for most in (1e9, 1e-3):
        config = toy.config(clip_range=math.inf, updates_per_epoch=1, max_grad_norm=most)
        trajectories = prdp.collect_epoch(config, toy, ["0", "1"], 0, {})
        before, optimizer = toy.bias.detach().clone(), torch.optim.SGD([toy.bias], 1)
        loss = prdp.objective_loss(config, trajectories.log_probs_old, trajectories).item()
        logged = prdp.update_policy(config, toy.policy, optimizer, trajectories)
        step = (toy.bias - before).norm().item()
        assert step == pytest.approx(min(logged["grad_norm"], most), rel=1e-4)
        assert logged["loss"] == pytest.approx(loss) and logged["grad_norm"] > 1e-2


@pytest.mark.parametrize("objective", ["prdp", "grpo"])
def test_two_pass_gradient_equals_plain_autograd(demo_models, objective):
    """Through all T steps and all pairs at once, with guidance, at a policy that has moved."""
    config = prdp.parse_config([*DEMO, "--objective", objective, "--images_per_prompt", "3",
                                "--clip_range", "2e-3"])
    trajectories = prdp.collect_epoch(config, demo_models, CAT_AND_BAT, 0, {})
    trajectories.rewards = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.9]])
    trajectories.advantages = prdp.grpo_advantages(trajectories.rewards)
    policy = demo_models.policy
    torch.manual_seed(1)
    for weight in policy.unet.double().parameters():
        weight.data += 2e-4 * torch.randn_like(weight)
    policy.negative_embeds = policy.negative_embeds.double()
    embeds, latents = trajectories.prompt_embeds.double(), trajectories.latents.double()
    trajectories = replace(trajectories, prompt_embeds=embeds, latents=latents)
    weights, steps = [*policy.unet.parameters()], []
    loss = lambda log_probs: prdp.objective_loss(config, log_probs.view(2, 3, 4), trajectories)

    for i, t in enumerate(policy.scheduler.timesteps):
        mean, std = policy.mean_std(latents[:, i], t.expand(len(latents)), embeds)
        steps.append(prdp.gaussian_log_prob(latents[:, i + 1], mean, std))
    flat = lambda gradients: torch.cat([gradient.flatten() for gradient in gradients])
    exact = flat(torch.autograd.grad(loss(torch.stack(steps, 1)), weights))
    for size in (7, 100):
        log_probs = prdp.trajectory_log_probs(policy, embeds, latents, size).requires_grad_()
        (grad,) = torch.autograd.grad(loss(log_probs), log_probs)
        assert 0 < (grad == 0).sum() < grad.numel()  # some are clipped, and so left out
        prdp.backward_log_probs(policy, trajectories, grad, size)
        assert (flat(w.grad for w in weights) - exact).norm() < 1e-12 * exact.norm()
        policy.unet.zero_grad()


def test_before_an_epochs_first_update_the_policy_is_the_old_one(demo_models):
    config, policy = prdp.parse_config(DEMO), demo_models.policy
    optimizer = torch.optim.AdamW(policy.unet.parameters(), config.learning_rate)
    for epoch in range(2):
        trajectories = prdp.collect_epoch(config, demo_models, CAT_AND_BAT, epoch, {})
        old, ref = trajectories.log_probs_old, trajectories.log_probs_ref
        scored = prdp.trajectory_log_probs(policy, trajectories.prompt_embeds, trajectories.latents,
                                           config.micro_batch_size)
        assert torch.equal(scored.view_as(old), old)
        assert torch.equal(ref, old) is (epoch == 0)  # then the weights have moved
        prdp.update_policy(config, policy, optimizer, trajectories)


def test_equal_rewards_leave_the_weights_as_they_are():
    toy = GaussianToy()
    toy.score = lambda latents, prompts, size: {"linear": torch.ones(len(prompts))}
    toy.bias.data += 1
    before = toy.bias.detach().clone()
    decaying = torch.optim.AdamW([toy.bias], 0.1, weight_decay=1)
    metrics = prdp.run_epoch(toy.config(updates_per_epoch=2), toy, decaying, ["0"], 0, {})
    assert metrics["loss"] == 0 and torch.equal(toy.bias, before)


@pytest.mark.parametrize("name", ["log_probs_ref", "latents"])
def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_no_weight(name):
    toy = GaussianToy()
    trajectories = prdp.collect_epoch(toy.config(), toy, ["0"], 0, {})
    vars(trajectories)[name][0, 1] = math.nan
    with pytest.raises(ValueError, match="update 1: the gradient's norm is nan; nothing of"):
        prdp.update_policy(toy.config(), toy.policy, torch.optim.Adam([toy.bias]), trajectories)
    assert not toy.bias.any()  # as it was


def test_metrics_are_what_the_documents_say():
    torch.manual_seed(0)
    old, ref = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rewards = torch.rand(3, 4)
    rewards[2] = 0.5  # a prompt without a pair
    config = Config(kl_weight=0.1, images_per_prompt=4)
    given = dict(log_probs_old=old, log_probs_ref=ref, rewards=rewards, seconds={"seconds": 3})
    given |= dict(reward_terms={"clip": 2 * rewards.flatten()})
    metrics = prdp.summarise(config, SimpleNamespace(**given), {"loss": 2.0})
    errors, targets, r_hat = [], [], (old - ref).mean(-1)
    for n, a, b in itertools.product(range(3), range(4), range(4)):
        if rewards[n, a] > rewards[n, b]:
            targets.append((rewards[n, a].item() - rewards[n, b].item()) / 0.1)
            errors.append((r_hat[n, a] - r_hat[n, b]).item() - targets[-1])
    flat = rewards.flatten().tolist()
    expected = dict(
        loss=2, seconds=3, peak_gib=0, pairless_prompts=1 / 3, kl=(old.mean() - ref.mean()).item(),
        explained_variance=1 - sum(e**2 for e in errors) / sum(t**2 for t in targets),
        reward_mean=statistics.fmean(flat), reward_std=statistics.stdev(flat))
    expected["reward/clip"] = 2 * expected["reward_mean"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    given["rewards"] = torch.randn(4000, 1) + 2 * torch.randn(4000, 4)  # 1 of 5 between prompts
    old, given["reward_terms"] = torch.zeros(4000, 4, 1, dtype=torch.float64), {}
    given |= dict(log_probs_old=old, log_probs_ref=old)
    metrics = prdp.summarise(config, SimpleNamespace(**given), {"loss": 2.0})
    assert metrics["between_prompt_variance"] == pytest.approx(0.2, abs=0.02)


# --------------------------------------------------------------------------------------- §5 Models

def load_pipeline(model: str | Path) -> StableDiffusionPipeline:
    return prdp.load_pipeline(prdp.parse_config([*DEMO, "--model", str(model)]))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_model_like_stable_diffusion_2_scores_as_it_samples(tmp_path):
    """v prediction, a wide text encoder with gelu, linear projections, heads of equal width; and a
    schedule without an offset, as which its last step would have no deviation."""
    model = load_pipeline("demo/model")
    model.register_modules(
        unet=UNet2DConditionModel.from_config(
            model.unet.config, sample_size=6, attention_head_dim=(4, 8), cross_attention_dim=48,
            use_linear_projection=True),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            hidden_act="gelu", max_position_embeddings=24)))
    model.save_pretrained(tmp_path / "v2")
    edit_json(tmp_path / "v2/scheduler/scheduler_config.json", prediction_type="v_prediction",
              steps_offset=0)
    (tmp_path / "mine.py").write_text("def size(images, prompts):  # the only one that it meets\n"
                                      "    assert images.shape[1:] == (3, 48, 48)\n"
                                      "    return images.mean((1, 2, 3))\n")
    train(tmp_path / "run", "--num_epochs", "1", "--model", str(tmp_path / "v2"),
          "--reward", f"{tmp_path}/mine.py:size")
    metrics, before = read_metrics(tmp_path / "run")[0], model.unet.state_dict()
    assert metrics["kl"] == 0 and metrics["grad_norm"] > 0
    assert any(not torch.equal(w, before[name]) for name, w in weights(tmp_path / "run").items())


@pytest.mark.parametrize("part, change, message", [
    ("unet", "a weight less", "conv_in.weight"), ("vae", "other shapes", "decoder.conv_in.bias"),
    ("unet", "a pickle", "Unable to load weights"), ("text_encoder", "a pickle", "code in it"),
    ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "it is a StableDiffusionX"),
    ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "predicts 'sample'"),
    ("unet/config.json", dict(sample_size=None), "must have a sample_size"),
    ("unet/config.json", dict(in_channels=9), "take only latents"),
    ("unet/config.json", dict(class_embed_type="timestep"), "take only latents"),
    ("tokenizer", "no files", ""), ("tokenizer", "another word", "more tokens than its text")])
def test_a_model_with_a_wrong_part_or_code_in_it_is_refused(tmp_path, part, change, message):
    model = shutil.copytree("demo/model", tmp_path / "model")
    folder = model / part
    file = next(folder.glob("*.safetensors"), None)
    if isinstance(change, dict):
        edit_json(folder, **change)
    elif change == "a pickle":
        name = "pytorch_model" if part == "text_encoder" else file.stem
        torch.save({"code": Path()}, folder / f"{name}.bin")  # to load a Path is to call it
        file.unlink()
    elif change == "no files":
        shutil.rmtree(folder)
    elif change == "another word":
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.add_tokens("a token without an embedding")
        tokenizer.save_pretrained(folder)
    else:
        content = safetensors.torch.load_file(file)
        weight = content.pop(message)
        others = {message: weight[1:].clone()} if change == "other shapes" else {}
        safetensors.torch.save_file(content | others, file)
    with pytest.raises(ValueError, match=f"^--model .* cannot be used .*{message}.*$"):
        load_pipeline(model)


def test_half_precision_is_taken_only_where_there_is_no_float32(tmp_path, capsys):
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


# ---------------------------------------------------------------------------------- §6 Distributed

def demo_flags(run: Path, *flags: str) -> list[str]:
    """The demo with two prompts, small enough for a test."""
    prompts = run.parent / "two.txt"
    prompts.write_text("\n".join(CAT_AND_BAT) + "\n")
    return [*DEMO, "--prompts", str(prompts), "--run_dir", str(run), *flags]


def a_rank(rank: int, environment: dict, flags: list[str], log: Path, before: Callable) -> None:
    """What a launcher starts, forked from a process that has imported everything already."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["prdp.py", *flags]
    before(rank)
    prdp.main()


def in_float64(rank: int) -> None:
    """So that what is left of a difference is no rounding."""
    make_noise = prdp.make_noise
    prdp.make_noise = lambda *key: make_noise(*key).double()
    torch.nn.Module.float = torch.nn.Module.double  # what rewards.load_network ends with
    prdp.save_grid = lambda *_: None  # to save time


class Launch:
    """Processes of one run; if one fails, the others get SIGTERM, as torchrun does it."""

    def __init__(self, run: Path, world: int, *flags: str, before: Callable = print):
        environment = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(get_free_port()))
        self.run, self.log = run, run.with_suffix(".log")
        self.log.write_text("")
        arguments = environment, demo_flags(run, *flags), self.log, before
        self.ranks = torch.multiprocessing.start_processes(
            a_rank, arguments, world, join=False, daemon=True, start_method="forkserver")
        self.processes = self.ranks.processes

    def wait_for(self, name: str) -> None:
        while not (self.run / name).exists() and self.processes[0].is_alive():
            time.sleep(0.01)

    def end(self, within=300) -> list[int]:
        """The exit codes; fails unless every process ended in time."""
        deadline = time.monotonic() + within
        with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
            while not self.ranks.join(timeout=1):
                assert time.monotonic() < deadline, self.log.read_text()
        return [process.exitcode for process in self.processes]


@pytest.mark.parametrize("variables, gpus, device, backend", [
    ("", 0, "cpu", None), ("RANK=1 WORLD_SIZE=2", 2, "cuda", None),
    ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a", 0, "cpu", "gloo"),
    ("RANK=5 WORLD_SIZE=8 MASTER_ADDR=a", 4, "cuda:1", "nccl"),  # not torchrun; two machines
    ("RANK=5 WORLD_SIZE=8 MASTER_ADDR=a LOCAL_WORLD_SIZE=8 LOCAL_RANK=5", 4, "cpu", "gloo"),
    ("RANK=5 WORLD_SIZE=6 MASTER_ADDR=a LOCAL_WORLD_SIZE=3 LOCAL_RANK=2", 4, "cuda:2", "nccl")])
def test_processes_of_any_launcher_join(monkeypatch, variables, gpus, device, backend):
    variables = dict(variable.split("=") for variable in variables.split())
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda local_rank: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", join := mock.Mock())
    assert prdp.start_distributed() == torch.device(device)
    assert [call.args for call in join.call_args_list] == ([(backend,)] if backend else [])


@pytest.mark.parametrize("flags, worlds", [
    ("--prompts_per_epoch 6", (3,)),
    ("--prompts_per_epoch 12 --objective ddpo --tracker_size 8", (2,)),
    pytest.param("--prompts_per_epoch 24", (2, 3, 4), marks=slow),
    pytest.param("--prompts_per_epoch 24 --objective grpo", (2, 3, 4), marks=slow)])
def test_any_number_of_processes_has_the_same_curve(tmp_path, flags, worlds):
    """In float64: Adam's first step makes a whole step even of a gradient that is rounding."""
    flags += " --num_epochs 2 --images_per_prompt 2 --num_steps 2"
    flags += " --reward jpeg_incompressibility"  # the others round to float32
    curves = {}
    for world in (1, *worlds):
        launch = Launch(tmp_path / str(world), world, *flags.split(), before=in_float64)
        assert set(launch.end()) == {0}, launch.log.read_text()
        curves[world] = read_metrics(launch.run)
        for line, of_one in zip(curves[world], curves[1], strict=True):
            assert line == pytest.approx(of_one, rel=1e-6, abs=1e-8), world


@slow
def test_two_machines_of_two_processes_are_one_of_four_bit_for_bit(tmp_path):
    """Two torchrun agents on this machine."""
    flags = "--num_epochs 2 --prompts_per_epoch 12 --num_steps 2".split()
    assert set(Launch(tmp_path / "4", 4, *flags).end()) == {0}
    launch = "-m torch.distributed.run --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d".split()
    launch += ["--rdzv_endpoint", f"127.0.0.1:{get_free_port()}", "prdp.py"]
    launch += demo_flags(tmp_path / "2x2", *flags)
    agents = [subprocess.Popen([sys.executable, *launch]) for _ in range(2)]
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    assert ending(tmp_path / "2x2") == ending(tmp_path / "4")


def test_what_one_process_meets_ends_all_and_is_told_once(tmp_path):
    (tmp_path / "faults.py").write_text("""
import os
on_rank_1 = os.environ["RANK"] == "1"
def nan(images, prompts): return [float("nan") if on_rank_1 else 1.0] * len(prompts)
def fails(images, prompts): return [1 / (not on_rank_1)] * len(prompts)
""")
    for fault, told in (("nan", "0: epoch 1: --reward .* is .*nan.* for 'A pa"),  # which all meet
                        ("fails", "1: reward 'fails' failed: ZeroDivision")):
        launch = Launch(tmp_path / fault, 2, "--reward", f"{tmp_path}/faults.py:{fault}")
        assert 0 not in launch.end(within=60)
        log = launch.log.read_text()
        assert re.search(f"prdp.py: error on rank {told}", log), log
        if fault == "nan":
            assert log.count("prdp.py: error") == 1 and "Traceback" not in log, log


def on_a_disk_of_its_own(rank: int) -> None:
    sys.argv[sys.argv.index("--run_dir") + 1] += str(rank)


def test_machines_that_do_not_share_the_folder_of_a_run_are_refused(tmp_path):
    train(tmp_path / "run0", *ONE_EPOCH)
    launch = Launch(tmp_path / "run", 2, *ONE_EPOCH, before=on_a_disk_of_its_own)
    assert 0 not in launch.end(within=60)
    assert "checkpoint.pt is not the same in all processes" in launch.log.read_text()


def test_a_live_run_locks_its_folder_and_ctrl_c_ends_it_without_a_word(tmp_path):
    launch, run = Launch(tmp_path / "run", 2, "--num_epochs", "1000"), prdp.Run(tmp_path / "run")
    launch.wait_for("metrics.jsonl")
    with pytest.raises(ValueError, match="--run_dir .*run: another process is at work on it"):
        run.lock()
    for process in launch.processes:
        os.kill(process.pid, signal.SIGINT)
    assert launch.end(within=5) == [-signal.SIGINT] * 2
    assert "Traceback" not in (log := launch.log.read_text()) and "error" not in log
    run.lock()


# --------------------------------------------------------------------------------- §7 Runs on disk

ONE_EPOCH = "--num_epochs 1 --learning_rate 1e-3 --weight_decay 0.5 --clip_range inf".split()


def train(run: Path, *flags: str) -> None:
    prdp.train(prdp.parse_config(demo_flags(run, *flags)), CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of ONE_EPOCH, which no test may change."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.chdir(ROOT):
        train(run, *ONE_EPOCH)
    return run


def read_metrics(run: Path) -> list[dict]:
    """Without what the same run measures differently each time."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("seconds") and k != "peak_gib"}
            for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(run / "unet").state_dict()


def ending(run: Path) -> tuple:
    """What a finished run must have in common with one that was never stopped."""
    assert not list(run.rglob("*.tmp"))
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*"))
    final = [file for folder in ("unet", "lora") for file in sorted(run.glob(f"{folder}/*"))]
    return [file.read_bytes() for file in final], names, read_metrics(run)


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=slow)])
def test_a_run_killed_at_any_moment_ends_bit_equal_to_one_that_was_not(tmp_path, count):
    """SIGKILL to a rank or all, at a moment while a run is at work; then the same command."""
    flags, rng = ["--num_epochs", "3", "--save_every", "2"], random.Random(0)
    whole = Launch(tmp_path / "whole", 2, *flags)
    whole.wait_for("config.json")
    started = time.monotonic()
    assert whole.end() == [0, 0]
    seconds, cut_short = time.monotonic() - started, 0
    while cut_short < count:  # a run that ended before its moment came is drawn again
        launch = Launch(tmp_path / "killed", 2, *flags)
        launch.wait_for("config.json")
        time.sleep(rng.uniform(0, seconds))
        for process in rng.choice([launch.processes, launch.processes[:1], launch.processes[1:]]):
            process.kill()
        cut_short += any(launch.end())
        again = Launch(tmp_path / "killed", 2, *flags)
        assert again.end() == [0, 0], again.log.read_text()
        assert ending(again.run) == ending(whole.run)
        shutil.rmtree(again.run)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands for the disk: the real writers meet a failing write."""
    flags = "--objective ddpo --tracker_size 4".split()  # ddpo has a history to restore
    flags += "--num_steps 2 --images_per_prompt 2 --num_epochs".split()
    train(tmp_path / "whole", *flags, "3")
    train(tmp_path / "run", *flags, "1")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limits[1]))
    try:
        with pytest.raises(Exception) as error:
            train(tmp_path / "run", *flags, "3", "--save_every", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in prompts.sets.explain(error.value)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert len(read_metrics(tmp_path / "run")) == 3  # one more than are in the checkpoint
    for _ in range(2):
        train(tmp_path / "run", *flags, "3")
        assert ending(tmp_path / "run") == ending(tmp_path / "whole")
        shutil.rmtree(tmp_path / "run/unet")  # as a kill right after the last checkpoint


def test_what_has_changed_is_refused_by_name(tmp_path, monkeypatch, capsys, demo_models):
    """Flags, prompts, models, rewards; a reward that is never the same twice is only told of."""
    file = tmp_path / "mine.py"
    spec = f"{file}:red=0,{file}:chance=0,clip:demo/clip"
    config = prdp.parse_config(demo_flags(tmp_path / "run", "--num_epochs", "1", "--reward", spec))

    def begin_or_go_on(factor=1, **flags):
        file.write_text("import torch\ndef chance(images, _): return torch.rand(len(images))\n"
                        f"def red(images, _): return {factor} * images[:, 0].mean((1, 2))\n")
        demo_models.reward = load_reward(spec, CPU)
        prdp.train(replace(config, **flags), CPU)

    def is_refused(name, *factor, **flags):
        with pytest.raises(prdp.UserError, match=re.escape(f"was made with --{name} ")):
            begin_or_go_on(*factor, **flags)
        assert json.loads((tmp_path / "run/config.json").read_text()) == kept

    monkeypatch.setattr(prdp, "load_models", lambda config, device: demo_models)
    begin_or_go_on()
    kept = json.loads((tmp_path / "run/config.json").read_text())
    begin_or_go_on(1.0001)  # as another machine may round it
    is_refused("learning_rate 0.0002 and not 1.0; give", learning_rate=1.0)
    assert "--reward chance scores one image differently each" in capsys.readouterr().out
    is_refused("reward red (score of noise)", 1.01)
    pipeline = demo_models.pipeline
    for network in (demo_models.reference.unet, pipeline.vae, pipeline.text_encoder):
        weight = next(network.parameters())
        weight.data = weight.data.flip(0)
        is_refused("model (hash)")
        weight.data = weight.data.flip(0)
    begin_or_go_on()
    (tmp_path / "two.txt").write_text("\n".join(reversed(CAT_AND_BAT)))
    is_refused("prompts (hash)")


def test_a_checkpoint_with_damage_or_code_in_it_is_refused_by_name(tmp_path):
    """Or it was not harmed."""
    run, rng, expected = prdp.Run(str(tmp_path)), random.Random(0), {"weight": torch.randn(40, 40)}
    run.save(config=vars(Config()), metrics=[{"epoch": 1}], history={}, weights=expected)
    whole, num_unharmed = run.checkpoint.read_bytes(), 0
    for _ in range(300):
        at, taken_out = rng.randrange(len(whole)), rng.choice([0, 1, 4, 5000, len(whole)])
        put_in = rng.randbytes(rng.randrange(5))
        run.checkpoint.write_bytes(whole[:at] + put_in + whole[at + taken_out :])
        network = torch.nn.Linear(40, 40, bias=False)
        try:
            assert run.load(network, vars(Config()))["metrics"] == [{"epoch": 1}]
            assert torch.equal(network.weight, expected["weight"])
            num_unharmed += 1
        except prdp.UserError as error:
            assert re.search("checkpoint.pt is not a whole checkpoint[^\n]*$", str(error))
    assert 0 < num_unharmed < 300
    run.save(config=vars(Config()), code=Path())
    with pytest.raises(prdp.UserError, match="whole checkpoint [^\n]*code in it[^\n]*$"):
        run.load(network, vars(Config()))


def test_a_finished_run_leaves_its_weights_flags_and_proper_json(finished):
    names = {file.name for file in finished.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "samples", "checkpoint.pt", "lock", "unet"}
    for epoch in (0, 1):  # each picture has two prompts and three images of each
        assert Image.open(finished / f"samples/epoch_000{epoch}.png").size == (326, 488)
    content = (finished / "config.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail)["clip_range"] == "Infinity"
    assert prdp.parse_config(["--evaluate", str(finished)]).clip_range == math.inf
    state = torch.load(finished / "checkpoint.pt")
    assert all(torch.equal(w, state["weights"][name]) for name, w in weights(finished).items())
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.5)


# ------------------------------------------------------------------------------------- §8 Training

@pytest.mark.parametrize("scale", [0, 1, 3])  # 0 and 1 mean no guidance
def test_diffusers_own_pipeline_draws_the_same_images_with_a_runs_unet(finished, scale):
    flags = ["--num_steps", "6", "--guidance_scale", str(scale)]
    config = prdp.parse_config(["--evaluate", str(finished), *flags])
    models = prdp.load_models(config, CPU)
    models.policy.unet.load_state_dict(weights(finished))
    (C, H, W), generator = models.latent_shape, torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(1, C, H, W, generator=generator) for _ in range(7)])[None]
    embeds = models.encode_prompts(CAT_AND_BAT[:1])
    latents, _ = prdp.sample_trajectories(models.policy, embeds, noise, 1)
    ours = models.decode(latents[:, -1])

    pipeline = StableDiffusionPipeline.from_pretrained(
        "demo/model", unet=UNet2DConditionModel.from_pretrained(finished / "unet"),
        safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False,
                                                   set_alpha_to_one=False)
    generator.manual_seed(0)  # which draws x_T, and then every step's noise
    theirs = pipeline(CAT_AND_BAT[0], num_inference_steps=6, eta=1.0, generator=generator,
                      guidance_scale=scale, output_type="pt").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_lora_learns_in_adapters_alone_and_keeps_its_reference(tmp_path):
    flags = "--lora_rank 2 --learning_rate 1e-2 --images_per_prompt 2".split()
    train(tmp_path / "whole", "--num_epochs", "2", *flags)
    train(tmp_path / "run", "--num_epochs", "1", *flags)
    train(tmp_path / "run", "--num_epochs", "2", "--gradient_checkpointing", *flags)  # same bits
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["kl"] == 0 != metrics[1]["kl"]
    assert (tmp_path / "run/checkpoint.pt").stat().st_size < 1e6

    config = prdp.parse_config(["--evaluate", str(tmp_path / "run")])
    models = prdp.load_models(config, CPU)
    prdp.Run(config.run_dir).load(models.policy.unet, {})
    embeds = models.encode_prompts(CAT_AND_BAT)
    noise = torch.randn(2, config.num_steps + 1, *models.latent_shape)
    latents, log_probs = prdp.sample_trajectories(models.policy, embeds, noise, 5)

    def scores(unet):  # in the memory format that takes the same kernels
        policy = replace(models.policy, unet=unet.to(memory_format=torch.channels_last))
        return prdp.trajectory_log_probs(policy, embeds, latents, 5)

    untouched, loaded = load_pipeline("demo/model"), load_pipeline("demo/model")
    loaded.load_lora_weights(tmp_path / "run/lora", weight_name="pytorch_lora_weights.safetensors")
    of_ref = scores(models.reference.unet)
    assert torch.equal(of_ref, scores(untouched.unet))
    assert torch.equal(scores(models.policy.unet), log_probs)
    assert torch.equal(scores(loaded.unet), log_probs)
    assert not torch.isclose(log_probs, of_ref, atol=1e-5).all()


@pytest.mark.parametrize("flags, told", [
    ("--prompts_per_epoch 32", "32: must be a multiple of 3, the 3 processes"),
    ("--prompts_per_epoch 9 --objective grpo", "9: must be a multiple of 6, the 3 proc")])
def test_prompts_that_processes_and_updates_cannot_share_are_refused(monkeypatch, flags, told):
    monkeypatch.setattr(prdp, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=f"--prompts_per_epoch {told}"):
        prdp.train(prdp.parse_config(flags.split()), CPU)


# ----------------------------------------------------------------------------------- §9 Evaluation

def test_evaluation_equals_a_plain_loop_over_images(finished, tmp_path, capsys):
    run = prdp.Run(str(shutil.copytree(finished, tmp_path / "run")))
    config = prdp.parse_config(["--evaluate", str(run.folder), "--samples_per_prompt", "3"])
    prdp.evaluate(config, CPU)
    results = json.loads((run.folder / "evaluation-two.json").read_text())["results"]
    assert Image.open(run.folder / "evaluation-two.png").size == (326, 974)

    models = prdp.load_models(config, CPU)
    run.load(models.policy.unet, {})
    (T, policies), values = (config.num_steps, (models.reference, models.policy)), {}
    for policy, (i, prompt) in itertools.product(policies, enumerate(CAT_AND_BAT)):
        embeds, images = models.encode_prompts([prompt]), []
        for j in range(3):
            noise, kl = prdp.make_noise(f"0/evaluate/{i}/{j}", T, models.latent_shape)[:, None], 0
            x = noise[0]
            for t, of_step in zip(policy.scheduler.timesteps[:, None], noise[1:], strict=True):
                now, ref = (Normal(*of.mean_std(x, t, embeds)) for of in (policy, models.reference))
                x = now.mean + now.stddev * of_step
                kl += (now.log_prob(x) - ref.log_prob(x)).mean().item() / T
            clip = models.score(x, [prompt], 1)["clip"].item()
            images.append((clip, clip, kl, clip - config.kl_weight * kl))
        values[policy is models.policy, i] = [*map(statistics.fmean, zip(*images, strict=True))]

    assert len(results) == 4
    for row, name in enumerate(results):
        columns = {"base": [values[False, i][row] for i in range(2)],
                   "finetuned": [values[True, i][row] for i in range(2)]}
        columns["difference"] = [b - a for a, b in zip(*columns.values(), strict=True)]
        columns["higher"] = [float(gain > 0) for gain in columns["difference"]]
        for column, of_prompts in columns.items():
            expected = dict(mean=statistics.fmean(of_prompts),
                            standard_error=statistics.stdev(of_prompts) / math.sqrt(2))
            assert results[name][column] == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert results["kl"]["base"]["mean"] == 0 < results["kl"]["finetuned"]["mean"]

    capsys.readouterr()
    (tmp_path / "one.txt").write_text(CAT_AND_BAT[0])
    flags = ["--evaluate", "base", "--run_dir", str(tmp_path), "--samples_per_prompt", "3"]
    prdp.evaluate(prdp.parse_config([*DEMO, *flags, "--prompts", f"{tmp_path}/one.txt"]), CPU)
    assert f"base {values[False, 0][0]:.4f}\n" in (told := capsys.readouterr().out)
    assert "nan" not in told  # as the standard error over one prompt is
    results = json.loads((tmp_path / "evaluation-one.json").read_text())["results"]
    assert results["clip"]["base"]["standard_error"] is None


# ------------------------------------------------------------------------------ §10 Flags and main

@pytest.mark.parametrize("flags, message", [
    ("--prompts nowhere.txt", "--prompts nowhere.txt .*it is not one of the sets hpdv2"),
    (f"--prompts {'a' * 300}", "--prompts aaa.*File name too long.*it is not one of the sets"),
    ("--reward hpsv2", "--reward hpsv2.*HF_HUB_OFFLINE"),
    ("--model a/b", "--model a/b.*HF_HUB_OFFLINE"),
    ("--model README.md", "README.md cannot be used .*; the README says which can"),
    ("--num_steps 1000", "--num_steps 1000: must be less than 1000"),
    ("--images_per_prompt 1", "--images_per_prompt 1: must be at least 2"),
    ("--num_steps 1 --objective ddpo", "--num_steps 1: must be at least 2"),
    ("--images_per_prompt 0 --objective ddpo", "--images_per_prompt 0: must be at least 1"),
    ("--num_epochs -1", "--num_epochs -1: must be at least 1"),
    ("--clip_range nan", "--clip_range nan: must be at least 0"),
    ("--kl_weight 0", "--kl_weight 0.0: must be at least 1e-12"),
    ("--model=", "--model: must not be empty"), ("--learning 1", "--learning"),
    ("--offline --objective ddpo", "--offline: ddpo is a policy gradient"),
    ("--evaluate nowhere", "--evaluate nowhere: no run with a checkpoint .*No such file"),
    ("--learning_rate fast", "--learning_rate.*: invalid float value: 'fast'")])
def test_a_mistake_gets_one_sentence_that_names_it(tmp_path, flags, message):
    with pytest.raises(prdp.UserError, match=f"^.*{message}.*$"):
        train(tmp_path / "run", *flags.split())


@pytest.mark.parametrize("error, told", [
    (prdp.UserError("--flag 1: no"), "prdp.py: error: --flag 1: no"),
    (ValueError("in a fork"), "prdp.py: error: ValueError: in a fork"),
    (torch.OutOfMemoryError("20.00 MiB"), "prdp.py: error: cpu is full: lower --micro_batch_size")])
def test_what_a_user_can_mend_has_no_traceback(monkeypatch, capsys, tmp_path, error, told):
    monkeypatch.setattr(prdp, "train", mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["prdp.py"])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match=f"^{told}"):  # of a text, so the process fails with 1
        prdp.main()
    assert json.loads((tmp_path / "error.json").read_text())["message"].startswith(told)
    assert ("Traceback" in capsys.readouterr().err) == (type(error) is ValueError)
    monkeypatch.setattr(os, "environ", os.environ | dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="a"))
    with pytest.raises(SystemExit, match="^prdp.py: error: ValueError: .*MASTER_PORT"):
        prdp.main()


# --------------------------------------------------------------------------------------- rewards.py

httpx = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
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
    """The package hpsv2's scoring, with what its wheel lacks, a vocabulary and a progress bar, and
    without Tk, which it imports by mistake."""
    package = importlib.util.find_spec("hpsv2")
    if package is None:
        pytest.skip("pip install --no-deps hpsv2==1.2.0")
    shutil.copytree(Path(package.origin).parent, tmp_path / "hpsv2")
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(vocabulary, tmp_path / "hpsv2/src/open_clip")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("clint", "clint.textui", "turtle"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(progress=None, forward=None))
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
    official_hpsv2.model_dict.clear()
    del network

    reward = load_reward(f"hpsv2:{tmp_path if size == 'tiny' else file}", CPU)
    for prompt, scores in zip(PROMPTS, expected, strict=True):
        actual = [reward(image[None], [prompt]).item() for image in images]
        assert actual == pytest.approx(scores, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_clip_pickscore_and_aesthetic_are_as_their_authors_compute(tmp_path, name):
    network = CLIPModel.from_pretrained("demo/clip").eval()
    processor = CLIPProcessor.from_pretrained("demo/clip")
    options = dict(padding=True, truncation=True, return_tensors="pt")
    options["max_length"] = network.config.text_config.max_position_embeddings
    folder = copy_clip(tmp_path / "clip")
    head = save_aesthetic_head(folder / "sac+logos+ava1-l14-linearMSE.pth", width=64)
    reward = load_reward(f"{name}:{folder}", CPU)
    for image, prompt in zip(pictures((48, 48), (32, 32), (300, 512)), PROMPTS, strict=True):
        with torch.no_grad():
            output = network(**processor(images=pil(image), text=[prompt], **options))
            of_text, of_image = output.text_embeds, output.image_embeds  # both of length 1
            expected = head(of_image)[0] if name == "aesthetic" else (of_text @ of_image.T)[0]
        torch.testing.assert_close(reward(image[None], [prompt]), expected, rtol=0, atol=1e-6)


def test_jpeg_rewards_are_the_size_of_the_file(tmp_path):
    images = torch.stack([torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.5)])
    sizes = []
    for image in images:
        pil(image).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    for name, sign in (("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)):
        scores = load_reward(name, CPU)(images, ["", ""])
        assert (sign * scores).tolist() == pytest.approx(sizes)
        with pytest.raises(ValueError, match=f"--reward {name}:5 cannot be loaded"):
            load_reward(f"{name}:5", CPU)  # a weight needs =


@pytest.mark.parametrize("scorer", ["hpsv2.1:{}/hps.pt", "pickscore:{}/clip", "aesthetic:{}/clip"])
def test_rewards_are_float32_under_any_autocast_and_the_same_in_any_batch(reward_folder, scorer):
    reward = load_reward(scorer.format(reward_folder), CPU)
    images = torch.stack(pictures((48, 48), (48, 48), (48, 48)))
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(load_reward(scorer.format(reward_folder), CPU)(images, PROMPTS), scores)
        assert torch.equal(reward(images, PROMPTS), scores)
    alone = [reward(image[None], [p]) for image, p in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_are_refused_by_name_and_code_in_them_does_not_run(reward_folder):
    file, clip = reward_folder / "hps.pt", reward_folder / "clip"
    state, whole, code = torch.load(file)["state_dict"], file.read_bytes(), Path()
    less = {name: weight for name, weight in state.items() if name != "ln_final.bias"}
    weights = safetensors.torch.load_file(clip / "model.safetensors")
    name = "vision_model.post_layernorm.weight"
    del weights[name]
    for spec, saved, content, found in (
        (f"hpsv2:{file}", file, {"state_dict": less}, "ln_final.bias"),
        (f"hpsv2:{file}", file, whole[: len(whole) // 2], ""),
        (f"hpsv2:{file}", file, {"state_dict": code}, "code in it"),
        (f"aesthetic:{clip}", clip / "aesthetic-model.pth", code, "code in it"),
        (f"pickscore:{clip}", clip / "model.safetensors",
         safetensors.torch.save(weights, {"format": "pt"}), name)):
        saved.write_bytes(content) if isinstance(content, bytes) else torch.save(content, saved)
        with pytest.raises(ValueError, match=f"^--reward {spec} cannot be loaded .*{found}.*$"):
            load_reward(spec, CPU)


def test_a_weighted_sum_is_the_sum_of_its_parts_and_a_weight_of_0_only_watches(tmp_path):
    file = tmp_path / "a, b=c.py"  # a path with every character that the spec's rule uses
    file.write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
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


@pytest.mark.parametrize("spec, message", {
    "beauty": "unknown reward 'beauty'", "nowhere.py:f": "there is no file nowhere.py",
    "rewards.py:nothing": "there is no function 'nothing' in rewards.py", "hpsv2=much": "'much'",
    "hpsv2=nan": "must be finite", "hpsv2=0,clip:a=0": "one of them not 0",
    "clip:a,hpsv2,clip:a=2": "'clip:a' is given twice", "pickscore:": "'pickscore:' lacks"}.items())
def test_a_spec_that_is_not_clear_is_refused_in_a_sentence(spec, message):
    with pytest.raises(ValueError, match=f"^--reward {re.escape(spec)}: .*{message}.*$"):
        load_reward(spec, CPU)


def test_scores_of_one_dict_share_a_call_and_have_weights_and_names_of_their_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
calls = []
def scores(images, prompts):
    calls.append(len(prompts))
    return {"red": images[:, 0].mean((1, 2)), "v1.length": list(map(len, prompts))}
def called(images, prompts):
    return [len(calls)] * len(prompts)
""")
    terms = f"{file}:scores.red=2,{file}:called=0,{file}:scores.v1.length=0.5"
    reward, images, given = load_reward(terms, CPU), torch.rand(3, 3, 8, 8), ["a", "", "a cat"]
    red = torch.stack([(image[0] * 255).round().mean() / 255 for image in images])
    for batch in (1, 2):
        found = reward.terms(images, given)
        assert list(found) == list(reward.weights) == ["red", "called", "v1.length"]
        torch.testing.assert_close(found["red"], red)
        assert found["v1.length"].tolist() == [1, 0, 5] and found["called"].tolist() == [batch] * 3
    torch.testing.assert_close(reward(images, given), 2 * red + torch.tensor([0.5, 0, 2.5]))
    for spec, message in (
        ("scores", "^reward 'scores' returned a dict; .* or for FUNCTION.SCORE a dict"),
        ("scores.blue", "scores.blue: scores returned no score 'blue', but red, v1.length"),
        ("called.red", "called.red: called returned a list, not a dict")):
        with pytest.raises(ValueError, match=message):
            load_reward(f"{file}:{spec}", CPU)(images, given)


@pytest.mark.parametrize("spec, names", {
    "a.py:f,b.py:f=2,b.py:g": ["a.py:f", "b.py:f", "g"],
    "clip:x/y=1,clip:x/z,hpsv2": ["clip:x-y", "clip:x-z", "hpsv2"],
    "hpsv2,hpsv2:file.pt=0": ["hpsv2", "hpsv2:file.pt"], "a.py:kl": ["a.py:kl"],
    "a.py:f.red,a.py:g.red,a.py:f.a/b": ["a.py:f.red", "a.py:g.red", "a-b"]}.items())
def test_rewards_of_one_name_are_told_apart_and_no_name_has_a_slash(spec, names):
    assert list(prdp.parse_reward(spec)) == names


def test_no_term_can_change_what_another_sees(tmp_path):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    (tmp_path / "terms.py").write_text("""
import os, torch
def rude(images, prompts):
    images.zero_()
    prompts.reverse()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", True)
    torch.backends.cuda.matmul.allow_tf32 = True
    os.chdir("/")
    return torch.ones(len(prompts), requires_grad=True).float()
def polite(images, prompts):
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    state += torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert state == (torch.float32, *[False] * 4) and os.getcwd() != "/", state
    return [float(p == "b") + i.max().item() for i, p in zip(images, prompts)]
""")
    given, images = ["a", "b"], torch.ones(2, 3, 8, 8)
    reward = load_reward(f"{tmp_path}/terms.py:rude=0,{tmp_path}/terms.py:polite", CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(images, given).tolist() == [1, 2] and torch.is_autocast_enabled("cpu")
    assert not reward.terms(images, given)["rude"].requires_grad
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert given == ["a", "b"] and images.min() == 1


def test_a_reward_file_hides_neither_a_module_nor_a_namesake_and_is_read_as_it_is_now(tmp_path):
    one, two = tmp_path / "one/json.py", tmp_path / "two/json.py"
    for file, function in ((one, "red"), (two, "rouge")):
        file.parent.mkdir()
        file.write_text(f"import json\ndef {function}(images, prompts): return json.loads('[1]')\n")
    spec = f"{one}:red,{two}:rouge=2"
    assert load_reward(spec, CPU)(torch.ones(1, 3, 8, 8), [""]).tolist() == [3]
    assert sys.modules["json"] is json
    one.write_text("def red(images, prompts): return [7.5]")
    assert load_reward(spec, CPU)(torch.ones(1, 3, 8, 8), [""]).tolist() == [9.5]


def test_a_reward_may_have_worker_processes_that_start_afresh(tmp_path):
    file = tmp_path / "1.5/json.py"
    file.parent.mkdir()
    file.write_text("""
import concurrent.futures, multiprocessing
def length(prompt): return len(prompt)
def score(images, prompts):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return list(pool.map(length, prompts))
""")
    reward = load_reward(f"{file}:score", CPU)
    assert reward(torch.zeros(2, 3, 8, 8), ["a", "cat"]).tolist() == [1, 3]


@pytest.mark.parametrize("fault, kind, message", [
    ("raise httpx.ConnectError('refused')", RuntimeError, "failed: ConnectError: refused"),
    ("float('much')", RuntimeError, "failed: ValueError: could not convert"),
    ("sys.exit(0)", RuntimeError, "failed: SystemExit: 0"),
    ("raise KeyboardInterrupt", KeyboardInterrupt, None),
    ("raise torch.OutOfMemoryError('full')", torch.OutOfMemoryError, "^full"),  # prdp.py's advice
    ("return None", ValueError, "returned a NoneType; it must return one number an image"),
    ("return images", ValueError, r"returned shape \(2, 3, 8, 8\)")])
def test_a_reward_that_fails_is_named_and_its_traceback_kept(tmp_path, fault, kind, message):
    file = tmp_path / "mine.py"
    modules = f"import sys, torch, {httpx.__name__} as httpx\n"
    file.write_text(f"{modules}def broken(images, prompts):\n    {fault}\n")
    with pytest.raises(kind, match=message) as error:
        load_reward(f"{file}:broken", CPU)(torch.rand(2, 3, 8, 8), ["", ""])
    if kind is RuntimeError:
        assert error.match("^reward 'broken'") and error.value.__cause__.__traceback__
        file.write_text(f"{modules}{fault}  # at import\n")
        with pytest.raises(RuntimeError, match=f"--reward .*mine.py {message}"):
            load_reward(f"{file}:broken", CPU)


# ------------------------------------------------------------------------------------------ the hub

@pytest.mark.parametrize("status, code, reason", [
    (401, "", "401: it is private or gated.*`hf auth login` or set HF_TOKEN"),
    (404, "RepoNotFound", "404: there is no such repository"), (503, "", "503; try again later"),
    (None, "", "no connection to the hub; without a network .*HF_HUB_OFFLINE=1")])
def test_the_hubs_answer_is_told_and_what_helps(tmp_path, monkeypatch, status, code, reason):
    def answer(request):
        if status is None:
            raise httpx.ConnectError("[Errno -3] Temporary failure in name resolution")
        return httpx.Response(status, headers={"X-Error-Code": code}, request=request)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT_FACTORY",
                        lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries
    huggingface_hub.close_session()
    for spec in ("clip:a/b", "pickscore", "hpsv2", "aesthetic"):
        hint = "" if ":" in spec else f"; a local copy is given as {spec}:PATH"
        with pytest.raises(ValueError, match=rf"^--reward {spec} .*{reason}.*\){hint}$") as error:
            load_reward(spec, CPU)
        assert ("without a network" in str(error.value)) is (status is None)
    with pytest.raises(ValueError, match=rf"--prompts hpdv2 .*{reason}.*python -m prompts.sets"):
        prompts.sets.read_prompts("hpdv2")
    monkeypatch.undo()
    huggingface_hub.close_session()  # which makes the next one of the real client


# ---------------------------------------------------------------------------------------- documents

def test_the_readmes_commands_parse_and_its_paths_exist(tmp_path):
    prdp.Run(str(tmp_path)).write_json("config.json", vars(Config()))
    (tmp_path / "checkpoint.pt").touch()
    pages = {page: page.read_text() for page in
             [ROOT / "README.md", *(ROOT / "benchmarks").rglob("*.md")]}
    anchors = {page: {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                      for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
               for page, text in pages.items()}
    for page, text in pages.items():
        commands = re.findall(r"^    .*prdp\.py.*$", text, re.MULTILINE)
        assert len(commands) >= 3 or page.parent != ROOT
        for command in commands:
            words = shlex.split(command, comments=True)
            words = [str(tmp_path) if word.startswith("runs/") else word for word in words]
            config = prdp.parse_config(words[words.index("prdp.py") + 1 :])
            assert not config.prompts.endswith(".txt") or (ROOT / config.prompts).exists(), command
        for flag in re.findall(r"^    --(\w+)|`--(\w+)", text, re.MULTILINE):
            assert "".join(flag) in vars(Config()) | {"help": None}, flag
        for script in re.findall(r"python (\w+/\w+\.py)", text):
            assert (ROOT / script).exists(), script
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            target = (page.parent / path if path else page).resolve()
            assert target.exists(), path
            assert not anchor or anchor in anchors[target], anchor
