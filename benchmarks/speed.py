"""How fast prdp.py is, and how much memory it takes.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py peer     # the same images and steps, alternately with TRL 0.23.1
    python benchmarks/speed.py floor    # against as many UNet calls and nothing else; by phase
    python benchmarks/speed.py skip     # what leaving out clipped entries saves at K = 10
    python benchmarks/speed.py world    # two processes of a thread against one of two
    torchrun --nproc_per_node=2 benchmarks/speed.py allreduce   # its share of an epoch
    python benchmarks/speed.py memory   # a GPU's memory, counted without one and checked with one
    python benchmarks/speed.py gpu      # all that only a GPU can tell, in perhaps 15 minutes
    python benchmarks/speed.py full_size FOLDER   # Stable Diffusion v1.4 and HPSv2, random weights

All but full_size print a table and write benchmarks/speed-PART.json. The parts up to allreduce
compare on the CPU, with the demo's model (a UNet of 2.2 million weights, latents of 8 x 8), 64
images of 10 guided steps (world: the demo's epoch), K = 1 and two threads. The last three have
Stable Diffusion v1.4's shape; --tiny rehearses them on a CPU with a small one. Times of peer, floor
and gpu are medians over rounds in which all that is compared takes its turn.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not {"gpu", "memory"} & set(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other parts compare on the CPU

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

import prdp  # noqa: E402
from prompts.sets import explain  # noqa: E402

PROMPTS, IMAGES, STEPS, GUIDANCE = 8, 8, 10, 5.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def median_seconds(tasks: dict[str, Callable[[], dict[str, float]]],
                   rounds: int) -> dict[str, dict[str, float]]:
    """Run every task in turn, `rounds` times after a warm-up; medians of what each returns, and of
    its whole time as "epoch"."""
    seconds = {name: defaultdict(list) for name in tasks}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            parts = task()
            parts["epoch"] = time.perf_counter() - started
            for part, value in parts.items() if round_ else ():
                seconds[name][part].append(value)
    return {name: {part: statistics.median(values) for part, values in parts.items()}
            for name, parts in seconds.items()}


def print_table(title: str, rows: list[dict]) -> None:
    """In Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns)
        print(f"| {' | '.join(cells)} |", flush=True)


def write_json(part: str, **content) -> None:
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores",
               "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
               "torch": torch.__version__}
    file = ROOT / f"benchmarks/speed-{part}.json"
    file.write_text(json.dumps(machine | content, indent=1) + "\n")


def report(part: str, rows: list[dict], **settings) -> None:
    print_table(f"{part}: {settings}", rows)
    write_json(part, **settings, rows=rows)


def config_of(micro_batch_size: int, *flags: str) -> prdp.Config:
    """At K = 1."""
    return prdp.parse_config([
        "--preset", "demo", "--reward", "benchmarks/speed.py:brightness", "--prompts_per_epoch",
        str(PROMPTS), "--images_per_prompt", str(IMAGES), "--num_steps", str(STEPS),
        "--guidance_scale", str(GUIDANCE), "--updates_per_epoch", "1",
        "--micro_batch_size", str(micro_batch_size), *flags])


class Ours:
    """prdp.py, one epoch a call."""

    def __init__(self, micro_batch_size: int, *flags: str):
        self.config = config_of(micro_batch_size, *flags)
        self.models = prdp.load_models(self.config, DEVICE)
        (self.prompts,) = prdp.load_prompts(self.config.prompts, print).values()
        weights = [w for w in self.models.policy.unet.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, self.config.learning_rate,
                                           fused=DEVICE.type == "cuda")
        self.epoch = 0

    def collect(self) -> prdp.Trajectories:
        self.epoch += 1
        return prdp.collect_epoch(self.config, self.models, self.prompts, self.epoch, {})

    def update(self, trajectories: prdp.Trajectories) -> None:
        prdp.update_policy(self.config, self.models.policy, self.optimizer, trajectories)

    def __call__(self) -> dict[str, float]:
        with timing("trajectory_log_probs") as passes:
            trajectories = self.collect()
        reference, seconds = sum(passes), trajectories.seconds
        with prdp.timed(seconds, "updating"):
            self.update(trajectories)
        # TRL's sampling decodes its images too.
        return {"sampling": seconds["seconds_sampling"] - reference + seconds["seconds_scoring"],
                "of it decoding and reward": seconds["seconds_scoring"],
                "reference": reference, "updating": seconds["updating"]}


