"""Pairs that are found from either side."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Multimap(Generic[_K, _V]):
    """Which values go with which keys, many with many.

    VALUE is in `self[key]`, once, exactly when KEY is in `self.keys_of(value)`. Values are in the order in which they
    came to the key, keys in the order in which they were put.
    """

    def __init__(self) -> None:
        self.by_key: dict[_K, dict[_V, None]] = {}
        self.by_value: dict[_V, tuple[_K, ...]] = {}

    def __getitem__(self, key: _K) -> Collection[_V]:
        """The values of KEY, none if there are none."""
        return self.by_key.get(key, {}).keys()

    def keys_of(self, value: _V) -> tuple[_K, ...]:
        """The keys of VALUE, none if there are none."""
        return self.by_value.get(value, ())

    def groups(self) -> Iterable[tuple[_K, Collection[_V]]]:
        """Each key that has values, and these."""
        return ((key, values.keys()) for key, values in self.by_key.items())

    def put(self, value: _V, keys: Iterable[_K]) -> set[_K]:
        """Has VALUE go with KEYS and no others; the keys that it goes with now and did not, or did and does not."""
        before, after = self.by_value.get(value, ()), tuple(dict.fromkeys(keys))
        if before == after:
            return set()
        for key in before:
            if key not in after:
                self._take_out(key, value)
        for key in after:
            self.by_key.setdefault(key, {})[value] = None
        if after:
            self.by_value[value] = after
        else:
            del self.by_value[value]
        return {*before} ^ {*after}

    def _take_out(self, key: _K, value: _V) -> None:
        values = self.by_key[key]
        del values[value]
        if not values:
            del self.by_key[key]
