"""Prompts: files, and sets by name, most of them from the Hugging Face hub (`--prompts hpdv2`).

    python -m prompts.sets                   # the names
    python -m prompts.sets hpdv2 hpdv2.txt   # a copy for machines without a network

The hub's are what the paper trains on (hpdv2, pickapic) and judges by (most others). Users of image
generators wrote them, unfiltered, so they are not part of this repository but fetched at first use,
and kept in HF_HOME/prdp, one a line.

The rule for lists in flags and the explanation of what the hub raises are here too, because
--prompts, --reward and --model share them.
"""

import contextlib
import csv
import errno
import json
import os
import pickle
import random
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors, is_offline_mode, snapshot_download
from huggingface_hub.constants import HF_HOME

SETS = {  # name -> dataset of the hub, and its files
    "hpdv2": ("ymhao/HPDv2", "train.json"),
    "hpdv2-animation": ("zhwang/HPDv2", "benchmark/anime.json"),
    "hpdv2-concept-art": ("zhwang/HPDv2", "benchmark/concept-art.json"),
    "hpdv2-painting": ("zhwang/HPDv2", "benchmark/paintings.json"),
    "hpdv2-photo": ("zhwang/HPDv2", "benchmark/photo.json"),
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", "data/train-*.parquet"),
    "pickapic-test": ("yuvalkirstain/pickapic_v1_no_images", "data/test_unique-*.parquet"),
    "partiprompts": ("nateraw/parti-prompts", "PartiPrompts.tsv"),
}
# Sentences of demo/grammar.py: held out or not, and how many.
MADE = {"emoji": (False, None), "emoji-500": (False, 500), "emoji-unseen": (True, 500)}
NAMES = [*SETS, "hpdv2-500", *MADE]
COLUMNS = ("prompt", "caption", "text")  # of tables, in upper or lower case; the first one counts


class UserError(ValueError):
    """What the user can mend: prdp.py prints its sentence alone, other errors with a traceback."""


def load_prompts(sources: str, say: Callable[[str], None]) -> dict[str, list[str]]:
    """The prompts of each set of a list, by its name, or of each file, by its name's stem.

    Files with the same stem have their paths for names. It tells `say` what was read and left out.
    Raises UserError naming --prompts.
    """
    files = list(dict.fromkeys(Path(source) for source in split_list(sources, "--prompts")))
    stems = [Path(file.name.removesuffix(".gz")).stem for file in files]
    prompt_sets = {}
    for file, stem in zip(files, stems, strict=True):
        name = stem if stems.count(stem) == 1 else str(file).replace("/", "-")
        prompt_sets[name], remark = read_prompts(str(file))
        say(remark)
    return prompt_sets


def report_cut(prompts: list[str], tokenizer: Callable, say: Callable[[str], None]) -> None:
    """Tell `say` how many of the prompts the tokenizer's text encoder will not read to the end."""
    sample, limit = prompts[:1000], tokenizer.model_max_length
    cut = [prompt for prompt in sample if len(tokenizer(prompt).input_ids) > limit]
    if cut:
        say(f"{len(cut)} of the first {len(sample)} prompts have over {limit} tokens and are cut "
            f"there, as {textwrap.shorten(cut[0], 80)!r}")


def read_prompts(source: str) -> tuple[list[str], str]:
    """The distinct prompts of a file or a named set in their order, and a sentence on what was
    read and left out. Raises UserError naming --prompts."""
    try:
        lines = read_set(source) if source in NAMES else read_file(Path(source))
        if any("\0" in line for line in lines):
            raise ValueError("it has NUL bytes")
    except Exception as error:  # whatever the hub, the network, the disk or a damaged file raise
        hint = f"; it is not one of the sets {', '.join(NAMES)}" * (not Path(source).exists())
        if source in NAMES:
            hint = f"; elsewhere `python -m prompts.sets {source} FILE` makes a file of them"
        raise UserError(f"--prompts {source} cannot be read ({explain(error)}){hint}") from error
    lines = [line.strip() for line in lines]
    filled = [line for line in lines if 0 < len(line) <= 10_000]  # else encoding takes seconds
    distinct = list(dict.fromkeys(filled))
    if not distinct:
        raise UserError(f"--prompts {source}: there is no prompt in it; write one a line")
    blank = lines.count("")
    said = (f"{source}: {len(distinct)} prompts; left out {blank} blank and "
            f"{len(filled) - len(distinct)} repeated lines")
    if too_long := len(lines) - blank - len(filled):
        said += f", and {too_long} of more than 10,000 characters"
    return distinct, said


