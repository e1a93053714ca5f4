"""How fast prdp.py is: beside TRL's DDPOTrainer, beside bare UNet calls, and on a GPU.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py peer     # the same images and steps, alternately with TRL 0.23.1
    python benchmarks/speed.py floor    # against as many UNet calls and nothing else; by phase
    python benchmarks/speed.py skip     # what leaving out clipped entries saves at K = 10
    python benchmarks/speed.py memory   # peak against the number of steps
    python benchmarks/speed.py world    # two processes of a thread against one of two
    torchrun --nproc_per_node=2 benchmarks/speed.py allreduce   # its share of an epoch
    python benchmarks/speed.py gpu      # Stable Diffusion v1.4's shape, random weights

Each prints a table and writes benchmarks/speed-PART.json. The CPU parts use the demo's model (a
UNet of 2.2 million weights, latents of 8 x 8), 64 images of 10 guided steps, and two threads.
Times are medians over rounds in which all that is compared takes its turn.
"""

import contextlib
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if sys.argv[1:] != ["gpu"]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other parts compare on the CPU

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import prdp  # noqa: E402
from rewards import Reward  # noqa: E402

CPU = torch.device("cpu")
PROMPTS, IMAGES, STEPS, GUIDANCE = 8, 8, 10, 5.0
BRIGHTNESS = Reward({"brightness": lambda images, prompts: images.float().mean((1, 2, 3))},
                    {"brightness": 1.0})


def median_seconds(tasks: dict[str, Callable[[], dict[str, float] | None]],
                   rounds: int) -> dict[str, dict[str, float]]:
    """Run every task in turn, `rounds` times after a warm-up; medians of what each returns, and of
    its whole time as "epoch"."""
    seconds = {name: defaultdict(list) for name in tasks}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            parts = task() or {}
            parts["epoch"] = time.perf_counter() - started
            for part, value in parts.items() if round_ else ():
                seconds[name][part].append(value)
    return {name: {part: statistics.median(values) for part, values in parts.items()}
            for name, parts in seconds.items()}


def report(part: str, rows: list[dict], **settings) -> None:
    """A table of the rows, and benchmarks/speed-PART.json."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"\n{part}: {settings}\n" + " | ".join(columns))
    for row in rows:
        print(" | ".join(f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v)
                         for c in columns))
    file = ROOT / f"benchmarks/speed-{part}.json"
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores",
               "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    file.write_text(json.dumps(machine | settings | {"rows": rows}, indent=1) + "\n")


class Ours:
    """prdp.py on the demo's model, one epoch a call."""

    def __init__(self, micro_batch_size: int, *flags: str):
        self.config = prdp.parse_config([
            "--preset", "demo", "--prompts_per_epoch", str(PROMPTS), "--images_per_prompt",
            str(IMAGES), "--num_steps", str(STEPS), "--guidance_scale", str(GUIDANCE),
            "--micro_batch_size", str(micro_batch_size), *flags])
        self.models = prdp.load_models(self.config, CPU)
        self.models.reward = BRIGHTNESS
        (self.prompts,) = prdp.load_prompts(self.config.prompts, print).values()
        self.optimizer = torch.optim.AdamW(self.models.policy.unet.parameters(),
                                           self.config.learning_rate)
        self.epoch = 0

    def __call__(self) -> dict[str, float]:
        self.epoch += 1
        with timing("trajectory_log_probs") as passes:
            trajectories = prdp.collect_epoch(self.config, self.models, self.prompts, self.epoch,
                                              {})
        reference, seconds = sum(passes), trajectories.seconds
        with prdp.timed(seconds, "updating"):
            prdp.update_policy(self.config, self.models.policy, self.optimizer, trajectories)
        # TRL's sampling decodes its images too.
        return {"sampling": seconds["seconds_sampling"] - reference + seconds["seconds_scoring"],
                "reference": reference, "updating": seconds["updating"]}


@contextlib.contextmanager
def timing(name: str):
    """The durations of every call of a function of prdp.py, in a list."""
    durations, function = [], getattr(prdp, name)

    @functools.wraps(function)
    def timed(*arguments, **options):
        started = time.perf_counter()
        result = function(*arguments, **options)
        durations.append(time.perf_counter() - started)
        return result

    setattr(prdp, name, timed)
    yield durations
    setattr(prdp, name, function)


# ------------------------------------------------------------------------------------------- peer


