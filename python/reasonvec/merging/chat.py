"""The chat template of a merge: a model's own, the most frequent one, a known one, or a text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from reasonvec.compat.problem import Problem
from reasonvec.errors import FormatError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import read_json

if TYPE_CHECKING:
    from reasonvec.merging.planning import Plan

__all__ = ["chat_template", "template_of"]

_KNOWN: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}


def template_of(folder: CheckpointFolder) -> str | None:
    """The chat template of a checkpoint, if it has one.

    Raises:
        FormatError: the file is no text in UTF-8.
        OSError: it cannot be read.
    """
    path = folder.folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            message = f"{path}: expected a chat template in UTF-8: {error}; fetch the file again"
            raise FormatError(message) from None
    config = folder.folder / "tokenizer_config.json"
    said = read_json(config).get("chat_template") if config.is_file() else None
    return said if isinstance(said, str) else None


def chat_template(asked: str | None, plan: Plan) -> tuple[str | None, Problem | None]:
    """The template to write, or None for the tokenizer's own; and what is wrong with what was
    asked for. "auto" is the one that most of the models have, the earlier of equally many."""
    if asked is None:
        return None, None
    if asked == "auto":
        found = Counter(
            template
            for source in plan.inputs
            if (template := template_of(source.folder)) is not None
        )
        if found:
            return found.most_common(1)[0][0], None
        message = "chat_template: auto: none of the models has a chat template"
        return None, Problem("chat_template", message, severity="warning")
    if asked in _KNOWN:
        return _KNOWN[asked], None
    if "{" in asked:
        return asked, None
    message = (
        f"chat_template: {asked!r} is neither auto, nor one of {', '.join(_KNOWN)}, nor a Jinja "
        "template (which has braces)"
    )
    return None, Problem("chat_template", message)
