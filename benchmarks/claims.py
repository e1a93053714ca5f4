"""The paper's claims, tried in the emoji world of demo/: runs, raw logs, tables and figures.

    python benchmarks/claims.py sweep A4       # learning rates, on seeds 0 and 1
    python benchmarks/claims.py run A4         # at the best rate of each method, and its evaluation
    python benchmarks/claims.py base P         # the base alone at several guidance scales
    python benchmarks/claims.py guidance B4    # the end policies at guidance scales not their own
    python benchmarks/claims.py samples A      # the end policies: a picture, and kinds
    python benchmarks/claims.py before-after   # the README's picture, of a run of P-large
    python benchmarks/claims.py report         # all tables and curves, from the logs

`run` and `sweep` call prdp.py with flags. What was interrupted goes on by the same command, and
two commands for different seeds may run side by side. Runs lie in runs/claims/, and the raw logs of
those that are finished are copied to benchmarks/claims/; `report` reads nothing else. What has logs
is not run again; to repeat it, delete them.

What is the same for all methods of a claim: the world's flags, so the images of an epoch, the
epochs, the number of steps and guidance; the noise of the evaluation (seed 1000); and how the
learning rate is chosen: four rates, and the one whose mean reward over the last fifth of the epochs
is highest, on seeds that are not reported. That was seed 0 alone. On 45 prompts the five reported
seeds then showed another order of PRDP's rates, so `sweep` has seeds 0 and 1, and P's rate is from
both (README.md has how). An ablation, a method less one part, has the rate of the whole. A rate in
a claim's method is not from a sweep. Methods differ by the flags in METHODS and the rate alone. The
flags of the worlds demo and demo-large stand here, whatever the presets of these names are. P is
the preset demo as it is. P-large is of runs of B4: those of 60 epochs have the flags of the preset
demo-large, those of 40 had them before, first at 1e-4, then at 5e-5.

Written before the runs of A to F, from the paper: what should be seen.

A  45 prompts (Fig. 9 right, Table 1): PRDP as good as DDPO with statistics of each prompt; DDPO
   without them worse.
B  More than 100,000 prompts (Fig. 9 left, Table 2): PRDP improves steadily, also on prompts that it
   never saw. DDPO, whose prompts hardly ever come twice, falls back to statistics of the batch and
   fails. GRPO normalises within a prompt and at K = 1 nearly has PRDP's gradient, so it should do
   as well as PRDP.
C  K = 4 updates an epoch, with and without clipping (Fig. 3, Table 5): without it both collapse.
D  PRDP on samples of its own against samples of the base model (Fig. 7): online training passes
   where offline training ends, and long before its own end.
E  A reward that does not read the prompt, the smallness of the picture's JPEG (Fig. 8, 10): DDPO
   gains the most reward and the judge finds ever fewer animals. The larger PRDP's KL weight, the
   less reward and the more animals. The middle weight, 3, is to the spread of this reward within a
   prompt (0.54 in the base's samples) what A's 1 is to that of its own (0.18).
F  At K = 1 and with hardly any KL, PRDP is RLOO: GRPO without division by the standard deviation.
   The curves lie on each other. Gradients are not clipped here, as the two losses differ in scale.
G  A's PRDP for five times its epochs: no fall.
H  B's PRDP for twice its epochs: no fall.
I  H for five times as many epochs: no fall.

What should be seen of the later claims stands in predictions.py, written before their runs.

A4, B4  A and B at K = 4. DDPO has the same number of images, and with 40 and 100 epochs the same
        time, once at the rate that was best with this number and once at PRDP's, which is lower. B4
        has half of that rate, too, for both, and one run that went on to 80 epochs. In A4 PRDP also
        has 40 epochs, the same number of images as that DDPO, at its rate and at half of it.
C       Also the norm clip of the paper, made so tight that it binds, without clipping of steps.
E2      E at rates that a KL weight can hold.
H, I    Also without the KL term, which is RLOO, at the same rate. I also has DDPO.
L       Long runs: 400 epochs. Not run; what I has comes nearest.
M       The paper's reason why DDPO fails: rewards whose level depends on the prompt (levels.py). At
        level 0 these are the runs of A4 and B4, as a level that is 0 changes no reward.
R       Does the regression arrive where it should, with a large KL weight and a low rate?
P, P-large  The presets as they are.

Said after the runs began. H's prediction was written after its first run. DDPO makes 4 updates an
epoch, PRDP 1 in A and B. A's best rate of DDPO is the highest of the grid, so a higher one may be
better. E's methods have rates that were swept on another reward, M's on the reward without levels.
D's offline training has online training's rate, not one of its own. B's runs of PRDP at 1e-4 are
the first half of H's (seed 0 of H is there for the sweep of B alone), and A's of seed 2 is the
beginning of G's. I ran in two processes. The sweep of K = 4 with demo-large had its 5e-5 after the
reported runs. Some logs' folders had other names when their config.json was written.
When the later predictions were written, A4's seeds 2 to 4 of PRDP at K = 4 had been seen in C, and
short trials of M (batch statistics, seed 2) and of the preset (seed 2). Those of DDPO at a low rate
in B4 and of PRDP's 40 epochs in A4 are of after A4's runs of DDPO at a low rate. H's are of after
49 epochs of I's RLOO, of which H's on seed 2 are the first 80. I's DDPO at 2e-4 had none: it is
the first half of L's, which was seen to drift. Those of it at 1e-4 are of after that and after B4's
100 epochs. Those of 5e-5 in B4 and P-large are of after seed 0's run at that rate, those of 60
epochs of after the reported runs of 40.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from levels import SPREAD  # noqa: E402
from predictions import OBJECTIVE, PREDICTIONS  # noqa: E402

import prdp  # noqa: E402
from demo.judge import all_right, seen  # noqa: E402

LOGS, RUNS = ROOT / "benchmarks/claims", ROOT / "runs/claims"
REWARD = "clip:demo/clip,demo/judge.py:animal=0,demo/judge.py:all_right=0"
# Of the claims A to R, whatever the presets are. Rows of METHODS add to them and beat them.
EMOJI_WORLD = (f"--reward {REWARD} --updates_per_epoch 1 --prompts_per_epoch 44 "
               "--images_per_prompt 6 --num_steps 10 --kl_weight 1 --clip_range 1e-4 "
               "--guidance_scale 1.5 --micro_batch_size 64 --save_every 1")
DDPO = "--objective ddpo --prompts_per_epoch 264 --images_per_prompt 1 --updates_per_epoch 4"
K4 = "--updates_per_epoch 4"
JPEG = "--reward jpeg_compressibility,clip:demo/clip=0,demo/judge.py:animal=0"
LEVELS = (1, 3, 10)  # how many times the spread within a prompt
AT = {level: f"--reward {REWARD},benchmarks/levels.py:level={level * SPREAD:g}" for level in LEVELS}
METHODS = {  # flags, and the method whose best learning rate it has where a claim gives none
    "PRDP": ("", "PRDP"),
    "DDPO": (DDPO, "DDPO"),
    "DDPO, batch statistics": (f"{DDPO} --tracker_size 0", "DDPO, batch statistics"),
    "GRPO": ("--objective grpo", "GRPO"),
    "PRDP, K = 4": (K4, "PRDP, K = 4"),
    "PRDP, K = 4, no clipping": (f"{K4} --clip_range inf", "PRDP, K = 4"),
    "PRDP, K = 4, norm clip alone": (f"{K4} --clip_range inf --max_grad_norm 0.01", "PRDP, K = 4"),
    "DDPO, no clipping": (f"{DDPO} --clip_range inf", "DDPO"),
    "PRDP, offline": ("--offline", "PRDP"),
    **{f"PRDP, JPEG, KL {weight}": (f"{JPEG} --kl_weight {weight}", "PRDP")
       for weight in (0.3, 1, 3, 30, 300, 1000)},
    "DDPO, JPEG": (f"{JPEG} {DDPO}", "DDPO"),
    "PRDP, KL 0.001": ("--kl_weight 0.001 --max_grad_norm inf", "PRDP"),
    "RLOO": ("--objective rloo --max_grad_norm inf", "PRDP"),
    "PRDP, 80 epochs": ("--num_epochs 80", "PRDP"),
    "PRDP, 400 epochs": ("--num_epochs 400", "PRDP"),
    "GRPO, K = 4": (f"--objective grpo {K4}", "GRPO, K = 4"),
    **{f"DDPO, {count} epochs": (f"{DDPO} --num_epochs {count}", "DDPO")
       for count in (40, 100, 200, 400)},
    **{f"PRDP, K = 4, {count} epochs": (f"{K4} --num_epochs {count}", "PRDP, K = 4")
       for count in (40, 60, 80, 400)},
    "GRPO, 400 epochs": ("--objective grpo --num_epochs 400", "GRPO"),
    **{f"RLOO, {count} epochs": (f"--objective rloo --num_epochs {count}", "PRDP")
       for count in (80, 160, 400)},
    **{f"DDPO, level {level}": (f"{DDPO} {flags}", "DDPO") for level, flags in AT.items()},
    "DDPO, batch statistics, level 10": (
        f"{DDPO} --tracker_size 0 {AT[10]}", "DDPO, batch statistics"),
    "PRDP, K = 4, level 10": (f"{K4} {AT[10]}", "PRDP, K = 4"),
    "PRDP, K = 4, KL 300": (f"{K4} --kl_weight 300 --num_epochs 32", "PRDP, K = 4"),
    "PRDP, K = 4, KL 300, offline": (
        f"{K4} --kl_weight 300 --num_epochs 32 --offline", "PRDP, K = 4"),
}


@dataclass
class World:
    """What all claims of it share."""
    title: str
    flags: str  # of all methods
    prompts: str  # of the evaluation
    samples: int  # of the evaluation, of each prompt
    terms: tuple[str, ...]  # of the tables; the first is the reward, the last the judge's


DEMO = ("prompts/animals.txt", 16, ("clip", "animal"))
DEMO_LARGE = ("emoji-500,emoji-unseen", 4, ("clip", "animal", "all_right"))
WORLDS = {
    "demo": World("45 prompts", f"--preset demo {EMOJI_WORLD} --num_epochs 16", *DEMO),
    "demo-large": World("more than 100,000 prompts",
                        f"--preset demo-large {EMOJI_WORLD} --num_epochs 40", *DEMO_LARGE),
    "preset-demo": World("--preset demo", "--preset demo", *DEMO),
}
ALL_RATES = ("2e-5", "5e-5", "7e-5", "1e-4", "2e-4", "4e-4")
SWEEP_RATES, SWEEP_SEEDS = ("5e-5", "1e-4", "2e-4", "4e-4"), ("0", "1")
GUIDANCES, OTHER_GUIDANCES = ("1", "1.5", "3", "5", "8"), ("3", "5")  # of the base, of the rest


@dataclass
class Claim:
    world_name: str
    methods: tuple[str, ...]  # "METHOD" at every rate at which it has logs, or "METHOD, RATE"
    seeds: str = "2,3,4"
    own_terms: tuple[str, ...] = ()
    once: tuple[str, ...] = ()  # the methods that have the first seed alone

    @property
    def world(self) -> World:
        return WORLDS[self.world_name]

    @property
    def terms(self) -> tuple[str, ...]:
        return self.own_terms or self.world.terms

    def seeds_of(self, method: str) -> list[str]:
        seeds = self.seeds.split(",")
        return seeds[:1] if method in self.once else seeds

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each method with each rate that it may have."""
        return list(dict.fromkeys(
            pair for method in self.methods for pair in pairs_of(method)))

    @property
    def curves(self) -> dict[str, str]:
        """The terms of the curves."""
        return {"reward": self.terms[0], "judge": self.terms[-1]}


