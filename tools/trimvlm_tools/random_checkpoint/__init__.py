"""Complete checkpoint directories with random weights at a published model's geometry.

One YAML in `models/` per published model; nothing is downloaded. `trimvlm synthesize` is the command.
"""
