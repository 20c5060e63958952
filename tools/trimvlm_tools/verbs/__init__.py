"""One module per verb of the command line: `configure(parser)` and `run(args) -> int`.

A verb's module docstring is its `--help` text. Heavy modules are imported inside `run`, so that `--help` and
argument errors are instant. A verb that reports takes `--json` and then says its report with `console.emit`.
"""
