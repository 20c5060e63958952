"""What a geometry is measured as: its checkpoint, its profiles, its prompts, and the work by the Schedule."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from trimvlm.accounting import kv_bytes_per_layer, left_out, mac2, selection_flops
from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.schedule import Schedule, resolve
from trimvlm_tools.bench.bars import at_least, at_most
from trimvlm_tools.bench.decisions import METHODS, QUARTER, bench_profiles, hidivdrop
from trimvlm_tools.bench.decoding import Agreement, agreement
from trimvlm_tools.bench.geometry import GEOMETRIES, Geometry, find_geometry, make_checkpoint
from trimvlm_tools.bench.peaks import Peaks
from trimvlm_tools.bench.prompt_rows import Point, decoder_rows, embedding_rows, prompt_ids
from trimvlm_tools.bench.random_llava import IMAGE
from trimvlm_tools.bench.roofline import Work, decode_work, prefill_work, weight_values
from trimvlm_tools.bench.size import checkpoint_bytes
from trimvlm_tools.random_checkpoint.description import load
from trimvlm_tools.random_checkpoint.tokenizer import make_tokenizer

TINY = Geometry(
    name="test", layers=8, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64, vocab=64, image=28,
    vision_layers=2, vision_hidden=32, text=10,
)  # fmt: skip
CLIP = Tower(layers=24, patches=576, cls=True, features=(23,), width=1024)
TILES = Tower(layers=26, patches=729, cls=False, features=(26,), width=1152, views=2)
PEAKS = Peaks(flops=4e11, read=4e10, copy=2e10, rows=3e10, by={}, range={})


@pytest.mark.parametrize("geometry", [*GEOMETRIES.values(), TINY], ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("visual", [None, 64, 2880])
def test_every_method_has_a_schedule_that_costs_less_than_dense(geometry, visual):
    model = geometry.model_spec()
    tower = TILES if model.grid and not visual else CLIP
    model = msgspec.structs.replace(model, visual_tokens=visual or model.visual_tokens)
    costs = {
        name: mac2(Schedule.resolve(profile, model), geometry.text)
        for name, profile in bench_profiles(model, tower, geometry.text).items()
    }
    assert list(costs) == list(METHODS)
    dense = costs.pop("dense")
    assert all(cost < dense for cost in costs.values())
    assert costs["fastv+v-skip"] < min(costs["fastv"], costs["v-skip"])


@pytest.mark.parametrize("name", ["llava-1b", "onevision-0.5b"])
def test_the_three_methods_of_a_quarter_take_about_a_quarter_of_the_flops(name):
    model = GEOMETRIES[name].model_spec()
    profiles = bench_profiles(model, TILES if model.grid else CLIP, 32)
    dense = mac2(Schedule.resolve(profiles["dense"], model), 32)
    for method in QUARTER:
        schedule = Schedule.resolve(profiles[method], model)
        assert 0.18 < (mac2(schedule, 32) + selection_flops(schedule, 32)) / dense < 0.31


def test_hidivdrop_is_the_published_schedule_at_its_own_depth():
    decisions = hidivdrop(32, 576)
    assert (decisions.inject, decisions.exit) == (8, 24)
    assert [(stage.layer, stage.keep) for stage in decisions.select] == [
        (10, 215),
        (14, 10),
        (16, 5),
        (18, 1),
    ]


def test_the_papers_shares_hold_at_their_own_depth():
    model = msgspec.structs.replace(GEOMETRIES["llava-1b"].model_spec(), layers=32)
    profiles = bench_profiles(model, CLIP, 32)
    for method in ("v-skip", "shortv"):
        assert len(profiles[method].decisions.layers[0].layers) == 19
    spider = profiles["spider"].decisions
    assert spider.encoder and spider.encoder.keep == 384
    assert spider.skip and [(s.layer, s.count) for s in spider.skip.stages] == [(16, 211)]
    assert [len(rule.layers) for rule in spider.layers] == [14, 2]
    visipruner = profiles["visipruner"].decisions
    assert visipruner.exit == 24 and [rule.layers for rule in visipruner.layers] == [(0,), (1, 2, 3, 4, 5)]
    assert [(stage.layer, stage.keep) for stage in visipruner.select] == [(15, 20)]


def test_a_tower_of_several_views_keeps_the_same_number_in_each():
    model = GEOMETRIES["onevision-0.5b"].model_spec()
    stage = bench_profiles(model, TILES, 32)["spider"].decisions.encoder
    assert stage and stage.keep % 2 == 0 and getattr(stage.by, "received", None)


def test_work_of_a_prefill_is_the_flops_and_the_bytes_of_weights_and_caches():
    model = TINY.model_spec()
    schedule = Schedule.resolve(bench_profiles(model, CLIP, 10)["hidivdrop"], model)
    work = prefill_work(schedule, 10, 4.0)
    head = TINY.hidden * TINY.vocab
    flops = mac2(schedule, 10) + selection_flops(schedule, 10) - left_out(schedule, 10) + 2 * head
    assert sum(work.flops) == flops
    layer = 2 * 32 * (32 + 16) + 3 * 32 * 64
    assert weight_values(schedule) == 8 * layer + head
    assert sum(work.bytes) == 4 * (8 * layer + head) + sum(kv_bytes_per_layer(schedule, 10, 4))
    assert work.flops[-1] == 2 * head and len(work.flops) == 9


def test_the_roofline_takes_the_larger_of_flops_and_bytes_layer_by_layer():
    model = GEOMETRIES["llava-1b"].model_spec()
    dense = resolve(Decisions(), model)
    work = prefill_work(dense, 32, 4.0)
    assert work.seconds(PEAKS) == pytest.approx(
        sum(max(f / 4e11, b / 4e10) for f, b in zip(work.flops, work.bytes, strict=True))
    )
    # 608 rows: layers are bound by FLOPs, the head of one row by its bytes.
    assert work.flops[0] / 4e11 > work.bytes[0] / 4e10 and work.flops[-1] / 4e11 < work.bytes[-1] / 4e10
    few = prefill_work(resolve(Decisions(exit=1), model), 2, 4.0)
    assert few.seconds(PEAKS) > few.bytes[-1] / 4e10 + 15 * few.bytes[1] / 4e10


def test_in_turn_nothing_is_read_while_something_is_multiplied():
    work = Work(flops=(8 * 10**11, 4 * 10**10), bytes=(4e10, 8e10))
    assert work.seconds(PEAKS) == pytest.approx(2 + 2)
    assert work.seconds_in_turn(PEAKS) == pytest.approx(2 + 1 + 0.1 + 2)


def test_decode_reads_all_weights_and_the_rows_that_are_cached_by_then():
    model = TINY.model_spec()
    schedule = resolve(Decisions(layers=(LayerRule(layers=(3,), execute="none"),)), model)
    layer, head, row = 2 * 32 * (32 + 16) + 3 * 32 * 64, TINY.hidden * TINY.vocab, 2 * 16 * 4
    # Three steps after 4 visual and 10 text rows: 15, 16 and 17 rows in each of seven layers.
    work = decode_work(schedule, 10, 3, 4.0)
    assert sum(work.bytes) == 3 * 4 * (7 * layer + head) + 7 * row * (15 + 16 + 17)
    assert sum(work.flops) == 3 * 2 * (7 * layer + head) + 7 * 4 * 32 * (15 + 16 + 17)
    assert sum(decode_work(schedule, 10, 3, 0.625).bytes) < sum(work.bytes) / 3


def test_peers_read_the_same_rows_as_our_decoder(tmp_path):
    checkpoint = make_checkpoint(TINY, tmp_path / "checkpoint")
    point = Point(visual=20, text=10, new_tokens=4)
    ids_S = prompt_ids(point, TINY.vocab, seed=0)
    assert ids_S.shape == (30,) and ids_S.min() > IMAGE and ids_S.max() < TINY.vocab
    table_VD = next(
        value
        for name, value in load_file(checkpoint / "model.safetensors").items()
        if name.endswith("embed_tokens.weight")
    )
    rows = decoder_rows(ids_S, 20, embedding_rows(checkpoint, ids_S[2:22]))
    assert rows["visual_positions"].tolist() == list(range(2, 22))
    assert np.array_equal(rows["visual"], table_VD[ids_S[rows["visual_positions"]]])
    assert np.array_equal(rows["input_ids"], ids_S[rows["text_positions"]])
    fewer = decoder_rows(ids_S, 20, embedding_rows(checkpoint, ids_S[2:7]))
    assert fewer["visual_positions"].tolist() == [2, 3, 4, 5, 6]
    assert fewer["text_positions"].tolist() == [0, 1, *range(7, 15)]
    assert np.array_equal(fewer["input_ids"], rows["input_ids"])


def test_agreement_counts_tokens_up_to_the_first_that_differs(tmp_path):
    logits_V = np.array([1.0, -4.0, 2.0], np.float32)
    np.savez(tmp_path / "ours.npz", tokens=np.array([2, 5, 6, 7]), logits=logits_V)
    np.savez(tmp_path / "same.npz", tokens=np.array([2, 5, 9, 7]), logits=logits_V + np.float32(0.001))
    np.savez(tmp_path / "other.npz", tokens=np.array([1, 5, 6, 7]))
    same = agreement(tmp_path / "ours.npz", tmp_path / "same.npz")
    assert (same.tokens, same.of) == (2, 4) and same.logits == pytest.approx(0.00025, rel=1e-3) and same.same
    other = agreement(tmp_path / "ours.npz", tmp_path / "other.npz")
    assert other == Agreement(tokens=0, of=4, logits=None) and not other.same
    assert not Agreement(tokens=4, of=4, logits=0.01).same


def test_a_bar_that_was_not_measured_is_not_a_pass():
    assert [at_most("x", m, 1.1).verdict for m in (None, 1.1, 1.2)] == ["not measured", "pass", "MISSED"]
    assert [at_least("x", m, 1.1).verdict for m in (None, 1.1, 1.0)] == ["not measured", "pass", "MISSED"]


def test_geometry_makes_a_checkpoint_that_loads_and_answers(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    directory = make_checkpoint(TINY, tmp_path / "checkpoint")
    model: Any = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    turn = [{"type": "image"}, {"type": "text", "text": TINY.question(10)}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (40, 50)), return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert int((ids == IMAGE).sum()) == TINY.visual_tokens == 4
    assert int((ids != IMAGE).sum()) == 10
    answer = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert answer.shape[1] == ids.shape[0] + 2


def test_a_question_fills_the_template_of_a_described_model_to_the_wanted_rows():
    geometry = find_geometry("onevision-0.5b")
    described = load("llava-onevision-qwen2-0.5b")
    tokenizer = make_tokenizer(described.tokenizer)
    turn = [{"type": "image"}, {"type": "text", "text": geometry.question(40)}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}],
        chat_template=described.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert len(tokenizer.encode(text)) - 1 == 40  # the image's own token is not a text row
    with pytest.raises(UserError, match="--text: 19 rows leave none for a question; give at least 20"):
        geometry.question(19)


def test_a_checkpoint_is_made_again_only_for_another_geometry(tmp_path):
    directory = make_checkpoint(TINY, tmp_path / "checkpoint")
    weights = directory / "model.safetensors"
    first = weights.read_bytes()
    assert checkpoint_bytes(directory, 4) < len(first) + 200_000
    made = weights.stat().st_mtime_ns
    make_checkpoint(TINY, directory)
    assert weights.stat().st_mtime_ns == made
    weights.unlink()
    (directory / "geometry.json").unlink()
    make_checkpoint(TINY, directory)
    assert weights.read_bytes() == first  # the seed decides


def test_unknown_geometries_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"d1024, llava-1b, onevision-0\.5b, tiny"):
        find_geometry("d4096")
