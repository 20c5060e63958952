"""The rules of the encoder stage, which reduces the visual tokens before the decoder sees any. Values only.

A rule reads taps of the vision tower and gives `keep` rows for each image: tower features of chosen patches,
or weighted sums of several (merging). The projector then runs on these rows alone. Position ids are those of
a prompt with `keep` visual tokens: compacted by construction.

Layers are 0-based tower layers; features are numbered as Hugging Face's `hidden_states` (0: embeddings).
"""

from __future__ import annotations

from typing import TypeAlias

from trimvlm.errors import UserError
from trimvlm.rules import RandomOrder, rule_name
from trimvlm.value import Value


class Tower(Value, frozen=True, kw_only=True):
    """A vision tower as an encoder stage sees it.

    Attributes:
        layers: how many it has.
        patches: patches of one image, N.
        cls: row 0 is [CLS], patch p is row p + 1; without, patch p is row p.
        hidden_cls: there is a [CLS] whose attention can be read, but which is no row of what the projector
            reads. Patches may then be groups of the tower's own (pixel shuffle): taps are means over a group.
        features: hidden states, beside one another, that the projector reads.
        width: of a row that the projector reads.
        views: that one image is cut into; an encoder stage reduces each of them alone.
        columns: patches in a row of a view; None: as many as there are rows.
    """

    layers: int
    patches: int
    cls: bool
    hidden_cls: bool = False
    features: tuple[int, ...]
    width: int
    views: int = 1
    columns: int | None = None


class VisionTaps(Value, frozen=True, kw_only=True):
    """Outputs of the vision graph that an encoder stage reads (I images, N patches, S tower rows).

    Attributes:
        cls_attention: layers whose [CLS] row of attention to the patches is wanted: [I, N], mean over heads.
        received_attention: layers whose mean attention is wanted that each patch receives, over all rows
            and heads: [I, N].
        joint_attention: layers whose [CLS] attention is wanted as if all heads were one: [I, N].
        keys: layers whose keys are wanted: [I, S, heads, C].
        features: hidden states wanted: [I, S, E].
    """

    cls_attention: tuple[int, ...] = ()
    received_attention: tuple[int, ...] = ()
    joint_attention: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    features: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the vision graph's outputs, in its order: `cls_attention.3`, ..., `features.5`."""
        return [f"{field}.{n}" for field in self.__struct_fields__ for n in getattr(self, field)]


class MsvPrune(Value, frozen=True, kw_only=True, tag_field="rule", tag="msv_prune"):
    """SPIDER's MSV-Prune: anchors by [CLS] attention, and from K-means clusters of the rest those tokens that
    are least like the others, in two layers' features.

    Attributes:
        anchors: share of the budget that is anchors, rounded down.
        clusters, iterations: of K-means (maximin start, Lloyd steps), on `last`.
        attention: layer whose attention ranks anchors.
        received: rank anchors by received attention, for towers without [CLS].
        middle, last: the two hidden states.
    """

    anchors: float = 0.7
    clusters: int = 4
    iterations: int = 10
    attention: int
    received: bool = False
    middle: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.anchors <= 1:
            raise UserError(f"anchors: {self.anchors} is not within 0 and 1")
        if self.clusters < 1 or self.iterations < 1:
            raise UserError("clusters, iterations: at least 1")


class VisPruner(Value, frozen=True, kw_only=True, tag_field="rule", tag="vispruner"):
    """VisPruner: the most attended patches, and diverse ones of the rest by repeated bipartite matching.

    Attributes:
        important: share of the budget that is chosen by attention, rounded down.
        attention: layer whose [CLS] attention ranks.
        received: rank by received attention, for towers without [CLS].
        features: hidden state that tells how alike two patches are.
    """

    important: float = 0.5
    attention: int
    received: bool = False
    features: int

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise UserError(f"important: {self.important} is not within 0 and 1")


class VisionZip(Value, frozen=True, kw_only=True, tag_field="rule", tag="visionzip"):
    """VisionZip: [CLS] and the most attended patches, then `contextual` merged rows.

    Attributes:
        contextual: rows of the budget that are merged; the others are [CLS] and patches.
        attention: layer whose [CLS] attention ranks.
        keys: layer whose keys (mean over heads) tell how alike two patches are.
    """

    contextual: int
    attention: int
    keys: int


