"""`python -m emf.train` is `emf train`; the deepspeed launcher starts it on every rank."""

from emf.train.command import main

main()
