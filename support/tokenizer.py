"""The tokenizer of a Hugging Face directory: special tokens, marker, prompt, chat template, export.

    tokenizer = Tokenizer("DIR", marker=None, prompt_format=None)
    tokenizer.prompt_ids(["a question"])      prompt in the prompt format, after bos if there is one
    tokenizer.encode_answer("an answer")      answer, eos
    tokenizer.save("R/final")                 the directory again, with the marker in it

The marker is one token, which ends a trace. Where the vocabulary lacks it, it is added at the end.
A prompt format is one string with {question}, or "chat" for the directory's own chat template. The
export has a chat template that makes the prompts of training, so that other software prompts the
model as it was trained.
"""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import tokenizers

from support.errors import python, read_json, refusing, require, write_json

MARKER = "<|response_start|>"  # the paper's
PROMPT_FORMAT = "<|user|>\n{question}\n<|assistant|>\n"  # of Tulu, which the paper trains on
CHAT = "chat"  # the prompt format of the model directory's own chat template

# Parts of the names of unused tokens in Llama 3, Gemma and Mistral's two tokenizers.
RESERVED = ("reserved", "unused", "[control_", "<special_")
# Files of a model directory that other software reads beside tokenizer.json, copied with it.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Tokenizer:
    """The tokenizer of a Hugging Face directory, with eos, bos, marker and prompt format.

    marker, prompt_format: None means those of the directory's nrt.json, which `save` writes; the
    paper's if there is none. InputError if tokenizer.json cannot be read, if there is no eos, or if
    marker, prompt format and tokens do not fit together.

    Attributes:
        eos_ids             the tokens that end an answer; gold answers end with the first one
        prefix              the ids that start every prompt: [bos], or [] for a tokenizer without
        marker_id           the token that ends a trace
        marker_is_new       the embedding has no row for it
        marker_is_reserved  its row was never trained
        trained_marker      the marker that the model was trained with here, or None
        cut_ids             tokens that stop sampling a trace without being the marker
        without_row         texts of added tokens that have no row in the embedding
        note                a line to print, or ""
    """

    def __init__(
        self, path: str | Path, marker: str | None = None, prompt_format: str | None = None
    ) -> None:
        self.path = Path(path)
        # All files are read here: a run may outlive the directory it began from.
        config, saved = (read_json(self.path / name) for name in ("config.json", "nrt.json"))
        self.files = {name: read_json(self.path / name) for name in SIDE_FILES}
        self.model: tokenizers.Tokenizer = load_tokenizer(self.path / "tokenizer.json")
        with refusing(self.path):
            self.eos_ids = find_eos(self.path, config, self.files, self.model)
        self.eos: str = self.model.id_to_token(self.eos_ids[0])
        # Llama's and Mistral's tokenizers put bos in front of every text, some put eos behind it.
        self.prefix = [token for token in self.model.encode("").ids if token not in self.eos_ids]
        self.bos = "".join(self.model.id_to_token(token) for token in self.prefix)

        self.own_template = own_template(self.path, self.files["tokenizer_config.json"])
        chosen = prompt_format or saved.get("prompt_format")
        self.note = ""
        if self.own_template and not chosen:
            self.note = (
                f"note: {self.path} has a chat template: --prompt-format chat prompts with it\n"
            )
        self.prompt_format: str = chosen or PROMPT_FORMAT
        if self.prompt_format == CHAT:
            self.chat = make_chat(self.own_template, self.path, self.bos, self.eos)
        with refusing(f"--prompt-format {self.prompt_format!r} (or that of {self.path}/nrt.json)"):
            shown = self.prompt_text(["a question"])
            self.model.encode(shown)  # fails for half a character
        require(
            "a question" in shown,
            f"--prompt-format {self.prompt_format!r} drops the question: it lacks {{question}}, "
            f"or the chat template of {self.path} leaves it out",
        )

        self.trained_marker: str | None = saved.get("marker")
        self.marker: str = marker or self.trained_marker or MARKER
        with refusing(f"--marker {self.marker!r} (or that of {self.path}/nrt.json)"):
            self.add_marker(config.get("vocab_size") or math.inf)

    def add_marker(self, rows: float) -> None:
        """Sets the marker's attributes and what depends on them. rows: of the embedding."""
        known = self.model.token_to_id(self.marker)
        self.marker_is_new = known is None or known >= rows
        unused_name = any(part in self.marker.lower() for part in RESERVED)
        self.marker_is_reserved = unused_name and self.marker != self.trained_marker
        if known is None:
            token = tokenizers.AddedToken(self.marker, special=False, normalized=False)
            self.model.add_tokens([token])
        self.marker_id: int = self.model.token_to_id(self.marker)
        require(
            self.marker_id not in self.eos_ids,
            f"--marker {self.marker!r} is an eos token of {self.path / 'tokenizer.json'}: "
            "it cannot start the answer and end it",
        )
        self.model = with_ordinary_token(self.model, self.marker_id)
        if self.marker_is_new:
            rows = max(rows, self.marker_id + 1)  # the embedding grows
        # Any text may need these. Of the added tokens a model may have fewer rows: Pairs refuses
        # the rows of a file that spell out one without.
        ordinary = self.model.get_vocab(with_added_tokens=False).values()
        highest = max([self.eos_ids[0], *self.prefix, *ordinary])
        require(
            highest < rows,
            f"{self.path / 'tokenizer.json'}: has a token {highest}, config.json says vocab_size "
            f"{rows}: the model is not this tokenizer's",
        )
        # A special token within a trace would start another turn or end the text.
        added = self.model.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        self.cut_ids = sorted((special | set(self.eos_ids)) - {self.marker_id})

        self.without_row = {entry.content for token, entry in added.items() if token >= rows}
        named = special | {self.marker_id}
        names = {entry.content for token, entry in added.items() if token in named}
        names = sorted(names | self.without_row)
        # With a common first letter, a search is many times as fast.
        self.patterns = {
            letter: re.compile("|".join(map(re.escape, group)))
            for letter, group in groupby(names, key=lambda name: name[0])
        }

    # ---- text to ids and back
    def prompt_ids(self, turns: list[str]) -> list[int]:
        """[user, assistant, ..., user] -> the prompt, in the prompt format."""
        return self.encode_prompt(self.prompt_text(turns))

    def prompt_text(self, turns: list[str]) -> str:
        """The same as text, without bos.

        A conversation is laid out as in Tulu: format(question) answer eos newline, ...,
        format(last question). The tokenizer turns the text of eos into its token, as it does with
        any special token in a text. str.replace, as questions may contain braces.
        """
        if self.prompt_format == CHAT:
            return self.chat(turns).removeprefix(self.bos)
        text = ""
        for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
            text += self.prompt_format.replace("{question}", question) + answer + self.eos + "\n"
        return text + self.prompt_format.replace("{question}", turns[-1])

    def encode_prompt(self, text: str) -> list[int]:
        return self.prefix + self.model.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        ids = self.model.encode(text, add_special_tokens=False).ids
        eos = self.eos_ids[0]
        return ids if ids[-1:] == [eos] else [*ids, eos]  # some data has eos in its text

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text for people and for exact match, never for scoring. special: show special tokens."""
        return self.model.decode(ids, skip_special_tokens=not special)

    def spells_out(self, text: str) -> bool:
        """Whether the text holds a special token's name: it becomes that token."""
        found = (letter in text and names.search(text) for letter, names in self.patterns.items())
        return any(found)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens of every row."""
        ours, theirs = (
            (made.model.to_str(), made.eos_ids, made.marker, made.prompt_format)
            for made in (self, other)
        )
        return ours == theirs

    # ---- export
    def save(self, path: str | Path) -> None:
        """Writes the tokenizer, the marker among its tokens, into a model directory.

        With it go nrt.json (marker, prompt format), a chat template that makes the prompts that
        `prompt_ids` makes, and the other files of the directory that tokenizers and samplers read.
        """
        path = Path(path)
        described = self.files["tokenizer_config.json"] | {"chat_template": self.chat_template()}
        described.get("added_tokens_decoder", {}).get(str(self.marker_id), {})["special"] = False
        for name, values in (self.files | {"tokenizer_config.json": described}).items():
            if values:
                write_json(path / name, values)
        self.model.save(str(path / "tokenizer.json"))
        write_json(path / "nrt.json", {"marker": self.marker, "prompt_format": self.prompt_format})

    def chat_template(self) -> str:
        """The prompt format as the Jinja template that other software applies."""
        if self.prompt_format == CHAT:
            return self.own_template
        return template_of(self.prompt_format, self.bos, self.eos)


# ---- reading a directory
def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    require(
        file.parent.is_dir(),
        f"{file.parent}: no such directory; for a model of the hub, first "
        "`hf download ORGANISATION/NAME --local-dir DIR`, then --model DIR",
    )
    found = file.is_file()
    require(found, f"{file}: no such file; a Hugging Face directory with a fast tokenizer has one")
    with refusing(f"{file}: not a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # Some published files contain the padding and truncation that a training run used.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("A text: 1, 2 é \n")  # some mistakes show only here
    return tokenizer


def find_eos(
    path: Path, config: dict, files: dict[str, dict], tokenizer: tokenizers.Tokenizer
) -> list[int]:
    """All eos ids: tokenizer_config.json names the first, the model's configs may add more."""
    named = files["tokenizer_config.json"].get("eos_token")
    if isinstance(named, dict):  # an AddedToken written as an object
        named = named["content"]
    found = [] if named is None else [tokenizer.token_to_id(named)]
    for values in (files["generation_config.json"], config):
        ids = values.get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    found = [token for token in found if token is not None]
    require(
        bool(found),
        f"{path}: no eos token: neither tokenizer_config.json (eos_token) "
        "nor config.json (eos_token_id) names one",
    )
    known = tokenizer.id_to_token(found[0]) is not None
    require(known, f"{path}: eos is token {found[0]}, which tokenizer.json does not have")
    return list(dict.fromkeys(found))  # without duplicates, in this order


