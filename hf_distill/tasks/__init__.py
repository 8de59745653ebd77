"""Tasks: which positions of a batch are predicted, and what their labels are."""

from hf_distill.tasks.base import TARGET_INDEX, Task
from hf_distill.tasks.causal_lm import CausalLM
from hf_distill.tasks.classification import SequenceClassification, TokenClassification
from hf_distill.tasks.find import TASKS, find_task, named_task
from hf_distill.tasks.masked_lm import MaskedLM
from hf_distill.tasks.question_answering import QuestionAnswering
from hf_distill.tasks.seq2seq_lm import Seq2SeqLM

__all__ = [
    "TARGET_INDEX",
    "TASKS",
    "CausalLM",
    "MaskedLM",
    "QuestionAnswering",
    "Seq2SeqLM",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "find_task",
    "named_task",
]
