"""MobileVLM-V2 (1.7B, 3B), which transformers does not have: configuration, reference model, processor.

Importing this package tells transformers' `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor`
what `model_type: mobilevlm` is. No code of a checkpoint is executed.

What the published checkpoints are (github.com/Meituan-AutoML/MobileVLM, arXiv:2402.03766):

    decoder     Llama, 32000 tokens: `model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`
    tower       CLIP ViT-L/14-336, layer -2, patches only; fine-tuned, and therefore part of the checkpoint:
                `model.vision_tower.vision_tower.vision_model.*`. OpenAI's weights are not the same.
    projector   LDPv2: `model.mm_projector.mlp.mlp.{0,2}`, `model.mm_projector.peg.peg.0`
    files       config.json (flat: text and `mm_*` keys together), tokenizer.model, pickled weights; no
                configuration of the tower, of the image processor, and no chat template

`<image>` is not in the vocabulary. The published code cuts the prompt there and puts -200 in between; here it
is the first id after the vocabulary (32000), which the processor adds to the tokenizer. The embedding table
stays as it is: no row of it stands for an image.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from trimvlm_export.mobilevlm.config import MobileVLMConfig
from trimvlm_export.mobilevlm.model import MobileVLMForConditionalGeneration
from trimvlm_export.mobilevlm.processor import MobileVLMProcessor, processor

__all__ = ["MobileVLMConfig", "MobileVLMForConditionalGeneration", "MobileVLMProcessor", "processor"]

AutoConfig.register("mobilevlm", MobileVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MobileVLMConfig, MobileVLMProcessor, exist_ok=True)
