"""Publish a student on the Hub: weights, tokenizer, configs and card, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    errors,
    get_token,
)
from huggingface_hub.utils import filter_repo_objects

from hf_distill.errors import InputError
from hf_distill.reporting.model_card import with_model_id

CARD = "README.md"
# Allowed by name, so that what is unknown (and everything pickled: training_args.bin, optimizer
# states, *.pt, *.pth, *.pkl) stays here. Only the folder itself is read, never its checkpoints.
PUBLISHED = [CARD, "LICENSE*", "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
WITHHELD = ["trainer_state.json", "log_history.json", "*_results.json", "optimizer*", "scheduler*"]
# What would be loaded beside, or instead of, the student if an earlier one had left it there.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a saved student to the Hub in one commit and return its address.

    The same commit deletes weights of an earlier student that would be loaded beside the new ones:
    shards of another number, or an adapter that has been merged since.

    folder: a model saved as safetensors with its tokenizer and card (``README.md``); the card's
        snippet is made to load ``repo_id``
    private: create the repository as a private one; a public one of that name is refused
    token: by default that of ``HF_TOKEN`` or ``hf auth login``; never printed
    endpoint: by default ``HF_ENDPOINT`` or the public Hub
    raises: InputError for an incomplete folder, a refused token or a Hub that cannot be reached
    """
    folder = Path(folder)
    _check_complete(folder)
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line_errors(f"{folder.name!r} cannot be published as {repo_id!r}", token):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise InputError(
                f"{url.repo_id!r} exists on the Hub and is public, but the student was to be "
                "private: choose another name, or make that repository private first"
            )
        files = _files(folder)
        changes: list[CommitOperation] = [
            CommitOperationAdd(path.name, str(path)) for path in files
        ]
        changes.append(CommitOperationAdd(CARD, _card_for(folder, url.repo_id).encode()))
        present = api.list_repo_files(url.repo_id)
        stale = set(filter_repo_objects(present, allow_patterns=REPLACED))
        stale = {name for name in stale if "/" not in name} - {path.name for path in files}
        changes += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(url.repo_id, changes, commit_message="Publish the student")
    return str(url)


def published_files(folder: str | Path) -> list[str]:
    """The names of the files in a saved student's folder that ``publish`` would push."""
    return [*(path.name for path in _files(Path(folder))), CARD]


def _files(folder: Path) -> list[Path]:
    """The files that are pushed unchanged. The card is pushed too, rewritten."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    names = list(
        filter_repo_objects(
            names, allow_patterns=PUBLISHED, ignore_patterns=[*WITHHELD, CARD, ".*"]
        )
    )
    return [folder / name for name in names]


def _card_for(folder: Path, repo_id: str) -> str:
    return with_model_id((folder / CARD).read_text(encoding="utf-8"), repo_id)


def _check_complete(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: give the folder of a saved student")
    adapter = (folder / "adapter_config.json").is_file()
    stem, config = ("adapter_model", "adapter_config") if adapter else ("model", "config")
    missing = [name for name in (f"{config}.json", CARD) if not (folder / name).is_file()]
    missing += _missing_weights(folder, stem)
    if missing:
        raise InputError(
            f"{str(folder)!r} has no {' and no '.join(missing)}, so it could not be used: "
            "save the student with save_pretrained and write its card with "
            "hf_distill.reporting.model_card.write_card"
        )
    if adapter:
        base = json.loads((folder / "adapter_config.json").read_text()).get(
            "base_model_name_or_path"
        )
        if base and Path(base).exists():
            raise InputError(
                f"{str(folder)!r} holds an adapter for a model in a local folder "
                f"({Path(base).name!r}), which others do not have: merge it (merge_and_unload) and "
                "save the whole student, or publish the base and name its id in adapter_config.json"
            )


def _missing_weights(folder: Path, stem: str) -> list[str]:
    """The safetensors files that the folder should have and has not."""
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    return sorted(name for name in names if not (folder / name).is_file())


@contextmanager
def _one_line_errors(what: str, token: str | None) -> Iterator[None]:
    """Turn any error of the client into one InputError without the token in it."""
    try:
        yield
    except InputError:
        raise
    # `HTTPError` is the base of the client's own and of its transport's errors, OSError covers an
    # offline mode, ValueError a malformed id, RuntimeError a failed upload of a large file.
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        secret = token or get_token()
        message = f"{what}: {_reason(error)}"
        for shown in (secret, repr(secret)[1:-1]) if secret else ():  # as it is, and escaped
            if shown in f"{message} {error}":
                raise InputError(message.replace(shown, "<token>")) from None
        raise InputError(message) from error


def _reason(error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there: use a token with write access and a name of yours"
    if status is None and isinstance(error, errors.HTTPError | ConnectionError):
        return (
            f"the Hub cannot be reached ({_first_line(error)}): "
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".:")
