"""A run's folder: nothing of the user's is touched, what was saved stays whole, one run in it."""

import fcntl
import io
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_refusals import COMMANDS, assert_refused, merge, put, run, tensors, tree
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

import train
from data import Pairs
from support import run as checkpoint_module
from support.errors import printable
from support.run import LOCKS, check_cover, checkpoints, newest_checkpoint
from support.tokenizer import Tokenizer
from support.weights import load_model, stored_dtypes

NORM = "model.norm.weight"


def steps_of(log: str) -> list[int]:
    return [json.loads(line)["step"] for line in Path(log).read_text().splitlines()]


# ---- whose files
THEIRS = [
    "final-thesis.txt",
    "final_results.csv",
    "checkpoint-notes/a",
    "checkpoint-best/weights",
    "checkpoint-000001-backup/weights",
    "checkpoint-1/weights",
    "notes.tmp",
    "final.bak",
    "log.jsonl.gz",
]


def put_theirs(folder: str) -> dict[Path, str]:
    kept = {Path(folder) / name: name for name in THEIRS}
    for path, text in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return kept


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume", "--steps=4", "--keep=1"]], ids=str)
def test_files_of_other_names_stay_in_a_run_that_is_overwritten_or_resumed(
    flags, world, monkeypatch
):
    theirs = put_theirs("run")
    command = "train" if "--overwrite" in flags else "resume"
    assert run(command, ["--out=run", *flags], monkeypatch) == 0
    assert {path: path.read_text() for path in theirs} == theirs
    assert (
        newest_checkpoint(Path("run")).name == f"checkpoint-00000{2 if command == 'train' else 4}"
    )


def test_files_of_other_names_stay_where_a_run_begins(world, monkeypatch):
    theirs = put_theirs("new")
    assert run("train", [], monkeypatch) == 0
    assert {path: path.read_text() for path in theirs} == theirs


@pytest.mark.parametrize(
    "name", ["args.json", "final", "log.jsonl", "checkpoint-000001", "final.tmp", "args.json.tmp"]
)
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]], ids=str)
def test_a_folder_of_somebody_else_is_refused_whatever_is_asked(
    name, flags, world, monkeypatch, capfd
):
    Path("new").mkdir()
    (Path("new") / name).write_text("{}")
    assert_refused("train", flags, ["new", name], monkeypatch, capfd)


def test_nothing_is_deleted_where_something_cannot_be(world, monkeypatch, capfd):
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "final":
            raise PermissionError(1, "Operation not permitted")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    before = {path: path.read_bytes() for path in Path("run").rglob("*.safetensors")}
    assert run("train", ["--out=run", "--overwrite"], monkeypatch) == 2
    assert "Operation not permitted" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in Path("run").rglob("*.safetensors")} == before


