"""evaluate.py: the held-out figures equal their definitions; what the command prints."""

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_sample import letters, line, next_logits, slow_trace

import sample
from data import Example, Trace
from evaluate import FIGURES, evaluate, main, sampled_accuracy, show_gains
from model import Transformer
from sample import trace_ids
from support.distributed import copy_token_rows
from support.errors import InputError
from support.tokenizer import Tokenizer
from support.weights import save_model


@torch.no_grad()
def slow_figures(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], max_trace: int
) -> tuple[dict, list[Trace]]:
    """The figures by their definitions, one example and one token at a time."""
    marker, rows, traces = tokenizer.marker_id, [], []
    for example in examples:
        limit = torch.zeros(max_trace)
        traces.append(slow_trace(model, example.prompt, limit, 0.0, [marker], tokenizer.cut_ids))

    def answered(example: Example, context: list[int]) -> Trace:
        limit = torch.zeros(len(example.answer))
        read = [*example.prompt, *context]
        return slow_trace(model, read, limit, 0.0, tokenizer.eos_ids)

    def right(example: Example, context: list[int]) -> bool:
        answer = answered(example, context)
        return answer.finished and tokenizer.decode(answer.ids).strip() == example.gold

    def f1(example: Example, context: list[int]) -> float:
        words = tokenizer.decode(answered(example, context).ids).split()
        gold = example.gold.split()
        common = sum(min(words.count(word), gold.count(word)) for word in set(gold))
        if common == 0:
            return 0.0
        precision, recall = common / len(words), common / len(gold)
        return 2 * precision * recall / (precision + recall)

    def gold_logp(example: Example, context: list[int]) -> float:
        total = 0.0
        for i, token in enumerate(example.answer):
            read = [*example.prompt, *context, *example.answer[:i]]
            total += float(next_logits(model, read).log_softmax(0)[token])
        return total

    for i, (example, trace) in enumerate(zip(examples, traces, strict=True)):
        own = trace_ids(trace, marker)
        other = trace_ids(traces[(i + 1) % len(traces)], marker)
        half = [*own[: (len(own) - 1) // 2], marker]  # of the tokens before the marker
        null = gold_logp(example, [marker])
        row = {"accuracy": right(example, own), "accuracy_null": right(example, [marker])}
        row["f1"] = f1(example, own)
        row["gain"] = gold_logp(example, own) - null
        row["gain_shuffled"] = gold_logp(example, other) - null
        row["gain_half"] = gold_logp(example, half) - null
        row["trace_len"] = len(trace.ids)
        rows.append(row)
    means = {f"eval_{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means, traces


def example(tokenizer: Tokenizer, question: str, gold: str) -> Example:
    return Example(
        0, tokenizer.encode_prompt(question), tokenizer.encode_answer(gold), question, gold
    )


def examples_to_get_right_and_wrong(
    model: Transformer, tokenizer: Tokenizer, max_trace: int
) -> list[Example]:
    """Gold answers: in turn what the model answers after a trace, after the empty one, neither."""
    generator, examples, marker = torch.Generator().manual_seed(1), [], tokenizer.marker_id
    for i in range(12):
        prompt = torch.randint(3, 9, (1 + i % 5,), generator=generator).tolist()
        trace = slow_trace(model, prompt, torch.zeros(max_trace), 0.0, [marker], tokenizer.cut_ids)
        read = [*prompt, *(trace_ids(trace, marker) if i % 3 == 0 else [marker])]
        answer = slow_trace(model, read, torch.zeros(8), 0.0, tokenizer.eos_ids)
        gold = tokenizer.decode(answer.ids) if i % 3 < 2 and answer.finished else ""
        gold = gold or "a b c"[: 1 + 2 * (i % 3)]
        examples.append(example(tokenizer, tokenizer.decode(prompt), gold))
    return examples


@pytest.mark.parametrize("seed", [54, 84])
@pytest.mark.parametrize("batch", [64, 5, 1])
def test_held_out_figures_equal_their_definitions(seed, batch, tmp_path):
    model, tokenizer = tiny.model(seed), letters(tmp_path)
    examples = examples_to_get_right_and_wrong(model, tokenizer, max_trace=6)
    expected, traces = slow_figures(model, tokenizer, examples, max_trace=6)
    assert 0 < expected["eval_accuracy"] < 1 and 0 < expected["eval_accuracy_null"] < 1
    assert expected["eval_accuracy"] != expected["eval_accuracy_null"]
    assert abs(expected["eval_gain"]) > 0.01
    assert expected["eval_accuracy"] < expected["eval_f1"] < 1
    kinds = {(trace.finished, len(trace.ids) == 6) for trace in traces}
    assert kinds >= {(True, False), (False, True), (False, False)}
    figures = evaluate(model, tokenizer, examples, 6, batch)
    assert figures == pytest.approx(expected, rel=0, abs=1e-10)


def test_a_right_answer_ends_and_is_no_longer_than_the_gold_one_whatever_is_evaluated_beside_it(
    tmp_path,
):
    tokenizer = letters(tmp_path)
    short, long = example(tokenizer, "f", "a"), example(tokenizer, "f", "b c d e")
    # After "f" each says the marker m, and then:
    says_it = line(8, 9, 3, 1, vocab=10)  # a <eos>
    says_more = line(8, 9, 2, 3, 1, vocab=10)  # <eot> a <eos>: reads "a", three tokens for two
    goes_on = line(8, 9, 3, 3, vocab=10)  # a a a ...
    ends_otherwise = line(8, 9, 3, 2, vocab=10)  # a <eot> <eot> ...: special, but no eos
    for model, right in ((says_it, 1), (says_more, 0), (goes_on, 0), (ends_otherwise, 0)):
        for beside in ([], [long]):
            figures = evaluate(model, tokenizer, [short, *beside], 4)
            assert figures["eval_accuracy"] == right / (1 + len(beside))
            assert figures["eval_accuracy_null"] == right / (1 + len(beside))


# ---- the command
def command(monkeypatch, capsys, path: Path, *flags: str) -> list[str]:
    """The lines it prints with the model in `path`."""
    argv = ["evaluate.py", "--device", "cpu", "--model", str(path), "--max-trace", "6", *flags]
    monkeypatch.setattr("sys.argv", argv)
    main()
    return capsys.readouterr().out.splitlines()


def save(model: Transformer, tokenizer: Tokenizer, path: Path) -> None:
    save_model(model.float(), path)
    tokenizer.save(path)


@pytest.mark.parametrize("question", ["f", "c", "c a b"])
def test_the_command_shows_trace_and_answer_and_what_the_trace_does_to_the_gold_one(
    question, tmp_path, monkeypatch, capsys
):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save(model, tokenizer, tmp_path)
    asked = ["--question", f" {question} ", "--gold", "a b"]
    shown = command(monkeypatch, capsys, tmp_path, *asked, "--max-answer", "20")
    monkeypatch.setattr("sys.argv", [*sys.argv[:-6], "--question", question, "--max-answer", "20"])
    sample.main()
    assert shown[:2] == capsys.readouterr().out.splitlines()  # as python sample.py prints them
    figures, _ = slow_figures(model, tokenizer, [example(tokenizer, question, "a b")], 6)
    gold_shown, gain_shown = shown[2:]
    assert gold_shown.startswith("gold    a (") and "<eos> (" in gold_shown
    assert gain_shown.endswith(f"gain {figures['eval_gain']:+.2f} nats")


def test_gains_are_numbers_in_a_file_and_shades_of_green_and_red_on_a_terminal(
    tmp_path, monkeypatch
):
    tokenizer, gains = letters(tmp_path), torch.tensor([0.4, 1.2, -9.0])
    assert show_gains(tokenizer, [3, 4, 1], gains) == "a (+0.4) b (+1.2) <eos> (-9.0)"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    green, red = "\x1b[48;5;22m", "\x1b[48;5;160m"  # the first shade and the last
    assert show_gains(tokenizer, [3, 4, 1], gains) == f"a {green}b\x1b[0m {red}<eos>\x1b[0m"


def test_the_command_scores_a_data_set(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save(model, tokenizer, tmp_path)
    rows = [("b c", "a b"), ("d", "e f a"), ("a", "a")]
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    data.write_text("\n".join(lines))
    shown = command(monkeypatch, capsys, tmp_path, "--data", str(data), "--limit", "2")
    examples = [example(tokenizer, *row) for row in rows[:2]]
    expected, _ = slow_figures(model, tokenizer, examples, 6)
    assert shown == [f"{name} {value:.4g}" for name, value in expected.items()]


def test_the_command_stores_what_was_predicted(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save(model, tokenizer, tmp_path)
    data, stored = tmp_path / "rows.jsonl", tmp_path / "predictions.jsonl"
    data.write_text('{"question": "b c", "answer": "a b"}\n{"question": "f", "answer": "a"}\n')
    asked = ["--data", str(data), "--predictions", str(stored)]
    figures = dict(line.split() for line in command(monkeypatch, capsys, tmp_path, *asked))
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    assert [(row["question"], row["gold"]) for row in rows] == [("b c", "a b"), ("f", "a")]
    for name in FIGURES:
        mean = sum(row[name] for row in rows) / 2
        assert figures[f"eval_{name}"] == f"{mean:.4g}"
    shown = command(monkeypatch, capsys, tmp_path, "--question", "f", "--gold", "a")
    assert shown[0].startswith(f"trace   {rows[1]['trace']}")
    assert shown[1].startswith(f"answer  {rows[1]['answer']}")
    assert shown[3].endswith(f"gain {rows[1]['gain']:+.2f} nats")


def test_sampled_accuracy_is_the_probability_of_a_right_answer(tmp_path):
    tokenizer = letters(tmp_path)
    sure = line(8, 9, 3, 1, vocab=10)  # after "f": the marker m, a, <eos>
    assert sampled_accuracy(sure, tokenizer, [example(tokenizer, "f", "a")], 4, 6) == 1
    logits = torch.full((10, 10), -1e4, dtype=torch.float64)
    logits[8, 9] = logits[3, 1] = logits[4, 1] = 0
    logits[9, 3], logits[9, 4] = math.log(0.3), math.log(0.7)  # a or b
    either = [example(tokenizer, "f", gold) for gold in ("a", "b", "b")]
    share = sampled_accuracy(tiny.chain(logits), tokenizer, either, 500, 6)
    assert abs(share - (0.3 + 0.7 + 0.7) / 3) < 0.05
    greedy = evaluate(tiny.chain(logits), tokenizer, either, 6)
    assert greedy["eval_accuracy"] == pytest.approx(2 / 3)


def test_a_base_without_the_marker_is_scored_as_training_would_start_from_it(
    tmp_path, monkeypatch, capsys
):
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    tokenizer = letters(base)  # saved without nrt.json, and the marker given is new
    save_model(tiny.model(9, vocab_size=10).float(), base)
    data.write_text('{"question": "b c", "answer": "a b"}\n')
    asked = ["--data", str(data), "--marker", "<new>", "--prompt-format", "{question}"]
    figures = dict(line.split() for line in command(monkeypatch, capsys, base, *asked))
    started = tiny.model(9, vocab_size=10).float()
    tokenizer = Tokenizer(base, "<new>", "{question}")
    copy_token_rows(started, tokenizer.marker_id, tokenizer.eos_ids[0])
    expected = evaluate(started, tokenizer, [example(tokenizer, "b c", "a b")], 6)
    assert figures == {name: f"{value:.4g}" for name, value in expected.items()}
    with pytest.raises(InputError, match="has no marker '<new>', the token that ends a trace"):
        monkeypatch.setattr(
            "sys.argv", ["sample.py", *sys.argv[1:5], "--question", "b c", *asked[2:]]
        )
        sample.main()


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--question"),
        (["--question", "a", "--gold", "a", "--predictions", "p.jsonl"], "--predictions"),
        (
            ["--data", "rows.jsonl", "--predictions", "nowhere/p.jsonl"],
            "there is no folder nowhere",
        ),
        (["--data", "rows.jsonl", "--samples", "0"], "--samples"),
        (["--question", "a", "--data", "rows.jsonl"], "--question"),
        (["--question", "a"], "--gold"),
        (["--gold", "a", "--data", "rows.jsonl"], "--gold"),
        (["--data", "rows.jsonl", "--limit", "0"], "--limit"),
        (["--question", " ", "--gold", "a"], "--question is empty"),
        (["--question", "a", "--gold", "a", "--marker", "<new>"], "<new>"),
        (["--question", "a", "--gold", "a", "--max-trace", "many"], "--max-trace"),
        (["--question", "a", "--gold", "a", "--max-trace", "0"], "max_new_tokens"),
        (["--question", "a", "--gold", "a", "--seed", "-1"], "--seed"),
        (["--question", "a", "--gold", "a", "--colour"], "--colour"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(flags, says, tmp_path, monkeypatch, capsys):
    save(tiny.model(9), letters(tmp_path), tmp_path)
    with pytest.raises(InputError, match=says) as refusal:
        command(monkeypatch, capsys, tmp_path, *flags)
    assert "\n" not in str(refusal.value)
