"""What the pages of captions/ have in common: their templates in pages/, and how numbers and times read."""

from datetime import datetime

import jinja2

from sharegpt4v.credentials import without_credentials
from sharegpt4v.run import charts, timeline

MAX_BYTES = 20_000_000
"""Size of a page, whatever the images and captions are."""

PAGE_BYTES = 2_000_000
"""What a page may take beside the texts and pictures of its cards: style, script, charts, tables, markup."""

FIELD_CHARACTERS = 300
"""Longest id, path, source or message shown in full."""

# Control characters would be lost or would upset the layout: show the Unicode pictures of them.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def template(name: str) -> jinja2.Template:
    """Returns a template of pages/; every value it shows is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharegpt4v.captions", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": timeline.duration,
        "grouped": "{:,.0f}".format,
        "moment": _moment,
        "printable": printable,
        "rate": _rate,
    }
    environment.globals["chart"] = charts
    return environment.get_template(name)


def printable(text: str, limit: int = FIELD_CHARACTERS) -> str:
    """Returns at most `limit` characters of a text, an ellipsis at the cut.

    Control characters are made visible, credentials in URIs hidden.
    """
    text = without_credentials(text)
    return (text if len(text) <= limit else text[:limit] + "…").translate(_VISIBLE)


def _moment(moment: str) -> str:
    """Returns `2026-03-01 14:05 UTC` for an ISO 8601 time."""
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M %Z").strip()


def _rate(rate: float) -> str:
    """Returns three digits below a thousand, whole numbers above."""
    return f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}"
