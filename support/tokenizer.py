"""The tokenizer of a Hugging Face directory: special tokens, marker, prompt, chat template, export.

    tokenizer = Tokenizer("DIR", marker=None, prompt_format=None)
    tokenizer.prompt_ids(["a question"])      prompt in the prompt format, after bos if there is one
    tokenizer.encode_answer("an answer")      answer, eos
    tokenizer.save("R/final")                 the directory again, with the marker in it

The marker is one token, which ends a trace. Where the vocabulary lacks it, it is added at the end.
A prompt format is one string with {question}, or "chat" for the directory's own chat template. A
prompt is rendered as text, bos included, and tokenized as it is, as transformers does it. The
export has a chat template that renders the prompts of training, so that other software prompts the
model as it was trained.

Several files name tokens. tokenizer.json says what a token is; tokenizer_config.json says which one
is bos, eos, pad ...; what it names beyond tokenizer.json is added, as in transformers. The export
has each fact once, and a class that reads tokenizer.json as it is.
"""

import json
import math
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import tokenizers

from support.errors import python, read_json, refusing, require, write_json

MARKER = "<|response_start|>"  # the paper's
PROMPT_FORMAT = "<|user|>\n{question}\n<|assistant|>\n"  # of Tulu, which the paper trains on
CHAT = "chat"  # the prompt format of the model directory's own chat template

