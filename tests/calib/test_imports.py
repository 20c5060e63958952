"""Other tools' configurations: what each key becomes, and that no key is dropped silently."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny_models import tiny_llava

from trimvlm.encoder_rules import EncoderStage, VisionZip, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention, RandomOrder, TextAttention
from trimvlm_calib.files import load_profile
from trimvlm_calib.imports import discover, import_profile
from trimvlm_tools.cli import main

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """8 layers, 16 visual tokens, a tower of 3 layers whose features are hidden state 2 (layer -2)."""
    return tiny_llava(tmp_path_factory.mktemp("model"), layers=8, kv_heads=2)


def lightcompress(**special):
    """A file as the tool's own examples are laid out."""
    return {
        "base": {"seed": 42},
        "model": {"type": "Llava", "path": "model path", "torch_dtype": "auto"},
        "eval": {"eval_pos": ["transformed"], "type": "vqa", "name": ["mme"], "bs": 1},
        "sparse": {"method": "TokenReduction", "special": special},
        "save": {"save_trans": False, "save_path": "/path/to/save/"},
    }


def in_vision(**special):
    file = lightcompress()
    return file | {"sparse": {"vision": {"method": "TokenReduction", "special": special}}}


@pytest.fixture
def read(tmp_path, checkpoint):
    def read(config, format_="lightcompress"):
        file = tmp_path / "other"
        dump = yaml.safe_dump if format_ == "lightcompress" else json.dumps
        file.write_text(config if isinstance(config, str) else dump(config))
        return import_profile(file, format_, checkpoint, "imported")

    return read


def select(by, *stages):
    return tuple(Select(layer=layer, keep=keep, by=by) for layer, keep in stages)


@pytest.mark.parametrize(
    ("config", "name", "wanted"),
    [
        pytest.param(
            lightcompress(method="FastV", pruning_loc=3, rate=0.778),
            "fastv",
            Decisions(select=select(PREVIOUS, (3, 4))),  # round(16 * 0.222)
            id="FastV",
        ),
        pytest.param(
            lightcompress(
                method="PyramidDrop", image_token_ratio_list=[0.5, 0.3, 0.125], layer_list=[2, 4, 6]
            ),
            "pyramiddrop",
            Decisions(select=select(OWN, (2, 8), (4, 4), (6, 2)), positions="compact"),  # int(16 * 0.3)
            id="PyramidDrop",
        ),
        pytest.param(
            lightcompress(method="RandomPrune", pruning_loc=2, rate=0.5),
            "random-select",
            Decisions(select=select(RandomOrder(seed=42), (2, 8))),
            id="RandomPrune",
        ),
        pytest.param(
            in_vision(method="VisPruner", prune_ratio=0.5, important_ratio=0.25),
            "vispruner",
            Decisions(encoder=EncoderStage(keep=8, by=VisPruner(important=0.25, attention=1, features=2))),
            id="VisPruner",
        ),
        pytest.param(
            in_vision(method="VisionZip", dominant=5, contextual=3),
            "visionzip",
            Decisions(encoder=EncoderStage(keep=9, by=VisionZip(contextual=3, attention=1, keys=1))),
            id="VisionZip",
        ),
        pytest.param(
            lightcompress(method="FasterVLM", rate=0.75),
            "fastervlm",
            Decisions(encoder=EncoderStage(keep=4, by=VisPruner(important=1.0, attention=1, features=2))),
            id="FasterVLM",
        ),
        pytest.param(
            {
                "quant": {
                    "method": "RTN",
                    "weight": {"bit": 4},
                    "token_reduction": {"method": "FastV", "special": {"pruning_loc": 3, "rate": 0.5}},
                }
            },
            "fastv",
            Decisions(select=select(PREVIOUS, (3, 8))),
            id="beside quantization",
        ),
    ],
)
def test_lightcompress(read, config, name, wanted):
    profile = read(config)
    assert profile.decisions == wanted
    assert profile.method.name == name
    assert profile.notes == "Imported from other (lightcompress)."


