"""Pico models, built on the spot.

A base and three experts of a four-layer Llama, in milliseconds.
"""

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# The libraries below warn of their own future at import; what our calls cause stays an error.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import botorch  # noqa: F401
    import lm_eval.models.huggingface
    import lm_eval.tasks  # noqa: F401

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from paretomerge.calibration import Example, calibrate
from paretomerge.examples import SPECIALISTS

# The same examples each time: what passed once passes again. `make explore` draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

EXPERTS = ("ada", "bob", "cyd")
REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
logging.disable_progress_bar()


def pico_config(layers: int = 4, width: int = 16) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def save_pico(
    folder: Path,
    state: dict[str, torch.Tensor],
    layers: int = 4,
    width: int = 16,
    shard: str = "5GB",
) -> None:
    model = LlamaForCausalLM(pico_config(layers, width))
    model.load_state_dict(state)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)


def save_tokenizer(folder: Path, adds_bos: bool = False) -> None:
    """A tokenizer of single letters; if it adds one, `~` begins a sequence."""
    tokens = ["<pad>", ".", *list("abcdefghijklmnopqrstuvwxyz"), *list("=:~ ")]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    special = {"pad_token": "<pad>", "eos_token": "."}
    if adds_bos:
        special["bos_token"] = "~"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="~ $A", special_tokens=[("~", tokens.index("~"))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", **special
    ).save_pretrained(folder)


def pico_states(
    seed: int = 0, layers: int = 4, width: int = 16
) -> dict[str, dict[str, torch.Tensor]]:
    """base, and experts that differ from it by small normal deltas."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(pico_config(layers, width)).state_dict()
    states = {"base": base}
    for expert in EXPERTS:
        states[expert] = {
            name: tensor + 0.02 * torch.randn_like(tensor)
            for name, tensor in base.items()
        }
    return states


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `ada`, `bob` and `cyd`; treat it as read-only."""
    folder = tmp_path_factory.mktemp("pico")
    for name, state in pico_states().items():
        save_pico(folder / name, state, shard="8KB" if name == "bob" else "5GB")
    return folder


TEXTS = {"ada": "abc de=fgh.", "bob": "zyx:wvut srq", "cyd": "mno=pq~ rst uvw"}
"""A text of each expert, of which examples are made by turning it around."""


def pico_examples(expert: str, count: int = 12) -> list[Example]:
    """Examples of several lengths."""
    text = TEXTS[expert]
    examples = []
    for i in range(count):
        turned = text[i % len(text) :] + text[: i % len(text)]
        examples.append(Example(turned[: 4 + i % 7], prompt=text[: 2 + i % 5]))
    return examples


@pytest.fixture(scope="session")
def pico_calibration(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of all kinds of `ada`, `bob` and `cyd`; treat them as read-only."""
    folder = tmp_path_factory.mktemp("calibration") / "statistics"
    texts = {str(pico / expert): pico_examples(expert) for expert in EXPERTS}
    return calibrate(
        str(pico / "base"),
        list(texts),
        texts,
        folder,
        kinds=("regmean", "regmean_pp", "fisher"),
        batch_size=5,
    )


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """A job in the background is started deaf to Ctrl-C, and so are the processes it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def specialists() -> Path:
    return SPECIALISTS
