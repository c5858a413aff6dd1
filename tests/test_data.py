"""data.py: rows to token ids, the marker, what is refused and where, and an order that is a function of the seed alone."""

import json
from pathlib import Path

import jinja2.sandbox  # comes with torch
import numpy as np
import pytest
import tiny
import tokenizers

from data import (
    MARKER,
    PROMPT_FORMAT,
    Example,
    Pairs,
    Tokenizer,
    next_examples,
    row_at,
    stream_seed,
)
from support.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
KINDS = {
    "byte_level": ("<|begin_of_text|>", "<|end_of_text|>"),
    "sentencepiece": ("<s>", "</s>"),
}  # bos, eos
every_kind = pytest.mark.parametrize("kind", KINDS)


def write_rows(file: Path, *rows: object) -> Path:
    """A JSONL file; a row that is bytes stands as it is."""
    file.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return file


def only_example(tmp_path: Path, tokenizer: Tokenizer, row: object) -> Example:
    pairs = Pairs(write_rows(tmp_path / "rows.jsonl", row), tokenizer)
    assert len(pairs) == 1
    return pairs[0]


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, special=True)


def assert_refused(refused: str, *names: str) -> None:
    assert "\n" not in refused
    for name in names:
        assert name in refused


# ---------------------------------------------------------------------------------------------------------------- rows
@every_kind
def test_a_question_becomes_the_prompt_and_the_answer_ends_with_eos(kind, tmp_path):
    bos, eos = KINDS[kind]
    example = only_example(
        tmp_path, Tokenizer(GOLDEN / kind), {"question": " What is 2 + 3?\n", "answer": "It is 5. "}
    )
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / kind / "tokenizer.json"))
    assert (
        example.prompt == library.encode("<|user|>\nWhat is 2 + 3?\n<|assistant|>\n").ids
    )  # the library puts bos in front
    assert (
        example.prompt[0] == library.token_to_id(bos)
        and example.prompt.count(library.token_to_id(bos)) == 1
    )
    assert example.answer == [
        *library.encode("It is 5.", add_special_tokens=False).ids,
        library.token_to_id(eos),
    ]
    assert (example.question, example.gold, example.index) == ("What is 2 + 3?", "It is 5.", 0)


def test_messages_with_one_turn_equal_the_pair(tmp_path):
    tokenizer = Tokenizer(GOLDEN / "byte_level")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Kim."}]
    pair = only_example(tmp_path, tokenizer, {"question": "Who?", "answer": "Kim."})
    assert only_example(tmp_path, tokenizer, {"messages": messages, "id": 7}) == pair


@every_kind
def test_the_last_assistant_turn_is_the_gold_answer_and_what_stands_before_it_the_prompt(
    kind, tmp_path
):
    eos = KINDS[kind][1]
    tokenizer = Tokenizer(GOLDEN / kind)
    turns = [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Kim."),
        ("user", "Where?"),
        ("assistant", "Paris."),
        ("user", "When?"),
    ]
    example = only_example(
        tmp_path, tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]}
    )
    assert (example.question, example.gold) == ("Where?", "Paris.")
    text = (
        f"<|user|>\nBe brief.\n\nWho?\n<|assistant|>\nKim.{eos}\n<|user|>\nWhere?\n<|assistant|>\n"
    )
    assert (
        example.prompt
        == tokenizer.prefix + tokenizer.model.encode(text, add_special_tokens=False).ids
    )
    assert (
        example.prompt.count(tokenizer.eos_ids[0]) == 1
    )  # the first answer's eos is the token, not its letters
    assert example.answer == tokenizer.encode_answer("Paris.")


@pytest.mark.parametrize(
    "question", ["{question}", "{}", "a {x} {{y}} }{ {0}", "\\{question\\}", "100 %s %(q)s"]
)
def test_braces_in_a_question_stay_as_they_are(question, tmp_path):
    tokenizer = Tokenizer(GOLDEN / "byte_level", prompt_format="Q{}: {question} {{A}}:")
    example = only_example(tmp_path, tokenizer, {"question": question, "answer": "b"})
    assert shown(tokenizer, example.prompt) == "<|begin_of_text|>Q{}: " + question + " {{A}}:"


