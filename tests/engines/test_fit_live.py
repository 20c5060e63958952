"""Which values are in memory at once, on graphs of a few nodes."""

from __future__ import annotations

from typing import NamedTuple

from trimvlm_engines.fit import live
from trimvlm_engines.fit.arena import Sum
from trimvlm_engines.fit.graph import Node, Sized, Tensor

KB = 1000


class Result(NamedTuple):
    peak: int
    left: int
    kept: set[str]


def graph(*nodes: tuple[str, str, str], **kilobytes: int) -> Sized:
    """Nodes as (operator, inputs, outputs) with names of one letter."""
    tensors = {name: Tensor((size * KB,), 1) for name, size in kilobytes.items()}
    return Sized(tuple(Node(op, tuple(i), tuple(o), None, 0) for op, i, o in nodes), tensors)


def run(sized: Sized, outputs: str, scratch: live.Scratch = live.no_scratch, outside: str = "") -> Result:
    space = Sum()
    kept = live.run(sized, list(outputs), space, scratch, outside=lambda name: name in outside)
    return Result(space.resident // KB, space.taken // KB, set(kept))


def test_a_value_lives_from_its_node_to_its_last_reader() -> None:
    chain = graph(
        ("MatMul", "xw", "a"), ("MatMul", "aw", "b"), ("MatMul", "bw", "y"), a=5, b=3, y=2, x=9, w=9
    )
    assert run(chain, "y") == (8, 2, {"y"})  # a with b; inputs and weights are not counted


def test_a_value_that_is_read_again_stays() -> None:
    chain = graph(
        ("MatMul", "x", "a"),
        ("MatMul", "a", "b"),
        ("MatMul", "b", "c"),
        ("Concat", "ca", "y"),
        a=5,
        b=3,
        c=4,
        y=9,
    )
    assert run(chain, "y") == (18, 9, {"y"})  # a, c and y


def test_what_nobody_reads_is_gone_after_its_node() -> None:
    split = graph(("TopK", "x", "ab"), ("MatMul", "b", "y"), a=50, b=3, y=2)
    assert run(split, "y") == (53, 2, {"y"})


def test_a_view_takes_no_bytes_and_holds_its_source() -> None:
    chain = graph(
        ("MatMul", "x", "a"),
        ("Reshape", "a", "v"),
        ("MatMul", "x", "b"),
        ("MatMul", "vb", "y"),
        a=5,
        v=5,
        b=7,
        y=1,
    )
    assert run(chain, "y") == (13, 1, {"y"})


def test_an_output_that_is_a_view_of_another_value_holds_it() -> None:
    chain = graph(("MatMul", "x", "a"), ("Reshape", "a", "y"), ("MatMul", "x", "z"), a=5, y=5, z=1)
    assert run(chain, "yz") == (6, 6, {"z"})


def test_elementwise_operators_write_over_what_nobody_reads_again() -> None:
    once = graph(("MatMul", "x", "a"), ("Sigmoid", "a", "s"), ("MatMul", "s", "y"), a=5, s=5, y=1)
    assert run(once, "y") == (6, 1, {"y"})
    twice = graph(("MatMul", "x", "a"), ("Sigmoid", "a", "s"), ("Mul", "as", "y"), a=5, s=5, y=5)
    assert run(twice, "y") == (15, 5, {"y"})  # silu: a is read again, and y is an output of the graph
    wider = graph(("MatMul", "x", "a"), ("Add", "ab", "s"), ("MatMul", "s", "y"), a=5, b=9, s=9, y=1)
    assert run(wider, "y") == (14, 1, {"y"})  # a is too small to hold the sum


def test_scratch_is_there_while_its_node_runs() -> None:
    chain = graph(("MatMul", "x", "a"), ("Attention", "a", "b"), ("MatMul", "b", "y"), a=5, b=5, y=1)
    assert run(chain, "y", lambda node, _: [40 * KB] * (node.op == "Attention")) == (50, 1, {"y"})


def test_outputs_that_lie_elsewhere_are_not_counted() -> None:
    chain = graph(("MatMul", "x", "p"), ("MatMul", "p", "y"), p=50, y=1)
    assert run(chain, "py", outside="p") == (1, 1, {"y"})


def test_scores_are_of_every_head_and_twice_where_heads_share_keys() -> None:
    def shapes(groups: int) -> dict[str, Tensor]:
        return {"q": Tensor((1, 4, 10, 8), 4), "k": Tensor((1, groups, 30, 8), 4)}

    node = Node("Attention", ("q", "k", "k", "m"), ("y",), 0, 0)
    assert live.scores_apart(node, shapes(4), {}) == [4 * 10 * 30, 4 * 4 * 10 * 30]
    assert live.scores_apart(node, shapes(2), {}) == [4 * 10 * 30, 4 * 4 * 10 * 30, 4 * 4 * 10 * 30]
    assert live.scores_twice(node, shapes(2)) == [4800, 4800]
    assert live.scores_apart(node, shapes(4), {0: 2}) == [600, 2400, 1280], "half of them, and the queries"
    assert live.scores_apart(node._replace(op="MatMul"), shapes(4), {}) == []