@contextlib.contextmanager
def timing(name: str):
    """The durations of every call of a function of prdp.py, in a list."""
    durations, function = [], getattr(prdp, name)

    @functools.wraps(function)
    def timed(*arguments, **options):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # what was asked for before is not this function's
        seconds = {}
        with prdp.timed(seconds, name):
            result = function(*arguments, **options)
        durations.append(seconds[name])
        return result

    with mock.patch.object(prdp, name, timed):
        yield durations


# ------------------------------------------------------------------------------------------- peer


class Trl:
    """TRL's DDPOTrainer on the same model, images and steps, one epoch a call."""

    def __init__(self, ours: prdp.Config, folder: str,
                 memory_format: torch.memory_format = torch.contiguous_format):
        import accelerate

        accelerate.PartialState()  # the trainer logs before it makes one
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

        size, images = ours.micro_batch_size, ours.prompts_per_epoch * ours.images_per_prompt
        config = DDPOConfig(
            sample_num_steps=ours.num_steps, sample_guidance_scale=ours.guidance_scale,
            sample_batch_size=size, train_batch_size=size, train_cfg=True,
            sample_num_batches_per_epoch=images // size,
            train_gradient_accumulation_steps=images // size,  # one update, as K = 1
            train_num_inner_epochs=1, mixed_precision="no", save_freq=10**9, log_with=None,
            project_kwargs={"project_dir": folder})
        pipeline = DefaultDDPOStableDiffusionPipeline(ours.model, use_lora=False)
        animals = itertools.cycle((ROOT / "prompts/animals.txt").read_text().splitlines())
        self.trainer = DDPOTrainer(
            config, lambda images, prompts, _: (images.mean((1, 2, 3)), {}),
            lambda: (next(animals), {}), pipeline)
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

    with tempfile.TemporaryDirectory() as folder:
        tasks = {f"TRL DDPO, {size}": Trl(config_of(size), folder) for size in (8, 64)}
        tasks |= {f"TRL DDPO, {size}, channels_last":
                  Trl(config_of(size), folder, torch.channels_last) for size in (8, 64)}
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


# --------------------------------------------------------------------------------- skip, processes


def skip(updates: int = 10) -> None:
    """At the small preset's clip range: the entries left out, the time, the same gradient."""
    ours = Ours(64, "--clip_range", "1e-6", "--learning_rate", "1e-5")
    trajectories = ours.collect()
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
        loss = prdp.objective_loss(ours.config, log_probs, trajectories)
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


