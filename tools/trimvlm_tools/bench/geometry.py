"""A LLaVA checkpoint of a given geometry with random weights: time and memory do not depend on training."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec

from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec
from trimvlm.value import Value
from trimvlm_tools.bench.quiet import quiet
from trimvlm_tools.random_checkpoint.weights import tensors, write

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
GEOMETRY_FILE = "geometry.json"  # in a checkpoint's directory: what it was made as
TEXT_BEFORE_IMAGE = 2  # `<s> USER:`
_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}USER: {% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Geometry(Value, frozen=True, kw_only=True):
    """Sizes of a model to measure.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: the Llama decoder.
        image, patch: side of the image and of a patch in pixels; (image / patch)^2 visual tokens.
        vision_layers, vision_hidden: the CLIP tower, small where the decoder is what is measured.
        text: text rows of the prompt that is measured, all of them together.
        seed: what the weights are drawn with.
    """

    name: str
    layers: int = 8
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64
    ffn: int = 2816
    vocab: int = 8192
    image: int = 336
    patch: int = 14
    vision_layers: int = 3
    vision_hidden: int = 64
    text: int = 32
    seed: int = 0

    @property
    def visual_tokens(self) -> int:
        """Visual rows of one image."""
        return (self.image // self.patch) ** 2

    @property
    def prompt(self) -> str:
        """A question that makes `text` text rows with `<s> USER: ... ASSISTANT:` around it."""
        words = self.text - TEXT_BEFORE_IMAGE - 1
        return " ".join(
            _word(len(SPECIAL) + 37 * index % (self.vocab - len(SPECIAL))) for index in range(words)
        )

    def model_spec(self, fingerprint: str | None = None) -> ModelSpec:
        """The ModelSpec of this geometry."""
        same = {
            f: getattr(self, f) for f in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
        }
        return ModelSpec(family="llava", fingerprint=fingerprint, visual_tokens=self.visual_tokens, **same)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry(name="d1024"),
        # Seconds instead of minutes: for trying the command out, not for figures.
        Geometry(
            name="tiny", layers=8, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=128,
            image=56, vision_hidden=32, text=12,
        ),
    )
}  # fmt: skip


def find_geometry(name: str) -> Geometry:
    """The geometry of that name.

    Raises:
        UserError: there is none.
    """
    if name not in GEOMETRIES:
        raise UserError(f"--geometry: {name!r} is not known; choose from {', '.join(sorted(GEOMETRIES))}")
    return GEOMETRIES[name]


def make_checkpoint(geometry: Geometry, directory: Path) -> Path:
    """Writes the checkpoint to `directory` (fp32 safetensors, tokenizer, processor), or finds it there.

    The directory also holds `geometry.json`; a checkpoint of another geometry or seed is made again.
    """
    from transformers import GenerationConfig

    stamp = directory / GEOMETRY_FILE
    encoded = msgspec.json.encode(geometry)
    if stamp.is_file() and stamp.read_bytes() == encoded:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with quiet():
        config = _make_config(geometry)
        config.save_pretrained(directory)
        GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(directory)
        _make_processor(geometry).save_pretrained(directory)
        write(directory, tensors(config), "float32", geometry.seed, math.inf)
    stamp.write_bytes(encoded)  # last: without it the directory counts as not made
    return directory


def _make_config(geometry: Geometry):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=geometry.vision_hidden,
        intermediate_size=4 * geometry.vision_hidden,
        num_hidden_layers=geometry.vision_layers,
        num_attention_heads=geometry.vision_hidden // 32,
        image_size=geometry.image,
        patch_size=geometry.patch,
        projection_dim=geometry.vision_hidden,
        hidden_act="gelu",
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


def _make_processor(geometry: Geometry):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [*SPECIAL, *(_word(index) for index in range(len(SPECIAL), geometry.vocab))]
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


def _word(index: int) -> str:
    return f"w{index}"
