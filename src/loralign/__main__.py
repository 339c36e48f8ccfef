"""`python -m loralign` is the command `loralign`. Here, so that Ctrl-C is answered while the command itself loads."""

import signal
import sys


def main() -> int:
    """Run the command of sys.argv; returns the exit code."""
    try:
        from loralign.cli.app import main as command

        return command()
    except KeyboardInterrupt:
        print("loralign: stopped", file=sys.stderr)
        return 130
    finally:  # what is left is the interpreter's end: a signal ends it at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
