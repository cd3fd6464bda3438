"""A page that looks around in a panorama or repeats a tile, with the picture inside it: one file, no network."""

from __future__ import annotations

import base64
import html
import mimetypes
from pathlib import Path
from typing import Literal

View = Literal["panorama", "tile"]

_DOES = {"panorama": "look around", "tile": "move"}
_WAYS = ((" or use the arrow keys", "turn the wheel to zoom"), ("", "pinch to zoom"))  # with a mouse, with fingers


def page(picture: Path, kind: View, title: str) -> str:
    """The page for a picture's file, whose left edge meets its right one; a tile's top meets its bottom too."""
    words = base64.b64encode(picture.read_bytes()).decode("ascii")
    mime = mimetypes.guess_type(picture.name)[0] or "image/png"
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    hint, touch = (f"drag{how} to {_DOES[kind]}, {zoom}" for how, zoom in _WAYS)
    source = f"data:{mime};base64,{words}"
    values = {"hint": hint, "touch": touch, "kind": kind, "source": source, "title": html.escape(title)}
    for name, value in values.items():
        text = text.replace("{{ " + name + " }}", value)
    return text
