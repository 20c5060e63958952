"""Which values of a graph are in memory at once, as its nodes run one after the other.

Shapes: R query rows, S key rows, H heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from trimvlm_engines.fit.graph import Node, Sized, Tensor

# Operators that give their input another shape and no other bytes.
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
# Operators that may write over an input that nobody reads again.
OVER = {
    *("Add", "Sub", "Mul", "Div", "And", "Or", "Not", "Min", "Max", "Clip", "Neg", "Exp", "Erf", "Tanh"),
    *("Sigmoid", "Sqrt", "Cos", "Sin", "Relu", "Gelu", "Cast"),
}

Scratch = Callable[[Node, dict[str, Tensor]], Iterable[int]]


class Space(Protocol):
    """Where values lie: `arena.Arena` or `arena.Sum`."""

    def take(self, size: int) -> Any: ...

    def give(self, chunk: Any) -> None: ...


def run(
    sized: Sized,
    outputs: Iterable[str],
    space: Space,
    scratch: Scratch,
    *,
    outside: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Takes and gives what one run does.

    Args:
        sized: the graph; its inputs and weights are not counted.
        outputs: names of the graph's outputs; they stay taken.
        scratch: bytes that a node needs beside its inputs and outputs while it runs.
        outside: outputs that lie in memory which is counted elsewhere.

    Returns:
        Name to chunk, of the outputs; views of others and those outside have none.
    """
    values = _Values(sized, set(outputs))
    chunks: dict[str, Any] = {}
    for node in sized.nodes:
        shared = values.taken_over(node)
        for name in node.outputs:
            if shared is not None:
                values.share(name, shared)
            elif not outside(name):
                chunks[name] = space.take(sized.tensors[name].bytes)
                values.users[name] = {name}
        for chunk in [space.take(size) for size in scratch(node, sized.tensors)]:
            space.give(chunk)
        values.left.subtract(node.inputs)
        for name in {values.root(one) for one in (*node.inputs, *node.outputs)}:
            if name in chunks and not values.needed(name):
                space.give(chunks.pop(name))
    return {name: chunks[name] for name in values.wanted if name in chunks}


class _Values:
    """Who reads what, and which values share bytes.

    Attributes:
        left: how often a value is still read.
        users: names of the values that lie in the bytes of one.
    """

    def __init__(self, sized: Sized, wanted: set[str]) -> None:
        self.wanted, self._tensors = wanted, sized.tensors
        self.left = Counter(name for node in sized.nodes for name in node.inputs)
        self.users: dict[str, set[str]] = {}
        self._roots: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The value in whose bytes this one lies."""
        return self._roots.get(name, name)

    def share(self, name: str, root: str) -> None:
        """Puts a value into the bytes of another."""
        self._roots[name] = root
        if root in self.users:
            self.users[root].add(name)

    def needed(self, root: str, without: str | None = None) -> bool:
        """Whether what lies in these bytes is read later on, `without` one of the values apart."""
        return any(one in self.wanted or (one != without and self.left[one] > 0) for one in self.users[root])

    def taken_over(self, node: Node) -> str | None:
        """The value whose bytes a node's output takes over, or None."""
        if node.op in VIEWS:
            return self.root(node.inputs[0])
        if node.op not in OVER or node.outputs[0] in self.wanted:
            return None
        size = self._tensors[node.outputs[0]].bytes
        for name in node.inputs:
            root = self.root(name)
            last = self.left[name] == 1 and self._tensors[name].bytes == size
            if last and root in self.users and not self.needed(root, without=name):
                return root
        return None


def scores_apart(node: Node, tensors: dict[str, Tensor], pieces: Mapping[int | None, int]) -> list[int]:
    """Scratch of ONNX Runtime's Attention on a CPU: mask [R, S] and scores [H, R, S] in float32, the scores
    twice where heads share keys (measured: version 1.31).

    Args:
        pieces: by layer, into how many its queries are cut (`accounting.attention_pieces`), where they are:
            scores of the last piece alone, which sees all keys, beside its queries and the others' results.
    """
    mask, scores = _mask_and_scores(node, tensors)
    if not scores:
        return []
    queries, cut = tensors[node.inputs[0]], pieces.get(node.layer, 1)
    shared = queries.shape[1] != tensors[node.inputs[1]].shape[1]
    made = [mask // cut, *[scores // cut] * (2 if shared else 1)]
    return made if cut == 1 else [*made, queries.bytes]


def scores_twice(node: Node, tensors: dict[str, Tensor]) -> list[int]:
    """Of an Attention that was taken apart: scores before and after the softmax."""
    return [_mask_and_scores(node, tensors)[1]] * 2


def no_scratch(node: Node, tensors: dict[str, Tensor]) -> list[int]:
    """Of kernels that keep what they need on the chip."""
    return []


def _mask_and_scores(node: Node, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes of mask [R, S] and scores [H, R, S] in float32; 0 where the node has none."""
    if node.op != "Attention":
        return 0, 0
    heads, rows = tensors[node.inputs[0]].shape[1:3]
    keys = tensors[node.inputs[1]].shape[2]
    return 4 * rows * keys, 4 * heads * rows * keys
