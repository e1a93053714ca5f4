"""PRDP: Proximal Reward Difference Prediction, black-box reward finetuning of Stable Diffusion.

Deng, Wang, Wei, Grundmann, Hou, "PRDP: Proximal Reward Difference Prediction for Large-Scale
Reward Finetuning of Diffusion Models", CVPR 2024, arXiv 2402.08714, whose equations are cited here.

A diffusion model is a policy pi_theta: for a prompt c it draws a trajectory x_{0:T} of denoising
steps. We raise any reward r(x_0, c) of the final image, but stay near the pretrained model (Eq. 6):

    maximise  E[ r(x_0, c) ] - beta * KL[ pi_theta(x_{0:T} | c) || pi_ref(x_{0:T} | c) ]

The optimum is pi_ref exp(r / beta) / Z(c), and Z cancels between two trajectories a, b of a prompt
(Eq. 9): at the optimum, differences of log ratios to pi_ref equal reward differences / beta. PRDP
is regression towards that (Eq. 14), and by the paper stays stable where policy gradients collapse:

    r_hat(x_{0:T}) = log pi_theta(x_{0:T} | c) - log pi_ref(x_{0:T} | c)
    loss(a, b)     = ( [r_hat(a) - r_hat(b)] - [r(a) - r(b)] / beta )^2

Proximal updates (Eq. 18-21): each step's term of r_hat is clipped to within eps of what it was
under the policy that drew the trajectory, and a pair's loss is the larger of plain and clipped.

Algorithm 1, and the function that does each line:

    for each epoch                                              train
        draw N prompts and B trajectories of each from pi_old   collect_epoch: sample_trajectories
        log pi_ref of these trajectories                        collect_epoch: trajectory_log_probs
        reward every final image                                collect_epoch: score_images
        K times, over all prompts and all pairs of each         update_policy
            log pi_theta, without a graph                       update_policy: trajectory_log_probs
            the loss and its gradient at every log-prob         update_policy: prdp_loss
            that gradient's way into the weights; AdamW         update_policy: backward_log_probs

Deviations from the paper
 1. A log-prob is a mean over the latent's elements and the loss takes the mean over steps, as does
    Appendix G (Eq. 21 has a sum). The published beta and eps hold only for these; see `Config`.
 2. The DDPM sampler is DDIM with eta = 1, whose last step has a standard deviation of 0.02; that of
    diffusers' DDPMScheduler has 1e-10, which no log-prob survives.
 3. Rewards are float32 and log-probs reduced in float64: eps = 1e-6 is near float32's rounding.
 4. A prompt whose rewards all tie has no pair; its loss is 0 (the paper has a mean over nothing),
    and an update with no gradient at all changes no weight.
 5. The baseline, `--objective ddpo`, normalises rewards by the prompt's B images of the epoch only.
 6. `--offline` (Fig. 7) trains on the first epoch's prompts, sampled from pi_ref and drawn again
    every epoch; pi_old is the policy at the epoch's start, and reward_mean stays pi_ref's.
 7. bfloat16 autocast on GPUs that have it, though its rounding exceeds what one update changes in
    a log-prob: for K > 1 see --no_mixed_precision. Rewards see images rounded to 8 bits.

    torchrun --nproc_per_node=2 prdp.py --preset demo          # minutes on a laptop, no download
    torchrun --nproc_per_node=8 prdp.py --reward hpsv2         # the paper's small-scale run
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 prdp.py
    python prdp.py --evaluate runs/demo-clip                   # base against finetuned

`grep -n '^# .*§' prdp.py` prints the outline. After §4 a reader has seen the whole algorithm, but
for the loop over epochs, which is `train`.
"""

import argparse
import contextlib
import copy
import fcntl
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from prompts.sets import NAMES, prompt_file
from rewards import Reward, cause, check_words, load_network, load_reward

# ---------------------------------------------------------------------------------------- §1 Config


@dataclass
class Config:
    """Every knob; the defaults are the small-scale column of the paper's Table 4.

    Sizes are for all processes together; only micro_batch_size is for each. As log-probs are means
    over T steps and D latent elements, the KL weight of Eq. 6 in nats is kl_weight / (T * D): with
    Stable Diffusion v1.4's D = 4 * 64 * 64 and T = 50, it is kl_weight / 819200.
    """

    preset: Literal["small", "large", "multi", "demo"] = HfArg(
        default="small", help="where defaults come from: a column of Table 4, or the demo")
    model: str = HfArg(default="CompVis/stable-diffusion-v1-4", help="SD v1/v2, hub id or folder")
    prompts: str = HfArg(default="prompts/animals.txt", help="text file, one prompt a line, or a "
                         "name in prompts/sets.py; with --evaluate several, commas between")
    prompt_template: str = HfArg(
        default="A painting of a {}", help="around each line; {} alone with your own --prompts")
    reward: str = HfArg(default="hpsv2", help="r: a reward or a weighted sum, see rewards.py")
    objective: Literal["prdp", "ddpo"] = HfArg(default="prdp", help="prdp, or the baseline ddpo")
    offline: bool = HfArg(default=False, help="train on one pool, drawn from pi_ref (Fig. 7)")
    run_dir: str | None = HfArg(
        default=None, aliases=["--run"], help="output folder, continued if it is there; if not "
        "given, runs/PRESET-REWARD. torchrun on Python 3.11 takes --run for its own")
    seed: int = HfArg(default=0, help="of all prompts and noise")
    num_epochs: int = HfArg(default=100, help="E: epochs")
    updates_per_epoch: int = HfArg(default=10, help="K: updates an epoch, each over all pairs")
    prompts_per_epoch: int = HfArg(default=32, help="N: prompts an epoch, over all processes")
    images_per_prompt: int = HfArg(default=16, help="B: images of each prompt")
    kl_weight: float = HfArg(default=3e-5, help="beta: reward per nat of mean log-prob")
    num_steps: int = HfArg(default=50, help="T: denoising steps")
    clip_range: float = HfArg(default=1e-6, help="eps: clip of a step, nats per element, or inf")
    guidance_scale: float = HfArg(default=5.0, help="classifier-free guidance, part of the policy")
    learning_rate: float = HfArg(default=1e-5, help="of AdamW")
    weight_decay: float = HfArg(default=1e-4, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="L2 norm the gradient is clipped to")
    lora_rank: int = HfArg(default=0, help="of LoRA adapters; at 0 all weights learn")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower updates")
    mixed_precision: bool = HfArg(default=True, help="bfloat16 on GPUs that have it; with "
                                  "--no_mixed_precision float32")
    compile: bool = HfArg(default=False, help="compile the UNet, which takes minutes at first")
    micro_batch_size: int = HfArg(default=8, help="images, or (image, step), of a UNet call")
    keep_checkpoints: int = HfArg(default=1, help="how many stay on disk, the newest")
    evaluate: str | None = HfArg(default=None, help="a finished run, compared with its base")
    samples_per_prompt: int = HfArg(default=16, help="images of each prompt with --evaluate")


