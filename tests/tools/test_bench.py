"""The bench tool: who runs when, what ratios say, what memory is read as, where time goes."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from trimvlm.errors import UserError
from trimvlm_tools.bench.clocked import GraphRun, split
from trimvlm_tools.bench.groups import Grouped, grouped, race_in_groups
from trimvlm_tools.bench.harness import Contender, Race, Spread, race
from trimvlm_tools.bench.machine import fingerprint
from trimvlm_tools.bench.peaks import NAME, Peaks, read_peaks
from trimvlm_tools.bench.process_memory import Memory, library_pages, parse_kernel_fields, weight_pages
from trimvlm_tools.bench.report import Report
from trimvlm_tools.bench.session_memory import SessionMemory, phases
from trimvlm_tools.bench.tables import as_text
from trimvlm_tools.cli import main

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


def test_memory_is_read_of_every_contender_that_ran(tmp_path):
    log = tmp_path / "log"
    result = race([fake("a", log, 2.0), fake("b", log, 1.0, dies_at=1)], runs=1, warmup=1)
    if not Path("/proc/self/smaps_rollup").exists():
        assert result.memory == {}
        return
    assert set(result.memory) == {"a"}
    held = result.memory["a"]
    assert held.imports is None and held.opened.resident > 1 << 20
    assert held.used.peak >= held.opened.resident


def test_groups_hold_the_anchor_and_what_fits_beside_it():
    contenders = [Contender(name=name, command=()) for name in "abcd"]
    always = [Contender(name="dense", command=()), Contender(name="machine", command=())]
    needs = {"dense": 5, "machine": 1, "a": 4, "b": 4, "c": 9, "d": 2}

    def names(available: int | None) -> list[str]:
        return ["".join(each.name[0] for each in g) for g in grouped(contenders, always, needs, available)]

    assert names(14) == ["dmab", "dmc", "dmd"]
    assert names(7) == ["dma", "dmb", "dmc", "dmd"]
    assert names(None) == ["dmabcd"]


def test_contenders_of_different_groups_are_compared_by_their_ratios_to_the_anchor(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr("trimvlm_tools.bench.groups.available_bytes", lambda: 2)
    saved: list[str] = []
    result = race_in_groups(
        [fake("b", log, 1.0), fake("c", log, 3.0)],
        always=[fake("a", log, 2.0)],
        needs=dict.fromkeys("abc", 1),
        runs=2,
        processes=1,
        save={},
        advance=saved.append,
    )
    assert len(result.races) == 2 and "ab" in log.read_text() and "ac" in log.read_text()
    assert result.ratio("b") == Spread(median=0.5, min=0.5, max=0.5)
    assert result.ratio("c").median == 1.5 and result.ratio("a").median == 1.0
    assert len(result.figures("a")["seconds"]) == 4 and result.figures("nobody") == {}
    assert result.failed == {} and result.open_seconds("c") == 0.5


def test_without_the_anchor_there_is_nothing_to_compare_with(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(UserError, match="a failed, nothing to compare with: exit code 1: out of a"):
        race_in_groups(
            [fake("b", log, 1.0)],
            always=[fake("a", log, 1.0, dies_at=0)],
            needs={},
            runs=1,
            processes=1,
            save={},
        )


def test_every_contender_starts_as_often_as_there_are_processes_and_their_runs_are_pooled(tmp_path):
    log, steps = tmp_path / "log", list[str]()
    result = race_in_groups(
        [fake("b", log, 1.0), fake("c", log, 1.0, dies_at=3)],
        always=[fake("a", log, 2.0)],
        needs={},
        runs=2,
        processes=2,
        save={},
        advance=steps.append,
    )
    # The second time b starts first, and c, which failed, is left out; each process begins with two rounds of
    # warm-up.
    assert log.read_text() == "abc" + "bca" + "cab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert [step[0] for step in steps if step.endswith(" open")] == ["a", "b", "c", "b", "a"]
    assert [(each.process, each.figures["seconds"]) for each in result.samples("b")] == [
        (1, (3.0, 4.0)),
        (2, (3.0, 4.0)),
    ]
    assert result.figures("a")["seconds"] == (6.0, 8.0, 6.0, 8.0)
    assert result.spread("a") == Spread(median=7.0, min=6.0, max=8.0)
    assert result.ratio("b") == Spread(median=0.5, min=0.5, max=0.5)
    assert result.failed == {"c": "exit code 1: out of c"} and not result.ran("c")


def test_no_contender_reports_home():
    code = """
