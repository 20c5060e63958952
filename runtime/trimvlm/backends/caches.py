"""KV caches that grow in place, for the decoder graphs that `trimvlm_export.passes.in_place` makes.

Such a graph has for layers {l} that it names in its property `LAYERS`, in place of `past_key.{l}` and
`past_value.{l}`:

    cache_key.{l}, cache_value.{l}      float [1, G, B_l, C]: buffers of B_l rows
    past_rows.{l} int64 [1]             how many of these are rows of the past
    present_key.{l}, present_value.{l}  the buffers with the new rows behind the past; the same memory

Here it takes and gives what an ordinary decoder does; what a run keeps of them all is one thing. A buffer is
as large as the prompt needs; for the tokens after it grows by `ROOM` rows at a time.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import PAST_CACHES, PRESENT_CACHES, Port

LAYERS = "trimvlm.cached_rows"  # JSON: {"image": visual rows of one image, "layers": {l: those it caches}}
CACHE, PAST, PAST_ROWS, PRESENT = "cache", "past", "past_rows", "present"
KINDS = ("key", "value")
ROOM = 64  # rows; attention passes over those that are not filled
FEW = 8  # numbers of an input that is copied to where the last run had it, instead of bound


class Caches:
    """Buffers of one conversation.

    Attributes:
        buffers: [1, G, B, C] by name (`key.3`).
        memory: what they lie in, with room.
        rows: filled rows, by layer; as arrays that ONNX Runtime reads where they are, parts of `counts`.
        cells: the same memory as `counts`, as a plain sequence of numbers.
        room: rows of the buffers, in the order of `counts`.
        free: at least so many rows of every buffer will be left after the run.
        runs: how many; what an earlier run than the last one kept is of no use any more.
        bound: binding of the last run and what it has by name: binding all anew takes a millisecond.
    """

    def __init__(self, past: Mapping[str, NDArray[Any]], spare: dict[str, NDArray[Any]]) -> None:
        """`spare` is memory that is free; what is used of it is put back when nothing refers to these."""
        self.buffers = {name: np.ascontiguousarray(array) for name, array in past.items()}
        self.memory: dict[str, NDArray[Any]] = {}
        counts = {int(name.partition(".")[2]): array.shape[2] for name, array in past.items()}
        self.counts = np.array([*counts.values()])
        self.cells = self.counts.data
        self.room = self.counts.copy()
        self.free = 0
        self.rows = {layer: self.counts[number : number + 1] for number, layer in enumerate(counts)}
        self.runs = 0
        self.bound: Bound | None = None
        self.spare = spare
        weakref.finalize(self, spare.update, self.memory).atexit = False

    def reserve(self, added: NDArray[np.int64] | int) -> None:
        """Makes room for so many more rows of each layer; for just these before the first run: a prompt's
        attention then passes over none that is not filled."""
        if isinstance(added, int) and added <= self.free:
            self.free -= added
            return
        wanted = self.counts + added
        small = wanted > self.room if self.runs else np.ones_like(wanted, dtype=bool)
        if small.any():
            for number, layer in enumerate(self.rows):
                if small[number]:
                    self.room[number] = self._grow(layer, int(wanted[number]))
        self.free = int((self.room - wanted).min())

    def advance(self, added: NDArray[np.int64] | int) -> None:
        """Counts rows that a run has written."""
        self.runs += 1
        if isinstance(added, int):
            for number in range(len(self.cells)):  # after a token, numpy is out of the processor's caches
                self.cells[number] += added
        else:
            self.counts += added

    def _grow(self, layer: int, wanted: int) -> int:
        """Rows of the layer's buffers from now on."""
        filled, rows = int(self.rows[layer][0]), wanted
        for name in (f"{kind}.{layer}" for kind in KINDS):
            before = self.buffers[name]
            rows = max(wanted, before.shape[2] + ROOM) if self.runs else wanted
            self.buffers[name] = buffer = self._lay_out(name, before, rows)
            row, old = buffer.shape[3] * buffer.itemsize, before.shape[2]
            for head in reversed(range(buffer.shape[1])):  # the last moves farthest, in the same memory
                places = buffer.ctypes.data + head * rows * row, before.ctypes.data + head * old * row
                ctypes.memmove(*places, filled * row)
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
        fetch, keep: what it is for.
        outputs: names of these that are no caches, in their order after the buffers.
    """

    def __init__(
        self, binding: Any, caches: Caches, fetch: Sequence[str], keep: Sequence[str], presents: set[str]
    ) -> None:
        self.binding, self.fetch, self.keep = binding, fetch[:], keep[:]
        self.outputs = [name for name in (*fetch, *keep) if name not in presents]
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
            before = self._fed.get(name)
            if before is value:
                continue
            if not isinstance(value, np.ndarray):
                self.binding.bind_ortvalue_input(name, value)
                self._fed[name] = value
            elif value.size <= FEW and isinstance(before, np.ndarray) and before.shape == value.shape:
                before[...] = value
            else:
                self._fed[name] = bound = value.copy() if value.size <= FEW else value
                self.binding.bind_cpu_input(name, bound)


class Kept:
    """What a run leaves of its caches for the next one."""

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
        self.pasts = {PAST_CACHES, *(f"{PAST}_{name}" for name in self.names)}
        self.presents = {f"{PRESENT}_{name}" for name in self.names}
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

        caches, given, text = self._caches(feeds), len(feeds["visual"]), len(feeds["input_ids"])
        added = given * self.visual // self.image + text if given else text
        caches.reserve(added)
        bound = caches.bound
        if bound is None or bound.fetch != fetch or bound.keep != keep:
            bound = caches.bound = Bound(self.session.io_binding(), caches, fetch, keep, self.presents)
        bound.feed({name: value for name, value in feeds.items() if name not in self.pasts})
        self.session.run_with_iobinding(bound.binding, options)
        caches.advance(added)
        outputs = bound.binding.get_outputs_as_ortvaluevector()  # no object for each of the buffers
        values = {name: outputs[number] for number, name in enumerate(bound.outputs, len(self.names))}
        results: dict[str, Any] = {
            name: values[name].numpy() if name in values else caches.filled(name.partition("_")[2])
            for name in fetch
        }
        results |= {name: OrtValue(value) for name, value in values.items() if name not in results}
        if not self.presents.isdisjoint(keep):
            results[PRESENT_CACHES] = Kept(caches)
        return results

    def _caches(self, feeds: Mapping[str, Any]) -> Caches:
        """The caches that a run goes on with: those of the run before, or new ones of arrays."""
        kept = feeds.get(PAST_CACHES)
        if kept is None:
            return Caches({name: feeds[f"{PAST}_{name}"] for name in self.names}, self.spare)
        assert kept.caches.spare is self.spare, "what another session kept"
        assert kept.run == kept.caches.runs, "what a run kept was fed to another run before"
        return kept.caches
