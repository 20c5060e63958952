"""MobileVLM-V2: LDPv2 by hand, the reference model, the vision graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_mobilevlm import PUBLISHED, TOKENS, tiny_config, tiny_mobilevlm
from tiny_models import noise_image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from trimvlm.encoder_rules import EncoderStage as Stage
from trimvlm.encoder_rules import HiPrune, MsvPrune, VisionTaps, VisPruner, check_tower
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import Schedule
from trimvlm_export.decoder_graph import export_decoder
from trimvlm_export.families import mobilevlm
from trimvlm_export.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from trimvlm_export.mobilevlm.projector import LDPv2
from trimvlm_export.reference import Reference
from trimvlm_export.reference_encoder import reduced_features
from trimvlm_export.source import Source
from trimvlm_export.vision_graph import export_projector, export_tower

IMAGE = len(TOKENS)  # the first id after the vocabulary
TAPS = VisionTaps(cls_attention=(0,), received_attention=(1,), features=(1, 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mobilevlm(tmp_path_factory.mktemp("mobilevlm") / "model", shards=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return MobileVLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return Source.place(checkpoint, checkpoint.parent / "bundle", "float32")


@pytest.fixture(scope="module")
def inputs(checkpoint: Path) -> dict[str, Any]:
    processor: Any = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [noise_image(1), noise_image(2, (30, 70))]
    return dict(processor(images=images, text=prompt, return_tensors="pt"))


def run(path: Path, **feeds: np.ndarray) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("patch_size", [4, 2])
def test_ldpv2_equals_loops(patch_size: int) -> None:
    """Windows of 2 x 2 and 4 x 4 patches; every token and channel one by one."""
    tower = tiny_config()["vision_config"] | {"patch_size": patch_size}
    config: Any = MobileVLMConfig(**tiny_config() | {"vision_config": tower, "hidden_size": 8})
    torch.manual_seed(0)
    projector = LDPv2(config).double()
    side = 96 // patch_size
    features = torch.randn(2, side * side, 32, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in projector.named_parameters()}
    rows = features.numpy() @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    rows = rows * (1 + torch.erf(torch.from_numpy(rows) / 2**0.5).numpy()) / 2
    rows = rows @ weights["linear_2.weight"].T + weights["linear_2.bias"]
    step = side // 12
    pooled = np.zeros((2, 14, 14, 8))  # with a border of zeros
    for r in range(12):
        for c in range(12):
            patches = [(r * step + i) * side + c * step + j for i in range(step) for j in range(step)]
            pooled[:, 1 + r, 1 + c] = rows[:, patches].mean(axis=1)
    wanted = np.zeros((2, 144, 8))
    for r in range(12):
        for c in range(12):
            for channel in range(8):
                kernel = weights["position.weight"][channel, 0]
                around = (pooled[:, r : r + 3, c : c + 3, channel] * kernel).sum(axis=(1, 2))
                bias = weights["position.bias"][channel]
                wanted[:, 12 * r + c, channel] = pooled[:, 1 + r, 1 + c, channel] + around + bias
    np.testing.assert_allclose(projector(features).detach().numpy(), wanted, atol=1e-12)


def test_published_geometry() -> None:
    small: Any = MobileVLMConfig(**PUBLISHED)
    spec = mobilevlm.model_spec(small, None, None)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.ffn) == (24, 2048, 16, 128, 5632)
    assert (spec.visual_tokens, spec.vocab, small.image_token_id) == (144, 32000, 32000)
    assert mobilevlm.pixel_values(small, None) == ["images", 3, 336, 336]
    tower = mobilevlm.tower(small, None)
    assert (tower.layers, tower.patches, tower.features, tower.width) == (24, 144, (23,), 2048)
    large = PUBLISHED | {"hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 6912}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    assert mobilevlm.model_spec(MobileVLMConfig(**large | heads), None, None).head_dim == 80
    with torch.device("meta"):
        published = MobileVLMForConditionalGeneration(small)
    assert len(list(published.parameters())) == 616  # tensors in the published 1.7B checkpoint


def test_reference_is_clip_ldpv2_and_llama(checkpoint: Path, inputs: dict[str, Any]) -> None:
    """Row by row as the published code puts them together, with a Llama that knows nothing of images."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32", local_files_only=True)
    assert type(model) is MobileVLMForConditionalGeneration
    whole = {
        name: each for file in checkpoint.glob("*.safetensors") for name, each in load_file(file).items()
    }
    vision = model.model.vision_tower
    states = vision(inputs["pixel_values"], output_hidden_states=True).hidden_states
    visual = model.model.multi_modal_projector(states[-2][:, 1:])
    assert visual.shape == (2, 144, 64)
    features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    assert torch.equal(torch.stack(list(features.pooler_output)), visual)
    llama = LlamaForCausalLM(model.config.text_config).eval()
    text = {n: w for n, w in whole.items() if "vision" not in n and "mm_projector" not in n}
    llama.load_state_dict(text, strict=True)
    ids = inputs["input_ids"][0]
    rows, taken = [], iter(visual.flatten(0, 1))
    for token in ids.tolist():
        rows.append(next(taken) if token == IMAGE else llama.model.embed_tokens.weight[token])
    assert next(taken, None) is None
    wanted = llama(inputs_embeds=torch.stack(rows)[None]).logits
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=0)
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert answer[0] == wanted[0, -1].argmax()
    assert bool((answer < IMAGE).all())


