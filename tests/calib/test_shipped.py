"""Shipped profiles: that they resolve, and that they cost what the papers say (methods' tables and code)."""

from __future__ import annotations

import pytest

from trimvlm.accounting import mac2, macv
from trimvlm.errors import UserError
from trimvlm.profile import (
    Decisions,
    LayerRule,
    Method,
    ModelSpec,
    Profile,
    SkipMode,
    SkipStage,
    check_fits,
)
from trimvlm.schedule import Schedule, resolve
from trimvlm_calib import shipped
from trimvlm_calib.files import load_profile, save_profile

TERA = 1e12
TEXT = 67  # text rows of the papers' LLaVA prompts


def schedule(name: str) -> Schedule:
    profile = shipped.load(name)
    return Schedule.resolve(profile, profile.model)


def dense(model: ModelSpec) -> Schedule:
    return resolve(Decisions(), model)


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_profile(tmp_path, name):
    profile = shipped.load(name)
    assert profile.name == name and profile.model.fingerprint is None and profile.calibration is None
    table = schedule(name)
    assert mac2(table, TEXT) < mac2(dense(profile.model), TEXT)
    assert profile.notes
    save_profile(profile, tmp_path / "again.yaml")
    assert load_profile(tmp_path / "again.yaml") == profile
    wanted = {"llava": 576, "llava_next": 2880}
    assert profile.model.visual_tokens == wanted[profile.model.family]


def test_the_geometry_is_that_of_llava_in_hugging_face_form():
    """`LlavaConfig` for Vicuna-7B; the token embeddings are padded to 32064 there."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from trimvlm_export import families

    text = LlamaConfig(vocab_size=32064)  # its other defaults are LLaMA-7B's
    vision = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        num_hidden_layers=24,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
    )
    config = LlavaConfig(text_config=text, vision_config=vision)
    check_fits(shipped.load("shortv-llava-15-7b"), families.of("llava").model_spec(config, "any", None))


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("fastv-llava-15-7b", 4.9, 0.05),
        ("vtw-llava-15-7b", 4.7, 0.05),
        ("shortv-llava-15-7b", 4.72, 0.02),
        ("fastv-llava-next-7b", 22.0, 0.1),
        ("vtw-llava-next-7b", 21.8, 0.05),
        ("shortv-llava-next-7b", 21.6, 0.05),
    ],
)
def test_published_tflops(name, published, tolerance):
    """SPIDER, table 1; ShortV's own figure for its 7B list. Two per multiply-accumulate, all rows."""
    assert mac2(schedule(name), TEXT) / TERA == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "published"),
    [("pyramiddrop-llava-15-7b", 1.78), ("hidivdrop-llava-15-7b-64", 0.42)],
)
def test_published_visual_tmacs(name, published):
    """HiDivDrop, table 2: visual rows only, one per multiply-accumulate."""
    assert macv(schedule(name)) / TERA == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("pyramiddrop-llava-15-7b", 270),
        ("hidivdrop-llava-15-7b-80", 80.03),
        ("hidivdrop-llava-15-7b-64", 64),
        ("hidivdrop-llava-15-7b-48", 48),
    ],
)
def test_published_mean_tokens(name, published):
    assert schedule(name).mean_visual_tokens == pytest.approx(published, abs=0.005)
    assert shipped.load(name).needs_adapted_weights == name.startswith("hidivdrop")


@pytest.mark.parametrize(("scheme", "percent"), [(50, 49.7), (60, 59.7), (90, 89.7)])
def test_fitprune_schemes_by_its_own_formula(scheme, percent):
    """Its released deletions. Their cost is written out here: Q, K, V and attention before a deletion."""
    table = schedule(f"fitprune-llava-15-7b-{scheme}")
    d, m = 4096, 11008
    cost = sum(3 * n * d**2 + 2 * n**2 * d + k * d**2 + 3 * m * d * k for n, k in
               ((row.live, row.after) for row in table.rows))  # fmt: skip
    whole = 32 * (4 * 576 * d**2 + 2 * 576**2 * d + 3 * 576 * d * m)
    assert 100 * (1 - cost / whole) == pytest.approx(percent, abs=0.05)
    assert macv(table) == cost


