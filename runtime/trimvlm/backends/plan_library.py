"""What classic TensorRT and TensorRT-RTX have in common for running plans; one module each fills in the rest.

Names and behaviour: TensorRT 10.3's and 11.4's Python API, the same in TensorRT-RTX 1.7.1 where its own
`help()` was read. Nothing here has met a GPU: tests run it against a stand-in.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError

log = logging.getLogger(__name__)


class PlanLibrary:
    """An installed library that runs plans.

    Args:
        name: of its module.
        oldest: first version whose API is what this file and `loaded_plan.py` use.
        install: how to get one.
        host_code: version-compatible plans may be loaded, which hold code of the library.

    Raises:
        UserError: it is not installed, does not load, or is too old.
    """

    def __init__(self, name: str, oldest: tuple[int, ...], install: str, *, host_code: bool = False) -> None:
        self.name, self.host_code = name, host_code
        try:
            self.trt: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            raise UserError(f"{name} is not installed; {install}") from None
        except (ImportError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name} is installed, but does not load ({reason}); {install}") from None
        self.version: str = self.trt.__version__
        if tuple(int(part) for part in re.findall(r"\d+", self.version)[: len(oldest)]) < oldest:
            wanted = ".".join(map(str, oldest))
            raise UserError(f"{name} {self.version} is too old to run plans: {wanted} or newer; {install}")
        self.logger = make_logger(self.trt)

    def create_runtime(self) -> Any:
        """What deserialises plans. It must outlive their engines.

        Raises:
            UserError: the library does not start.
        """
        self.logger.taken()
        try:
            runtime = self.trt.Runtime(self.logger)
        except (TypeError, RuntimeError):  # of the bindings, where there is no object to bind to
            raise UserError(
                f"{self.name} {self.version} does not start ({self.logger.taken()}); see trimvlm doctor"
            ) from None
        if self.host_code:
            runtime.engine_host_code_allowed = True
        return runtime

    def create_context(self, engine: Any, path: Path) -> Any:
        """An execution context that has no memory of its own, so that engines that take turns share it.

        Args:
            path: of the plan.
        """
        return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def leave_context(self, context: Any, path: Path) -> None:
        """Called before a context is dropped; `context` is of `create_context`."""


def one_line(message: str) -> str:
    """Its words with one space between them."""
    return " ".join(message.split())


def make_logger(trt: Any, clean: Callable[[str], str] = one_line) -> Any:
    """The library's log through `logging`; errors are kept for messages of our own.

    Args:
        clean: what becomes of each error that is kept.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.INFO,
        severity.ERROR: logging.INFO,
        severity.WARNING: logging.INFO,
        severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            if severity in levels:
                log.log(levels[severity], "%s", message)

        def said(self) -> str:
            """The errors on one line."""
            lines = dict.fromkeys(map(clean, self.errors))
            return "; ".join(filter(None, lines)) or "no reason given"

        def taken(self) -> str:
            """The errors since the last call, on one line."""
            found = self.said()
            self.errors.clear()
            return found

    return Logger()
