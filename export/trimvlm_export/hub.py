"""Checkpoints by their Hugging Face Hub id: where the local cache has them. Nothing is ever downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from trimvlm.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = {".yaml", ".yml", ".json"}  # endings of what is a path, even if it is not there


def is_hub_id(text: str) -> bool:
    """Whether `text` can name a model of the Hub (`owner/name`) and is no path that exists."""
    return bool(_ID.fullmatch(text)) and Path(text).suffix not in _FILES and not Path(text).exists()


def resolve_checkpoint(text: str) -> Path:
    """The directory of a checkpoint: `text` itself, or for a Hub id its snapshot in the local cache.

    Args:
        text: a directory, or an id such as `llava-hf/llava-1.5-7b-hf`. A directory of that name goes first.

    Raises:
        UserError: a Hub id that is not in the cache.
    """
    if not is_hub_id(text):
        return Path(text)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{text}: no such directory, and no such model in the local Hugging Face cache "
            f"({constants.HF_HUB_CACHE}); trimvlm downloads nothing, fetch it with: hf download {text}"
        ) from None
