"""The user's own calibration data."""

from __future__ import annotations

import json

import pytest
from tiny_models import noise_image, tiny_inputs, tiny_llava

from trimvlm.errors import UserError
from trimvlm_calib.samples import (
    PreparedSamples,
    Sample,
    digest,
    draw,
    load_samples,
    model_inputs,
    of_task,
    set_name,
)
from trimvlm_export.loading import Preparation


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text, "utf-8")
    return folder


def test_samples_are_read_in_order(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    lines = (
        {"image": "a.png", "question": "what is it ?", "answer": "a cat", "type": "x"},
        "",
        {"image": "a.png", "question": "où ?"},
    )
    assert load_samples(write(tmp_path, *lines)) == [
        Sample(image=tmp_path / "a.png", question="what is it ?", answer="a cat"),
        Sample(image=tmp_path / "a.png", question="où ?"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: '\[1\]' is not a JSON object"),
        ({"question": "q"}, "line 2: image: a text is needed, found None"),
        ({"image": "a.png", "question": 3}, "line 2: question: a text is needed, found 3"),
        ({"image": "a.png", "question": " "}, "line 2: question: a text"),
        ({"image": "a.png", "question": "q", "answer": 3}, "line 2: answer: a text is needed, found 3"),
        (
            {"image": "a.png", "question": "q", "task": ["x"]},
            r"line 2: task: a text is needed, found \[",
        ),
        ({"image": "a.png", "prompt": ""}, "line 2: prompt: a text is needed, found ''"),
        ({"image": "a.png", "question": "q", "prompt": "q"}, "line 2: prompt and question say the same"),
        ({"image": "b.png", "question": "q"}, r"line 2: image: there is no file .*b\.png"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    noise_image(0).save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png", "question": "q"}, line)
    with pytest.raises(UserError, match=rf"questions\.jsonl: {message}"):
        load_samples(tmp_path)


def test_a_jsonl_file_anywhere(tmp_path):
    """Images lie relative to the file; `prompt` is `question`; lines end where JSON's do."""
    (tmp_path / "images").mkdir()
    (tmp_path / "lists").mkdir()
    noise_image(0).save(tmp_path / "images" / "a.png")
    lines = [
        json.dumps(
            {"image": "../images/a.png", "prompt": "read\u2028this", "task": "ocr"}, ensure_ascii=False
        ),
        json.dumps({"image": str(tmp_path / "images" / "a.png"), "question": "what ?"}),
    ]
    file = tmp_path / "lists" / "mine.jsonl"
    file.write_text("\r\n".join(lines), "utf-8")
    first, second = load_samples(file)
    assert (first.question, first.task, first.answer) == ("read\u2028this", "ocr", None)
    assert first.image.samefile(second.image)
    file.write_text(lines[1] + '\n{"image": "../images/b.png", "prompt": "q"}')
    with pytest.raises(UserError, match=r"mine\.jsonl: line 2: image: there is no file .*b\.png"):
        load_samples(file)


def test_a_set_is_named_alike_by_folder_and_by_file(tmp_path):
    assert set_name(tmp_path) == set_name(tmp_path / "questions.jsonl") == tmp_path.name
    assert set_name(tmp_path / "mine.jsonl") == "mine.jsonl"


def test_samples_of_one_task(tmp_path):
    tasks = ("ocr", "chart", None, "ocr")
    samples = [Sample(image=tmp_path, question=str(number), task=task) for number, task in enumerate(tasks)]
    assert [sample.question for sample in of_task(samples, "ocr")] == ["0", "3"]
    with pytest.raises(UserError, match=r"task 'vqa': no sample has it; .*: chart \(1\), ocr \(2\)"):
        of_task(samples, "vqa")
    with pytest.raises(UserError, match="none are named"):
        of_task(samples[2:3], "vqa")


def test_no_samples(tmp_path):
    with pytest.raises(UserError, match=r"no questions\.jsonl here"):
        load_samples(tmp_path)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        load_samples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no samples"):
        load_samples(write(tmp_path, ""))
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_samples(tmp_path)


def test_draws_are_decided_by_the_seed(tmp_path):
    samples = [Sample(image=tmp_path / str(n), question="q") for n in range(30)]
    drawn = draw(samples, 10, seed=3)
    assert drawn == draw(samples, 10, seed=3) != draw(samples, 10, seed=4)
    assert len({sample.image for sample in drawn}) == 10
    for count in (0, 31):
        with pytest.raises(UserError, match=f"{count} samples asked for, there are 30"):
            draw(samples, count, seed=0)


def test_inputs_are_the_processors(tmp_path):
    path = tiny_llava(tmp_path / "model")
    noise_image(0).convert("RGBA").save(tmp_path / "a.png")
    sample = Sample(image=tmp_path / "a.png", question="what is the color of w3 ?")
    got, wanted = model_inputs(sample, Preparation(path, None)), tiny_inputs(path)
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert value.equal(wanted[key])


def test_inputs_are_prepared_when_asked_for(tmp_path):
    prepare = Preparation(tiny_llava(tmp_path / "model"), None)
    noise_image(0).save(tmp_path / "a.png")
    samples = [Sample(image=tmp_path / "a.png", question=f"what is w{number} ?") for number in range(3)]
    prepared = PreparedSamples(samples, prepare)
    assert len(prepared) == 3
    assert prepared[1] is prepared[1]
    assert prepared[-1]["input_ids"].equal(model_inputs(samples[2], prepare)["input_ids"])
    assert [each["input_ids"].tolist() for each in prepared][:2] == [
        each["input_ids"].tolist() for each in prepared[:2]
    ]
    with pytest.raises(IndexError):
        prepared[3]
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image"):
        PreparedSamples([*samples, Sample(image=tmp_path / "b.png", question="q")], prepare)


def test_the_digest_is_of_contents(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    noise_image(0).save(tmp_path / "b.png")
    one, two = (Sample(image=tmp_path / name, question="q") for name in ("a.png", "b.png"))
    assert digest([one]) == digest([two]) != digest([one, two])
    noise_image(1).save(tmp_path / "b.png")
    assert digest([one]) != digest([two])
    assert digest([one]) != digest([Sample(image=tmp_path / "a.png", question="r")])


def test_what_the_model_cannot_be_given(tmp_path):
    prepare = Preparation(tiny_llava(tmp_path / "model"), None)
    (tmp_path / "a.png").write_text("no image")
    sample = Sample(image=tmp_path / "a.png", question="q")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"):
        model_inputs(sample, prepare)
    prepare.processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        model_inputs(sample, prepare)
