"""ONNX Runtime's arena, by its rules on cases that one can follow, and what must hold whatever is taken."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from trimvlm_engines.fit.arena import FIRST, SPLIT, UNIT, Arena, Chunk, Sum


def test_pieces_are_of_256_bytes_and_lie_side_by_side() -> None:
    arena = Arena()
    first, second = arena.take(1), arena.take(257)
    assert (first.start, first.size, second.start, second.size) == (0, 256, 256, 512)
    assert arena.taken == arena.resident == 768


def test_a_gap_is_used_again_only_where_it_is_large_enough() -> None:
    arena = Arena()
    gap, wall = arena.take(1024), arena.take(256)
    arena.give(gap)
    assert arena.take(2048).start == 1280  # after the wall
    assert arena.take(512).start == 0
    assert wall.start == 1024 and arena.resident == 1280 + 2048


def test_the_smallest_gap_that_fits_is_taken_and_split_only_if_twice_as_large() -> None:
    arena = Arena()
    large, _, small, _ = arena.take(4096), arena.take(256), arena.take(1024), arena.take(256)
    arena.give(large)
    arena.give(small)
    assert arena.take(768) is small and small.size == 1024  # whole: 1024 is less than twice 768
    assert arena.take(768) is large and large.size == 768  # split


def test_free_neighbours_become_one() -> None:
    arena = Arena()
    a, b, c, _ = arena.take(1024), arena.take(1024), arena.take(1024), arena.take(256)
    for chunk in (a, c, b):
        arena.give(chunk)
    assert arena.take(3072).start == 0
    assert arena.taken == 3072 + 256


def test_regions_double_and_a_large_piece_gets_one_of_its_own() -> None:
    arena = Arena()
    arena.take(FIRST)
    assert arena.take(FIRST + 1).region == 1  # of 4 MiB
    assert arena.take(2 * FIRST).region == 2  # of 8 MiB, which have room for more
    assert arena.take(FIRST).region == 2
    assert arena.take(100 * FIRST).region == 3
    assert arena.resident == FIRST * (1 + 1 + 2 + 1 + 100) + UNIT


def test_of_a_large_region_what_is_left_is_not_lost() -> None:
    arena = Arena()
    assert arena.take(SPLIT * 5).size == SPLIT * 5  # of 1 GiB: less than twice, but 128 MiB more
    assert arena.take(SPLIT).region == 0


def test_a_sum_has_no_gaps() -> None:
    total = Sum()
    first, second = total.take(1000), total.take(10)
    total.give(first)
    total.take(900)
    total.give(second)
    assert (total.taken, total.resident) == (900, 1010)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3 << 20), st.booleans()), max_size=60), st.randoms())
def test_chunks_never_overlap_and_everything_given_back_is_one_piece(wanted, random) -> None:
    arena, held = Arena(), list[tuple[int, Chunk]]()
    for size, give in wanted:
        if give and held:
            arena.give(held.pop(random.randrange(len(held)))[1])
        held.append((size, arena.take(size)))
        ends = sorted((chunk.region, chunk.start, chunk.start + chunk.size) for _, chunk in held)
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(ends))
        assert all(chunk.size >= size for size, chunk in held)
        assert arena.taken == sum(chunk.size for _, chunk in held) <= arena.resident + len(held) * SPLIT
    before = arena.resident
    for _, chunk in held:
        arena.give(chunk)
    assert arena.taken == 0
    if held and held[0][1].region == 0:
        assert arena.take(FIRST).start == 0  # a whole region
    assert arena.resident >= before
