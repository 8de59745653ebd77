"""Tasks: which positions of a batch are predicted, and what their labels are."""

from hf_distill.tasks.base import TARGET_INDEX, Task, has_labels
from hf_distill.tasks.causal_lm import CausalLM
from hf_distill.tasks.find import TASKS, find_task

__all__ = ["TARGET_INDEX", "TASKS", "CausalLM", "Task", "find_task", "has_labels"]
