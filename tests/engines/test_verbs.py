"""`trimvlm build` and `trimvlm targets`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimvlm_engines import targets
from trimvlm_tools.cli import main


def test_targets_as_json_are_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [target["name"] for target in found] == [target.name for target in targets.shipped()]


def test_targets_as_a_list_say_what_was_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    header, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert header.split()[-3:] == ["built", "run", "measured"]
    assert sum("JetPack 6.2" in row for row in rows) == 6 and sum("JetPack 7.2" in row for row in rows) == 8
    done = {row.split()[0]: row.split()[-3:] for row in rows}
    assert done["rtx-4090"] == ["yes", "never", "never"]
    assert done["ort-cpu"] == ["-", "yes", "yes"]
    jetsons = [name for name in done if name.startswith("jetson-")]
    assert len(jetsons) == 14
    assert all(done[name] == ["never"] * 3 for name in jetsons)


def test_own_target_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = (targets.SHIPPED / "jetson-orin-nano-8gb.yaml").read_text()
    (tmp_path / "my-board.yaml").write_text(
        shipped.replace("jetson-orin-nano-8gb", "my-board").replace("tested: {}", "tested: {run: on my desk}")
    )
    assert main(["targets", str(tmp_path / "my-board.yaml"), "ort-cpu"]) == 0
    own, cpu = capsys.readouterr().out.split("\n\n")
    lines = dict(line.split(None, 1) for line in own.splitlines())
    assert lines.keys() > {"l4t", "ranges", "tflops", "dtypes", "limits.topk", "source"}
    assert lines["name"] == "my-board"
    assert lines["limits.lm_head_columns"] == "16384"
    assert lines["limits.allocation_mb"] == "256"
    assert (lines["tested.run"], lines["tested.measured"]) == ("on my desk", "never")
    assert dict(line.split(None, 1) for line in cpu.splitlines())["provider"] == "CPUExecutionProvider"


def test_unknown_target_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "rtx4090"]) == 2
    assert capsys.readouterr().err.startswith("trimvlm targets: no target 'rtx4090'; did you mean rtx-4090?")


def test_build_without_a_profile_builds_all(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert report["engines"].keys() == manifest["profiles"].keys()
    for name, entry in manifest["profiles"].items():
        assert entry["engines"] == {"ort-cpu": report["engines"][name]}
    assert report["up_to_date"]["dense"] == {"vision": False, "decoder": False}
    assert report["up_to_date"]["vtw"] == {"vision": True, "decoder": False}


def test_build_of_one_profile_says_what_was_kept(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in ("built", "up to date"):
        assert main(["build", str(bundle), "--profile", "fastv"]) == 0
        first, _, vision, decoder = capsys.readouterr().out.splitlines()
        assert first.startswith("ort-cpu: any CPU, onnxruntime ")
        assert state in vision and state in decoder
        assert "fastv.decoder." in decoder


def test_plan_that_was_deleted_does_not_stop_the_build(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ["build", str(bundle), "--target", "rtx-4090"]
    assert main([*arguments, "--profile", "dense"]) == 0
    (bundle / "vision.rtx-4090.engine").unlink()
    capsys.readouterr()
    assert main([*arguments, "--profile", "dense"]) == 0
    vision = next(line for line in capsys.readouterr().out.splitlines() if " vision " in line)
    size = (bundle / "vision.rtx-4090.engine").stat().st_size
    assert "built" in vision and str(size) in vision
