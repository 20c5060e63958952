"""The demo model's generator, vocabulary, packed forward pass and checkpoint."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from trimvlm_tools.demo_model import CHECKPOINT
from trimvlm_tools.demo_model.questions import FIRST_SEED, KINDS, SPLIT_SIZE, prompt_of, samples
from trimvlm_tools.demo_model.scenes import COLORS, SHAPES, SIZES, draw_scene
from trimvlm_tools.demo_model.vocabulary import IMAGE, PAD, VOCABULARY, VOCABULARY_ROWS, token_ids

ROW_WORDS, COLUMN_WORDS = {"top": 0, "middle": 1, "bottom": 2}, {"left": 0, "center": 1, "right": 2}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def cell_named(words: list[str]) -> tuple[int, int]:
    """(row, column) of `top left`, `center` and so on."""
    return (1, 1) if words == ["center"] else (ROW_WORDS[words[0]], COLUMN_WORDS[words[1]])


def expected_answer(scene, question: str) -> str:  # noqa: PLR0911 - one return per kind of question
    """The answer, derived from the question's text and the list of things alone."""
    words = question.removesuffix(" ?").split()
    known = {word for word in words if word in COLORS or word in SHAPES or word in SIZES}
    things = list(scene.things)

    def cell(thing):
        return round((thing.y - 18) / 37), round((thing.x - 18) / 37)  # from the pixels, not from the fields

    def attributes(thing):
        return {thing.color, thing.shape, thing.size}

    def the(description: list[str]):
        """The one thing that a noun phrase means."""
        wanted = {word for word in description if word in COLORS or word in SHAPES}
        characters = [word for word in description if len(word) == 1 and (word.isdigit() or word.isupper())]
        place = [word for word in description if word in ROW_WORDS or word in COLUMN_WORDS]
        found = [
            thing
            for thing in things
            if wanted <= attributes(thing)
            and (not characters or thing.glyph == characters[0])
            and (not place or cell(thing) == cell_named(place))
        ]
        assert len(found) == 1, (question, found)
        return found[0]

    def phrase(thing):
        return f"a {thing.size} {thing.color} {thing.shape}"

    match words:
        case ["what", "color", "is", "the", *rest]:
            return the(rest).color
        case ["what", "shape", "is", "the", *rest]:
            return the(rest).shape
        case ["what", "character", "is", "on", "the", *rest]:
            return the(rest).glyph
        case ["what", "is", "at", "the", *rest]:
            here = [thing for thing in things if cell(thing) == cell_named(rest)]
            return phrase(here[0]) if here else "nothing"
        case ["where", "is", "the", *rest]:
            row, column = cell(the(rest))
            return "center" if (row, column) == (1, 1) else f"{[*ROW_WORDS][row]} {[*COLUMN_WORDS][column]}"
        case ["how", "many", *_]:
            return NUMBER_WORDS[sum(known <= attributes(thing) for thing in things)]
        case ["is", "there", "a", *_]:
            return "yes" if any(known <= attributes(thing) for thing in things) else "no"
        case ["is", "the", color_a, shape_a, first, "or", second, "of", "the", color_b, shape_b]:
            a, b = cell(the([color_a, shape_a])), cell(the([color_b, shape_b]))
            axis = 0 if first == "above" else 1
            assert a[axis] != b[axis]
            return first if a[axis] < b[axis] else second
        case ["which", "object", "has", character]:
            return phrase(the([character]))
        case ["read", "the", row, "row"]:
            line = sorted(
                (cell(thing)[1], thing.glyph) for thing in things if cell(thing)[0] == ROW_WORDS[row]
            )
            return " ".join(glyph for _, glyph in line) or "nothing"
    raise AssertionError(question)


def test_equal_seeds_give_equal_bytes():
    a, b = samples("calib", 12, first=5), samples("calib", 7, first=10)
    for one, two in zip(a[5:], b, strict=True):
        assert (one.question, one.answer, one.kind, one.seed) == (
            two.question,
            two.answer,
            two.kind,
            two.seed,
        )
        assert one.image.tobytes() == two.image.tobytes()


