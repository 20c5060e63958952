"""List the calibration methods, their parameters and the published defaults. Methods compose by field:
`--method fastv+v-skip`.
"""

from __future__ import annotations

import argparse
from typing import Any

from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm methods`."""
    parser.add_argument("--json", action="store_true", help="machine-readable list on stdout")


def run(args: argparse.Namespace) -> int:
    """Lists what was discovered."""
    import msgspec

    from trimvlm_calib.methods import discover

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": method.SUMMARY,
            "samples": method.SAMPLES,
            "parameters": msgspec.to_builtins(method.Parameters()),
        }
        for name, method in discover().items()
    ]
    if args.json:
        console.emit(found)
        return 0
    width = max(len(method["name"]) for method in found)
    for method in found:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in method["parameters"].items())
        print(f"{method['name']:<{width}}  {method['summary']}")
        print(f"{'':<{width}}  samples {method['samples']}; {settings or 'no parameters'}")
    return 0


def _short(value: Any) -> str:
    """As `--set` takes it, with four digits."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
