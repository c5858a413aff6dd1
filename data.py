"""Question-answer pairs, from rows of a JSONL file to token ids.

A row is {"question": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...]},
whose last assistant turn is the gold answer. It becomes an Example with two parts of a sequence:

    prompt    bos (where the tokenizer adds it), then the prompt format with the question in it
    answer    the gold answer, then eos

Training samples a trace after the prompt and scores the answer after prompt, trace and marker:

    prompt  trace  marker  answer

The marker is one token, "<|response_start|>" in the paper. The model learns to end its trace with
it; to a trace that ran out of tokens it is appended. The gold answer is tokenized here, once.
Traces stay token ids: text that is decoded and tokenized again may come out as other ids, and then
what is scored is not what was sampled.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers

from support.chat import make_prompter, own_template, template_of
from support.errors import InputError, require
from support.files import is_file, write_json
from support.tokenizer import (
    by_first_letter,
    check_ids,
    find_eos,
    is_text,
    load_tokenizer,
    read_directory,
    with_ordinary_token,
    write_directory,
)

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


# ---- rows
MAX_ROW = 2**26  # bytes of a line
MAX_CHARS = 100  # of a token, on average over a text; English has 4


@dataclass(frozen=True)
class Example:
    """One question-answer pair as token ids."""

    index: int  # row number in the file, from which the example's random streams are seeded
    prompt: list[int]
    answer: list[int]  # ends with eos
    question: str  # the last question as text, for logs
    gold: str  # the gold answer as text, for logs and exact match


class Pairs:
    """The rows of a JSONL file. Memory holds their offsets; rows are read when they are needed.

    Every row is checked at the start: otherwise a bad row at line 150,000 would end a run after
    hours of training. InputError names file and line. Blank lines are skipped.

    Attributes:
        digest        of all rows: with the same digest, a row number means the same row
        spelled_out   rows whose text spells out a special token, which then becomes that token
        early_eos     answers of which an eos is not the end: they teach to stop there
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        max_prompt: int | None = None,
        max_answer: int | None = None,
    ) -> None:
        """max_prompt, max_answer: tokens. A text with more than MAX_CHARS for each is not tokenized
        but counts as too long: tokenizing takes 200 times its memory."""
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.spelled_out = self.early_eos = 0
        self.too_long: set[int] = set()  # row numbers
        most_prompt = MAX_CHARS * (max_prompt or MAX_ROW)
        most_answer = MAX_CHARS * (max_answer or MAX_ROW)
        require(is_file(self.path), f"{self.path}: No such file or directory")
        digest = hashlib.sha256()
        offsets = array("q")
        offset = 0  # of the line, in bytes
        number = 0
        self.file = open(self.path, "rb")
        while line := self.file.readline(MAX_ROW + 1):
            number += 1
            where = f"{self.path}:{number}"
            require(len(line) <= MAX_ROW, f"{where}: has more than {MAX_ROW} bytes")
            if not line.isspace():
                turns, gold = parse_row(line, where)
                if sum(map(len, turns)) > most_prompt or len(gold) > most_answer:
                    self.too_long.add(len(offsets))
                if any(map(tokenizer.spells_out, (*turns, gold))):
                    self.count_special(turns, gold, where)
                digest.update(line)
                offsets.append(offset)
            offset += len(line)
        require(bool(offsets), f"{self.path}: holds no rows")
        self.offsets = np.frombuffer(offsets, dtype=np.int64)
        self.digest = digest.hexdigest()

    def count_special(self, turns: list[str], gold: str, where: str) -> None:
        self.spelled_out += 1
        eos = self.tokenizer.eos
        self.early_eos += eos in gold.removesuffix(eos)
        for text in self.tokenizer.without_row:
            found = any(text in turn for turn in (*turns, gold))
            require(not found, f"{where}: holds {text!r}, a token without a row in the embedding")

    def note(self) -> str:
        """What a run says of them in its first lines; empty where there is nothing to say."""
        if not self.spelled_out:
            return ""
        early = f", {self.early_eos} answers go on after an eos" if self.early_eos else ""
        return f" ({self.spelled_out} spell out special tokens, which they become{early})"

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Example | None:
        """None: the row is too long to be tokenized."""
        if index in self.too_long:
            return None
        self.file.seek(self.offsets[index])
        turns, gold = parse_row(self.file.readline(), f"{self.path}, row {index}")
        prompt = self.tokenizer.prompt_ids(turns)
        answer = self.tokenizer.encode_answer(gold)
        return Example(index, prompt, answer, question=turns[-1], gold=gold)


