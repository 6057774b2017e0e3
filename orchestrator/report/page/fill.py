"""Fills the page in: values to HTML, with what a store says escaped; text only, no I/O beyond fimo's own files."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup


def page(values: Mapping[str, Any]) -> str:
    """The page as HTML; ``values`` as the template names them."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_clean)
    environment.filters |= {"signed": signed, "measured": measured, "between": between, "marked": marked}
    template = environment.from_string(_own("page.html.j2"))
    return template.render(values, css=Markup(_own("page.css")), script=Markup(_own("page.js")))


def _own(name: str) -> str:
    return resources.files("fimo.orchestrator.report.page").joinpath(name).read_text(encoding="utf-8")


def _clean(value: Any) -> Any:
    """A text without control characters: labels and names come from a store that anybody may have written."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join(c for c in value if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return value


def signed(value: float) -> str:
    """An effect for people: two digits and its sign."""
    return f"{value:+.2g}".replace("-", "−")


def measured(value: float, sem: float | None = None) -> Markup:
    """An effect, with its standard error to two digits and itself to the same place: (+1.78 ± 0.17) × 10⁻³."""
    error = f"± {{:.{_digits(value, sem)}f}}" if sem is not None else ""
    return _scaled([value], max(abs(value), sem or 0.0), _digits(value, sem), lambda texts: texts[0], sem, error)


def between(low: float, high: float) -> Markup:
    """An interval, its ends to two digits of its width: (+1.37 to +2.18) × 10⁻³."""
    size = max(abs(low), abs(high))
    return _scaled([low, high], size, _digits(size, high - low), " to ".join)


def _power(size: float) -> int:
    """The power of ten that numbers of a size are shown in: 0 for those that are read as they are."""
    power = math.floor(math.log10(size)) if size else 0
    return 0 if -2 <= power <= 4 else power


def _digits(size: float, width: float | None) -> int:
    """Decimals that show two digits of a width; without one, three of the size."""
    size = max(abs(size), width or 0.0)
    scale = 10.0 ** _power(size)
    if width:
        return min(6, max(0, 1 - math.floor(math.log10(width / scale))))
    return min(6, max(0, 2 - math.floor(math.log10(size / scale)))) if size else 2


def _scaled(
    values: list[float],
    size: float,
    digits: int,
    join: Callable[[list[str]], str],
    sem: float | None = None,
    error: str = "",
) -> Markup:
    power = _power(size)
    text = join([f"{value / 10.0**power:+.{digits}f}".replace("-", "−") for value in values])
    if sem is not None:
        text += " " + error.format(sem / 10.0**power)
    return Markup(f"({text}) × 10<sup>{power}</sup>".replace("<sup>-", "<sup>−") if power else text)


def marked(text: str) -> Markup:
    """A text whose `words` in backticks are code."""
    parts = str(_clean(text)).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 and place < len(parts) - 1 else part
        for place, part in enumerate(parts)
    )


def inline(svg: bytes, name: str, title: str) -> Markup:
    """An SVG file as an element of the page: scaled by its width, its ids its own, its style not the page's.

    Args:
        name: a prefix for its ids; ``title``: what is read out in its place.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    label = Markup.escape(title)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
