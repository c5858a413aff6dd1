"""examples/everyday: the committed rows are those of make.py, no fact of a test row is in train,
and the computed answers are right."""

import importlib.util
import json
import re
from collections import Counter
from datetime import date, timedelta
from itertools import permutations
from pathlib import Path

import pytest

from data import parse_row

FOLDER = Path(__file__).parents[1] / "examples" / "everyday"
spec = importlib.util.spec_from_file_location("everyday_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

TEXT = {name: (FOLDER / name).read_text(encoding="utf-8") for name in ("train.jsonl", "test.jsonl")}
TRAIN = [json.loads(line) for line in TEXT["train.jsonl"].splitlines()]
TEST = [json.loads(line) for line in TEXT["test.jsonl"].splitlines()]
ROWS = TRAIN + TEST


# ---- files
def test_the_committed_files_are_what_make_writes():
    assert make.make_files() == TEXT
    assert (len(TRAIN), len(TEST)) == (600, 100)


@pytest.mark.parametrize("name", TEXT)
def test_every_row_parses(name):
    for number, line in enumerate((FOLDER / name).read_bytes().splitlines(), start=1):
        (question,), gold = parse_row(line, f"{name}:{number}")
        # Nothing to strip, no other field.
        assert json.loads(line) == {"question": question, "answer": gold}


def test_questions_and_answers_are_a_sentence_or_two():
    for row in ROWS:
        assert 10 <= len(row["question"].split()) <= 60, row
        assert 8 <= len(row["answer"].split()) <= 30, row
        assert re.fullmatch(r"[A-Z].*\.", row["answer"]), row
        assert re.search(r"[.?]$", row["question"]), row


# ---- train and test
def test_no_question_is_asked_twice():
    assert len({row["question"].lower() for row in ROWS}) == len(ROWS)


def test_train_and_test_rest_on_different_facts():
    _, tested = make.make_rows(make.TEST, seed=1, taken=set())
    _, trained = make.make_rows(make.TRAIN, seed=2, taken=tested)
    assert len(tested) == make.TEST and not tested & trained
    # The same, from the text of the questions.
    facts = [what for what, _ in make.CAUSES + make.ADVICE]
    facts += [clue for _, clue in make.THINGS]
    for fact in facts:
        assert not (occurs(fact, TRAIN) and occurs(fact, TEST)), fact


def occurs(fact: str, rows: list[dict]) -> bool:
    """Whether a question has the fact in it, also at the beginning of a sentence."""
    questions = [row["question"] for row in rows]
    return any(fact in question.lower() or make.capital(fact) in question for question in questions)


def test_no_word_of_facts_txt_belongs_to_two_groups_or_two_opposites():
    for sets in ([words for _, _, words in make.GROUPS], make.OPPOSITES):
        assert max(Counter(word for words in sets for word in words).values()) == 1


# ---- answers
# A solver works the answer out from the words of the question, in another way than make.py.
ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
NUMBERS = {word: n for n, word in enumerate(ONES, start=1)}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
for tens, word in zip(range(20, 100, 10), TENS, strict=True):
    NUMBERS[word] = tens
    for n, one in enumerate(ONES[:9], start=1):
        NUMBERS[f"{word}-{one}"] = tens + n


def numbers(text: str) -> list[int]:
    """The numbers that a text has in words, in order."""
    text = re.sub("-(pound|dollar|euro)", r" \1", text.lower())
    return [NUMBERS[word] for word in re.findall(r"[a-z-]+", text) if word in NUMBERS]


def found(words: list[str], text: str) -> list[str]:
    """Which of `words` a text has, in order."""
    return re.findall(rf"\b(?:{'|'.join(words)})\b", text)


def right_change(question: str, answer: str) -> bool:
    *costs, paid = numbers(question)
    several = re.search(r"each|One \w+ costs", question)  # price and count, in either order
    spent = costs[0] * costs[-1] if several else sum(costs)
    return numbers(re.search(r"[a-z-]+ (?=pound|dollar|euro)", answer)[0]) == [paid - spent]


def right_order(question: str, answer: str) -> bool:
    """The one order of the three that contradicts no clue."""
    clues = re.findall(
        r"(the \w+ \w+|\w+) is (\w+)er than (the \w+ \w+|\w+)", question.replace("The", "the")
    )
    small = "short young slow weak light thinn".split()
    pairs = [(b, a) if less in small else (a, b) for a, less, b in clues]
    three = sorted({x for pair in pairs for x in pair})
    (ranked,) = [p for p in permutations(three) if all(p.index(a) < p.index(b) for a, b in pairs)]
    asked = re.search(r"is the (\w+)est of", question)
    if asked is None:
        right = ranked[1]
    else:
        right = ranked[2] if asked[1] in small else ranked[0]
    return found(three, answer.replace("The ", "the "))[0] == right


def right_weekday(question: str, answer: str) -> bool:
    days = [(date(2024, 1, 1) + timedelta(days=n)).strftime("%A") for n in range(7)]
    near = {
        "the day before yesterday": -2,
        "yesterday": -1,
        "tomorrow": 1,
        "the day after tomorrow": 2,
    }
    (start,) = found(days, question)
    named = found(sorted(near, key=len, reverse=True), question.lower())  # longest match first
    if named:
        shift = near[named[1]] - near[named[0]]
    else:
        (steps,) = numbers(question)
        shift = -steps if found(["before", "back", "ago"], question) else steps
    right = date(2024, 1, 1 + days.index(start)) + timedelta(days=shift)
    return {start, *found(days, answer)} == {start, right.strftime("%A")}


def right_month(question: str, answer: str) -> bool:
    months = [date(2024, n, 1).strftime("%B") for n in range(1, 13)]
    (start,) = found(months, question)
    (steps,) = numbers(question)
    shift = -steps if found(["before", "earlier", "ago"], question) else steps
    right = (months * 3)[12 + months.index(start) + shift]
    return {start, *found(months, answer)} == {start, right}


def right_turns(question: str, answer: str) -> bool:
    """Directions as complex numbers: a turn to the left multiplies by i."""
    compass = {"east": 1, "north": 1j, "west": -1, "south": -1j}
    (here,) = (compass[word] for word in found(list(compass), question))
    for turn in re.findall(r"turn (\w+)", question):
        here *= {"left": 1j, "right": -1j, "around": -1}[turn]
    return compass[found(list(compass), answer)[0]] == here


def right_letters(question: str, answer: str) -> bool:
    word = re.search(r"(\w+)[,.?]", question)[1]
    letter = re.search(r"the letter (\w)\b", question)
    ordinals = ["first", "second", "third", "fourth", "fifth"]
    ordinal = found(ordinals, question)
    if letter:
        return {1: "once", 2: "twice", 3: "three times"}[word.count(letter[1])] in answer
    if ordinal:
        return answer.endswith(f" is {word[ordinals.index(ordinal[0])]}.")
    return numbers(answer.replace(word, "")) == [len(word)]


@pytest.mark.parametrize(
    "kind, solver",
    [
        (r"How much (change|money)", right_change),
        (r"of the three\?", right_order),
        (r"days? (of the week|will that|was that|do you reach)", right_weekday),
        (r"[Ww]hich month", right_month),
        (r"\bturn (left|right|around)", right_turns),
        (r"letters? (of|comes|do|\w appear)|How often do you write", right_letters),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_computed_answers_are_right(kind, solver):
    rows = [row for row in ROWS if re.search(kind, row["question"])]
    assert 40 <= len(rows) <= 46  # one kind in sixteen
    for row in rows:
        assert solver(row["question"], row["answer"]), row
