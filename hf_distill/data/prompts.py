"""Encode the input of generation: sources with a prefix, prompts, conversations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.data.chat import render
from hf_distill.data.tokenize import glue, prefix_ids, token_ids
from hf_distill.errors import InputError

_UNLIMITED = 10**9  # tokenizers without a limit report a huge number


@dataclass(frozen=True)
class Prompts:
    """Encodes sources for generation.

    encoder_decoder: the source is the encoder's input; otherwise it is the beginning of the text
        that the model continues
    limit: most tokens of an encoded source; a longer text is cut at the end
    prefix: put before each text, such as "summarize: "
    separator: put after each text of a causal model that does not end in white space
    """

    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool
    limit: int | None = None
    prefix: str = ""
    separator: str = ""

    def encode(self, source: Any) -> tuple[list[int], int]:
        """The ids of a text or a list of messages, and their number before it was cut.

        raises: InputError for an empty source, and for a conversation that is too long
        """
        if isinstance(source, str):
            if not source.strip():
                raise InputError("the source is empty: leave out such rows")
            return (self._encoder if self.encoder_decoder else self._causal)(source)
        if not isinstance(source, Sequence) or not all(isinstance(m, Mapping) for m in source):
            raise InputError(
                f"the source is a {type(source).__name__}, but must be text or a list of messages"
            )
        if self.encoder_decoder:
            raise InputError("an encoder-decoder reads text, but the source is a list of messages")
        ids = render(self.tokenizer, list(source), add_generation_prompt=True)["input_ids"]
        if self.limit is not None and len(ids) > self.limit:
            raise InputError(
                f"a conversation has {len(ids)} tokens, but the model can read {self.limit}: "
                "leave out such rows, or shorten them"
            )
        return ids, len(ids)

    def _encoder(self, text: str) -> tuple[list[int], int]:
        whole = self.tokenizer(self.prefix + text, verbose=False)["input_ids"]
        if self.limit is None or len(whole) <= self.limit:
            return whole, len(whole)
        cut = self.tokenizer(self.prefix + text, truncation=True, max_length=self.limit)
        return cut["input_ids"], len(whole)

    def _causal(self, text: str) -> tuple[list[int], int]:
        text = self.prefix + text
        border = glue(text, "", self.separator)
        start = prefix_ids(self.tokenizer)
        whole = start + token_ids(self.tokenizer, [text + border])[0]
        if self.limit is None or len(whole) <= self.limit:
            return whole, len(whole)
        # The separator tells the model where the source ends, so it stays.
        end = token_ids(self.tokenizer, [border])[0] if border else []
        left = self.limit - len(start) - len(end)
        if left < 1:
            raise InputError(
                f"the model can read {self.limit} tokens, which leaves none for the source: set "
                "max_new_tokens lower, or use a model with more positions"
            )
        return start + token_ids(self.tokenizer, [text])[0][:left] + end, len(whole)


def source_limit(
    tokenizer: PreTrainedTokenizerBase, positions: int | None, new_tokens: int = 0
) -> int | None:
    """The longest source that a model takes, in tokens; None if there is no limit.

    positions: of the model; new_tokens: reserved for the text that a causal model generates
    raises: InputError if they leave none for the source
    """
    stated = [positions, tokenizer.model_max_length]
    limits = [limit for limit in stated if limit is not None and limit < _UNLIMITED]
    if not limits:
        return None
    if new_tokens >= min(limits):
        raise InputError(
            f"max_new_tokens is {new_tokens}, but the model has {min(limits)} positions for source "
            "and new tokens together: set it lower"
        )
    return min(limits) - new_tokens


def for_languages(
    tokenizer: PreTrainedTokenizerBase, source: str | None, target: str | None
) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """The tokenizer of a model with language codes (mBART, M2M100, NLLB) for two languages.

    source, target: codes, or their part before "_"
    returns: a copy that marks the languages of sources and targets, and the keyword for `generate`
    raises: InputError for a tokenizer without language codes, or a language that it lacks
    """
    if source is None and target is None:
        return tokenizer, {}
    if not has_languages(tokenizer):
        raise InputError(
            f"the languages {source!r} and {target!r} are given, but the tokenizer has no language "
            "codes: leave them out, and use a prefix where the model expects one"
        )
    tokenizer = copy.deepcopy(tokenizer)
    marked: Any = tokenizer
    if source is not None:
        marked.src_lang = _language(tokenizer, source)[0]
    if target is None:
        return tokenizer, {}
    marked.tgt_lang, token = _language(tokenizer, target)
    return tokenizer, {"forced_bos_token_id": token}


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer marks the language of a text."""
    return hasattr(type(tokenizer), "src_lang")


def _language(tokenizer: Any, code: str) -> tuple[str, int]:
    """The tokenizer's name for a language, and the id of its token."""
    # Only special tokens: "en" may also be a piece of a word.
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    for token in (code, f"__{code}__"):
        if token in special:
            return code, tokenizer.convert_tokens_to_ids(token)
    longer = [token for token in special if token.startswith(f"{code}_")]
    if len(longer) == 1:
        return longer[0], tokenizer.convert_tokens_to_ids(longer[0])
    raise InputError(
        f"the tokenizer knows no language {code!r}: give one of its codes, such as en_XX (mBART), "
        "en (M2M100) or eng_Latn (NLLB)"
    )
