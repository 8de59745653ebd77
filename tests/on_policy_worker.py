"""On-policy trainings on two processes: `on_policy_worker.py OUT ENGINE CASE...`.

ENGINE: ddp, or zero2 as accelerate's configuration says; CASE: of `CASES` in test_on_policy_rows.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from distributed import TESTS, leave

sys.path.insert(0, str(TESTS / "training"))

from test_on_policy_rows import make_for_processes

if __name__ == "__main__":
    out, engine, *cases = Path(sys.argv[1]), *sys.argv[2:]
    for case in cases:
        trainer = make_for_processes(out / f"{case}-two", case, processes=2)
        trainer.train()
        wrapped = trainer.model_wrapped
        if engine == "zero2":
            assert wrapped.zero_optimization_stage() == 2
        else:
            assert type(wrapped).__name__ == "DistributedDataParallel"
        weights = trainer.accelerator.get_state_dict(wrapped)
        if trainer.is_world_process_zero():
            torch.save({k: v.cpu() for k, v in weights.items()}, out / f"{case}.pt")
            (out / f"{case}.json").write_text(json.dumps(trainer.state.log_history))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state()
    leave()
