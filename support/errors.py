"""Refusing bad input: one line on stderr and exit code 2.

The line says what is wrong, where (file, line, tensor, flag) and what would be right. All that a
user gives (a flag, a file, a row, a tensor) is checked where it enters, and raises InputError with
that line as its text. The commands wrap their main() in `exit_on_bad_input`: a user never sees a
traceback for a typing error, while tests and library users catch InputError like any ValueError.
"""

import argparse
import functools
import json
import math
import os
import signal
import stat
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


# ---- small files in and out
MAX_BYTES = 16 * 2**20  # of a JSON file; it is read into memory at once
MAX_DEPTH = 50  # of lists and objects within each other

# Fields of a JSON file, by name: type, least and most value (None: any). A field that is absent or
# null is not checked.
Fields = dict[str, tuple[type, float | None, float | None]]
NOUNS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def is_file(file: Path) -> bool:
    """Whether `file` exists. InputError if it is no regular file: reading might never end."""
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # no permission, a name too long, a name with a NUL
        raise InputError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    require(stat.S_ISREG(mode), f"{file}: a directory, pipe or device, it should be a file")
    return True


def read_json(file: Path, fields: Fields | None = None) -> dict:
    """The object in a JSON file, its `fields` checked; {} if there is no such file."""
    if not is_file(file):
        return {}
    size = file.stat().st_size
    require(size <= MAX_BYTES, f"{file}: has {size} bytes, it should have {MAX_BYTES} at most")
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    kind = type(value).__name__
    require(isinstance(value, dict), f"{file}: holds a {kind}, it should be an object")
    require(not deeper(value, MAX_DEPTH), f"{file}: nested more than {MAX_DEPTH} deep")
    check_fields(value, fields or {}, file)
    return value


def read_log(file: Path) -> list[dict]:
    """The lines of log.jsonl or samples.jsonl; a kill may have left half of the last one."""
    found = []
    lines = file.read_bytes().splitlines(keepends=True) if is_file(file) else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, text in enumerate(lines, start=1):
        where = f"{file}:{number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        require(isinstance(line, dict) and line.get("step") is not None, f"{where}: has no step")
        check_fields(line, {"step": (int, 0, None), "warnings": (list, None, None)}, where)
        found.append(line)
    return found


def check_fields(values: dict, fields: Fields, where: object) -> None:
    """InputError for the first of `fields` in `values` with another type or out of its range."""
    for name, (kind, least, most) in fields.items():
        value = values.get(name)
        if value is None:
            continue
        words = [NOUNS[kind]]
        words += [f"from {least}"] * (least is not None) + [f"to {most}"] * (most is not None)
        right = f"{where}: {name} is {shown(value)}, it should be {' '.join(words)}"
        require(has_type(value, kind), right)
        require(least is None or value >= least, right)
        require(most is None or value <= most, right)


def has_type(value: object, kind: type) -> bool:
    """bool is no int here, and a float is any finite number."""
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def deeper(value: object, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep: json cannot write them back."""
    inside = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return False
    return limit == 0 or any(deeper(part, limit - 1) for part in inside)


def shown(value: object) -> str:
    """repr, cut to a length that fits into an error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def write_json(file: Path, value: dict) -> None:
    """Under its own name the file is complete at every moment."""
    write_beside(file, value).replace(file)


def write_beside(file: Path, value: dict) -> Path:
    """Writes the JSON under a temporary name, to the disk -> its path."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as text:
        text.write(json.dumps(value, indent=2) + "\n")
        text.flush()
        os.fsync(text.fileno())
    return temporary
