"""PRDP against closed forms, plain loops, torch.distributions, diffusers and plain autograd."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here must be missed at once
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import prdp
from prdp import Config, Policy
from rewards import Reward, load_reward

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
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


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
    at_optimum = prdp.objective(config, trajectories.log_probs_old, trajectories).item()
    at_reference = prdp.objective(config, trajectories.log_probs_ref, trajectories).item()
    assert at_optimum < 1e-9 * at_reference

    for scale in (0.0, 0.9, 1.1):
        toy.policy.unet.bias.data = scale * toy.optimal_bias
        trajectories = prdp.collect_epoch(config, toy, ["x"], 0, {})
        assert (
            prdp.objective(config, trajectories.log_probs_old, trajectories) > 1e-3 * at_reference
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
    policy = prdp.replace(
        policy,
        unet=copy.deepcopy(policy.unet).to(dtype),
        negative_embeds=policy.negative_embeds.to(dtype),
    )
    embeds, latents = trajectories.prompt_embeds.to(dtype), trajectories.latents.to(dtype)
    trajectories = prdp.replace(trajectories, prompt_embeds=embeds, latents=latents)
    if micro_batch_size is None:
        steps = []
        for i, t in enumerate(policy.scheduler.timesteps):
            mean, std = policy.mean_std(latents[:, i], t.expand(len(latents)), embeds)
            steps.append(prdp.gaussian_log_prob(latents[:, i + 1], mean, std))
        log_probs = torch.stack(steps, 1).view_as(trajectories.log_probs_old)
        prdp.objective(config, log_probs, trajectories).backward()
    else:
        log_probs = prdp.trajectory_log_probs(policy, embeds, latents, micro_batch_size)
        log_probs = log_probs.view_as(trajectories.log_probs_old).requires_grad_()
        (grad,) = torch.autograd.grad(prdp.objective(config, log_probs, trajectories), log_probs)
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
    return prdp.UNet2DConditionModel.from_pretrained(run / "unet").state_dict()


def test_a_stopped_run_continues_to_the_bit_identical_end(tmp_path):
    train(tmp_path / "whole", "--num_epochs", "3", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "1", "--updates_per_epoch", "2")
    train(tmp_path / "stopped", "--num_epochs", "3", "--updates_per_epoch", "2")
    whole, stopped = (
        without_measurements(read_metrics(tmp_path / run)) for run in ("whole", "stopped")
    )
    assert whole == stopped and [line["epoch"] for line in whole] == [1, 2, 3]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[name])
    for file in (
        "config.json",
        "metrics.jsonl",
        "reward.png",
        "samples/epoch_0000.png",
        "samples/epoch_0003.png",
        "checkpoints/epoch_000003.pt",
    ):
        assert (tmp_path / "whole" / file).stat().st_size > 0
    assert not list((tmp_path / "whole").rglob("*.tmp"))


def test_two_processes_see_the_same_draws_and_follow_the_same_curve(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, torch, prdp\n"
        "collect = prdp.collect_epoch\n"
        "def saving(config, models, prompts, epoch, seconds):\n"
        "    trajectories = collect(config, models, prompts, epoch, seconds)\n"
        "    torch.save(trajectories.latents, f'{config.run}.{epoch}.{prdp.rank()}.pt')\n"
        "    return trajectories\n"
        "prdp.collect_epoch = saving\n"
        "prdp.main()\n"
    )
    for processes in (1, 2):
        launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        flags = demo_flags(tmp_path / f"world{processes}", "--num_epochs", "2")
        command = [sys.executable, *launch, str(script), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=150)
    for epoch in range(2):
        one = torch.load(tmp_path / f"world1.{epoch}.0.pt")
        two = torch.cat([torch.load(tmp_path / f"world2.{epoch}.{rank}.pt") for rank in range(2)])
        assert torch.equal(one[:, 0], two[:, 0])
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    one, two = (without_measurements(read_metrics(tmp_path / f"world{n}")) for n in (1, 2))
    for before, after in zip(one, two, strict=True):
        assert before == pytest.approx(after, rel=1e-4, abs=1e-6)


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


def test_a_v_prediction_model_trains_and_scores_like_its_sampler(tmp_path):
    shutil.copytree("demo/model", tmp_path / "v")
    config = tmp_path / "v/scheduler/scheduler_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"})
    )
    train(tmp_path / "run", "--num_epochs", "1", "--model", str(tmp_path / "v"))
    assert read_metrics(tmp_path / "run")[0]["kl"] == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


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
    assert result["difference"] == [0, 0] and result["base"] == result["finetuned"]
    assert result["prompts_improved"] == 0 and result["base"][1] > 0
    assert (tmp_path / "run/evaluation-two.png").exists() and "clip" in capsys.readouterr().out


# ------------------------------------------------------------------------------ prompts and rewards


def test_prompts_are_distinct_lines_in_order_and_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("cat\n\n  dog  \ncat\n   \nbat")
    assert prdp.read_prompts(str(tmp_path / "list.txt"), "a {}!") == ["a cat!", "a dog!", "a bat!"]
    assert "3 prompts; left out 2 blank and 1 repeated" in capsys.readouterr().out
    assert len(prdp.read_prompts("prompts/animals.txt", "{}")) == 45


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


def test_clip_reward_is_the_cosine_that_transformers_gives_for_the_saved_picture(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    images, prompts = torch.rand(2, 3, 48, 48), ["A painting of a cat", "A painting of a bat"]
    model, processor = (
        CLIPModel.from_pretrained("demo/clip"),
        CLIPProcessor.from_pretrained("demo/clip"),
    )
    pictures = [Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in images]
    with torch.no_grad():
        output = model(
            **processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
        )
    expected = output.logits_per_image.diag() / model.logit_scale.exp()
    reward = load_reward("clip:demo/clip", CPU)
    torch.testing.assert_close(reward(images, prompts), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reward(images, prompts), expected, rtol=0, atol=1e-5)


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
    assert prdp.parse_config([]) == Config(run="runs/small-hpsv2")
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
    "SDXL": (["--model", "XL"], "StableDiffusionXLPipeline"),
    "sample prediction": (["--model", "SAMPLE"], "predicts 'sample'"),
    "one image": (["--images_per_prompt", "1"], "--images_per_prompt 1"),
    "no epochs": (["--num_epochs", "0"], "--num_epochs 0"),
    "negative clip": (["--clip_range", "-1"], "--clip_range -1"),
    "not a run": (["--evaluate", "nowhere"], "nowhere is not the folder of a run"),
    "reward of a wrong shape": (["--reward", "BAD:shape"], "'shape' returned shape"),
    "reward NaN": (["--reward", "BAD:nan"], "it is nan for 'A painting of a"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_that_names_it(tmp_path, mistake):
    flags, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.py").write_text(
        "def shape(images, prompts):\n    return images\n"
        "def nan(images, prompts):\n    return images.mean((1, 2, 3)).log() * float('nan')\n"
    )
    for name, file, key, value in (
        ("XL", "model_index.json", "_class_name", "StableDiffusionXLPipeline"),
        ("SAMPLE", "scheduler/scheduler_config.json", "prediction_type", "sample"),
    ):
        if name in flags:
            shutil.copytree("demo/model", tmp_path / name)
            config = tmp_path / name / file
            config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    stand_ins = {
        "EMPTY": tmp_path / "empty.txt",
        "XL": tmp_path / "XL",
        "SAMPLE": tmp_path / "SAMPLE",
        "BAD:shape": f"{tmp_path}/bad.py:shape",
        "BAD:nan": f"{tmp_path}/bad.py:nan",
    }
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        train(tmp_path / "run", *[str(stand_ins.get(flag, flag)) for flag in flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_made_with_other_flags_is_refused_and_kept(tmp_path):
    train(tmp_path / "run", "--num_epochs", "1")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="--learning_rate 0.0002 and not 1.0"):
        train(tmp_path / "run", "--num_epochs", "1", "--learning_rate", "1")
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    }


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
    monkeypatch.setattr(prdp, "read_config", lambda run: {})
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
