"""A peer's own virtual environment and its converted models, made once, and the command that runs it.

    DIRECTORY/NAME/venv                              pip's, with the peer's pinned requirements
    DIRECTORY/NAME/models/CHECKPOINT-HASH/PRECISION  what the peer converted

Each holds `made.json`, written last: without it, or with another one, the directory counts as not made. pip's
and the converter's output lies beside it as a `.log`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trimvlm
import trimvlm_tools
from trimvlm.value import Value
from trimvlm_tools.bench import peers
from trimvlm_tools.bench.harness import SILENT, Contender
from trimvlm_tools.bench.peers import Peer, file_name, find_peer

STAMP = "made.json"
_WORKER = "trimvlm_tools.bench.peers.worker"
_ASIDES = ("note:", "hint:", "[notice]", "╰─>")  # what pip may say after its error


class PeerError(RuntimeError):
    """A peer could not be installed, could not convert or cannot do what is asked: its own last words."""


class Decoding(Value, frozen=True, kw_only=True):
    """The decoder's workload: `ids`, an .npy file of int64 [S], then `new_tokens` greedy tokens."""

    ids: Path
    new_tokens: int


class Answering(Value, frozen=True, kw_only=True):
    """The whole model's workload: first token about an image file, from `keep` visual tokens or all."""

    image: Path
    question: str
    keep: int | None = None


def peer_contender(
    name: str,
    workload: Decoding | Answering,
    checkpoint: Path,
    directory: Path,
    *,
    precision: str,
    threads: int,
    label: str | None = None,
) -> Contender:
    """A peer ready to race: installs it and converts the checkpoint where that was not done.

    Args:
        directory: of all peers, such as build/bench/peers.
        label: the contender's name (default: the peer's); its specification is written under it.

    Raises:
        PeerError: it cannot be had; the others can go on.
        UserError: no peer has that name.
    """
    peer, label = find_peer(name), label or name
    _check(peer, precision)
    _check_workload(peer, workload)
    python = install(peer, directory)
    model = convert(peer, checkpoint, directory, precision)
    answers = isinstance(workload, Answering)
    spec = {"workload": "answer" if answers else "decoder", "model": str(model), "threads": threads}
    if isinstance(workload, Answering):
        spec |= {"image": str(workload.image.resolve()), "question": workload.question, "keep": workload.keep}
    else:
        spec |= {"ids": str(workload.ids.resolve()), "new_tokens": workload.new_tokens}
    path = directory.resolve() / name / re.sub(r"[^\w.+-]", "-", f"{label}.json")
    return Contender(name=label, command=_command(peer, python, path, spec | {"precision": precision}))


def prepare_peer(name: str, checkpoint: Path, directory: Path, precision: str) -> Path:
    """The directory of the converted checkpoint: what a peer needs before it can race.

    Raises:
        PeerError: it has no such precision, cannot be installed or cannot convert.
        UserError: no peer has that name.
    """
    peer = find_peer(name)
    _check(peer, precision)
    return convert(peer, checkpoint, directory, precision)


