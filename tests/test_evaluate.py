"""evaluate.py: the held-out figures equal their definitions; what the command prints."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_sample import letters, line, slow_trace
from tiny import lines_of, plain_logp

import evaluate
import sample
from data import Example, Trace
from evaluate import FIGURES, mean_figures, predict, show_gains
from model import Transformer
from sample import trace_ids
from support.errors import InputError
from support.tokenizer import Tokenizer
from support.weights import load_with_marker, save_model

MAX_TRACE = 6


def example(tokenizer: Tokenizer, question: str, gold: str) -> Example:
    prompt, answer = tokenizer.encode_prompt(question), tokenizer.encode_answer(gold)
    return Example(0, prompt, answer, question, gold)


def figures_of(*given) -> dict[str, float]:
    return mean_figures(predict(*given))


def greedy_trace(model: Transformer, tokenizer: Tokenizer, prompt: list[int]) -> Trace:
    stops, cuts = [tokenizer.marker_id], tokenizer.cut_ids
    return slow_trace(model, prompt, torch.zeros(MAX_TRACE), 0.0, stops, cuts)


def greedy_answer(model: Transformer, tokenizer: Tokenizer, read: list[int], limit: int) -> str:
    """'?' if it has not ended within `limit` tokens."""
    answer = slow_trace(model, read, torch.zeros(limit), 0.0, tokenizer.eos_ids)
    return tokenizer.decode(answer.ids).strip() if answer.finished else "?"


@torch.no_grad()
def slow_figures(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example]
) -> tuple[dict, list[Trace]]:
    """The figures by their definitions, one example and one token at a time."""
    marker, rows = tokenizer.marker_id, []
    traces = [greedy_trace(model, tokenizer, example.prompt) for example in examples]

    def right(example: Example, context: list[int]) -> bool:
        read = [*example.prompt, *context]
        return greedy_answer(model, tokenizer, read, len(example.answer)) == example.gold

    def gold_logp(example: Example, context: list[int]) -> float:
        return plain_logp(model, [*example.prompt, *context], example.answer).sum().item()

    for i, (example, trace) in enumerate(zip(examples, traces, strict=True)):
        own = trace_ids(trace, marker)
        other = trace_ids(traces[(i + 1) % len(traces)], marker)
        null = gold_logp(example, [marker])
        row = {"accuracy": right(example, own), "accuracy_null": right(example, [marker])}
        row["gain"] = gold_logp(example, own) - null
        row["gain_shuffled"] = gold_logp(example, other) - null
        row["trace_len"] = len(trace.ids)
        rows.append(row)
    means = {f"eval_{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means, traces


def examples_to_get_right_and_wrong(model: Transformer, tokenizer: Tokenizer) -> list[Example]:
    """Gold answers: in turn what the model answers after a trace, after the empty one, neither."""
    generator, examples, marker = torch.Generator().manual_seed(1), [], tokenizer.marker_id
    for i in range(12):
        prompt = torch.randint(3, 9, (1 + i % 5,), generator=generator).tolist()
        thought = trace_ids(greedy_trace(model, tokenizer, prompt), marker)
        read = [*prompt, *(thought if i % 3 == 0 else [marker])]
        answer = greedy_answer(model, tokenizer, read, limit=8) if i % 3 < 2 else "?"
        gold = "a b c"[: 1 + 2 * (i % 3)] if answer in ("?", "") else answer
        examples.append(example(tokenizer, tokenizer.decode(prompt), gold))
    return examples


def test_held_out_figures_equal_their_definitions(tmp_path):
    model, tokenizer = tiny.model(54), letters(tmp_path)
    examples = examples_to_get_right_and_wrong(model, tokenizer)
    expected, traces = slow_figures(model, tokenizer, examples)
    assert 0 < expected["eval_accuracy"] < 1 and 0 < expected["eval_accuracy_null"] < 1
    assert expected["eval_accuracy"] != expected["eval_accuracy_null"]
    assert abs(expected["eval_gain"]) > 0.01
    kinds = {(trace.finished, len(trace.ids) == 6) for trace in traces}
    assert kinds >= {(True, False), (False, True), (False, False)}
    figures = figures_of(model, tokenizer, examples, 6)
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
            figures = figures_of(model, tokenizer, [short, *beside], 4)
            assert figures["eval_accuracy"] == right / (1 + len(beside))
            assert figures["eval_accuracy_null"] == right / (1 + len(beside))


# ---- the command
ROWS = [("b c", "a b"), ("f", "a"), ("a", "a")]


@pytest.fixture
def saved(tmp_path, monkeypatch) -> tuple[Transformer, Tokenizer]:
    """A model in ./model, as it is read from there; ROWS in ./rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny.model(9, torch.float32), letters(tmp_path / "words")
    save_model(model, "model")
    tokenizer.save("model")
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in ROWS]
    Path("rows.jsonl").write_text("\n".join(lines))
    return model, tokenizer


def command(
    monkeypatch, capsys, *flags: str, main=evaluate.main, model: str = "model"
) -> list[str]:
    """The lines it prints."""
    argv = ["evaluate.py", "--device=cpu", f"--model={model}", "--max-trace=6", *flags]
    monkeypatch.setattr("sys.argv", argv)
    main()
    return capsys.readouterr().out.splitlines()


def test_the_command_shows_trace_and_answer_and_what_the_trace_does_to_the_gold_one(
    saved, monkeypatch, capsys
):
    asked = ["--question= c a b ", "--max-answer=20"]
    shown = command(monkeypatch, capsys, *asked, "--gold=a b")
    assert shown[:2] == command(monkeypatch, capsys, *asked, main=sample.main)
    figures, _ = slow_figures(*saved, [example(saved[1], "c a b", "a b")])
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


def test_the_command_scores_a_data_set_and_stores_what_was_predicted(saved, monkeypatch, capsys):
    asked = ["--data=rows.jsonl", "--limit=2", "--predictions=predictions.jsonl"]
    shown = command(monkeypatch, capsys, *asked)
    expected, _ = slow_figures(*saved, [example(saved[1], *row) for row in ROWS[:2]])
    assert shown == [f"{name} {value:.4g}" for name, value in expected.items()]
    rows = lines_of("predictions.jsonl")
    assert [(row["question"], row["gold"]) for row in rows] == ROWS[:2]
    for name in FIGURES:
        mean = sum(row[name] for row in rows) / 2
        assert mean == pytest.approx(expected[f"eval_{name}"], rel=1e-4)


def test_a_base_without_the_marker_is_scored_as_training_would_start_from_it(
    saved, monkeypatch, capsys
):
    save_model(tiny.model(9, torch.float32, vocab_size=10), "base")
    shutil.copy("words/tokenizer.json", "base")  # no nrt.json, and the marker given is new
    shutil.copy("words/tokenizer_config.json", "base")
    asked = ["--marker=<new>", "--prompt-format={question}"]
    shown = command(monkeypatch, capsys, "--data=rows.jsonl", *asked, model="base")
    tokenizer = Tokenizer("base", "<new>", "{question}")
    started = load_with_marker("base", tokenizer, torch.float32, "cpu")
    examples = [example(tokenizer, *row) for row in ROWS]
    expected = figures_of(started, tokenizer, examples, 6)
    assert shown == [f"{name} {value:.4g}" for name, value in expected.items()]
    with pytest.raises(InputError, match="base: has no marker '<new>'"):
        command(monkeypatch, capsys, "--question=b", *asked, main=sample.main, model="base")
