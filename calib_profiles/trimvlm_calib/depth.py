"""Published layer numbers as shares of the depth, and budgets as shares of the visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

from trimvlm.errors import UserError


def layers_at(field: str, shares: Sequence[float], depth: int, first: int = 0) -> list[int]:
    """Layer numbers for shares of the depth, rounded, in rising order.

    In a shallow model two shares may round to one layer: each then takes the next free layer.

    Args:
        field: the parameter's name, for the error.
        shares: rising, within 0 and 1.
        depth: decoder layers of the model.
        first: lowest layer that may be used.

    Raises:
        UserError: the model has too few layers.
    """
    layers: list[int] = []
    for share in shares:
        layers.append(max(round(share * depth), layers[-1] + 1 if layers else first))
    if layers and layers[-1] >= depth:
        raise UserError(
            f"{field}: {len(shares)} stages end at layer {layers[-1]}, but the model has layers "
            f"0..{depth - 1}; give fewer stages or smaller shares"
        )
    return layers


def budgets(shares: Sequence[float], tokens: int) -> list[int]:
    """Budgets for falling shares of `tokens`: rounded, at least one token each."""
    return [max(1, round(share * tokens)) for share in shares]


def check_shares(field: str, shares: Sequence[float], order: str) -> None:
    """Refuses shares outside 0 (excluded) and 1, none at all, or another order than `rising` or `falling`.

    Raises:
        UserError: naming the parameter and its value.
    """
    wanted = sorted(shares, reverse=order == "falling")
    if not shares or list(shares) != wanted or not all(0 < share <= 1 for share in shares):
        raise UserError(f"{field}: {list(shares)} is not a {order} list of shares within 0 (excluded) and 1")


def check_share(field: str, share: float) -> None:
    """Refuses a share outside 0 (excluded) and 1.

    Raises:
        UserError: naming the parameter and its value.
    """
    if not 0 < share <= 1:
        raise UserError(f"{field}: {share} is not within 0 (excluded) and 1")
