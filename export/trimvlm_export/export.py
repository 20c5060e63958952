"""Export: checkpoint + Profile -> Bundle. `export` shows the whole pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import msgspec
import torch
from torch import nn

import trimvlm
from trimvlm.bundle import (
    MANIFEST,
    Bundle,
    Dtype,
    Entry,
    File,
    Lowering,
    Manifest,
    record,
    write_manifest,
    write_whole,
)
from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm.schedule import Schedule
from trimvlm_export import families
from trimvlm_export.checkpoint import Tensor, TensorMap, load_config, read_header, weight_files
from trimvlm_export.checkpoint import model_spec as read_model_spec
from trimvlm_export.decoder import Decoder
from trimvlm_export.graph_io import decoder_example, decoder_inputs, decoder_outputs, is_dynamic
from trimvlm_export.lowerings import OPERATORS
from trimvlm_export.processing import image_processing, text_processing
from trimvlm_export.trace import attach_weights, save, trace
from trimvlm_export.weights import mapped, place

CHECKPOINT = "checkpoint"  # the checkpoint itself, inside the bundle: weights, tokenizer, configuration


def export(checkpoint: Path | str, profile: Profile, out: Path | str, *, dtype: Dtype = "float32") -> Path:
    """Writes a bundle, or adds a profile to the bundle of the same checkpoint and precision.

    Args:
        checkpoint: directory of a Hugging Face checkpoint with safetensors.
        profile: must have been made for this model.
        out: the bundle's directory.
        dtype: precision of the weights and activations.

    Returns:
        The bundle's directory.

    Raises:
        UserError: the profile does not fit the model, the checkpoint is incomplete or of an unknown kind,
            or `out` holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = load_config(checkpoint)
    family = families.of(config.model_type)
    spec = read_model_spec(checkpoint)
    schedule = Schedule.resolve(profile, spec)
    before = _existing(out, spec, dtype)
    files = place_checkpoint(checkpoint, out, dtype)
    tensors = TensorMap(
        (tensor for file in files if file.suffix == ".safetensors" for tensor in read_header(file)),
        family.canonical,
    )
    vision = export_vision(family, config, profile, tensors, out, dtype)
    decoders = {
        lowering: export_decoder(family, config, profile, schedule, tensors, out, lowering)
        for lowering in get_args(Lowering)
    }
    ignored = tensors.rest(lambda name: family.unused(config, name))
    profile_file = f"{profile.name}.profile.json"
    write_whole(out / profile_file, msgspec.json.format(msgspec.json.encode(profile), indent=2))
    image, image_size = image_processing(checkpoint)
    entry = Entry(profile=profile_file, vision=vision, decoders=decoders)
    written = [
        *(file.relative_to(out).as_posix() for file in files),
        vision,
        profile_file,
        *decoders.values(),
    ]
    manifest = Manifest(
        producer=f"trimvlm {trimvlm.__version__}, torch {torch.__version__}",
        model=spec,
        dtype=dtype,
        image=image,
        image_size=image_size,
        text=text_processing(checkpoint),
        weights=tuple(name for name in written if name.endswith(".safetensors")),
        ignored_tensors=ignored,
        profiles={**(before.profiles if before else {}), profile.name: entry},
        files={**(before.files if before else {}), **_recorded(out, written, before)},
    )
    write_manifest(out, manifest)
    return out


