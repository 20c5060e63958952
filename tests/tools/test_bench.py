"""The bench tool: who runs when, what ratios say, what memory is read as, what a geometry loads as."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimvlm.accounting import mac2
from trimvlm.errors import UserError
from trimvlm.schedule import Schedule, resolve
from trimvlm_tools.bench.decisions import bench_profiles, method_decisions
from trimvlm_tools.bench.feeds import peer_feeds, prefill_feeds
from trimvlm_tools.bench.geometry import GEOMETRIES, Geometry, find_geometry, make_checkpoint
from trimvlm_tools.bench.harness import Contender, Race, Spread, graph_contender, race
from trimvlm_tools.bench.machine import fingerprint
from trimvlm_tools.bench.memory import parse_kernel_fields, phases
from trimvlm_tools.bench.peer import check_peer
from trimvlm_tools.bench.prefill import contests
from trimvlm_tools.bench.random_llava import IMAGE
from trimvlm_tools.bench.report import Bar, Report, as_text
from trimvlm_tools.bench.size import checkpoint_bytes
from trimvlm_tools.cli import main

TINY = Geometry(
    name="test", layers=8, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64, vocab=64, image=28,
    vision_layers=2, vision_hidden=32, text=10,
)  # fmt: skip

FAKE = """
import json, sys
name, log, seconds, dies_at = sys.argv[1:]
def say(**reply): print(json.dumps(reply), flush=True)
say(ready=1, open_seconds=0.5)
for count, line in enumerate(sys.stdin):
    if count == int(dies_at):
        sys.exit("out of " + name)
    with open(log, "a") as file:
        file.write(name)
    # The machine gets slower from run to run: only ratios within a round are right.
    say(seconds=float(seconds) * (1 + count), cpu_seconds=float(seconds) * (1 + count) * 1.5)
