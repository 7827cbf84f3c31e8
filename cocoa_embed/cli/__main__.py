"""``python -m cocoa_embed.cli``: the command ``cocoa-embed``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is being imported ends it as a later one does.

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
