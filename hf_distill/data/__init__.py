"""Data preparation: collect, clean, tokenize, pack, collate.

``clean_rows`` gives rows of text, ``tokenize_rows`` rows of token ids and labels, ``collator``
batches of tensors.
"""

from hf_distill.data.collate import Collator, collator
from hf_distill.data.config import CleanConfig, DataConfig
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.prepare import check_max_length, clean_rows, require_rows, text_iterator
from hf_distill.data.tokenize import tokenize_rows

__all__ = [
    "CleanConfig",
    "Collator",
    "DataConfig",
    "PreparationTable",
    "Step",
    "check_max_length",
    "clean_rows",
    "collator",
    "require_rows",
    "text_iterator",
    "tokenize_rows",
]
