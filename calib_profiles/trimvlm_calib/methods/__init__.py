"""Calibrators, one file per published method.

A method is a module of this package with

    NAME         on the command line and in Profiles
    SUMMARY      one line: what it does; paper and section
    SAMPLES      how many calibration samples the paper takes; 0: nothing is measured
    Parameters   a frozen struct whose defaults are the paper's
    calibrate(probe, parameters) -> Outcome
    at_share(share) -> Parameters, where one number can set how much the method prunes: parameters that leave
                 about `share`, 0 to 1, of what it can save (`trimvlm compare` searches it)

Modules are found by being here; no table lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol, cast

from trimvlm.errors import UserError

if TYPE_CHECKING:
    from trimvlm_calib.outcome import Outcome
    from trimvlm_calib.probe import Probe


class Method(Protocol):
    """What a method module offers."""

    NAME: str
    SUMMARY: str
    SAMPLES: int
    Parameters: type

    def calibrate(self, probe: Probe, parameters: Any) -> Outcome:
        """Measures and decides."""
        ...


def discover() -> dict[str, Method]:
    """Every method here, by name."""
    found = [
        importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
    ]
    return {module.NAME: cast(Method, module) for module in found}


def find(expression: str) -> dict[str, Method]:
    """The methods that `a` or `a+b` names, in that order.

    Raises:
        UserError: an unknown name, or one named twice.
    """
    known, names = discover(), expression.split("+")
    for name in names:
        if name not in known:
            raise UserError(
                f"method {name!r} is not one of {', '.join(known)} (or several, as in fastv+v-skip)"
            )
        if names.count(name) > 1:
            raise UserError(f"method {name!r} is named twice in {expression!r}")
    return {name: known[name] for name in names}
