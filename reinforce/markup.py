"""HTML and Markdown by jinja2 templates.

In HTML everything that comes from data is text: values are escaped, and only what templates and ``render`` have made is
HTML. In both, control characters of values are written as ``\\x00`` or ``\\u202e``.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from reinforce.terminal import escape, format_bytes, format_duration, plural

TEMPLATES = Path(__file__).parent / "templates"


def picture_address(data: bytes, kind: str = "webp") -> str:
    """The address of a picture that holds its data, for a page that is one file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> Markup:
    """Fill in an HTML template of the folder ``templates``."""
    return Markup(_environment().get_template(template).render(values))  # noqa: S704 - escaped by the environment


def notebook_table(
    title: str,
    facts: Sequence[tuple[str, str]],
    heads: Sequence[str] = (),
    lines: Sequence[Sequence[str]] = (),
    more: int = 0,
) -> Markup:
    """A result as a notebook shows it: facts by name, and a table, of which ``more`` lines are left out."""
    return render("notebook/table.html", title=title, facts=facts, heads=heads, lines=lines, more=more)


def render_markdown(template: str, **values: Any) -> str:
    """Fill in a template of Markdown or YAML, whose values are not escaped; ends with a line end."""
    return _environment().get_template(template).render(values) + "\n"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(disabled_extensions=("md", "yaml"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_control_characters,
    )
    environment.filters.update(
        count=lambda value: f"{value:,}",
        plural=plural,
        size=format_bytes,
        duration=format_duration,
        share=lambda value: "-" if value is None else f"{value:.1%}".replace("%", " %"),
        fixed=lambda value, digits=3: "-" if value is None else f"{value:.{digits}f}".replace("-", "\u2212"),
    )
    return environment


def _without_control_characters(value: Any) -> Any:
    return escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value
