"""Check that student and teacher share a vocabulary, and how many ids they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError, warn_once
from hf_distill.models.base import base_model


def head_rows(model: PreTrainedModel) -> int:
    """The number of ids that a model's output head predicts, padding rows included."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(
            f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM"
        )
    # A ZeRO-3 weight is empty between uses; the layer's own attribute is not.
    return getattr(head, "out_features", None) or head.weight.shape[0]


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of ids that a model's input embedding has."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    return model.config.get_text_config().vocab_size


def known_ids(ids: Tensor, attention_mask: Tensor | None, readable: int, reader: str) -> Tensor:
    """Replace ids that an embedding lacks by 0 where they are masked; refuse them elsewhere.

    ids, attention_mask: (rows, positions); readable: how many ids the embedding has
    reader: the model's role, used in the error message
    raises: InputError naming the largest unknown id that is not masked
    """
    unknown = (ids >= readable) | (ids < 0)
    real = unknown if attention_mask is None else unknown & (attention_mask != 0)
    if real.any():
        largest = int(ids[real].max())
        causes = (
            "probably the data were tokenized for another model (use models that share one "
            "tokenizer), or the token was added later (resize the embedding)"
        )
        raise InputError(
            f"{reader} reads ids up to {readable - 1}, but the batch has the token id {largest}: "
            f"{'remove it from the data' if largest < 0 else causes}"
        )
    return ids.masked_fill(unknown, 0)


def first_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[int, str | None, str | None] | None:
    """The first id that is a different token in each vocabulary, with both tokens; else None.

    Ids beyond the shorter vocabulary (an added ``<pad>``) are not compared, since they are not
    shared.
    """
    ids = range(min(len(student), len(teacher)))
    ours, theirs = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student, teacher)
    )
    for index in ids:
        if ours.get(index) != theirs.get(index):
            return index, ours.get(index), theirs.get(index)
    return None


def shared_vocabulary(
    student_rows: int,
    teacher_rows: int,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """The number of ids, from 0 on, that both models share. The divergence runs over these.

    Head rows beyond a tokenizer (50257 tokens in 50304 rows) are not shared. If a tokenizer is
    missing, a warning says that the tokens were not compared.
    raises: InputError naming the first token that differs
    """
    known = [t for t in (student_tokenizer, teacher_tokenizer) if t is not None]
    compare_tokens(student_tokenizer, teacher_tokenizer)
    return min([student_rows, teacher_rows, *map(len, known)])


def same_embeddings(student: Any, teacher: Any) -> bool:
    """Whether both read tokens by the same weights, as after `student_from_teacher`.

    Then the same id is the same token in both, whatever their tokenizers. False for weights that
    cannot be compared here (partitioned, sharded, quantised).
    """
    weights = []
    for model in map(base_model, (student, teacher)):
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding.weight, DTensor):
            return False
        weights.append(embedding.weight.detach())
    ours, theirs = weights
    if ours.is_meta or theirs.is_meta or not ours.numel() or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.to(theirs.device, theirs.dtype), theirs)


def compare_tokens(
    student_tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """InputError if an id is a different token in each tokenizer; a warning if one is unknown."""
    if student_tokenizer is None or teacher_tokenizer is None:
        missing = ("student", "processing_class")
        if student_tokenizer is not None:
            missing = ("teacher", "teacher_tokenizer, or LiveTeacher(model, tokenizer),")
        warn_once(
            "The tokens of student and teacher were not compared, since the tokenizer of the %s is "
            "not known: pass %s to check them.",
            *missing,
        )
        return
    difference = first_difference(student_tokenizer, teacher_tokenizer)
    if difference is not None:
        index, ours, theirs = difference
        raise InputError(
            f"student and teacher have different tokenizers: id {index} is {ours!r} for the "
            f"student and {theirs!r} for the teacher, so their distributions cannot be compared: "
            "use a student with the teacher's tokenizer"
        )


def suppress_unused_ids(model: PreTrainedModel, tokenizer: Any) -> None:
    """Suppress head rows beyond the tokenizer in the model's generation config."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not model.can_generate():
        return
    if unused := range(len(tokenizer), head_rows(model)):
        config: Any = model.generation_config
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *unused})