MULTI = dict(
    prompts="pickapic", prompt_template="{}", reward="pickscore=10,hpsv2=2,aesthetic=0.05",
    num_epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8,
    clip_range=1e-4)
PRESETS = {
    "small": {},
    "multi": MULTI,
    "large": MULTI | dict(prompts="hpdv2", reward="hpsv2", kl_weight=3e-6, learning_rate=7e-6),
    "demo": dict(
        model="demo/model", reward="clip:demo/clip", num_epochs=16, updates_per_epoch=1,
        prompts_per_epoch=44, images_per_prompt=6, num_steps=10, kl_weight=1.0, clip_range=1e-4,
        guidance_scale=3.0, learning_rate=2e-4, micro_batch_size=64),
}


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags beat the preset; with --evaluate they beat what the run was made with."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{message}; --help explains the flags")

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.error = fail  # else argparse ends every process with a message of its own
    given = parser.parse_args(arguments, argparse.Namespace(prompts=None))  # None: not given
    defaults = asdict(Config()) | PRESETS[given.preset]
    if given.evaluate is not None:
        defaults = read_config(Path(given.evaluate))
    if given.prompts:  # the default template is for the default list
        is_default = given.prompts == Config().prompts
        defaults["prompt_template"] = Config().prompt_template if is_default else "{}"
    parser.set_defaults(**defaults)
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if not config.run_dir:
        scorers = [part.partition("=")[0].partition(":")[0] for part in config.reward.split(",")]
        names = "+".join(Path(scorer.strip()).name for scorer in scorers)
        config.run_dir = f"runs/{config.preset}-{names}"

    bounds = {"images_per_prompt": 2, "clip_range": 0, "kl_weight": 1e-12, "max_grad_norm": 1e-12,
              "lora_rank": 0, "learning_rate": 0, "weight_decay": 0}
    bounds |= dict.fromkeys(("num_epochs", "updates_per_epoch", "prompts_per_epoch", "num_steps",
                             "micro_batch_size", "samples_per_prompt", "keep_checkpoints"), 1)
    for name, bound in bounds.items():
        if not getattr(config, name) >= bound:
            raise ValueError(f"--{name} {getattr(config, name)}: must be at least {bound}")
    if "{}" not in config.prompt_template:
        raise ValueError(f"--prompt_template {config.prompt_template!r}: there is no {{}} in it")
    if config.evaluate is not None and config.lora_rank != defaults["lora_rank"]:
        raise ValueError(f"--lora_rank {config.lora_rank}: must be the run's, "
                         f"{defaults['lora_rank']}")
    if config.offline and config.objective == "ddpo":
        raise ValueError("--offline: ddpo is a policy gradient and needs its policy's samples")
    return config


# ------------------------------------------------------------------------ §2 Denoising as a policy
# P images, or P entries (image, step); T steps. A trajectory is `latents` (P, T+1, C, H, W): index
# 0 is pure noise x_T, index T is x_0; `timesteps[i]` is the scheduler's t, 0..999, of i -> i + 1.


