"""Let a student that learns conversations end its texts where a turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.data.chat import end_of_turn

LOOKED_AT = 64  # rows


def end_at_turns(model: PreTrainedModel, tokenizer: Any, rows: Any) -> str | None:
    """Add the token that ends a turn to those at which the student's generation stops.

    A base model stops at its end-of-text token only, which rows of chats may not have: it would
    write on after its answer. The generation config is saved with the student.

    rows: of the training, tokenized; nothing is done unless one of the first has the token
    returns: the token; None if nothing was done
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if not isinstance(rows, Dataset | Sequence) or tokenizer.chat_template is None:
        return None
    end = end_of_turn(tokenizer)
    known = config.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    if end is None or end in known or not any(end in _ids(row) for row in islice(rows, LOOKED_AT)):
        return None
    config.eos_token_id = [*known, end]
    return str(tokenizer.convert_ids_to_tokens(end))


def _ids(row: Any) -> Any:
    return row.get("input_ids", ()) if isinstance(row, dict) else ()
