"""A smaller student made of a teacher's layers and units.

There is no list of architectures. The layers are the ``nn.ModuleList``s whose length the config
states (`models.shorter_config`). Their weights are copied by index (`models.layer_origins`). Widths
are cut in `models.widths`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.models.assembly import assembled, check_weights
from hf_distill.models.calibration import (
    BlockInfluence,
    Row,
    calibration_rows,
    run,
)
from hf_distill.models.layer_origins import DoesNotFit, Origin, plan_layers
from hf_distill.models.layer_selection import (
    Layers,
    Stack,
    choose_layers,
    similar_selections,
    uses_influence,
)
from hf_distill.models.loading import load_model
from hf_distill.models.narrower_config import Width, Widths, narrower_configs
from hf_distill.models.shorter_config import blueprint, find_stacks, shorter_config
from hf_distill.models.student_report import StudentReport
from hf_distill.models.widths import Cut, narrower

# Other selections that are tried for the error message.
TRIED, NAMED = 12, 2


def student_from_teacher(
    teacher: PreTrainedModel | str | Path,
    layers: Layers | Mapping[str, Layers] | None = None,
    *,
    num_layers: int | None = None,
    ffn: Width | None = None,
    heads: Width | None = None,
    hidden: Width | None = None,
    rows: Iterable[Row] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """A new model of the teacher's class with copies of some of its layers and units.

    teacher: a loaded transformers model of any task, or the id or folder of a causal one
    layers: the layers to copy; by default all if a width is given, otherwise "every_other"
        "every_other": layers 0, 2, 4, ...
        "first_and_last": ``num_layers`` evenly spaced layers that include the first and the last;
            by default half of them, as DistilBERT and DistilGPT2 were initialised
            (0, 2, 4, 7, 9, 11 of 12)
        "influence": the ``num_layers`` layers (by default half of them) with the largest block
            influence on ``rows``: 1 - mean cosine(hidden state in, hidden state out)
        a list of layer indices, ascending
        for an encoder-decoder, one of these for both, or {"encoder": ..., "decoder": ...}; a side
            that is not named is kept whole
    ffn, heads, hidden: neurons of each feed-forward network, attention heads of each layer and
        features of the hidden states to keep, as a number or as a share of the teacher's. The most
        active ones on ``rows`` are kept (`models.widths`), heads by whole groups that share a key.
        If the size of a head is hidden / heads (GPT-2, BERT, BART), reduce both in proportion
    rows: a few hundred rows of the data that the student is for. Each is a text, or has
        ``input_ids`` and perhaps ``attention_mask`` and ``labels``. All of them are used, one at a
        time, forward only
    tokenizer: for rows that are texts
    returns: a model in evaluation mode on the teacher's device, in its dtype, with its generation
        config, its weights tied as the teacher's are; no memory is shared with the teacher
    raises: InputError if the selection does not fit the teacher, if a layer would compute something
        else at its new index, or if a weight cannot be cut to a width
    """
    student, report = student_and_report(
        teacher,
        layers,
        num_layers=num_layers,
        ffn=ffn,
        heads=heads,
        hidden=hidden,
        rows=rows,
        tokenizer=tokenizer,
    )
    logging.getLogger("hf_distill").info("%s", report.render())
    return student


def student_and_report(
    teacher: PreTrainedModel | str | Path,
    layers: Layers | Mapping[str, Layers] | None = None,
    *,
    num_layers: int | None = None,
    ffn: Width | None = None,
    heads: Width | None = None,
    hidden: Width | None = None,
    rows: Iterable[Row] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, StudentReport]:
    """`student_from_teacher`, with a report of the removed parts and the student's perplexity.

    The report has perplexities if there are ``rows`` and the teacher is a language model.
    """
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_model(_name(teacher), "teacher")
    check_weights(teacher, blueprint(type(teacher), teacher.config))
    widths = Widths(ffn, heads, hidden)
    stacks, by_influence = find_stacks(teacher), uses_influence(layers)
    measured = rows is not None or by_influence or widths
    on = calibration_rows(teacher, rows, tokenizer) if measured else []
    scores = BlockInfluence(teacher, stacks if by_influence else [])
    with scores.measured():
        before = run(teacher, on)
    influence = scores.scores
    chosen = _chosen(stacks, layers, num_layers, widths, influence)
    student, cut = _with_layers(teacher, chosen), Cut({}, {})
    if widths:
        student, cut = narrower(student, widths, on)
    return student, StudentReport(
        parameters=student.num_parameters(),
        teacher_parameters=teacher.num_parameters(),
        initial_perplexity=run(student, on),
        teacher_perplexity=before,
        influence={stack.name: scores for stack, scores in influence.items()},
        removed_layers={
            stack.name: [i for i in range(stack.length) if i not in kept]
            for stack, kept in chosen.items()
        },
        widths=cut.fields,
        kept_units=cut.kept,
    )


def student_stacks(
    whole: PreTrainedModel,
    layers: Layers | Mapping[str, Layers] | None,
    num_layers: int | None,
    widths: Widths,
) -> list[Stack]:
    """The stacks of layers that a student of a teacher would have; nothing is measured or copied.

    whole: the teacher without memory; the others as in `student_from_teacher`
    raises: InputError as it does, but for what only weights can show
    """
    stacks, by_influence = find_stacks(whole), uses_influence(layers)
    # Any scores will do for the number of layers.
    scores = {stack: [0.0] * stack.length for stack in stacks} if by_influence else {}
    chosen = _chosen(stacks, layers, num_layers, widths, scores)
    if not by_influence:
        whole = blueprint(type(whole), _shortened(whole, chosen)[0])
    if widths:
        narrower_configs(whole, find_stacks(whole), widths)
    return [replace(stack, length=len(kept)) for stack, kept in chosen.items()]


def _chosen(
    stacks: Sequence[Stack],
    layers: Layers | Mapping[str, Layers] | None,
    num_layers: int | None,
    widths: Widths,
    influence: Mapping[Stack, Sequence[float]],
) -> dict[Stack, list[int]]:
    if layers is None and not (widths and num_layers is None):
        layers = "every_other"
    return choose_layers(stacks, {} if layers is None else layers, num_layers, influence)


def _with_layers(
    teacher: PreTrainedModel, chosen: Mapping[Stack, Sequence[int]]
) -> PreTrainedModel:
    """A copy of a model with the chosen layers only."""
    config, plan = _shortened(blueprint(type(teacher), teacher.config), chosen)
    source = teacher.state_dict()
    return assembled(teacher, config, {key: part(source) for key, part in plan.items()})


def _shortened(
    whole: PreTrainedModel, chosen: Mapping[Stack, Sequence[int]]
) -> tuple[PreTrainedConfig, dict[str, Origin]]:
    """The config of a teacher with the chosen layers only, and the origin of each weight.

    whole: the teacher without memory
    """
    kept = {stack: list(indices) for stack, indices in chosen.items()}
    try:
        config = shorter_config(type(whole), whole.config, kept)
        return config, plan_layers(whole, blueprint(type(whole), config), kept)
    except DoesNotFit as reason:
        raise InputError(f"{reason}: {_alternatives(whole, kept)}") from None


def _alternatives(whole: PreTrainedModel, chosen: Mapping[Stack, list[int]]) -> str:
    """Selections of as many layers that would work, as the end of a sentence."""
    working: list[str] = []
    (stack, kept), *others = [(s, k) for s, k in chosen.items() if len(k) < s.length]
    if not others:
        for candidate in islice(similar_selections(stack.length, len(kept)), TRIED):
            selection = {**chosen, stack: candidate}
            try:
                config = shorter_config(type(whole), whole.config, selection)
                plan_layers(whole, blueprint(type(whole), config), selection)
            except (DoesNotFit, InputError):
                continue
            if str(candidate) not in working:
                working.append(str(candidate))
            if len(working) == NAMED:
                break
    if working:
        return f"layers={' or layers='.join(working)} would work"
    return "choose layers whose kinds alternate as the teacher's do, or another number of layers"


def _name(teacher: object) -> str | Path:
    if isinstance(teacher, str | Path):
        return teacher
    raise InputError(
        f"teacher is a {type(teacher).__name__}, not a transformers model: give a PreTrainedModel "
        "(merge an adapter into it first) or the id or folder of one"
    )
