"""Bad input: every command refuses it in one line with exit code 2, and changes no file.

A case is an edit of a world (a model, rows, a finished run) and what the error must name.
"""

import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, needs_proc
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from support.checkpoint import LOCKS
from support.errors import exit_on_bad_input

FUZZ = 25  # of each file
NOISE = 8 * 2**20  # bytes that a command may take whatever its files hold; 0.2 MB were measured
COMMANDS = {
    "train": (train.main, ["--model=model", "--data=rows.jsonl", "--out=new", *BRIEF]),
    "resume": (train.main, ["--out=run", "--resume", "--steps=3"]),
    "sample": (sample.main, ["--model=model", "--question=a", "--max-trace=4", "--device=cpu"]),
    "evaluate": (
        evaluate.main,
        ["--model=model", "--data=rows.jsonl", "--max-trace=4", "--device=cpu"],
    ),
    "preflight": (
        evaluate.main,
        ["--model=model", "--data=rows.jsonl", "--preflight", "--max-trace=4", "--device=cpu"],
    ),
}
MODEL_COMMANDS = ["train", "sample", "evaluate", "preflight"]
DATA_COMMANDS = ["train", "evaluate", "preflight"]


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
def merge(file: str, **fields) -> Callable[[], None]:
    """Sets fields of a JSON file."""

    def edit() -> None:
        value = json.loads(Path(file).read_text()) if Path(file).exists() else {}
        Path(file).write_text(json.dumps(value | fields))

    return edit


def put(file: str, content: bytes | str) -> Callable[[], None]:
    content = content.encode() if isinstance(content, str) else content
    return lambda: Path(file).write_bytes(content)


def drop(file: str) -> Callable[[], None]:
    return lambda: Path(file).unlink()


def pipe(file: str) -> Callable[[], None]:
    """A FIFO in its place: who opens it waits for ever."""

    def edit() -> None:
        Path(file).unlink(missing_ok=True)
        os.mkfifo(file)

    return edit


def endless(file: str) -> Callable[[], None]:
    def edit() -> None:
        Path(file).unlink(missing_ok=True)
        Path(file).symlink_to("/dev/zero")

    return edit


def tensors(drop: str = "", **changed: torch.Tensor) -> Callable[[], None]:
    def edit() -> None:
        file = Path("model/model.safetensors")
        kept = load_file(file)
        kept.pop(drop, None)
        save_file(kept | changed, file)

    return edit


