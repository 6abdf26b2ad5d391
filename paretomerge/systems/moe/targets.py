"""The architectures that dense models are put together to: names of tensors and of sources.

The names are the classic ones with a tensor for each expert, as Mixtral and Qwen released them.
transformers packs the experts when it loads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from paretomerge.errors import RecipeError, unknown_name

MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP: down(act(gate(x)) * up(x))."""

OUTPUT_PART = "down_proj"
"""The matrix that an MLP's output is linear in, so that a factor of the output is one of it."""

_DENSE_LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
)
ATTENTION_BIASES = (
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
)
"""The biases that Qwen2 has."""

_QUERY_AND_KEY_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_QWEN_EXPERT = MappingProxyType({part: part for part in MLP_PARTS})
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Target:
    """An architecture with experts.

    Attributes:
        title: Its name in messages.
        aliases: What `architecture:` may call it.
        model_type: Its `model_type`.
        class_name: Its class in transformers.
        sources: The `model_type` of dense models that it can be made of.
        block: The name of a layer's experts with their router.
        expert_parts: Part of a dense MLP -> its name in an expert.
        layer_tensors: What a layer has beside the experts, in the names of the dense models.
        biases: Whether there are biases of query, key and value.
        n_shared: The number of shared experts.
    """

    title: str
    aliases: tuple[str, ...]
    model_type: str
    class_name: str
    sources: tuple[str, ...]
    block: str
    expert_parts: Mapping[str, str]
    layer_tensors: tuple[str, ...]
    biases: bool
    n_shared: int

    def expert(self, expert: int, layer: int, part: str) -> str:
        """Name a matrix of a routed expert."""
        name = self.expert_parts[part]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{name}.weight"

    def shared_expert(self, layer: int, part: str) -> str:
        """Name a matrix of the shared expert."""
        return f"model.layers.{layer}.{self.block}.shared_expert.{part}.weight"

    def router(self, layer: int) -> str:
        """Name the router `(experts, d)` of a layer."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def shared_gate(self, layer: int) -> str:
        """Name the gate `(1, d)` of the shared expert."""
        return f"model.layers.{layer}.{self.block}.shared_expert_gate.weight"


MIXTRAL = Target(
    title="Mixtral",
    aliases=("mixtral",),
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    sources=("llama", "mistral"),
    block="block_sparse_moe",
    expert_parts=MappingProxyType(
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    ),
    layer_tensors=_DENSE_LAYER,
    biases=False,
    n_shared=0,
)
QWEN2_MOE = Target(
    title="Qwen2-MoE",
    aliases=("qwen", "qwen2", "qwen2_moe"),
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    sources=("qwen2", "llama", "mistral"),
    block="mlp",
    expert_parts=_QWEN_EXPERT,
    layer_tensors=_DENSE_LAYER,
    biases=True,
    n_shared=1,
)
QWEN3_MOE = Target(
    title="Qwen3-MoE",
    aliases=("qwen3", "qwen3_moe"),
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    sources=("qwen3",),
    block="mlp",
    expert_parts=_QWEN_EXPERT,
    layer_tensors=(*_DENSE_LAYER, *_QUERY_AND_KEY_NORMS),
    biases=False,
    n_shared=0,
)
TARGETS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
"""All architectures; of those that a base fits, the first with its number of shared experts."""


def dense_mlp(layer: int, part: str) -> str:
    """Name a matrix of a dense model's MLP."""
    return f"model.layers.{layer}.mlp.{part}.weight"


def dense_tensor(layer: int, name: str) -> str:
    """Name another tensor of a dense model's layer."""
    return f"model.layers.{layer}.{name}"


def choose_target(
    architecture: str | None, base: str, base_type: str, n_shared: int
) -> Target:
    """Choose the architecture of the result.

    Args:
        architecture: What the configuration asks for; None to choose by the base.
        base: The base's name, for messages.
        base_type: `model_type` of the base.
        n_shared: The number of shared experts.

    Returns:
        The architecture.

    Raises:
        RecipeError: If there is none for such a base and so many shared experts.
    """
    if architecture is None:
        fitting = [target for target in TARGETS if base_type in target.sources]
        for target in fitting:
            if target.n_shared == n_shared:
                return target
    else:
        fitting = [_named(architecture)]
    if not fitting:
        known = sorted({kind for target in TARGETS for kind in target.sources})
        raise RecipeError(
            f"base_model: {base} is of type {base_type}, of which no mixture of experts can be "
            f"made; use a base of type {', '.join(known)}"
        )
    target = fitting[0]
    if base_type not in target.sources:
        raise RecipeError(
            f"base_model: {base} is of type {base_type}, and a {target.title} is made of "
            f"{' or '.join(target.sources)}; use another base or another `architecture`"
        )
    if target.n_shared != n_shared:
        if target.n_shared:
            cure = "name one in `shared_experts`, perhaps the base itself"
        else:
            cure = "move it to `experts`"
        raise RecipeError(
            f"shared_experts: a {target.title} has {target.n_shared or 'none'}, not {n_shared}; "
            f"{cure}"
        )
    return target


def _named(architecture: str) -> Target:
    aliases: list[str] = []
    for target in TARGETS:
        if architecture.lower() in target.aliases:
            return target
        aliases += target.aliases
    raise RecipeError(
        f"architecture: {unknown_name('architecture', architecture, aliases)}"
    )
