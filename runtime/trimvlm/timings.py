"""What one answer took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Timings:
    """Seconds of one `generate`, filled in as it goes; None: not run, or not apart from another step.

    Attributes:
        preprocess: text and images to arrays.
        vision: vision graphs (tower and projector), all images.
        select: encoder stage, all images, and router; None where the profile has neither (decoder graphs
            select inside).
        prefill: decoder over the prompt; the four together are the time to the first token.
        decode: all runs of the decoder after prefill, and `decode_tokens` how many there were.
    """

    preprocess: float | None = None
    vision: float | None = None
    select: float | None = None
    prefill: float | None = None
    decode: float = 0.0
    decode_tokens: int = 0

    def add_decoder_run(self, seconds: float) -> None:
        """Notes a run of the decoder: the first is the prefill, each of the others a token."""
        if self.prefill is None:
            self.prefill = seconds
        else:
            self.decode += seconds
            self.decode_tokens += 1

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return sum(part or 0.0 for part in (self.preprocess, self.vision, self.select, self.prefill))

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None before a token was decoded."""
        return self.decode_tokens / self.decode if self.decode_tokens else None
