"""What a transfer tells while it runs. The engine writes, whoever shows it reads; nothing here draws."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """How far one transfer is. Sizes in bytes; `total` is ``None`` while unknown."""

    total: int | None = None
    done: int = 0
    resumed: int = 0
    """Of `done`, what an earlier run had left behind."""
    stage: str = "asking"
    stores: dict[str, int] = field(default_factory=dict)
    """Bytes by store."""
    notes: deque[str] = field(default_factory=deque)
    """What happened that people may want to know, oldest first; the reader takes them out."""

    def note(self, text: str) -> None:
        self.notes.append(text)
