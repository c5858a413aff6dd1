"""The tokenizer of a Hugging Face directory: special tokens, marker, prompt, chat template, export.

    tokenizer = Tokenizer("DIR", marker=None, prompt_format=None)
    tokenizer.prompt_ids(["a question"])      prompt in the prompt format, after bos if there is one
    tokenizer.encode_answer("an answer")      answer, eos
    tokenizer.save("R/final")                 the directory again, with the marker in it

The marker is one token, which ends a trace. Where the vocabulary lacks it, it is added at the end.
A prompt format is one string with {question}, or "chat" for the directory's own chat template. A
prompt is rendered as text, with bos, and tokenized as it is. The export's chat template renders
the same text, so that other software prompts the model as it was trained.

tokenizer.json says what the tokens are; tokenizer_config.json names bos, eos and others, and what
it lists beyond tokenizer.json is added, as in transformers. The export has each fact once.
"""

import json
import math
import re
from datetime import datetime
from functools import partial
from pathlib import Path

import tokenizers

from support.errors import python, read_json, refusing, require, write_json

MARKER = "<|response_start|>"  # the paper's
PROMPT_FORMAT = "<|user|>\n{question}\n<|assistant|>\n"  # of Tulu, which the paper trains on
CHAT = "chat"  # the prompt format of the model directory's own chat template
# What transformers shows a template beside messages and special tokens.
CHAT_OPTIONS = {"tools": None, "documents": None, "add_generation_prompt": True}

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
        config = read_json(self.path / "config.json")
        saved = read_json(self.path / "nrt.json")
        self.generation = read_json(self.path / "generation_config.json")
        self.described = read_json(self.path / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.described:
            # transformers reads the older file then
            self.described |= read_json(self.path / "special_tokens_map.json")
        self.model: tokenizers.Tokenizer = load_tokenizer(self.path / "tokenizer.json")
        with refusing(self.path):
            self.named = add_named_tokens(self.model, self.described)
            self.eos_ids = find_eos(self.path, self.model, self.named, self.generation, config)
        self.eos: str = self.model.id_to_token(self.eos_ids[0])
        # Llama's and Mistral's tokenizers put bos in front of every text.
        start = self.model.encode("a")
        of_text = [sequence == 0 for sequence in start.sequence_ids]
        length = of_text.index(True) if any(of_text) else 0
        self.prefix = start.ids[:length]
        self.bos = "".join(self.model.id_to_token(token) for token in self.prefix)
        added = self.model.get_added_tokens_decoder()
        hidden = [self.model.id_to_token(token) for token in self.prefix if token not in added]
        self.model.add_special_tokens(hidden)  # a prompt is a text: bos has to be a token there

        self.own_template = own_template(self.path, self.described)
        chosen = prompt_format or saved.get("prompt_format")
        self.note = ""
        if self.own_template and not chosen:
            use = "--prompt-format chat prompts with it"
            self.note = f"note: {path} has a chat template: {use}\n"
        self.prompt_format: str = chosen or PROMPT_FORMAT
        if self.prompt_format == CHAT:
            self.chat = compile_template(self.own_template, self.path)
        flag = f"--prompt-format {self.prompt_format!r} (or that of {self.path}/nrt.json)"
        with refusing(flag):
            shown = self.prompt_text(["a question"])
            self.model.encode(shown)  # fails for half a character
        lacks = "it lacks {question}, or the chat template leaves it out"
        require("a question" in shown, f"{flag} drops the question: {lacks}")

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
        self.model = with_marker(self.model, self.marker)
        self.marker_id: int = self.model.token_to_id(self.marker)
        free = self.marker_id not in [*self.eos_ids, *self.prefix]
        require(free, f"--marker {self.marker!r} is an eos or bos token of {self.path}")
        if self.marker_is_new:
            self.note += f"note: {self.path} lacks the marker {self.marker!r}: it gets that token\n"
            rows = max(rows, self.marker_id + 1)  # the embedding grows
        # Any text may need these. Of the added tokens a model may have fewer rows: Pairs refuses
        # the rows of a file that spell out one without.
        ordinary = self.model.get_vocab(with_added_tokens=False).values()
        highest = max([self.eos_ids[0], *self.prefix, *ordinary])
        text = f"{self.path}: has a token {highest}, config.json says vocab_size {rows}"
        require(highest < rows, f"{text}: the model is not this tokenizer's")
        added = self.model.get_added_tokens_decoder()
        # A special token within a trace would start another turn or end the text.
        special = {token for token, entry in added.items() if entry.special}
        self.cut_ids = sorted((special | set(self.eos_ids)) - {self.marker_id})

        self.without_row = {entry.content for token, entry in added.items() if token >= rows}
        named = special | {self.marker_id}
        names = {entry.content for token, entry in added.items() if token in named}
        # What a text spells out becomes the token.
        self.spelled = re.compile("|".join(map(re.escape, names | self.without_row)))

    # ---- text to ids and back
    def prompt_ids(self, turns: list[str]) -> list[int]:
        """[user, assistant, ..., user] -> the prompt, in the prompt format."""
        return self.encode_prompt(self.prompt_text(turns))

    def prompt_text(self, turns: list[str]) -> str:
        """The same as text, bos included.

        A conversation is laid out as in Tulu: format(question) answer eos newline, ...,
        format(last question). str.replace, as questions may contain braces.
        """
        if self.prompt_format == CHAT:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
            with refusing(f"{self.path}: its chat template fails"):
                return self.chat.render(messages=messages, **self.named, **CHAT_OPTIONS)
        text = self.bos
        for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
            text += self.prompt_format.replace("{question}", question) + answer + self.eos + "\n"
        return text + self.prompt_format.replace("{question}", turns[-1])

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text as it is."""
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        ids = self.encode_prompt(text)
        eos = self.eos_ids[0]
        return ids if ids[-1:] == [eos] else [*ids, eos]  # some data has eos in its text

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text for people and for exact match, never for scoring. special: show special tokens."""
        return self.model.decode(ids, skip_special_tokens=not special)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens of every row."""
        ours = (self.model.to_str(), self.eos_ids, self.marker, self.prompt_format)
        return ours == (other.model.to_str(), other.eos_ids, other.marker, other.prompt_format)

    # ---- export
    def save(self, path: str | Path) -> None:
        """Writes the tokenizer, the marker among its tokens, into a model directory.

        With it go nrt.json (marker, prompt format), a chat template that makes the prompts that
        `prompt_ids` makes, and generation_config.json, with all ids that end an answer.
        """
        path = Path(path)
        described = dict(self.described)
        for name in (*NOT_EXPORTED, *self.named):
            described.pop(name, None)
        # A marker that is named, as pad for instance, would be special again.
        named = {name: text for name, text in self.named.items() if text != self.marker}
        extra = [named.pop(name) for name in list(named) if name.isdigit()]
        described |= named | {"additional_special_tokens": extra}
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        described["model_input_names"] = ["input_ids", "attention_mask"]  # as the models' classes
        space = getattr(self.model.pre_tokenizer, "add_prefix_space", False)
        described["add_prefix_space"] = space  # transformers 4 would set it to False
        described["chat_template"] = self.chat_template()
        write_json(path / "tokenizer_config.json", dict(sorted(described.items())))
        self.model.save(str(path / "tokenizer.json"))
        stops = self.generation | {"eos_token_id": self.eos_ids}
        write_json(path / "generation_config.json", stops)
        write_json(path / "nrt.json", {"marker": self.marker, "prompt_format": self.prompt_format})

    def chat_template(self) -> str:
        """The prompt format as the Jinja template that other software applies."""
        if self.prompt_format == CHAT:
            return self.own_template
        return template_of(self.prompt_format, self.bos, self.eos)


# ---- reading a directory
def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    final = file.parent / "final"
    advice = "for a model of the hub, first `hf download ORGANISATION/NAME --local-dir DIR`"
    advice = f"the run's model is {final}" if final.exists() else f"{advice}, then --model DIR"
    require(file.is_file(), f"{file}: no such file; {advice}")
    with refusing(f"{file}: not a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_padding()  # some published files have those of a training run
        tokenizer.no_truncation()
        tokenizer.encode("A text: 1, 2 é \n")  # some mistakes show only here
    return tokenizer


def add_named_tokens(model: tokenizers.Tokenizer, described: dict) -> dict[str, str]:
    """-> the special tokens that tokenizer_config.json names: {"bos_token": text, ...}.

    Those without a name have a number. What tokenizer.json lacks is added, as in transformers.
    """
    extra = described.get("extra_special_tokens") or described.get("additional_special_tokens")
    if not isinstance(extra, dict):
        extra = {str(i): token for i, token in enumerate(extra or [])}
    named = {}
    for name, token in (described | extra).items():
        if token is None or isinstance(token, bool):  # add_bos_token, for instance
            continue
        if name in extra or name.endswith("_token"):
            named[name] = token["content"] if isinstance(token, dict) else token
    listed = described.get("added_tokens_decoder") or {}
    tokens = [tokenizers.AddedToken(**listed[i]) for i in sorted(listed, key=int)]
    tokens += [tokenizers.AddedToken(text, special=True) for text in named.values()]
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    model.add_tokens([token for token in tokens if token.content not in known])
    return named


def find_eos(path: Path, model: tokenizers.Tokenizer, named: dict, *configs: dict) -> list[int]:
    """All eos ids: tokenizer_config.json names the first, the model's configs may add more."""
    found = [model.token_to_id(named["eos_token"])] if "eos_token" in named else []
    for config in configs:
        ids = config.get("eos_token_id")
        if isinstance(ids, int):
            ids = [ids]
        found += ids or []
    names = "neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) names one"
    require(bool(found), f"{path}: no eos token: {names}")
    known = model.id_to_token(found[0]) is not None
    require(known, f"{path}: eos is token {found[0]}, which tokenizer.json does not have")
    return list(dict.fromkeys(found))  # without duplicates, in this order


def with_marker(tokenizer: tokenizers.Tokenizer, marker: str) -> tokenizers.Tokenizer:
    """The same tokenizer with `marker`: at the end, if it is new, and never special.

    Software that drops special tokens from its text could not tell the answer from the trace.
    """
    if tokenizer.token_to_id(marker) is None:
        tokenizer.add_tokens([tokenizers.AddedToken(marker, special=False, normalized=False)])
    file = json.loads(tokenizer.to_str())
    for token in file["added_tokens"]:
        token["special"] &= token["content"] != marker
    made = tokenizers.Tokenizer.from_str(json.dumps(file))
    ids = made.get_vocab()
    same = ids == tokenizer.get_vocab() and len(set(ids.values())) == len(ids)
    text = "tokenizer.json leaves out ids, and the library gives a new token that of another"
    require(same, f"{text}; take a --marker that it has")
    return made


# ---- chat templates
def own_template(path: Path, described: dict) -> str:
    """The directory's chat template, "" if it has none. described: its tokenizer_config.json."""
    file = path / "chat_template.jinja"
    with refusing(file):
        own = file.read_text("utf-8") if file.is_file() else described.get("chat_template")
    if isinstance(own, list):  # several, of which this one is for prompts without tools
        own = {named["name"]: named["template"] for named in own}.get("default")
    return own or ""


def compile_template(template: str, path: Path) -> object:
    """A chat template as a jinja2 Template, in an environment like transformers'."""
    require(template != "", f"--prompt-format chat: {path} has no chat template named default")
    with refusing(f"--prompt-format chat needs jinja2 ({python()} -m pip install jinja2)"):
        from jinja2 import TemplateError, sandbox

    def raise_exception(message: str) -> None:  # templates call it where they refuse a message
        raise TemplateError(message)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    made.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    # transformers' own tag marks what a model has written: a scope without a further effect.
    scopes = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", template)
    with refusing(f"{path}: its chat template fails"):
        return made.from_string(scopes)


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
