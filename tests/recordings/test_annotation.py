"""Annotation: the teacher's texts and their scores, resume, forms of rows, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from distributed import launch
from writing_setup import CAUSAL, ENCODER_DECODER, spaced_words, tokenizer, writer

from hf_distill import InputError, annotate
from hf_distill.models.generation import Generator
from hf_distill.recordings import shards

WORDS = ["dog", "row", "man", "print", "fox", "wife", "add", "jumps", "over", "want"]
DOCUMENTS = Dataset.from_dict(
    {
        "document": [" ".join(WORDS[i:] + WORDS[: i % 4])[: 5 + 3 * i] for i in range(10)],
        "summary": [f"original {i}" for i in range(10)],
        "id": list(range(10)),
    }
)
DRAWN = {"do_sample": True, "max_new_tokens": 6}


def made(kind: str, folder: Path, rows: Any = DOCUMENTS, **options: Any) -> Dataset:
    options = {"tokenizer": tokenizer(ends=kind in ENCODER_DECODER), "shard_rows": 3} | options
    options.setdefault("generation", {"max_new_tokens": 6})
    return annotate(rows, options.pop("teacher", None) or writer(kind), folder, **options)


def by_loops(kind: str, text: str, tokens: int) -> tuple[str, float, list[int]]:
    """Greedy text, the sum of its log-probabilities, and its ids, made token by token."""
    model = writer(kind).double()
    ids = tokenizer(ends=kind in ENCODER_DECODER)(text)["input_ids"]
    written: list[int] = []
    total = 0.0
    while len(written) < tokens and written[-1:] != [0]:
        if kind in ENCODER_DECODER:
            start = torch.tensor([[model.config.decoder_start_token_id, *written]])
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits
        else:
            logits = model(input_ids=torch.tensor([[*ids, *written]])).logits
        p = logits[0, -1].exp() / logits[0, -1].exp().sum()
        written.append(int(p.argmax()))
        total += math.log(p.max())
    return tokenizer().decode(written, skip_special_tokens=True), total, written


@pytest.mark.parametrize("kind", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_greedy_texts_and_their_scores(kind: str, tmp_path: Path) -> None:
    found = made(kind, tmp_path, prefix="say ")
    assert found["id"] == DOCUMENTS["id"]
    assert found["document"] == DOCUMENTS["document"]
    for row in found:
        text, total, ids = by_loops(kind, f"say {row['document']}", 6)
        assert row["summary"] == text
        assert row["teacher_log_prob"] == pytest.approx(total, abs=1e-4)
        assert row["teacher_mean_log_prob"] == pytest.approx(total / len(ids), abs=1e-4)
        assert row["teacher_finished"] == (ids[-1] == 0)
    assert len(set(found["summary"])) > 3
    if kind == "bart":
        assert len(set(found["teacher_finished"])) == 2


def test_beams_are_ordered_and_scored_without_length_penalty(tmp_path: Path) -> None:
    """Three beams a row stand together; their sums are those of a second forward."""
    generation = {"num_beams": 3, "max_new_tokens": 4, "length_penalty": 0.0}
    found = made("t5", tmp_path, n=3, generation=generation)
    assert found["id"] == [i for i in range(10) for _ in range(3)]
    model = writer("t5")
    for at in range(0, 30, 3):
        ids = torch.tensor([tokenizer()(found[at]["document"])["input_ids"]])
        beams = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=3, output_scores=True,
            return_dict_in_generate=True, **generation,
        )  # fmt: skip
        texts = tokenizer().batch_decode(beams.sequences, skip_special_tokens=True)
        assert found[at : at + 3]["summary"] == texts
        scores = found[at : at + 3]["teacher_log_prob"]
        assert scores == pytest.approx(beams.sequences_scores.tolist(), abs=1e-4)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_draw_depends_on_its_row_and_the_seed_only(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"generation": DRAWN, "n": 2}
    found = made(kind, tmp_path / "a", **options)
    other = made(kind, tmp_path / "b", batch_size=3, shard_rows=10, **options)
    assert found["summary"] == other["summary"]
    assert found["teacher_log_prob"] == pytest.approx(other["teacher_log_prob"], abs=1e-4)
    assert any(found[at]["summary"] != found[at + 1]["summary"] for at in range(0, 20, 2))
    assert made(kind, tmp_path / "c", seed=1, **options)["summary"] != found["summary"]


def test_draws_follow_the_distribution() -> None:
    """First tokens of 2000 draws against softmax(logits / T) over the k likeliest, in total
    variation; the expected distance of so many draws is about 0.03."""
    model, ids = writer("gpt2"), [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] / 1.5
    top = logits.topk(8)
    wanted = torch.zeros(300).scatter(0, top.indices, top.values.softmax(-1))
    settings = {"do_sample": True, "max_new_tokens": 1, "temperature": 1.5, "top_k": 8}
    generator = Generator(model, settings, pad_token_id=1, n=2000)
    drawn = [text.ids[0] for text in generator.write([ids], [range(2000)])[0]]
    share = torch.bincount(torch.tensor(drawn), minlength=300) / 2000
    assert (share - wanted).abs().sum() / 2 < 0.06


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_teachers_own_settings_of_sampling_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = writer("t5")
    config: Any = teacher.generation_config
    config.update(do_sample=True, top_k=50, temperature=1.0, top_p=0.9)
    for settings, expected in (
        ({}, "sets do_sample=True, top_k=50, top_p=0.9; generation={...} overrides it"),
        ({"do_sample": True, "top_k": 0}, "sets top_p=0.9; gen"),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, None),
        ({"do_sample": False}, None),
    ):
        folder = tmp_path / str(len(settings)) / str(expected)[:4]
        made("t5", folder, teacher=teacher, generation={"max_new_tokens": 2, **settings})
        told = capsys.readouterr().out
        assert (expected in told) if expected else ("sampling:" not in told)


@pytest.mark.parametrize("generation", [{"max_new_tokens": 4}, DRAWN])
def test_resumed_after_a_kill_at_any_instant(
    generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each renaming and each flush, and started again after each: the same files."""
    whole = made("gpt2", tmp_path / "whole", generation=generation)
    folder, kills = tmp_path / "killed", 0
    replace, fsync, steps_left = Path.replace, shards.os.fsync, 0

    def step() -> None:
        nonlocal steps_left
        steps_left -= 1
        if steps_left < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", lambda path, to: step() or replace(path, to))
    monkeypatch.setattr(shards.os, "fsync", lambda handle: step() or fsync(handle))
    for steps in [1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 99]:
        steps_left = steps
        try:
            resumed = made("gpt2", folder, generation=generation)
        except KeyboardInterrupt:
            kills += 1
            assert not (folder / "annotation.json").exists()
    assert kills >= 6
    assert resumed.to_list() == whole.to_list()
    assert files(folder) == files(tmp_path / "whole")


