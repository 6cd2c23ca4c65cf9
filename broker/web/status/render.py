"""From what the service tells to HTML: templates, and the few things that they cannot say themselves.

Jinja2 rather than text put together here: every value is escaped where it is written unless a template says otherwise (only the style
does), and a page reads as one. Templates lie beside this file.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from broker import __version__
from broker.model import Principal
from broker.service.overview import COMPARED_SIZE, OutcomeShown, Overview
from broker.units import seconds_text, size_text

OPEN_STORES = 40
"""With more stores than this, only sites with one in trouble are shown unfolded."""

CELLS = 16
"""Up to so many slots are drawn one by one."""

_STYLE = Markup((resources.files("broker.web.status") / "templates" / "style.css").read_text("utf-8"))  # noqa: S704 - our own file
STYLE_HASH = "sha256-" + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
"""What the Content-Security-Policy allows: this style and no other."""


def status(overview: Overview, principal: Principal, *, refresh: int | None, can_sign_out: bool) -> bytes:
    """The status page. `refresh` is after how many seconds it is asked for again, ``None`` for never."""
    return _page(
        "status.html",
        overview=overview,
        principal=principal,
        refresh=refresh,
        can_sign_out=can_sign_out,
        plot=plot(overview.outcomes),
        open_all=overview.store_count <= OPEN_STORES,
        compared=COMPARED_SIZE,
    )


def sign_in(said: str | None, *, keystone: bool) -> bytes:
    """The form to sign in; `said` is why the last try did not do."""
    return _page("sign_in.html", said=said, keystone=keystone, refresh=None)


class Plot:
    """Transfers as dots, oldest left, by what each took over its estimate: halves and doubles are as far apart below 1 as above.

    The area is 1000 wide and 400 high; paths are of zero-length strokes, which round caps make dots.
    """

    MOST = 4
    """Powers of two to each side; what is farther is drawn at the edge."""

    def __init__(self, outcomes: Sequence[OutcomeShown]) -> None:
        self.count = len(outcomes)
        ratios = [outcome.ratio for outcome in outcomes if outcome.ratio is not None]
        self.within = sum(0.5 <= ratio <= 2 for ratio in ratios)
        self.longer = sum(ratio > 2 for ratio in ratios)
        self.shorter = sum(ratio < 0.5 for ratio in ratios)
        self.failed = self.count - len(ratios)
        self.median = sorted(ratios)[len(ratios) // 2] if ratios else None
        paths: dict[str, list[str]] = {"good": [], "warn": [], "bad": []}
        for index, outcome in enumerate(reversed(outcomes)):
            x = round(1000 * (index + 0.5) / self.count, 1)
            if outcome.ratio is None:
                paths["bad"].append(f"M{x} 388h0")
            else:
                paths["good" if 0.5 <= outcome.ratio <= 2 else "warn"].append(f"M{x} {self.height(outcome.ratio)}h0")
        self.paths = {level: "".join(steps) for level, steps in paths.items() if steps}

    def height(self, ratio: float) -> float:
        """Where a ratio lies, from the top; failures have the lowest strip to themselves."""
        power = max(-self.MOST, min(self.MOST, math.log2(max(ratio, 1e-9))))
        return round(185 - power / self.MOST * 170, 1)


def plot(outcomes: Sequence[OutcomeShown]) -> Plot | None:
    """The plot of these outcomes, newest first; ``None`` when there are none."""
    return Plot(outcomes) if outcomes else None


def instant(at: float) -> str:
    """An instant for machines (RFC 3339)."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def day_and_time(at: float) -> str:
    """An instant for people."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def time_of_day(at: float) -> str:
    """The same where the day is known."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S UTC")


def percent(share: float) -> str:
    """A share; what is not quite all or nothing is not told as that."""
    if 0.995 <= share < 1:
        return f"{math.floor(share * 1000) / 10:.1f} %"
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or share == 0 else "< 1 %"


def short_seconds(seconds: float) -> str:
    """A duration; short ones in milliseconds."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else seconds_text(seconds)


def times(ratio: float) -> str:
    """How many times as much."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def basis(text: str) -> str:
    """Where an estimate comes from, in words."""
    kind, _, site = text.partition(":")
    if kind == "wider-site":
        return f"measured from {site}" if site else "measured from everywhere"
    return {"prior": "by distance alone"}.get(kind, kind)


def _page(template: str, **values: object) -> bytes:
    return _templates.get_template(template).render(values).encode()


_templates = Environment(
    loader=PackageLoader("broker.web.status"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    auto_reload=False,
)  # fmt: skip
_templates.globals |= {"style": _STYLE, "version": __version__, "cells": CELLS}
_templates.filters |= {
    "size": size_text, "seconds": short_seconds, "instant": instant, "day_and_time": day_and_time, "time_of_day": time_of_day,
    "percent": percent, "times": times, "plural": plural, "basis": basis,
}  # fmt: skip
