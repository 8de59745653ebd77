"""Read rows of other tasks under the names that public data sets use, and check them.

    read_source_target   documents and summaries, translations -> source, target
    read_questions       SQuAD's forms -> id, question, context, answers
    read_labelled        texts or pairs with classes or numbers -> text, (pair), label
    read_unlabelled      texts or pairs -> text, (pair)
    read_tagged          words with tags -> tokens, tags
    read_texts           plain text, for masked language modelling -> text

Each takes a `datasets.Dataset`, and `columns` if its columns have other names than the known ones:
`columns={"text": "body", "label": "topic"}`. A row that cannot be used raises an `InputError` with
the number of the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from hf_distill.data.forms import is_list
from hf_distill.data.labels import Labels, as_index_lists, find_labels, read_label
from hf_distill.data.model_labels import in_order
from hf_distill.data.source_target import find_source_target, text_at, value_at
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

VERSION = 1  # part of every cache key: raise it when the same settings would give other rows

# The known names of each column that is read, the most usual one first.
QUESTION = {
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer", "answer_text"),
    "start": ("answer_start", "start"),
    "impossible": ("is_impossible",),
    "id": ("id", "qid"),
}
LABELLED = {
    "text": ("text", "sentence", "content"),
    "pair": (),
    "label": ("label", "labels", "score", "intent"),
}
TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
TAGGED = {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "labels")}
TEXT = {"text": ("text", "content", "document", "sentence")}


def read_source_target(dataset: Dataset, columns: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `source` and `target`, both text; see `source_target.PAIRS` for the known names."""
    found = find_source_target(dataset.column_names, columns)
    features = {"source": Value("string"), "target": Value("string")}
    return _read(
        dataset,
        lambda row: {"source": text_at(row, found.source), "target": text_at(row, found.target)},
        features,
    )


def read_texts(dataset: Dataset, columns: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `text`."""
    name = _columns(dataset, TEXT, columns, needed=("text",))["text"]
    return _read(dataset, lambda row: {"text": text_at(row, name)}, {"text": Value("string")})


# ---- Questions ----


def read_questions(dataset: Dataset, columns: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `id`, `question`, `context` and `answers`.

    Answers may be SQuAD's {"text": [...], "answer_start": [...]}, a list of {"text",
    "answer_start"}, or separate columns with one answer or a list. A question without an answer, or
    with `is_impossible`, is unanswerable. An answer whose start is missing or wrong is searched in
    the context; of several occurrences the one nearest to the start is used.

    returns: `answers` is {"text": [...], "answer_start": [...]}, starts in characters
    raises: InputError for an answer that the context does not contain
    """
    names = _columns(dataset, QUESTION, columns, needed=("question", "context", "answers"))

    def read(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        context = text_at(row, names["context"])
        pairs = _answers(row, names)
        texts = [text for text, _ in pairs]
        starts = [_place(context, text, start) for text, start in pairs]
        return {
            "id": str(row[names["id"]]) if "id" in names else str(index),
            "question": text_at(row, names["question"]),
            "context": context,
            "answers": {"text": texts, "answer_start": starts},
        }

    text, number = Value("string"), Value("int64")
    answers = {"text": List(text), "answer_start": List(number)}
    features = {"id": text, "question": text, "context": text, "answers": answers}
    return _read(dataset, read, features, indexed=True)


def _answers(row: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, int | None]]:
    """The answers of a row, each with its start if that is known."""
    if "impossible" in names and row[names["impossible"]]:
        return []
    cell: Any = value_at(row, names["answers"])
    starts: Any = row[names["start"]] if "start" in names else None
    if isinstance(cell, Mapping):
        cell, starts = cell.get("text"), cell.get("answer_start")
    elif cell and is_list(cell) and isinstance(cell[0], Mapping):
        starts = [one.get("answer_start") for one in cell]
        cell = [one.get("text") for one in cell]
    if cell is None or cell == "":
        return []
    texts = [cell] if isinstance(cell, str) else list(cell)
    places = [starts] * len(texts) if starts is None or isinstance(starts, int) else list(starts)
    if len(places) != len(texts):
        raise InputError(f"there are {len(texts)} answers and {len(places)} starts")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"an answer is {text!r}, but must be text: leave out empty answers")
    return list(zip(texts, places, strict=True))


