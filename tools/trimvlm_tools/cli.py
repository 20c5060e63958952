"""The `trimvlm` command. Verbs are modules of `trimvlm_tools.verbs`, imported only when asked for.

A verb is one file with `configure(parser)` and `run(args) -> int` and one line in `VERBS`; one that is a word
of Python's (`import`) has a file with an underscore after it. Exit codes:
0 done, 1 a gate failed (`check`, `verify`, `doctor`; `inspect` of a model), 2 the user can mend it (one line
on stderr says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import gc
import importlib
import keyword
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from trimvlm.errors import UserError
from trimvlm_tools import console

VERBS = {
    "demo": "calibrate, export, build, run and check the demo model with seven methods; one table",
    "calibrate": "make a pruning profile for a model from samples",
    "export": "write a model and its profiles as a bundle of ONNX graphs",
    "fit": "predict memory and times of a bundle on a target, before anything is built",
    "build": "build a bundle's engine for a target",
    "run": "ask a bundle about images",
    "check": "measure a bundle against the reference; exits with 1 when a gate fails",
    "verify": "check every file of a bundle, and whether its engines fit this machine",
    "bench": "measure times and memory of a bundle",
    "inspect": "show what a model, bundle or profile holds and costs, and what export would refuse",
    "compare": "compare methods at matched FLOPs on held-out questions",
    "methods": "list the calibration methods and their parameters",
    "import": "another tool's configuration as a profile; list the profiles that come with trimvlm",
    "targets": "list the devices that can be built for",
    "doctor": "look at this machine: what is missing for a target, and what to do",
    "synthesize": "write a checkpoint with random weights at a published model's size",
}

# Which extra brings a module, for the message when it is missing.
EXTRAS = {
    "torch": "export",
    "transformers": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "jinja2": "export",
    "onnxruntime": "ort",
    "tensorrt_rtx": "rtx",
    "tensorrt": "tensorrt",
    "filelock": "ort",
    "yaml": "tools",
    "polygraphy": "tools",
    "rich": "tools",
    "matplotlib": "tools",
}


class OneLineParser(argparse.ArgumentParser):
    """Argument errors on one line, as UserError; argparse would print the whole usage as well."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and turns what went wrong into one line and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    prog = f"trimvlm {verb}" if verb else "trimvlm"
    try:
        code = run_verb(verb, arguments[1:]) if verb else overview(arguments)
        sys.stdout.flush()  # a closed pipe shows here, where it is handled, and not at interpreter exit
        return code
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        message = f"{module} is not installed; pip install 'trimvlm[{EXTRAS[module]}]'"
    except BrokenPipeError:
        # Nobody reads on (`trimvlm inspect ... | head`): no noise, also not when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        message = "interrupted"
        console.say(f"{prog}: {message}")
        return 130
    console.say(f"{prog}: {' '.join(message.split())}")
    return 2


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Imports the verb's module, parses its arguments and runs it."""
    gc.set_threshold(100_000, 20, 20)  # imports and traces make objects that live on: a fifth of an export
    atexit.register(gc.freeze)  # and need no collection when the process ends, which takes half a second
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are directories; nothing is fetched
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is the console's
    module = importlib.import_module(f"trimvlm_tools.verbs.{verb}{'_' * keyword.iskeyword(verb)}")
    parser = OneLineParser(prog=f"trimvlm {verb}", description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.configure(parser)
    args = parser.parse_args(arguments)
    reserved = console.reserved_stdout() if getattr(args, "json", False) else contextlib.nullcontext()
    with reserved:
        return module.run(args)


def overview(arguments: Sequence[str]) -> int:
    """`trimvlm`, `trimvlm --help`, `trimvlm --version`, and verbs that do not exist."""
    width = max(map(len, VERBS))
    parser = OneLineParser(
        prog="trimvlm",
        usage="trimvlm VERB ...",
        description="Static visual-token pruning of vision-language models, from calibration to engine.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
        + "\n\n`trimvlm VERB --help` shows a verb's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    if not arguments:
        parser.print_help()
        return 0
    if arguments[0].startswith("-") and parser.parse_args(arguments).version:
        import importlib.metadata

        print(f"trimvlm {importlib.metadata.version('trimvlm')}")
        return 0
    near = difflib.get_close_matches(arguments[0], VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(VERBS)}"
    raise UserError(f"no verb {arguments[0]!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
