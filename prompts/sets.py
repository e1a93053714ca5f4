"""Prompt sets by name, from the Hugging Face hub: `--prompts hpdv2` and the like.

    python prompts/sets.py                   # the names
    python prompts/sets.py hpdv2 hpdv2.txt   # a copy for machines without a network

They are what the paper trains on (hpdv2, pickapic) and judges by (most others). Users of image
generators wrote them, unfiltered, so they are not part of this repository but fetched at first use,
and kept in HF_HOME/prdp, one a line.
"""

import csv
import json
import os
import random
import shutil
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME

SETS = {  # name -> dataset of the hub, its files, and the field that is the prompt
    "hpdv2": ("ymhao/HPDv2", "train.json", "prompt"),
    "hpdv2-animation": ("zhwang/HPDv2", "benchmark/anime.json", None),
    "hpdv2-concept-art": ("zhwang/HPDv2", "benchmark/concept-art.json", None),
    "hpdv2-painting": ("zhwang/HPDv2", "benchmark/paintings.json", None),
    "hpdv2-photo": ("zhwang/HPDv2", "benchmark/photo.json", None),
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", "data/train-*.parquet", "caption"),
    "pickapic-test": ("yuvalkirstain/pickapic_v1_no_images", "data/test_unique-*.parquet",
                      "caption"),
    "partiprompts": ("nateraw/parti-prompts", "PartiPrompts.tsv", "Prompt"),
}
SAMPLES = {"hpdv2-500": ("hpdv2", 500)}  # as Table 2's prompts that were seen in training
NAMES = [*SETS, *SAMPLES]


def prompt_file(name: str) -> Path:
    """The text file with the set's distinct prompts, one a line, made if it is not there yet.

    Raises ValueError naming the set, and the way without a network, if it cannot be had.
    """
    file = Path(HF_HOME, "prdp", f"{name}.txt")
    if file.exists():
        return file
    if name in SAMPLES:
        source, count = SAMPLES[name]
        lines = prompt_file(source).read_text("utf-8").splitlines()
        lines = random.Random(0).sample(lines, count)
    try:
        if name in SETS:
            # Any whitespace becomes a space: a prompt is a line. A dict keeps the order.
            lines = dict.fromkeys(" ".join(prompt.split()) for prompt in download(*SETS[name]))
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(line + "\n" for line in lines if line), "utf-8")
        temporary.replace(file)
    except Exception as error:  # whatever the hub, the network, the disk or a damaged file raise
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the prompts {name} cannot be had from the Hugging Face hub ({cause}). Without a "
            "network: `python prompts/sets.py NAME FILE` where there is one, and --prompts FILE; "
            "or point HF_HOME at a cache that holds them"
        ) from error
    return file


def download(dataset: str, pattern: str, field: str | None) -> list[str]:
    """All prompts of a dataset's files, as often as they are there."""
    folder = snapshot_download(dataset, repo_type="dataset", allow_patterns=pattern)
    if not (files := sorted(Path(folder).glob(pattern))):
        raise FileNotFoundError(f"{dataset} holds no {pattern}")
    return [prompt for file in files for prompt in read_field(file, field)]


def read_field(file: Path, field: str | None) -> list[str]:
    """One field of all rows of a .parquet, .tsv or .json file; without a field rows are strings."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ImportError("it takes pyarrow: pip install pyarrow") from None
        return parquet.read_table(file, columns=[field])[field].to_pylist()
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".tsv":  # a quotation mark is part of the prompt
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = json.load(lines)
        return [row[field] if field else row for row in rows]


def main() -> None:
    match sys.argv[1:]:
        case [name, target] if name in NAMES:
            try:
                shutil.copyfile(prompt_file(name), target)
            except (ValueError, OSError) as error:
                sys.exit(f"prompts/sets.py: error: {error}")
        case _:
            print("usage: python prompts/sets.py NAME FILE, where NAME is one of", *NAMES, sep="\n")
            sys.exit(len(sys.argv) > 2)


if __name__ == "__main__":
    main()
