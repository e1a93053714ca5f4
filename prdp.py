"""PRDP: Proximal Reward Difference Prediction, black-box reward finetuning of Stable Diffusion.

Deng, Wang, Wei, Grundmann, Hou, "PRDP: Proximal Reward Difference Prediction for Large-Scale
Reward Finetuning of Diffusion Models", CVPR 2024, arXiv 2402.08714, whose equations are cited here.

    torchrun --nproc_per_node=2 prdp.py --preset demo          # minutes on a laptop, no download
    torchrun --nproc_per_node=8 prdp.py --reward hpsv2         # the paper's small-scale run
    python prdp.py --evaluate runs/demo-clip                   # base against finetuned

A diffusion model is a policy pi_theta: for a prompt c it samples a trajectory x_{0:T} of denoising
steps. We raise any reward r(x_0, c) of the final image, but stay near the pretrained model (Eq. 6):

    maximise  E[ r(x_0, c) ] - beta * KL[ pi_theta(x_{0:T} | c) || pi_ref(x_{0:T} | c) ]

The optimum is pi_ref exp(r / beta) / Z(c). Z cancels between two trajectories a, b of one prompt
(Eq. 9): at the optimum, differences of log ratios to pi_ref equal reward differences / beta. PRDP
is regression towards that (Eq. 14):

    r_hat(x_{0:T}) = log pi_theta(x_{0:T} | c) - log pi_ref(x_{0:T} | c)
    loss(a, b)     = ( [r_hat(a) - r_hat(b)] - [r(a) - r(b)] / beta )^2

Proximal updates (Eq. 18-21): each step's term of r_hat is clipped to within eps of its value under
old, the policy before the epoch's updates; a pair's loss is the larger of plain and clipped.
Algorithm 1, and the function that does each line (§2 to §4; Models.score is in §5):

    for each epoch                                              run_epoch
        pick N prompts, sample B trajectories of each from old  collect_epoch: sample_trajectories
        log pi_ref of these trajectories                        collect_epoch: trajectory_log_probs
        reward every final image                                collect_epoch: Models.score
        K times, over all prompts and all pairs of each         update_policy
            log pi_theta, without a graph                       update_policy: trajectory_log_probs
            the loss, its gradient with respect to these        update_policy: prdp_loss
            backward through the UNet from there                update_policy: backward_log_probs
            a step of AdamW                                     update_policy

T Gaussian steps of fixed variance can only approach this optimum; the more steps, the closer.

Deviations from the paper
 1. A log-prob is a mean over the latent's elements and the loss takes the mean over steps, as does
    Appendix G (Eq. 21 has a sum). The published beta and eps hold only for these; see `Config`.
 2. The DDPM sampler is DDIM with eta = 1. Its last step has a standard deviation of 0.02, that of
    diffusers' DDPMScheduler one of 1e-10, which is too small for log-probs.
 3. Rewards are float32, of images rounded to 8 bits, and log-probs are computed in float64.
 4. A prompt whose rewards all tie has loss 0, not a mean over nothing. If all do: no update.
 5. An epoch's N prompts come about equally often (Algorithm 1 picks them independently).
 6. On a GPU the UNet is in bf16 at K = 1, in TF32 at K > 1, the VAE and text encoder in TF32.
 7. The paper does not print all settings of DDPO. The rest is from the code by DDPO's authors.

At K = 1, as in the paper's large-scale runs, theta = old. If no rewards tie, a prompt's loss then
has the gradient 4 / (B-1) * [(d_i - mean d) - (r_i - mean r) / kl_weight] with respect to image i's
mean log-prob, d being the log ratio to pi_ref: REINFORCE with a leave-one-out baseline and a KL
reward. --objective rloo is that without the KL, up to a factor; its default K is 2.
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from prompts.sets import UserError, explain, load_prompts, report_cut
from rewards import Reward, RewardError, check_words, load_network, load_reward, parse_reward

# ----------------------------------------------------------------------------------- §1 Config

@dataclass
class Config:
    """Every flag. Defaults: the small-scale column of Table 4; `PRESETS` (§10) has the others.

    Sizes are for all processes together; only micro_batch_size is for each. As log ratios are means
    over T steps and D latent elements, the KL weight of Eq. 6 in nats is kl_weight / (T * D): with
    Stable Diffusion v1.4's D = 4 * 64 * 64 and T = 50, it is kl_weight / 819200.
    """
    # What to train, on what, towards what
    preset: Literal["small", "large", "multi", "demo", "demo-large"] = HfArg(
        default="small", help="where defaults come from: a column of Table 4, or the demo's")
    model: str = HfArg(default="CompVis/stable-diffusion-v1-4", help="SD v1/v2: hub id or folder")
    prompts: str = HfArg(default="prompts/animals.txt", help="files or sets, see prompts/sets.py")
    reward: str = HfArg(default="hpsv2", help="r: a reward or a weighted sum, see rewards.py")
    run_dir: str | None = HfArg(default=None, help="output folder; default runs/PRESET-REWARD")
    seed: int = HfArg(default=0, help="random seed of prompts, noise and LoRA")
    # The algorithm
    objective: Literal["prdp", "ddpo", "grpo", "rloo"] = HfArg(
        default="prdp", help="prdp, or a baseline: ddpo (the paper's), grpo or rloo; see §3")
    num_epochs: int = HfArg(default=100, help="E: number of epochs")
    updates_per_epoch: int = HfArg(default=10, help="K: gradient updates in each epoch")
    prompts_per_epoch: int = HfArg(default=32, help="N: prompts in each epoch, of all processes")
    images_per_prompt: int = HfArg(default=16, help="B: images of each prompt")
    kl_weight: float = HfArg(default=3e-5, help="Table 4's beta: reward per nat of mean log-prob")
    clip_range: float = HfArg(default=1e-6, help="eps: clip range of a step, nats/element, or inf")
    num_steps: int = HfArg(default=50, help="T: denoising steps, best a divisor of 1000")
    guidance_scale: float = HfArg(default=5.0, help="classifier-free guidance; part of the policy")
    learning_rate: float = HfArg(default=1e-5, help="AdamW's learning rate")
    weight_decay: float = HfArg(default=1e-4, help="AdamW's weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="L2 norm to which the gradient is clipped")
    offline: bool = HfArg(default=False, help="sample from pi_ref in every epoch (Fig. 7)")
    tracker_size: int = HfArg(default=32, help="ddpo: rewards remembered per prompt; 0: none")
    lora_rank: int = HfArg(default=0, help="rank of LoRA adapters; 0 trains all weights")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower updates")
    precision: Literal["bf16", "tf32", "float32"] | None = HfArg(default=None, help="of all but "
        "rewards; bf16: of the UNet, others in TF32. Default: on a GPU bf16 at K = 1, else tf32")
    micro_batch_size: int = HfArg(default=4, help="images, or (image, step), at a time")
    save_every: int = HfArg(default=10, help="epochs from one checkpoint to the next")
    evaluate: str | None = HfArg(default=None, help="compare this run with its base; or: base")
    samples_per_prompt: int = HfArg(default=16, help="images of each prompt in an evaluation")


# ------------------------------------------------------------------------ §2 Denoising as a policy
# P images, or P entries (image, step); T steps. A trajectory is `latents` (P, T+1, C, H, W): index
# 0 is pure noise x_T, index T is x_0; `timesteps[i]` is the scheduler's t, 0..999, of i -> i + 1.

def predict_noise(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor,
                  prompt_embeds: Tensor, negative_embeds: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: eps(x, "") + guidance_scale * (eps(x, c) - eps(x, "")).

    latents: (P, C, H, W) float32; timesteps: (P,), 0..999, may mix steps; prompt_embeds: (P, L, F);
    negative_embeds: (1, L, F), of the empty prompt, not used at guidance_scale <= 1, which means no
    guidance, as in diffusers. Returns noise or velocity, as trained, (P, C, H, W) float32.
    """
    if guidance_scale <= 1:
        return unet(latents, timesteps, prompt_embeds).sample.to(latents.dtype)
    embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2P, L, F)
    both = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds).sample  # (2P, C, H, W)
    unconditional, conditional = both.to(latents.dtype).chunk(2)  # (P, C, H, W) each
    return unconditional + guidance_scale * (conditional - unconditional)


