from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_distill.data import DataConfig
from hf_distill.data.collect import collect
from hf_distill.data.sources import find_files, hub_id
from hf_distill.errors import InputError


def gather(folder: Path, train: str | list[str], **options: Any) -> tuple[list[Any], str]:
    config = DataConfig(train=train, **options)
    rows, name, _ = collect(config, train, config.split, folder / "cache")
    return list(rows), name


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("line", ["one", "", "two", "three"]),
        ("paragraph", ["one", "two\nthree\n"]),
        ("document", ["one\n\ntwo\nthree\n"]),
    ],
)
def test_plain_text_by_line_paragraph_and_document(
    tmp_path: Path, rows: str, expected: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    found, name = gather(tmp_path, str(tmp_path / "a.txt"), rows=rows)
    assert name == "text"
    assert [row["text"] for row in found] == expected


@pytest.mark.parametrize(("suffix", "opener"), [("gz", gzip), ("xz", lzma), ("bz2", bz2)])
def test_compressed_files(tmp_path: Path, suffix: str, opener: Any) -> None:
    with opener.open(tmp_path / f"a.txt.{suffix}", "wt", encoding="utf-8") as stream:
        stream.write("été\nsecond\n")
    with opener.open(tmp_path / f"b.jsonl.{suffix}", "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": "third", "label": 3}) + "\n")
    found, _ = gather(tmp_path, [str(tmp_path / "*")])
    assert found == [{"text": "été"}, {"text": "second"}, {"text": "third"}]


def test_tables_and_column_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('document,summary,id\n"long, long",short,7\n')
    (tmp_path / "b.tsv").write_text("document\tsummary\nmore\tless\n")
    datasets.Dataset.from_dict({"document": ["last"], "summary": ["end"]}).to_parquet(
        tmp_path / "c.parquet"
    )
    files = [str(tmp_path / name) for name in ("a.csv", "b.tsv", "c.parquet")]
    found, name = gather(tmp_path, files, prompt_column="document", completion_column="summary")
    assert name == "prompt_completion"
    assert [row["prompt"] for row in found] == ["long, long", "more", "last"]
    assert [row["completion"] for row in found] == ["short", "less", "end"]
    with pytest.raises(InputError, match=r"columns document, summary, id but not .*text_column"):
        gather(tmp_path, str(tmp_path / "a.csv"))


def test_chat_is_recognised_before_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x", "messages": messages}]))
    assert gather(tmp_path, str(tmp_path / "a.json")) == ([{"messages": messages}], "chat")
    assert gather(tmp_path, str(tmp_path / "a.json"), format="text") == ([{"text": "x"}], "text")
    (tmp_path / "b.jsonl").write_text('{"messages": "hi"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl: messages must be a list"):
        gather(tmp_path, str(tmp_path / "b.jsonl"))


def test_places(tmp_path: Path) -> None:
    for name in ("deep/er/a.py", "deep/test/b.py", "c[1].txt", "deep/d.bin", "deep/empty.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)

    def names(place: str, *exclude: str) -> list[str]:
        files = find_files([str(tmp_path / place)], exclude)
        return [file.relative_to(tmp_path).as_posix() for file in files]

    assert names("**/*.py") == ["deep/er/a.py", "deep/test/b.py"]
    assert names("**/*.py", "test/*") == ["deep/er/a.py"]
    assert names("deep") == ["deep/er/a.py", "deep/test/b.py"]
    assert names("c[1].txt") == ["c[1].txt"]
    assert len(find_files([str(tmp_path / "deep"), str(tmp_path / "**")], [])) == 4
    standard = find_files(["{stdlib}/json/*.py"], ["{stdlib}/json/tool.py"])
    assert {file.name for file in standard} >= {"decoder.py", "encoder.py"}
    assert "tool.py" not in {file.name for file in standard}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone\.txt' does not exist"),
        ("gone*.txt", None, r"gone\*\.txt' matches no file"),
        ("empty.txt", b"", r"empty\.txt' is empty"),
        ("blank.jsonl", b"\n", r"blank\.jsonl"),
        ("latin.txt", "café au lait".encode("latin-1"), r"latin\.txt is not UTF-8 text"),
        ("cut.txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-9], r"cut\.txt\.gz cannot be read"),
        ("cut.txt.xz", lzma.compress(b"abc" * 999)[:-40], r"cut\.txt\.xz cannot be read"),
        ("plain.txt.gz", b"not compressed", r"plain\.txt\.gz cannot be read"),
        ("half.jsonl", b'{"text": "a"}\n{"text": ', r"half\.jsonl cannot be read as json"),
        ("fake.parquet", b"PAR1", r"fake\.parquet cannot be read as parquet"),
        ("number.csv", b"text\n3\n", r"number\.csv: column 'text' holds int64, not text"),
    ],
)
def test_bad_files_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    (tmp_path / "good.txt").write_text("fine\n")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    logging.getLogger("datasets").addHandler(handler)
    try:
        with pytest.raises(InputError, match=message) as caught:
            gather(tmp_path, [str(tmp_path / "good.txt"), str(tmp_path / name)])
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert "\n" not in str(caught.value)
    assert not records


def test_names_with_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "c[1].txt").write_text("bracketed\n")
    (tmp_path / "c1.txt").write_text("plain\n")
    assert gather(tmp_path, str(tmp_path / "c[1].txt"))[0] == [{"text": "bracketed"}]


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(InputError, match=r"text \(.*a\.txt\), prompt_completion \(.*b\.jsonl\)"):
        gather(tmp_path, str(tmp_path / "*"))


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(["Salesforce/wikitext"]) == "Salesforce/wikitext"
    assert hub_id(["imdb"]) == "imdb"
    for place in (
        "here",
        "./imdb",
        "a/b/c",
        "corpus.txt",
        "data/*.txt",
        "data/x.jsonl.gz",
        "/imdb",
    ):
        assert hub_id([place]) is None
    assert hub_id(["imdb", "squad"]) is None


def test_hub_offline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'Salesforce/wikitext' .* cannot be loaded from the Hub"):
        gather(tmp_path, "Salesforce/wikitext", subset="wikitext-2-raw-v1")


def test_hub_subset_split_and_revision_reach_load_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs["split"], kwargs["revision"]))
        return datasets.Dataset.from_dict({"text": ["row"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"subset": "small", "split": "validation[:10]", "revision": "abc"}
    found, _ = gather(tmp_path, "owner/corpus", **options)
    assert found == [{"text": "row"}]
    assert asked == [(("owner/corpus", "small"), "validation[:10]", "abc")]
