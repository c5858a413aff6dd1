"""Refusing bad input: one line on stderr and exit code 2.

The line says what is wrong, where (file, line, tensor, flag) and what would be right. All that a
user gives (a flag, a file, a row, a tensor) is checked where it enters, and raises InputError with
that line as its text. The commands wrap their main() in `exit_on_bad_input`: a user never sees a
traceback for a typing error, while tests and library users catch InputError like any ValueError.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable


class InputError(ValueError):
    """The input cannot be used. The text is one line: what, where, what would be right."""


class TrainingError(RuntimeError):
    """The run cannot go on, though its input was fine (the loss stays NaN, say). One line."""


def exit_on_bad_input(main: Callable[[], None]) -> Callable[[], None]:
    """InputError becomes one line and exit code 2, TrainingError one line and exit code 1.

    Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(print_line(error, 2))
        except TrainingError as error:
            sys.exit(print_line(error, 1))

    return wrapped


def print_line(error: Exception, code: int) -> int:
    if int(os.environ.get("LOCAL_RANK", 0)):
        # The first rank of a machine prints first, and its exit usually ends this process within
        # the pause. What only this rank has met (a file missing in its view) is printed after it.
        time.sleep(5)
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


class OneLineParser(argparse.ArgumentParser):
    """argparse that refuses in one line instead of printing its usage first; no abbreviations."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")
