"""A parity report for people."""

from __future__ import annotations

from trimvlm.parity import ParityReport
from trimvlm_tools.console import table


def as_text(report: ParityReport) -> str:
    """One table: every metric with its gate, every rung with its verdict."""
    rows: list[list[object]] = []
    for rung in report.rungs:
        rows.append([rung.name, None, None, rung.verdict, rung.skipped or ""])
        for metric in rung.metrics:
            rows.append(["  " + metric.name, metric.value, metric.limit, metric.verdict, metric.note])
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    head = (
        f"profile {report.profile} ({report.dtype}), {report.samples} questions of {report.data}: "
        f"{report.verdict}\n{versions}"
    )
    return head + "\n" + table(["", "worst", "limit", "verdict", ""], rows)
