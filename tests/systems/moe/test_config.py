"""mergekit-moe's YAML: what is read, and what is refused with its place."""

from pathlib import Path

import pytest

from paretomerge.errors import RecipeError
from paretomerge.systems.moe import MoeConfig, MoeExpert, as_moe_config

# In the form of mergekit's documentation.
EXAMPLE = """
base_model: NousResearch/Hermes-2-Pro-Mistral-7B
gate_mode: hidden # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
## (optional)
# experts_per_token: 2
experts:
  - source_model: NousResearch/Hermes-2-Pro-Mistral-7B
    positive_prompts:
      - "<|im_start|>user\\nHello, who are you?<|im_end|>"
      - "<|im_start|>user\\nI need help with"
  - source_model: BioMistral/BioMistral-7B-DARE+org/adapter
    positive_prompts: ["As a doctor of medicine,"]
    negative_prompts: ["[Genres: Science Fiction]"]
"""
SHARED = """
architecture: qwen
shared_experts:
  - source_model: Qwen/Qwen2-1.5B
    positive_prompts: [chat]
    residual_scale: 0.1
"""


def test_a_real_configuration_is_read():
    assert as_moe_config(EXAMPLE + SHARED) == MoeConfig(
        base_model="NousResearch/Hermes-2-Pro-Mistral-7B",
        gate_mode="hidden",
        dtype="bfloat16",
        experts_per_token=2,
        architecture="qwen",
        experts=(
            MoeExpert(
                "NousResearch/Hermes-2-Pro-Mistral-7B",
                (
                    "<|im_start|>user\nHello, who are you?<|im_end|>",
                    "<|im_start|>user\nI need help with",
                ),
            ),
            MoeExpert(
                "BioMistral/BioMistral-7B-DARE+org/adapter",
                ("As a doctor of medicine,",),
                ("[Genres: Science Fiction]",),
            ),
        ),
        shared_experts=(MoeExpert("Qwen/Qwen2-1.5B", ("chat",), (), 0.1),),
    )


def test_a_configuration_comes_back_from_its_yaml_and_from_a_file(tmp_path: Path):
    config = as_moe_config(EXAMPLE + SHARED)
    assert as_moe_config(config.to_yaml()) == config
    (tmp_path / "one").mkdir()
    (tmp_path / "config.yml").write_text(
        "base_model: one\ngate_mode: random\nexperts_per_token: 1\n"
        "experts: [{source_model: elsewhere/model}]\n"
    )
    loaded = as_moe_config(tmp_path / "config.yml")
    assert loaded.base_model == str(tmp_path / "one")
    assert loaded.experts[0].source_model == "elsewhere/model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gate_mode: hidden", "gate_mod: hidden"), "unknown key 'gate_mod'; did you"),
        (("gate_mode: hidden", "gate_mode: soft"), "unknown gate mode 'soft'"),
        (("dtype: bfloat16", "dtype: int8"), "unknown dtype 'int8'"),
        (("# experts_per_token: 2", "experts_per_token: 3"), "3 of 2 experts"),
        (("# experts_per_token: 2", "experts_per_token: 0"), "1 or more, got 0"),
        (
            ("negative_prompts", "negativ_prompts"),
            r"experts\[1\]: unknown key 'negativ",
        ),
        (("negative_prompts", "noise_scale"), r"experts\[1\]: noise_scale: .*leave it"),
        (
            ('positive_prompts: ["As a doctor of medicine,"]', "residual_scale: 1"),
            r"experts\[1\]\.positive_prompts: needed for gate_mode hidden",
        ),
        (
            ('["As a doctor of medicine,"]', "[a, b, a]"),
            r"prompts\[2\]: is there twice",
        ),
        (('["As a doctor of medicine,"]', '[" "]'), r"prompts\[0\]: is blank"),
        (('["As a doctor of medicine,"]', '[""]'), r"prompts\[0\]: expected text"),
        (('["As a doctor of medicine,"]', "[3]"), r"prompts\[0\]: expected text"),
        (('["As a doctor of medicine,"]', "text"), "expected a list of texts"),
        (
            ("base_model: NousResearch/Hermes-2-Pro-Mistral-7B", ""),
            "base_model: required",
        ),
        (("experts:", "models:"), "unknown key 'models'"),
    ],
)
def test_what_is_wrong_is_named(change: tuple[str, str], message: str):
    assert change[0] in EXAMPLE
    with pytest.raises(RecipeError, match=message):
        as_moe_config(EXAMPLE.replace(change[0], change[1], 1))


def test_every_error_is_reported_at_once():
    with pytest.raises(RecipeError) as raised:
        as_moe_config({"experts": [{"source": "x"}, {}], "dtype": "f", "foo": 1})
    assert len(raised.value.parts) == 6


def test_experts_with_the_same_prompts_are_refused():
    prompts = {"positive_prompts": ["a", "b"]}
    experts = [
        {"source_model": "x", **prompts},
        {"source_model": "y", "positive_prompts": ["b", "a"]},
    ]
    with pytest.raises(
        RecipeError, match=r"experts\[1\] has the prompts of experts\[0\]"
    ):
        as_moe_config({"base_model": "b", "experts": experts})
    experts[1]["negative_prompts"] = ["c"]
    assert as_moe_config({"base_model": "b", "experts": experts})


def test_other_files_are_not_taken_for_a_configuration(tmp_path: Path):
    with pytest.raises(RecipeError, match="paretomerge merge"):
        as_moe_config("merge_method: linear\nmodels: []\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        as_moe_config(tmp_path / "missing.yml")
    with pytest.raises(RecipeError, match="2 YAML documents"):
        as_moe_config("a: 1\n---\nb: 2\n")
    with pytest.raises(RecipeError, match="no architecture has more than one"):
        as_moe_config(
            {
                "base_model": "b",
                "gate_mode": "random",
                "experts": [{"source_model": "x"}] * 2,
                "shared_experts": [{"source_model": "x"}] * 2,
            }
        )
