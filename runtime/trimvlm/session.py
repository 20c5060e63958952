"""The Session: a bundle at work. `with Session.open(bundle) as session: session.generate(prompt, images)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Backend
from trimvlm.bundle import Bundle
from trimvlm.decoding import Decoder, Outputs, generate_ids, prefill_inputs, step_inputs
from trimvlm.detokenization import stream_text
from trimvlm.encoder import make_encoder
from trimvlm.errors import UserError
from trimvlm.images import ImageSource, make_preprocessor
from trimvlm.opening import ORT_CPU, open_backends
from trimvlm.routing import make_pick
from trimvlm.sampling import make_sampler
from trimvlm.text import Prompt, Turn, load_tokenizer, make_prompter
from trimvlm.timings import Timings
from trimvlm.vision import VisualRows, make_vision


class Session:
    """One profile of a bundle, or a choice of several, running on one target. Device memory is held only
    inside `with`.

    Attributes:
        bundle: the bundle.
        profile: name of the profile or choice.
        member: the profile that the latest prompt ran on.
        target: name of the target.
        timings: of the latest `generate`.
    """

    def __init__(self, bundle: Bundle, profile: str, target: str, backends: Mapping[str, Backend]) -> None:
        manifest = bundle.manifest
        self.member, self._backend = next(iter(backends.items()))
        self.bundle = bundle
        self.profile = profile
        self.target = target
        self.timings = Timings()
        self._backends = backends
        self._held = ExitStack()
        self._open = False
        self._tokenizer = load_tokenizer(bundle.path(manifest.text.tokenizer))
        tokens, stage = manifest.model.visual_tokens, bundle.profile(self.member).decisions.encoder
        self._prompter = make_prompter(self._tokenizer, manifest.text, stage.keep if stage else tokens)
        self._preprocess = make_preprocessor(manifest.image)
        self._see = make_vision(
            self._backend, manifest.model.hidden, make_encoder(stage, tokens) if stage else None
        )
        self._pick = make_pick(backends, manifest.choices.get(profile), manifest.model.layers)

    @classmethod
    def open(
        cls, bundle: Bundle | Path | str, profile: str | None = None, target: str = ORT_CPU, **options: Any
    ) -> Session:
        """Prepares a session; `with` starts it.

        Args:
            bundle: the bundle or its directory.
            profile: which of its profiles or choices; None where it holds one profile. Of a choice, every
                member's decoder is loaded; on ONNX Runtime with `low_memory` unless said otherwise, so that
                they share the mapped weights.
            target: what to run on. `ort-cpu` runs the graphs themselves, others need `trimvlm build` first.
            options: of the backend, see its `open_backend`; for ONNX Runtime `threads` and `low_memory`.

        Raises:
            UserError: no bundle, profile or engine of that name, an engine of an older profile, or a backend
                that is not installed.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        backends = open_backends(bundle, profile, target, options)
        name = profile if profile in bundle.manifest.choices else next(iter(backends))
        return cls(bundle, name, target, backends)

    def __enter__(self) -> Session:
        with ExitStack() as held:
            for backend in self._backends.values():
                held.enter_context(backend)
            self._held = held.pop_all()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._held.__exit__(kind, error, trace)

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        raw: bool = False,
        history: Sequence[Turn] = (),
    ) -> Iterator[str]:
        """Answers a prompt. Arguments are checked and images read at once, the rest runs as it is iterated.

        Args:
            prompt: the question; the bundle's chat template is put around it.
            images: in the order of the conversation: those of the history first, then the prompt's.
            max_new_tokens: at most so many tokens; the model may end earlier.
            temperature, top_p, seed: see `make_sampler`; temperature 0 is greedy.
            raw: `prompt` is the whole text as the model sees it, one image token for each image.
            history: earlier turns, answered.

        Returns:
            Pieces of the answer, each as soon as later tokens cannot change it.

        Raises:
            UserError: see `make_prompter`, `make_sampler` and `make_preprocessor`.
        """
        self._check_open()
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens} is not a positive number")
        sampler = make_sampler(temperature, top_p, seed)
        timings = self.timings = Timings()
        start = perf_counter()
        rows = self.prompt(prompt, len(images), raw=raw, history=history)
        pixels = [self.preprocess(image) for image in images]
        timings.preprocess = perf_counter() - start

        def run() -> Iterator[str]:
            self._check_open()
            visual = self._see(pixels, timings)
            picked = self._pick(rows, visual.rows, timings)
            ids = generate_ids(
                self._timed(picked.profile, timings),
                rows,
                visual.rows,
                sampler,
                router_scores=picked.router_scores,
                eos_ids=self.bundle.manifest.text.eos_ids,
                max_new_tokens=max_new_tokens,
            )
            yield from stream_text(self._tokenizer, ids)

        return run()

    def prompt(
        self, text: str, images: int = 0, *, raw: bool = False, history: Sequence[Turn] = ()
    ) -> Prompt:
        """The rows of a prompt; arguments as for `generate`, images as a number.

        Raises:
            UserError: images and image tokens differ in number, an image token in a text that is not raw, or
                a prompt that does not end in text.
        """
        return self._prompter(text, images, raw=raw, history=history)

    def preprocess(self, image: ImageSource) -> NDArray[np.float32]:
        """Pixels float32 of an image, as the vision graph takes them: [1, 3, H, W].

        Raises:
            UserError: it cannot be read.
        """
        return self._preprocess(image)

    def vision(self, images: Sequence[ImageSource | NDArray[np.float32]]) -> NDArray[np.floating]:
        """Visual rows [m * N, D] of images, or [m * keep, D] with an encoder stage; arrays are pixels from
        `preprocess`."""
        return self.visual(images).rows

    def visual(self, images: Sequence[ImageSource | NDArray[np.float32]]) -> VisualRows:
        """The same rows, with the patches that the profile's encoder stage chose for each image."""
        self._check_open()
        return self._see([self._pixels(image) for image in images], Timings())

    def prefill(
        self,
        prompt: Prompt,
        visual_ND: NDArray[np.floating],
        forced: Sequence[NDArray[np.int64]] = (),
        *,
        forced_skip: Sequence[NDArray[np.int64]] = (),
        router_scores: NDArray[np.float32] | None = None,
    ) -> Outputs:
        """One decoder run over a prompt, with every output as an array (for parity).

        Args:
            visual_ND: visual rows, from `vision`.
            forced: for each selection the rows of `visual_ND` to keep; empty: the graph selects.
            forced_skip: for each skip stage the rows of `visual_ND` in skip mode; empty: the graph chooses.
            router_scores: [N], for a graph that has this input; None: the bundle's router gives them.
        """
        self._check_open()
        if router_scores is None or len(self._backends) > 1:
            picked = self._pick(prompt, visual_ND, Timings())
            self.member = picked.profile
            router_scores = picked.router_scores if router_scores is None else router_scores
        inputs = prefill_inputs(
            prompt, visual_ND, forced, forced_skip=forced_skip, router_scores=router_scores
        )
        return self._run(self.member, inputs, prompt.length)

    def step(self, token: int, before: Outputs) -> Outputs:
        """One decode step with a given token after the run `before`, with every output as an array."""
        inputs = step_inputs(token, before.next_position, before)
        return self._run(before.profile, inputs, before.next_position + 1)

    def _pixels(self, image: ImageSource | NDArray[np.float32]) -> NDArray[np.float32]:
        if not isinstance(image, np.ndarray):
            return self.preprocess(image)
        ((_, port),) = self._backend.inputs("vision").items()
        fits = image.ndim == len(port.shape) and all(
            want in (None, have) for want, have in zip(port.shape, image.shape, strict=True)
        )
        if not fits or image.dtype != np.float32:
            shape = ", ".join("any" if size is None else str(size) for size in port.shape)
            raise UserError(
                f"an array of {image.dtype} {image.shape} is no image; give pixels from preprocess (float32 "
                f"[{shape}]), or PIL.Image.fromarray(frame) of a camera's frame"
            )
        return image

    def _run(self, profile: str, inputs: dict[str, Any], next_position: int) -> Outputs:
        self._check_open()
        backend = self._backends[profile]
        decoder = Decoder(backend, list(backend.outputs("decoder")))
        return Outputs(decoder(inputs), next_position, profile)

    def _timed(self, profile: str, timings: Timings) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A profile's decoder that notes its seconds and keeps its caches where they are."""
        self.member, backend = profile, self._backends[profile]
        names = [name for name in backend.outputs("decoder") if name.startswith("present_")]
        graph = Decoder(backend, ["logits"], names)

        def decoder(inputs: dict[str, Any]) -> dict[str, Any]:
            self._check_open()
            start = perf_counter()
            outputs = graph(inputs)
            seconds = perf_counter() - start
            if timings.prefill is None:
                timings.prefill = seconds
            else:
                timings.decode += seconds
                timings.decode_tokens += 1
            return outputs

        return decoder

    def _check_open(self) -> None:
        if not self._open:
            raise UserError("the session is closed; use it inside `with Session.open(...) as session:`")
