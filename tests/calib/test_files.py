"""Profiles as YAML: what is written can be read by people and by us; what is wrong is named."""

from __future__ import annotations

import pytest

from trimvlm.errors import UserError
from trimvlm.profile import Calibration, Decisions, LayerRule, Method, ModelSpec, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm_calib.files import load_profile, save_profile

MODEL = ModelSpec(
    family="llava",
    fingerprint="ab" * 32,
    layers=12,
    hidden=192,
    heads=6,
    kv_heads=6,
    head_dim=32,
    ffn=384,
    vocab=96,
    visual_tokens=196,
)
FULL = Profile(
    name="fastv+v-skip",
    method=Method(name="fastv+v-skip", parameters={"fastv": {"layer": 2, "keep": 0.5}, "v-skip": {}}),
    model=MODEL,
    decisions=Decisions(
        exit=9,
        select=(Select(layer=2, keep=98, by=LastRowAttention(attention="previous")),),
        layers=(LayerRule(layers=(0, 4, 6), query="none"), LayerRule(layers=(7,), execute="none")),
        positions="compact",
    ),
    calibration=Calibration(data="mine", samples=20, seed=7, curves={"vig": (None, 1.5e-05, 0.25)}),
    needs_adapted_weights=True,
    notes="Größe: two lines\nof notes",
)


@pytest.mark.parametrize("profile", [FULL, Profile(name="d", method=Method(name="dense"), model=MODEL)])
def test_what_is_written_is_read(tmp_path, profile):
    path = tmp_path / "a.yaml"
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert load_profile(path).digest == profile.digest


def test_the_file_is_for_people(tmp_path):
    path = tmp_path / "a.yaml"
    save_profile(FULL, path)
    text = path.read_text("utf-8")
    assert text.startswith("schema: 1\nname: fastv+v-skip\n")
    assert "layers: [0, 4, 6]" in text
    assert "vig: [null, 1.5e-05, 0.25]" in text
    assert "inject" not in text  # at its default
    assert "rule: last_row_attention" in text


def test_nothing_half_written(tmp_path):
    path = tmp_path / "a.yaml"
    save_profile(FULL, path)
    save_profile(FULL, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("exit: 9", "exti: 9", r"exti.*\$\.decisions"),
        ("exit: 9", "exit: nine", r"\$\.decisions\.exit"),
        ("keep: 98", "keep: 98\n      kept: 3", r"kept.*\$\.decisions\.select\[0\]"),
        ("attention: previous", "attention: next", r"next.*\$\.decisions\.select\[0\]\.by\.attention"),
        ("rule: last_row_attention", "rule: magic", r"magic.*\$\.decisions\.select\[0\]\.by\.rule"),
        ("exit: 9", "exit: 9\n  exit: 10", "exit is said twice.*line"),
        ("exit: 9", "exit: [9", "not YAML.*line"),
        ("schema: 1", "schema: 2", r"\$\.schema"),
        ("heads: 6", "heads: 0", "model.heads: 0"),
    ],
)
def test_errors_name_file_and_field(tmp_path, old, new, message):
    path = tmp_path / "bad.yaml"
    save_profile(FULL, path)
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(UserError, match=rf"bad\.yaml.*{message}") as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match=r"empty\.yaml: not a profile"):
        load_profile(tmp_path / "empty.yaml")