import json, os
print(json.dumps({"ready": 1}), flush=True)
input()
print(json.dumps({"seconds": float(os.environ["ORT_DISABLE_TELEMETRY"])}), flush=True)
"""
    result = race([Contender(name="a", command=(sys.executable, "-c", code))], runs=1, warmup=0)
    assert result.figures["a"]["seconds"] == (1.0,)


def test_the_greatest_of_several_probes_is_the_machines_peak():
    figures = {
        "flops_numpy": (3.0, 5.0, 4.0), "flops_onnxruntime": (9.0, 1.0, 2.0), "read_libc": (7.0, 8.0, 9.0),
        "read_numpy": (1.0, 1.0, 1.0), "copy": (2.0, 2.0, 3.0), "rows_onnxruntime": (5.0, 7.0, 6.0),
    }  # fmt: skip
    result = Grouped(anchor="a", races=(Race(figures={NAME: figures}, open_seconds={}, failed={}),))
    assert read_peaks(result) == Peaks(
        flops=4.0,
        read=8.0,
        copy=2.0,
        rows=6.0,
        by={"flops": "numpy", "read": "libc"},
        range={"flops": (3.0, 5.0), "read": (7.0, 9.0), "copy": (2.0, 3.0), "rows": (5.0, 7.0)},
    )
    assert read_peaks(Grouped(anchor="a", races=())) is None


def test_time_outside_graphs_is_host_time():
    runs = [
        GraphRun("vision", 1.0, 3.0), GraphRun("decoder", 4.0, 8.0), GraphRun("decoder", 8.5, 9.0),
        GraphRun("decoder", 9.25, 9.75),
    ]  # fmt: skip
    assert split(runs, 0.5, 10.0) == {
        "first_graph": 6.0, "first_host": 1.5, "decode_graph": 1.0, "decode_host": 1.0,
    }  # fmt: skip
    assert split(runs[:2], 0.5, 10.0) == {"first_graph": 6.0, "first_host": 3.5}


def test_a_contender_that_does_not_start_or_does_not_speak_json_is_reported():
    codes = {
        "silent": "raise ValueError('no graph here')",
        "wordy": "raise ImportError('\\nvideos want torchvision\\nRestart afterwards.\\n')",
        "listing": "raise ImportError('cannot open:\\n  a.so: not found\\n  b.so: not found')",
        "late": "import traceback, sys\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()\n"
        "sys.exit('loading\\n' * 100 + 'no memory left')",
        "curt": "raise SystemExit('no\\nmore memory')",
        "mute": "raise SystemExit(3)",
        "chatty": "print('hello')",
    }
    contenders = [Contender(name=name, command=(sys.executable, "-c", code)) for name, code in codes.items()]
    result = race(contenders, runs=1)
    long = result.failed.pop("late")
    assert len(long) < 350 and "ZeroDivisionError: division by zero loading" in long
    assert long.endswith("loading no memory left"), "a traceback that was handled is not the last word"
    assert result.failed == {
        "silent": "exit code 1: ValueError: no graph here",
        "wordy": "exit code 1: ImportError: videos want torchvision Restart afterwards.",
        "listing": "exit code 1: ImportError: cannot open: a.so: not found b.so: not found",
        "curt": "exit code 1: more memory",
        "mute": "exit code 3: no message",
        "chatty": "not a reply: 'hello'",
    }
    assert result.figures == {}


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


MAPPED = """7f00-7f10 r--p 00000000 fe:00 12    /usr/lib/libc.so.6
Rss:                 100 kB
Anonymous:            10 kB
THPeligible:    0
7f10-7f20 r--p 00000000 fe:00 13    /models/model.safetensors
Rss:                 500 kB
Pss:                 350 kB
Anonymous:             0 kB
7f18-7f28 r--p 00000000 fe:00 13    /models/model.safetensors
Rss:                 300 kB
Pss:                 150 kB
Anonymous:             0 kB
7f20-7f30 rw-p 00000000 00:00 0
Rss:                  70 kB
Anonymous:            70 kB
7f30-7f40 r--p 00000000 fe:00 14    /venv/site packages/_core.cpython-311-x86_64-linux-gnu.so
Rss:                   5 kB
Anonymous:             0 kB
"""


def test_pages_of_shared_libraries_and_of_weights_are_told_apart():
    assert library_pages(MAPPED) == 95 * 1024
    assert weight_pages(MAPPED) == (200 + 300) * 1024  # 300 of them are mapped twice
    assert library_pages("") == weight_pages("") == 0


def test_weights_are_what_opening_took_and_what_was_mapped_by_the_end():
    def memory(private: int, weights: int = 0) -> Memory:
        return Memory(
            peak=0, anonymous=private, file=0, libraries=0, weights=weights, anonymous_peak=0, file_peak=0
        )

    held = SessionMemory(
        weight_bytes=100, empty=memory(5), imports=memory(10), opened=memory(105), used=memory(150, 5),
        low_memory=memory(20, 100), open_seconds=1.0,
    )  # fmt: skip
    assert held.weights_resident == 1.0 and held.choice_weights_resident is None
    both = msgspec.structs.replace(held, choice_opened=memory(12), choice=memory(40, 100))
    assert both.choice_weights_resident == 1.02


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
    empty, private, held = (phase.memory for phase in phases(code, count=3))
    assert private.minus(empty).anonymous == pytest.approx(64 << 20, rel=0.05)
    gone = held.minus(empty)
    assert gone.anonymous < 8 << 20
    assert gone.file == pytest.approx(32 << 20, rel=0.1)
    assert gone.peak >= (64 << 20) * 0.95
    assert gone.anonymous_peak == pytest.approx(64 << 20, rel=0.05)
    assert gone.file_peak == pytest.approx(32 << 20, rel=0.1)


def test_a_process_that_dies_while_its_memory_is_measured_is_an_error():
    with pytest.raises(UserError, match="measuring memory: ValueError: no bundle"):
        phases("raise ValueError('no bundle')")


@pytest.mark.parametrize(("others", "warns"), [(None, False), (0.02, False), (0.5, True)])
def test_a_report_from_a_busy_machine_says_so(others, warns):
    report = Report(
        machine=fingerprint(),
        threads=2,
        runs=3,
        processes=2,
        others_busy=others,
        failed={"b": "exit code 1: no"},
    )
    text = as_text(report)
    assert ("NOT QUIET" in text) == warns
    assert "b FAILED: exit code 1: no" in text and not report.good


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either BUNDLE or --geometry"),
        (["bundle", "--geometry", "tiny"], "either BUNDLE or --geometry"),
        (["bundle", "--against", "llama.cpp"], "--against: goes with --geometry only"),
        (["bundle", "--plot", "plots"], "--plot: goes with --geometry only"),
        (["bundle", "--prepare"], "--prepare: goes with --geometry only"),
        (["--geometry", "tiny", "--runs", "0"], "--runs: 0 is not a positive number"),
        (["--geometry", "tiny", "--processes", "0"], "--processes: 0 is not a positive number"),
        (["--geometry", "tiny", "--new-tokens", "0"], "--new-tokens: 0 is not a positive number"),
        (["--geometry", "tiny", "--visual", "64", "8"], "--visual: 8 rows are too few; give at least 16"),
        (["--geometry", "tiny", "--against", "nobody"], "--against: 'nobody' is not known"),
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
