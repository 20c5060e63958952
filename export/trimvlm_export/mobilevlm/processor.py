"""Images and prompts of MobileVLM-V2 as its published code prepares them, behind transformers' interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from trimvlm.errors import UserError
from trimvlm_export.checkpoint import load_config
from trimvlm_export.mobilevlm.config import SIDE

IMAGE_TOKEN = "<image>"

# Either may hold the image processor's options: the older file alone, the newer one beside the rest.
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")

# The conversation `v1` of the published code: one line break after each image, none between turns.
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CHAT_TEMPLATE = (
    "{{ " + repr(_SYSTEM) + " }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class MobileVLMProcessor(LlavaProcessor):
    """transformers' LLaVA processor, whose visual token covers a window of patches."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path | str, **_: Any) -> MobileVLMProcessor:  # type: ignore[override]
        """As `processor`; what transformers' Auto classes say about the Hub does not matter."""
        return processor(pretrained_model_name_or_path)


def processor(checkpoint: Path | str) -> MobileVLMProcessor:
    """The processor of a checkpoint directory.

    Images: transformers' LLaVA image processor (Pillow), padded to squares in the mean colour where
    config.json says `image_aspect_ratio: pad`; sizes and colours are those of the checkpoint's
    preprocessor_config.json, or where there is none CLIP's for the tower's size.

    Text: the checkpoint's tokenizer, to which `<image>` is added as the id `config.image_token_id`, and its
    chat template, or where there is none the published conversation `v1`.

    Returns:
        An object with `image_processor`, `tokenizer`, `image_token`, `image_token_id`, `chat_template` and
        `apply_chat_template`, which is called as any processor of transformers.

    Raises:
        UserError: no tokenizer, one that gives `<image>` another id, or one that does not tokenize around
            images as the published code does.
    """
    checkpoint = Path(checkpoint)
    config: Any = load_config(checkpoint)
    size = config.vision_config.image_size
    if any((checkpoint / name).is_file() for name in _IMAGE_FILES):
        images = LlavaImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
    else:
        images = LlavaImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    images.do_pad = config.image_aspect_ratio == "pad"
    tokenizer = _tokenizer(checkpoint, config.image_token_id)
    made = MobileVLMProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=size // SIDE,  # pixels of one visual token each way
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    return made


def _tokenizer(checkpoint: Path, image_token_id: int) -> Any:
    """The checkpoint's tokenizer with `<image>`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint}: transformers cannot load its tokenizer ({reason})") from None
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        # Llama's. The published code cuts at images and has every piece begin with a space, as sentencepiece
        # does it; transformers 5 puts one at the very beginning only, whatever `legacy` says.
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), None
    tokenizer.add_bos_token = True
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != image_token_id:
        raise UserError(
            f"{checkpoint}: the tokenizer gives {IMAGE_TOKEN} the id {found}, but config.json wants "
            f"{image_token_id}; vocab_size must be the size of the tokenizer"
        )
    before, after = "USER: ", "\nWhat is it?"
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
    whole = tokenizer(before + IMAGE_TOKEN + after, add_special_tokens=False).input_ids
    if whole != [*parts[0], image_token_id, *parts[1]]:
        raise UserError(
            f"{checkpoint}: the tokenizer does not tokenize the text after {IMAGE_TOKEN} as a text of its "
            "own, as MobileVLM does; take the checkpoint's tokenizer.model, or a tokenizer.json made from it"
        )
    return tokenizer
