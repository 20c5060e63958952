"""The router: its graph against the torch module, its weights on disk, and bundles that choose per input."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from msgspec import structs
from operator_list import refused
from tiny_models import noise_image, tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.filling import NOWHERE
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select
from trimvlm.router_spec import RouterSpec
from trimvlm.rules import RouterScores
from trimvlm.schedule import Schedule, resolve
from trimvlm.session import Session
from trimvlm_engines import targets
from trimvlm_engines.build import build, parts
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_export.reference import Reference
from trimvlm_export.router import Router, draw_parameters
from trimvlm_export.router_graph import export_router, gather_choices, load_router
from trimvlm_export.router_weights import digest, encode, find_weights
from trimvlm_export.source import Source

LAYERS, FIRST, IMAGE = 4, 2, 4
ROWS = ("visual", "text_positions", "visual_positions")
QUESTIONS = ["what is the color of w3 ?", "where is the w9 ?", "how many w5 are there ?", "w1 w2", "w30 ?"]
TOKENS = (Select(layer=1, keep=5, by=RouterScores()),)


def without(layer: int) -> tuple[LayerRule, ...]:
    return (LayerRule(layers=(layer,), execute="none"),)


@dataclass
class Trained:
    """A checkpoint, and a profile whose router has random weights, with that router in torch."""

    checkpoint: Path
    directory: Path
    profile: Profile
    router: Router

    def scores(self, model: Any, inputs: dict[str, Any], features: torch.Tensor) -> list[np.ndarray]:
        """Of tokens and layers, by the module."""
        ids = inputs["input_ids"][0]
        text, visual = torch.nonzero(ids != IMAGE)[:, 0], torch.nonzero(ids == IMAGE)[:, 0]
        embedded = model.model.language_model.embed_tokens(ids[text]).detach()
        return [part.numpy() for part in self.router(embedded, features, text, visual)]


def trained(checkpoint: Path, directory: Path, mask: Literal["full", "causal"], seed: int = 0) -> Trained:
    spec = RouterSpec(weights=f"{mask}-{seed}.router.safetensors", sha256="", width=24, heads=2, first=FIRST)
    spec = structs.replace(spec, mask=mask)
    model = model_spec(checkpoint)
    router = Router(spec, model.hidden, model.layers).requires_grad_(False)
    draw_parameters(router, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in router.named_parameters():
        if "head" in name or "norm" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    weights = {name: array.numpy() for name, array in router.state_dict().items()}
    (directory / spec.weights).write_bytes(encode(weights))
    spec = structs.replace(spec, sha256=digest(weights))
    decisions = Decisions(select=TOKENS, layers=without(2))
    profile = Profile(
        name=f"par-{mask}", method=Method(name="par"), model=model, decisions=decisions, router=spec
    )
    return Trained(checkpoint, directory, profile, router)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("router") / "model", layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def full(checkpoint: Path) -> Trained:
    return trained(checkpoint, checkpoint.parent, "full")


@pytest.fixture(scope="module")
def bundle(full: Trained) -> Bundle:
    """One profile with the router, and two members of a choice with another one."""
    out = full.directory / "bundle"
    export(full.checkpoint, full.profile, out, beside=full.directory)
    other = trained(full.checkpoint, full.directory, "full", seed=1)
    for number, layer in enumerate((2, 3)):
        decisions = Decisions(select=TOKENS if number else (), layers=without(layer))
        member = structs.replace(other.profile, name=f"par-{number}", choice="par", decisions=decisions)
        export(full.checkpoint, member, out, beside=full.directory)
    return Bundle(out)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def prompt_rows(text: int, visual: int) -> dict[str, np.ndarray]:
    positions = np.arange(text + visual)
    generator = np.random.default_rng(text)
    return {
        "input_ids": generator.integers(5, 64, text),
        "visual": generator.standard_normal((visual, 64), np.float32),
        "text_positions": np.delete(positions, slice(3, 3 + visual)),
        "visual_positions": positions[3 : 3 + visual],
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_graph_equals_module(checkpoint: Path, model: Any, tmp_path: Path, mask: Any, dtype: Any) -> None:
    made = trained(checkpoint, tmp_path, mask)
    source = Source.place(checkpoint, tmp_path, dtype)
    graph, _ = export_router(source, made.profile, tmp_path / f"{mask}-0.router.safetensors")
    assert refused(tmp_path / graph) == []
    session = onnxruntime.InferenceSession(tmp_path / graph)
    table = model.model.language_model.embed_tokens.weight.detach().to(getattr(torch, dtype)).float()
    for text, visual in ((7, 16), (12, 32), (5, 1)):
        feeds = prompt_rows(text, visual)
        feeds["visual"] = feeds["visual"].astype(dtype)
        tokens, layers = session.run(["router_scores", "layer_scores"], feeds)
        rows = [torch.from_numpy(feeds[name]) for name in ROWS]
        expected = made.router(table[torch.from_numpy(feeds["input_ids"])], rows[0].float(), *rows[1:])
        assert tokens.shape == (visual,) and layers.shape == (LAYERS - FIRST,)
        np.testing.assert_allclose(tokens, expected[0], atol=1e-5)
        np.testing.assert_allclose(layers, expected[1], atol=1e-5)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_no_row_sees_the_filler_row(checkpoint: Path, tmp_path: Path, mask: Any) -> None:
    """What the runtime feeds for a prompt without images is as if there were none."""
    router = trained(checkpoint, tmp_path, mask).router
    text, none = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(0)
    positions = torch.arange(5)
    _, wanted = router(text, torch.zeros(0, 64), positions, none.long())
    _, found = router(text, torch.zeros(1, 64), positions, torch.tensor([NOWHERE]))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    _, other = router(text, torch.zeros(1, 64), positions, torch.tensor([2]))
    assert not np.allclose(other, wanted, atol=1e-4)


def test_module_equals_plain_attention(full: Trained) -> None:
    """The network again in numpy, row by row: rotation by complex numbers, softmax over visible rows only."""
    w = {name: array.numpy().astype(np.float64) for name, array in full.router.state_dict().items()}
    feeds = prompt_rows(6, 16)
    text = np.random.default_rng(1).standard_normal((6, 64))
    positions = np.concatenate([feeds["visual_positions"], feeds["text_positions"], [22, 23]])

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        angle = position * 10_000.0 ** -(np.arange(half) / half)
        spun = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([spun.real, spun.imag])

    for causal in (False, True):
        full.router.causal = causal
        x = np.concatenate([np.concatenate([feeds["visual"], text]) @ w["input.weight"].T, w["layer_tokens"]])
        y, mixed = norm(x, w["attention_norm"]), np.zeros_like(x)
        q, k, v = (y @ w[f"{part}.weight"].T for part in ("query", "key", "value"))
        for head in (slice(0, 12), slice(12, 24)):
            for row, at in enumerate(positions):
                seen = [key for key, where in enumerate(positions) if where <= at or not causal]
                query = turned(q[row, head], at)
                logits = np.array([query @ turned(k[key, head], positions[key]) for key in seen]) / 12**0.5
                share = np.exp(logits - logits.max())
                mixed[row, head] = share / share.sum() @ v[seen, head]
        x = x + mixed @ w["output.weight"].T
        y = norm(x, w["ffn_norm"])
        gate = y @ w["gate.weight"].T
        x = norm(x + (gate / (1 + np.exp(-gate)) * (y @ w["up.weight"].T)) @ w["down.weight"].T, w["norm"])
        rows = [torch.from_numpy(feeds[name]) for name in ROWS]
        tokens, layers = full.router(torch.from_numpy(text).float(), *rows)
        np.testing.assert_allclose(tokens, x[:16] @ w["token_head.weight"][0], atol=2e-5)
        np.testing.assert_allclose(layers, x[-2:] @ w["layer_head.weight"][0], atol=2e-5)
    full.router.causal = False


def test_a_bundle_has_no_second_copy(bundle: Bundle, full: Trained) -> None:
    entry = bundle.manifest.profiles["par-full"]
    assert entry.router is not None and bundle.path(entry.router).stat().st_size < 20_000
    graph = onnx.load(bundle.path(entry.router), load_external_data=False).graph
    external = [initializer for initializer in graph.initializer if initializer.external_data]
    places = {
        each.name: {pair.key: pair.value for pair in each.external_data}["location"] for each in external
    }
    assert places.pop("embed_tokens.weight") == bundle.manifest.weights[0]
    assert set(places.values()) == {entry.router.replace(".onnx", ".safetensors")}
    routers = {bundle.manifest.profiles[name].router for name in ("par-0", "par-1")}
    assert len(routers) == 1 and routers != {entry.router}


@pytest.mark.parametrize("images", [1, 2])
def test_session_equals_reference(bundle: Bundle, full: Trained, model: Any, images: int) -> None:
    schedule = Schedule.resolve(full.profile, full.profile.model)
    with Session.open(bundle, "par-full") as session, Reference(model, schedule) as reference:
        for seed, question in enumerate(QUESTIONS[:3]):
            pictures = [noise_image(seed * 100 + number) for number in range(images)]
            inputs = tiny_inputs(full.checkpoint, question, images=images, seed=seed)
            features = reference.features(inputs)
            scores, _ = full.scores(model, inputs, features)
            expected = reference.prefill(inputs, features=features, router_scores=scores)
            outputs = session.prefill(session.prompt(question, images), session.vision(pictures))
            assert outputs["selected.0"].tolist() == expected.selected[0].tolist()
            np.testing.assert_allclose(outputs["scores.0"], expected.scores[0], atol=1e-4)
            np.testing.assert_allclose(outputs["logits"][0], expected.logits, atol=1e-4)
            ids = reference.generate(inputs, 5, features=features, router_scores=scores)
            answer = "".join(session.generate(question, pictures, max_new_tokens=5)).split()
            words = [session._tokenizer.id_to_token(token) for token in ids if token > IMAGE]
            assert answer == words
            assert session.timings.select is not None


def test_a_choice_takes_what_numpy_takes(bundle: Bundle, full: Trained, model: Any) -> None:
    other = trained(full.checkpoint, full.directory, "full", seed=1)
    kept = {"par-0": [3], "par-1": [2]}  # of the layers that the router scores
    assert {name: list(layers) for name, layers in bundle.manifest.choices["par"].members.items()} == kept
    dense = Reference(model, resolve(Decisions(), full.profile.model))
    taken = set()
    with ExitStack() as opened:
        session = opened.enter_context(Session.open(bundle, "par"))
        alone = {name: opened.enter_context(Session.open(bundle, name)) for name in kept}
        for seed, question in enumerate(QUESTIONS * 2):
            inputs = tiny_inputs(full.checkpoint, question, seed=seed)
            features = dense.features(inputs)
            tokens, layers = other.scores(model, inputs, features)
            wanted = f"par-{int(layers[0] > layers[1])}"
            picture = noise_image(seed * 100)
            answer = list(session.generate(question, [picture], max_new_tokens=3))
            assert session.member == wanted
            taken.add(wanted)
            assert list(alone[wanted].generate(question, [picture], max_new_tokens=3)) == answer
            outputs = session.prefill(session.prompt(question, 1), session.vision([picture]))
            assert outputs.profile == wanted and ("selected.0" in outputs) == (wanted == "par-1")
            if wanted == "par-1":
                assert outputs["selected.0"].tolist() == sorted(np.argsort(-tokens, kind="stable")[:5])
            again = session.step(7, outputs)
            assert again["present_key.0"].shape[2] == outputs["present_key.0"].shape[2] + 1
    assert taken == set(kept)


def test_a_choice_has_one_router(bundle: Bundle, full: Trained) -> None:
    def added(name: str, choice: str | None, profile: Profile) -> dict[str, set[str]]:
        profile = structs.replace(profile, name=name, choice=choice)
        found = gather_choices(bundle.manifest, profile, Schedule.resolve(profile, profile.model))
        return {name: set(each.members) for name, each in found.items()}

    same = trained(full.checkpoint, full.directory, "full", seed=1).profile
    assert added("par-2", "par", same) == {"par": {"par-0", "par-1", "par-2"}}
    assert added("par-1", None, same) == {"par": {"par-0"}}
    assert added("par-1", "par", full.profile) == {"par": {"par-1"}}
    assert added("par-1", "mine", full.profile) == {"par": {"par-0"}, "mine": {"par-1"}}
    for name, choice in (("par", None), ("par-2", "par-0")):
        with pytest.raises(UserError, match="cannot name both a profile and a choice"):
            added(name, choice, same)
    with pytest.raises(UserError, match="it holds par-0, par-1, par-full, and par chooses per input"):
        bundle.members("nowhere")


def test_a_target_builds_the_router_once(bundle: Bundle) -> None:
    target = targets.load("rtx-4090")
    found = {name: parts(bundle, *bundle.entry(name), target) for name in ("par-0", "par-1")}
    assert list(found["par-0"]) == ["vision", "router", "decoder"]
    assert found["par-0"]["router"] == found["par-1"]["router"]
    router, decoder = found["par-1"]["router"], found["par-1"]["decoder"]
    for name in ("input_ids", *ROWS):
        assert router.ranges[name].max == decoder.ranges[name].max
        assert min(router.ranges[name].min) >= 1
    assert len(router.sources["weights"]) == len(bundle.manifest.weights) + 1


@pytest.mark.parametrize("card", ["rtx-3090", "rtx-4090", "rtx-5090"])
def test_plans_build_ahead_of_time(bundle: Bundle, card: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build(bundle.directory, card, "par-1")
    assert set(engine.graphs) == {"vision", "router", "decoder"}
    for role, file in engine.graphs.items():
        assert bundle.path(file).stat().st_size == engine.measured[f"{role}_bytes"]


@pytest.mark.parametrize("kind", ["missing", "other", "shape", "none"])
def test_what_is_refused(full: Trained, tmp_path: Path, kind: str) -> None:
    spec = full.profile.router
    assert spec is not None
    profile, place = full.profile, tmp_path / spec.weights
    data = (full.directory / spec.weights).read_bytes()
    if kind == "missing":
        message = f"router weights {place} are missing"
    elif kind == "other":
        place.write_bytes(data[:-1] + b"x")
        message = f"{place} is not its router"
    elif kind == "shape":
        place.write_bytes(data)
        profile = structs.replace(profile, router=structs.replace(spec, width=16))
        message = f"{place}: attention_norm is float32 \\[24\\], this model's router has \\[16\\]"
    else:
        profile = structs.replace(profile, router=None)
        message = "select.by: router needs the profile's router"
    with pytest.raises(UserError, match=message) as caught:
        export(full.checkpoint, profile, tmp_path / "out", beside=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_come_back(full: Trained) -> None:
    path = find_weights(full.profile, full.directory)
    assert path is not None
    again = load_router(full.profile, path)
    for name, array in full.router.state_dict().items():
        assert torch.equal(array, again.state_dict()[name]), name
