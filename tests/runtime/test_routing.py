"""Routing on the device: which profile runs, and that the router runs only where something depends on it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimvlm.accounting import router_flops
from trimvlm.backends import Port
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, ModelSpec, Profile
from trimvlm.router_spec import Choice, RouterSpec
from trimvlm.routing import choose, make_pick
from trimvlm.schedule import resolve
from trimvlm.text import Prompt
from trimvlm.timings import Timings

SPEC = RouterSpec(weights="par.router.safetensors", sha256="0" * 64, width=8, heads=2, first=2)
MODEL = ModelSpec(
    family="llava", layers=4, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=16, visual_tokens=6
)
PROMPT = Prompt(
    input_ids=np.array([1, 2, 3]), text_positions=np.array([0, 7, 8]), visual_positions=np.arange(1, 7)
)
CHOICE = Choice(router=SPEC.stem, members={"a": (2,), "b": (3,)})


class Backend:
    """A router that scores layers as told, and a decoder that may take token scores."""

    def __init__(self, takes_scores: bool, layers: tuple[float, ...] = (), dtype: str = "float32") -> None:
        self.takes_scores, self.layers, self.dtype = takes_scores, layers, dtype
        self.runs: list[dict[str, np.ndarray]] = []

    def inputs(self, role: str) -> dict[str, Port]:
        if role == "router":
            return {"visual": Port(np.dtype(self.dtype), (None, 8))}
        return {"router_scores": Port(np.dtype("float32"), (None,))} if self.takes_scores else {}

    def run(self, role: str, feeds, fetch, keep=()):
        assert (role, fetch) == ("router", ["router_scores", "layer_scores"])
        self.runs.append(feeds)
        return {
            "router_scores": feeds["visual"].sum(axis=1).astype(np.float32),
            "layer_scores": np.array(self.layers, np.float32),
        }


def picked(backends: dict[str, Backend], choice: Choice | None = None):
    timings = Timings(select=1.0)
    visual = np.arange(48, dtype=np.float32).reshape(6, 8)
    found = make_pick(backends, choice, MODEL.layers)(PROMPT, visual, timings)  # type: ignore[arg-type]
    return found, timings, visual


def test_the_router_runs_only_where_something_depends_on_it() -> None:
    alone = Backend(takes_scores=False)
    found, timings, _ = picked({"a": alone})
    assert (found.profile, found.router_scores, alone.runs, timings.select) == ("a", None, [], 1.0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_token_scores_go_to_a_decoder_that_ranks_by_them(dtype: str) -> None:
    alone = Backend(takes_scores=True, dtype=dtype)
    found, timings, visual = picked({"a": alone})
    assert found.profile == "a"
    assert found.router_scores is not None
    assert found.router_scores.tolist() == visual.sum(axis=1).tolist()
    (feeds,) = alone.runs
    assert feeds["visual"].dtype == dtype
    assert feeds["input_ids"] is PROMPT.input_ids
    assert timings.select is not None and timings.select > 1.0  # added to the encoder stage's


@pytest.mark.parametrize(("layers", "wanted"), [((1.0, 0.5), "a"), ((0.5, 1.0), "b"), ((1.0, 1.0), "a")])
def test_a_choice_runs_the_first_router_and_one_of_its_decoders(layers, wanted: str) -> None:
    backends = {"a": Backend(False, layers), "b": Backend(True)}
    found, _, _ = picked(backends, CHOICE)
    assert found.profile == wanted
    assert (found.router_scores is not None) == (wanted == "b")
    assert (len(backends["a"].runs), len(backends["b"].runs)) == (1, 0)


@given(st.data())
def test_choose_is_the_likeliest_product_of_independent_choices(data: st.DataObject) -> None:
    """Against probabilities: executed layers with sigmoid(z), the others with 1 - sigmoid(z)."""
    layers, scored = 7, data.draw(st.integers(1, 5))
    odds = st.floats(-4, 4, width=32).map(lambda value: round(value, 2))
    scores_R = np.array(data.draw(st.lists(odds, min_size=scored, max_size=scored)), np.float32)
    candidates = st.sets(st.integers(layers - scored, layers - 1)).map(lambda chosen: tuple(sorted(chosen)))
    sets = data.draw(st.lists(candidates, min_size=1, max_size=4, unique=True))
    members = {f"m{number}": chosen for number, chosen in enumerate(sets)}
    keep_R = 1 / (1 + np.exp(-scores_R.astype(np.float64)))

    def probability(chosen: tuple[int, ...]) -> float:
        executed = np.isin(np.arange(layers - scored, layers), chosen)
        return float(np.prod(np.where(executed, keep_R, 1 - keep_R)))

    best = max(probability(chosen) for chosen in sets)
    assert probability(members[choose(scores_R, members, layers)]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "../par.safetensors"}, "is not the name of a file beside the profile"),
        ({"weights": ""}, "is not the name of a file beside the profile"),
        ({"width": 9}, "does not make 2 heads of an even number of channels"),
        ({"width": 6}, "does not make 2 heads of an even number of channels"),
        ({"first": -1}, "is not a layer"),
    ],
)
def test_a_router_that_cannot_be(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        msgspec.structs.replace(SPEC, **changes)


def test_files_in_a_bundle_are_named_by_what_decides_them() -> None:
    same = msgspec.structs.replace(SPEC, weights="renamed.safetensors")
    assert same.stem == SPEC.stem
    for changes in ({"sha256": "1" * 64}, {"heads": 1}, {"first": 3}, {"mask": "causal"}, {"width": 12}):
        assert msgspec.structs.replace(SPEC, **changes).stem != SPEC.stem


def test_what_a_profile_refuses() -> None:
    def profile(**fields) -> Profile:
        return Profile(name="par-0", method=Method(name="par"), model=MODEL, **fields)

    assert profile(router=SPEC, choice="par").choice == "par"
    with pytest.raises(UserError, match=r"router.first: layer 4 is not within 0..3"):
        profile(router=msgspec.structs.replace(SPEC, first=4))
    for fields in ({"choice": "par"}, {"router": SPEC, "choice": "par-0"}):
        with pytest.raises(UserError, match="needs a router, and a name that no profile has"):
            profile(**fields)
    with pytest.raises(UserError, match="cannot name files"):
        profile(router=SPEC, choice="../par")


def test_cost_is_that_of_its_matrices() -> None:
    """Against every matrix product of `trimvlm_export.router`, written out."""
    schedule, text = resolve(Decisions(), MODEL), 5
    visual, layers, width, hidden = MODEL.visual_tokens, 2, SPEC.width, MODEL.hidden
    rows = visual + text + layers
    products = [
        (visual + text, hidden, width),
        *[(rows, width, width)] * 4,
        *[(rows, width // SPEC.heads, rows)] * SPEC.heads * 2,
        *[(rows, width, 4 * width)] * 3,
        (visual, width, 1),
        (layers, width, 1),
    ]
    assert router_flops(SPEC, schedule, text) == sum(2 * a * b * c for a, b, c in products)
    assert router_flops(None, schedule, text) == 0
