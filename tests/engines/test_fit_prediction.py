"""What is predicted for a target, what speaks against it, and which changes would help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.target import Limits, Target, Weights
from trimvlm_engines import targets
from trimvlm_engines.fit import on_gpu, plan_size
from trimvlm_engines.fit.changes import changes
from trimvlm_engines.fit.memory import MIB, Memory, kv_layers
from trimvlm_engines.fit.prediction import Prediction, predict
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject

ASKED = Request(images=1, text=20, new_tokens=16)
LIMITS = Limits(images=1, text=20, new_tokens=16)


def card(**fields: Any) -> Target:
    """The target `rtx-4090` with other fields."""
    return msgspec.structs.replace(targets.load("rtx-4090"), **{"limits": LIMITS, **fields})


def gib(size: int) -> float:
    return size / 2**30


@pytest.fixture
def given(exported: Path) -> Callable[..., Prediction]:
    bundle = Bundle(exported)
    return lambda profile, target, asked=ASKED, **fields: predict(bundle, profile, target, asked, **fields)


def piece(memory: Memory, name: str) -> int:
    (found,) = [each.bytes for each in memory.pieces if each.name == name]
    return found


@pytest.mark.parametrize("profile", ["dense", "hidivdrop"])
def test_the_cache_is_what_the_decoder_really_puts_out(exported: Path, profile: str, given) -> None:
    from trimvlm import Session
    from trimvlm.text import Prompt

    with Session.open(exported, profile) as session:
        visual = np.zeros((2 * 16, 64), np.float32)
        prompt = Prompt(
            input_ids=np.zeros(20, np.int64), text_positions=np.arange(20), visual_positions=np.arange(20, 52)
        )
        outputs = session.prefill(prompt, visual)
    real = sum(value.nbytes for name, value in outputs.items() if name.startswith("present_"))
    found = given(profile, targets.load("ort-cpu"), Request(images=2, text=17, new_tokens=3))
    assert sum(found.kv_layers) == real == piece(found.memory, "KV cache")


def test_a_plan_has_room_for_its_limits_and_not_for_the_request(given) -> None:
    little = given("dense", card(), Request(text=1, new_tokens=1))
    much = given("dense", card(), ASKED)
    assert little.memory == much.memory and sum(little.kv_layers) < sum(much.kv_layers)
    wider = given("dense", card(limits=Limits(images=4, text=200, new_tokens=100))).memory
    assert piece(wider, "activations") > piece(much.memory, "activations")
    schedule_rows = 4 * 16 + 300
    assert piece(wider, "KV cache") == piece(wider, "KV cache, second copy") == 5 * 2 * 64 * 4 * schedule_rows


def test_vision_and_decoder_can_take_turns(given) -> None:
    found = given("dense", card())
    vision = piece(found.memory, "vision engine")
    assert found.memory.taking_turns == found.memory.peak - vision
    assert found.fits and not found.takes_turns
    tight = given("dense", card(memory_gb=gib(found.memory.peak - vision // 2)))
    assert tight.fits and tight.takes_turns and tight.left == pytest.approx(vision // 2, abs=2)
    tighter = given("dense", card(memory_gb=gib(found.memory.peak - 2 * vision)))
    assert tighter.fits is False and tighter.left == pytest.approx(-vision, abs=2)


def test_a_jetson_shares_its_memory_with_the_system(given) -> None:
    board = targets.load("jetson-orin-nano-8gb")
    found = given("dense", msgspec.structs.replace(board, limits=LIMITS)).memory
    assert piece(found, "system") == on_gpu.SYSTEM
    assert "system" not in [each.name for each in given("dense", card()).memory.pieces]


def test_what_the_target_does_not_say_is_unknown(given) -> None:
    found = given("dense", card(memory_gb=None, bandwidth_gb_s=None, tflops=None))
    assert found.fits is None and found.left is None
    assert found.unknown == ("memory_gb: whether it fits",)
    assert found.times.unknown == ("tflops: times count bytes alone", "bandwidth_gb_s: no times")
    assert found.times.first_token is None and found.times.tokens_per_second is None
    assert found.times.prefill.flops > 0
    assert given("dense", card()).times.unknown == ("the float32 peak: times count bytes alone",)


def test_each_problem_is_named(given) -> None:
    request = Request(images=2, text=21, new_tokens=17)
    found = given("dense", card(dtypes=("float16",), memory_gb=0.1), request)
    said = "; ".join(found.problems)
    assert found.fits is False and len(found.problems) == 5
    for words in (
        *("float32: the target runs float16", "MiB too much for 0.1 GiB", "images: 2 is more than"),
        *("text: 21 is more than its plans' limits.text, 20", "new_tokens: 17 is more"),
    ):
        assert words in said


def test_pieces_that_the_board_does_not_give_are_named(given) -> None:
    small = given("dense", card(limits=msgspec.structs.replace(LIMITS, allocation_mb=1)))
    assert small.fits is False
    assert small.problems[0] == (
        "activations of the decoder engine: 8 MiB in one piece, where the target gives 1 MiB"
    )
    assert given("dense", card(limits=msgspec.structs.replace(LIMITS, allocation_mb=10))).fits


def test_blocks_of_layers_are_plans_of_their_own(given) -> None:
    whole = given("dense", card()).memory
    split = given("dense", card(limits=msgspec.structs.replace(LIMITS, layers_per_engine=2))).memory
    names = [each.name for each in split.pieces if each.name.startswith("decoder")]
    assert names == ["decoder.0 engine", "decoder.1 engine", "decoder.2 engine"]
    more = sum(piece(split, name) for name in names) - piece(whole, "decoder engine")
    assert more == pytest.approx(2 * plan_size.GRAPH, abs=3)
    assert max(each.bytes for each in split.at_once if "weights of the decoder" in each.name) < max(
        each.bytes for each in whole.at_once if "weights of the decoder" in each.name
    )


def test_split_ranges_store_the_weights_twice(given, exported: Path) -> None:
    once, twice = (given("dense", card(ranges=ranges)).memory for ranges in ("joint", "split"))
    weights = Subject.of(Bundle(exported), "dense", card()).graphs["decoder"].weight_bytes
    assert piece(twice, "decoder engine") - piece(once, "decoder engine") == weights


def test_changes_are_predicted_and_the_smallest_of_each_kind_is_named(exported: Path, given) -> None:
    bundle = Bundle(exported)
    roomy = card(limits=Limits(images=8, text=2000, new_tokens=2000))
    needed = given("dense", roomy).memory.least
    tight = msgspec.structs.replace(roomy, memory_gb=gib(needed - MIB))
    request = Request(images=8, text=2000, new_tokens=2000)
    assert given("dense", tight, request).fits is False
    found = {change.what.partition(" ")[0]: change for change in changes(bundle, "dense", tight, request)}
    assert {"--text", "--new-tokens", "--images", "the"} <= set(found)
    assert found["--text"].what.startswith("--text 1000 and limits")
    assert found["--images"].what.startswith("--images 7 ")
    assert found["the"].what == "the model exported with --dtype float16"
    for change in found.values():
        assert change.left is not None and change.left >= 0
    shorter = Request(images=8, text=1000, new_tokens=2000)
    limits = Limits(images=8, text=1000, new_tokens=2000)
    again = given("dense", msgspec.structs.replace(tight, limits=limits), shorter)
    assert again.fits and again.memory.least == found["--text"].peak


def test_a_request_within_large_limits_needs_smaller_limits_and_nothing_else(exported: Path, given) -> None:
    bundle = Bundle(exported)
    roomy = card(limits=Limits(images=8, text=2000, new_tokens=2000))
    tight = msgspec.structs.replace(roomy, memory_gb=gib(given("dense", roomy).memory.least - MIB))
    first, *others = changes(bundle, "dense", tight, ASKED)
    assert first.what == (
        "limits of exactly this request in a target of your own (images: 1, text: 20, new_tokens: 16)"
    )
    assert not [change for change in others if change.what.startswith(("--text", "--new", "--images"))]


def test_quantised_weights_are_a_change(exported: Path, given) -> None:
    """As many bits as fit; of a target of one's own the field is named."""
    needed = given("dense", card()).memory.least
    saved = {
        bits: needed - given("dense", targets.quantized(card(), Weights(bits=bits))).memory.least
        for bits in (8, 4)
    }
    assert 0 < saved[8] < saved[4]
    for bits in (8, 4):
        tight = card(memory_gb=gib(needed - saved[bits]))
        found = [change.what for change in changes(Bundle(exported), "dense", tight, ASKED)]
        assert f"--target {card().name}-int{bits}" in found
        own = msgspec.structs.replace(tight, name="my-card")
        found = [change.what for change in changes(Bundle(exported), "dense", own, ASKED)]
        assert f"weights: {{bits: {bits}}} in the target" in found


