"""Tokenizers of Hugging Face directories, in and out: reading, checking, writing.

What data.Tokenizer makes of one is the concept; here is what a directory may hold and lack.
"""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import tokenizers

from support.errors import InputError, require
from support.files import check_fields, is_file, read_json, write_json

# Files of a model directory that other software reads beside tokenizer.json, copied with it.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TEXT = (str, None, None)


def read_directory(path: Path) -> tuple[dict, dict, dict[str, dict]]:
    """config.json, nrt.json, and SIDE_FILES by name; {} for a file that is not there."""
    config = read_json(path / "config.json", {"vocab_size": (int, 1, None)})
    saved = read_json(path / "nrt.json", {"marker": TEXT, "prompt_format": TEXT})
    return config, saved, {name: read_json(path / name) for name in SIDE_FILES}


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.parent.is_dir():
        raise InputError(
            f"{file.parent}: no such directory; for a model of the hub, first "
            "`hf download ORGANISATION/NAME --local-dir DIR`, then --model DIR"
        )
    found = is_file(file)
    require(found, f"{file}: no such file; a Hugging Face directory with a fast tokenizer has one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # Some published files contain the padding and truncation that a training run used.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("A text: 1, 2 é \n")  # some mistakes show only here
    except BaseException as error:  # the library raises bare Exceptions, and panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(f"{file}: not a tokenizer: {error}") from None
    return tokenizer


def find_eos(
    path: Path, config: dict, files: dict[str, dict], tokenizer: tokenizers.Tokenizer
) -> list[int]:
    """All eos ids: tokenizer_config.json names the first, the model's configs may add more."""
    file = path / "tokenizer_config.json"
    named = files[file.name].get("eos_token")
    if isinstance(named, dict):  # an AddedToken written as an object
        named = named.get("content")
    check_fields({"eos_token": named}, {"eos_token": TEXT}, file)
    require(named is None or is_text(named), f"{file}: eos_token is {named!r}, no text")
    found = [] if named is None else [tokenizer.token_to_id(named)]
    for name in ("generation_config.json", "config.json"):
        values = files.get(name, config)
        ids = values.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            check_fields({"eos_token_id": token}, {"eos_token_id": (int, 0, 2**31)}, path / name)
            found.append(token)
    found = [token for token in found if token is not None]
    require(
        bool(found),
        f"{path}: no eos token: neither tokenizer_config.json (eos_token) "
        "nor config.json (eos_token_id) names one",
    )
    known = tokenizer.id_to_token(found[0]) is not None
    require(known, f"{path}: eos is token {found[0]}, which tokenizer.json does not have")
    return list(dict.fromkeys(found))  # without duplicates, in this order


def check_ids(path: Path, tokenizer: tokenizers.Tokenizer, needed: list[int], rows: float) -> None:
    """InputError if a token that any text may need has no row in the embedding."""
    highest = max([*needed, *tokenizer.get_vocab(with_added_tokens=False).values()])
    require(
        highest < rows,
        f"{path / 'tokenizer.json'}: has a token {highest}, config.json says vocab_size {rows}: "
        "the model is not this tokenizer's",
    )


def is_text(text: str) -> bool:
    """Python's and JSON's strings may hold half a character, a tokenizer's do not."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def with_ordinary_token(tokenizer: tokenizers.Tokenizer, token: int) -> tokenizers.Tokenizer:
    """The same tokenizer, in which `token` is not special: decoding never drops it."""
    entry = tokenizer.get_added_tokens_decoder().get(token)
    if entry is None or not entry.special:
        return tokenizer
    made = json.loads(tokenizer.to_str())
    for added in made["added_tokens"]:
        added["special"] &= added["id"] != token
    return tokenizers.Tokenizer.from_str(json.dumps(made))


def by_first_letter(names: Iterable[str]) -> dict[str, re.Pattern]:
    """Patterns that find the names. With a common first letter, a search is many times as fast."""
    groups = groupby(sorted(names), key=lambda name: name[0])
    return {letter: re.compile("|".join(map(re.escape, group))) for letter, group in groups}


def write_directory(
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    files: dict[str, dict],
    chat_template: str,
    marker_id: int,
) -> None:
    """Writes tokenizer.json and SIDE_FILES: with the chat template, the marker not special."""
    described = files["tokenizer_config.json"] | {"chat_template": chat_template}
    described.get("added_tokens_decoder", {}).get(str(marker_id), {})["special"] = False
    for name, values in (files | {"tokenizer_config.json": described}).items():
        if values:
            write_json(path / name, values)
    tokenizer.save(str(path / "tokenizer.json"))