def test_finished_shards_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made("gpt2", tmp_path)
    (tmp_path / "shard-000002.arrow").unlink()
    rows = []
    write = Generator.write
    monkeypatch.setattr(
        Generator, "write", lambda self, ids, seeds: rows.extend(ids) or write(self, ids, seeds)
    )
    assert made("gpt2", tmp_path).to_list() == whole.to_list()
    assert len(rows) == 3


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    launch("annotation_worker.py", str(tmp_path / "two"))
    alone = made("t5", tmp_path / "one", generation=DRAWN)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(alone) == 10


# ---- Forms of rows ----


def test_the_original_targets_may_stay(tmp_path: Path) -> None:
    replaced = made("t5", tmp_path / "a")
    beside = made("t5", tmp_path / "b", keep_targets=True)
    assert beside["summary"] == DOCUMENTS["summary"]
    assert beside["teacher_text"] == replaced["summary"]
    assert replaced.column_names == [
        *DOCUMENTS.column_names, "teacher_log_prob", "teacher_mean_log_prob", "teacher_finished",
    ]  # fmt: skip


def test_targets_may_be_missing(tmp_path: Path) -> None:
    """A column of nulls, as rows without labels have it."""
    rows = DOCUMENTS.remove_columns("summary").add_column("summary", [None] * 10)
    wanted = made("t5", tmp_path / "b")["summary"]
    assert made("t5", tmp_path / "a", rows)["summary"] == wanted
    rows = Dataset.from_dict({"body": DOCUMENTS["document"]})
    found = made("t5", tmp_path / "c", rows, columns={"source": "body"})
    assert found["target"] == wanted


