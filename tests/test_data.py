"""data.py and support/tokenizer.py: rows to token ids, the marker, the export, refusals by file and
line, an order that depends on the seed alone."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jinja2.sandbox  # comes with torch
import numpy as np
import pytest
import tiny
import tokenizers
from conftest import BRIEF
from tiny import lines_of

import train
from data import Example, Pairs, fits, next_examples, row_at, stream_seed
from support.args import Args
from support.errors import InputError
from support.tokenizer import MARKER, PROMPT_FORMAT, Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
EOS = {"llama3": "<|end_of_text|>", "llama2": "</s>"}

every_kind = pytest.mark.parametrize("kind", ["llama3", "llama2"])


def library_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory without our additions."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_rows(file: Path, *rows: object) -> Path:
    """A JSONL file. A row of bytes is written as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def example_of(tmp_path: Path, tokenizer: Tokenizer, row: object) -> Example:
    """The example of a file with this one row."""
    return Pairs(write_rows(tmp_path / "rows.jsonl", row), tokenizer)[0]


def pair(question: object, answer: object) -> dict:
    return {"question": question, "answer": answer}


def conversation(*turns: tuple[str, object]) -> dict:
    """A row of messages from (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ---- rows
@every_kind
def test_a_question_becomes_the_prompt_and_the_answer_ends_with_eos(kind, tmp_path):
    row = pair(" What is 2 + 3?\n", "It is 5. ")
    tokenizer = Tokenizer(GOLDEN / kind)
    example = example_of(tmp_path, tokenizer, row)
    library = library_tokenizer(GOLDEN / kind)
    eos = library.token_to_id(EOS[kind])
    prompt = "<|user|>\nWhat is 2 + 3?\n<|assistant|>\n"
    assert example.prompt == library.encode(prompt).ids  # the library puts bos in front
    assert example.answer == [*library.encode("It is 5.", add_special_tokens=False).ids, eos]
    assert (example.question, example.gold, example.index) == ("What is 2 + 3?", "It is 5.", 0)
    # Some data has eos in its text.
    assert tokenizer.encode_answer("It is 5." + EOS[kind]) == example.answer
    messages = conversation(("user", row["question"]), ("assistant", row["answer"])) | {"id": 7}
    assert example_of(tmp_path, tokenizer, messages) == example


@every_kind
def test_the_last_assistant_turn_is_the_answer_and_the_turns_before_it_the_prompt(kind, tmp_path):
    tokenizer = Tokenizer(GOLDEN / kind)
    row = conversation(
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Kim."),
        ("user", "Where?"),
        ("assistant", "Paris."),
        ("user", "When?"),
    )
    example = example_of(tmp_path, tokenizer, row)
    assert (example.question, example.gold) == ("Where?", "Paris.")
    text = "<|user|>\nBe brief.\n\nWho?\n<|assistant|>\n"
    text += f"Kim.{EOS[kind]}\n<|user|>\nWhere?\n<|assistant|>\n"
    assert example.prompt == tokenizer.encode_prompt(tokenizer.bos + text)
    assert example.prompt.count(tokenizer.eos_ids[0]) == 1  # one token, not its letters
    assert example.answer == tokenizer.encode_answer("Paris.")


def test_rows_are_found_whatever_stands_between_them(tmp_path):
    rows = [pair(f"{i} é 日本", "x" * i) for i in range(1, 6)]
    a, b, c, d, e = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n" + a + b"\r\n\n  \n" + b + b"\n" + c + b"\n\n" + d + b"\n" + e)
    pairs = Pairs(file, Tokenizer(GOLDEN / "llama3"))
    assert len(pairs) == 5
    for i in (4, 0, 2, 1, 3, 0):
        example = pairs[i]
        assert example.index == i
        assert pair(example.question, example.gold) == rows[i]


# ---- tokenizer
@pytest.mark.parametrize(
    "adds, eos, prompt",
    [
        ("$A", "<eos>", [2, 3]),
        ("<bos> $A <eos>", "<eos>", [1, 2, 3]),
        ("<bos> $A", "<bos>", [1, 2, 3]),  # one token is both
    ],
)
@pytest.mark.parametrize("special", [("<eos>", "<bos>"), ("<eos>",)])  # bos: an ordinary word
def test_a_prompt_starts_as_the_tokenizer_starts_texts_and_never_ends_with_eos(
    adds, eos, prompt, special, tmp_path
):
    words = ("<eos>", "<bos>", "a", "b")[len(special) :]
    tiny.tokenizer_dir(tmp_path, words, special, eos=eos)
    made = library_tokenizer(tmp_path)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=adds, special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, prompt_format="{question}")
    assert tokenizer.prompt_ids(["a b"]) == prompt
    assert tokenizer.encode_answer("a") == [2, 1 if eos == "<bos>" else 0]


@pytest.mark.parametrize(
    "named, config, generation, expected",
    [
        ("<eot>", None, None, [2]),
        ({"__type": "AddedToken", "content": "<eot>", "lstrip": False}, None, None, [2]),
        (None, 2, None, [2]),
        (None, [3, 1], None, [3, 1]),
        (None, None, 2, [2]),
        (None, None, [3, 1], [3, 1]),
        ("<eot>", [1, 2], 3, [2, 3, 1]),
    ],
)
def test_every_eos_counts_and_answers_end_with_the_tokenizers_own(
    named, config, generation, expected, tmp_path
):
    tiny.tokenizer_dir(tmp_path, special=("<unk>", "<end>", "<eot>", "<eom>"), eos=named)
    for name, ids in (("config.json", config), ("generation_config.json", generation)):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids == expected
    assert tokenizer.encode_answer("a") == [4, expected[0]]


def test_padding_and_truncation_stored_in_the_file_are_ignored(tmp_path):
    tiny.tokenizer_dir(tmp_path)
    made = library_tokenizer(tmp_path)
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode_prompt("a b c") == [1, 2, 3]


def test_a_new_token_never_takes_the_id_of_another(tmp_path):
    """The library counts up from the number of tokens."""
    made = json.loads((tiny.tokenizer_dir(tmp_path) / "tokenizer.json").read_text())
    made["model"]["vocab"] |= {"c": 5, "d": 6}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="leaves out ids"):
        Tokenizer(tmp_path)
    assert Tokenizer(tmp_path, marker="d").marker_id == 6


# ---- marker
@pytest.mark.parametrize(
    "special, eos, marker, cut",
    [
        (("<unk>", "<bos>", "<eos>", "<eot>"), "<eos>", None, [0, 1, 2, 3]),
        (("<unk>", "<bos>", "<eos>", "<eot>"), "<eos>", "<eot>", [0, 1, 2]),
        (("<unk>", "<bos>", "<eos>", "<eot>"), "<eos>", "c", [0, 1, 2, 3]),
        (("<unk>",), "d", None, [0, 4]),  # an eos that is an ordinary word
    ],
)
def test_every_special_token_but_the_marker_cuts_a_trace(special, eos, marker, cut, tmp_path):
    tiny.tokenizer_dir(tmp_path, special=special, eos=eos)
    made = library_tokenizer(tmp_path)
    made.add_tokens(["<thought>"])  # added, but not special
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path, marker=marker).cut_ids == cut


@pytest.mark.parametrize(
    "name, reserved",
    [("<|reserved_special_token_0|>", True), ("<|start_header_id|>", False), ("<|new|>", False)],
)
def test_a_reserved_token_is_recognised_until_a_directory_has_it_as_its_marker(
    name, reserved, tmp_path
):
    tokenizer = Tokenizer(GOLDEN / "llama3", marker=name)
    assert tokenizer.marker_is_reserved is reserved
    assert tokenizer.marker_is_new is (name == "<|new|>")
    assert ("lacks the marker" in tokenizer.note) is tokenizer.marker_is_new
    tokenizer.save(tmp_path)
    assert not Tokenizer(tmp_path).marker_is_reserved  # its embedding has been trained


# ---- what is saved
@pytest.mark.parametrize("prompt_format", [PROMPT_FORMAT, "chat"])
@pytest.mark.parametrize("kind", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_transformers_reads_in_an_export_what_was_trained(kind, prompt_format, tmp_path):
    """expected.json was written by transformers, from files with these digests."""
    expected = json.loads((GOLDEN / kind / "expected.json").read_text())
    transformers = expected[prompt_format]
    tokenizer = Tokenizer(GOLDEN / kind, prompt_format=prompt_format)
    tokenizer.save(tmp_path)
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp_path.iterdir()}
    assert digests == transformers["files"]  # else: tests/golden/cut_tokenizers.py
    assert list(map(tokenizer.prompt_ids, expected["turns"])) == transformers["prompts"]
    assert [tokenizer.marker_id, MARKER] == transformers["marker"]
    assert tokenizer.eos_ids == transformers["stops"]
    back = Tokenizer(tmp_path)
    assert list(map(back.prompt_ids, expected["turns"])) == transformers["prompts"]
    assert (back.marker_id, back.eos_ids) == (tokenizer.marker_id, tokenizer.eos_ids)


@pytest.mark.parametrize(
    "name, named, special",
    [
        ("tokenizer_config", {"added_tokens_decoder": {"9": {"content": "<x>"}}}, False),
        ("tokenizer_config", {"pad_token": "<x>", "add_bos_token": True}, True),
        ("tokenizer_config", {"image_token": {"__type": "AddedToken", "content": "<x>"}}, True),
        ("tokenizer_config", {"extra_special_tokens": ["<x>"]}, True),
        ("tokenizer_config", {"additional_special_tokens": [{"content": "<x>"}]}, True),
        ("tokenizer_config", {"extra_special_tokens": {"image_token": "<x>"}}, True),
        ("special_tokens_map", {"sep_token": "<x>"}, True),
    ],
)
def test_a_token_that_another_file_names_is_a_token(name, named, special, tmp_path):
    tiny.tokenizer_dir(tmp_path, eos=None)
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(named | {"eos_token": "d"}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.encode_prompt("a <x>"), tokenizer.marker_id) == ([1, 5], 6)
    assert tokenizer.cut_ids == ([0, 4, 5] if special else [0, 4])
    (tmp_path / "final").mkdir()
    tokenizer.save(tmp_path / "final")
    exported = library_tokenizer(tmp_path / "final")
    assert exported.encode("a <x>").ids == [1, 5]


@pytest.mark.parametrize("marker", ["<|new|>", "<|start_header_id|>"])
def test_a_saved_marker_stays_in_text_from_which_special_tokens_are_dropped(marker, tmp_path):
    """Other software drops them, and finds the answer behind the marker."""
    shutil.copytree(GOLDEN / "llama3", tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer(tmp_path, marker=marker)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    entry = {"content": marker, "special": True}
    described["added_tokens_decoder"] = {str(tokenizer.marker_id): entry}
    described |= {"pad_token": marker, "additional_special_tokens": [marker, "<|other|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = Tokenizer(tmp_path, marker=marker)
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"added_tokens_decoder", "pad_token"} & described.keys()
    assert described["additional_special_tokens"] == ["<|other|>"]
    ids = [*tokenizer.encode_prompt("trace"), tokenizer.marker_id, *tokenizer.encode_answer("42")]
    assert library_tokenizer(tmp_path).decode(ids, skip_special_tokens=True) == f"trace{marker}42"


def test_a_flag_overrides_what_is_saved_and_the_paper_is_the_default(tmp_path):
    initial = Tokenizer(tiny.tokenizer_dir(tmp_path))
    assert initial.prompt_format == PROMPT_FORMAT == "<|user|>\n{question}\n<|assistant|>\n"
    assert initial.marker == MARKER
    Tokenizer(tmp_path, marker="<saved>", prompt_format="Q: {question}").save(tmp_path)
    flags = Tokenizer(tmp_path, marker="<other>", prompt_format="{question}!")
    assert (flags.marker, flags.prompt_format) == ("<other>", "{question}!")


SYSTEM = ("system", '  system says "x\\n{{}}" ')
USER = ("user", '  user says "x\\n{{}}" ')
ASSISTANT = ("assistant", '  assistant says "x\\n{{}}" ')


@every_kind
@pytest.mark.parametrize(
    "prompt_format", [PROMPT_FORMAT, "{question}", '\'{{ \\ "{question}" %}} naïve\n{question}\t']
)
@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER]])
def test_the_exported_template_makes_the_prompt_of_training(kind, prompt_format, turns, tmp_path):
    tokenizer = Tokenizer(GOLDEN / kind, prompt_format=prompt_format)
    example = example_of(tmp_path, tokenizer, conversation(*turns, ("assistant", "gold")))
    # The settings of transformers.
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = jinja.from_string(tokenizer.chat_template())
    text = template.render(**conversation(*turns), add_generation_prompt=True)
    assert tokenizer.model.encode(text, add_special_tokens=False).ids == example.prompt
    if turns == [USER]:  # and the exported directory's own template, read by us, has one bos
        tokenizer.save(tmp_path)
        served = Tokenizer(tmp_path, prompt_format="chat")
        assert served.prompt_ids([example.question]) == example.prompt


# ---- the directory's own chat template
CHATML = """{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_a_template_in_a_file_of_its_own_comes_first_and_gets_no_bos_that_it_has_not(tmp_path):
    """Templates in tokenizer_config.json, and what their exports remember: `transformers` above."""
    shutil.copytree(GOLDEN / "llama3", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert "--prompt-format chat" in Tokenizer(tmp_path).note
    tokenizer = Tokenizer(tmp_path, prompt_format="chat")
    eos = tokenizer.eos
    text = f"<|user|>x{eos}\n<|assistant|>y{eos}\n<|user|>z{eos}\n<|assistant|>"  # without bos
    assert tokenizer.prompt_ids(["x", "y", "z"]) == tokenizer.encode_prompt(text)


@pytest.mark.parametrize(
    "template, says",
    [
        ("", "no chat template"),
        ("{{ messages", "template fails"),
        ("{{ raise_exception('no user turns') }}", "no user turns"),
        ("{{ messages | unknown }}", "unknown"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),  # no way out of the sandbox
        ("<|assistant|>", "drops the question"),
    ],
)
def test_a_chat_template_that_does_not_work_is_refused(template, says, tmp_path):
    tiny.tokenizer_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=says):
        Tokenizer(tmp_path, prompt_format="chat")


SEEN = """{{ bos_token }}{{ pad_token }}{% generation %}{% set x = 1 %}
{{- {"b": "<é>", "a": x} | tojson }}
{%- endgeneration -%} {{ x is defined }} {{ tools is none and documents is none }}
{%- for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %} {{ message.content }}
{%- endfor %}{{ strftime_now("%%") }}{{ {"a": 1} | tojson(indent=1) }}"""


def test_a_chat_template_sees_what_transformers_shows_it(tmp_path):
    """The text was rendered by transformers 5.23."""
    tiny.tokenizer_dir(tmp_path, special=("<eos>", "<bos>", "<pad>"))
    templates = [{"name": "rag", "template": "{{"}, {"name": "default", "template": SEEN}]
    described = {"bos_token": "<bos>", "pad_token": {"content": "<pad>"}, "eos_token": "<eos>"}
    described["chat_template"] = templates
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    text = Tokenizer(tmp_path, prompt_format="chat").prompt_text(["a", "b", "a"])
    assert text == '<bos><pad>{"b": "<é>", "a": 1}False True a%{\n "a": 1\n}'


def test_the_format_chat_says_what_it_needs_where_jinja2_is_not_installed(tmp_path, monkeypatch):
    tiny.tokenizer_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="pip install jinja2"):
        Tokenizer(tmp_path, prompt_format="chat")