def read_file(file: Path) -> list[str]:
    """The lines of a text file, or the prompts of a table, one for each of its rows."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ImportError("it takes pyarrow: pip install pyarrow") from None
        column = find_column(parquet.read_schema(file).names)
        prompts = parquet.read_table(file, columns=[column])[column].to_pylist()
    elif suffix in (".csv", ".tsv", ".json", ".jsonl"):
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if suffix == ".csv":
                rows = list(csv.DictReader(lines))
            elif suffix == ".tsv":  # a quotation mark is part of the prompt
                rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
            else:
                rows = json.load(lines) if suffix == ".json" else list(map(json.loads, lines))
        if not isinstance(rows, list):
            raise ValueError("it is not a list of prompts or of rows")
        column = find_column(rows[0]) if rows and isinstance(rows[0], dict) else None
        prompts = [row.get(column) if column else row for row in rows]
    else:
        return file.read_text("utf-8-sig").removesuffix("\n").split("\n")
    if not all(isinstance(prompt, str | None) for prompt in prompts):
        raise ValueError("some of its prompts are not text")
    return [" ".join((prompt or "").split()) for prompt in prompts]  # a prompt is a line


def find_column(names: list[str]) -> str:
    """The column that holds the prompts."""
    by_name = {name.lower(): name for name in names if name}
    for column in COLUMNS:
        if column in by_name:
            return by_name[column]
    raise ValueError(f"none of its columns is {', '.join(COLUMNS)}, but {', '.join(by_name)}")


def read_set(name: str) -> list[str]:
    """The prompts of a named set; HF_HOME/prdp keeps what was downloaded."""
    if name in MADE:
        from demo.grammar import prompts

        is_held_out, count = MADE[name]
        return prompts(is_held_out)[:count]
    if name == "hpdv2-500":  # as Table 2's prompts that were seen in training
        return random.Random(0).sample(read_set("hpdv2"), 500)
    file = Path(HF_HOME, "prdp", f"{name}.txt")
    with contextlib.suppress(OSError):  # it is not there, or not ours to read
        return file.read_text("utf-8").splitlines()
    prompts = list(dict.fromkeys(filter(None, download(*SETS[name]))))  # keeps the order
    with contextlib.suppress(OSError):  # what cannot be kept is used all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text("\n".join(prompts) + "\n", "utf-8")
        temporary.replace(file)
    return prompts


def download(dataset: str, pattern: str) -> list[str]:
    """All prompts of a dataset's files, as often as they are there."""
    folder = snapshot_download(dataset, repo_type="dataset", allow_patterns=pattern)
    if not (files := sorted(Path(folder).glob(pattern))):
        raise FileNotFoundError(f"{dataset} holds no {pattern}")
    return [prompt for file in files for prompt in read_file(file)]


def split_list(text: str, flag: str) -> list[str]:
    """The items of a flag that takes several, by the csv format's rule: commas separate items, and
    an item that has a comma in it stands in double quotes. Raises UserError for an empty item."""
    try:
        items = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UserError(f"{flag} {text}: its quotes are not clear ({error})") from None
    items = [item.strip() for item in items]
    if not items or "" in items:
        raise UserError(f"{flag} {text}: it has an empty item; commas separate items, and an item "
                        'that has a comma in it stands in "double quotes"')
    return items


def explain(error: BaseException) -> str:
    """One line on why the hub, the network, a disk or a file failed, and what helps.

    The libraries raise errors about missing files from these causes, so it looks for the cause.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for answer in (e.response for e in chain if isinstance(e, errors.HfHubHTTPError)):
        status = f"the hub answers {answer.status_code}"
        if answer.status_code in (401, 403):
            return (f"{status}: it is private or gated, or does not exist; if you may use it, "
                    "run `hf auth login` or set HF_TOKEN")
        if answer.status_code == 404:
            return f"{status}: there is no such repository or file"
        if answer.status_code == 429 or answer.status_code >= 500:
            return f"{status}; try again later"
    if any(isinstance(e, errors.LocalEntryNotFoundError | errors.HTTPError) for e in chain):
        if is_offline_mode():
            return ("HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or point HF_HOME "
                    "to a cache that holds it")
        return ("no connection to the hub; without a network give a local copy, or set "
                "HF_HUB_OFFLINE=1 if the cache, HF_HOME, holds it: else retries take minutes")
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged or has code in it, which is never run"
    of_disk = (e for e in chain if isinstance(e, OSError) and e.errno not in (None, errno.ENOENT))
    error = next(of_disk, error)
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def main() -> None:
    match sys.argv[1:]:
        case [name, target] if name in NAMES:
            try:
                Path(target).write_text("\n".join(read_set(name)) + "\n", "utf-8")
            except Exception as error:
                sys.exit(f"prompts/sets.py: error: {name} cannot be copied ({explain(error)})")
        case _:
            print("usage: python -m prompts.sets NAME FILE, where NAME is one of", *NAMES, sep="\n")
            sys.exit(len(sys.argv) > 2)


if __name__ == "__main__":
    main()
