"""The benchmarks run at their smallest size; the claims' report, flags and levels are right."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # read at the first import
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import claims  # noqa: E402
import speed  # noqa: E402

import prdp  # noqa: E402
from rewards import load_reward  # noqa: E402
from test_prdp import in_the_repository, slow  # noqa: E402, F401  # the fixture is of all tests


def test_the_benchmarks_run_at_their_smallest_size(monkeypatch):
    files = {}
    monkeypatch.setattr(speed, "write_json", lambda part, **content: files.update({part: content}))
    for size in ("PROMPTS", "IMAGES", "STEPS"):
        monkeypatch.setattr(speed, size, 2)
    monkeypatch.setattr(speed, "MICRO_BATCHES", (1,))
    monkeypatch.setattr(speed, "SETTINGS", [(16, True, True)])
    phases = dict.fromkeys(("seconds_sampling", "seconds_scoring", "seconds_updating"), 1.0)
    monkeypatch.setattr(speed, "run_prdp", lambda *flags, **_: [phases] * 2)
    for part in (speed.floor, speed.allreduce, speed.world):
        part(rounds=1)
    speed.skip(updates=2)
    speed.gpu(tiny=True)
    assert files.keys() == {"floor", "skip", "allreduce", "world", "memory-tiny", "gpu-tiny"}
    assert files["skip"]["rows"][0]["relative difference of gradients"] < 1e-4
    assert speed.config_of(8).updates_per_epoch == 1  # whatever the preset has
    on_gpu = files["gpu-tiny"]
    assert [row["largest log ratio before the first update"] for row in on_gpu["log ratios"]] == [
        0, 0, 0]
    assert all("epoch" in row for row in on_gpu["epochs"])  # what fails has a note instead
    with speed.Count() as count:
        kept = torch.zeros(1000)  # 4000 bytes take 4096
        kept.add(1).sum()  # for a moment as many again, and 512
    assert (count.now, count.peak) == (4096, 2 * 4096 + 512)


@slow
@pytest.mark.parametrize("flags", [
    "--updates_per_epoch 1", "--updates_per_epoch 3", "--lora_rank 2 --gradient_checkpointing",
    "--offline", "--objective grpo",
    "--objective ddpo --images_per_prompt 1 --prompts_per_epoch 8 --updates_per_epoch 4"])
def test_no_tensors_of_the_cpu_and_of_a_gpu_meet(tmp_path, flags):
    """On a pretend device: training, going on from a checkpoint, evaluation."""
    (tmp_path / "two.txt").write_text("A painting of a cat\nA painting of a bat\n")
    small = f"--preset demo --prompts {tmp_path}/two.txt --run_dir {tmp_path} --num_steps 2"
    small += f" --prompts_per_epoch 4 --images_per_prompt 2 {flags}"
    for part in (f"{small} --num_epochs 1", f"{small} --num_epochs 2", f"--evaluate {tmp_path}"):
        subprocess.run([sys.executable, "benchmarks/pretend.py", *part.split()], check=True)
    assert (tmp_path / "evaluation-two.json").exists()


def test_the_claims_report_is_made_from_the_logs_alone(tmp_path, monkeypatch):
    shutil.copytree(claims.LOGS, tmp_path / "claims")
    monkeypatch.setattr(claims, "LOGS", tmp_path / "claims")
    shown = (tmp_path / "claims/README.md").read_text()
    (tmp_path / "claims/README.md").unlink()
    claims.report()
    assert (tmp_path / "claims/README.md").read_text() == shown
    assert all(f"({file.name})" in shown for file in (tmp_path / "claims").glob("*.png"))


@pytest.mark.parametrize("changes", [{}, dict(
    reward="aesthetic", num_epochs=3, updates_per_epoch=7, prompts_per_epoch=9, images_per_prompt=5,
    num_steps=20, kl_weight=9, clip_range=1, guidance_scale=9, micro_batch_size=4, save_every=5)])
def test_the_claims_flags_are_those_of_their_logs_whatever_the_presets_are(monkeypatch, changes):
    logged = set(claims.LOGS.glob("*/*/config.json"))
    for preset in ("demo", "demo-large"):
        monkeypatch.setitem(prdp.PRESETS, preset, prdp.PRESETS[preset] | changes)
    for world, method in itertools.product(claims.WORLDS, claims.METHODS):
        flags = claims.flags_of(world, method)
        prdp.parse_config(flags)
        for rate, seed in itertools.product(claims.ALL_RATES, "0123456"):
            file = claims.LOGS / claims.name_of(world, method, rate, seed) / "config.json"
            if file in logged and not (changes and world == "preset-demo"):
                config = json.loads(file.read_text().replace('"Infinity"', "Infinity"))
                flags_of_run = ["--learning_rate", rate, "--seed", seed]
                flags_of_run += ["--run_dir", config["run_dir"]]
                assert vars(prdp.parse_config([*flags, *flags_of_run])) == config, file
            logged.discard(file)
    assert not logged


@pytest.mark.parametrize("preset, world, method, rate", [
    ("demo", "preset-demo", "PRDP, K = 4", "7e-5"),
    ("demo-large", "demo-large", "PRDP, K = 4, 60 epochs", "5e-5")])
def test_claims_p_and_p_large_are_of_the_presets(preset, world, method, rate):
    flags = [*claims.flags_of(world, method), "--learning_rate", rate]
    assert prdp.parse_config(flags) == prdp.parse_config(["--preset", preset])


def test_a_level_of_each_prompt_changes_the_gradient_of_batch_statistics_alone():
    """Claim M of benchmarks/claims.py, at ten times the spread within a prompt. Advantages are all
    that policy gradients see of rewards."""
    torch.manual_seed(0)
    (prompts,) = prdp.load_prompts("emoji-unseen", print).values()
    level = load_reward("benchmarks/levels.py:level", "cpu")(torch.zeros(500, 3, 1, 1), prompts)
    assert level.mean().abs() < 0.15 and 0.9 < level.std() < 1.1  # standard normal
    prompts, level = prompts[:44], level[:44]  # N; B = 6, T = 3
    rewards = 0.4 + 0.18 * torch.randn(44, 6)
    log_probs, old, ref = 1e-4 * torch.randn(3, 44, 6, 3, dtype=torch.float64)

    def gradient(rewards):
        theta = log_probs.clone().requires_grad_()
        loss = prdp.prdp_loss(theta, old, ref, rewards, 1e-4, kl_weight=1)
        return torch.autograd.grad(loss, theta)[0]

    def by_batch(rewards):
        return prdp.ddpo_advantages(rewards, prompts, {}, tracker_size=0)

    errors = []
    for function in (gradient, prdp.grpo_advantages, prdp.rloo_advantages, by_batch):
        without, with_level = function(rewards), function(rewards + 1.8 * level[:, None])
        errors.append(((with_level - without).norm() / without.norm()).item())
    assert max(errors[:3]) < 1e-6 and errors[3] > 0.5, errors
