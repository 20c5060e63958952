"""transformers' own ONNX exporter with its ONNX Runtime fusions, as its documentation recommends for a CPU.

`export_for_generation` splits a vision-language model into components; a decoder runs on three of them, taken
by the documented way to export some only (`decompose_for_generation`): `language_model` reads a prompt from
embeddings, `lm_head` makes logits of its last row, `decode` reads one token and makes logits. The embeddings
of a prompt are left to the caller; here they are rows of the checkpoint's table. Inputs and outputs stay with
ONNX Runtime: the cache that one run returns is what the next one is fed.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._greedy import decode_greedily
from trimvlm_tools.bench.peers._plain_decoder import read_decoder
from trimvlm_tools.bench.peers._torch_model import link_checkpoint, linked_checkpoint, load_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "transformers-onnx"
REQUIREMENTS = ()
SETTINGS = {"dynamic": True, "ort_fusions": "cpu"}
PRECISIONS = ("fp32",)
ANSWERS = False
PRUNES = False
_COMPONENTS = ("language_model", "lm_head", "decode")
_CACHE = "past_key_values."
_SAMPLE_ROWS = 8


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Exports the components that a decoder runs on.

    Raises:
        UserError: this transformers exports without ONNX Runtime's fusions.
    """
    check_exporter()
    link_checkpoint(checkpoint, directory)
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    model = load_model(directory, threads=1)
    ids = torch.arange(_SAMPLE_ROWS)[None]
    parts = decompose_for_generation(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for name in _COMPONENTS:
        component: Any
        component, sample = parts.pop(name)
        exported = OnnxExporter().export(component, sample, OnnxConfig(**SETTINGS))
        OnnxExporter.save_program(exported.program, directory / f"{name}.onnx")


def check_exporter() -> None:
    """Refuses a transformers whose exporter lacks the settings that the peer is measured with.

    Raises:
        UserError: naming the version.
    """
    import transformers
    from transformers.exporters.configs import OnnxConfig

    if not set(SETTINGS) <= set(inspect.signature(OnnxConfig).parameters):
        raise UserError(
            f"{NAME}: transformers {transformers.__version__} exports without ONNX Runtime's fusions; "
            "install 5.23 or newer (it needs Python 3.11), or leave this peer out"
        )


def open_decoder(directory: Path, threads: int, precision: str) -> _Decoder:
    """A session per component, and the embedding table where it lies in the checkpoint."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Contenders take turns, and three sessions share the process: threads wait busily within a run only.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = {
        name: onnxruntime.InferenceSession(
            directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for name in _COMPONENTS
    }
    table_VD = read_decoder(linked_checkpoint(directory)).tensors["model.embed_tokens.weight"].read()
    return _Decoder(sessions, table_VD)


class _Decoder:
    def __init__(self, sessions: dict[str, Any], table_VD: NDArray[np.float32]) -> None:
        self._sessions, self._table_VD = sessions, table_VD
        self._inputs = {name: [v.name for v in of.get_inputs()] for name, of in sessions.items()}
        self._outputs = {name: [v.name for v in of.get_outputs()] for name, of in sessions.items()}

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """Reads ids [S] into an empty cache and decodes."""
        import numpy as np

        cache: dict[str, Any] = {}

        def prefill() -> NDArray[np.float32]:
            rows_SD = self._table_VD[ids]
            positions_S = np.arange(len(ids))
            done = self._run("language_model", inputs_embeds=rows_SD[None], position_ids=positions_S[None])
            cache.update(_cache_of(done))
            last_D = done["last_hidden_state"].numpy()[0, -1]
            (logits,) = self._run("lm_head", last_D[None, None]).values()
            return logits.numpy()[0, -1]

        def step(token: int, position: int) -> NDArray[np.float32]:
            read = {"input_ids": np.array([[token]]), "position_ids": np.array([[position]])}
            done = self._run("decode", **read, cache=cache)
            cache.update(_cache_of(done))
            return done["logits"].numpy()[0, -1]

        return decode_greedily(prefill, step, len(ids), new_tokens)

    def _run(self, component: str, *only: Any, cache: Any = None, **arrays: Any) -> dict[str, Any]:
        """Outputs by name, as OrtValues; `only`: of a graph with one input, whatever it is called."""
        import onnxruntime

        inputs, outputs = self._inputs[component], self._outputs[component]
        if only:
            arrays = dict(zip(inputs, only, strict=True))
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        feeds |= {name: cache[_layer(name)] for name in inputs if cache and _CACHE in name}
        done = self._sessions[component].run_with_ort_values(outputs, feeds)
        return dict(zip(outputs, done, strict=True))


def _cache_of(outputs: dict[str, Any]) -> dict[str, Any]:
    return {_layer(name): value for name, value in outputs.items() if _CACHE in name}


def _layer(name: str) -> str:
    """Layer and kind: components differ in what they put before it."""
    return name.rpartition(_CACHE)[2]
