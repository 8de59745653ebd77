"""Feature losses: values and gradients by hand, projections, engines, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import launch
from feature_setup import TASKS, by_hand, pair, trainer_of
from peft import LoraConfig
from safetensors.torch import load_file
from task_models import collate, make_model, make_rows

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.errors import InputError
from hf_distill.models.layer_selection import Stack
from hf_distill.training.feature_settings import feature_settings
from hf_distill.training.features import FILE, PROJECTIONS

UNIFORM, LAST = [(0, 1), (1, 3)], [(1, 3)]
ALL = {
    "hidden_cosine": {"weight": 0.7, "layers": "last"},
    "hidden_mse": {"weight": 0.5},
    "embeddings": 0.3,
    "attention": {"weight": 2.0, "layers": [[0, 2], [1, 0]]},
    "relations": 1.5,
}
PAIRS = {
    "hidden_cosine": LAST,
    "hidden_mse": UNIFORM,
    "embeddings": [(0, 0)],
    "attention": [(0, 2), (1, 0)],
    "relations": LAST,
}


def delta(before: dict[str, Any], trainer: Any) -> dict[str, Any]:
    return {name: weight - before[name] for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", ["Bert", "GPT2", "T5"])
def test_values_and_gradients_are_those_by_hand(name: str, tmp_path: Path) -> None:
    sides = ["encoder", "decoder"] if name == "T5" else [""]
    trainer = trainer_of(name, tmp_path, ALL, pair(name))
    student, teacher = trainer.model, trainer.teacher.model
    before = {key: value.clone() for key, value in student.state_dict().items()}
    projections = trainer._loss.features.projections
    measured = trainer.evaluate()
    total = torch.zeros((), dtype=torch.float64)
    for kind, pairs in PAIRS.items():
        for side in sides:
            term = f"{kind}_{side}" if side else kind
            more = {"projection": projections[term].weight} if term in projections else {}
            value = by_hand(kind, (student, teacher), pairs, side, name, **more)
            assert measured[f"eval_{term}"] == pytest.approx(value.item(), rel=1e-9), term
            setting: Any = ALL[kind]
            weight = setting if isinstance(setting, float) else setting.get("weight", 1.0)
            weight = 1.5 if kind == "relations" else weight
            total = total + weight * value
    plain = measured["eval_loss"] - total.item()
    assert plain == pytest.approx(
        0.5 * measured["eval_ce"] + 0.5 * measured["eval_forward_kl"], rel=1e-9
    )

    total.backward()
    expected = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    of_projections = {key: p.grad.clone() for key, p in projections.named_parameters()}
    were = {key: value.clone() for key, value in projections.state_dict().items()}
    student.zero_grad()
    projections.zero_grad()
    trainer.train()
    with_features = delta(before, trainer)
    for key, gradient in of_projections.items():
        step = projections.state_dict()[key] - were[key]
        torch.testing.assert_close(step, -0.1 * gradient, rtol=1e-7, atol=1e-10)

    other = trainer_of(name, tmp_path / "none", None, pair(name))
    other.train()
    without = delta(before, other)
    assert expected
    for key, gradient in expected.items():
        if key not in with_features:
            continue
        step = with_features[key] - without[key]
        torch.testing.assert_close(step, -0.1 * gradient, rtol=1e-5, atol=1e-7)  # T5 has float32


def test_equal_widths_need_no_projection(tmp_path: Path) -> None:
    features = {"hidden_mse": 1.0, "hidden_cosine": {"layers": "uniform"}}
    models = pair("Bert", wider=False)
    trainer = trainer_of("Bert", tmp_path, features, models)
    assert not trainer._loss.features.projections
    found = trainer.evaluate()
    for kind in features:
        value = by_hand(kind, models, UNIFORM, "", "Bert")
        assert found[f"eval_{kind}"] == pytest.approx(value.item(), rel=1e-9)


def test_only_the_named_stack(tmp_path: Path) -> None:
    features = {"hidden_mse": {"layers": {"decoder": "last"}}}
    trainer = trainer_of("T5", tmp_path, features, pair("T5"))
    terms = [key for key in trainer.evaluate() if "hidden_mse" in key]
    assert terms == ["eval_hidden_mse_decoder"]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(3, 12, [3, 7, 11]), (5, 12, [2, 4, 7, 9, 11]), (4, 4, [0, 1, 2, 3]), (7, 12, None)],
)
def test_uniform_layers(student: int, teacher: int, expected: list[int] | None) -> None:
    (setting,) = feature_settings({"hidden_mse": 1})
    found = setting.pairs(Stack("a", "a", student), Stack("b", "b", teacher))
    assert [ours for ours, _ in found] == list(range(student))
    theirs = [layer for _, layer in found]
    assert theirs == sorted(set(theirs))
    assert theirs[-1] == teacher - 1
    assert expected is None or theirs == expected


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("name", ["Bert", "T5"])
def test_splits_of_a_step_give_the_same_weights(name: str, tmp_path: Path) -> None:
    whole = trainer_of(name, tmp_path / "a", ALL, pair(name), max_steps=2)
    split = trainer_of(name, tmp_path / "b", ALL, pair(name), max_steps=2, **SPLIT)
    whole.train()
    split.train()
    torch.testing.assert_close(
        dict(split.model.state_dict()), dict(whole.model.state_dict()), rtol=1e-9, atol=1e-11
    )
    log = [entry for entry in split.state.log_history if "loss" in entry]
    assert "relations" in str(log)


@pytest.mark.parametrize("name", ["Bert"])
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    launch("feature_worker.py", str(tmp_path / "two"), name, json.dumps(ALL))
    one = trainer_of(name, tmp_path / "one", ALL, pair(name), max_steps=2)
    one.train()
    found = load_file(tmp_path / "two" / "found.safetensors")
    projections = one._loss.features.projections.state_dict()
    expected = {
        **one.model.state_dict(),
        **{f"{PROJECTIONS}.{k}": v for k, v in projections.items()},
    }
    assert len(projections) == 3
    torch.testing.assert_close(found, dict(expected), rtol=1e-9, atol=1e-11)


def test_checkpointing_of_activations_changes_nothing(tmp_path: Path) -> None:
    found = []
    for more in (
        {},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    ):
        trainer = trainer_of("GPT2", tmp_path, ALL, pair("GPT2", attn_pdrop=0.1), **more)
        trainer.train()
        found.append(dict(trainer.model.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_maps_are_those_without_dropout(tmp_path: Path) -> None:
    """Dropout sets entries of a map to zero, whose logarithm would rule the loss."""
    features = {"attention": {"weight": 1.0, "layers": [[0, 0]]}}
    models = pair("GPT2", wider=False, attn_pdrop=0.9)
    trainer = trainer_of("GPT2", tmp_path, features, models, alpha=0.0)
    expected = trainer.evaluate()["eval_attention"]
    trainer.train()
    logged = next(e["attention"] for e in trainer.state.log_history if "attention" in e)
    assert logged == pytest.approx(expected, rel=1e-6)


def test_projections_are_trained_kept_for_resuming_and_not_saved(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = trainer_of("GPT2", tmp_path / "whole", ALL, pair("GPT2"), **options)
    start = {k: v.clone() for k, v in whole._loss.features.projections.state_dict().items()}
    whole.train()
    trained = whole._loss.features.projections.state_dict()
    assert len(trained) == 3
    assert all(not torch.equal(trained[key], start[key]) for key in start)

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / FILE).exists()
    assert not [k for k in load_file(checkpoint / "model.safetensors") if PROJECTIONS in k]
    resumed = trainer_of("GPT2", tmp_path / "whole", ALL, pair("GPT2"), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    again = resumed._loss.features.projections.state_dict()
    torch.testing.assert_close(dict(again), dict(trained), rtol=0, atol=0)
    torch.testing.assert_close(
        dict(resumed.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0
    )

    whole.save_model(str(tmp_path / "saved"))
    kind: Any = type(whole.model)
    model, info = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not [key for key in whole.model.state_dict() if PROJECTIONS in key]
    assert model.num_parameters() == whole.model.num_parameters()

    (checkpoint / FILE).unlink()
    resumed = trainer_of("GPT2", tmp_path / "whole", ALL, pair("GPT2"), **options)
    with pytest.raises(InputError, match="has no projections that fit"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_weights_is_named(tmp_path: Path) -> None:
    """Of features that are not set any longer, or of a deeper student."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    trainer_of("GPT2", tmp_path, ALL, pair("GPT2"), **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    student, teacher = pair("GPT2")
    deeper = make_model("GPT2", "causal-lm", seed=1, n_layer=3).double()
    for features, model in ((None, student), (ALL, deeper)):
        resumed = trainer_of("GPT2", tmp_path, features, (model, teacher), **options)
        with pytest.raises(InputError, match="features or the student differ from those of") as e:
            resumed.train(resume_from_checkpoint=checkpoint)
        assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_student_with_an_adapter(tmp_path: Path) -> None:
    adapter = LoraConfig(target_modules=["c_attn"], r=4, init_lora_weights=False)
    features = {"hidden_mse": 1.0, "relations": 1.0}
    trainer = trainer_of("GPT2", tmp_path, features, pair("GPT2"), peft_config=adapter, max_steps=2)
    before = {k: v.clone() for k, v in trainer._loss.features.projections.state_dict().items()}
    trainer.train()
    after = trainer._loss.features.projections.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before)
    trainer.save_model(str(tmp_path / "saved"))
    assert not [
        k for k in load_file(tmp_path / "saved" / "adapter_model.safetensors") if "proj" in k
    ]


