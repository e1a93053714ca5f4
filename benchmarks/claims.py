"""The paper's claims, tried in the small world of demo/: runs, raw logs, tables and figures.

    python benchmarks/claims.py sweep A                  # learning rates, on seed 0
    python benchmarks/claims.py run A                    # at the best rate of each method
    python benchmarks/claims.py samples A                # the end policies: a picture, and kinds
    python benchmarks/claims.py report                   # all tables and curves, from the logs

`run` and `sweep` call prdp.py with flags. What was interrupted goes on by the same command, and
two commands for different seeds may run side by side. Runs lie in runs/claims/, and the raw logs of
those that are finished are copied to benchmarks/claims/; `report` reads nothing else. What has logs
is not run again; to repeat it, delete them.

What is the same for all methods of a claim: the preset, so the images of an epoch, the epochs, the
number of steps and guidance; the noise of the evaluation (seed 1000); and how the learning rate is
chosen: four rates on seed 0, which is not reported, and the one whose mean reward over the last
fifth of the epochs is highest. An ablation, a method less one part, has the rate of the whole.
Methods differ by the flags in METHODS alone, and so by prdp.py's defaults of each objective. The
claims A and B have five seeds, the others three, G and I one.

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
   prompt (0.54 in the base's samples) what the preset's 1 is to that of its own (0.18).
F  At K = 1 and with hardly any KL, PRDP is RLOO: GRPO without division by the standard deviation.
   The curves lie on each other. Gradients are not clipped here, as the two losses differ in scale.
G  PRDP with --preset demo for five times its epochs: no fall.
H  PRDP with --preset demo-large and all of its epochs, of which B has half for the cost: no fall.
I  H for five times as many epochs: no fall.

Said after the runs began. H's prediction was written after its first run. DDPO makes 4 updates an
epoch, PRDP 1. A's best rate of DDPO is the highest of the grid, so a higher one may be better. A
sweep of one seed is a weak choice. E's methods have rates that were swept on another reward. B's
runs of PRDP at 1e-4 are the first half of H's, and A's of seed 2 is the beginning of G's. Runs of
A and D at 1e-4, where another rate is the best, were begun by hand, as were I in two processes and
K = 4 with --preset demo-large, which has seed 0 alone and three rates.
"""

import argparse
import functools
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.distributions import Categorical

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import prdp  # noqa: E402
from demo.judge import seen  # noqa: E402

LOGS, RUNS = ROOT / "benchmarks/claims", ROOT / "runs/claims"
RATES = ("5e-5", "1e-4", "2e-4", "4e-4")
DDPO = "--objective ddpo"
JPEG = "--reward jpeg_compressibility,clip:demo/clip=0,demo/judge.py:animal=0"
METHODS = {  # flags, and the method whose learning rate it has, or a rate
    "PRDP": ("", "PRDP"),
    "DDPO": (DDPO, "DDPO"),
    "DDPO, batch statistics": (f"{DDPO} --tracker_size 0", "DDPO, batch statistics"),
    "GRPO": ("--objective grpo", "GRPO"),
    "PRDP, K = 4": ("--updates_per_epoch 4", "PRDP, K = 4"),
    "PRDP, K = 4, no clipping": ("--updates_per_epoch 4 --clip_range inf", "PRDP, K = 4"),
    "DDPO, no clipping": (f"{DDPO} --clip_range inf", "DDPO"),
    "PRDP, offline": ("--offline", "PRDP"),
    "PRDP, JPEG, KL 0.3": (f"{JPEG} --kl_weight 0.3", "PRDP"),
    "PRDP, JPEG, KL 3": (f"{JPEG} --kl_weight 3", "PRDP"),
    "PRDP, JPEG, KL 30": (f"{JPEG} --kl_weight 30", "PRDP"),
    "DDPO, JPEG": (f"{JPEG} {DDPO}", "DDPO"),
    "PRDP, KL 0.001": ("--kl_weight 0.001 --max_grad_norm inf", "PRDP"),
    "RLOO": ("--objective rloo --max_grad_norm inf", "PRDP"),
    "PRDP, 80 epochs": ("--num_epochs 80", "1e-4"),
    "PRDP, 400 epochs": ("--num_epochs 400", "1e-4"),
}