def test_sparsevlm_selects_after_the_layers_it_names():
    """192 tokens on a model with 576: [300, 200, 110] after layers 2, 6 and 15."""
    from trimvlm_calib import shipped
    from trimvlm_calib.imports import Target
    from trimvlm_calib.imports import lightcompress as format_

    model = Target.__new__(Target)
    model.spec = shipped.load("fastv-llava-15-7b").model
    settings = {"method": "SparseVLM", "merge_flag": False, "prune_flag": True, "retained_tokens": 192}
    text = yaml.safe_dump(lightcompress(**settings, pruning_loc=[2, 6, 15], init_token_total_shape=668))
    _, decisions = format_.read(text, model)
    assert decisions == Decisions(select=select(TextAttention(), (3, 300), (7, 200), (16, 110)))
    _, decisions = format_.read(yaml.safe_dump(lightcompress(**settings, pruning_loc=[2])), model)
    assert decisions == Decisions(select=select(TextAttention(), (3, 192)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lightcompress(method="FastV", pruning_loc=3), r"sparse\.special\.rate: is missing"),
        (
            lightcompress(method="FastV", pruning_loc="3", rate=0.5),
            r"sparse\.special\.pruning_loc: a whole number is",
        ),
        (
            lightcompress(method="FastV", pruning_loc=3, rate=1.5),
            r"special\.rate: 1\.5 is not within",
        ),
        (lightcompress(method="FastV", pruning_loc=3, rate=0.5, top=1), r"sparse\.special\.top: no decision"),
        (lightcompress(method="FastV", pruning_loc=30, rate=0.5), "layer 30: select"),
        (lightcompress(method="DART", pruning_loc=3), r"sparse\.special\.method: 'DART' has no counterpart"),
        (lightcompress(method="SparseVLM"), r"sparse\.special\.merge_flag: merged rows .* merge_flag: False"),
        (
            lightcompress(method="SparseVLM", merge_flag=False, retained_tokens=100),
            r"retained_tokens: 100 is not one of 192, 128, 64",
        ),
        (
            lightcompress(method="SparseVLM", merge_flag=False, prune_flag=False),
            r"prune_flag: without pruning",
        ),
        (
            lightcompress(method="SparseVLM", merge_flag=False, pruning_loc=[2, 6]),
            r"pruning_loc: \[2, 6\]: budgets are known",
        ),
        (
            lightcompress(method="PyramidDrop", layer_list=[2, 4], image_token_ratio_list=[0.5]),
            "image_token_ratio_list: 1 ratios for 2 layers",
        ),
        (
            in_vision(method="VisPruner", prune_ratio=0.5),
            r"sparse\.vision\.special\.important_ratio: is missing",
        ),
        (
            {"sparse": {"method": "ShortGPT", "weight": {"n_prune_layers": 9}}},
            "sparse.method: 'ShortGPT' is not",
        ),
        ({"quant": {"method": "RTN"}}, "quant: no token_reduction"),
        (lightcompress(method="FastV", pruning_loc=3, rate=0.5) | {"extra": 1}, "extra: no decision"),
        ({"base": {}}, "sparse: is missing"),
        ("[1]", "the file: a mapping is needed"),
        ("a: [", "not YAML"),
    ],
)
def test_lightcompress_names_the_key_that_cannot_be_mapped(read, config, message):
    with pytest.raises(UserError, match=rf"other: .*{message}"):
        read(config)


CONFIG = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 64}


@pytest.mark.parametrize(
    ("lists", "wanted"),
    [
        (
            {"drop_attn_list": [6, 5], "drop_mlp_list": None},
            (LayerRule(layers=(5, 6), sublayers="ffn"),),
        ),
        ({"drop_mlp_list": [7]}, (LayerRule(layers=(7,), sublayers="attention"),)),
        (
            {"drop_attn_list": [False] * 5 + [True, True, False], "drop_mlp_list": [6, 4]},
            (
                LayerRule(layers=(5,), sublayers="ffn"),
                LayerRule(layers=(4,), sublayers="attention"),
                LayerRule(layers=(6,), execute="none"),
            ),
        ),
        ({"drop_attn_list": [1], "drop_mlp_list": [1]}, (LayerRule(layers=(1,), execute="none"),)),
    ],
)
def test_llm_drop(read, lists, wanted):
    profile = read(CONFIG | lists, "llm-drop")
    assert profile.decisions == Decisions(layers=wanted)
    assert profile.method.name == "llm-drop"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"drop_attn_list": [8]}, r"drop_attn_list: layer 8 is not within 0\.\.7"),
        (CONFIG | {"drop_mlp_list": [True] * 9}, r"drop_mlp_list: layer 8 is not within 0\.\.7"),
        (CONFIG | {"drop_mlp_list": "all"}, "drop_mlp_list: a list of layer numbers"),
        (CONFIG | {"drop_attn_list": []}, "both are empty"),
        (CONFIG | {"drop_attn_list": [1], "hidden_size": 128}, "hidden_size: 128, but this model has 64"),
        ("{", "not JSON"),
        ("[]", "an object is needed"),
    ],
)
def test_llm_drop_refuses(read, config, message):
    with pytest.raises(UserError, match=message):
        read(config, "llm-drop")


def test_the_verb_writes_a_profile_and_lists(tmp_path, checkpoint, capsys):
    file = tmp_path / "fastv.yml"
    file.write_text(yaml.safe_dump(lightcompress(method="FastV", pruning_loc=3, rate=0.5)))
    out = tmp_path / "fastv.yaml"
    arguments = [str(file), "--format", "lightcompress", "--model", str(checkpoint)]
    assert main(["import", *arguments, "-o", str(out)]) == 0
    assert load_profile(out).decisions.select[0].keep == 8
    assert f"{out}: profile fastv" in capsys.readouterr().out
    assert main(["import", *arguments]) == 2
    assert capsys.readouterr().err == "trimvlm import: --out: is needed; see trimvlm import --help\n"
    assert main(["import", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["formats"]) == set(discover()) == {"lightcompress", "llm-drop"}
    assert "shortv-llava-15-7b" in {profile["name"] for profile in listed["profiles"]}
    assert main(["import", "--list"]) == 0
    assert "spider-llava-15-7b" in capsys.readouterr().out


def test_what_is_not_there(tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"--format: 'onnx' is not one of lightcompress, llm-drop"):
        import_profile(tmp_path / "a", "onnx", checkpoint, "a")
    with pytest.raises(UserError, match="no such file"):
        import_profile(tmp_path / "a", "llm-drop", checkpoint, "a")
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        import_profile(tmp_path / "a", "llm-drop", checkpoint, "a")
