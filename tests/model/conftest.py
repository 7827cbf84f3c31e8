"""A checkpoint of the tiny backbone and its export."""

from pathlib import Path

import pytest
from exported import write_checkpoint
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model


@pytest.fixture(scope="session")
def checkpoint(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return write_checkpoint(backbone, tmp_path_factory.mktemp("run") / "contrastive")


@pytest.fixture(scope="session")
def tiny_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(checkpoint, tmp_path_factory.mktemp("export") / "cocoa-qwen2vl")
