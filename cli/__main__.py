"""The process: the console script, and `python -m lorazip_cli`."""

from .interrupt import INTERRUPTED, leave_when_asked


def run() -> None:
    """Run the command of the command line. Its imports take a while, in which a signal has nothing to clear away."""
    leave_when_asked()
    from . import main

    try:
        main.run()
    except KeyboardInterrupt:  # between the end of the command and that of its handlers
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    run()
