"""Stage `student`, and the models of a run: how they are made, loaded and adapted."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_distill.data import Labels, check_max_length, label_names, task_collator
from hf_distill.models.engines import made_whole, plain_accelerator
from hf_distill.models.from_scratch import max_positions, model_from_config
from hf_distill.models.from_teacher import student_and_report
from hf_distill.models.heads import which_files
from hf_distill.models.layer_selection import uses_influence
from hf_distill.models.loading import load_model, load_tokenizer
from hf_distill.models.student_report import StudentReport
from hf_distill.recipes import AdapterSection, Recipe, arguments
from hf_distill.recipes.stages.inputs import revision_of, training_arguments
from hf_distill.recipes.stages.stage import Run, read_json
from hf_distill.recordings.recorder import load_recording

LABELS = "labels.json"
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}  # peft has none for masked language modelling
# A teacher is measured on a few hundred training rows, fewer where they are long, since the scores
# are means over positions.
MEASURED_ROWS = 256
MEASURED_TOKENS = 32_768


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer that the rows were made with."""
    return load_tokenizer(run.folder / "data" / "tokenizer", "student")


def teacher_tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """The teacher's own, to be compared with the student's."""
    section = run.recipe.teacher
    if section.model is None or section.is_trained_here:
        return tokenizer_of(run)
    return load_tokenizer(section.model, "teacher", **which_files(section.model_kwargs))


def collator_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The collator for the rows that a recipe prepares."""
    masks = {"probability": recipe.data.mask_probability, "seed": recipe.seed}
    return task_collator(recipe.task, tokenizer, **masks)


def accelerator_of(run: Run) -> Accelerator:
    """An accelerator with the mixed precision of the trainings."""
    args = training_arguments(run.recipe, arguments(run.recipe.train), run.folder)
    return plain_accelerator("bf16" if args.bf16 else "fp16" if args.fp16 else "no")


def rows_of(run: Run, split: str) -> Dataset:
    """The tokenized rows of "train" or of one of the recipe's `data.eval_splits`."""
    return load_from_disk(str(run.folder / "data" / split))


def text_of(run: Run, split: str) -> Dataset:
    """The same rows as text, of tasks other than causal language modelling."""
    return load_from_disk(str(run.folder / "data" / "text" / split))


def labels_of(run: Run) -> Labels | None:
    """What the labels of the rows are; None where the task has no classes."""
    found = read_json(run.folder / "data" / LABELS)
    return found and Labels(found["kind"], tuple(found["names"]))


def head_settings(run: Run) -> dict[str, Any]:
    """The settings of a model's config for the classes of this run."""
    labels = labels_of(run)
    if labels is None:
        return {}
    settings = label_names(labels)
    if run.recipe.task == "token-classification":  # whose config names no problem
        del settings["problem_type"]
    return settings


def rows_to_learn(run: Run, split: str) -> Dataset:
    """The rows of a split for the student.

    Training rows have the targets that the teacher has written, and include rows without labels, if
    the recipe has such.
    """
    if split == "train" and run.recipe.annotate is not None:
        return load_from_disk(str(run.folder / "annotation" / split))
    rows = rows_of(run, split)
    if split == "train" and run.recipe.data.unlabelled is not None:
        rows = concatenate_datasets([rows, rows_of(run, "unlabelled")])
    return rows


def rows_to_train(run: Run, split: str) -> Dataset:
    """The same rows with their recordings, if the recipe records the teacher."""
    if run.recipe.record is None:
        return rows_to_learn(run, split)
    return load_recording(run.folder / "recording" / split)


def rows_of_baseline(run: Run, split: str) -> Dataset:
    """The rows of the student, but with the original targets, and only those with labels."""
    if split == "train" and run.recipe.has_rows_of_the_student:
        return rows_of(run, split)
    return rows_to_train(run, split)


def teacher_source(run: Run) -> tuple[str, dict[str, Any]]:
    """Path and keywords of the recipe's teacher, or of the one that this run has trained."""
    section = run.recipe.teacher
    if section.adapt is not None:
        return str(run.folder / "teacher"), _kept(section.model_kwargs)
    if section.model is None or section.is_trained_here:
        return str(run.folder / "teacher"), {}
    return section.model, section.model_kwargs


