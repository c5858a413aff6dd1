"""Checks of the sharded model. test_distributed.py runs them under torchrun, on every rank.

Each rank trains on one question, as the loop of train.py does. The ranks' traces are as different
as they can be: equal and short on one, of very different lengths on the other.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch

from data import Example, Trace
from model import Transformer
from sample import sample_traces
from support import distributed
from support.args import Args
from support.weights import load_model, save_model
from train import train_question

TOKENIZER = SimpleNamespace(marker_id=3)


def question(rank: int) -> tuple[Example, list[Trace]]:
    prompt = [0, 4, 2, 1] if rank % 2 else [2, 4]
    answer = [1, 0, 4] if rank % 2 else [2, 4]
    lengths = [1, 1, 1, 1] if rank % 2 else [40, 0, 7, 90]
    traces = []
    for length in lengths:
        ids = [*([0, 1, 2] * length)[:length], TOKENIZER.marker_id]
        traces.append(Trace(ids, [-1.0] * len(ids), finished=True))
    return Example(rank, prompt, answer, question="", gold=""), traces


def collect_in_fp32(model: Transformer) -> None:
    """The plain model's gradients of several backwards: .main_grad is their fp32 sum."""

    def add(parameter: torch.Tensor) -> None:
        parameter.main_grad = parameter.main_grad + parameter.grad.float()
        parameter.grad = None

    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.main_grad = torch.zeros(())
        parameter.register_post_accumulate_grad_hook(add)


def freeze_lower_half(model: Transformer) -> None:
    model.embed_tokens.requires_grad_(False)
    model.layers[:2].requires_grad_(False)


def check_gradients(folder: Path, dtype: torch.dtype) -> None:
    """The sum over the ranks is the gradient that a plain model has on all questions."""
    model = distributed.shard(load_model(folder), dtype)
    cases = [(*case, False) for case in itertools.product((0, 2), (False, True))]
    for micro_traces, recompute, frozen in [*cases, (2, False, True)]:
        if frozen:  # before `shard`, which keeps it
            model = load_model(folder)
            freeze_lower_half(model)
            model = distributed.shard(model, dtype)
        args = Args(questions=distributed.world_size(), traces=4, micro_traces=micro_traces)
        plain = load_model(folder, dtype)
        plain.recompute = model.recompute = recompute
        if frozen:
            freeze_lower_half(plain)
        collect_in_fp32(plain)
        for rank in range(distributed.world_size()):
            train_question(plain, TOKENIZER, *question(rank), args)
        outcome = train_question(model, TOKENIZER, *question(distributed.rank()), args)
        if distributed.rank() % 2:  # equal traces: equal rewards, hence no advantage
            assert len(set(outcome.reward.tolist())) == 1 and not outcome.advantage.any()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad
            if not theirs.requires_grad:
                assert ours.grad is None
                continue
            assert ours.grad.dtype == torch.float32
            apart = (distributed.whole(ours.grad) - theirs.main_grad).norm()
            case = (folder, dtype, micro_traces, recompute, name)
            assert apart <= 1e-6 * theirs.main_grad.norm(), case
        model.zero_grad()


def check_gathered_view(folder: Path, dtype: torch.dtype) -> None:
    """It samples what a plain model samples, and is freed before the training pass."""
    model = distributed.shard(load_model(folder), dtype)
    plain = load_model(folder, dtype)
    with distributed.gathered_view(model) as view:
        tensors = list(view.parameters())
        for ours, theirs in zip(tensors, plain.parameters(), strict=True):
            assert type(ours) is torch.nn.Parameter and torch.equal(ours, theirs)
        [traces] = sample_traces(view, [[0, 4, 2]], 4, 9, stop_ids=[TOKENIZER.marker_id])
    [expected] = sample_traces(plain, [[0, 4, 2]], 4, 9, stop_ids=[TOKENIZER.marker_id])
    assert [trace.ids for trace in traces] == [trace.ids for trace in expected]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0

    at_once = []  # layers that are whole while a layer runs its backward

    def count(*_: object) -> None:
        sizes = [layer.mlp.up_proj.weight.untyped_storage().nbytes() for layer in view.layers]
        at_once.append(sum(size > 0 for size in sizes))

    for layer in model.layers:
        layer.mlp.register_full_backward_hook(count)
    args = Args(questions=2, traces=4)
    train_question(model, TOKENIZER, *question(distributed.rank()), args)
    assert 1 <= min(at_once) and max(at_once) <= 2 < len(model.layers)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0


def main(folder: Path) -> None:
    distributed.start("cpu", torch.bfloat16)
    for tied, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        model = tiny.model(0, torch.float32, tie_word_embeddings=tied, num_hidden_layers=4)
        path = folder / f"tied-{tied}"
        distributed.on_first_rank(lambda model=model, path=path: save_model(model, path))
        check_gradients(path, dtype)
        check_gathered_view(path, dtype)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
