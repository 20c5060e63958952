"""VisionZip (section 3): dominant rows by attention, contextual rows merged from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.encoder.ranking import highest, others, unit
from trimvlm.encoder_rules import VisionZip


def merge(
    rule: VisionZip, keep: int, outputs: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows [keep, E]: [CLS], the most attended patches in spatial order, contextual rows.

    Contextual rows start from evenly spaced patches of the rest; each other patch goes to the target whose
    key is most alike (ties: the first), and a row is its target plus the mean of what went to it, as the
    published code has it.
    """
    attention_N = outputs[f"cls_attention.{rule.attention}"]
    patches = len(attention_N)
    tower_SE = outputs["tower"]
    features_NE = tower_SE[-patches:].astype(np.float32)
    dominant = np.sort(highest(attention_N, keep - rule.contextual - 1))
    rest = others(dominant, patches)
    step = max(1, len(rest) // max(1, rule.contextual))
    is_target = np.zeros(len(rest), bool)
    is_target[::step][: rule.contextual] = True
    targets, merged = rest[is_target], rest[~is_target]
    contextual_CE = features_NE[targets]
    if rule.contextual:
        keys_NC = unit(outputs[f"keys.{rule.keys}"][-patches:].astype(np.float32).mean(axis=1))
        goes_to = np.argmax(keys_NC[merged] @ keys_NC[targets].T, axis=1)
        for number in range(rule.contextual):
            members = merged[goes_to == number]
            if len(members):
                contextual_CE[number] += features_NE[members].mean(axis=0)
    rows = [tower_SE[:1], tower_SE[-patches:][dominant], contextual_CE.astype(tower_SE.dtype)]
    return np.concatenate(rows), np.concatenate([dominant, targets])