def run_prdp(*flags: str, processes: int, threads: int) -> list[dict]:
    """The metrics of a run of the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                  f"--nproc_per_node={processes}", "prdp.py"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*launch, "--preset", "demo", "--run_dir", folder, *flags], cwd=ROOT,
                       env=environment, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


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


# -------------------------------------------------------------------- Stable Diffusion v1.4's shape

SD14 = {  # where it differs from the library's defaults
    "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "vae": dict(sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                         projection_dim=768)}
TINY = {
    "unet": dict(sample_size=8, cross_attention_dim=32, attention_head_dim=8, layers_per_block=1,
                 block_out_channels=(32, 32),
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "vae": SD14["vae"] | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    "text_encoder": dict(hidden_size=32, intermediate_size=32, num_attention_heads=4,
                         num_hidden_layers=1)}
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                clip_sample=False, set_alpha_to_one=False)


def full_size(folder: str, tiny: bool = False) -> None:
    """Write a model of this shape and HPSv2's, random weights in the formats that are published."""
    shape = TINY if tiny else SD14
    torch.manual_seed(0)
    # The demo's words, in sentences of Stable Diffusion's length.
    tokenizer = CLIPTokenizer.from_pretrained("demo/model", subfolder="tokenizer",
                                              model_max_length=77)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**shape["unet"]), vae=AutoencoderKL(**shape["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**shape["text_encoder"])), tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder)
    if not tiny:
        import open_clip

        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).half()
        torch.save({"state_dict": clip.state_dict()}, f"{folder}/HPS_v2_compressed.pt")


# ------------------------------------------------------------------------------------------ memory

MICRO_BATCHES = (1, 2, 4, 8)
CARDS = {24: 23.6, 40: 39.4, 80: 79.1}  # GB by name: GiB that a process can have
MARGIN = 2.0  # GiB for workspaces and fragmentation
SETTINGS = list(itertools.product((0, 16), (False, True), (False, True)))


class Count(TorchDispatchMode):
    """The bytes of all tensors alive, each rounded up to 512 as CUDA's allocator does, with no GPU
    and no numbers. Not in it: cuDNN's and cuBLAS's workspaces, fragmentation, CUDA itself.

    The tensors say that they are on the CPU. There attention is the CPU's flash kernel. As CUDA's
    flash, cuDNN's and memory-efficient kernels do, it keeps queries, keys, values, its output and a
    number for each query, and no matrix of queries by keys. Autocast leaves norms in bf16 on a CPU
    and has them in float32 on a GPU, so here they are told to be in float32.
    """

    def __init__(self):
        super().__init__()
        self.device, self.modes = torch.device("cpu"), contextlib.ExitStack()
        self.now, self.peak, self.alive = 0, 0, set()

    def __enter__(self):
        self.modes.enter_context(FakeTensorMode())
        library = self.modes.enter_context(torch.library._scoped_library("aten", "FRAGMENT"))
        for name in ("group_norm", "layer_norm"):
            torch.library.register_autocast(f"aten::{name}", "cpu", torch.float32, lib=library)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.modes.close()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    size = -(-storage.nbytes() // 512) * 512
                    self.alive.add(storage._cdata)
                    self.now, self.peak = self.now + size, max(self.peak, self.now + size)
                    weakref.finalize(storage, self.free, storage._cdata, size)
        return result

    def free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def reset(self) -> None:
        self.peak = self.now


class Allocator(contextlib.nullcontext):
    """What CUDA's allocator itself says."""
    device = torch.device("cuda")
    now = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated())

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def peak_above(memory: Count | Allocator, task: Callable, *arguments) -> float:
    """GiB that a task takes at its peak, above what was there before it."""
    gc.collect()
    memory.reset()
    before = memory.now
    task(*arguments)
    return (memory.peak - before) / GIB


def weights_gib(network: torch.nn.Module) -> float:
    return sum(weight.nbytes for weight in network.parameters()) / GIB


def memory_of(memory: Count | Allocator, shape: dict, lora_rank: int, checkpointing: bool,
              is_bf16: bool) -> dict[str, float]:
    """GiB of the weights that learn, and at its peak of an update and of the reference's pass, its
    own weights included, by the size of the micro-batches. The policy's weights and gradients are
    not in the peaks. The pass takes no less than sampling: all its weights are cast and kept."""
    import peft

    def update(latents: Tensor, embeds: Tensor) -> None:
        timesteps = torch.ones(len(latents), dtype=torch.int64)
        mean, std = policy.mean_std(latents[:, 0], timesteps, embeds)
        prdp.gaussian_log_prob(latents[:, 1], mean, std).sum().backward()

    def refer(latents: Tensor, embeds: Tensor) -> None:
        unet.requires_grad_()  # as the reference's weights, so that autocast keeps their casts
        prdp.trajectory_log_probs(policy, embeds, latents, len(latents))

    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape["unet"]).eval()
        unet.to(memory_format=torch.channels_last).requires_grad_(not lora_rank)
        if lora_rank:
            unet.add_adapter(peft.LoraConfig(r=lora_rank, target_modules=[
                "to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with memory, torch.device(memory.device):
        for layer in unet.modules():
            for name, weight in list(layer.named_parameters(recurse=False)):
                zeros = torch.empty_strided(weight.shape, weight.stride()).zero_()
                weight = torch.nn.Parameter(zeros, weight.requires_grad)
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
                setattr(layer, name, weight)
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.timesteps, scheduler.num_inference_steps = torch.tensor([501, 1]), 2
        scheduler.alphas_cumprod = torch.rand(1000)
        negative_embeds = torch.randn(1, 77, shape["unet"]["cross_attention_dim"])
        policy = prdp.Policy(unet, scheduler, negative_embeds, GUIDANCE, is_bf16)
        side = shape["unet"]["sample_size"]
        gib = {"trained": sum(w.nbytes for w in unet.parameters() if w.requires_grad) / GIB}
        for (name, task), size in itertools.product(
                (("update", update), ("reference", refer)), MICRO_BATCHES):
            inputs = torch.randn(size, 3, 4, side, side), policy.negative_embeds.repeat(size, 1, 1)
            with contextlib.suppress(torch.OutOfMemoryError):
                gib[f"{name}, M = {size}"] = peak_above(memory, task, *inputs)
                gib[f"{name}, M = {size}"] += weights_gib(unet) * (name == "reference")
    return gib


def memory(tiny: bool = False) -> list[dict]:
    """The memory of Stable Diffusion v1.4's training, by part and by card."""
    import open_clip

    shape, rows, sums = TINY if tiny else SD14, [], []
    for lora_rank, is_bf16, checkpointing in SETTINGS:
        names = {"weights": f"LoRA {lora_rank}" if lora_rank else "all", "precision":
                 "bf16" if is_bf16 else "tf32", "checkpointing": "yes" if checkpointing else "no"}
        case = shape, lora_rank, checkpointing, is_bf16
        rows.append(names | {"": "counted"} | memory_of(Count(), *case))
        if DEVICE.type == "cuda":
            rows.append(names | {"": "measured"} | memory_of(Allocator(), *case))
    with Count() as count:
        vae = AutoencoderKL(**shape["vae"]).eval()
        models = prdp.Models(SimpleNamespace(vae=vae), None, None)
        side = shape["unet"]["sample_size"]
        decoding = peak_above(count, models.decode, torch.randn(1, 4, side, side))
    with torch.device("meta"):
        fixed = {"UNet": weights_gib(UNet2DConditionModel(**shape["unet"])),
                 "text encoder": weights_gib(
                     CLIPTextModel(CLIPTextConfig(**shape["text_encoder"]))),
                 "VAE": weights_gib(AutoencoderKL(**shape["vae"])),
                 "HPSv2": weights_gib(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))),
                 "trajectories of 64 images": 64 * 4 * (51 * 4 * 64**2 + 77 * 768) / GIB,
                 "CUDA, cuDNN and NCCL, about": 1.0}
    for row in rows:
        if row[""] == "counted":
            # Gradients, which only an update has, and two moments are of the weights' size. The
            # reference is still there when the images are decoded.
            rest = sum(fixed.values()) + 2 * row["trained"]
            by_size = {size: rest + max(row["trained"] + row[f"update, M = {size}"],
                                        row[f"reference, M = {size}"], fixed["UNet"] + decoding)
                       for size in MICRO_BATCHES}
            fits = {f"{card} GB": max((size for size, gib in by_size.items()
                                       if gib + MARGIN <= usable), default="none")
                    for card, usable in CARDS.items()}
            names = {name: row[name] for name in ("weights", "precision", "checkpointing")}
            sums.append(names | {f"M = {size}": gib for size, gib in by_size.items()} | fits)
    print_table("memory, GiB", rows)
    print_table(f"always there, GiB (decoding an image takes another {decoding:.2f})", [fixed])
    print_table("the sum at its peak on one of 8 GPUs, GiB, and the largest M by card", sums)
    write_json("memory" + "-tiny" * tiny, rows=rows, fixed=fixed, decoding=decoding, sums=sums)
    return rows


# --------------------------------------------------------------------------------------------- gpu

PRECISIONS = ("bf16", "tf32", "float32")
PEAKS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989}  # dense bf16, TFLOP/s


