"""The recipe's ``data:`` section: sources, cleaning, tokenization and packing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Names become a part of logged names, as eval_NAME_loss, and of folders.
_SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Sets = Annotated[dict[_SetName, str | list[str]], Field(min_length=1)]

# What rows are. Prompts and completions that are lists of messages are chat_completion: of these
# rows only the completion's messages are learnt.
Format = Literal["text", "prompt_completion", "chat_completion", "chat"]


class CleanConfig(BaseModel):
    """What is repaired in rows, and which rows are removed. ``None`` or ``false`` skips a step."""

    model_config = ConfigDict(extra="forbid")

    repair_unicode: bool = True
    """Undo mis-decoded UTF-8 (``Ã©`` for ``é``). Quotes, HTML entities, ligatures, widths and
    composition of accents stay as they are, so that source code is not damaged."""
    strip_control_characters: bool = True
    """Remove control characters other than newline and tab, and byte-order marks."""
    min_characters: int = Field(default=1, ge=1)
    """Shorter rows go. Blank rows (no visible character) always go."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longer rows go."""
    max_repeated_lines: float | None = Field(default=0.7, gt=0, le=1)
    """Largest share of a row's lines that may repeat an earlier line of it. Ordinary source code
    reaches 0.46 (Python's standard library); Gopher's limit for web text is 0.3."""
    max_top_ngram: float | None = Field(default=0.4, gt=0, le=1)
    """Largest share of a row's words that its most frequent sequence of 4 words may cover, in rows
    of at least 50 words. The loosest file of Python's standard library has 0.23; Gopher's limit
    for web text is 0.16."""
    exact_duplicates: bool = True
    """Keep only the first of equal rows."""
    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Estimated Jaccard similarity (sequences of 5 words) from which a later training row goes.
    Prompt-completion and chat rows must agree in what is to be learnt as well."""
    eval_overlap: float | None = Field(default=0.5, gt=0, le=1)
    """Share of 13-word sequences in common with one evaluation row, of either row, from which a
    training row goes; rows equal or near-equal to an evaluation row go too."""


class DataConfig(BaseModel):
    """Where rows come from and what is made of them."""

    model_config = ConfigDict(extra="forbid")

    train: str | list[str] | Sets
    """Files, globs (``**`` too), folders, or one Hub data set id. ``{stdlib}`` stands for the
    folder of the Python standard library. Causal language modelling also takes several sets by
    name, whose rows may have other formats."""
    eval: str | list[str] | Sets | None = None
    """The same for evaluation rows, or several sets by name, as ``{novels: FILE, news: FILE}``, of
    which the first is the main one; without it (and without ``eval_split``) rows are held out."""
    unlabelled: str | list[str] | None = None
    """Classification: rows without labels, in the places that ``train`` may have, which the student
    learns from the teacher alone."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the rows that is held out: the choice depends on content and seed only, and equal
    rows stay together."""
    exclude: list[str] = []
    """Globs of files to leave out; ``*`` also crosses folder borders here."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set that is trained on."""
    eval_split: str | None = None
    """Split of a Hub data set that is evaluated on."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""

    format: Literal[
        "auto",
        "text",
        "prompt_completion",
        "chat",
        "source_target",
        "questions",
        "labelled",
        "tagged",
    ] = "auto"
    """What the columns hold; ``auto`` takes the format of the recipe's task, for causal language
    modelling the first form of docs/data.md whose columns are there."""
    columns: dict[str, str] | None = None
    """Other tasks: the names of columns that are not the known ones, as ``{text: body}``."""
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    rows: Literal["line", "paragraph", "document"] = "line"
    """Plain text files: a row per line, per block between blank lines, or per file."""
    prompts_as_chat: bool = False
    """Make prompts and completions of text the turns of user and assistant, which the tokenizer's
    chat template renders."""
    separator: str = "\n"
    """Put between prompt and completion where neither brings its own white space."""
    max_train_rows: int | None = Field(default=None, ge=1)
    """Keep a sample of this many rows after cleaning (by content and seed, in their order); of each
    set, where there are several."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """The same for each set of evaluation rows."""

    clean: CleanConfig = CleanConfig()
    max_length: int = Field(default=512, ge=2)
    """Tokens of a row, at most; of a source, where rows have source and target."""
    max_target_length: int = Field(default=128, ge=2)
    """Tokens of a target, at most."""
    prefix: str = ""
    """Put before each source, as ``"summarize: "``."""
    source_lang: str | None = None
    """Language code of the sources, for models with such codes (mBART, M2M100, NLLB)."""
    target_lang: str | None = None
    """The same for the targets."""
    stride: int = Field(default=128, ge=0)
    """Question answering: tokens that the next window of a long context repeats."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Masked language modelling: the share of tokens that is masked."""
    packing: bool = True
    """Fill rows of ``max_length`` tokens with several documents instead of padding each."""
    packing_attention: Literal["auto", "across", "within"] = "auto"
    """Whether attention crosses document borders in a packed row; ``auto`` is across for text,
    within for prompt-completion and chat."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that prepare the data. The result does not depend on it."""

    @property
    def train_places(self) -> dict[str, list[str]]:
        """The places of `train` by split: "train", or "train/NAME" for each set with a name."""
        return _by_split("train", self.train)

    @property
    def eval_places(self) -> dict[str, list[str]]:
        """The places of `eval` by split: "eval", or "eval/NAME" for each set with a name."""
        return _by_split("eval", self.eval)

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """The splits of evaluation rows: "eval", or "eval/NAME" for each set that has a name."""
        return tuple(self.eval_places) or ("eval",)


def _by_split(
    split: str, given: str | list[str] | dict[str, str | list[str]] | None
) -> dict[str, list[str]]:
    sets = given if isinstance(given, dict) else {"": given}
    listed = {n: [p] if isinstance(p, str) else p for n, p in sets.items() if p is not None}
    return {f"{split}/{name}" if name else split: places for name, places in listed.items()}
