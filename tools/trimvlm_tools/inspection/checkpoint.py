"""A checkpoint, and what export would make of it: from its small files and the headers of its weights.

What export would refuse is found as export does it, by the same functions; each problem is kept, so that one
run shows them all. Nothing is written, and no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from trimvlm.accounting import kv_bytes_per_layer
from trimvlm.errors import UserError
from trimvlm.image_processing import ImageProcessing, SingleView
from trimvlm.images import natural_grid, profile_grid
from trimvlm.profile import Decisions, Grid, Method, ModelSpec, Profile
from trimvlm.schedule import Schedule, resolve
from trimvlm.text import Turn, render
from trimvlm_export import families
from trimvlm_export.checkpoint import Tensor, TensorMap, read_config, read_header, weight_files
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.graph_io import decoder_inputs, decoder_outputs
from trimvlm_export.processing import image_processing, text_processing
from trimvlm_export.source import map_tensors
from trimvlm_tools.inspection.graphs import values
from trimvlm_tools.inspection.profile import BYTES, describe
from trimvlm_tools.inspection.tensors import account, describe_stored, unreadable, wanted

KV = "float16"  # what the KV cache is counted in

# What follows from the text model alone, whatever the image.
TEXT = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "mrope")


class Problems(list[str]):
    """What export would refuse, each once; `problems(function, ...)` is its result, or None and a problem."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self._prefix = f"{checkpoint}: "

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            self.add(" ".join(str(error).removeprefix(self._prefix).split()))
            return None

    def add(self, problem: str) -> None:
        if problem not in self:
            self.append(problem)


def describe_checkpoint(
    name: str, directory: Path, image_size: tuple[int, int] | None, text: int
) -> dict[str, Any]:
    """The report, as plain data; what is not known is None.

    Args:
        name: what the user calls it.
        image_size: (width, height) in pixels, for models whose visual tokens depend on it.
        text: text rows that costs are counted with.

    Raises:
        UserError: no model there, or images of this size have no grid.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{name}: no manifest.json here, nor a model's config.json; give a bundle or a model")
    problems = Problems(directory)
    files: list[Path] = problems(weight_files, directory) or []
    headers = [problems(read_header, file) for file in files]
    tensors: list[Tensor] = [tensor for header in headers if header for tensor in header]
    for problem in unreadable(tensors):
        problems.add(problem)
    config = problems(read_config, directory)
    report: dict[str, Any] = {
        "name": name,
        "path": str(directory),
        "family": config.model_type if config else _model_type(directory),
        "stored": describe_stored(files, tensors) if files else None,
        **dict.fromkeys(
            ("text", "vision", "image", "tensors", "graphs", "kv_bytes_per_token", "profile", "prompt")
        ),
    }
    if config:
        family = families.of(config.model_type)
        complete = bool(files) and None not in headers
        mapped = problems(map_tensors, tensors, family, config) if complete else None
        report |= _of_family(config, directory, problems, image_size=image_size, text=text, tensors=mapped)
        processing = problems(text_processing, directory)
        turns = [Turn(text="...", images=1)]
        report["prompt"] = render(processing.template, turns) if processing else None
    return {**report, "problems": list(problems), "exportable": not problems}


def _of_family(
    config: Any,
    directory: Path,
    problems: Problems,
    *,
    image_size: tuple[int, int] | None,
    text: int,
    tensors: TensorMap | None,
) -> dict[str, Any]:
    """What the family's module says of the model."""
    family = families.of(config.model_type)
    processing: ImageProcessing | None = problems(image_processing, directory)
    image = _image(processing, image_size)
    some = _some_grid(family, config, image["grid"])
    spec: ModelSpec | None = problems(family.model_spec, config, None, some)
    dense = resolve(Decisions(), spec) if spec else None
    # Costs and sizes follow from the grid; names, layers and shapes of weights do not.
    settled = isinstance(processing, SingleView) or image["grid"] is not None
    report = {
        "image": image,
        "text": {"model_type": config.text_config.model_type, **_text(config, spec)} if spec else None,
        "vision": _vision(config, family, some, settled, problems),
        "kv_bytes_per_token": _kv_per_token(dense) if dense else None,
        "profile": None,
    }
    if spec and settled:
        profile = Profile(name="dense", method=Method(name="dense"), model=spec)
        report["profile"] = describe(profile, text, KV)
        image["visual_tokens"] = spec.visual_tokens
    return report | _of_graphs(
        config, family, problems, grid=some, dense=dense, settled=settled, tensors=tensors
    )