# ---- refusals
GOOD = pair("a", "b")
BAD_ROWS = [
    (b"{broken", "line 1 column 2"),
    (b"[" * 100_000, None),
    (b'{"question": "\xff", "answer": "b"}', None),
    (["a", "b"], None),
    ({"answer": "b"}, "lacks 'question'"),
    ({"prompt": "a", "question": "b"}, "lacks 'answer'"),
    (pair(3, "b"), "int"),
    (pair("a", None), "NoneType"),
    (pair("a", " \n"), "answer is empty"),
    (pair("", "b"), "question is empty"),
    (pair("a", "\ude00 b"), "surrogates"),  # half a character
    ({"messages": "a"}, None),
    ({"messages": []}, "alternate"),
    (conversation(("system", "a"), ("user", "b")), "alternate"),
    (conversation(("assistant", "b")), "alternate"),
    (conversation(("user", "b"), ("user", "b"), ("assistant", "b")), "alternate"),
    (conversation(("user", "b"), ("tool", "b"), ("assistant", "b")), "tool"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "content"),
    (conversation(("user", [{"text": "a"}]), ("assistant", "b")), None),
]


@pytest.mark.parametrize("row, says", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_refused_at_the_start_by_file_and_line(row, says, tmp_path):
    rows = [GOOD, GOOD, GOOD, b"", GOOD, GOOD, row, GOOD]  # line 7: blank lines count
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError, match=says) as refusal:
        Pairs(file, Tokenizer(GOLDEN / "llama3"))
    assert str(refusal.value).startswith(f"{file}:7: ")


