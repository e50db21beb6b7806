"""Entry point of `pydsa` and of `python -m pydsa`."""
import sys

from pydsa import signals
from pydsa.errors import lacks_memory


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
        if lacks_memory(error):
            sys.stderr.write("Error: There is not enough memory for the libraries, or less is allowed than they take (ulimit -v).\n")
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