JPEG_TERMS = ("jpeg_compressibility", "clip", "animal")
CLAIMS = {
    "A": Claim("demo", ("PRDP", "PRDP, 1e-4", "DDPO", "DDPO, batch statistics", "GRPO"),
               "2,3,4,5,6"),
    "A4": Claim("demo", (
        "PRDP, K = 4", "PRDP, K = 4, 40 epochs", "PRDP, K = 4, 40 epochs, 5e-5",
        "GRPO, K = 4, 1e-4", "DDPO", "DDPO, 40 epochs", "DDPO, 40 epochs, 1e-4"), "2,3,4,5,6"),
    "B": Claim("demo-large", ("PRDP", "DDPO", "GRPO"), "2,3,4,5,6"),
    "B4": Claim("demo-large", (
        "PRDP, K = 4", "PRDP, K = 4, 5e-5", "PRDP, K = 4, 60 epochs, 5e-5",
        "PRDP, K = 4, 80 epochs", "GRPO, K = 4, 1e-4", "DDPO", "DDPO, 100 epochs",
        "DDPO, 100 epochs, 1e-4", "DDPO, 100 epochs, 5e-5"), "2,3,4,5,6"),
    "C": Claim("demo", ("PRDP, K = 4", "PRDP, K = 4, no clipping", "PRDP, K = 4, norm clip alone",
                        "DDPO", "DDPO, no clipping")),
    "D": Claim("demo", ("PRDP", "PRDP, 1e-4", "PRDP, offline", "PRDP, offline, 1e-4"),
               once=("PRDP, offline, 1e-4",)),
    "E": Claim("demo", (*(f"PRDP, JPEG, KL {weight}, 2e-4" for weight in (0.3, 3, 30)),
                        "DDPO, JPEG"), own_terms=JPEG_TERMS),
    "E2": Claim("demo", tuple(f"PRDP, JPEG, KL {weight}, {rate}" for weight in (1, 30, 300, 1000)
                              for rate in ("2e-5", "5e-5")), own_terms=JPEG_TERMS),
    "F": Claim("demo", ("PRDP, KL 0.001", "RLOO")),
    "G": Claim("demo", ("PRDP, 80 epochs, 1e-4",), "2"),
    "H": Claim("demo-large", ("PRDP, 80 epochs, 1e-4", "RLOO, 80 epochs, 1e-4")),
    "I": Claim("demo-large", (
        "PRDP, 400 epochs, 1e-4", "RLOO, 160 epochs, 1e-4", "DDPO, 200 epochs, 2e-4",
        "DDPO, 200 epochs, 1e-4"), "2"),
    "L": Claim("demo-large", ("PRDP, K = 4, 400 epochs", "DDPO, 400 epochs", "GRPO, 400 epochs",
                              "RLOO, 400 epochs"), "2,3"),
    "M": Claim("demo", ("DDPO, batch statistics", "DDPO, batch statistics, level 10", "DDPO",
                        "DDPO, level 10", "PRDP, K = 4", "PRDP, K = 4, level 10")),
    "M-large": Claim("demo-large", (
        "DDPO", *(f"DDPO, level {level}" for level in LEVELS), "PRDP, K = 4, 1e-4",
        "PRDP, K = 4, level 10"), once=("DDPO, level 1", "PRDP, K = 4, level 10")),
    "R": Claim("demo", ("PRDP, K = 4, KL 300, 2e-5", "PRDP, K = 4, KL 300, offline, 2e-5")),
    "P": Claim("preset-demo", ("PRDP, K = 4, 7e-5",), "2,3,4,5,6"),
    "P-large": Claim("demo-large", (
        "PRDP, K = 4, 60 epochs, 5e-5", "PRDP, K = 4, 5e-5", "PRDP, K = 4, 1e-4")),
}


