"""Chat templates: prompts through a model directory's own (`--prompt-format chat`), and the one
that is exported for any other prompt format.

A template is Jinja, in the file chat_template.jinja or in tokenizer_config.json. jinja2 is imported
only here, and run in its sandbox. What transformers would fill in beside the messages is left
undefined: no tools, no date of today, no `enable_thinking`. A system turn of the data stands in
front of the first question, as in any prompt format.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from support.errors import InputError, python, require
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
    install = f"{python()} -m pip install jinja2"
    require(find_spec("jinja2") is not None, f"--prompt-format chat needs jinja2 ({install})")
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


def template_of(prompt_format: str, bos: str, eos: str) -> str:
    """The template that makes the prompts of a prompt format with {question} (data.render).

    A model that continues its prompts writes trace, marker, answer. A Jinja string literal reads as
    in JSON, so that any prompt format can be one. A template writes bos itself.
    """
    pieces = [literal(piece) for piece in prompt_format.split("{question}")]
    question = " + text + ".join(pieces)
    answer = "text + " + literal(eos + "\n")
    blank = literal("\n\n")
    return "".join(
        [
            "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}",
            f"{{%- set system = messages[0].content + {blank}"
            " if messages[0].role == 'system' else '' -%}",
            f"{{{{- {literal(bos)} -}}}}",
            "{%- for turn in turns -%}",
            "{%- set text = ((system if loop.first else '') + turn.content) | trim -%}",
            f"{{%- if turn.role == 'user' -%}}{{{{- {question} -}}}}",
            f"{{%- else -%}}{{{{- {answer} -}}}}{{%- endif -%}}",
            "{%- endfor -%}",
        ]
    )


def literal(text: str) -> str:
    """A string literal in Jinja."""
    return json.dumps(text, ensure_ascii=False)
