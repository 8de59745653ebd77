"""Tasks: which positions of a batch are predicted, and what their labels are."""

from hf_distill.tasks.base import Task, has_labels
from hf_distill.tasks.causal_lm import CausalLM
from hf_distill.tasks.find import TASKS, find_task

__all__ = ["TASKS", "CausalLM", "Task", "find_task", "has_labels"]