def test_rows_are_found_where_they_stand_whatever_stands_between_them(tmp_path):
    rows = [{"question": f"{i} é 日本", "answer": "x" * i} for i in range(1, 6)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\n"
        + lines[0]
        + b"\r\n\n  \n"
        + lines[1]
        + b"\n"
        + lines[2]
        + b"\n\n"
        + lines[3]
        + b"\n"
        + lines[4]
    )  # no last \n
    pairs = Pairs(file, Tokenizer(GOLDEN / "byte_level"))
    assert len(pairs) == 5
    for i in (4, 0, 2, 1, 3, 0):
        assert (pairs[i].index, pairs[i].question, pairs[i].gold) == (
            i,
            rows[i]["question"],
            rows[i]["answer"],
        )


# ---------------------------------------------------------------------------------------------------------------- tokenizer
@every_kind
def test_bos_stands_once_before_every_prompt_and_never_before_an_answer(kind):
    tokenizer = Tokenizer(GOLDEN / kind)
    bos = tokenizer.model.token_to_id(KINDS[kind][0])
    assert tokenizer.prefix == [bos]
    assert tokenizer.encode_prompt("the answer") == tokenizer.model.encode("the answer").ids
    assert bos not in tokenizer.encode_answer("the answer")


def test_a_tokenizer_that_puts_nothing_in_front_gives_prompts_without_bos(tmp_path):
    tokenizer = Tokenizer(tiny.tokenizer_dir(tmp_path))
    assert tokenizer.prefix == [] and tokenizer.encode_prompt("a b") == [1, 2]


def test_a_tokenizer_that_ends_texts_with_eos_does_not_end_prompts_with_it(tmp_path):
    tiny.tokenizer_dir(tmp_path, special=("<eos>", "<bos>"))
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_prompt("a b") == [1, 2, 3] and tokenizer.encode_answer("a") == [2, 0]


@every_kind
def test_an_answer_ends_with_exactly_one_eos(kind):
    tokenizer = Tokenizer(GOLDEN / kind)
    eos = tokenizer.eos_ids[0]
    for text in (
        "yes",
        "yes.",
        "yes" + KINDS[kind][1],
    ):  # the last: data in which somebody has already put it
        ids = tokenizer.encode_answer(text)
        assert ids[-1] == eos and ids.count(eos) == 1 and len(ids) > 1


@pytest.mark.parametrize(
    "named",
    ["<eos>", {"__type": "AddedToken", "content": "<eos>", "lstrip": False}],
    ids=["string", "object"],
)
def test_eos_is_read_from_tokenizer_config_in_both_its_forms(named, tmp_path):
    tokenizer = Tokenizer(tiny.tokenizer_dir(tmp_path, special=("<unk>", "<eos>"), eos=named))
    assert tokenizer.eos_ids == [1] and tokenizer.encode_answer("a") == [2, 1]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [2, [2], [3, 1]])
def test_eos_is_read_from_the_models_configs_as_an_int_and_as_a_list(file, ids, tmp_path):
    tiny.tokenizer_dir(tmp_path, special=("<unk>", "<end>", "<eot>", "<eom>"), eos=None)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    assert Tokenizer(tmp_path).eos_ids == (ids if isinstance(ids, list) else [ids])


