"""examples/ABLATIONS.md: every diff applies to the files as they are and does what it says."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BRIEF
from tiny import lines_of, without_clock
from torch import Tensor

import train as ours
from model import prefill
from support.errors import InputError
from support.tokenizer import Tokenizer
from support.weights import load_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples/ABLATIONS.md").read_text()
TITLES = re.findall(r"^## \d+\. (.*)", PAGE, flags=re.M)
APPLY = r"sed -n '/^## %d\./,/^## %d\./p' examples/ABLATIONS.md | git apply"
FLAGS = ["--model=model", "--data=rows.jsonl", *BRIEF, "--traces=4", "--lr=0.02"]

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def apply(number: int, copy: Path) -> None:
    """By the command of the page, in a copy outside of any repository."""
    (copy / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples/ABLATIONS.md", copy / "examples")
    for file in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("kernels/*.py")):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    subprocess.run(APPLY % (number, number + 1), shell=True, cwd=copy, check=True)


def train(module, out: str, *flags: str) -> list[dict]:
    """Two steps of a tiny model -> log lines, without the wall clock."""
    module.train(module.parse_args([*FLAGS, f"--out={out}", *flags], ""))
    return without_clock(lines_of(Path(out, "log.jsonl")))


@pytest.fixture
def both(world, monkeypatch, request):
    """The function that trains without and with the diff of this title."""
    copy = world / "copy"
    apply(1 + TITLES.index(request.param), copy)
    for key, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and file.parent.name in (ROOT.name, "support", "kernels"):
            monkeypatch.delitem(sys.modules, key)  # and puts it back
    monkeypatch.syspath_prepend(copy)
    theirs = importlib.import_module("train")
    assert Path(theirs.__file__) == copy / "train.py"

    def run(*flags: str) -> tuple[list[dict], list[dict]]:
        return train(ours, "plain", *flags), train(theirs, "changed", *flags)

    return run


def ablation(title: str):
    return pytest.mark.parametrize("both", [title], indirect=True)


def apart(plain: dict, changed: dict) -> set[str]:
    """The figures in which two lines of a log differ by more than rounding."""
    close = {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in plain.items()}
    return {key for key in changed if key not in plain or changed[key] != close[key]}


def samples(out: str) -> list[dict]:
    return lines_of(Path(out, "samples.jsonl"))


def weights(folder: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in load_model(folder).named_parameters()}


def test_there_are_ten_of_at_most_twenty_lines():
    _, *sections = re.split(r"^## \d+\. ", PAGE, flags=re.M)
    assert len(sections) == 10 and APPLY % (3, 4) in PAGE
    for text in sections:
        lines = re.findall(r"^[-+](?!--|\+\+) *\S.*$", text, flags=re.M)
        assert 1 <= len(lines) <= 20, text


@ablation("KL to the initial model")
def test_kl_begins_at_0_with_the_initial_model_and_adds_to_the_loss_after_a_step(both):
    plain, changed = both()
    assert not apart(plain[0], changed[0])
    assert apart(plain[1], changed[1]) == {"trace_loss", "loss", "grad_norm"}
    assert changed[1]["trace_loss"] > plain[1]["trace_loss"]


@ablation("Length penalty")
def test_a_token_costs_a_thousandth_of_reward(both):
    plain, changed = both()
    paid = plain[0]["reward_mean"] - 0.001 * plain[0]["trace_len_mean"]
    assert changed[0]["reward_mean"] == pytest.approx(paid, rel=1e-5)
    assert changed[0]["gain"] == plain[0]["gain"]


@ablation("Temperature annealing")
def test_traces_are_sampled_and_scored_at_a_temperature_that_falls(both):
    plain, changed = both()
    assert [line.pop("temperature") for line in changed] == pytest.approx([1.0, 0.8])
    assert changed[0] == plain[0] and changed[1]["entropy"] < plain[1]["entropy"]
    assert changed[1]["sampler_gap"] < 1e-5


@ablation("Resampling of flat groups")
def test_flat_groups_are_sampled_again(both):
    plain, changed = both("--questions=8", "--traces=2", "--temperature=0.5")
    assert 0 < changed[0]["zero_std_frac"] < plain[0]["zero_std_frac"]
    assert changed[0]["sampler_gap"] < 1e-5


@ablation("One standard deviation for a batch")
def test_all_groups_are_divided_by_one_std(both):
    _, changed = both("--scale=none")
    centred, divided = (
        torch.tensor([trace["advantage"] for trace in samples(out)[0]["traces"]])
        for out in ("plain", "changed")
    )
    assert torch.allclose(divided * changed[0]["batch_std"], centred, rtol=1e-4)
    assert divided.any() and abs(divided.std().item() - 1) > 0.01  # not by the group's own


@ablation("A figure of your own")
def test_the_figure_is_in_the_log_and_nothing_else_is_changed(both):
    plain, changed = both()
    assert all(0 <= line.pop("copied") <= 1 for line in changed)
    assert changed == plain


@ablation("Partial rotary embedding")
def test_rope_turns_a_share_of_each_head(both):
    plain, changed = both()
    assert changed == plain  # the share is 1
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.5}))
    with pytest.raises(InputError, match=r"partial_rotary_factor 0\.5"):
        train(ours, "refused")
    half = train(sys.modules["train"], "half")
    assert "gold_logp_null" in apart(plain[0], half[0]) and half[0]["sampler_gap"] < 1e-5
    assert json.loads(Path("half/final/config.json").read_text())["partial_rotary_factor"] == 0.5


@ablation("Last layers only")
def test_the_lower_half_stays_and_the_upper_learns(both):
    both()
    before, after = weights("model"), weights("changed/final")
    for name in before:
        frozen = name.startswith(("embed_tokens", "layers.0"))
        assert torch.equal(before[name], after[name]) == frozen, name


@ablation("LoRA on q and v")
def test_lora_changes_q_and_v_alone_by_a_low_rank_and_final_is_a_plain_model(both):
    plain, changed = both()
    assert not {"loss", "entropy", "gold_ce"} & apart(plain[0], changed[0])  # B is 0
    assert changed[1]["sampler_gap"] < 1e-5
    before, after = weights("model"), weights("changed/final")
    for name in before:
        adapted = name.endswith(("q_proj.weight", "v_proj.weight"))
        assert torch.equal(before[name], after[name]) != adapted, name
    moved = after["layers.0.self_attn.q_proj.weight"] - before["layers.0.self_attn.q_proj.weight"]
    values = torch.linalg.svdvals(moved)  # 16 of them
    assert values[7] > 0 and values[8:].max() < 1e-4 * values[0]


@torch.no_grad()
def entropy_of_the_first_token(folder: str) -> float:
    model, tokenizer = load_model(folder), Tokenizer(folder)
    hidden = prefill(model, [tokenizer.prompt_ids([letter]) for letter in "abcdef"]).hidden
    return torch.distributions.Categorical(logits=model.lm_head(hidden)).entropy().mean().item()


FLAT = "def flat(logp, null_logp):\n    return 0 * null_logp.sum().expand(len(logp))\n"


@ablation("Entropy bonus")
def test_without_any_reward_the_entropy_rises(both):
    Path("mine.py").write_text(FLAT)
    alone = "--aggregator=mine.py:flat --answer-weight=none --marker-weight=0".split()
    plain, changed = both(*alone, "--lr=0.001", "--traces=16")
    assert plain[0]["grad_norm"] == 0 < changed[0]["grad_norm"]
    before, after = map(entropy_of_the_first_token, ("plain/final", "changed/final"))
    assert after > before
