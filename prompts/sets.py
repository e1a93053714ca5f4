"""Prompts: files, and sets by name, most of them from the Hugging Face hub (`--prompts hpdv2`).

    python -m prompts.sets                   # the names
    python -m prompts.sets hpdv2 hpdv2.txt   # a copy for machines without a network

hpdv2            HPDv2's training prompts, as in the paper; ymhao/HPDv2, Apache-2.0
hpdv2-500        500 of them, drawn at random
hpdv2-animation  HPDv2's benchmark, 800 prompts; zhwang/HPDv2, Apache-2.0. Its other styles are
                 hpdv2-concept-art, hpdv2-painting and hpdv2-photo
pickapic         Pick-a-Pic v1's training captions, as in the paper; some are not safe for work;
                 yuvalkirstain/pickapic_v1_no_images, MIT
pickapic-test    those of its unique test
partiprompts     PartiPrompts, 1,632; nateraw/parti-prompts, Apache-2.0
emoji            more than 100,000 sentences of the demo's world, made by demo/grammar.py
emoji-500        500 of them
emoji-unseen     500 others; neither the demo's base model nor PRDP trains on their combinations

The hub's are huggingface.co/datasets/ID. They are not filtered, so they are not part of this
repository, but fetched at first use and kept in HF_HOME/prdp. Licences are as far as we know them.

A text file (.txt) has one prompt a line: animals.txt has the paper's 45, unseen.txt 120 of ours in
HPDv2's four styles. A table (.csv, .tsv, .json, .jsonl, .ndjson, .parquet) is read by its column
prompt, caption or text. The first line of a .csv names the columns and shows the separator: comma,
semicolon, | or tab. A prompt with the separator in it stands in double quotes. In a .tsv, quotes
are part of the prompt. Files are UTF-8 and may be packed (.gz). A file is refused if half of its
prompts look like JSON or like items of a list ("- a cat"), because the marks would be trained on.

The rule for lists in flags and the explanation of what the hub raises are here too, because
--prompts, --reward and --model share them.
"""

import contextlib
import csv
import errno
import gzip
import io
import json
import os
import pickle
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from urllib.parse import quote

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
COLUMNS = ("prompt", "caption", "text")  # or plurals, or capitals; the first that is there counts
# Of lists and JSON: [a], {a, • a, | a, - a, 1. a, a) a, <a>, "a", 'a': and text: a.
MARKED = re.compile(r"""[][{}•|] | [-*+–]\s | \(?\d+\s?[-.):|]\s | [a-z]\)\s | <.*>$ |
    ("[^"]*"|'[^']*')\s*([,:]|$) | (prompt|caption|text)s?(\s\d+)?:""", re.I | re.X)


class UserError(ValueError):
    """What the user can mend: prdp.py prints its sentence alone, other errors with a traceback."""


def load_prompts(sources: str, say: Callable[[str], None]) -> dict[str, list[str]]:
    """The prompts of each set of a list, by its name, or of each file, by its name's stem.

    Files with the same stem have their paths for names, "/" as %2F. It tells `say` what was read
    and left out. Raises UserError naming --prompts.
    """
    files = list(dict.fromkeys(Path(source) for source in split_list(sources, "--prompts")))
    stems = [Path(file.name.removesuffix(".gz")).stem for file in files]
    prompt_sets = {}
    for file, stem in zip(files, stems, strict=True):
        name = stem if stems.count(stem) == 1 else quote(str(file), safe="")
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
        hint = f"; it is not one of the sets {', '.join(NAMES)}" * (not os.path.exists(source))
        if source in NAMES:
            hint = f"; elsewhere `python -m prompts.sets {source} FILE` makes a file of them"
        raise UserError(f"--prompts {source} cannot be read ({explain(error)}){hint}") from error
    filled = [line for line in lines if 0 < len(line) <= 10_000]  # else encoding takes seconds
    distinct = list(dict.fromkeys(filled))
    if not distinct:
        raise UserError(f"--prompts {source}: there is no prompt in it; write one a line")
    marked = list(filter(MARKED.match, distinct))
    if 2 * len(marked) >= len(distinct):
        raise UserError(f"--prompts {source}: {textwrap.shorten(marked[0], 60)!r} looks like JSON "
                        "or an item of a list; name JSON .json, or leave the marks out")
    blank = lines.count("")
    said = (f"{source}: {len(distinct)} prompts; left out {blank} blank and "
            f"{len(filled) - len(distinct)} repeated lines")
    if too_long := len(lines) - blank - len(filled):
        said += f", and {too_long} of more than 10,000 characters"
    return distinct, said


