"""The pipelines "summarization" and "translation", which transformers 5 has removed.

`import hf_distill.pipelines` restores them, for encoder-decoder and causal models:

    from transformers import pipeline

    summarize = pipeline("summarization", model="runs/summarization/student")
    summarize("A long document ...")  # [{"summary_text": "..."}]
    translate = pipeline("translation_en_to_es", model="Helsinki-NLP/opus-mt-en-es")
    translate(["One.", "Two."], batch_size=2)  # [{"translation_text": "Uno."}, ...]
"""

from __future__ import annotations

import logging
import re
from typing import Any, ClassVar

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    Pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY, REMOVED_TASKS

from hf_distill.data.prompts import Prompts, for_languages, has_languages, source_limit
from hf_distill.errors import InputError
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.heads import auto_class
from hf_distill.models.positions import position_limit

__all__ = ["SummarizationPipeline", "TranslationPipeline"]

_PARAMETRIZED = re.compile(r"translation_(\w+)_to_(\w+)")
_OF_PROMPTS = ("prefix", "separator", "src_lang", "tgt_lang")
_OF_TEXTS = ("clean_up_tokenization_spaces",)


class WritingPipeline(Pipeline):
    """Generates a text for each source: the common part of summarization and translation.

    A call takes a text, a list of texts, a generator or a data set, and these keywords:

    prefix: put before each source; by default that of `config.task_specific_params`
    separator: put after each source of a causal model, "\\n" by default, as in recipes
    src_lang, tgt_lang: codes, for models with language codes (mBART, M2M100, NLLB)
    truncation: False makes a source that is too long an error; otherwise its end is cut
    return_tensors: True gives token ids ("summary_token_ids") in place of texts
    clean_up_tokenization_spaces: for the tokenizer's `decode`
    batch_size, num_workers, and all keywords of `generate`

    At most 256 tokens are generated, unless the call, `config.task_specific_params` or the model's
    generation config set a length.
    returns: a list of dictionaries, one for each generated text
    raises: InputError for an empty source, a source that leaves no room for new tokens, or an
        unknown language
    """

    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)
    result: ClassVar[str]
    tokenizer: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.model.can_generate() or self.tokenizer is None:
            raise InputError(
                f"{type(self.model).__name__} cannot write text for {self.task!r}: give an "
                "encoder-decoder or a causal language model, with its tokenizer"
            )
        config = self.model.config
        if auto_class(config, None) not in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            raise InputError(
                f"the model was saved as {config.architectures[0]}, which cannot write text for "
                f"{self.task!r}, so that its language-model head would be random: give an "
                "encoder-decoder or a causal language model"
            )
        self._encoder_decoder = bool(config.is_encoder_decoder)
        if not self._encoder_decoder:
            self.tokenizer.padding_side = "left"
        elif (places := position_limit(self.model)) is not None:
            # A decoder has no more positions than these.
            usual = self._generation_defaults["max_new_tokens"]
            self._generation_defaults["max_new_tokens"] = min(usual, places)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        settings = getattr(config, "task_specific_params", None) or {}
        known = vars(GenerationConfig())
        settings = settings.get(self.task) or {}
        self._prefix = settings.get("prefix") or ""
        self._task_settings = {k: v for k, v in settings.items() if k in known}
        self._prompts: dict[Any, tuple[Prompts, dict[str, int]]] = {}

    def _sanitize_parameters(
        self,
        truncation: bool = True,
        return_tensors: bool = False,
        return_text: bool = True,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        read = {name: kwargs.pop(name) for name in _OF_PROMPTS if name in kwargs}
        gives = {name: kwargs.pop(name) for name in _OF_TEXTS if name in kwargs}
        languages = {k: v for k, v in read.items() if k.endswith("_lang")}
        reads: dict[str, Any] = {**read, **kwargs}
        if not truncation:
            reads["truncation"] = False
        if not (return_text or return_tensors):
            raise InputError(
                "return_text is False, which leaves nothing to return: with return_tensors=True "
                "the result holds token ids"
            )
        if return_tensors:
            gives["return_tensors"] = True
        return reads, {**languages, **kwargs}, gives

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Write a text for each source; see the class."""
        if isinstance(inputs, list | tuple) and not inputs:
            return []  # the base class asks the first source for its form
        found = super().__call__(inputs, *args, **kwargs)
        # One conversation is a list too, and its result is one list of texts.
        if isinstance(inputs, list) and all(isinstance(t, list) and len(t) == 1 for t in found):
            return [texts[0] for texts in found]
        return found

    def preprocess(  # type: ignore[override]
        self,
        source: Any,
        prefix: str | None = None,
        separator: str = "\n",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        truncation: bool = True,
        **generate_kwargs: Any,
    ) -> Any:
        """Encode one source, and warn if it is too long."""
        new_tokens = 0 if self._encoder_decoder else self._new_tokens(generate_kwargs)
        prefix = self._prefix if prefix is None else prefix
        key = (prefix, separator, src_lang, tgt_lang, new_tokens)
        prompts, _ = self._prompts.get(key) or self._prompts.setdefault(key, self._made(*key))
        ids, tokens = prompts.encode(getattr(source, "messages", source))
        if tokens > len(ids):
            if not truncation:
                raise InputError(
                    f"the source has {tokens} tokens, but the model can read {len(ids)}: shorten "
                    "it, or leave truncation at True"
                )
            logging.getLogger("hf_distill").warning(
                "The source has %d tokens, but the model can read %d: its end is cut.",
                tokens,
                len(ids),
            )
        return self.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")

    def _forward(  # type: ignore[override]
        self,
        model_inputs: Any,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        ids, mask = model_inputs["input_ids"], model_inputs["attention_mask"]
        _, forced = self._languages(src_lang, tgt_lang)
        options = self._prepare_generate_kwargs({**generate_kwargs, **forced})
        found = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        written = found if not hasattr(found, "sequences") else found.sequences
        if not self._encoder_decoder:
            written = written[:, ids.shape[1] :]
        return {"written": written.reshape(len(ids), -1, written.shape[1])}

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, return_tensors: bool = False, **decoding: Any
    ) -> list[dict[str, Any]]:
        """The texts that were written for one source, or their token ids."""
        written = model_outputs["written"][0]
        if return_tensors:
            return [{f"{self.result}_token_ids": ids} for ids in written]
        decode = self.tokenizer.decode
        return [
            {f"{self.result}_text": decode(ids, skip_special_tokens=True, **decoding)}
            for ids in written
        ]

    def _prepare_generate_kwargs(
        self, generate_kwargs: dict[str, Any], **overrides: Any
    ) -> dict[str, Any]:
        """As the base class; the user's settings override the task's settings."""
        if "generation_config" in generate_kwargs:
            return super()._prepare_generate_kwargs(generate_kwargs, **overrides)
        given = {**self._generate_kwargs, **generate_kwargs}
        settings = dict(self._task_settings)
        if "max_new_tokens" in given:  # the task's two lengths belong together
            settings.pop("max_length", None)
            settings.pop("min_length", None)
        return super()._prepare_generate_kwargs({**settings, **given}, **overrides)

    def _new_tokens(self, generate_kwargs: dict[str, Any]) -> int:
        """Positions of a causal model that its source must leave free."""
        params = self._get_set_generation_params(self._prepare_generate_kwargs(generate_kwargs))
        new_tokens = params.get("max_new_tokens")
        positions = source_limit(self.tokenizer, max_positions(self.model.config))
        if new_tokens is None:
            # `max_length` is for source and new tokens together.
            longest = params["max_length"]
            return max(1, 1 + (positions or longest) - longest)
        asked = {**self._generate_kwargs, **generate_kwargs}
        if positions is not None and not {"max_new_tokens", "generation_config"} & set(asked):
            return min(new_tokens, positions // 2)
        return new_tokens

    def _languages(self, source: str | None, target: str | None) -> tuple[Any, dict[str, int]]:
        return for_languages(self.tokenizer, source, target)

    def _made(
        self,
        prefix: str,
        separator: str,
        src_lang: str | None,
        tgt_lang: str | None,
        new_tokens: int,
    ) -> tuple[Prompts, dict[str, int]]:
        tokenizer, forced = self._languages(src_lang, tgt_lang)
        limit = source_limit(tokenizer, max_positions(self.model.config), new_tokens)
        return Prompts(tokenizer, self._encoder_decoder, limit, prefix, separator), forced


class SummarizationPipeline(WritingPipeline):
    """Writes summaries: `[{"summary_text": ...}]`. See `WritingPipeline`."""

    result = "summary"


class TranslationPipeline(WritingPipeline):
    """Writes translations: `[{"translation_text": ...}]`. See `WritingPipeline`.

    A task such as "translation_en_to_es" names the languages of models with language codes, and
    the entry of `config.task_specific_params`.
    """

    result = "translation"

    def _languages(self, source: str | None, target: str | None) -> tuple[Any, dict[str, int]]:
        named = _PARAMETRIZED.fullmatch(self.task or "")
        if named and has_languages(self.tokenizer):
            source, target = source or named[1], target or named[2]
        return super()._languages(source, target)


class _WithoutDefault(dict[str, Any]):
    """The registry's entry of a task that has no default model."""

    def __missing__(self, key: str) -> Any:
        if key == "default":  # `pipeline()` asks for it where no model is given
            raise InputError(
                "there is no default model for this task: give model=, an id or a folder"
            )
        raise KeyError(key)


def _register() -> None:
    """Register both tasks, and "translation_xx_to_yy" as names of the second."""
    models: Any = (AutoModelForSeq2SeqLM, AutoModelForCausalLM)
    pipelines: dict[str, Any] = {
        "summarization": SummarizationPipeline,
        "translation": TranslationPipeline,
    }
    for task, pipeline in pipelines.items():
        # `pipeline()` refuses these before it looks into the registry.
        REMOVED_TASKS.pop(task, None)
        PIPELINE_REGISTRY.register_pipeline(task, pipeline, pt_model=models)
        PIPELINE_REGISTRY.supported_tasks[task] = _WithoutDefault(
            PIPELINE_REGISTRY.supported_tasks[task]
        )
        # With it, `save_pretrained` would copy this file beside the model as remote code.
        del pipeline._registered_impl
    check_task = PIPELINE_REGISTRY.check_task

    def check(task: str) -> tuple[str, dict[str, Any], Any]:
        named = _PARAMETRIZED.fullmatch(task)
        if named is None:
            return check_task(task)
        return task, PIPELINE_REGISTRY.supported_tasks["translation"], named.groups()

    registry: Any = PIPELINE_REGISTRY
    registry.check_task = check


_register()
