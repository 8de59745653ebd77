"""The classes of a model that exists, and rows whose labels have the order of these classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedConfig

from hf_distill.data.labels import Kind, Labels, as_index_lists, find_labels
from hf_distill.errors import InputError
from hf_distill.tasks import SequenceClassification, Task
from hf_distill.tasks.classification import NUMBERS, ONE, SEVERAL, is_unnamed

KINDS: dict[str, Kind] = {ONE: "single", SEVERAL: "several", NUMBERS: "regression"}
SHOWN = 5  # classes that a message names
REMEDY = "set teacher.train, which trains a new head"


@dataclass(frozen=True)
class GivenLabels:
    """The labels of a model that a recipe names.

    owner: the model, for messages; binding: whether rows with other classes are an error. If not,
        the model decides only the order of the classes, where the rows have the same ones
    """

    labels: Labels
    owner: str
    binding: bool


def model_labels(task: Task, config: PreTrainedConfig) -> Labels:
    """What the labels of a model are: its classes in the order of their indices, or numbers."""
    kind = KINDS[task.problem] if isinstance(task, SequenceClassification) else "single"
    if kind == "regression":
        return Labels(kind)
    named: Any = config.id2label
    return Labels(kind, tuple(named[index] for index in sorted(named)))


def same_classes(ours: Labels, theirs: Labels) -> bool:
    """Whether two models, or a model and its rows, have the same classes in any order."""
    names, others = _folded(ours.names), _folded(theirs.names)
    return names.keys() == others.keys() and len(names) == len(ours.names) == len(theirs.names)


def fit_labels(
    rows: Dataset, column: str, given: GivenLabels, *, tagged: bool
) -> tuple[Dataset, GivenLabels | None, str]:
    """Rows whose labels mean the same as the model's.

    Names are matched, also where they differ in upper and lower case only; integers, and a
    `ClassLabel` of a model without names of its own, are indices of the model.
    tagged: whether the labels are those of words
    returns: the rows; the labels that they have now, None where the model does not decide them; a
        line that says which class is which where that follows from the indices alone, or ""
    raises: InputError where the rows have classes that the model does not have
    """
    rows, model = rows.with_format(None), given.labels
    if not tagged and column in rows.features:
        classes = len(model.names) if given.binding and model.kind == "several" else None
        rows = as_index_lists(rows, column, classes)
    if not given.binding:
        found = find_labels(rows, column)
        if not same_classes(found, model):
            return rows, None, ""
        model = model if tagged else Labels(found.kind, model.names)
        given = replace(given, labels=model)
    elif not tagged:
        check_kind(
            rows, column, model, owner=given.owner, remedy=f"{REMEDY}, or give a teacher with"
        )
    if model.kind == "regression":
        return rows, given, ""
    feature = _feature(rows, column)
    names = find_labels(rows, column).names
    unnamed = is_unnamed(dict(enumerate(model.names)))
    if isinstance(feature, ClassLabel) and not _are_numbers(names):
        if names == model.names:
            return rows, given, ""
        if unnamed:
            return _by_index(rows, names, given)
        if (aligned := aligned_rows(rows, column, model)) is None:
            raise InputError(_other_classes(names, given))
        return aligned, given, ""
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return _by_name(rows, column, names, given, unnamed=unnamed), given, ""
    if len(names) > len(model.names):
        raise InputError(_other_classes(names, given))
    if unnamed or _are_numbers(model.names):
        return rows, given, ""
    pairs = (f"{index} is {name!r}" for index, name in enumerate(model.names[:SHOWN]))
    return rows, given, f"labels are the indices of {given.owner}: {_listed(pairs, model.names)}"


def aligned_rows(rows: Dataset, column: str, labels: Labels) -> Dataset | None:
    """Rows whose `ClassLabel` has the order of a model's classes; None where it has others."""
    names = _feature(rows, column).names
    ours, theirs = _folded(names), _folded(labels.names)
    distinct = len(ours) == len(names) and len(theirs) == len(labels.names)
    if not distinct or not ours.keys() <= theirs.keys():
        return None
    # `align_labels_with_mapping` of datasets 5.2 fails for lists of labels.
    places = {one.lower(): index for index, one in enumerate(labels.names)}
    moved = [places[one.lower()] for one in names]

    def move(cell: Any) -> Any:
        if isinstance(cell, list):
            return [move(one) for one in cell]
        return cell if cell is None or cell < 0 else moved[cell]

    feature: Any = ClassLabel(names=list(labels.names))
    feature = feature if isinstance(rows.features[column], ClassLabel) else List(feature)
    cells = rows.with_format(None)[column]
    return rows.remove_columns(column).add_column(column, list(map(move, cells)), feature=feature)


