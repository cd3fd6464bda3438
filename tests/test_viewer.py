"""The page beside a panorama or a tile: all of it is in one file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distrifusion.viewer import page


@pytest.mark.parametrize("kind", ["panorama", "tile"])
@pytest.mark.parametrize(("suffix", "mime"), [(".png", "image/png"), (".jpg", "image/jpeg"), (".webp", "image/webp")])
def test_the_picture_is_in_the_page_and_nothing_is_loaded(tmp_path: Path, kind: Any, suffix: str, mime: str) -> None:
    file = tmp_path / f"x{suffix}"
    Image.new("RGB", (4, 3), "teal").save(file)
    text = page(file, kind, 'a "lake" & {{ kind }} <script>')
    (source,) = re.findall(r'picture\.src = "data:([^"]*)"', text)
    head, words = source.split(",")
    assert head == f"{mime};base64"
    assert base64.b64decode(words) == file.read_bytes()
    assert f'const kind = "{kind}";' in text
    assert text.count("<script>") == 1  # the title's is only text
    assert "&quot;lake&quot; &amp;" in text
    assert not re.search(r"https?://|src=|href=|@import|fetch\(", text)
