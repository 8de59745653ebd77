"""What the configs of a recipe's models decide: the classes of the rows, layers that exist.

No weights are loaded.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.data import GivenLabels, Labels, model_labels, same_classes
from hf_distill.models.engines import made_whole
from hf_distill.models.from_scratch import config_from_settings
from hf_distill.models.from_teacher import student_stacks
from hf_distill.models.heads import HEADS
from hf_distill.models.shorter_config import find_stacks
from hf_distill.recipes import Recipe, arguments
from hf_distill.recipes.stages.inputs import config_of
from hf_distill.tasks import SequenceClassification, TokenClassification
from hf_distill.tasks.classification import is_unnamed, match_classes
from hf_distill.training.feature_settings import feature_settings, pairs_of


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
        if ours is None:
            return None
        labels = _labels(recipe, ours)
        if is_unnamed(dict(enumerate(labels.names))):
            return None
        return GivenLabels(labels, f"student {recipe.student.model!r}", False)
    labels = _labels(recipe, theirs)
    if ours is not None and same_classes(_labels(recipe, ours), labels):
        match_classes(ours, theirs)
    return GivenLabels(labels, f"teacher {recipe.teacher.model!r}", True)


def check_student(recipe: Recipe) -> None:
    """InputError for layers, widths or features that teacher and student do not have.

    Their stages would find the same, but only after the teacher's.
    """
    section, trainings = recipe.student, [recipe.off_policy, recipe.train]
    features = [
        setting
        for training in trainings
        if training is not None
        for setting in feature_settings(arguments(training).get("features"))
    ]
    if not section.from_teacher and not features:
        return
    teacher = _outline(recipe, "teacher")
    if teacher is None:
        return
    if section.from_teacher:
        ours = student_stacks(teacher, section.layers, section.num_layers, section.widths)
    elif (student := _outline(recipe, "student")) is not None:
        ours = find_stacks(student)
    else:
        return
    for setting in features:
        pairs_of(setting, ours, find_stacks(teacher))


def _outline(recipe: Recipe, role: str) -> PreTrainedModel | None:
    """A model of the recipe without memory; None where it needs more than its config."""
    settings = getattr(recipe, role).config
    config = config_of(recipe, role)
    if config is None:
        config = config_from_settings(settings, recipe.task)
    try:
        with made_whole(), torch.device("meta"):
            return HEADS[recipe.task][0].from_config(config)
    except Exception:  # code from the Hub, or a config that is refused with a reason of its own
        return None


def _labels(recipe: Recipe, config: PreTrainedConfig) -> Labels:
    if recipe.task == TokenClassification.key:
        return model_labels(TokenClassification(), config)
    return model_labels(SequenceClassification.of_config(config), config)
