"""Entry point of `pydsa` and of `python -m pydsa`."""
import sys

from pydsa import signals


def main():
    """Run the command line and end the process."""
    try:
        signals.watch()
        signals.open_streams()
        with signals.interrupts_held():
            from pydsa.cli import main as commands
        commands()
    except BaseException as error:
        signals.ignore()
        if signals.interrupted(error):
            sys.stderr.write("\n[stopped]\n")
            sys.exit(signals.STOPPED)
        raise


if __name__ == "__main__":
    main()
