"""A page that looks around in a panorama or repeats a tile, with the picture inside it: one file, no network."""

from __future__ import annotations

import base64
import html
import mimetypes
from pathlib import Path
from typing import Literal

View = Literal["panorama", "tile"]

_HINTS = {
    "panorama": "drag or use the arrow keys to look around, turn the wheel to zoom",
    "tile": "drag or use the arrow keys to move, turn the wheel to zoom",
}


def page(picture: Path, kind: View, title: str) -> str:
    """The page for a picture's file, whose left edge meets its right one; a tile's top meets its bottom too."""
    words = base64.b64encode(picture.read_bytes()).decode("ascii")
    mime = mimetypes.guess_type(picture.name)[0] or "image/png"
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    values = {"hint": _HINTS[kind], "kind": kind, "source": f"data:{mime};base64,{words}", "title": html.escape(title)}
    for name, value in values.items():
        text = text.replace("{{ " + name + " }}", value)
    return text