"""


def fake(name: str, log: Path, seconds: float, *, dies_at: int = -1) -> Contender:
    return Contender(
        name=name, command=(sys.executable, "-c", FAKE, name, str(log), str(seconds), str(dies_at))
    )


def test_contenders_take_turns_and_ratios_are_taken_within_a_round(tmp_path):
    log = tmp_path / "log"
    result = race([fake("a", log, 2.0), fake("b", log, 1.0), fake("c", log, 3.0)], runs=3, warmup=1)
    assert log.read_text() == "abc" + "bca" + "cab" + "abc"
    assert result.failed == {}
    assert result.figures["a"]["seconds"] == (4.0, 6.0, 8.0)  # the warm-up is not counted
    assert result.ratio("b", "a") == Spread(median=0.5, min=0.5, max=0.5)
    assert result.ratio("c", "a").median == 1.5
    assert result.spread("c") == Spread(median=9.0, min=6.0, max=12.0)
    assert result.cores("a") == 1.5
    assert result.cpu_seconds == pytest.approx(1.5 * (4 + 6 + 8) * (2 + 1 + 3) / 2)
    assert result.open_seconds == {"a": 0.5, "b": 0.5, "c": 0.5}


def test_a_contender_that_fails_is_reported_with_its_error_and_the_others_go_on(tmp_path):
    log = tmp_path / "log"
    contenders = [fake("a", log, 2.0), fake("b", log, 1.0, dies_at=2), fake("c", log, 1.0)]
    result = race(contenders, runs=2, warmup=1)
    assert result.failed == {"b": "exit code 1: out of b"}
    assert set(result.figures) == {"a", "c"}
    assert result.ratio("c", "a").median == 0.5


def test_a_contender_that_does_not_start_or_does_not_speak_json_is_reported():
    silent = Contender(name="silent", command=(sys.executable, "-c", "raise ValueError('no graph here')"))
    chatty = Contender(name="chatty", command=(sys.executable, "-c", "print('hello')"))
    result = race([silent, chatty], runs=1)
    assert result.failed == {
        "silent": "exit code 1: ValueError: no graph here",
        "chatty": "not a reply: 'hello'",
    }
    assert result.figures == {}


def test_the_worker_runs_a_graph_and_keeps_its_outputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 2])
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "doubling", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "double.onnx")
    np.savez(tmp_path / "good.npz", x=np.ones((3, 2), np.float32))
    np.savez(tmp_path / "bad.npz", z=np.ones((3, 2), np.float32))
    good = graph_contender("good", tmp_path / "double.onnx", tmp_path / "good.npz", threads=1)
    bad = graph_contender("bad", tmp_path / "double.onnx", tmp_path / "bad.npz", threads=1)
    result = race([good, bad], runs=2, save={"good": tmp_path / "outputs.npz"})
    assert "['x', 'z']" in result.failed["bad"]
    assert len(result.figures["good"]["seconds"]) == 2 and result.spread("good").min > 0
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert outputs["y"].tolist() == [[2.0, 2.0]] * 3


def test_overhead_is_the_time_ratio_over_the_flops_ratio():
    profiles = bench_profiles(TINY.model_spec())
    seconds = {name: (1.0, 2.0, 3.0) for name in profiles} | {"vtw": (0.6, 1.2, 1.8)}
    result = Race(
        figures={name: {"seconds": s, "cpu_seconds": s} for name, s in seconds.items()},
        open_seconds=dict.fromkeys(profiles, 0.0),
        failed={},
    )
    found = {contest.method: contest for contest in contests(result, profiles, TINY.text)}
    vtw = resolve(profiles["vtw"].decisions, TINY.model_spec())
    dense = resolve(profiles["dense"].decisions, TINY.model_spec())
    head = 2 * TINY.hidden * TINY.vocab
    ratio = (mac2(vtw, TINY.text) + head) / (mac2(dense, TINY.text) + head)
    assert found["vtw"].flops_ratio == pytest.approx(ratio)
    assert found["vtw"].overhead == pytest.approx(0.6 / ratio)
    assert found["dense"].overhead == 1.0


def test_without_dense_there_is_nothing_to_compare_with():
    result = Race(figures={}, open_seconds={}, failed={"dense": "exit code 1: no"})
    with pytest.raises(UserError, match="dense decoder failed"):
        contests(result, bench_profiles(TINY.model_spec()), TINY.text)


@pytest.mark.parametrize("geometry", [*GEOMETRIES.values(), TINY], ids=lambda geometry: geometry.name)
def test_every_method_has_a_schedule_that_costs_less_than_dense(geometry):
    model = geometry.model_spec()
    costs = {
        name: mac2(Schedule.resolve(profile, model), geometry.text)
        for name, profile in bench_profiles(model).items()
    }
    dense = costs.pop("dense")
    assert all(cost < dense for cost in costs.values())
    assert costs["fastv+v-skip"] < min(costs["fastv"], costs["v-skip"])


def test_hidivdrop_is_the_published_schedule_at_its_own_depth():
    decisions = method_decisions(32, 576)["hidivdrop"]
    assert (decisions.inject, decisions.exit) == (8, 24)
    assert [(stage.layer, stage.keep) for stage in decisions.select] == [
        (10, 215),
        (14, 10),
        (16, 5),
        (18, 1),
    ]


def test_v_skip_and_shortv_skip_nineteen_of_thirty_two_layers():
    decisions = method_decisions(32, 576)
    assert len(decisions["v-skip"].layers[0].layers) == len(decisions["shortv"].layers[0].layers) == 19


def test_feeds_cover_the_prompt_once_and_match_the_peers():
    model = TINY.model_spec()
    schedule = Schedule.resolve(bench_profiles(model)["hidivdrop"], model)
    feeds = prefill_feeds(schedule, text=10, before_image=2)
    positions = np.concatenate((feeds["text_positions"], feeds["visual_positions"]))
    assert sorted(positions.tolist()) == list(range(10 + TINY.visual_tokens))
    assert feeds["visual_positions"].tolist() == [2, 3, 4, 5]
    assert feeds["past_key.7"].shape == (1, 1, 0, 16)
    assert sum(name.startswith("forced.") for name in feeds) == len(schedule.stages)
    embedding_VD = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    rows_SD = peer_feeds(embedding_VD, TINY.visual_tokens, text=10, before_image=2)["inputs_embeds"][0]
    assert np.array_equal(rows_SD[feeds["visual_positions"]], feeds["visual"])
    assert np.array_equal(rows_SD[feeds["text_positions"]], embedding_VD[feeds["input_ids"]])


SMAPS = """55d0c0a00000-7ffd1b9fe000 ---p 00000000 00:00 0                          [rollup]
Rss:               10240 kB
Pss:                8000 kB
Shared_Clean:       2048 kB
Anonymous:          4096 kB
Swap:                  0 kB
"""


def test_kernel_fields_are_read_in_bytes():
    fields = parse_kernel_fields(SMAPS)
    assert fields["Rss"] == 10240 * 1024
    assert fields["Anonymous"] == 4 * 2**20
    assert set(fields) == {"Rss", "Pss", "Shared_Clean", "Anonymous", "Swap"}
    status = parse_kernel_fields("Name:\tpython\nVmHWM:\t   12345 kB\nRssAnon:\t     10 kB\nThreads:\t1\n")
    assert status == {"VmHWM": 12345 * 1024, "RssAnon": 10 * 1024}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_memory_of_a_process_splits_into_private_and_file_backed(tmp_path):
    mapped = tmp_path / "mapped"
    mapped.write_bytes(b"x" * (32 << 20))
    code = f"""
