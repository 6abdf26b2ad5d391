"""Calibration text: files, tasks, and the tokens that a model reads."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from paretomerge.calibration import Example, read_examples
from paretomerge.calibration.text import TextReader, make_batches, tokens_digest
from paretomerge.config.convert import settings_of
from paretomerge.config.schema import load_config
from paretomerge.errors import ConfigError
from paretomerge.study.calibration import task_examples
from tests.conftest import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, adds_bos=True)
    return AutoTokenizer.from_pretrained(folder)


def texts(tokenizer, examples, max_tokens=100, most=100, **options):
    reader = TextReader(tokenizer, max_tokens, **options)
    read = reader.read(examples, most)
    return [(tokenizer.decode(one.ids).replace(" ", ""), one.start) for one in read]


def test_a_prompt_and_its_answer(tokenizer):
    assert texts(tokenizer, [Example("de", "abc:")]) == [("~abc:de", 5)]
    # The beginning is lost, as where it is scored, and never the whole prompt.
    assert texts(tokenizer, [Example("de", "abc:")], 4) == [("c:de", 2)]
    assert texts(tokenizer, [Example("defgh", "abc:")], 3) == [("fgh", 1)]
    assert texts(tokenizer, [Example("de", "abc:")], add_bos_token=False) == [
        ("abc:de", 4)
    ]
    # A template may have written the token already.
    assert texts(tokenizer, [Example("de", "~abc:")]) == [("~abc:de", 5)]


def test_a_long_text_becomes_several_examples(tokenizer):
    assert texts(tokenizer, [Example("abcdefg")], 4) == [
        ("~abc", 1),
        ("~def", 1),
        ("~g", 1),
    ]
    assert texts(tokenizer, [Example("abcdef")], 4, add_bos_token=False) == [
        ("abcd", 1),
        ("ef", 1),
    ]
    # One token predicts nothing.
    assert texts(tokenizer, [Example("a")], add_bos_token=False) == []


def test_examples_are_spread_over_the_text(tokenizer):
    examples = [Example(letter) for letter in "abcdefghij"]
    chosen = texts(tokenizer, examples, most=3)
    assert [text for text, _ in chosen] == ["~a", "~d", "~g"]


def test_chats(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    messages = (
        {"role": "user", "content": "xy"},
        {"role": "assistant", "content": "z"},
    )
    assert texts(tokenizer, [Example(messages=messages)]) == [("~u:xy.a:z.", 8)]
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        texts(tokenizer, [Example(messages=messages)])


def test_files(tmp_path: Path):
    lines = [
        {"prompt": "a", "answer": "b"},
        {"text": "c"},
        {"messages": [{"role": "user", "content": "d"}]},
    ]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second, third = read_examples(file)
    assert first == Example("b", "a") and second == Example("c")
    assert third.messages == ({"role": "user", "content": "d"},)
    plain = tmp_path / "text.txt"
    plain.write_text("one\n\ntwo")
    assert read_examples(plain) == [Example("one\n\ntwo")]
    for content, message in (
        ("", "is empty"),
        ("{", "text.jsonl, line 1: is not JSON"),
        ('{"question": "a"}', "text.jsonl, line 1: expected .*prompt"),
        ('{"prompt": "a", "answer": ""}', "text.jsonl, line 1: expected"),
        ('{"messages": ["a"]}', "text.jsonl, line 1: expected"),
        ("[" * 100_000, "text.jsonl, line 1: is not JSON"),
        (r'{"text": "a\ud83d"}', "text.jsonl, line 1: holds half of a character"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_examples(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_examples(tmp_path / "none.txt")


def test_files_of_other_systems(tmp_path: Path):
    """A mark of UTF-8, ends of lines in two characters, and separators inside of a text."""
    file = tmp_path / "text.jsonl"
    file.write_bytes('\ufeff{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n'.encode())
    assert read_examples(file) == [Example("a\u2028b\u0085c"), Example("d")]
    plain = tmp_path / "text.txt"
    plain.write_bytes("\ufeffone\u2028two".encode())
    assert read_examples(plain) == [Example("one\u2028two")]


def test_a_chat_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    chat = Example(messages=({"role": "user", "content": "a"},))
    with pytest.raises(ConfigError, match=r"does not take the chat .*must alternate"):
        texts(tokenizer, [chat])
    tokenizer.chat_template = None


def test_a_task_gives_its_search_examples_and_never_held_out_ones(specialists: Path):
    settings = settings_of(load_config(specialists / "study.yaml"), specialists)
    examples = task_examples(settings, "sort")
    data = specialists / "tasks" / "data" / "sort"
    expected = []
    for line in (data / "search.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected.append(Example(row["answer"], row["prompt"]))
    assert examples == expected
    held_out = (data / "held_out.jsonl").read_text()
    prompts = {json.loads(line)["prompt"] for line in held_out.splitlines()}
    assert not prompts & {example.prompt for example in examples}


def test_batches_are_padded_on_the_right(tokenizer):
    reader = TextReader(tokenizer, 10)
    tokens = reader.read([Example("a"), Example("bcd"), Example("ef")], 10)
    first, second = make_batches(tokens, 2, pad=0)
    assert first.ids.shape == (2, 4) and first.mask.tolist() == [[1] * 4, [1] * 3 + [0]]
    assert first.ids[1, 3] == 0 and "attention_mask" in first.model_inputs()
    assert "attention_mask" not in second.model_inputs()
    assert tokens_digest(tokens) != tokens_digest(tokens[:2])
