"""Prompt files, tables and named sets, lists in flags, and the explanation of errors."""

import errno
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here must be missed at once
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prompts.sets
from prompts.sets import explain, load_prompts, read_prompts, split_list


def test_prompts_are_distinct_lines_in_order_and_what_is_left_out_is_said(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\ufeffcat\n\n  dog  \ncat\n   \nbat\n" + "x" * 10_001, "utf-8")
    read, said = read_prompts(str(file))
    assert read == ["cat", "dog", "bat"]
    assert said == (f"{file}: 3 prompts; left out 2 blank and 1 repeated lines, "
                    "and 1 of more than 10,000 characters")
    animals = read_prompts(str(Path(__file__).parent / "animals.txt"))[0]
    assert len(animals) == 45 and animals[1] == "A painting of a dog"


def test_two_files_of_one_name_are_two_sets_named_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/two.txt", "b/two.txt", "b/two.csv", "b/one.txt", "hpdv2.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"prompt\n{name}\n" if name.endswith("csv") else name)
    said = []
    sets = load_prompts("a/two.txt, b/two.txt, ./a/two.txt,b/two.csv,b/one.txt", said.append)
    assert sets == {"a-two.txt": ["a/two.txt"], "b-two.txt": ["b/two.txt"],
                    "b-two.csv": ["b/two.csv"], "one": ["b/one.txt"]}
    assert [line.split(":")[0] for line in said] == ["a/two.txt", "b/two.txt", "b/two.csv",
                                                     "b/one.txt"]
    monkeypatch.setattr(prompts.sets, "read_set", lambda name: [name])
    assert list(load_prompts("hpdv2,hpdv2.txt", print)) == ["hpdv2", "hpdv2.txt"]


TABLES = {
    "a.csv": 'id,Prompt,text\n1," a ""red"" cat,\nold ",x\n2,dog,\n3,,\n4,dog,\n',
    "a.tsv": 'Caption\tid\na "red" cat, old\t1\ndog\t2\n',
    "a.json": '[{"text": "a \\"red\\" cat,\\nold", "id": 1}, {"text": "dog"}, {"text": null}]',
    "b.json": '["a \\"red\\" cat, old", "dog"]',
    "a.jsonl": '{"PROMPT": "a \\"red\\" cat, old"}\n{"PROMPT": "dog"}\n',
}
NO_PROMPTS = {"missing.txt": (None, "there is no|No such file"),
              "empty.txt": ("\n \n", "there is no prompt in it; write one a line"),
              "nul.txt": ("a\0b", "NUL"),
              "a.csv": ("id,title\n1,cat\n",
                        "none of its columns is prompt, caption, text, but id, title"),
              "b.csv": ("prompt\n", "there is no prompt in it"),
              "a.jsonl": ('{"prompt": {"x": 1}}\n', "not text"),
              "a.json": ('{"prompt": "a"}', "not a list"), "b.json": ("[1, 2", "JSONDecodeError"),
              "a.parquet": ("no table", "cannot be read")}


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_prompts_are_the_column_of_that_name(tmp_path, name):
    (tmp_path / name).write_text(TABLES[name])
    assert read_prompts(str(tmp_path / name))[0] == ['a "red" cat, old', "dog"]


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_a_file_without_prompts_is_refused_in_a_sentence(tmp_path, name):
    content, message = NO_PROMPTS[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^--prompts .*{name}.*{message}") as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert ("one of the sets hpdv2" in str(error.value)) is (content is None)


@settings(deadline=None, max_examples=500, database=None)
@given(st.binary(max_size=60) | st.text("ab \n\r\t\0\u2028\ufeff", max_size=40).map(str.encode))
def test_a_prompt_file_of_any_bytes_is_read_or_refused_in_a_sentence(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(content)
    try:
        read, _ = read_prompts(str(file))
    except ValueError as error:
        assert str(error).startswith("--prompts ") and "\n" not in str(error)
        return
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    assert read == list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))


