"""The reference model of MobileVLM-V2: transformers' LLaVA around CLIP and Llama, with LDPv2 in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from trimvlm.errors import UserError
from trimvlm_export.checkpoint import load_config
from trimvlm_export.mobilevlm.config import MobileVLMConfig
from trimvlm_export.mobilevlm.projector import LDPv2
from trimvlm_export.mobilevlm.weights import load

# What transformers' Auto classes pass on about where to look; a directory needs none of it.
_WHERE = {
    "adapter_kwargs",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
}


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """MobileVLM-V2 with the surface of transformers' models.

    Prompts hold the image token 144 times for each image; `get_image_features` gives [144, D] per image.

    Args:
        config: a MobileVLMConfig.
    """

    config_class = MobileVLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.add_module("multi_modal_projector", LDPv2(config))
        self.model.language_model.embed_tokens.__class__ = _TextEmbedding

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Path | str,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        **where: Any,
    ) -> MobileVLMForConditionalGeneration:
        """Loads a directory with the published tensor names, strictly; nothing is downloaded or executed.

        Args:
            dtype: of the weights; None and `auto`: as stored.
            where: what transformers' Auto classes say about the Hub, which is not asked.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: another kind of model, no safetensors (pickled weights are refused), a tensor that is
                missing, mis-shaped or left over, or an option that is not known here.
        """
        directory = Path(pretrained_model_name_or_path)
        if unknown := sorted(set(where) - _WHERE):
            raise UserError(f"{unknown[0]}: not an option here; a MobileVLM takes config and dtype")
        config = load_config(directory) if config is None else config
        with no_init_weights():
            model = cls(config)
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype != "auto" and kind is None and dtype is not None:
            raise UserError(f"dtype: {dtype!r} is not one of torch's; take float32, float16 or bfloat16")
        load(model, directory, kind)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        return model.eval()


class _TextEmbedding(nn.Embedding):
    """Token embeddings of prompts that hold image tokens, whose id is the first after the vocabulary: they
    get some row, which the projector's rows then replace."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.where(input == self.num_embeddings, 0, input))