@dataclass
class Logs:
    """A claim's runs of one seed, or raises LookupError."""
    claim: Claim
    seed: str

    def curve(self, method: str, key: str = "reward/clip") -> list[float]:
        """A metric in each fifth of the epochs."""
        (folder,) = self.folders(method)
        return fifths(read(folder), key)

    def ends(self, term: str, *methods: str, column: str = "finetuned") -> list[float]:
        """Of the evaluation on its last prompts: each method at each of its rates."""
        folders = [folder for method in methods for folder in self.folders(method)]
        return self.evaluated(folders, term, column)

    def gain(self, method: str, term: str = "clip") -> float:
        return self.ends(term, method, column="difference")[0]

    def left(self, method: str, level: int) -> float:
        """The gain at a level as a share of that at level 0."""
        return self.gain(f"{method}, level {level}") / self.gain(method)

    def fall(self, method: str) -> float:
        """From the best fifth to the last."""
        return max(self.curve(method)) - self.curve(method)[-1]

    def lead(self, other: str, method: str = "PRDP, K = 4", key: str = "reward/clip") -> float:
        """Of the method over the other in a metric of the last fifth."""
        return self.curve(method, key)[-1] - self.curve(other, key)[-1]

    def collapse(self, method: str) -> float:
        """The first epoch with a mean reward under 0.2, or inf."""
        (folder,) = self.folders(method)
        rewards = [line["reward/clip"] for line in read(folder)]
        return next((i for i, reward in enumerate(rewards, 1) if reward < 0.2), math.inf)

    def above_base(self, term: str, method: str, at: str = "") -> float:
        """Its end less the base's best at any guidance that was tried. `at` is the end's, as
        "-guidance-3", where it is not the run's own."""
        if not (tried := list((LOGS / self.claim.world_name).glob("*-guidance-*"))):
            raise LookupError
        (run,) = self.folders(method)
        (end,) = self.evaluated([run.with_name(run.name + at)], term, "finetuned")
        return end - max(self.evaluated(tried, term, "base"))

    def folders(self, method: str) -> list[Path]:
        pairs = [pair for pair in pairs_of(method) if pair in self.claim.pairs]
        assert pairs, method
        folders = [LOGS / name_of(self.claim.world_name, *pair, self.seed) for pair in pairs]
        if not (found := [folder for folder in folders if folder.exists()]):
            raise LookupError
        return found

    def evaluated(self, folders: list[Path], term: str, column: str) -> list[float]:
        values = evaluated(folders, self.claim.world.prompts.split(",")[-1], term, column)
        if len(values) < len(folders):
            raise LookupError
        return values


COUNTED = {"mean": lambda seeds: [statistics.fmean(seeds)], "every seed": list,
           "one seed": lambda seeds: [max(seeds)]}


def pairs_of(method: str) -> list[tuple[str, str]]:
    """A claim's method with each rate that it may have: all, if "METHOD, RATE" does not say."""
    name, _, rate = method.rpartition(", ")
    return [(name, rate)] if rate in ALL_RATES else [(method, rate) for rate in ALL_RATES]


