"""An on-policy training on several processes: `on_policy_worker.py OUT`."""

import sys
from pathlib import Path

import torch
from distributed import TESTS, leave

sys.path.insert(0, str(TESTS / "training"))

from test_on_policy import make_for_processes

if __name__ == "__main__":
    out = Path(sys.argv[1])
    trainer = make_for_processes(out, processes=2)
    trainer.train()
    if torch.distributed.get_rank() == 0:
        torch.save(dict(trainer.model.state_dict()), out / "weights.pt")
    leave()
