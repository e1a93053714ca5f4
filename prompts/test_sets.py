"""Prompt files, tables and named sets, lists in flags, and the explanation of errors."""

import errno
import gzip
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
    for name in ("a/two.txt", "a/b/two.txt", "a-b/two.txt", "b/two.csv", "b/one.txt", "hpdv2.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"prompt\n{name}\n" if name.endswith("csv") else name)
    said = []
    files = ["a/two.txt", "a/b/two.txt", "a-b/two.txt", "b/two.csv"]
    sets = load_prompts(f"{', '.join(files)},./a/two.txt,b/one.txt", said.append)
    assert sets == {file.replace("/", "%2F"): [file] for file in files} | {"one": ["b/one.txt"]}
    assert [line.split(":")[0] for line in said] == [*files, "b/one.txt"]
    monkeypatch.setattr(prompts.sets, "read_set", lambda name: [name])
    assert list(load_prompts("hpdv2,hpdv2.txt", print)) == ["hpdv2", "hpdv2.txt"]


CAT = 'a "red" cat, old'  # and "dog" are the prompts of each of these
TABLES = {
    "a.csv": 'id,Prompt,text\n1," a ""red"" cat,\nold ",x\n2,dog,\n3,,\n4,dog,\n',
    "semicolon.csv": f"id;prompt\n1;{CAT}\n2;dog\n",
    "space.csv": 'id, prompt\r\n1, "a ""red"" cat, old"\r\n2, dog\r\n',
    "bar.csv": f"Captions|id\n{CAT}|1\ndog|2\n",
    "tab.CSV": f"id\tprompt\n1\t{CAT}\n2\tdog\n",
    "a.tsv": f"Caption\tid\n{CAT}\t1\ndog\t2\n",
    "alone.tsv": f"text\n{CAT}\ndog\n",
    "a.json": '[{"text": "a \\"red\\" cat,\\nold", "id": 1}, {"text": "dog"}, {"text": null}]',
    "texts.json": '["a \\"red\\" cat, old", "dog"]',
    "object.json": '{"id": 1, "prompts": ["a \\"red\\" cat, old", "dog"]}',
    "rows.json": '{"prompts": [{"prompt": "a \\"red\\" cat, old"}, {"prompt": "dog"}]}',
    "lists.json": '[{"text": ["a \\"red\\" cat, old"]}, {"text": ["dog"]}, {"text": []}]',
    "mixed.json": '["a \\"red\\" cat, old", null, {"prompt": "dog"}]',
    "lines.json": '{\n"text": "a \\"red\\" cat, old"},\n{"text": "dog"},',
    "a.jsonl": '{"PROMPT": "a \\"red\\" cat, old"}\n{"prompt": "dog"}\n',
    "empty_lines.jsonl": '\n"a \\"red\\" cat, old"\r\n \r\n"dog"\n\n',
    "a.ndjson": '{"text": "x"}\n{"prompt": "a \\"red\\" cat, old", "text": "y"}\n{"prompt": "dog"}',
}
NO_PROMPTS = {"missing.txt": (None, "there is no|No such file"),
              "empty.txt": ("\n \n", "there is no prompt in it; write one a line"),
              "nul.txt": ("a\0b", "NUL"),
              "a.csv": ("id,title\n1,cat\n",
                        "no column is named prompt, caption, text, but id, title"),
              "b.csv": ("prompt\n", "there is no prompt in it"),
              "comma.csv": ("prompt\ndog\na red cat, old\n", "line 3 has more fields.*quotes"),
              "quote.csv": ('prompt\n"cat\ndog\n', "unexpected end of data"),
              "a.jsonl": ('{"prompt": {"x": 1}}\n', "no column is named .* but x"),
              "number.jsonl": ('"a"\n1\n', "not text"), "a.json": ('{"0": "a"}', "no column"),
              "b.json": ("[1, 2", "JSONDecodeError"),
              "a.parquet": ("no table", "cannot be read"), "a.txt.gz": ("no zip", "gzip"),
              "a.yaml": ("- a cat\n", "its name ends in .yaml; write one prompt a line in a .txt"),
              "a.md": ("a cat\n", "its name ends in .md; .* a table in a .csv"),
              "csv.txt": ("id,prompt\n1,a\n", "name it .csv"),
              "tsv.txt": ("1\ta\n", "name it .csv"),
              "head.txt": ("Prompt\na cat\n", "its first line looks like a table's"),
              "quoted.csv": ("prompt\n['a']\n['b']\n", "looks like JSON")}
LISTS = ("- a cat\n- a dog", "1. a cat\n2. a dog", "* a cat\n* a dog", "(1) a cat\n(2) a dog",
         "Some prompts:\n\n\u2022 a cat\n\u2022 a dog", "Prompt 1: a cat\nPrompt 2: a dog",
         '{"prompt": "a cat"}\n{"prompt": "a dog"}', '"a cat",\n"a dog"', "['a cat', 'a dog']",
         '[\n  {\n    "id": 1,\n    "text": "a cat"\n  }\n]', "prompts:\n  - a cat\n  - a dog",
         "| prompt | n |\n|---|---|\n| a cat | 1 |", "a) a cat\nb) a dog",
         "- text: a cat\n  seed: 1", "<li>a cat</li>\n<li>a dog</li>")


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_prompts_are_the_column_of_that_name(tmp_path, name):
    (tmp_path / name).write_text(TABLES[name])
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for file in (tmp_path / name, packed):
        assert read_prompts(str(file))[0] == [CAT, "dog"]


def test_rows_without_the_column_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": 2, "prompt": "cat"}\n{"text": "x"}\n')
    read, said = read_prompts(str(tmp_path / "a.jsonl"))
    assert read == ["cat"] and "left out 2 blank" in said


def test_a_parquet_tables_prompts_may_be_lists(tmp_path):
    table = pyarrow.table({"image": [b"", b""], "Captions": [["cat", "dog"], ["bat"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet"))[0] == ["cat", "dog", "bat"]


@pytest.mark.parametrize("text", LISTS)
def test_text_that_is_a_list_or_json_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match="a.txt: .* looks like JSON or an item of a list; name"):
        read_prompts(str(tmp_path / "a.txt"))


def test_prompts_with_digits_brackets_and_quotes_are_read(tmp_path):
    lines = ["2 cats on a sofa", "3D render", "(masterpiece), 1girl, text", "<cat-toy> on a beach",
             "16:9 photo, caption", '"Hello" on a sign', "a well-lit - but small - room", "- a cat"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert read_prompts(str(tmp_path / "a.txt"))[0] == lines


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
    lines = (" ".join(line.split()) for line in text.split("\n"))
    assert read == list(dict.fromkeys(filter(None, lines)))


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


@pytest.mark.parametrize("arguments, code", [("", 0), ("--help", 0), ("hpdv2", 1), ("a b", 1)])
def test_what_is_no_copy_prints_the_sets_and_fails_if_one_was_meant(monkeypatch, capsys, arguments,
                                                                    code):
    monkeypatch.setattr(sys, "argv", ["sets.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        prompts.sets.main()
    assert end.value.code == code and "\nhpdv2\n" in capsys.readouterr().out


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