def predict_noise(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor,
                  prompt_embeds: Tensor, negative_embeds: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: eps(x, "") + guidance_scale * (eps(x, c) - eps(x, "")).

    latents: (P, C, H, W) float32; timesteps: (P,), 0..999, may mix steps; prompt_embeds: (P, L, E);
    negative_embeds: (1, L, E), of the empty prompt; guidance_scale 1 leaves it out. Returns what
    the checkpoint was trained to predict, noise or velocity, (P, C, H, W) float32.
    """
    if guidance_scale == 1:
        return unet(latents, timesteps, prompt_embeds).sample.to(latents.dtype)
    embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2P, L, E)
    both = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds).sample  # (2P, C, H, W)
    unconditional, conditional = both.to(latents.dtype).chunk(2)  # (P, C, H, W) each
    return unconditional + guidance_scale * (conditional - unconditional)


def ddim_mean_std(scheduler: DDIMScheduler, noise_pred: Tensor, latents: Tensor,
                  timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's Gaussian N(mean, std^2 I) over x_{t-1} (Eq. 2), a DDIM step with eta = 1.

    noise_pred, latents: (P, C, H, W); timesteps: (P,), 0..999, may mix steps. Returns mean
    (P, C, H, W) and std (P, 1, 1, 1), > 0 as the last step ends at alpha_bar[0] and not at 1.
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bars = scheduler.alphas_cumprod.to(latents)  # (1000,)
    alpha_bar = alpha_bars[timesteps].view(-1, 1, 1, 1)
    alpha_bar_prev = alpha_bars[(timesteps - stride).clamp(min=0)].view(-1, 1, 1, 1)

    if scheduler.config.prediction_type == "v_prediction":
        clean = alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * noise_pred  # (P, C, H, W)
        noise = alpha_bar.sqrt() * noise_pred + (1 - alpha_bar).sqrt() * latents
    else:
        clean = (latents - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
        noise = noise_pred

    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    mean = alpha_bar_prev.sqrt() * clean + (1 - alpha_bar_prev - variance).sqrt() * noise
    return mean, variance.sqrt()


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2 I) as a mean over the latent's elements, not a sum.

    x, mean: (P, C, H, W); std: broadcastable to them. Returns (P,) float64, nats per element.
    """
    standardised = (x.double() - mean.double()) / std.double()
    log_density = -0.5 * standardised**2 - std.double().log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


@dataclass
class Policy:
    """pi(x_{t-1} | x_t, c): a UNet, its noise schedule, and guidance, which is part of it."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler  # after set_timesteps(T)
    negative_embeds: Tensor  # (1, L, E)
    guidance_scale: float
    mixed_precision: bool = True

    def mean_std(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Of the steps from latents (P, C, H, W) at timesteps (P,): (P, C, H, W), (P, 1, 1, 1)."""
        noise_pred = predict_noise(self.unet, latents, timesteps, embeds, self.negative_embeds,
                                   self.guidance_scale)
        return ddim_mean_std(self.scheduler, noise_pred, latents, timesteps)

    def autocast(self) -> torch.autocast:
        """bfloat16 matrix products on GPUs that have them; the weights are float32 in any case."""
        device = self.negative_embeds.device.type
        has_bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(device, torch.bfloat16, self.mixed_precision and has_bfloat16)

    def in_use(self) -> contextlib.AbstractContextManager:
        """Around trajectories that are drawn or scored: only a `Reference` (§5) has to prepare."""
        return contextlib.nullcontext()

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters sit on the UNet."""
        return hasattr(self.unet, "peft_config")

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name: all of the UNet's, or those of its LoRA adapters."""
        return {name: weight for name, weight in self.unet.named_parameters()
                if weight.requires_grad}


def sample_trajectories(policy: Policy, prompt_embeds: Tensor, noise: Tensor,
                        micro_batch_size: int) -> tuple[Tensor, Tensor]:
    """Draw x_{0:T} ~ pi(. | c) from the given standard normal noise.

    prompt_embeds: (P, L, E); noise: (P, T+1, C, H, W), whose index 0 is x_T itself. Returns latents
    (P, T+1, C, H, W) float32 and their log_probs (P, T) float64, nats per latent element.
    """
    latents = noise.to(prompt_embeds.device, copy=True)
    log_probs = trajectory_log_probs(policy, prompt_embeds, latents, micro_batch_size, draw=True)
    return latents, log_probs


@torch.no_grad()
def trajectory_log_probs(policy: Policy, prompt_embeds: Tensor, latents: Tensor,
                         micro_batch_size: int, draw: bool = False) -> Tensor:
    """log pi(x_{t-1} | x_t, c) at every step of the trajectories, without a graph.

    prompt_embeds: (P, L, E); latents: (P, T+1, C, H, W), recorded, or with draw still the noise
    that each step turns into its latent. Returns (P, T) float64, nats per latent element. Sampling
    and scoring share this loop: for the policy that drew the trajectories they agree bit for bit.
    """
    timesteps = policy.scheduler.timesteps.to(latents.device)  # (T,)
    log_probs = latents.new_empty(len(latents), len(timesteps), dtype=torch.float64)
    with policy.in_use(), policy.autocast():
        for images in micro_batches(len(latents), micro_batch_size, "denoising"):
            x, embeds = latents[images], prompt_embeds[images]  # x is a view, (p, T+1, C, H, W)
            for i, t in enumerate(timesteps):
                mean, std = policy.mean_std(x[:, i], t.expand(len(x)), embeds)
                if draw:
                    x[:, i + 1] = mean + std * x[:, i + 1]
                log_probs[images, i] = gaussian_log_prob(x[:, i + 1], mean, std)
    return log_probs


# -------------------------------------------------------------------------------- §3 The objective
# N prompts, B images of each, T steps. All of it is float64, small, and free of the UNet.


def pair_differences(values: Tensor) -> Tensor:
    """values (..., B) -> (..., B, B) with entry [a, b] = values[a] - values[b]."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def prdp_loss(log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, rewards: Tensor,
              clip_range: float, kl_weight: float) -> Tensor:
    """Squared error of predicted against true reward differences, proximal (Appendix G).

    log_probs, log_probs_old, log_probs_ref: (B, T) or (N, B, T), nats per latent element, under the
    policy, the one that drew the trajectories, and the reference; rewards: (B,) or (N, B);
    clip_range: eps >= 0 in nats per element, may be inf; kl_weight: beta > 0. Returns a scalar, the
    mean over prompts of the mean over their pairs: never below the plain loss; 0 where log_probs
    and log_probs_old are the optimum's (Eq. 15); 0, with gradient 0, for a prompt of equal rewards.
    """
    log_ratios = log_probs - log_probs_ref  # (N, B, T), r_hat_t (Eq. 19)
    log_ratios_old = log_probs_old - log_probs_ref
    clipped_log_ratios = log_ratios.clamp(log_ratios_old - clip_range, log_ratios_old + clip_range)

    log_ratio_diffs = pair_differences(log_ratios.mean(-1))  # (N, B, B)
    clipped_log_ratio_diffs = pair_differences(clipped_log_ratios.mean(-1))
    reward_diffs = pair_differences(rewards.to(log_ratios))
    target_diffs = reward_diffs / kl_weight

    # The larger of the two bounds the plain loss from above, as in PPO (Eq. 18).
    loss = torch.maximum((log_ratio_diffs - target_diffs) ** 2,
                         (clipped_log_ratio_diffs - target_diffs) ** 2)
    is_pair = reward_diffs > 0  # each unordered pair once, ties left out
    num_pairs = is_pair.sum((-1, -2)).clamp(min=1)  # (N,)
    return (loss.where(is_pair, 0).sum((-1, -2)) / num_pairs).mean()


def ddpo_loss(log_probs: Tensor, log_probs_old: Tensor, advantages: Tensor,
              clip_range: float) -> Tensor:
    """The paper's baseline, DDPO: a policy gradient with PPO's clipping (Black et al., 2023).

    log_probs, log_probs_old: (N, B, T), nats per latent element; advantages: (N, B); clip_range: of
    the likelihood ratio around 1. Returns a scalar, the mean over prompts, images and steps.
    """
    likelihood_ratios = (log_probs - log_probs_old).exp()  # (N, B, T)
    clipped = likelihood_ratios.clamp(1 - clip_range, 1 + clip_range)
    advantages = advantages.to(log_probs).unsqueeze(-1)  # (N, B, 1)
    return torch.maximum(-advantages * likelihood_ratios, -advantages * clipped).mean()


# ------------------------------------------------------------------------------ §4 The online loop


@dataclass
class Trajectories:
    """One epoch's samples on this process: n of the N prompts, each with all of its B images."""

    epoch: int
    prompts: list[str]  # n
    prompt_embeds: Tensor  # (n * B, L, E)
    latents: Tensor  # (n * B, T+1, C, H, W) float32
    log_probs_old: Tensor  # (n, B, T) float64, of the policy before this epoch's updates
    log_probs_ref: Tensor  # (n, B, T) float64; the old ones for an objective without reference
    rewards: Tensor  # (n, B) float32
    reward_terms: dict[str, Tensor]  # name -> (n * B,), of which the reward is a weighted sum

    def check_finite(self, values: Tensor, name: str) -> None:
        """Raise ValueError naming the prompt if values (n, ...) have a NaN or an infinity."""
        for prompt, of_prompt in zip(self.prompts, values.flatten(1), strict=True):
            if not (finite := of_prompt.isfinite()).all():
                raise ValueError(f"epoch {self.epoch + 1}: {name} is {of_prompt[~finite][0]} for "
                                 f"{prompt!r}; nothing of this epoch is saved")


def collect_epoch(config: Config, models: "Models", prompts: list[str], epoch: int,
                  seconds: dict[str, float]) -> Trajectories:
    """First half of Algorithm 1: draw N prompts, sample B trajectories of each, score the images.

    Prompts and noise depend on (seed, epoch, prompt, image, step) alone, so any number of processes
    sees the same. Notes its times in seconds. Raises ValueError if a reward or log-prob is not
    finite.
    """
    key = f"{config.seed}/{0 if config.offline else epoch}"  # offline, one pool is drawn every time
    epoch_prompts = draw_prompts(prompts, config.prompts_per_epoch, key)  # N
    mine = range(rank(), config.prompts_per_epoch, world_size())  # n of the indices 0..N-1
    my_prompts = [epoch_prompts[i] for i in mine]
    indices = list(itertools.product(mine, range(config.images_per_prompt)))  # P = n * B
    shape = (len(mine), config.images_per_prompt, -1)  # as which (P, ...) is seen per prompt
    size = config.micro_batch_size

    with timed(seconds, "seconds_sampling"):
        noise = torch.stack([draw_noise(f"{key}/{i}/{j}", config.num_steps, models.latent_shape)
                             for i, j in indices])  # (P, T+1, C, H, W)
        embeds = models.encode_prompts(my_prompts)  # (n, L, E)
        embeds = embeds.repeat_interleave(config.images_per_prompt, 0)  # (P, L, E)
        if config.offline:
            latents, _ = sample_trajectories(models.reference, embeds, noise, size)
            log_probs_old = trajectory_log_probs(models.policy, embeds, latents, size)
        else:
            latents, log_probs_old = sample_trajectories(models.policy, embeds, noise, size)
        log_probs_ref = log_probs_old  # (P, T)
        if config.objective == "prdp":  # DDPO has no reference
            log_probs_ref = trajectory_log_probs(models.reference, embeds, latents, size)

    with timed(seconds, "seconds_scoring"):
        image_prompts = [epoch_prompts[i] for i, _ in indices]  # P
        terms = score_images(models, latents[:, -1], image_prompts, size)  # name -> (P,)
        rewards = models.reward.total(terms).view(shape[:2])
    trajectories = Trajectories(epoch, my_prompts, embeds, latents, log_probs_old.view(shape),
                                log_probs_ref.view(shape), rewards, terms)
    trajectories.check_finite(trajectories.log_probs_old, "a log-prob of sampling")
    trajectories.check_finite(trajectories.log_probs_ref, "a log-prob of the reference")
    trajectories.check_finite(trajectories.rewards, f"--reward {config.reward}")
    return trajectories


def score_images(models: "Models", latents: Tensor, prompts: list[str],
                 micro_batch_size: int) -> dict[str, Tensor]:
    """The reward's terms at x_0 (P, C, H, W): name -> (P,) float32, unweighted."""
    scores = [models.reward.terms(models.decode(latents[batch]), prompts[batch])
              for batch in micro_batches(len(latents), micro_batch_size, "scoring")]
    return {name: torch.cat([score[name] for score in scores]) for name in scores[0]}


def update_policy(config: Config, policy: Policy, optimizer: torch.optim.Optimizer,
                  trajectories: Trajectories) -> dict[str, float]:
    """Second half of Algorithm 1: K updates, each over all pairs of all prompts.

    The loss couples all T steps and B images of a prompt, yet memory must not grow with them. So
    (1) all log-probs without a graph; (2) the loss and its gradient on that small tensor; (3) for
    each (image, step) alone, a forward with a graph and a backward that starts from its entry of
    the gradient. By the chain rule this is exact. Returns this process's means over the K updates.
    """
    old, history = trajectories.log_probs_old, []
    for k in range(config.updates_per_epoch):
        log_probs = old.clone()  # (n, B, T); at k = 0 the policy still is the old one
        if k > 0:
            log_probs = trajectory_log_probs(
                policy, trajectories.prompt_embeds, trajectories.latents, config.micro_batch_size
            ).view_as(old)  # (1)
        loss = objective_loss(config, log_probs.requires_grad_(), trajectories)
        (grad,) = torch.autograd.grad(loss, log_probs)  # (2), (n, B, T)
        trajectories.check_finite(grad, f"update {k + 1}: the loss's gradient")
        backward_log_probs(policy, trajectories, grad.flatten(0, 1), config.micro_batch_size)  # (3)
        weights = list(policy.trained.values())
        average_gradients(weights)

        grad_norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        if not grad_norm.isfinite():
            raise ValueError(f"epoch {trajectories.epoch + 1}: update {k + 1}: the gradient's norm "
                             f"is {grad_norm}; nothing of this epoch is saved")
        if grad_norm > 0:  # else AdamW would still decay the weights and follow its momentum
            optimizer.step()
        optimizer.zero_grad()
        clipped = ((log_probs.detach() - old).abs() > config.clip_range).double().mean()
        history.append([loss.item(), clipped.item(), grad_norm.item()])
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError(f"epoch {trajectories.epoch + 1}: an update left weights that are not "
                         "finite; nothing of this epoch is saved")
    means = torch.tensor(history).mean(0).tolist()
    return dict(zip(("loss", "clip_fraction", "grad_norm"), means, strict=True))


def objective_loss(config: Config, log_probs: Tensor, trajectories: Trajectories) -> Tensor:
    """The loss of --objective at log_probs (n, B, T), a scalar."""
    old, rewards = trajectories.log_probs_old, trajectories.rewards.double()
    if config.objective == "prdp":
        return prdp_loss(log_probs, old, trajectories.log_probs_ref, rewards, config.clip_range,
                         config.kl_weight)
    deviations = rewards - rewards.mean(-1, keepdim=True)
    advantages = deviations / (deviations.square().mean(-1, keepdim=True).sqrt() + 1e-8)  # (n, B)
    return ddpo_loss(log_probs, old, advantages, config.clip_range)


def backward_log_probs(policy: Policy, trajectories: Trajectories, grad: Tensor,
                       micro_batch_size: int) -> None:
    """Add to .grad the sum over (image, step) of grad * d log_prob / d theta.

    grad: (P, T), d loss / d log_prob. Entries that are exactly 0, as clipping makes them, are left
    out; the others are independent, so they fill micro-batches that mix images and steps.
    """
    latents, timesteps = trajectories.latents, policy.scheduler.timesteps.to(grad.device)
    entries = grad.nonzero()  # (M, 2)
    for batch in micro_batches(len(entries), micro_batch_size, "updating"):
        image, step = entries[batch].unbind(1)  # (P,) each
        with policy.autocast():
            mean, std = policy.mean_std(latents[image, step], timesteps[step],
                                        trajectories.prompt_embeds[image])
        log_probs = gaussian_log_prob(latents[image, step + 1], mean, std)  # (P,)
        log_probs.backward(grad[image, step])


# --------------------------------------------------------------------------------------- §5 Models


@dataclass
class Models:
    """What a run computes with: the policy that learns, and all that is frozen."""

    policy: Policy
    reference: Policy
    pipeline: StableDiffusionPipeline  # its VAE, text encoder and tokenizer
    reward: Reward

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents the UNet was made for."""
        unet = self.pipeline.unet.config
        return unet.in_channels, unet.sample_size, unet.sample_size

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """P prompts -> (P, L, E), cut at the tokenizer's limit, 77 tokens for Stable Diffusion."""
        return self.pipeline.encode_prompt(prompts, self.policy.unet.device, 1, False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """x_0 (P, C, H, W) -> images (P, 3, 8H, 8W) in [0, 1]."""
        vae = self.pipeline.vae
        # One 512 x 512 image, or as many smaller ones, at a time: it takes over 1 GiB.
        slices = (latents / vae.config.scaling_factor).split(max(1, 64**2 // latents[0, 0].numel()))
        images = torch.cat([vae.decode(part).sample for part in slices])
        return (images / 2 + 0.5).clamp(0, 1)


class Reference(Policy):
    """pi_ref, the pretrained model: a UNet that is on the GPU only while it computes, or with LoRA
    the policy's own with its adapters off."""

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        device = self.negative_embeds.device
        self.unet.disable_adapters() if self.has_adapters else self.unet.to(device)
        try:
            yield
        finally:
            self.unet.enable_adapters() if self.has_adapters else self.unet.to("cpu")


def load_models(config: Config, device: torch.device, finetuned: Path | None = None) -> Models:
    """The reward, the pretrained model as the reference, and as the policy a copy of it that can
    learn, or the weights that a run left in the folder `finetuned`."""
    reward = load_reward(config.reward, device)
    pipeline = load_pipeline(config.model).to(device)
    for frozen in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        frozen.eval().requires_grad_(False)
    scheduler = pipeline.scheduler
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"--model {config.model} predicts {scheduler.config.prediction_type!r}; "
                         "only epsilon and v_prediction are supported")
    if config.num_steps >= scheduler.config.num_train_timesteps:
        raise ValueError(f"--num_steps {config.num_steps}: the model was trained with "
                         f"{scheduler.config.num_train_timesteps}, and fewer can be taken")
    try:
        scheduler.set_timesteps(config.num_steps)
        negative_embeds = try_out(pipeline)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--model {config.model}: its parts do not work together "
                         f"({cause(error)})") from None

    if finetuned:
        unet = load_finetuned(pipeline, config, finetuned).to(device)
    elif config.lora_rank:
        unet = add_lora(pipeline, config)
    else:
        unet = copy.deepcopy(pipeline.unet).requires_grad_(True)
    if not config.lora_rank:
        pipeline.unet.to("cpu")  # from where the reference fetches it
    for network in {unet, pipeline.unet}:
        prepare_unet(network, config)
    shared = scheduler, negative_embeds, config.guidance_scale, config.mixed_precision
    return Models(Policy(unet, *shared), Reference(pipeline.unet, *shared), pipeline, reward)


@torch.no_grad()
def try_out(pipeline: StableDiffusionPipeline) -> Tensor:
    """Use every part once, on a small latent, before anything is drawn. Returns the empty prompt's
    embedding (1, L, E); raises what parts that do not fit each other raise."""
    unet, vae = pipeline.unet, pipeline.vae
    check_words(pipeline.tokenizer)
    embeds = pipeline.encode_prompt([""], unet.device, 1, False)[0]
    size = min(unet.config.sample_size, 8)
    latents = torch.zeros(1, unet.config.in_channels, size, size, device=unet.device)
    noise_pred = unet(latents, pipeline.scheduler.timesteps[:1].to(unet.device), embeds).sample
    if noise_pred.shape != latents.shape:
        raise ValueError(f"{tuple(latents.shape)} into the UNet, {tuple(noise_pred.shape)} out")
    vae.decode(latents / vae.config.scaling_factor)
    return embeds


def add_lora(pipeline: StableDiffusionPipeline, config: Config) -> UNet2DConditionModel:
    """The pipeline's UNet with new LoRA adapters on its attention."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("--lora_rank needs the package peft: pip install peft") from None
    torch.manual_seed(config.seed)  # the same adapters in every process
    pipeline.unet.add_adapter(LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_rank, init_lora_weights="gaussian",
        target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return pipeline.unet


def load_finetuned(pipeline: StableDiffusionPipeline, config: Config,
                   run: Path) -> UNet2DConditionModel:
    """The policy at a run's end, from unet/, or from lora/ as adapters on the pipeline's UNet."""
    try:
        if not config.lora_rank:
            return load_network(UNet2DConditionModel, run / "unet")
        pipeline.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
        return pipeline.unet
    except Exception as error:
        raise ValueError(f"--evaluate {run}: its weights cannot be loaded "
                         f"({cause(error)})") from None


def prepare_unet(unet: UNet2DConditionModel, config: Config) -> None:
    """What changes a UNet's speed and memory alone."""
    unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        unet.compile(dynamic=True)  # one graph for full and partial batches: bit-equal log-probs


def load_pipeline(model: str) -> StableDiffusionPipeline:
    """Stable Diffusion v1 or v2 in float32, without the safety checker, which blackens images.

    Part by part: diffusers' own loader would take the classes, even scripts, that the folder names.
    """
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    try:
        kind = StableDiffusionPipeline.load_config(model)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}; only StableDiffusionPipeline, that is Stable "
                             "Diffusion v1 and v2, is supported")
        for name, loader in networks.items():
            try:
                networks[name] = load_network(loader, model, subfolder=name)
            except Exception as error:
                try:  # a copy may hold half precision alone
                    networks[name] = load_network(loader, model, subfolder=name, variant="fp16")
                except Exception:
                    raise error from None
        # Of it, only the noise schedule and timesteps are used; `ddim_mean_std` is the step.
        scheduler = DDIMScheduler.from_pretrained(  # with offset 1 the last step is from 1 to 0
            model, subfolder="scheduler", timestep_spacing="leading", steps_offset=1,
            clip_sample=False)
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        return StableDiffusionPipeline(
            **networks, scheduler=scheduler, tokenizer=tokenizer, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)
    except Exception as error:  # of the hub, the network, or a damaged file
        raise ValueError(f"--model {model} cannot be loaded from a folder or hub id of that name "
                         f"({cause(error)}); without a network give a local folder, "
                         "or point HF_HOME at a cache that holds it") from None


