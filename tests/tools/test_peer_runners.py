"""What onnxruntime-genai and llama.cpp are given and how they are driven, with the libraries faked."""

from __future__ import annotations

import ctypes
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimvlm_tools.bench.geometry import Geometry, make_checkpoint
from trimvlm_tools.bench.peers import _gguf, llama_cpp, onnxruntime_genai
from trimvlm_tools.bench.peers._plain_decoder import read_decoder, write_decoder

GEOMETRY = Geometry(
    name="peers", layers=8, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=64, image=28,
    vision_layers=2, vision_hidden=32, text=10,
)  # fmt: skip
VOCAB, END = 16, 3
PROMPT = np.array([5, 1, 2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(GEOMETRY, tmp_path_factory.mktemp("peers") / "checkpoint")


def following(token: int) -> int:
    """The fake models' greedy token after `token`: 2 is followed by the end token, that by 4."""
    return (token + 1) % VOCAB


def logits_after(token: int) -> np.ndarray:
    return np.eye(VOCAB, dtype=np.float32)[following(token)]


def test_the_plain_decoder_computes_what_the_whole_model_does(checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

    write_decoder(read_decoder(checkpoint), checkpoint, tmp_path / "plain")
    ids = torch.arange(8, 20)[None]
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    whole: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "plain")) == GEOMETRY.vocab


def write_checkpoint(
    directory, text_config: dict, tensors: dict[str, np.ndarray], dtype: str = "F32"
) -> None:
    """A checkpoint by hand, one file per tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"text_config": text_config}))
    for index, (name, values) in enumerate(tensors.items()):
        data = values.tobytes()
        header = json.dumps(
            {name: {"dtype": dtype, "shape": values.shape, "data_offsets": [0, len(data)]}}
        ).encode()
        (directory / f"{index}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


VALUES = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)


@pytest.mark.parametrize("root", ["language_model.model.", "model.language_model.", "model."])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_found_under_every_layout_of_names(tmp_path, root, tied):
    inside = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight")
    names = (*(f"{root}{name}" for name in inside), "x.lm_head.weight", "vision.w")
    config = {"model_type": "qwen2", "tie_word_embeddings": tied, "rope_theta": 7.0}
    write_checkpoint(tmp_path / "c", config, dict.fromkeys(names, VALUES))
    decoder = read_decoder(tmp_path / "c")
    head = set() if tied else {"lm_head.weight"}
    assert set(decoder.tensors) == {f"model.{name}" for name in inside} | head
    assert decoder.config["architectures"] == ["Qwen2ForCausalLM"] and decoder.rope_theta == 7.0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_are_read_in_float32(tmp_path, dtype):
    stored = {
        "F32": VALUES,
        "F16": VALUES.astype(np.float16),
        "BF16": (VALUES.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    write_checkpoint(tmp_path / "c", {"model_type": "llama"}, {"model.embed_tokens.weight": stored}, dtype)
    decoder = read_decoder(tmp_path / "c")
    assert decoder.config["tie_word_embeddings"]  # there is no head
    values = decoder.tensors["model.embed_tokens.weight"].read()
    assert values.dtype == np.float32 and np.array_equal(values, VALUES)


@pytest.mark.parametrize(
    ("config", "name", "says"),
    [
        ({"model_type": "mamba"}, "model.embed_tokens.weight", "'mamba': only llama, qwen2"),
        ({"model_type": "llama"}, "vision.weight", "not one decoder"),
    ],
)
def test_what_is_no_llama_or_qwen2_is_refused(tmp_path, config, name, says):
    write_checkpoint(tmp_path / "c", config, {name: VALUES})
    with pytest.raises(ValueError, match=says):
        read_decoder(tmp_path / "c")


def test_scaled_rotary_frequencies_are_refused(tmp_path):
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}, "rope_theta": 1e4}
    write_checkpoint(tmp_path / "c", config, {"model.embed_tokens.weight": VALUES})
    with pytest.raises(ValueError, match="rope type 'llama3'"):
        _ = read_decoder(tmp_path / "c").rope_theta


def test_interleaved_projections_score_alike_under_the_other_rotation():
    """Halves rotated against halves, and pairs rotated, give the same products of queries and keys."""
    random = np.random.default_rng(0)
    heads, size, width = 2, 8, 6
    angles = np.array([1, 0.1, 0.01, 0.001])

    def rotated(rows: np.ndarray, position: int, *, pairs: bool) -> np.ndarray:
        first, second = (rows[..., 0::2], rows[..., 1::2]) if pairs else np.split(rows, 2, axis=-1)
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    def scores(query: np.ndarray, key: np.ndarray, *, pairs: bool) -> np.ndarray:
        q, k = (w @ x for w, x in ((query, x_q), (key, x_k)))
        q, k = (rotated(rows.reshape(heads, size), at, pairs=pairs) for rows, at in ((q, 9), (k, 4)))
        return (q * k).sum(axis=-1)

    query, key = random.standard_normal((2, heads * size, width))
    x_q, x_k = random.standard_normal((2, width))
    halves = scores(query, key, pairs=False)
    paired = scores(_gguf.interleave(query, heads), _gguf.interleave(key, heads), pairs=True)
    assert np.allclose(halves, paired)
    assert not np.allclose(halves, scores(query, key, pairs=True))


class GgufWriter:
    """Remembers what is written."""

    made: list[GgufWriter] = []

    def __init__(self, path, arch) -> None:
        self.arch, self.fields, self.infos, self.data = arch, {}, {}, []
        GgufWriter.made.append(self)

    def add_tensor_info(self, name, shape, dtype, size) -> None:
        self.infos[name] = (tuple(shape), dtype, size)

    def write_tensor_data(self, values) -> None:
        self.data.append(values)

    def __getattr__(self, name):
        return lambda *values: self.fields.__setitem__(name, values[0] if values else True)


def fake_gguf(lost: str) -> ModuleType:
    """Its map of names knows every weight but `lost`."""
    found = SimpleNamespace(
        get_name=lambda name, try_suffixes: None if name == lost else f"gguf/{name}",
    )
    gguf: Any = ModuleType("gguf")
    gguf.MODEL_ARCH = SimpleNamespace(LLAMA=0, QWEN2=1)
    gguf.MODEL_ARCH_NAMES = {0: "llama", 1: "qwen2"}
    gguf.LlamaFileType = SimpleNamespace(ALL_F32=0)
    gguf.get_tensor_name_map = lambda arch, layers: found
    gguf.GGUFWriter = GgufWriter
    return gguf


def test_gguf_has_every_weight_in_the_order_of_its_header(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", fake_gguf(lost=""))
    decoder = read_decoder(checkpoint)
    _gguf.write_gguf(decoder, tmp_path / "model.gguf")
    writer = GgufWriter.made[-1]
    assert writer.arch == "llama" and writer.fields["close"]
    assert (writer.fields["add_head_count"], writer.fields["add_head_count_kv"]) == (4, 2)
    assert writer.fields["add_rope_dimension_count"] == GEOMETRY.head_dim
    assert writer.fields["add_rope_freq_base"] == 10000.0
    assert writer.fields["add_tokenizer_model"] == "no_vocab"
    assert list(writer.infos) == [f"gguf/{name}" for name in decoder.tensors]
    for (shape, dtype, size), values in zip(writer.infos.values(), writer.data, strict=True):
        assert (shape, dtype, size) == (values.shape, values.dtype, values.nbytes)
    stored = dict(zip(decoder.tensors, writer.data, strict=True))
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
        whole = f"model.layers.0.self_attn.{name}.weight"
        values = decoder.tensors[whole].read()
        assert np.array_equal(stored[whole], _gguf.interleave(values, heads) if heads else values)


def test_a_weight_that_llama_cpp_does_not_know_is_an_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", fake_gguf(lost="model.norm.weight"))
    with pytest.raises(ValueError, match=r"llama has no place for model\.norm\.weight"):
        _gguf.write_gguf(read_decoder(checkpoint), tmp_path / "model.gguf")


class LlamaLibrary(ModuleType):
    """llama.cpp's C interface over the fake model; `rows` is what its KV cache holds."""

    llama_token = ctypes.c_int32
    LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED, GGML_TYPE_F32 = 0, 1, 0

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.rows: list[int] = []
        self.contexts: list[Any] = []
        self.calls: list[int] = []

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model, params) -> Any:
        self.contexts.append(params)
        return params

    def llama_free(self, context) -> None:
        assert context is self.contexts[-1]

    def llama_get_memory(self, context) -> list[int]:
        return self.rows

    def llama_memory_clear(self, memory, data) -> None:
        memory.clear()

    def llama_batch_get_one(self, tokens, count) -> list[int]:
        return list(tokens)[:count]

    def llama_decode(self, context, batch) -> int:
        self.calls.append(len(batch))
        self.rows += batch
        if len(self.rows) > context.n_ctx or len(batch) > context.n_batch:
            return 1
        self.logits = (ctypes.c_float * VOCAB)(*logits_after(self.rows[-1]))
        return 0

    def llama_get_logits_ith(self, context, row) -> Any:
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))

    def llama_model_get_vocab(self, model) -> None: ...

    def llama_vocab_n_tokens(self, vocab) -> int:
        return VOCAB


