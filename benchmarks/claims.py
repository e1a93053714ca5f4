"""The paper's claims, tried in the small world of demo/: runs, raw logs, tables and figures.

    python benchmarks/claims.py sweep A                  # learning rates on seed 0
    python benchmarks/claims.py run A --seeds 2,3,4,5,6  # at the best rate of each method
    python benchmarks/claims.py report                   # everything shown, from benchmarks/claims/

`run` and `sweep` call prdp.py with flags. What was interrupted goes on by the same command, and
two commands for different seeds may run side by side. Runs lie in runs/claims/, and the raw logs of
those that are finished are copied to benchmarks/claims/; `report` reads nothing else.

What is the same for all methods of a claim: the preset, so the images of an epoch, the epochs, the
number of steps and guidance; the noise of the evaluation (seed 1000); and how the learning rate is
chosen: four rates on seed 0, which is not reported, and the one whose mean reward over the last
fifth of the epochs is highest. Methods differ by the flags in METHODS alone.

Written before the runs, from the paper: what should be seen.

A  45 prompts: PRDP as good as DDPO with statistics of each prompt; DDPO without them worse.
B  More than 100,000 prompts: PRDP improves steadily, also on prompts that it never saw. DDPO, whose
   prompts hardly ever come twice, falls back to statistics of the batch and fails. GRPO normalises
   within a prompt and at K = 1 nearly has PRDP's gradient, so it should do as well as PRDP.
C  K = 4 updates an epoch, with and without clipping: without it both collapse.
D  PRDP on samples of its own against samples of the base model: online passes the offline end.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
LOGS, RUNS = ROOT / "benchmarks/claims", ROOT / "runs/claims"
RATES = ("5e-5", "1e-4", "2e-4", "4e-4")
DDPO = "--objective ddpo"
METHODS = {
    "PRDP": "",
    "DDPO": DDPO,
    "DDPO, batch statistics": f"{DDPO} --tracker_size 0",
    "GRPO": "--objective grpo",
    "PRDP, K = 4": "--updates_per_epoch 4",
    "PRDP, K = 4, no clipping": "--updates_per_epoch 4 --clip_range inf",
    "DDPO, no clipping": f"{DDPO} --clip_range inf",
    "PRDP, offline": "--offline",
}
CLAIMS = {  # preset, methods, prompts of the evaluation, samples of each
    "A": ("demo", ("PRDP", "DDPO", "DDPO, batch statistics", "GRPO"), "prompts/animals.txt", 16),
    "B": ("demo-large", ("PRDP", "DDPO", "GRPO"), "emoji-500,emoji-unseen", 4),
    "C": ("demo", ("PRDP, K = 4", "PRDP, K = 4, no clipping", "DDPO", "DDPO, no clipping"),
          "prompts/animals.txt", 16),
    "D": ("demo", ("PRDP", "PRDP, offline"), "prompts/animals.txt", 16),
}
REWARD, JUDGE = "reward/clip", "reward/all_right"


def name_of(preset: str, method: str, rate: str, seed: str) -> str:
    """The folder of a run's logs. Claims with the same preset share their runs."""
    words = method.replace(",", "").replace("= ", "").replace(" ", "-")
    return f"{preset}/{words}-{rate}-seed{seed}"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prdp(*flags: str) -> None:
    print("python prdp.py", *flags, flush=True)
    subprocess.run([sys.executable, "prdp.py", *flags], cwd=ROOT, check=True)


def train(preset: str, method: str, rate: str, seed: str) -> Path:
    """One run, and its logs; returns their folder."""
    name = name_of(preset, method, rate, seed)
    run, logs = RUNS / name, LOGS / name
    if not (logs / "metrics.jsonl").exists():
        flags = ["--preset", preset, *METHODS[method].split(), "--learning_rate", rate]
        prdp(*flags, "--seed", seed, "--run_dir", str(run.relative_to(ROOT)))
        logs.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(run / file, logs)
    return logs


def evaluation_of(prompts: str) -> str:
    """The name of the file that prdp.py writes for a set."""
    return f"evaluation-{Path(prompts).stem}.json"


def evaluate(run: Path, logs: Path, prompt_sets: str, samples: int) -> None:
    names = [evaluation_of(prompts) for prompts in prompt_sets.split(",")]
    if not all((logs / name).exists() for name in names):
        prdp("--evaluate", str(run.relative_to(ROOT)), "--prompts", prompt_sets,
             "--samples_per_prompt", str(samples), "--seed", "1000")
        for name in names:
            shutil.copy(run / name, logs)