def _place(context: str, text: str, start: int | None) -> int:
    """Where an answer begins, in characters of the context."""
    if start is not None and context[start : start + len(text)] == text and start >= 0:
        return start
    places = []
    at = context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    if not places:
        raise InputError(
            f"the context does not contain the answer {text!r}, which an extractive model needs: "
            "correct the row or leave it out"
        )
    return min(places, key=lambda place: abs(place - (start or 0)))


# ---- Labels ----


def read_labelled(
    dataset: Dataset,
    columns: Mapping[str, str] | None = None,
    labels: Labels | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Dataset, Labels]:
    """Rows of `text`, perhaps `pair`, and `label`, and their `Labels`.

    Pairs are premise and hypothesis, sentence1 and sentence2, question1 and question2, question and
    sentence. Labels are names or indices of classes, lists of these or of 0 or 1 for each class
    (several labels), or floating numbers (regression).

    labels: those of the training rows, for evaluation rows
    names: of the classes, in the order of their indices; by default those of the `ClassLabel`, else
        the names that occur, sorted, or "0", "1", ... up to the largest index
    returns: `label` is an index, for several labels a list of 0.0 or 1.0 for each class, for
        regression a float
    raises: InputError for a label that is no class
    """
    found = _columns(dataset, LABELLED, _paired(dataset, columns), needed=("text", "label"))
    known = labels.names if labels is not None else names
    if found["label"] in dataset.features:  # not a field of a column
        dataset = as_index_lists(dataset, found["label"], len(known) if known else None)
    if labels is None:
        labels = find_labels(dataset, found["label"], names)
    else:
        dataset = in_order(dataset, found["label"], labels)

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        parts = [name for name in ("text", "pair") if name in found]
        label = read_label(value_at(row, found["label"]), labels)
        return {name: text_at(row, found[name]) for name in parts} | {"label": label}

    number = {"single": Value("int64"), "several": List(Value("float32"))}
    features: dict[str, Any] = {"text": Value("string")}
    features |= {"pair": Value("string")} if "pair" in found else {}
    features["label"] = number.get(labels.kind, Value("float32"))
    if labels.kind == "single":
        features["label"] = ClassLabel(names=list(labels.names))
    return _read(dataset, read, features), labels


