"""Changes that would make a profile fit: each is predicted like the profile itself, and kept if it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from trimvlm.bundle import Bundle, Dtype
from trimvlm.errors import UserError
from trimvlm.target import Target, Weights
from trimvlm.value import Value
from trimvlm_engines import targets
from trimvlm_engines.fit.prediction import CPU, Prediction, predict
from trimvlm_engines.fit.sizes import Request

LEAST_TEXT, LEAST_TOKENS = 32, 16  # rows, below which a shorter prompt or answer is no help to anyone


class Change(Value, frozen=True, kw_only=True):
    """One change, or several at once, with which it fits.

    Attributes:
        what: to do.
        peak: bytes that are then needed.
        left: bytes that are then free; None where the memory is unknown.
        takes_turns: it fits only where engines take turns in memory.
    """

    what: str
    peak: int
    left: int | None
    takes_turns: bool


class _Case(Value, frozen=True, kw_only=True):
    """What is changed, all of it at once."""

    profile: str
    target: Target
    request: Request
    dtype: Dtype


def changes(bundle: Bundle, profile: str, target: Target, request: Request) -> tuple[Change, ...]:
    """Single changes that make a profile fit, of each kind the smallest; else all kinds at once."""
    start = _Case(profile=profile, target=target, request=request, dtype=bundle.manifest.dtype)
    exact = _first(bundle, _limits(bundle, start))
    smaller = () if exact else (_text, _new_tokens, _images)  # a smaller request is no better than this one
    kinds = (_blocks, *smaller, _dtype, _weights, _profiles, _targets)
    tried = [exact, *(_first(bundle, kind(bundle, start)) for kind in kinds)]
    found = [change for change in tried if change is not None]
    return tuple(found) or tuple(filter(None, [_together(bundle, start)]))


def _first(bundle: Bundle, tried: Iterator[tuple[str, _Case]]) -> Change | None:
    """The first of a kind that fits."""
    for what, case in tried:
        prediction = _predict(bundle, case)
        if prediction is not None and not prediction.problems:
            return Change(
                what=what,
                peak=prediction.memory.least,
                left=prediction.left,
                takes_turns=prediction.takes_turns,
            )
    return None


def _predict(bundle: Bundle, case: _Case) -> Prediction | None:
    """None: there is no such thing in this bundle, as another target's decoder."""
    try:
        return predict(bundle, case.profile, case.target, case.request, dtype=case.dtype, times=False)
    except UserError:
        return None


def _with(case: _Case, **fields: Any) -> _Case:
    return msgspec.structs.replace(case, **fields)


def _limited(case: _Case, request: Request, **fields: Any) -> _Case:
    """For a request, with plans that are built for it and nothing larger."""
    room = {name: max(1, getattr(request, name)) for name in request.__struct_fields__}
    limits = msgspec.structs.replace(case.target.limits, **{**room, **fields})
    return _with(case, request=request, target=msgspec.structs.replace(case.target, limits=limits))


def _limits(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """Plans for this request alone."""
    if case.target.provider != CPU:
        asked = case.request
        said = f"images: {max(1, asked.images)}, text: {asked.text}, new_tokens: {asked.new_tokens}"
        yield f"limits of exactly this request in a target of your own ({said})", _limited(case, asked)


def _blocks(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """Engines of fewer layers, for boards that give only small pieces of memory."""
    if case.target.provider == CPU or case.target.limits.allocation_mb is None:
        return
    layers = bundle.profile(case.profile).model.layers
    while layers > 1:
        layers = -(-layers // 2)
        yield (
            f"engines of {layers} layers for this request (limits.layers_per_engine)",
            _limited(case, case.request, layers_per_engine=layers),
        )


def _text(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    text = case.request.text
    while (text := text // 2) >= LEAST_TEXT:
        yield f"--text {text}{_rebuilt(case)}", _shorter(case, text=text)


def _new_tokens(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    count = case.request.new_tokens
    while (count := count // 2) >= LEAST_TOKENS:
        yield f"--new-tokens {count}{_rebuilt(case)}", _shorter(case, new_tokens=count)


def _images(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    for images in range(case.request.images - 1, 0, -1):
        yield f"--images {images}{_rebuilt(case)}", _shorter(case, images=images)


def _shorter(case: _Case, **fields: int) -> _Case:
    return _limited(case, msgspec.structs.replace(case.request, **fields))


def _rebuilt(case: _Case) -> str:
    return "" if case.target.provider == CPU else " and limits of that in a target of your own"


def _dtype(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """Another precision that the target runs, of float16 and bfloat16 the first."""
    if case.target.provider == CPU:
        return  # it computes float16 in float32
    for dtype in case.target.dtypes:
        if dtype != case.dtype:
            yield f"the model exported with --dtype {dtype}", _with(case, dtype=dtype)


def _weights(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """Quantised weights, as many bits as fit."""
    if case.target.weights is not None:
        return
    shipped = (targets.SHIPPED / f"{case.target.name}.yaml").is_file()
    for weights in (Weights(bits=8), Weights(bits=4)):
        target = targets.quantized(case.target, weights)
        said = f"--target {target.name}" if shipped else f"weights: {{bits: {weights.bits}}} in the target"
        yield said, _with(case, target=target)


def _profiles(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """The bundle's other profiles for images of the same grid; those that keep most come first."""
    grid = bundle.profile(case.profile).model.grid
    others = [name for name in bundle.manifest.profiles if name != case.profile]
    same = [name for name in others if bundle.profile(name).model.grid == grid]
    costs = {name: _predict(bundle, _with(case, profile=name)) for name in same}
    known = {name: found.memory.least for name, found in costs.items() if found is not None}
    for name in sorted(known, key=lambda name: -known[name]):
        yield f"--profile {name}", _with(case, profile=name)


def _targets(bundle: Bundle, case: _Case) -> Iterator[tuple[str, _Case]]:
    """Shipped targets of the same library with more memory, the smallest first."""
    larger = [
        other
        for other in targets.shipped()
        if other.backend == case.target.backend
        and (other.l4t is None) == (case.target.l4t is None)
        and other.memory_gb
        and other.memory_gb > (case.target.memory_gb or 0)
    ]
    for other in sorted(larger, key=lambda other: other.memory_gb or 0):
        yield f"--target {other.name}", _with(case, target=other)


def _together(bundle: Bundle, start: _Case) -> Change | None:
    """The furthest of every kind but the target, at once."""
    case, said = start, []
    kinds: list[Callable[[Bundle, _Case], Iterator[tuple[str, _Case]]]] = [
        _dtype, _weights, _profiles, _text, _new_tokens, _blocks,
    ]  # fmt: skip
    for kind in kinds:
        tried = list(kind(bundle, case))
        if tried:
            what, case = tried[0] if kind is _dtype else tried[-1]
            said.append(what)
    return _first(bundle, iter([("; ".join(said), case)]))
