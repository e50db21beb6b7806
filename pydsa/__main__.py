"""Entry point of `python -m pydsa`."""
from pydsa.cli import main

main()
