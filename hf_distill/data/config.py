"""The recipe's `data:` section: sources, cleaning, tokenization and packing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Names become a part of logged names, as eval_NAME_loss, and of folders.
_SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Sets = Annotated[dict[_SetName, str | list[str]], Field(min_length=1)]

# The format of rows. Prompts and completions that are lists of messages are chat_completion; the
# loss covers only the completion's messages.
Format = Literal["text", "prompt_completion", "chat_completion", "chat"]


class CleanConfig(BaseModel):
    """Which text is repaired and which rows are removed. `None` or `false` skips a step."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    repair_unicode: bool = True
    """Undo mis-decoded UTF-8 (`Ã©` for `é`). Quotes, HTML entities, ligatures, widths and
    composition of accents stay as they are, so that source code is not damaged."""
    strip_control_characters: bool = True
    """Remove control characters other than newline and tab, and byte-order marks."""
    min_characters: int = Field(default=1, ge=1)
    """Remove shorter rows. Blank rows (without a visible character) are always removed."""
    max_characters: int | None = Field(default=None, ge=1)
    """Remove longer rows."""
    max_repeated_lines: float | None = Field(default=0.7, gt=0, le=1)
    """Remove rows in which a larger share of the lines repeats an earlier line. Source code reaches
    0.46 (Python's standard library); Gopher's limit for web text is 0.3."""
    max_top_ngram: float | None = Field(default=0.4, gt=0, le=1)
    """Remove rows of at least 50 words in which the most frequent sequence of 4 words covers a
    larger share of the words. The highest value in Python's standard library is 0.23; Gopher's
    limit for web text is 0.16."""
    exact_duplicates: bool = True
    """Keep only the first of equal rows."""
    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Remove a training row whose estimated Jaccard similarity (sequences of 5 words) to an earlier
    row is at least this. Prompt-completion and chat rows must also have the same targets."""
    eval_overlap: float | None = Field(default=0.5, gt=0, le=1)
    """Remove a training row that has at least this share of 13-word sequences, of either row, in
    common with one evaluation row; also rows equal or similar to an evaluation row."""


class DataConfig(BaseModel):
    """The sources of the rows, and how they are cleaned, tokenized and packed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: str | list[str] | Sets
    """Files, globs (`**` too), folders, or one Hub data set id. `{stdlib}` stands for the
    folder of Python's standard library. Causal language modelling also takes several sets by name,
    whose rows may differ in format."""
    eval: str | list[str] | Sets | None = None
    """The same for evaluation rows, or several sets by name, as `{novels: FILE, news: FILE}`;
    the first is the main one. Without it (and without `eval_split`) rows are held out."""
    unlabelled: str | list[str] | None = None
    """Classification: rows without labels, given like `train`. The student learns them from the
    teacher alone."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the rows that is held out. The choice depends on content and seed only; equal rows
    stay together."""
    exclude: list[str] = []
    """Globs of files to leave out; `*` also crosses folder borders here."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set to train on."""
    eval_split: str | None = None
    """Split of a Hub data set to evaluate on."""
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
    """Format of the rows. `auto` is the format of the recipe's task; for causal language
    modelling, the first one in docs/data.md whose columns are all present."""
    columns: dict[str, str] | None = None
    """Other tasks: your names of columns that have other names than the known ones, such as
    `{text: body}`."""
    text_column: str = "text"
    """Causal language modelling: the column of texts."""
    prompt_column: str = "prompt"
    """Causal language modelling: the column of prompts."""
    completion_column: str = "completion"
    """Causal language modelling: the column of completions."""
    messages_column: str = "messages"
    """Causal language modelling: the column of messages."""
    rows: Literal["line", "paragraph", "document"] = "line"
    """Plain text files: a row per line, per block between blank lines, or per file."""
    prompts_as_chat: bool = False
    """Turn textual prompts and completions into a user's and an assistant's message, which the
    tokenizer's chat template renders."""
    separator: str = "\n"
    """Text put between prompt and completion unless one of them has white space there."""
    max_train_rows: int | None = Field(default=None, ge=1)
    """Keep a sample of this many rows after cleaning, chosen by content and seed, in their order;
    with several sets, of each set. Rows without a target within `max_length` are left out later."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """The same for each set of evaluation rows."""

    clean: CleanConfig = CleanConfig()
    """Which text is repaired and which rows are removed; `null` or `false` skips a step."""
    max_length: int = Field(default=512, ge=2)
    """Most tokens of a row, or of a source if rows have source and target."""
    max_target_length: int = Field(default=128, ge=2)
    """Most tokens of a target."""
    prefix: str = ""
    """Text put before each source, such as `"summarize: "`."""
    source_lang: str | None = None
    """Language code of the sources, for models with such codes (mBART, M2M100, NLLB)."""
    target_lang: str | None = None
    """The same for the targets."""
    stride: int = Field(default=128, ge=0)
    """Question answering: tokens that consecutive windows of a long context share."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Masked language modelling: the share of tokens that is masked."""
    packing: bool = True
    """Fill rows of `max_length` tokens with several documents instead of padding each."""
    packing_attention: Literal["auto", "across", "within"] = "auto"
    """Whether attention crosses document borders in a packed row. `auto` is `across` for text,
    `within` for prompt-completion and chat."""
    num_proc: int | None = Field(default=None, ge=1)
    """Number of processes that prepare the data. The result does not depend on it."""

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
