"""Predictions against measurements: memory on ONNX Runtime's CPU provider, sizes of real plans."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm_engines.fit.sizes import Request
from trimvlm_tools.bench.geometry import Geometry, make_checkpoint
from trimvlm_tools.fit import measure

# About 5, 37 and 137 MB of weights; in the second, heads share keys, as in Qwen2.
SMALL = Geometry(
    name="small", layers=2, hidden=192, heads=6, kv_heads=6, head_dim=32, ffn=512, vocab=1024, image=112,
    vision_layers=2, vision_hidden=32, text=16,
)  # fmt: skip
MIDDLE = msgspec.structs.replace(
    SMALL, name="middle", layers=4, hidden=384, heads=12, kv_heads=2, ffn=1024, vocab=4096, image=224
)
LARGE = msgspec.structs.replace(
    SMALL, name="large", hidden=1024, heads=16, kv_heads=16, head_dim=64, ffn=2816, vocab=4096, image=224
)
WIDE = msgspec.structs.replace(MIDDLE, name="wide", image=336)  # attention in pieces


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    from trimvlm_export.export import export

    made = {}
    for geometry in (SMALL, MIDDLE, LARGE, WIDE):
        work = tmp_path_factory.mktemp(geometry.name)
        checkpoint = make_checkpoint(geometry, work / "checkpoint")
        name, decisions = "dense", Decisions()
        if geometry is MIDDLE:
            select = Select(layer=2, keep=128, by=LastRowAttention(attention="previous"))
            name, decisions = "fastv", Decisions(select=(select,))
        model, method = geometry.model_spec(), Method(name=name)
        profile = Profile(name=name, method=method, model=model, decisions=decisions)
        export(checkpoint, profile, work / "bundle")
        made[geometry.name] = Bundle(work / "bundle")
    return made


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("size", "profile", "text"),
    [
        ("small", "dense", 32),
        ("middle", "fastv", 32),
        ("middle", "fastv", 200),
        ("large", "dense", 64),
        ("wide", "dense", 32),
    ],
)
def test_memory_on_the_cpu_is_within_10_percent(
    bundles: dict[str, Bundle], size: str, profile: str, text: int
) -> None:
    found = measure.memory(bundles[size], profile, Request(text=text, new_tokens=24))
    assert found.what == f"memory, {text} text rows, 24 new tokens"
    assert found.good, found


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX here")
@pytest.mark.parametrize(("size", "profile"), [("middle", "fastv"), ("large", "dense")])
def test_plans_are_within_10_percent(bundles: dict[str, Bundle], size: str, profile: str) -> None:
    from trimvlm_engines.build import build

    build(bundles[size].directory, "rtx-4090", profile)
    found = measure.plans(Bundle(bundles[size].directory), profile, "rtx-4090")
    assert [each.what for each in found] == ["vision engine", "decoder engine"]
    together = measure.Comparison(
        profile=profile,
        what="plans",
        predicted=sum(each.predicted for each in found),
        measured=sum(each.measured for each in found),
    )
    assert found[1].good and together.good, found


def test_plans_that_were_not_built_are_an_error(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no engine of dense for rtx-5090"):
        measure.main([str(bundles["small"].directory), "--target", "rtx-5090"])


def test_the_tool_says_what_is_off(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(bundle: Bundle, profile: str, request: Request, target: str) -> measure.Comparison:
        return measure.Comparison(
            profile=profile, what=f"{request.text}", predicted=89_000_000, measured=100_000_000
        )

    monkeypatch.setattr(measure, "memory", wrong)
    assert measure.main([str(bundles["small"].directory), "--profiles", "dense", "--text", "9"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == ["dense", "9", "89.0", "100.0", "0.890"]


def test_prompts_have_the_rows_that_are_asked_for(bundles: dict[str, Bundle]) -> None:
    prompt, rows = measure.make_prompt(bundles["small"], "dense", 40)
    assert (rows, len(prompt.split())) == (40, 37)  # <s> USER: ... ASSISTANT:
    with pytest.raises(UserError, match="a prompt of one word has 4 rows, more than 3"):
        measure.make_prompt(bundles["small"], "dense", 3)