def test_llama_cpp_reads_the_prompt_in_one_call_and_starts_every_run_anew(monkeypatch):
    library = LlamaLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    runner = llama_cpp.Runner("model", threads=2, whole=False)
    for _ in range(2):
        done = runner.run(PROMPT, 4)
        assert done.tokens == [3, 4, 5, 6]
        assert done.logits is not None and np.array_equal(done.logits, logits_after(2))
        assert library.rows == [5, 1, 2, 3, 4, 5]  # the last token is never fed
    assert library.calls == [3, 1, 1, 1] * 2
    (context,) = library.contexts
    assert (context.n_ctx, context.n_batch, context.n_threads_batch, context.n_threads) == (7, 3, 2, 2)
    runner.run(PROMPT[:2], 1)
    assert [context.n_batch for context in library.contexts] == [3, 2]


def test_llama_cpp_attends_in_float32_where_that_is_asked_for(monkeypatch):
    library = LlamaLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    for whole in (True, False):
        llama_cpp.Runner("model", threads=1, whole=whole).run(PROMPT, 1)
    exact, default = library.contexts
    assert (exact.type_k, exact.type_v, exact.flash_attn_type) == (0, 0, 0)
    assert default.flash_attn_type == 1 and not hasattr(default, "type_k")


class Generator:
    """genai's Generator over the fake model: an end token ends it, and is not among its tokens."""

    made = 0

    def __init__(self, model, params) -> None:
        Generator.made += 1
        self.rows: list[int] = []
        self.limit, self.done, self.computed = params.max_length, False, False

    def rewind_to(self, rows: int) -> None:
        assert rows == 0
        self.rows, self.done, self.computed = [], False, False

    def append_tokens(self, tokens: np.ndarray) -> None:
        assert tokens.dtype == np.int32
        self.rows += tokens.tolist()
        assert len(self.rows) <= self.limit
        self.done, self.computed = False, True

    def get_logits(self) -> np.ndarray:
        assert self.computed
        return logits_after(self.rows[-1])[None, None]

    def generate_next_token(self) -> None:
        assert not self.done
        self.token = following(self.rows[-1])
        self.done = self.token == END
        if not self.done:
            self.rows.append(self.token)
        self.computed = False

    def get_next_tokens(self) -> np.ndarray:
        return np.array([self.token], np.int32)

    def is_done(self) -> bool:
        return self.done or len(self.rows) == self.limit


def test_genai_goes_on_after_an_end_token_and_starts_every_run_anew(monkeypatch):
    library: Any = ModuleType("onnxruntime_genai")
    library.Generator = Generator
    library.GeneratorParams = lambda model: SimpleNamespace(
        set_search_options=lambda **options: options.pop("do_sample") or made.update(options)
    )
    made: dict[str, int] = {}
    library.Generator = lambda model, params: Generator(model, SimpleNamespace(**made))
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", library)
    runner = onnxruntime_genai.Runner("model")
    before = Generator.made
    for _ in range(2):
        done = runner.run(PROMPT, 4)
        assert done.tokens == [END, 4, 5, 6]
        assert done.logits is not None and np.array_equal(done.logits, logits_after(2))
    assert Generator.made == before + 1
    assert runner.run(PROMPT[:2], 2).tokens == [2, END]
