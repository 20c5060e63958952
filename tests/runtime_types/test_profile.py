"""Profiles: what is refused, and that the message leads to the bad field."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
import yaml

from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec, Profile, check_fits, layer_numbers, to_profile

MODEL = {
    "family": "llava",
    "fingerprint": "ab" * 32,
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 128,
    "vocab": 99,
    "visual_tokens": 16,
}
PROFILE: dict[str, Any] = {
    "schema": 1,
    "name": "fastv+v-skip",
    "method": {"name": "fastv+v-skip", "parameters": {"keep": 4}},
    "model": MODEL,
    "decisions": {
        "select": [{"layer": 2, "keep": 4, "by": {"rule": "last_row_attention", "attention": "previous"}}],
        "layers": [{"layers": [1, 3], "query": "none"}],
    },
    "calibration": {
        "data": "demo",
        "samples": 20,
        "seed": 0,
        "curves": {"vig": [0.5, 1.25e-4, None, 0.0]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """PROFILE with `value` at a dotted path; list positions are numbers."""
    data = copy.deepcopy(PROFILE)
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    return data


def test_yaml_and_json_round_trip() -> None:
    profile = to_profile(yaml.safe_load(yaml.safe_dump(PROFILE)), source="a.yaml")
    assert profile.calibration and profile.calibration.curves["vig"] == (0.5, 1.25e-4, None, 0.0)
    again = to_profile(yaml.safe_load(yaml.safe_dump(msgspec.to_builtins(profile))), source="b.yaml")
    assert again == profile
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile
    assert again.digest == profile.digest


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("colour", 1, ["unknown field `colour`"]),
        ("decisions.select.0.kep", 4, ["unknown field `kep`", "$.decisions.select[0]"]),
        ("decisions.layers.0.querry", "none", ["unknown field `querry`", "$.decisions.layers[0]"]),
        ("decisions.layers.0.query", "some", ["'some'", "$.decisions.layers[0].query"]),
        ("decisions.select.0.by.attention", "mean", ["'mean'", "$.decisions.select[0].by.attention"]),
        ("decisions.select.0.by.rule", "by_hand", ["'by_hand'", "$.decisions.select[0].by.rule"]),
        ("decisions.select.0.keep", "4", ["`int`", "$.decisions.select[0].keep"]),
        ("decisions.exit", 2.5, ["`float`", "$.decisions.exit"]),
        ("schema", 2, ["2", "$.schema"]),
        ("name", "../x", ["name: '../x'", "lower-case"]),
        ("model.hidden", 0, ["model.hidden: 0", "$.model"]),
        ("model.kv_heads", 3, ["model.kv_heads: 3 does not divide 4"]),
        ("model", None, ["$.model"]),
    ],
)
def test_refused_with_the_path_of_the_bad_field(path: str, value: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        to_profile(changed(path, value), source="mine.yaml")
    message = str(error.value)
    assert message.startswith("mine.yaml: not a profile of schema 1: ")
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("data", [None, [], "profile", 3])
def test_not_a_mapping(data: Any) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: not a profile"):
        to_profile(data, source="mine.yaml")


def test_missing_required_field() -> None:
    data = {key: value for key, value in PROFILE.items() if key != "model"}
    with pytest.raises(UserError, match="missing required field `model`"):
        to_profile(data, source="mine.yaml")


@pytest.mark.parametrize("field", [field for field in MODEL if field != "family"])
def test_refused_for_another_model(field: str) -> None:
    other = "cd" * 32 if field == "fingerprint" else MODEL[field] * 2
    profile = to_profile(PROFILE, source="a.yaml")
    with pytest.raises(UserError) as error:
        check_fits(profile, ModelSpec(**{**MODEL, field: other}))
    assert f"model.{field} is {MODEL[field]}, but this model has {other}" in str(error.value)
    assert "trimvlm calibrate" in str(error.value)


def test_published_layer_lists_fit_every_checkpoint_of_the_geometry() -> None:
    profile = to_profile(changed("model.fingerprint", None), source="a.yaml")
    check_fits(profile, ModelSpec(**MODEL))
    with pytest.raises(UserError, match=r"model\.layers"):
        check_fits(profile, ModelSpec(**{**MODEL, "layers": 5}))


def test_digest_changes_with_any_decision() -> None:
    digests = {
        to_profile(changed(path, value), source="a.yaml").digest
        for path, value in [
            ("name", "other"),
            ("decisions.exit", 3),
            ("decisions.positions", "compact"),
            ("decisions.select.0.keep", 5),
            ("calibration.seed", 1),
            ("method.parameters.keep", 5),
            ("schema", 1),
        ]
    }
    assert len(digests) == 7


def test_values_cannot_be_changed() -> None:
    profile = to_profile(PROFILE, source="a.yaml")
    with pytest.raises(AttributeError, match="immutable"):
        profile.decisions.exit = 1  # type: ignore[misc]


def test_layer_numbers_for_people() -> None:
    assert layer_numbers([5, 0, 3, 4]) == "0, 3-5"
    assert layer_numbers([]) == ""
