"""Entry of `python -m alphalayer`."""

from alphalayer.cli.app import main

main()