def test_where_only_a_larger_target_helps_it_is_the_only_change(exported: Path) -> None:
    found = changes(Bundle(exported), "dense", card(memory_gb=0.01), ASKED)
    assert [change.what for change in found] == ["--target rtx-3060"]


def test_times_are_the_longer_of_arithmetic_and_memory(given) -> None:
    slow = given("dense", card(bandwidth_gb_s=1e-3, tflops=1e9), dtype="float16").times
    assert slow.prefill.seconds == pytest.approx(slow.prefill.bytes / 1e6)
    busy = given("dense", card(bandwidth_gb_s=1e9, tflops=1e-6), dtype="float16").times
    assert busy.prefill.seconds == pytest.approx(busy.prefill.flops / 1e6)
    assert busy.first_token == pytest.approx(busy.before.seconds + busy.prefill.seconds)
    both = given("dense", card(), Request(images=3, text=20, new_tokens=16)).times
    assert both.before.flops == 3 * busy.before.flops
    # A step reads every matrix, a past of 3 x 16 visual and 20 + 8 text rows, and writes and reads a present.
    weights = 5 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 64
    assert both.step.bytes == pytest.approx(4 * (weights + 3 * 5 * 2 * 64 * 76), rel=0.03)


def test_requests_that_cannot_be_are_refused() -> None:
    for fields in ({"text": 0}, {"new_tokens": 0}, {"images": -1}):
        with pytest.raises(UserError, match="too small"):
            Request(**fields)


def test_caches_grow_with_images(exported: Path) -> None:
    schedule = Subject.of(Bundle(exported), "hidivdrop", targets.load("ort-cpu")).schedule
    none, one, three = (kv_layers(schedule, Request(images=n, text=5, new_tokens=2), 2) for n in (0, 1, 3))
    row = 2 * 64 * 2
    assert none == (row * 7,) * 5
    assert one == tuple(row * (7 + each.cached) for each in schedule.rows)
    assert three == tuple(row * (7 + 3 * each.cached) for each in schedule.rows)
