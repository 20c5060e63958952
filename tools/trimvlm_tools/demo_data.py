"""The demo model's own questions as a folder of samples, as a user's would be."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal


def write_samples(directory: Path, split: Literal["calib", "test"], count: int, first: int = 0) -> Path:
    """Writes `count` questions of a split with their images; returns `directory`."""
    from trimvlm_tools.demo_model.questions import samples

    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples(split, count, first)):
        name = f"{number:04d}.png"
        sample.image.save(directory / name)
        line = {"image": name, "kind": sample.kind, "task": sample.kind}
        line |= {"question": sample.question, "answer": sample.answer}
        lines.append(json.dumps(line) + "\n")
    (directory / "questions.jsonl").write_text("".join(lines))
    return directory


@contextlib.contextmanager
def demo_samples(data: str, split: Literal["calib", "test"], count: int) -> Iterator[Path]:
    """The folder that `--data` names; for `demo`, generated scenes in a folder that is removed afterwards."""
    if data != "demo":
        yield Path(data)
        return
    with tempfile.TemporaryDirectory(prefix="trimvlm-demo-") as directory:
        yield write_samples(Path(directory), split, count)