def test_translations_and_columns_that_are_told(tmp_path: Path) -> None:
    pairs = [{"en": text, "es": "x"} for text in DOCUMENTS["document"]]
    rows = Dataset.from_dict({"translation": pairs})
    columns = {"source": "translation.en", "target": "translation.es"}
    found = made("marian", tmp_path / "a", rows, columns=columns)
    wanted = made("marian", tmp_path / "b")
    assert [row["es"] for row in found["translation"]] == wanted["summary"]
    assert [row["en"] for row in found["translation"]] == DOCUMENTS["document"]
    with pytest.raises(InputError, match="does not state the direction"):
        made("marian", tmp_path / "c", rows)


def test_prompts_and_text_get_completions(tmp_path: Path) -> None:
    wanted = made("gpt2", tmp_path / "a")["summary"]
    for name in ("prompt", "text"):
        rows = DOCUMENTS.select_columns("document").rename_column("document", name)
        found = made("gpt2", tmp_path / name, rows)
        assert found["completion"] == wanted
        assert found[name] == DOCUMENTS["document"]
    alone = made("gpt2", tmp_path / "alone", DOCUMENTS.select_columns("document"))
    assert alone["summary"] == wanted
    stream = IterableDataset.from_generator(lambda: iter(DOCUMENTS.to_list()))
    assert made("gpt2", tmp_path / "s", stream)["summary"] == wanted


def test_a_completion_begins_with_its_space(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["w5", "w6 w7"]})
    found = made("llama", tmp_path, rows, tokenizer=spaced_words())
    assert all(text.startswith(" w") for text in found["completion"])


def test_conversations(tmp_path: Path) -> None:
    """The last answer is written anew, after the generation prompt of the template."""
    chat = tokenizer(ends=False, positions=41)
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = [{"role": "user", "content": text[:4]} for text in DOCUMENTS["document"]]
    old = {"role": "assistant", "content": "old"}
    plain = Dataset.from_dict({"prompt": [f"user: {m['content']}\nassistant: " for m in asked]})
    wanted = made("gpt2", tmp_path / "a", plain)["completion"]
    rows = Dataset.from_dict({"messages": [[turn, old] for turn in asked]})
    found = made("gpt2", tmp_path / "b", rows, tokenizer=chat)
    new = [{"role": "assistant", "content": text} for text in wanted]
    assert found["messages"] == [[turn, text] for turn, text in zip(asked, new, strict=True)]
    rows = Dataset.from_dict({"prompt": [[turn] for turn in asked]})
    found = made("gpt2", tmp_path / "c", rows, tokenizer=chat)
    assert found["completion"] == [[text] for text in new]


# ---- What is cut, refused and reported ----


def test_long_sources_are_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = made("t5", tmp_path, max_source_length=5)
    long = sum(len(tokenizer()(text).input_ids) > 5 for text in DOCUMENTS["document"])
    assert 0 < long < 10
    assert any(f"{long} of 10 sources were cut at the end" in text for text in caplog.messages)
    assert json.loads((tmp_path / "annotation.json").read_text())["cut"] == long
    first = tokenizer()(DOCUMENTS[9]["document"]).input_ids[:4]
    kept = tokenizer().decode(first)
    with torch.no_grad():
        assert found[9]["summary"] == by_loops("t5", kept, 6)[0]


def test_texts_cut_at_the_limit_and_empty_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = made("bart", tmp_path)
    cut, empty = found["teacher_finished"].count(False), found["summary"].count("")
    assert 0 < cut < 10
    assert f"{cut} of 10 texts were cut at the length limit" in " ".join(caplog.messages)
    assert bool(empty) == ("of the teacher are empty" in " ".join(caplog.messages))


