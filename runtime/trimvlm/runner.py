"""One profile or choice at work on images of one grid: the steps from a question to tokens, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Backend
from trimvlm.bundle import Bundle
from trimvlm.decoding import Decoder, Outputs, generate_ids, prefill_inputs, step_inputs
from trimvlm.encoder import make_encoder
from trimvlm.errors import UserError
from trimvlm.images import ImageSource, make_preprocessor
from trimvlm.mrope import Coordinates, coordinates
from trimvlm.routing import make_pick
from trimvlm.text import Prompt, make_prompter
from trimvlm.timings import Timings
from trimvlm.vision import VisualRows, make_vision

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Runner:
    """See the module's text. The backends are open while it works.

    Args:
        name: of the profile or choice in the bundle.
        backends: by profile; the first has the graphs before the decoder too.

    Attributes:
        model: what the bundle's entry is for; `model.grid` is the images'.
        member: the profile that the latest prompt ran on.
        prompt: see `trimvlm.text.make_prompter`.
        preprocess: see `trimvlm.images.make_preprocessor`.
    """

    def __init__(
        self, bundle: Bundle, name: str, backends: Mapping[str, Backend], tokenizer: Tokenizer
    ) -> None:
        manifest = bundle.manifest
        self.name, self.backends = name, backends
        self.member = next(iter(backends))
        self.model = manifest.profiles[self.member].model
        self._backend = backends[self.member]
        self._eos_ids = manifest.text.eos_ids
        stage, tower = bundle.profile(self.member).decisions.encoder, manifest.profiles[self.member].tower
        self._rows = stage.keep if stage else self.model.visual_tokens
        self.prompt = make_prompter(tokenizer, manifest.text, self._rows)
        self.preprocess = make_preprocessor(manifest.image, self.model.grid)
        encode = None
        if stage:  # each view keeps the same share of the budget
            per_view = msgspec.structs.replace(stage, keep=stage.keep // tower.views)
            encode = make_encoder(per_view, tower.patches, tower.columns)
        self._see = make_vision(self._backend, self.model.hidden, encode, tower.patches)
        self._pick = make_pick(backends, manifest.choices.get(name), self.model.layers)

    def visual(
        self, images: Sequence[ImageSource | NDArray[np.float32]], timings: Timings | None = None
    ) -> VisualRows:
        """Visual rows of images, and the patches that the encoder stage chose; arrays are pixels."""
        return self._see([self._pixels(image) for image in images], timings or Timings())

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
        """See `Session.prefill`."""
        if router_scores is None or len(self.backends) > 1:
            picked = self._pick(prompt, visual_ND, Timings())
            self.member = picked.profile
            router_scores = picked.router_scores if router_scores is None else router_scores
        places = self._places(prompt, patches)
        inputs = prefill_inputs(
            prompt,
            visual_ND,
            forced,
            places=places,
            forced_skip=forced_skip,
            router_scores=router_scores,
        )
        return self._run(self.member, inputs, prompt.length, places.lag if places else None)

    def step(self, token: int, before: Outputs) -> Outputs:
        """See `Session.step`."""
        inputs = step_inputs(token, before.next_position, before, lag=before.lag)
        return self._run(before.profile, inputs, before.next_position + 1, before.lag)

    def generate(
        self,
        prompt: Prompt,
        pixels: Sequence[NDArray[np.float32]],
        sampler: Callable[[NDArray[np.floating]], int],
        timings: Timings,
        check: Callable[[], None],
        *,
        max_new_tokens: int,
    ) -> Iterator[int]:
        """Token ids of an answer; `check` is called before each run of the decoder."""
        check()
        visual = self._see(pixels, timings)
        picked = self._pick(prompt, visual.rows, timings)
        yield from generate_ids(
            self._timed(picked.profile, timings, check),
            prompt,
            visual.rows,
            sampler,
            places=self._places(prompt, visual.chosen),
            router_scores=picked.router_scores,
            eos_ids=self._eos_ids,
            max_new_tokens=max_new_tokens,
        )

    def _places(self, prompt: Prompt, patches: Sequence[NDArray[np.int64]]) -> Coordinates | None:
        if not self.model.mrope:
            return None
        assert self.model.grid is not None
        return coordinates(prompt, self.model.grid, full=self._rows, patches=patches)

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

    def _run(self, profile: str, inputs: dict[str, Any], next_position: int, lag: int | None) -> Outputs:
        backend = self.backends[profile]
        decoder = Decoder(backend, list(backend.outputs("decoder")))
        return Outputs(decoder(inputs), next_position, profile, lag)

    def _timed(
        self, profile: str, timings: Timings, check: Callable[[], None]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A profile's decoder with its caches kept where they are; notes its seconds in `timings`."""
        self.member, backend = profile, self.backends[profile]
        names = [name for name in backend.outputs("decoder") if name.startswith("present_")]
        graph = Decoder(backend, ["logits"], names)

        def decoder(inputs: dict[str, Any]) -> dict[str, Any]:
            check()
            start = perf_counter()
            outputs = graph(inputs)
            timings.add_decoder_run(perf_counter() - start)
            return outputs

        return decoder
