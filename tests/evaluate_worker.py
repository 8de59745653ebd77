"""The evaluation of `test_trainer` on two processes: `evaluate_worker.py OUT`."""

import json
import sys
import tempfile
from pathlib import Path

from distributed import leave
from trainer_setup import arguments, collate, make_rows, small_model

from hf_distill import DistillationTrainer

if __name__ == "__main__":
    trainer = DistillationTrainer(
        small_model(0),
        small_model(1, layers=2),
        arguments(Path(tempfile.mkdtemp()), temperature=2.0, per_device_eval_batch_size=3),
        eval_dataset=make_rows(13, seed=2),
        data_collator=collate,
    )
    metrics = trainer.evaluate()
    # The same rows in two sets, of which one has fewer than a round of batches.
    rows = make_rows(13, seed=2)
    metrics |= trainer.evaluate({"many": rows, "few": rows[:2]})
    if trainer.is_world_process_zero():
        Path(sys.argv[1]).write_text(json.dumps(metrics))
    leave()
