"""A toy bundle: hand-made graphs that follow the contract of `bundle.py`, with answers one can work out.

The toy has three layers (the second is not executed and so has no KV), one selection at the third, N = 4
visual rows of width D = 3 from an image of 4 x 4 pixels. Keys are one number per row: a text row's token id,
or the sum of a visual row. The next token is the rounded sum of

    all keys of layer 0 (every row) + 2 * all keys of layer 2 (text rows and selected visual rows)
    + the last text position, modulo V.

A wrong past, position, dtype or selection gives another answer; `toy_answer` computes it in numpy.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.parser
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from trimvlm.bundle import (
    Entry,
    Manifest,
    PromptTemplate,
    TextProcessing,
    record,
    write_manifest,
    write_whole,
)
from trimvlm.encoder_rules import Tower
from trimvlm.image_processing import SingleView
from trimvlm.profile import Decisions, LayerRule, Method, ModelSpec, Profile, Select
from trimvlm.rules import LastRowAttention

VOCAB = 64
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
WORDS += [f"w{n}" for n in range(len(WORDS), VOCAB)]

VISION = """
<ir_version: 10, opset_import: ["" : 20]>
vision (FLOAT[images, 3, 4, 4] pixel_values) => (FLOAT[visual_rows, 3] visual)
{
    pooled = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (pixel_values)
    last = Transpose <perm = [0, 2, 3, 1]> (pooled)
    shape = Constant <value = int64[2] {-1, 3}> ()
    visual = Reshape (last, shape)
}
"""

DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
decoder (
    int64[text] input_ids, FLOAT[visual, 3] visual, int64[text] text_positions,
    int64[visual] visual_positions, int64[forced_0] forced__0,
    FLOAT[1, 1, past_0, 1] past_key__0, FLOAT[1, 1, past_1, 1] past_key__2,
    FLOAT[1, 1, past_0, 1] past_value__0, FLOAT[1, 1, past_1, 1] past_value__2
) => (
    float[1, 64] logits,
    FLOAT[1, 1, total_0, 1] present_key__0, FLOAT[1, 1, total_1, 1] present_key__2,
    FLOAT[1, 1, total_0, 1] present_value__0, FLOAT[1, 1, total_1, 1] present_value__2,
    int64[selected_0] selected__0, float[entered_0] scores__0
)
{
    minus = Constant <value = int64[1] {-1}> ()
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    column = Constant <value = int64[4] {1, 1, -1, 1}> ()
    vocab = Constant <value = int64 {64}> ()
    off_on = Constant <value = float[2] {0.0, 1.0}> ()

    rows = ReduceSum <keepdims = 0> (visual, one)
    scores__0 = Cast <to = 1> (rows)
    count = Shape (rows)
    keep = Min (two, count)
    best, found = TopK (scores__0, keep)
    found_float = Cast <to = 1> (found)
    ascending, order = TopK <largest = 0> (found_float, keep)
    free = Cast <to = 7> (ascending)
    forced_count = Shape (forced__0)
    both = Concat <axis = 0> (forced__0, free)
    wanted = Max (forced_count, keep)
    selected__0 = Slice (both, zero, wanted)
    kept = Gather (rows, selected__0)

    text = Cast <to = FLOAT_CODE> (input_ids)
    visual_text = Concat <axis = 0> (rows, text)
    kept_text = Concat <axis = 0> (kept, text)
    new__0 = Reshape (visual_text, column)
    new__2 = Reshape (kept_text, column)
    present_key__0 = Concat <axis = 2> (past_key__0, new__0)
    present_key__2 = Concat <axis = 2> (past_key__2, new__2)
    present_value__0 = Concat <axis = 2> (past_value__0, new__0)
    present_value__2 = Concat <axis = 2> (past_value__2, new__2)

    key__0 = Cast <to = 1> (present_key__0)
    value__2 = Cast <to = 1> (present_value__2)
    all = ReduceSum <keepdims = 0> (key__0)
    some = ReduceSum <keepdims = 0> (value__2)
    sum = Add (all, some)
    sum_some = Add (sum, some)
    rounded = Round (sum_some)
    whole = Cast <to = 7> (rounded)
    position = Gather (text_positions, minus)
    number = Add (whole, position)
    token = Mod (number, vocab)
    logits = OneHot (token, vocab, off_on)
}
"""


