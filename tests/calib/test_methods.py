"""What methods decide from given curves: a fake probe answers, no model runs."""

from __future__ import annotations

import numpy as np
import pytest
from fake_probe import FakeProbe, run

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention
from trimvlm_calib.calibrate import read_parameters
from trimvlm_calib.methods import discover, find, v_skip, vtw
from trimvlm_calib.outcome import Outcome, merge


def test_every_method_is_found_and_says_what_it_is():
    methods = discover()
    assert set(methods) >= {"dense", "v-skip", "fastv", "vtw", "shortv", "hidivdrop"}
    for name, method in methods.items():
        assert name == method.NAME
        assert method.SUMMARY and "\n" not in method.SUMMARY
        method.Parameters()


def test_finding_methods_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from trimvlm_calib.methods import discover; discover(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("expression", ["fastvv", "", "fastv+", "fastv+nothing"])
def test_unknown_methods_are_refused_with_the_known_ones(expression):
    with pytest.raises(UserError, match=r"not one of .*dense, fastv, .*vtw \(or several"):
        find(expression)


def test_a_method_named_twice():
    with pytest.raises(UserError, match="named twice"):
        find("fastv+fastv")


def test_v_skip_takes_the_lowest_vig():
    vig = np.random.default_rng(0).permutation(32) / 32
    probe = FakeProbe(vig.tolist())
    outcome = run("v-skip", probe)
    (rule,) = outcome.decisions.layers
    assert set(rule.layers) == set(np.argsort(vig)[:19])  # N = 19 of 32
    assert (rule.query, rule.ffn) == ("none", None)
    asked, direction = probe.asked["VIG"]
    assert direction == "full||pruned"
    assert asked[5] == Decisions(layers=(LayerRule(layers=(5,), query="none"),))
    assert outcome.curves["vig"] == tuple(vig)


def test_ffn_skip_is_the_ablation():
    probe = FakeProbe([float(layer) for layer in range(32)])
    (rule,) = run("v-skip", probe, skip="ffn", share=2 / 32).decisions.layers
    assert (rule.layers, rule.query, rule.ffn) == ((0, 1), None, "none")
    assert probe.asked["VIG"][0][7] == Decisions(layers=(LayerRule(layers=(7,), ffn="none"),))


def test_v_skip_by_other_measures():
    values = [float(layer % 8) for layer in range(32)]
    probe = FakeProbe(values)
    outcome = run("v-skip", probe, identify="cosine", skip="ffn", share=4 / 32)
    assert outcome.decisions.layers[0].layers == (7, 15, 23, 31)  # the most similar change least
    assert probe.asked["similarity"] == "ffn"
    assert outcome.curves == {"cosine": tuple(values)}
    outcome = run("v-skip", probe, identify="logits", share=4 / 32)
    assert outcome.decisions.layers[0].layers == (0, 8, 16, 24)  # the least distant
    assert probe.asked["logits"][1] == "cosine"


def test_v_skip_of_random_layers_measures_nothing():
    drawn = {
        seed: run("v-skip", FakeProbe(), identify="random", seed=seed).decisions.layers[0].layers
        for seed in (0, 1, 2)
    }
    assert all(len(set(layers)) == 19 for layers in drawn.values())
    assert len(set(drawn.values())) == 3
    again = run("v-skip", FakeProbe(), identify="random", seed=1)
    assert again.decisions.layers[0].layers == drawn[1]
    assert again.curves == {}


def test_published_layer_counts():
    assert len(v_skip.lowest(tuple(range(40)), v_skip.Parameters().share)) == 24  # 13B
    assert v_skip.lowest((1.0, 0.5, 0.5, 0.5), 0.5) == [1, 2]  # ties: the lower layer
    assert v_skip.lowest((1.0, 0.5), 0.01) == [1]


def test_shortv_freezes_attention_and_ffn():
    probe = FakeProbe([float(layer) for layer in range(32)])
    (rule,) = run("shortv", probe, share=3 / 32).decisions.layers
    assert (rule.layers, rule.query, rule.ffn) == ((0, 1, 2), "none", "none")
    assert probe.asked["LC"][1] == "pruned||full"


def test_fastv_keeps_the_published_layer_and_measures_all():
    probe = FakeProbe([float(layer) for layer in range(32)])
    outcome = run("fastv", probe)
    assert outcome.decisions == Decisions(
        select=(Select(layer=2, keep=288, by=LastRowAttention(attention="previous")),)
    )
    assert outcome.curves["kl_select"][0] is None
    assert outcome.curves["kl_select"][31] == 31.0
    with pytest.raises(UserError, match=r"layer: 32 is not within 1\.\.31"):
        run("fastv", probe, layer=32)


def test_vtw_exits_at_the_first_layer_within_eta():
    curve = [1.0] * 32
    curve[3], curve[15], curve[20] = 0.0, 0.003, 0.0
    probe = FakeProbe(curve)
    assert run("vtw", probe).decisions == Decisions(exit=15)  # layer 3 lies before the search
    assert min(probe.asked["exit"][0]) == 5
    with pytest.raises(UserError, match=r"within 1e-09 nats; the least is 1\.0 at layer 1"):
        vtw.first_within((None, 1.0, 2.0), 1e-9)


@pytest.mark.parametrize(
    ("expression", "given", "message"),
    [
        ("fastv", {"keeep": 1}, "'keeep': fastv has layer, keep"),
        ("dense", {"keep": 1}, "dense has no parameters"),
        ("fastv", {"keep": 1.5}, r"fastv: keep: 1\.5 is not within"),
        ("fastv", {"layer": "two"}, r"fastv: .*layer"),
        ("vtw", {"eta": 0}, "vtw: eta: 0"),
        ("hidivdrop", {"keep": [0.1, 0.5]}, "falling list"),
        ("hidivdrop", {"keep": "tok32"}, "keep"),
        ("hidivdrop", {"keep": [0.5, 0.1], "layers": "published"}, "layers: published layers go with"),
        ("hidivdrop", {"mean": 1.5}, r"mean: 1\.5 is not within"),
        ("hidivdrop", {"extrema": "both"}, "extrema"),
        ("v-skip", {"seed": -1}, "seed: -1 is negative"),
        ("fastv+v-skip", {"keep": 0.5}, r"say whose, as in fastv\.keep"),
        ("fastv+v-skip", {"vtw.eta": 0.5}, "'vtw' is not one of fastv, v-skip"),
    ],
)
def test_wrong_parameters_are_refused_by_name(expression, given, message):
    with pytest.raises(UserError, match=message):
        read_parameters(find(expression), given)


def test_parameters_may_be_text():
    settings = read_parameters(find("fastv+v-skip"), {"fastv.layer": "3", "v-skip.share": "0.25"})
    assert settings["fastv"].layer == 3
    assert settings["v-skip"].share == 0.25


SKIP = Outcome(decisions=Decisions(layers=(LayerRule(layers=(1,), query="none"),)), curves={"vig": (0.1,)})
DROP = Outcome(
    decisions=Decisions(select=(Select(layer=2, keep=9, by=LastRowAttention(attention="previous")),)),
    curves={"kl_select": (0.2,)},
)


def test_merging_is_field_wise():
    merged = merge({"fastv": DROP, "v-skip": SKIP})
    assert merged.decisions == Decisions(select=DROP.decisions.select, layers=SKIP.decisions.layers)
    assert merged.curves == {"kl_select": (0.2,), "vig": (0.1,)}
    assert not merged.needs_adapted_weights
    assert merge({"v-skip": SKIP}) == SKIP


def test_merging_refuses_two_opinions():
    exits = {name: Outcome(decisions=Decisions(exit=layer)) for name, layer in (("vtw", 3), ("hidivdrop", 4))}
    with pytest.raises(UserError, match=r"exit: the methods disagree: 3 \(vtw\) and 4 \(hidivdrop\)"):
        merge(exits)


def test_curves_of_one_name_are_both_kept():
    other = Outcome(decisions=Decisions(), curves={"vig": (0.3,)})
    assert merge({"v-skip": SKIP, "b": other}).curves == {"vig": (0.1,), "vig (b)": (0.3,)}


@pytest.mark.parametrize("name", [name for name, method in discover().items() if hasattr(method, "at_share")])
@pytest.mark.parametrize("share", [1 / 64, 0.3, 1.0])
def test_at_share_gives_parameters_or_says_why_not(name: str, share: float) -> None:
    method = discover()[name]
    assert isinstance(method.at_share(share), method.Parameters)  # type: ignore[attr-defined]


def test_composition_leaves_out_what_has_nothing_to_act_on() -> None:
    """V-Skip in layers that VTW's exit has emptied is no contradiction, in a composition."""
    skip = LayerRule(layers=(1, 4, 6), query="none")
    whole = LayerRule(layers=(5,), execute="none", cache="none")
    v_skip_outcome = Outcome(decisions=Decisions(layers=(skip, whole)))
    united = merge({"v-skip": v_skip_outcome, "vtw": Outcome(decisions=Decisions(exit=4))}).decisions
    assert united.layers == (LayerRule(layers=(1,), query="none"), LayerRule(layers=(5,), execute="none"))
    assert merge({"v-skip": v_skip_outcome}).decisions.layers == (skip, whole)