def test_named_sets_are_read_from_the_files_that_the_hub_has(tmp_path, monkeypatch):
    """Files in the formats of the datasets, in place of those."""
    hub = tmp_path / "hub"
    for folder in ("benchmark", "data"):
        (hub / folder).mkdir(parents=True)
    train = [{"prompt": f"p{i // 2}", "image_path": ["a.jpg"]} for i in range(1200)]
    train[0] = {"prompt": "  two\n lines "}
    (hub / "train.json").write_text(json.dumps(train))
    (hub / "benchmark/paintings.json").write_text(json.dumps(["ä", "", "b", "ä"]))
    (hub / "PartiPrompts.tsv").write_text('Prompt\tCategory\n"A" sign\tArts\na "b"\t\n')
    for part, captions in enumerate((["x", "y"], ["y", "z"])):
        table = pyarrow.table({"jpg": [b"", b""], "caption": captions})
        pyarrow.parquet.write_table(table, hub / f"data/train-0000{part}-of-00002-f00.parquet")
    asked = []
    monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts.sets, "snapshot_download",
                        lambda dataset, **options: asked.append((dataset, options)) or str(hub))

    hpdv2 = read_prompts("hpdv2")[0]
    assert hpdv2 == ["two lines", *(f"p{i}" for i in range(600))]
    assert read_prompts("hpdv2-painting")[0] == ["ä", "b"]
    assert read_prompts("partiprompts")[0] == ['"A" sign', 'a "b"']
    assert read_prompts("pickapic")[0] == ["x", "y", "z"]
    options = dict(repo_type="dataset", allow_patterns="train.json")
    assert len(asked) == 4 and asked[0] == ("ymhao/HPDv2", options)
    assert read_prompts("hpdv2-500")[0] == random.Random(0).sample(hpdv2, 500)
    assert read_prompts("hpdv2")[0] == hpdv2 and len(asked) == 4  # kept

    monkeypatch.setattr(sys, "argv", ["sets.py", "hpdv2-painting", str(tmp_path / "copy.txt")])
    prompts.sets.main()
    assert read_prompts(str(tmp_path / "copy.txt"))[0] == ["ä", "b"]
    with pytest.raises(ValueError, match="hpdv2-animation .*no benchmark/anime.json"):
        read_prompts("hpdv2-animation")


def test_a_set_that_cannot_be_kept_is_read_and_copied_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/photo.json").write_text('["a", "b"]')
    monkeypatch.setattr(prompts.sets, "snapshot_download", lambda *args, **options: str(tmp_path))

    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for broken in ("mkdir", "read_text", "write_text", "replace"):
        monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / broken))
        with monkeypatch.context() as patched:
            patched.setattr(Path, broken, refuse)
            assert read_prompts("hpdv2-photo")[0] == ["a", "b"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(prompts.sets, "HF_HOME", str(tmp_path / "file"))  # so no folder is made
    monkeypatch.setattr(sys, "argv", ["sets.py", "hpdv2-photo", str(tmp_path / "copy.txt")])
    prompts.sets.main()
    assert (tmp_path / "copy.txt").read_text() == "a\nb\n"


def test_commas_separate_a_flags_items_and_quotes_keep_them():
    assert split_list(' a, "b, c=2","d""e"', "--reward") == ["a", "b, c=2", 'd"e']
    for text in ("", " ", ",", "a,", 'a,"b', '"a"b'):
        with pytest.raises(ValueError):
            split_list(text, "--reward")


def test_an_error_is_explained_by_its_cause_in_one_line_of_300_characters():
    def raised(outer, cause):
        try:
            try:
                raise cause
            except Exception as error:
                raise outer from error
        except Exception as error:
            return error

    full = OSError(errno.ENOSPC, "No space left on device", "/cache/weights")
    assert "No space left on device: '/cache/weights'" in explain(raised(OSError("missing"), full))
    assert explain(raised(ValueError("mine"), FileNotFoundError(2, "x"))) == "ValueError: mine"
    long = explain(ValueError("a line\n" * 1000))
    assert long.startswith("ValueError: a line a line") and len(long) == 300
