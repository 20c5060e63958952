"""From a library that refuses empty tensors to an answer: what the error says, export, build, run, check."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_models import noise_image, tiny_bundle

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.opening import on_cpu
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention, ValueInfluence
from trimvlm.session import Session
from trimvlm.target import Target
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_tools.cli import main

# Ranks by two rules, hides cached rows by a threshold, and has layers without visual rows.
DECISIONS = Decisions(
    exit=3,
    select=(
        Select(layer=1, keep=8, by=LastRowAttention(attention="own")),
        Select(layer=2, keep=5, by=ValueInfluence(threshold=0.05)),
    ),
)
NAME = "rows"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported without the decoder in question, which the command in the error then adds."""
    bundle = tiny_bundle(tmp_path_factory.mktemp("filled"), {NAME: DECISIONS}, layers=4)
    with pytest.raises(UserError, match="has no fused decoder without empty tensors") as raised:
        build(bundle, unfilled("ort-cpu"))
    command = shlex.split(str(raised.value).partition("add it on the workstation with ")[2])
    assert command[:2] == ["trimvlm", "export"]
    assert main(command[1:]) == 0
    return bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def unfilled(target: str, **changes: object) -> Target:
    return msgspec.structs.replace(targets.load(target), empty_tensors=False, **changes)


def test_the_bundle_has_both_decoders_and_runs_the_ordinary_one_until_told(bundle: Path) -> None:
    decoders = Bundle(bundle).manifest.profiles[NAME].decoders
    assert set(decoders) == {"fused", "in_place", "primitive", "fused.filled", "primitive.filled"}
    with Session.open(bundle) as session:
        ports = session._runner.backends[NAME].inputs("decoder")
    assert "visual_positions" in ports


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
def test_the_same_answers(bundle: Path, lowering: str) -> None:
    build(bundle, unfilled("ort-cpu", name="no-empties", lowering=lowering))
    image = noise_image(1)
    with Session.open(bundle) as theirs, Session.open(bundle, target="no-empties") as ours:
        assert "filled_positions" in ours._runner.backends[NAME].inputs("decoder")
        for images in ([image], [image, noise_image(2)], []):
            wanted = list(theirs.generate("w1 w2", images, max_new_tokens=12))
            assert list(ours.generate("w1 w2", images, max_new_tokens=12)) == wanted
        prompt, visual = ours.prompt("w3", 1), ours.vision([image])
        forced = [np.arange(3, 11), np.arange(4, 9)]
        first, second = (session.prefill(prompt, visual, forced) for session in (ours, theirs))
        assert first["selected.1"].tolist() == [4, 5, 6, 7, 8]
        for one, other in ((first, second), (ours.step(9, first), theirs.step(9, second))):
            assert set(one) == set(other)
            for name, array in other.items():
                assert one[name].shape == array.shape, name
                np.testing.assert_allclose(one[name], array, atol=1e-5, err_msg=name)


def test_one_flag_and_the_parity_ladder(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["build", str(bundle), "--no-empty-tensors"]) == 0
    assert f"{NAME}.decoder.fused.filled.onnx" in capsys.readouterr().out
    noise_image(0).save(tmp_path / "0.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "0.png", "question": "where is w0 ?"}))
    check = ["check", str(bundle), "--data", str(tmp_path), "--samples", "1", "--json"]
    assert main([*check, "--write-goldens"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert {"reference -> graph, free running", "reference -> graph, forced indices"} <= {
        rung["name"] for rung in report["rungs"] if not rung["skipped"]
    }
    assert Bundle(bundle).manifest.profiles[NAME].engines["ort-cpu"].graphs["decoder"].endswith("filled.onnx")
    assert main(["check", str(bundle), "--goldens"]) == 0
    assert main(["build", str(bundle)]) == 0
    entry = Bundle(bundle).manifest.profiles[NAME]
    assert entry.decoders[on_cpu(entry)] in capsys.readouterr().out


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
def test_tensorrt_rtx_builds_it_without_a_shape_of_no_rows(bundle: Path, lowering: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(bundle, unfilled("rtx-4090", lowering=lowering))
    ranges = engine.options["decoder"]["ranges"]
    assert "filled_positions" in ranges and "forced.0" in ranges and "past_visible.1" in ranges
    assert all(size >= 1 for sizes in ranges.values() for shape in sizes for size in shape)
    assert engine.measured["decoder_bytes"] > 0
    assert main(["verify", str(bundle)]) == 0