def test_alpha_zero_asks_the_teacher_for_features_only(tmp_path: Path) -> None:
    trainer = trainer_of("Bert", tmp_path, {"hidden_mse": 1.0}, pair("Bert"), alpha=0.0)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "hidden_mse" in entry
    assert "forward_kl" not in entry
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["hidden_mse"], rel=1e-5)


def test_memory_of_the_layers_used_only(tmp_path: Path) -> None:
    features = {"relations": 1.0}
    trainer = trainer_of("Bert", tmp_path, features, pair("Bert"))
    found = trainer._loss.features
    with found.of_student() as student:
        trainer.model(**collate(make_rows(TASKS["Bert"])))
    assert [place.layer for place in student.found] == [1]
    assert not trainer.model.bert.encoder.layer[1]._forward_hooks


REFUSED = [
    ({"hidden": 1.0}, "none of hidden_cosine"),
    ({"hidden_mse": -1.0}, "must be above 0"),
    ({"hidden_mse": {"layer": "last"}}, "has no 'layer', only weight, layers"),
    ({"hidden_mse": {"heads": 2}}, "has no 'heads'"),
    ({"hidden_mse": {"layers": "middle"}}, "must be 'uniform', 'last'"),
    ({"hidden_mse": {"layers": [[0, 1, 2]]}}, "or pairs"),
    ({"hidden_mse": {"layers": [[2, 3]]}}, "names layer 2 of the student"),
    ({"hidden_mse": {"layers": [[1, 4]]}}, "names layer 4 of the teacher"),
    ({"hidden_mse": {"layers": {"side": "last"}}}, "names side, but the student has"),
    (["hidden_mse"], "must map kinds to weights"),
]


