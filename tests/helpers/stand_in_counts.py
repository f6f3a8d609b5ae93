"""What ``stand_in_cuda`` counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Copy:
    """A copy between the host and the device."""

    to_device: bool
    bytes: int
    pinned: bool
    blocking: bool
    place: str


@dataclass
class Counts:
    """What a piece of code asked the device to do."""

    operations: int = 0
    allocations: int = 0
    allocated_bytes: int = 0
    graph_launches: int = 0
    by_name: Counter[str] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # by reason and place

    @property
    def synchronizations(self) -> int:
        """How often the host waited for the device; blocking copies are among them."""
        return self.waits.total()

    def copies_to_device(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.to_device]

    def copies_to_host(self) -> list[Copy]:
        return [copy for copy in self.copies if not copy.to_device]

    def describe(self) -> str:
        """A text for messages of assertions."""
        waits = "; ".join(f"{count}x {what}" for what, count in self.waits.most_common(12))
        names = ", ".join(f"{name} {count}" for name, count in self.by_name.most_common(20))
        return (
            f"{self.operations} operations ({names}), {self.allocations} allocations, {len(self.copies)} copies, "
            f"{self.synchronizations} synchronizations: {waits}"
        )