def name_of(world: str, method: str, rate: str, seed: str) -> str:
    """The folder of a run's logs. Claims with the same world share their runs."""
    words = method.replace(",", "").replace("= ", "").replace(" ", "-")
    return f"{world}/{words}-{rate}-seed{seed}"


def flags_of(world: str, method: str) -> list[str]:
    return [*WORLDS[world].flags.split(), *METHODS[method][0].split()]


@functools.cache
def read(folder: Path) -> list[dict]:
    """A run's metrics, one dict an epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def call_prdp(*flags: str) -> None:
    print("python prdp.py", *flags, flush=True)
    subprocess.run([sys.executable, "prdp.py", *flags], cwd=ROOT, check=True)


def train(world: str, method: str, rate: str, seed: str, again: bool = False) -> None:
    """One run, if it has no logs yet or is wanted again, and its logs."""
    name = name_of(world, method, rate, seed)
    run, logs = RUNS / name, LOGS / name
    if again or not (logs / "metrics.jsonl").exists():
        call_prdp(*flags_of(world, method), "--learning_rate", rate, "--seed", seed,
                  "--run_dir", str(run.relative_to(ROOT)))
        logs.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(run / file, logs)


def evaluation_of(prompts: str) -> str:
    """The name of the file that prdp.py writes for a set."""
    return f"evaluation-{Path(prompts).stem}.json"


def evaluate(claim: Claim, name: str, *flags: str) -> None:
    """What --evaluate with these flags says in the claim's world, as far as it is not there yet."""
    files = map(evaluation_of, claim.world.prompts.split(","))
    if missing := [file for file in files if not (LOGS / name / file).exists()]:
        call_prdp(*flags, "--prompts", claim.world.prompts, "--samples_per_prompt",
                  str(claim.world.samples), "--seed", "1000")
        (LOGS / name).mkdir(parents=True, exist_ok=True)
        for file in missing:
            shutil.copy(RUNS / name / file, LOGS / name)


def train_and_evaluate(claim: Claim, method: str, rate: str, seed: str) -> None:
    """As far as that is not done yet."""
    name = name_of(claim.world_name, method, rate, seed)
    files = map(evaluation_of, claim.world.prompts.split(","))
    is_evaluated = all((LOGS / name / file).exists() for file in files)
    train(claim.world_name, method, rate, seed,
          again=not is_evaluated and not (RUNS / name).exists())
    evaluate(claim, name, "--evaluate", f"runs/claims/{name}")


def evaluate_guidance(claim: Claim, name: str, guidances: Iterable[str], *flags: str) -> None:
    """What --evaluate with these flags says at each guidance."""
    for guidance in guidances:
        at = f"{name}-guidance-{guidance}"
        evaluate(claim, at, *flags, "--guidance_scale", guidance, "--run_dir", f"runs/claims/{at}")


