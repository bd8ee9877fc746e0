"""The `emf` commands, one file a group. Nothing imports it."""


def main() -> None:
    """The command `emf`, under the name that an installation of an older version calls it by."""
    from emf.cli.main import main as run

    run()
