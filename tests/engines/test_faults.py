"""Faults injected into a bundle with engines: each is found before anything of the bundle is loaded.

TRIMVLM_FAULTS sets the number of cases (2,200 by default).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_library import FakeLibrary, card, pretend, two_profiles

from trimvlm import Session, files
from trimvlm.bundle import Bundle, Engine, Entry, Manifest, write_manifest
from trimvlm.errors import UserError
from trimvlm_engines import build as build_module

Said = tuple[str, ...]  # one of them must be in the message; none: nothing may open
REBUILD = "build it again with trimvlm build"
CASES = int(os.environ.get("TRIMVLM_FAULTS", "2200"))


class LoadedError(Exception):
    """Graphs or plans were given to a backend."""

    def __init__(self, library: str, paths: Mapping[str, Path], **_: Any) -> None:
        self.names = {path.name for path in paths.values()}
        if library == "onnxruntime":
            self.names.add("model.safetensors")


@dataclass
class Patient:
    """A whole bundle that faults are injected into, one after the other.

    Attributes:
        whole: what it holds, by name.
        tokenizers: what was loaded.
    """

    directory: Path
    whole: dict[str, bytes]
    manifest: Manifest
    tokenizers: list[Path]

    def any(self, dice: random.Random) -> str:
        return dice.choice(sorted(self.whole))

    def write(self, name: str, data: bytes) -> None:
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_bytes(data)

    def heal(self) -> None:
        for path in sorted(self.directory.rglob("*"), reverse=True):
            name = path.relative_to(self.directory).as_posix()
            if path.is_symlink() or (path.is_file() and name not in self.whole):
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        for name, data in self.whole.items():
            path = self.directory / name
            if not path.is_file() or path.read_bytes() != data:
                self.write(name, data)


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Patient:
    """Opening it gets as far as `LoadedError`; `tokenizers` tells of the step before."""

    def loaded(library: str, paths: Mapping[str, Path], options: Any) -> None:
        raise LoadedError(library, paths)

    monkeypatch.setattr("trimvlm.bundle.PATIENCE", 0.0)
    pretend(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module, "open_library", FakeLibrary)
    bundle = two_profiles(tmp_path / "bundle")
    for profile in ("toy", "other"):
        build_module.build(bundle, card(), profile)
    monkeypatch.setattr(files, "SMALL", 5000)  # plans and weights are large
    tokenizers: list[Path] = []
    monkeypatch.setattr("trimvlm.session.load_tokenizer", tokenizers.append)
    monkeypatch.setattr("trimvlm.opening.load_backend", loaded)
    whole = {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    return Patient(bundle, whole, Bundle(bundle).manifest, tokenizers)


def flipped_bit(patient: Patient, dice: random.Random) -> Said:
    name = patient.any(dice)
    data = bytearray(patient.whole[name])
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    patient.write(name, bytes(data))
    return (name,)


def truncated(patient: Patient, dice: random.Random) -> Said:
    name = patient.any(dice)
    patient.write(name, patient.whole[name][: dice.randrange(len(patient.whole[name]))])
    return (name,)


def zeroed_block(patient: Patient, dice: random.Random) -> Said:
    """What a power cut leaves: the right length, a block that never reached the disk."""
    name = patient.any(dice)
    data = bytearray(patient.whole[name])
    start = dice.randrange(len(data))
    end = min(len(data), start + 512)
    if not any(data[start:end]):
        return flipped_bit(patient, dice)
    data[start:end] = bytes(end - start)
    patient.write(name, bytes(data))
    return (name,)


def missing(patient: Patient, dice: random.Random) -> Said:
    name = patient.any(dice)
    (patient.directory / name).unlink()
    return (name,)


def extra(patient: Patient, dice: random.Random) -> Said:
    folder = dice.choice(["", "checkpoint/", "new/"])
    name = f"{folder}{dice.randrange(10**6)}{dice.choice(['.engine', '.onnx', '.json', '.safetensors', ''])}"
    patient.write(name, dice.randbytes(dice.randrange(100)))
    return (name,)


def exchanged(patient: Patient, dice: random.Random) -> Said:
    """Two files under each other's name: plans of two profiles, or any."""
    plans = [name for name in patient.whole if name.endswith(".decoder.engine")]
    names = plans if dice.random() < 0.5 else dice.sample(sorted(patient.whole), 2)
    for name, other in zip(names, reversed(names), strict=True):
        patient.write(name, patient.whole[other])
    return tuple(names)