@pytest.mark.parametrize(
    "eos, config, flags, says",
    [
        (None, {}, {}, "no eos token"),
        ("<gone>", {"vocab_size": 5}, {"marker": "a"}, "has a token 5, .* vocab_size 5"),
        (None, {"eos_token_id": 9}, {}, "eos is token 9"),
        ("<eos>", {}, {"marker": "<eos>"}, "--marker '<eos>' is an eos"),
        ("<eos>", {}, {"marker": "\udcff"}, "--marker .*surrogates"),
        ("<eos>", {}, {"prompt_format": "no place"}, "lacks {question}"),
        ("<eos>", {"vocab_size": 4}, {"marker": "a"}, "has a token 4, .* vocab_size 4"),
    ],
)
def test_a_tokenizer_that_would_train_something_else_is_refused(eos, config, flags, says, tmp_path):
    tiny.tokenizer_dir(tmp_path, eos=eos)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        Tokenizer(tmp_path, **flags)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"positions": 10}, True),  # prompt 3, trace 4, a forced marker, answer 2
        ({"positions": 9}, False),
        ({"positions": 10, "max_prompt": 3, "max_answer": 2}, True),
        ({"positions": 10, "max_prompt": 2}, False),
        ({"positions": 10, "max_answer": 1}, False),
    ],
)
def test_an_example_fits_up_to_each_limit_and_with_a_forced_marker(limits, expected):
    example = Example(0, [1, 2, 3], [4, 5], "", "")
    assert fits(example, max_trace=4, **limits) is expected
    assert not fits(replace(example, prompt=[]), max_trace=4, **limits)


