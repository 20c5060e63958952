"""A parity report: measured agreement between rungs of the ladder dense HF -> reference -> graph -> engine.

Metrics are always recorded and the verdict is apart from them; what was not measured is None, and a rung that
was not run is skipped, which is not a pass. The measuring is `trimvlm_tools.parity`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from trimvlm.value import Value

Verdict: TypeAlias = Literal["PASS", "AMBIGUOUS", "FAIL", "SKIPPED"]


class Metric(Value, frozen=True, kw_only=True):
    """One number over all samples.

    Attributes:
        name: e.g. `logits max abs`.
        value: worst value over the samples; None if it was not measured.
        limit: the gate: PASS needs `value <= limit`. None: information, no gate.
        ambiguous: the samples that miss the limit are explained by a tie (see `note`).
        note: for people.
    """

    name: str
    value: float | None
    limit: float | None = None
    ambiguous: bool = False
    note: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """None for information."""
        if self.limit is None:
            return None
        if self.value is None:
            return "SKIPPED"
        if self.value <= self.limit:
            return "PASS"
        return "AMBIGUOUS" if self.ambiguous else "FAIL"


class Rung(Value, frozen=True, kw_only=True):
    """One step of the ladder. `skipped` says why it was not run."""

    name: str
    metrics: tuple[Metric, ...] = ()
    skipped: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of its gates."""
        verdicts = {metric.verdict for metric in self.metrics}
        for worst in ("FAIL", "AMBIGUOUS", "SKIPPED"):
            if worst in verdicts:
                return worst
        return "SKIPPED" if self.skipped else "PASS"


class ParityReport(Value, frozen=True, kw_only=True):
    """All rungs for one profile of a bundle.

    Attributes:
        samples: questions asked.
        data: where they came from.
        versions: libraries that took part.
    """

    profile: str
    dtype: str
    samples: int
    data: str
    versions: dict[str, str]
    rungs: tuple[Rung, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the rungs that were run; SKIPPED if none was."""
        verdicts = [rung.verdict for rung in self.rungs if rung.skipped is None]
        for worst in ("FAIL", "AMBIGUOUS", "SKIPPED"):
            if worst in verdicts:
                return worst
        return "PASS" if verdicts else "SKIPPED"
