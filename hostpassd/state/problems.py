"""What is wrong with the host as a whole, each thing once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from hostpassd.model.codes import PROBLEMS, Details, Fact, detailed


class Hypervisor(Protocol):
    """A hypervisor connection."""

    @property
    def uri(self) -> str: ...
    @property
    def connected(self) -> bool: ...
    @property
    def error(self) -> str: ...


class View(Protocol):
    """What this asks of the state."""

    told_problems: dict[str, Details]

    @property
    def lacks_iommu(self) -> bool: ...
    @property
    def hypervisors(self) -> Mapping[str, Hypervisor]: ...


def problems(view: View) -> tuple[Fact, ...]:
    """The problems that were told, and those that follow from what is known, in the order of the table."""
    found = {code: [details] for code, details in view.told_problems.items()}
    if view.lacks_iommu:
        found["no-iommu"] = [()]
    lost = [h for h in view.hypervisors.values() if not h.connected]
    found["hypervisor-unreachable"] = [detailed(uri=h.uri, error=h.error) for h in lost]
    return tuple(Fact(PROBLEMS[code], "", details) for code in PROBLEMS for details in found.get(code, ()))
