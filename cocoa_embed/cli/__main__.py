"""``python -m cocoa_embed.cli``: the command ``cocoa-embed``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C during the imports ends it in the same way as later.

    :raises SystemExit: Always.
    """
    try:
        from cocoa_embed.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("cocoa-embed: interrupted\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