# ---------------------------------------------------------------------------- §6 Prompts and noise


def read_prompts(file: str, template: str) -> list[str]:
    """The distinct lines of a file or a named set in their order, each put into the template."""
    path = prompt_file(file) if file in NAMES else Path(file)
    try:
        text = path.read_text("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has NUL bytes")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {file}: not a readable UTF-8 text file ({error}), and not one "
                         f"of the sets {', '.join(NAMES)}") from None
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    filled = [line for line in lines if 0 < len(line) <= 10_000]  # else encoding takes seconds
    prompts = [template.replace("{}", line) for line in dict.fromkeys(filled)]
    if not prompts:
        raise ValueError(f"--prompts {file}: there is no prompt in it; write one a line")
    say(f"{file}: {len(prompts)} prompts; left out {lines.count('')} blank and "
        f"{len(filled) - len(prompts)} repeated lines")
    if too_long := len(lines) - lines.count("") - len(filled):
        say(f"left out {too_long} lines of more than 10,000 characters")
    return prompts


def report_long_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say how many of the prompts, or of a sample, the text encoder will not read to their end."""
    sample = random.Random(0).sample(prompts, min(len(prompts), 1000))
    limit = tokenizer.model_max_length
    if long := sum(len(ids) > limit for ids in tokenizer(sample).input_ids):
        say(f"{long} of {len(sample)} prompts are longer than {limit} tokens and are cut there")


def draw_prompts(prompts: list[str], count: int, key: str) -> list[str]:
    """`count` of the prompts, none twice while there are enough; a function of the key."""
    return random.Random(key).sample(prompts * math.ceil(count / len(prompts)), count)


def draw_noise(key: str, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """One trajectory's standard normal noise (T+1, C, H, W), on the CPU; a function of the key."""
    generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
    return torch.randn(num_steps + 1, *shape, generator=generator)