# ---- steps
def test_steps_are_integers_and_other_names_no_checkpoints(tmp_path):
    names = ["checkpoint-000009", "checkpoint-999999", "checkpoint-1000000"]
    for name in [*names, "checkpoint-best", "checkpoint-9999999.tmp", "checkpoint-99"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == names
    assert newest_checkpoint(tmp_path).name == "checkpoint-1000000"


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(world, monkeypatch, capfd):
    shutil.move("run/checkpoint-000001", "elsewhere")
    Path("run/checkpoint-000001").symlink_to(Path("elsewhere").resolve())
    real = shutil.rmtree

    def rmtree(path: Path, *given, **named) -> None:
        if "000002" in str(path):
            raise PermissionError(13, "Permission denied")
        real(path, *given, **named)

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", rmtree)
    assert run("resume", ["--keep=1"], monkeypatch) == 0
    assert "cannot be deleted: Permission denied" in capfd.readouterr().out
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-000003"]
    assert (Path("elsewhere") / "model.safetensors").exists()  # of a link, the link goes


# ---- resume
def test_a_resume_takes_the_runs_flags_and_not_todays_defaults(world, monkeypatch):
    assert run("resume", ["--lr=1e-3"], monkeypatch) == 0
    assert steps_of("run/log.jsonl") == [1, 2, 3]
    now = json.loads(Path("run/args.json").read_text())
    assert (now["model"], now["data"], now["eval_data"]) == ("model", "rows.jsonl", "")
    assert (now["steps"], now["lr"]) == (3, 1e-3)


def test_a_finished_run_says_so_and_stays_as_it_is(world, monkeypatch, capfd):
    before = tree(Path.cwd())
    assert run("resume", ["--steps=2"], monkeypatch) == 0
    assert "finished: step 2 of 2" in capfd.readouterr().out
    assert tree(Path.cwd()) == before


def test_code_named_in_args_json_runs_only_if_the_command_names_it_too(world, monkeypatch, capfd):
    put("mine.py", "open('ran', 'w')\ndef f(logp, null_logp):\n    return logp.sum(1)\n")()
    merge("run/args.json", aggregator="mine.py:f")()
    assert_refused("resume", [], ["--aggregator", "mine.py:f"], monkeypatch, capfd)
    assert not Path("ran").exists()
    assert run("resume", ["--aggregator=mine.py:f"], monkeypatch) == 0


def test_a_piece_of_the_optimizer_that_is_missing_is_refused():
    def stored(*pieces: tuple[int, int]) -> dict:
        chunks = [ChunkStorageMetadata(torch.Size([a, 0]), torch.Size([n, 3])) for a, n in pieces]
        size = torch.Size([6, 3])
        return {"norm.exp_avg": TensorStorageMetadata(TensorProperties(), size, chunks)}

    check_cover(stored((0, 2), (2, 4)))
    for pieces in ([(2, 4)], [(0, 2)], [], [(2, 3), (2, 3)]):
        with pytest.raises(ValueError, match=r"lacks a part of norm.exp_avg"):
            check_cover(stored(*pieces))


# ---- one run at a time
def test_a_second_run_in_the_folder_is_refused_with_the_process_that_holds_it(
    world, monkeypatch, capfd
):
    with open("run/run.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in (["--resume", "--steps=9"], ["--overwrite"], []):
            command = "resume" if "--resume" in flags else "train"
            says = ["run.lock", f"process {os.getpid()}"]
            assert_refused(command, ["--out=run", *flags], says, monkeypatch, capfd)
    assert run("resume", [], monkeypatch) == 0


# ---- weights
def test_every_tensor_of_final_has_the_type_it_has_in_the_initial_model(world, monkeypatch):
    tensors(**{NORM: load_file("model/model.safetensors")[NORM].to(torch.bfloat16)})()
    before = stored_dtypes("model")
    assert set(before.values()) == {torch.float32, torch.bfloat16}
    assert run("train", [], monkeypatch) == 0
    assert stored_dtypes("new/final") == before


def test_a_model_in_memory_does_not_change_with_its_file(world):
    model = load_model("model")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with open("model/model.safetensors", "r+b") as file:
        file.truncate(8)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name])


# ---- not finite
def read_strictly(file: str) -> list[dict]:
    """JSON has no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = Path(file).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_weight_that_is_nan_is_logged_and_ends_the_run_after_three_steps(
    world, monkeypatch, capfd
):
    tensors(**{NORM: torch.full((16,), math.nan)})()
    assert run("train", ["--steps=9", "--save-every=2"], monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: step 2") and error.count("\n") == 1
    lines = read_strictly("new/log.jsonl")
    assert [line["bad_updates"] for line in lines] == [1, 1]
    assert read_strictly("new/samples.jsonl")[0]["traces"][0]["reward"] is None
    assert checkpoints(Path("new")) == []


def test_one_reward_that_is_nan_is_logged_and_not_applied_and_three_steps_of_them_end_the_run(
    world, monkeypatch, capfd
):
    own = """calls = []
def f(logp, null_logp):
    calls.append(1)
    spoilt = float("nan") if len(calls) > 4 else 0.0  # from the third step on
    return logp.sum(1) + logp.new_tensor([0.0, spoilt])
