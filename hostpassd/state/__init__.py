"""Everything that is known, and its single writer."""

from hostpassd.state.changes import MANAGER, Changes, Entity
from hostpassd.state.state import HypervisorState, State

__all__ = ["MANAGER", "Changes", "Entity", "HypervisorState", "State"]