def test_every_eos_counts_and_answers_end_with_the_tokenizers_own(tmp_path):
    tiny.tokenizer_dir(tmp_path, special=("<unk>", "<end>", "<eot>", "<eom>"), eos="<eot>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids[0] == 2 and sorted(tokenizer.eos_ids) == [1, 2, 3]
    assert tokenizer.encode_answer("a")[-1] == 2


def test_padding_and_truncation_stored_in_the_file_are_ignored(tmp_path):
    tiny.tokenizer_dir(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode_prompt("a b c") == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------- marker
@every_kind
def test_a_missing_marker_is_added_behind_the_vocabulary_as_one_token(kind):
    before = tokenizers.Tokenizer.from_file(str(GOLDEN / kind / "tokenizer.json"))
    tokenizer = Tokenizer(GOLDEN / kind)
    assert tokenizer.marker == MARKER == "<|response_start|>" and tokenizer.marker_is_new
    assert tokenizer.marker_id == before.get_vocab_size()
    assert (
        tokenizer.model.encode(f"yes{MARKER}", add_special_tokens=False).ids[-1]
        == tokenizer.marker_id
    )
    text = "Question: what is 12 + 30? naïve 日本"
    assert (
        tokenizer.model.encode(text).ids == before.encode(text).ids
    )  # ordinary text is cut up as before


@pytest.mark.parametrize("marker, special", [("c", False), ("<eot>", True)])
def test_a_marker_the_vocabulary_has_is_kept(marker, special, tmp_path):
    before = tiny.tokenizer_dir(tmp_path, special=("<eos>", "<eot>"))
    tokenizer = Tokenizer(before, marker=marker)
    assert not tokenizer.marker_is_new
    assert tokenizer.marker_id == (1 if special else 4) and tokenizer.model.get_vocab_size() == 6
    assert tokenizer.model.id_to_token(tokenizer.marker_id) == marker


def test_every_special_token_but_the_marker_cuts_a_trace(tmp_path):
    tiny.tokenizer_dir(tmp_path, special=("<unk>", "<bos>", "<eos>", "<eot>"))
    assert Tokenizer(tmp_path).cut_ids == [0, 1, 2, 3]  # the marker is new here, and special too
    assert Tokenizer(tmp_path, marker="<eot>").cut_ids == [0, 1, 2]
    assert Tokenizer(tmp_path, marker="c").cut_ids == [0, 1, 2, 3]


def test_an_eos_that_is_an_ordinary_word_cuts_a_trace_too(tmp_path):
    assert Tokenizer(tiny.tokenizer_dir(tmp_path, special=("<unk>",), eos="d")).cut_ids == [0, 4]


def test_an_added_token_that_is_not_special_cuts_nothing(tmp_path):
    tiny.tokenizer_dir(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens(["<thought>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert made.token_to_id("<thought>") == 5 and Tokenizer(tmp_path).cut_ids == [0]


@every_kind
def test_cut_tokens_of_the_golden_tokenizers(kind):
    tokenizer = Tokenizer(GOLDEN / kind)
    specials = {
        "byte_level": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|reserved_special_token_0|>",
        ]
    }
    names = specials.get(kind, ["<unk>", "<s>", "</s>"])
    assert tokenizer.cut_ids == [tokenizer.model.token_to_id(name) for name in names]


@every_kind
def test_a_saved_tokenizer_reads_back_the_same(kind, tmp_path):
    tokenizer = Tokenizer(GOLDEN / kind, marker="<|think_end|>", prompt_format="Q: {question}\nA:")
    tokenizer.save(tmp_path)
    back = Tokenizer(tmp_path)
    assert not back.marker_is_new
    for name in ("marker", "marker_id", "prompt_format", "eos_ids", "cut_ids", "prefix"):
        assert getattr(back, name) == getattr(tokenizer, name)
    text = "Who? naïve 日本 <|think_end|> Kim."
    assert back.model.encode(text).ids == tokenizer.model.encode(text).ids
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert described.pop("chat_template")
    assert described == json.loads((GOLDEN / kind / "tokenizer_config.json").read_text())
    assert (
        Tokenizer(tmp_path, marker="<other>", prompt_format="{question}!").prompt_format
        == "{question}!"
    )  # a flag goes before the file
    assert Tokenizer(tmp_path, marker="<other>").marker == "<other>"


SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": f'  {role} says "x\\n{{{{}}}}" '}
    for role in ("system", "user", "assistant")
)


@every_kind
@pytest.mark.parametrize(
    "prompt_format", [PROMPT_FORMAT, "{question}", '\'{{ \\ "{question}" %}} naïve\n{question}\t']
)
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ASSISTANT, USER],
        [USER, ASSISTANT, USER, ASSISTANT, USER],
    ],
)
def test_the_chat_template_gives_the_prompt_we_train_on(kind, prompt_format, messages, tmp_path):
    tokenizer = Tokenizer(GOLDEN / kind, prompt_format=prompt_format)
    prompt = only_example(
        tmp_path, tokenizer, {"messages": [*messages, {"role": "assistant", "content": "gold"}]}
    ).prompt
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )  # as transformers sets it up
    text = jinja.from_string(tokenizer.chat_template()).render(
        messages=messages, add_generation_prompt=True
    )
    assert tokenizer.model.encode(text, add_special_tokens=False).ids == prompt


@pytest.mark.parametrize(
    ("name", "reserved"),
    [("<|reserved_special_token_0|>", True), ("<|eot_id|>", False), ("<|new|>", False)],
)
def test_a_token_kept_free_is_recognised_until_a_directory_says_it_is_its_marker(
    name, reserved, tmp_path
):
    tokenizer = Tokenizer(GOLDEN / "byte_level", marker=name)
    assert tokenizer.marker_is_reserved is reserved and tokenizer.marker_is_new is (
        name == "<|new|>"
    )
    tokenizer.save(tmp_path)
    assert not Tokenizer(tmp_path).marker_is_reserved  # in use now: its embedding has been trained


