"""The commands of NVIDIA's own tools that build the plans of a target, for people who want to use those.

`trtexec` comes with TensorRT, `tensorrt_rtx` with TensorRT-RTX, Polygraphy from the package index. Plans
that they build are not recorded in the bundle, so a Session does not open them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trimvlm import machine
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines import targets, versions
from trimvlm_engines.build import check
from trimvlm_engines.parts import Part, parts
from trimvlm_engines.shapes import ShapeRange

RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX=1"


class Command(NamedTuple):
    """One command that builds one plan into the current directory.

    Attributes:
        tool: `trtexec`, `tensorrt_rtx` or `polygraphy`.
        role: part of the profile.
        argv: the command; variables of the environment may stand before the tool.
        notes: what the user should know of it.
    """

    tool: str
    role: str
    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """As it is pasted into a shell, an option per line, notes as comments before it."""
        comments = "".join(f"# {note}\n" for note in self.notes)
        variables = [word for word in self.argv[:1] if word == RTX_VARIABLE]
        words = [*variables, *map(shlex.quote, self.argv[len(variables) :])]
        lead = len(variables) + (2 if self.tool == "polygraphy" else 1)
        return comments + " \\\n  ".join([" ".join(words[:lead]), *_options(words[lead:])])


def explain(directory: Path | str, target: Target | str, profile: str | None = None) -> list[Command]:
    """What builds the plans of a profile by hand; nothing is built or looked for on this machine.

    Args:
        directory, target, profile: as for `build`.

    Raises:
        UserError: as `build`, as far as the bundle and the target go; a target without plans.
    """
    target = target if isinstance(target, Target) else targets.load(target)
    if target.backend == "onnxruntime":
        raise UserError(
            f"target {target.name}: ONNX Runtime runs the graphs as they are, so no command builds anything; "
            "choose a TensorRT target (trimvlm targets)"
        )
    bundle = Bundle(directory)
    name, entry = bundle.entry(profile)
    check(bundle, target)
    return [
        command
        for role, part in parts(bundle, name, entry, target).items()
        for command in _commands(bundle, role, part, target)
    ]


def version_explained(target: Target) -> str:
    """The version that the commands are for: the installed one, or else the oldest that the target allows."""
    installed = machine.library_version(target.backend)
    if installed and target.allows(installed):
        return installed
    oldest = re.findall(r">=([\d.]+)", target.versions)
    if not oldest:
        raise UserError(f"target {target.name}: versions: {target.versions!r} names no oldest one; add >=")
    return oldest[-1]


def _commands(bundle: Bundle, role: str, part: Part, target: Target) -> list[Command]:
    graph, plan = bundle.directory / part.graph, Path(part.plan).name
    dynamic = _dynamic_inputs(bundle, part)
    sets = [
        {name: shape for name, shape in ranges.items() if name in dynamic}
        for ranges in part.phases or [part.ranges]
    ]
    notes: list[str] = []
    if part.made is not None:
        notes.append(f"{part.graph} is written by trimvlm build")
    attends = role.startswith("decoder") and target.lowering == "fused"
    if attends and target.backend == "tensorrt_rtx" and bundle.manifest.dtype == "float32":
        notes.append("refused: float32 Attention must be taken apart, which trimvlm build does and no option")
    own = "trtexec" if target.backend == "tensorrt" else "tensorrt_rtx"
    flags = [f"--onnx={graph}", f"--saveEngine={plan}", "--skipInference"]
    if target.backend == "tensorrt":
        flags.append("--noTF32")
        if versions.trtexec_types_weakly(version_explained(target)):
            flags.append("--stronglyTyped")
    elif target.compute_capability:
        flags.append(f"--computeCapabilities={target.compute_capability.replace('.', '')}")
    if target.plan.version_compatible:
        flags.append("--versionCompatible")
    if target.plan.stripped:
        flags.append("--stripWeights")
    polygraphy = ["polygraphy", "convert", str(graph), "--convert-to", "trt", "-o", plan, "--strongly-typed"]
    if target.backend == "tensorrt_rtx" and target.compute_capability:
        polygraphy = [RTX_VARIABLE, *polygraphy, "--compute-capabilities", target.compute_capability]
    if target.plan.version_compatible:
        polygraphy.append("--version-compatible")
    if target.plan.stripped:
        polygraphy.append("--strip-plan")
    return [
        Command(own, role, (own, *flags, *_trtexec_shapes(sets)), tuple(notes)),
        Command("polygraphy", role, (*polygraphy, *_polygraphy_shapes(sets)), tuple(notes)),
    ]


def _trtexec_shapes(sets: Sequence[Mapping[str, ShapeRange]]) -> list[str]:
    """`--minShapes=a:1x2,b:3` and so on; several sets are numbered."""
    words: list[str] = []
    for number, ranges in enumerate(sets):
        if not ranges:
            continue
        if len(sets) > 1:
            words.append(f"--profile={number}")
        for end in ("min", "opt", "max"):
            shapes = (f"{name}:{'x'.join(map(str, getattr(shape, end)))}" for name, shape in ranges.items())
            words.append(f"--{end}Shapes={','.join(shapes)}")
    return words


def _polygraphy_shapes(sets: Sequence[Mapping[str, ShapeRange]]) -> list[str]:
    """`--trt-min-shapes a:[1,2] b:[3]` and so on, once for each set."""
    words: list[str] = []
    for ranges in sets:
        for end in ("min", "opt", "max") if ranges else ():
            shapes = (f"{name}:[{','.join(map(str, getattr(shape, end)))}]" for name, shape in ranges.items())
            words += [f"--trt-{end}-shapes", *shapes]
    return words


def _dynamic_inputs(bundle: Bundle, part: Part) -> set[str]:
    """Inputs that need a range: trtexec refuses ranges where none has a dynamic dimension."""
    import onnx

    model = onnx.load_from_string(part.made or bundle.path(part.graph).read_bytes())
    return {
        node.name
        for node in model.graph.input
        if any(not dim.HasField("dim_value") for dim in node.type.tensor_type.shape.dim)
    }


def _options(words: Sequence[str]) -> list[str]:
    """Each option with its values as one line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines
