"""Which tensors of a checkpoint the graphs would be made of: by names and shapes, nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trimvlm.errors import UserError
from trimvlm_export.checkpoint import SAFETENSORS_DTYPES, Tensor, TensorMap

# Parameter names in transformers' model, with the shapes that a graph needs.
Wanted = Mapping[str, tuple[int, ...]]


def wanted(module: Any, names: Mapping[str, str]) -> Wanted:
    """What a module needs; `names`: its parameter names to transformers' names."""
    parameters = dict(module.named_parameters())
    return {whole: tuple(parameters[name].shape) for name, whole in names.items()}


def sizes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """How many, and of how many parameters and bytes."""
    found = list(tensors)
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(tensor.shape) for tensor in found),
        "bytes": sum(tensor.length for tensor in found),
    }


def describe_stored(files: Sequence[Path], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What is in the weight files, whatever it is for."""
    dtypes = sorted({tensor.dtype for tensor in tensors})
    return {
        "files": {file.name: file.stat().st_size for file in files},
        **sizes(tensors),
        "dtypes": {dtype: sizes(t for t in tensors if t.dtype == dtype) for dtype in dtypes},
    }


def unreadable(tensors: Iterable[Tensor]) -> list[str]:
    """Problems with dtypes that are no floats which export takes."""
    known = SAFETENSORS_DTYPES.values()
    odd = [tensor for tensor in tensors if tensor.dtype not in known]
    return [
        f"{dtype} tensors are not supported, only {', '.join(known)}: {_first(names)}"
        for dtype in sorted({tensor.dtype for tensor in odd})
        if (names := [f"{tensor.name} in {tensor.file.name}" for tensor in odd if tensor.dtype == dtype])
    ]


def account(
    tensors: TensorMap, config: Any, family: ModuleType, graphs: Mapping[str, Wanted | None]
) -> tuple[dict[str, Any], list[str]]:
    """Takes each tensor that the graphs need, as export does.

    Args:
        graphs: role to what it needs; None: not known, and with it which tensors have no use.

    Returns:
        Sizes by role (`consumed`), names and reasons (`ignored`), and of what should not be: parameters
        without a fitting tensor (`missing`) and tensors without a use (`unexpected`), both with the reason.
        Then the problems.
    """
    consumed, missing = {}, {}
    for role, needed in graphs.items():
        taken = {}
        for name, shape in (needed or {}).items():
            try:
                taken[name] = tensors.take(name, shape)
            except UserError as error:
                missing[name] = str(error)
        consumed[role] = None if needed is None else sizes(taken.values())
    rest = {name: family.unused(config, name) for name in sorted(set(tensors.tensors) - tensors.taken)}
    # A tensor of the wrong shape is no surprise: it is listed as missing.
    unexpected = [name for name, reason in rest.items() if reason is None and name not in missing]
    if None in graphs.values():
        unexpected = []
    ignored = [name for name, reason in rest.items() if reason is not None]
    problems = []
    if missing:
        problems.append(_first(list(missing.values()), "tensors that are missing or do not fit"))
    if unexpected:
        names = [tensors.tensors[name].name for name in unexpected]
        reason = "not used by the exported model and not known to be unneeded: "
        problems.append(reason + _first(names, "tensors"))
    report = {
        "consumed": consumed,
        "ignored": {tensors.tensors[name].name: rest[name] for name in ignored},
        "ignored_sizes": sizes(tensors.tensors[name] for name in ignored),
        "missing": missing,
        "unexpected": [tensors.tensors[name].name for name in unexpected],
    }
    return report, problems


def _first(found: list[str], what: str = "tensors") -> str:
    """The first of several, and how many there are."""
    return found[0] if len(found) == 1 else f"{found[0]} (the first of {len(found)} {what})"