@dataclass
class World:
    """What all claims of a preset share."""
    title: str
    flags: str  # of all methods
    prompts: str  # of the evaluation
    samples: int  # of the evaluation, of each prompt
    terms: tuple[str, ...]  # of the tables; the first is the reward, the last the judge's


WORLDS = {
    "demo": World("45 prompts", "", "prompts/animals.txt", 16, ("clip", "animal")),
    "demo-large": World("more than 100,000 prompts", "--num_epochs 40", "emoji-500,emoji-unseen", 4,
                        ("clip", "animal", "all_right")),
}


@dataclass
class Claim:
    preset: str
    methods: tuple[str, ...]
    seeds: str = "2,3,4"
    own_terms: tuple[str, ...] = ()

    @property
    def world(self) -> World:
        return WORLDS[self.preset]

    @property
    def terms(self) -> tuple[str, ...]:
        return self.own_terms or self.world.terms

    @property
    def curves(self) -> dict[str, str]:
        """The terms of the curves."""
        return {"reward": self.terms[0], "judge": self.terms[-1]}


CLAIMS = {
    "A": Claim("demo", ("PRDP", "DDPO", "DDPO, batch statistics", "GRPO"), "2,3,4,5,6"),
    "B": Claim("demo-large", ("PRDP", "DDPO", "GRPO"), "2,3,4,5,6"),
    "C": Claim("demo", (
        "PRDP, K = 4", "PRDP, K = 4, no clipping", "DDPO", "DDPO, no clipping")),
    "D": Claim("demo", ("PRDP", "PRDP, offline")),
    "E": Claim("demo", (
        "PRDP, JPEG, KL 0.3", "PRDP, JPEG, KL 3", "PRDP, JPEG, KL 30", "DDPO, JPEG"),
        own_terms=("jpeg_compressibility", "clip", "animal")),
    "F": Claim("demo", ("PRDP, KL 0.001", "RLOO")),
    "G": Claim("demo", ("PRDP, 80 epochs",), "2"),
    "H": Claim("demo-large", ("PRDP, 80 epochs",)),
    "I": Claim("demo-large", ("PRDP, 400 epochs",), "2"),
}


def name_of(preset: str, method: str, rate: str, seed: str) -> str:
    """The folder of a run's logs. Claims with the same preset share their runs."""
    words = method.replace(",", "").replace("= ", "").replace(" ", "-")
    return f"{preset}/{words}-{rate}-seed{seed}"


def flags_of(preset: str, method: str) -> list[str]:
    return ["--preset", preset, *WORLDS[preset].flags.split(), *METHODS[method][0].split()]


@functools.cache
def read(folder: Path) -> list[dict]:
    """A run's metrics, one dict an epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def call_prdp(*flags: str) -> None:
    print("python prdp.py", *flags, flush=True)
    subprocess.run([sys.executable, "prdp.py", *flags], cwd=ROOT, check=True)


def train(preset: str, method: str, rate: str, seed: str, again: bool = False) -> None:
    """One run, if it has no logs yet or is wanted again, and its logs."""
    name = name_of(preset, method, rate, seed)
    run, logs = RUNS / name, LOGS / name
    if again or not (logs / "metrics.jsonl").exists():
        call_prdp(*flags_of(preset, method), "--learning_rate", rate, "--seed", seed,
                  "--run_dir", str(run.relative_to(ROOT)))
        logs.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(run / file, logs)


def evaluation_of(prompts: str) -> str:
    """The name of the file that prdp.py writes for a set."""
    return f"evaluation-{Path(prompts).stem}.json"


def evaluate(claim: Claim, method: str, rate: str, seed: str) -> None:
    """Train and evaluate, as far as that is not done yet."""
    name = name_of(claim.preset, method, rate, seed)
    run, logs = RUNS / name, LOGS / name
    files = map(evaluation_of, claim.world.prompts.split(","))
    missing = [file for file in files if not (logs / file).exists()]
    train(claim.preset, method, rate, seed, again=bool(missing) and not run.exists())
    if missing:
        call_prdp("--evaluate", str(run.relative_to(ROOT)), "--prompts", claim.world.prompts,
                  "--samples_per_prompt", str(claim.world.samples), "--seed", "1000")
        for file in missing:
            shutil.copy(run / file, logs)


def fifths(metrics: list[dict], key: str) -> list[float]:
    """The mean of a metric in each fifth of the epochs; first ones that are too many are left out,
    as the first of 16."""
    values, size = [line[key] for line in metrics], max(1, len(metrics) // 5)
    return [statistics.fmean(values[start : start + size])
            for start in range(len(values) % size, len(values), size)]


def sweep_ends(preset: str, method: str) -> dict[str, float]:
    """The reward at the end of the sweep's runs that are there, by learning rate."""
    folders = {rate: LOGS / name_of(preset, method, rate, "0") for rate in RATES}
    return {rate: fifths(read(folder), "reward/clip")[-1]
            for rate, folder in folders.items() if folder.exists()}


