"""`python -m emf` is the command `emf`."""

from emf.cli.main import main

main()
