"""What each graph of a profile is fed and gives on a golden question, in the files of NVIDIA's Polygraphy.

`polygraphy run GRAPH --onnxrt` (or `--trt` with a plan) then runs each graph by itself and compares: the
opinion of a tool that is not ours, on a board NVIDIA's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trimvlm.backends import Backend
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.opening import check_opening, open_backends
from trimvlm.runner import Runner
from trimvlm.text import load_tokenizer
from trimvlm_tools.forwarding import Forwarding
from trimvlm_tools.parity.goldens import Goldens

STEPS = 1  # decode steps after the prefill; each writes the whole cache twice
RUNNER = "trimvlm"

Run = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


class Recording(Forwarding):
    """Keeps what a backend's graphs were fed and gave.

    Attributes:
        runs: by role, inputs and outputs of each run.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.runs: dict[str, list[Run]] = {}

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        found = super().run(role, feeds, fetch, keep)
        self.runs.setdefault(role, []).append((dict(feeds), dict(found)))
        return found


def record_golden(bundle: Bundle, profile: str | None, target: str) -> dict[str, list[Run]]:
    """Runs a profile's first golden question: prefill and a decode step with the golden token.

    Returns:
        By role, inputs and outputs of each run.

    Raises:
        UserError: the profile has no goldens, or as `Session.open`.
    """
    name, entry = bundle.entry(profile)
    if entry.goldens is None:
        raise UserError(
            f"{bundle.directory}: profile {name} has no goldens; write them on the workstation with "
            f"trimvlm check {bundle.directory} --profile {name} --write-goldens"
        )
    goldens = msgspec.json.decode(bundle.path(entry.goldens).read_bytes(), type=Goldens)
    case = goldens.cases[0]
    check_opening(bundle, [name], target)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.text.tokenizer))
    ((member, backend),) = open_backends(bundle, name, target, {}).items()
    with Recording(backend) as recording:
        runner = Runner(bundle, name, {member: recording}, tokenizer)
        visual = runner.visual([bundle.path(case.image)])
        outputs = runner.prefill(runner.prompt(case.question, 1), visual.rows, patches=visual.chosen)
        for token in case.tokens[:STEPS]:
            outputs = runner.step(token, outputs)
    return recording.runs


def write_polygraphy(bundle: Bundle, profile: str | None, target: str, folder: Path) -> list[Path]:
    """Writes `<profile>.<role>.inputs.json` and `.outputs.json` for each graph of a profile.

    A file holds one entry per run of the graph, of the decoder the prefill and then a decode step.

    Returns:
        The files.

    Raises:
        UserError: as `record_golden`.
        ModuleNotFoundError: Polygraphy is not installed.
    """
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    name, _ = bundle.entry(profile)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for role, runs in record_golden(bundle, name, target).items():
        inputs, outputs = (folder / f"{name}.{role}.{kind}.json" for kind in ("inputs", "outputs"))
        save_json([feeds for feeds, _ in runs], str(inputs), "inputs")
        results = [IterationResult(outputs=found, runner_name=RUNNER) for _, found in runs]
        save_json(RunResults([(RUNNER, results)]), str(outputs), "outputs")
        written += [inputs, outputs]
    return written
