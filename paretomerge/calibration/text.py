"""Calibration text: examples from files and tasks, and their tokens as a model reads them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from paretomerge.calibration.text_files import (
    numbered_lines,
    parse_json_line,
    read_text,
)
from paretomerge.errors import ConfigError, shorten
from paretomerge.evaluate.inference.bos_setting import with_bos_setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from paretomerge.evaluate.examples import Examples, GroupExamples

_FORMS = '`{"prompt": ..., "answer": ...}`, `{"text": ...}` or `{"messages": [...]}`'
_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Example:
    """A text that a model has been trained on, or is going to be asked.

    Attributes:
        text: What the model writes; a text without a prompt is read from its first token.
        prompt: What it reads before.
        messages: A chat instead of both, whose last message is the model's. The model's own chat
            template is applied.
    """

    text: str = ""
    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """An example as a model reads it.

    Attributes:
        ids: The tokens.
        start: The place of the first token that the model writes, 1 or more.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        ids: Tokens, (examples, length), padded on the right: tokens before a pad do not see it.
        mask: 1 for a token and 0 for a pad, of the same shape.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of a forward pass without a cache."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": False}
        # Without padding there is nothing to mask, and models then take faster paths.
        if not bool(self.mask.all()):
            inputs["attention_mask"] = self.mask
        return inputs


def read_examples(path: str | Path) -> list[Example]:
    """Read calibration text.

    Args:
        path: A JSONL file with one example per line, as `{"prompt": ..., "answer": ...}`,
            `{"text": ...}` or `{"messages": [...]}`; or any other file, which is one long text.

    Returns:
        The examples.

    Raises:
        ConfigError: The file cannot be read, is empty or holds other lines.
    """
    file = Path(path).expanduser()
    content = read_text(file, str(file))
    if not content.strip():
        raise ConfigError(f"{file}: is empty; name a file with calibration text")
    if file.suffix != ".jsonl":
        return [Example(content)]
    examples = []
    for number, line in numbered_lines(content):
        examples.append(_read_line(line, f"{file}, line {number}"))
    return examples


def _read_line(line: str, where: str) -> Example:
    data = parse_json_line(line, where)
    if isinstance(data, dict):
        text = data.get("answer", data.get("text"))
        prompt = data.get("prompt", "")
        if isinstance(text, str) and isinstance(prompt, str) and text:
            return Example(text, prompt)
        messages = data.get("messages")
        if _are_messages(messages):
            return Example(messages=tuple(messages))
    raise ConfigError(f"{where}: expected {_FORMS}, got {shorten(data)}")


