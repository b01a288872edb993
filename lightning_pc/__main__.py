"""The command line."""

from lightning_pc.cli import main

main()
