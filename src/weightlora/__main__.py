"""``weightlora`` on the command line, and ``python -m weightlora``: Ctrl-C is one line from the first import on."""

import sys


def main() -> int:
    """Run one command; see :func:`weightlora.cli.main`.

    The commands are imported here, so that Ctrl-C while they are prints no traceback either.
    """
    try:
        from weightlora.cli import main as run_command

        return run_command()
    except KeyboardInterrupt:
        sys.stderr.write("weightlora: stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