# ---- order of rows
def test_the_order_is_a_permutation_an_epoch_and_depends_on_seed_and_epoch_alone():
    stream = [row_at(position, 17, seed=3) for position in range(85)]
    expected = []
    for epoch in range(5):
        expected += np.random.default_rng([3, epoch]).permutation(17).tolist()
    assert stream == expected
    for position in np.random.default_rng(0).permutation(85).tolist():  # asked in any order
        row_at(position, 17, seed=4)  # other streams in between
        row_at(position, 19, seed=3)
        assert row_at(position, 17, seed=3) == stream[position]


class Rows(list):
    """Stands for Pairs, in memory: row i is the Example of index i."""

    path = Path("rows.jsonl")

    def __init__(self, count: int) -> None:
        super().__init__(Example(index, [0], [0], "", "") for index in range(count))


def test_the_next_examples_are_those_of_the_stream_that_fit_and_the_others_are_counted():
    stream = [row_at(p, 10, seed=1) for p in range(100)]
    position = skipped = 0
    seen = []
    for _ in range(4):  # over several epochs
        examples, after, too_long = next_examples(
            Rows(10), position, 6, seed=1, row_fits=lambda example: example.index % 3 != 0
        )
        assert after - position == 6 + too_long
        position = after
        skipped += too_long
        seen += [example.index for example in examples]
    assert seen == [row for row in stream[:position] if row % 3] and len(seen) == 24
    assert skipped == sum(row % 3 == 0 for row in stream[:position]) > 0


