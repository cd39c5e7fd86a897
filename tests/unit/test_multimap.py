"""Pairs that are found from either side."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostpassd.state.multimap import Multimap


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 4), max_size=4))))
def test_both_sides_tell_the_same(puts: list[tuple[str, list[int]]]) -> None:
    pairs: Multimap[int, str] = Multimap()
    truth: dict[str, list[int]] = {}
    for value, keys in puts:
        before = set(truth.get(value, ()))
        truth[value] = list(dict.fromkeys(keys))
        assert pairs.put(value, iter(keys)) == before ^ set(keys)
        assert all(list(pairs.keys_of(value)) == keys for value, keys in truth.items())
        groups = {key: {value for value, keys in truth.items() if key in keys} for key in range(5)}
        assert all(set(pairs[key]) == values and len(pairs[key]) == len(values) for key, values in groups.items())
        assert {key: set(values) for key, values in pairs.groups()} == {key: vs for key, vs in groups.items() if vs}


def test_the_order_is_that_in_which_they_came() -> None:
    pairs: Multimap[str, int] = Multimap()
    for value in (3, 1, 2):
        pairs.put(value, ["x", "y"])
    pairs.put(1, ["y"])
    pairs.put(1, ["y", "x"])
    assert (list(pairs["x"]), list(pairs["y"]), pairs.keys_of(1)) == ([3, 2, 1], [3, 1, 2], ("y", "x"))


def test_nothing_is_kept_of_what_went() -> None:
    pairs: Multimap[str, int] = Multimap()
    pairs.put(1, ["x", "y"])
    assert pairs.put(1, ()) == {"x", "y"} and pairs.put(2, ()) == set()
    assert not pairs.by_key and not pairs.by_value