def _kept(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords to load a checkpoint of this run like the model that it was made from."""
    return {k: v for k, v in model_kwargs.items() if k in ("dtype", "attn_implementation")}


def teaches_itself(recipe: Recipe) -> bool:
    """Whether the teacher is the base model of the student's adapter."""
    teacher, student = recipe.teacher, recipe.student
    same = teacher.model is not None and teacher.model == student.model
    same = same and not teacher.is_trained_here
    files, others = (which_files(section.model_kwargs) for section in (teacher, student))
    quantised = [s.model_kwargs.get("quantization_config") for s in (teacher, student)]
    return same and student.lora is not None and files == others and quantised[0] == quantised[1]


def new_model(run: Run, config: dict[str, Any]) -> PreTrainedModel:
    """Random weights, the same for the same seed, whatever the engine."""
    recipe = run.recipe
    with made_whole():
        return model_from_config(
            {**config, **head_settings(run)},
            tokenizer_of(run),
            seed=recipe.seed,
            max_length=recipe.data.max_length,
            task=recipe.task,
        )


def pretrained(run: Run, role: str) -> PreTrainedModel:
    """The `model` of a role, to be trained; with a new head where it has none for these classes."""
    section, settings = getattr(run.recipe, role), head_settings(run)
    if settings:
        settings["ignore_mismatched_sizes"] = True  # a head for other classes
    set_seed(run.recipe.seed)  # of a new head
    with made_whole():
        return load_model(
            section.model,
            role,
            run.recipe.task,
            new_head=True,
            **({"dtype": "float32"} | section.model_kwargs | settings),
        )


def make_student(run: Run, result: Path) -> None:
    """`student_initial/`: the student before training, without adapters."""
    with made_whole():  # this is one process's work
        model, report = _new_student(run)
    model.save_pretrained(result)
    if report is not None:
        (result / "from_teacher.json").write_text(report.to_json())
        run.show(report.render())
    tokenizer_of(run).save_pretrained(result)


def student_initial(run: Run, folder: Path | None = None) -> PreTrainedModel:
    """What `make_student` saved, in float32 unless the recipe says otherwise.

    folder: of a later student instead
    """
    kept = {"dtype": "float32"} | _kept(run.recipe.student.model_kwargs)
    folder = run.folder / "student_initial" if folder is None else folder
    return load_model(folder, "student", **kept)


def _new_student(run: Run) -> tuple[PreTrainedModel, StudentReport | None]:
    section = run.recipe.student
    if section.config is not None:
        return new_model(run, section.config), None
    if section.from_teacher:
        name, kwargs = teacher_source(run)
        teacher = load_model(name, "teacher", run.recipe.task, **kwargs)
        rows = None
        if uses_influence(section.layers) or section.widths:
            rows = _measured_rows(rows_of(run, "train").shuffle(seed=run.recipe.seed))
            if torch.accelerator.is_available():
                teacher.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
        return student_and_report(
            teacher,
            section.layers,
            num_layers=section.num_layers,
            ffn=section.ffn,
            heads=section.heads,
            hidden=section.hidden,
            rows=rows,
        )
    assert section.model is not None
    model = pretrained(run, "student")
    check_max_length(run.recipe.data.max_length, max_positions(model.config), "the student")
    return model, None


def _measured_rows(rows: Dataset) -> Dataset:
    """The first rows, at most MEASURED_ROWS and MEASURED_TOKENS, and at least one."""
    rows = rows.select(range(min(len(rows), MEASURED_ROWS)))
    ends = accumulate(len(ids) for ids in rows["input_ids"])
    return rows.select(range(max(1, sum(end <= MEASURED_TOKENS for end in ends))))


def student_to_train(run: Run) -> PreTrainedModel | PeftModel:
    """The initial student, with fresh adapters where the recipe asks for LoRA."""
    model = student_initial(run)
    return model if run.recipe.student.lora is None else with_adapters(model, run.recipe)


def student_to_train_on(run: Run) -> PreTrainedModel | PeftModel:
    """The student of the `off_policy` stage, or the initial one with its adapters from there."""
    folder = run.folder / "off_policy"
    if run.recipe.student.lora is None:
        return student_initial(run, folder)
    adapted: Any = PeftModel.from_pretrained(student_initial(run), folder, is_trainable=True)
    return adapted


def with_adapters(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """A student with the fresh adapters that its recipe asks for."""
    section = recipe.student
    lora = section.lora
    assert lora is not None
    # The adapter stores the name of its base model: the original id instead of the copy in the run
    # folder, which peft could not read from a GGUF file; a folder by its whole path, since adapters
    # are loaded from anywhere.
    original = None if "gguf_file" in section.model_kwargs else section.model
    name = original or model.name_or_path
    model.name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    return _adapted(model, lora, recipe, revision_of(section))


def _adapted(
    model: PreTrainedModel, lora: AdapterSection, recipe: Recipe, revision: str | None = None
) -> PeftModel:
    options: dict[str, Any] = lora.model_dump(exclude={"alpha", "dropout", "merge"})
    options |= {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    set_seed(recipe.seed)
    config = LoraConfig(task_type=PEFT_TASKS.get(recipe.task), **options)
    adapted: Any = get_peft_model(model, config, revision=revision)
    return adapted


def unadapted_teacher(run: Run, **kwargs: Any) -> PreTrainedModel:
    """The teacher before `teacher.adapt`. kwargs: above those of the recipe"""
    section = run.recipe.teacher
    assert section.model is not None  # the recipe is refused without one
    with made_whole():
        return load_model(section.model, "teacher", **{**section.model_kwargs, **kwargs})


def teacher_to_train(run: Run) -> PreTrainedModel | PeftModel:
    """The teacher's config or model before its training; in float32 where it is adapted."""
    section = run.recipe.teacher
    if section.config is not None:
        return new_model(run, section.config)
    if section.adapt is None:
        return pretrained(run, "teacher")
    model = unadapted_teacher(run, dtype="float32")
    lora = section.adapt.lora
    return model if lora is None else _adapted(model, lora, run.recipe)


def merge_adapter(base: PreTrainedModel, folder: Path) -> None:
    """Replace the adapter in a folder by the base with the adapter merged into its weights."""
    with made_whole():
        model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    model.save_pretrained(folder)


def trained(run: Run, role: str) -> PreTrainedModel | PeftModel:
    """A finished `baseline` or `student`, from its folder."""
    folder = run.folder / role
    with made_whole():
        if not (folder / "adapter_config.json").exists():
            return load_model(folder, role)
        return PeftModel.from_pretrained(student_initial(run), folder)