def test_lengths_of_the_teachers_own_generation_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder-decoder's `max_length` counts its text. A causal model's counts the prompt too, so
    that another number of tokens is written."""
    teacher = writer("t5")
    teacher.generation_config.max_length = 7
    found = made("t5", tmp_path / "a", teacher=teacher, generation={})
    assert found["summary"] == made("t5", tmp_path / "b")["summary"]
    monkeypatch.setattr("hf_distill.models.generation.NEW_TOKENS", 6)
    teacher = writer("gpt2")
    teacher.generation_config.max_length = 40
    found = made("gpt2", tmp_path / "c", teacher=teacher, generation={})
    assert found["summary"] == made("gpt2", tmp_path / "d")["summary"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {"rows": Dataset.from_dict({"document": ["a", " "], "summary": ["", ""]})},
     "row 1: the source is empty"),
    ("t5", {"rows": DOCUMENTS.select([])}, "no rows to annotate"),
    ("t5", {"rows": DOCUMENTS.rename_column("document", "body")}, "no known source and target"),
    ("t5", {"columns": {"source": "body", "target": "summary"}}, "row 0: there is no 'body'"),
    ("t5", {"columns": {"target": "document"}}, "needs 'source' and 'target'"),
    ("t5", {"rows": DOCUMENTS.add_column("teacher_finished", [True] * 10)},
     "a column 'teacher_finished' already"),
    ("t5", {"max_source_length": 5, "too_long": "refuse"}, r"row \d+: 'document' has \d+ tokens"),
    ("t5", {"max_source_length": 50}, "must be 1 to 40"),
    ("t5", {"source_lang": "en"}, "no language codes"),
    ("t5", {"max_new_tokens": 8}, "no 'max_new_tokens': give it as generation="),
    ("t5", {"dtype": "bfloat16"}, "no 'dtype': give it where the teacher is loaded"),
    ("t5", {"generation": {"num_beam": 2}}, "no setting of generate: did you mean 'num_beams'"),
    ("t5", {"generation": {"typical_p": 0.9}}, "'typical_p' cannot be used"),
    ("t5", {"generation": {"temperature": -1.0, "do_sample": True}}, "do not fit"),
    ("gpt2", {"generation": {"max_length": 9}}, "'max_length' counts .* give 'max_new_tokens'"),
    ("t5", {"n": 2}, "a search with 1 beam finds 1"),
    ("t5", {"n": 0}, "must be at least 1"),
    ("t5", {"n": 2, "generation": {"do_sample": True, "num_beams": 2}}, "drawn or searched"),
    ("gpt2", {"generation": {"max_new_tokens": 40}}, "max_new_tokens is 40, but"),
    ("gpt2", {"tokenizer": None}, "tokenizer is not known"),
    ("gpt2", {"teacher": "./nowhere"}, "a folder that does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_input_is_one_clear_line(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        made(kind, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_of_other_rows_or_settings_is_refused(tmp_path: Path) -> None:
    made("t5", tmp_path)
    with pytest.raises(InputError, match="annotated from other rows"):
        made("t5", tmp_path, DOCUMENTS.select([1, 0, *range(2, 10)]))
    with pytest.raises(InputError, match="an annotation with prefix ''"):
        made("t5", tmp_path, prefix="say ")
    with pytest.raises(InputError, match="an annotation with teacher"):
        made("t5", tmp_path, teacher=writer("t5", seed=2))


def test_saved_teachers_are_loaded_by_path(tmp_path: Path) -> None:
    for kind in ("t5", "llama"):
        writer(kind).save_pretrained(tmp_path / kind)
        tokenizer(ends=kind == "t5").save_pretrained(tmp_path / kind)
        wanted = made(kind, tmp_path / "a" / kind)["summary"]
        options: dict[str, Any] = {"teacher": str(tmp_path / kind), "tokenizer": None}
        assert made(kind, tmp_path / "b" / kind, **options)["summary"] == wanted