def read_unlabelled(dataset: Dataset, columns: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `text`, and perhaps `pair`, as `read_labelled` finds them, without labels."""
    told = {name: column for name, column in (columns or {}).items() if name != "label"}
    known = {name: LABELLED[name] for name in ("text", "pair")}
    found = _columns(dataset, known, _paired(dataset, told), needed=("text",))
    return _read(
        dataset,
        lambda row: {name: text_at(row, column) for name, column in found.items()},
        {name: Value("string") for name in found},
    )


def columns_read(
    dataset: Dataset, columns: Mapping[str, str] | None = None, *, tagged: bool = False
) -> dict[str, str]:
    """The columns that `read_labelled` or, if `tagged`, `read_tagged` reads; the labels last."""
    if tagged:
        return _columns(dataset, TAGGED, columns, needed=("tokens", "tags"))
    found = _columns(dataset, LABELLED, _paired(dataset, columns), needed=("text", "label"))
    return {name: found[name] for name in ("text", "pair", "label") if name in found}


def label_column(
    dataset: Dataset, columns: Mapping[str, str] | None, *, tagged: bool = False
) -> str:
    """The column that `read_labelled` or, if `tagged`, `read_tagged` takes the labels from."""
    return columns_read(dataset, columns, tagged=tagged)["tags" if tagged else "label"]


def _paired(dataset: Dataset, columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns that were named, and those of a known pair of texts."""
    told = dict(columns or {})
    pairs = (pair for pair in TEXT_PAIRS if set(pair) <= set(dataset.column_names))
    if "text" not in told and (pair := next(pairs, None)) is not None:
        told = dict(zip(("text", "pair"), pair, strict=True)) | told
    return told


def read_tagged(
    dataset: Dataset,
    columns: Mapping[str, str] | None = None,
    labels: Labels | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Dataset, Labels]:
    """Rows of `tokens` and `tags`, an index for each token, and the classes of the tags.

    A tag of None or -100 is none, and becomes -1.

    labels, names: see `read_labelled`
    raises: InputError for rows without tokens, or with another number of tags
    """
    found = _columns(dataset, TAGGED, columns, needed=("tokens", "tags"))
    if labels is None:
        labels = Labels("single", find_labels(dataset, found["tags"], names).names)
    else:
        dataset = in_order(dataset, found["tags"], labels)

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        words, tags = value_at(row, found["tokens"]), value_at(row, found["tags"])
        if isinstance(words, str) or not words:
            held = "is empty: leave out such rows" if not words else "is text, not a list of words"
            raise InputError(f"{found['tokens']!r} {held}")
        if len(words) != len(tags or ()):
            raise InputError(
                f"there are {len(words)} tokens and {len(tags or ())} tags: give one for each token"
            )
        places = [-1 if tag in (None, IGNORE) else labels.index(tag) for tag in tags]
        return {"tokens": list(words), "tags": places}

    tags = List(ClassLabel(names=list(labels.names)))
    return _read(dataset, read, {"tokens": List(Value("string")), "tags": tags}), labels


# ---- Common ----


def without_blanks(
    dataset: Dataset, task: str, columns: Mapping[str, str] | None
) -> tuple[Dataset, dict[str, int]]:
    """The rows that have text, and a label where they need one; how many have not, by reason.

    task: its key. A `ClassLabel` of -1 is none; a label of None stays, for `read_label` to refuse,
        since such rows may be meant for `data.unlabelled`
    returns: the rows as they were if none would be left
    """
    label: str | None = None
    if task == "seq2seq-lm":
        pair = find_source_target(dataset.column_names, columns)
        texts = [pair.source, pair.target]
    elif task == "question-answering":
        found = _columns(dataset, QUESTION, columns, needed=("question", "context", "answers"))
        texts = [found["question"], found["context"]]
    else:
        tagged = task == "token-classification"
        known, needed = (TAGGED, ("tokens", "tags")) if tagged else (LABELLED, ("text", "label"))
        told = columns if tagged else _paired(dataset, columns)
        found = _columns(dataset, known, told, needed=needed)
        texts = [found[name] for name in ("text", "pair", "tokens") if name in found]
        label = None if tagged else found["label"]
    if not isinstance(dataset.features.get(label), ClassLabel):
        label = None
    reasons = []
    for row in dataset.with_format(None):
        cells = [value_at(row, name) for name in texts]
        blank = any(not (cell.strip() if isinstance(cell, str) else cell) for cell in cells)
        unlabelled = label is not None and value_at(row, label) == -1
        reasons.append("blank" if blank else "without a label" if unlabelled else "")
    kept = [place for place, reason in enumerate(reasons) if not reason]
    if len(kept) in (0, len(dataset)):
        return dataset, {}
    counts = Counter(reason for reason in reasons if reason)
    return dataset.select(kept), dict(counts)


def _columns(
    dataset: Dataset,
    known: Mapping[str, Sequence[str]],
    told: Mapping[str, str] | None,
    needed: Sequence[str],
) -> dict[str, str]:
    """The data set's name of each column that is read; those not needed may be absent."""
    told, there = told or {}, dataset.column_names
    for name, column in told.items():
        if name not in known:
            raise InputError(f"columns has {name!r}, but must be of {', '.join(known)}")
        if column.partition(".")[0] not in there and column not in there:
            raise InputError(f"columns names {column!r}, but there is only {', '.join(there)}")
    found = dict(told)
    for name, candidates in known.items():
        free = [c for c in candidates if c in there and c not in found.values()]
        if name not in found and free:
            found[name] = free[0]
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"the columns {', '.join(there)} hold no {missing[0]}: name it by "
            f"columns={{{missing[0]!r}: ...}} (in a recipe data.columns)"
        )
    return found


def _read(
    dataset: Dataset,
    read: Callable[..., dict[str, Any]],
    features: dict[str, Any],
    *,
    indexed: bool = False,
) -> Dataset:
    """Apply a reader to each row, and name the row in its error."""
    if not len(dataset):
        raise InputError("the data set has no rows")

    def numbered(row: Mapping[str, Any], index: int, version: int) -> dict[str, Any]:
        try:
            return read(row, index) if indexed else read(row)
        except InputError as error:
            raise InputError(f"row {index}: {error}") from error

    return dataset.with_format(None).map(
        numbered,
        with_indices=True,
        fn_kwargs={"version": VERSION},
        remove_columns=dataset.column_names,
        features=Features(features),
        desc="read",
    )
