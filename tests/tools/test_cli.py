"""The command line: instant help, one-line errors, exit codes, and reports alone on stdout."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from trimvlm.errors import UserError
from trimvlm_tools import cli, console
from trimvlm_tools.cli import VERBS, main

HEAVY = ("numpy", "torch", "transformers", "onnx", "onnxruntime", "yaml", "rich", "matplotlib")
PROFILE = {
    "schema": 1,
    "name": "fastv+v-skip",
    "method": {"name": "fastv+v-skip", "parameters": {"keep": 4}},
    "model": {
        "family": "llava",
        "layers": 4,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn": 128,
        "vocab": 99,
        "visual_tokens": 16,
    },
    "decisions": {
        "select": [{"layer": 2, "keep": 4, "by": {"rule": "last_row_attention", "attention": "previous"}}],
        "layers": [{"layers": [1], "query": "none"}, {"layers": [3], "execute": "none"}],
    },
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    return path


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A verb of our own, `probe`; set its `run`."""
    module = ModuleType("trimvlm_tools.verbs.probe")
    module.configure = lambda parser: parser.add_argument("--json", action="store_true")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERBS, "probe", "for tests")
    return module


def fails(error: BaseException) -> object:
    def run(args: object) -> int:
        raise error

    return run


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_instant_and_loads_nothing_heavy(verb: str | None) -> None:
    """The import guard is the real one; CPU time, 0.1 s idle, is bounded generously."""
    code = (
        "import sys, time\nfrom trimvlm_tools.cli import main\n"
        f"try: main({[verb, '--help'] if verb else ['--help']})\nexcept SystemExit as end: code = end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], code, time.process_time() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0 True"
    assert done.stderr == ""


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for verb, summary in VERBS.items():
        assert f"{verb} " in out and summary in out


def test_every_verb_has_its_file() -> None:
    found = {path.stem.rstrip("_") for path in (Path(cli.__file__).parent / "verbs").glob("[!_]*.py")}
    assert found == set(VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import trimvlm

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trimvlm {trimvlm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspekt"], "trimvlm: no verb 'inspekt'; did you mean inspect?"),
        (["zzz"], "trimvlm: no verb 'zzz'; verbs are demo, calibrate, export, fit, build, run, "),
        (["--colour"], "trimvlm: unrecognized arguments: --colour; see trimvlm --help"),
        (
            ["inspect"],
            "trimvlm inspect: the following arguments are required: MODEL_OR_BUNDLE; see trimvlm",
        ),
        (["inspect", "x", "--text", "many"], "argument --text: invalid int value: 'many'; see"),
        (["inspect", "x", "--text", "0"], "trimvlm inspect: --text: 0 is not a positive number"),
        (["inspect", "nowhere.yaml"], "trimvlm inspect: nowhere.yaml: no such file"),
        (["inspect", "."], "trimvlm inspect: .: no manifest.json here"),
        (["run", "nowhere", "--prompt", "?"], "trimvlm run: nowhere: no manifest.json here"),
        (
            ["calibrate", ".", "--method", "vtw", "--data", "demo", "--out", "My Own.yaml"],
            "trimvlm calibrate: name: 'My Own' cannot name files; use lower-case",
        ),
        (
            ["calibrate", ".", "--method", "vtw", "--data", "demo", "--out", "no/a.yaml"],
            "trimvlm calibrate: --out: there is no directory no",
        ),
        (
            ["calibrate", ".", "--method", "vtw", "--data", "demo", "--out", "a.yaml", "--set", "eta"],
            "trimvlm calibrate: --set: 'eta' is not KEY=VALUE",
        ),
        (["calibrate", "nowhere", "--method", "x", "--data", "demo", "--out", "a.yaml"], "method 'x' is not"),
        (["calibrate", "nowhere", "--method", "vtw", "--data", ".", "--out", "a.yaml"], "no questions.jsonl"),
        (["export", "nowhere", "--out", "out"], "trimvlm export: nowhere: no model here"),
        (["export", ".", "--out", "out", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_user_errors_are_one_line_and_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\nlines"), 2, "trimvlm probe: two lines\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "trimvlm probe: torch is not installed; pip install 'trimvlm[export]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime.x'", name="onnxruntime.x"),
            2,
            "trimvlm probe: onnxruntime is not installed; pip install 'trimvlm[ort]'\n",
        ),
        (PermissionError(13, "Permission denied", "out"), 2, "trimvlm probe: out: Permission denied\n"),
        (KeyboardInterrupt(), 130, "trimvlm probe: interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, said: str, verb: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.run = fails(error)  # type: ignore[attr-defined]
    assert main(["probe"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ModuleNotFoundError("x", name="trimvlm_tools.x"), ValueError("bug")])
def test_our_own_mistakes_are_not_hidden(error: Exception, verb: ModuleType) -> None:
    verb.run = fails(error)  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        main(["probe"])


def test_a_failed_gate_is_1(verb: ModuleType) -> None:
    verb.run = lambda args: 1  # type: ignore[attr-defined]
    assert main(["probe"]) == 1


def test_only_the_report_reaches_stdout(verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        print("a library talks")
        console.emit({"n": 1, "none": None})
        return 0

    verb.run = run  # type: ignore[attr-defined]
    assert main(["probe", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"n": 1, "none": None}
    assert printed.err == "a library talks\n"


def test_closed_pipe_is_quiet(profile: Path) -> None:
    command = [sys.executable, "-m", "trimvlm_tools.cli", "inspect", str(profile)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_inspect_reports_the_schedule(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(profile), "--text", "8", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["profiles"]
    assert [layer["live"] for layer in report["layers"]] == [16, 16, 4, 4]
    assert [layer["query"] for layer in report["layers"]] == [16, 0, 4, 0]
    assert [layer["cache"] for layer in report["layers"]] == [16, 16, 4, 0]
    assert [layer["ffn"] for layer in report["layers"]] == [16, 16, 4, 0]
    # 2 (keys, values) x 2 heads x 16 x 2 bytes = 128 bytes a row, and 8 text rows
    assert [layer["kv_bytes"] for layer in report["layers"]] == [128 * 24, 128 * 24, 128 * 12, 0]
    assert report["kv"] == {"dtype": "float16", "bytes": 128 * 60, "bytes_dense": 128 * 96}
    assert report["mean_visual_tokens"] == 10
    assert report["flops"]["n"] == 16 and report["flops"]["t"] == 8


def test_inspect_for_people(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(profile)]) == 0
    out = capsys.readouterr().out
    for part in (
        "profile fastv+v-skip: method fastv+v-skip, keep=4",
        "selects 4 of 16 by last_row_attention (previous)",
        "not executed",
        "mean visual tokens: 10.00 of 16",
        "n = 16 visual and t = 32 text rows",
        "no causal halving, no LM head",
    ):
        assert part in out


def test_table_aligns_numbers_and_marks_what_was_not_measured() -> None:
    text = console.table(("name", "n", "x"), [("a", 1, None), ("bbbbb", 12, 2.34567)])
    assert text.splitlines() == ["name    n      x", "a       1      -", "bbbbb  12  2.346"]


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("work", 3) as step:
        for note in ("one", "two", "three"):
            step(note)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["work: 1 of 3, 12 s left one", "work: done in 18 s"]


def test_progress_of_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stages() as tell:
        for layer in range(3):
            tell(f"layer {layer}", 1, 1)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.stages() as tell:
        tell("layer 0", 1, 1)
        tell("layer 1", 1, 2, "samples")
        tell("layer 1", 2, 2)
    assert "layer 1" in terminal.getvalue() and "2/2" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
