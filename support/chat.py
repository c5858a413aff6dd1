"""Prompts through a model directory's own chat template: `--prompt-format chat`.

A template is Jinja, in the file chat_template.jinja or in tokenizer_config.json. jinja2 is imported
only here, and run in its sandbox. What transformers would fill in beside the messages is left
undefined: no tools, no date of today, no `enable_thinking`. A system turn of the data stands in
front of the first question, as in any prompt format.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from support.errors import InputError, require
from support.files import is_file

Prompter = Callable[[list[str]], str]  # [user, assistant, ..., user] -> the prompt as text


def own_template(path: Path, described: dict) -> str:
    """The directory's chat template, "" if it has none. described: its tokenizer_config.json."""
    file = path / "chat_template.jinja"
    try:
        own = file.read_text("utf-8") if is_file(file) else described.get("chat_template")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as text: {error}") from None
    return own if isinstance(own, str) else ""


def make_prompter(template: str, path: Path, bos: str, eos: str) -> Prompter:
    """InputError where there is no template or no jinja2, or the template does not work."""
    require(template != "", f"--prompt-format chat: {path} has no chat template")
    require(
        find_spec("jinja2") is not None, "--prompt-format chat needs jinja2 (pip install jinja2)"
    )
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:  # templates call it where they refuse a message
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception

    def prompt(turns: list[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        return compiled.render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )

    try:
        compiled = environment.from_string(template)
        shown = prompt(["a question"])
    except Exception as error:  # Jinja's own errors, and those of Python inside a template
        raise InputError(f"{path}: its chat template fails: {error}") from None
    require("a question" in shown, f"{path}: its chat template drops the question")
    return prompt
