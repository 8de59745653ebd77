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
read_source_target, read_questions, read_labelled, read_unlabelled, read_tagged, read_texts
                    rows under the names of public data sets, checked
tokenize_source_target, tokenize_questions, tokenize_labelled, tokenize_tagged, tokenize_texts
                    these rows as token ids and labels
with_spaces         a byte-level tokenizer for words, as token classification needs it
Labels, label_names the kind and names of labels, and the settings of a model's config for them
model_labels, same_classes, GivenLabels    the labels of a model that exists
masking_collator    masks tokens at random, for masked language modelling
mask_rows           masks tokens once, for evaluation and recordings
read_task_rows, tokenize_splits    the same for the `data` section of a recipe, with `TaskRows`
tokenize_task_rows  raw rows of a model's task to token ids and labels; TaskTokens, its settings
is_raw_for          whether rows are raw rows of a task
TaskCollator        rows of a task to batches of tensors

Prompts without completions:
holds_prompts       whether rows hold prompts alone
tokenize_prompts    prompts to token ids
prompt_length       how many tokens of a row are its prompt
TEACHER_PROMPT, TEACHER_PROMPT_IDS      the columns with a teacher's own prompts

For all:
collator, Collator  rows to batches of tensors
require_rows, check_max_length     errors for too few rows and for too long rows
"""

from hf_distill.data.collate import Collator, collator
from hf_distill.data.config import CleanConfig, DataConfig
from hf_distill.data.forms import FORMS, Form, find_form
from hf_distill.data.labels import Labels
from hf_distill.data.masked_texts import masking_collator, tokenize_texts
from hf_distill.data.model_labels import GivenLabels, model_labels, same_classes
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.prepare import check_max_length, clean_rows, require_rows, text_iterator
from hf_distill.data.prepare_tasks import TaskRows, read_task_rows, tokenize_splits
from hf_distill.data.prompt_rows import (
    TEACHER_PROMPT,
    TEACHER_PROMPT_IDS,
    holds_prompts,
    prompt_length,
    tokenize_prompts,
)
from hf_distill.data.question_windows import tokenize_questions
from hf_distill.data.raw_rows import is_raw, tokenize_raw_rows
from hf_distill.data.task_collators import TaskCollator, mask_rows, task_collator
from hf_distill.data.task_forms import (
    TaskTokens,
    is_raw_for,
    known_task_forms,
    tokenize_task_rows,
)
from hf_distill.data.task_rows import (
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_texts,
    read_unlabelled,
)
from hf_distill.data.task_tokens import (
    label_names,
    tokenize_labelled,
    tokenize_source_target,
    tokenize_tagged,
    with_spaces,
)
from hf_distill.data.tokenize import tokenize_rows

__all__ = [
    "FORMS",
    "TEACHER_PROMPT",
    "TEACHER_PROMPT_IDS",
    "CleanConfig",
    "Collator",
    "DataConfig",
    "Form",
    "GivenLabels",
    "Labels",
    "PreparationTable",
    "Step",
    "TaskCollator",
    "TaskRows",
    "TaskTokens",
    "check_max_length",
    "clean_rows",
    "collator",
    "find_form",
    "holds_prompts",
    "is_raw",
    "is_raw_for",
    "known_task_forms",
    "label_names",
    "mask_rows",
    "masking_collator",
    "model_labels",
    "prompt_length",
    "read_labelled",
    "read_questions",
    "read_source_target",
    "read_tagged",
    "read_task_rows",
    "read_texts",
    "read_unlabelled",
    "require_rows",
    "same_classes",
    "task_collator",
    "text_iterator",
    "tokenize_labelled",
    "tokenize_prompts",
    "tokenize_questions",
    "tokenize_raw_rows",
    "tokenize_rows",
    "tokenize_source_target",
    "tokenize_splits",
    "tokenize_tagged",
    "tokenize_task_rows",
    "tokenize_texts",
    "with_spaces",
]