def test_what_is_not_said_is_the_papers(tmp_path):
    tokenizer = Tokenizer(tiny.tokenizer_dir(tmp_path))
    assert (
        tokenizer.prompt_format == PROMPT_FORMAT == "<|user|>\n{question}\n<|assistant|>\n"
        and tokenizer.marker == MARKER
    )


# ---------------------------------------------------------------------------------------------------------------- refusals
GOOD = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    "row, names",
    [
        (b"{broken", ["not JSON"]),
        (b"[" * 100_000, ["not JSON"]),
        (b'{"question": "a", "answer": "b"} {}', ["not JSON"]),
        (b'{"question": "\xff", "answer": "b"}', ["not JSON"]),
        (["a", "b"], ["list"]),
        ("a", ["str"]),
        ({"answer": "b"}, ["question"]),
        ({"question": "a"}, ["answer"]),
        ({"prompt": "a", "answer": "b"}, ["question", "messages"]),
        ({"question": 3, "answer": "b"}, ["question", "int", "string"]),
        ({"question": "a", "answer": None}, ["answer", "NoneType", "string"]),
        ({"question": "a", "answer": ["b"]}, ["answer", "list"]),
        ({"question": "a", "answer": ""}, ["answer is empty"]),
        ({"question": "a", "answer": " \n"}, ["answer is empty"]),
        ({"question": "", "answer": "b"}, ["question is empty"]),
        ({"question": "a \ud83d", "answer": "b"}, ["half a character"]),
        ({"question": "a", "answer": "\ude00 b"}, ["half a character"]),
        ({"messages": "a"}, ["messages"]),
        ({"messages": []}, ["messages", "assistant"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["messages", "assistant", "user"]),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
            ["messages", "assistant"],
        ),
        ({"messages": [{"role": "assistant", "content": "b"}]}, ["messages", "alternate"]),
        (
            {
                "messages": [
                    {"role": role, "content": "b"} for role in ("user", "user", "assistant")
                ]
            },
            ["messages", "alternate"],
        ),
        (
            {
                "messages": [
                    {"role": role, "content": "b"} for role in ("user", "tool", "assistant")
                ]
            },
            ["messages", "tool"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            ["answer is empty"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            ["messages", "content"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"text": "a"}]},
                    {"role": "assistant", "content": "b"},
                ]
            },
            ["messages", "strings"],
        ),
    ],
    ids=lambda value: (
        value.decode(errors="replace")
        if isinstance(value, bytes)
        else ""
        if isinstance(value, list)
        else json.dumps(value)
    ),
)
def test_a_bad_row_is_refused_before_the_first_step_by_file_and_line(row, names, tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl", *[GOOD] * 3, b"", *[GOOD] * 2, row, GOOD
    )  # line 7; the blank line counts
    with pytest.raises(InputError) as refusal:
        Pairs(file, Tokenizer(GOLDEN / "byte_level"))
    assert_refused(str(refusal.value), f"{file}:7: ", *names)


