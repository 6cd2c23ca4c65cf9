"""Which of an image's formats a client should fetch: as it is, or one that it converts itself (M19).

Rules
- A client names the formats that it takes as they are, best first, and of others how many bytes it converts in a second, counted in
  the bytes that it fetches. What it names in neither way is not offered.
- What is compared is the time until the client can use the image: fetching, as ranking estimates it (`Estimate.score`), and then
  converting. A format that is full everywhere comes after all that are not, since waiting takes longer than anything known.
- Between equals the client's own order decides.

Pure: sizes in bytes, durations in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


def main(declared: str | None, held: Collection[str]) -> str | None:
    """Of the formats that an image has, the one that stands for it where there is one file only: what was declared, else the first."""
    return declared if declared is not None and declared in held else min(held, default=None)


class Option(NamedTuple):
    """A format that would do, with the best place to fetch it from."""

    format: str
    size: int
    seconds: float | None
    """Until the last byte, from the best place; ``None`` where there is none."""
    is_full: bool = False
    """Whether every place that has it is at its limit."""


class Considered(NamedTuple):
    """What was weighed of a format; shown to the client (M2). `seconds` of fetching and of converting."""

    format: str
    seconds: float
    conversion_seconds: float
    is_full: bool


class Choice(NamedTuple):
    """The option to take, by its place among all, and those that could have been taken, best first."""

    chosen: int
    considered: tuple[Considered, ...]

    @property
    def conversion_seconds(self) -> float:
        return self.considered[0].conversion_seconds


def acceptable(have: Collection[str], formats: Iterable[str], convert: Mapping[str, float]) -> list[str]:
    """The formats, of those that there are, that a client takes: those as they are first, in its own order."""
    return [format for format in dict.fromkeys((*formats, *convert)) if format in have]


def choose(options: Sequence[Option], formats: Collection[str], convert: Mapping[str, float]) -> Choice | None:
    """The option that can be used soonest; ``None`` when none can be fetched."""
    weighed = [
        (option.is_full, option.seconds + conversion_seconds(option, formats, convert), index)
        for index, option in enumerate(options)
        if option.seconds is not None
    ]
    if not weighed:
        return None
    best_first = [options[index] for _, _, index in sorted(weighed)]
    considered = tuple(
        Considered(option.format, option.seconds or 0.0, conversion_seconds(option, formats, convert), option.is_full)
        for option in best_first
    )
    return Choice(min(weighed)[2], considered)


def conversion_seconds(option: Option, formats: Collection[str], convert: Mapping[str, float]) -> float:
    """What converting takes; nothing for what is taken as it is."""
    return 0.0 if option.format in formats else option.size / convert[option.format]
