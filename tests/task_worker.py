"""The two-process cases of the grid of tasks, in one group: `task_worker.py OUT`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from distributed import TESTS, leave

sys.path.insert(0, str(TESTS / "tasks"))

import task_grid

if __name__ == "__main__":
    found = {}
    for case in task_grid.cases():
        if case.processes == 2:
            with tempfile.TemporaryDirectory() as folder:
                found[str(case)] = task_grid.run(case, Path(folder))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