def test_a_data_file_that_is_not_there_is_refused(tmp_path):
    tokenizer = Tokenizer(GOLDEN / "byte_level")
    for file, why in ((tmp_path / "nowhere.jsonl", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError) as refusal:
            Pairs(file, tokenizer)
        assert_refused(str(refusal.value), str(file), why)


@pytest.mark.parametrize("text", [b"", b"\n  \n"], ids=["empty", "blank"])
def test_a_data_file_without_rows_is_refused(text, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text)
    with pytest.raises(InputError) as refusal:
        Pairs(file, Tokenizer(GOLDEN / "byte_level"))
    assert_refused(str(refusal.value), str(file), "no rows")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tiny.tokenizer_dir(tmp_path, eos=None)
    for config in ({}, {"eos_token_id": None}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError) as refusal:
            Tokenizer(tmp_path)
        assert_refused(str(refusal.value), str(tmp_path), "eos", "tokenizer_config.json")


def test_an_eos_the_vocabulary_does_not_have_is_no_eos(tmp_path):
    with pytest.raises(InputError, match="no eos token"):
        Tokenizer(tiny.tokenizer_dir(tmp_path, eos="<gone>"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_that_is_an_eos_is_refused(kind):
    eos = KINDS[kind][1]
    with pytest.raises(InputError) as refusal:
        Tokenizer(GOLDEN / kind, marker=eos)
    assert_refused(str(refusal.value), "--marker", eos, str(GOLDEN / kind))


def test_a_prompt_format_without_question_is_refused():
    for wrong in ("{} ?", "{Question}", "question"):
        with pytest.raises(InputError) as refusal:
            Tokenizer(GOLDEN / "byte_level", prompt_format=wrong)
        assert_refused(str(refusal.value), "--prompt-format", wrong, "{question}")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(InputError) as refusal:
        Tokenizer(tmp_path)
    assert_refused(str(refusal.value), str(file), "no such file")
    for text in ("", "{", '{"version": "1.0"}'):
        file.write_text(text)
        with pytest.raises(InputError) as refusal:
            Tokenizer(tmp_path)
        assert_refused(str(refusal.value), str(file), "not a tokenizer")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "config.json", "nrt.json"]
)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_file_beside_the_tokenizer_is_refused(name, text, tmp_path):
    tiny.tokenizer_dir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refusal:
        Tokenizer(tmp_path)
    assert_refused(str(refusal.value), str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_every_epoch_is_a_permutation_of_the_rows(rows):
    for epoch in range(5):
        assert sorted(row_at(epoch * rows + i, rows, seed=3) for i in range(rows)) == list(
            range(rows)
        )


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    stream = [row_at(position, 17, seed=3) for position in range(85)]
    for position in (
        np.random.default_rng(0).permutation(85).tolist()
    ):  # asked in any order, between questions to other streams
        row_at(position, 17, seed=4)
        row_at(position, 19, seed=3)
        assert row_at(position, 17, seed=3) == stream[position]
    assert stream == [
        row for epoch in range(5) for row in np.random.default_rng([3, epoch]).permutation(17)
    ]


def test_epochs_and_seeds_differ_from_each_other():
    orders = [
        tuple(row_at(epoch * 17 + i, 17, seed) for i in range(17))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16


class Rows:
    """Pairs in memory: row i is the Example of index i."""

    path = Path("rows.jsonl")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example(index, [0], [0], "", "")


def test_the_next_examples_are_those_of_the_stream_across_epochs():
    examples, position, skipped = next_examples(
        Rows(5), position=3, count=9, seed=1, fits=lambda example: True
    )
    assert [example.index for example in examples] == [row_at(p, 5, seed=1) for p in range(3, 12)]
    assert (position, skipped) == (12, 0)


def test_rows_that_do_not_fit_are_skipped_and_counted():
    rows, fits = Rows(10), lambda example: example.index % 3 != 0
    stream = [row_at(p, 10, seed=1) for p in range(100)]
    position, seen, skipped = 0, [], 0
    for _ in range(4):
        examples, after, too_long = next_examples(rows, position, 6, 1, fits)
        assert after - position == 6 + too_long
        position, skipped = after, skipped + too_long
        seen += [example.index for example in examples]
    assert seen == [row for row in stream[:position] if row % 3] and len(seen) == 24
    assert skipped == sum(row % 3 == 0 for row in stream[:position]) > 0


def test_rows_of_which_none_fits_are_refused():
    for position in (0, 3):
        seen = []
        with pytest.raises(InputError) as refusal:
            next_examples(
                Rows(5),
                position,
                2,
                seed=0,
                fits=lambda example, seen=seen: seen.append(example.index),
            )
        assert_refused(str(refusal.value), "rows.jsonl", "5 rows", "--max-prompt")
        assert set(seen) == set(range(5)) and len(seen) <= 10  # every row, and then no further


def test_one_row_that_fits_is_found_wherever_the_stream_stands():
    for position in range(20):
        for row in range(10):
            examples, _, skipped = next_examples(
                Rows(10), position, 1, seed=2, fits=lambda example, row=row: example.index == row
            )
            assert [example.index for example in examples] == [row] and skipped < 20


# ---------------------------------------------------------------------------------------------------------------- seeds
def test_stream_seeds_never_change():
    """A run resumed with a later version must draw what the first one would have drawn."""
    assert stream_seed(0) == 7896617691693857887
    assert stream_seed(1, 2, 3) == 6498626229777268288


def test_a_stream_seed_differs_in_every_argument():
    seeds = [
        stream_seed(a, b, c) for a in range(1, 4) for b in range(1, 4) for c in range(1, 4)
    ] + [stream_seed(1), stream_seed(1, 2)]
    assert len(set(seeds)) == 29
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator takes
