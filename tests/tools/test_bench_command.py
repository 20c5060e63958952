"""The whole command on the tiny geometry, and on the bundle that it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest
from PIL import Image

from trimvlm.backends import Backend
from trimvlm.bundle import Bundle
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm_tools.bench.choice import Member, members
from trimvlm_tools.bench.geometry import find_geometry
from trimvlm_tools.bench.harness import Contender
from trimvlm_tools.bench.operators import BETWEEN, middle
from trimvlm_tools.bench.peers.environment import PeerError
from trimvlm_tools.bench.plots import draw
from trimvlm_tools.bench.prepare import Made, Plan
from trimvlm_tools.bench.report import Report, as_data
from trimvlm_tools.bench.roofline import weight_values
from trimvlm_tools.bench.run_geometry import bench_geometry
from trimvlm_tools.bench.size import bundle_size
from trimvlm_tools.bench.tables import as_text
from trimvlm_tools.cli import main

# Says what our dense decoder said, in a fixed time.
PEER = """
import json, shutil, sys
def say(**reply): print(json.dumps(reply), flush=True)
say(ready=1, open_seconds=0.5)
for line in sys.stdin:
    command, _, file = line.strip().partition(" ")
    if command == "save":
        shutil.copy(file.replace("copycat", "dense"), file)
        say(saved=file)
    else:
        say(seconds=0.2, cpu_seconds=0.2, prefill=0.1, decode=0.1, first_token=0.4 if sys.argv[1:] else 0.3)
"""


class Copycat:
    """A peer's declarations."""

    REQUIREMENTS, SETTINGS, ANSWERS, PRUNES = ("copycat==1",), {"speed": 1}, True, True


def copycat(*_, label, **__) -> Contender:
    return Contender(name=label, command=(sys.executable, "-c", PEER))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[tuple[Report, Path]]:
    """A report with one of our pruned decoders at 32 visual rows (images give 16), and where it was made."""
    cache = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimvlm_tools.bench.peaks._SIDE", 256)
        patch.setattr("trimvlm_tools.bench.peaks._BYTES", 1 << 24)
        for module in ("points", "answers"):
            patch.setattr(f"trimvlm_tools.bench.{module}.peer_contender", copycat)
        for module in ("run_geometry", "prepare", "answers"):
            patch.setattr(f"trimvlm_tools.bench.{module}.find_peer", lambda name: Copycat)
        report = bench_geometry(
            msgspec.structs.replace(find_geometry("tiny"), layers=4, vision_layers=2),
            Plan(against=("copycat",), methods=("vtw",), visual=(32,), cache=cache),
            new_tokens=4,
            threads=1,
            runs=1,
            processes=2,
            operators=("dense", "vtw"),
        )
    yield report, cache


def test_every_contender_is_measured_and_peers_agree(run):
    report, _ = run
    assert report.failures == {}
    assert report.answers and [each.peer for each in report.answers.peers] == ["copycat"]
    (point,) = report.points
    assert [each.name for each in point.contenders] == ["dense", "vtw", "copycat"]
    dense, pruned, peer = point.contenders
    assert dense.prefill_ratio.median == 1.0 and dense.over_roofline == dense.over_in_turn == 1.0
    assert pruned.flops_ratio is not None and pruned.flops_ratio < 0.7
    for each in (dense, pruned):
        assert each.bytes and each.bytes.kv == each.bytes.kv_predicted > 0
        assert each.split and each.split.decode_graph and each.split.first_graph.median < each.prefill.median
        parts = (
            each.split.first_graph,
            each.split.first_host,
            each.split.decode_graph,
            each.split.decode_host,
        )
        assert sum(part.median for part in parts) == pytest.approx(each.seconds.median, rel=0.01)
    assert peer.agreement and peer.agreement.tokens == peer.agreement.of == 4
    assert peer.agreement.logits == 0.0 and peer.prefill.median == 0.1
    for name, found in point.samples.items():
        assert [each.process for each in found] == [1, 2]
        assert name == "machine" or all(len(each.figures["prefill"]) == 1 for each in found)
    assert set(point.samples) == {"dense", "vtw", "copycat", "machine"}
    assert set(report.answers.samples) == {"dense", "copycat"}
    assert point.peaks and point.peaks.flops > 1e9 and point.peaks.read > 1e8