def fifths(metrics: list[dict], key: str) -> list[float]:
    """The mean of a metric in each fifth of the epochs; first ones that are too many are left out,
    as the first of 16."""
    return means([line[key] for line in metrics], max(1, len(metrics) // 5))


def means(values: list[float], size: int) -> list[float]:
    """Of each `size` values in a row; first ones that are too many are left out."""
    return [statistics.fmean(values[start : start + size])
            for start in range(len(values) % size, len(values), size)]


def sweep_ends(world: str, method: str, seed: str) -> dict[str, float]:
    """The reward at the end of the sweep's runs that are there, by learning rate."""
    folders = {rate: LOGS / name_of(world, method, rate, seed) for rate in SWEEP_RATES}
    return {rate: fifths(read(folder), "reward/clip")[-1]
            for rate, folder in folders.items() if folder.exists()}


def rate_of(world: str, method: str) -> str:
    """The best of the sweep, for which seeds count that have all rates. Raises ValueError if there
    is none."""
    source = METHODS[method][1]
    sweeps = [sweep_ends(world, source, seed) for seed in SWEEP_SEEDS]
    if not (whole := [ends for ends in sweeps if len(ends) == len(SWEEP_RATES)]):
        raise ValueError(f"{source} in {world} lacks its sweep: --rates says which")
    return max(SWEEP_RATES, key=lambda rate: sum(ends[rate] for ends in whole))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def mean_and_error(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else (
        f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}")


def runs_of(claim: Claim) -> dict[tuple[str, str], list[Path]]:
    """The logs of the reported seeds, by (method, learning rate)."""
    runs = {}
    for method, rate in claim.pairs:
        folders = [LOGS / name_of(claim.world_name, method, rate, seed)
                   for seed in claim.seeds.split(",")]
        if found := [folder for folder in folders if folder.exists()]:
            runs[method, rate] = found
    return runs


def evaluated(folders: list[Path], prompts: str, term: str,
              column: str = "finetuned") -> list[float]:
    """A term's mean on a set, of each run whose evaluation has it."""
    files = [folder / evaluation_of(prompts) for folder in folders]
    results = [json.loads(file.read_text())["results"] for file in files if file.exists()]
    return [result[term][column]["mean"] for result in results if term in result]


def ends_table(claim: Claim) -> str:
    """Judged by evaluation: the base and the end of each method, mean and error over seeds."""
    header = ["method, learning rate", f"prompts x {claim.world.samples}", "seeds"]
    for term in claim.terms:
        header += [f"{term}: base", "finetuned"]
    rows = []
    for run, folders in runs_of(claim).items():
        for prompts in claim.world.prompts.split(","):
            cells = []
            for term in (*claim.terms, OBJECTIVE):  # the base's is the same with every seed
                cells += [mean_and_error(evaluated(folders, prompts, term, "base")[:1]),
                          mean_and_error(evaluated(folders, prompts, term))]
            cells.append(mean_and_error(evaluated(folders, prompts, "kl"), 4))
            num_ends = len(evaluated(folders, prompts, claim.terms[0]))
            rows += [[", ".join(run), prompts, str(num_ends), *cells]] if num_ends else []
    if any(row[-1] for row in rows):
        return table([*header, "objective: base", "finetuned", "kl"], rows)
    return table(header, [row[:-3] for row in rows])


def guidance_table(claim: Claim) -> str:
    """The base alone and end policies at several guidance scales, if that was tried."""
    policies = {", ".join(run): folders for run, folders in runs_of(claim).items()}
    base = [LOGS / claim.world_name / "base", *itertools.chain(*policies.values())]
    policies, rows = {"base": base} | policies, []
    for (policy, folders), guidance, prompts in itertools.product(
            policies.items(), GUIDANCES, claim.world.prompts.split(",")):
        at = [folder.with_name(f"{folder.name}-guidance-{guidance}") for folder in folders]
        column, most = ("base", 1) if policy == "base" else ("finetuned", None)  # bases are equal
        values = [evaluated(at, prompts, term, column)[:most] for term in claim.terms]
        rows += [[policy, str(len(values[0])), guidance, prompts, *map(mean_and_error, values)]
                 ] if values[0] else []
    if not rows:
        return ""
    return "By guidance in sampling, whatever it was in training.\n\n" + table(
        ["policy", "runs", "guidance", f"prompts x {claim.world.samples}", *claim.terms], rows)


def has_curves(method: str) -> bool:
    """Whether training samples from the policy. The samples of offline training are the base's."""
    return "--offline" not in METHODS[method][0]


def curves_table(claim: Claim) -> str:
    """Judged by the samples of training: its first and last fifth, and what was lost again."""
    header, rows = ["method, learning rate", "seeds"], []
    for term in claim.curves.values():
        header += [f"{term}: first fifth", "last", "largest fall"]
    for (method, rate), folders in runs_of(claim).items():
        if has_curves(method):
            row = [f"{method}, {rate}", str(len(folders))]
            for term in claim.curves.values():
                curves = [fifths(read(folder), f"reward/{term}") for folder in folders]
                row += [mean_and_error([curve[0] for curve in curves]),
                        mean_and_error([curve[-1] for curve in curves]),
                        f"{max(max(curve) - curve[-1] for curve in curves):.3f}"]
            has_kl = read(folders[0])[0]["kl"] is not None
            kls = [fifths(read(folder), "kl")[-1] for folder in folders] if has_kl else []
            rows.append([*row, mean_and_error(kls)])
    return table([*header, "kl: last fifth"], rows)


def explained_table(claim: Claim) -> str:
    """How much of the reward differences the log ratios explain, from fifth to fifth."""
    header = ["method, learning rate", "seed", "explained variance in each fifth"]
    rows = [[", ".join(run), folder.name[-1], ", ".join(
                f"{value:.3f}" for value in fifths(read(folder), "explained_variance"))]
            for run, folders in runs_of(claim).items() for folder in folders]
    return table(header, rows)


def predictions_table() -> str:
    """Which came true. A seed counts when all logs are there that a prediction needs."""
    rows = []
    for name, text, figure_of, counted, low, high in PREDICTIONS:
        figures = {}
        for seed in CLAIMS[name].seeds.split(","):
            with contextlib.suppress(LookupError):
                figures[seed] = figure_of(Logs(CLAIMS[name], seed))
        verdict = "not run"
        if figures:
            counting = COUNTED[counted](figures.values())
            verdict = "yes" if all(low < x < high for x in counting) else "**no**"
        bounds = (f"above {low}" if high == math.inf else f"below {high}" if low == -math.inf else
                  f"{low} to {high}")
        rows.append([name, text, f"{counted}: {bounds}", ", ".join(
            f"{figure:.4f} ({seed})" for seed, figure in figures.items()), verdict])
    return table(["claim", "figure", "predicted", "found (seed)", "was it so?"], rows)


def kinds_table(file: Path) -> str:
    """What kinds_of found in the base's samples and in those of each method's runs."""
    kinds = json.loads(file.read_text())
    rows = [[run, str(len(found)), *(mean_and_error([of_run[attribute] for of_run in found])
                                     for attribute in ("background", "size"))]
            for run, found in kinds.items()]
    return ("Effective number of kinds in 45 prompts x 6 samples, by the judge's reading.\n\n" +
            table(["method, learning rate", "seeds", "colours of background", "sizes"], rows))


def online_passes_offline(claim: Claim) -> str:
    """The table of claim D."""
    rows = []
    pairs = [(LOGS / name_of(claim.world_name, method, rate, seed),
              LOGS / name_of(claim.world_name, "PRDP", rate, seed), rate, seed)
             for method, rate in runs_of(claim) if not has_curves(method)
             for seed in claim.seeds.split(",")]
    for offline, online, rate, seed in pairs:
        ends = evaluated([offline], claim.world.prompts, "clip")
        if ends and online.exists():
            explained = fifths(read(offline), "explained_variance")[-1]
            curve = [line["reward/clip"] for line in read(online)]
            passed = next((str(i) for i, mean in enumerate(curve) if mean > ends[0]), "never")
            rows.append([rate, seed, f"{ends[0]:.3f}", f"{explained:.2f}", passed])
    return table(["learning rate", "seed", "offline training ends at", "explained variance there",
                  "online samples are above it after epochs"], rows)


def curves_lie_on_each_other(claim: Claim) -> str:
    """The table of claim F: the two methods, seed by seed."""
    rows = []
    for seed in claim.seeds.split(","):
        folders = [LOGS / name_of(claim.world_name, *run, seed) for run in runs_of(claim)]
        curves = [[line["reward/clip"] for line in read(folder)] for folder in folders]
        gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
        half = len(gaps) // 2
        rows.append([seed, f"{statistics.fmean(gaps[:half]):.4f}",
                     f"{statistics.fmean(gaps[half:]):.4f}", f"{max(gaps):.4f}"])
    return table(["seed", "mean distance of the rewards, first half of the epochs", "second half",
                  "largest"], rows)


def report() -> None:
    """Tables to benchmarks/claims/README.md, and the figures beside it."""
    text = """# The paper's claims in the emoji world

Made by `python benchmarks/claims.py report` from the logs in this folder. What was expected, and
how it was made fair, stands at the top of [claims.py](../claims.py) and in
[predictions.py](../predictions.py). `clip` is the reward, `animal` and `all_right` are the judge's.
`kl` is in nats per latent element and step, and the objective is reward - kl_weight * kl; they
are left out where they were not measured. ± is the standard error over training seeds. The first
table of a claim is of evaluations, the second of the samples that training drew. A fall is the
difference between the best fifth of the epochs and the last, on the worst seed. Curves show the
mean over seeds and their range; a dashed line is the mean of evaluations at the end of offline
training. Pictures of samples are of one seed of each method.

## Predictions

Those of the claims that came later, each with the figure that decides it, seed by seed. Where
no fifth is named, rewards and kl are of the last fifth of the epochs (kl in E2 and L of
evaluations), gains and shares of evaluations.

"""
    text += predictions_table()
    text += "## Learning rates\n\nMean reward over the last fifth of the epochs, by seed.\n\n"
    rows = []
    for world, method, seed in itertools.product(WORLDS, METHODS, SWEEP_SEEDS):
        if METHODS[method][1] == method and (ends := sweep_ends(world, method, seed)):
            cells = [f"{ends[rate]:.3f}" if rate in ends else "" for rate in SWEEP_RATES]
            rows.append([world, method, seed, *cells])
    text += table(["world", "method", "seed", *SWEEP_RATES], rows)
    text += "## Share of the reward's variance that lies between prompts\n\n"
    for world in ("demo", "demo-large"):
        first, last = between_prompts(world)
        text += (f"In {world}, mean over the reported runs of PRDP in A or B: {first:.2f} in the "
                 f"base's samples, {last:.2f} in the last fifth of the epochs.\n\n")
    shown = {name: claim for name, claim in CLAIMS.items() if is_shown(claim)}
    for name, claim in shown.items():
        draw(claim, LOGS / f"{name}.png")
        text += f"## {name}\n\n{ends_table(claim)}"
        text += guidance_table(claim)
        text += curves_table(claim)
        text += online_passes_offline(claim) if name == "D" else ""
        text += curves_lie_on_each_other(claim) if name == "F" else ""
        text += explained_table(claim) if name == "R" else ""
        text += f"![curves]({name}.png)\n\n"
        if (LOGS / f"{name}-samples.png").exists():
            text += f"![samples]({name}-samples.png)\n\n{kinds_table(LOGS / f'{name}-kinds.json')}"
    draw_distance([replace(CLAIMS[at_4], methods=CLAIMS[at_1].methods + CLAIMS[at_4].methods)
                   for at_1, at_4 in (("A", "A4"), ("B", "B4"))])
    draw_kl_term(CLAIMS["I"])
    draw_gains([CLAIMS["M"], CLAIMS["M-large"]])
    text += figure_section("Reward against distance", draw_distance, "distance")
    text += figure_section("Without the KL term", draw_kl_term, "kl-term")
    text += figure_section("Gain against share", draw_gains, "gains")
    text += "## What it cost\n\nI's run of PRDP had two processes; one of them is counted.\n\n"
    text += costs_table()
    (LOGS / "README.md").write_text(text.rstrip("\n") + "\n")


def figure_section(title: str, draw: Callable, name: str) -> str:
    """A figure, and what it shows, which its function's docstring says."""
    return f"## {title}\n\n{inspect.cleandoc(draw.__doc__)}\n\n![{name}]({name}.png)\n\n"


def is_shown(claim: Claim) -> bool:
    """Whether there is a run that no claim of the world before it has."""
    before = itertools.takewhile(lambda other: other is not claim, CLAIMS.values())
    shown = {pair for other in before if other.world_name == claim.world_name
             for pair in other.pairs}
    return bool(runs_of(claim).keys() - shown)


def between_prompts(world: str) -> tuple[float, float]:
    """The share of the reward's variance: in the base's samples and in the last fifth of PRDP's."""
    claim = next(claim for claim in CLAIMS.values() if claim.world_name == world)
    runs = [read(folder) for (method, _), folders in runs_of(claim).items()
            for folder in folders if method == "PRDP"]
    curves = [[metrics[0]["between_prompt_variance"],
               fifths(metrics, "between_prompt_variance")[-1]] for metrics in runs]
    first, last = map(statistics.fmean, zip(*curves, strict=True))
    return first, last


def costs_table() -> str:
    """Hours by the logs, of one thread unless a run had more: epochs times their median, as some
    had to wait. An epoch counts where it is first, and once for runs with the same beginning."""
    counted, rows = set(), []
    for name, claim in CLAIMS.items():
        swept = [LOGS / name_of(claim.world_name, *pair, seed)
                 for pair, seed in itertools.product(claim.pairs, SWEEP_SEEDS)]
        reported = itertools.chain(*runs_of(claim).values())
        num_runs, hours = 0, 0
        for folder in sorted({folder for folder in (*swept, *reported) if folder.exists()}):
            seconds = [tuple(value for key, value in line.items() if key.startswith("seconds_"))
                       for line in read(folder)]
            new = set(seconds) - counted
            counted |= new
            num_runs += bool(new)
            hours += len(new) * statistics.median(map(sum, seconds)) / 3600
        rows += [[name, str(num_runs), f"{hours:.1f}"]] if num_runs else []
    return table(["claim", "runs", "hours of training in one thread"], rows)


def draw(claim: Claim, file: Path) -> None:
    """Reward and judge against images drawn: the mean over seeds and their range."""
    figure = Figure(figsize=(5, 7.5), layout="constrained")
    for _, column, method, folders, style in panels([claim], figure, "images drawn in training"):
        for axes, term in zip(column, claim.curves.values(), strict=True):
            if has_curves(method):
                draw_curves(axes, folders, f"reward/{term}", **style)
            elif ends := evaluated(folders, claim.world.prompts, term):
                dashed = {"-": "--", ":": "-."}[style["linestyle"]]
                axes.axhline(statistics.fmean(ends), **style | {"linestyle": dashed})
    figure.savefig(file, dpi=100)


def draw_distance(claims: list[Claim]) -> None:
    """How far from the base a policy had to go for its reward (above) and the judge (below). A
    point is a tenth of the epochs (an epoch, where they are fewer than 20), the mean over seeds of
    the samples of training. Methods are left out whose logs have no kl. A method has one colour,
    and a line style for each rate."""
    figure = Figure(figsize=(5 * len(claims), 7.5), layout="constrained")
    x_label = "kl to the base, nats per latent element and step"
    for claim, column, _, folders, style in panels(claims, figure, x_label):
        if read(folders[0])[0]["kl"] is not None:
            style["label"] += f" (seeds: {len(folders)})"
            for axes, term in zip(column, claim.curves.values(), strict=True):
                curves = [list(map(statistics.fmean, curves_of(folders, key)))
                          for key in ("kl", f"reward/{term}")]
                axes.plot(*(means(curve, max(1, len(curve) // 10)) for curve in curves),
                          marker=".", **style)
    figure.savefig(LOGS / "distance.png", dpi=100)


def panels(claims: list[Claim], figure: Figure, x_label: str) -> Iterator[
        tuple[Claim, Iterable[Axes], str, list[Path], dict[str, str]]]:
    """A column of axes for each claim, reward above, judge below. Yields what may be drawn there: a
    claim, its column, a method, its runs at one rate, and their style. A method has one colour in
    the figure, and a line style for each of its rates."""
    methods = dict.fromkeys(method for claim in claims for method, _ in runs_of(claim))
    palette = matplotlib.colormaps["tab20"].colors  # ten strong colours, each before a pale one
    color_of = dict(zip(methods, [*palette[::2], *palette[1::2]], strict=False))
    for column, claim in zip(figure.subplots(2, len(claims), sharex="col", squeeze=False).T, claims,
                             strict=True):
        rates = Counter()
        for (method, rate), folders in runs_of(claim).items():
            yield claim, column, method, folders, dict(
                color=color_of[method], linestyle=("-", ":", "-.")[rates[method]],
                label=f"{method}, {rate}")
            rates[method] += 1
        for axes, (kind, term) in zip(column, claim.curves.items(), strict=True):
            axes.set_ylabel(f"{kind}: {term}")
        column[0].set_title(claim.world.title)
        column[1].set_xlabel(x_label)
        column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below, off the curves


def curves_of(folders: list[Path], key: str) -> list[tuple[float, ...]]:
    """A metric in each epoch, of every run."""
    return list(zip(*([line[key] for line in read(folder)] for folder in folders), strict=True))


def images_of(folder: Path) -> int:
    """Of an epoch of this run."""
    config = json.loads((folder / "config.json").read_text())
    return config["prompts_per_epoch"] * config["images_per_prompt"]


def draw_curves(axes: Axes, folders: list[Path], key: str, **style: str) -> None:
    """A metric against images drawn: the mean over seeds and their range."""
    values, images = curves_of(folders, key), images_of(folders[0])
    drawn = range(0, images * len(values), images)
    axes.plot(drawn, list(map(statistics.fmean, values)), **style)
    axes.fill_between(drawn, list(map(min, values)), list(map(max, values)), alpha=0.2,
                      color=style["color"], linewidth=0)


def draw_kl_term(claim: Claim) -> None:
    """PRDP at K = 1, RLOO, which is the same without the KL term, at the same rate, and DDPO at
    this rate and at 2e-4, its best in 40 epochs (seed 2; RLOO was stopped after 160 epochs, DDPO
    after 200). A point is the mean of ten epochs. kl is in nats per latent element and step."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), {
            "kl": "distance to the base (kl)", "reward/clip": "reward",
            "reward/all_right": "everything right, by the judge"}.items(), strict=True):
        for (method, rate), folders in runs_of(claim).items():
            values = means([line[key] for line in read(folders[0])], 10)
            drawn = [images_of(folders[0]) * (10 * i + 5) for i in range(len(values))]
            name = method.partition(",")[0].replace("RLOO", "without its KL term (RLOO)")
            axes.plot(drawn, values, label=f"{name}, {rate}")
        axes.set(xlabel="images drawn in training", title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(LOGS / "kl-term.png", dpi=100)


def draw_gains(claims: list[Claim]) -> None:
    """A point is a run at level 0, 1, 3 or 10: its gain in the reward without the level (evaluation
    on the last prompts) against the share s of the variance that lies between prompts, level
    included. The formula: an advantage's variance is that within a prompt times 1 / (1 - s) with
    statistics of the batch, and times B / (B - 1) with the other images of the prompt. AdamW
    fixes the length of a step, so its gain is proportional to 1 / sqrt(variance) (dashed, through
    the mean at level 0). At s = 1 / B (dotted) the two are equal."""
    figure, names = Figure(figsize=(5 * len(claims), 3.5), layout="constrained"), []
    for axes, claim in zip(figure.subplots(1, len(claims), squeeze=False)[0], claims, strict=True):
        base = between_prompts(claim.world_name)[0]
        shares = torch.linspace(base, 1, 200)
        batch = {"demo": "DDPO, batch statistics", "demo-large": "DDPO"}[claim.world_name]
        for (method, _), folders in runs_of(claim).items():
            gains = evaluated(folders, claim.world.prompts.split(",")[-1], "clip", "difference")
            name, _, level = method.partition(", level ")
            names += [] if name in names else [name]
            color, odds = f"C{names.index(name)}", base / (1 - base) + float(level or 0) ** 2
            axes.plot([odds / (1 + odds)] * len(gains), gains, "o", color=color)
            if gains and not level:
                left = ((1 - shares) / (1 - base)).sqrt() if name == batch else torch.ones(200)
                axes.plot(shares, statistics.fmean(gains) * left, "--", color=color, label=name)
        axes.axvline(1 / 6, color="grey", linestyle=":")
        axes.set(title=claim.world.title, ylabel="gain in clip",
                 xlabel="share of the reward's variance between prompts")
        axes.legend()
    figure.savefig(LOGS / "gains.png", dpi=100)


def load_run(folder: Path) -> tuple[prdp.Config, prdp.Models]:
    """A run's end policy beside its base, and the flags of its evaluation."""
    config = prdp.parse_config(["--evaluate", str(folder), "--seed", "1000"])
    models = prdp.load_models(config, torch.device("cpu"))
    prdp.Run(str(folder)).load(models.policy.unet, {})
    return config, models


def kept_runs(name: str) -> list[tuple[tuple[str, str], Path]]:
    """A claim's reported runs whose folders are still there, each with its (method, rate)."""
    runs = [(run, RUNS / logs.relative_to(LOGS))
            for run, folders in runs_of(CLAIMS[name]).items() for logs in folders]
    if not (runs := [(run, folder) for run, folder in runs if folder.exists()]):
        raise ValueError(f"{RUNS} holds no run of claim {name}")
    return runs


def draw_samples(name: str) -> None:
    """The claim's end policies: a picture of samples from the same prompts and noise, rows of each
    method, and how various the backgrounds and sizes are. It needs the runs themselves, which are
    not kept, and leaves out those that are not there."""
    claim, policies, kinds = CLAIMS[name], {}, {}
    for run, folder in kept_runs(name):
        config, models = load_run(folder)
        if not kinds:
            policies["base"] = models.reference
            kinds["base"] = [kinds_of(config, models, models.reference)]
        policies.setdefault("\n".join(run).replace(", ", "\n"), models.policy)
        kinds.setdefault(", ".join(run), []).append(kinds_of(config, models, models.policy))
    (prompts,) = prdp.load_prompts(claim.world.prompts.split(",")[-1], print).values()
    spread = [column * len(prompts) // 8 for column in range(8)]  # over the list
    draw_grid(config, models, policies, prompts, spread, LOGS / f"{name}-samples.png")
    (LOGS / f"{name}-kinds.json").write_text(json.dumps(kinds, indent=2) + "\n")


def draw_before_after() -> None:
    """The README's picture: the first run of P-large, four unseen sentences spread over the list,
    three images of each, before and after from the same noise. Where the judge finds everything
    right, the frame is green."""
    config, models = load_run(kept_runs("P-large")[0][1])
    (prompts,) = prdp.load_prompts("emoji-unseen", print).values()
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    for column, part in enumerate(figure.subfigures(1, 4)):
        index, cells = column * len(prompts) // 4, part.subplots(3, 2)
        part.suptitle(textwrap.fill(prompts[index].removeprefix("A painting of "), 34), fontsize=9)
        for side, (label, policy) in enumerate((("before", models.reference),
                                                ("after", models.policy))):
            cells[0, side].set_title(label, fontsize=9)
            latents = prdp.sample_for_evaluation(config, models, policy, prompts, [index], 3)[1]
            images = models.decode(latents[:, -1])
            is_right = all_right(images, [prompts[index]] * 3).bool()
            for cell, image, right in zip(cells[:, side], images, is_right, strict=True):
                show(cell, image)
                cell.spines[:].set(color="tab:green" if right else "lightgrey", linewidth=4)
    figure.savefig(ROOT / "demo/before-after.png", dpi=100)


def draw_grid(config: prdp.Config, models: prdp.Models, policies: dict[str, prdp.Policy],
              prompts: list[str], indices: list[int], file: Path) -> None:
    """Three images by each policy of each of eight prompts, all policies from the same noise."""
    figure = Figure(figsize=(10.4, 4.2 * len(policies)), layout="constrained")
    cells = figure.subplots(3 * len(policies), 8)
    for i, (label, policy) in enumerate(policies.items()):
        latents = prdp.sample_for_evaluation(config, models, policy, prompts, indices, 3)[1]
        images = models.decode(latents[:, -1]).unflatten(0, (8, 3))
        for row, column in itertools.product(range(3), range(8)):
            cell = cells[i * 3 + row, column]
            show(cell, images[column, row])
            if column == 0:
                cell.set_ylabel(label)
            if i == row == 0:
                title = prompts[indices[column]].removeprefix("A painting of ")
                cell.set_title(textwrap.fill(title, 18), fontsize=9)
    figure.savefig(file, dpi=100)


def show(cell: Axes, image: Tensor) -> None:
    """An image (3, H, W) without axes."""
    cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="bicubic")
    cell.set(xticks=[], yticks=[])


def kinds_of(config: prdp.Config, models: prdp.Models, policy: prdp.Policy) -> dict[str, float]:
    """The effective number of the kinds that the judge sees in 45 prompts x 6 samples. The prompts
    name the animal alone."""
    prompts = (ROOT / "prompts/animals.txt").read_text().splitlines()
    indices = list(range(len(prompts)))
    _, latents, _ = prdp.sample_for_evaluation(config, models, policy, prompts, indices, 6)
    scenes = seen(models.decode(latents[:, -1]))
    return {attribute: effective_number(getattr(scene, attribute) for scene in scenes)
            for attribute in ("background", "size")}


def effective_number(kinds: Iterable[str | None]) -> float:
    """exp(entropy) of their frequencies."""
    counts = torch.tensor(list(Counter(kinds).values()), dtype=torch.float64)
    return Categorical(counts).entropy().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(
        "sweep", "run", "base", "guidance", "samples", "before-after", "report"))
    parser.add_argument("claim", nargs="?", choices=tuple(CLAIMS))
    parser.add_argument("--seeds", help="some of the claim's; of `sweep`, any")
    parser.add_argument("--methods", help="some of the claim's, with semicolons between")
    parser.add_argument("--rates", help="instead of the grid, or of what the sweep says")
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if arguments.what == "before-after":
        return draw_before_after()
    if not arguments.claim:
        parser.error("which claim?")
    claim = CLAIMS[arguments.claim]
    if arguments.what == "samples":
        return draw_samples(arguments.claim)
    if arguments.what == "base":
        world = claim.world_name
        return evaluate_guidance(claim, f"{world}/base", GUIDANCES, *claim.world.flags.split(),
                                 "--evaluate", "base")
    if arguments.what == "guidance":
        for _, folder in kept_runs(arguments.claim):
            name = str(folder.relative_to(RUNS))
            evaluate_guidance(claim, name, OTHER_GUIDANCES, "--evaluate", f"runs/claims/{name}")
        return None
    methods = arguments.methods.split(";") if arguments.methods else claim.methods
    given, is_sweep = arguments.rates and arguments.rates.split(","), arguments.what == "sweep"
    seeds = (arguments.seeds or (",".join(SWEEP_SEEDS) if is_sweep else claim.seeds)).split(",")
    for seed, method in itertools.product(seeds, methods):
        (name, rate), *others = pairs_of(method)
        if is_sweep and METHODS[name][1] == method:
            rates = given or SWEEP_RATES
        elif not is_sweep and seed in claim.seeds_of(method):
            rates = given or [rate_of(claim.world_name, name) if others else rate]
        else:
            continue
        for rate in rates:
            if is_sweep:
                train(claim.world_name, name, rate, seed)
            else:
                train_and_evaluate(claim, name, rate, seed)


if __name__ == "__main__":
    main()
