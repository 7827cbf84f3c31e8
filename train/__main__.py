"""``python -m cocoa_embed.train RECIPE``: what ``accelerate launch -m`` and ``torchrun -m`` start."""

import sys

from cocoa_embed.cli import main

main(["train", *sys.argv[1:]])