def parse_row(line: bytes, where: str) -> tuple[list[str], str]:
    """One JSONL line -> (turns, gold answer), stripped of white space at their ends.

    turns: the text of user, assistant, ..., user. where: "file:line", for InputError.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: holds a {type(row).__name__}, "
            "a row should be an object with question and answer"
        )
    turns = parse_messages(row["messages"], where) if "messages" in row else parse_pair(row, where)
    half = f"{where}: the text holds half a character (a lone \\ud800-\\udfff escape)"
    require(all(is_text(turn) for turn in turns if turn), half)
    *turns, gold = [text.strip() for text in turns]
    if not gold:
        raise InputError(f"{where}: the answer is empty")
    if not turns[-1]:
        raise InputError(f"{where}: the question is empty")
    return turns, gold


def parse_pair(row: dict, where: str) -> list[str]:
    """{"question": ..., "answer": ...} -> [question, answer]"""
    for key in ("question", "answer"):
        if key not in row:
            raise InputError(
                f'{where}: no "{key}"; a row is {{"question": ..., "answer": ...}} '
                'or {"messages": [...]}'
            )
        if not isinstance(row[key], str):
            kind = type(row[key]).__name__
            raise InputError(f'{where}: "{key}" is a {kind}, it should be a string')
    return [row["question"], row["answer"]]


def parse_messages(messages: object, where: str) -> list[str]:
    """A conversation -> [user, assistant, ..., user, assistant], up to its last assistant turn.

    A system turn is put in front of the first question. Turns after the last answer are dropped.
    """
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise InputError(
            f'{where}: "messages" should be a list of {{"role": ..., "content": ...}} with strings'
        )
    system = []
    if messages and messages[0]["role"] == "system":
        system = [messages[0]["content"]]
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    turns = [message["content"] for message in messages]
    while roles and roles[-1] != "assistant":
        roles.pop()
        turns.pop()
    alternating = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != alternating:
        roles = [message["role"] for message in messages]
        raise InputError(
            f'{where}: "messages" should alternate user and assistant and hold an assistant turn; '
            f"roles are {roles}"
        )
    turns[0] = "\n\n".join([*system, turns[0]])
    return turns


def is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def render(turns: list[str], prompt_format: str, eos: str) -> str:
    """The prompt as text: format(question) answer eos newline, ..., format(last question).

    Conversations are laid out as in Tulu. The tokenizer turns the text of eos into its token, as
    it does with any special token in a text. str.replace, as questions may contain braces.
    """
    text = ""
    for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
        text += prompt_format.replace("{question}", question) + answer + eos + "\n"
    return text + prompt_format.replace("{question}", turns[-1])


def first_examples(pairs: Pairs, count: int, fits: Callable[[Example], bool]) -> list[Example]:
    """The first `count` rows of the file without those that do not fit. InputError if none does."""
    found = [pairs[i] for i in range(min(count, len(pairs)))]
    fitting = [example for example in found if example is not None and fits(example)]
    none = (
        f"not one of the first {len(found)} rows fits the length limits and the model's positions"
    )
    require(bool(fitting), f"{pairs.path}: {none}")
    return fitting


# ---- order of rows
# Training reads an endless stream of rows: all of them in random order, then all in another order.
# A run saves its position in the stream and no random state: row and randomness are functions of
# (seed, position).
def next_examples(
    pairs: Pairs, position: int, count: int, seed: int, fits: Callable[[Example], bool]
) -> tuple[list[Example], int, int]:
    """The next `count` examples from `position` of the stream on.

    fits: whether an example keeps to the length limits; others are skipped.
    -> (examples, position after them, number of skipped rows)
    """
    examples: list[Example] = []
    start = position
    while len(examples) < count:
        # Two epochs' length contains a whole epoch, wherever it starts: every row has been tried.
        if not examples and position - start >= 2 * len(pairs):
            raise InputError(
                f"{pairs.path}: not one of its {len(pairs)} rows fits --max-prompt, --max-answer "
                "and, with --max-trace (lower it), the model's max_position_embeddings"
            )
        example = pairs[row_at(position, len(pairs), seed)]
        position += 1
        if example is not None and fits(example):
            examples.append(example)
    return examples, position, position - start - count


def row_at(position: int, rows: int, seed: int) -> int:
    """The row at `position` of the stream: epoch position // rows, in an order of its own."""
    return int(permutation(rows, seed, position // rows)[position % rows])


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def stream_seed(*names: int) -> int:
    """The seed of one random stream, 63 bits, from what names it: (seed, step, question, ...)."""
    state = np.random.SeedSequence(names).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
