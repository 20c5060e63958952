"""The rules by which a decoder stage ranks visual tokens. Values only; what computes them is elsewhere,
twice: the reference (`trimvlm_export.reference*`) and the exported decoder (`trimvlm_export.decoder*`).

All scores are float32; ties go to the lower index. A rule reads the attention of one layer at most.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from trimvlm.errors import UserError
from trimvlm.value import Value


class LastRowAttention(Value, frozen=True, kw_only=True, tag_field="rule", tag="last_row_attention"):
    """The last prompt row's attention to each visual token, mean over heads.

    Attributes:
        attention: `previous`: the attention of the layer before (FastV); `own`: an auxiliary attention
            with this layer's own input norm, Wq and Wk, over the rows that enter it (PyramidDrop,
            HiDivDrop section 3.3).
    """

    attention: Literal["previous", "own"]


class TextAttention(Value, frozen=True, kw_only=True, tag_field="rule", tag="text_attention"):
    """SparseVLM: the attention of the layer before, mean over heads, summed over the raters.

    Raters are text rows after the last visual row, chosen once, by the embeddings h0 (raw projector outputs
    for visual rows): with M = the mean over visual rows of softmax over those text rows of `h0_V h0_T^T`
    (unscaled), a row is a rater where M >= mean(M).
    """


class ValueInfluence(Value, frozen=True, kw_only=True, tag_field="rule", tag="value_influence"):
    """VisiPruner: how much a token's value moves the last row's attention output in the layer before.

    The score of token j is the Euclidean norm of c_j = concat over heads of w_hj v_hj, with w the last
    row's attention weights and v the values (before the output projection).

    Attributes:
        threshold: survivors whose score does not exceed it are hidden from all rows, from this layer on and
            at decode: TopK then selects exactly what the threshold selects, as long as the budget holds it.
            None: the budget alone decides.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold < 0:
            raise UserError(f"threshold: {self.threshold} is negative; norms are not")


class CrossAndSelfAttention(
    Value, frozen=True, kw_only=True, tag_field="rule", tag="cross_and_self_attention"
):
    """FitPrune: attention received from text rows times attention received from visual rows.

    Both are sums over rows of the maximum over heads, in this layer's own attention. The tokens that lose
    leave after the attention and before its output projection: this layer still attends to them and keeps
    their keys and values; residual stream and FFN do not hold them any more.
    """


class RandomOrder(Value, frozen=True, kw_only=True, tag_field="rule", tag="random"):
    """The same tokens for every input: a permutation drawn once (numpy's PCG64, `permutation(N)`).

    Attributes:
        seed: of the permutation; token i's score is its place in it, largest kept.
    """

    seed: int = 0


class RouterScores(Value, frozen=True, kw_only=True, tag_field="rule", tag="router"):
    """PAR: the router's score of each visual token, an input of the decoder graph."""


SelectionRule: TypeAlias = (
    LastRowAttention | TextAttention | ValueInfluence | CrossAndSelfAttention | RandomOrder | RouterScores
)


def reads(rule: SelectionRule) -> Literal["previous", "own", "nothing"]:
    """Which layer's attention a rule ranks by."""
    if isinstance(rule, LastRowAttention):
        return rule.attention
    if isinstance(rule, TextAttention | ValueInfluence):
        return "previous"
    return "own" if isinstance(rule, CrossAndSelfAttention) else "nothing"


def rule_name(rule: Value) -> str:
    """The rule's name in a profile."""
    tag = type(rule).__struct_config__.tag
    assert isinstance(tag, str)
    return tag
