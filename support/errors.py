"""Refusing bad input: one line on stderr that says what is wrong, where, and what would be right; exit code 2.

Everything a user hands us (a flag, a file, a row, a tensor) is checked where it enters, and what does not hold raises InputError
with that one line as its text. The commands wrap their main() in `exit_on_bad_input`, so a user never sees a traceback for a typo,
while a library user and a test catch InputError like any other exception.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable


class InputError(ValueError):
    """What the user handed us cannot be used. The text is one line: what, where (file, line, tensor, flag), what would be right."""


class TrainingError(RuntimeError):
    """The run cannot go on, though its input was fine (the loss stays NaN, say). The text is one line."""


def exit_on_bad_input(main: Callable[[], None]) -> Callable[[], None]:
    """Turns InputError into one line and exit code 2, TrainingError into one line and exit code 1; real bugs keep their traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(_one_line(error, 2))
        except TrainingError as error:
            sys.exit(_one_line(error, 1))

    return wrapped


def _one_line(error: Exception, code: int) -> int:
    if int(os.environ.get("LOCAL_RANK", 0)):
        # Of torchrun's processes on a machine the first one speaks. What it says too ends this one within the pause; what only this one
        # has met (a file missing in its view, say) is said after it.
        time.sleep(5)
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


class OneLineParser(argparse.ArgumentParser):
    """argparse that refuses in our one line instead of printing its usage first, and takes no abbreviated flags."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")
