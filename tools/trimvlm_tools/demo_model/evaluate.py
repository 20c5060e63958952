"""Measure the demo model: `python -m trimvlm_tools.demo_model.evaluate [--blind removed] [--drop 0.75]`.

Loads the checkpoint as a user would (fp16 weights, fp32 arithmetic), asks held-out questions of the test
split by batched greedy `generate`, and prints the share of exactly right answers per kind.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from trimvlm_tools.demo_model import CHECKPOINT
from trimvlm_tools.demo_model.questions import KINDS, Sample, prompt_of, samples

DROP_LAYER = 2  # 0-based: the first decoder layer that no longer sees the dropped tokens
LONGEST_ANSWER = 6  # tokens of `a small red circle </s>`, and one more


@contextmanager
def visual_tokens_dropped(
    model: LlavaForConditionalGeneration, dropped_BT: Tensor, layer: int
) -> Iterator[None]:
    """Hide prompt positions from every row in decoder layers `layer` and later, also while decoding.

    Args:
        model: Loaded with `attn_implementation="eager"`, whose masks are additive.
        dropped_BT: Bool [B, prompt length], true where a token is dropped.
        layer: 0-based.

    Yields:
        Nothing; the masks are restored on exit.
    """

    def hide(_module, arguments, keywords):
        mask = keywords["attention_mask"]
        hidden = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool)
        hidden[:, : dropped_BT.shape[1]] = dropped_BT
        blocked = torch.finfo(mask.dtype).min
        return arguments, keywords | {"attention_mask": mask.masked_fill(hidden[:, None, None], blocked)}

    layers = model.model.language_model.layers[layer:]
    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def random_drop(input_ids_BT: Tensor, image_token: int, share: float, seeds: list[int]) -> Tensor:
    """Bool [B, T]: in each row a random `share` of the visual tokens, chosen by the row's seed."""
    dropped = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for row, seed in enumerate(seeds):
        visual = (input_ids_BT[row] == image_token).nonzero().flatten()
        order = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(visual))
        dropped[row, visual[torch.from_numpy(order[: round(share * len(visual))])]] = True
    return dropped


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: list[Sample],
    blind: str | None,
    drop: float,
) -> list[str]:
    """Greedy answers to a batch of samples.

    Args:
        model: The model.
        processor: Its `LlavaProcessor`.
        asked: The batch.
        blind: None, `removed` (no image in the prompt) or `black` (a black image).
        drop: Share of visual tokens dropped at random before layer `DROP_LAYER`.

    Returns:
        One string per sample.
    """
    prompts = [prompt_of(sample.question) for sample in asked]
    if blind == "removed":
        prompts = [prompt.replace("<image> ", "") for prompt in prompts]
        inputs = processor.tokenizer(prompts, return_tensors="pt", padding=True)
    else:
        black = Image.new("RGB", asked[0].image.size)
        images = [black if blind else sample.image for sample in asked]
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    ids = inputs["input_ids"]
    dropped = random_drop(ids, model.config.image_token_index, drop, [sample.seed for sample in asked])
    with visual_tokens_dropped(model, dropped, DROP_LAYER):
        inputs.pop("token_type_ids", None)
        # The library types `generate` for a protocol that its own models do not declare.
        generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
        made = generate(**inputs, max_new_tokens=LONGEST_ANSWER)
    return processor.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)


def evaluate(
    folder: Path, questions: int, blind: str | None, drop: float, batch: int = 50
) -> dict[str, float]:
    """Exact match per kind, and `all`, on the first `questions` samples of the test split."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    processor = AutoProcessor.from_pretrained(folder)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for first in range(0, questions, batch):
        asked = samples("test", min(batch, questions - first), first=first)
        for sample, answer in zip(asked, answers(model.eval(), processor, asked, blind, drop), strict=True):
            right[sample.kind].append(answer.split() == sample.answer.split())
    share = {kind: sum(flags) / len(flags) for kind, flags in right.items() if flags}
    return {"all": sum(map(sum, right.values())) / questions} | share


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument(
        "--blind", nargs="?", const="removed", choices=("removed", "black"), help="hide the image"
    )
    parser.add_argument(
        "--drop", type=float, default=0.0, help="share of visual tokens dropped before layer 2"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.monotonic()
    share = evaluate(arguments.checkpoint, arguments.questions, arguments.blind, arguments.drop)
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("questions", "blind", "drop")}
        print(json.dumps(settings | share))
        return
    seconds = time.monotonic() - begun
    print(f"{arguments.questions} questions, blind {arguments.blind}, drop {arguments.drop}, {seconds:.0f} s")
    for kind, value in share.items():
        print(f"{kind:10} {value:.4f}")


if __name__ == "__main__":
    main()
