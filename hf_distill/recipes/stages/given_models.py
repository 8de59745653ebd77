"""What the configs of a recipe's models decide: the classes of the rows. No weights are loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_distill.data import GivenLabels, Labels, model_labels, same_classes
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.inputs import config_of
from hf_distill.tasks import SequenceClassification, TokenClassification
from hf_distill.tasks.classification import check_classes, is_unnamed


def given_labels(recipe: Recipe) -> GivenLabels | None:
    """The labels of a model that exists, whose classes the rows have, or None.

    A teacher that is not trained here decides what its outputs mean. Otherwise a student that has
    the classes of the rows decides their order.
    raises: InputError for a config that cannot be read, and for a student that has the classes of
        such a teacher in another order
    """
    if recipe.task not in (SequenceClassification.key, TokenClassification.key):
        return None
    ours, theirs = (config_of(recipe, role) for role in ("student", "teacher"))
    if theirs is None or recipe.teacher.is_trained_here:
        if ours is None or is_unnamed(ours.id2label or {}):
            return None
        return GivenLabels(_labels(recipe, ours), f"student {recipe.student.model!r}", False)
    labels = _labels(recipe, theirs)
    if ours is not None and same_classes(_labels(recipe, ours), labels):
        check_classes(ours, theirs)
    return GivenLabels(labels, f"teacher {recipe.teacher.model!r}", True)


def _labels(recipe: Recipe, config: PreTrainedConfig) -> Labels:
    if recipe.task == TokenClassification.key:
        return model_labels(TokenClassification(), config)
    return model_labels(SequenceClassification.of_config(config), config)
