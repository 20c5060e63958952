"""Keeps progress bars and remarks of transformers and of torch's exporter away from a report."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_CHATTY = ("torch", "torch.onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences all but errors inside the block; what is printed to stdout is dropped."""
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