def _existing(out: Path, spec: Any, dtype: Dtype) -> Manifest | None:
    """The manifest of the bundle that a profile is added to, or None for a new one."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a bundle; give a new directory")
        return None
    manifest = Bundle(out).manifest
    if manifest.model != spec or manifest.dtype != dtype:
        raise UserError(
            f"{out}: holds another checkpoint or precision ({manifest.dtype}); give a new directory"
        )
    return manifest


def place_checkpoint(checkpoint: Path, out: Path, dtype: Dtype) -> list[Path]:
    """Weights (linked, or converted) and the small files that make `out/checkpoint` loadable by transformers."""
    directory = out / CHECKPOINT
    directory.mkdir(parents=True, exist_ok=True)
    files = [place(file, directory, dtype) for file in weight_files(checkpoint)]
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in {".json", ".jinja", ".model", ".txt"} and file.is_file():
            shutil.copyfile(file, directory / file.name)
            files.append(directory / file.name)
    return files


def export_vision(
    family: ModuleType, config: Any, profile: Profile, tensors: TensorMap, out: Path, dtype: Dtype
) -> str:
    """Vision tower and projector with the profile's taps; profiles with the same taps share the graph."""
    taps = profile.vision_taps
    names = [*(f"cls{n}" for n in taps.cls_attention), *(f"hidden{n}" for n in taps.features)]
    file = "-".join(["vision", *names]) + ".onnx"
    module = family.Vision(config, taps)
    weights = load_weights(module, module.parameter_names(), tensors)
    if (out / file).exists():
        return file
    size = config.vision_config.image_size
    rows = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    shapes = {"visual": ["visual_rows", config.text_config.hidden_size]}
    for name in family.vision_outputs(taps)[1:]:
        width = [rows] if name.startswith("cls") else [rows + 1, config.vision_config.hidden_size]
        shapes[name] = ["images", *width]
    model = trace(
        module,
        {"pixel_values": torch.zeros(2, 3, size, size, dtype=getattr(torch, dtype))},
        lambda _, dimension: dimension == 0,
        inputs={"pixel_values": ["images", 3, size, size]},
        outputs=shapes,
        opset=OPERATORS["primitive"].opset,
    )
    attach_weights(model, weights, out)
    save(model, out / file)
    return file


def export_decoder(
    family: ModuleType,
    config: Any,
    profile: Profile,
    schedule: Schedule,
    tensors: TensorMap,
    out: Path,
    lowering: Lowering,
) -> str:
    """One decoder graph; returns its file name."""
    file = f"{profile.name}.decoder.{lowering}.onnx"
    operators = OPERATORS[lowering]
    module = make_decoder(config, schedule, lowering)
    weights = load_weights(module, decoder_names(family, config, module), tensors)
    model = trace(
        module,
        decoder_example(schedule, dtype=next(module.parameters()).dtype),
        is_dynamic,
        inputs=decoder_inputs(schedule),
        outputs=decoder_outputs(schedule),
        opset=operators.opset,
    )
    attach_weights(model, weights, out)
    save(model, out / file)
    return file


def make_decoder(config: Any, schedule: Schedule, lowering: Lowering) -> Decoder:
    """The decoder without weights; rotary frequencies as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = config.text_config
    rotary = LlamaRotaryEmbedding(text)
    with torch.device("meta"):
        module = Decoder(text, schedule, OPERATORS[lowering], torch.empty(0), float(rotary.attention_scaling))
    module.inv_freq = rotary.inv_freq.float()
    return module


def decoder_names(family: ModuleType, config: Any, module: nn.Module) -> dict[str, str]:
    """From the decoder's parameter names to transformers' names in the whole model."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.text_config.tie_word_embeddings else {}
    names = {}
    for name, _ in module.named_parameters():
        source = tied.get(name, name)
        names[name] = source if source.startswith(family.LM_HEAD) else family.DECODER_PREFIX + source
    return names


def load_weights(module: nn.Module, names: dict[str, str], tensors: TensorMap) -> dict[str, Tensor]:
    """Maps every parameter of `module` onto its bytes in the bundle. Nothing is copied.

    Returns:
        Parameter name to tensor.
    """
    parameters = dict(module.named_parameters())
    weights = {name: tensors.take(source, tuple(parameters[name].shape)) for name, source in names.items()}
    state = {name: mapped(tensor) for name, tensor in weights.items()}
    module.load_state_dict(state, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return weights


def _recorded(out: Path, names: list[str], before: Manifest | None) -> dict[str, File]:
    """Sizes and hashes; a weight file that the bundle already had is not hashed again."""
    known = before.files if before else {}
    return {
        name: known[name] if name in known and name.endswith(".safetensors") else record(out / name)
        for name in names
    }
