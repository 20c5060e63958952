"""Peers: other programs that run the same model on the same prompt. One file per peer.

A peer's file is `NAME` with `_` for `-` and `.`. It is imported by trimvlm and by the peer's own interpreter,
which has numpy and the peer's requirements, not trimvlm's: its top level imports the standard library and
this package alone, everything else is imported inside the functions. What a file declares is `Peer`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from trimvlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OWN = ("environment", "worker")  # files here that are no peers


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One run of a decoder.

    Attributes:
        prefill: seconds from the ids to the first token, chosen greedily.
        decode: seconds of the further tokens.
        tokens: all of them, the first included.
        logits: float32 [V] of the prompt's last row; None where the peer does not give them away.
    """

    prefill: float
    decode: float
    tokens: list[int]
    logits: NDArray[np.float32] | None


class DecoderRunner(Protocol):
    """A loaded decoder. Every run starts from an empty KV cache and reuses nothing of the run before."""

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """Reads ids [S] and decodes greedily; an end token does not end it."""
        ...


class AnswerRunner(Protocol):
    """A loaded model with its image side."""

    def run(self, image: bytes, question: str) -> float:
        """Seconds from an image file's bytes and a question to the first token, everything included."""
        ...


class Peer(Protocol):
    """What a peer's file declares.

    Attributes:
        NAME: as `--against` has it.
        REQUIREMENTS: pinned pip requirements of its environment; none: it runs in trimvlm's own.
        SETTINGS: what it is measured with, for the report: the best that its documentation names.
        PRECISIONS: of the weights, such as `fp32`, `int4`.
        ANSWERS: whether it answers questions about images; then the file has `open_answer`.
        PRUNES: whether answers can be given from fewer visual tokens (`keep`).

    A file may also have `BUILD_REQUIREMENTS`, installed before the others, `BUILD_ENVIRONMENT`,
    variables that are set while the others are installed (`{packages}` in them: the directory that packages
    are installed to), and `ENVIRONMENT` and `MODELS`, the names of the peers whose environment and whose
    converted models it shares.
    """

    NAME: str
    REQUIREMENTS: tuple[str, ...]
    SETTINGS: dict[str, Any]
    PRECISIONS: tuple[str, ...]
    ANSWERS: bool
    PRUNES: bool

    def convert(self, checkpoint: Path, directory: Path, precision: str) -> None:
        """Writes what the peer loads to an empty directory, from a Hugging Face checkpoint."""
        ...

    def open_decoder(self, directory: Path, threads: int, precision: str) -> DecoderRunner:
        """Loads the decoder of a converted directory."""
        ...

    def open_answer(self, directory: Path, threads: int, precision: str, keep: int | None) -> AnswerRunner:
        """Loads the whole model; `keep`: visual tokens after its own pruning, None: all."""
        ...


def peer_names() -> tuple[str, ...]:
    """Names of all peers, sorted."""
    return tuple(sorted(_load(file).NAME for file in _files()))


def find_peer(name: str) -> Peer:
    """The peer of that name.

    Raises:
        UserError: there is none.
    """
    file = file_name(name)
    if file not in _files() or name != _load(file).NAME:
        raise UserError(f"--against: {name!r} is not known; choose from {', '.join(peer_names())}")
    return _load(file)


def file_name(name: str) -> str:
    """A peer's module here, without `.py`."""
    return name.replace("-", "_").replace(".", "_")


def _files() -> set[str]:
    found = {file.name for file in pkgutil.iter_modules(__path__)}
    return {file for file in found.difference(_OWN) if not file.startswith("_")}


def _load(file: str) -> Peer:
    return cast("Peer", importlib.import_module(f"{__name__}.{file}"))
