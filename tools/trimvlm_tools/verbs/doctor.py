"""Look at this machine and say what trimvlm needs and what to do about it: Python, JetPack, GPU, CUDA, both
TensorRTs, ONNX Runtime, wheels, memory, CMA, swap and power mode.

Nothing is changed, and no rights are needed. Exit code 1 where something is `bad`; `warn` and `-` are not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm doctor`."""
    parser.add_argument(
        "--target", help="name or .yaml that this machine is meant for; default: what it is recognised as"
    )
    parser.add_argument("--json", action="store_true", help="checks and facts as JSON on stdout")


def run(args: argparse.Namespace, root: Path = Path("/")) -> int:
    """Looks at the machine whose files start at `root`."""
    from trimvlm_engines import targets
    from trimvlm_tools.doctor.checks import diagnose
    from trimvlm_tools.doctor.facts import read

    wanted = targets.load(args.target) if args.target else None
    facts = read(root)
    checks = diagnose(facts, targets.shipped(), wanted)
    bad = [check.name for check in checks if check.state == "bad"]
    if args.json:
        console.emit({"ok": not bad, "checks": checks, "facts": facts})
        return int(bool(bad))
    print(console.table(("check", "state", "found"), [(c.name, c.state, c.found) for c in checks]))
    todo = [check for check in checks if check.todo]
    if todo:
        print("\nto do:")
        print("\n".join(f"  {check.name} ({check.state}): {check.todo}" for check in todo))
    print(f"\n{'bad: ' + ', '.join(bad) if bad else 'nothing is bad'}")
    return int(bool(bad))
