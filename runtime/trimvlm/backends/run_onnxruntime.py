"""ONNX Runtime: the exported graph itself runs, nothing is built.

On the CPU, or through the providers for CUDA and TensorRT-RTX, which were never run on a GPU here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trimvlm.backends import Port, check_feeds
from trimvlm.backends.blocks import part_of
from trimvlm.backends.caches import LAYERS, InPlace
from trimvlm.backends.providers import CPU, CUDA, check_provider, create_session, nodes_on_cpu
from trimvlm.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}
ARENAS = {CPU: "cpu:0", CUDA: "gpu:{}"}  # where a provider's scratch memory is, as ONNX Runtime calls it


def open_backend(
    files: Mapping[str, Path],
    *,
    provider: str = CPU,
    device: int = 0,
    threads: int | None = None,
    low_memory: bool = False,
    packed: Collection[str] = (),
) -> OnnxRuntimeBackend:
    """Makes the backend; sessions are created by `with`.

    Args:
        files: role to ONNX file.
        provider: ONNX Runtime's name of what executes the graphs; a Target's `provider`.
        device: number of the GPU, for a provider that has one.
        threads: threads that compute; None: one per core.
        low_memory: keep the decoder's weights, too, in the mapped files instead of a prepacked private copy
            (measured on 482 MB of weights: 32 MB instead of 457 MB of private memory, prefill 8 % and decode
            29 % slower); not those of `packed`.
        packed: roles whose weights are codes. They are always packed: for codes as they lie in the file there
            is no kernel, each run would make floats of them first.

    Raises:
        UserError: ONNX Runtime is not installed or lacks the provider, or `threads` is no positive number.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX Runtime is not installed; pip install trimvlm[ort]") from None
    check_provider(onnxruntime, provider)
    if threads is not None and threads < 1:
        raise UserError(f"threads: {threads} is not a positive number")

    def options(role: str) -> Any:
        made = onnxruntime.SessionOptions()
        made.intra_op_num_threads = threads or 0
        made.log_severity_level = 3
        # Shapes change from run to run, so a remembered pattern would only hold memory.
        made.enable_mem_pattern = False
        # Reused buffers stay allocated from their first use to their last: here the three widest of a feed
        # forward network, while attention needs its scores (measured: 20 MB of 100 at 608 rows of 1024).
        made.enable_mem_reuse = False
        if role not in packed and (low_memory or part_of(role) != "decoder"):
            # A tower multiplies hundreds of rows with each matrix, whose packing is then next to nothing (0
            # to 2 % of SigLIP's time); a copy of 1.6 GB takes two seconds to open.
            made.add_session_config_entry("session.disable_prepacking", "1")
        # Threads that go on waiting busily after a run compete with whatever comes next: between two graphs
        # 0.137 s of CPU time per short answer against 0.105 s (7 M parameters); a prompt of 608 rows of width
        # 1024 takes a tenth longer (2 threads).
        made.add_session_config_entry("session.force_spinning_stop", "1")
        return made

    return OnnxRuntimeBackend(files, options, provider, device)


class OnnxRuntimeBackend:
    """See `Backend`. What a run keeps stays an OrtValue where it was computed: KV caches make no detour over
    numpy or the host."""

    def __init__(
        self, files: Mapping[str, Path], options: Callable[[str], Any], provider: str = CPU, device: int = 0
    ) -> None:
        self.files = files
        self.options = options
        self.provider = provider
        self.device = device
        self.sessions: dict[str, Any] = {}
        self.ports: dict[str, tuple[dict[str, Port], dict[str, Port]]] = {}
        self.in_place: dict[str, InPlace] = {}  # the decoder, where its caches grow in place

    def __enter__(self) -> OnnxRuntimeBackend:
        # Together: opening is copying weights into the kernels' layout, which one thread does per graph.
        with ThreadPoolExecutor() as pool:
            loading = {role: pool.submit(self._load, role, path) for role, path in self.files.items()}
        self.sessions = {role: each.result() for role, each in loading.items()}
        for role, session in self.sessions.items():
            inputs = {node.name: _port(node) for node in session.get_inputs()}
            outputs = {node.name: _port(node) for node in session.get_outputs()}
            self.ports[role] = inputs, outputs
            if LAYERS in session.get_modelmeta().custom_metadata_map:
                self.in_place[role] = InPlace(session, inputs, outputs)
                self.ports[role] = self.in_place[role].inputs, outputs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sessions.clear()
        self.in_place.clear()

    def inputs(self, role: str) -> dict[str, Port]:
        return self.ports[role][0]

    def outputs(self, role: str) -> dict[str, Port]:
        return self.ports[role][1]

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        import onnxruntime
        from onnxruntime import OrtValue

        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        check_feeds(self.inputs(role), arrays)
        once = None  # making options and reading them back costs a tenth of a millisecond
        if role == "vision" and self.provider in ARENAS:  # its scratch memory is of no use to the decoder
            once = getattr(onnxruntime, "RunOptions")()  # noqa: B009 its stubs do not name it
            arena = ARENAS[self.provider].format(self.device)
            once.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        if role in self.in_place:
            return self.in_place[role].run(feeds, fetch, keep, once)
        values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        session, names = self.sessions[role], [*fetch, *keep]
        if self.provider == CPU:  # without the 10 microseconds that binding costs each input and output
            results = session.run_with_ort_values(names, {**feeds, **values}, once)
        else:
            results = self._bound(session, {**feeds, **values}, fetch, keep, once)
        return {
            name: result.numpy() if name in fetch else result
            for name, result in zip(names, results, strict=True)
        }

    def _bound(
        self, session: Any, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str], once: Any
    ) -> Sequence[Any]:
        """Outputs of a run; what is kept is left in the device's memory."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)  # copies to the device what is on the host
        for name in fetch:
            binding.bind_output(name)
        for name in keep:
            binding.bind_output(name, "cuda", self.device)
        session.run_with_iobinding(binding, once)
        return binding.get_outputs()

    def _load(self, role: str, path: Path) -> Any:
        import onnxruntime

        try:
            session = create_session(onnxruntime, path, self.options(role), self.provider, self.device)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 the bindings' exceptions share no other base
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load this graph ({reason}); "
                "update onnxruntime, or export again"
            ) from None
        if left := nodes_on_cpu(session, self.provider):
            log.info("%s: nodes that %s leaves to the CPU: %s", path, self.provider, left)
        return session


def _port(node: Any) -> Port:
    assert node.type in DTYPES, f"{node.name}: {node.type} is not a type that trimvlm's graphs use"
    return Port(DTYPES[node.type], tuple(d if isinstance(d, int) else None for d in node.shape))
