"""Students with adapters, and students that teach themselves."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from trainer_setup import arguments, collate, make_rows, small_model, weights
from transformers import AutoModelForCausalLM

from hf_distill import AdapterTeacher, DistillationTrainer, InputError, evaluate_student
from hf_distill.losses.signals import Hidden
from hf_distill.tasks import CausalLM

# peft 0.21 asks for a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(kind: str = "lora", seed: int = 3, layers: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, **OPTIONS[kind])
    return get_peft_model(small_model(0, "llama", layers), config)


def make_trainer(folder: Path, model: Any, teacher: Any, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        model,
        teacher,
        arguments(folder, temperature=2.0, optim="sgd", learning_rate=0.5, **options),
        train_dataset=make_rows(16, 0),
        eval_dataset=make_rows(6, 1),
        data_collator=collate,
    )


def trained(folder: Path, model: Any, teacher: Any, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, model, teacher, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_its_own_base_equals_a_second_model(kind: str, fused: bool, tmp_path: Path) -> None:
    model = adapted(kind)
    itself = trained(tmp_path / "itself", model, model, fused_head=fused)
    base = small_model(0, "llama")
    other = trained(tmp_path / "other", adapted(kind), base, fused_head=fused)
    torch.testing.assert_close(weights(itself), weights(other), rtol=1e-5, atol=1e-6)
    ours, theirs = itself.evaluate(), other.evaluate()
    for name in ("eval_loss", "eval_forward_kl", "eval_teacher_ce", "eval_top1_agreement"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert ours["eval_forward_kl"] > 1e-4  # the adapter does something


@pytest.mark.parametrize("kind", OPTIONS)
def test_another_adapter_teaches(kind: str, tmp_path: Path) -> None:
    def second(model: PeftModel) -> PeftModel:
        torch.manual_seed(8)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["o_proj"])
        model.add_adapter("expert", config)
        return model

    model = second(adapted(kind))
    itself = trained(tmp_path / "itself", model, AdapterTeacher(model, "expert"))
    torch.manual_seed(3)
    other = second(adapted(kind))
    other.set_adapter("expert")
    alone = trained(tmp_path / "alone", adapted(kind), other)
    found = weights(itself)
    expected = {k: v for k, v in weights(alone).items() if k in found}
    assert any("lora" in name for name in expected)
    torch.testing.assert_close(
        {k: v for k, v in found.items() if k in expected}, expected, rtol=1e-5, atol=1e-6
    )


def test_the_base_inside_an_adapted_model_is_the_same_teacher(tmp_path: Path) -> None:
    model = adapted()
    trainer = trained(tmp_path / "base", model, model.get_base_model())
    assert isinstance(trainer.teacher, AdapterTeacher)
    assert any(p.requires_grad for p in model.parameters())
    other = adapted()
    torch.testing.assert_close(
        weights(trainer), weights(trained(tmp_path / "itself", other, other)), rtol=0, atol=0
    )


def test_asking_leaves_the_student_as_it_was() -> None:
    model = adapted().train()
    model.base_model.model.model.layers[0].mlp.up_proj.requires_grad_(False)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    batch = collate(make_rows(4, 0))
    signal = AdapterTeacher(model).signal(
        {k: v for k, v in batch.items() if k != "labels"}, CausalLM().targets(batch)
    )
    assert isinstance(signal, Hidden)
    assert not signal.states.requires_grad
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert model.training
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("raises", [False, True])
def test_all_active_adapters_come_back(raises: bool) -> None:
    """Several adapters may be active at once, and a forward may fail."""
    model = adapted()
    for name in ("second", "expert"):
        model.add_adapter(name, LoraConfig(r=2, init_lora_weights=False, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    batch = collate(make_rows(4, 0))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if raises:
        inputs["input_ids"] = inputs["input_ids"].float()
    teacher = AdapterTeacher(model, "expert")
    with pytest.raises(Exception) if raises else nullcontext():  # noqa: PT011
        teacher.signal(inputs, CausalLM().targets(batch))
    assert model.active_adapters == ["default", "second"]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert layer.active_adapters == ["default", "second"]


def test_one_set_of_weights_in_memory(tmp_path: Path) -> None:
    """All tensors of the process, counted: the base is there once, not twice."""

    def held() -> int:
        gc.collect()
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter)
        }
        return sum(found.values())

    before = held()
    model = adapted(layers=6)
    base = sum(p.nbytes for n, p in model.named_parameters() if "lora" not in n)
    trainer = trained(tmp_path, model, model)
    assert held() - before < 1.5 * base
    trainer.teacher = small_model(1, "llama", 6)  # what a teacher of its own would add
    assert held() - before > 1.9 * base


def test_a_model_without_adapter_cannot_teach_itself(tmp_path: Path) -> None:
    model = small_model(0)
    with pytest.raises(InputError, match="has no adapter to switch off"):
        AdapterTeacher(model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="same object, .*: load the teacher a second time, or tr"):
        make_trainer(tmp_path, model, model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="student and teacher are the same object"):
        make_trainer(tmp_path, model.requires_grad_(False), model)  # of an earlier trainer
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    found = DistillationTrainer(
        model, model, arguments(tmp_path), peft_config=config, train_dataset=make_rows(4, 0)
    )
    assert isinstance(found.teacher, AdapterTeacher)


def test_a_student_larger_than_its_teacher_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(student: Any, teacher: Any) -> bool:
        caplog.clear()
        make_trainer(tmp_path, student, teacher)
        return "check that the student is the first argument" in caplog.text

    assert told(small_model(0, layers=3), small_model(1))
    assert "The student has 11k parameters, but the teacher only 4.46k" in caplog.text
    assert told(adapted(layers=3), small_model(1, "llama"))
    assert not told(small_model(0), small_model(1, layers=3))
    assert not told(small_model(0), small_model(1))
    # With its adapter, an adapted student is larger than the model that it was made of.
    for kind in OPTIONS:
        assert not told(adapted(kind), small_model(1, "llama"))
    student = adapted()
    assert not told(student, student)
    quantised = small_model(1)
    quantised.config.quantization_config = {"quant_method": "gptq"}
    assert not told(small_model(0, layers=3), quantised)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("missing", "no adapter 'missing'.*only 'default'"),
        ("default", "is the one being trained"),
    ],
)
def test_adapters_that_cannot_teach(adapter: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdapterTeacher(adapted(), adapter)


def test_a_teacher_of_the_students_weights_is_the_student(tmp_path: Path) -> None:
    student = adapted()
    with pytest.raises(InputError, match="another model than the student"):
        make_trainer(tmp_path, student, AdapterTeacher(adapted()))
    with pytest.raises(InputError, match="teacher_placement is 'sharded', but this teacher uses"):
        make_trainer(tmp_path, student, student, teacher_placement="sharded")


def test_learned_prompts_are_refused(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(small_model(0, "llama"), config)
    with pytest.raises(InputError, match="PROMPT_TUNING, whose learned prompt.*LoRA"):
        make_trainer(tmp_path, model, small_model(1, "llama"))


def test_an_adapted_model_as_a_teacher_of_its_own(tmp_path: Path) -> None:
    """Whole with its adapter, as the merged model that it stands for."""
    teacher = adapted(seed=5)
    found = trained(tmp_path / "a", small_model(2, "llama"), teacher)
    merged = adapted(seed=5).merge_and_unload()
    expected = trained(tmp_path / "b", small_model(2, "llama"), merged)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_saved_adapters_come_back(kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, adapted(kind), small_model(1, "llama"))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(small_model(0, "llama"), tmp_path / "saved")
    batch = collate(make_rows(4, 2))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(again.eval()(**inputs).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_students_and_teachers(bits: int, tmp_path: Path) -> None:
    """QLoRA, and a teacher that was quantised because it was asked for, never by itself."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 64}
    small_model(1, "llama", 2, **shape).save_pretrained(tmp_path / "model")
    asked = {"quantization_config": {f"load_in_{bits}bit": True}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **asked)
    assert base.is_quantized
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    start = {name: value.clone() for name, value in student.named_parameters() if "lora_B" in name}
    trainer = trained(tmp_path / "q", student, str(tmp_path / "model"), teacher_model_kwargs=asked)
    teacher: Any = trainer.teacher
    assert teacher.model.is_quantized
    moved = dict(student.named_parameters())
    assert all(not torch.equal(moved[name], value) for name, value in start.items())
    plain: Any = make_trainer(tmp_path / "p", small_model(0, "llama"), str(tmp_path / "model"))
    assert not getattr(plain.teacher.model, "is_quantized", False)
    with pytest.raises(InputError, match="this teacher is quantised"):
        make_trainer(
            tmp_path / "s",
            small_model(0, "llama"),
            str(tmp_path / "model"),
            teacher_model_kwargs=asked,
            teacher_placement="offloaded",
        )


def test_a_four_bit_student_keeps_its_gradient(tmp_path: Path) -> None:
    """After an evaluation, and beside a teacher that is its own base."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    small_model(1, "llama", 2, **shape).save_pretrained(tmp_path / "model")
    asked = {"quantization_config": {"load_in_4bit": True}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **asked)
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer(tmp_path / "q", student, student)
    trainer.evaluate()
    start = {name: value.clone() for name, value in student.named_parameters() if "lora_B" in name}
    trainer.train()
    moved = dict(student.named_parameters())
    assert all(not torch.equal(moved[name], value) for name, value in start.items())


def test_a_self_taught_student_is_evaluated_beside_its_base(tiny_tokenizer: Any) -> None:
    model = adapted()
    rows = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in make_rows(6, 0)]
    figures = evaluate_student(
        model, AdapterTeacher(model), rows, tiny_tokenizer, shared_vocabulary=40, speed=False
    )
    base = evaluate_student(
        adapted(), small_model(0, "llama"), rows, tiny_tokenizer, shared_vocabulary=40, speed=False
    )
    assert figures["kl_to_teacher"] == pytest.approx(base["kl_to_teacher"], rel=1e-4)
