"""The Session: a bundle at work. `with Session.open(bundle) as session: session.generate(prompt, images)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from trimvlm.bundle import Bundle
from trimvlm.decoding import Outputs
from trimvlm.detokenization import stream_text
from trimvlm.errors import UserError
from trimvlm.images import ImageSource, nearest_grid, read_rgb
from trimvlm.opening import ORT_CPU, check_opening, open_backends
from trimvlm.profile import Grid, ModelSpec
from trimvlm.runner import Runner
from trimvlm.sampling import make_sampler
from trimvlm.text import Prompt, Turn, load_tokenizer
from trimvlm.timings import Timings
from trimvlm.vision import VisualRows

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Session:
    """One profile of a bundle, or a choice of several, running on one target. Device memory is held only
    inside `with`.

    Where images have grids and the bundle holds the profile for several, each prompt runs on the one for its
    first image, and the steps one by one (`prompt` to `step`) need a session of a single one, as `name@RxC`.

    Attributes:
        bundle: the bundle.
        profile: name of the profile or choice.
        target: name of the target.
        timings: of the latest `generate`.
    """

    def __init__(
        self, bundle: Bundle, name: str, target: str, runners: Sequence[Runner], tokenizer: Tokenizer
    ) -> None:
        self.bundle = bundle
        self.profile = name
        self.target = target
        self.timings = Timings()
        self._runners = {runner.model.grid: runner for runner in runners}
        self._runner = runners[0]
        self._held = ExitStack()
        self._open = False
        self._tokenizer = tokenizer

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
            UserError: no bundle, profile or engine of that name, a damaged file, an engine for another
                profile, library version, GPU or system, or a backend that is not installed.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        names = bundle.named(profile)
        check_opening(bundle, names, target)
        tokenizer = load_tokenizer(bundle.path(bundle.manifest.text.tokenizer))
        runners = [
            Runner(
                bundle, each, open_backends(bundle, each, target, options, shared=len(names) > 1), tokenizer
            )
            for each in names
        ]
        name = names[0] if len(names) == 1 else names[0].partition("@")[0]
        return cls(bundle, name, target, runners, tokenizer)

    @property
    def model(self) -> ModelSpec:
        """What the latest prompt ran on."""
        return self._runner.model

    @property
    def member(self) -> str:
        """The profile that the latest prompt ran on."""
        return self._runner.member

    def __enter__(self) -> Session:
        with ExitStack() as held:
            for runner in self._runners.values():
                for backend in runner.backends.values():
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
        if len(self._runners) > 1 and images:
            images = [image if isinstance(image, Image) else read_rgb(image) for image in images]
            self._runner = self._runners[self._grid_for(*images[0].size)]
        runner = self._runner
        rows = runner.prompt(prompt, len(images), raw=raw, history=history)
        pixels = [runner.preprocess(image) for image in images]
        timings.preprocess = perf_counter() - start
        ids = runner.generate(rows, pixels, sampler, timings, self._check_open, max_new_tokens=max_new_tokens)
        return stream_text(self._tokenizer, ids)

    def prompt(
        self, text: str, images: int = 0, *, raw: bool = False, history: Sequence[Turn] = ()
    ) -> Prompt:
        """The rows of a prompt; arguments as for `generate`, images as a number.

        Raises:
            UserError: images and image tokens differ in number, an image token in a text that is not raw, or
                a prompt that does not end in text.
        """
        return self._single().prompt(text, images, raw=raw, history=history)

    def preprocess(self, image: ImageSource) -> NDArray[np.float32]:
        """Pixels float32 of an image, as the vision graph takes them: [1, 3, H, W].

        Raises:
            UserError: it cannot be read.
        """
        return self._single().preprocess(image)

    def vision(self, images: Sequence[ImageSource | NDArray[np.float32]]) -> NDArray[np.floating]:
        """Visual rows [m * N, D] of images, or [m * keep, D] with an encoder stage; arrays are pixels from
        `preprocess`."""
        return self.visual(images).rows

    def visual(self, images: Sequence[ImageSource | NDArray[np.float32]]) -> VisualRows:
        """The same rows, with the patches that the profile's encoder stage chose for each image."""
        self._check_open()
        return self._single().visual(images)

    def prefill(
        self,
        prompt: Prompt,
        visual_ND: NDArray[np.floating],
        forced: Sequence[NDArray[np.int64]] = (),
        *,
        patches: Sequence[NDArray[np.int64]] = (),
        forced_skip: Sequence[NDArray[np.int64]] = (),
        router_scores: NDArray[np.float32] | None = None,
    ) -> Outputs:
        """One decoder run over a prompt, with every output as an array (for parity).

        Args:
            visual_ND: visual rows, from `vision`.
            forced: for each selection the rows of `visual_ND` to keep; empty: the graph selects.
            patches: with M-RoPE, what an encoder stage chose for each image, as `visual` gave it.
            forced_skip: for each skip stage the rows of `visual_ND` in skip mode; empty: the graph chooses.
            router_scores: [N], for a graph that has this input; None: the bundle's router gives them.
        """
        self._check_open()
        return self._single().prefill(
            prompt,
            visual_ND,
            forced,
            patches=patches,
            forced_skip=forced_skip,
            router_scores=router_scores,
        )

    def step(self, token: int, before: Outputs) -> Outputs:
        """One decode step with a given token after the run `before`, with every output as an array."""
        self._check_open()
        return self._single().step(token, before)

    def _single(self) -> Runner:
        if len(self._runners) > 1:
            names = ", ".join(runner.name for runner in self._runners.values())
            raise UserError(f"this session is for several grids of images; open one of {names}")
        return self._runner

    def _grid_for(self, width: int, height: int) -> Grid:
        """The grid of an image, or the one nearest to it that there is a profile for."""
        grids = [grid for grid in self._runners if grid is not None]
        return nearest_grid(self.bundle.manifest.image, grids, width, height)

    def _check_open(self) -> None:
        if not self._open:
            raise UserError("the session is closed; use it inside `with Session.open(...) as session:`")
