"""What OpenVINO GenAI is given, what is read from it and what is converted how, with the libraries faked."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trimvlm.errors import UserError
from trimvlm_tools.bench.peers import _openvino_convert, openvino_genai

PROMPT = np.array([5, 1, 2])
TTFT_MS = 0.001


class Pipeline:
    """Remembers what it was opened with and asked."""

    def __init__(self, directory: str, device: str, **properties: Any) -> None:
        self.directory, self.device, self.properties = Path(directory), device, properties

    def generate(self, prompt: Any, config: Any = None, **more: Any) -> Any:
        self.prompt, self.config, self.more = prompt, config or more["generation_config"], more
        count = self.config.max_new_tokens
        metrics = SimpleNamespace(get_ttft=lambda: SimpleNamespace(mean=TTFT_MS))
        return SimpleNamespace(tokens=[list(range(40, 40 + count))], perf_metrics=metrics)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def genai(monkeypatch):
    """GenAI's Python package as far as the peer uses it; tensors are arrays."""
    fakes = module(
        "openvino_genai",
        LLMPipeline=Pipeline,
        VLMPipeline=Pipeline,
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        TokenizedInputs=lambda ids, mask: (ids, mask),
    )
    monkeypatch.setitem(sys.modules, "openvino_genai", fakes)
    monkeypatch.setitem(sys.modules, "openvino", module("openvino", Tensor=np.asarray))


@pytest.mark.parametrize("precision", openvino_genai.PRECISIONS)
def test_the_pipeline_is_opened_for_latency_in_float32_without_a_prefix_cache(genai, tmp_path, precision):
    opened = openvino_genai.open_decoder(tmp_path, 3, precision)._pipeline
    assert (opened.directory, opened.device) == (tmp_path / "decoder", "CPU")
    scheduler = opened.properties.pop("scheduler_config")
    assert scheduler.enable_prefix_caching is False
    assert scheduler.max_num_batched_tokens > 100_000  # a prompt is one step
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if precision == "fp32" else {}
    assert opened.properties == exact | {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": 3,
    }


def test_a_decoder_is_asked_for_all_its_tokens_and_timed_by_its_own_first(genai, tmp_path):
    runner = openvino_genai.open_decoder(tmp_path, 1, "fp32")
    done = runner.run(PROMPT, 4)
    ids, mask = runner._pipeline.prompt
    assert ids.tolist() == [[5, 1, 2]] and mask.tolist() == [[1, 1, 1]]
    config = runner._pipeline.config
    assert (config.max_new_tokens, config.ignore_eos, config.do_sample) == (4, True, False)
    assert done.tokens == [40, 41, 42, 43] and done.logits is None
    assert done.prefill == pytest.approx(TTFT_MS / 1000)
    assert done.decode > 0


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (directory / _openvino_convert.PROMPT).write_text("USER: <image> {question} ASSISTANT:")
    return tmp_path


def test_an_answer_gets_the_models_own_prompt_and_the_picture(genai, model):
    picture = io.BytesIO()
    Image.new("L", (5, 4), 9).save(picture, "png")
    answers = openvino_genai.open_answer(model, 2, "fp32", None)
    assert answers.run(picture.getvalue(), "what {is} this?") > 0
    pipeline = answers._pipeline
    assert pipeline.directory == model / "model" and pipeline.properties["INFERENCE_NUM_THREADS"] == 2
    assert pipeline.prompt == "USER: <image> what {is} this? ASSISTANT:"
    (pixels,) = pipeline.more["images"]
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8 and (pixels == 9).all()
    assert pipeline.config.max_new_tokens == 1
    assert pipeline.config.apply_chat_template is False  # the prompt has it already


def test_pruning_that_genai_would_silently_leave_out_is_refused(genai, model):
    with pytest.raises(UserError, match=r"keep 64: .* Qwen-VL models only, and of 'llava'"):
        openvino_genai.open_answer(model, 2, "fp32", 64)


