"""The small models and rows of the tests of tasks, for the tests of training."""

from __future__ import annotations

import sys

from distributed import TESTS

sys.path.insert(0, str(TESTS / "tasks"))

from task_models import collate as task_collate
from task_models import make_model
from task_models import make_rows as task_rows

__all__ = ["make_model", "task_collate", "task_rows"]
