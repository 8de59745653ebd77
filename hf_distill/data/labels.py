"""Labels: their kind, the names of the classes, and a row's label as a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import ClassLabel, Dataset, List

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

Kind = Literal["single", "several", "regression"]


@dataclass(frozen=True)
class Labels:
    """The kind of the labels, and the names of the classes.

    kind: "single", one class per row (or word); "several", any number of classes; "regression", a
        number. names: of the classes, in the order of their indices; () for numbers
    """

    kind: Kind
    names: tuple[str, ...] = ()

    def index(self, label: Any) -> int:
        """The index of a class given by name or index; InputError if it is no class."""
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, int) and 0 <= label < len(self.names):
            return int(label)
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        default = isinstance(label, str) and self.names[:1] == ("LABEL_0",)
        advice = ": set id2label of the student to the names of the classes" if default else ""
        raise InputError(
            f"the label {label!r} is none of the {len(self.names)} classes ({shown}){advice}"
        )


def read_label(value: Any, labels: Labels) -> Any:
    """A row's label as an index, a list of 0.0 and 1.0, or a float; InputError if it is none."""
    if value is None or value != value:
        raise InputError(
            f"the label is {value!r}: leave the row out, or in a recipe move rows without a label "
            "to data.unlabelled"
        )
    if labels.kind == "several":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(
                f"the label is {value!r}, but other rows have lists of labels: give lists only"
            )
        given = {labels.index(one) for one in value}
        return [float(index in given) for index in range(len(labels.names))]
    if isinstance(value, Sequence) and not isinstance(value, str):
        raise InputError(
            f"the label is {value!r}, but other rows have one label: a row with several labels "
            "needs lists everywhere"
        )
    if labels.kind == "single":
        return labels.index(value)
    if abs(value) == float("inf"):
        raise InputError(f"the label is {value!r}, but must be a finite number")
    return float(value)


def as_index_lists(dataset: Dataset, column: str, classes: int | None = None) -> Dataset:
    """Rows whose lists of 0 and 1, one for each class, are lists of the classes that have a 1.

    Lists of booleans or floats are such lists. Lists of integers are, if each holds only 0 and 1
    and has as many numbers as there are classes, or as all others have.

    classes: their number, where it is known
    returns: the rows as given, if their labels are none of these
    raises: InputError for lists with another number of values than there are classes
    """
    inner = getattr(dataset.features.get(column), "feature", None)
    dtype = str(getattr(inner, "dtype", ""))
    if isinstance(inner, ClassLabel) or not dtype.startswith(("bool", "float", "int", "uint")):
        return dataset
    cells = [None if c in (None, [IGNORE]) else c for c in dataset.with_format(None)[column]]
    given = [cell for cell in cells if cell is not None]
    widths = {len(cell) for cell in given}
    fits = all(value in (0, 1) for cell in given for value in cell) and (
        widths == {classes} if classes else len(widths) == 1
    )
    if dtype.startswith(("int", "uint")) and (not fits or widths == {1}):
        return dataset  # lists of indices
    if not fits:
        known = f"each of {classes} classes" if classes else "each class"
        found = ", ".join(map(str, sorted(widths)))
        raise InputError(
            f"the column {column!r} holds lists of {dtype}, which must be 0 or 1 for {known}: "
            f"there are lists of {found} numbers"
        )
    (width,) = widths
    names = ClassLabel(names=[str(index) for index in range(width)])
    lists = [cell and [i for i, value in enumerate(cell) if value] for cell in cells]
    return dataset.remove_columns(column).add_column(column, lists, feature=List(names))


def find_labels(dataset: Dataset, column: str, names: Sequence[str] | None = None) -> Labels:
    """What the labels of a column are, from its type, or from all of its values.

    names: of the classes, where they are known
    """
    feature = dataset.features.get(column)
    inner = getattr(feature, "feature", None)
    several = inner is not None
    feature = inner if several else feature
    kind: Kind = "several" if several else "single"
    if names is not None:
        return Labels(kind, tuple(names))
    if isinstance(feature, ClassLabel):
        return Labels(kind, tuple(feature.names))
    if str(getattr(feature, "dtype", "")).startswith("float") and not several:
        return Labels("regression")
    cells = dataset.with_format(None)[column]
    values = {one for cell in cells for one in (cell or ())} if several else set(cells)
    values -= {None, IGNORE}
    if not values:
        raise InputError(f"the column {column!r} holds no label: give labelled rows")
    if all(isinstance(value, str) for value in values):
        return Labels(kind, tuple(sorted(values)))
    if all(isinstance(value, int) for value in values) and min(values) >= 0:
        return Labels(kind, tuple(str(index) for index in range(max(values) + 1)))
    strange = min((v for v in values if not isinstance(v, str)), key=lambda v: (v >= 0, v))
    raise InputError(
        f"the column {column!r} holds the label {strange!r}, but classes are names or indices "
        "from 0: convert it, or leave out rows without a label"
    )
