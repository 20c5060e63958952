"""Plans of TensorRT at work: one stream, and device memory that is allocated when the session opens.

An output `present_x` and the input `past_x` share a pool of two buffers: a run reads its past from one and
writes the present into the other, and the next run has them the other way round. No cache is ever copied. A
buffer stays taken while somebody keeps what is in it: answers under way at the same time take more buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Port, check_feeds
from trimvlm.backends.bfloat16 import from_bits, to_bits
from trimvlm.backends.blocks import CARRIED, part_of
from trimvlm.backends.cuda import Cuda
from trimvlm.backends.device_memory import Lease, Pool, Staging, aligned
from trimvlm.backends.loaded_plan import LoadedPlan, Tensor
from trimvlm.backends.plan_library import PlanLibrary
from trimvlm.backends.shape_ranges import Shape, limit
from trimvlm.errors import UserError

DECODER = "decoder"
_PAST, _PRESENT = "past_", "present_"


@dataclass(frozen=True, eq=False)
class Kept:
    """An output that stayed on the device."""

    lease: Lease
    dtype: np.dtype
    shape: Shape


class PlanBackend:
    """See `Backend`.

    Args:
        files: role to plan.
        graphs, turns: see `open_backend` of a library's module.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        library: PlanLibrary,
        graphs: Mapping[str, Path],
        turns: bool | None,
    ) -> None:
        self.files, self.library, self.graphs, self.turns = files, library, graphs, turns
        self._held = ExitStack()

    def __enter__(self) -> PlanBackend:
        with ExitStack() as held:
            self._cuda = Cuda()
            self._stream = self._cuda.create_stream()
            held.callback(self._cuda.destroy_stream, self._stream)
            self._staging = Staging(self._cuda)
            held.callback(self._staging.close)
            self._scratch = Pool(self._cuda, "activations", 0)
            held.callback(self._scratch.close)
            self._pools: dict[tuple[str, str], Pool] = {}
            held.callback(self._close_pools)
            self._runtime = self.library.create_runtime()
            held.callback(self._drop_runtime)
            self._plans = {
                role: LoadedPlan(self.library, role, path, self.graphs.get(role))
                for role, path in self.files.items()
            }
            held.callback(self._unload, list(self._plans))
            self._open_plans()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def inputs(self, role: str) -> dict[str, Port]:
        return {name: tensor.port for name, tensor in self._plans[role].inputs.items()}

    def outputs(self, role: str) -> dict[str, Port]:
        return {name: tensor.port for name, tensor in self._plans[role].outputs.items()}

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        plan = self._ready(role)
        # TensorRT drops inputs that nothing depends on.
        feeds = {name: value for name, value in feeds.items() if name in plan.inputs}
        arrays = {name: value for name, value in feeds.items() if not isinstance(value, Kept)}
        check_feeds(self.inputs(role), arrays)
        assert feeds.keys() == plan.inputs.keys(), f"{role} wants {sorted(plan.inputs)}, not {sorted(feeds)}"
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        results = plan.set_shapes(shapes, int(self._stream))
        known = {name: shape for name, shape in results.items() if shape is not None}
        for name in {*fetch, *keep} - known.keys():
            raise plan.unsaid(name)
        with self._leased(role, plan, feeds, results) as leases:
            scratch = self._scratch.take(plan.scratch)
            try:
                addresses = {name: lease.address for name, lease in leases.items()}
                fetched = {name: known[name] for name in fetch}
                found = self._execute(plan, arrays, addresses, fetched, scratch)
            except BaseException:
                self._cuda.settle(self._stream)  # before buffers that are queued for are used again
                raise
            finally:
                scratch.release()
            for name in keep:
                found[name] = Kept(leases.pop(name), plan.outputs[name].port.dtype, known[name])
        return found

    def _execute(
        self,
        plan: LoadedPlan,
        arrays: Mapping[str, NDArray[Any]],
        addresses: Mapping[str, int],
        fetch: Mapping[str, Shape],
        scratch: Lease,
    ) -> dict[str, Any]:
        """Uploads, runs, downloads, and waits once for all of it."""
        cuda, stream = self._cuda, self._stream
        sizes = {name: plan.inputs[name].bytes(array.shape) for name, array in arrays.items()}
        wanted = {name: plan.outputs[name].bytes(shape) for name, shape in fetch.items()}
        self._staging.start(sum(aligned(size) for size in (*sizes.values(), *wanted.values())))
        for name, array in arrays.items():
            if sizes[name]:
                host, piece = self._staging.piece(sizes[name])
                piece[:] = _to_bytes(plan.inputs[name], array)
                cuda.upload(addresses[name], host, sizes[name], stream)
        plan.run(addresses, scratch.address, scratch.pool.size, int(stream))
        pieces = {}
        for name, size in wanted.items():
            host, pieces[name] = self._staging.piece(size)
            if size:
                cuda.download(host, addresses[name], size, stream)
        cuda.synchronize(stream)
        return {name: _from_bytes(plan.outputs[name], piece, fetch[name]) for name, piece in pieces.items()}

    @contextmanager
    def _leased(
        self, role: str, plan: LoadedPlan, feeds: Mapping[str, Any], results: Mapping[str, Shape | None]
    ) -> Iterator[dict[str, Lease]]:
        """Buffers of all tensors of a run. What is left in the dictionary at the end goes back."""
        leases: dict[str, Lease] = {}
        fed = {name: value.lease for name, value in feeds.items() if isinstance(value, Kept)}
        try:
            for name, value in feeds.items():
                if name in fed:
                    assert value.lease.valid, f"{name}: what was kept is of a session that was closed"
                    assert value.dtype == plan.inputs[name].port.dtype, f"{name}: {value.dtype} was kept"
                    leases[name] = value.lease
                else:
                    size = plan.inputs[name].bytes(value.shape)
                    leases[name] = self._pool(role, name).take(size)
            for name, shape in results.items():
                size, pool = plan.bytes(name, shape), self._pool(role, name)
                if name.startswith(_PRESENT) and size > pool.size:
                    raise UserError(
                        f"the {role} engine has no room for {size} bytes of {name}; ask for less, or build "
                        f"it for a target with larger {limit(_PAST)}"
                    )
                leases[name] = pool.take(size)
            yield leases
        finally:
            for name, lease in leases.items():
                if name not in fed:
                    lease.release()

    def _pool(self, role: str, name: str) -> Pool:
        """Of a tensor; a past shares its present's."""
        other = name.replace(_PAST, _PRESENT, 1) if name.startswith(_PAST) else name
        return self._pools.setdefault((role, other), Pool(self._cuda, f"{name} of the {role}", 0))

    def _open_plans(self) -> None:
        """Loads and describes every plan and allocates its buffers; the decoder's first, the largest."""
        decoder = [role for role in self._plans if part_of(role) == DECODER]
        others = [role for role in self._plans if role not in decoder]
        for role in decoder:
            self._load(role)
        if others and decoder:
            wanted = sum(self.files[role].stat().st_size for role in others)
            if self.turns or (self.turns is None and wanted > self._cuda.available()):
                self._unload(decoder)
        for role in others:
            self._load(role)

    def _load(self, role: str) -> None:
        plan = self._plans[role]
        plan.load(self._runtime)
        for name, tensor in plan.inputs.items():
            pool = self._pool(role, name)
            sizes = [tensor.bytes(ranges[name].max) for ranges in plan.ranges]
            pool.size = max(pool.size, aligned(max(sizes)))
            if not name.startswith(CARRIED):  # those arrive in the buffer that an earlier block wrote
                pool.reserve(2 if name.startswith(_PAST) else 1)
        for name, size in plan.largest(int(self._stream)).items():
            if not name.startswith(_PRESENT):
                pool = self._pool(role, name)
                pool.size = max(pool.size, aligned(size))
                pool.reserve(1)
        self._scratch.size = max(self._scratch.size, aligned(plan.scratch))
        self._scratch.take(plan.scratch).release()

    def _ready(self, role: str) -> LoadedPlan:
        """The plan of a role, loaded; where engines take turns, those of the other turn are dropped first."""
        plan = self._plans[role]
        if not plan.loaded:
            decodes = part_of(role) == DECODER
            turn = [each for each in self._plans if (part_of(each) == DECODER) == decodes]
            self._unload([each for each in self._plans if each not in turn])
            for each in turn:
                self._load(each)
        return plan

    def _unload(self, roles: Sequence[str]) -> None:
        for role in roles:
            self._plans[role].unload()

    def _close_pools(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _drop_runtime(self) -> None:
        self._runtime = None


def _to_bytes(tensor: Tensor, array: NDArray[Any]) -> NDArray[np.uint8]:
    values = to_bits(array) if tensor.bfloat16 else np.ascontiguousarray(array)
    return values.reshape(-1).view(np.uint8)


def _from_bytes(tensor: Tensor, data: NDArray[np.uint8], shape: Shape) -> NDArray[Any]:
    if tensor.bfloat16:
        return from_bits(data.view(np.uint16)).reshape(shape)
    return data.view(tensor.port.dtype).reshape(shape).copy()