# ---------------------------------------------------------------------------------- §7 Distributed
# The only section that knows torch.distributed. Without torchrun there is a world of one.


def start_distributed() -> torch.device:
    """Join the processes that torchrun started, if it did; returns this one's device."""
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in
                              (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    on_gpu = torch.cuda.device_count() >= local_size  # else two would have to share one
    if on_gpu:
        torch.cuda.set_device(local_rank)
    elif local_size > 1:  # torchrun gave each process one thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if "LOCAL_RANK" in os.environ:
        store, this_rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # several machines count restarts apart
            # Else processes that torchrun started again find the addresses of those that ended.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        # A long timeout, as the others wait while rank 0 draws grids and writes checkpoints.
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=this_rank,
                                world_size=size, timeout=timedelta(hours=2),
                                device_id=device if on_gpu else None)
    if not on_gpu and torch.cuda.is_available():
        say(f"{local_size} processes, {torch.cuda.device_count()} GPUs: computing on the CPU")
    return device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class PeerLost(Exception):
    """This process could not go on because another one ended; that one has told why."""


def together(collective: Callable, *tensors: Tensor | list[Tensor]) -> None:
    """Call what every process has to take part in, if there is more than one."""
    try:
        if world_size() > 1:
            collective(*tensors)
    except RuntimeError as error:
        raise PeerLost(f"the connection to another process broke ({error})") from None