def test_the_generator_has_not_changed():
    """The checkpoint was trained on these bytes: a change here asks for a new training run."""
    digest = hashlib.sha256()
    for sample in samples("test", 40):
        digest.update(sample.image.tobytes() + f"{sample.question}|{sample.answer}".encode())
    assert digest.hexdigest() == "8247a3a0bee247dfb4ccd2f83a7e369c369dd8e2e4347a0bb952dc3331283bc1"


def test_splits_are_disjoint():
    ranges = sorted((first, first + SPLIT_SIZE) for first in FIRST_SEED.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    pictures = [{s.image.tobytes() for s in samples(split, 40)} for split in ("train", "calib", "test")]
    assert len(set.union(*pictures)) == 120


@pytest.mark.parametrize(("split", "count", "first"), [("tests", 1, 0), ("test", -1, 0), ("test", 1, -1)])
def test_bad_ranges_are_refused(split, count, first):
    with pytest.raises(ValueError, match=r"split|samples"):
        samples(split, count, first=first)


def test_prefixes_are_balanced():
    kinds = [sample.kind for sample in samples("test", 25)]
    assert kinds == [KINDS[i % 10] for i in range(25)]


def test_answers_follow_from_the_scene():
    for sample in samples("train", 400, first=1 << 38):
        assert sample.answer == expected_answer(draw_scene(sample.seed), sample.question), sample


def test_scenes_are_well_formed():
    for seed in range(150):
        scene = draw_scene(seed)
        assert scene.image.shape == (112, 112, 3) and scene.image.dtype == np.uint8
        assert 3 <= len(scene.things) <= 8
        for key in (lambda t: (t.color, t.shape), lambda t: t.glyph, lambda t: (t.row, t.column)):
            assert len({key(thing) for thing in scene.things}) == len(scene.things)
        for index, thing in enumerate(
            scene.things
        ):  # nothing is hidden: each thing owns its pixels inside its cell
            ys, xs = np.nonzero(scene.owner == index)
            assert len(ys) > 50
            assert {y // 37 for y in ys} == {thing.row} and {x // 37 for x in xs} == {thing.column}


def test_every_word_is_known_and_fits_the_slot():
    from trimvlm_tools.demo_model.packing import SLOT

    assert len(VOCABULARY) <= VOCABULARY_ROWS
    for sample in samples("train", 300, first=1 << 37):
        assert len(token_ids(sample.question)) + 1 + len(token_ids(sample.answer)) <= SLOT


def test_importing_the_questions_loads_no_torch():
    code = "import sys, trimvlm_tools.demo_model.questions; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}
        ).returncode
        == 0
    )


def test_processor_round_trip(tmp_path):
    from transformers import AutoProcessor

    from trimvlm_tools.demo_model.train import to_pixels
    from trimvlm_tools.demo_model.vocabulary import save_processor

    save_processor(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    asked = samples("calib", 10)
    inputs = processor(
        images=[sample.image for sample in asked],
        text=[prompt_of(sample.question) for sample in asked],
        return_tensors="pt",
        padding=True,
    )
    for row, sample in zip(inputs["input_ids"].tolist(), asked, strict=True):
        ids = [i for i in row if i != PAD]
        assert ids == [*token_ids(f"<s> USER: {' '.join(['<image>'] * 196)} {sample.question} ASSISTANT:")]
        assert row.count(IMAGE) == 196
        assert processor.tokenizer.decode(token_ids(sample.answer)) == sample.answer
    pixels = to_pixels([np.asarray(sample.image) for sample in asked])
    assert (inputs["pixel_values"] - pixels).abs().max() < 1e-6
    content = [{"type": "image"}, {"type": "text", "text": asked[0].question}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert chat == prompt_of(asked[0].question)


def test_packed_forward_equals_one_forward_per_question():
    import torch

    from trimvlm_tools.demo_model.model import make_config, make_model
    from trimvlm_tools.demo_model.packing import SLOT, encode_slots, project, read_slots, see_images
    from trimvlm_tools.demo_model.vocabulary import make_processor

    model = make_model(make_config(width=64, layers=2, vision_layers=2), seed=1).eval()
    asked = samples("calib", 6)
    image = asked[0].image  # two images, three questions each
    other = asked[1].image
    pairs = [(sample.question, sample.answer) for sample in asked]
    ids, targets = encode_slots([pairs[:3], pairs[3:]])
    processor = make_processor()
    with torch.no_grad():
        pixels = processor.image_processor([image, other], return_tensors="pt")["pixel_values"]
        visual = project(model, see_images(model, pixels, torch.float32).features)
        packed = model.lm_head(read_slots(model, visual, ids)[0]).view(6, SLOT, -1)
        for index, (question, answer) in enumerate(pairs):
            inputs = processor(
                images=[(image, other)[index // 3]],
                text=f"{prompt_of(question)} {answer}",
                return_tensors="pt",
            )
            length = len(token_ids(f"{question} ASSISTANT: {answer}"))
            alone = model(**inputs).logits[0, -length:]
            assert torch.allclose(packed[index, :length], alone, atol=2e-5)
            wanted = [*token_ids(answer), 2]
            assert targets.view(6, SLOT)[index, length - len(wanted) + 0 : length].tolist() == wanted


def test_batched_orthogonalisation_matches_torch():
    import torch

    from trimvlm_tools.demo_model.muon import Muon

    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in ((16, 16), (16, 16), (32, 16), (16, 48))]
    theirs = [p.clone() for p in ours]
    options = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.05}
    pair = (Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_training_batches_are_reproducible_and_labelled():
    from trimvlm_tools.demo_model.labels import patch_labels
    from trimvlm_tools.demo_model.train import make_batch

    a, b = make_batch(7, 2, 3, (1.0,) * 10), make_batch(7, 2, 3, (1.0,) * 10)
    assert a.pixels.equal(b.pixels) and a.ids.equal(b.ids) and a.targets.equal(b.targets)
    scene = draw_scene(3)
    labels, present, owner, centres = patch_labels(scene)
    assert centres.sum() == len(scene.things)
    for thing in scene.things:
        patch = labels[thing.y // 8 * 14 + thing.x // 8]
        assert scene.things[owner[thing.y // 8 * 14 + thing.x // 8]] is thing
        assert centres[thing.y // 8 * 14 + thing.x // 8] == 1
        assert [*COLORS][patch[0]] == thing.color and SHAPES[patch[1]] == thing.shape
        assert (patch[4], patch[5]) == (thing.row, thing.column)
    assert present.sum() == sum(
        len({getattr(t, a) for t in scene.things}) for a in ("color", "shape", "size", "glyph")
    )


def test_evidence_is_what_the_answer_is_read_from():
    from trimvlm_tools.demo_model.labels import NO_THING, evidence

    for sample in samples("train", 300, first=1 << 36):
        scene, words, reply = draw_scene(sample.seed), sample.question.split(), sample.answer.split()
        looks = evidence(scene, sample.question, sample.answer)
        for row, index, _ in looks:  # a word of the question looks at the thing whose name it completes
            if row < len(words):
                assert [scene.things[index].color, scene.things[index].shape] == words[row - 1 : row + 1]
        answering = [look for look in looks if look[0] >= len(words)]
        seen = [scene.things[index] for _, index, _ in answering if index != NO_THING]
        if sample.answer in ("no", "nothing"):
            assert answering == [(len(words), NO_THING, 1.0)]
        elif sample.kind == "count":
            assert len(seen) == NUMBER_WORDS.index(sample.answer)
            assert sum(share for *_, share in answering) == pytest.approx(1)
        elif sample.kind == "relation":
            assert len(seen) == 2 and len(looks) == 4
        elif sample.kind == "row":
            assert [thing.glyph for thing in seen] == reply
        else:
            assert len(seen) == len(reply) and len(set(seen)) == 1
            told = (seen[0].color, seen[0].shape, seen[0].glyph, seen[0].phrase, seen[0].place, "yes")
            assert sample.answer in told


def test_a_team_averages_gradients_and_shares_updates():
    """Two threads stand in for two processes: the result must be that of one with the mean gradient."""
    import threading
    from dataclasses import replace

    import torch

    from trimvlm_tools.demo_model.muon import Muon
    from trimvlm_tools.demo_model.team import Team

    torch.manual_seed(0)
    shapes = ((8, 8), (8, 8), (16, 8), (8, 8))
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    barrier = threading.Barrier(2)
    team = Team(size=2, barrier=barrier, gradients=torch.zeros(2, 400), updates=torch.zeros(400))

    def member(rank: int, parameters: list) -> None:
        mine = replace(team, rank=rank)
        optimizer = Muon(parameters, lr=0.1, team=mine)
        for parameter, gradient in zip(parameters, gradients[rank], strict=True):
            parameter.grad = gradient.clone()
        mine.average(parameters)
        optimizer.step()

    copies = [[parameter.clone() for parameter in start] for _ in range(2)]
    threads = [threading.Thread(target=member, args=(rank, copies[rank])) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Muon(start, lr=0.1)
    for parameter, one, two in zip(start, *gradients, strict=True):
        parameter.grad = (one + two) / 2
    alone.step()
    for one, two, three in zip(*copies, start, strict=True):
        assert one.equal(two) and torch.allclose(one, three, atol=5e-3)


def test_stages_cover_the_schedule():
    from trimvlm_tools.demo_model.train import SCHEDULES, stage_at

    for schedule in SCHEDULES.values():
        names = [stage_at(schedule, i / 1000)[0].name for i in range(1001)]
        assert list(dict.fromkeys(names)) == [stage.name for stage in schedule]
        last, progress = stage_at(schedule, 1.0)
        assert last is schedule[-1] and last.rate(progress, warm=0.01) == pytest.approx(0)


@pytest.fixture(scope="module")
def trained():
    if not (CHECKPOINT / "model.safetensors").exists():
        pytest.skip("no checkpoint")
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


def test_the_checkpoint_answers(trained):
    from trimvlm_tools.demo_model.evaluate import answers

    model, processor = trained
    asked = samples("test", 40)
    dense, blind, dropped = (
        answers(model, processor, asked, b, d) for b, d in ((None, 0), ("black", 0), (None, 0.9))
    )
    right = [sum(a == s.answer for a, s in zip(made, asked, strict=True)) for made in (dense, blind, dropped)]
    assert right[0] >= 37 and right[1] <= 20 and right[2] <= right[0] - 4


def test_the_packed_score_is_the_greedy_score(trained):
    import torch

    from trimvlm_tools.demo_model.evaluate import answers
    from trimvlm_tools.demo_model.train import exact_match

    model, processor = trained
    asked = samples("test", 30, first=100)
    made = answers(model, processor, asked, None, 0.75)  # dropped, so that some are wrong
    assert any(a != s.answer for a, s in zip(made, asked, strict=True))
    made = answers(model, processor, asked, None, 0.0)
    greedy = sum(a == s.answer for a, s in zip(made, asked, strict=True)) / len(asked)
    assert exact_match(model, asked, torch.float32)["all"] == pytest.approx(greedy)


def test_the_checkpoint_is_small_half_precision_and_of_the_agreed_form(trained):
    from safetensors import safe_open

    model, _ = trained
    path = CHECKPOINT / "model.safetensors"
    assert path.stat().st_size <= 15e6
    with safe_open(path, "pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert model.config.text_config.num_hidden_layers >= 10
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
