"""Question-answer pairs, from rows of a JSONL file to token ids.

A row is {"question": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...]},
whose last assistant turn is the gold answer. It becomes an Example with two parts of a sequence:

    prompt    bos (where the tokenizer adds it), then the prompt format with the question in it
    answer    the gold answer, then eos

Training samples a trace after the prompt and scores the answer after prompt, trace and marker:

    prompt  trace  marker  answer

The marker is one token, "<|response_start|>" in the paper. The model learns to end its trace with
it; to a trace that ended otherwise it is appended. The gold answer is tokenized here, once.
Traces stay token ids: text that is decoded and tokenized again may come out as other ids, and then
what is scored is not what was sampled.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from support.errors import InputError, refusing, require
from support.tokenizer import Tokenizer


# ---- the parts of a sequence
@dataclass(frozen=True)
class Example:
    """One question-answer pair as token ids."""

    index: int  # row number in the file, from which the example's random streams are seeded
    prompt: list[int]
    answer: list[int]  # ends with eos
    question: str  # the last question as text, for logs
    gold: str  # the gold answer as text, for logs and predictions


@dataclass
class Trace:
    """One sampled continuation of a prompt."""

    ids: list[int]  # as sampled; a stop token that ended it comes last
    logp: list[float]  # log-prob of each id in nats, under the distribution it was drawn from
    finished: bool  # ended by a stop token; False: by a cut token or at max_new_tokens
    cut_id: int | None = None  # the cut token that ended it: sampled, but not in ids
    cut_logp: float = 0.0


# ---- rows
class Pairs:
    """The rows of a JSONL file. Memory holds their offsets; rows are read when they are needed.

    Every row is checked at the start: otherwise a bad row at line 150,000 would end a run after
    hours of training. InputError names file and line. Blank lines are skipped.

    Attributes:
        digest        of all rows: with the same digest, a row number means the same row
        spelled_out   rows whose text spells out a special token, which then becomes that token
        early_eos     answers of which an eos is not the end: they teach to stop there
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.spelled_out = self.early_eos = 0
        self.offsets: list[int] = []  # of the rows, in bytes
        digest = hashlib.sha256()
        with refusing(self.path):
            self.file = open(self.path, "rb")
        for number, line in enumerate(self.file, start=1):
            if not line.isspace():
                where = f"{self.path}:{number}"
                turns, gold = parse_row(line, where)
                if any(map(tokenizer.spelled.search, (*turns, gold))):
                    self.count_special(turns, gold, where)
                digest.update(line)
                self.offsets.append(self.file.tell() - len(line))
        require(bool(self.offsets), f"{self.path}: holds no rows")
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
        text = ""
        if self.spelled_out:
            early = f", {self.early_eos} answers go on after an eos" if self.early_eos else ""
            text = f" ({self.spelled_out} spell out special tokens, which they become{early})"
        examples = [self[i] for i in range(min(100, len(self)))]
        ids = [token for e in examples for token in (*e.prompt, *e.answer[:-1])]  # without eos
        unk = getattr(self.tokenizer.model.model, "unk_token", None)  # byte-level ones have none
        unknown = unk and ids.count(self.tokenizer.model.token_to_id(unk)) / max(1, len(ids))
        if unknown and unknown > 0.01:
            text += f" ({unknown:.0%} of their tokens are {unk}: the tokenizer lacks them)"
        return text

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Example:
        self.file.seek(self.offsets[index])
        turns, gold = parse_row(self.file.readline(), f"{self.path}, row {index}")
        prompt = self.tokenizer.prompt_ids(turns)
        answer = self.tokenizer.encode_answer(gold)
        return Example(index, prompt, answer, question=turns[-1], gold=gold)


def parse_row(line: bytes, where: str) -> tuple[list[str], str]:
    """One JSONL line -> (turns, gold answer), stripped of white space at their ends.

    turns: the text of user, assistant, ..., user. where: "file:line", for InputError.
    """
    with refusing(f"{where}: no row of JSON (examples/convert.py makes rows of other files)"):
        row = json.loads(line)
    require(isinstance(row, dict), f"{where}: is no JSON object")
    with refusing(where):
        if "messages" in row:
            turns = alternating_turns(row["messages"], where)
        else:
            turns = [row["question"], row["answer"]]
        *turns, gold = [text.strip() for text in turns]
        for text in (*turns, gold):
            text.encode()  # fails for half a character, which no tokenizer takes
    require(gold != "", f"{where}: the answer is empty")
    require(turns[-1] != "", f"{where}: the question is empty")
    return turns, gold


def alternating_turns(messages: list[dict], where: str) -> list[str]:
    """A conversation -> [user, assistant, ..., user, assistant], up to its last assistant turn.

    A system turn is put in front of the first question. Turns after the last answer are dropped.
    """
    roles = [message["role"] for message in messages]
    turns = [message["content"] for message in messages]
    first = int(roles[:1] == ["system"])  # where the first question stands
    end = len(roles)  # behind the last answer
    while end > first and roles[end - 1] != "assistant":
        end -= 1
    pairs = (end - first) // 2
    right = pairs > 0 and roles[first:end] == ["user", "assistant"] * pairs
    require(right, f'{where}: "messages" should alternate user and assistant, roles are {roles}')
    system, turns = turns[:first], turns[first:end]
    turns[0] = "\n\n".join([*system, turns[0]])
    return turns


def fits(
    example: Example,
    positions: int,
    max_trace: int,
    max_prompt: float = math.inf,
    max_answer: float = math.inf,
) -> bool:
    """Whether an example is within the length limits and the positions that the model knows."""
    prompt, answer = len(example.prompt), len(example.answer)
    together = prompt + max_trace + 1 + answer  # 1 for a forced marker
    return 0 < prompt <= max_prompt and answer <= max_answer and together <= positions


def first_examples(pairs: Pairs, count: int, row_fits: Callable[[Example], bool]) -> list[Example]:
    """The first `count` rows of the file without those that do not fit. InputError if none does."""
    rows = min(count, len(pairs))
    fitting = [example for example in map(pairs.__getitem__, range(rows)) if row_fits(example)]
    none = f"not one of the first {rows} rows fits the length limits and the model's positions"
    require(bool(fitting), f"{pairs.path}: {none}")
    return fitting


# ---- order of rows
# Training reads an endless stream of rows: all of them in random order, then all in another order.
# A run saves its position in the stream and no random state: a row is a function of (seed,
# position), the random numbers of its traces of (seed, step, row).
def next_examples(
    pairs: Pairs, position: int, count: int, seed: int, row_fits: Callable[[Example], bool]
) -> tuple[list[Example], int, int]:
    """The next `count` examples from `position` of the stream on.

    row_fits: whether an example keeps to the length limits; others are skipped.
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
        if row_fits(example):
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
