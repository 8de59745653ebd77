"""Narrower students compute what their teacher computes without the removed units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from test_from_teacher import DECODER, FAMILIES, WITH_GENERATION, build, inputs, logits, stacks_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_distill.errors import InputError
from hf_distill.models.from_teacher import student_and_report, student_from_teacher
from hf_distill.models.student_report import StudentReport

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 3]]
# By family: what neurons and heads go into, in a layer.
DOWN = {
    "gpt2": "mlp.c_proj", "bert": "output.dense", "distilbert": "ffn.lin2", "t5": "wo",
    "bart": "fc2",
}  # fmt: skip
OUT = {
    "gpt2": ("attn.c_proj",), "bert": ("attention.output.dense",),
    "distilbert": ("attention.out_lin",), "t5": ("SelfAttention.o", "EncDecAttention.o"),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj"),
}  # fmt: skip
# The size of a head is hidden / heads, so that both are cut together.
COUPLED = {"gpt2", "bert", "bert_classifier", "distilbert", "bart"}
GEMMAS = {"gemma2", "gemma3"}  # which multiply embeddings by the root of their width


def base(family: str) -> str:
    return family.removesuffix("_tied").removesuffix("_gated").removesuffix("_classifier")


def rows_for(teacher: Any) -> list[dict[str, Any]]:
    two_sided = teacher.config.is_encoder_decoder
    return [{"input_ids": ids} | ({"labels": ids[::-1]} if two_sided else {}) for ids in ROWS]


def cut(family: str, **widths: Any) -> tuple[Any, Any, StudentReport]:
    teacher = build(family).double()
    student, report = student_and_report(teacher, rows=rows_for(teacher), **widths)
    return teacher, student, report


def inner(teacher: Any, family: str, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The projections of these names in the layers, by path."""
    blocks = {block for stack in stacks_of(teacher) for block in stack}
    return {
        path: module
        for path, module in teacher.named_modules()
        if path.endswith(tuple(f".{name}" for name in names))
        and not (names == ("output.dense",) and ".attention." in path)
        and any(module in set(block.modules()) for block in blocks)
    }


def kept_of(report: StudentReport, path: str) -> list[int]:
    """Kept units of a projection, also where all layers of a stack share them."""
    for choice, kept in report.kept_units.items():
        parts, here = choice.split("."), path.split(".")
        if len(parts) == len(here) and all(a in ("*", b) for a, b in zip(parts, here, strict=True)):
            return kept
    raise KeyError(path)


@torch.no_grad()
def forget(module: Any, kept: list[int], units: int) -> None:
    """Make a linear module deaf to the units that are not kept."""
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # (in, out)
    size = weight.shape[0] // units
    for unit in set(range(units)) - set(kept):
        weight[unit * size : (unit + 1) * size] = 0


def without(teacher: Any, family: str, report: StudentReport, units: dict[str, int]) -> Any:
    """The teacher whose projections ignore removed neurons and heads."""
    teacher = copy.deepcopy(teacher)
    for kind, names in (
        ("ffn", (DOWN.get(base(family), "mlp.down_proj"),)),
        ("heads", OUT.get(base(family), ("self_attn.o_proj",))),
    ):
        if kind in units:
            found = inner(teacher, family, names)
            assert found
            for path, module in found.items():
                forget(module, kept_of(report, path), units[kind])
    return teacher


class NarrowNorm(nn.Module):
    """A norm that looks at some features only, written out, and gives zeros for the others."""

    def __init__(self, norm: Any, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, values: Tensor) -> Tensor:
        seen = values[..., self.kept]
        eps = getattr(self.norm, "eps", None) or self.norm.variance_epsilon
        if isinstance(self.norm, nn.LayerNorm):
            seen = seen - seen.mean(-1, keepdim=True)
        seen = seen / (seen.square().mean(-1, keepdim=True) + eps).sqrt()
        seen = seen * self.norm.weight[self.kept]
        if getattr(self.norm, "bias", None) is not None:
            seen = seen + self.norm.bias[self.kept]
        wide = torch.zeros_like(values)
        wide[..., self.kept] = seen
        return wide


