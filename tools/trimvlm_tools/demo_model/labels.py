"""Dense labels of a scene and the auxiliary losses on them: what each patch shows, what the image shows.

Shape suffixes: B images, N patches (14 x 14), D width, 6 attributes in the order of `ATTRIBUTES`.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm_tools.demo_model.packing import IGNORED, VisionStates
from trimvlm_tools.demo_model.questions import NOTHING
from trimvlm_tools.demo_model.scenes import COLORS, COLUMNS, GLYPHS, PATCH, ROWS, SHAPES, SIDE, SIZES, Scene
from trimvlm_tools.demo_model.vocabulary import CENTRE_ROW, TOKEN_ID

# The words of each attribute; background has label len(words) in the first four and none in the last two.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": SIZES,
    "glyph": tuple(GLYPHS),
    "row": ROWS,
    "column": COLUMNS,
}
DENSE = ("color", "shape", "size", "glyph")
LEAST_PIXELS = 10  # of a patch's 64: fewer pixels of an object leave the patch background
_WORDS = [word for name in DENSE for word in ATTRIBUTES[name]]
_ALIGN_SCALE = 0.25
NO_THING = -1


def evidence(scene: Scene, question: str, answer: str) -> list[tuple[int, int, float]]:
    """What each row of a question slot should look at; training points the decoder's attention there.

    A word that completes a name (`red circle`) looks at that thing, an answer's word at the thing that it is
    read from. A count gives every counted thing a ninth of the attention and the rest to `<s>`, so that the
    mixture tells the number; `no` and `nothing` look at `<s>` alone.

    Args:
        scene: The scene asked about.
        question: A question of the generator.
        answer: Its answer.

    Returns:
        Triples (row of the slot, index of a thing or `NO_THING`, share of the row's attention).
    """
    words, things = question.split(), scene.things
    asking = len(words)  # the row of `ASSISTANT:`
    pairs = {(thing.color, thing.shape): index for index, thing in enumerate(things)}
    named = [(i, pairs.get((words[i - 1], words[i]), NO_THING)) for i in range(1, asking)]
    looks = [(i, index, 1.0) for i, index in named if index != NO_THING]
    if words[0] == "read" and answer != NOTHING:
        line = [index for index, thing in enumerate(things) if thing.row == ROWS.index(words[2])]
        line.sort(key=lambda index: things[index].column)
        return [(asking + i, index, 1.0) for i, index in enumerate(line)]
    if answer in ("no", NOTHING):
        return [*looks, (asking, NO_THING, 1.0)]
    matching = []
    for half in [words[:5], words[5:]] if "or" in words else [words]:
        wanted = set(half) & set(_WORDS)
        place = " ".join(word for word in half if "or" not in words and word in (*ROWS, *COLUMNS))
        matching += [
            index
            for index, thing in enumerate(things)
            if wanted <= {thing.color, thing.shape, thing.size, thing.glyph} and place in ("", thing.place)
        ]
    if "many" in words:
        counted = [(asking, index, 1 / 9) for index in matching]
        return [*counted, (asking, NO_THING, 1 - len(matching) / 9)]
    return looks + [(asking + i, index, 1.0) for i in range(len(answer.split())) for index in matching]


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of a scene.

    Args:
        scene: A drawn scene.

    Returns:
        int64 [N, 6] class of each patch per attribute, and float32 [32]: which dense attributes' words occur,
        int64 [N] index of the thing that a patch shows, `len(scene.things)` for background, and float32 [N]
        which patches hold the centre of a thing.
    """
    grid = SIDE // PATCH
    count = len(scene.things)
    owned = scene.owner[None] == np.arange(count, dtype=np.int8)[:, None, None]
    pixels = owned.reshape(count, grid, PATCH, grid, PATCH).sum((2, 4)).reshape(count, -1)
    owner = np.where(pixels.max(0) >= LEAST_PIXELS, pixels.argmax(0), count)
    table = [
        [*(ATTRIBUTES[name].index(getattr(thing, name)) for name in DENSE), thing.row, thing.column]
        for thing in scene.things
    ]
    table.append([*(len(ATTRIBUTES[name]) for name in DENSE), IGNORED, IGNORED])
    words = {getattr(thing, name) for thing in scene.things for name in DENSE}
    present = np.array([word in words for word in _WORDS], dtype=np.float32)
    centres = np.zeros(grid * grid, dtype=np.float32)
    centres[[thing.y // PATCH * grid + thing.x // PATCH for thing in scene.things]] = 1.0
    return np.array(table)[owner], present, owner, centres


class AuxiliaryHeads(nn.Module):
    """Linear heads used in training only; they are not part of the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sum(len(ATTRIBUTES[name]) + 1 for name in DENSE))
        self.summary = nn.Linear(width, len(_WORDS))

    def losses(
        self,
        states: VisionStates,
        visual_BND: Tensor,
        table_VD: Tensor,
        *,
        labels_BN6: Tensor,
        present: Tensor,
        centres_BN: Tensor,
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The losses `dense`, `summary`, `align`, `centre`; and the dense accuracies on patches of things.

        Alignment asks the projector's output to name its patch: the token embeddings are the classifier.
        The centre loss asks it to mark one patch per thing, so that things can be counted.
        """
        labels = labels_BN6.flatten(0, 1)
        logits = self.dense(states.features.float()).flatten(0, 1)
        dense, align, accuracy, start = logits.new_zeros(()), logits.new_zeros(()), [], 0
        shown = labels[:, 4] != IGNORED
        for index, name in enumerate(DENSE):
            classes = len(ATTRIBUTES[name]) + 1
            part = logits[:, start : start + classes]
            dense = dense + F.cross_entropy(part, labels[:, index])
            with torch.no_grad():
                accuracy.append((part.argmax(-1) == labels[:, index])[shown].float().mean().item())
            start += classes
        scores = visual_BND.float().flatten(0, 1) @ table_VD.T * _ALIGN_SCALE
        for index, (name, words) in enumerate(ATTRIBUTES.items()):
            wanted, choices = labels[:, index], words
            if name == "color":
                choices = (*words, NOTHING)
            else:
                wanted = torch.where(shown, wanted, IGNORED)
            ids = torch.tensor([TOKEN_ID[word] for word in choices])
            align = align + F.cross_entropy(scores[:, ids], wanted, ignore_index=IGNORED)
        summary = F.binary_cross_entropy_with_logits(self.summary(states.summary.float()), present)
        near = 1.0 + 3.0 * shown.float()  # a quarter of the patches
        centre = F.binary_cross_entropy_with_logits(scores[:, CENTRE_ROW], centres_BN.flatten(), near)
        align, dense = align / len(ATTRIBUTES), dense / len(DENSE)
        return {"dense": dense, "summary": summary, "align": align, "centre": centre}, accuracy
