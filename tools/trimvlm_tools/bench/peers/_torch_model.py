"""A vision-language checkpoint in PyTorch: its decoder alone, or the whole model with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LINK = "checkpoint"


def link_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Conversion for who loads the checkpoint as it is: a link to it."""
    (directory / _LINK).symlink_to(checkpoint.resolve(), target_is_directory=True)


def linked_checkpoint(directory: Path) -> Path:
    """The checkpoint that was linked."""
    return directory / _LINK


def load_decoder(directory: Path, threads: int) -> tuple[Any, Any]:
    """The language model and its LM head, fp32, with `sdpa` attention; the image side is let go."""
    model = load_model(directory, threads)
    return model.get_decoder(), model.get_output_embeddings()


def load_model(directory: Path, threads: int) -> Any:
    """The whole model of a linked checkpoint, fp32, for inference with `sdpa` attention."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        linked_checkpoint(directory), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def load_processor(directory: Path) -> Any:
    """The processor of a linked checkpoint, which takes images; for videos transformers wants torchvision."""
    from trimvlm_export import processing

    return processing.load_processor(linked_checkpoint(directory))


def read_question(processor: Any, image: bytes, question: str) -> Any:
    """Inputs of `generate` from an image file's bytes and a question, through the chat template."""
    import io

    from PIL import Image

    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    return processor(text=prompt, images=picture, return_tensors="pt")