def fake_optimum(monkeypatch, supported: bool) -> list[str]:
    """optimum-intel with or without the model's type, and a processor; returns what gets exported."""
    exported: list[str] = []
    processor = SimpleNamespace(
        tokenizer=None,
        image_processor=SimpleNamespace(save_pretrained=lambda to: (to / "sizes").write_text("336")),
        apply_chat_template=lambda turns, **_: f"USER: {turns[0]['content'][1]['text']}",
    )
    automatic = SimpleNamespace(from_pretrained=lambda _: processor)
    monkeypatch.setitem(sys.modules, "transformers", module("transformers", AutoProcessor=automatic))

    def supported_tasks(kind: str, exporter: str, library_name: str) -> dict[str, str]:
        assert (exporter, library_name) == ("openvino", "transformers")
        return {"image-text-to-text": kind} if supported else {}[kind]

    def export(model: Any, directory: Path, task: str, preprocessors: Any = None) -> None:
        exported.append(task)

    manager = SimpleNamespace(get_supported_tasks_for_model_type=supported_tasks)
    convert = module("convert", export_from_model=export, export_tokenizer=lambda *_: None)
    for name in ("optimum", "optimum.exporters", "optimum.exporters.openvino"):
        monkeypatch.setitem(sys.modules, name, module(name))
    monkeypatch.setitem(sys.modules, "optimum.exporters.openvino.convert", convert)
    monkeypatch.setitem(sys.modules, "optimum.exporters.tasks", module("tasks", TasksManager=manager))
    monkeypatch.setattr(_openvino_convert, "version", lambda _: "9.9")
    return exported


ONEVISION = SimpleNamespace(config=SimpleNamespace(model_type="llava_onevision"))


def test_a_model_that_optimum_does_not_convert_is_refused_when_answers_are_opened(
    genai, tmp_path, monkeypatch
):
    exported = fake_optimum(monkeypatch, supported=False)
    _openvino_convert.convert_model(ONEVISION, tmp_path, tmp_path / "model", "fp32")
    assert exported == []
    with pytest.raises(UserError, match=r"optimum-intel 9\.9 converts no .* 'llava_onevision'"):
        openvino_genai.open_answer(tmp_path, 1, "fp32", None)


@pytest.mark.parametrize(("precision", "small"), [("fp32", {}), ("int4", {"language": 4, "vision": 8})])
def test_int4_takes_the_language_model_to_four_bits_and_the_rest_to_eight(
    tmp_path, monkeypatch, precision, small
):
    compressed: dict[str, int] = {}
    fake_optimum(monkeypatch, supported=True)
    monkeypatch.setattr(
        _openvino_convert,
        "compress",
        lambda graph, four_bits: compressed.update({graph.name.split("_")[1]: 4 if four_bits else 8}),
    )
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("language_model", "vision_embeddings_model", "tokenizer"):
        (directory / f"openvino_{name}.xml").touch()
    _openvino_convert.convert_model(ONEVISION, tmp_path, directory, precision)
    assert compressed == small
    assert (directory / "prompt.txt").read_text() == "USER: {question}"
    assert (directory / "sizes").read_text() == "336"


def test_compressed_weights_take_the_place_of_the_graphs_own(tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def compress_weights(model: str, **options: Any) -> str:
        asked.update(options)
        return f"small {model}"

    def save_model(model: str, path: Path, compress_to_fp16: bool) -> None:
        assert not compress_to_fp16  # float32 weights stay float32
        path.write_text(model)
        path.with_suffix(".bin").write_text("small weights")

    modes = SimpleNamespace(INT4_ASYM="int4", INT8_ASYM="int8")
    nncf = module(
        "nncf",
        compress_weights=compress_weights,
        CompressWeightsMode=modes,
        GroupSizeFallbackMode=SimpleNamespace(ADJUST="adjust"),
        AdvancedCompressionParameters=dict,
    )
    core = SimpleNamespace(read_model=lambda path: path.read_text())
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    monkeypatch.setitem(sys.modules, "openvino", module("openvino", Core=lambda: core, save_model=save_model))
    graph = tmp_path / "openvino_model.xml"
    graph.write_text("graph")
    graph.with_suffix(".bin").write_text("weights")
    _openvino_convert.compress(graph, four_bits=True)
    assert (asked["mode"], asked["group_size"], asked["ratio"]) == ("int4", 128, 1.0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "openvino_model.xml": "small graph",
        "openvino_model.bin": "small weights",
    }
    asked.clear()
    _openvino_convert.compress(graph, four_bits=False)
    assert asked == {"mode": "int8"}