def rate_of(preset: str, method: str) -> str:
    """By the sweep's logs; raises ValueError if they are not all there."""
    source = METHODS[method][1]
    if source in RATES:
        return source
    ends = sweep_ends(preset, source)
    if missing := [rate for rate in RATES if rate not in ends]:
        raise ValueError(f"the sweep of {source} with --preset {preset} lacks {missing}")
    return max(ends, key=ends.get)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def mean_and_error(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else (
        f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}")


def runs_of(claim: Claim) -> dict[tuple[str, str], list[Path]]:
    """The logs of the reported seeds, by (method, learning rate)."""
    runs = {}
    for method, rate in itertools.product(claim.methods, RATES):
        folders = [LOGS / name_of(claim.preset, method, rate, seed)
                   for seed in claim.seeds.split(",")]
        if found := [folder for folder in folders if folder.exists()]:
            runs[method, rate] = found
    return runs


def evaluated(folders: list[Path], prompts: str, term: str,
              column: str = "finetuned") -> list[float]:
    """A term's mean on a set, of each run whose evaluation is there."""
    files = [folder / evaluation_of(prompts) for folder in folders]
    return [json.loads(file.read_text())["results"][term][column]["mean"]
            for file in files if file.exists()]


def ends_table(claim: Claim) -> str:
    """Judged by evaluation: the base and the end of each method, mean and error over seeds."""
    header = ["method, learning rate", f"prompts x {claim.world.samples}", "seeds"]
    for term in claim.terms:
        header += [f"{term}: base", "finetuned"]
    rows = []
    for run, folders in runs_of(claim).items():
        for prompts in claim.world.prompts.split(","):
            cells = []
            for term in claim.terms:
                base, ends = (evaluated(folders, prompts, term, column)
                              for column in ("base", "finetuned"))
                if ends:  # the base's is the same with every seed
                    cells += [mean_and_error(base[:1]), mean_and_error(ends)]
            rows += [[", ".join(run), prompts, str(len(ends)), *cells]] if ends else []
    return table(header, rows)


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
            rows.append(row)
    return table(header, rows)


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
    pairs = [(LOGS / name_of(claim.preset, method, rate, seed),
              LOGS / name_of(claim.preset, "PRDP", rate, seed), rate, seed)
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
        folders = [LOGS / name_of(claim.preset, *run, seed) for run in runs_of(claim)]
        if len(folders) == 2 and all(folder.exists() for folder in folders):
            curves = [[line["reward/clip"] for line in read(folder)] for folder in folders]
            gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
            half = len(gaps) // 2
            rows.append([seed, f"{statistics.fmean(gaps[:half]):.4f}",
                         f"{statistics.fmean(gaps[half:]):.4f}", f"{max(gaps):.4f}"])
    return table(["seed", "mean distance of the rewards, first half of the epochs", "second half",
                  "largest"], rows)


def report() -> None:
    """Tables to benchmarks/claims/README.md, and the figures beside it."""
    text = """# The paper's claims in the small world

Made by `python benchmarks/claims.py report` from the logs in this folder. What was expected, and
how it was made fair, stands at the top of [claims.py](../claims.py). `clip` is the reward, `animal`
and `all_right` are the judge's. ± is the standard error over seeds. The first table of a claim is
of evaluations, the second of the samples that training drew. A fall is the difference between the
best fifth of the epochs and the last, on the worst seed. Curves show the mean over seeds and their
range; a dashed line is the mean of evaluations at the end of offline training. Pictures of samples
are of one seed of each method.

## Learning rates

Mean reward over the last fifth of the epochs, seed 0.

"""
    rows = []
    for preset, method in itertools.product(WORLDS, METHODS):
        if METHODS[method][1] == method and (ends := sweep_ends(preset, method)):
            cells = [f"{ends[rate]:.3f}" if rate in ends else "" for rate in RATES]
            rows.append([preset, method, *cells])
    text += table(["preset", "method", *RATES], rows)
    text += "## Share of the reward's variance that lies between prompts\n\n"
    for claim in (CLAIMS["A"], CLAIMS["B"]):
        runs = [read(folder) for (method, _), folders in runs_of(claim).items()
                for folder in folders if method == "PRDP"]
        shares = {"the base's samples": [metrics[0]["between_prompt_variance"] for metrics in runs],
                  "the last fifth of the epochs": [
                      fifths(metrics, "between_prompt_variance")[-1] for metrics in runs]}
        means = [f"{statistics.fmean(values):.2f} in {name}" for name, values in shares.items()]
        text += (f"With --preset {claim.preset}, mean over PRDP's reported runs: "
                 f"{', '.join(means)}.\n\n")
    shown = {name: claim for name, claim in CLAIMS.items()
             if len({method for method, _ in runs_of(claim)}) >= min(2, len(claim.methods))}
    for name, claim in shown.items():
        draw([claim], LOGS / f"{name}.png")
        text += f"## {name}\n\n{ends_table(claim)}{curves_table(claim)}"
        text += online_passes_offline(claim) if name == "D" else ""
        text += curves_lie_on_each_other(claim) if name == "F" else ""
        text += f"![curves]({name}.png)\n\n"
        if (LOGS / f"{name}-samples.png").exists():
            text += f"![samples]({name}-samples.png)\n\n{kinds_table(LOGS / f'{name}-kinds.json')}"
    if {"A", "B"} <= shown.keys():
        draw([shown["A"], shown["B"]], LOGS / "A-and-B.png")
    text += "## What it cost\n\nThe run of claim I had two processes; one of them is counted.\n\n"
    text += costs_table()
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / "README.md").write_text(text.rstrip("\n") + "\n")


def costs_table() -> str:
    """Hours by the logs, of one thread unless a run had more: epochs times their median, as some
    had to wait. An epoch counts where it is first, and once for runs with the same beginning."""
    counted, rows = set(), []
    for name, claim in CLAIMS.items():
        swept = [LOGS / name_of(claim.preset, method, rate, "0")
                 for method in claim.methods for rate in RATES]
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


def draw(claims: list[Claim], file: Path) -> None:
    """A column for each claim: reward above, judge below, against images drawn; the mean over seeds
    and their range. A method has one colour everywhere, and a line style for each of its rates."""
    figure = Figure(figsize=(5 * len(claims), 6), layout="constrained")
    for column, claim in zip(figure.subplots(2, len(claims), sharex="col", squeeze=False).T, claims,
                             strict=True):
        rates = Counter()
        for (method, rate), folders in runs_of(claim).items():
            draw_method, lines = ((draw_curves, ("-", ":")) if has_curves(method) else
                                  (draw_ends, ("--", "-.")))
            draw_method(claim, folders, column, color=f"C{list(METHODS).index(method)}",
                        linestyle=lines[rates[method]], label=f"{method}, {rate}")
            rates[method] += 1
        for axes, (kind, term) in zip(column, claim.curves.items(), strict=True):
            axes.set_ylabel(f"{kind}: {term}")
        column[0].legend()
        column[0].set_title(claim.world.title)
        column[1].set_xlabel("images drawn in training")
    figure.savefig(file, dpi=100)


def draw_curves(claim: Claim, folders: list[Path], column: Iterable[Axes], **style: str) -> None:
    """The mean over seeds and their range, against images drawn."""
    curves = [read(folder) for folder in folders]
    config = json.loads((folders[0] / "config.json").read_text())
    images = config["prompts_per_epoch"] * config["images_per_prompt"]
    epochs = range(min(map(len, curves)))
    drawn = [images * epoch for epoch in epochs]
    for axes, term in zip(column, claim.curves.values(), strict=True):
        values = [[curve[epoch][f"reward/{term}"] for curve in curves] for epoch in epochs]
        axes.plot(drawn, list(map(statistics.fmean, values)), **style)
        axes.fill_between(drawn, list(map(min, values)), list(map(max, values)), alpha=0.2,
                          color=style["color"], linewidth=0)


def draw_ends(claim: Claim, folders: list[Path], column: Iterable[Axes], **style: str) -> None:
    """A level line at the mean of the evaluations, if there are any yet."""
    for axes, term in zip(column, claim.curves.values(), strict=True):
        if ends := evaluated(folders, claim.world.prompts, term):
            axes.axhline(statistics.fmean(ends), **style)


def draw_samples(name: str) -> None:
    """The claim's end policies: a picture of samples from the same prompts and noise, rows of each
    method, and how various the backgrounds and sizes are. It needs the runs themselves, which are
    not kept, and leaves out those that are not there."""
    claim, policies, kinds = CLAIMS[name], {}, {}
    runs = [(run, RUNS / logs.relative_to(LOGS))
            for run, folders in runs_of(claim).items() for logs in folders]
    if not (runs := [(run, folder) for run, folder in runs if folder.exists()]):
        raise ValueError(f"{RUNS} holds no run of claim {name}")
    for run, folder in runs:
        config = prdp.parse_config(["--evaluate", str(folder), "--seed", "1000"])
        models = prdp.load_models(config, torch.device("cpu"))
        prdp.Run(str(folder)).load(config, models.policy.unet)
        if not kinds:
            policies["base"] = models.reference
            kinds["base"] = [kinds_of(config, models, models.reference)]
        policies.setdefault("\n".join(run).replace(", ", "\n"), models.policy)
        kinds.setdefault(", ".join(run), []).append(kinds_of(config, models, models.policy))
    (prompts,) = prdp.load_prompts(claim.world.prompts.split(",")[-1], print).values()
    prdp.save_grid(config, models, policies, prompts, prdp.Run(str(LOGS)), f"{name}-samples.png")
    (LOGS / f"{name}-kinds.json").write_text(json.dumps(kinds, indent=2) + "\n")


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
    parser.add_argument("what", choices=("sweep", "run", "samples", "report"))
    parser.add_argument("claim", nargs="?", choices=tuple(CLAIMS))
    parser.add_argument("--seeds", help="of `run`, some of the claim's")
    parser.add_argument("--methods", help="some of the claim's, with semicolons between")
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if not arguments.claim:
        parser.error("which claim?")
    if arguments.what == "samples":
        return draw_samples(arguments.claim)
    claim = CLAIMS[arguments.claim]
    methods = arguments.methods.split(";") if arguments.methods else claim.methods
    if arguments.what == "sweep":
        for rate, method in itertools.product(RATES, methods):
            if METHODS[method][1] == method:
                train(claim.preset, method, rate, "0")
        return
    for seed, method in itertools.product((arguments.seeds or claim.seeds).split(","), methods):
        evaluate(claim, method, rate_of(claim.preset, method), seed)


if __name__ == "__main__":
    main()
