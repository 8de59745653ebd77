"""On-policy rows: the student generates completions, and the teacher gives its distributions.

OnPolicy              replaces rows of an optimizer step by the student's own text
OnPolicyArguments     its settings, a part of `DistillationArguments`
written_rows          the texts generated in a training, as a data set; WRITTEN_ROWS, its file
"""

from hf_distill.training.on_policy.arguments import OnPolicyArguments
from hf_distill.training.on_policy.kept_rows import WRITTEN_ROWS, written_rows
from hf_distill.training.on_policy.writer import OnPolicy

__all__ = ["WRITTEN_ROWS", "OnPolicy", "OnPolicyArguments", "written_rows"]