def _are_messages(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is a chat, as chat templates read it."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, dict) and "role" in entry for entry in value)


def examples_of_task(examples: "Examples | GroupExamples") -> list[Example]:
    """The prompts of a task's examples with their right answers, as the task's model reads them.

    Args:
        examples: The examples of one split.

    Returns:
        One example for each of them.

    Raises:
        ConfigError: The task does not say what the right answers are.
    """
    result = []
    for requests in examples.requests:
        request = requests[0]
        if request.request_type == "loglikelihood_rolling":
            result.append(Example(str(request.args[0])))
            continue
        # Which task of a group an example belongs to.
        task = _task_of(examples, request.task_name)
        target = task.doc_to_target(request.doc)
        if request.request_type == "loglikelihood":
            # Of several choices, the right one; else the only one.
            index = target if isinstance(target, int) and len(requests) > 1 else 0
            prompt, answer = requests[index].args[:2]
            result.append(Example(str(answer), str(prompt)))
            continue
        answer = target[0] if isinstance(target, list) and target else target
        if not isinstance(answer, str) or not answer:
            raise ConfigError(
                f"calibration: task {task.task_name!r} has no written answers; give a JSONL file "
                f"with {_FORMS}"
            )
        delimiter = task.config.target_delimiter or ""
        result.append(Example(f"{delimiter}{answer}", str(request.args[0])))
    return result


def _task_of(examples: "Examples | GroupExamples", name: str | None) -> Any:
    # Any: a task of the harness
    members: Any = getattr(examples, "members", (examples,))
    for member in members:
        if member.task.task_name == name:
            return member.task
    return members[0].task


@dataclass(frozen=True)
class TextReader:
    """Turns examples into tokens, as the evaluation of a task does.

    Attributes:
        tokenizer: The model's tokenizer.
        max_tokens: The longest example. A prompt with its answer loses its beginning, as where it
            is scored; a text alone is cut into several.
        add_bos_token: Whether texts begin with the token that begins a sequence; None to do what
            the tokenizer does.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int
    add_bos_token: bool | None = None

    def read(self, examples: Sequence[Example], most: int) -> list[Tokens]:
        """Tokenize examples.

        Args:
            examples: The examples.
            most: How many are used at most. They are spread evenly over what there is.

        Returns:
            Their tokens; those with a single token are left out, for they predict nothing.
        """
        reader = self
        if self.add_bos_token is not None:
            tokenizer = with_bos_setting(self.tokenizer, self.add_bos_token)
            reader = TextReader(tokenizer, self.max_tokens)
        # Before they are tokenized, which takes time; a long text becomes several.
        chosen = _spread(examples, most)
        tokens: list[Tokens] = []
        for example in chosen:
            tokens += reader._tokens(example)
        return _spread(tokens, most)

    def _tokens(self, example: Example) -> Iterator[Tokens]:
        prompt, answer = example.prompt, example.text
        if example.messages:
            prompt, answer = self._chat(example.messages)
        if prompt:
            # As the harness does it: spaces belong to the word behind them.
            context = prompt.rstrip() or prompt
            ids = self._encode(prompt + answer)
            start = len(self._encode(context))
            surplus = max(0, len(ids) - self.max_tokens)
            ids = ids[surplus:]
            start = max(1, start - surplus)
            if start < len(ids):
                yield Tokens(tuple(ids), start)
            return
        first = self._encode("")
        ids = self._encode(answer)[len(first) :]
        step = max(1, self.max_tokens - len(first))
        for offset in range(0, len(ids), step):
            window = (*first, *ids[offset : offset + step])
            if len(window) > 1:
                yield Tokens(window, 1)

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        # A chat template may have written it already.
        has_bos = bool(bos) and text.startswith(bos)
        options = {"add_special_tokens": False} if has_bos else {}
        ids: list[int] = self.tokenizer.encode(text, **options)
        return ids

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """The chat up to the last message, and the last message, as text."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "calibration: examples with `messages` need a tokenizer with a chat template; "
                "give `prompt` and `answer` instead"
            )
        try:
            whole = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
            prompt = self.tokenizer.apply_chat_template(
                list(messages[:-1]), tokenize=False, add_generation_prompt=True
            )
        # Templates raise errors of their own, such as on a role that they do not know.
        except Exception as error:
            raise ConfigError(
                f"calibration: the chat template does not take the chat {shorten(messages)}: "
                f"{error}"
            ) from error
        assert isinstance(whole, str) and isinstance(prompt, str)
        if not whole.startswith(prompt):
            return "", whole
        return prompt, whole.removeprefix(prompt)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced, in their order."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def make_batches(
    tokens: Sequence[Tokens], batch_size: int, pad: int, device: str = "cpu"
) -> list[Batch]:
    """Put examples of similar length side by side.

    Args:
        tokens: The examples.
        batch_size: How many at most.
        pad: The token that fills up shorter ones.
        device: Where the batches go.

    Returns:
        The batches, the longest examples first.
    """
    import torch

    ordered = sorted(tokens, key=lambda example: len(example.ids), reverse=True)
    batches = []
    for first in range(0, len(ordered), batch_size):
        rows = ordered[first : first + batch_size]
        shape = (len(rows), len(rows[0].ids))
        ids = torch.full(shape, pad)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(rows):
            length = len(example.ids)
            ids[row, :length] = torch.tensor(example.ids)
            mask[row, :length] = 1
        batches.append(Batch(ids.to(device), mask.to(device)))
    return batches


def tokens_digest(tokens: Sequence[Tokens]) -> str:
    """A digest of what a model reads."""
    content = [[*example.ids, example.start] for example in tokens]
    text = json.dumps(content)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
