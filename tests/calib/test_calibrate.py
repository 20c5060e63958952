"""From a checkpoint and a folder of samples to a Profile, for every method."""

from __future__ import annotations

import json

import pytest
from tiny_models import noise_image, tiny_llava

from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm_calib.calibrate import calibrate
from trimvlm_calib.files import load_profile, save_profile
from trimvlm_calib.methods import discover
from trimvlm_calib.samples import load_samples
from trimvlm_export.checkpoint import model_spec

# A random model has no layer where vision can leave for free.
PARAMETERS = {"vtw": {"eta": 1.0}, "hidivdrop": {"eta": 0.25}}
ALL_TOKENS = {"dense", "v-skip", "shortv", "asl-skip", "shortgpt", "magnitude", "random-layers"}
UNMEASURED = {name for name, method in discover().items() if not method.SAMPLES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("model"), layers=8, kv_heads=2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(6):
        noise_image(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"what is w{number} ?"}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return load_samples(folder)


@pytest.mark.parametrize("method", [*discover(), "fastv+v-skip"])
def test_every_method_gives_a_profile_that_fits(tmp_path, checkpoint, samples, method):
    profile = calibrate(
        checkpoint, method, samples, PARAMETERS.get(method), data_name="noise", count=2, seed=1
    )
    spec = model_spec(checkpoint)
    assert profile.name == profile.method.name == method
    assert profile.model == spec
    schedule = Schedule.resolve(profile, spec)
    assert (schedule.mean_visual_tokens == 16) == (method in ALL_TOKENS)
    assert profile.needs_adapted_weights == (method == "hidivdrop")
    if method in UNMEASURED:
        assert profile.calibration is None
    else:
        made = profile.calibration
        assert (made.data, made.samples, made.seed) == ("noise", 2, 1)
        assert {len(curve) for curve in made.curves.values()} == {8}
    save_profile(profile, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == profile


def test_parameters_are_recorded_with_their_defaults(checkpoint, samples):
    single = calibrate(checkpoint, "fastv", samples, {"layer": "3"}, data_name="noise", count=1, name="mine")
    assert single.name == "mine"
    assert single.method.parameters == {"layer": 3, "keep": 0.5}
    both = calibrate(checkpoint, "fastv+v-skip", samples, {"v-skip.share": 0.25}, data_name="noise", count=1)
    assert both.method.parameters == {
        "fastv": {"layer": 2, "keep": 0.5},
        "v-skip": {"share": 0.25, "skip": "attention", "identify": "vig", "seed": 0},
    }
    assert set(both.calibration.curves) == {"kl_select", "vig"}
    assert len(both.decisions.layers[0].layers) == 2


def test_calibration_is_deterministic(checkpoint, samples):
    first, second, other = (
        calibrate(checkpoint, "v-skip", samples, data_name="noise", count=3, seed=seed) for seed in (5, 5, 6)
    )
    assert first == second
    assert first.calibration.curves != other.calibration.curves


def test_too_few_samples(checkpoint, samples):
    with pytest.raises(UserError, match="7 samples asked for, there are 6"):
        calibrate(checkpoint, "v-skip", samples, data_name="noise", count=7)
    assert calibrate(checkpoint, "v-skip", samples[:2], data_name="noise").calibration.samples == 2


def test_decisions_that_cannot_be_united_are_refused(checkpoint, samples):
    with pytest.raises(UserError, match=r"layer \d: query: none has no effect"):
        calibrate(
            checkpoint, "vtw+v-skip", samples, {"vtw.eta": 100, "v-skip.share": 1}, data_name="noise", count=1
        )


def test_errors_come_before_the_work_and_name_the_method(tmp_path, checkpoint, samples):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match="name: 'My Profile' cannot name files"):
        calibrate(nowhere, "v-skip", samples, data_name="noise", name="My Profile")
    with pytest.raises(UserError, match="no model here"):
        calibrate(nowhere, "v-skip", samples, data_name="noise")
    with pytest.raises(UserError, match="vtw: eta: at no layer"):
        calibrate(checkpoint, "vtw", samples, {"eta": 1e-12}, data_name="noise", count=1)
