"""Data preparation: collect, clean, tokenize, pack, collate.

From files:
clean_rows          files or a Hub data set to rows of text, filtered and deduplicated
tokenize_rows       rows of text to token ids and labels, packed
DataConfig, CleanConfig    the settings of a recipe's `data` section
PreparationTable, Step     what each step kept and removed
text_iterator       the text of rows, to train a tokenizer on

From rows in Python:
tokenize_raw_rows   rows of a known form to token ids and labels, packed; also of a stream
is_raw              whether rows are of a known form and not tokenized yet
FORMS, Form, find_form     the known forms, and the form that some columns have

For other tasks than causal language modelling:
read_source_target, read_questions, read_labelled, read_tagged, read_texts
                    rows under the names of public data sets, checked
tokenize_source_target, tokenize_questions, tokenize_labelled, tokenize_tagged, tokenize_texts
                    these rows as token ids and labels
Labels, label_names what labels are, and what a model's config says of them
task_collator       rows of a task to batches of tensors
masking_collator    masks tokens at random, for masked language modelling
read_task_rows, tokenize_task_rows, TaskRows     the same from a recipe's `data` section

For all:
collator, Collator  rows to batches of tensors
require_rows, check_max_length     errors for too few rows and for too long rows
"""

from hf_distill.data.collate import Collator, collator
from hf_distill.data.config import CleanConfig, DataConfig
from hf_distill.data.forms import FORMS, Form, find_form
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.prepare import check_max_length, clean_rows, require_rows, text_iterator
from hf_distill.data.prepare_tasks import TaskRows, read_task_rows, tokenize_task_rows
from hf_distill.data.raw_rows import is_raw, tokenize_raw_rows
from hf_distill.data.task_batches import task_collator
from hf_distill.data.task_rows import (
    Labels,
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_texts,
)
from hf_distill.data.task_tokens import (
    label_names,
    masking_collator,
    tokenize_labelled,
    tokenize_questions,
    tokenize_source_target,
    tokenize_tagged,
    tokenize_texts,
)
from hf_distill.data.tokenize import tokenize_rows

__all__ = [
    "FORMS",
    "CleanConfig",
    "Collator",
    "DataConfig",
    "Form",
    "Labels",
    "PreparationTable",
    "Step",
    "TaskRows",
    "check_max_length",
    "clean_rows",
    "collator",
    "find_form",
    "is_raw",
    "label_names",
    "masking_collator",
    "read_labelled",
    "read_questions",
    "read_source_target",
    "read_tagged",
    "read_task_rows",
    "read_texts",
    "require_rows",
    "task_collator",
    "text_iterator",
    "tokenize_labelled",
    "tokenize_questions",
    "tokenize_raw_rows",
    "tokenize_rows",
    "tokenize_source_target",
    "tokenize_tagged",
    "tokenize_task_rows",
    "tokenize_texts",
]