"""
    put("spoilt.py", own)()
    assert run("train", ["--aggregator=spoilt.py:f", "--steps=9", "--keep=9"], monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: step 5") and error.count("\n") == 1
    assert [line["bad_updates"] for line in read_strictly("new/log.jsonl")] == [0, 0, 1, 1, 1]
    saved = [load_model(path).state_dict() for path in checkpoints(Path("new"))]
    assert len(saved) == 4
    for name, weight in saved[1].items():  # after step 2
        assert torch.equal(saved[3][name], weight) and not torch.equal(saved[0][name], weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_answers_log_prob_that_is_not_finite_is_not_applied(value, world, monkeypatch):
    real, calls = train.score_group, []

    def spoilt(*given):
        scores = real(*given)
        calls.append(1)
        if len(calls) == 1:
            scores.answer_logp[0, 0] = value
        return scores

    monkeypatch.setattr(train, "score_group", spoilt)
    assert run("train", ["--steps=3"], monkeypatch) == 0
    assert [line["bad_updates"] for line in read_strictly("new/log.jsonl")] == [1, 0, 0]


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_never_written(world, monkeypatch, capfd):
    assert run("train", ["--lr=1e12", "--steps=9"], monkeypatch) == 1
    assert "not finite" in capfd.readouterr().err
    for path in checkpoints(Path("new")):
        assert all(weight.isfinite().all() for weight in load_model(path).parameters())


# ---- a full disk, a kill
@pytest.fixture
def small_files():
    """Files of this process cannot grow beyond 20 kB: the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_one_line_and_what_was_saved_is_whole(
    world, monkeypatch, capfd, small_files
):
    before = {
        path: path.read_bytes() for path in Path("run").rglob("checkpoint-*/**/*") if path.is_file()
    }
    assert run("resume", [], monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: run/checkpoint-000003: cannot be written: ")
    assert error.count("\n") == 1 and "large" in error
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path("run").glob("*.tmp"))


def test_a_log_that_cannot_be_written_is_one_line(world, monkeypatch, capfd):
    Path("new").mkdir()
    os.symlink("/dev/full", "new/samples.jsonl")
    merge("new/args.json", **json.loads(Path("run/args.json").read_text()))()
    assert run("train", ["--resume", "--eval-data="], monkeypatch) in (1, 2)
    assert capfd.readouterr().err.count("\n") == 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_within_any_write_leaves_the_args_and_the_newest_checkpoint_whole(
    every, world, monkeypatch
):
    """At every file that a resumed run opens for writing, renames or deletes, in turn."""
    calls, limit = [], [0]

    def deadly(real):
        def call(*given, **named):
            mode = given[1] if len(given) > 1 else named.get("mode", "")
            if real is not open or (isinstance(mode, str) and set(mode) & set("wa")):
                calls.append(1)
                if len(calls) > limit[0]:
                    raise Killed
            return real(*given, **named)

        return call

    shutil.copytree("run", "kept")
    monkeypatch.setattr("builtins.open", deadly(open))
    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, deadly(getattr(Path, name)))
    died = 0
    while True:
        calls.clear()
        limit[0] = died
        try:
            assert run("resume", [], monkeypatch) == 0
            break
        except Killed:
            died += every
        limit[0] = 10**9
        LOCKS.clear()
        assert json.loads(Path("run/args.json").read_text())["model"] == "model"
        newest = newest_checkpoint(Path("run"))
        load_model(newest)
        assert (newest / "progress.json").exists()
        shutil.rmtree("run")
        shutil.copytree("kept", "run")
    assert died > 20


# ---- signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_it_goes_on_from_there(
    number, world, monkeypatch, capfd
):
    whole = ["--steps=4", "--save-every=9", "--overwrite"]
    assert run("train", whole, monkeypatch) == 0
    uninterrupted = [line["grad_norm"] for line in read_strictly("new/log.jsonl")]
    real = train.sample_groups

    def interrupted(policy, tokenizer, questions, step, args):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(policy, tokenizer, questions, step, args)

    monkeypatch.setattr(train, "sample_groups", interrupted)
    assert run("train", whole, monkeypatch) == 128 + number
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "python train.py --resume --out new" in error
    assert [path.name for path in checkpoints(Path("new"))] == ["checkpoint-000002"]
    monkeypatch.setattr(train, "sample_groups", real)
    monkeypatch.setitem(COMMANDS, "resume", (train.main, ["--out=new", "--resume"]))
    assert run("resume", [], monkeypatch) == 0
    assert [line["grad_norm"] for line in read_strictly("new/log.jsonl")] == uninterrupted