NORM = "model.norm.weight"
DEEP = "[" * 200 + "]" * 200
CONFIG, GENERATION = "model/config.json", "model/generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, NRT = (
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/nrt.json",
)
# What a model directory may hold: the edit, and what the line must name. For four commands.
MODEL = [
    *[
        (merge(CONFIG, **{field: value}), [CONFIG, field])
        for field, value in [
            ("vocab_size", "11"),
            ("vocab_size", True),
            ("vocab_size", 10**12),
            ("vocab_size", None),
            ("hidden_size", 0),
            ("hidden_size", -16),
            ("hidden_size", 16.0),
            ("hidden_size", [16]),
            ("intermediate_size", {}),
            ("num_hidden_layers", 100_000),
            ("num_hidden_layers", 10**30),
            ("num_attention_heads", "4"),
            ("num_key_value_heads", 0),
            ("head_dim", 2.5),
            ("max_position_embeddings", "2048"),
            ("max_position_embeddings", 0),
            ("rms_norm_eps", -1),
            ("rms_norm_eps", float("nan")),
            ("rope_theta", True),
            ("rope_theta", {}),
            ("rope_theta", float("inf")),
            ("rope_theta", 0),
            ("rope_scaling", [8]),
            ("rope_parameters", "llama3"),
            ("tie_word_embeddings", "no"),
            ("layer_types", 3),
            ("model_type", ["llama"]),
            ("model_type", {}),
            ("hidden_act", ["silu"]),
            ("eos_token_id", "1"),
            ("eos_token_id", [1, -1]),
            ("eos_token_id", 1.5),
            ("eos_token_id", True),
        ]
    ],
    (
        merge(
            CONFIG,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        [CONFIG, "low_freq_factor"],
    ),
    (merge(CONFIG, rope_scaling={"rope_type": "llama3", "factor": "8"}), [CONFIG, "factor"]),
    (merge(CONFIG, vocab_size=9), ["model"]),
    (put(CONFIG, "{"), [CONFIG, "JSON"]),
    (put(CONFIG, "[]"), [CONFIG, "list"]),
    (put(CONFIG, f'{{"model_type": {DEEP}}}'), [CONFIG, "deep"]),
    (put(CONFIG, "[" * 100_000), [CONFIG]),
    (put(CONFIG, b"\xff\xfe\x00"), [CONFIG, "JSON"]),
    (put(CONFIG, b"1" * 5000), [CONFIG]),
    (pipe(CONFIG), [CONFIG, "pipe"]),
    (endless(CONFIG), [CONFIG, "device"]),
    (drop(CONFIG), [CONFIG, "no such file"]),
    *[
        (merge(file, **{field: value}), [file, field])
        for file, field, value in [
            (GENERATION, "eos_token_id", "1"),
            (GENERATION, "eos_token_id", [[1]]),
            (GENERATION, "eos_token_id", {"id": 1}),
            (GENERATION, "eos_token_id", -3),
            (TOKENIZER_CONFIG, "eos_token", 1),
            (TOKENIZER_CONFIG, "eos_token", ["<eos>"]),
            (TOKENIZER_CONFIG, "eos_token", {"content": 5}),
            (NRT, "marker", 3),
            (NRT, "marker", ["m"]),
            (NRT, "marker", {}),
            (NRT, "prompt_format", 7),
            (NRT, "prompt_format", ["{question}"]),
        ]
    ],
    (merge(NRT, marker="\ud800"), ["marker", "nrt.json"]),
    (merge(NRT, prompt_format="{question}\udfff"), ["prompt-format"]),
    (merge(NRT, prompt_format="no question"), ["prompt-format"]),
    (merge(NRT, marker="<eos>"), ["marker", "eos"]),
    *[
        (put(file, text), [file])
        for file in (GENERATION, TOKENIZER_CONFIG, NRT, "model/special_tokens_map.json")
        for text in ("[]", "{", '"text"', f'{{"a": {DEEP}}}', b"\xff")
    ],
    (pipe(GENERATION), [GENERATION, "pipe"]),
    (pipe(NRT), [NRT, "pipe"]),
    (pipe(TOKENIZER), [TOKENIZER, "pipe"]),
    (drop(TOKENIZER), [TOKENIZER, "no such file"]),
    (put(TOKENIZER, "{}"), [TOKENIZER, "tokenizer"]),
    (put(TOKENIZER, "[" * 100_000), [TOKENIZER, "tokenizer"]),
    (put(TOKENIZER, b"\x00" * 100), [TOKENIZER, "tokenizer"]),
    (
        lambda: (
            merge(TOKENIZER_CONFIG, eos_token=None)(),
            merge(CONFIG, eos_token_id=10)(),
            merge(GENERATION, eos_token_id=10**6)(),
        ),
        ["eos", "10"],
    ),
    (tensors(**{NORM: torch.ones(16, dtype=torch.int64)}), [NORM, "I64", "F32"]),
    (tensors(**{NORM: torch.ones(16, dtype=torch.bool)}), [NORM, "BOOL"]),
    (tensors(**{NORM: torch.ones(16).to(torch.float8_e4m3fn)}), [NORM, "F8"]),
    (tensors(**{NORM: torch.ones(15)}), [NORM, "[15]"]),
    (tensors(**{"junk": torch.ones(2)}), ["junk"]),
    (tensors(drop=NORM), [NORM, "missing"]),
    (put("model/model.safetensors", b""), ["model.safetensors"]),
    (put("model/model.safetensors", b"\xff" * 64), ["model.safetensors"]),
    (put("model/model.safetensors", struct.pack("<Q", 2**40) + b"{}"), ["model.safetensors"]),
    (pipe("model/model.safetensors"), ["model.safetensors", "pipe"]),
    (endless("model/model.safetensors"), ["model.safetensors", "device"]),
    (drop("model/model.safetensors"), ["model.safetensors"]),
    *[
        (put("model/model.safetensors.index.json", json.dumps(index)), ["index.json"])
        for index in [
            {},
            {"weight_map": 3},
            {"weight_map": {}},
            {"weight_map": {"a": "../model.safetensors"}},
            {"weight_map": {"a": "/etc/passwd"}},
            {"weight_map": {"a": ".."}},
            {"weight_map": {"a": ["model.safetensors"]}},
            {"weight_map": {"a": ""}},
        ]
    ],
    (
        put("model/model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
        ["gone.safetensors"],
    ),
]


@pytest.mark.parametrize("case", range(len(MODEL)))
def test_a_model_directory_that_is_not_one_is_refused_by_file_and_field(
    case, world, monkeypatch, capfd
):
    edit, says = MODEL[case]
    edit()
    for name in MODEL_COMMANDS:
        assert_refused(name, [], says, monkeypatch, capfd)


GOOD = b'{"question": "a", "answer": "b"}\n'
DATA = [
    (put("rows.jsonl", b""), ["rows.jsonl", "no rows"]),
    (put("rows.jsonl", GOOD + b"[" * 100_000), ["rows.jsonl:2:"]),
    (put("rows.jsonl", GOOD + b"\x00\x00"), ["rows.jsonl:2:"]),
    (put("rows.jsonl", GOOD + b"\xff\xfe"), ["rows.jsonl:2:"]),
    (put("rows.jsonl", GOOD + b"12"), ["rows.jsonl:2:", "int"]),
    (put("rows.jsonl", GOOD + b"null"), ["rows.jsonl:2:", "NoneType"]),
    (put("rows.jsonl", GOOD + b'{"question": {}, "answer": "b"}'), ["rows.jsonl:2:", "dict"]),
    (put("rows.jsonl", GOOD + b'{"messages": {"role": "user"}}'), ["rows.jsonl:2:", "messages"]),
    (put("rows.jsonl", GOOD + b'{"question": "a", "answer": "\\ud800"}'), ["rows.jsonl:2:"]),
    (put("rows.jsonl", GOOD + b'{"question": "\xed\xa0\x80", "answer": "b"}'), ["rows.jsonl:2:"]),
    (put("rows.jsonl", GOOD + b'{"question": "' + b"a" * 2**26), ["rows.jsonl:2:", "bytes"]),
    (put("rows.jsonl", b'{"question": "' + b"a " * 3000 + b'", "answer": "b"}'), ["rows.jsonl"]),
    (drop("rows.jsonl"), ["rows.jsonl", "No such file"]),
    (pipe("rows.jsonl"), ["rows.jsonl", "pipe"]),
    (endless("rows.jsonl"), ["rows.jsonl", "device"]),
    (lambda: (drop("rows.jsonl")(), Path("rows.jsonl").mkdir()), ["rows.jsonl", "directory"]),
]


@pytest.mark.parametrize("case", range(len(DATA)))
def test_rows_that_cannot_be_used_are_refused_by_file_and_line(case, world, monkeypatch, capfd):
    edit, says = DATA[case]
    edit()
    for name in DATA_COMMANDS:
        assert_refused(name, [], says, monkeypatch, capfd)


FLAGS = {
    "train": [
        *[
            ([f"--{name}={value}"], f"--{name}")
            for name in ("lr", "temperature", "grad-clip", "weight-decay", "eps", "null-loss")
            for value in ("nan", "inf", "-1")
        ],
        *[
            ([f"--{name}={value}"], f"--{name}")
            for name in ("steps", "max-trace", "keep", "save-every", "updates", "max-prompt")
            for value in ("0", "-1", "1e3", "9" * 30, "9" * 5000)
        ],
        (["--questions=1000000000000"], "--questions"),
        (["--traces=1000000000000"], "--traces"),
        (["--decode-rows=-1"], "--decode-rows"),
        (["--seed=-1"], "--seed"),
        (["--device=tpu"], "--device"),
        (["--device=meta"], "--device"),
        (["--device="], "--device"),
        (["--timeout=0"], "--timeout"),
        (["--dtype=int8"], "--dtype"),
        (["--out="], "--out"),
        (["--model="], "tokenizer.json"),
        (["--data=model"], "model: a directory"),
        (["--data=\udcff"], "No such file"),
        (["--eval-data=model"], "model: a directory"),
        (["--marker=\udcff"], "--marker"),
        (["--marker=<eos>"], "--marker"),
        (["--prompt-format=\udcff{question}"], "--prompt-format"),
        (["--model=" + "x" * 5000], "too long"),
        (["--aggregator=gone.py:f"], "gone.py"),
        (["--max-trace=4096"], "max_position_embeddings"),
        (["--out=rows.jsonl"], "--out rows.jsonl"),
        (["--out=rows.jsonl/run"], "--out rows.jsonl/run"),
        (["--out=run"], "already holds a run"),
        (["--out=run", "--resume", "--model=words"], "--model words"),
        (["--model=run/final", "--out=run", "--overwrite"], "would be deleted"),
        (["--data=run/log.jsonl", "--out=run", "--overwrite"], "would be deleted"),
    ],
    "sample": [
        (["--device=tpu"], "--device"),
        (["--device=cuda:99"], "--device"),
        (["--temperature=nan"], "--temperature"),
        (["--temperature=inf"], "--temperature"),
        (["--temperature=-1"], "--temperature"),
        (["--max-trace=0"], "--max-trace"),
        (["--max-answer=-5"], "--max-answer"),
        (["--seed=-1"], "--seed"),
        (["--question="], "--question"),
        (["--question=\udcff"], "--question"),
        (["--question=" + "a " * 3000], "--question"),
        (["--model=gone"], "gone"),
        (["--marker=<new>"], "--marker"),
    ],
    "evaluate": [
        (["--data="], "directory"),
        (["--limit=0"], "--limit"),
        (["--limit=-3"], "--limit"),
        (["--traces=1"], "--traces"),
        (["--temperature=nan"], "--temperature"),
        (["--device=tpu"], "--device"),
        (["--question=a"], "--question"),
        (["--gold=a"], "--gold"),
    ],
    "preflight": [
        (["--traces=1000000000000"], "--traces"),
        (["--traces=50000000"], "--traces"),
        (["--limit=0"], "--limit"),
    ],
    "resume": [
        (["--model=words"], "--model"),
        (["--data=model"], "--data"),
        (["--marker=a"], "--marker"),
        (["--prompt-format=Q {question}"], "--prompt-format"),
        (["--aggregator=log_prob"], "--aggregator"),
        (["--seed=7"], "--seed"),
        (["--dtype=bfloat16"], "--dtype"),
    ],
}
FLAG_CASES = [(name, *case) for name, cases in FLAGS.items() for case in cases]


@pytest.mark.parametrize("case", range(len(FLAG_CASES)))
def test_a_flag_that_cannot_work_is_refused_by_name(case, world, monkeypatch, capfd):
    name, flags, says = FLAG_CASES[case]
    assert_refused(name, flags, [says], monkeypatch, capfd)


LAST = "run/checkpoint-000002"
ARGS, PROGRESS, LOG = "run/args.json", f"{LAST}/progress.json", "run/log.jsonl"
OPTIMIZER = f"{LAST}/optimizer/shard-00001-model-00001-of-00001.safetensors"
RUN = [
    *[
        (merge(ARGS, **{field: value}), [ARGS, field])
        for field, value in [
            ("steps", "2"),
            ("steps", 2.5),
            ("steps", True),
            ("lr", "high"),
            ("lr", float("nan")),
            ("model", 3),
            ("model", "a\0b"),
            ("traces", [2]),
            ("resume", 1),
            ("marker", {}),
            ("center", "median"),
            ("keep", 0),
        ]
    ],
    (merge(ARGS, unknown_flag=1), [ARGS]),
    (put(ARGS, "[]"), [ARGS]),
    (put(ARGS, '{"model": '), [ARGS]),
    (put(ARGS, '{"somebody": "else"}'), [ARGS]),
    (drop(ARGS), ["args.json"]),
    (pipe(ARGS), [ARGS, "pipe"]),
    *[
        (merge(PROGRESS, **{field: value}), [PROGRESS, field])
        for field, value in [
            ("step", "2"),
            ("step", 7),
            ("step", None),
            ("position", -1),
            ("position", 1.5),
            ("position", [4]),
            ("updates", "many"),
            ("data", 5),
        ]
    ],
    (put(PROGRESS, "[]"), [PROGRESS]),
    (drop(PROGRESS), [PROGRESS]),
    (merge(PROGRESS, data="0" * 32), ["rows.jsonl", "changed"]),
    (put("rows.jsonl", GOOD * 6), ["rows.jsonl", "changed"]),
    (put(LOG, b"3\n"), [f"{LOG}:1"]),
    (put(LOG, b'{"step": 1}\n{"step": "2"}\n'), [f"{LOG}:2", "step"]),
    (put(LOG, b'{"step": 1}\n{}\n'), [f"{LOG}:2", "step"]),
    (put(LOG, b'{"step": 1, "warnings": 3}\n'), [f"{LOG}:1", "warnings"]),
    (put(LOG, b"[" * 100_000 + b"\n"), [f"{LOG}:1"]),
    (put("run/samples.jsonl", b"\x00\x00\n"), ["run/samples.jsonl:1"]),
    (drop(OPTIMIZER), [LAST]),
    (put(OPTIMIZER, b""), [LAST]),
    (put(OPTIMIZER, struct.pack("<Q", 2) + b"{}"), [LAST]),
    (merge(f"{LAST}/config.json", num_hidden_layers=3), [LAST]),
    (put(f"{LAST}/model.safetensors", b"short"), [LAST]),
    (put(f"{LAST}/tokenizer.json", "{}"), [LAST]),
    (merge(f"{LAST}/nrt.json", marker="a"), [LAST, "marker"]),
    (merge(NRT, prompt_format="Q {question}"), ["model", LAST]),
    (lambda: [shutil.rmtree(path) for path in Path("run").glob("checkpoint-*")], ["final"]),
    (put("run/run.lock", "my own notes"), ["run.lock"]),
]


@pytest.mark.parametrize("case", range(len(RUN)))
def test_a_run_that_cannot_be_resumed_is_refused_by_file_and_field(case, world, monkeypatch, capfd):
    edit, says = RUN[case]
    edit()
    assert_refused("resume", [], says, monkeypatch, capfd)


# ---- fuzzing: what no table lists
JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    1e300,
    10**30,
    "",
    "a",
    "\ud800",
    [],
    [[]],
    {},
    {"a": []},
    "{question}",
]


def spoil_json(text: bytes, rng: random.Random) -> bytes:
    """Replaces, removes or adds a value somewhere in a JSON file."""
    value = json.loads(text)
    inner = value
    while isinstance(inner, dict | list) and inner:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = rng.choice(keys)
        if rng.random() < 0.5 or not isinstance(inner[key], dict | list) or not inner[key]:
            if rng.random() < 0.2:
                del inner[key]
            else:
                inner[key] = rng.choice(JUNK)
            break
        inner = inner[key]
    return json.dumps(value).encode()


def spoil_bytes(text: bytes, rng: random.Random) -> bytes:
    """Flips, cuts or repeats some of the first bytes, where headers are."""
    at = rng.randrange(min(len(text), 400))
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + rng.randbytes(rng.randrange(1, 9)) + text[at:]
    if kind == 2:
        return text[:at] + text[at + rng.randrange(1, 9) :]
    return text[:at] + rng.randbytes(1) + text[at + 1 :]


def spoil_line(text: bytes, rng: random.Random) -> bytes:
    """The same with one row of a JSONL file."""
    lines = text.splitlines()
    row = rng.randrange(len(lines))
    lines[row] = rng.choice([spoil_json, spoil_bytes])(lines[row], rng)
    return b"\n".join(lines) + b"\n"


FUZZED = [
    ("sample", "model/model.safetensors", spoil_bytes),
    ("sample", CONFIG, spoil_json),
    ("sample", CONFIG, spoil_bytes),
    ("sample", TOKENIZER, spoil_json),
    ("sample", TOKENIZER, spoil_bytes),
    ("sample", TOKENIZER_CONFIG, spoil_json),
    ("sample", NRT, spoil_json),
    ("evaluate", "rows.jsonl", spoil_line),
    ("resume", ARGS, spoil_json),
    ("resume", PROGRESS, spoil_json),
    ("resume", PROGRESS, spoil_bytes),
    ("resume", LOG, spoil_line),
    ("resume", OPTIMIZER, spoil_bytes),
]


def memory(name: str) -> int:
    """Bytes of this process's memory, "VmRSS" now or "VmHWM" at its highest."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


@needs_proc
@pytest.mark.parametrize(("command", "file", "spoil"), FUZZED)
def test_a_spoilt_file_is_used_or_refused_in_a_line_within_twice_its_memory(
    command, file, spoil, world, monkeypatch, capfd
):
    """Seeded. That it is used is fine: not every change is an error."""
    rng, whole = random.Random(f"{file} {spoil.__name__}"), Path(file).read_bytes()
    shutil.copytree("run", "kept")
    for _ in range(FUZZ):
        spoilt = spoil(whole, rng)
        Path(file).write_bytes(spoilt)
        before = tree(Path.cwd())
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory is that of now
        start = memory("VmRSS")
        code = run(command, ["--max-answer=2"] if command == "sample" else [], monkeypatch)
        assert memory("VmHWM") - start <= 2 * len(spoilt) + NOISE, spoilt
        error = capfd.readouterr().err
        assert code == 0 or (error.startswith("error: ") and error.count("\n") == 1), error
        if code == 2:
            assert tree(Path.cwd()) == before, spoilt
        elif command == "resume":  # it went on, to its end or to a weight that is not finite
            LOCKS.clear()
            shutil.rmtree("run")
            shutil.copytree("kept", "run")