def install(peer: Peer, directory: Path) -> Path:
    """The interpreter that has the peer: of its own environment, made if need be, or trimvlm's.

    Raises:
        PeerError: it cannot be made.
    """
    if not peer.REQUIREMENTS:
        return Path(sys.executable)
    venv = directory.resolve() / getattr(peer, "ENVIRONMENT", peer.NAME) / "venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    build = getattr(peer, "BUILD_ENVIRONMENT", {})
    first = getattr(peer, "BUILD_REQUIREMENTS", ())
    made = {"requirements": list(peer.REQUIREMENTS), "build": build, "python": platform.python_version()}
    with _lock(venv):
        if not _is_made(venv, made):
            _empty(venv)
            log = venv.with_suffix(".log")
            _run((sys.executable, "-m", "venv", str(venv)), log, f"{peer.NAME}: virtual environment")
            pip = (str(python), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
            # A wheel that pip kept may have been built with other variables.
            fresh = ("--no-cache-dir",) if build else ()
            variables = {name: value.format(packages=_packages(venv)) for name, value in build.items()}
            for requirements in filter(None, (first, peer.REQUIREMENTS)):
                _run((*pip, *fresh, *requirements), log, f"{peer.NAME}: pip install", variables)
            _finish(venv, made)
        _show_sources(venv)
    return python


def convert(peer: Peer, checkpoint: Path, directory: Path, precision: str) -> Path:
    """The directory of the converted checkpoint, made if need be.

    It is made again for another state of the checkpoint's files, other requirements or a changed peer's file.

    Raises:
        PeerError: the peer cannot be installed or cannot convert.
    """
    peer = find_peer(getattr(peer, "MODELS", peer.NAME))
    python = install(peer, directory)
    checkpoint = checkpoint.resolve()
    key = hashlib.sha256(str(checkpoint).encode()).hexdigest()[:8]
    model = directory.resolve() / peer.NAME / "models" / f"{checkpoint.name}-{key}" / precision
    files = ((path, path.stat()) for path in sorted(checkpoint.iterdir()))
    made = {
        "checkpoint": [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in files],
        "requirements": list(peer.REQUIREMENTS),
        "recipe": _recipe(peer),
    }
    with _lock(model):
        if not _is_made(model, made):
            _empty(model)
            model.mkdir(parents=True)
            spec = {"workload": "convert", "checkpoint": str(checkpoint), "directory": str(model)}
            spec_file = model.with_suffix(".json")
            command = _command(peer, python, spec_file, spec | {"precision": precision})
            _run(command, model.with_suffix(".log"), f"{peer.NAME}: conversion to {precision}")
            _finish(model, made)
    return model


def _check(peer: Peer, precision: str) -> None:
    if precision not in peer.PRECISIONS:
        raise PeerError(f"{peer.NAME}: {precision!r} is not offered; it has {', '.join(peer.PRECISIONS)}")


def _check_workload(peer: Peer, workload: Decoding | Answering) -> None:
    if isinstance(workload, Answering) and not peer.ANSWERS:
        raise PeerError(f"{peer.NAME}: runs decoders only; it answers no question about an image here")
    if isinstance(workload, Answering) and workload.keep is not None and not peer.PRUNES:
        raise PeerError(f"{peer.NAME}: keep {workload.keep}: it has no pruning of visual tokens")


def _command(peer: Peer, python: Path, path: Path, spec: dict[str, Any]) -> tuple[str, ...]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"peer": peer.NAME, **spec}, indent=2), "utf-8")
    # Isolated: neither the user's PYTHONPATH nor the current directory is the peer's.
    isolated = ("-I",) if peer.REQUIREMENTS else ()
    return (str(python), *isolated, "-m", _WORKER, str(path))


def _show_sources(venv: Path) -> None:
    """Lets the environment import trimvlm's sources, after everything of its own."""
    roots = {Path(str(package.__file__)).resolve().parents[1] for package in (trimvlm, trimvlm_tools)}
    lines = "".join(f"{root}\n" for root in sorted(roots))
    (_packages(venv) / "trimvlm-sources.pth").write_text(lines, "utf-8")


def _packages(venv: Path) -> Path:
    """Where an environment's packages lie."""
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    return Path(sysconfig.get_path("purelib", scheme, {"base": str(venv)}))


def _recipe(peer: Peer) -> str:
    """Hash of the peer's file and of the files beside it that it imports, and so on."""
    sources = {path.stem: path.read_text("utf-8") for path in Path(peers.__path__[0]).glob("*.py")}
    found, text = {file_name(peer.NAME)}, ""
    for _ in sources:
        text = "".join(sources[name] for name in sorted(found))
        found |= {name for name in sources if re.search(rf"peers(\.| import ){name}\b", text)}
    return hashlib.sha256(text.encode()).hexdigest()


def _run(command: Sequence[str], log: Path, what: str, variables: dict[str, str] | None = None) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **SILENT, **(variables or {})}
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=environment, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if done.returncode:
        raise PeerError(f"{what}: exit code {done.returncode}: {_last_words(log)} (all of it: {log})")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    said = [line for line in lines if line and not line.startswith(_ASIDES)]
    return said[-1] if said else "no message"


def _lock(made: Path):
    from filelock import FileLock

    made.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(made.with_suffix(".lock"))


def _is_made(directory: Path, made: dict[str, Any]) -> bool:
    stamp = directory / STAMP
    return stamp.is_file() and json.loads(stamp.read_text("utf-8")) == made


def _finish(directory: Path, made: dict[str, Any]) -> None:
    (directory / STAMP).write_text(json.dumps(made), "utf-8")


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
