"""Check the external inputs of a recipe, and detect changes in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from hf_distill.data import DataConfig, check_max_length
from hf_distill.data.sources import find_files, hub_id
from hf_distill.errors import InputError
from hf_distill.evaluation.harness import check_harness
from hf_distill.models.from_scratch import max_positions, model_from_config
from hf_distill.models.heads import HEADS, model_types, which_files
from hf_distill.models.loading import load_config, load_tokenizer, not_found
from hf_distill.models.precision import bf16_is_fast
from hf_distill.models.vocabulary import shared_vocabulary
from hf_distill.recipes import (
    PretrainSection,
    Recipe,
    StudentSection,
    TeacherSection,
    arguments,
)
from hf_distill.training.arguments import DistillationArguments

PATIENCE_S = 10.0
# Tasks whose head transformers adds with random weights where a checkpoint has none.
NEW_HEADS = ("sequence-classification", "token-classification", "question-answering")


# ---- Arguments of the trainings ----


def training_arguments(
    recipe: Recipe, options: dict[str, Any], folder: str | Path
) -> DistillationArguments:
    """The arguments of one of the recipe's trainings.

    options: what the train section sets; `bf16: auto` is decided here, for this machine
    raises: InputError for a value that is out of range or that Trainer refuses
    """
    options = dict(options)
    rows = options.pop("global_batch_size", None)
    # bf16 without an accelerator is refused by Trainer unless the CPU is asked for by name.
    options.setdefault("use_cpu", not torch.accelerator.is_available())
    if options.get("bf16") == "auto":
        options["bf16"] = not options.get("fp16") and bf16_is_fast(cpu=options["use_cpu"])
    try:
        args = DistillationArguments(
            str(folder), seed=recipe.seed, data_seed=recipe.seed, **options
        )
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(_first_line(error)) from error
    if rows is not None:
        devices = args.world_size * max(1, args.n_gpu)
        at_a_time, steps = micro_batches(rows, devices, options.get("per_device_train_batch_size"))
        args.per_device_train_batch_size, args.gradient_accumulation_steps = at_a_time, steps
    return args


def micro_batches(rows: int, devices: int, most: int | None) -> tuple[int, int]:
    """Split a device's share of a step's rows into micro-batches: rows at a time, and how often.

    most: rows at a time; by default the whole share
    raises: InputError where the devices cannot share them evenly
    """
    share, left = divmod(rows, devices)
    if left:
        raise InputError(
            f"global_batch_size is {rows}, which {devices} processes cannot share evenly: "
            f"use a multiple of {devices}, or another number of processes"
        )
    at_a_time = max(n for n in range(1, min(most or share, share) + 1) if share % n == 0)
    return at_a_time, share // at_a_time


def teacher_options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets of its teacher's training, or of its adaptation."""
    section = recipe.teacher.adapt or recipe.teacher.train or PretrainSection()
    options = arguments(section) | {"alpha": 0.0}
    options.pop("lora", None)
    return options


def check_arguments(recipe: Recipe) -> None:
    """InputError for a value in a train section, or a benchmark that is not known, before anything
    is read or written."""
    sections = {"train": arguments(recipe.train)}
    if recipe.teacher.is_trained_here:
        name = "teacher.train" if recipe.teacher.adapt is None else "teacher.adapt"
        sections[name] = teacher_options(recipe)
    if recipe.off_policy is not None:
        sections["off_policy"] = arguments(recipe.off_policy)
    for name, options in sections.items():
        try:
            training_arguments(recipe, options, recipe.output_dir)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if (harness := recipe.evaluate.harness) is not None:
        check_harness(harness.tasks, harness.include_path)


# ---- Models, tokenizers and data sets ----


