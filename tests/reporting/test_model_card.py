"""The model card: what is known stands in it, what was not measured does not, no path leaks."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_distill.reporting.model_card import (
    CardFacts,
    hub_id,
    metrics_of_evaluation,
    public_name,
    render_card,
    with_model_id,
    write_card,
)

FACTS = CardFacts(
    model_name="tiny-student",
    teacher="openai-community/gpt2-large",
    initial_from="openai-community/gpt2",
    dataset="Salesforce/wikitext",
    objective={"alpha": 0.5, "temperature": 2.0, "divergence": "forward_kl"},
    metrics={
        "teacher": {"perplexity": 20.1234, "parameters": 774030080},
        "baseline": {"perplexity": 31.5, "kl_to_teacher": 0.41},
        "student": {"perplexity": 28.25, "kl_to_teacher": 0.2871, "parameters": 124439808},
    },
    training={"max_steps": 1000, "learning_rate": 5e-4},
    versions={"torch": "2.13.0"},
    tags=["wikitext"],
    language="en",
    license="apache-2.0",
)


def table(card: str) -> dict[str, list[str]]:
    """The results by their first cell."""
    rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in rows}


def test_the_metadata_say_what_is_known() -> None:
    data = ModelCard(render_card(FACTS)).data
    assert data.base_model == ["openai-community/gpt2", "openai-community/gpt2-large"]
    assert data.datasets == ["Salesforce/wikitext"]
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"distillation", "hf-distill", "wikitext"} <= set(data.tags)


def test_published_results_are_the_students_own_and_exact() -> None:
    data = ModelCard(render_card(FACTS)).data
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"perplexity": 28.25, "kl_to_teacher": 0.2871}


def test_the_text_has_everything_that_was_given() -> None:
    card = render_card(FACTS)
    for words in ("`openai-community/gpt2-large`", "temperature: 2.0", "max steps: 1000", "2.13.0"):
        assert words in card
    assert table(card)["Perplexity"] == ["20.12", "31.50", "28.25"]
    assert table(card)["Parameters"] == ["774M", "", "124.4M"]


def test_what_was_not_measured_does_not_appear() -> None:
    figures: dict[str, Any] = {"perplexity": float("nan"), "ce": None, "top1_agreement": 0.5}
    card = render_card(replace(FACTS, metrics={"student": figures}))
    assert set(table(card)) == {"", "---", "Top-1 agreement with the teacher"}
    assert [r.metric_type for r in ModelCard(card).data.eval_results] == ["top1_agreement"]
    assert not re.search(r"\bnan\b|None", card)


def test_a_card_of_nothing_claims_nothing() -> None:
    card = render_card(CardFacts("student"))
    data = ModelCard(card).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert re.findall(r"^## (.*)", card, re.MULTILINE) == ["How to load it"]
    assert not re.search(r"\d", card.split("```")[-1])


def test_no_results_are_published_for_data_without_a_name() -> None:
    assert ModelCard(render_card(replace(FACTS, dataset=None))).data.eval_results is None


def test_the_evaluation_data_are_named_where_there_are_some() -> None:
    facts = replace(FACTS, dataset="a.txt", evaluated_on={"": ["/x/b.txt"]})
    card = render_card(facts)
    assert "On `b.txt`. An empty cell" in card
    results = ModelCard(card).data.eval_results
    assert {(r.dataset_type, r.dataset_name) for r in results} == {("b.txt", "b.txt")}

    several = {"novels": ["/x/n.txt"], "wiki": ["Salesforce/wikitext"]}
    figures = {**FACTS.metrics, "sets": dict.fromkeys(several, FACTS.metrics)}
    card = render_card(replace(facts, evaluated_on=several, metrics=figures))
    assert "On held-out rows. An empty cell" in card
    for words in ("### novels\n\n`n.txt`\n\n|", "### wiki\n\n`Salesforce/wikitext`\n\n|"):
        assert words in card
    results = ModelCard(card).data.eval_results
    assert {(r.dataset_type, r.dataset_name) for r in results} == {("n.txt", "novels (n.txt)")}


def test_on_policy_rows_and_an_adapted_teacher_are_told() -> None:
    objective = {**FACTS.objective, "on_policy": 0.5, "max_new_tokens": 64}
    metrics = {**FACTS.metrics, "unadapted": {"perplexity": 25.0}}
    card = render_card(replace(FACTS, objective=objective, metrics=metrics))
    assert "- on policy: 0.5" in card
    assert "Text that the student generated itself (on-policy rows) has no CE" in card
    assert "gpt2-large`, which was first trained on the same rows, starting from" in card


def test_local_paths_do_not_leak(tmp_path: Path) -> None:
    secret = tmp_path / "alice" / "teacher-v2"
    secret.mkdir(parents=True)
    facts = CardFacts(
        model_name=f"{secret.parent}/student",
        teacher=str(secret),
        initial_from=f"layers 0, 2 of {secret}",
        dataset=[f"{secret.parent}/corpus/**/*.txt", "~/alice/books.jsonl.gz", "../alice/x.csv"],
        objective={"divergence": f"{secret}/mine.py"},
        training={"output_dir": str(secret / "out"), "note": f"saved 'in {secret}', then read"},
        versions={"hf_distill": f"0.1 at {secret}"},
        metrics={"student": {"perplexity": 3.0}},
        repo_id=None,
    )
    card = render_card(facts)
    assert "alice" not in card
    assert str(tmp_path) not in card
    assert "/" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL).replace("and/or", "")
    for name in ("# student", "`teacher-v2`", "layers 0, 2 of teacher-v2", "`corpus`"):
        assert name in card
    assert "`books.jsonl.gz`, `x.csv`" in card
    data = ModelCard(card).data
    assert (data.base_model, data.datasets) == (None, None)


def test_a_folder_that_looks_like_an_id_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_id("runs/teacher") == "runs/teacher"
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/teacher") is None
    assert public_name("runs/teacher") == "teacher"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/models/x", None),
        ("a/b/c", None),
        ("data/train.jsonl", None),
        ("random weights", None),
        ("{stdlib}/**/*.py", None),
        ("", None),
        (None, None),
    ],
)
def test_hub_ids_are_told_from_paths(name: str | None, found: str | None) -> None:
    assert hub_id(name) == found


def test_words_with_a_slash_are_not_paths() -> None:
    assert public_name("trained with and/or without CE") == "trained with and/or without CE"
    assert public_name(r"C:\Users\alice\teacher") == "teacher"


def test_text_cannot_break_out_of_the_card() -> None:
    hostile = "x\n---\nlicense: mit\n---\n# Fake | `code`"
    facts = replace(FACTS, model_name=hostile, teacher=hostile, training={hostile: hostile})
    card = render_card(facts)
    assert ModelCard(card).data.license == "apache-2.0"
    assert "\n# Fake" not in card
    assert card.count("\n---\n") == 1, "only the end of the metadata"


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def test_the_snippet_runs(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    exec(compile(snippet(render_card(replace(FACTS, repo_id=str(tmp_path)))), "card", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out


def test_an_adapter_is_loaded_as_one() -> None:
    card = render_card(replace(FACTS, adapter=True))
    assert ModelCard(card).data.library_name == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained" in snippet(card)
    ast.parse(snippet(card))


def test_the_snippet_is_pointed_at_the_repository() -> None:
    card = render_card(FACTS)
    here = '# The folder of this file: run this there, or give its path.\nmodel_id = "."\n'
    assert here in card
    assert with_model_id(card, "me/tiny") == card.replace(here, 'model_id = "me/tiny"\n')
    assert render_card(replace(FACTS, repo_id="me/tiny")) == with_model_id(card, "me/tiny")


def test_a_card_is_written_whole(tmp_path: Path) -> None:
    path = write_card(tmp_path, FACTS)
    assert path.name == "README.md"
    assert path.read_text() == render_card(FACTS)
    assert list(tmp_path.iterdir()) == [path]


def test_trainers_evaluation_becomes_figures() -> None:
    logged = {
        "eval_loss": 2.5,
        "eval_ce": 3.0,
        "eval_reverse_kl": 0.5,
        "eval_teacher_ce": 2.75,
        "eval_top1_agreement": 0.75,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 9.0,
        "eval_model_preparation_time": 0.1,
        "epoch": 1.0,
    }
    metrics = metrics_of_evaluation(logged)
    assert metrics["teacher"] == {"ce": 2.75}
    assert set(metrics["student"]) == {"loss", "ce", "reverse_kl", "top1_agreement"}
    rows = table(render_card(replace(FACTS, metrics=metrics)))
    assert rows["Cross-entropy (nats per target)"] == ["2.750", "3.000"]
    assert rows["Reverse kl"] == ["", "0.5000"]
