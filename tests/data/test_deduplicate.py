from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.data import DataConfig, clean_rows, hashing
from hf_distill.data.deduplicate import repeated

WORDS = [f"word{number}" for number in range(500)]


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def sentence(rng: random.Random, length: int) -> list[str]:
    return rng.choices(WORDS, k=length)


def changed(rng: random.Random, words: list[str], count: int) -> list[str]:
    words = list(words)
    for place in rng.sample(range(len(words)), count):
        words[place] = rng.choice(WORDS)
    return words


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 6))
def test_ngram_hashes_tell_sequences_apart(numbers: list[int], n: int) -> None:
    words = np.array(numbers, dtype=np.uint64)
    size = min(n, len(numbers))
    expected = [tuple(numbers[start : start + size]) for start in range(len(numbers) - size + 1)]
    hashes = hashing.ngram_hashes(words, n).tolist()
    assert len(hashes) == (len(expected) if numbers else 0)
    if numbers:
        assert len(set(hashes)) == len(set(expected))
        assert len(set(zip(hashes, expected, strict=True))) == len(set(expected))


def test_signatures_estimate_the_jaccard_similarity() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(40):
        first = sentence(rng, 200)
        second = changed(rng, first, rng.randrange(0, 20))
        texts = [" ".join(first), " ".join(second)]
        one, two = (hashing.signature(hashing.word_hashes(text), 0) for text in texts)
        sets = [shingles(text, hashing.SHINGLE_WORDS) for text in texts]
        errors.append((one == two).mean() - len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert abs(np.mean(errors)) < 0.03  # no bias
    assert np.std(errors) < 0.09  # 1 / (2 * sqrt(64)) = 0.06 each


def test_top_ngram_share() -> None:
    chant = hashing.word_hashes("now or never again " * 25)
    assert hashing.top_ngram_share(chant) == pytest.approx(1.0, abs=0.05)
    assert hashing.top_ngram_share(hashing.word_hashes(" ".join(WORDS))) == 0
    assert hashing.top_ngram_share(chant[:40]) == 0  # too short to tell


@given(st.lists(st.integers(0, 5)))
def test_repeated_keeps_the_first(numbers: list[int]) -> None:
    mask = repeated(np.array(numbers, dtype=np.uint64))
    assert mask.tolist() == [number in numbers[:place] for place, number in enumerate(numbers)]


def test_near_duplicates_go_and_only_they(tmp_path: Path) -> None:
    """Against all pairs compared exactly: clear duplicates go, clearly different rows stay."""
    rng = random.Random(1)
    texts = []
    for _ in range(60):
        base = sentence(rng, 150)
        texts += [" ".join(changed(rng, base, count)) for count in (0, 1, 2, 60)]
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    clean = {"eval_overlap": None, "near_duplicates": 0.8}
    config = DataConfig(train=file, clean=clean, eval_fraction=0.001)
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    kept = set(rows["train"]["text"])
    sets = {text: shingles(text, 5) for text in [*texts] if text not in rows["eval"]["text"]}
    for text in sets:
        best = (
            max(
                (len(sets[other] & sets[text]) / len(sets[other] | sets[text]))
                for other in list(sets)[: list(sets).index(text)] or [text]
            )
            if list(sets).index(text)
            else 0.0
        )
        if best > 0.95:
            assert text not in kept
        elif best < 0.6:
            assert text in kept
    assert (
        table.steps[-1].removed["near-duplicates of an earlier row"] == len(sets) - len(kept) > 80
    )


def test_threshold_and_switches(tmp_path: Path) -> None:
    rng = random.Random(2)
    base = sentence(rng, 150)
    texts = [" ".join(base), " ".join(changed(rng, base, 3)), " ".join(base)]
    texts += [" ".join(sentence(rng, 30)) for _ in range(20)]
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    evaluation = write(tmp_path / "e.jsonl", [{"text": " ".join(sentence(rng, 30))}])
    left = {}
    for near, exact in ((0.7, True), (0.99, True), (None, True), (None, False)):
        clean = {"near_duplicates": near, "exact_duplicates": exact}
        config = DataConfig(train=file, eval=evaluation, clean=clean)
        rows, _ = clean_rows(config, seed=0, work_dir=tmp_path / "work")
        left[near, exact] = len(rows["train"])
    assert left == {(0.7, True): 21, (0.99, True): 22, (None, True): 22, (None, False): 23}


def test_one_context_with_several_answers_is_no_duplicate(tmp_path: Path) -> None:
    rng = random.Random(3)
    context = " ".join(sentence(rng, 200))
    rows = [{"prompt": f"{context} Who is {name}?", "completion": name} for name in ("Ann", "Bob")]
    rows.append({"prompt": f"{context} Who was Ann?", "completion": "Ann "})
    other = write(tmp_path / "e.jsonl", [{"prompt": "What else?", "completion": "Nothing."}])
    config = DataConfig(train=write(tmp_path / "a.jsonl", rows), eval=other)
    kept, _ = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert list(kept["train"]["completion"]) == ["Ann", "Bob"]


def overlap(
    tmp_path: Path, train: list[str], held: list[str], **clean: Any
) -> tuple[list[str], Any]:
    config = DataConfig(
        train=write(tmp_path / "t.jsonl", [{"text": text} for text in train]),
        eval=write(tmp_path / "e.jsonl", [{"text": text} for text in held]),
        clean=clean,
    )
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    step = next((step for step in table.steps if step.name == "evaluation overlap"), None)
    return list(rows["train"]["text"]), step and step.removed


def test_what_overlaps_the_evaluation_rows_goes(tmp_path: Path) -> None:
    rng = random.Random(4)
    held = sentence(rng, 60)
    header = sentence(rng, 30)
    fresh = [" ".join(header + sentence(rng, 100)) for _ in range(3)]
    train = {
        "equal": " ".join(held),
        "near": " ".join(changed(rng, held, 1)),
        "around": " ".join(sentence(rng, 200) + held + sentence(rng, 200)),
        "inside": " ".join(held[10:40]),
        "most": " ".join(sentence(rng, 100) + held[:50]),
        "little": " ".join(sentence(rng, 100) + held[:20]),
    }
    evaluation = [" ".join(held), " ".join(header + sentence(rng, 100))]
    kept, removed = overlap(tmp_path, [*train.values(), *fresh], evaluation)
    assert kept == [train["little"], *fresh]
    assert removed == {
        "equal to an evaluation row": 1,
        "near-duplicates of an evaluation row": 1,
        "sharing text with an evaluation row": 3,
    }
    kept, removed = overlap(tmp_path, [*train.values(), *fresh], evaluation, eval_overlap=None)
    assert removed is None
    assert len(kept) == 8  # only "near", a near-duplicate of "equal", went


def test_many_evaluation_rows_of_one_text_hide_nothing(tmp_path: Path) -> None:
    """More evaluation rows share a text than are remembered per sequence: it is found still."""
    rng = random.Random(5)
    passage = sentence(rng, 80)
    held = [" ".join(passage + sentence(rng, 30)) for _ in range(40)]
    train = [" ".join(passage + sentence(rng, 30)), " ".join(sentence(rng, 100))]
    kept, _ = overlap(tmp_path, train, held, near_duplicates=None)
    assert kept == train[1:]


def test_what_evaluation_rows_share_counts_for_each_of_them(tmp_path: Path) -> None:
    """5/7 of one evaluation row is in the training row, though most of it is in all of them."""
    rng = random.Random(6)
    passage = sentence(rng, 60)
    own = [sentence(rng, 80) for _ in range(10)]
    train = [" ".join(sentence(rng, 300) + passage + own[7][:40])]
    train.append(" ".join(sentence(rng, 300) + passage))
    held = [" ".join(passage + words) for words in own]
    assert overlap(tmp_path, train, held, near_duplicates=None)[0] == train[1:]


def expected_overlap(train: list[str], held: list[str], threshold: float) -> set[int]:
    """The rule by loops over sets of words, without hashes or an index."""
    found = set()
    sets = [shingles(text, 13) for text in held]
    owners: dict[tuple[str, ...], list[int]] = {}
    for number, grams in enumerate(sets):
        for gram in grams:
            owners.setdefault(gram, []).append(number)
    for place, text in enumerate(train):
        grams = shingles(text, 13)
        common = Counter(owner for gram in grams for owner in owners.get(gram, []))
        if any(
            count >= threshold * len(sets[owner]) or count >= threshold * len(grams)
            for owner, count in common.items()
        ):
            found.add(place)
    return found


def check_real_overlap(config: DataConfig, work_dir: Path, columns: tuple[str, str]) -> int:
    """Nothing that overlaps by the naive rule is left; returns how many rows went."""
    rows, table = clean_rows(config, seed=0, work_dir=work_dir)
    step = next(step for step in table.steps if step.name == "evaluation overlap")
    train, held = (
        [f"{row['prompt']}\n{row['completion']}" for row in rows[split]]
        for split in ("train", "eval")
    )
    assert not expected_overlap(train, held, 0.5)
    raw = load_dataset("json", data_files=str(config.train), split="train")
    original = [f"{row[columns[0]]}\n{row[columns[1]]}" for row in raw]
    expected = expected_overlap(original, held, 0.5)
    gone = sum(step.removed.values())
    assert 0 < len(expected) <= gone
    return gone


@pytest.mark.parametrize(("name", "held"), [("mts_dialog", "valid"), ("scitldr", "dev")])
def test_overlap_in_real_summaries_is_found(
    tmp_path: Path, real_data: Path, name: str, held: str
) -> None:
    folder = real_data / "summ" / name
    config = DataConfig(
        train=str(folder / "train.jsonl.gz"),
        eval=str(folder / f"{held}.jsonl.gz"),
        prompt_column="document",
        completion_column="summary",
    )
    assert check_real_overlap(config, tmp_path, ("document", "summary")) < 10


@pytest.mark.slow
def test_overlap_in_real_instructions_is_found(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "instruct" / "p3_open"
    config = DataConfig(train=str(folder / "train.jsonl.xz"), eval=str(folder / "valid.jsonl.xz"))
    assert check_real_overlap(config, tmp_path, ("prompt", "completion")) < 200