@torch.no_grad()
def narrowed(teacher: Any, kept: list[int]) -> Any:
    """The teacher with norms and a pooler that look at the kept features only."""
    for path, module in list(teacher.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (16,):
            parent, _, name = path.rpartition(".")
            setattr(teacher.get_submodule(parent), name, NarrowNorm(module, kept))
        if path.endswith("pooler.dense"):
            removed = sorted(set(range(16)) - set(kept))
            module.weight[removed], module.bias[removed] = 0, 0
    return teacher


def close(found: Tensor, expected: Tensor, far: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, far, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_neurons(family: str) -> None:
    teacher, student, report = cut(family, ffn=9)
    width = 64 if family == "gpt2" else 24
    assert set(report.widths.values()) == {(width, 9)}
    close(logits(student), logits(without(teacher, family, report, {"ffn": width})),
          logits(teacher))  # fmt: skip
    kept = list(report.kept_units.values())
    assert len({tuple(units) for units in kept}) > 1  # each layer has its own


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - COUPLED))
def test_fewer_heads(family: str) -> None:
    heads = build(family).config.num_attention_heads
    teacher, student, report = cut(family, heads=heads // 2)
    groups = getattr(teacher.config, "num_key_value_heads", heads)
    assert report.widths[("num_attention_heads", "num_heads")[base(family) == "t5"]] == (
        heads, heads // 2
    )  # fmt: skip
    close(logits(student), logits(without(teacher, family, report, {"heads": groups})),
          logits(teacher))  # fmt: skip


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - GEMMAS))
def test_fewer_features(family: str) -> None:
    """With fewer heads where their size depends on it, and fewer neurons."""
    teacher = build(family)
    heads = teacher.config.num_attention_heads
    options: dict[str, Any] = {"hidden": 12, "ffn": 0.5}
    if family in COUPLED:
        options |= {"hidden": 8, "heads": heads // 2}
    teacher, student, report = cut(family, **options)
    kept = report.kept_units["hidden"]
    assert len(kept) == options["hidden"]
    assert student.get_input_embeddings().weight.shape[1] == len(kept)
    units = {"ffn": 64 if family == "gpt2" else 24} | (
        {"heads": heads} if family in COUPLED else {}
    )
    expected = logits(narrowed(without(teacher, family, report, units), kept))
    if family == "t5":
        # Tied T5 multiplies by width ** -0.5 in front of its head; the student makes up for it.
        assert teacher.config.scale_decoder_outputs
    # Norms without a bias compute in float32 whatever they are given.
    exact = 1e-9 if family in COUPLED else 2e-5
    torch.testing.assert_close(logits(student), expected, rtol=exact, atol=exact)
    assert not torch.allclose(expected, logits(teacher), atol=1e-2)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - GEMMAS))
def test_reload_and_generate(family: str, tmp_path: Any) -> None:
    options = {"hidden": 8, "heads": 0.5, "ffn": 0.25}
    _, student, _ = cut(family, **options, layers=[0, 2])
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    if family in WITH_GENERATION:
        batch = {k: v for k, v in inputs(student).items() if k != "decoder_input_ids"}
        same = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        written = [again.generate(**batch, **same, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*written)


def test_groups_of_heads_stay_whole() -> None:
    teacher, student, report = cut("llama", heads=2)  # of 4 heads in 2 groups
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.config.head_dim == 4
    for index, block in enumerate(teacher.model.layers):
        theirs, ours = block.self_attn, student.model.layers[index].self_attn
        (group,) = report.kept_units[f"model.layers.{index}.self_attn.o_proj"]
        queries, keys = slice(8 * group, 8 * group + 8), slice(4 * group, 4 * group + 4)
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[queries])
        assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[keys])
        assert torch.equal(ours.v_proj.weight, theirs.v_proj.weight[keys])
        assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:, queries])


def test_the_heads_of_t5_are_the_same_in_all_layers_that_share_a_position_bias() -> None:
    _, student, report = cut("t5", heads=1)
    shared = [choice for choice in report.kept_units if "*" in choice]
    assert shared == ["encoder.block.*.layer.0.SelfAttention.o",
                      "decoder.block.*.layer.0.SelfAttention.o"]  # fmt: skip
    assert sum("EncDecAttention" in choice for choice in report.kept_units) == 4
    bias = student.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert bias.shape[1] == 1


