"""examples/sums: the questions and answers are right, and the base knows their words."""

import random

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


def test_the_tokenizer_has_every_word_of_the_documents(tmp_path):
    hops.write_tokenizer(tmp_path, SUMS.vocabulary)
    (tmp_path / "config.json").write_text("{}")
    tokenizer, rng = Tokenizer(tmp_path), random.Random(0)
    unknown = tokenizer.model.token_to_id("<unk>")
    for make in [hops.make_document, hops.make_lookup_document] * 50:
        for text in make(hops.Task(), rng, SUMS):
            assert unknown not in tokenizer.encode_prompt(text)
