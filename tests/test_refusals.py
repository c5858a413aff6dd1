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
from support.errors import exit_on_bad_input
from support.run import LOCKS

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


# ---- tables: an edit, and what the line must name
Case = tuple[Callable[[], None], list[str]]


def fields(file: str, **values: list) -> list[Case]:
    """Each field of a JSON file with each of its wrong values; the line names file and field."""
    return [
        (merge(file, **{field: value}), [file, field])
        for field, wrong in values.items()
        for value in wrong
    ]


def each(flags: str) -> list[tuple[list[str], str]]:
    """Each flag alone; the line names it."""
    return [([flag], flag.partition("=")[0]) for flag in flags.split()]


NORM = "model.norm.weight"
DEEP = "[" * 200 + "]" * 200
CONFIG, GENERATION = "model/config.json", "model/generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
NRT, MAP = "model/nrt.json", "model/special_tokens_map.json"
WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 4.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {"F8": torch.float8_e4m3fn, "I64": torch.int64, "BOOL": torch.bool}
BROKEN_TOKENIZERS = ["", "{", "{}", '{"version": "1.0"}', "[" * 100_000, "\0" * 100]
MODEL = [  # of a model directory, for four commands
    *fields(
        CONFIG,
        vocab_size=["11", True, 10**12, None],
        hidden_size=[0, -16, 16.0, [16], None],
        intermediate_size=[{}, None],
        num_hidden_layers=[0, 100_000, 10**30, None],
        num_attention_heads=["4", 2.0, None],
        num_key_value_heads=[0],
        head_dim=[2.5],
        max_position_embeddings=["2048", 0],
        rms_norm_eps=[-1, "1e-5", float("nan")],
        rope_theta=["many", True, {}, float("inf"), 0],
        rope_scaling=[[8], "linear"],
        rope_parameters=["llama3"],
        tie_word_embeddings=["no"],
        layer_types=[3],
        model_type=[["llama"], {}],
        hidden_act=[["silu"]],
        eos_token_id=["1", [1, -1], 1.5, True],
    ),
    (merge(CONFIG, rope_scaling=LLAMA3), [CONFIG, "low_freq_factor"]),
    (merge(CONFIG, rope_scaling={"rope_type": "llama3", "factor": "8"}), [CONFIG, "factor"]),
    (merge(CONFIG, vocab_size=9), ["model"]),
    *[(put(CONFIG, text), [CONFIG, "JSON"]) for text in ("", "{", b"\xff\xfe\x00", b"1" * 5000)],
    *[(put(CONFIG, text), [CONFIG, kind]) for text, kind in (("[]", "list"), ('"llama"', "str"))],
    (put(CONFIG, f'{{"model_type": {DEEP}}}'), [CONFIG, "deep"]),
    (put(CONFIG, "[" * 100_000), [CONFIG]),
    *[(pipe(file), [file, "pipe"]) for file in (CONFIG, GENERATION, NRT, TOKENIZER, WEIGHTS)],
    *[(endless(file), [file, "device"]) for file in (CONFIG, WEIGHTS)],
    *[(drop(file), [file, "no such file"]) for file in (CONFIG, TOKENIZER)],
    *fields(GENERATION, eos_token_id=["1", [[1]], {"id": 1}, -3]),
    *fields(TOKENIZER_CONFIG, eos_token=[1, ["<eos>"], {"content": 5}]),
    *fields(NRT, marker=[3, ["m"], {}], prompt_format=[7, ["{question}"]]),
    (merge(NRT, marker="\ud800"), ["marker", "nrt.json"]),
    (merge(NRT, prompt_format="{question}\udfff"), ["prompt-format"]),
    *[
        (merge(NRT, prompt_format=text), ["prompt-format", text, "{question}"])
        for text in ("no question", "{Question}", "{} ?")
    ],
    (merge(NRT, marker="<eos>"), ["marker", "eos"]),
    *[
        (put(file, text), [file])
        for file in (GENERATION, TOKENIZER_CONFIG, NRT, MAP)
        for text in ("[]", "{", '"text"', f'{{"a": {DEEP}}}', b"\xff")
    ],
    *[(put(TOKENIZER, text), [TOKENIZER, "tokenizer"]) for text in BROKEN_TOKENIZERS],
    (
        lambda: (
            merge(TOKENIZER_CONFIG, eos_token=None)(),
            merge(CONFIG, eos_token_id=10)(),
            merge(GENERATION, eos_token_id=10**6)(),
        ),
        ["eos", "10"],
    ),
    *[
        (tensors(**{NORM: torch.ones(16).to(kind)}), [NORM, name, "F32"])
        for name, kind in KINDS.items()
    ],
    (tensors(**{NORM: torch.ones(15)}), [NORM, "[15]", "[16]"]),
    *[
        (tensors(**{name: torch.ones(16)}), [WEIGHTS, name])
        for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight")
    ],
    (tensors(junk=torch.ones(2)), ["junk"]),
    *[(tensors(drop=name), ["model:", name, "missing"]) for name in (NORM, "lm_head.weight")],
    *[
        (put(WEIGHTS, content), [WEIGHTS])
        for content in (b"", b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}")
    ],
    (drop(WEIGHTS), ["model.safetensors"]),
    *[(put(INDEX, text), [INDEX]) for text in ("{", "[]", '{"metadata": {}}')],
    *[(merge(INDEX, weight_map=wrong), [INDEX]) for wrong in (None, 3, {})],
    *[
        (merge(INDEX, weight_map={"a": name}), [INDEX])
        for name in ("../model.safetensors", "/etc/passwd", "..", ["model.safetensors"], "")
    ],
    (merge(INDEX, weight_map={"a": "gone.safetensors"}), ["gone.safetensors"]),
]