def ddim_mean_std(scheduler: DDIMScheduler, noise_pred: Tensor, latents: Tensor,
                  timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's Gaussian N(mean, std^2 I) over x_{t-1} (Eq. 2), a DDIM step with eta = 1.

    noise_pred, latents: (P, C, H, W); timesteps: (P,), 0..999, may mix steps. Returns mean
    (P, C, H, W) and std (P, 1, 1, 1), > 0 as the last step ends at alpha_bar[0] and not at 1.
    """
    # Leading spacing: the next timestep is t - stride; the last step goes from t = 1 to t = 0.
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

    # DDIM's Eq. 16 with eta = 1 (Song et al., 2021)
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
    scheduler: DDIMScheduler  # after set_timesteps(T); its tensors are on the device
    negative_embeds: Tensor  # (1, L, F)
    guidance_scale: float
    is_bf16: bool = False

    def autocast(self) -> torch.autocast:
        """Autocast to bf16 if is_bf16. One around many calls casts each weight only once."""
        return torch.autocast(self.negative_embeds.device.type, torch.bfloat16, self.is_bf16)

    def mean_std(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """`ddim_mean_std` of this policy's step, for prompts with embeds (P, L, F)."""
        with self.autocast():
            noise_pred = predict_noise(self.unet, latents, timesteps, embeds, self.negative_embeds,
                                       self.guidance_scale)
        return ddim_mean_std(self.scheduler, noise_pred, latents, timesteps)


def make_noise(key: str, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """One trajectory's standard normal noise (T+1, C, H, W), on the CPU; a function of the key."""
    generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
    return torch.randn(num_steps + 1, *shape, generator=generator)


@torch.no_grad()
def sample_trajectories(policy: Policy, prompt_embeds: Tensor, noise: Tensor,
                        micro_batch_size: int) -> tuple[Tensor, Tensor]:
    """Sample x_{0:T} ~ pi(. | c), as a function of standard normal noise.

    prompt_embeds: (P, L, F); noise: (P, T+1, C, H, W), whose index 0 is x_T itself. Returns latents
    (P, T+1, C, H, W) float32 and their log-probs (P, T) float64, nats per latent element.
    """
    latents = noise.to(prompt_embeds.device, copy=True)
    log_probs = latents.new_empty(len(latents), latents.shape[1] - 1, dtype=torch.float64)
    with policy.autocast():
        for images in micro_batches(len(latents), micro_batch_size, "sampling"):
            x, embeds = latents[images], prompt_embeds[images]  # x is a view; noise becomes samples
            for i, t in enumerate(policy.scheduler.timesteps):
                mean, std = policy.mean_std(x[:, i], t.expand(len(x)), embeds)
                x[:, i + 1] = mean + std * x[:, i + 1]
                log_probs[images, i] = gaussian_log_prob(x[:, i + 1], mean, std)
    return latents, log_probs


@torch.no_grad()
def trajectory_log_probs(policy: Policy, prompt_embeds: Tensor, latents: Tensor,
                         micro_batch_size: int) -> Tensor:
    """log pi(x_{t-1} | x_t, c) at every step of recorded trajectories, without a graph.

    prompt_embeds: (P, L, F); latents: (P, T+1, C, H, W). Returns (P, T) float64, nats per latent
    element; bit for bit those of sampling, if this policy sampled them in such micro-batches.
    """
    log_probs = latents.new_empty(len(latents), latents.shape[1] - 1, dtype=torch.float64)
    with policy.autocast():
        for images in micro_batches(len(latents), micro_batch_size, "scoring trajectories"):
            x, embeds = latents[images], prompt_embeds[images]
            for i, t in enumerate(policy.scheduler.timesteps):
                mean, std = policy.mean_std(x[:, i], t.expand(len(x)), embeds)
                log_probs[images, i] = gaussian_log_prob(x[:, i + 1], mean, std)
    return log_probs


def micro_batches(count: int, size: int, description: str) -> Iterable[slice]:
    """Slices of at most `size` that cover 0..count-1; a progress bar on rank 0's terminal."""
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return tqdm(slices, description, leave=False, disable=None if rank() == 0 else True)


# -------------------------------------------------------------------------------- §3 The objective
# N prompts, B images of each, T steps. All of it is float64, small, and free of the UNet.

def pair_differences(values: Tensor) -> Tensor:
    """values (..., B) -> (..., B, B) with entry [a, b] = values[a] - values[b]."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def prdp_loss(log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, rewards: Tensor,
              clip_range: float, kl_weight: float) -> Tensor:
    """Squared error of log-ratio differences against reward differences / kl_weight (Appendix G).

    log_probs, log_probs_old, log_probs_ref: (B, T) or (N, B, T), nats per latent element, under the
    current policy, the old one and the reference; rewards: (B,) or (N, B); clip_range: eps >= 0
    in nats per element, may be inf; kl_weight: Table 4's beta, > 0. An image's log ratio is a mean
    over its steps. Returns a scalar, the mean over prompts of the mean over their pairs of unequal
    rewards: tied pairs are left out. It is never below the unclipped loss; 0 where log_probs and
    log_probs_old are the optimum's (Eq. 15); 0, with gradient 0, for a prompt whose rewards tie.
    """
    log_ratios = log_probs - log_probs_ref  # (N, B, T), r_hat_t (Eq. 19)
    log_ratios_old = log_probs_old - log_probs_ref
    clipped_log_ratios = log_ratios.clamp(log_ratios_old - clip_range, log_ratios_old + clip_range)

    log_ratio_diffs = pair_differences(log_ratios.mean(-1))  # (N, B, B)
    clipped_log_ratio_diffs = pair_differences(clipped_log_ratios.mean(-1))
    reward_diffs = pair_differences(rewards.to(log_ratios))
    target_diffs = reward_diffs / kl_weight

    # The maximum is an upper bound of the unclipped loss, as in PPO (Eq. 18).
    loss = torch.maximum((log_ratio_diffs - target_diffs) ** 2,
                         (clipped_log_ratio_diffs - target_diffs) ** 2)
    is_pair = reward_diffs > 0  # each unordered pair once, ties left out
    num_pairs = is_pair.sum((-1, -2)).clamp(min=1)  # (N,)
    return (loss.where(is_pair, 0).sum((-1, -2)) / num_pairs).mean()


def ppo_loss(log_probs: Tensor, log_probs_old: Tensor, advantages: Tensor,
             clip_range: float) -> Tensor:
    """A policy gradient with PPO's clipping: DDPO's (Black et al., 2023), GRPO's and RLOO's.

    log_probs, log_probs_old: (N, B, T), nats per latent element; advantages: (N, B); clip_range: of
    the likelihood ratio around 1. Returns a scalar, the mean over prompts, images and steps.
    """
    likelihood_ratios = (log_probs - log_probs_old).exp()  # (N, B, T)
    clipped = likelihood_ratios.clamp(1 - clip_range, 1 + clip_range)
    advantages = advantages.to(log_probs).unsqueeze(-1)  # (N, B, 1)
    return torch.maximum(-advantages * likelihood_ratios, -advantages * clipped).mean()


def ddpo_advantages(rewards: Tensor, prompts: list[str], history: dict[str, list[float]],
                    tracker_size: int) -> Tensor:
    """Rewards normalised by their prompt's newest rewards, this epoch's included, if at least
    tracker_size / 2 of them are known, else by the rewards of the whole epoch.

    rewards: (N, B) of all processes; prompts: N; history: prompt -> its newest rewards, at most
    tracker_size, to which this first adds the epoch's. Returns (N, B) float64 in [-10, 10].
    """
    rewards = rewards.double()
    advantages = normalise(rewards, rewards.flatten())
    if tracker_size > 0:
        for prompt, new in zip(prompts, rewards.tolist(), strict=True):
            history[prompt] = [*history.get(prompt, []), *new][-tracker_size:]
        for i, prompt in enumerate(prompts):
            if 2 * len(history[prompt]) >= tracker_size:
                advantages[i] = normalise(rewards[i], rewards.new_tensor(history[prompt]))
    return advantages.clamp(-10, 10)


def grpo_advantages(rewards: Tensor, *_: object) -> Tensor:
    """Rewards (N, B) normalised by their prompt's B: (N, B) float64. GRPO's KL term is left out."""
    return normalise(rewards.double(), rewards.double())


def rloo_advantages(rewards: Tensor, *_: object) -> Tensor:
    """Rewards (N, B) less the mean of their prompt's B - 1 others: (N, B) float64 (Kool et al.)."""
    rewards, B = rewards.double(), rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * B / (B - 1)


def normalise(rewards: Tensor, sample: Tensor) -> Tensor:
    """(rewards - mean) / std, both of the sample's last dimension; std is the population's."""
    std = sample.std(-1, correction=0, keepdim=True)
    return (rewards - sample.mean(-1, keepdim=True)) / (std + 1e-6)


# The baselines' advantages (N, B): functions of the rewards (N, B) of all processes, the prompts,
# history and tracker_size. An objective that is not here is a regression, as prdp is.
POLICY_GRADIENTS = {"ddpo": ddpo_advantages, "grpo": grpo_advantages, "rloo": rloo_advantages}


def objective_loss(config: Config, log_probs: Tensor, trajectories: "Trajectories") -> Tensor:
    """The loss of --objective at log_probs (n, B, T) of trajectories, a scalar."""
    old, ref = trajectories.log_probs_old, trajectories.log_probs_ref
    if config.objective != "prdp":  # a policy gradient; only these have advantages
        return ppo_loss(log_probs, old, trajectories.advantages, config.clip_range)
    return prdp_loss(log_probs, old, ref, trajectories.rewards, config.clip_range, config.kl_weight)


# ------------------------------------------------------------------------------ §4 The online loop

@dataclass
class Trajectories:
    """One epoch's samples on this process: n of the N prompts, each with all of its B images."""
    prompt_embeds: Tensor  # (n * B, L, F)
    latents: Tensor  # (n * B, T+1, C, H, W) float32
    log_probs_old: Tensor  # (n, B, T) float64, of the policy before this epoch's updates
    log_probs_ref: Tensor  # (n, B, T) float64, of the reference
    rewards: Tensor  # (n, B) float32
    advantages: Tensor | None  # (n, B) float64; None for a regression
    reward_terms: dict[str, Tensor]  # name -> (n * B,), of which the reward is a weighted sum
    seconds: dict[str, float]  # what the epoch's phases took


def run_epoch(config: Config, models: "Models", optimizer: torch.optim.Optimizer,
              prompts: list[str], epoch: int, history: dict[str, list[float]]) -> dict:
    """One epoch of Algorithm 1; returns its metrics. history: past rewards, see ddpo_advantages.
    Raises UserError for a reward or a gradient that is not finite, before the weights see it."""
    trajectories = collect_epoch(config, models, prompts, epoch, history)
    with timed(trajectories.seconds, "seconds_updating"):
        updates = update_policy(config, models.policy, optimizer, trajectories)
    return {"epoch": epoch + 1} | summarise(config, trajectories, updates)


def collect_epoch(config: Config, models: "Models", prompts: list[str], epoch: int,
                  history: dict[str, list[float]]) -> Trajectories:
    """First half of Algorithm 1: N prompts, B trajectories of each, pi_ref's log-probs, rewards.
    Prompts and noise depend on seed, epoch, indices and step alone, not on the processes."""
    N, B, size = config.prompts_per_epoch, config.images_per_prompt, config.micro_batch_size
    key = f"{config.seed}/{epoch}"
    seconds: dict[str, float] = {}
    repeated = prompts * math.ceil(N / len(prompts))  # one copy, if there are N or more
    epoch_prompts = random.Random(key).sample(repeated, N)
    mine = my_share(N)  # n of the indices 0..N-1
    indices = [(i, j) for i in mine for j in range(B)]  # P = n * B

    with timed(seconds, "seconds_sampling"):
        noise = torch.stack([make_noise(f"{key}/{i}/{j}", config.num_steps, models.latent_shape)
                             for i, j in indices])  # (P, T+1, C, H, W)
        embeds = models.encode_prompts([epoch_prompts[i] for i in mine])  # (n, L, F)
        embeds = embeds.repeat_interleave(B, 0)  # (P, L, F)
        unet = copy.deepcopy(models.reference.unet).to(embeds.device)
        reference = replace(models.reference, unet=unet)  # freed when this function ends
        if config.offline:
            latents, log_probs_ref = sample_trajectories(reference, embeds, noise, size)
            log_probs_old = trajectory_log_probs(models.policy, embeds, latents, size)
        else:
            latents, log_probs_old = sample_trajectories(models.policy, embeds, noise, size)
            log_probs_ref = trajectory_log_probs(reference, embeds, latents, size)

    with timed(seconds, "seconds_scoring"):
        terms = models.score(latents[:, -1], [epoch_prompts[i] for i, _ in indices], size)
        rewards = gather(models.reward.total(terms).unflatten(0, (-1, B)))  # (N, B)
    for prompt, of_prompt in zip(epoch_prompts, rewards, strict=True):
        if not of_prompt.isfinite().all():
            raise UserError(f"epoch {epoch + 1}: --reward {config.reward} is {of_prompt.tolist()} "
                            f"for {prompt!r}; nothing of this epoch is saved")
    rule = POLICY_GRADIENTS.get(config.objective)
    advantages = rule(rewards, epoch_prompts, history, config.tracker_size)[mine] if rule else None
    return Trajectories(embeds, latents, log_probs_old.unflatten(0, (-1, B)),
                        log_probs_ref.unflatten(0, (-1, B)), rewards[mine], advantages, terms,
                        seconds)


def update_policy(config: Config, policy: Policy, optimizer: torch.optim.Optimizer,
                  trajectories: Trajectories) -> dict[str, float]:
    """Second half of Algorithm 1: K updates, each over all pairs of all prompts of its batch.

    The loss couples all T steps and B images of a prompt, yet its graph must not grow with them. So
    (1) all log-probs without a graph; (2) the loss and its gradient on that small tensor; (3) for
    micro-batches of (image, step) a forward with a graph and a backward that starts from their part
    of the gradient. By the chain rule this is exact. Returns means over K updates and processes.
    """
    size, statistics = config.micro_batch_size, []
    weights = [w for group in optimizer.param_groups for w in group["params"]]  # those that learn
    for k, batch in enumerate(batches_of_updates(config, trajectories)):
        old = batch.log_probs_old  # (n, B, T)
        log_probs = old.clone()  # (1); before the first update the policy still is the old one
        if k > 0:
            log_probs = trajectory_log_probs(policy, batch.prompt_embeds, batch.latents, size)
            log_probs = log_probs.view_as(old)
        loss = objective_loss(config, log_probs.requires_grad_(), batch)
        (grad,) = torch.autograd.grad(loss, log_probs)  # (2), (n, B, T)
        backward_log_probs(policy, batch, grad.flatten(0, 1), size)  # (3)

        average_gradients(weights)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        if not grad_norm.isfinite():
            raise UserError(f"update {k + 1}: the gradient's norm is {grad_norm}; nothing of this "
                            "epoch is saved")
        if grad_norm > 0:  # else AdamW would still decay the weights and follow its momentum
            optimizer.step()
        optimizer.zero_grad()
        is_beyond = (log_probs.detach() - old).abs() > config.clip_range  # (n, B, T)
        statistics.append(torch.stack([loss.detach(), grad_norm, is_beyond.double().mean()]))
    means = gather(torch.stack(statistics)).mean(0)
    return dict(zip(("loss", "grad_norm", "clip_fraction"), means.tolist(), strict=True))


def batches_of_updates(config: Config, trajectories: Trajectories) -> list[Trajectories]:
    """What each of an epoch's K updates takes: all trajectories. A policy gradient's update takes
    those of another K-th of the N prompts each time, as in DDPO."""
    K = config.updates_per_epoch
    if config.objective not in POLICY_GRADIENTS:
        return [trajectories] * K
    parts = {name: values.chunk(K) for name, values in vars(trajectories).items()
             if isinstance(values, Tensor)}  # of n or n * B; n is a multiple of K, see `train`
    return [replace(trajectories, **{name: values[k] for name, values in parts.items()})
            for k in range(K)]


def backward_log_probs(policy: Policy, trajectories: Trajectories, grad: Tensor,
                       micro_batch_size: int) -> None:
    """Add to .grad the sum over (image, step) of grad * d log_prob / d theta.

    grad: (P, T), d loss / d log_prob. Entries that are exactly 0, as clipping makes them, are left
    out; the others are independent, so they fill micro-batches that mix images and steps.
    """
    latents, timesteps = trajectories.latents, policy.scheduler.timesteps
    entries = grad.nonzero()  # (M, 2)
    for batch in micro_batches(len(entries), micro_batch_size, "updating"):
        image, step = entries[batch].unbind(1)  # (P,) each
        mean, std = policy.mean_std(latents[image, step], timesteps[step],
                                    trajectories.prompt_embeds[image])
        log_probs = gaussian_log_prob(latents[image, step + 1], mean, std)  # (P,)
        log_probs.backward(grad[image, step])


def summarise(config: Config, trajectories: Trajectories, updates: dict[str, float]) -> dict:
    """Metrics. All but `updates` are of the policy before them; times and memory are rank 0's."""
    rewards, B = gather(trajectories.rewards).double(), config.images_per_prompt  # (N, B)
    metrics = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item(), **updates,
               "pairless_prompts": (rewards.amax(-1) == rewards.amin(-1)).double().mean().item(),
               "between_prompt_variance": None}
    if min(rewards.shape) > 1:
        within = rewards.var(-1).mean()
        between = rewards.mean(-1).var() - within / B
        metrics["between_prompt_variance"] = (between / (between + within)).item()
    old, ref = gather(trajectories.log_probs_old), gather(trajectories.log_probs_ref)
    loss, loss_of_ref = (prdp_loss(log_probs, log_probs, ref, rewards, math.inf, config.kl_weight)
                         for log_probs in (old, ref))
    metrics["explained_variance"] = 1 - (loss / loss_of_ref).item()
    metrics["kl"] = None if config.offline else (old - ref).mean().item()
    for name, term in trajectories.reward_terms.items():
        metrics[f"reward/{name}"] = gather(term.view(-1, B)).mean().item()
    return metrics | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} | trajectories.seconds


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the block's wall time, the GPU's work included, as seconds[phase]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - started