def gather(values: Tensor) -> Tensor:
    """All processes' values (n, ...), one rank's after the other's, on every process: (N, ...)."""
    parts = [values.clone() for _ in range(world_size())]
    together(dist.all_gather, parts, values.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def first_of_each_machine_first() -> Iterator[None]:
    """The block runs in one process of a machine, which may download, and then in its others."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        together(dist.barrier)
    yield
    if is_first:
        together(dist.barrier)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average .grad over processes, once an update; DDP would at each of thousands of backwards."""
    for parameter in parameters:
        if parameter.grad is None:  # this process had no pair with a gradient
            parameter.grad = torch.zeros_like(parameter)
        together(dist.all_reduce, parameter.grad.div_(world_size()))


def micro_batches(count: int, size: int, description: str) -> Iterable[slice]:
    """Slices of at most `size` that cover 0..count-1; a progress bar on rank 0's terminal."""
    slices = [slice(start, start + size) for start in range(0, count, size)]
    return tqdm(slices, description, leave=False, disable=None if rank() == 0 else True)


def say(text: str) -> None:
    """Print once, not once a process."""
    if rank() == 0:
        print(text, flush=True)


# --------------------------------------------------------------------------------- §8 Runs on disk


class Run:
    """A run's folder. Files are written aside, and renamed when they are whole and on the disk.

    So a process can be killed anywhere, or the disk be full, and what is there is whole. The newest
    checkpoint is the truth of a run: metrics.jsonl and reward.png are written again from it.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def claim(self, config: Config) -> None:
        """Make the folder this run's, until the process ends; raises ValueError if it cannot be
        written to, belongs to a process that lives, or holds a run with other flags."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise ValueError(f"--run_dir {self.folder}: not a folder that can be written to "
                             f"({error})") from None
        try:
            if rank() == 0:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--run_dir {self.folder}: another process is at work on it; wait for "
                             "its end, or give another --run_dir") from None
        except OSError:
            say(f"{self.folder} is on a file system without locks: start no second run on it")
        if not self.checkpoints():
            if any((self.folder / weights).exists() for weights in ("unet", "lora")):
                raise ValueError(f"--run_dir {self.folder}: has finished weights but no checkpoint "
                                 "to go on from, and they are not to be lost; give another")
            return
        then, now = read_config(self.folder), asdict(config)
        may_change = {"run_dir", "num_epochs", "micro_batch_size", "gradient_checkpointing",
                      "evaluate", "keep_checkpoints", "samples_per_prompt"}
        changed = [f"--{name} {then[name]} and not {now[name]}" for name in now
                   if name not in may_change and then[name] != now[name]]
        if changed:
            raise ValueError(f"--run_dir {self.folder} was made with {', '.join(changed)}; give "
                             "another --run_dir")

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """The path to write the file or folder to until it is whole; raises ValueError, and leaves
        the one before as it was, if it cannot be written."""
        file = self.folder / name
        temporary = file.with_name(file.name + ".tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            delete(temporary)  # of a process that was killed
            yield temporary
            for written in (temporary, *temporary.rglob("*")):
                flush(written)
            if file.is_dir():
                delete(file)
            os.replace(temporary, file)
            flush(file.parent)
        except Exception as error:  # of the disk, which torch.save hides behind one of its own
            with contextlib.suppress(OSError):
                delete(temporary)
            raise ValueError(
                f"{file} cannot be written ({cause(error.__context__ or error)}); when it can, the "
                "same command goes on from what is saved") from None

    def write_json(self, name: str, content: dict) -> None:
        with self.replacing(name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n")

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/epoch_*.pt"))

    def save_checkpoint(self, policy: Policy, optimizer: torch.optim.Optimizer,
                        metrics: list[dict], config: Config) -> None:
        """All that the next epoch needs."""
        name = f"checkpoints/epoch_{len(metrics):06}.pt"
        with self.replacing(name) as path, path.open("wb") as file:
            weights = {name: weight.detach() for name, weight in policy.trained.items()}
            torch.save({"config": asdict(config), "epoch": len(metrics), "metrics": metrics,
                        "unet": weights, "optimizer": optimizer.state_dict()}, file)

    def save_weights(self, policy: Policy) -> None:
        """unet/, or with LoRA lora/, as diffusers loads them."""
        if not policy.has_adapters:
            with self.replacing("unet") as folder:
                policy.unet.save_pretrained(folder)
        else:
            from peft import get_peft_model_state_dict

            with self.replacing("lora") as folder:
                StableDiffusionPipeline.save_lora_weights(
                    folder, get_peft_model_state_dict(policy.unet))

    def load_checkpoint(self, policy: Policy, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Go on from the newest whole checkpoint; returns the metrics of its epochs, [] without
        any. Raises ValueError if there are some but none is whole."""
        damaged = []
        for file in reversed(self.checkpoints()):
            try:
                if part := zipfile.ZipFile(file).testzip():  # torch.load checks no checksums
                    raise ValueError(f"its part {part} is damaged")
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                shapes, trained = ({name: weight.shape for name, weight in weights.items()}
                                   for weights in (state["unet"], policy.trained))
                if shapes != trained:
                    raise ValueError("it holds the weights of another network")
                if [line["epoch"] for line in state["metrics"]] != [*range(1, state["epoch"] + 1)]:
                    raise ValueError("its metrics are not those of its epochs")
                optimizer.load_state_dict(state["optimizer"])
                for name, weight in policy.trained.items():
                    weight.data.copy_(state["unet"][name])
            except Exception as error:  # what a damaged file, or one with code in it, can raise
                damaged.append(f"{file} ({cause(error)})")
                continue
            say("".join(f"passing over {name}\n" for name in damaged)
                + f"continuing {self.folder} after epoch {state['epoch']}")
            return state["metrics"]
        if damaged:
            raise ValueError(f"no checkpoint is whole: {', '.join(damaged)}; restore one, or give "
                             "another --run_dir")
        return []

    def follow_up(self, metrics: list[dict], config: Config) -> None:
        """What follows from a checkpoint: metrics.jsonl, one line an epoch, reward.png, the curve,
        and the end of checkpoints too old to keep."""
        with self.replacing("metrics.jsonl") as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([m["epoch"] for m in metrics], [m["reward_mean"] for m in metrics], ".-")
        axes.set(xlabel="epoch", ylabel="mean reward of the epoch's samples")
        with self.replacing("reward.png") as file:
            figure.savefig(file, dpi=120, format="png")
        # Those of later epochs are damaged ones, which were passed over; they do not count.
        past = [file for file in self.checkpoints() if file.stem <= f"epoch_{len(metrics):06}"]
        for superseded in past[: -config.keep_checkpoints]:
            superseded.unlink()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def read_config(folder: Path) -> dict:
    """The flags that a run was made with."""
    config = asdict(Config())
    try:
        for name, value in dict(json.loads((folder / "config.json").read_text())).items():
            if name not in config:
                raise ValueError(f"no flag is named {name}")
            if config[name] is not None and not isinstance(value, type(config[name])):
                raise ValueError(f"{name} is {value!r}")
            config[name] = value
        return config
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not the folder of a run: its config.json cannot be read "
                         f"({error})") from None


def summarise(config: Config, trajectories: Trajectories, updates: dict[str, float]) -> dict:
    """An epoch's metrics over all processes; predictions are those of the policy that sampled."""
    rewards = gather(trajectories.rewards).double()  # (N, B)
    means = gather(torch.tensor([[*updates.values()]], device=rewards.device)).mean(0).tolist()
    metrics = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item(),
               **dict(zip(updates, means, strict=True)),
               "explained_variance": None, "sign_accuracy": None, "kl": None}
    if config.objective == "prdp":  # DDPO took no log-probs of the reference
        log_ratios = gather(trajectories.log_probs_old - trajectories.log_probs_ref)  # (N, B, T)
        metrics["kl"] = None if config.offline else log_ratios.mean().item()
        targets = pair_differences(rewards) / config.kl_weight  # (N, B, B)
        is_pair, predicted = targets > 0, pair_differences(log_ratios.mean(-1))
        if is_pair.any():
            errors, is_right = (predicted - targets)[is_pair], predicted[is_pair].sign() / 2 + 0.5
            unexplained = errors.square().mean() / targets[is_pair].square().mean()
            metrics["explained_variance"] = 1 - unexplained.item()
            metrics["sign_accuracy"] = is_right.mean().item()  # a prediction of 0 is half right
    return metrics | {f"reward/{name}": gather(term).mean().item()
                      for name, term in trajectories.reward_terms.items()}


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the block's wall time, the GPU's work included, as seconds[phase]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - started


def peak_gib() -> float:
    """Peak memory of this process so far: of its GPU, or if it uses none its resident set."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**30
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------- §9 Train and evaluate


def train(config: Config, device: torch.device) -> None:
    """Algorithm 1, and what it leaves on disk."""
    if config.prompts_per_epoch % world_size():
        raise ValueError(f"--prompts_per_epoch {config.prompts_per_epoch} cannot be divided among "
                         f"{world_size()} processes; change one of the two")
    run = Run(config.run_dir)
    run.claim(config)
    with first_of_each_machine_first():
        prompts = read_prompts(config.prompts, config.prompt_template)
        models = load_models(config, device)
    report_long_prompts(prompts, models.pipeline.tokenizer)
    policy = models.policy
    optimizer = torch.optim.AdamW(policy.trained.values(), config.learning_rate,
                                  weight_decay=config.weight_decay,
                                  fused=device.type == "cuda")  # without temporary copies
    metrics = run.load_checkpoint(policy, optimizer)
    epochs_done = gather(torch.tensor([len(metrics)], device=device)).tolist()
    if len(set(epochs_done)) > 1:
        raise ValueError(f"--run_dir {run.folder} has {epochs_done} epochs as each process sees "
                         "it; it must be on a file system that all machines share")
    if len(metrics) > config.num_epochs:
        raise ValueError(f"--num_epochs {config.num_epochs}: --run_dir {run.folder} already has "
                         f"{len(metrics)}")
    if rank() == 0:
        run.write_json("config.json", asdict(config))
        for finished in ("unet", "lora"):  # will be out of date
            delete(run.folder / finished)
        if metrics:  # the process before may have been killed ahead of it
            run.follow_up(metrics, config)

    for epoch in range(len(metrics), config.num_epochs):
        if rank() == 0 and epoch % math.ceil(config.num_epochs / 10) == 0:
            save_grid(config, models, {"": policy}, prompts, run, f"samples/epoch_{epoch:04}.png")
        seconds = {}
        trajectories = collect_epoch(config, models, prompts, epoch, seconds)
        with timed(seconds, "seconds_updating"):
            updates = update_policy(config, policy, optimizer, trajectories)
        metrics.append({"epoch": epoch + 1, **summarise(config, trajectories, updates), **seconds,
                        "peak_gib": peak_gib()})
        say(" | ".join(f"{k} {v:.4g}" for k, v in metrics[-1].items() if v is not None))
        if rank() == 0:
            run.save_checkpoint(policy, optimizer, metrics, config)
            run.follow_up(metrics, config)
    if rank() == 0:
        name = f"samples/epoch_{config.num_epochs:04}.png"
        save_grid(config, models, {"": policy}, prompts, run, name)
        run.save_weights(policy)
    say(f"{run.folder} is finished; to judge it: python prdp.py --evaluate {run.folder}")


def draw_latents(config: Config, models: Models, policy: Policy, prompts: list[str], index: int,
                 count: int) -> Tensor:
    """x_0 (count, C, H, W) of prompts[index], from noise that is the same for any policy."""
    keys = [f"{config.seed}/evaluate/{index}/{image}" for image in range(count)]
    noise = torch.stack([draw_noise(key, config.num_steps, models.latent_shape) for key in keys])
    embeds = models.encode_prompts([prompts[index]]).expand(count, -1, -1)
    return sample_trajectories(policy, embeds, noise, config.micro_batch_size)[0][:, -1]


def save_grid(config: Config, models: Models, policies: dict[str, Policy], prompts: list[str],
              run: Run, name: str) -> None:
    """A picture: up to eight prompts, spread over the list, by three images of each policy."""
    columns = min(8, len(prompts))
    shown = [column * len(prompts) // columns for column in range(columns)]  # indices of prompts
    figure = Figure(figsize=(1.3 * len(shown), 4.2 * len(policies)), layout="constrained")
    cells = figure.subplots(3 * len(policies), len(shown), squeeze=False)
    for i, (label, policy) in enumerate(policies.items()):
        for column, index in enumerate(shown):
            images = models.decode(draw_latents(config, models, policy, prompts, index, 3))
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            for cell, image in zip(cells[3 * i : 3 * i + 3, column], images, strict=True):
                cell.imshow(image, interpolation="nearest")
                cell.set(xticks=[], yticks=[], ylabel="" if column else label)
            title = textwrap.fill(textwrap.shorten(prompts[index], 60), 18)
            cells[0, column].set_title(title, fontsize=8, parse_math=False)
    with run.replacing(name) as file:
        figure.savefig(file, dpi=100, format="png")


def evaluate(config: Config, device: torch.device) -> None:
    """Base against finetuned from the same noise, on one prompt set after the other."""
    run = Run(config.evaluate)
    if not any((run.folder / weights).is_dir() for weights in ("unet", "lora")):
        raise ValueError(f"--evaluate {run.folder}: the run is not finished, as it has neither "
                         "unet/ nor lora/; the command that began it goes on with it")
    files = {name: f"evaluation-{Path(name).stem}"
             for name in map(str.strip, config.prompts.split(","))}
    if len(set(files.values())) < len(files):
        raise ValueError(f"--prompts {config.prompts}: files of one name; evaluate them one by one")
    with first_of_each_machine_first():
        prompt_sets = {name: read_prompts(name, config.prompt_template)
                       for name in files}
        models = load_models(config, device, run.folder)
    policies = {"base": models.reference, "finetuned": models.policy}
    for name, prompts in prompt_sets.items():
        results = compare(config, models, policies, prompts)
        if rank() == 0:
            file = files[name]
            save_grid(config, models, policies, prompts, run, f"{file}.png")
            run.write_json(f"{file}.json", {"config": asdict(config), "prompts": name,
                                            "results": results})
            say(f"{run.folder}/{file}.json and .png\n")


def compare(config: Config, models: Models, policies: dict[str, Policy],
            prompts: list[str]) -> dict[str, dict]:
    """A table of every reward: each policy's mean over the prompts, and its standard error."""
    count, names = config.samples_per_prompt, list(models.reward.weights)
    if set(models.reward.weights.values()) != {1}:
        names.append("weighted sum")
    share = math.ceil(len(prompts) / world_size())
    scores = torch.zeros(share, 2, count, len(names), device=models.policy.unet.device)
    for row, index in enumerate(range(rank(), len(prompts), world_size())):
        for i, policy in enumerate(policies.values()):
            latents = draw_latents(config, models, policy, prompts, index, count)
            terms = score_images(models, latents, [prompts[index]] * count, config.micro_batch_size)
            terms["weighted sum"] = models.reward.total(terms)
            scores[row, i] = torch.stack([terms[name] for name in names], -1)
    scores = gather(scores[None]).transpose(0, 1).flatten(0, 1)[: len(prompts)]
    means = scores.double().mean(2).permute(2, 1, 0)  # of each prompt: (R, 2, prompts)

    say(f"{len(prompts)} prompts x {count} samples; mean ± standard error over prompts\n"
        f"{'':<24}{'base':<20}{'finetuned':<20}{'difference':<20}prompts improved")
    results = {}
    for name, (base, finetuned) in zip(names, means, strict=True):
        columns = {"base": base, "finetuned": finetuned, "difference": finetuned - base}
        results[name], cells = {}, ""
        for column, of_prompts in columns.items():
            mean = of_prompts.mean().item()
            variance = of_prompts.var(correction=0) / (len(of_prompts) - 1)  # NaN for one prompt
            error = variance.sqrt().item()
            results[name][column] = {"mean": mean, "standard_error": error}
            cells += f"{f'{mean:.4f} ± {error:.4f}':<20}"
        improved = results[name]["prompts_improved"] = (finetuned > base).double().mean().item()
        say(f"{name:<24}{cells}{improved:.1%}")
    return results


def main() -> None:
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # else each cut prompt is named every time
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as for matrix products
    device = start_distributed()
    try:
        config = parse_config()
        train(config, device) if config.evaluate is None else evaluate(config, device)
    except Exception as error:
        # The cause is told once: by rank 0 if all meet it, and else by the one that does; by then
        # torchrun has stopped those that wait here. Only other machines' processes wait in vain.
        time.sleep(30 if isinstance(error, PeerLost) else 5 * (rank() > 0))
        if isinstance(error, torch.OutOfMemoryError):
            error = (f"{device} is out of memory; lower --micro_batch_size (it is "
                     f"{config.micro_batch_size}), add --gradient_checkpointing, or begin "
                     "another --run_dir with --lora_rank")
        elif not isinstance(error, (ValueError, PeerLost)):
            traceback.print_exc()
            error = f"{type(error).__name__}: {error}"
        print(f"prdp.py: error{f' on rank {rank()}' * (world_size() > 1)}: {error}",
              file=sys.stderr, flush=True)
        os._exit(1)  # sys.exit would wait for threads that a reward may have left
    if dist.is_initialized():
        dist.destroy_process_group()


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end this process at once, amid a collective too, in one sentence."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    ends = (signal.SIGINT, signal.SIGTERM)
    for number in ends:
        signal.signal(number, lambda *_: None)  # Python would run it only after the collective

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)  # the end of a reward's worker is not the run's

    def wait() -> None:
        while (number := os.read(reader, 1)[0]) not in ends:  # another signal that a reward handles
            pass
        with contextlib.suppress(OSError):  # nobody may read it any more
            by_torchrun = number == signal.SIGTERM and world_size() > 1
            say(f"stopped by {signal.Signals(number).name}"
                f"{', as torchrun does if another process fails' * by_torchrun}; the same command "
                "goes on from what is saved")
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_on_signals()
    main()