def changed_engine(patient: Patient, **changes: Any) -> None:
    entries = {}
    for name, entry in patient.manifest.profiles.items():
        engine = msgspec.structs.replace(entry.engines["rtx-4090"], **changes)
        entries[name] = msgspec.structs.replace(entry, engines={"rtx-4090": engine})
    write_manifest(patient.directory, msgspec.structs.replace(patient.manifest, profiles=entries))


def wrong_binding(patient: Patient, dice: random.Random) -> Said:
    """A manifest that is whole and says that the engine is for something else."""
    field = dice.choice(["version", "compute_capability", "system", "profile_digest"])
    value = {
        "version": f"1.{dice.randrange(20)}.0.{dice.randrange(100)}",
        "compute_capability": dice.choice(["7.5", "8.6", "12.0", None]),
        "system": dice.choice(["win32-x86_64", "linux-aarch64-l4t36.4.3", None]),
        "profile_digest": f"{dice.randrange(16**64):064x}",
    }[field]
    changed_engine(patient, **{field: value})
    return (REBUILD,)


def wrong_sources(patient: Patient, dice: random.Random) -> Said:
    """An engine that was built from another graph, other weights, or is another plan."""
    options = msgspec.json.decode(
        msgspec.json.encode(patient.manifest.profiles["toy"].engines["rtx-4090"].options)
    )
    role, field = (
        dice.choice(["vision", "decoder"]),
        dice.choice(["plan", "graph", "weights", "ranges", "all"]),
    )
    if field == "all":
        options[role] = {}
    elif field == "weights":
        options[role]["weights"]["checkpoint/model.safetensors"] = "0" * 64
    elif field == "ranges":
        ranges = options["decoder"]["ranges"]
        name = dice.choice([name for name in ranges if name.startswith("past")])
        if dice.random() < 0.5:
            del ranges[name]
        else:
            ranges[name][2][2] += dice.choice([-1, 1]) * dice.randrange(1, 400)
    else:
        options[role][field] = f"{dice.randrange(16**64):064x}"
    entry = patient.manifest.profiles["toy"]
    engine = msgspec.structs.replace(entry.engines["rtx-4090"], options=options)
    entry = msgspec.structs.replace(entry, engines={"rtx-4090": engine})
    profiles = {**patient.manifest.profiles, "toy": entry}
    write_manifest(patient.directory, msgspec.structs.replace(patient.manifest, profiles=profiles))
    return (REBUILD,)


def exchanged_engines(patient: Patient, dice: random.Random) -> Said:
    """Entries of the manifest under each other's name: engines, or plans with their hashes."""
    toy, other = (patient.manifest.profiles[name] for name in ("toy", "other"))
    recorded = dict(patient.manifest.files)
    if dice.random() < 0.5:
        profiles = {
            "toy": msgspec.structs.replace(toy, engines=other.engines),
            "other": msgspec.structs.replace(other, engines=toy.engines),
        }
    else:
        profiles = {"toy": toy, "other": other}
        one, two = (entry.engines["rtx-4090"].graphs["decoder"] for entry in (toy, other))
        recorded[one], recorded[two] = recorded[two], recorded[one]
        patient.write(one, patient.whole[two])
        patient.write(two, patient.whole[one])
    changed = msgspec.structs.replace(patient.manifest, profiles=profiles, files=recorded)
    write_manifest(patient.directory, changed)
    return (REBUILD,)