import mmap
print("empty", flush=True); input()
private = b"x" * (64 << 20)
print("private", flush=True); input()
del private
with open({str(mapped)!r}, "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(view[::4096])
    print("mapped", flush=True); input()
"""
    empty, private, held = phases(code, count=3)
    assert private.minus(empty).anonymous == pytest.approx(64 << 20, rel=0.05)
    gone = held.minus(empty)
    assert gone.anonymous < 8 << 20
    assert gone.file == pytest.approx(32 << 20, rel=0.1)
    assert gone.peak >= (64 << 20) * 0.95
    assert gone.anonymous_peak == pytest.approx(64 << 20, rel=0.05)


def test_a_process_that_dies_while_its_memory_is_measured_is_an_error():
    with pytest.raises(UserError, match="measuring memory: ValueError: no bundle"):
        phases("raise ValueError('no bundle')")


def test_a_bar_that_was_not_measured_is_not_a_pass():
    bars = [Bar(what="x", measured=m, at_most=1.1) for m in (None, 1.1, 1.2)]
    assert [bar.verdict for bar in bars] == ["not measured", "pass", "MISSED"]


@pytest.mark.parametrize(("others", "warns"), [(None, False), (0.02, False), (0.5, True)])
def test_a_report_from_a_busy_machine_says_so(others, warns):
    report = Report(
        machine=fingerprint(), threads=2, runs=3, others_busy=others, failed={"b": "exit code 1: no"}
    )
    text = as_text(report)
    assert ("NOT QUIET" in text) == warns
    assert "b FAILED: exit code 1: no" in text and not report.good


def test_geometry_makes_a_checkpoint_that_loads_and_answers(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    directory = make_checkpoint(TINY, tmp_path / "checkpoint")
    model: Any = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    turn = [{"type": "image"}, {"type": "text", "text": TINY.question(TINY.text)}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (40, 50)), return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert int((ids == IMAGE).sum()) == TINY.visual_tokens == 4
    assert int((ids != IMAGE).sum()) == TINY.text
    answer = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert answer.shape[1] == ids.shape[0] + 2


def test_a_checkpoint_is_made_again_only_for_another_geometry(tmp_path):
    directory = make_checkpoint(TINY, tmp_path / "checkpoint")
    weights = directory / "model.safetensors"
    first = weights.read_bytes()
    assert checkpoint_bytes(directory, 4) < len(first) + 200_000
    made = weights.stat().st_mtime_ns
    make_checkpoint(TINY, directory)
    assert weights.stat().st_mtime_ns == made
    weights.unlink()
    (directory / "geometry.json").unlink()
    make_checkpoint(TINY, directory)
    assert weights.read_bytes() == first  # the seed decides


def test_unknown_geometries_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="d1024, llava-1b, onevision-0"):
        find_geometry("d4096")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either BUNDLE or --geometry"),
        (["bundle", "--geometry", "tiny"], "either BUNDLE or --geometry"),
        (["bundle", "--against", "transformers"], "--against"),
        (["--geometry", "tiny", "--runs", "0"], "--runs: 0 is not a positive number"),
        (["--geometry", "huge"], "choose from d1024, llava-1b, onevision-0.5b, tiny"),
        (["--geometry", "tiny", "--profiles", "turbo"], "'turbo'"),
        (["no-such-directory"], "no manifest.json here"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said


def peer_is_installed() -> bool:
    with contextlib.suppress(UserError):
        check_peer()
        return True
    return False


def test_peer_that_cannot_be_exported_stops_the_command_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimvlm_tools.bench.peer.SETTINGS", {"no_such_setting": True})
    assert main(["bench", "--geometry", "tiny", "--against", "transformers"]) == 2
    assert "exports without ONNX Runtime's fusions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not peer_is_installed(), reason="this transformers has no ONNX Runtime fusions")
def test_the_whole_command_on_the_tiny_geometry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--profiles",
        "hidivdrop",
        "--against",
        "transformers",
        "--runs",
        "2",
        "--threads",
        "1",
    ]
    main(["bench", "--geometry", "tiny", *arguments, "--json", "--out", "report.json"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == {}
    assert [contest["method"] for contest in report["prefill"]] == ["dense", "hidivdrop"]
    assert all(contest["seconds"]["min"] > 0 for contest in report["prefill"])
    assert report["against"]["largest_difference"] < 1e-4
    assert report["memory"]["dense"]["used"]["peak"] > report["memory"]["dense"]["imports"]["peak"] > 0
    assert report["size"]["bundle"] > report["size"]["weights"] > 0
    import msgspec

    text = as_text(msgspec.convert(report, Report))
    assert "hidivdrop" in text and "peer: transformers" in text and "time/FLOPs" in text