def attempt(names: dict, task: Callable[..., list[dict]], *arguments) -> list[dict]:
    """The rows that the task measured, or one that says why it could not."""
    try:
        return [names | row for row in task(*arguments)]
    except Exception as error:  # all else is measured nonetheless
        return [names | {"note": explain(error)}]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def set_precision(ours: Ours, precision: str) -> None:
    """As prdp.load_models does."""
    ours.models.policy.is_bf16 = ours.models.reference.is_bf16 = precision == "bf16"
    tf32 = precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def log_ratios(ours: Ours) -> list[dict]:
    """Of a new policy, so that it still is the reference: its log ratios, which must be exactly 0.
    Then, for the same trajectories and the same update, how far those of less precision are from
    float32's, and how often they fall on the other side of the small preset's clip range."""
    largest = {}
    for precision in PRECISIONS:
        set_precision(ours, precision)
        trajectories = ours.collect()
        difference = trajectories.log_probs_old - trajectories.log_probs_ref
        largest[precision] = difference.abs().max().item()

    def log_probs() -> dict[str, Tensor]:
        result = {}
        for precision in PRECISIONS:
            set_precision(ours, precision)
            result[precision] = prdp.trajectory_log_probs(
                ours.models.policy, trajectories.prompt_embeds, trajectories.latents,
                ours.config.micro_batch_size)
        return result

    before = log_probs()
    ours.update(trajectories)
    after = log_probs()
    ratios = {precision: after[precision] - before[precision] for precision in PRECISIONS}
    exact, eps = ratios["float32"].abs(), prdp.Config().clip_range
    return [{"precision": precision,
             "largest log ratio before the first update": largest[precision],
             "typical change of a log-prob by an update": exact.median().item(),
             "its rms error": (ratio - ratios["float32"]).square().mean().sqrt().item(),
             "clipped otherwise": ((ratio.abs() > eps) != (exact > eps)).double().mean().item()}
            for precision, ratio in ratios.items()]


