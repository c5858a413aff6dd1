"""tests/readme.py, which executes README.md, finds its commands and what they should print."""

import readme

TEXT = """
```
$ .venv/bin/python say.py --one \\
    two      # a comment
it says 1.00   2.00 ...

make thing
```
`make other` and `.venv/bin/python say.py --three`

```python
def f(x):
    return x
```
"""


def test_commands_output_and_files_are_found_in_the_order_of_the_text():
    assert [(part.kind, " ".join(part.text.split())) for part in readme.read_parts(TEXT)] == [
        ("command", ".venv/bin/python say.py --one two"),
        ("output", "it says 1.00 2.00 ..."),
        ("command", "make thing"),
        ("command", ".venv/bin/python say.py --three"),
        ("file", "def f(x): return x"),
    ]


def test_an_expected_line_is_compared_without_its_spacing_up_to_its_dots():
    assert readme.is_printed("it says 1.00   2.00 ...", "before\n  it says 1.00 2.00 3.00\n")
    assert not readme.is_printed("it says 1.00   2.00", "it says 1.00\n2.00\n")
    assert not readme.is_printed("it says 1.00   2.00 ...", "it says 1.00 2.01\n")


def test_the_parts_of_our_readme_are_what_a_reader_sees_as_such():
    parts = readme.read_parts((readme.ROOT / "README.md").read_text())
    commands = [part.text for part in parts if part.kind == "command"]
    outputs = [part.text.split()[0] for part in parts if part.kind == "output"]
    assert commands[:2] == ["make train", "make test"]
    for program in ("train.py", "sample.py", "evaluate.py", "bin/torchrun", "bin/lm_eval"):
        assert any(program in command for command in commands), program
    for word in ("NRT", "RLPR", "plain", "vanishing_trace:", "trace", "answer", "aggregator"):
        assert word in outputs
    assert outputs.count("weighted_sum_log_prob") == 1


def test_every_command_of_our_readme_can_run_without_a_model_of_ones_own():
    parts = readme.read_parts((readme.ROOT / "README.md").read_text())
    for part in parts:
        if part.kind == "command":
            command = readme.runnable(part.text)
            assert not {"DIR", "pairs.jsonl", "held-out.jsonl", "..."} & set(command.split())
