"""Chat templates: named ones, that of a model folder, and writing one beside a tokenizer."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from paretomerge.checkpoint.json_file import read_optional_json, write_json
from paretomerge.checkpoint.reference import reject_symlink_escape
from paretomerge.errors import RecipeError, unknown_name

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"

CHAT_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}{{ '\\n' }}"
        "{{ message['content'] }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}"
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.{{ '\\n\\n' }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{{ message['content'] }}{{ '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "### Instruction:{{ '\\n' }}{{ message['content'] }}{{ '\\n\\n' }}"
        "{% else %}"
        "### Response:{{ '\\n' }}{{ message['content'] }}{{ eos_token }}{{ '\\n\\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Response:{{ '\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' }}"
        "{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"
        "{% endif %}"
    ),
    # Mistral has no system turn: the system message opens the first instruction.
    "mistral": (
        "{{ bos_token }}"
        "{% set lead = namespace(text='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set lead.text = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "[INST] {{ lead.text + message['content'] }} [/INST]{% set lead.text = '' %}"
        "{% else %}"
        "{{ ' ' + message['content'] | trim }}{{ eos_token }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "exaone": (
        "{% if messages[0]['role'] != 'system' %}[|system|][|endofturn|]{{ '\\n' }}{% endif %}"
        "{% for message in messages %}"
        "[|{{ message['role'] }}|]{{ message['content'] }}"
        "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}
"""Chat templates by the name that a recipe may use."""


def resolve_chat_template(value: str, folders: Mapping[str, Path]) -> str | None:
    """Return the jinja text that a recipe's `chat_template` stands for.

    Args:
        value: Jinja text, a name of `CHAT_TEMPLATES`, or "auto" for the most frequent template of
            the models (the first of several).
        folders: Folder of each model, for "auto".

    Returns:
        The template; None for "auto" if no model has one.

    Raises:
        RecipeError: If `value` is an unknown name.
    """
    if value == "auto":
        return _most_frequent_template(folders.values())
    # Every template has at least one of these marks, and no name has.
    if "{{" in value or "{%" in value:
        return value
    if value not in CHAT_TEMPLATES:
        message = unknown_name("template", value, ("auto", *CHAT_TEMPLATES))
        raise RecipeError(
            f"chat_template: {message}; or write jinja, with {{{{ and {{%"
        )
    return CHAT_TEMPLATES[value]


def write_chat_template(folder: Path, template: str) -> None:
    """Make `template` the only chat template of the tokenizer in `folder`."""
    (folder / _TEMPLATE_FILE).write_text(template, encoding="utf-8")
    # Processors of older models have theirs in a file of its own.
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / _CONFIG_FILE
    config = read_optional_json(path)
    # Older readers prefer the template in the config, so it must not stay there.
    if config.pop("chat_template", None) is not None:
        write_json(path, config)


def _most_frequent_template(folders: Iterable[Path]) -> str | None:
    templates = [read_chat_template(folder) for folder in folders]
    # Copies of one template often differ in the newline at their end.
    stripped = [template.strip() for template in templates if template]
    if not stripped:
        return None
    return Counter(stripped).most_common(1)[0][0]


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a model folder; None if it has none."""
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        # The result is going to be published, so no link may lead to a private file.
        return reject_symlink_escape(path).read_text(encoding="utf-8") or None
    template = read_optional_json(folder / _CONFIG_FILE).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None
