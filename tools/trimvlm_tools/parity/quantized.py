"""The reference of quantised weights: the Hugging Face model with the values that they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

from trimvlm.bundle import Bundle, Entry
from trimvlm.errors import UserError
from trimvlm.opening import ORT_CPU

EMBEDDINGS = "embed_tokens."  # also the head's name where both are one tensor


class Codes(NamedTuple):
    """What an Engine says of its quantised weights: the bundle's file, and how it is read."""

    file: str
    bits: int
    block: int
    activations: str


def quantized(entry: Entry, target: str) -> Codes | None:
    """Of a target that ONNX Runtime runs; None: its weights are those of the checkpoint.

    Raises:
        UserError: no engine was built for it, or no library that the reference can be compared with runs it.
    """
    if target == ORT_CPU:
        return None
    engine = entry.engines.get(target)
    if engine is None or engine.backend != "onnxruntime":
        known = sorted(name for name, each in entry.engines.items() if each.backend == "onnxruntime")
        raise UserError(
            f"--target: {target!r} is no engine of this bundle that ONNX Runtime runs; known "
            f"are {', '.join({ORT_CPU: None, **dict.fromkeys(known)})}; engines of others are compared with "
            "--goldens, on their device"
        )
    said = next((each["quantized"] for each in engine.options.values() if "quantized" in each), None)
    return Codes(**said) if said else None


def take_codes(model: Any, bundle: Bundle, codes: Codes) -> None:
    """Puts the values that the codes stand for into a transformers model, in place of its matrices."""
    import torch
    from safetensors import safe_open

    from trimvlm_engines.quantizing.codes import dequantize, unpack
    from trimvlm_export import families

    family = families.of(model.config.model_type)
    parameters = dict(model.named_parameters())
    head: dict[int, torch.Tensor] = {}
    with safe_open(bundle.path(codes.file), "np") as stored:
        for key in {key.rpartition(".")[0] for key in stored.keys()}:  # noqa: SIM118 - no mapping
            packed, scales = (stored.get_tensor(f"{key}.{part}") for part in ("codes", "scales"))
            values = torch.from_numpy(dequantize(unpack(packed, codes.bits), scales, codes.bits))
            name, _, first = key.rpartition("weight")  # a head in pieces: `lm_head.weight.16384`
            if name in (EMBEDDINGS, family.LM_HEAD):
                head[int(first[1:] or 0)] = values
            else:
                parameters[f"{family.DECODER_PREFIX}{key}"].data.copy_(values)
    whole = torch.cat([head[first] for first in sorted(head)]) if head else None
    if whole is not None:  # it may have been the embeddings
        model.get_output_embeddings().weight = torch.nn.Parameter(whole, requires_grad=False)
