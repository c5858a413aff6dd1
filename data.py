"""Question-answer pairs, from JSONL on disk to token ids.

A row is {"question": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...]}, whose last assistant turn is the gold
answer. It becomes an Example:

    prompt ids = bos? + prompt format with {question} filled in        the model thinks after this
    answer ids = the gold answer + eos                                 scored, and trained, after the marker

Between the two stands the trace and the marker m, one token that ends thinking and starts the answer ("<|response_start|>" in the
paper). The gold answer is tokenised here, once; traces are never decoded and re-tokenised: what was sampled is what is scored.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers

from support.errors import InputError

MARKER = "<|response_start|>"  # the paper's
RESERVED = (
    "reserved",
    "unused",
    "[control_",
    "<special_",
)  # so are free tokens named: Llama 3, Gemma, Mistral's two tokenizers
PROMPT_FORMAT = "<|user|>\n{question}\n<|assistant|>\n"  # Tulu's, which the paper trains on


# ---------------------------------------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """A tokenizer.json, with what a Hugging Face directory says around it: eos ids, bos, marker, prompt format.

    marker, prompt_format: None takes what the directory's nrt.json says (written by `save`), else the paper's.
    InputError when tokenizer.json cannot be read or no eos is named anywhere.
    """

    def __init__(
        self, path: str | Path, marker: str | None = None, prompt_format: str | None = None
    ) -> None:
        self.path = Path(path)
        ours = self.read("nrt.json")
        self.marker = marker or ours.get("marker") or MARKER
        self.prompt_format = prompt_format or ours.get("prompt_format") or PROMPT_FORMAT
        if "{question}" not in self.prompt_format:
            raise InputError(f"--prompt-format {self.prompt_format!r} lacks {{question}}")
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise InputError(
                f"{file}: no such file; a Hugging Face directory with a fast tokenizer has one"
            )
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{file}: not a tokenizer: {error}") from None
        self.model.no_padding()
        self.model.no_truncation()  # some published files carry a training-time limit
        self.eos_ids = self.find_eos()
        self.eos: str = self.model.id_to_token(self.eos_ids[0]) or ""
        # What the tokenizer puts before every text: bos in Llama's and Mistral's, nothing in most others.
        self.prefix = [token for token in self.model.encode("").ids if token not in self.eos_ids]
        self.marker_is_new = self.model.token_to_id(self.marker) is None
        if self.marker_is_new:
            self.model.add_special_tokens(
                [tokenizers.AddedToken(self.marker, special=True, normalized=False)]
            )
        self.marker_id: int = self.model.token_to_id(self.marker)
        # A token kept free for uses like ours, and not yet in use: its embedding has never been trained.
        self.marker_is_reserved = self.marker != ours.get("marker") and any(
            word in self.marker.lower() for word in RESERVED
        )
        if self.marker_id in self.eos_ids:
            raise InputError(
                f"--marker {self.marker!r} is an eos token of {file}: it cannot start the answer and end it"
            )
        # Any of these ends a trace, though only the marker is a decision to answer (METHOD: every eos id counts, not just one).
        specials = {
            token for token, added in self.model.get_added_tokens_decoder().items() if added.special
        }
        self.cut_ids = sorted((specials | set(self.eos_ids)) - {self.marker_id})

    def read(self, name: str) -> dict:
        """The directory's JSON file `name`, {} if it has none."""
        file = self.path / name
        try:
            value = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: not readable as JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{file}: holds a {type(value).__name__}, it should be an object")
        return value

    def find_eos(self) -> list[int]:
        """Every eos id, the one to end gold answers with first: tokenizer_config.json names it, the model's configs may add others."""
        named = self.read("tokenizer_config.json").get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        found = [] if named is None else [self.model.token_to_id(named)]
        for file in ("generation_config.json", "config.json"):
            ids = self.read(file).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        found = list(dict.fromkeys(token for token in found if token is not None))
        if not found:
            raise InputError(
                f"{self.path}: no eos token: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) names one"
            )
        return found

    def encode_prompt(self, text: str) -> list[int]:
        return self.prefix + self.model.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        ids, eos = self.model.encode(text, add_special_tokens=False).ids, self.eos_ids[0]
        return ids if ids[-1:] == [eos] else [*ids, eos]  # some data spells its eos out

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text, for people and for exact match only: nothing that is scored passes through here. special: show special tokens."""
        return self.model.decode(ids, skip_special_tokens=not special)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json with the marker in it, nrt.json with marker and prompt format, what stood beside them, and a chat
        template that renders conversations as `render` does."""
        path = Path(path)
        for name in ("special_tokens_map.json", "generation_config.json"):
            if (self.path / name).exists():
                (path / name).write_bytes((self.path / name).read_bytes())
        self.model.save(str(path / "tokenizer.json"))
        described = self.read("tokenizer_config.json") | {"chat_template": self.chat_template()}
        (path / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
        (path / "nrt.json").write_text(
            json.dumps({"marker": self.marker, "prompt_format": self.prompt_format}, indent=2)
            + "\n"
        )

    def chat_template(self) -> str:
        """`encode_prompt(render(...))` as a Jinja template, which opens the trace: what a model continues from it is trace, marker, answer.

        A template writes its own bos. Jinja reads string literals as JSON does, so any prompt format can stand in one.
        """
        bos = "".join(self.model.id_to_token(token) for token in self.prefix)
        question = " + text + ".join(
            literal(piece) for piece in self.prompt_format.split("{question}")
        )
        return "".join(
            [
                "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}",
                "{%- set system = messages[0].content + "
                + literal("\n\n")
                + " if messages[0].role == 'system' else '' -%}",
                "{{- " + literal(bos) + " -}}",
                "{%- for turn in turns -%}",
                "{%- set text = ((system if loop.first else '') + turn.content) | trim -%}",
                "{%- if turn.role == 'user' -%}{{- "
                + question
                + " -}}{%- else -%}{{- text + "
                + literal(self.eos + "\n")
                + " -}}{%- endif -%}",
                "{%- endfor -%}",
            ]
        )


def literal(text: str) -> str:
    """A string as Jinja (and JSON) write it."""
    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Example:
    """One question-answer pair as the model sees it."""

    index: int  # row number in the file, which names the example's random streams
    prompt: list[int]
    answer: list[int]  # ends with eos
    question: str
    gold: str


class Pairs:
    """The rows of a JSONL file, read where they stand: only line offsets are kept, so the file may be larger than memory.

    Every row is checked once, up front: a bad row at line 150,000 stops the run before its first step, not in its tenth hour.
    InputError names file and line. Blank lines are skipped.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer) -> None:
        self.path, self.tokenizer = Path(path), tokenizer
        offsets, self.lines = [], []
        try:
            self.file = open(self.path, "rb")
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        offset = 0
        for number, line in enumerate(self.file, start=1):
            if line.strip():
                parse_row(line, f"{self.path}:{number}")
                offsets.append(offset)
            offset += len(line)
        if not offsets:
            raise InputError(f"{self.path}: holds no rows")
        self.offsets = np.array(offsets)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Example:
        self.file.seek(self.offsets[index])
        turns, gold = parse_row(self.file.readline(), f"{self.path}, row {index}")
        tokenizer = self.tokenizer
        prompt = tokenizer.encode_prompt(render(turns, tokenizer.prompt_format, tokenizer.eos))
        return Example(index, prompt, tokenizer.encode_answer(gold), question=turns[-1], gold=gold)


def parse_row(line: bytes, where: str) -> tuple[list[str], str]:
    """One JSONL line -> (turns, gold answer). turns alternates user, assistant, ..., user. `where` is "file:line" for errors."""
    try:
        row = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError is a ValueError; brackets can nest too deeply
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: holds a {type(row).__name__}, a row should be an object with question and answer"
        )
    if "messages" in row:
        turns = parse_messages(row["messages"], where)
    else:
        for key in ("question", "answer"):
            if key not in row:
                raise InputError(
                    f'{where}: no "{key}"; a row is {{"question": ..., "answer": ...}} or {{"messages": [...]}}'
                )
            if not isinstance(row[key], str):
                raise InputError(
                    f'{where}: "{key}" is a {type(row[key]).__name__}, it should be a string'
                )
        turns = [row["question"], row["answer"]]
    try:
        "".join(turns).encode()
    except UnicodeEncodeError:  # such text can be held in JSON, and in a str, but not be tokenised
        raise InputError(
            f"{where}: the text holds half a character (a lone \\ud800-\\udfff escape)"
        ) from None
    *turns, gold = (text.strip() for text in turns)
    if not gold:
        raise InputError(f"{where}: the answer is empty")
    if not turns[-1]:
        raise InputError(f"{where}: the question is empty")
    return turns, gold


def parse_messages(messages: object, where: str) -> list[str]:
    """A conversation up to its last assistant turn, as [user, assistant, ..., user, assistant]; a system turn opens the first user's."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise InputError(
            f'{where}: "messages" should be a list of {{"role": ..., "content": ...}} with strings'
        )
    system = [m["content"] for m in messages[:1] if m["role"] == "system"]
    roles = [m["role"] for m in messages[len(system) :]]
    turns = [m["content"] for m in messages[len(system) :]]
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    if last < 1 or any(
        role != ("user", "assistant")[i % 2] for i, role in enumerate(roles[: last + 1])
    ):
        raise InputError(
            f'{where}: "messages" should alternate user and assistant and hold an assistant turn; roles are {roles}'
        )
    turns[0] = "\n\n".join([*system, turns[0]])
    return turns[: last + 1]