@pytest.mark.parametrize("case", range(len(MODEL)))
def test_a_model_directory_that_is_not_one_is_refused_by_file_and_field(
    case, world, monkeypatch, capfd
):
    edit, says = MODEL[case]
    edit()
    for name in MODEL_COMMANDS:
        assert_refused(name, [], says, monkeypatch, capfd)


ROWS, SECOND = "rows.jsonl", "rows.jsonl:2:"
GOOD = b'{"question": "a", "answer": "b"}\n'
DATA = [
    *[
        (put(ROWS, GOOD + row), [SECOND, says])
        for row, says in [
            (b"[" * 100_000, ""),
            (b"\x00\x00", ""),
            (b"\xff\xfe", ""),
            (b"12", "int"),
            (b"null", "NoneType"),
            (b'{"question": {}, "answer": "b"}', "dict"),
            (b'{"messages": {"role": "user"}}', "messages"),
            (b'{"question": "a", "answer": "\\ud800"}', ""),
            (b'{"question": "\xed\xa0\x80", "answer": "b"}', ""),
            (b'{"question": "' + b"a" * 2**26, "bytes"),
        ]
    ],
    *[(put(ROWS, text), [ROWS, "no rows"]) for text in ("", "\n  \n")],
    (put(ROWS, b'{"question": "' + b"a " * 3000 + b'", "answer": "b"}'), [ROWS]),
    (drop(ROWS), [ROWS, "No such file"]),
    (pipe(ROWS), [ROWS, "pipe"]),
    (endless(ROWS), [ROWS, "device"]),
    (lambda: (drop(ROWS)(), Path(ROWS).mkdir()), [ROWS, "directory"]),
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
            for names, values in [
                ("lr temperature grad-clip weight-decay eps null-loss", "nan inf -1"),
                ("steps max-trace keep save-every updates max-prompt", "0 -1 1e3 " + "9" * 30),
                ("steps max-trace keep save-every updates max-prompt", "9" * 5000),
            ]
            for name in names.split()
            for value in values.split()
        ],
        *each("--questions=1000000000000 --traces=1000000000000 --decode-rows=-1 --seed=-1"),
        *each("--device=tpu --device=meta --device= --timeout=0 --dtype=int8 --out="),
        (["--device=cuda:0"], "invalid choice: 'cuda:0'"),  # a GPU is named by CUDA_VISIBLE_DEVICES
        *each("--marker=\udcff --marker=<eos> --prompt-format=\udcff{question}"),
        *each("--no-such-flag=1 --step=3 --steps=many --traces=1 --activation-checkpointing=some"),
        (["--traces=1", "--center=none"], "--scale"),
        (["--questions=5", "--updates=2"], "--updates"),
        (["--traces=0", "--null-loss=1"], "--null-loss"),
        (["--clip-null", "--aggregator=r3"], "--clip-null"),
        (["--resume", "--overwrite"], "--resume"),
        (["--aggregator=best"], "best"),
        (["--model="], "tokenizer.json"),
        (["--model=nowhere"], "nowhere"),
        (["--model=meta-llama/Llama-3.2-1B"], "hf download"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval-data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt-format=no place"], "{question}"),
        (["--data=model"], "model: a directory"),
        (["--data=\udcff"], "No such file"),
        (["--eval-data=model"], "model: a directory"),
        (["--model=" + "x" * 5000], "too long"),
        (["--aggregator=gone.py:f"], "gone.py"),
        (["--max-trace=4096"], "max_position_embeddings"),
        (["--out=rows.jsonl"], "--out rows.jsonl: cannot be written"),
        (["--out=rows.jsonl/run"], "--out rows.jsonl/run: cannot be written"),
        (["--out=run"], "already holds a run"),
        (["--out=run", "--resume", "--model=words"], "--model words"),
        (["--model=run/final", "--out=run", "--overwrite"], "would be deleted"),
        (["--data=run/log.jsonl", "--out=run", "--overwrite"], "would be deleted"),
    ],
    "sample": [
        *each("--device=tpu --device=cuda:99 --temperature=nan --temperature=inf --temperature=-1"),
        *each(
            "--max-trace=0 --max-answer=-5 --seed=-1 --question= --question=\udcff --marker=<new>"
        ),
        (["--question=" + "a " * 3000], "--question"),
        (["--model=gone"], "gone"),
    ],
    "evaluate": [
        *each("--limit=0 --limit=-3 --traces=1 --temperature=nan --device=tpu"),
        *each("--question=a --gold=a"),
        (["--data="], "directory"),
    ],
    "preflight": each("--traces=1000000000000 --traces=50000000 --limit=0"),
    "resume": [
        *each("--model=words --data=model --marker=a --aggregator=log_prob --seed=7"),
        *each("--dtype=bfloat16"),
        (["--prompt-format=Q {question}"], "--prompt-format"),
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
EMPTY = struct.pack("<Q", 2) + b"{}"  # safetensors without tensors
RUN = [
    *fields(
        ARGS,
        steps=["2", 2.5, True],
        lr=["high", float("nan")],
        model=[3, "a\0b"],
        traces=[[2]],
        resume=[1],
        marker=[{}],
        center=["median"],
        keep=[0],
    ),
    (merge(ARGS, unknown_flag=1), [ARGS]),
    *[(put(ARGS, text), [ARGS]) for text in ("[]", '{"model": ', '{"somebody": "else"}')],
    (drop(ARGS), ["args.json"]),
    (pipe(ARGS), [ARGS, "pipe"]),
    *fields(
        PROGRESS,
        step=["2", 7, None],
        position=[-1, 1.5, [4]],
        updates=["many"],
        data=[5],
    ),
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
    *[(put(OPTIMIZER, content), [LAST]) for content in (b"", b"short", EMPTY)],
    (lambda: shutil.copy(WEIGHTS, OPTIMIZER), [LAST, "embed_tokens.weight.exp_avg"]),
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
