"""`python -m emf.train` is `emf train`; the deepspeed launcher starts it on every rank."""

from emf.train.loop import main

main()
