"""Bad input: every command refuses it in one line with exit code 2, and changes no file.

A case is a command, an edit of a world (a model, rows, a finished run), flags, and what the line
must name. What the line says beside that is often a library's own text.
"""

import hashlib
import io
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BRIEF
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import preflight
import sample
import train
from support.errors import exit_on_bad_input, printable
from support.tokenizer import Tokenizer

OF_A_MODEL = ["--model=model", "--max-trace=4", "--device=cpu"]
COMMANDS = {
    "train": (train.main, ["--model=model", "--data=rows.jsonl", "--out=new", *BRIEF]),
    "resume": (train.main, ["--out=run", "--resume", "--steps=3"]),
    "sample": (sample.main, [*OF_A_MODEL, "--question=a"]),
    "evaluate": (evaluate.main, [*OF_A_MODEL, "--data=rows.jsonl"]),
    "gain": (evaluate.main, [*OF_A_MODEL, "--gold=a"]),
    "preflight": (preflight.main, [*OF_A_MODEL, "--data=rows.jsonl"]),
}


def tree(folder: Path) -> str:
    """A hash of every name, link and content below it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode(errors="surrogateescape"))
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def run(name: str, flags: list[str], monkeypatch) -> int:
    main, common = COMMANDS[name]
    monkeypatch.setattr("sys.argv", ["command", *common, *flags])
    try:
        exit_on_bad_input(main)()
    except SystemExit as stop:
        return stop.code
    return 0


def assert_refused(name: str, flags: list[str], says: list[str], monkeypatch, capfd) -> None:
    before = tree(Path.cwd())
    code = run(name, flags, monkeypatch)
    error = capfd.readouterr().err
    assert code == 2, (code, error)
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert error[:-1].isprintable()
    for text in says:
        assert text in error, error
    assert tree(Path.cwd()) == before


# ---- edits
Edit = Callable[[], object]
Case = tuple[str, Edit, list[str], list[str]]  # command, edit, flags, what the line must name


def merge(file: str, **fields) -> Edit:
    """Sets fields of a JSON file."""

    def edit() -> None:
        value = json.loads(Path(file).read_text()) if Path(file).exists() else {}
        Path(file).write_text(json.dumps(value | fields))

    return edit


def put(file: str, content: bytes | str) -> Edit:
    content = content.encode() if isinstance(content, str) else content
    return lambda: Path(file).write_bytes(content)


def drop(file: str) -> Edit:
    return lambda: Path(file).unlink()


def tensors(**changed: torch.Tensor) -> Edit:
    file = Path("model/model.safetensors")
    return lambda: save_file(load_file(file) | changed, file)


def lose_first_rows() -> None:
    """The moments as if their first two rows were in another rank's file, which is gone."""
    with safe_open(OPTIMIZER, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    where = json.loads(metadata["DCP_SHARDING_INFO"])
    for name in names:
        where[name]["saved_offsets"][0] = 2
    kept = {name: tensor[2:].contiguous() for name, tensor in load_file(OPTIMIZER).items()}
    save_file(kept, OPTIMIZER, metadata | {"DCP_SHARDING_INFO": json.dumps(where)})


# ---- tables
NORM = "model.norm.weight"
CONFIG, NRT, TOKENIZER = "model/config.json", "model/nrt.json", "model/tokenizer.json"
GENERATION, MAP = "model/generation_config.json", "model/special_tokens_map.json"
WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
LAST = "run/checkpoint-000002"
ARGS, PROGRESS = "run/args.json", f"{LAST}/progress.json"
OPTIMIZER = f"{LAST}/optimizer/shard-00001-model-00001-of-00001.safetensors"
EMPTY = struct.pack("<Q", 2) + b"{}"  # safetensors without tensors
ROWS, SECOND = "rows.jsonl", "rows.jsonl:2"
GOOD = b'{"question": "a", "answer": "b"}\n'


MODEL = [
    # What else of a config.json, a tensor or a row is refused: test_weights.py, test_data.py.
    ("train", merge(CONFIG, hidden_size=None), [], [CONFIG]),
    ("train", merge(CONFIG, vocab_size=9), [], ["model"]),
    *[("sample", put(CONFIG, text), [], [CONFIG]) for text in ("{", b"\xff", "[]")],
    ("train", put(TOKENIZER, "{}"), [], [TOKENIZER]),
    *[("train", put(file, "{"), [], [file]) for file in (GENERATION, NRT, MAP, INDEX)],
    *[("train", drop(file), [], [file]) for file in (CONFIG, TOKENIZER, WEIGHTS)],
    ("train", merge(NRT, marker=3), [], [NRT]),
    ("train", merge("model/tokenizer_config.json", eos_token=["<eos>"]), [], ["model"]),
    ("train", tensors(**{NORM: torch.ones(15)}), [], [WEIGHTS, NORM, "[15]", "[16]"]),
    ("train", put(WEIGHTS, b"\xff" * 64), [], [WEIGHTS]),
    ("train", put(INDEX, '{"metadata": {}}'), [], [INDEX]),
    ("train", merge(INDEX, weight_map={"a": "gone.safetensors"}), [], [INDEX]),
]
DATA = [
    *[(name, put(ROWS, GOOD + b"12"), [], [SECOND]) for name in ("train", "evaluate", "preflight")],
    ("train", put(ROWS, GOOD + b'["a", "b"]'), [], [SECOND, "is no JSON object"]),
    ("train", put(ROWS, "\n"), [], [ROWS]),
    ("train", put(ROWS, b'{"question": "' + b"a " * 3000 + b'", "answer": "b"}'), [], [ROWS]),
    ("evaluate", drop(ROWS), [], [ROWS]),
]


def flags(command: str, *cases: str) -> list[Case]:
    """Each string is flags; the line names the first one, or what stands behind "-> "."""
    made = []
    for case in cases:
        given, _, says = case.partition(" -> ")
        given = given.split(" --")
        given = [given[0], *[f"--{flag}" for flag in given[1:]]]
        made.append((command, lambda: None, given, [says or given[0].partition("=")[0]]))
    return made


MATRIX = "def f(logp, null_logp): return logp"
FIVE = "def f(logp, null_logp, example, traces, tokenizer): ..."
FLAGS = [
    *flags(
        "train",
        *"--lr=nan --lr=inf --temperature=-1 --steps=0 --max-trace=1e3".split(),
        *"--device=tpu --marker=<eos> --no-such-flag=1 --step=3".split(),
        "--questions=5 --updates=2",
        "--traces=1",
        "--traces=1 --center=none -> --scale",
        "--traces=0 --clip-null",
        "--traces=0 --scale=none -> --scale",
        "--traces=0 --micro-traces=2 -> --micro-traces",
        "--traces=0 --temperature=0.5 -> --temperature",
        "--traces=0 --aggregator=prob -> --aggregator",
        "--clip-null --aggregator=r3 -> compares traces",
        "--resume --overwrite",
        "--aggregator=gone.py:f",
        "--aggregator=geometric -> unknown aggregator 'geometric'; there are log_prob, prob",
        "--model=nowhere -> nowhere",
        "--model=meta-llama/Llama-3.2-1B -> hf download",
        "--data=nowhere.jsonl -> nowhere.jsonl",
        "--eval-data=model -> model",
        "--prompt-format=no place -> {question}",
        "--max-trace=4096 -> max_position_embeddings",
        "--out=rows.jsonl",
        "--out=run -> already holds a run",
        "--model=run/final --out=run --overwrite -> would be deleted",
        "--data=run/log.jsonl --out=run --overwrite -> would be deleted",
    ),
    *flags(
        "resume",
        *"--model=words --data=model --marker=a --aggregator=log_prob --seed=7".split(),
        *"--dtype=bfloat16 --prompt-format=Q{question}".split(),
    ),
    *flags("sample", "--device=cuda:99", "--marker=<new> -> <new>", "--question="),
    *flags("sample", "--question=" + "a " * 3000),
    *flags("sample", "--seed=3"),
    *flags("sample", "--model=run -> the run's model is run/final"),
    *flags("preflight", "--race-seed=-1", "--limit=0"),
    *flags("evaluate", "--question=a", "--gold=a", "--question=a --gold=a", "--limit=0"),
    *flags("evaluate", "--max-trace=0", "--predictions=gone/rows.jsonl"),
    *flags("evaluate", "--temperature=1", "--max-answer=3", "--seed=3"),  # no effect there
    *flags("gain", "--seed=3 -> --question", "--question=a --seed=3 -> --seed"),
    *flags("gain", "--question=a --max-answer=0 -> --max-answer 0"),
    *flags("gain", "--question=a --temperature=-1 -> --temperature -1.0"),
    *flags("gain", "--question=a --predictions=new.jsonl -> --predictions"),
    *flags("gain", "--question=a --limit=3 -> --limit"),
    ("train", put("f.py", FIVE), ["--clip-null", "--aggregator=f.py:f"], ["sees their text"]),
    ("train", put("f.py", FIVE), ["--aggregator=f.py:g"], ["f.py: defines no function 'g'"]),
    ("train", put("g.py", MATRIX), ["--aggregator=g.py:f"], ["g.py:f", "shape [2, 3]"]),
]
RUN = [
    ("resume", merge(ARGS, lr=math.nan), [], ["lr"]),
    ("resume", merge(ARGS, center="median"), [], ["center"]),
    ("resume", merge(ARGS, unknown=1), [], ["unknown"]),
    *[("resume", merge(ARGS, **{name: [2]}), [], [ARGS, name]) for name in ("steps", "lr", "seed")],
    *[("resume", merge(ARGS, **{name: 2}), [], [ARGS, name]) for name in ("data", "marker")],
    ("resume", lambda: None, ["--out=typo"], ["typo/args.json"]),
    *[("resume", put(ARGS, text), [], [ARGS]) for text in ("{", '{"somebody": "else"}')],
    ("resume", drop(ARGS), [], ["args.json"]),
    ("resume", merge(PROGRESS, position=None), [], [LAST]),
    ("resume", drop(PROGRESS), [], [LAST]),
    ("resume", put(ROWS, GOOD * 6), [], [ROWS, "changed"]),
    ("resume", merge(NRT, prompt_format="Q {question}"), [], ["model", LAST]),
    ("resume", merge(f"{LAST}/nrt.json", marker="a"), [], [LAST, "marker"]),
    *[("resume", put(OPTIMIZER, content), [], [LAST]) for content in (b"short", EMPTY)],
    ("resume", lambda: shutil.copy(WEIGHTS, OPTIMIZER), [], [LAST]),
    ("resume", lose_first_rows, [], [LAST, "lacks a part of"]),  # torch would read zeros
    ("resume", merge(f"{LAST}/config.json", num_hidden_layers=3), [], [LAST]),
    ("resume", put(f"{LAST}/model.safetensors", b"short"), [], [LAST]),
    ("resume", lambda: [shutil.rmtree(path) for path in Path("run").glob("c*")], [], ["final"]),
]
CASES = [*MODEL, *DATA, *FLAGS, *RUN]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_cannot_be_used_is_refused_in_one_line_that_names_it(case, world, monkeypatch, capfd):
    command, edit, given, says = CASES[case]
    edit()
    assert_refused(command, given, says, monkeypatch, capfd)


def test_a_tracker_that_is_not_installed_is_refused(world, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused("train", ["--tracker=wandb"], ["--tracker wandb: is not"], monkeypatch, capfd)


# ---- odd, and used all the same
def test_special_tokens_that_rows_spell_out_are_counted_and_said(world, monkeypatch, capfd):
    rows = [("a <eot> b", "c"), ("a", "b <eos> c"), ("a", "b <eos>"), ("a", "b")]
    put(ROWS, "\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows))()
    assert run("train", ["--questions=1"], monkeypatch) == 0
    says = "3 spell out special tokens, which they become, 1 answers go on after an eos"
    assert says in capfd.readouterr().out


def test_the_share_of_tokens_that_the_tokenizer_does_not_know_is_said(world, monkeypatch, capfd):
    put(ROWS, '{"question": "english words a", "answer": "b"}\n')()
    assert run("train", ["--questions=1", "--prompt-format={question}"], monkeypatch) == 0
    assert " (50% of their tokens are <" in capfd.readouterr().out
    put(ROWS, GOOD)()
    assert run("train", ["--questions=1", "--overwrite"], monkeypatch) == 0
    assert "of their tokens" not in capfd.readouterr().out


def test_a_token_without_a_row_in_the_embedding_is_refused_only_where_a_row_spells_it_out(
    world, monkeypatch, capfd
):
    tokenizer = Tokenizer("model")
    tokenizer.model.add_special_tokens(["<far>", "<farther>"])
    tokenizer.model.save(TOKENIZER)  # ids 10, which has a row, and 11
    assert run("sample", [], monkeypatch) == 0
    put(ROWS, GOOD + b'{"question": "<farther>", "answer": "b"}\n')()
    capfd.readouterr()
    assert_refused("evaluate", [], [SECOND, "<farther>"], monkeypatch, capfd)


def test_a_command_does_not_exceed_the_positions_of_its_model(world, monkeypatch, capfd):
    config = Path(CONFIG)
    merge(CONFIG, max_position_embeddings=12)()
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())  # a byte order mark is no part of it
    flags = ["--max-trace=500", "--max-answer=500", "--temperature=3"]
    assert run("sample", flags, monkeypatch) == 0
    assert run("evaluate", ["--max-trace=500"], monkeypatch) == 0
    assert "--max-trace 6" in capfd.readouterr().err


def test_an_answer_does_not_move_the_cursor():
    assert printable("a\x1b[2Jb\r\x07\u202e\n\tc é") == "a\\x1b[2Jb\\r\\x07\\u202e\n\tc é"


def test_a_terminal_without_letters_beyond_ascii_shows_their_escapes(world, monkeypatch):
    file = Path(TOKENIZER)
    file.write_text(file.read_text().replace('"a"', '"aé"'), "utf-8")
    put(ROWS, '{"question": "aé", "answer": "b"}\n' * 2)()
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    assert run("train", ["--out=é"], monkeypatch) == 0
    assert run("train", ["--model=é"], monkeypatch) == 2
    for stream in streams:
        stream.flush()
        assert "\\xe9" in stream.buffer.getvalue().decode("ascii")