@pytest.mark.parametrize("name", ["asl-skip-llava-15-7b", "asl-skip-llava-next-7b"])
def test_spiders_table_9_covers_every_layer_once(name):
    profile = shipped.load(name)
    lists = [layer for kind in ("attention", "ffn") for layer in profile.method.parameters[kind]]
    assert sorted(lists) == list(range(32))
    attention, ffn = profile.decisions.layers
    assert (attention.query, attention.ffn, ffn.query, ffn.ffn) == ("none", None, None, "none")
    for rule, kind in ((attention, "attention"), (ffn, "ffn")):
        assert list(rule.layers) == sorted(profile.method.parameters[kind])


@pytest.mark.parametrize(
    ("name", "tokens", "share", "tflops"),
    [
        ("asl-skip-llava-15-7b", 384, 0.55, 5.24),
        ("asl-skip-llava-next-7b", 1920, 0.50, 23.6),
        ("asl-skip-llava-next-7b", 710, 0.30, 9.55),
    ],
)
def test_spiders_cost_with_keys_and_values_kept(name, tokens, share, tflops):
    """Every row of table 1 with R_s of N tokens in skip mode from layer 0 on, their keys and values computed.

    Published are 4.8, 21.9 and 9.0: those follow only without keys and values, against the paper's own text.
    """
    profile = shipped.load(name)
    geometry = {field: getattr(profile.model, field) for field in ModelSpec.__struct_fields__}
    model = ModelSpec(**geometry | {"visual_tokens": tokens})
    attention, ffn = profile.decisions.layers
    decisions = Decisions(
        skip=SkipMode(stages=(SkipStage(layer=0, count=round(share * tokens)),)),
        layers=(
            LayerRule(layers=attention.layers, query="unskipped"),
            LayerRule(layers=ffn.layers, ffn="unskipped"),
        ),
    )
    assert mac2(resolve(decisions, model), TEXT) / TERA == pytest.approx(tflops, rel=0.002)


def test_spider_staged():
    """N = 384, R_s = 55 %: 211 tokens from layer 16 on, targets as in table 9."""
    table, lists = schedule("spider-llava-15-7b"), shipped.load("asl-skip-llava-15-7b").method.parameters
    assert [row.skipped for row in table.rows] == [0] * 16 + [211] * 16
    for row in table.rows[16:]:
        assert (row.query == "unskipped") == (row.layer in lists["attention"])
        assert (row.ffn == "unskipped") == (row.layer in lists["ffn"])
        assert {row.queries, row.ffn_rows} == {384, 173}
    assert {row.live for row in table.rows} == {384}


def test_by_name_or_by_file(tmp_path):
    profile = shipped.load_file_or_shipped("vtw-llava-15-7b")
    assert profile.decisions.exit == 16
    file = tmp_path / "mine.yaml"
    save_profile(Profile(name="mine", method=Method(name="dense"), model=profile.model), file)
    assert shipped.load_file_or_shipped(str(file)).name == "mine"
    with pytest.raises(UserError, match=r"no shipped profile 'vtw-llava-15'; did you mean vtw-llava-15-7b\?"):
        shipped.load_file_or_shipped("vtw-llava-15")
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        shipped.load_file_or_shipped("missing.yaml")


def test_a_shipped_profile_is_refused_for_another_geometry(tmp_path, capsys):
    from tiny_models import tiny_llava

    from trimvlm_tools.cli import main

    checkpoint = tiny_llava(tmp_path / "model")
    arguments = ["export", str(checkpoint), "--profile", "shortv-llava-15-7b", "--out", str(tmp_path / "b")]
    assert main(arguments) == 2
    assert "profile shortv-llava-15-7b: model.layers is 32, but this model has 4" in capsys.readouterr().err
