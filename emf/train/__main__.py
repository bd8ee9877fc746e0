"""`python -m emf.train` is `emf train`; the deepspeed launcher starts it on every rank."""

import contextlib

with contextlib.suppress(ImportError):  # the command says what is not installed
    from emf.train.launcher import remember_launchers

    remember_launchers()  # before torch is imported, which takes seconds

from emf.train.command import main  # noqa: E402

main()
