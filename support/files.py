"""Small files in and out: JSON whose fields are checked, and writes that are whole or not there."""

import json
import math
import os
import stat
from pathlib import Path

from support.errors import InputError, require

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
