"""HTML and SVG built from nested calls: every plain string is escaped, so that no name in a run can become markup."""

from __future__ import annotations

from html import escape


class Html(str):
    """Text that is markup already."""


def el(tag: str, *children: object, **attributes: object) -> Html:
    """One element, well-formed as XML too: `el("p", "a < b", class_="note")`.

    Children and attributes that are None are left out.  Of an attribute's name a trailing underscore is dropped
    (class_), other underscores become hyphens (text_anchor).
    """
    opening = tag + "".join(f' {_attribute(k)}="{escape(str(v))}"' for k, v in attributes.items() if v is not None)
    content = join(*children)
    return Html(f"<{opening}>{content}</{tag}>" if content or tag not in _VOID else f"<{opening}/>")


def join(*children: object) -> Html:
    """Children one after the other, plain strings escaped."""
    return Html("".join(c if isinstance(c, Html) else escape(str(c)) for c in children if c is not None))


_VOID = {"meta", "line", "rect", "path"}


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
