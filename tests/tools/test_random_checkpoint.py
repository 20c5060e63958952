"""Checkpoints with random weights: they load without a missing or left-over tensor, and repeat exactly."""

from __future__ import annotations

import json
import math
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from trimvlm.errors import UserError
from trimvlm_tools.bench.quiet import quiet
from trimvlm_tools.cli import main
from trimvlm_tools.random_checkpoint.description import SHIPPED, Description, load, shipped
from trimvlm_tools.random_checkpoint.make import make_checkpoint
from trimvlm_tools.random_checkpoint.tokenizer import make_tokenizer
from trimvlm_tools.random_checkpoint.values import PERIOD, RandomTensor, stream
from trimvlm_tools.random_checkpoint.weights import tensors

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"vision_config": CLIP, "text_config": TEXT}
# What makes the shipped description of a family tiny; the rest stays as published.
TINY: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {**LLAMA, "image_token_index": 370},
    "llava-v1.6-vicuna-7b": {**LLAMA, "image_token_index": 370},
    "llava-onevision-qwen2-0.5b": {**LLAMA, "image_token_index": 370},
    "qwen2.5-vl-3b": {
        **TEXT,
        "image_token_id": 370,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    },
    "internvl3-1b": {**LLAMA, "image_token_id": 370},
}


def merged(data: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    return {**data, **{key: merged(data.get(key, {}), value) for key, value in change.items()}}


def tiny(name: str, path: Path, **change: Any) -> Description:
    """The shipped description with a small model, read from a YAML file as a user's own would be."""
    data = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    special = data["tokenizer"]["special"]
    image = data["tokenizer"].get("attributes", {})
    image = image.get("image_token") or image.get("context_image_token") or "<|image_pad|>"
    others = [token for token in special if token != image]
    data["tokenizer"]["special"] = {**{token: n for n, token in enumerate(others)}, image: 370}
    data["config"] = merged(data["config"], TINY[name])
    file = path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merged(data, change)))
    return load(str(file))


def header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(size))


def strictly_loaded(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    with quiet():
        model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize(
    ("name", "names"),
    [
        *((name, "saved") for name in TINY),
        *((name, "published") for name in TINY if load(name).published_names),
    ],
)
def test_every_family_loads_with_nothing_missing_and_nothing_left_over(tmp_path, name, names):
    description = tiny(name, tmp_path)
    made = make_checkpoint(description, tmp_path / "made", names=names)
    model = strictly_loaded(tmp_path / "made")
    assert str(model.dtype) == f"torch.{description.dtype}" and made.dtype == description.dtype
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    deviations = {}
    for key, parameter in model.named_parameters():
        values = parameter.detach().double()
        assert values.isfinite().all(), key
        deviations[key] = float(values.std()) * math.sqrt(values[0].numel())
        assert parameter.ndim > 1 or float(values.std()) == pytest.approx(0.02, rel=0.7), key
    linear = [value for key, value in deviations.items() if "mlp" in key and key.endswith("weight")]
    assert linear == pytest.approx([1.0] * len(linear), rel=0.1)
    norms = [p for key, p in model.named_parameters() if "norm" in key and key.endswith("weight")]
    assert norms and all(abs(float(norm.detach().double().mean()) - 1) < 0.02 for norm in norms)


@pytest.mark.parametrize("name", TINY)
def test_names_and_files_are_those_of_save_pretrained(tmp_path, name):
    make_checkpoint(tiny(name, tmp_path), tmp_path / "made")
    with quiet():
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(tmp_path / "made")
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "theirs")
    ours, theirs = header(tmp_path / "made/model.safetensors"), header(tmp_path / "theirs/model.safetensors")
    assert {key: entry["shape"] for key, entry in ours.items() if key != "__metadata__"} == {
        key: entry["shape"] for key, entry in theirs.items() if key != "__metadata__"
    }


def test_published_names_are_the_hubs_and_mean_the_same_model(tmp_path):
    description = tiny("llava-1.5-7b", tmp_path)
    make_checkpoint(description, tmp_path / "made", names="published")
    make_checkpoint(description, tmp_path / "saved")
    saved = dict(strictly_loaded(tmp_path / "saved").named_parameters())
    for key, parameter in strictly_loaded(tmp_path / "made").named_parameters():
        assert torch.equal(parameter, saved[key]), key
    found = set(header(tmp_path / "made/model.safetensors"))
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in found
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in found
    assert "language_model.lm_head.weight" in found


