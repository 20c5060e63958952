"""KV caches that grow in place, for the decoder graphs that `trimvlm_export.passes.in_place` makes.

Such a graph has for layers {l} that it names in its property `LAYERS`, in place of `past_key.{l}` and
`past_value.{l}`:

    cache_key.{l}, cache_value.{l}      float [1, G, B_l, C]: buffers of B_l rows
    past_rows.{l} int64 [1]             how many of these are rows of the past
    present_key.{l}, present_value.{l}  the buffers with the new rows behind the past; the same memory

Here it takes and gives what an ordinary decoder does. A buffer is as large as the prompt needs; for the
tokens after it grows by `ROOM` rows at a time.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Port

LAYERS = "trimvlm.cached_rows"  # JSON: {"image": visual rows of one image, "layers": {l: those it caches}}
CACHE, PAST, PAST_ROWS, PRESENT = "cache", "past", "past_rows", "present"
KINDS = ("key", "value")
ROOM = 64  # rows; attention passes over those that are not filled


class Caches:
    """Buffers of one conversation.

    Attributes:
        buffers: [1, G, B, C] by name (`key.3`).
        memory: what they lie in, with room.
        rows: filled rows, by layer; as arrays, which ONNX Runtime reads where they are.
        runs: how many; what an earlier run than the last one kept is of no use any more.
        bound: binding of the last run and what it has by name: binding all anew takes a millisecond.
    """

    def __init__(self, past: Mapping[str, NDArray[Any]], spare: dict[str, NDArray[Any]]) -> None:
        """`spare` is memory that is free; what is used of it is put back when nothing refers to these."""
        self.buffers = dict(past)
        self.memory: dict[str, NDArray[Any]] = {}
        self.rows = {int(name.partition(".")[2]): np.array([array.shape[2]]) for name, array in past.items()}
        self.runs = 0
        self.bound: Bound | None = None
        self.spare = spare
        weakref.finalize(self, spare.update, self.memory).atexit = False

    def reserve(self, layer: int, wanted: int) -> None:
        """Makes room for `wanted` rows; for just these before the first run: a prompt's attention then passes
        over none that is not filled."""
        for name in (f"{kind}.{layer}" for kind in KINDS):
            before = self.buffers[name]
            if self.runs and before.shape[2] >= wanted:
                continue
            filled = int(self.rows[layer][0])
            rows = max(wanted, before.shape[2] + ROOM) if self.runs else wanted
            self.buffers[name] = buffer = self._lay_out(name, before, rows)
            for head in reversed(range(before.shape[1])):  # the last moves farthest, in the same memory
                buffer[0, head, :filled] = before[0, head, :filled]
            buffer[:, :, wanted:] = 0  # attention gives the room no weight, which a NaN would survive
            self.bound = None

    def _lay_out(self, name: str, before: NDArray[Any], rows: int) -> NDArray[Any]:
        """A buffer of `rows` rows, in the same memory where it is large enough."""
        _, heads, _, size = before.shape
        memory = self.memory.get(name)
        if memory is None:
            memory = self.spare.pop(name, None)
        if memory is None or memory.size < heads * rows * size:
            memory = np.empty(heads * (rows + ROOM) * size, before.dtype)
        self.memory[name] = memory
        return memory[: heads * rows * size].reshape(1, heads, rows, size)

    def filled(self, name: str) -> NDArray[Any]:
        """A copy of a cache's rows."""
        return self.buffers[name][:, :, : int(self.rows[int(name.partition(".")[2])][0])].copy()


class Bound:
    """A binding that has all buffers of some caches, and outputs beside them.

    Attributes:
        outputs: names, in their order after the buffers.
    """

    def __init__(self, binding: Any, caches: Caches, outputs: list[str]) -> None:
        self.binding, self.outputs = binding, outputs
        self._fed: dict[str, Any] = {}
        for layer, rows in caches.rows.items():
            binding.bind_cpu_input(f"{PAST_ROWS}.{layer}", rows)
        for name, buffer in caches.buffers.items():
            place = "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data
            binding.bind_input(f"{CACHE}_{name}", *place)
            binding.bind_output(f"{PRESENT}_{name}", *place)

    def feed(self, feeds: Mapping[str, Any]) -> None:
        """Binds what is not bound already; outputs get memory of their own in every run."""
        for name in self.outputs:
            self.binding.bind_output(name)
        for name, value in feeds.items():
            if self._fed.get(name) is value:
                continue
            if isinstance(value, np.ndarray):
                self.binding.bind_cpu_input(name, value)
            else:
                self.binding.bind_ortvalue_input(name, value)
            self._fed[name] = value


class Kept:
    """What a run leaves of one cache for the next one."""

    def __init__(self, caches: Caches) -> None:
        self.caches, self.run = caches, caches.runs


class InPlace:
    """A session of such a graph, with the inputs and outputs of an ordinary decoder.

    Args:
        session: ONNX Runtime's, on the CPU.
        inputs, outputs: its ports.
    """

    def __init__(self, session: Any, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> None:
        told = json.loads(session.get_modelmeta().custom_metadata_map[LAYERS])
        self.image: int = told["image"]
        self.layers = {int(layer): int(rows) for layer, rows in told["layers"].items()}
        self.names = [f"{kind}.{layer}" for layer in self.layers for kind in KINDS]
        self.session = session
        self.spare: dict[str, NDArray[Any]] = {}
        self.inputs = {
            name.replace(f"{CACHE}_", f"{PAST}_", 1): port
            for name, port in inputs.items()
            if not name.startswith(f"{PAST_ROWS}.")
        }
        self.outputs = dict(outputs)

    def run(
        self, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str], options: Any
    ) -> dict[str, Any]:
        """See `Backend.run`. Feeds are arrays, OrtValues or what the run before kept, which is used up."""
        past = {name: feeds[f"{PAST}_{name}"] for name in self.names}
        caches, given = self._caches(past), feeds["visual"].shape[0]
        added = {
            n: given * visual // self.image + len(feeds["input_ids"]) for n, visual in self.layers.items()
        }
        for layer, rows in added.items():
            caches.reserve(layer, int(caches.rows[layer][0]) + rows)
        others = [name for name in (*fetch, *keep) if name.partition("_")[2] not in past]
        if caches.bound is None or caches.bound.outputs != others:
            caches.bound = Bound(self.session.io_binding(), caches, others)
        caches.bound.feed({n: value for n, value in feeds.items() if n.partition("_")[2] not in past})
        self.session.run_with_iobinding(caches.bound.binding, options)
        caches.runs += 1
        for layer, rows in added.items():
            caches.rows[layer] += rows
        values = dict(zip(others, caches.bound.binding.get_outputs()[2 * len(self.layers) :], strict=True))
        results: dict[str, Any] = {name: values[name].numpy() for name in fetch if name in values}
        results |= {name: values[name] for name in keep if name in values}
        results |= {name: caches.filled(name.partition("_")[2]) for name in fetch if name not in values}
        kept = Kept(caches)
        return results | {name: kept for name in keep if name not in values}

    def _caches(self, past: Mapping[str, Any]) -> Caches:
        """The caches that a run goes on with: those of the run before, or new ones of arrays."""
        first = next(iter(past.values()))
        if not isinstance(first, Kept):
            return Caches(past, self.spare)
        same = all(isinstance(each, Kept) and each.caches is first.caches for each in past.values())
        assert same and first.run == first.caches.runs, "what a run kept was fed to another run before"
        return first.caches
