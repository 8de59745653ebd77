"""The fused head inside the real trainer: families of heads, engines, and where it steps aside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trainer_setup import VOCABULARY, arguments, collate, make_rows, small_model, weights
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill import DistillationTrainer, Term
from hf_distill.losses import LinearHead
from hf_distill.losses import fused_head as fused
from hf_distill.models.output_head import HeadReplacement, UnsupportedHead

ROOT = Path(__file__).parents[2]
ROWS = make_rows(24, seed=1)

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GPTJ = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4}
MAMBA = {"state_size": 4, "intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},  # tied
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
    "phi": {},  # bias
    "gptj": GPTJ,  # bias
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 1, "n_head": 2},
    "cohere": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "olmo2": {},
    "stablelm": {},
    "mamba": MAMBA,
}


def family(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(SHAPE | FAMILIES[name]))
    for part in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout"):
        if hasattr(config, part):
            setattr(config, part, 0.0)
    if hasattr(config, "dropout"):
        config.dropout = 0.0
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # sharper than fresh weights
        model.get_output_embeddings().weight.mul_(10)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def make_trainer(folder: Path, kind: Any = DistillationTrainer, **options: Any) -> Any:
    parts = {
        "model": options.pop("model", None) or small_model(0),
        "teacher": options.pop("teacher", None) or small_model(1, layers=2),
        "compute_metrics": options.pop("compute_metrics", None),
    }
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "temperature": 2.0}
    return kind(
        args=arguments(folder, **(sgd | options)),
        train_dataset=ROWS,
        eval_dataset=ROWS[:5],
        data_collator=collate,
        **parts,
    )


def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return weights(trainer)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of targets of each pass through the fused head."""
    seen: list[int] = []
    real = fused._Pass.run

    def watching(self: Any, hidden: Tensor, *wanted: bool) -> Any:
        seen.append(len(hidden))
        return real(self, hidden, *wanted)

    monkeypatch.setattr(fused._Pass, "run", watching)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_is_plain_for_every_family(name: str, tmp_path: Path, heads: list[int]) -> None:
    found = {}
    for on in (True, False):
        heads.clear()
        trainer = make_trainer(
            tmp_path, model=family(name, 0), teacher=family(name, 1), fused_head=on, max_steps=2
        )
        trainer.train()
        assert len(heads) == (2 if on else 0)  # really fused, really plain
        found[on] = weights(trainer), trainer.evaluate()
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=2e-5)
    ours, plain = found[True][1], found[False][1]
    assert len(heads) == 0
    for key in ("eval_loss", "eval_ce", "eval_forward_kl", "eval_teacher_ce"):
        assert ours[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6)
    assert ours["eval_top1_agreement"] == pytest.approx(plain["eval_top1_agreement"], abs=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_activations(reentrant: bool, tmp_path: Path, heads: list[int]) -> None:
    option = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    expected = trained(tmp_path, fused_head=False)
    torch.testing.assert_close(trained(tmp_path, **option), expected, rtol=1e-4, atol=1e-5)
    assert len(heads) == 3  # once a step: the backward runs layers again, but not the head


def test_accumulation(tmp_path: Path) -> None:
    option = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    one = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    expected = trained(tmp_path, fused_head=False, **one)
    torch.testing.assert_close(trained(tmp_path, **option), expected, rtol=1e-4, atol=1e-5)


def test_autocast_reaches_the_products(
    tmp_path: Path, heads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = []
    real = LinearHead.product

    def watching(self: Any, hidden: Tensor, out: Any = None) -> Tensor:
        dtypes.append((hidden.dtype, self.weight.dtype))
        return real(self, hidden, out)

    monkeypatch.setattr(LinearHead, "product", watching)
    trained(tmp_path, bf16=True, max_steps=1)
    assert heads
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


def test_memory_decides_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = small_model(0, vocab_size=60000), small_model(1, vocab_size=60000)
    numbers = []
    real = fused._Pass._chunks

    def watching(self: Any, *arguments: Any) -> Any:
        chunks = real(self, *arguments)
        numbers.append(len(chunks))
        return chunks

    monkeypatch.setattr(fused._Pass, "_chunks", watching)
    for memory_mb in (1, 160):
        trained(tmp_path, model=model, teacher=teacher, max_steps=1, head_memory_mb=memory_mb)
    assert numbers[0] > 3
    assert numbers[1] == 1


# ---- Where it steps aside ----


def lora(**options: Any) -> Any:
    model = small_model(0, "llama")
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "all of its logits" in r.message]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "not a plain linear layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
        ({"target_modules": ["q_proj"]}, None),
    ],
)
def test_adapters(
    options: dict[str, Any],
    reason: str | None,
    tmp_path: Path,
    heads: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = trained(tmp_path, model=lora(**options))
    said = warnings_of(caplog)
    assert bool(heads) is (reason is None)
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]
    expected = trained(tmp_path, model=lora(**options), fused_head=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Doubled(type(small_model(0, "llama"))):  # type: ignore[misc]
    """Does to its logits what no config tells."""

    def forward(
        self, input_ids: Any, attention_mask: Any, labels: Any = None, **options: Any
    ) -> Any:
        out = super().forward(input_ids, attention_mask, **options)
        out.logits = out.logits * 2
        return out


class CalledTwice(Doubled):
    def forward(
        self, input_ids: Any, attention_mask: Any, labels: Any = None, **options: Any
    ) -> Any:
        super(Doubled, self).forward(input_ids, attention_mask, **options)
        return super(Doubled, self).forward(input_ids, attention_mask, **options)


@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Doubled, "its config does not state"), (CalledTwice, "called the output head 2 times")],
)
def test_a_forward_of_its_own(
    kind: Any, reason: str, role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unusual() -> Any:
        plain = small_model(3, "llama")
        model = kind(plain.config)
        model.load_state_dict(plain.state_dict())
        return model

    with caplog.at_level(logging.WARNING):
        found = trained(tmp_path, **{role: unusual()})
    said = warnings_of(caplog)
    assert len(said) == 1  # one line, however many steps
    assert reason in said[0]
    expected = trained(tmp_path, fused_head=False, **{role: unusual()})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_head_are_not_bypassed() -> None:
    model = small_model(0, "llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedHead, match="has hooks"):
        HeadReplacement(model)


def test_the_head_is_whole_again_after_an_error() -> None:
    model = small_model(0, "llama")
    place = HeadReplacement(model)

    def fails(*_: Any) -> Any:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        place.forward(model, {"input_ids": torch.tensor([[2, 3]])}, fails)
    assert isinstance(model.lm_head, nn.Linear)
    assert model(torch.tensor([[2, 3]])).logits.shape == (1, 2, VOCABULARY)


def test_whoever_asks_for_logits_gets_them(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = make_trainer(tmp_path, compute_metrics=metrics)
    trainer.evaluate()
    assert shapes[0][-1] == VOCABULARY
    batch = collate(ROWS[:2])
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs.logits.shape[-1] == VOCABULARY


def test_a_term_of_a_subclass_sees_real_logits(tmp_path: Path, heads: list[int]) -> None:
    class WithPenalty(DistillationTrainer):
        def extra_terms(self, inputs: Any, outputs: Any) -> dict[str, Term]:
            assert outputs.logits.shape[-1] == VOCABULARY
            return {"penalty": Term(outputs.logits.square().mean((1, 2)), "rows")}

    make_trainer(tmp_path, WithPenalty).train()
    assert not heads