class Trl:
    """TRL's DDPOTrainer on the same model, images and steps, one epoch a call."""

    def __init__(self, micro_batch_size: int, folder: str, memory_format: torch.memory_format):
        import accelerate

        accelerate.PartialState()  # the trainer logs before it makes one
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

        images = PROMPTS * IMAGES
        config = DDPOConfig(
            sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE, train_cfg=True,
            sample_batch_size=micro_batch_size, train_batch_size=micro_batch_size,
            sample_num_batches_per_epoch=images // micro_batch_size,
            train_gradient_accumulation_steps=images // micro_batch_size,  # one update, as K = 1
            train_num_inner_epochs=1, mixed_precision="no", save_freq=10**9, log_with=None,
            project_kwargs={"project_dir": folder})
        pipeline = DefaultDDPOStableDiffusionPipeline(str(ROOT / "demo/model"), use_lora=False)
        animals = iter((ROOT / "prompts/animals.txt").read_text().split("\n") * 1000)
        self.trainer = DDPOTrainer(
            config, lambda images, prompts, _: (images.mean((1, 2, 3)), {}),
            lambda: (f"A painting of a {next(animals)}", {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.to(memory_format=memory_format)
        self.seconds = {}
        for method, part in (("_generate_samples", "sampling"),
                             ("_train_batched_samples", "updating")):
            setattr(self.trainer, method, self.timed(getattr(self.trainer, method), part))

    def timed(self, method: Callable, part: str) -> Callable:
        def timed(*arguments, **options):
            with prdp.timed(self.seconds, part):
                return method(*arguments, **options)
        return timed

    def __call__(self) -> dict[str, float]:
        self.trainer.step(1, 0)
        return dict(self.seconds)


def peer(rounds: int = 7) -> None:
    import trl

    as_it_is, like_ours = torch.contiguous_format, torch.channels_last
    with tempfile.TemporaryDirectory() as folder:
        tasks = {f"TRL DDPO, {size}": Trl(size, folder, as_it_is) for size in (8, 64)}
        tasks |= {f"TRL DDPO, {size}, channels_last": Trl(size, folder, like_ours)
                  for size in (8, 64)}
        tasks |= {f"prdp.py GRPO, {size}": Ours(size, "--objective", "grpo")
                  for size in (8, 64, 256)}
        tasks |= {f"prdp.py PRDP, {size}": Ours(size) for size in (8, 64, 256)}
        rows = [{"what, micro-batch": name, **parts}
                for name, parts in median_seconds(tasks, rounds).items()]
    report("peer", rows, rounds=rounds, threads=torch.get_num_threads(), trl=trl.__version__,
           images=PROMPTS * IMAGES, steps=STEPS)


# ------------------------------------------------------------------------------------------ floor


def bare_calls(ours: Ours) -> Callable[[], dict[str, float]]:
    """As many guided UNet calls as an epoch at K = 1 has, on ready inputs, and nothing else."""
    unet, size = ours.models.policy.unet, ours.config.micro_batch_size
    count = PROMPTS * IMAGES * STEPS
    latents = torch.randn(2 * size, *ours.models.latent_shape)
    timesteps = torch.randint(0, 1000, (2 * size,))
    embeds = ours.models.encode_prompts(["A painting of a cat"]).repeat(2 * size, 1, 1)

    def calls(images: int, backward: bool) -> None:
        for start in range(0, images, size):
            p = 2 * min(size, images - start)
            output = unet(latents[:p], timesteps[:p], embeds[:p]).sample
            output.backward(output) if backward else None

    def epoch() -> dict[str, float]:
        seconds = {}
        for part in ("sampling", "reference"):
            with prdp.timed(seconds, part), torch.no_grad():
                for _ in range(STEPS):
                    calls(PROMPTS * IMAGES, backward=False)
        with prdp.timed(seconds, "updating"):
            calls(count, backward=True)
        unet.zero_grad()
        return seconds

    return epoch


def floor(rounds: int = 7) -> None:
    rows = []
    for size in (8, 64, 256):
        ours = Ours(size)
        seconds = median_seconds({"bare": bare_calls(ours), "prdp.py": ours}, rounds)
        for name, parts in seconds.items():
            rows.append({"": f"{name}, micro-batch {size}", **parts,
                         "epoch / bare": parts["epoch"] / seconds["bare"]["epoch"]})
    report("floor", rows, rounds=rounds, threads=torch.get_num_threads(),
           note="prdp.py's sampling includes decoding and the reward")


# ------------------------------------------------------------------------------------- skip, memory


def skip(updates: int = 10) -> None:
    """At the small preset's clip range: the entries left out, the time, the same gradient."""
    ours = Ours(64, "--clip_range", "1e-6", "--learning_rate", "1e-5")
    trajectories = prdp.collect_epoch(ours.config, ours.models, ours.prompts, 0, {})
    policy, old, rows = ours.models.policy, trajectories.log_probs_old, []
    weights = list(policy.unet.parameters())

    def gradient(grad: Tensor) -> tuple[Tensor, float]:
        started = time.perf_counter()
        prdp.backward_log_probs(policy, trajectories, grad, ours.config.micro_batch_size)
        seconds = time.perf_counter() - started
        prdp.average_gradients(weights)  # alone it only makes gradients that are missing zeros
        return torch.cat([weight.grad.flatten() for weight in weights]), seconds

    for k in range(updates):
        log_probs = old if k == 0 else prdp.trajectory_log_probs(
            policy, trajectories.prompt_embeds, trajectories.latents, 64).view_as(old)
        log_probs = log_probs.clone().requires_grad_()
        loss = prdp.objective_loss(ours.config, log_probs, trajectories, None)
        (grad,) = torch.autograd.grad(loss, log_probs)
        grad = grad.flatten(0, 1)
        # Entries of 1e-300 are not left out, and add nothing.
        everything, seconds_all = gradient(grad.where(grad != 0, 1e-300))
        ours.optimizer.zero_grad()
        skipping, seconds = gradient(grad)  # which the update then takes
        error = ((skipping - everything).norm() / everything.norm()).item()
        rows.append({"k": k + 1, "left out": (grad == 0).double().mean().item(),
                     "seconds": seconds, "seconds with all": seconds_all,
                     "relative difference of gradients": error})
        torch.nn.utils.clip_grad_norm_(weights, ours.config.max_grad_norm)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
    report("skip", rows, clip_range=1e-6, learning_rate=1e-5, threads=torch.get_num_threads())


def run_prdp(*flags: str, processes: int = 1, threads: int = 2) -> list[dict]:
    """The metrics of a run of the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "prdp.py"]
        if processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                      f"--nproc_per_node={processes}", "prdp.py"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*launch, "--preset", "demo", "--run_dir", folder, *flags], cwd=ROOT,
                       env=environment, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().split("\n")
                if line]


def memory() -> None:
    rows = []
    for steps in (10, 20, 50):
        metrics = run_prdp("--num_steps", str(steps), "--prompts_per_epoch", "4", "--num_epochs",
                           "1")
        rows.append({"steps": steps, "peak GiB": metrics[-1]["peak_gib"]})
    for row in rows:
        row["against 10 steps"] = row["peak GiB"] / rows[0]["peak GiB"]
    report("memory", rows)


def world(rounds: int = 3) -> None:
    rows = []
    for _ in range(rounds):
        for processes, threads in ((1, 2), (2, 1)):
            metrics = run_prdp("--num_epochs", "3", processes=processes, threads=threads)
            phases = {phase: statistics.median(line[f"seconds_{phase}"] for line in metrics[1:])
                      for phase in ("sampling", "scoring", "updating")}
            rows.append({"processes": processes, "threads each": threads, **phases,
                         "epoch": sum(phases.values())})
    report("world", rows, rounds=rounds)


def allreduce(rounds: int = 5) -> None:
    prdp.start_distributed()
    ours, rows = Ours(64), []
    ours()  # the warm-up
    for _ in range(rounds):
        with timing("average_gradients") as durations:
            started = time.perf_counter()
            ours()
            epoch = time.perf_counter() - started
        rows.append({"epoch": epoch, "average_gradients": sum(durations),
                     "share": sum(durations) / epoch})
    if prdp.rank() == 0:
        report("allreduce", rows, processes=prdp.world_size(), threads=torch.get_num_threads())


# -------------------------------------------------------------------------------------------- gpu

PEAKS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}  # dense bf16 FLOP/s
VARIANTS = ("bf16", "tf32", "float32", "channels_first", "gradient_checkpointing", "lora",
            "compile")


def gpu() -> None:
    """Pairs (image, step) and FLOP a second of SD v1.4's UNet, and hours for the presets."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/speed.py: error: the part gpu needs a GPU")
    matmul, cudnn, rows = torch.backends.cuda.matmul, torch.backends.cudnn, []
    for variant in VARIANTS:
        matmul.allow_tf32 = cudnn.allow_tf32 = variant == "tf32"
        policy = random_policy(variant, torch.device("cuda"))
        optimizer = torch.optim.AdamW(policy.unet.parameters(), 1e-9, fused=True)
        for size in (1, 2, 4, 8, 16, 32):
            row = {"variant": variant, "micro-batch": size}
            rows.append(row)
            try:
                measure_gpu(policy, optimizer, row)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
                break
        del policy, optimizer
        gc.collect()
        torch.cuda.empty_cache()
        report("gpu", rows, latents="64 x 64")
    for preset in ("small", "large", "multi"):
        config = prdp.Config(**prdp.PRESETS[preset])
        K = config.updates_per_epoch
        for variant in ("bf16", "tf32", "float32"):
            of_its_size = [row for row in rows if row.get("micro-batch") == config.micro_batch_size
                           and row["variant"] == variant and "pairs backward/s" in row]
            for row in of_its_size:
                pairs = config.prompts_per_epoch * config.images_per_prompt * config.num_steps
                seconds = pairs * ((1 + K) / row["pairs/s"]  # sampling, reference, and for k > 1
                                   + K / row["pairs backward/s"])
                rows.append({"variant": f"--preset {preset} in {variant}, of 8 GPUs",
                             "hours without decoding and rewards":
                             config.num_epochs * seconds / 3600 / 8})
    report("gpu", rows, latents="64 x 64")


def random_policy(variant: str, device: torch.device) -> prdp.Policy:
    """A policy of Stable Diffusion v1.4's shape, of five steps, with random weights."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              steps_offset=1)
    scheduler.set_timesteps(5)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.to(device).eval()
    if variant != "channels_first":
        unet.to(memory_format=torch.channels_last)
    if variant == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if variant == "gradient_checkpointing":
        unet.enable_gradient_checkpointing()
    if variant == "compile":
        unet.compile(dynamic=True)
    negative_embeds = torch.randn(1, 77, 768, device=device)
    return prdp.Policy(unet, scheduler, negative_embeds, GUIDANCE,
                       is_bf16=variant not in ("tf32", "float32"))


def measure_gpu(policy: prdp.Policy, optimizer: torch.optim.Optimizer, row: dict) -> None:
    """Fill in a row: sampling, then updating, in micro-batches of a size."""
    from torch.utils.flop_counter import FlopCounterMode

    size, device = row["micro-batch"], policy.negative_embeds.device
    embeds = torch.randn(size, 77, 768, device=device)
    latents = torch.randn(size, 6, 4, 64, 64, device=device)
    trajectories = SimpleNamespace(prompt_embeds=embeds, latents=latents)
    grad = torch.full((size, 5), 1e-9, dtype=torch.float64, device=device)

    def sample() -> None:
        prdp.trajectory_log_probs(policy, embeds, latents, size)

    def update() -> None:
        prdp.backward_log_probs(policy, trajectories, grad, size)
        optimizer.step()
        optimizer.zero_grad()

    for key, task in (("pairs/s", sample), ("pairs backward/s", update)):
        torch.cuda.reset_peak_memory_stats()
        started, count = time.perf_counter(), 0
        task()
        torch.cuda.synchronize()
        row[f"warm-up of {key}, s"] = time.perf_counter() - started
        started = time.perf_counter()
        while time.perf_counter() - started < 4:
            task()
            torch.cuda.synchronize()
            count += 1
        row[key] = 5 * size * count / (time.perf_counter() - started)
        row[f"peak GiB, {key}"] = torch.cuda.max_memory_allocated() / 2**30
    row["images/s at 50 steps"] = row["pairs/s"] / 50
    peak = next((PEAKS[name] for name in PEAKS if name in torch.cuda.get_device_name()), None)
    if row["variant"] == "bf16" and peak:
        with FlopCounterMode(display=False) as counter:
            sample()
        flops = counter.get_total_flops() / (5 * size)  # of a guided pair
        row["share of the bf16 peak"] = row["pairs/s"] * flops / peak


def main() -> None:
    os.chdir(ROOT)
    parts = {part.__name__: part for part in (peer, floor, skip, memory, world, allreduce, gpu)}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"usage: python benchmarks/speed.py {'|'.join(parts)}")
    torch.set_num_threads(2)
    parts[sys.argv[1]]()


if __name__ == "__main__":
    main()
