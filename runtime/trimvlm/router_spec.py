"""What a Profile says of its router and a bundle of its choices; what a router does is `routing.py`."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from trimvlm.errors import UserError
from trimvlm.value import Value


class RouterSpec(Value, frozen=True, kw_only=True):
    """A trained router, as a Profile names it.

    Attributes:
        weights: safetensors file beside the Profile.
        sha256: of that file.
        width: of the router's rows; its FFN is four times as wide.
        heads: attention heads; a head has an even number of channels.
        first: the layer that the first layer token stands for, the others follow.
        mask: `full`: every row sees every other one; `causal`: only what is before it in the prompt, and
            visual rows do not see a question that follows (the released code).
    """

    weights: str
    sha256: str
    width: int
    heads: int
    first: int
    mask: Literal["full", "causal"] = "full"

    def __post_init__(self) -> None:
        if not self.weights or any(sign in self.weights for sign in "/\\") or self.weights.startswith("."):
            raise UserError(f"router.weights: {self.weights!r} is not the name of a file beside the profile")
        if self.heads < 1 or self.width < 1 or self.width % (2 * self.heads):
            raise UserError(
                f"router.width: {self.width} does not make {self.heads} heads of an even number of channels"
            )
        if self.first < 0:
            raise UserError(f"router.first: {self.first} is not a layer")

    @property
    def stem(self) -> str:
        """Name of the router's files in a bundle: the same for all profiles with this router."""
        known = (self.sha256, self.width, self.heads, self.first, self.mask)
        return f"router-{hashlib.sha256(msgspec.json.encode(known)).hexdigest()[:12]}"


class Choice(Value, frozen=True, kw_only=True):
    """Profiles among which the runtime chooses for each input.

    Attributes:
        router: stem of the router that all of them have, see `RouterSpec.stem`.
        members: profile to the layers that it executes, among those that the router scores.
    """

    router: str
    members: dict[str, tuple[int, ...]]
