"""Caches that grow in place against caches that are made anew, run by run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from shared_bundle import shared_bundle
from tiny_models import tiny_bundle, tiny_llava

from trimvlm import accounting
from trimvlm.backends import load_backend
from trimvlm.backends.caches import LAYERS, ROOM, Kept
from trimvlm.bundle import Bundle
from trimvlm.decoding import Decoder, prefill_inputs, step_inputs
from trimvlm.opening import IN_PLACE_SINCE, on_cpu
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, TextAttention, ValueInfluence
from trimvlm.schedule import Schedule
from trimvlm.target import numbers
from trimvlm.text import Prompt
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
DECISIONS = {
    "dense": Decisions(),
    "late": Decisions(inject=1, exit=4, select=(Select(layer=2, keep=7, by=OWN),)),
    "ranked": Decisions(select=(Select(layer=2, keep=8, by=PREVIOUS),)),
    "rated": Decisions(
        select=(Select(layer=1, keep=9, by=TextAttention()), Select(layer=3, keep=5, by=ValueInfluence()))
    ),
    "uncached": Decisions(
        layers=(
            LayerRule(layers=(0,), visual_keys="none"),
            LayerRule(layers=(1,), text_keys="none"),
            LayerRule(layers=(2, 3), cache="none"),
            LayerRule(layers=(4,), query="none"),
        )
    ),
    "blind": Decisions(
        mask="post_softmax",
        layers=(
            LayerRule(layers=(1,), text_keys="none"),
            LayerRule(layers=(2,), text_keys="sink", visual_keys="none"),
            LayerRule(layers=(3,), text_keys="none", cache="none"),
        ),
    ),
    "lost": Decisions(
        mask="post_softmax",
        layers=(
            LayerRule(layers=(1,), visual_keys="none"),
            LayerRule(layers=(2,), text_keys="none", visual_keys="none"),
        ),
    ),
    "hidden": Decisions(
        mask="post_softmax",
        positions="compact",
        select=(Select(layer=2, keep=7, by=ValueInfluence(threshold=0.5)),),
        layers=(LayerRule(layers=(3,), text_keys="none"),),
    ),
    "skipped": Decisions(
        skip=SkipMode(stages=(SkipStage(layer=2, count=6),), entropy=False),
        layers=(LayerRule(layers=(2,), query="unskipped"), LayerRule(layers=(3,), ffn="unskipped")),
    ),
    "parts": Decisions(
        layers=(
            LayerRule(layers=(1,), sublayers="ffn"),
            LayerRule(layers=(2,), execute="decode"),
            LayerRule(layers=(3,), sublayers="attention"),
        )
    ),
}
# Caches are made anew in layers that lose weights after the softmax under a threshold, and in those that
# cache other rows than they read.
GROWING = {
    "dense": [0, 1, 2, 3, 4],
    "late": [0, 1, 2, 3, 4],
    "ranked": [0, 1, 2, 3, 4],
    "rated": [0, 1, 2, 3, 4],
    "uncached": [0, 1, 4],
    "blind": [0, 1, 2, 4],
    "lost": [0, 1, 2, 3, 4],
    "hidden": [0, 1, 2, 4],
    "skipped": [0, 1, 2, 3, 4],
    "parts": [0, 2, 3, 4],
}

CUT = ("dense", "late", "blind", "lost")  # those that are tried with attention in pieces, too

pytestmark = pytest.mark.skipif(
    numbers(onnxruntime.__version__) < IN_PLACE_SINCE, reason="this ONNX Runtime has no TensorScatter"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(shared_bundle(tmp_path_factory, DECISIONS, layers=5))


def prompt(bundle: Bundle, name: str, images: int) -> tuple[Prompt, np.ndarray]:
    """Rows of a prompt of 6 text rows with the images after the second."""
    model = bundle.manifest.profiles[name].model
    visual = images * model.visual_tokens
    positions, rng = np.arange(visual + 6), np.random.default_rng(images)
    rows = Prompt(
        input_ids=rng.integers(5, 60, 6),
        text_positions=np.delete(positions, slice(2, 2 + visual)),
        visual_positions=positions[2 : 2 + visual],
    )
    return rows, rng.standard_normal((visual, model.hidden), dtype=np.float32)


def open_decoder(bundle: Bundle, name: str, lowering: Any) -> Any:
    decoders = bundle.manifest.profiles[name].decoders
    return load_backend("onnxruntime", {"decoder": bundle.path(decoders[lowering])}, {"threads": 1})


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", DECISIONS)
def test_every_step_is_as_with_caches_made_anew(bundle: Bundle, name: str, images: int) -> None:
    rows, visual = prompt(bundle, name, images)
    with open_decoder(bundle, name, "fused") as anew, open_decoder(bundle, name, "in_place") as backend:
        presents = [each for each in anew.outputs("decoder") if each.startswith("present_")]
        assert set(backend.outputs("decoder")) == set(anew.outputs("decoder"))
        assert set(backend.inputs("decoder")) == set(anew.inputs("decoder"))
        ours, theirs = Decoder(backend, ["logits"], presents), Decoder(anew, ["logits"], presents)
        ours_all, theirs_all = Decoder(backend, ["logits", *presents]), Decoder(anew, ["logits", *presents])
        kept, wanted = ours(prefill_inputs(rows, visual)), theirs(prefill_inputs(rows, visual))
        for number in range(2 * ROOM + 5):  # buffers grow three times
            np.testing.assert_allclose(kept["logits"], wanted["logits"], atol=2e-5)
            at = rows.length + number, 5 + number % 50
            kept, wanted = (
                run(step_inputs(at[1], at[0], before)) for run, before in ((ours, kept), (theirs, wanted))
            )
        end = rows.length + 2 * ROOM + 5
        found = ours_all(step_inputs(7, end, kept))
        for each, value in theirs_all(step_inputs(7, end, wanted)).items():
            np.testing.assert_allclose(found[each], value, atol=2e-5, err_msg=each)


@pytest.mark.parametrize("name", DECISIONS)
def test_an_image_after_a_token(bundle: Bundle, name: str) -> None:
    """A stage then ranks the new image's rows by caches that hold others."""
    rows, visual = prompt(bundle, name, 1)
    later = Prompt(
        input_ids=rows.input_ids + 1,
        text_positions=rows.text_positions + rows.length + 1,
        visual_positions=rows.visual_positions + rows.length + 1,
    )
    end = rows.length + 1 + later.length
    with open_decoder(bundle, name, "fused") as anew, open_decoder(bundle, name, "in_place") as backend:
        presents = [each for each in anew.outputs("decoder") if each.startswith("present_")]
        chosen = [each for each in anew.outputs("decoder") if each.startswith(("selected", "scores"))]
        answers: list[list[dict[str, Any]]] = []
        for run in (Decoder(each, ["logits", *chosen], presents) for each in (backend, anew)):
            answers.append(made := [run(prefill_inputs(rows, visual))])
            made.append(run(step_inputs(9, rows.length, made[-1])))
            past = {key: value for key, value in step_inputs(0, 0, made[-1]).items() if "past_" in key}
            made.append(run(prefill_inputs(later, visual[::-1].copy()) | past))
            made.append(run(step_inputs(11, end, made[-1])))
        for ours, theirs in zip(*answers, strict=True):
            for value in ("logits", *chosen):
                np.testing.assert_allclose(ours[value], theirs[value], atol=2e-5, err_msg=value)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with attention in pieces of 4 visual rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accounting, "PIECE_ROWS", 4)
        few = {name: DECISIONS[name] for name in CUT}
        return Bundle(tiny_bundle(tmp_path_factory.mktemp("cut"), few, layers=5))


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CUT)
def test_attention_in_pieces_is_attention(bundle: Bundle, cut: Bundle, name: str, images: int) -> None:
    rows, visual = prompt(bundle, name, images)
    with open_decoder(bundle, name, "fused") as whole, open_decoder(cut, name, "in_place") as pieces:
        presents = [each for each in whole.outputs("decoder") if each.startswith("present_")]
        runs = [Decoder(each, ["logits", *presents]) for each in (pieces, whole)]
        ours, theirs = (run(prefill_inputs(rows, visual)) for run in runs)
        for number in range(3):
            for each, value in theirs.items():
                np.testing.assert_allclose(ours[each], value, atol=2e-5, err_msg=each)
            ours, theirs = (
                run(step_inputs(9, rows.length + number, before))
                for run, before in zip(runs, (ours, theirs), strict=True)
            )


