"""examples/report.py: what the page computes, what a text in it can do, which logs are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aggregate import AGGREGATORS, advantages, aggregate
from examples import report
from examples.hops import compare
from support.errors import InputError

NODE = shutil.which("node")
NAMES = [name for name in AGGREGATORS if name != "exact_match"]  # its rewards are drawn at random
HOSTILE = "</script><script>alert(1)</script><img src=x><!-- \x1b[31mred \u2028 \U0001f600 &lt;"


def group(k: int, tokens: int, seed: int = 0, scale: float = 1.0) -> tuple[list, list]:
    """Log-probs of an answer after K traces and after the empty one, as a log has them."""
    generator = torch.Generator().manual_seed(seed)
    logp = -scale * torch.rand(k, tokens, generator=generator, dtype=torch.float64)
    null_logp = -scale * torch.rand(tokens, generator=generator, dtype=torch.float64)
    return logp.tolist(), null_logp.tolist()


def write_run(folder: Path, steps: int = 2, text: str = "thinking", **settings) -> Path:
    """A run's log, a training and a held-out sample in every step."""
    folder.mkdir(parents=True)
    chosen = {"traces": 3, "aggregator": "arithmetic_mean", "center": "mean", "scale": "std"}
    chosen |= {"clip_null": False, "out": str(folder)} | settings
    (folder / "args.json").write_text(json.dumps(chosen) + "\n")
    with open(folder / "log.jsonl", "w") as log, open(folder / "samples.jsonl", "w") as samples:
        for step in range(steps + 1):
            line = {"step": step, "eval_gain": step / steps, "trace_len_mean": 3.0}
            if step == 1:
                line["warnings"] = [f"vanishing_trace: trace_len_mean {text}"]
            log.write(json.dumps(line) + "\n")
            for held_out in (True, False):
                logp, null_logp = group(3, 5, seed=step)
                traces = [
                    {"trace": f"{text} {k}", "trace_len": 4, "finished": True, "logp": logp[k]}
                    for k in range(3)
                ]
                sample = {"step": step, "held_out": held_out, "question": text, "gold": text}
                sample |= {"answer": [text] * 5, "null_logp": null_logp, "traces": traces}
                samples.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return folder


def page_of(*runs: Path) -> str:
    return report.make_page([report.read_run(run, report.SAMPLE_BYTES) for run in runs])


# ---- the script computes what aggregate.py computes
def in_node(groups: list[tuple[list, list]]) -> list[dict]:
    """Every aggregator of aggregate.js on every group, as a list over groups of name -> figures."""
    driver = """
        const figures = (name, [logp, nullLogp]) => {
          const { reward, weight } = aggregate(name, logp, nullLogp);
          const of = (center, scale) => advantages(reward, weight, center, scale);
          const [std, none] = [of("mean", "std"), of("mean", "none")];
          return { reward, weight, std, none, mean: of("none", "mean") };
        };
        const names = Object.keys(AGGREGATORS);
        console.log(JSON.stringify(GROUPS.map((group) =>
          Object.fromEntries(names.map((name) => [name, figures(name, group)])))));
    """
    script = (report.PARTS / "aggregate.js").read_text("utf-8")
    script += f"const GROUPS = {json.dumps(groups)};" + driver
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not NODE, reason="needs node (Debian's nodejs) to run aggregate.js")
def test_rewards_weights_and_advantages_of_the_page_are_those_of_aggregate_py():
    equal = [[-0.5, -1.0, 0.0]] * 4
    groups = [
        group(8, 42),
        group(2, 1, seed=1),
        group(5, 300, seed=2, scale=9.0),  # products near 1e-600, sums of logs near -1350
        (equal, [-0.7, 0.0, -3.0]),  # equal rewards, and a token that is certain without thinking
        (group(3, 2)[0], [-300.0, -2.0]),  # 1 / n_i beyond its cap
    ]
    computed = in_node(groups)
    assert set(computed[0]) == set(NAMES)
    for (logp, null_logp), of_group in zip(groups, computed, strict=True):
        logp = torch.tensor(logp, dtype=torch.float64)
        null_logp = torch.tensor(null_logp, dtype=torch.float64)
        for name, figures in of_group.items():
            reward, weight = aggregate(name, logp, null_logp)
            expected = {
                "reward": reward,
                "weight": weight,
                "std": advantages(reward, weight=weight),
                "none": advantages(reward, "mean", "none", weight=weight),
                "mean": advantages(reward, "none", "mean", weight=weight),
            }
            for key, value in expected.items():
                found = torch.tensor(figures[key], dtype=torch.float64)
                assert torch.allclose(found, value, rtol=1e-6, atol=1e-6), (name, key)


