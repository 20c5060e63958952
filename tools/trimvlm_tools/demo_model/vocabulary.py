"""The closed vocabulary, and the tokenizer and processor files made from it."""

from pathlib import Path

from trimvlm_tools.demo_model.questions import NOTHING, NUMBERS
from trimvlm_tools.demo_model.scenes import COLORS, COLUMNS, GLYPHS, ROWS, SHAPES, SIDE, SIZES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
_GRAMMAR = """? a above are at below character color has how in is left many no object objects of on or read
right row shape the there what where which with yes"""
_WORDS = {*_GRAMMAR.split(), *COLORS, *SHAPES, *SIZES, *GLYPHS, *ROWS, *COLUMNS, *NUMBERS, NOTHING}
VOCABULARY = (*SPECIAL, "USER:", "ASSISTANT:", *sorted(_WORDS))
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}
VOCABULARY_ROWS = 96  # rows of the embedding table; no text uses the last ones
CENTRE_ROW = VOCABULARY_ROWS - 1  # in training, the direction that marks the centre of a thing
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}USER: {% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def token_ids(text: str) -> list[int]:
    """Ids of a text's words, without `<s>`; a word outside the vocabulary is a `KeyError`."""
    return [TOKEN_ID[word] for word in text.split()]


def make_processor():
    """The `LlavaProcessor`: words split at spaces, images of 112 x 112 pixels scaled to -1..1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab=dict(TOKEN_ID), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        image_token="<image>",
        model_max_length=512,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(folder: Path) -> None:
    """Write tokenizer, processor configuration and chat template into a folder."""
    make_processor().save_pretrained(folder)