def linked_out(patient: Patient, dice: random.Random) -> Said:
    """The same bytes, but outside the bundle."""
    name = patient.any(dice)
    outside = patient.directory.parent / "outside"
    outside.mkdir(exist_ok=True)
    if "/" in name and dice.random() < 0.5:
        folder, file = name.split("/")
        (outside / file).write_bytes(patient.whole[name])
        (patient.directory / name).unlink()
        (patient.directory / folder).rmdir()
        (patient.directory / folder).symlink_to(outside)
    else:
        (outside / "file").write_bytes(patient.whole[name])
        (patient.directory / name).unlink()
        (patient.directory / name).symlink_to(outside / "file")
    return (name,)


def named_out(patient: Patient, dice: random.Random) -> Said:
    """A manifest that is whole and names a file outside the bundle, or one that it has no hash of."""
    (patient.directory.parent / "outside").mkdir(exist_ok=True)
    outside = patient.directory.parent / "outside/secret"
    outside.write_bytes(b"secret")
    leading_out = ["../outside/secret", str(outside), "checkpoint/../../outside/secret", "..\\secret"]
    manifest = patient.manifest
    kind = dice.choice(["files", "vision", "profile", "tokenizer", "engine"])
    name = dice.choice([*leading_out, *([] if kind == "files" else ["graph.onnx", "a/b.json"])])
    entry: Entry = manifest.profiles["toy"]
    if kind == "files":
        recorded = {**manifest.files, name: files.record(outside)}
        changed = msgspec.structs.replace(manifest, files=recorded)
    elif kind == "tokenizer":
        text = msgspec.structs.replace(manifest.text, tokenizer=name)
        changed = msgspec.structs.replace(manifest, text=text)
    else:
        engine: Engine = entry.engines["rtx-4090"]
        engine = msgspec.structs.replace(engine, graphs={**engine.graphs, "decoder": name})
        part: dict[str, Any] = {"engines": {"rtx-4090": engine}} if kind == "engine" else {kind: name}
        entry = msgspec.structs.replace(entry, **part)
        changed = msgspec.structs.replace(manifest, profiles={**manifest.profiles, "toy": entry})
    write_manifest(patient.directory, changed)
    return ()


FAULTS: dict[Callable[[Patient, random.Random], Said], int] = {
    flipped_bit: 10,
    truncated: 3,
    zeroed_block: 2,
    missing: 1,
    extra: 2,
    exchanged: 1,
    wrong_binding: 2,
    wrong_sources: 2,
    exchanged_engines: 1,
    linked_out: 1,
    named_out: 2,
}


OPENINGS = [(profile, target) for profile in ("toy", "other") for target in ("rtx-4090", "ort-cpu")]


def problem_of(patient: Patient, said: Said, openings: list[tuple[str, str]]) -> str | None:
    """What was wrong with how a fault was found, or None.

    Sessions that do not read a large damaged file may open; the first that reads it must say so.
    """
    for profile, target in openings:
        patient.tokenizers.clear()
        try:
            Session.open(patient.directory, profile, target)
        except LoadedError as loaded:
            if not said or loaded.names & {Path(name).name for name in said}:
                return f"{profile} on {target} loaded {loaded.names}"
        except UserError as error:
            if patient.tokenizers:
                return f"{profile} on {target} was refused after its tokenizer was loaded"
            found = not said or any(each in str(error) for each in said)
            return None if found else f"said {error}"
    return "not found"


def test_every_fault_is_found_before_anything_is_loaded(patient: Patient) -> None:
    dice, done = random.Random(5), Counter[str]()
    missed = []
    for profile, target in OPENINGS:
        with pytest.raises(LoadedError):
            Session.open(patient.directory, profile, target)
    for case in range(CASES):
        (fault,) = dice.choices(list(FAULTS), list(FAULTS.values()))
        said = fault(patient, dice)
        engines = said == (REBUILD,)
        openings = [each for each in OPENINGS if not engines or each == ("toy", "rtx-4090")]
        problem = problem_of(patient, said, dice.sample(openings, len(openings)))
        if problem:
            missed.append((case, fault.__name__, said, problem))
        done[fault.__name__] += 1
        patient.heal()
    assert missed == []
    assert done.keys() == {fault.__name__ for fault in FAULTS}
    for profile, target in OPENINGS:
        with pytest.raises(LoadedError):
            Session.open(patient.directory, profile, target)
