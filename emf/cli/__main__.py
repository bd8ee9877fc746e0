"""`python -m emf.cli` is the command `emf`, for launchers that start a module on every rank."""

from emf.cli.main import main

main()
