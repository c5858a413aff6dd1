"""A world for the tests of what a run does to its files: a tiny model, rows, a finished run.
And a machine whose attention is chosen as on a GPU."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_sample import letters
from torch import Tensor

import model
import train
from sample import DecodeBatch
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
    argv = ["--model=model", "--data=rows.jsonl", "--out=run", *BRIEF]
    train.train(train.parse_args(argv, ""))
    os.chdir(back)
    return world


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> Path:
    """A copy of its own, which is the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.library.custom_op("tests::flash_attention_forward", mutates_args=())
def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    seqused_k: Tensor,
) -> list[Tensor]:
    """aten::_flash_attention_forward for decode steps, by its definition, one row after another.

    It reads the first seqused_k keys of a row and no others, and refuses what CUDA's refuses.
    """
    rows = len(seqused_k)
    for tensor in (cum_seq_q, cum_seq_k, seqused_k):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert cum_seq_q.tolist() == list(range(rows + 1)) and max_q == 1
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (query, key, value))
    assert query.shape[2] % 8 == 0 and dropout_p == 0.0 and not return_debug_mask
    out = torch.empty_like(query)  # [rows, Hq, D]
    for row, used in enumerate(seqused_k.tolist()):
        first, end = cum_seq_k[row : row + 2].tolist()
        assert 0 < used <= end - first <= max_k
        q = query[row, None, :, None]  # [1, Hq, 1, D]
        k, v = (x[None, first : first + used].transpose(1, 2) for x in (key, value))
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out[row] = seen[0, :, 0]
    return [out]


@pytest.fixture
def flash(monkeypatch) -> None:
    """Attention is chosen as on a GPU that has FlashAttention, and computed by the CPU."""
    monkeypatch.setattr(model, "can_use_flash_attention", lambda parameters: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention_forward)
    monkeypatch.setattr(DecodeBatch, "record", lambda *_: None)  # no CUDA graph