def toy_answer(visual_ND: np.ndarray, prompt_ids: list[int], prompt_length: int, tokens: int) -> list[int]:
    """The toy's greedy tokens, independently of its graphs."""
    scores_N = visual_ND.astype(np.float64).sum(axis=1)
    kept = np.sort(np.argsort(-scores_N, kind="stable")[:2])
    every, some = scores_N.sum() + sum(prompt_ids), scores_N[kept].sum() + sum(prompt_ids)
    answer, position = [], prompt_length - 1
    for _ in range(tokens):
        token = int((np.round(every + 2 * some) + position) % VOCAB)
        answer.append(token)
        every, some, position = every + token, some + token, position + 1
    return answer


def toy_pixels(value: float) -> np.ndarray:
    """Float32 pixels whose visual row sums are four distinct multiples of 1/2."""
    pixels = np.zeros((1, 3, 4, 4), np.float32)
    pixels[0, 0] = np.kron(np.array([[value, value + 3], [value + 1, value + 2]]), np.ones((2, 2)))
    return pixels


def dotted(graph: onnx.GraphProto) -> None:
    """`a__0` to `a.0`: the text format has no dots in names."""
    for value in [*graph.input, *graph.output]:
        value.name = value.name.replace("__", ".")
    for node in graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
        node.output[:] = [name.replace("__", ".") for name in node.output]


def write_toy_bundle(out: Path, *, dtype: str = "float32", eos: tuple[int, ...] = (2,)) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    code = {"float32": ("float", "1"), "float16": ("float16", "10")}[dtype]
    for name, text in (("vision.onnx", VISION), ("toy.decoder.fused.onnx", DECODER)):
        model = onnx.parser.parse_model(text.replace("FLOAT_CODE", code[1]).replace("FLOAT", code[0]))
        dotted(model.graph)
        onnx.checker.check_model(model)
        onnx.save(model, out / name)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in WORDS[:5]])
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(out / "tokenizer.json"))
    spec = ModelSpec(
        family="toy", layers=3, hidden=3, heads=1, kv_heads=1, head_dim=1, ffn=1, vocab=VOCAB, visual_tokens=4
    )
    profile = Profile(
        name="toy",
        method=Method(name="toy"),
        model=spec,
        decisions=Decisions(
            select=(Select(layer=2, keep=2, by=LastRowAttention(attention="own")),),
            layers=(LayerRule(layers=(1,), execute="none"),),
        ),
    )
    write_whole(out / "toy.profile.json", msgspec.json.encode(profile))
    names = ("vision.onnx", "toy.decoder.fused.onnx", "tokenizer.json", "toy.profile.json")
    entry = Entry(
        model=spec,
        tower=Tower(layers=1, patches=4, cls=False, features=(1,), width=3),
        profile="toy.profile.json",
        vision="vision.onnx",
        decoders={"fused": "toy.decoder.fused.onnx"},
    )
    manifest = Manifest(
        producer="test",
        fingerprint="toy",
        dtype=dtype,
        image=SingleView(
            resize=4, resample=3, crop=(4, 4), rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        text=TextProcessing(
            tokenizer="tokenizer.json",
            image_token="<image>",
            image_token_id=4,
            eos_ids=eos,
            template=PromptTemplate(
                start="",
                user_start="USER: ",
                image="<image> ",
                user_end=" ",
                answer_start="ASSISTANT: ",
                answer_end=" ",
                generate="ASSISTANT:",
            ),
        ),
        weights=(),
        ignored_tensors={},
        profiles={"toy": entry},
        files={name: record(out / name) for name in names},
    )
    write_manifest(out, manifest)
    return out