# Parts of the names of unused tokens in Llama 3, Gemma and Mistral's two tokenizers.
RESERVED = ("reserved", "unused", "[control_", "<special_")
# Fields of tokenizer_config.json that might contradict the exported tokenizer.json.
NOT_EXPORTED = ("added_tokens_decoder", "extra_special_tokens", "auto_map", "split_special_tokens")


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
        config, saved, self.generation, self.described, named = (
            read_json(self.path / f"{name}.json")
            for name in "config nrt generation_config tokenizer_config special_tokens_map".split()
        )
        if "added_tokens_decoder" not in self.described:  # else transformers ignores the older file
            self.described |= named
        self.model: tokenizers.Tokenizer = load_tokenizer(self.path / "tokenizer.json")
        with refusing(self.path / "tokenizer_config.json"):
            self.named = special_tokens(self.described)
            self.add_named_tokens()
        with refusing(self.path):
            self.eos_ids = self.find_eos(config)
        self.eos: str = self.model.id_to_token(self.eos_ids[0])
        # Llama's and Mistral's tokenizers put bos in front of every text.
        start = self.model.encode("a")
        length = next((i for i, text in enumerate(start.sequence_ids) if text == 0), 0)
        self.prefix = start.ids[:length]
        self.bos = "".join(self.model.id_to_token(token) for token in self.prefix)

        self.own_template = own_template(self.path, self.described)
        chosen = prompt_format or saved.get("prompt_format")
        note = f"note: {path} has a chat template: --prompt-format chat prompts with it\n"
        self.note = note if self.own_template and not chosen else ""
        self.prompt_format: str = chosen or PROMPT_FORMAT
        if self.prompt_format == CHAT:
            self.chat = make_chat(self.own_template, self.path, self.named)
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

    def add_named_tokens(self) -> None:
        """Adds what tokenizer_config.json names and tokenizer.json lacks, as transformers does."""
        listed = self.described.get("added_tokens_decoder") or {}
        tokens = [tokenizers.AddedToken(**listed[i]) for i in sorted(listed, key=int)]
        tokens += [tokenizers.AddedToken(text, special=True) for text in self.named.values()]
        known = {token.content for token in self.model.get_added_tokens_decoder().values()}
        self.model.add_tokens([token for token in tokens if token.content not in known])

    def find_eos(self, config: dict) -> list[int]:
        """All eos ids: tokenizer_config.json names the first, the model's configs may add more."""
        eos = self.named.get("eos_token")
        found = [] if eos is None else [self.model.token_to_id(eos)]
        for values in (self.generation, config):
            ids = values.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        found = [token for token in found if token is not None]
        require(
            bool(found),
            f"{self.path}: no eos token: neither tokenizer_config.json (eos_token) "
            "nor config.json (eos_token_id) names one",
        )
        known = self.model.id_to_token(found[0]) is not None
        require(known, f"{self.path}: eos is token {found[0]}, which tokenizer.json does not have")
        return list(dict.fromkeys(found))  # without duplicates, in this order

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
            self.marker_id not in [*self.eos_ids, *self.prefix],
            f"--marker {self.marker!r} is an eos or bos token of {self.path / 'tokenizer.json'}: "
            "it cannot end the trace and have another meaning",
        )
        ids = list(self.model.get_vocab().values())
        require(
            len(set(ids)) == len(ids),
            f"{self.path / 'tokenizer.json'}: two tokens have one id: ids are missing in its "
            "vocabulary; take a --marker that it has, or fill the gaps",
        )
        added = self.model.get_added_tokens_decoder()
        if self.marker_id in added and added[self.marker_id].special:
            # Software that drops special tokens from its text could not tell answer from trace.
            added[self.marker_id].special = False
            self.model.add_tokens([added[self.marker_id]])
            self.model = tokenizers.Tokenizer.from_str(self.model.to_str())  # else it is still one
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
        special = {token for token, entry in added.items() if entry.special}
        self.cut_ids = sorted((special | set(self.eos_ids)) - {self.marker_id})

        self.without_row = {entry.content for token, entry in added.items() if token >= rows}
        named = special | {self.marker_id}
        names = {entry.content for token, entry in added.items() if token in named}
        self.names = names | self.without_row
        self.letters = {name[0] for name in self.names}  # looked for first: few texts have one

    # ---- text to ids and back
    def prompt_ids(self, turns: list[str]) -> list[int]:
        """[user, assistant, ..., user] -> the prompt, in the prompt format."""
        return self.encode(self.prompt_text(turns))

    def prompt_text(self, turns: list[str]) -> str:
        """The same as text, bos included.

        A conversation is laid out as in Tulu: format(question) answer eos newline, ...,
        format(last question). The tokenizer turns the text of eos into its token, as it does with
        any special token in a text. str.replace, as questions may contain braces.
        """
        if self.prompt_format == CHAT:
            return self.chat(turns)
        text = self.bos
        for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
            text += self.prompt_format.replace("{question}", question) + answer + self.eos + "\n"
        return text + self.prompt_format.replace("{question}", turns[-1])

    def encode_prompt(self, text: str) -> list[int]:
        """A text as the tokenizer starts texts, with bos."""
        return self.encode(self.bos + text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it is."""
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        ids = self.encode(text)
        eos = self.eos_ids[0]
        return ids if ids[-1:] == [eos] else [*ids, eos]  # some data has eos in its text

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text for people and for exact match, never for scoring. special: show special tokens."""
        return self.model.decode(ids, skip_special_tokens=not special)

    def spells_out(self, text: str) -> bool:
        """Whether the text holds a special token's name: it becomes that token."""
        found = any(letter in text for letter in self.letters)
        return found and any(name in text for name in self.names)

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
        `prompt_ids` makes, and generation_config.json, with all ids that end an answer.
        """
        path, own = Path(path), self.prompt_format == CHAT
        described = {k: v for k, v in self.described.items() if k not in NOT_EXPORTED} | self.named
        described["additional_special_tokens"] = [
            described.pop(n) for n in self.named if n.isdigit()
        ]
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        template = template_of(self.prompt_format, self.bos, self.eos)
        described["chat_template"] = self.own_template if own else template
        write_json(path / "tokenizer_config.json", described)
        self.model.save(str(path / "tokenizer.json"))
        stops = {"eos_token_id": self.eos_ids}
        write_json(path / "generation_config.json", self.generation | stops)
        write_json(path / "nrt.json", {"marker": self.marker, "prompt_format": self.prompt_format})


# ---- reading a directory
def special_tokens(described: dict) -> dict[str, str]:
    """What tokenizer_config.json names: {"bos_token": text, ..., "0": text without a name, ...}."""
    extra = described.get("extra_special_tokens") or described.get("additional_special_tokens")
    if not isinstance(extra, dict):
        extra = {str(i): token for i, token in enumerate(extra or [])}
    named = {name: token for name, token in described.items() if name.endswith("_token")} | extra
    found = {}
    for name, token in named.items():
        if token is not None and not isinstance(token, bool):  # add_bos_token is a switch
            found[name] = token["content"] if isinstance(token, dict) else token
    return found


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    require(
        file.is_file(),
        f"{file}: no such file; for a model of the hub, first "
        "`hf download ORGANISATION/NAME --local-dir DIR`, then --model DIR",
    )
    with refusing(f"{file}: not a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # Some published files contain the padding and truncation that a training run used.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("A text: 1, 2 é \n")  # some mistakes show only here
    return tokenizer


# ---- chat templates
def own_template(path: Path, described: dict) -> str:
    """The directory's chat template, "" if it has none. described: its tokenizer_config.json."""
    file = path / "chat_template.jinja"
    with refusing(file):
        own = file.read_text("utf-8") if file.is_file() else described.get("chat_template")
    if isinstance(own, list):  # several, of which this one is for prompts without tools
        own = {named["name"]: named["template"] for named in own}.get("default")
    return own or ""


def make_chat(template: str, path: Path, named: dict[str, str]) -> Callable[[list[str]], str]:
    """-> a function [user, assistant, ..., user] -> the prompt as text, by the template.

    The template sees what transformers shows it. named: {"bos_token": text, ...}.
    """
    require(template != "", f"--prompt-format chat: {path} has no chat template named default")
    with refusing(f"--prompt-format chat needs jinja2 ({python()} -m pip install jinja2)"):
        from jinja2 import TemplateError, ext, nodes, parser, sandbox

    class Generation(
        ext.Extension
    ):  # {% generation %} marks what a model has written; no effect here
        tags = frozenset(["generation"])

        def parse(self, source: parser.Parser) -> nodes.Node:
            line = next(source.stream).lineno
            body = source.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:  # templates call it where they refuse a message
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    fails = f"{path}: its chat template fails"
    with refusing(fails):
        compiled = environment.from_string(template)
    given = named | {"tools": None, "documents": None, "add_generation_prompt": True}

    def chat(turns: list[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        with refusing(fails):
            return compiled.render(messages=messages, **given)

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