def read_file(file: Path) -> list[str]:
    """The prompts of a text file or of a table, each as one line."""
    opener, name = (gzip.open, file.stem) if file.suffix.lower() == ".gz" else (open, file.name)
    suffix = Path(name).suffix.lower()
    with opener(file, "rb") as binary:
        if suffix == ".parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(binary)
            rows = table.read(find_columns(table.schema_arrow.names)).to_pylist()
        elif suffix in READERS:
            rows = READERS[suffix](io.TextIOWrapper(binary, "utf-8-sig").read())
        else:
            raise ValueError(f"its name ends in {suffix}; write one prompt a line in a .txt file, "
                             "or a table in a .csv, .tsv, .json, .jsonl or .parquet file")
    return find_prompts(rows)


def read_text(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    if {*COLUMNS} & set(re.split("[,;|\t]", lines[0].lower())) or "\t" in lines[0].strip():
        raise ValueError("its first line looks like a table's: name it .csv or .tsv")
    return lines


def read_csv(text: str, separators=",;|\t", quoting=csv.QUOTE_MINIMAL) -> list[dict]:
    separator = max(separators, key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, quoting=quoting, strict=True,
                            skipinitialspace=True)
    rows = []
    for row in reader:
        if any(row.pop(None, ())):  # the fields without a name
            raise ValueError(f"line {reader.line_num} has more fields than the first line; in a "
                             ".csv, double quotes hold a prompt that has the separator in it")
        rows.append(row)
    return rows


def read_json(text: str) -> list:
    """JSON values that follow each other: a list, or rows with or without empty lines."""
    text, position, values = text.strip(), 0, []
    while position < len(text):
        value, position = json.JSONDecoder().raw_decode(text, position)
        position = re.compile(r"[\s,]*").match(text, position).end()
        values.append(value)
    return values


READERS = {"": read_text, ".txt": read_text, ".csv": read_csv,
           ".tsv": partial(read_csv, separators="\t", quoting=csv.QUOTE_NONE),
           ".json": read_json, ".jsonl": read_json, ".ndjson": read_json}


def find_prompts(rows: list) -> list[str]:
    """The texts in a list whose items are texts, lists of the same kind, or rows with columns."""
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    columns = find_columns(names) if names else []
    prompts = []
    for row in rows:
        if isinstance(row, dict):
            row = [row[name] for name in columns if name in row] or None
        if isinstance(row, list):
            prompts += find_prompts(row)
        elif isinstance(row, str | None):
            prompts.append(" ".join((row or "").split()))
        else:
            raise ValueError("some of its prompts are not text")
    return prompts


def find_columns(names: Iterable[str]) -> list[str]:
    """The name of the prompts' column, and its other spellings, as rows may differ in them."""
    for column in COLUMNS:
        if found := [name for name in names if name.strip().lower() in (column, f"{column}s")]:
            return found
    raise ValueError(f"no column is named {', '.join(COLUMNS)}, but {', '.join(names)}")


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

    Libraries often say that a file is missing where the network or the disk failed. So this looks
    through the causes of the error.
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
            sys.exit(sys.argv[1:] not in ([], ["-h"], ["--help"]))


if __name__ == "__main__":
    main()