def test_operators_are_all_the_work_of_a_run(run):
    """A token multiplies one row with every matrix."""
    report, cache = run
    (point,) = report.points
    assert list(point.operators) == ["dense", "vtw"]
    profiles = Bundle(cache / "bundles" / "tiny")
    for name, found in point.operators.items():
        profile = profiles.profile(f"{name}-32")
        values = weight_values(Schedule.resolve(profile, profile.model))
        products = [each for each in found.token if each.bytes]
        assert [each.name for each in products] == ["Gemm"]
        assert products[0].flops == 2 * values and products[0].bytes == 4 * values
        (attention,) = (each for each in found.token if each.name == "Attention")
        assert attention.nodes == 4 and attention.flops == 0
        for operators in (found.prefill, found.token):
            assert operators[-1].name == BETWEEN and all(each.seconds > 0 for each in operators)
        (gemm,) = (each for each in found.prefill if each.name == "Gemm")
        assert sum(each.nodes for each in found.products) == gemm.nodes
        assert sum(each.flops for each in found.products) == gemm.flops
        assert sum(each.seconds for each in found.products) == pytest.approx(gemm.seconds)
        rows = [point.point.visual + point.point.text, *([point.point.text] * (name == "vtw")), 1]
        assert [each.rows for each in found.products] == rows
        assert all(each.flops * 4 == 2 * each.rows * each.bytes for each in found.products)
    assert "a prefill" in as_text(report) and "between nodes" in as_text(report)


def test_a_slow_run_is_not_the_one_that_is_shown():
    runs = [
        {"name": "model_run", "ts": 100 * number, "dur": time} for number, time in enumerate((9, 2, 90, 3))
    ]
    assert middle(runs, range(1, 4)) == 3


def test_what_a_build_adds_is_not_counted_as_the_bundle(run, tmp_path):
    _, cache = run
    copied = tmp_path / "bundle"
    shutil.copytree(cache / "bundles" / "tiny", copied)
    before = bundle_size(Bundle(copied), cache / "checkpoints" / "tiny")
    assert main(["build", str(copied), "--target", "ort-cpu-int8", "--profile", "dense"]) == 0
    after = bundle_size(Bundle(copied), cache / "checkpoints" / "tiny")
    added = sum(file.bytes for file in Bundle(copied).manifest.files.values()) - before.bundle
    manifest = (copied / "manifest.json").stat().st_size
    assert added > 5000 and after.bundle - before.bundle < manifest


def test_operators_of_what_does_not_run_are_refused(capsys):
    command = ["bench", "--geometry", "tiny", "--operators"]
    assert main([*command, "spider-25"]) == 2
    assert "'spider-25' does not run" in capsys.readouterr().err
    assert main([*command, "fastv", "--profiles", "vtw"]) == 2
    assert "choose from dense, vtw" in capsys.readouterr().err
    for option in (["--operators", "dense"], ["--decoders-only"]):
        assert main(["bench", "bundle", *option]) == 2
        assert f"{option[0]}: goes with --geometry only" in capsys.readouterr().err


def test_decoders_alone_leave_what_needs_a_session_unmeasured(run, monkeypatch):
    _, cache = run
    for name, value in {"_SIDE": 256, "_BYTES": 1 << 24}.items():
        monkeypatch.setattr(f"trimvlm_tools.bench.peaks.{name}", value)
    report = bench_geometry(
        msgspec.structs.replace(find_geometry("tiny"), layers=4, vision_layers=2),  # the bundle is there
        Plan(against=(), methods=("vtw",), visual=(32,), cache=cache),
        new_tokens=2,
        threads=1,
        runs=1,
        processes=1,
        sessions=False,
    )
    assert report.answers is None and report.memory == {} and report.failures == {}
    verdicts = {bar.what: bar.verdict for bar in report.bars}
    assert verdicts["host time / decoded token, worst"] != "not measured"
    for what in ("host time / time to first token, worst", "weights resident / one copy, a session"):
        assert verdicts[what] == "not measured"
    assert "first token ms" not in as_text(report)