@pytest.mark.parametrize(
    ("name", "wanted", "again"),
    [("dense", [4, 4, 4, 4, 1], 0), ("blind", [4, 4, 4, 1, 1], 3), ("lost", [4, 4, 4, 4, 1], 1)],
)
def test_a_piece_makes_no_scores_of_later_visual_rows(
    cut: Bundle, name: str, wanted: list[int], again: int, tmp_path: Path
) -> None:
    """Queries and keys of every attention that ran, from ONNX Runtime's profile.

    Args:
        wanted: pieces of each layer; a layer whose cache does not grow in place is whole.
        again: layers with an attention for each kind of rows, one text row in both.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accounting, "PIECE_ROWS", 4)
        profile = cut.profile(name)
        schedule = Schedule.resolve(profile, profile.model)
        pieces = [accounting.attention_pieces(schedule, row) for row in schedule.rows]
        hidden = accounting.hidden_pairs(schedule)
    backend, (rows, visual) = open_decoder(cut, name, "in_place"), prompt(cut, name, 1)
    options = backend.options("decoder")
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    backend.options = lambda role: options
    with backend:
        Decoder(backend, ["logits"])(prefill_inputs(rows, visual))
        noted = json.loads(Path(backend.sessions["decoder"].end_profiling()).read_text())
    ran = [each["args"]["input_type_shape"] for each in noted if each["args"].get("op_name") == "Attention"]
    sizes = [(*each[0].values(), *each[1].values()) for each in ran]
    flops = [4 * heads * size * queries * keys[2] for (_, heads, queries, size), keys in sizes]
    every = rows.length * 4 * profile.model.heads * profile.model.head_dim
    assert pieces == wanted and len(flops) == sum(pieces) + again
    assert sum(flops) == 4 * every * rows.length + (1 + again) * every - sum(hidden)
    assert [each > 0 for each in hidden] == [each > 1 for each in pieces]


@pytest.mark.parametrize("name", DECISIONS)
def test_arrays_go_in_and_come_out(bundle: Bundle, name: str) -> None:
    """As `Session.prefill` and `Session.step` give and take them."""
    rows, visual = prompt(bundle, name, 1)
    with open_decoder(bundle, name, "fused") as anew, open_decoder(bundle, name, "in_place") as backend:
        runs = [Decoder(each, list(each.outputs("decoder"))) for each in (backend, anew)]
        ours, theirs = (run(prefill_inputs(rows, visual)) for run in runs)
        for number in range(3):
            assert set(ours) == set(theirs)
            for each, value in theirs.items():
                assert ours[each].shape == value.shape, each
                np.testing.assert_allclose(ours[each], value, atol=2e-5, err_msg=each)
            again = runs[0](step_inputs(9, rows.length + number, ours))  # arrays are not used up
            ours, theirs = (
                run(step_inputs(9, rows.length + number, before))
                for run, before in zip(runs, (ours, theirs), strict=True)
            )
            np.testing.assert_array_equal(again["logits"], ours["logits"])


def test_new_rows_are_written_where_the_old_ones_lie(bundle: Bundle) -> None:
    rows, visual = prompt(bundle, "dense", 1)
    with open_decoder(bundle, "dense", "in_place") as backend:
        presents = [each for each in backend.outputs("decoder") if each.startswith("present_")]
        decoder = Decoder(backend, ["logits"], presents)
        kept = decoder(prefill_inputs(rows, visual))
        caches = kept["present_caches"].caches
        assert caches.buffers["key.0"].shape[2] == rows.length  # no room for prefill to pass over
        kept = decoder(step_inputs(9, rows.length, kept))
        buffer = caches.buffers["key.0"]
        assert buffer.shape[2] == rows.length + ROOM
        before = buffer.copy()
        kept = decoder(step_inputs(11, rows.length + 1, kept))
        assert caches.buffers["key.0"] is buffer and caches.rows[0].tolist() == [rows.length + 2]
        written = np.flatnonzero((buffer != before).any(axis=(0, 1, 3)))
        assert written.tolist() == [rows.length + 1]


def test_the_next_conversation_gets_the_memory_of_the_last(bundle: Bundle) -> None:
    """Memory that was never touched costs time, and what was left in it must not be seen."""
    rows, visual = prompt(bundle, "dense", 2)
    short, fewer = prompt(bundle, "dense", 1)
    with open_decoder(bundle, "dense", "in_place") as backend:
        presents = [each for each in backend.outputs("decoder") if each.startswith("present_")]
        decoder = Decoder(backend, ["logits"], presents)
        fresh = [decoder(prefill_inputs(short, fewer))]
        fresh.append(decoder(step_inputs(9, short.length, fresh[0])))
        memory = fresh[1]["present_caches"].caches.memory["key.0"]
        long = decoder(prefill_inputs(rows, visual))
        other = long["present_caches"].caches.memory["key.0"]
        assert not np.shares_memory(memory, other), "the first conversation may still go on"
        other[:] = np.nan
        del long
        again = [decoder(prefill_inputs(short, fewer))]
        assert np.shares_memory(again[0]["present_caches"].caches.memory["key.0"], other)
        again.append(decoder(step_inputs(9, short.length, again[0])))
        for one, two in zip(fresh, again, strict=True):
            np.testing.assert_array_equal(one["logits"], two["logits"])


def test_what_was_kept_is_used_up_by_the_next_run(bundle: Bundle) -> None:
    rows, visual = prompt(bundle, "dense", 1)
    with open_decoder(bundle, "dense", "in_place") as backend:
        presents = [each for each in backend.outputs("decoder") if each.startswith("present_")]
        decoder = Decoder(backend, ["logits"], presents)
        kept = decoder(prefill_inputs(rows, visual))
        assert isinstance(kept["present_caches"], Kept)
        decoder(step_inputs(9, rows.length, kept))
        with pytest.raises(AssertionError, match="fed to another run before"):
            decoder(step_inputs(9, rows.length, kept))


@pytest.mark.parametrize("name", DECISIONS)
def test_which_layers_grow_in_place(bundle: Bundle, name: str) -> None:
    entry = bundle.manifest.profiles[name]
    assert on_cpu(entry) == "in_place"
    model = onnx.load(str(bundle.path(entry.decoders["in_place"])), load_external_data=False)
    told = {each.key: each.value for each in model.metadata_props}
    assert [int(layer) for layer in json.loads(told[LAYERS])["layers"]] == GROWING[name]
    names = {value.name for value in model.graph.input}
    assert {f"cache_key.{layer}" for layer in GROWING[name]} <= names
    schedule = Schedule.resolve(bundle.profile(name), entry.model)
    caching = {row.layer for row in schedule.rows if row.attends}
    assert {f"past_key.{layer}" for layer in caching - set(GROWING[name])} <= names


def test_an_older_library_gets_the_fused_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = bundle.manifest.profiles["dense"]
    monkeypatch.setattr("trimvlm.opening.version", lambda name: "1.24.4")
    assert on_cpu(entry) == "fused"


def test_graph_is_small(bundle: Bundle) -> None:
    """Weights stay where they are, as in the other lowerings."""
    files: dict[Any, str] = dict(bundle.manifest.profiles["dense"].decoders)
    sizes = {kind: Path(bundle.path(file)).stat().st_size for kind, file in files.items()}
    assert sizes["in_place"] < 1.5 * sizes["fused"]


@pytest.mark.parametrize("name", DECISIONS)
def test_branches_read_no_weights(bundle: Bundle, name: str) -> None:
    """Quantising finds products with weights outside of branches only."""
    file = bundle.path(bundle.manifest.profiles[name].decoders["in_place"])
    graph = onnx.load(str(file), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.external_data}
    branches = [each.g for node in graph.node for each in node.attribute if each.HasField("g")]
    assert weights and branches
    for node in (node for branch in branches for node in branch.node):
        assert weights.isdisjoint(node.input), node.name


# Layers whose rows after the prompt see all that is cached, in one operator: where caches grow in place and
# no stage reads the layer's queries, or keys before they are cached.
IN_ONE = {
    "dense": 5,
    "late": 4,
    "ranked": 4,
    "rated": 3,
    "uncached": 2,
    "blind": 4,
    "lost": 5,
    "hidden": 1,
    "skipped": 5,
    "parts": 4,
}


def counted(bundle: Bundle, name: str, operator: str, scratch: Path) -> list[int]:
    """How often an operator ran, by ONNX Runtime's profile, until the end of a prompt, of a token after it,
    and of several rows without an image after that; their logits are those of caches made anew."""
    backend, (rows, visual) = open_decoder(bundle, name, "in_place"), prompt(bundle, name, 1)
    anew = open_decoder(bundle, name, "fused")
    options = backend.options("decoder")
    options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
    backend.options = lambda role: options
    later = Prompt(
        input_ids=np.arange(5, 8),
        text_positions=np.arange(rows.length + 1, rows.length + 4),
        visual_positions=np.zeros(0, np.int64),
    )
    logits: dict[str, list[np.ndarray]] = {}
    with backend, anew:
        for each in (backend, anew):
            presents = [value for value in each.outputs("decoder") if value.startswith("present_")]
            run = Decoder(each, ["logits"], presents)  # what is kept has room after a token, arrays have none
            first = run(prefill_inputs(rows, visual))
            token = run(step_inputs(9, rows.length, first))
            past = {key: value for key, value in step_inputs(0, 0, token).items() if key.startswith("past_")}
            several = run(prefill_inputs(later, visual[:0]) | past)
            logits[str(each is anew)] = [first["logits"], token["logits"], several["logits"]]
        np.testing.assert_allclose(*logits.values(), atol=2e-5)
        noted = json.loads(Path(backend.sessions["decoder"].end_profiling()).read_text())
    ends = [each["ts"] + each["dur"] for each in noted if each["name"] == "model_run"]
    ran = [each for each in noted if each["args"].get("op_name") == operator]
    return [sum(each["ts"] < end for each in ran) for end in ends]


@pytest.mark.parametrize("name", DECISIONS)
def test_one_row_after_the_prompt_takes_one_operator(bundle: Bundle, name: str, tmp_path: Path) -> None:
    ran = counted(bundle, name, "GroupQueryAttention", tmp_path)
    assert ran == [0, IN_ONE[name], IN_ONE[name]], "and none of several rows"


@pytest.mark.parametrize("name", DECISIONS)
def test_a_prompt_of_one_row(bundle: Bundle, name: str) -> None:
    """Its one row takes the operator too, on caches that are empty."""
    model = bundle.manifest.profiles[name].model
    rows = Prompt(
        input_ids=np.array([7]), text_positions=np.array([0]), visual_positions=np.zeros(0, np.int64)
    )
    none = np.zeros((0, model.hidden), np.float32)
    with open_decoder(bundle, name, "fused") as anew, open_decoder(bundle, name, "in_place") as backend:
        runs = [Decoder(each, list(each.outputs("decoder"))) for each in (backend, anew)]
        ours, theirs = (run(prefill_inputs(rows, none)) for run in runs)
        for number in range(3):
            for each, value in theirs.items():
                np.testing.assert_allclose(ours[each], value, atol=2e-5, err_msg=each)
            ours, theirs = (
                run(step_inputs(9, 1 + number, before))
                for run, before in zip(runs, (ours, theirs), strict=True)
            )


@pytest.mark.parametrize("heads", [{"kv_heads": 2}, {"hidden": 80}])
def test_other_heads_keep_their_attention(heads: dict[str, int], tmp_path: Path) -> None:
    """Grouped ones, for which `GroupQueryAttention` is slower, and of sizes that it does not take."""
    checkpoint = tiny_llava(tmp_path / "model", layers=2, **heads)
    profile = Profile(
        name="dense", method=Method(name="dense"), model=model_spec(checkpoint), decisions=Decisions()
    )
    export(checkpoint, profile, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    file = bundle.path(bundle.entry("dense")[1].decoders["in_place"])
    model = onnx.load(str(file), load_external_data=False)
    assert {each.domain for each in model.opset_import} == {""}


RANKING = {"late": 1, "ranked": 1, "rated": 2, "hidden": 1}  # stages


@pytest.mark.parametrize("name", RANKING)
def test_a_run_without_visual_rows_ranks_none(bundle: Bundle, name: str, tmp_path: Path) -> None:
    prompts, *later = counted(bundle, name, "TopK", tmp_path)
    assert prompts == 2 * RANKING[name], "the best, and these in their order"
    assert later == [prompts, prompts]


@pytest.mark.parametrize("heads", [4, 2])
def test_one_row_reads_its_values_in_the_cache(heads: int, tmp_path: Path) -> None:
    """Of several rows, each kind that loses weights is given values of its own, and text rows keys too."""
    checkpoint = tiny_llava(tmp_path / "model", layers=5, kv_heads=heads)
    profile = Profile(
        name="blind", method=Method(name="blind"), model=model_spec(checkpoint), decisions=DECISIONS["blind"]
    )
    export(checkpoint, profile, tmp_path / "bundle")
    prompts, token, several = counted(Bundle(tmp_path / "bundle"), "blind", "Where", tmp_path)
    assert (prompts, token, several) == (7, 9, 16), "of a token only in the layer that caches no visual rows"
