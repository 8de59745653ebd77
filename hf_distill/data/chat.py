"""Conversations as token ids by the tokenizer's chat template, with labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from hf_distill.data.forms import joined_messages
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")

Annotated = tuple[list[int], list[int]]  # ids and labels of one row
Messages = list[dict[str, Any]]


def assistant_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Annotated:
    """Ids and labels of a conversation, with the loss on the assistant's turns.

    A turn is what the template marks by ``{% generation %}``. Without marks it extends from the end
    of the generation prompt to the end of the turn; a turn that opens the conversation is then not
    covered by the loss, because no generation prompt comes before it.
    raises: InputError for a template without marks that rewrites earlier turns
    """
    marked = bool(_GENERATION.search(template(tokenizer)))
    return (_by_marks if marked else _by_prefixes)(tokenizer, messages)


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; InputError if the tokenizer has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            "the rows are chat, but the tokenizer has no chat template: use a chat model's "
            "tokenizer, or set tokenizer.chat_template"
        ) from error


def _by_marks(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Annotated:
    encoded = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids = encoded["input_ids"]
    pairs = zip(ids, encoded["assistant_masks"], strict=True)
    return ids, [token if learnt else IGNORE for token, learnt in pairs]


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Annotated:
    ids = render(tokenizer, messages)["input_ids"]
    labels = [IGNORE] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not place:
            continue
        before = render(tokenizer, messages[:place], add_generation_prompt=True)["input_ids"]
        after = render(tokenizer, messages[: place + 1])["input_ids"]
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                "the assistant's turns cannot be found: the chat template does not mark them, and "
                f"the first {place + 1} messages as rendered are not a prefix of all "
                f"{len(messages)}; use a template with {{% generation %}} around these turns"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def completion_of(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Annotated:
    """A conversational prompt with its completion, rendered as one conversation."""
    ids = render(tokenizer, joined_messages(row))["input_ids"]
    prompt = render(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"]
    if ids[: len(prompt)] != prompt:
        raise InputError(
            "the chat template renders a prompt differently when a completion follows, so the "
            "completion's tokens cannot be found: use a template that only appends"
        )
    return ids, [IGNORE] * len(prompt) + ids[len(prompt) :]


def without_end(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], annotated: Annotated
) -> Annotated:
    """A conversation up to the last token of its last message, without the end of this turn.

    row: with messages, or prompt and completion; annotated: its ids and labels
    """
    messages = row["messages"] if "messages" in row else joined_messages(row)
    open_ids = render(tokenizer, messages, continue_final_message=True)["input_ids"]
    ids, labels = annotated
    length = next((i for i, (a, b) in enumerate(zip(ids, open_ids, strict=False)) if a != b),
                  min(len(ids), len(open_ids)))  # fmt: skip
    return ids[:length], labels[:length]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant's turn, if there is one."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        whole = render(tokenizer, talk)["input_ids"]
        unfinished = render(tokenizer, talk, continue_final_message=True)["input_ids"]
    except (InputError, ValueError):  # a template for other conversations
        return None
    after = whole[len(unfinished) :]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if whole[: len(unfinished)] != unfinished or not after or after[0] not in special:
        return None
    return int(after[0])


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any
) -> dict[str, Any]:
    """A conversation by the chat template, as ids; InputError if the template refuses it."""
    if not messages:
        raise InputError("a conversation or its prompt has no message: leave out such rows")
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            **options,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template refuses a conversation of {roles} ({error}): "
            "correct such rows or leave them out"
        ) from error
    return cast(dict[str, Any], encoded)
