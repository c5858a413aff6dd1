"""Tokenizers of Hugging Face directories, in and out: reading, checking, writing.

What data.Tokenizer makes of one is the concept; here is what a directory may hold and lack.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import tokenizers

from support.errors import InputError, python, require, check_fields, is_file, read_json, write_json

MARKER = "<|response_start|>"  # the paper's
PROMPT_FORMAT = "<|user|>\n{question}\n<|assistant|>\n"  # of Tulu, which the paper trains on
CHAT = "chat"  # the prompt format of the model directory's own chat template

# Parts of the names of unused tokens in Llama 3, Gemma and Mistral's two tokenizers.
RESERVED = ("reserved", "unused", "[control_", "<special_")


# ---- tokenizer
class Tokenizer:
    """The tokenizer of a Hugging Face directory, with eos, bos, marker and prompt format.

    marker, prompt_format: None means those of the directory's nrt.json, which `save` writes; the
    paper's if there is none. InputError if tokenizer.json cannot be read or there is no eos.

    Attributes:
        eos_ids    the tokens that end an answer; gold answers end with the first one
        prefix     the ids that start every prompt: [bos], or [] for a tokenizer without
        marker_id  the token that ends a trace
        cut_ids    tokens that stop sampling a trace without being the marker
    """

    def __init__(
        self, path: str | Path, marker: str | None = None, prompt_format: str | None = None
    ) -> None:
        self.path = Path(path)
        # All files are read here: a run may outlive the directory it began from.
        config, saved, self.files = read_directory(self.path)
        self.trained_marker: str | None = saved.get("marker")  # None: not trained here
        self.marker = marker or saved.get("marker") or MARKER
        self.prompt_format = prompt_format or saved.get("prompt_format") or PROMPT_FORMAT
        for flag, value in (("marker", self.marker), ("prompt-format", self.prompt_format)):
            require(is_text(value), f"--{flag} {value!r} is not text (of {self.path}/nrt.json?)")
        own = own_template(self.path, self.files["tokenizer_config.json"])
        chosen = prompt_format or saved.get("prompt_format")
        self.note = ""  # a line to print
        if own and not chosen:
            self.note = (
                f"note: {self.path} has a chat template: --prompt-format chat prompts with it\n"
            )
        has_question = "{question}" in self.prompt_format or self.prompt_format == CHAT
        require(has_question, f"--prompt-format {self.prompt_format!r} lacks {{question}}")
        self.model: tokenizers.Tokenizer = load_tokenizer(self.path / "tokenizer.json")
        self.eos_ids = find_eos(self.path, config, self.files, self.model)
        self.eos: str = self.model.id_to_token(self.eos_ids[0])
        # Llama's and Mistral's tokenizers put bos in front of every text, some put eos behind it.
        self.prefix = [token for token in self.model.encode("").ids if token not in self.eos_ids]
        self.bos = "".join(self.model.id_to_token(token) for token in self.prefix)
        self.own_template = own
        if self.prompt_format == CHAT:
            self.prompter = make_prompter(own, self.path, self.bos, self.eos)

        # A new marker needs a new row of the embedding. A reserved one has a row that was never
        # trained, unless nrt.json says that this model was trained with it.
        rows = config.get("vocab_size") or math.inf  # of the embedding
        known = self.model.token_to_id(self.marker)
        self.marker_is_new = known is None or known >= rows
        unused_name = any(part in self.marker.lower() for part in RESERVED)
        self.marker_is_reserved = unused_name and self.marker != saved.get("marker")
        if known is None:
            token = tokenizers.AddedToken(self.marker, special=False, normalized=False)
            self.model.add_tokens([token])
        self.marker_id: int = self.model.token_to_id(self.marker)
        # Software that drops special tokens from its text could not tell the answer from the trace.
        self.model = with_ordinary_token(self.model, self.marker_id)
        require(
            self.marker_id not in self.eos_ids,
            f"--marker {self.marker!r} is an eos token of {self.path / 'tokenizer.json'}: "
            "it cannot start the answer and end it",
        )
        # A special token within a trace would start another turn or end the text.
        added = self.model.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        self.cut_ids = sorted((special | set(self.eos_ids)) - {self.marker_id})
        if self.marker_is_new:
            rows = max(rows, self.marker_id + 1)  # the embedding grows
        check_ids(self.path, self.model, [self.eos_ids[0], *self.prefix], rows)
        # Special tokens that a text spells out become tokens, as other software has it too.
        # Tokens without a row are refused (Pairs): of added ones a model may have fewer.
        self.without_row = {entry.content for token, entry in added.items() if token >= rows}
        names = {entry.content for token, entry in added.items() if token in special}
        names |= {self.marker} if self.marker_id in added else set()
        self.special_names = {name for name in names | self.without_row if name}
        self.patterns = by_first_letter(self.special_names)

    def prompt_ids(self, turns: list[str]) -> list[int]:
        """[user, assistant, ..., user] -> the prompt, in the prompt format."""
        if self.prompt_format == CHAT:
            return self.encode_prompt(self.prompter(turns).removeprefix(self.bos))
        return self.encode_prompt(render(turns, self.prompt_format, self.eos))

    def spells_out(self, text: str) -> bool:
        """Whether the text holds a special token's name: it becomes that token."""
        found = (letter in text and names.search(text) for letter, names in self.patterns.items())
        return any(found)

    def encode_prompt(self, text: str) -> list[int]:
        return self.prefix + self.model.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        ids = self.model.encode(text, add_special_tokens=False).ids
        eos = self.eos_ids[0]
        return ids if ids[-1:] == [eos] else [*ids, eos]  # some data has eos in its text

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text for people and for exact match, never for scoring. special: show special tokens."""
        return self.model.decode(ids, skip_special_tokens=not special)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer, the marker among its tokens, into a model directory.

        With it go nrt.json (marker, prompt format), a chat template that makes the prompts that
        `render` makes, and the other files of the directory that tokenizers and samplers read.
        """
        own = {"marker": self.marker, "prompt_format": self.prompt_format}
        write_directory(Path(path), self.model, self.files, self.chat_template(), self.marker_id)
        write_json(Path(path) / "nrt.json", own)

    def chat_template(self) -> str:
        """`encode_prompt(render(...))` as the Jinja template that other software applies."""
        if self.prompt_format == CHAT:
            return self.own_template
        return template_of(self.prompt_format, self.bos, self.eos)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens of every row."""
        ours, theirs = (
            (made.model.to_str(), made.eos_ids, made.marker, made.prompt_format)
            for made in (self, other)
        )
        return ours == theirs


def render(turns: list[str], prompt_format: str, eos: str) -> str:
    """The prompt as text: format(question) answer eos newline, ..., format(last question).

    Conversations are laid out as in Tulu. The tokenizer turns the text of eos into its token, as
    it does with any special token in a text. str.replace, as questions may contain braces.
    """
    text = ""
    for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
        text += prompt_format.replace("{question}", question) + answer + eos + "\n"
    return text + prompt_format.replace("{question}", turns[-1])


# ---- a directory
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


# ---- chat templates
Prompter = Callable[[list[str]], str]  # [user, assistant, ..., user] -> the prompt as text


def own_template(path: Path, described: dict) -> str:
    """The directory's chat template, "" if it has none. described: its tokenizer_config.json."""
    file = path / "chat_template.jinja"
    try:
        own = file.read_text("utf-8") if is_file(file) else described.get("chat_template")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as text: {error}") from None
    return own if isinstance(own, str) else ""


