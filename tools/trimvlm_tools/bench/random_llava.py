"""Configuration and processor of a LLaVA of given sizes: one token per word, all words known."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimvlm_tools.bench.geometry import Geometry

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
TEXT_BEFORE_IMAGE = 2  # `<s> USER:`
_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}USER: {% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_config(geometry: Geometry):
    """transformers' LlavaConfig."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=geometry.vision_hidden,
        intermediate_size=4 * geometry.vision_hidden,
        num_hidden_layers=geometry.vision_layers,
        num_attention_heads=geometry.vision_hidden // geometry.vision_head_dim,
        image_size=geometry.image,
        patch_size=geometry.patch,
        projection_dim=geometry.vision_hidden,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.ffn,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype="float32",
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=geometry.visual_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def make_processor(geometry: Geometry):
    """transformers' LlavaProcessor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [*SPECIAL, *(word(index) for index in range(len(SPECIAL), geometry.vocab))]
    tokenizer = Tokenizer(
        models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:5]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": geometry.image},
            crop_size={"height": geometry.image, "width": geometry.image},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            padding_side="left",
            image_token="<image>",
        ),
        patch_size=geometry.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=_TEMPLATE,
    )


def word(index: int) -> str:
    """The word of an id that is not special."""
    return f"w{index}"