# ---- texts
def test_special_tokens_that_rows_spell_out_are_counted_and_said(world, monkeypatch, capfd):
    rows = [("a <eot> b", "c"), ("a", "b <eos> c"), ("a", "b <eos>"), ("a", "b")]
    lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
    put("rows.jsonl", "\n".join(lines))()
    pairs = Pairs("rows.jsonl", Tokenizer("model"))
    assert (pairs.spelled_out, pairs.early_eos) == (3, 1)
    assert run("train", ["--questions=1"], monkeypatch) == 0
    assert "3 spell out special tokens" in capfd.readouterr().out


def test_a_token_without_a_row_in_the_embedding_is_refused_by_the_line_that_spells_it_out(
    world, monkeypatch, capfd
):
    tokenizer = Tokenizer("model")
    tokenizer.model.add_special_tokens(["<far>", "<farther>"])
    tokenizer.model.save("model/tokenizer.json")  # ids 10, which has a row, and 11
    assert run("sample", [], monkeypatch) == 0  # nobody needs it
    put(
        "rows.jsonl", '{"question": "a", "answer": "b"}\n{"question": "<farther>", "answer": "b"}'
    )()
    capfd.readouterr()
    assert_refused("evaluate", [], ["rows.jsonl:2:", "<farther>"], monkeypatch, capfd)


def test_a_text_far_too_long_is_never_tokenized(world, monkeypatch):
    tokenizer = Tokenizer("model")
    long = {"question": "a " * 1000, "answer": "b"}
    put("rows.jsonl", json.dumps(long) + '\n{"question": "a", "answer": "b"}')()
    pairs = Pairs("rows.jsonl", tokenizer, max_prompt=10, max_answer=10)
    monkeypatch.setattr(tokenizer, "encode_prompt", lambda text: [len(text)])
    assert pairs[0] is None and pairs[1].prompt == [1]
    assert run("train", ["--max-prompt=10", "--questions=1", "--steps=3"], monkeypatch) == 0
    skipped = [line["skipped_long"] for line in read_strictly("new/log.jsonl")]
    assert sum(skipped) > 0


def test_an_answer_does_not_move_the_cursor():
    assert printable("a\x1b[2Jb\r\x07\u202e\n\tc é") == "a\\x1b[2Jb\\r\\x07\\u202e\n\tc é"


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_terminal_without_letters_beyond_ascii_shows_their_escapes(command, world, monkeypatch):
    tokenizer = Path("model/tokenizer.json")
    text = tokenizer.read_text()
    for letter in "abcdef":
        text = text.replace(f'"{letter}"', f'"{letter}é"')
    tokenizer.write_text(text, "utf-8")
    put("rows.jsonl", '{"question": "aé", "answer": "bé"}\n' * 2)()
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    flags = {"train": ["--out=é"], "sample": ["--question=aé"], "evaluate": []}[command]
    assert run(command, flags, monkeypatch) == 0
    assert run(command, [*flags, "--model=é"], monkeypatch) == 2
    for stream in streams:
        stream.flush()
    out, error = (stream.buffer.getvalue().decode("ascii") for stream in streams)
    assert "error: " in error and "\\xe9" in error
    assert "\\xe9" in out or command == "evaluate"  # which prints figures alone


def test_a_byte_order_mark_is_no_part_of_a_config(world, monkeypatch):
    config = Path("model/config.json")
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert run("sample", [], monkeypatch) == 0


def test_a_command_does_not_exceed_the_positions_of_its_model(world, monkeypatch, capfd):
    merge("model/config.json", max_position_embeddings=12)()
    assert (
        run("sample", ["--max-trace=500", "--max-answer=500", "--temperature=3"], monkeypatch) == 0
    )
    assert run("evaluate", ["--max-trace=500"], monkeypatch) == 0
    assert "--max-trace 6" in capfd.readouterr().err
