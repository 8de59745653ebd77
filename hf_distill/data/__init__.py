"""Data preparation: collect, clean, tokenize, pack, collate.

clean_rows          files or a Hub data set to rows of text, filtered and deduplicated
tokenize_rows       rows of text to token ids and labels, packed
tokenize_raw_rows   the same for rows that exist in Python, also of a stream
collator            rows to batches of tensors
DataConfig, CleanConfig    the settings of a recipe's `data` section
PreparationTable, Step     what each step kept and removed
"""

from hf_distill.data.collate import Collator, collator
from hf_distill.data.config import CleanConfig, DataConfig
from hf_distill.data.forms import FORMS, Form, find_form
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.prepare import check_max_length, clean_rows, require_rows, text_iterator
from hf_distill.data.raw_rows import is_raw, tokenize_raw_rows
from hf_distill.data.tokenize import tokenize_rows

__all__ = [
    "FORMS",
    "CleanConfig",
    "Collator",
    "DataConfig",
    "Form",
    "PreparationTable",
    "Step",
    "check_max_length",
    "clean_rows",
    "collator",
    "find_form",
    "is_raw",
    "require_rows",
    "text_iterator",
    "tokenize_raw_rows",
    "tokenize_rows",
]
