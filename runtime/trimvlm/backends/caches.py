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
        rows: filled rows, by layer; as arrays that ONNX Runtime reads where they are, parts of `counts`.
        room: rows of the buffers, in the order of `counts`.
        runs: how many; what an earlier run than the last one kept is of no use any more.
        bound: binding of the last run and what it has by name: binding all anew takes a millisecond.
    """

    def __init__(self, past: Mapping[str, NDArray[Any]], spare: dict[str, NDArray[Any]]) -> None:
        """`spare` is memory that is free; what is used of it is put back when nothing refers to these."""
        self.buffers = dict(past)
        self.memory: dict[str, NDArray[Any]] = {}
        counts = {int(name.partition(".")[2]): array.shape[2] for name, array in past.items()}
        self.counts = np.array([*counts.values()])
        self.room = self.counts.copy()
        self.rows = {layer: self.counts[number : number + 1] for number, layer in enumerate(counts)}
        self.runs = 0
        self.bound: Bound | None = None
        self.spare = spare
        weakref.finalize(self, spare.update, self.memory).atexit = False

    def reserve(self, added: NDArray[np.int64]) -> None:
        """Makes room for so many more rows of each layer; for just these before the first run: a prompt's
        attention then passes over none that is not filled."""
        wanted = self.counts + added
        small = wanted > self.room if self.runs else np.ones_like(wanted, dtype=bool)
        if small.any():
            for number, layer in enumerate(self.rows):
                if small[number]:
                    self.room[number] = self._grow(layer, int(wanted[number]))

    def _grow(self, layer: int, wanted: int) -> int:
        """Rows of the layer's buffers from now on."""
        filled, rows = int(self.rows[layer][0]), wanted
        for name in (f"{kind}.{layer}" for kind in KINDS):
            before = self.buffers[name]
            rows = max(wanted, before.shape[2] + ROOM) if self.runs else wanted
            self.buffers[name] = buffer = self._lay_out(name, before, rows)
            for head in reversed(range(before.shape[1])):  # the last moves farthest, in the same memory
                buffer[0, head, :filled] = before[0, head, :filled]
            buffer[:, :, wanted:] = 0  # attention gives the room no weight, which a NaN would survive
            self.bound = None
        return rows

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
        self.visual = np.array([int(rows) for rows in told["layers"].values()])  # that each layer caches
        self.names = [f"{kind}.{layer}" for layer in told["layers"] for kind in KINDS]
        self.pasts, self.presents = ({f"{each}_{name}" for name in self.names} for each in (PAST, PRESENT))
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
        from onnxruntime import OrtValue

        caches, given, text = self._caches(feeds), feeds["visual"].shape[0], len(feeds["input_ids"])
        added = given * self.visual // self.image + text
        caches.reserve(added)
        others = [name for name in (*fetch, *keep) if name not in self.presents]
        if caches.bound is None or caches.bound.outputs != others:
            caches.bound = Bound(self.session.io_binding(), caches, others)
        caches.bound.feed({name: value for name, value in feeds.items() if name not in self.pasts})
        self.session.run_with_iobinding(caches.bound.binding, options)
        caches.runs += 1
        caches.counts += added
        outputs = caches.bound.binding.get_outputs_as_ortvaluevector()  # no object for each of the buffers
        values = {name: outputs[number] for number, name in enumerate(others, len(self.names))}
        results: dict[str, Any] = {name: values[name].numpy() for name in fetch if name in values}
        results |= {name: OrtValue(values[name]) for name in keep if name in values}
        results |= {name: caches.filled(name.partition("_")[2]) for name in fetch if name not in values}
        kept = Kept(caches)
        return results | {name: kept for name in keep if name not in values}

    def _caches(self, feeds: Mapping[str, Any]) -> Caches:
        """The caches that a run goes on with: those of the run before, or new ones of arrays."""
        first = feeds[f"{PAST}_{self.names[0]}"]
        if not isinstance(first, Kept):
            return Caches({name: feeds[f"{PAST}_{name}"] for name in self.names}, self.spare)
        same = all(feeds[name] is first for name in self.pasts)
        assert same and first.run == first.caches.runs, "what a run kept was fed to another run before"
        return first.caches
