"""The two-process cases of one tier of the grid, in one group: `grid_worker.py TIER OUT`."""

import json
import sys
import tempfile
from pathlib import Path

import grid
import torch
from distributed import leave

if __name__ == "__main__":
    tier, out = sys.argv[1:]
    cases = grid.every_pair() if tier == "pairs" else grid.every_case()
    found = {}
    for case in cases:
        if case.processes == 2:
            with tempfile.TemporaryDirectory() as folder:
                found[str(case)] = grid.run(case, Path(folder))
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    leave()
