"""How much one token's value moves an attention output (VisiPruner, section 4), in closed form."""

from __future__ import annotations

import numpy as np

from trimvlm_export.reference_record import Prefill


def influence(weights_HS: np.ndarray, values_GSC: np.ndarray, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Influence of each of the first `keys` keys on one row's attention output O, before the projection.

    With w_hj the weight and v_hj the value of key j in head h, c_j is the concatenation of w_hj v_hj over the
    heads, and O the sum of all c_j.

    Args:
        weights_HS: the row's attention weights.
        values_GSC: values of the same keys; H / G heads share one.

    Returns:
        cos(O, O - c_j) and the Euclidean norm of c_j, both float64 [keys]. Where O - c_j is zero the cosine
        is 0; where O itself is zero nothing moves it, and the cosine is 1.
    """
    weights = weights_HS.astype(np.float64)
    values = np.repeat(values_GSC.astype(np.float64), len(weights) // len(values_GSC), axis=0)
    output_HC = np.einsum("hs,hsc->hc", weights, values)
    weights, values = weights[:, :keys], values[:, :keys]
    squares = np.einsum("hn,hnc,hnc->n", weights**2, values, values)
    along = np.einsum("hn,hnc,hc->n", weights, values, output_HC)
    whole = float((output_HC**2).sum())
    rest = np.maximum(whole - 2 * along + squares, 0.0)
    product = np.sqrt(whole * rest)
    cosine = np.divide(whole - along, product, out=np.zeros_like(product), where=product > 0)
    return cosine if whole else np.ones_like(cosine), np.sqrt(squares)


def visual_influence(run: Prefill, layer: int, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`influence` of the visual rows that are live in `layer` on the last prompt row.

    Args:
        run: a prefill with detail, under which the layer caches its live visual rows.
        visual: rows of the prompt that hold visual tokens.
    """
    stored = run.kv[layer]
    assert stored is not None
    live = visual[run.live[layer][visual]]
    text = np.setdiff1d(np.arange(len(run.live[layer])), visual)
    weights_HS = run.last_row[layer][:, np.concatenate([live, text])]  # the cache holds visual rows first
    return influence(weights_HS, stored[1][0], len(live))