def last_fifth(metrics: list[dict], key: str) -> float:
    """The mean over the last fifth of the epochs."""
    return statistics.fmean(line[key] for line in metrics[-max(1, len(metrics) // 5):])


def sweep_ends(preset: str, method: str) -> dict[str, float]:
    """The reward at the end of the sweep's runs that are there, by learning rate."""
    files = {rate: LOGS / name_of(preset, method, rate, "0") / "metrics.jsonl" for rate in RATES}
    return {rate: last_fifth(read(file), REWARD) for rate, file in files.items() if file.exists()}


def best_rate(preset: str, method: str) -> str:
    """By the sweep's logs; raises ValueError if they are not all there."""
    ends = sweep_ends(preset, method)
    for rate in RATES:
        if rate not in ends:
            raise ValueError(f"the sweep of {method} with --preset {preset} lacks {rate}")
    return max(ends, key=ends.get)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_error(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else (
        f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}")


def runs_of(preset: str, methods: tuple[str, ...]) -> dict[str, list[Path]]:
    """The logs of all reported seeds, by method and learning rate."""
    runs = {}
    for method, rate in itertools.product(methods, RATES):
        found = LOGS.glob(f"{name_of(preset, method, rate, '')}*/metrics.jsonl")
        folders = sorted(file.parent for file in found if not file.parent.name.endswith("-seed0"))
        if folders:
            runs[f"{method}, {rate}"] = folders
    return runs


def report() -> None:
    """Tables to benchmarks/claims/README.md, and a figure for each claim that has runs."""
    text = """# The paper's claims in the small world

Made by `python benchmarks/claims.py report` from the logs in this folder. What was expected, and
how it was made fair, stands at the top of [claims.py](../claims.py). ± is the standard error over
seeds.
"""
    sweeps = []
    for preset, method in itertools.product(("demo", "demo-large"), METHODS):
        if ends := sweep_ends(preset, method):
            cells = [f"{ends[rate]:.3f}" if rate in ends else "" for rate in RATES]
            sweeps.append([preset, method, *cells])
    text += "\n## Learning rates\n\nMean reward over the last fifth of the epochs, seed 0.\n\n"
    text += table(["preset", "method", *RATES], sweeps)
    for claim, (preset, methods, prompt_sets, samples) in CLAIMS.items():
        if not (runs := runs_of(preset, methods)):
            continue
        rows = []
        for method, folders in runs.items():
            for prompts in prompt_sets.split(","):
                name = evaluation_of(prompts)
                results = [json.loads((folder / name).read_text())["results"]
                           for folder in folders if (folder / name).exists()]
                if results:
                    cells = [mean_and_error([r[term][column]["mean"] for r in results])
                             for term in ("clip", "animal", "all_right")
                             for column in ("base", "finetuned")]
                    rows.append([method, prompts, str(len(results)), *cells])
        header = ["method, learning rate", f"prompts x {samples}", "seeds", "reward: base",
                  "finetuned", "animal right: base", "finetuned", "all right: base", "finetuned"]
        text += f"\n## {claim}\n\n{table(header, rows)}\n![curves of claim {claim}]({claim}.png)\n"
        draw(runs, LOGS / f"{claim}.png")
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / "README.md").write_text(text)


def draw(runs: dict[str, list[Path]], file: Path) -> None:
    """Reward above, judge below, against images drawn: the mean over seeds and their range."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for method, folders in runs.items():
        curves = [read(folder / "metrics.jsonl") for folder in folders]
        config = json.loads((folders[0] / "config.json").read_text())
        images = config["prompts_per_epoch"] * config["images_per_prompt"]
        epochs = range(min(map(len, curves)))
        drawn = [images * epoch for epoch in epochs]
        for axes, key, label in ((above, REWARD, "reward"), (below, JUDGE, "judge: all right")):
            values = [[curve[epoch][key] for curve in curves] for epoch in epochs]
            (line,) = axes.plot(drawn, list(map(statistics.fmean, values)), label=method)
            axes.fill_between(drawn, list(map(min, values)), list(map(max, values)), alpha=0.2,
                              color=line.get_color(), linewidth=0)
            axes.set_ylabel(label)
    above.legend()
    below.set_xlabel("images drawn")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "run", "report"))
    parser.add_argument("claim", nargs="?", choices=tuple(CLAIMS))
    parser.add_argument("--seeds", default="2,3,4,5,6")
    parser.add_argument("--methods", help="some of the claim's, with semicolons between")
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if not arguments.claim:
        parser.error("which claim?")
    preset, methods, prompt_sets, samples = CLAIMS[arguments.claim]
    for method in arguments.methods.split(";") if arguments.methods else methods:
        if arguments.what == "sweep":
            for rate in RATES:
                train(preset, method, rate, "0")
            continue
        rate = best_rate(preset, method)
        for seed in arguments.seeds.split(","):
            logs = train(preset, method, rate, seed)
            evaluate(RUNS / logs.relative_to(LOGS), logs, prompt_sets, samples)


if __name__ == "__main__":
    main()
