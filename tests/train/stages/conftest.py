from pathlib import Path

import pytest
import torch
from PIL import Image

from cocoa_embed.data.rows import Item, Row

SIZES = ((56, 56), (84, 56), (112, 112), (28, 84), (168, 112))
"""Image sizes of 4, 6, 16, 3 and 24 visual tokens of 28 x 28 pixels; the last is scaled down to MAX_PIXELS."""


@pytest.fixture
def sized_rows(tmp_path: Path) -> list[Row]:
    """Rows with images of different sizes, all of noise, so that no two patches are alike."""
    rows = []
    for number, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
        rows.append(Row(query=Item(images=(path,)), positive=Item(text="small red ring at top left"), source=""))
    return rows