# ---- the page
def test_no_text_of_a_run_is_markup_in_the_page(tmp_path):
    page = page_of(write_run(tmp_path / "run", text=HOSTILE))
    plain = page_of(write_run(tmp_path / "other"))
    assert page.count("<") == plain.count("<")
    assert "\u2028" not in page and "\x1b" not in page


def test_the_page_of_the_embedded_task_is_made_of_the_present_scripts():
    page = (report.ROOT / "examples/hops/report.html").read_text("utf-8")
    head, _, _ = (report.PARTS / "page.html").read_text("utf-8").partition("/* data */")
    assert page.startswith(head) and len(page) < 1_000_000
    for script in ("aggregate.js", "page.js"):
        assert (report.PARTS / script).read_text("utf-8") in page


# ---- runs side by side
def test_a_run_is_compared_by_its_last_evaluation_whatever_came_after_it_if_any():
    args = {"traces": 8, "aggregator": "weighted_sum_log_prob"}
    args |= {"clip_null": False, "null": "policy"}
    evaluated = {"eval_accuracy": 0.25, "eval_gain": 1.5, "trace_len_mean": 4.0}
    name, trace = "NRT        held-out accuracy", "   trace  3.0 tokens"
    shown = compare.line_of(args, [evaluated, {"trace_len_mean": 3.0}])
    assert shown == f"{name} 0.25{trace}   gain +1.50 nats"
    assert compare.line_of(args, [{"trace_len_mean": 3.0}]) == f"{name} not evaluated{trace}"


# ---- what is read
def test_a_long_run_is_thinned_but_keeps_its_ends_and_extremes(tmp_path):
    run = report.read_run(write_run(tmp_path / "run", steps=1000), 60_000)
    curve = run["curves"]["eval_gain"]
    assert len(curve) <= report.POINTS
    assert curve[0][2] == 0 and curve[-1][0] == 1000 and curve[-1][3] == 1
    steps = [sample["step"] for sample in run["samples"] if sample["held_out"]]
    assert steps[0] == 0 and steps[-1] == 1000 and 2 < len(steps) <= report.SAMPLES
    assert len(json.dumps(run["samples"])) < 90_000


def test_only_settings_that_differ_are_in_the_page(tmp_path):
    one = write_run(tmp_path / "one", lr=0.1, model="/private/place")
    two = write_run(tmp_path / "two", lr=0.2, model="/private/place")
    page = page_of(one, two)
    assert '"differ": ["lr"]' in page and "/private/place" not in page and str(tmp_path) not in page


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("log.jsonl", '{"step": 1}\n{"step": 2, "ga', "log.jsonl:2: half-written"),
        ("log.jsonl", "", "log.jsonl: holds no lines"),
        ("args.json", "{}\n", "lacks 'traces'"),
        ("samples.jsonl", '{"step": 1, "traces": []}\n', "samples.jsonl:1: not a line"),
    ],
)
def test_a_half_written_or_foreign_log_is_refused_in_one_line(tmp_path, file, text, said):
    run = write_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(InputError, match=said):
        report.read_run(run, report.SAMPLE_BYTES)


def test_the_command_writes_the_page_and_refuses_with_exit_code_2(tmp_path, monkeypatch, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    report.main()
    assert (run / "report.html").read_text("utf-8") == page_of(run)
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "-o", str(out)])
    report.main()
    assert out.read_text("utf-8") == page_of(run)
    os.truncate(run / "log.jsonl", 20)
    out.unlink()
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 2 and not out.exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "half-written" in error
