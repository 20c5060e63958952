"""A killed calibration goes on where it stopped, and several processes share the work."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import pytest
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm_calib.distributed import Team
from trimvlm_calib.partial import Partial, discard, key_of
from trimvlm_calib.probe import Probe
from trimvlm_export.checkpoint import model_spec

BYPASS = {layer: Decisions(layers=(LayerRule(layers=(layer,), query="none"),)) for layer in range(4)}
BOUND = {"model": "ab12", "method": "v-skip", "samples": 20, "seed": 0}


def test_figures_come_back_exactly(tmp_path):
    output = tmp_path / "a+b.yaml"
    figures = (0.1 + 0.2, 1e-300, -0.0, math.pi, math.inf)
    first = Partial(output, BOUND)
    first.put("k", 3, "VIG 1", figures)
    first.put("k", 4, "VIG 1", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["a+b.yaml.partial"]
    again = Partial(output, BOUND)
    assert again.get("k", 3) == figures
    assert again.get("k", 5) is again.get("l", 3) is None
    assert json.loads((tmp_path / "a+b.yaml.partial").read_text().splitlines()[0]) == BOUND
    discard(output)
    assert list(tmp_path.iterdir()) == []
    assert Partial(output, BOUND).get("k", 3) is None


def test_a_line_that_was_cut_short_is_dropped_at_every_byte(tmp_path):
    output = tmp_path / "p.yaml"
    file = tmp_path / "p.yaml.partial"
    partial = Partial(output, BOUND)
    start = file.stat().st_size
    partial.put("k", 0, "VIG 0", [1.5])
    middle = file.stat().st_size
    partial.put("k", 1, "VIG 0", [2.5])
    whole = file.read_bytes()
    for size in range(start, len(whole)):
        file.write_bytes(whole[:size])
        resumed = Partial(output, BOUND)
        assert resumed.get("k", 0) == ((1.5,) if size >= middle else None)
        assert resumed.get("k", 1) is None
        resumed.put("k", 2, "VIG 0", [3.5])
        assert Partial(output, BOUND).get("k", 2) == (3.5,)


@pytest.mark.parametrize("field", BOUND)
def test_a_foreign_file_is_refused_and_kept(tmp_path, field):
    output = tmp_path / "p.yaml"
    Partial(output, BOUND).put("k", 0, "VIG 0", [1.5])
    with pytest.raises(UserError, match=rf"p\.yaml\.partial: .*{field} {BOUND[field]}, but this run has z"):
        Partial(output, {**BOUND, field: "z"})
    assert Partial(output, BOUND).get("k", 0) == (1.5,)


@pytest.mark.parametrize("text", ["[1]\n", "{}\n[]\n", "no JSON\n", '{}\n{"key": 1}\n'])
def test_another_kind_of_file_is_refused(tmp_path, text):
    (tmp_path / "p.yaml.partial").write_text(text)
    with pytest.raises(UserError, match=r"p\.yaml\.partial: "):
        Partial(tmp_path / "p.yaml", BOUND)
    assert (tmp_path / "p.yaml.partial").read_text() == text


def test_each_process_writes_its_own_file_and_reads_all(tmp_path):
    output = tmp_path / "p.yaml"
    for rank in range(12):
        Partial(output, BOUND, rank).put("k", rank, "VIG 0", [rank])
    assert [Partial(output, BOUND).get("k", rank) for rank in range(12)] == [(rank,) for rank in range(12)]
    discard(output)
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_decisions_apart():
    keys = {key_of("distance", "full||pruned", each) for each in BYPASS.values()}
    keys.add(key_of("distance", "pruned||full", BYPASS[0]))
    assert len(keys) == 5
    again = Decisions(layers=(LayerRule(layers=(0,), query="none"),))
    assert key_of("distance", "full||pruned", again) in keys


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("partial"), kv_heads=2, seed=5)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, model_spec(path), [tiny_inputs(path, seed=number) for number in range(3)]


class KilledError(Exception):
    """Stands for a kill."""


def sweep(case, **kwargs):
    return Probe(*case, **kwargs).sweep("VIG", BYPASS, "full||pruned")


@pytest.mark.parametrize("measured", [1, 4, 6, 11])
def test_what_was_measured_before_a_kill_is_not_measured_again(case, tmp_path, measured):
    """6: in the middle of the second sample."""

    def kill(what, done, total):
        if done == measured:
            raise KilledError

    with pytest.raises(KilledError):
        sweep(case, progress=kill, partial=Partial(tmp_path / "p"))
    calls = []
    again = sweep(case, progress=lambda *call: calls.append(call), partial=Partial(tmp_path / "p"))
    assert again == sweep(case)
    assert calls == [("VIG", done, 12) for done in range(measured + 1, 13)]


def test_views_are_kept_too_and_belong_to_their_parameters(case, tmp_path):
    seen = []

    def view(run, inputs):
        seen.append(inputs)
        return run.logits[:3]

    for scope, runs in (("a", 3), ("a", 3), ("b", 6)):
        probe = Probe(*case, partial=Partial(tmp_path / "p"))
        probe.scope = scope
        figures = probe.measure("logits", Decisions(), view)
        assert len(seen) == runs
        wanted = [run.logits[:3] for run in Probe(*case).runs(Decisions(), "")]
        np.testing.assert_array_equal(figures, np.array(wanted, np.float64))


def test_a_team_measures_each_sample_once(case):
    """Two processes played one after the other: the first one goes on with the second one's figures."""
    parts: list[dict] = []

    class Recorded(Team, frozen=True):
        def gather(self, mine):
            parts.append(dict(mine))
            return {key: value for part in parts for key, value in part.items()}

    with contextlib.suppress(KeyError):  # the first one's are not there yet
        sweep(case, team=Recorded(rank=1, size=2))
    assert sweep(case, team=Recorded(rank=0, size=2)) == sweep(case)
    assert [sorted({sample for _, sample in part}) for part in parts] == [[1], [0, 2]]