def with_ordinary_token(tokenizer: tokenizers.Tokenizer, token: int) -> tokenizers.Tokenizer:
    """The same tokenizer, in which `token` is not special: decoding never drops it.

    Software that drops special tokens from its text could not tell the answer from the trace.
    """
    entry = tokenizer.get_added_tokens_decoder().get(token)
    if entry is None or not entry.special:
        return tokenizer
    made = json.loads(tokenizer.to_str())
    for added in made["added_tokens"]:
        added["special"] &= added["id"] != token
    return tokenizers.Tokenizer.from_str(json.dumps(made))


# ---- chat templates
def own_template(path: Path, described: dict) -> str:
    """The directory's chat template, "" if it has none. described: its tokenizer_config.json."""
    file = path / "chat_template.jinja"
    with refusing(file):
        own = file.read_text("utf-8") if file.is_file() else described.get("chat_template")
    return own if isinstance(own, str) else ""


def make_chat(template: str, path: Path, bos: str, eos: str) -> Callable[[list[str]], str]:
    """-> a function [user, assistant, ..., user] -> the prompt as text, by the template."""
    require(template != "", f"--prompt-format chat: {path} has no chat template")
    with refusing(f"--prompt-format chat needs jinja2 ({python()} -m pip install jinja2)"):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:  # templates call it where they refuse a message
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    fails = f"{path}: its chat template fails"
    with refusing(fails):
        compiled = environment.from_string(template)

    def chat(turns: list[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        with refusing(fails):
            return compiled.render(
                messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
            )

    return chat


def template_of(prompt_format: str, bos: str, eos: str) -> str:
    """The template that makes the prompts of a prompt format with {question}, and bos itself.

    A model that continues its prompts writes trace, marker, answer. A Jinja string literal reads as
    in JSON, so that any prompt format can be one.
    """
    literal = partial(json.dumps, ensure_ascii=False)
    blank = literal("\n\n")
    question = " + text + ".join(map(literal, prompt_format.split("{question}")))
    answer = "text + " + literal(eos + "\n")
    return (
        "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
        f"{{%- set system = messages[0].content + {blank}"
        " if messages[0].role == 'system' else '' -%}"
        f"{{{{- {literal(bos)} -}}}}"
        "{%- for turn in turns -%}"
        "{%- set text = ((system if loop.first else '') + turn.content) | trim -%}"
        f"{{%- if turn.role == 'user' -%}}{{{{- {question} -}}}}"
        f"{{%- else -%}}{{{{- {answer} -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )
