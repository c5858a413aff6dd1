"""Peak memory of a rank in the parts of a training step, as train.py runs on more processes.

    python bench/memory.py                    1, 2 and 4 processes, a random model of 100M, bf16
    python bench/memory.py --beside DIR       the train.py of another checkout as well, in turns
    --json: one JSON object as the last line

MB of resident memory above what the process held before it read the model; the largest of all
ranks, in the second step. `sample` has the gathered view, `update` the backward passes and AdamW.
The questions are short, so that parameters outweigh activations. For Linux.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.environ.get("MEASURED_TREE") or str(Path(__file__).resolve().parents[1]))
from bench import machine
from support.errors import InputError, OneLineParser, exit_on_bad_input

ROOT = machine.ROOT
PARTS = ("sample", "score", "update")
FLAGS = "--device cpu --dtype bfloat16 --steps 3 --questions 4 --traces 2 --max-trace 4"
PAIR = '{"question": "from ann go 1 ?", "answer": "kim"}\n'


def measured_rank(out: Path) -> None:
    """One rank of a run: train.py, which notes its peak whenever its clock is read."""
    import train
    from support.metrics import Clock

    before = machine.held_mb("cpu")
    plain_lap = Clock.lap
    steps = []  # peaks by part

    def lap(clock: Clock, part: str) -> None:
        plain_lap(clock, part)
        if part == "sample":
            steps.append({})
        if len(steps) == 3:  # the second step is complete
            (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(steps[1]))
            os._exit(0)
        steps[-1][part] = max(steps[-1].get(part, 0.0), machine.peak_mb("cpu") - before)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    Clock.lap = lap
    train.main()


def peaks_of(tree: Path, model: Path, ranks: int) -> dict[str, float]:
    """MB by part of the step, the largest of all ranks."""
    with tempfile.TemporaryDirectory() as out:
        data = Path(out) / "pairs.jsonl"
        data.write_text(PAIR * 16)
        flags = [*FLAGS.split(), "--model", str(model), "--data", str(data)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        # Freed blocks go back to the system at once, not into glibc's free lists.
        env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        env |= {"MEASURED_TREE": str(tree), "MEASURED_OUT": out}
        command = [sys.executable, *launcher, __file__, *flags, "--out", f"{out}/run"]
        subprocess.run(command, env=os.environ | env, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(file.read_text()) for file in Path(out).glob("rank-*.json")]
    assert len(found) == ranks
    return {part: max(peaks[part] for peaks in found) for part in PARTS}


def main() -> None:
    from bench.make_model import make_model  # here: a rank may run in a checkout without it

    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes")
    parser.add_argument("--beside", help="another checkout")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    flags = parser.parse_args()
    machine.check_least("--ranks", min(flags.ranks), 1)
    if flags.beside and not (Path(flags.beside) / "train.py").exists():
        raise InputError(f"--beside {flags.beside}: there is no train.py")
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory.py reads /proc, which this system does not have")
    trees = {"ours": ROOT} | ({"beside": Path(flags.beside)} if flags.beside else {})
    result = machine.circumstances("cpu") | {"flags": FLAGS, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        result["parameters"] = make_model("100m", folder)
        print(f"{machine.headline(result)}\n{result['parameters'] / 1e6:.1f}M parameters, MB")
        print(f"{'':8s}{'ranks':>8s}" + "".join(f"{part:>8s}" for part in PARTS))
        for ranks in flags.ranks:
            for name, tree in trees.items():
                row = peaks_of(tree, Path(folder), ranks)
                result["rows"].append({"tree": name, "ranks": ranks} | row)
                cells = "".join(f"{row[part]:8.0f}" for part in PARTS)
                print(f"{name:8s}{ranks:8d}{cells}", flush=True)
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if "MEASURED_OUT" in os.environ:
        measured_rank(Path(os.environ["MEASURED_OUT"]))
    else:
        exit_on_bad_input(main)()