def test_shards_and_their_index_hold_the_bytes_of_one_file(tmp_path):
    from safetensors.torch import load_file

    description = tiny("llava-1.5-7b", tmp_path)
    make_checkpoint(description, tmp_path / "whole", dtype="float32")
    limit = 60_000
    made = make_checkpoint(description, tmp_path / "shards", dtype="float32", shard_gb=limit / 1e9)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{made.files:05}.safetensors" for n in range(1, made.files + 1)
    ]
    whole = load_file(tmp_path / "whole/model.safetensors")
    found = {}
    for file in files:
        shard = load_file(file)
        assert len(shard) == 1 or sum(4 * tensor.numel() for tensor in shard.values()) <= limit
        assert {key for key, name in index["weight_map"].items() if name == file.name} == set(shard)
        found |= shard
    assert made.files > 3
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in whole.values())
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    strictly_loaded(tmp_path / "shards")


def test_the_seed_decides_every_byte_and_the_dtype_only_rounds(tmp_path):
    from safetensors.torch import load_file

    description = tiny("llava-1.5-7b", tmp_path)
    for name, options in {
        "a": {}, "b": {}, "other": {"seed": 1}, "float": {"dtype": "float32"},
        "brain": {"dtype": "bfloat16"},
    }.items():  # fmt: skip
        make_checkpoint(description, tmp_path / name, **options)
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {file.name for file in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    a, other, whole, brain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("a", "other", "float", "brain")
    )
    for key, tensor in whole.items():
        assert torch.equal(a[key], tensor.half()) and torch.equal(brain[key], tensor.bfloat16())
        assert not torch.equal(a[key], other[key])


def test_memory_does_not_grow_with_a_tensor():
    """The first pieces of a tensor that no machine could hold come at once, and are views of one block."""
    huge = RandomTensor(name="huge", drawn_as="huge", shape=(1 << 40, 1 << 10), mean=0.0, deviation=1.0)
    pieces = list(islice(stream(huge, "float16", 0), 1000))
    assert all(len(piece) <= 2 * PERIOD for piece in pieces)
    assert len({id(piece.obj) for piece in pieces}) == 1


def test_no_two_rows_of_a_tensor_are_equal_and_its_values_are_normal():
    wide = 1 << 13  # divides no multiple of the block, unlike a block of 2^22 elements
    tensor = RandomTensor(name="rows", drawn_as="rows", shape=(2048, wide), mean=0.0, deviation=0.5)
    content = b"".join(stream(tensor, "float32", 3))
    rows = np.frombuffer(content, np.float32).reshape(tensor.shape)
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert float(rows.std()) == pytest.approx(0.5, rel=0.01) and abs(float(rows.mean())) < 1e-3
    products = rows[:512] @ rows[:512].T / wide
    assert float(np.abs(products - np.diag(np.diag(products))).max()) < 0.25 * 6 / math.sqrt(wide)


@pytest.mark.parametrize(
    ("name", "parameters", "files"),
    [
        ("internvl3-1b", 938_193_024, 1),
        ("llava-1.5-13b", 13_351_494_656, 6),
        ("llava-1.5-7b", 7_063_427_072, 3),
        ("llava-onevision-qwen2-0.5b", 893_675_552, 1),
        ("llava-v1.6-vicuna-7b", 7_063_431_168, 3),
        ("qwen2.5-vl-3b", 3_754_622_976, 2),
    ],
)
def test_shipped_models_have_the_size_of_the_published_ones(tmp_path, name, parameters, files):
    from transformers import AutoConfig

    description = load(name)
    assert description.name == name
    (tmp_path / "config.json").write_text(json.dumps(description.config))
    config = AutoConfig.from_pretrained(tmp_path)
    with quiet():
        found = tensors(config)
    assert sum(tensor.elements for tensor in found) == parameters
    assert math.ceil(2 * parameters / (1e9 * description.shard_gb)) == files
    assert len({tensor.name for tensor in found}) == len(found)


@pytest.mark.parametrize("description", shipped(), ids=lambda description: description.name)
def test_shipped_tokenizers_have_the_published_ids(description):
    tokenizer = make_tokenizer(description.tokenizer)
    for token, number in description.tokenizer.special.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer.encode(f"{token}", add_special_tokens=False) == [number]
    text = "Größe, 猫 & a cat"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == description.tokenizer.special.get("<s>")) == description.tokenizer.bos_first
    rows = description.config.get("text_config", description.config)["vocab_size"]
    assert all(tokenizer.convert_ids_to_tokens(number) for number in range(0, min(rows, len(tokenizer)), 997))


