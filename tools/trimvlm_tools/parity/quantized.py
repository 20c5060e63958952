"""The reference of quantised weights: the Hugging Face model with the values that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trimvlm.bundle import Bundle, Entry
from trimvlm.errors import UserError
from trimvlm.opening import ORT_CPU

EMBEDDINGS = "embed_tokens."  # also the head's name where both are one tensor


class Codes(NamedTuple):
    """What an Engine says of the quantised weights of one part.

    Attributes:
        graph: of the bundle, that names them; None: the decoder's, whose names every profile's graph shares.
    """

    graph: str | None
    file: str
    bits: int
    block: int
    activations: str


def quantized(entry: Entry, target: str) -> tuple[Codes, ...]:
    """Of a target that ONNX Runtime runs; none: its weights are those of the checkpoint.

    Raises:
        UserError: no engine was built for it, or no library that the reference can be compared with runs it.
    """
    if target == ORT_CPU:
        return ()
    engine = entry.engines.get(target)
    if engine is None or engine.backend != "onnxruntime":
        known = sorted(name for name, each in entry.engines.items() if each.backend == "onnxruntime")
        raise UserError(
            f"--target: {target!r} is no engine of this bundle that ONNX Runtime runs; known "
            f"are {', '.join({ORT_CPU: None, **dict.fromkeys(known)})}; engines of others are compared with "
            "--goldens, on their device"
        )
    graphs = {"vision": entry.vision, "projector": entry.projector}
    found = {role: each["quantized"] for role, each in engine.options.items() if "quantized" in each}
    return tuple(dict.fromkeys(Codes(graph=graphs.get(role), **said) for role, said in found.items()))


def take_codes(model: Any, bundle: Bundle, parts: Sequence[Codes]) -> None:
    """Puts the values that the codes stand for into a transformers model, in place of its matrices."""
    import torch
    from safetensors import safe_open

    from trimvlm_engines.quantizing.codes import dequantize, unpack
    from trimvlm_export import families

    family = families.of(model.config.model_type)
    parameters = dict(model.named_parameters())
    head: dict[int, torch.Tensor] = {}
    for codes in parts:
        names = _checkpoint_names(bundle, codes.graph) if codes.graph else {}
        with safe_open(bundle.path(codes.file), "np") as stored:
            for key in {key.rpartition(".")[0] for key in stored.keys()}:  # noqa: SIM118 - no mapping
                packed, scales = (stored.get_tensor(f"{key}.{part}") for part in ("codes", "scales"))
                values = torch.from_numpy(dequantize(unpack(packed, codes.bits), scales, codes.bits))
                name, _, first = key.rpartition("weight")  # a head in pieces: `lm_head.weight.16384`
                if name in (EMBEDDINGS, family.LM_HEAD):
                    head[int(first[1:] or 0)] = values
                else:
                    whole_name = family.canonical(names[key]) if names else f"{family.DECODER_PREFIX}{key}"
                    weight = parameters[whole_name].data
                    weight.copy_(values[:, : weight.shape[1]])
    whole = torch.cat([head[first] for first in sorted(head)]) if head else None
    if whole is not None:  # it may have been the embeddings
        output = model.get_output_embeddings()
        whole = whole[:, : output.weight.shape[1]]
        output.weight = torch.nn.Parameter(whole, requires_grad=False)


def _checkpoint_names(bundle: Bundle, graph: str) -> dict[str, str]:
    """From names of a graph's weights to those of the checkpoint, by where their bytes are."""
    import onnx

    from trimvlm_export.checkpoint import read_header

    files = bundle.manifest.weights
    at = {(file, str(each.offset)): each.name for file in files for each in read_header(bundle.path(file))}
    found = {}
    for tensor in onnx.load(str(bundle.path(graph)), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            found[tensor.name] = at[place["location"], place["offset"]]
    return found
