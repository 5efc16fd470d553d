"""The trained adapter on the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, OutputError
from weightlora.folders import RECORD_FILE

if TYPE_CHECKING:
    from transformers import TrainingArguments


def require_hub(token: str | None) -> None:
    """Raise where nothing could be pushed; better before the training than after it.

    Raises:
        OptionError: The hub does not answer, or knows no such token.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=_token(token)).whoami()
    except Exception as error:  # the hub's own kin, and what its transport raises
        raise OptionError(
            f"push_to_hub: the hub knows no such user: {_first_line(error)}; log in with `hf auth login`, give "
            "hub_token, or leave push_to_hub out"
        ) from error


def push_adapter(folder: Path, repository: Any, arguments: TrainingArguments) -> None:
    """Upload an adapter directory over what the checkpoints pushed.

    Raises:
        OutputError: The hub did not take it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=_token(arguments.hub_token)).upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[RECORD_FILE],
            commit_message="End of training",
            revision=arguments.hub_revision,
        )
    except Exception as error:  # as above
        raise OutputError(
            f"cannot push {folder} to {repository}: {_first_line(error)}; the same command tries again"
        ) from error


def _token(token: Any) -> str | None:
    return None if token is None else str(token)  # transformers gives its type a bool too


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
