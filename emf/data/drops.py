"""What could not be used of some data: counted and named, never fatal and never silent."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

NAMES_KEPT = 5  # of each reason


class Dropped(Exception):
    """A sample that cannot be used. `reason` is one of a few, `detail` what this one's trouble is."""

    def __init__(self, key: str, source: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{source}: {key}: {reason}{f' ({detail})' if detail else ''}")
        self.key, self.source, self.reason, self.detail = key, source, reason, detail


class Drops:
    """What was dropped, by source and reason, the first few by name. A sample met again is not counted again."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self.names: dict[tuple[str, str], list[str]] = {}
        self._told: dict[tuple[str, str], int] = {}
        self._seen: set[tuple[str, str, str]] = set()
        self._lock = threading.Lock()

    def add(self, key: str, source: str, reason: str, detail: str = "") -> None:
        with self._lock:
            if (key, source, reason) in self._seen:
                return
            self._seen.add((key, source, reason))
            kind = source, reason
            self.counts[kind] = self.counts.get(kind, 0) + 1
            names = self.names.setdefault(kind, [])
            if len(names) < NAMES_KEPT:
                names.append(f"{key} ({detail})" if detail else key)

    def take(self, others: Drops) -> None:
        """What others have dropped too."""
        for kind, count in others.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.names[kind] = [*self.names.get(kind, []), *others.names[kind]][:NAMES_KEPT]
        self._seen |= others._seen

    def __len__(self) -> int:
        return sum(self.counts.values())

    def news(self) -> list[str]:
        """The lines of what has come, or has doubled, since this was asked last: a long run tells each reason a few
        times."""
        with self._lock:
            new = [kind for kind, count in self.counts.items() if count >= 2 * self._told.get(kind, 0)]
            self._told |= {kind: self.counts[kind] for kind in new}
            return list(self.lines(new))

    def lines(self, kinds: Iterable[tuple[str, str]] | None = None) -> Iterator[str]:
        """One for each source and reason; of these kinds alone, where they are given."""
        for source, reason in self.counts if kinds is None else kinds:
            count = self.counts[source, reason]
            more = ", ..." if count > NAMES_KEPT else ""
            yield f"{source}: {count} dropped: {reason}: {', '.join(self.names[source, reason])}{more}"
