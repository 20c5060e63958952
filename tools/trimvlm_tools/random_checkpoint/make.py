"""A checkpoint directory from a description: whole or not at all, and proven to load before it is there."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_tools.bench.quiet import quiet
from trimvlm_tools.random_checkpoint.description import Description, Dtype
from trimvlm_tools.random_checkpoint.tokenizer import make_tokenizer
from trimvlm_tools.random_checkpoint.weights import CODES, rename, tensors, write


class Made(Value, frozen=True, kw_only=True):
    """What was written; `bytes` of the weight files together, `seconds` for everything."""

    directory: str
    dtype: Dtype
    parameters: int
    tensors: int
    files: int
    bytes: int
    seconds: float


def make_checkpoint(
    description: Description,
    directory: Path,
    *,
    dtype: Dtype | None = None,
    names: Literal["saved", "published"] = "saved",
    shard_gb: float | None = None,
    seed: int = 0,
) -> Made:
    """Writes the checkpoint to `directory`, which must not be there.

    Weights are streamed: memory does not grow with the model. Nothing is forced to the disk (no fsync):
    what a power failure destroys is made again.

    Args:
        dtype: None: as published.
        names: tensor names as transformers 5 saves them, or as in the published files.
        shard_gb: None: as published.

    Raises:
        UserError: the directory is there, the disk is too small, or the description does not fit together.
    """
    started = time.perf_counter()
    if directory.exists():
        raise UserError(f"{directory}: is there already; give another directory, or remove it")
    dtype = dtype or description.dtype
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        work.chmod(0o755)
        with quiet():
            config = _write_small_files(description, work, dtype)
            found = tensors(config)
        if names == "published":
            found = rename(found, description.published_names)
        size = CODES[dtype][1] * sum(tensor.elements for tensor in found)
        free = shutil.disk_usage(work).free
        if size > free:
            raise UserError(
                f"{directory}: {size / 1e9:.1f} GB of weights, but the disk has {free / 1e9:.1f} GB free; "
                "give a directory on another one"
            )
        files = write(work, found, dtype, seed, 1e9 * (shard_gb or description.shard_gb))
        work.rename(directory)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Made(
        directory=str(directory),
        dtype=dtype,
        parameters=sum(tensor.elements for tensor in found),
        tensors=len(found),
        files=len(files),
        bytes=sum((directory / file.name).stat().st_size for file in files),
        seconds=time.perf_counter() - started,
    )


def _write_small_files(description: Description, directory: Path, dtype: Dtype) -> Any:
    """Everything but the weights; gives transformers' configuration, read from what was written."""
    from transformers import AutoConfig

    for name, content in (
        ("config.json", {**description.config, "torch_dtype": dtype}),
        ("preprocessor_config.json", description.preprocessor),
        ("processor_config.json", description.processor),
        ("generation_config.json", description.generation),
    ):
        if content:
            (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(description.chat_template)
    make_tokenizer(description.tokenizer).save_pretrained(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{description.name}: config: {' '.join(str(error).split())[:200]}") from None
    _check_image_token(description, directory, config)
    return config


def _check_image_token(description: Description, directory: Path, config: Any) -> None:
    """Special tokens have their ids, and one of them is the image token, which has an embedding."""
    from transformers import AutoTokenizer

    if not hasattr(config, "image_token_id"):
        raise UserError(
            f"{description.name}: config.model_type: {config.model_type!r} is not a model of images and text"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    special, rows = description.tokenizer.special, config.get_text_config().vocab_size
    for token, number in special.items():
        if tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise UserError(
                f"{description.name}: tokenizer.special: {token!r} cannot be id {number}; give it another"
            )
    if config.image_token_id not in special.values() or config.image_token_id >= rows:
        raise UserError(
            f"{description.name}: the image token's id {config.image_token_id} must be that of a special "
            f"token and below vocab_size {rows}; correct config or tokenizer"
        )
