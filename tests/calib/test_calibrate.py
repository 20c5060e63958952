"""From a checkpoint and a folder of samples to a Profile, for every method."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from msgspec import structs
from tiny_models import noise_image, tiny_llava

from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm_calib.calibrate import calibrate, calibrate_all
from trimvlm_calib.calibrated import save_calibrated
from trimvlm_calib.files import load_profile, save_profile
from trimvlm_calib.methods import discover
from trimvlm_calib.partial import discard
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
    made = calibrate_all(
        checkpoint, method, samples, PARAMETERS.get(method), data_name="noise", count=2, seed=1
    )
    spec, profile = model_spec(checkpoint), made.profiles[0]
    assert profile.method.name == method
    assert profile.model == spec
    schedule = Schedule.resolve(profile, spec)
    assert (schedule.mean_visual_tokens == 16) == (method in ALL_TOKENS)
    assert profile.needs_adapted_weights == (method == "hidivdrop")
    if method in UNMEASURED:
        assert profile.calibration is None
    else:
        measured = profile.calibration
        assert (measured.data, measured.samples, measured.seed) == ("noise", 2, 1)
        assert {len(curve) for curve in measured.curves.values()} == {8}
    files = save_calibrated(made, tmp_path / f"{method}.yaml")
    assert [load_profile(file) for file in files] == list(made.profiles)
    assert [file.stem for file in files] == [profile.name for profile in made.profiles]


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


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("method", ["v-skip", "fastv+shortv", "hidivdrop"])
def test_a_killed_calibration_ends_in_the_same_bytes(tmp_path, checkpoint, samples, method):
    """Killed again and again, at every third measurement: none is made twice."""
    output = tmp_path / "p.yaml"
    measured = []

    def run(progress=None, output=None):
        return calibrate(
            checkpoint, method, samples, PARAMETERS.get(method), data_name="noise", count=2, seed=3,
            progress=progress, output=output,
        )  # fmt: skip

    def killing():
        calls = []

        def progress(what, done, total):
            measured.append((what, done))
            calls.append(done)
            if len(calls) == 3:
                raise KilledError

        return progress

    profile = None
    while profile is None:
        with contextlib.suppress(KilledError):
            profile = run(killing(), output)
    save_profile(profile, output)
    whole = []
    save_profile(run(lambda what, done, total: whole.append((what, done))), tmp_path / "whole.yaml")
    assert output.read_bytes() == (tmp_path / "whole.yaml").read_bytes()
    assert sorted(measured) == sorted(whole)
    assert len(whole) > 12
    assert (tmp_path / "p.yaml.partial").is_file()  # the profile must be on disk before it goes
    discard(output)
    assert not (tmp_path / "p.yaml.partial").exists()


def test_what_was_measured_serves_other_parameters(tmp_path, checkpoint, samples):
    output, calls = tmp_path / "p.yaml", []
    settings = {"data_name": "noise", "count": 1, "output": output}
    with pytest.raises(UserError, match="vtw: eta: at no layer"):
        calibrate(checkpoint, "vtw", samples, {"eta": 1e-12}, **settings)
    calibrate(checkpoint, "vtw", samples, {"eta": 1.0}, **settings, progress=lambda *call: calls.append(call))
    assert calls == []
    with pytest.raises(UserError, match=r"partial: of an unfinished run with method vtw, but this"):
        calibrate(checkpoint, "v-skip", samples, **settings)
    with pytest.raises(UserError, match=r"partial: of an unfinished run with seed 0, but this run has 4"):
        calibrate(checkpoint, "vtw", samples, **settings, seed=4)


def test_a_task_is_recorded(checkpoint, samples):
    named = [structs.replace(sample, task="ab"[number % 2]) for number, sample in enumerate(samples)]
    profile = calibrate(checkpoint, "v-skip", named, data_name="noise", task="b")
    assert (profile.calibration.data, profile.calibration.samples) == ("noise, task b", 3)
    alone = calibrate(checkpoint, "v-skip", named[1::2], data_name="noise")
    assert profile.calibration.curves == alone.calibration.curves


def test_two_processes_write_the_bytes_of_one(tmp_path, checkpoint, samples):
    """5 samples for 2 processes, through the command line; they leave nothing else behind."""
    (tmp_path / "two").mkdir()
    output = tmp_path / "two" / "p.yaml"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "trimvlm_tools", "calibrate", str(checkpoint), "--method", "v-skip", "--json"]
    data = ["--data", str(samples[0].image.parent), "--samples", "5", "--out", str(output)]
    done = subprocess.run(
        [*launcher, *command, *data],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "p"  # said once
    assert {path.name for path in output.parent.iterdir()} == {"p.yaml", "p.svg"}
    data_name = samples[0].image.parent.name
    one = calibrate(checkpoint, "v-skip", samples, data_name=data_name, count=5, name="p")
    save_profile(one, tmp_path / "one.yaml")
    assert output.read_bytes() == (tmp_path / "one.yaml").read_bytes()


def test_too_few_samples(checkpoint, samples):
    with pytest.raises(UserError, match="7 samples asked for, there are 6"):
        calibrate(checkpoint, "v-skip", samples, data_name="noise", count=7)
    assert calibrate(checkpoint, "v-skip", samples[:2], data_name="noise").calibration.samples == 2


def test_decisions_that_cannot_be_united_are_refused(checkpoint, samples):
    early = {"vtw.exit": 0.25, "fastv.layer": 2}
    with pytest.raises(UserError, match="layer 2: select: visual rows are live in layers"):
        calibrate(checkpoint, "vtw+fastv", samples, early, data_name="noise", count=1)


def test_errors_come_before_the_work_and_name_the_method(tmp_path, checkpoint, samples):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match="name: 'My Profile' cannot name files"):
        calibrate(nowhere, "v-skip", samples, data_name="noise", name="My Profile")
    with pytest.raises(UserError, match="no model here"):
        calibrate(nowhere, "v-skip", samples, data_name="noise")
    with pytest.raises(UserError, match="vtw: eta: at no layer"):
        calibrate(checkpoint, "vtw", samples, {"eta": 1e-12}, data_name="noise", count=1)