@torch.no_grad()
def by_hand(teacher: Any, paths: list[str], units: int, *, outputs: bool) -> list[list[float]]:
    """The activation of each unit: mean of |value| over positions and features, L2 over rows."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    for path in paths:
        teacher.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: seen[path].append((out if outputs else args[0])[0])
        )
    for ids in ROWS:
        teacher(torch.tensor([ids]))
    scores = []
    for path in paths:
        squares = [0.0] * units
        for values in seen[path]:  # of one row: (positions, units * features)
            size = values.shape[1] // units
            for unit in range(units):
                mean = values[:, unit * size : (unit + 1) * size].abs().sum().item()
                squares[unit] += (mean / (values.shape[0] * size)) ** 2
        scores.append([square**0.5 for square in squares])
    return scores


def largest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:count])


def test_the_most_active_units_stay() -> None:
    teacher = build("llama").double()
    with torch.no_grad():  # the norm after the layers does not count
        teacher.model.norm.weight.copy_(torch.linspace(0, 1000, 16))
    report = student_and_report(teacher, ffn=7, heads=2, hidden=6, rows=rows_for(teacher))[1]
    layers = [f"model.layers.{index}" for index in range(4)]
    for name, units, count in (("mlp.down_proj", 24, 7), ("self_attn.o_proj", 2, 1)):
        paths = [f"{layer}.{name}" for layer in layers]
        hand = by_hand(copy.deepcopy(teacher), paths, units, outputs=False)
        for path, scores in zip(paths, hand, strict=True):
            assert report.kept_units[path] == largest(scores, count)
    norms = [f"{layer}.{name}" for layer in layers
             for name in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    hand = by_hand(copy.deepcopy(teacher), norms, 16, outputs=True)
    total = [sum(scores) for scores in zip(*hand, strict=True)]
    assert report.kept_units["hidden"] == largest(total, 6)


def test_layers_and_widths_together() -> None:
    teacher = build("llama")
    shorter = student_from_teacher(teacher, [0, 3])
    one = student_from_teacher(shorter, ffn=8, rows=rows_for(teacher))
    other, report = student_and_report(teacher, [0, 3], ffn=8, rows=rows_for(teacher))
    assert torch.equal(logits(one), logits(other))
    assert report.removed_layers == {"model.layers": [1, 2]}
    assert report.widths == {"intermediate_size": (24, 8)}
    assert "intermediate_size: 8 instead of 24" in report.render()
    whole = student_from_teacher(teacher, ffn=8, rows=rows_for(teacher))
    assert whole.config.num_hidden_layers == 4


def test_bfloat16_and_nothing_is_shared() -> None:
    teacher = build("llama_tied").to(torch.bfloat16)
    before = logits(teacher)
    student = student_from_teacher(teacher, hidden=0.75, ffn=0.5, rows=rows_for(teacher))
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    with torch.no_grad():
        for value in student.parameters():
            value.zero_()
    assert torch.equal(logits(teacher), before)


@pytest.mark.parametrize(
    ("family", "widths", "message"),
    [
        ("llama", {"ffn": 25}, "ffn=25 is no part of the teacher's 24: give a number from 1 to 24"),
        ("llama", {"ffn": 0}, "ffn=0 is no part"),
        ("llama", {"ffn": 1.5}, "ffn=1.5 is no part"),
        ("llama", {"ffn": True}, "ffn=True is no part"),
        ("llama", {"heads": 3}, "heads=3 would split a group of 2 heads .* give 2 or 4"),
        ("gpt2", {"heads": 2}, "no weight becomes smaller with heads alone"),
        ("gpt2", {"hidden": 12}, "in this model: give heads=3 with hidden=12"),
        ("llama", {"hidden": 11}, "is not a multiple of the number of attention heads"),
        ("bart", {"hidden": 12}, "give a hidden that is a multiple of 8"),
        ("gemma2", {"hidden": 8}, "a constant depends on its width"),
    ],
)
def test_refused_widths(family: str, widths: dict[str, Any], message: str) -> None:
    teacher = build(family)
    with pytest.raises(InputError, match=message) as caught:
        student_from_teacher(teacher, rows=rows_for(teacher), **widths)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in
                   teacher.modules())  # fmt: skip


def test_a_share_of_the_features_is_a_multiple_of_the_heads() -> None:
    _, student, _ = cut("llama", hidden=0.7)  # 11.2 of 16
    assert student.config.hidden_size == 12


def test_without_rows() -> None:
    with pytest.raises(InputError, match="give rows"):
        student_from_teacher(build("llama"), ffn=8)


OTHERS: dict[str, Any] = {
    "fused in another order": (
        hf.GPTNeoXConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4),
        {"hidden": 8, "heads": 2}, "its weights have another order",
    ),
    "fused with fewer keys": (
        hf.Phi3Config(**DECODER | {"head_dim": 4}), {"heads": 2}, "joins queries, keys and values",
    ),
    "experts": (
        hf.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=8),
        {"ffn": 4}, "cut",
    ),
    "no field": (
        hf.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4), {"ffn": 8},
        "no field of BloomConfig decides the neurons",
    ),
    "a norm of the heads": (hf.Olmo2Config(**DECODER), {"heads": 2}, "cannot be cut"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_cannot_be_cut(name: str) -> None:
    config, widths, message = OTHERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = hf.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for value in teacher.parameters():
                value.add_(torch.randn_like(value) * 0.2)
    with pytest.raises(InputError, match=message) as caught:
        student_from_teacher(teacher, rows=rows_for(teacher), **widths)
    assert "\n" not in str(caught.value)


def test_fused_networks_with_gates_are_cut() -> None:
    """Phi-3 has gate and values in one weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)).eval().double()
    student, report = student_and_report(teacher, ffn=9, rows=rows_for(teacher))
    expected = without(teacher, "phi3", report, {"ffn": 24})
    torch.testing.assert_close(logits(student), logits(expected), rtol=1e-9, atol=1e-9)
    assert student.model.layers[0].mlp.gate_up_proj.weight.shape == (18, 16)