@pytest.mark.parametrize("position", [0, 3])
def test_rows_of_which_none_fits_are_refused(position):
    seen = []

    def row_fits(example: Example) -> bool:
        seen.append(example.index)
        return False

    with pytest.raises(InputError, match=r"rows.jsonl: .* 5 rows fits --max-prompt"):
        next_examples(Rows(5), position, 2, seed=0, row_fits=row_fits)
    assert set(seen) == set(range(5)) and len(seen) <= 10  # every row, and then no further


# ---- seeds
def test_a_stream_seed_depends_on_every_argument_and_never_changes():
    """A run resumed with a later version draws what the first one would have drawn."""
    assert stream_seed(0) == 7896617691693857887
    assert stream_seed(1, 2, 3) == 6498626229777268288
    three = range(1, 4)
    names = [(a, b, c) for a in three for b in three for c in three]
    seeds = {stream_seed(*name) for name in [*names, (1,), (1, 2)]}
    assert len(seeds) == 29
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator takes


# ---- a run that goes on
def test_more_steps_do_not_stretch_the_warm_up(world):
    flags = ["--model=model", "--data=rows.jsonl", "--out=new", "--warmup=1", *BRIEF]
    for steps in (4, 6, 8):  # each goes on from the one before
        train.train(train.parse_args([*flags, "--resume", f"--steps={steps}"], ""))
    log = lines_of("new/log.jsonl")
    rates = [record["lr"] / Args.lr for record in log]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