def in_order(rows: Dataset, column: str, labels: Labels) -> Dataset:
    """Rows whose `ClassLabel` has the order of `labels`, if it has their names; else as given."""
    if column not in rows.features or not isinstance(_feature(rows, column), ClassLabel):
        return rows
    aligned = None if labels.kind == "regression" else aligned_rows(rows, column, labels)
    return rows if aligned is None else aligned


def check_kind(
    rows: Dataset,
    name: str,
    labels: Labels,
    *,
    owner: str = "the student",
    remedy: str = "make it with",
) -> None:
    """InputError for labels that a model's head does not fit.

    owner: the model; remedy: how to get another head, before the setting that it needs
    """
    feature = rows.features[name]
    several = getattr(feature, "feature", None) is not None
    if several and labels.kind == "single":
        raise InputError(
            f"{name!r} holds several labels a row, but {owner} gives a row one class: {remedy} "
            'problem_type="multi_label_classification"'
        )
    if not several and labels.kind == "several":
        raise InputError(
            f"{name!r} holds one label a row, but {owner} gives each row any number of them: "
            f'{remedy} problem_type="single_label_classification", or give lists of labels'
        )
    kind = str(getattr(feature, "dtype", ""))
    if labels.kind == "regression" and not kind.startswith(("float", "int", "uint")):
        raise InputError(
            f"{name!r} holds {'several labels' if several else kind}, but {owner} predicts a "
            f"number (num_labels=1): {remedy} as many labels as there are classes"
        )
    if labels.kind == "single" and kind.startswith("float"):
        raise InputError(
            f"{name!r} holds fractions, but {owner} has {len(labels.names)} classes: give "
            f"names or indices of classes, or {remedy} num_labels=1"
        )


def _feature(rows: Dataset, column: str) -> Any:
    feature = rows.features[column]
    return getattr(feature, "feature", feature)


def _folded(names: Iterable[str]) -> dict[str, str]:
    """The names by their lower case."""
    return {name.lower(): name for name in names}


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no other names than their indices."""
    return list(names) == list(map(str, range(len(names))))


def _by_index(
    rows: Dataset, names: Sequence[str], given: GivenLabels
) -> tuple[Dataset, GivenLabels, str]:
    """Rows of a `ClassLabel` for a model without names, whose classes get those of the rows."""
    model = given.labels
    if len(names) > len(model.names):
        raise InputError(_other_classes(names, given))
    pairs = (f"{one!r} is {other}" for one, other in zip(names[:SHOWN], model.names, strict=False))
    line = f"labels are the indices of {given.owner}, which names no classes: "
    labels = Labels(model.kind, tuple(names) if len(names) == len(model.names) else model.names)
    return rows, GivenLabels(labels, given.owner, True), line + _listed(pairs, names)


def _by_name(
    rows: Dataset, column: str, names: Sequence[str], given: GivenLabels, *, unnamed: bool
) -> Dataset:
    """Rows whose names of classes are written as the model writes them."""
    model = given.labels.names
    if set(names) <= set(model):
        return rows
    if unnamed:
        raise InputError(
            f"the rows have the classes {_listed(names)}, but {given.owner} has only the default "
            f"names {_listed(model)}, which do not say which is which: give the indices 0 to "
            f"{len(model) - 1} as labels, name the classes in teacher.model_kwargs.id2label, or "
            f"{REMEDY}"
        )
    ours, theirs = _folded(names), _folded(model)
    distinct = len(ours) == len(names) and len(theirs) == len(model)
    if not distinct or not ours.keys() <= theirs.keys():
        raise InputError(_other_classes(names, given))
    spelled: Mapping[str, str] = {name: theirs[name.lower()] for name in names}

    def spell(cell: Any) -> Any:
        return [spelled.get(one, one) for one in cell] if isinstance(cell, list) else (
            spelled.get(cell, cell)
        )  # fmt: skip

    cells, feature = rows[column], rows.features[column]
    return rows.remove_columns(column).add_column(column, list(map(spell, cells)), feature=feature)


def _other_classes(names: Sequence[str], given: GivenLabels) -> str:
    model = given.labels.names
    # First those that the model lacks, since a message names a few only.
    known = _folded(model)
    ordered = sorted(names, key=lambda name: name.lower() in known)
    return (
        f"the rows have the {len(names)} classes {_listed(ordered)}; {given.owner} has the "
        f"{len(model)} classes {_listed(model)}: rename the labels, or {REMEDY}"
    )


def _listed(shown: Iterable[str], of: Sequence[str] | None = None) -> str:
    """The first few, with "..." where there are more. of: all of them, if `shown` has few only"""
    first = list(shown)
    more = len(first if of is None else of) > SHOWN
    return ", ".join(first[:SHOWN]) + (", ..." if more else "")
