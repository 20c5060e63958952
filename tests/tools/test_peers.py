"""Peers: finding them, environments and conversions made once, the worker's protocol, errors as their own."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import trimvlm_tools
from trimvlm.errors import UserError
from trimvlm_tools.bench import peers
from trimvlm_tools.bench.harness import race
from trimvlm_tools.bench.peers import Peer, environment, find_peer, peer_names
from trimvlm_tools.bench.peers.environment import Answering, Decoding, PeerError, peer_contender

# Its "model" is a number; a decoder counts up from the sum of the ids and that number.
FAKE = """
from pathlib import Path
from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._fake_part import ZERO

NAME = "fake.peer"
REQUIREMENTS = ()
SETTINGS = {"flash": True}
PRECISIONS = ("fp32", "int4")
ANSWERS = PRUNES = True

def convert(checkpoint, directory, precision):
    print("converting")
    if not (checkpoint / "number").exists():
        raise ValueError("no number in the checkpoint")
    (directory / "number").write_text((checkpoint / "number").read_text() + len(precision) * ZERO)

class Counter:
    def __init__(self, directory, threads):
        self.first = int((directory / "number").read_text()) + threads
    def run(self, ids, new_tokens):
        import numpy as np
        print("chatter")
        first = self.first + int(ids.sum())
        return Decoded(prefill=0.5, decode=0.25, tokens=list(range(first, first + new_tokens)),
                       logits=np.arange(3, dtype=np.float64))

class Answerer:
    def __init__(self, keep):
        self.keep = keep
    def run(self, image, question):
        return float(len(image) + len(question) + (self.keep or 0))

def open_decoder(directory, threads, precision):
    if threads > 8:
        raise RuntimeError("too many threads")
    return Counter(directory, threads)

def open_answer(directory, threads, precision, keep):
    return Answerer(keep)
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the peers' sources with one more peer, seen by this process and by those it starts."""
    package = Path(str(trimvlm_tools.__file__)).parent
    copy = tmp_path / "sources" / "trimvlm_tools"
    shutil.copytree(package / "bench", copy / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package / "__init__.py", copy)
    (copy / "bench/peers/fake_peer.py").write_text(FAKE)
    (copy / "bench/peers/_fake_part.py").write_text("ZERO = '0'\n")
    monkeypatch.setattr(peers, "__path__", [str(copy / "bench/peers")])
    monkeypatch.setattr(trimvlm_tools, "__file__", str(copy / "__init__.py"))
    monkeypatch.setenv("PYTHONPATH", str(copy.parent))
    for name in ("fake_peer", "_fake_part"):
        monkeypatch.delitem(sys.modules, f"trimvlm_tools.bench.peers.{name}", raising=False)
    return copy / "bench/peers"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "number").write_text("7")
    return tmp_path / "checkpoint"


@pytest.fixture
def decoding(tmp_path) -> Decoding:
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3]))
    return Decoding(ids=tmp_path / "ids.npy", new_tokens=3)


def test_peers_are_found_by_the_name_that_their_file_declares(sources):
    assert "fake.peer" in peer_names()
    assert find_peer("fake.peer").SETTINGS == {"flash": True}
    for name in ("fake_peer", "worker", "environment", "../harness", ""):
        with pytest.raises(UserError, match=r"is not known; choose from .*fake\.peer"):
            find_peer(name)


def declared() -> list[Peer]:
    return [find_peer(name) for name in peer_names()]


@pytest.mark.parametrize("peer", declared(), ids=lambda peer: peer.NAME)
def test_every_peer_declares_what_the_report_and_its_environment_need(peer):
    assert peers.file_name(peer.NAME) == peer.__name__.rpartition(".")[2]
    assert "fp32" in peer.PRECISIONS and peer.SETTINGS
    assert all(re.search("[=>]=", requirement) for requirement in peer.REQUIREMENTS)
    assert find_peer(getattr(peer, "ENVIRONMENT", peer.NAME)).REQUIREMENTS == peer.REQUIREMENTS
    assert callable(peer.convert) and callable(peer.open_decoder)
    assert callable(getattr(peer, "open_answer", None)) == peer.ANSWERS
    assert peer.ANSWERS or not peer.PRUNES
    json.dumps(peer.SETTINGS)


