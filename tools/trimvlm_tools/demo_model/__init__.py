"""The demo model: a small LLaVA trained from scratch on synthetic scenes.

`scenes` draws images, `questions` asks about them, `vocabulary` writes the tokenizer and processor,
`model` holds the geometry, `packing` the forward pass with many questions per image, `labels` the
auxiliary losses, `muon` and `team` the optimizer and the processes that share its work; `train` and
`evaluate` are the two commands.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT"]
