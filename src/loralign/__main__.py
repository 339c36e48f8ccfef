"""`python -m loralign` is the command `loralign`. Here, so that signals are answered while the command itself loads."""

import signal
import sys

from loralign.cli.stop import Signals


def main() -> int:
    """Run the command of sys.argv; returns the exit code."""
    stop = Signals()
    try:
        with stop.handled():
            from loralign.cli.app import main as command

            return command()
    except KeyboardInterrupt:
        print(f"loralign: {stop.answer(sys.argv[1:])}", file=sys.stderr)
        return stop.code
    finally:  # what is left is the interpreter's end: a signal ends it at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
