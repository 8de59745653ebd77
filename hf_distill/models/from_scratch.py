"""Make a tokenizer and a model with random weights."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_distill.errors import InputError
from hf_distill.models.heads import HEADS, class_name, model_types

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Of other tasks than causal language modelling, as in RoBERTa.
BEGIN, END, MASK = "<s>", "</s>", "<mask>"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_max_length: int | None = None,
    task: str = "causal-lm",
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lossless on any text, with exactly ``vocab_size`` tokens.

    texts: the corpus, read once and never kept in memory
    vocab_size: number of tokens, the special ones included. For a causal model they are
        ``<|endoftext|>`` (id 0, begins and ends a text) and ``<|pad|>`` (id 1). Padding has its own
        token, so that the end of a text is never masked together with it and stays learnable.
        For other tasks they are ``<s>``, ``<|pad|>``, ``</s>`` and ``<mask>`` (ids 0 to 3), and are
        put around texts and pairs: the tokenizer of an encoder-decoder ends a text with ``</s>``,
        that of an encoder begins it with ``<s>`` too.
    model_max_length: positions of the model, stored with the tokenizer
    task: the key of a task
    raises: InputError if the corpus is empty or has too few frequent pairs for so many tokens
    """
    causal = task == "causal-lm"
    special = [END_OF_TEXT, PAD] if causal else [BEGIN, PAD, END, MASK]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size} cannot hold the 256 bytes and {len(special)} special tokens: "
            f"give at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is not worth a token
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty(texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the corpus is too small for a vocabulary of {vocab_size} tokens, it gives "
            f"{tokenizer.get_vocab_size()}: give more text or set vocab_size to that"
        )
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    begin, end = (END_OF_TEXT, END_OF_TEXT) if causal else (BEGIN, END)
    marks = {"bos_token": begin, "eos_token": end, "pad_token": PAD}
    if not causal:
        marks |= {"cls_token": BEGIN, "sep_token": END, "mask_token": MASK}
        start = "" if task == "seq2seq-lm" else f"{BEGIN} "
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start}$A {END}",
            pair=f"{start}$A {END} $B {END}",
            special_tokens=[(BEGIN, special.index(BEGIN)), (END, special.index(END))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **marks, **limit
    )


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    seen = False
    for text in texts:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise InputError("the corpus has no text to train a tokenizer on: check the data's paths")


def model_from_config(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int | None = None,
    task: str = "causal-lm",
) -> PreTrainedModel:
    """A model with random weights and the tokenizer's vocabulary.

    config: ``model_type`` (any for which transformers has a model of the task) and that model's
        settings, under its own names or the common ones (``n_layer``, ``num_hidden_layers``).
        The vocabulary's size and the ids of special tokens come from the tokenizer
    seed: the same seed gives the same weights; the global random state does not change
    max_length: the longest row that the model must take, in positions
    task: its key; "seq2seq-lm" for an encoder-decoder. BART and its relatives also have a class
        for "causal-lm", which is their decoder alone
    raises: InputError for an unknown model type or setting (naming the nearest), for a value that
        the model refuses, and for fewer positions than ``max_length``
    """
    settings = dict(config)
    model_type = _model_type(settings)
    decided = _of_tokenizer(settings, tokenizer, task)
    built = _checked_config(model_type, settings, decided, task)
    positions = max_positions(built)
    if max_length is not None and positions is not None and positions < max_length:
        raise InputError(
            f"max_length={max_length} is beyond the {positions} positions of this {model_type}: "
            "shorten the rows or give the model more positions (max_position_embeddings, or "
            "n_positions)"
        )
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)
        try:
            model: PreTrainedModel = HEADS[task][0].from_config(built)
            if not is_deepspeed_zero3_enabled():  # the weights are partitioned by now
                _predict_something(model)
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise InputError(_refused(model_type, task, error)) from error
    return model


def config_from_settings(config: Mapping[str, Any], task: str) -> PreTrainedConfig:
    """The config that `model_from_config` makes, but for what the tokenizer decides.

    raises: InputError for an unknown model type or setting
    """
    settings = dict(config)
    return _checked_config(_model_type(settings), settings, {}, task)


def _model_type(settings: dict[str, Any]) -> str:
    """Take the type of the model out of its settings; InputError where there is none."""
    if "model_type" not in settings:
        raise InputError("the config has no model_type: give one, such as gpt2 or llama")
    return str(settings.pop("model_type"))


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest row, in positions, that a model's config states; None if there is no limit.

    RoBERTa and its relatives reserve two of these positions (see `models.positions`).
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def _predict_something(model: PreTrainedModel) -> None:
    """Some values (key-value heads that do not divide the heads) fail only when a model runs."""
    ids = torch.full((1, 2), model.config.get_text_config().eos_token_id or 0)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)


def _of_tokenizer(
    settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, task: str
) -> dict[str, int | None]:
    """The settings that the tokenizer decides."""
    decided = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if task == "seq2seq-lm":
        decided["decoder_start_token_id"] = tokenizer.pad_token_id  # as in T5 and Marian
    for name, value in decided.items():
        if settings.get(name, value) != value:
            raise InputError(
                f"{name}={settings[name]!r} disagrees with the tokenizer's {value}: leave it out, "
                "the model takes it from the tokenizer"
            )
    return decided


def _checked_config(
    model_type: str, settings: dict[str, Any], decided: dict[str, int | None], task: str
) -> PreTrainedConfig:
    """The config of some settings and those that the tokenizer has decided."""
    known_types = model_types(task)
    if model_type not in known_types:
        what, such = {
            "causal-lm": ("no causal language model", "gpt2 or llama"),
            "seq2seq-lm": ("no encoder-decoder", "t5 or bart"),
        }.get(task, (f"no model for {task}", "bert or roberta"))
        raise InputError(
            f"model_type={model_type!r} is {what} that transformers knows: give one, such as "
            f"{such} (the nearest is {_nearest(model_type, known_types)!r})"
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = config_class(**(settings | decided))
    except Exception as error:  # configs validate themselves, each with its own kind of error
        raise InputError(_refused(model_type, task, error)) from error
    known = {field.name for field in dataclasses.fields(config_class)} | set(config.attribute_map)
    for name in settings:
        if name not in known and _is_unread(name, config):
            raise InputError(
                f"{name!r} is not a setting of {model_type}, which would ignore it: "
                f"the nearest is {_nearest(name, known)!r}"
            )
    if getattr(config, "forced_eos_token_id", None) is not None:
        # `generate` writes it at the length limit; the default is of another vocabulary.
        config.forced_eos_token_id = settings.get("forced_eos_token_id", config.eos_token_id)
    return config


def _is_unread(name: str, config: PreTrainedConfig) -> bool:
    """Whether a config only stored a setting that is no field of it, or dropped it.

    Older names that it understands (``rope_theta``) are turned into a field. Generation settings
    are removed too, without any effect.
    """
    return name in vars(config) or hasattr(GenerationConfig(), name)


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def _refused(model_type: str, task: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    writes = task == "causal-lm" and model_type in model_types("seq2seq-lm")
    advice = ", or pass task='seq2seq-lm' for an encoder-decoder" if writes else ""
    return (
        f"{model_type} refuses its config as a {class_name(model_type, task)}, the class for "
        f"task={task!r} ({reason.rstrip('.')}): correct the value{advice}"
    )
