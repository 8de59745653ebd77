"""Load models and tokenizers by id or path, with a clear error if that fails."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_distill.errors import InputError
from hf_distill.models.heads import loader, which_files
from hf_distill.models.precision import warn_of_slow_weights

# What the readers of checkpoints raise, the last two for a broken GGUF file.
UNREADABLE = (OSError, ValueError, KeyError, struct.error)
# Keywords of `from_pretrained` that replace what the config says of the classes.
CLASSES = ("id2label", "label2id", "num_labels", "problem_type")


def load_config(name: str | Path, role: str, **kwargs: Any) -> PreTrainedConfig:
    """The config that `load_model` would give a model, without its weights.

    kwargs: as of `load_model`; those that do not concern the config are left out
    raises: InputError if it cannot be reached
    """
    check_gguf(kwargs)
    kwargs = _numbered_classes(kwargs)
    given = which_files(kwargs) | {key: kwargs[key] for key in CLASSES if key in kwargs}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(name), **given)
    except UNREADABLE as error:
        raise InputError(not_found(role, name, error, kwargs)) from error
    return config


def load_model(
    name: str | Path,
    role: str,
    task: str | None = None,
    *,
    new_head: bool | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model with a head from a Hub id or a local folder.

    role: "teacher", "student", ..., for the error message
    task: the key of a task; by default that of the class it was saved from, or causal language
        modelling
    new_head: whether it may get a new, untrained head for classes or answers; by default only a
        student may
    kwargs: passed to ``from_pretrained`` (dtype, revision, attn_implementation, ...). The weights
        of a ``gguf_file`` are converted, so that the model is an ordinary one
    raises: InputError if it cannot be reached, or has no head of its own
    """
    check_gguf(kwargs)
    kwargs = _numbered_classes(kwargs)
    unpacked = bool(kwargs.get("gguf_file")) and not kwargs.get("quantization_config")
    if unpacked:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    try:
        kind = loader(str(name), task, **kwargs)
        loaded: Any = kind.from_pretrained(str(name), output_loading_info=True, **kwargs)
        model, report = loaded
    except UNREADABLE as error:
        raise InputError(not_found(role, name, error, kwargs)) from error
    if unpacked:
        _forget_gguf(model, f"{name}/{kwargs['gguf_file']}")
    warn_of_slow_weights(model, role)
    missing, head = set(report["missing_keys"]), model.get_output_embeddings()
    if head is None:
        new = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
        may = role == "student" if new_head is None else new_head
        if new and not may:
            raise InputError(
                f"{role} {str(name)!r} was saved without the head of a {type(model).__name__} "
                f"({sorted(new)[0]} is missing), so that its predictions would be random: give a "
                "checkpoint that was trained for this task"
            )
        return model
    weights = model.state_dict(keep_vars=True)  # the parameters themselves, not detached copies
    if missing & {key for key, value in weights.items() if value is head.weight}:
        raise InputError(
            f"{role} {str(name)!r} was saved without a language-model head, so its predictions "
            "would be random: give a checkpoint of a language model"
        )
    return model


def _numbered_classes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords whose `id2label` has numbers as keys, as in configs; those of a recipe are words."""
    named = kwargs.get("id2label")
    if not isinstance(named, Mapping):
        return dict(kwargs)
    by_number = {int(number): str(name) for number, name in named.items()}
    by_name = {name: number for number, name in by_number.items()}
    return {**kwargs, "id2label": by_number, "label2id": by_name}


def load_tokenizer(name: str | Path, role: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a local folder; InputError if it cannot be reached.

    kwargs: passed to ``from_pretrained``. With ``gguf_file`` it comes from that file, with its chat
        template
    """
    check_gguf(kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **kwargs)
    except UNREADABLE as error:
        raise InputError(not_found(f"{role}'s tokenizer", name, error, kwargs)) from error
    if not _has_tokens(tokenizer):
        raise InputError(
            f"{role} {str(name)!r} has no tokenizer files: save the tokenizer into that folder, or "
            "give a folder that has one"
        )
    return tokenizer


def local_tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is on this machine, or None. Never downloads.

    name: an id, a folder, or a GGUF file in one of them, as `load_model` leaves it in a model
    """
    if not name:
        return None
    kwargs = {}
    if name.endswith(".gguf"):
        name, _, kwargs["gguf_file"] = name.rpartition("/")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, **kwargs)
    except UNREADABLE:
        return None
    return tokenizer if _has_tokens(tokenizer) else None


def _has_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for the tokenizer without tokens that AutoTokenizer makes of a model-only folder."""
    return len(tokenizer) > len(tokenizer.added_tokens_decoder)


def check_gguf(kwargs: Mapping[str, Any]) -> None:
    """InputError where a GGUF file is asked for that cannot be read without another package."""
    if kwargs.get("gguf_file") and find_spec("gguf") is None:
        raise InputError(
            f"gguf_file={kwargs['gguf_file']!r} needs the package gguf: run "
            "`pip install 'hf-distill[gguf]'`"
        )


def _forget_gguf(model: Any, name: str) -> None:
    """Remove the GGUF entries from a loaded config, which would be saved with students.

    name: the file with its folder or id, by which `local_tokenizer` finds the tokenizer
    """
    for left in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(left, None)
    model.name_or_path = model.config.name_or_path = name


def not_found(
    role: str, name: str | Path, error: Exception, kwargs: Mapping[str, Any] | None = None
) -> str:
    """The error message for an id or a path that cannot be loaded.

    kwargs: those of `from_pretrained`
    """
    looks_like_path = str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1
    if looks_like_path and not Path(name).exists():
        return f"{role} {str(name)!r} is a folder that does not exist: check the path"
    if (reason := _gguf_not_named(Path(name), kwargs or {})) is not None:
        return f"{role} {str(name)!r} cannot be loaded: {reason}"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{role} {str(name)!r} cannot be loaded ({first_line.rstrip('.')}): "
        "give a local folder, or check the id and the connection to the Hub"
    )


def _gguf_not_named(folder: Path, kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong where a local folder has GGUF files, but `gguf_file` names none of them."""
    folder /= kwargs.get("subfolder") or ""
    asked = kwargs.get("gguf_file")
    if not folder.is_dir() or (asked and (folder / asked).is_file()):
        return None
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith(".gguf")]
    if asked:
        present = f"only {', '.join(files)}" if files else "and no other GGUF file"
        return f"it has no file {asked!r}, {present}: check gguf_file"
    if not files or any(name.endswith((".safetensors", ".bin")) for name in names):
        return None
    return (
        f"its weights are GGUF files ({', '.join(files)}), and none of them is named: set "
        f"gguf_file (model_kwargs: {{gguf_file: {files[0]}}} in a recipe, "
        f"gguf_file={files[0]!r} in Python)"
    )
