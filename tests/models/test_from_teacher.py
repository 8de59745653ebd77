"""A student's layers must compute what the teacher's did, for every architecture alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_distill.errors import InputError
from hf_distill.models.from_teacher import student_from_teacher
from hf_distill.models.layer_selection import Stack, choose_layers

LENGTH = 12  # positions of a test row: more than the sliding windows
DEPTH = 4

DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,  # as many as layers: which of the two counts layers must be found out
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
BART = {
    "vocab_size": 61, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": DEPTH,
      "decoder_start_token_id": 0}  # fmt: skip

FAMILIES: dict[str, tuple[type, hf.PreTrainedConfig]] = {
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=61, n_embd=16, n_layer=DEPTH, n_head=4, n_positions=32,
                      bos_token_id=1, eos_token_id=2),
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER)),
    "llama_tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**{k: v for k, v in DECODER.items() if k != "head_dim"},
                       use_sliding_window=True, sliding_window=4, max_window_layers=DEPTH - 2),
    ),
    "qwen3": (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=4, layer_types=MIXED),
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**DECODER, sliding_window=4)),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**DECODER, sliding_window=4, layer_types=MIXED),
    ),
    "bert": (
        hf.BertForMaskedLM,
        hf.BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=4,
                      num_hidden_layers=DEPTH, max_position_embeddings=32),
    ),
    "bert_classifier": (
        hf.BertForSequenceClassification,
        hf.BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=4,
                      num_hidden_layers=DEPTH, max_position_embeddings=32, num_labels=DEPTH),
    ),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=61, dim=16, hidden_dim=24, n_heads=4, n_layers=DEPTH,
                            max_position_embeddings=32),
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    "t5_gated": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig(**BART, encoder_layers=DEPTH, decoder_layers=DEPTH),
    ),
}  # fmt: skip

WITH_GENERATION = sorted(set(FAMILIES) - {"bert", "bert_classifier", "distilbert"})


def build(family: str) -> hf.PreTrainedModel:
    """A teacher with weights large enough that every layer, bias and norm shows in the logits."""
    model_class, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.2)
    return model


def inputs(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, LENGTH), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(1)
    return batch


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> Tensor:
    """(rows, positions, vocabulary), or (rows, classes)."""
    return model(**inputs(model)).logits


def stacks_of(model: hf.PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of blocks, found by the names that the families give them."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == DEPTH and name.count(".") <= 2
    ]


def bypassed(teacher: hf.PreTrainedModel, kept: list[list[int]]) -> hf.PreTrainedModel:
    """The whole teacher, in which the layers that are not kept hand on what they were given."""

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return given if isinstance(out, Tensor) else (given, *out[1:])

    teacher = copy.deepcopy(teacher)
    stacks = stacks_of(teacher)
    assert len(stacks) == len(kept)
    for stack, indices in zip(stacks, kept, strict=True):
        for index, block in enumerate(stack):
            if index not in indices:
                block.register_forward_hook(hand_on, with_kwargs=True)
    return teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_make_the_teacher(family: str) -> None:
    teacher = build(family)
    student = student_from_teacher(teacher, list(range(DEPTH)))
    assert torch.equal(logits(student), logits(teacher))
    unset = {"architectures": None, "dtype": None}  # by a model that was not loaded
    assert student.config.to_dict() | unset == teacher.config.to_dict() | unset


@pytest.mark.parametrize("layers", [[0, 2], [1, 3], [2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_compute_what_they_did(family: str, layers: list[int]) -> None:
    teacher = build(family)
    student = student_from_teacher(teacher, layers)
    expected = logits(bypassed(teacher, [layers] * len(stacks_of(teacher))))
    torch.testing.assert_close(logits(student), expected)
    assert not torch.allclose(expected, logits(teacher), atol=1e-3)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ({"encoder": [1, 2], "decoder": [3]}, [[1, 2], [3]]),
        ({"decoder": "first_and_last"}, [[0, 1, 2, 3], [0, 3]]),
        ("every_other", [[0, 2], [0, 2]]),
    ],
    ids=str,
)
def test_encoder_and_decoder_apart(family: str, layers: Any, kept: list[list[int]]) -> None:
    teacher = build(family)
    student = student_from_teacher(teacher, layers)
    torch.testing.assert_close(logits(student), logits(bypassed(teacher, kept)))


@pytest.mark.parametrize("family", FAMILIES)
def test_reload_gives_the_same_student(family: str, tmp_path: Any) -> None:
    student = student_from_teacher(build(family), [0, 3])
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    assert again.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", WITH_GENERATION)
def test_cache_changes_nothing(family: str) -> None:
    student = student_from_teacher(build(family), [1, 3])
    batch = {k: v for k, v in inputs(student).items() if k != "decoder_input_ids"}
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": 1,
    }
    options |= {"output_logits": True, "eos_token_id": None}
    cached, plain = (
        student.generate(**batch, **options, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "t5", "bart", "bert"])
def test_tied_weights_stay_tied_and_nothing_is_shared_with_the_teacher(family: str) -> None:
    teacher = build(family)
    before = logits(teacher)
    student = student_from_teacher(teacher, [0, 1])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    with torch.no_grad():
        for value in [*student.parameters(), *student.buffers()]:
            value.zero_()
    assert torch.equal(logits(teacher), before)
    assert all(value.requires_grad for value in student.parameters())


def test_untied_head_stays_untied() -> None:
    teacher = build("llama")
    student = student_from_teacher(teacher)
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def test_dtype_attention_generation_config_and_identity() -> None:
    teacher = build("llama").to(torch.bfloat16)
    teacher.set_attn_implementation("eager")
    teacher.generation_config.temperature = 0.25
    teacher.name_or_path = teacher.config.name_or_path = "somewhere/teacher"
    student = student_from_teacher(teacher)
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    assert student.config._attn_implementation == "eager"
    assert student.generation_config.temperature == 0.25
    assert student.generation_config is not teacher.generation_config
    assert student.name_or_path == student.config.name_or_path == ""
    assert teacher.config.num_hidden_layers == DEPTH


def test_several_end_tokens_are_not_a_list_of_layers() -> None:
    teacher = build("llama")
    teacher.config.eos_token_id = [2, 3, 4, 5]
    assert student_from_teacher(teacher).config.eos_token_id == [2, 3, 4, 5]


def test_the_random_state_is_left_alone() -> None:
    teacher = build("gemma3")
    before = torch.get_rng_state()
    student_from_teacher(teacher)
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_from_a_folder(tmp_path: Any) -> None:
    teacher = build("gpt2")
    teacher.save_pretrained(tmp_path)
    assert torch.equal(
        logits(student_from_teacher(tmp_path)), logits(student_from_teacher(teacher))
    )


@pytest.mark.parametrize(
    ("length", "layers", "num_layers", "expected"),
    [
        (5, "every_other", None, [0, 2, 4]),
        (1, "every_other", None, [0]),
        (12, "first_and_last", None, [0, 2, 4, 7, 9, 11]),  # as DistilBERT and DistilGPT2
        (24, "first_and_last", 2, [0, 23]),
        (5, "first_and_last", 3, [0, 2, 4]),
        (3, "first_and_last", 3, [0, 1, 2]),
        (4, (1, 3), None, [1, 3]),
    ],
)
def test_selections(length: int, layers: Any, num_layers: int | None, expected: list[int]) -> None:
    stack = Stack("h", "transformer.h", length)
    assert choose_layers([stack], layers, num_layers) == {stack: expected}


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ("every_second", None, "'every_second' is not a selection: give 'every_other'"),
        ([2, 1], None, "different indices from 0 to 3 in ascending order"),
        ([1, 1], None, "ascending"),
        ([0, 4], None, "from 0 to 3"),
        ([-1], None, "from 0 to 3"),
        ([], None, r"layers=\[\]"),
        ([0.5], None, "indices"),
        ([True], None, "indices"),
        (3, None, "3 is not a selection"),
        ({"encoder": [0]}, None, "this teacher has 'transformer.h'"),
        ("first_and_last", 1, "num_layers=1 cannot include"),
        ("first_and_last", 5, "give 2 to 4"),
        ("every_other", 2, "has no effect"),
        ([0, 1], 2, "has no effect"),
    ],
)
def test_refused_selections(layers: Any, num_layers: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        student_from_teacher(build("gpt2"), layers, num_layers=num_layers)
    assert "\n" not in str(caught.value)


def test_a_layer_whose_index_decides_what_it_computes_is_refused() -> None:
    config = copy.deepcopy(FAMILIES["gpt2"][1])
    config.scale_attn_by_inverse_layer_idx = True
    teacher = hf.GPT2LMHeadModel(config).eval()
    with pytest.raises(InputError, match=r"layer 2 .* cannot become layer 1, since its attn"):
        student_from_teacher(teacher, [0, 2])
    student = student_from_teacher(teacher, [0, 1])
    torch.testing.assert_close(logits(student), logits(bypassed(teacher, [[0, 1]])))


def test_layers_of_different_build_are_refused() -> None:
    config = hf.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2,
                               moe_intermediate_size=8, decoder_sparse_step=2)  # fmt: skip
    with pytest.raises(InputError, match=r"the index decides what kind of layer"):
        student_from_teacher(hf.Qwen3MoeForCausalLM(config), [1, 3])


def test_a_teacher_that_is_not_what_its_config_says_is_refused() -> None:
    teacher = build("llama")
    teacher.model.layers[1].mlp.up_proj = nn.Linear(16, 24, bias=True)
    with pytest.raises(InputError, match="that its config does not describe"):
        student_from_teacher(teacher, [0, 1])
    teacher.model.layers[1].mlp.up_proj = nn.Linear(16, 23, bias=False)
    with pytest.raises(InputError, match="does not fit what its config describes"):
        student_from_teacher(teacher, [0, 1])


def test_what_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(InputError, match="a Linear, not a transformers model"):
        student_from_teacher(nn.Linear(2, 2))  # type: ignore[arg-type]


# ---- Layers whose kind is stated as a pattern, by index or by a period ----

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
HYBRIDS: dict[str, Any] = {
    "llama4_text": lambda: hf.Llama4TextConfig(
        **DECODER, intermediate_size_mlp=24, num_local_experts=2, interleave_moe_layer_step=2,
        attention_chunk_size=8,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **{k: v for k, v in DECODER.items() if k != "num_hidden_layers"},
        layers_block_type=["mamba", "attention", "mlp", "attention"], ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=2, conv_kernel=4, chunk_size=8,
    ),
    "gemma4_text": lambda: hf.Gemma4TextConfig(
        **DECODER, global_head_dim=4, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=61, num_kv_shared_layers=0, sliding_window=4,
    ),
    "gemma3n_text": lambda: hf.Gemma3nTextConfig(
        **(DECODER | {"intermediate_size": [24] * DEPTH}), hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=61, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * DEPTH, layer_types=MIXED, sliding_window=4,
    ),
    "jamba": lambda: hf.JambaConfig(
        **DECODER, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **(DECODER | {"num_key_value_heads": 4}), first_k_dense_replace=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip


def build_hybrid(family: str) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(HYBRIDS[family]()).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama4_text", [0, 2]),  # both without experts
        ("llama4_text", [1, 2]),  # the one with experts comes first
        ("nemotron_h", [0, 3]),
        ("nemotron_h", [1, 2]),
        ("gemma4_text", [0, 3]),
        ("jamba", [0, 3]),
        ("deepseek_v3", [0, 2, 3]),
    ],
)
def test_hybrids_compute_what_they_did(family: str, layers: list[int], tmp_path: Any) -> None:
    teacher = build_hybrid(family)
    student = student_from_teacher(teacher, layers)
    if family != "gemma4_text":  # embeddings by layer enter each block, bypassed ones too
        torch.testing.assert_close(logits(student), logits(bypassed(teacher, [layers])))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    written = student.generate(input_ids=inputs(student)["input_ids"], max_new_tokens=2)
    assert written.shape[1] > LENGTH


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_embeddings_by_layer_are_cut_by_layer(family: str) -> None:
    teacher = build_hybrid(family)
    student = student_from_teacher(teacher, [0, 3])
    name = "model.embed_tokens_per_layer.weight"
    theirs, ours = teacher.state_dict()[name], student.state_dict()[name]
    assert torch.equal(ours, theirs.view(61, DEPTH, 8)[:, [0, 3]].reshape(61, 16))


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("jamba", "every_other", r"layer 2 .* cannot become layer 1, since the index decides"),
        ("jamba", [1, 2], r"layer 2 .* cannot become layer 1"),
        ("deepseek_v3", [1, 2], r"layer 1 .* cannot become layer 0"),
        ("nemotron_h", [0, 2], "would have no attention layer"),
    ],
)
def test_refused_with_what_would_work(family: str, layers: Any, message: str) -> None:
    teacher = build_hybrid(family)
    with pytest.raises(InputError, match=message) as error:
        student_from_teacher(teacher, layers)
    text = str(error.value)
    assert "quantised" not in text
    working = text.partition("layers=")[2].partition(" would work")[0].partition(" or ")[0]
    student = student_from_teacher(teacher, [int(i) for i in working.strip("[]").split(",")])
    assert logits(student).shape == (2, LENGTH, 61)


def test_two_fields_that_state_one_count() -> None:
    shape = {"hidden_size": 32, "embedding_dim": 32, "num_heads": 4, "vocab_size": 61}
    teacher = hf.AutoModelForCausalLM.from_config(
        hf.xLSTMConfig(**shape, num_blocks=DEPTH, num_hidden_layers=DEPTH)
    )
    student = student_from_teacher(teacher, [0, 3])
    assert (student.config.num_blocks, student.config.num_hidden_layers) == (2, 2)
    ours, theirs = (dict(model.named_parameters()) for model in (student, teacher))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name.replace("blocks.1.", "blocks.3.")])


def test_patterns_and_dictionaries_are_cut() -> None:
    from hf_distill.models.shorter_config import _cut

    config = hf.LlamaConfig(**DECODER)
    config.layers_pattern = "M*-M"
    config.per_layer_config = {}
    config.layer_options = {"0": {"a": 1}, "3": {"b": 2}}
    config.expert_layers = [1, 3]
    _cut(config, ("num_hidden_layers",), [1, 3])
    assert config.layers_pattern == "*M"
    assert config.layer_options == {1: {"b": 2}}
    assert config.expert_layers == [0, 1]
    assert config.num_hidden_layers == 2
