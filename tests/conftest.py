"""A world for the tests of what a run does to its files: a tiny model, rows, a finished run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_sample import letters

import train
from support.checkpoint import LOCKS
from support.weights import save_model

needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
BRIEF = "--steps=2 --questions=2 --traces=2 --max-trace=4 --save-every=1 --device=cpu".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """model/, rows.jsonl, and run/, a run of two steps on them."""
    world = tmp_path_factory.mktemp("made")
    tokenizer = letters(world / "words")
    save_model(tiny.model(9, torch.float32), world / "model")
    tokenizer.save(world / "model")
    rows = [{"question": letter, "answer": f"{letter} b"} for letter in "abcdef"]
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    back = os.getcwd()
    os.chdir(world)
    LOCKS.clear()  # as below
    argv = ["--model=model", "--data=rows.jsonl", "--out=run", *BRIEF]
    train.train(train.parse_args(argv, ""))
    os.chdir(back)
    return world


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> Path:
    """A copy of its own, which is the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    LOCKS.clear()  # those of the same relative paths in another copy
    return tmp_path