@pytest.mark.parametrize(
    ("name", "rendered"),
    [
        ("llava-1.5-7b", "USER: <image>\nWhat? ASSISTANT: A. USER: Why? ASSISTANT:"),
        ("llava-v1.6-vicuna-7b", "USER: <image>\nWhat? ASSISTANT: A. USER: Why? ASSISTANT:"),
        (
            "llava-onevision-qwen2-0.5b",
            "<|im_start|>user <image>\nWhat?<|im_end|><|im_start|>assistant \nA.<|im_end|>"
            "<|im_start|>user \nWhy?<|im_end|><|im_start|>assistant\n",
        ),
        (
            "qwen2.5-vl-3b",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "internvl3-1b",
            "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_directory_prepares_text_and_images(tmp_path, name, rendered):
    """AutoProcessor of three of them needs torchvision for videos, so its parts are loaded one by one."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig

    make_checkpoint(tiny(name, tmp_path), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    turns = [("user", "What?"), ("assistant", "A."), ("user", "Why?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"].insert(0, {"type": "image"})
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == rendered
    with quiet():
        processor = AutoImageProcessor.from_pretrained(tmp_path / "made", backend="pil")
        pixels = processor(Image.new("RGB", (300, 200)), return_tensors="np")["pixel_values"]
    assert np.isfinite(pixels).all() and pixels.size
    assert GenerationConfig.from_pretrained(tmp_path / "made").eos_token_id


def test_a_generation_is_finite_in_half_precision(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    make_checkpoint(tiny("llava-1.5-7b", tmp_path), tmp_path / "made")
    model, processor = strictly_loaded(tmp_path / "made"), AutoProcessor.from_pretrained(tmp_path / "made")
    inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=Image.new("RGB", (60, 40)))
    inputs = inputs.convert_to_tensors("pt").to(torch.float16)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all() and 0.3 < float(logits.float().std()) < 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "int8"}, "Invalid enum value 'int8'"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"shard_gb": 0}, "shard_gb: 0.0 is not a size"),
        ({"tokenizer": {"pad": "<nothing>"}}, "'<nothing>' is not among `special`"),
        ({"tokenizer": {"special": {"<twice>": 370}}}, "every token needs an id of its own"),
    ],
)
def test_a_wrong_description_is_refused_with_its_field(tmp_path, change, says):
    with pytest.raises(UserError, match="not a model's description") as caught:
        tiny("llava-1.5-7b", tmp_path, **change)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {"image_token_index": 371}}, "the image token's id 371"),
        ({"config": {"text_config": {"vocab_size": 370}}}, "below vocab_size 370"),
        ({"config": {"model_type": "nothing"}}, "nothing"),
        ({"config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is not a model of images"),
        ({"published_names": [["^nothing", ""]]}, "'^nothing' is in no tensor's name"),
        ({"published_names": [["layers.[01]", "layers.0"]]}, "two tensors get the same name"),
    ],
)
def test_what_does_not_fit_together_leaves_nothing_behind(tmp_path, change, says):
    description = tiny("llava-1.5-7b", tmp_path, **change)
    with pytest.raises(UserError) as caught:
        make_checkpoint(description, tmp_path / "place/made", names="published")
    assert says in str(caught.value)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_disk_that_is_too_small_and_a_directory_that_is_there_are_refused(tmp_path, monkeypatch):
    description = tiny("llava-1.5-7b", tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="give a directory on another one"):
        make_checkpoint(description, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="is there already"):
        make_checkpoint(description, tmp_path / "made")


def test_the_command(tmp_path, capsys):
    tiny("llava-1.5-7b", tmp_path)
    out = tmp_path / "made"
    arguments = ["synthesize", str(tmp_path / "llava-1.5-7b.yaml"), "-o", str(out), "--dtype", "float32"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == (out / "model.safetensors").stat().st_size > 4 * report["parameters"]
    assert main(["synthesize"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{description.name} " in listed for description in shipped())
    for wrong, says in {
        "llava": "known are internvl3-1b, llava-1.5-13b",
        "no.yaml": "no such file",
    }.items():
        assert main(["synthesize", wrong, "-o", str(tmp_path / "x")]) == 2
        assert says in capsys.readouterr().err
    for options, says in (
        (["llava-1.5-7b"], "-o DIR"),
        (["llava-1.5-7b", "-o", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["llava-1.5-7b", "-o", "x", "--shard-gb", "0"], "--shard-gb: 0.0"),
        (["llava-1.5-7b", "-o", "x", "--seed", "-1"], "--seed: -1"),
        (["-o", "x"], "which MODEL?"),
    ):
        assert main(["synthesize", *options]) == 2
        assert says in capsys.readouterr().err