# --------------------------------------------------------------------------------------- §5 Models
# §5 to §10 are what the algorithm stands on. Skip them on a first reading.

@dataclass
class Models:
    """What a run computes with: the policy that learns, and all that is frozen."""
    pipeline: StableDiffusionPipeline  # its VAE, text encoder and tokenizer
    latent_shape: tuple[int, int, int]  # (C, H, W) that the UNet was made for
    reward: Reward
    policy: Policy = field(init=False)
    reference: Policy = field(init=False)  # its UNet waits on the CPU: 3.2 GiB for SD v1.4

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """P prompts -> (P, L, F), cut at the tokenizer's limit, 77 tokens for Stable Diffusion."""
        return self.pipeline.encode_prompt(prompts, self.pipeline.vae.device, 1,
                                           do_classifier_free_guidance=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """x_0 (P, C, H, W) -> images (P, 3, 8H, 8W) in [0, 1]."""
        vae = self.pipeline.vae
        # One 512 x 512 image, or as many smaller ones, at a time: it takes nearly 1 GiB.
        latents = latents / vae.config.scaling_factor
        slices = latents.split(max(1, 64**2 // latents[0, 0].numel()))
        images = torch.cat([vae.decode(part).sample for part in slices])
        return (images / 2 + 0.5).clamp(0, 1)

    def score(self, latents: Tensor, prompts: list[str], size: int) -> dict[str, Tensor]:
        """The reward's terms at x_0 (P, C, H, W): name -> (P,) float32, unweighted."""
        scores = [self.reward.terms(self.decode(latents[batch]), prompts[batch])
                  for batch in micro_batches(len(latents), size, "scoring")]
        return {name: torch.cat([score[name] for score in scores]) for name in scores[0]}


def load_models(config: Config, device: torch.device) -> Models:
    """The reward, the pretrained model as the reference, and a copy of it that can learn. All are
    in eval mode for good: dropout would make the policy another than the one that sampled."""
    reward, pipeline = load_reward(config.reward, device), load_pipeline(config)
    unet = copy.deepcopy(pipeline.unet.to(memory_format=torch.channels_last)).to(device)
    pipeline.vae.to(device), pipeline.text_encoder.to(device)
    unet.requires_grad_(not config.lora_rank)  # else in its adapters alone
    if config.lora_rank:
        from peft import LoraConfig
        torch.manual_seed(config.seed)  # the same adapters in every process
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank,
                                    init_lora_weights="gaussian",
                                    target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # bf16's error in a log-prob is larger than what one update changes. At K = 1 that does no harm:
    # no update lies between log-probs that are compared. TF32, 8 times finer, is off in rewards.
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = config.precision or ("bf16" if bf16 and config.updates_per_epoch == 1 else "tf32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    pipeline.scheduler.set_timesteps(config.num_steps, device)
    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    H, W = torch.tensor(unet.config.sample_size).expand(2).tolist()  # of one number or two
    models = Models(pipeline, (unet.config.in_channels, H, W), reward)
    models.policy = Policy(unet.eval(), pipeline.scheduler, models.encode_prompts([""]),
                           config.guidance_scale, is_bf16=precision == "bf16")
    models.reference = replace(models.policy, unet=pipeline.unet)
    return models


def load_pipeline(config: Config) -> StableDiffusionPipeline:
    """Stable Diffusion v1 or v2 in float32, without the safety checker, which blackens images. Its
    networks are loaded one by one: a pipeline's own loader fills missing weights with random
    numbers. Raises UserError for what cannot be loaded or trained, naming what is wrong."""
    model = config.model
    try:
        kind = StableDiffusionPipeline.load_config(model)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}; only Stable Diffusion v1 and v2 are supported")
        schedule = DDIMScheduler.load_config(model, subfolder="scheduler")
        prediction = schedule.get("prediction_type", "epsilon")
        if "beta_schedule" not in schedule or prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"its scheduler, a {schedule.get('_class_name')} that predicts "
                             f"{prediction!r}, must have betas and predict epsilon or v_prediction")
        # Of the scheduler only the noise schedule and the timesteps are used.
        scheduler = DDIMScheduler.from_config(schedule, timestep_spacing="leading", steps_offset=1)
        inputs = UNet2DConditionModel.load_config(model, subfolder="unet")
        if (not inputs.get("sample_size") or inputs["in_channels"] != inputs["out_channels"]
                or inputs.get("time_cond_proj_dim") or inputs.get("class_embed_type")):
            raise ValueError("its UNet must have a sample_size and take only latents, time, text")
        unet = load_network(UNet2DConditionModel, model, subfolder="unet")
        vae = load_network(AutoencoderKL, model, subfolder="vae")
        text_encoder = load_network(CLIPTextModel, model, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        check_words(tokenizer)
        if len(tokenizer) > text_encoder.config.vocab_size:
            raise ValueError("its tokenizer has more tokens than its text encoder knows")
    except Exception as error:  # of the hub, the network, or a damaged file
        raise UserError(f"--model {model} cannot be used ({explain(error)}); the README says which "
                        "can, under Your reward, prompts and model") from None
    if config.num_steps >= len(scheduler.betas):
        raise UserError(f"--num_steps {config.num_steps}: must be less than {len(scheduler.betas)}")
    return StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


# ---------------------------------------------------------------------------------- §6 Distributed

def start_distributed() -> torch.device:
    """Join the processes of a launcher, if it has set env://'s variables. Returns the device."""
    gpus = torch.cuda.device_count()
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return torch.device("cuda" if gpus else "cpu")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", gpus or os.environ["WORLD_SIZE"]))
    local_rank = int(os.environ.get("LOCAL_RANK", int(os.environ["RANK"]) % local_size))
    on_gpu = gpus >= local_size  # else two would have to share one
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=20))
    if on_gpu:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # unset, or torchrun's default
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    say(f"{local_size} processes and {gpus} GPUs: computing on the CPU")
    return torch.device("cpu")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def my_share(count: int) -> list[int]:
    """Which of the indices 0..count-1 are this process's."""
    return list(range(rank(), count, world_size()))


def gather(values: Tensor) -> Tensor:
    """values (n, ...) of every process's share -> those of all indices in order, (N, ...)."""
    if world_size() == 1:
        return values
    parts = [values.new_empty(values.shape) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def average_gradients(weights: list[torch.nn.Parameter]) -> None:
    """Average .grad over processes, once an update and not after each of its backward passes."""
    for weight in weights:
        if weight.grad is None:  # no entry of this process had a gradient
            weight.grad = torch.zeros_like(weight)
        if world_size() > 1:
            dist.all_reduce(weight.grad.div_(world_size()))


def say(text: str) -> None:
    """Print once, not once a process."""
    if rank() == 0:
        print(text, flush=True)


# --------------------------------------------------------------------------------- §7 Runs on disk
MAY_CHANGE = {"run_dir", "num_epochs", "micro_batch_size", "gradient_checkpointing", "save_every",
              "samples_per_prompt"}  # when a run goes on


class Run:
    """A run's folder. Only checkpoint.pt must survive a crash: it is written aside, flushed and
    renamed, so that the one before stays whole. All else but old pictures can be made from it."""

    def __init__(self, folder: str):
        self.folder = Path(folder).expanduser()  # a shell leaves ~ as it is in --run_dir=~/x
        self.checkpoint = self.folder / "checkpoint.pt"

    def lock(self) -> None:
        """Keep other processes off the folder until this one ends. Its children have no lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = (self.folder / "lock").open("w")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--run_dir {self.folder}: another process is at work on it") from None
        except OSError as error:
            say(f"{self.folder}: a disk without locks ({error}); start no second run in it")

    def save(self, **state: object) -> None:
        """Write the checkpoint."""
        aside = self.checkpoint.with_suffix(".tmp")
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.checkpoint)

    def load(self, unet: UNet2DConditionModel, made_with: dict) -> dict:
        """The checkpoint, whose weights go to unet, or a new run's state. Raises UserError if it
        is damaged, does not fit, was not made_with this, or differs between processes."""
        state = {"config": made_with, "metrics": [], "history": {}}
        device = next(unet.parameters()).device
        try:
            if self.checkpoint.exists():
                if part := zipfile.ZipFile(self.checkpoint).testzip():  # torch.load does not look
                    raise ValueError(f"its part {part} is damaged")
                # Mapped on its way to a GPU, so that a machine's processes hold no copy each.
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True,
                                   mmap=device.type == "cuda")
                unet.load_state_dict(unet.state_dict() | state.pop("weights"))
        except Exception as error:  # what a damaged file, or one with code in it, can raise
            raise UserError(f"{self.checkpoint} is not a whole checkpoint of this --model and "
                            f"--lora_rank ({explain(error)}); give another folder") from None
        for name in sorted((made_with.keys() & state["config"].keys()) - MAY_CHANGE):
            then, now = state["config"][name], made_with[name]  # a score can differ by device
            if then != now and not ("score" in name and math.isclose(then, now, rel_tol=1e-3)):
                raise UserError(f"--run_dir {self.folder} was made with --{name} {then} and not "
                                f"{now}; give the same, or another --run_dir")
        if len(gather(torch.tensor([len(state["metrics"])], device=device)).unique()) > 1:
            raise UserError(f"{self.checkpoint} is not the same in all processes; give a folder "
                            "that all machines share, or wait for the run that is at work on it")
        return state

    def write_json(self, name: str, *lines: dict, indent: int | None = None) -> None:
        """One object, or one a line. In JSON, NaN becomes null and infinity "Infinity"."""
        proper = [json.loads(json.dumps(line), parse_constant=lambda constant:
                             None if constant == "NaN" else constant) for line in lines]
        aside = self.folder / f"{name}.tmp"
        aside.write_text("".join(json.dumps(line, indent=indent) + "\n" for line in proper))
        aside.replace(self.folder / name)

    def save_weights(self, models: Models) -> None:
        """unet/, or with LoRA lora/, as diffusers loads them."""
        pipeline, network = models.pipeline, models.policy.unet
        if hasattr(network, "peft_config"):
            from peft import get_peft_model_state_dict
            pipeline.save_lora_weights(self.folder / "lora", get_peft_model_state_dict(network))
        else:
            network.save_pretrained(self.folder / "unet")


# ------------------------------------------------------------------------------------- §8 Training

def train(config: Config, device: torch.device) -> None:
    """Algorithm 1's epochs, and what they leave on disk."""
    parts = world_size() * (config.updates_per_epoch if config.objective in POLICY_GRADIENTS else 1)
    if config.prompts_per_epoch % parts:
        raise UserError(f"--prompts_per_epoch {config.prompts_per_epoch}: must be a multiple of "
                        f"{parts}, the {world_size()} processes" +
                        " times --updates_per_epoch" * (config.objective in POLICY_GRADIENTS))
    run = Run(config.run_dir)
    if rank() == 0:
        run.lock()
    sets = load_prompts(config.prompts, say).values()
    prompts = list(dict.fromkeys(prompt for of_set in sets for prompt in of_set))
    models = load_models(config, device)
    report_cut(prompts, models.pipeline.tokenizer, say)
    policy = models.policy  # all of its weights learn, or those of its LoRA adapters
    trained = {name: w for name, w in policy.unet.named_parameters() if w.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), config.learning_rate,
                                  weight_decay=config.weight_decay, fused=device.type == "cuda")
    made_with = asdict(config) | fingerprints(models, prompts)
    state = run.load(policy.unet, made_with)
    metrics, history = state["metrics"], state["history"]  # history: DDPO's past rewards
    save = lambda: run.save(config=made_with, metrics=metrics, history=history, weights=trained,
                            optimizer=optimizer.state_dict())
    if metrics:
        optimizer.load_state_dict(state.pop("optimizer"))
        say(f"continuing {run.folder} after epoch {len(metrics)}")
    if rank() == 0:
        run.write_json("config.json", asdict(config), indent=2)
    for epoch in range(len(metrics), config.num_epochs):
        if rank() == 0 and epoch % math.ceil(config.num_epochs / 10) == 0:
            save_grid(config, models, [policy], prompts, run, f"samples/epoch_{epoch:04}.png")
        metrics.append(run_epoch(config, models, optimizer, prompts, epoch, history))
        seconds = sum(v for name, v in metrics[-1].items() if name.startswith("seconds"))
        left = timedelta(seconds=round(seconds * (config.num_epochs - epoch - 1)))
        say(f"epoch {epoch + 1} | reward {metrics[-1]['reward_mean']:.4f} | {left} left")
        if rank() == 0:
            if (epoch + 1) % config.save_every == 0 and epoch + 1 < config.num_epochs:
                save()
            run.write_json("metrics.jsonl", *metrics)
    if rank() == 0:
        save()  # of the same weights as save_weights, wherever the loop has ended
        run.save_weights(models)
        save_grid(config, models, [policy], prompts, run, f"samples/epoch_{len(metrics):04}.png")
        say(f"{run.folder} is finished; use it at its own guidance_scale, {config.guidance_scale}. "
            "To judge it, on its own prompts or, if they are many, on fewer with --prompts:\n"
            f"    python prdp.py --evaluate {str(run.folder)!r}")


def fingerprints(models: Models, prompts: list[str]) -> dict[str, str | float]:
    """What a run depends on besides its flags, name -> fingerprint: a hash of the prompts, one of
    the base model's weights, and the score of noise by each reward that repeats it."""
    texts, base = hashlib.sha256("\n".join(prompts).encode()), hashlib.sha256()
    for network in (models.reference.unet, models.pipeline.vae, models.pipeline.text_encoder):
        for weight in network.state_dict().values():
            base.update(weight.cpu().contiguous().numpy())
    found = {"prompts (hash)": texts.hexdigest()[:8], "model (hash)": base.hexdigest()[:8]}
    size = [8 * side for side in models.latent_shape[1:]]  # of the images, as a reward may crop
    noise = make_noise("", 0, (3, *size)).to(models.pipeline.vae.device).clamp(0, 1)
    scores, again = (models.reward.terms(noise, prompts[:1]) for _ in range(2))
    for name, score in scores.items():
        if score.allclose(again[name], equal_nan=True):
            found[f"reward {name} (score of noise)"] = score.nan_to_num(-math.inf).item()
        else:
            say(f"--reward {name} scores one image differently each time: no run can be repeated")
    return found


# ------------------------------------------------------------------------------------ §9 Evaluation

def sample_for_evaluation(config: Config, models: Models, policy: Policy, prompts: list[str],
                          indices: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` images of each prompts[index], from noise that is the same for any policy: their
    prompt embeddings (P, L, F), latents (P, T+1, C, H, W) and log-probs (P, T)."""
    keys = [f"{config.seed}/evaluate/{index}/{j}" for index in indices for j in range(count)]
    noise = torch.stack([make_noise(key, config.num_steps, models.latent_shape) for key in keys])
    embeds = models.encode_prompts([prompts[i] for i in indices]).repeat_interleave(count, 0)
    return embeds, *sample_trajectories(policy, embeds, noise, config.micro_batch_size)


def save_grid(config: Config, models: Models, policies: list[Policy], prompts: list[str],
              run: Run, name: str) -> None:
    """A picture: columns of up to eight prompts, spread over the list; three rows a policy."""
    columns = min(8, len(prompts))
    indices = [column * len(prompts) // columns for column in range(columns)]
    say(f"drawing {run.folder / name}: {' | '.join(prompts[index][:60] for index in indices)}")
    rows = []
    for policy in policies:
        _, latents, _ = sample_for_evaluation(config, models, policy, prompts, indices, 3)
        images = torch.nn.functional.interpolate(models.decode(latents[:, -1]), 160, mode="bicubic",
                                                 antialias=True).unflatten(0, (columns, -1))
        rows.append(images.transpose(0, 1).flatten(0, 1))  # a row has an image of each prompt
    (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat(rows), run.folder / name, nrow=columns)


def score_prompts(config: Config, models: Models, policy: Policy, prompts: list[str]) -> Tensor:
    """Mean over the images of each prompt of every reward, the weighted sum, the KL estimate of
    this policy's samples and the objective of Eq. 6: (prompts, R + 3) float64."""
    count, mine, size = config.samples_per_prompt, my_share(len(prompts)), config.micro_batch_size
    scores = torch.zeros(len(prompts) // world_size() + 1, len(models.reward.weights) + 3).double()
    for batch in micro_batches(len(mine), math.ceil(size / count), "evaluating"):  # of prompts
        embeds, latents, log_probs = sample_for_evaluation(config, models, policy, prompts,
                                                           mine[batch], count)
        log_probs_ref = log_probs  # the base's distance from itself is 0
        if policy is not models.reference:
            log_probs_ref = trajectory_log_probs(models.reference, embeds, latents, size)
        kl = (log_probs - log_probs_ref).mean(1)  # nats per latent element and step
        of_images = [prompts[index] for index in mine[batch] for _ in range(count)]
        terms = models.score(latents[:, -1], of_images, size)
        total = models.reward.total(terms)
        of_all = torch.stack([*terms.values(), total, kl, total - config.kl_weight * kl], 1)
        scores[batch] = of_all.unflatten(0, (-1, count)).mean(1)
    return gather(scores.to(policy.negative_embeds.device))[: len(prompts)]


def evaluate(config: Config, device: torch.device) -> None:
    """A table, json and picture of each prompt set: the base alone, or with a run's policy."""
    run, prompt_sets = Run(config.run_dir), load_prompts(config.prompts, say)
    models = load_models(config, device)
    models.reference.unet.to(device)  # which it can share, as nothing is trained
    policies = {"base": models.reference}
    if config.evaluate != "base":
        policies["finetuned"] = models.policy
        state = Run(config.evaluate).load(models.policy.unet, {})
        say(f"finetuned: {config.evaluate} after epoch {len(state['metrics'])}")
    names = [*models.reward.weights, "weighted sum", "kl", "weighted sum - kl_weight * kl"]
    for prompt_set, prompts in prompt_sets.items():
        report_cut(prompts, models.pipeline.tokenizer, say)
        file = f"evaluation-{prompt_set}.json"
        if rank() == 0:  # first, as it tells at once of a folder that cannot be written
            save_grid(config, models, [*policies.values()], prompts, run, f"{file[:-5]}.png")
        columns = {column: score_prompts(config, models, policy, prompts)
                   for column, policy in policies.items()}  # each (prompts, R + 3)
        if "finetuned" in columns:
            difference = columns["difference"] = columns["finetuned"] - columns["base"]
            columns["higher"] = (difference > 0).double().where(difference.isfinite(), math.nan)
        results = {name: {column: {"mean": values[:, i].mean().item(), "standard_error": (
            values[:, i].var(correction=0) / (len(prompts) - 1)).sqrt().item()}
            for column, values in columns.items()} for i, name in enumerate(names)}
        if rank() == 0:
            content = {"config": asdict(config), "prompts": prompt_set, "results": results}
            run.write_json(file, content, indent=2)
        say(f"{prompt_set}: {len(prompts)} prompts x {config.samples_per_prompt} samples; mean ± "
            f"standard error over prompts; {run.folder / file} and .png")
        for name, result in results.items():
            cells = [f"{column} {value['mean']:.4f} ± {value['standard_error']:.4f}"
                     for column, value in result.items() if math.isfinite(value["mean"])]
            said = "   ".join(cells) or "does not score all of these prompts"
            say(f"{name:<32}{said.replace(' ± nan', '')}")  # of one prompt


# ------------------------------------------------------------------------------- §10 Flags and main

MULTI = dict(
    prompts="pickapic", reward="pickscore=10,hpsv2=2,aesthetic=0.05", num_epochs=1000,
    updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, clip_range=1e-4)
DEMO = dict(  # its judge is only logged
    model="demo/model", reward="clip:demo/clip,demo/judge.py:animal=0,demo/judge.py:all_right=0",
    num_epochs=9, updates_per_epoch=4, prompts_per_epoch=44, images_per_prompt=6, num_steps=10,
    kl_weight=0.3, clip_range=1e-4, guidance_scale=3.0, learning_rate=7e-5, micro_batch_size=64,
    save_every=1)
PRESETS = {
    "small": {}, "multi": MULTI, "demo": DEMO,
    "large": MULTI | dict(prompts="hpdv2", reward="hpsv2", kl_weight=3e-6, learning_rate=7e-6),
    "demo-large": DEMO | dict(prompts="emoji", num_epochs=60, guidance_scale=1.5, kl_weight=1.0,
                              learning_rate=5e-5),
}
# A baseline's own defaults, under any preset. DDPO also takes one image of each of the preset's
# N * B prompts instead of B images of each of N: 512 prompts in the paper's settings.
OBJECTIVE_DEFAULTS = {
    "grpo": dict(updates_per_epoch=2, clip_range=1e-4),
    "rloo": dict(updates_per_epoch=2, clip_range=1e-4),
    "ddpo": dict(images_per_prompt=1, updates_per_epoch=4, clip_range=1e-4, learning_rate=1e-5),
}


def parse_config(arguments: list[str] | None = None) -> Config:
    """What is given wins. Else, with --evaluate, the run's flags, then the objective's defaults,
    then the preset's. Raises UserError naming the flag."""

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message}; --help explains the flags")

    parser = HfArgumentParser(Config, allow_abbrev=False, add_help=False,
                              description=__doc__.partition("\n")[0])
    parser.error = fail  # else argparse ends every process with a message of its own
    given, _ = parser.parse_known_args(arguments)
    defaults = asdict(Config()) | PRESETS[given.preset]
    if given.objective == "ddpo":
        defaults["prompts_per_epoch"] *= defaults["images_per_prompt"]
    defaults |= OBJECTIVE_DEFAULTS.get(given.objective, {})
    if given.evaluate not in (None, "base"):
        try:
            run = Run(given.evaluate)
            flags = json.loads((run.folder / "config.json").read_text())
            defaults |= {name: flags.get(name, default) for name, default in defaults.items()}
            run.checkpoint.stat()  # fails if there is none yet
        except Exception as error:  # no folder, no file, or one with something else in it
            fail(f"--evaluate {given.evaluate}: no run with a checkpoint ({explain(error)})")
        defaults["run_dir"] = given.evaluate
    parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help")  # last, so it shows these defaults
    config = Config(**vars(parser.parse_args(arguments)))
    lowest = dict(seed=0, tracker_size=0, lora_rank=0, num_steps=2, kl_weight=1e-12,
                  images_per_prompt=1 if config.objective == "ddpo" else 2)  # others compare them
    for name, value in asdict(config).items():
        if value == "":
            fail(f"--{name}: must not be empty")
        least = lowest.get(name, int(type(value) is int))
        if type(value) in (int, float) and not value >= least:
            fail(f"--{name} {value}: must be at least {least}")
    names = [name for name, (_, _, weight) in parse_reward(config.reward).items() if weight]
    name = "base" if config.evaluate else "+".join(names)
    config.run_dir = config.run_dir or f"runs/{config.preset}-{name}"
    if config.offline and config.objective in POLICY_GRADIENTS:
        fail(f"--offline: {config.objective} is a policy gradient and needs its policy's samples")
    return config


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # files are safe, and Ctrl-C ends without a word
    for library in ("transformers.tokenization_utils_base", "diffusers.pipelines"):
        logging.getLogger(library).setLevel(logging.ERROR)  # `report_cut` tells of long prompts
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")  # an argument of diffusers' own
    try:
        device = start_distributed()
        if rank() > 0:
            transformers.utils.logging.disable_progress_bar()  # the hub's of downloads too
        config = parse_config()
        train(config, device) if config.evaluate is None else evaluate(config, device)
    except Exception as error:
        time.sleep(5 * (rank() > 0))  # rank 0 tells what all meet, then torchrun ends the others
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{device} is full: lower --micro_batch_size, add --gradient_checkpointing"
        elif not isinstance(error, (UserError, OSError)):
            sys.excepthook(*sys.exc_info())
            error = error if isinstance(error, RewardError) else explain(error)  # as a full disk
        message = f"prdp.py: error{f' on rank {rank()}' * (world_size() > 1)}: {error}"
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun says at its end
            Path(file).write_text(json.dumps({"message": message}))
        sys.exit(message)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