def make_prompter(template: str, path: Path, bos: str, eos: str) -> Prompter:
    """InputError where there is no template or no jinja2, or the template does not work."""
    require(template != "", f"--prompt-format chat: {path} has no chat template")
    install = f"{python()} -m pip install jinja2"
    require(find_spec("jinja2") is not None, f"--prompt-format chat needs jinja2 ({install})")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:  # templates call it where they refuse a message
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception

    def prompt(turns: list[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        return compiled.render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )

    try:
        compiled = environment.from_string(template)
        shown = prompt(["a question"])
    except Exception as error:  # Jinja's own errors, and those of Python inside a template
        raise InputError(f"{path}: its chat template fails: {error}") from None
    require("a question" in shown, f"{path}: its chat template drops the question")
    return prompt


def template_of(prompt_format: str, bos: str, eos: str) -> str:
    """The template that makes the prompts of a prompt format with {question} (data.render).

    A model that continues its prompts writes trace, marker, answer. A Jinja string literal reads as
    in JSON, so that any prompt format can be one. A template writes bos itself.
    """
    pieces = [literal(piece) for piece in prompt_format.split("{question}")]
    question = " + text + ".join(pieces)
    answer = "text + " + literal(eos + "\n")
    blank = literal("\n\n")
    return "".join(
        [
            "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}",
            f"{{%- set system = messages[0].content + {blank}"
            " if messages[0].role == 'system' else '' -%}",
            f"{{{{- {literal(bos)} -}}}}",
            "{%- for turn in turns -%}",
            "{%- set text = ((system if loop.first else '') + turn.content) | trim -%}",
            f"{{%- if turn.role == 'user' -%}}{{{{- {question} -}}}}",
            f"{{%- else -%}}{{{{- {answer} -}}}}{{%- endif -%}}",
            "{%- endfor -%}",
        ]
    )


def literal(text: str) -> str:
    """A string literal in Jinja."""
    return json.dumps(text, ensure_ascii=False)