@pytest.mark.parametrize("images", [1, 2])
def test_vision_graph_equals_reference(
    source: Source, model: Any, inputs: dict[str, Any], images: int
) -> None:
    pixels = inputs["pixel_values"][:images]
    wanted = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    vision: Any = mobilevlm.Vision(source.config, None, None)
    source.load(vision, vision.parameter_names())
    torch.testing.assert_close(vision(pixels)[0], torch.cat(list(wanted)), atol=1e-4, rtol=0)
    found = run(source.out / export_tower(source, None, None), pixel_values=pixels.numpy())
    np.testing.assert_allclose(found["visual"], torch.cat(list(wanted)), atol=1e-4)


def test_taps_are_means_over_the_patches_of_a_token(
    source: Source, model: Any, inputs: dict[str, Any]
) -> None:
    pixels = inputs["pixel_values"]
    found = run(source.out / export_tower(source, None, TAPS), pixel_values=pixels.numpy())
    wanted = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    np.testing.assert_allclose(found["tower"], torch.stack(list(wanted)), atol=1e-4)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    seen = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation("sdpa")
    for token in (0, 11, 12, 77, 143):
        row, column = divmod(token, 12)
        patches = [1 + 24 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)]
        cls = seen.attentions[0][:, :, 0, patches].mean(dim=(1, 2))
        received = seen.attentions[1][:, :, :, patches].mean(dim=(1, 2, 3))
        np.testing.assert_allclose(found["cls_attention.0"][:, token], cls, atol=1e-6)
        np.testing.assert_allclose(found["received_attention.1"][:, token], received, atol=1e-6)
        for number in TAPS.features:
            state = seen.hidden_states[number][:, patches].mean(dim=1)
            np.testing.assert_allclose(found[f"features.{number}"][:, token], state, atol=1e-4)
    rows = found["tower"][0, 3:10]
    np.testing.assert_array_equal(
        run(source.out / export_projector(source, None), features=rows)["visual"], rows
    )


@pytest.mark.parametrize(
    "rule",
    [
        MsvPrune(attention=1, middle=1, last=2, clusters=3),
        VisPruner(attention=1, features=2),
        HiPrune(object_layer=0, deep_layer=1),
    ],
)
def test_reference_reduces_projected_rows(model: Any, inputs: dict[str, Any], rule: Any) -> None:
    stage = Stage(keep=20, by=rule)
    check_tower(stage, mobilevlm.tower(model.config, None), 144)
    rows, chosen = reduced_features(model, inputs, stage)
    visual = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    assert [len(set(tokens.tolist())) for tokens in chosen] == [20, 20]
    kept = [of_image[tokens] for of_image, tokens in zip(visual, chosen, strict=True)]
    torch.testing.assert_close(rows, torch.cat(kept))


def test_reference_prunes(model: Any, inputs: dict[str, Any]) -> None:
    rule = LastRowAttention(attention="own")
    decisions = Decisions(select=(Select(layer=1, keep=30, by=rule),))
    spec = mobilevlm.model_spec(model.config, None, None)
    profile = Profile(name="p", method=Method(name="p"), model=spec, decisions=decisions)
    with Reference(model, Schedule.resolve(profile, spec)) as reference:
        pruned = reference.prefill(inputs)
        assert len(pruned.selected[0]) == 60
    dense = Profile(name="d", method=Method(name="d"), model=spec, decisions=Decisions())
    with Reference(model, Schedule.resolve(dense, spec)) as reference:
        found = reference.prefill(inputs).logits
    np.testing.assert_allclose(found, model(**inputs).logits[0, -1].detach(), atol=1e-4)


def test_every_tensor_is_used_or_named(source: Source, checkpoint: Path) -> None:
    source = Source.place(checkpoint, source.out, "float32")  # nothing consumed yet; graphs are there
    spec = mobilevlm.model_spec(source.config, None, None)
    dense = Profile(name="dense", method=Method(name="dense"), model=spec, decisions=Decisions())
    export_tower(source, None, None)
    with pytest.raises(UserError, match=r"lm_head\.weight is not used"):
        source.ignored()
    export_decoder(source, "dense", Schedule.resolve(dense, spec))
    reasons = source.ignored()
    published = "model.vision_tower.vision_tower.vision_model."
    norm = {f"{published}post_layernorm.{kind}" for kind in ("weight", "bias")}
    last = {name for name in source_names(source) if name.startswith(f"{published}encoder.layers.1.")}
    assert len(last) == 16 and set(reasons) == norm | last
    assert {reasons[name] for name in last} == {"tower layer 1 comes after the feature layer -2"}
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert "rotary" in str(mobilevlm.unused(source.config, mobilevlm.canonical(frequencies)))
    assert mobilevlm.unused(source.config, "model.multi_modal_projector.position.weight") is None


def source_names(source: Source) -> set[str]:
    """As in the checkpoint."""
    return {tensor.name for tensor in source.tensors.tensors.values()}


def test_grids_and_odd_towers_are_refused() -> None:
    config: Any = MobileVLMConfig(**tiny_config())
    with pytest.raises(UserError, match="leave the grid out"):
        mobilevlm.model_spec(config, None, (12, 12))
    config.vision_config.image_size = 64
    with pytest.raises(UserError, match="16 x 16 patches are not a multiple of 12 x 12"):
        mobilevlm.tower(config, None)
    with pytest.raises(UserError, match="16 x 16"):
        LDPv2(config)
