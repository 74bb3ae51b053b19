"""A prompt as token ids, also as a model that was trained on conversations expects it."""

from datetime import datetime
from typing import NoReturn

from .gguf_model import InputError, ModelFile


def encode(file: ModelFile, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, with the model's template or without. A template writes the token that begins a text."""
    if not prompt:
        raise InputError("a prompt must have at least one token, got an empty one")
    if chat:
        return file.tokenizer.encode(as_chat(file, prompt), add_special_tokens=False).ids
    return file.tokenizer.encode(prompt).ids


def as_chat(file: ModelFile, prompt: str) -> str:
    """The text of a conversation in which a user says `prompt` and the assistant is to answer.

    Args:
        file: A model whose file has a template.
        prompt: What the user says.

    Raises:
        InputError: the template does not work, or cannot put such a conversation into words.
    """
    from jinja2 import TemplateError, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is a program of the file's author

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    # The settings and functions that authors of templates count on.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=Undefined
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    messages = [{"role": "user", "content": prompt}]
    try:
        template = environment.from_string(file.chat_template or "")
        return template.render(messages=messages, add_generation_prompt=True, **file.control_tokens)
    except (TemplateError, TypeError) as error:
        raise InputError(f"model must have a chat template that works, got: {error}; --raw goes without") from error
