"""``python -m cocoa_embed.cli``: the command ``cocoa-embed``."""

from cocoa_embed.cli.main import main

main()