def render(turns: list[str], prompt_format: str, eos: str) -> str:
    """The prompt text: earlier turns as "format(question) answer eos newline" (Tulu's way), then the last question."""
    text = ""
    for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
        text += prompt_format.replace("{question}", question) + answer + eos + "\n"
    return text + prompt_format.replace("{question}", turns[-1])


# ---------------------------------------------------------------------------------------------------------------- order
def row_at(position: int, rows: int, seed: int) -> int:
    """The row that stands at `position` of the endless shuffled stream: a new permutation each epoch, a function of (seed, epoch)."""
    return int(permutation(rows, seed, position // rows)[position % rows])


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def stream_seed(*names: int) -> int:
    """One 63-bit seed from (seed, step, question, ...): no random state is ever saved, so a resumed run draws what the first would."""
    return int(np.random.SeedSequence(names).generate_state(1, np.uint64)[0] >> np.uint64(1))


def next_examples(
    pairs: Pairs, position: int, count: int, seed: int, fits
) -> tuple[list[Example], int, int]:
    """The next `count` examples for which fits(example) holds -> (examples, position after them, rows skipped as too long)."""
    examples, start = [], position
    while len(examples) < count:
        if (
            position - start >= 2 * len(pairs) and not examples
        ):  # whatever the start, these hold one whole epoch
            raise InputError(
                f"{pairs.path}: not one of its {len(pairs)} rows fits; raise --max-prompt or --max-answer"
            )
        example = pairs[row_at(position, len(pairs), seed)]
        position += 1
        if fits(example):
            examples.append(example)
    return examples, position, position - start - count