class HiPrune(Value, frozen=True, kw_only=True, tag_field="rule", tag="hiprune"):
    """HiPrune: anchors of a middle layer with their neighbours, filled up by a deep layer.

    Attributes:
        alpha: share of the budget that goes to anchors with their four neighbours.
        object_layer, deep_layer: layers whose received attention is read.
    """

    alpha: float = 0.1
    object_layer: int
    deep_layer: int

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha: {self.alpha} is not within 0 and 1")


class PruMerge(Value, frozen=True, kw_only=True, tag_field="rule", tag="prumerge"):
    """LLaVA-PruMerge with a fixed ratio: `keep - 1` rows, each merged with its nearest tokens, and one row of
    the rest. Rows stay in the order of attention.

    Attributes:
        neighbours: other tokens that are merged into each kept one.
        layer: whose keys and joint attention are read.
    """

    neighbours: int = 32
    layer: int


EncoderRule: TypeAlias = MsvPrune | VisPruner | VisionZip | HiPrune | PruMerge | RandomOrder


class EncoderStage(Value, frozen=True, kw_only=True):
    """Reduces each image's visual rows to `keep` before the decoder."""

    keep: int
    by: EncoderRule


def taps(rule: EncoderRule) -> VisionTaps:
    """What a rule reads."""
    if isinstance(rule, MsvPrune):
        ranked = {"received_attention" if rule.received else "cls_attention": (rule.attention,)}
        return VisionTaps(**ranked, features=tuple(sorted({rule.middle, rule.last})))
    if isinstance(rule, VisPruner):
        ranked = {"received_attention" if rule.received else "cls_attention": (rule.attention,)}
        return VisionTaps(**ranked, features=(rule.features,))
    if isinstance(rule, VisionZip):
        return VisionTaps(cls_attention=(rule.attention,), keys=(rule.keys,))
    if isinstance(rule, HiPrune):
        return VisionTaps(received_attention=tuple(sorted({rule.object_layer, rule.deep_layer})))
    if isinstance(rule, PruMerge):
        return VisionTaps(joint_attention=(rule.layer,), keys=(rule.layer,))
    return VisionTaps()


def check_tower(stage: EncoderStage, tower: Tower, visual_tokens: int) -> None:
    """Refuses a stage that this tower cannot serve.

    Args:
        visual_tokens: rows that one image gives without the stage.

    Raises:
        UserError: a layer that the tower does not have, a rule that needs [CLS] where there is none, too many
            neighbours, or a model whose decoder also takes [CLS].
    """
    rule, wanted = stage.by, taps(stage.by)
    name = rule_name(rule)
    if tower.cls and tower.views == 1 and visual_tokens == tower.patches + 1:
        raise UserError(
            f"encoder: an encoder stage chooses among patches, but an image has {tower.patches} patches and "
            f"{visual_tokens} visual tokens (vision_feature_select_strategy full?); only models that drop "
            "[CLS] can have one, leave encoder out"
        )
    if stage.keep % tower.views or stage.keep > tower.views * tower.patches:
        raise UserError(
            f"encoder.keep: {stage.keep} rows cannot be shared by {tower.views} views of {tower.patches} "
            f"patches each; take a multiple of {tower.views} up to {tower.views * tower.patches}"
        )
    attention = {*wanted.cls_attention, *wanted.received_attention, *wanted.joint_attention, *wanted.keys}
    for kind, numbers, count in (
        ("attention layer", attention, tower.layers),
        ("hidden state", wanted.features, tower.layers + 1),
    ):
        if bad := sorted(n for n in numbers if not 0 <= n < count):
            raise UserError(f"encoder.by: {name}: {kind} {bad[0]} is not within the tower's 0..{count - 1}")
    if tower.hidden_cls and (wanted.joint_attention or wanted.keys):
        raise UserError(
            f"encoder.by: {name} merges single patches beside [CLS], but this tower's tokens are groups of "
            "patches without it; take msv_prune, vispruner, hiprune or random"
        )
    if not (tower.cls or tower.hidden_cls) and (wanted.cls_attention or wanted.joint_attention):
        alternatives = (
            "set received: true, or take hiprune or random"
            if isinstance(rule, MsvPrune | VisPruner)
            else "take msv_prune or vispruner with received: true, hiprune or random"
        )
        raise UserError(
            f"encoder.by: {name} reads the attention of [CLS], which this tower does not have; {alternatives}"
        )
    if isinstance(rule, PruMerge) and rule.neighbours >= tower.patches:
        raise UserError(
            f"encoder.by.neighbours: {rule.neighbours} is not within 1..{tower.patches - 1}; one of "
            f"{tower.patches} patches has no more others"
        )