def flops_of_a_pair(ours: Ours) -> tuple[float, float]:
    """Of one image and step: without a graph, and with one and its backward."""
    trajectories, policy = ours.collect(), ours.models.policy
    grad = torch.zeros_like(trajectories.log_probs_old.flatten(0, 1))
    grad[0, 0] = 1e-9
    with FlopCounterMode(display=False) as forward:
        prdp.trajectory_log_probs(policy, trajectories.prompt_embeds[:1],
                                  trajectories.latents[:1], 1)
    with FlopCounterMode(display=False) as update:
        prdp.backward_log_probs(policy, trajectories, grad, 1)
    ours.optimizer.zero_grad()
    return forward.get_total_flops() / ours.config.num_steps, update.get_total_flops()


def epoch_on_gpu(ours: Ours, precision: str, size: int, flops: tuple[float, float]) -> list[dict]:
    """Seconds of an epoch's phases, FLOP a second, and the GPU's memory: one row."""
    set_precision(ours, precision)
    ours.config.micro_batch_size = size
    ours.optimizer.zero_grad()  # of an update for which memory did not suffice
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    images = ours.config.prompts_per_epoch * ours.config.images_per_prompt
    pairs = images * ours.config.num_steps  # of image and step
    row = {"images": images, "pairs": pairs} | median_seconds({"": ours}, 1)[""]
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    peak = next((PEAKS[name] for name in PEAKS if name in card), None)
    for part, of_a_pair in zip(("reference", "updating"), flops, strict=True):
        row[f"TFLOP/s, {part}"] = rate = pairs * of_a_pair / row[part] / 1e12
        if peak:
            row[f"share of the bf16 peak, {part}"] = rate / peak
    return [row | {"peak GiB": torch.cuda.max_memory_allocated() / GIB}]


