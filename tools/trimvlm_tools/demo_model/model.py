"""Geometry and initial weights of the demo model, a Hugging Face `LlavaForConditionalGeneration`."""

import math

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from trimvlm_tools.demo_model.scenes import PATCH, SIDE
from trimvlm_tools.demo_model.vocabulary import BOS, CENTRE_ROW, EOS, IMAGE, PAD, VOCABULARY_ROWS

HEAD_WIDTH, ROPE_THETA = 32, 10000.0


def make_config(width: int = 192, layers: int = 12, vision_layers: int = 5) -> LlavaConfig:
    """The configuration; tests make `width` and the layer counts smaller. Heads are 32 wide."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=width // HEAD_WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


@torch.no_grad()
def make_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A model with fresh weights, drawn from `seed`.

    Linear layers have a standard deviation of fan_in^-1/2, the ones that write to a residual stream less, by
    (2 x layers)^1/2. In the first half of every decoder layer's heads the key projection starts as a copy of
    the query projection, so that from the first step a word attends to the visual tokens that contain it.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    encoder, decoder = model.model.vision_tower.encoder, model.model.language_model
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2]
        if parameter.ndim == 1:
            if name.endswith("class_embedding"):
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = 1 / math.sqrt(parameter[0].numel())
        layers = len(encoder.layers if "vision" in name else decoder.layers)
        if leaf in ("o_proj", "down_proj", "out_proj", "fc2"):
            deviation /= math.sqrt(2 * layers)
        elif leaf == "embed_tokens":
            deviation = 0.5
        elif leaf == "position_embedding":
            deviation = 0.02
        elif leaf == "lm_head":
            deviation *= 0.1
        parameter.normal_(0.0, deviation)
    decoder.embed_tokens.weight[CENTRE_ROW] = 0.0
    for layer in decoder.layers:
        tied = layer.self_attn.q_proj.weight.shape[0] // 2
        layer.self_attn.k_proj.weight[:tied] = layer.self_attn.q_proj.weight[:tied]
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.do_sample = False
    return model
