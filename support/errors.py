"""Refusing bad input: one line on stderr and exit code 2.

The line says what is wrong, where (file, line, tensor, flag) and what would be right. All that a
user gives (a flag, a file, a row, a tensor) is checked where it enters, and raises InputError with
that line as its text. The commands wrap their main() in `exit_on_bad_input`: a user never sees a
traceback for a typing error, while tests and library users catch InputError like any ValueError.
"""

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = 500  # characters at both ends of an error; what it quotes may have any length


class InputError(ValueError):
    """The input cannot be used. The text is one line: what, where, what would be right."""

    said = False  # True on a rank where another one prints the line


class TrainingError(RuntimeError):
    """The run cannot go on, though its input was fine (the loss stays NaN, say). One line."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run. One line that says how to go on, and the signal."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


class StopSignals:
    """Ctrl-C and SIGTERM: the first is remembered, and asks the run to stop after its step. A
    second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        self.number = number
        self.restore(signal.SIG_DFL)

    def restore(self, interrupt: object = signal.default_int_handler) -> None:
        """Signals do again what they do without this."""
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def exit_on_bad_input(main: Callable[[], None]) -> Callable[[], None]:
    """Errors that are no bugs become one line and an exit code.

    InputError 2; TrainingError and OSError (the disk is full, say) 1; a signal 128 + its number.
    Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        for stream in (sys.stdout, sys.stderr):  # the locale may have no letter for a question's
            stream.reconfigure(errors="backslashreplace")
        try:
            main()
        except InputError as error:
            sys.exit(print_line(error, 2))
        except (TrainingError, OSError) as error:
            sys.exit(print_line(error, 1))
        except Interrupted as stop:
            if os.environ.get("RANK", "0") != "0":  # all ranks stop together, one says so
                sys.exit(128 + stop.number)
            sys.exit(print_line(stop, 128 + stop.number, "stopped: "))
        except KeyboardInterrupt:
            sys.exit(print_line("by Ctrl-C", 128 + signal.SIGINT, "stopped: "))

    return wrapped


def python(executable: str = sys.executable) -> str:
    """The running interpreter in a command that is printed to be pasted: .venv/bin/python where it
    is inside the project, else python."""
    path = Path(executable)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "python"


def print_line(error: object, code: int, begin: str = "error: ") -> int:
    if int(os.environ.get("LOCAL_RANK", 0)):
        # The first rank of a machine prints first, and its exit usually ends this process within
        # the pause. What only this rank has met (a file missing in its view) is printed after it.
        time.sleep(5)
    if getattr(error, "said", False):
        return code
    text = printable(" ".join(str(error).split()))
    if len(text) > 2 * LINE:
        text = f"{text[:LINE]} ... {text[-LINE:]}"
    print(begin + text, file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Text for a terminal: of the control characters only newline and tab stay what they are.

    A model's answer or a file's name could move the cursor, rename the window or worse.
    """
    shown = []
    for letter in text:
        plain = letter.isprintable() or letter in "\n\t"
        shown.append(letter if plain else letter.encode("unicode_escape").decode())
    return "".join(shown)


class OneLineParser(argparse.ArgumentParser):
    """argparse that refuses in one line instead of printing its usage first; no abbreviations.
    Commands in its help can be pasted."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        return super().format_help().replace("    python ", f"    {python()} ")

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")