def tokenizer_source(recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
    """The model whose tokenizer is used, and which of its files; None where one is trained."""
    if recipe.tokenizer.vocab_size is not None:
        return None
    if recipe.tokenizer.model is not None:
        return recipe.tokenizer.model, {}
    section = recipe.student if recipe.student.model is not None else recipe.teacher
    assert section.model is not None  # the recipe is refused without one
    return section.model, which_files(section.model_kwargs)


def revision_of(section: StudentSection | TeacherSection) -> str | None:
    """Which version of its model a section asks for."""
    return section.model_kwargs.get("revision")


def check_sources(recipe: Recipe) -> None:
    """InputError, within seconds, for a model or data set that is missing or does not fit.

    Nothing but configs and tokenizers is loaded.
    """
    for role in ("teacher", "student"):
        _check_model(recipe, role)
    if recipe.tokenizer.model is not None:
        _check_reachable("model", "tokenizer", recipe.tokenizer.model)
    for places in _places(recipe.data):
        if (name := hub_id(places)) is not None:
            _check_reachable("dataset", "data set", name, recipe.data.revision)


def check_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError where the tokenizer does not fit a model, or a model its rows."""
    if recipe.teacher.model is not None:
        files = which_files(recipe.teacher.model_kwargs)
        theirs = load_tokenizer(recipe.teacher.model, "teacher", **files)
        shared_vocabulary(len(tokenizer), len(theirs), tokenizer, theirs)
    for section in (recipe.teacher, recipe.student):
        if section.config is not None:
            model_from_config(
                section.config,
                tokenizer,
                seed=0,
                max_length=recipe.data.max_length,
                task=recipe.task,
            )


def config_of(recipe: Recipe, role: str) -> PreTrainedConfig | None:
    """The config of the `model` of a role, None where there is none; InputError if not reached."""
    section = getattr(recipe, role)
    if section.model is None:
        return None
    _check_reachable("model", role, section.model, revision_of(section))
    return load_config(section.model, role, **section.model_kwargs)


def _check_model(recipe: Recipe, role: str) -> None:
    config, name = config_of(recipe, role), getattr(recipe, role).model
    if config is None:
        return
    if config.model_type not in model_types(recipe.task):
        causal = recipe.task == "causal-lm"
        head = "language-model head that predicts the next token" if causal else "head for it"
        kind = "causal language model" if causal else f"model for {recipe.task}"
        task = "" if causal else f"the task is {recipe.task}, but "
        raise InputError(
            f"{task}{role} {name!r} is a {config.model_type}, which has no {head}: give a {kind}"
        )
    check_max_length(recipe.data.max_length, max_positions(config), f"the {role} {name!r}")
    _check_head(recipe, role, config)
    if recipe.task != "causal-lm":
        return
    backbone = getattr(MODEL_MAPPING[type(config)], "__name__", None)
    tied = config.get_text_config().tie_word_embeddings
    if not tied and config.architectures and set(config.architectures) == {backbone}:
        raise InputError(
            f"{role} {name!r} was saved as a {backbone}, without a language-model head: "
            "give a checkpoint of a causal language model"
        )


def _check_head(recipe: Recipe, role: str, config: PreTrainedConfig) -> None:
    """InputError for a teacher that would get an untrained head, if its config says so."""
    if role != "teacher" or recipe.teacher.is_trained_here or recipe.task not in NEW_HEADS:
        return
    saved = config.architectures or []
    # Classes that transformers does not have may derive from one with a head.
    known = [name for name in saved if hasattr(transformers, name)]
    if known and not HEADS[recipe.task][1].intersection(known):
        raise InputError(
            f"teacher {recipe.teacher.model!r} was saved as a {known[0]}, without a head for "
            f"{recipe.task}, so that its predictions would be random: set teacher.train to train "
            "it on the rows, or give a checkpoint that was trained for this task"
        )


def _check_reachable(kind: str, role: str, name: str, revision: str | None = None) -> None:
    """InputError unless the Hub has it or this machine does. Asks once, without retries."""
    if _is_local(name):
        return
    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        ask(name, revision=revision, timeout=PATIENCE_S)
    except HFValidationError as error:  # no id, as the path of a folder that does not exist
        raise InputError(not_found(role, name, error)) from error
    except GatedRepoError as error:
        raise InputError(
            f"{role} {name!r} is gated: accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{role} {name!r} is neither a local folder nor on the Hub: check the id, or log in "
            "with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the client's transport has errors of its own
        cached = "README.md" if kind == "dataset" else "config.json"
        found = try_to_load_from_cache(name, cached, repo_type=kind, revision=revision)
        if isinstance(found, str):
            return
        why = "was refused by" if isinstance(error, HfHubHTTPError) else "cannot be reached on"
        raise InputError(
            f"{role} {name!r} {why} the Hub ({_first_line(error)}) and is not on this machine: "
            "check the id and the connection, or give a local folder"
        ) from error


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".:")


# ---- Whether they have changed ----


def data_stamp(config: DataConfig) -> list[Any]:
    """Names, sizes and times of the local files that the rows come from."""
    places = _places(config)
    return [_stamps(find_files(group, config.exclude)) for group in places if hub_id(group) is None]


def _places(config: DataConfig) -> list[list[str]]:
    """The places of each set of training rows, of rows without labels, of each evaluation set."""
    alone = config.unlabelled
    unlabelled = [] if alone is None else [[alone] if isinstance(alone, str) else alone]
    return [*config.train_places.values(), *unlabelled, *config.eval_places.values()]


def model_stamp(name: str | None) -> Any:
    """The same for a model in a local folder; a Hub id stands for itself."""
    if name is None or not _is_local(name):
        return name
    path = Path(name).expanduser()
    return _stamps(file for file in path.iterdir() if file.is_file())


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
