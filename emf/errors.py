"""What ends a command: errors that are the user's to mend, and a run that diverged."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from emf.files.writing import not_written


class Diverged(RuntimeError):
    """A run's loss, gradient or weights are NaN or inf."""


class Torn(ValueError):
    """A file that could be read does not hold what it should: it was cut, or is of another kind."""


class NotFinite(ValueError):
    """Images that were sampled hold NaN or inf, or weights to sample from do."""

    def __init__(self, places: Sequence[int], fault: str = "") -> None:
        """places: the images' numbers; none where the weights alone were looked at. fault: what is known of why."""
        self.places = list(places)
        named = ", ".join(map(str, self.places[:8])) + ", ..." * (len(self.places) > 8)
        images = f"the images of captions {named} (counted from 0) hold NaN or inf"
        super().__init__("sample: " + ": ".join([images] * bool(self.places) + [fault] * bool(fault)))


@contextmanager
def report_errors() -> Iterator[None]:
    """A ValueError is the user's: its line is printed, and the exit code is 2. A diverged run ends with 3, what is
    interrupted with 130 and the KeyboardInterrupt's line, "interrupted" where it has none."""
    try:
        yield
    except (ValueError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None
    except BrokenPipeError:  # whoever read the output has enough, as in `emf generate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            line = f"{error.filename}: {error.strerror}"
        elif reason := not_written(error):
            line = f"a file cannot be written: {reason}"
        else:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
