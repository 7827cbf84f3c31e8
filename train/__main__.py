"""``python -m cocoa_embed.train RECIPE``: the command ``cocoa-embed train``."""

import sys

from cocoa_embed.cli.main import main

main(["train", *sys.argv[1:]])
