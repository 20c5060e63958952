"""A Session on the toy bundle of tests/toy_bundle.py, whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image
from toy_bundle import WORDS, toy_answer, toy_pixels, write_toy_bundle

from trimvlm import Bundle, Session, Turn, UserError
from trimvlm.bundle import Engine, record, write_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", eos=())


def pictures(tmp_path: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        path = tmp_path / f"{number}.png"
        levels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(levels).save(path)
        paths.append(path)
    return paths


def said(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens if token >= 5)  # the first five are special


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_answers(dtype: str, images: int, tmp_path: Path):
    bundle = write_toy_bundle(tmp_path / "bundle", dtype=dtype, eos=())
    paths = pictures(tmp_path, images)
    with Session.open(bundle) as session:
        pieces = list(session.generate("w20 w33", paths, max_new_tokens=12))
        visual = session.vision(paths)
        assert visual.dtype == dtype and visual.shape == (4 * images, 3)
    ids = [1, 5, 20, 33, 6]
    assert "".join(pieces) == said(toy_answer(visual, ids, len(ids) + 4 * images, 12))
    assert len(pieces) > 5


def test_visual_rows_come_image_by_image(bundle: Path, tmp_path: Path):
    paths = pictures(tmp_path, 2)
    with Session.open(bundle) as session:
        both = session.vision(paths)
        np.testing.assert_array_equal(both[:4], session.vision(paths[:1]))
        np.testing.assert_array_equal(both[4:], session.vision([session.preprocess(paths[1])]))
        # AveragePool over 2 x 2 pixels, rows in raster order, channels last.
        pixels = session.preprocess(paths[0])
        want = pixels.reshape(3, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(3, 4).T
        np.testing.assert_allclose(both[:4], want, atol=1e-6)


def test_timings(bundle: Path, tmp_path: Path):
    with Session.open(bundle) as session:
        assert session.timings.preprocess is None
        pieces = session.generate("w20", pictures(tmp_path, 1), max_new_tokens=6)
        assert session.timings.preprocess > 0 and session.timings.vision is None
        next(pieces)
        first = session.timings
        assert first.vision > 0 and first.prefill > 0 and first.decode_tokens == 0
        assert first.tokens_per_second is None and first.select is None
        list(pieces)
        assert first.decode_tokens == 5 and first.decode > 0
        assert first.first_token == first.preprocess + first.vision + first.prefill
        assert first.tokens_per_second == 5 / first.decode
        list(session.generate("w20", max_new_tokens=1))
        assert session.timings is not first and session.timings.decode_tokens == 0


def test_sampling_is_seeded_and_follows_the_options(bundle: Path):
    with Session.open(bundle) as session:

        def answer(**options) -> str:
            return "".join(session.generate("w20 w33", max_new_tokens=10, temperature=9.0, **options))

        assert answer(seed=1) == answer(seed=1) != answer(seed=2)
        greedy = "".join(session.generate("w20 w33", max_new_tokens=10))
        assert answer(seed=1) != greedy == answer(seed=1, top_p=1e-6)


def test_it_stops_at_eos(tmp_path: Path):
    tokens = toy_answer(np.zeros((0, 3)), [1, 5, 20, 33, 6], 5, 12)
    end = next(n for n, token in enumerate(tokens) if n > 2 and token not in tokens[:n])
    bundle = write_toy_bundle(tmp_path / "bundle", eos=(63, tokens[end]))
    with Session.open(bundle) as session:
        assert "".join(session.generate("w20 w33", max_new_tokens=12)) == said(tokens[:end])
        assert session.timings.decode_tokens == end


def test_prefill_and_steps_give_every_output(bundle: Path):
    """Teacher forcing: rows, shapes and positions of a prompt with two images."""
    with Session.open(bundle) as session:
        visual = session.vision([toy_pixels(1.0), toy_pixels(2.5)])
        scores = [1, 4, 2, 3, 2.5, 5.5, 3.5, 4.5]
        prompt = session.prompt("w7 w8", 2)
        outputs = session.prefill(prompt, visual)
        assert outputs["scores.0"].tolist() == scores
        assert outputs["selected.0"].tolist() == [5, 7]
        text = [1, 5, 7, 8, 6]
        assert outputs["present_key.0"].shape == (1, 1, 13, 1)
        assert outputs["present_key.0"].ravel().tolist() == [*scores, *text]
        assert outputs["present_value.2"].ravel().tolist() == [5.5, 4.5, *text]
        assert outputs.next_position == prompt.length == 13
        for token in (40, 41):  # not what the toy would say
            outputs = session.step(token, outputs)
            text.append(token)
            assert outputs["present_key.2"].ravel().tolist() == [5.5, 4.5, *text]
            number = sum(scores) + 2 * 10 + 3 * sum(text) + outputs.next_position - 1
            assert outputs["logits"].argmax() == round(number) % 64
            assert outputs["selected.0"].shape == outputs["scores.0"].shape == (0,)
        assert outputs.next_position == 15


def test_forced_indices_replace_the_selection(bundle: Path):
    with Session.open(bundle) as session:
        visual = session.vision([toy_pixels(1.0)])
        outputs = session.prefill(session.prompt("w7", 1), visual, [np.array([0, 2])])
        assert outputs["selected.0"].tolist() == [0, 2]
        assert outputs["present_key.2"].ravel()[:2].tolist() == [1, 2]


def test_history_raw_and_prompt_rows(bundle: Path, tmp_path: Path):
    one, two = pictures(tmp_path, 2)
    with Session.open(bundle) as session:
        chat = session.generate(
            "w9", [one, two], history=[Turn(text="w7", images=1, answer="w8")], max_new_tokens=4
        )
        written = "USER: <image> w7 ASSISTANT: w8 USER: <image> w9 ASSISTANT:"
        raw = session.generate(written, [one, two], raw=True, max_new_tokens=4)
        assert list(chat) == list(raw)
        assert session.prompt(written, 2, raw=True).length == 8 + 8


def test_two_answers_at_once_do_not_mix(bundle: Path, tmp_path: Path):
    paths = pictures(tmp_path, 2)
    with Session.open(bundle) as session:
        alone = [list(session.generate("w20", [path], max_new_tokens=6)) for path in paths]
        a, b = (session.generate("w20", [path], max_new_tokens=6) for path in paths)
        assert [list(pair) for pair in zip(*zip(a, b, strict=True), strict=True)] == alone


def test_a_closed_session_says_so(bundle: Path):
    session = Session.open(bundle)
    message = "the session is closed; use it inside"
    with pytest.raises(UserError, match=message):
        session.generate("w7")
    with session:
        pieces = session.generate("w20")
        next(pieces)
    with pytest.raises(UserError, match=message):
        list(pieces)
    for use in (lambda: session.vision([]), lambda: session.generate("w7")):
        with pytest.raises(UserError, match=message):
            use()
    with session:  # and opens again
        assert list(session.generate("w20", max_new_tokens=2))


def test_arguments_are_checked_at_the_call(bundle: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no picture")
    with Session.open(bundle) as session:
        for bad, message in [
            ({"max_new_tokens": 0}, "max_new_tokens: 0"),
            ({"temperature": -1}, "temperature: -1"),
            ({"top_p": 2}, "top_p: 2"),
            ({"images": [tmp_path / "notes.txt"]}, r"notes\.txt: cannot be read"),
            ({"prompt": "<image>", "raw": True}, "1 image token <image> for 0 images"),
        ]:
            with pytest.raises(UserError, match=message):
                session.generate(**{"prompt": "w7", **bad})


def test_arrays_are_pixels_and_nothing_else(bundle: Path):
    with Session.open(bundle) as session:
        for frame in (
            np.zeros((4, 4, 3), np.uint8),
            np.zeros((3, 4, 4), np.float32),
            np.zeros((1, 3, 5, 5), np.float32),
        ):
            with pytest.raises(UserError, match=r"array .*; give pixels .*Image\.fromarray"):
                session.vision([frame])


def test_opening(bundle: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no manifest"):
        Session.open(tmp_path)
    with pytest.raises(UserError, match="no profile 'v-skip'; it holds toy"):
        Session.open(bundle, "v-skip")
    with pytest.raises(UserError, match=r"no engine for target 'rtx-4090', .* trimvlm build"):
        Session.open(bundle, target="rtx-4090")
    with pytest.raises(UserError, match="threads: 0"):
        Session.open(bundle, threads=0)
    assert Session.open(Bundle(bundle)).profile == "toy"


def add_engine(bundle: Path, **changes) -> None:
    manifest = Bundle(bundle).manifest
    engine = Engine(
        target="box",
        backend="onnxruntime",
        version="1",
        graphs={"vision": "vision.onnx", "decoder": "toy.decoder.fused.onnx"},
        profile_digest=Bundle(bundle).profile().digest,
    )
    engine = msgspec.structs.replace(engine, **changes)
    entry = msgspec.structs.replace(manifest.profiles["toy"], engines={"box": engine})
    write_manifest(bundle, msgspec.structs.replace(manifest, profiles={"toy": entry}))


def test_a_built_engine_is_used(bundle: Path):
    add_engine(bundle)
    with Session.open(bundle, target="box") as session:
        assert list(session.generate("w20", max_new_tokens=2))


def test_an_engine_of_an_older_profile_is_refused(bundle: Path):
    add_engine(bundle, profile_digest="0" * 64)
    with pytest.raises(
        UserError,
        match=r"the profile's digest is .*, but it was built for 0000.*; build it again with trimvlm build",
    ):
        Session.open(bundle, target="box")


def test_an_engine_that_this_version_cannot_run(bundle: Path):
    add_engine(bundle, backend="tensorrt_of_tomorrow")
    with pytest.raises(UserError, match="cannot run tensorrt_of_tomorrow engines"):
        Session.open(bundle, target="box")


def test_without_onnxruntime(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install trimvlm\[ort\]"):
        Session.open(bundle)


def test_a_graph_that_does_not_load_leaves_the_session_closed(bundle: Path):
    manifest = Bundle(bundle).manifest
    path = bundle / "toy.decoder.fused.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type = "OfTomorrow"
    onnx.save(model, path)
    files = {**manifest.files, path.name: record(path)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    session = Session.open(bundle)
    with pytest.raises(UserError, match=r"toy\.decoder\.fused\.onnx: ONNX Runtime .* cannot load"), session:
        raise AssertionError("entered")
    assert not session._runner.backends["toy"].sessions  # nor does the graph that did load stay in memory
    with pytest.raises(UserError, match="closed"):
        session.vision([])


def test_low_memory_and_threads_answer_alike(bundle: Path, tmp_path: Path):
    paths = pictures(tmp_path, 1)
    answers = []
    for options in ({}, {"low_memory": True}, {"threads": 1}):
        with Session.open(bundle, **options) as session:
            answers.append(list(session.generate("w20", paths, max_new_tokens=5)))
    assert answers[0] == answers[1] == answers[2]