def test_the_report_is_whole_as_text_as_json_and_as_plots(run, tmp_path):
    report, _ = run
    data = json.loads(json.dumps(as_data(report)))
    assert data["machine"]["versions"]["onnxruntime"] and data["threads"] == 1
    assert data["points"][0]["contenders"][0]["prefill_reached"]["flops_per_second"] > 0
    verdicts = {bar["what"]: bar["verdict"] for bar in data["bars"]}
    assert verdicts["pruned prefill over roofline at 576 visual tokens"] == "not measured"
    assert verdicts["KV / the Schedule's prediction, worst"] == "pass"
    text = as_text(report)
    for words in ("32 visual and 12 text rows", "copycat", "4/4", "weights resident / one copy, a session"):
        assert words in text
    written = draw(report, tmp_path / "plots")
    assert [path.name for path in written] == ["tiny-fp32-roofline-32+12.png", "tiny-fp32-first-token.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_members_of_a_choice_answer_as_their_own_sessions_do(run):
    _, cache = run
    image = np.full((40, 40, 3), 90, np.uint8)

    def answer(session: Session) -> list[str]:
        return list(session.generate("w20 w30", [Image.fromarray(image)], max_new_tokens=4))

    (member,) = members(Bundle(cache / "bundles" / "tiny"), ["dense"], "ort-cpu", threads=1)
    with member, Session.open(cache / "bundles" / "tiny", "dense", threads=1) as session:
        assert answer(member) == answer(session) != []


def test_a_member_has_its_own_decoder_and_the_vision_of_the_first():
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, role, feeds, fetch, keep=()):
            return {"by": self.name}

    member = Member(cast("Backend", Named("own")), cast("Backend", Named("first")))
    assert [member.run(role, {}, [])["by"] for role in ("vision", "decoder")] == ["first", "own"]


def test_what_a_race_needs_can_be_made_without_running_it(monkeypatch, tmp_path, capsys):
    asked = []

    def prepare_peer(name, checkpoint, directory, precision):
        asked.append((name, checkpoint, directory, precision))
        if name == "openvino-genai":
            raise PeerError("no room")

    def make(geometry, plan):
        return Made(checkpoint=tmp_path, model=geometry.model_spec(), bundle=tmp_path, decoders={}, whole={})

    monkeypatch.setattr("trimvlm_tools.bench.prepare.prepare_peer", prepare_peer)
    monkeypatch.setattr("trimvlm_tools.bench.prepare.make", make)
    command = ["bench", "--geometry", "tiny", "--prepare", "--precision", "int4", "--against"]
    assert main([*command, "llama.cpp", "openvino-genai"]) == 1
    assert capsys.readouterr().out == "llama.cpp: ready\nopenvino-genai FAILED: no room\n"
    assert main([*command, "llama.cpp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"llama.cpp": None}
    assert asked[0] == ("llama.cpp", tmp_path, Path("build/bench/peers"), "int4")


def test_a_bundle_is_measured_step_by_step(run, tmp_path, capsys):
    _, cache = run
    arguments = ["--profiles", "dense", "--runs", "1", "--processes", "1", "--threads", "1", "--tokens", "3"]
    out = tmp_path / "report.json"
    bundle = str(cache / "bundles" / "tiny")
    assert main(["bench", bundle, *arguments, "--prompt", "w20 w30", "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    (steps,) = report["steps"]
    assert steps["first_graph"]["median"] + steps["first_host"]["median"] == pytest.approx(
        steps["first_token"]["median"]
    )
    assert steps["vision"]["median"] > 0 and steps["prefill"]["median"] > 0 and steps["select"] is None
    assert [each["process"] for each in report["samples"]["dense"]] == [1]
    if steps["decode_tokens"]:
        assert steps["decode_graph"]["median"] > 0 and steps["decode_host"]["median"] > 0
    main(["bench", bundle, *arguments])
    assert "dense" in capsys.readouterr().out