@pytest.mark.parametrize(("features", "message"), REFUSED)
def test_settings_that_are_refused(features: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        trainer_of("Bert", tmp_path, features, pair("Bert"))


def test_what_has_no_features(tmp_path: Path) -> None:
    student, teacher = pair("GPT2")

    class Own:
        name, rows, tokenizer = "own", 40, None

        def prepare(self, *args: Any, **kwargs: Any) -> None: ...
        def signal(self, *args: Any) -> Any: ...

    with pytest.raises(InputError, match="with a model as teacher"):
        trainer_of("GPT2", tmp_path, {"hidden_mse": 1.0}, (student, Own()))
    with pytest.raises(InputError, match="set torch_compile to False"):
        trainer_of("GPT2", tmp_path, {"hidden_mse": 1.0}, (student, teacher), torch_compile=True)
    optimizers = (torch.optim.SGD(student.parameters(), lr=0.1), None)
    with pytest.raises(InputError, match="leave out optimizers="):
        trainer_of("GPT2", tmp_path, {"hidden_mse": 1.0}, (student, teacher), optimizers=optimizers)


def test_models_that_cannot_be_compared(tmp_path: Path) -> None:
    wrong_heads = pair("Bert", num_attention_heads=4)
    trainer = trainer_of("Bert", tmp_path, {"attention": 1.0}, wrong_heads)
    with pytest.raises(InputError, match="for models with different heads use 'relations'"):
        trainer.train()
    trainer = trainer_of("Bert", tmp_path, {"relations": {"heads": 5}}, pair("Bert"))
    with pytest.raises(InputError, match="set heads to a divisor"):
        trainer.train()
    task = "sequence-classification"
    models = tuple(make_model("DebertaV2", task, seed) for seed in (1, 2))
    rows = make_rows(task)
    trainer = DistillationTrainer(
        models[0],
        models[1],
        DistillationArguments(str(tmp_path), features={"relations": 1.0}, report_to="none",
                              use_cpu=True, disable_tqdm=True, save_strategy="no"),
        train_dataset=rows,
        data_collator=collate,
    )  # fmt: skip
    with pytest.raises(InputError, match="does not use transformers' attention functions"):
        trainer.train()


def test_frozen_layers_have_no_gradient(tmp_path: Path) -> None:
    models = pair("Bert", wider=False)
    models[0].bert.embeddings.requires_grad_(False)
    trainer = trainer_of("Bert", tmp_path, {"embeddings": 1.0}, models)
    with pytest.raises(InputError, match="weights up to there are frozen"):
        trainer.train()
