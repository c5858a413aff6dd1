"""examples/sums: the questions, traces and answers are right, and the base knows their words."""

import random
import re

import pytest

from examples.hops import make as hops
from examples.sums.make import SUMS, make_question
from support.tokenizer import Tokenizer


@pytest.mark.parametrize("hard", [1, 3])
def test_the_hard_tokens_are_the_last_digits_of_the_sums(hard):
    task = hops.Task(hard=hard)
    for seed in range(20):
        rng = random.Random(seed)
        question, paths = make_question(task, rng)
        answer, positions = hops.make_answer(task, paths, rng)
        sums = question.removesuffix(" ?").split(" ; ")
        totals = [sum(map(int, text.split(" + "))) % 10 for text in sums]
        assert [int(answer.split()[position]) for position in positions] == totals


def test_every_hop_of_a_worked_trace_adds_the_next_term():
    rng = random.Random(0)
    question, paths = make_question(hops.Task(), rng)
    before, *terms = re.findall(r"\d", question)
    trace, _ = hops.make_trace("worked", paths, rng, SUMS)
    worked = [hop.split() for hop in trace.split(" ,")[:-1]]
    assert len(worked) == len(terms)
    for number, (hop, term) in enumerate(zip(worked, terms, strict=True), start=1):
        after = str((int(before) + int(term)) % 10)
        assert hop == [str(number), before, term, after]
        before = after


def test_the_tokenizer_has_every_word_of_the_documents(tmp_path):
    hops.write_tokenizer(tmp_path, SUMS.vocabulary)
    (tmp_path / "config.json").write_text("{}")
    tokenizer, rng = Tokenizer(tmp_path), random.Random(0)
    unknown = tokenizer.model.token_to_id("<unk>")
    for _ in range(50):
        for make in (hops.make_document, hops.make_lookup_document):
            for text in make(hops.Task(), rng, SUMS):
                assert unknown not in tokenizer.encode_prompt(text)