def test_importing_the_peers_loads_none_of_their_libraries(tmp_path):
    """The worker's interpreter has other packages than ours, and ours has other packages than theirs."""
    import subprocess

    code = (
        "import sys, trimvlm_tools.bench.peers as p, trimvlm_tools.bench.peers.worker\np.peer_names()\n"
        "print({n.partition('.')[0] for n in sys.modules} - sys.stdlib_module_names - {'__main__'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in eval(done.stdout) if not name.startswith(("_", "sitecustomize"))}
    assert loaded == {"trimvlm", "trimvlm_tools"}


def test_a_decoder_is_raced_and_its_tokens_are_kept(sources, checkpoint, decoding, tmp_path):
    contenders = [
        peer_contender(
            "fake.peer", decoding, checkpoint, tmp_path, precision=precision, threads=2, label=label
        )
        for precision, label in (("fp32", "a/b"), ("int4", "c"))
    ]
    kept = {name: tmp_path / f"{name[0]}.npz" for name in ("a/b", "c")}
    result = race(contenders, runs=2, save=kept)
    assert result.failed == {}
    figures = result.figures["a/b"]
    assert figures["prefill"] == (0.5, 0.5) and figures["decode"] == (0.25, 0.25)
    assert len(figures["seconds"]) == len(figures["cpu_seconds"]) == 2
    with np.load(kept["a/b"]) as saved:
        assert saved["tokens"].tolist() == [70008, 70009, 70010] and saved["tokens"].dtype == np.int64
        assert saved["logits"].tolist() == [0, 1, 2] and saved["logits"].dtype == np.float32


def test_an_answer_is_raced_with_the_visual_tokens_that_are_kept(sources, checkpoint, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"12345")
    contenders = [
        peer_contender(
            "fake.peer", Answering(image=image, question="why?", keep=keep), checkpoint, tmp_path,
            precision="fp32", threads=2, label=f"keep {keep}",
        )
        for keep in (None, 100)
    ]  # fmt: skip
    result = race(contenders, runs=1, warmup=0)
    assert result.failed == {}
    assert [figures["first_token"] for figures in result.figures.values()] == [(9.0,), (109.0,)]


def test_an_answer_has_nothing_to_save(sources, checkpoint, tmp_path):
    (tmp_path / "i").write_bytes(b"")
    answering = Answering(image=tmp_path / "i", question="?")
    contender = peer_contender("fake.peer", answering, checkpoint, tmp_path, precision="fp32", threads=1)
    result = race([contender], runs=1, save={"fake.peer": tmp_path / "nothing.npz"})
    assert "cannot do 'save" in result.failed["fake.peer"]


def test_a_peer_that_does_not_open_is_reported_and_the_others_go_on(sources, checkpoint, decoding, tmp_path):
    contenders = [
        peer_contender(
            "fake.peer", decoding, checkpoint, tmp_path, precision="fp32", threads=threads, label=str(threads)
        )
        for threads in (1, 9)
    ]
    result = race(contenders, runs=1)
    assert result.failed == {"9": "exit code 1: RuntimeError: too many threads"}
    assert set(result.figures) == {"1"}


def test_a_conversion_is_made_once_and_again_for_another_checkpoint_or_recipe(
    sources, checkpoint, tmp_path, monkeypatch
):
    peer = find_peer("fake.peer")
    model = environment.convert(peer, checkpoint, tmp_path, "int4")
    assert (model / "number").read_text() == "70000"
    assert model.with_suffix(".log").read_text() == "converting\n"
    (model / "number").write_text("kept")
    assert environment.convert(peer, checkpoint, tmp_path, "int4") == model
    assert (model / "number").read_text() == "kept"
    assert environment.convert(peer, checkpoint, tmp_path, "fp32") != model
    (checkpoint / "number").write_text("8111")
    environment.convert(peer, checkpoint, tmp_path, "int4")
    assert (model / "number").read_text() == "81110000"
    (model / "number").write_text("kept")
    (sources / "_fake_part.py").write_text("ZERO = '1'\n")
    environment.convert(peer, checkpoint, tmp_path, "int4")
    assert (model / "number").read_text() == "81111111"
    (model / "number").write_text("kept")
    with (sources / "fake_peer.py").open("a") as file:
        file.write("# another recipe\n")
    environment.convert(peer, checkpoint, tmp_path, "int4")
    assert (model / "number").read_text() == "81111111"


def test_a_conversion_that_fails_is_said_in_its_own_last_words_and_tried_again(sources, checkpoint, tmp_path):
    peer = find_peer("fake.peer")
    number = checkpoint / "number"
    number.rename(checkpoint / "hidden")
    failure = (
        r"fake\.peer: conversion to fp32: exit code 1: ValueError: no number in the checkpoint .*fp32\.log"
    )
    for _ in range(2):
        with pytest.raises(PeerError, match=failure):
            environment.convert(peer, checkpoint, tmp_path, "fp32")
    (checkpoint / "hidden").rename(number)
    assert (environment.convert(peer, checkpoint, tmp_path, "fp32") / "number").exists()


REFUSED = {
    "'int4' is not offered; it has fp32": ({"PRECISIONS": ("fp32",)}, None),
    "runs decoders only": ({"ANSWERS": False, "PRUNES": False}, Answering(image=Path("i"), question="?")),
    "keep 64: it has no pruning": ({"PRUNES": False}, Answering(image=Path("i"), question="?", keep=64)),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_a_peer_does_not_offer_is_refused_before_anything_is_made(sources, says, tmp_path, monkeypatch):
    changes, workload = REFUSED[says]
    for name, value in changes.items():
        monkeypatch.setattr(find_peer("fake.peer"), name, value)
    workload = workload or Decoding(ids=tmp_path / "ids.npy", new_tokens=1)
    with pytest.raises(PeerError, match=says):
        peer_contender("fake.peer", workload, tmp_path, tmp_path, precision="int4", threads=1)
    assert not list(tmp_path.glob("fake.peer"))


def make_wheel(directory: Path) -> Path:
    wheel = directory / "fakelib-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fakelib.py", "ANSWER = '42'\n")
        archive.writestr(
            "fakelib-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fakelib\nVersion: 1.0\n"
        )
        archive.writestr(
            "fakelib-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("fakelib-1.0.dist-info/RECORD", "")
    return wheel


def test_a_peer_with_requirements_has_an_interpreter_of_its_own(sources, checkpoint, tmp_path, monkeypatch):
    """Its packages and trimvlm's sources are there; trimvlm's packages and the user's PYTHONPATH are not."""
    convert = (
        "\ndef convert(checkpoint, directory, precision):\n"
        "    import importlib.util, fakelib\n"
        "    foreign = [n for n in ('msgspec', 'numpy') if importlib.util.find_spec(n)]\n"
        "    (directory / 'made').write_text(fakelib.ANSWER + str(foreign))\n"
    )
    requirement = f"fakelib @ {make_wheel(tmp_path).as_uri()}"
    (sources / "fake_peer.py").write_text(FAKE.replace("= ()", f"= ({requirement!r},)") + convert)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nowhere"))
    peer = find_peer("fake.peer")
    assert (environment.convert(peer, checkpoint, tmp_path, "fp32") / "made").read_text() == "42[]"
    venv = tmp_path / "fake.peer/venv"
    marker = venv / "was-not-made-again"
    marker.touch()
    assert environment.install(peer, tmp_path).is_relative_to(venv)
    assert marker.exists()
    monkeypatch.setattr(peer, "REQUIREMENTS", ("fakelib @ file:///no/such/fakelib-2.0-py3-none-any.whl",))
    with pytest.raises(
        PeerError, match=r"fake\.peer: pip install: exit code 1: ERROR: .*fakelib-2\.0.*venv\.log"
    ):
        environment.install(peer, tmp_path)
    assert not marker.exists() and not (venv / environment.STAMP).exists()
