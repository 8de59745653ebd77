"""The heads of transformers' models: the auto classes that load them, and the model classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto as auto


def _names(*mappings: Any) -> frozenset[str]:
    found = [names for mapping in mappings for names in mapping.values()]
    return frozenset(n for names in found for n in ([names] if isinstance(names, str) else names))


# By the key of a task: the auto class, and the names of its model classes by `model_type`.
_LOADERS: dict[str, tuple[Any, Any]] = {
    "causal-lm": (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq-lm": (AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": (AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence-classification": (
        AutoModelForSequenceClassification,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token-classification": (
        AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question-answering": (
        AutoModelForQuestionAnswering,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}
# Some classes serve two tasks: the first counts.
HEADS: dict[str, tuple[Any, frozenset[str]]] = {
    key: (loads, _names(mapping)) for key, (loads, mapping) in _LOADERS.items()
}
OTHER_HEADS = _names(
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)
# Keywords of `from_pretrained` that decide which files are read.
WHERE = (
    "revision", "code_revision", "subfolder", "cache_dir", "token", "trust_remote_code",
    "local_files_only", "force_download", "gguf_file",
)  # fmt: skip


def model_types(task: str) -> set[str]:
    """The `model_type` of each config that transformers has a model of the task for."""
    return {kind for kind in _LOADERS[task][1] if kind in CONFIG_MAPPING}


def class_name(model_type: str, task: str) -> str:
    """The name of the model class that a task has for a model type."""
    names = _LOADERS[task][1][model_type]
    return names if isinstance(names, str) else names[0]


def which_files(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords of `from_pretrained` that decide which files are read.

    A config and a tokenizer are read with the same ones as their model.
    """
    return {key: kwargs[key] for key in WHERE if key in kwargs}


def has_head(model: Any, task: str) -> bool:
    """Whether a model's class, or one that it derives from, is one of the task's."""
    return any(kind.__name__ in HEADS[task][1] for kind in type(model).__mro__)


def loader(name: str, task: str | None, **kwargs: Any) -> Any:
    """The auto class for an id or a folder: of the task, or of the class that it was saved from."""
    if task is not None:
        return HEADS[task][0]
    config = AutoConfig.from_pretrained(name, **which_files(kwargs))
    return auto_class(config, None)


def auto_class(config: Any, task: str | None) -> Any:
    """The auto class for a config; without a task that of its class, or of a language model."""
    task = task or saved_task(config)
    if task is None:
        writes = getattr(config, "is_encoder_decoder", False)
        task = "seq2seq-lm" if writes else "causal-lm"
    return HEADS[task][0]


def saved_task(config: Any) -> str | None:
    """The key of the task whose head a checkpoint was saved with; None if it had none."""
    saved = (getattr(config, "architectures", None) or [""])[0]
    found = [key for key, (_, names) in HEADS.items() if saved in names]
    if getattr(config, "is_encoder_decoder", False) and "seq2seq-lm" in found:
        return "seq2seq-lm"
    return found[0] if found else None