def _of_graphs(
    config: Any,
    family: ModuleType,
    problems: Problems,
    *,
    grid: Grid | None,
    dense: Schedule | None,
    settled: bool,
    tensors: TensorMap | None,
) -> dict[str, Any]:
    """The graphs of the dense model, and the tensors that they are made of.

    Args:
        grid: one that the family takes; `settled`: it is that of the user's images.
        dense: None: there is no schedule.
        tensors: None: not all of them could be found.
    """
    vision = problems(family.Vision, config, grid, None)
    decoder = problems(make_decoder, config, dense) if dense else None
    graphs: dict[str, Any] = {"vision": None, "decoder": None}
    needs: dict[str, Any] = {"vision": None, "decoder": None}
    if vision is not None:
        needs["vision"] = wanted(vision, vision.parameter_names())
        if settled and dense:
            pixels = family.pixel_values(config, grid)
            rows = "visual" if isinstance(pixels[0], str) else dense.visual_tokens
            graphs["vision"] = {
                "inputs": values({"pixel_values": pixels}),
                "outputs": values({"visual": [rows, dense.model.hidden]}),
            }
    if decoder is not None and dense:
        needs["decoder"] = wanted(decoder, decoder_names(family, config, decoder))
        graphs["decoder"] = {
            "inputs": values(decoder_inputs(dense)),
            "outputs": values(decoder_outputs(dense)),
        }
    accounts = None
    if tensors is not None:
        accounts, found = account(tensors, config, family, needs)
        for problem in found:
            problems.add(problem)
    return {"graphs": graphs, "tensors": accounts}


def _image(processing: ImageProcessing | None, size: tuple[int, int] | None) -> dict[str, Any]:
    """How images are prepared; the grid is that of images of the size, where they have one."""
    grid = profile_grid(processing, *size) if processing and size else None
    if processing and size and grid is None and not isinstance(processing, SingleView):
        raise UserError(
            f"--image-size: no grid of visual tokens has the shape of {size[0]}x{size[1]} pixels in this "
            "model; give a size that is less narrow"
        )
    return {
        "processing": msgspec.to_builtins(processing),
        "size": size,
        "grid": grid,
        "natural": natural_grid(processing, *size) == grid if processing and size and grid else None,
        "visual_tokens": None,
    }


def _some_grid(family: ModuleType, config: Any, grid: Grid | None) -> Grid | None:
    """The grid; where none is given one that the family takes, for what does not depend on it."""
    if grid is None:
        for some in (None, (1, 1)):
            try:
                family.tower(config, some)
            except UserError:
                continue
            return some
    return grid


def _text(config: Any, spec: ModelSpec) -> dict[str, Any]:
    return {field: getattr(spec, field) for field in TEXT} | {"tied": config.tie_word_embeddings}


def _kv_per_token(dense: Schedule) -> int:
    one, none = (sum(kv_bytes_per_layer(dense, text, BYTES[KV])) for text in (1, 0))
    return one - none


def _vision(
    config: Any, family: ModuleType, grid: Grid | None, settled: bool, problems: Problems
) -> dict[str, Any] | None:
    """The tower: what an encoder stage would rank, and how many views of an image it sees."""
    tower = problems(family.tower, config, grid)
    if tower is None:
        return None
    found = {"model_type": config.vision_config.model_type, **msgspec.to_builtins(tower)}
    if not settled:
        found |= {"views": None, "columns": None}
        if grid is not None:  # the family has no view of a fixed size
            found["patches"] = None
    return found


def _model_type(directory: Path) -> str | None:
    try:
        found = json.loads((directory / "config.json").read_text())
    except ValueError:
        return None
    return found.get("model_type") if isinstance(found, dict) else None
