"""Refusing bad input: one line on stderr and exit code 2; and JSON files in and out.

The line says what is wrong, where (file, line, tensor, flag) and, where it helps, what would be
right. Where a library checks, the library checks: `refusing(file)` turns its exception into that
line. Own checks (`require`) are for what would go on silently wrong. The commands wrap their main()
in `exit_on_bad_input`; library users catch InputError like any ValueError.
"""

import argparse
import functools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Removes a line of progress (support/distributed.py); empty where stderr is no terminal.
ERASE = "\r\x1b[K" if sys.stderr.isatty() else ""
OTHER_RANK = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0"  # of torchrun
LINE = 1000  # characters of an error; what it quotes may have any length


class InputError(ValueError):
    """The input cannot be used. The text is one line: what, where, what would be right."""

    said = False  # True on a rank where another one prints the line


class TrainingError(RuntimeError):
    """The run cannot go on, though its input was fine (the loss stays NaN, say). One line."""

    said = OTHER_RANK  # every rank raises it


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run. One line that says how to go on."""

    number = signal.SIGINT  # the signal
    said = False  # as in InputError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextmanager
def refusing(what: object) -> Iterator[None]:
    """What a library says of bad input becomes an InputError that begins with `what` (a file)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        text = f"lacks {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{what}: {text}") from error


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
            sys.exit(print_line(stop, 128 + stop.number, "stopped: "))
        except KeyboardInterrupt:
            stopped = Interrupted("by Ctrl-C")
            stopped.said = OTHER_RANK
            sys.exit(print_line(stopped, 128 + stopped.number, "stopped: "))

    return wrapped


def print_line(error: object, code: int, begin: str = "error: ") -> int:
    if not getattr(error, "said", False):
        if OTHER_RANK:
            time.sleep(5)  # mostly rank 0 says the same, and torchrun then ends this one
        print(ERASE + begin + printable(" ".join(str(error).split()))[:LINE], file=sys.stderr)
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


def python(executable: str | Path = sys.executable) -> str:
    """The interpreter, or another of the project's files, in a command that is printed to be
    pasted: .venv/bin/python where it is in the working directory, else the whole path."""
    path, here = Path(executable), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command(script: str, *flags: str, launcher: Sequence[str] = ()) -> str:
    """A line to be pasted where this process was started."""
    return shlex.join([python(), *launcher, python(ROOT / script), *flags])


class OneLineParser(argparse.ArgumentParser):
    """argparse that refuses in one line instead of printing its usage first; no abbreviations.
    Commands in its help can be pasted."""

    def __init__(self, **kwargs) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def format_help(self) -> str:
        return super().format_help().replace("    python ", f"    {python()} ")

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


# ---- JSON files
def read_json(file: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    if not file.exists():
        return {}
    with refusing(file):
        value = json.loads(file.read_text("utf-8-sig"))
    require(isinstance(value, dict), f"{file}: holds no JSON object")
    return value


def write_json(file: Path, value: dict) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: Path, content: str) -> None:
    """Under its own name the file is complete at every moment."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as text:
        text.write(content)
        text.flush()
        os.fsync(text.fileno())
    temporary.replace(file)
