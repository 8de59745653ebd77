"""What the trainer leaves behind and publishes, against a real client and a loopback Hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN, USER, HubServer

SCRIPT = """
import sys
from trainer_setup import arguments, collate, make_rows, small_model
from hf_distill import DistillationTrainer

teacher = small_model(1, layers=2)
teacher.config.name_or_path = "/secret/folder/big-teacher"
trainer = DistillationTrainer(
    small_model(0), teacher,
    arguments(sys.argv[1], push_to_hub=True, hub_model_id=sys.argv[2], hub_token=sys.argv[3],
              max_steps=4, save_strategy="steps", save_steps=2, hub_always_push=True,
              temperature=2.0),
    train_dataset=make_rows(24, seed=1), eval_dataset=make_rows(8, seed=2), data_collator=collate)
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
"""


def test_push_to_hub_publishes_model_and_card_but_no_pickle(tmp_path: Path) -> None:
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home") | {
            "PYTHONPATH": str(Path(__file__).parents[1])
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), f"{USER}/student", TOKEN],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repo(f"{USER}/student").files()
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    card = files["README.md"].decode()
    assert "big-teacher" in card
    assert "/secret" not in card
    assert "temperature: 2.0" in card
    assert "Cross-entropy" in card
    assert not list((tmp_path / "out").rglob("training_args.bin"))