def hours(rows: list[dict]) -> list[dict]:
    """Of the presets on 8 GPUs, with HPSv2 and as if clipping left no entry out."""
    estimates = []
    for preset in ("small", "large"):
        config = prdp.parse_config(["--preset", preset])
        K, precision = config.updates_per_epoch, "bf16" if config.updates_per_epoch == 1 else "tf32"
        for row in rows:
            if (row["setting"], row["precision"]) == ("", precision) and "epoch" in row:
                scoring = row["of it decoding and reward"]
                # The reference's pass, and K - 1 of the same kind after the first update.
                steps = row["sampling"] - scoring + K * (row["reference"] + row["updating"])
                images = config.prompts_per_epoch * config.images_per_prompt
                seconds = (images / row["images"] * scoring
                           + images * config.num_steps / row["pairs"] * steps)
                estimates.append({"preset": preset, "precision": precision,
                                  "micro-batch": row["micro-batch"],
                                  "hours": config.num_epochs * seconds / 3600 / 8})
    return estimates


def gpu(tiny: bool = False) -> None:
    """What no CPU can tell, for Stable Diffusion v1.4's shape with random weights."""
    tables = defaultdict(list)
    count, steps, sizes = ("2", "2", (2,)) if tiny else ("4", "5", (4, 8, 16))

    def add(table: str, rows: list[dict]) -> None:  # on disk at once, as a later part may fail
        tables[table] += rows
        print(table, *rows, sep="\n", flush=True)
        write_json("gpu" + "-tiny" * tiny, **tables)

    def epochs(ours: Ours, setting: str, precision: str, flops: tuple[float, float]) -> None:
        for size in sizes[:1] if precision == "float32" else sizes:
            add("epochs", attempt(
                {"setting": setting, "precision": precision, "micro-batch": size},
                epoch_on_gpu, ours, precision, size, flops))

    with tempfile.TemporaryDirectory() as folder:
        full_size(folder, tiny)
        reward = "jpeg_compressibility" if tiny else f"hpsv2:{folder}"
        flags = ["--model", folder, "--prompts", "prompts/animals.txt", "--reward", reward,
                 "--prompts_per_epoch", count, "--images_per_prompt", count, "--num_steps", steps,
                 "--learning_rate", "1e-5"]
        ours = Ours(2, *flags)
        flops = flops_of_a_pair(ours)
        unet = ours.models.policy.unet
        unet.enable_gradient_checkpointing()  # so that 24 GB are enough to begin with
        add("log ratios", attempt({}, log_ratios, ours))
        epochs(ours, "checkpointing", "tf32", flops)
        unet.disable_gradient_checkpointing()
        for precision in PRECISIONS:
            epochs(ours, "", precision, flops)
        add("hours", hours(tables["epochs"]))
        del ours, unet
        gc.collect()
        lora = Ours(4, *flags, "--lora_rank", "16")
        epochs(lora, "LoRA 16", "tf32", flops_of_a_pair(lora))
        del lora
        add("memory", attempt({}, memory, tiny))
        for size in sizes:
            add("TRL in tf32", attempt({"micro-batch": size}, trl_epoch, config_of(size, *flags)))
    for table, rows in tables.items():
        print_table(table, rows)


def trl_epoch(config: prdp.Config) -> list[dict]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with tempfile.TemporaryDirectory() as folder:
        return [median_seconds({"": Trl(config, folder)}, 1)[""]]


def main() -> None:
    os.chdir(ROOT)
    shaped = {part.__name__: part for part in (memory, gpu, full_size)}
    parts = {part.__name__: part for part in (peer, floor, skip, world, allreduce)} | shaped
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", nargs="*", help="of full_size: where it writes")
    parser.add_argument("--tiny", action="store_true", help="of memory, gpu and full_size")
    given = parser.parse_args()
    if given.part in shaped:
        parts[given.part](*given.folder, tiny=given.tiny)
    else:
        torch.set_num_threads(2)
        parts[given.part]()


if __name__ == "__main__":
    main()
