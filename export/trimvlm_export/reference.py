"""The reference: the untouched Hugging Face model under a Schedule, by hooks and masks over all rows.

Slow, obvious and close to the papers: every row is computed in every layer, and what a Schedule removes is
made invisible (keys) or has its contribution taken back (attention and FFN outputs). It is the oracle that
the exported decoder is compared with, so it shares weights and the Schedule with it and nothing else.

How to use it (one prompt at a time, the model best loaded in float32):

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with Reference(model, schedule) as reference:
        run = reference.prefill(inputs)            # run.logits, run.selected, ...: see Prefill
        logits_V = reference.step(token)           # one decode step after that prefill
        ids = reference.generate(inputs, max_new_tokens=16)
        again = reference.prefill(inputs, forced=run.selected)  # selections given from outside
        late = reference.prefill(inputs, resume=(2, dense.hidden[2]))  # layers 2.. only

Inside `with` the model belongs to the reference; afterwards it is as it was. Selections are numbered by
visual row, 0..M*N-1, in every stage; `scores[s]` list the rows that entered stage s, ascending.

Shapes: S all rows of the prompt, T text rows, N visual rows of one image, M images, K rows kept, D width,
H heads, G key/value heads, C head size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm_export.reference_checks import check_model, check_resume, check_router
from trimvlm_export.reference_hooks import install
from trimvlm_export.reference_prompt import Forced, PromptRun
from trimvlm_export.reference_record import Prefill
from trimvlm_export.reference_rows import ATTENTION, PromptRows, cut_images


class Reference:
    """A vision-language model under a Schedule. See the module's text.

    Args:
        model: of transformers, in evaluation mode.
        schedule: what to follow.
        encoder: the encoder stage that the Schedule was made for: features are then reduced by it, and
            prompts of the whole image cut accordingly. Without it, features and prompts that have been
            reduced elsewhere are expected.

    Attributes:
        layers_run: decoder layers that prefills have run so far, all together.

    Raises:
        UserError: the Schedule is for another geometry than the model's, or another budget than the stage's.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        encoder: EncoderStage | None = None,
    ) -> None:
        assert not model.training, "call model.eval() first"
        self.model = model
        self.schedule = schedule
        self.encoder = encoder
        self.layers_run = 0
        self._decoder: Any = model.model.language_model
        check_model(schedule, self._decoder.config, encoder)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._run: PromptRun | None = None

    def __enter__(self) -> Reference:
        config = self._decoder.config
        assert config._attn_implementation != ATTENTION, "this model is inside another Reference"
        self._attention_before = config._attn_implementation
        config._attn_implementation = ATTENTION
        for number, layer in enumerate(self._decoder.layers):
            self._hooks += install(layer, self.schedule.rows[number], self._running)
            self._hooks.append(layer.register_forward_hook(lambda *_: self._count()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._run = None
        self._decoder.config._attn_implementation = self._attention_before

    def features(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Rows [M*N, D] of the images of `inputs` that enter the decoder, image after image."""
        return self.encode(inputs)[0]

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[np.ndarray]]:
        """As `features`, and per image the patches that the encoder stage chose (none without a stage)."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            nothing = torch.empty(0, self.schedule.model.hidden, dtype=self.model.dtype)
            return nothing.to(self.model.device), []
        pixels = pixels.to(self.model.device, self.model.dtype)
        if self.encoder is not None:
            from trimvlm_export.reference_encoder import reduced_features

            return reduced_features(self.model, {**inputs, "pixel_values": pixels}, self.encoder)
        return image_features(self.model, {**inputs, "pixel_values": pixels}), []

    @torch.no_grad()
    def prefill(
        self,
        inputs: Mapping[str, Any],
        *,
        forced: Sequence[np.ndarray] | None = None,
        forced_skip: Sequence[np.ndarray] | None = None,
        features: torch.Tensor | None = None,
        patches: Sequence[np.ndarray] = (),
        router_scores: np.ndarray | None = None,
        resume: tuple[int, np.ndarray] | None = None,
        detail: bool = True,
    ) -> Prefill:
        """Runs the prompt.

        Args:
            inputs: `input_ids` [1, S] with expanded image tokens and `pixel_values`, as AutoProcessor gives.
            forced: per selection, visual rows that replace it.
            forced_skip: per skip stage, visual rows that are in skip mode from there on instead.
            features: what `features(inputs)` gave before, where many runs share an image.
            patches: what `encode(inputs)` gave with them.
            router_scores: float32 [M*N], what selections by `router` rank.
            resume: a layer and its input [S, D], `hidden[layer]` of a dense run of this prompt: only this
                layer and those after it are run. What is recorded of the layers before is empty, and such a
                run cannot decode.
            detail: also record `hidden` and `kv`, which are large.

        Raises:
            UserError: more than one prompt, padding, a prompt that ends in an image, images that give another
                number of visual tokens than the Schedule says, router scores that are missing or too many,
                or a `resume` after a layer that the Schedule changes or a selection ranks by.
        """
        assert self._hooks, "use the reference inside `with`"
        ids = inputs["input_ids"].to(self.model.device)
        image_token = self.model.config.image_token_id
        tokens = self.schedule.model.visual_tokens if self.encoder else self.schedule.visual_tokens
        rows = PromptRows.of(ids, inputs.get("attention_mask"), image_token, tokens)
        projected, patches = self.encode(inputs) if features is None else (features, patches)
        coordinates = self._coordinates(ids, inputs) if self.schedule.model.mrope else None
        if self.encoder is not None:
            if coordinates is not None:
                coordinates = rows.cut(coordinates, patches)
            ids = cut_images(ids, image_token, tokens, self.encoder.keep)
            rows = PromptRows.of(ids, None, image_token, self.encoder.keep)
        rows = replace(rows, coordinates=coordinates)
        if len(projected) != len(rows.visual):
            raise UserError(
                f"the prompt has {len(rows.visual)} image tokens, but its images give {len(projected)}; "
                "run the processor on prompt and images together"
            )
        embedded = self._decoder.embed_tokens(ids)
        embedded[0, rows.visual] = projected.to(embedded.dtype)
        check_router(self.schedule, router_scores, len(rows.visual))
        first, stream = 0, embedded
        if resume is not None:
            first = resume[0]
            check_resume(self.schedule, first)
            stream = torch.as_tensor(resume[1]).to(embedded)[None]
        self._run = PromptRun(
            schedule=self.schedule,
            decoder=self._decoder,
            rows=rows,
            head=self.model.lm_head.weight,
            embedded=embedded[0],
            forced=Forced(forced, forced_skip),
            router_scores=router_scores,
            cache=DynamicCache(config=self._decoder.config),
            detail=detail,
            first=first,
        )
        with self._layers_from(first):
            self._run.prefill.logits = self._forward(stream)
        self._run.start_decoding()
        return self._run.prefill

    @torch.no_grad()
    def step(self, token: int) -> np.ndarray:
        """Decodes one token after `prefill` or another `step`; returns logits [V] for the next."""
        assert self._run is not None and not self._run.first, "prefill first, and not resumed"
        logits_V = self._forward(
            self._decoder.embed_tokens(torch.tensor([[token]], device=self.model.device))
        )
        self._run.generated += 1
        return logits_V

    def generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        *,
        forced: Sequence[np.ndarray] | None = None,
        forced_skip: Sequence[np.ndarray] | None = None,
        features: torch.Tensor | None = None,
        patches: Sequence[np.ndarray] = (),
        router_scores: np.ndarray | None = None,
    ) -> list[int]:
        """Greedy ids of the answer, the end token included where it was reached."""
        assert self.model.generation_config is not None
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        logits_V = self.prefill(
            inputs,
            forced=forced,
            forced_skip=forced_skip,
            features=features,
            patches=patches,
            router_scores=router_scores,
            detail=False,
        ).logits
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            if ids:
                logits_V = self.step(ids[-1])
            ids.append(int(logits_V.argmax()))
            if ids[-1] in ends:
                break
        return ids

    def _forward(self, embedded: torch.Tensor) -> np.ndarray:
        """Logits [V] of the last row of `embedded` [1, rows, D]."""
        assert self._run is not None
        out = self._decoder(inputs_embeds=embedded, past_key_values=self._run.cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[0, -1]).float().cpu().numpy()

    def _coordinates(self, ids: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """M-RoPE coordinates [3, S] of all rows, by the model's own rule."""
        images = (ids == self.model.config.image_token_id).int()
        found, _ = self.model.model.get_rope_index(ids, images, inputs.get("image_grid_thw"))
        return found[:, 0]

    @contextmanager
    def _layers_from(self, first: int) -> Iterator[None]:
        """The text model with its last layers only."""
        whole = self._decoder.layers
        self._decoder.layers = torch.nn.ModuleList(list(whole)[first:])
        try:
            yield
        finally:
            self._decoder.layers = whole

    def _running(self) -> PromptRun:
        assert self._run is not None
        return self._run

    def _count(self) -> None:
        self.layers_run += not self._running().decoding


def image_features(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the decoder reads of the images of `inputs`, [rows, D], image after image, by the model itself."""
    wanted = signature(model.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in wanted}
    found = model.get_image_features(**given, return_dict=True).pooler_output
    return torch.cat([rows.flatten(0, -2) for rows in found])
