"""The pipelines that transformers 5 removed give what `generate` and `decode` give."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2ForSequenceClassification,
    MBart50Tokenizer,
    pipeline,
)
from writing_setup import CAUSAL, ENCODER_DECODER, tokenizer, writer

import hf_distill.pipelines  # noqa: F401  # registers them
from hf_distill import InputError, annotate
from hf_distill.data.prompts import for_languages

SOURCES = ["the dog", "a single man must be in want", "print(row)"]


def pipe(kind: str, task: str = "summarization", **options: Any) -> Any:
    model = writer(kind, **options.pop("config", {}))
    ends = kind in ENCODER_DECODER
    return pipeline(task, model=model, tokenizer=tokenizer(ends=ends), device="cpu", **options)


def by_hand(model: Any, text: str, **options: Any) -> str:
    """The text that generate and decode give for one source."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    else:
        ids = torch.tensor([tokenizer(ends=False)(text)["input_ids"]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        written = written[ids.shape[1] :]
    return tokenizer().decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("kind", CAUSAL + ENCODER_DECODER)
def test_same_text_as_generate(kind: str) -> None:
    end = "" if kind in ENCODER_DECODER else "\n"
    pipes = pipe(kind, prefix="say: ")
    options: dict[str, Any]
    for options in ({"max_new_tokens": 9}, {"max_new_tokens": 7, "num_beams": 3}):
        wanted = [by_hand(pipes.model, f"say: {text}{end}", **options) for text in SOURCES]
        assert len(set(wanted)) > 1  # the texts depend on the sources
        for size in (1, 3):
            found = pipes(SOURCES, batch_size=size, **options)
            assert found == [{"summary_text": text} for text in wanted]
        assert pipes(SOURCES[0], **options) == [{"summary_text": wanted[0]}]
    several = pipes(SOURCES, num_beams=3, num_return_sequences=2, max_new_tokens=7, batch_size=2)
    assert [texts[0]["summary_text"] for texts in several] == wanted
    assert {len(texts) for texts in several} == {2}


@pytest.mark.parametrize("task", ["translation", "translation_en_to_es"])
def test_translation(task: str) -> None:
    pipes = pipe("marian", task, max_new_tokens=5)
    assert pipes([]) == []
    wanted = by_hand(pipes.model, SOURCES[1], max_new_tokens=5)
    assert pipes(SOURCES[1]) == [{"translation_text": wanted}]


def test_settings_of_the_task_in_the_config() -> None:
    """The prefix and generation settings that T5's config holds; the call's own come first."""
    settings = {"prefix": "sum: ", "max_length": 6, "num_beams": 2}
    config = {"task_specific_params": {"summarization": settings}}
    pipes = pipe("t5", config=config)
    wanted = by_hand(pipes.model, "sum: the dog", max_length=6, num_beams=2)
    assert pipes("the dog") == [{"summary_text": wanted}]
    wanted = by_hand(pipes.model, "the dog", max_new_tokens=9, num_beams=2)
    assert pipes("the dog", prefix="", max_new_tokens=9) == [{"summary_text": wanted}]
    wanted = by_hand(pipes.model, "the dog", max_new_tokens=20)
    other = pipe("t5", "translation", config=config)
    assert other("the dog", max_new_tokens=20) == [{"translation_text": wanted}]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_long_sources_are_cut_with_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prefix and separator stay; a causal model keeps positions for what it writes."""
    pipes, text = pipe(kind, prefix="say: "), "dog " * 50
    tokens = len(tokenizer(ends=kind == "t5")(f"say: {text}").input_ids)
    with caplog.at_level(logging.WARNING, "hf_distill"):
        found = pipes(text, max_new_tokens=10)
    limit = 40 if kind == "t5" else 30
    ours = [record.getMessage() for record in caplog.records if record.name == "hf_distill"]
    assert ours == [
        f"The source has {tokens} tokens, but the model can read {limit}: its end is cut."
    ]
    if kind == "t5":
        kept = tokenizer().decode(tokenizer()(f"say: {text}").input_ids[:39])
    else:  # the text ends in white space, which stands for the separator
        kept = tokenizer().decode(tokenizer(ends=False)(f"say: {text}").input_ids[:30])
    assert found == [{"summary_text": by_hand(pipes.model, kept, max_new_tokens=10)}]
    with pytest.raises(InputError, match=f"{tokens} tokens, but the model can read {limit}"):
        pipes(text, max_new_tokens=10, truncation=False)


def test_the_separator_of_a_cut_source_stays() -> None:
    pipes, text = pipe("llama"), "dog" * 50
    ids = tokenizer(ends=False)(text).input_ids[:29] + tokenizer(ends=False)("\n").input_ids
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    written = pipes.model.generate(prompt, attention_mask=mask, max_new_tokens=10)[0, 30:]
    wanted = tokenizer().decode(written, skip_special_tokens=True)
    assert pipes(text, max_new_tokens=10) == [{"summary_text": wanted}]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("  ", {}, "the source is empty"),
        ("a", {"max_new_tokens": 40}, "max_new_tokens is 40, but"),
        ("a", {"src_lang": "en", "tgt_lang": "es"}, "no language codes"),
        (3, {}, "the source is a int"),
    ],
)
def test_bad_input_is_one_clear_line(source: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipe("gpt2")(source, **options)
    assert "\n" not in str(caught.value)


def test_keywords_of_transformers_4() -> None:
    pipes = pipe("t5", max_new_tokens=5)
    wanted = pipes("the dog")
    assert pipes("the dog", clean_up_tokenization_spaces=True, return_text=True) == wanted
    (found,) = pipes("the dog", return_tensors=True, return_text=False)
    text = tokenizer().decode(found["summary_token_ids"], skip_special_tokens=True)
    assert [{"summary_text": text}] == wanted
    with pytest.raises(InputError, match="return_text is False, which leaves nothing"):
        pipes("the dog", return_text=False)


def test_models_that_cannot_write(tmp_path: Path) -> None:
    for task in ("summarization", "translation_en_to_es"):
        with pytest.raises(InputError, match="no default model for this task: give model="):
            pipeline(task)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="saved as GPT2ForSequenceClassification, which cannot"):
        pipeline("summarization", model=str(tmp_path), device="cpu")


def test_language_codes() -> None:
    """The codes of the task's name, of the call, and codes of their first part; mBART's vocabulary
    without words."""
    given = MBart50Tokenizer()
    special = {"eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
    model = writer("bart", vocab_size=len(given), **special)
    pipes = pipeline("translation_en_to_es", model=model, tokenizer=given, device="cpu")
    ids = torch.tensor([given.convert_tokens_to_ids(["en_XX", "▁", "<unk>", "</s>"])])
    spanish = given.convert_tokens_to_ids("es_XX")
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), forced_bos_token_id=spanish, max_new_tokens=5
    )[0]
    assert written[1] == spanish
    wanted = given.decode(written, skip_special_tokens=True)
    assert pipes("dog", max_new_tokens=5) == [{"translation_text": wanted}]
    assert given.src_lang == "en_XX"
    marked, forced = for_languages(given, "ro_RO", "fr_XX")
    assert forced == {"forced_bos_token_id": given.convert_tokens_to_ids("fr_XX")}
    assert marked("dog").input_ids[0] == given.convert_tokens_to_ids("ro_RO")
    with pytest.raises(InputError, match="knows no language 'xx'"):
        pipes("dog", tgt_lang="xx")


def test_saving_a_pipeline_writes_no_code(tmp_path: Path) -> None:
    pipe("t5").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()


def test_a_folder_of_a_causal_model(tmp_path: Path) -> None:
    model = writer("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer(ends=False).save_pretrained(tmp_path)
    found = pipeline("summarization", model=str(tmp_path), device="cpu")("dog", max_new_tokens=5)
    assert found == [{"summary_text": by_hand(model, "dog\n", max_new_tokens=5)}]


def test_a_folder_in_a_new_process(tmp_path: Path) -> None:
    """As the issue types it; without the import transformers refuses the task."""
    model = writer("t5")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    use = (
        "from transformers import pipeline; "
        f"print(pipeline('summarization', model={str(tmp_path)!r})('the dog', max_new_tokens=5))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for code, works in ((f"import hf_distill.pipelines; {use}", True), (use, False)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert (done.returncode == 0) is works, done.stderr
        if works:
            wanted = [{"summary_text": by_hand(model, "the dog", max_new_tokens=5)}]
            assert done.stdout.strip().splitlines()[-1] == str(wanted)


def test_a_text_is_no_longer_than_the_decoder_has_positions(tmp_path: Path) -> None:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    sides = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    words = tokenizer()
    config = BartConfig(
        vocab_size=len(words), d_model=16, max_position_embeddings=40, forced_eos_token_id=None,
        **(ids | sides),
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 2] = -1e9  # it would never end by itself
    assert pipeline("summarization", model=model, tokenizer=words)("a source")
    rows = [{"document": "a source", "summary": "a target"}]
    assert len(annotate(rows, model, tmp_path / "written", tokenizer=words)) == 1


def test_one_conversation() -> None:
    write = pipe("llama")
    write.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    )
    talk = [{"role": "user", "content": "the dog"}]
    (alone,), ((in_batch,),) = write(talk), [write([talk])]
    assert alone == in_batch
