"""Hooks that make one Hugging Face decoder layer follow its row of the Schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trimvlm.schedule import Row
from trimvlm_export.reference_prompt import PromptRun


def install(layer: Any, row: Row, run: Callable[[], PromptRun]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on `layer` and its sub-layers; `run` gives the prompt that is under way."""

    def before_layer(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (run().enter(row, layer, args[0]), *args[1:]), kwargs

    def before_attention(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, **run().view(row, kwargs["hidden_states"])}

    def after_attention(module: Any, args: tuple, output: tuple) -> tuple:
        return run().attended(row, *output), output[1]

    def after_ffn(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return run().fed_forward(row, output)

    def after_layer(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return run().leave(row, output, args[0])

    return [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True),
        layer.self_attn.register_forward_pre_hook(before_attention, with_kwargs=True),
        layer.self_attn.register_forward_hook(after_attention),
        layer.mlp.register_forward_hook(after_ffn),
        layer.register_forward_hook(after_layer),
    ]
