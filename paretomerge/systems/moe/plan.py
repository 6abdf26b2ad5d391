"""From a configuration to the tensors of a mixture of experts, checked against headers alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from paretomerge.checkpoint.json_file import JsonObject
from paretomerge.checkpoint.model_config import with_class_defaults
from paretomerge.checkpoint.writer import TensorSpec
from paretomerge.errors import CheckpointError, ErrorCollector
from paretomerge.merging.plan.belonging import find_mismatch, moved_tokens
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import TensorRef, Weights
from paretomerge.systems.moe.config import (
    MoeConfig,
    MoeConfigLike,
    MoeExpert,
    as_moe_config,
)
from paretomerge.systems.moe.target_config import moe_config
from paretomerge.systems.moe.targets import (
    ATTENTION_BIASES,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MLP_PARTS,
    OUTPUT_PART,
    Target,
    choose_target,
    dense_mlp,
    dense_tensor,
)

_MAX_NAMES_IN_MESSAGE = 3


@dataclass(frozen=True)
class CopyJob:
    """A tensor of the result that is one of a dense model, times a factor.

    Attributes:
        spec: The tensor of the result.
        source: The dense model and the tensor's name in it.
        scale: The factor.
    """

    spec: TensorSpec
    source: TensorRef
    scale: float = 1.0


@dataclass(frozen=True)
class MoePlan:
    """A checked configuration, laid out as tensors.

    Attributes:
        config: The configuration.
        target: The architecture of the result.
        weights: The opened dense models by name.
        depth: The number of layers.
        width: The width d of the hidden states.
        dtype: Dtype of the result.
        copies: Tensors that dense models have.
        zeros: Tensors that are zero: biases that the base has not.
        gates: The routers, and the gates of the shared expert.
        model_config: The content of config.json.
        notes: What to tell the user.
    """

    config: MoeConfig
    target: Target
    weights: Mapping[str, Weights]
    depth: int
    width: int
    dtype: str
    copies: tuple[CopyJob, ...]
    zeros: tuple[TensorSpec, ...]
    gates: tuple[TensorSpec, ...]
    model_config: JsonObject
    notes: tuple[str, ...]

    @property
    def base(self) -> Weights:
        """The base model."""
        return self.weights[self.config.base_model]

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors of the result, sorted by name."""
        copies = [job.spec for job in self.copies]
        return sorted((*copies, *self.zeros, *self.gates), key=lambda spec: spec.name)

    def with_notes(self, notes: Sequence[str]) -> "MoePlan":
        """Return a copy with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def bytes_written(self) -> int:
        """Size of the result's tensors."""
        return sum(spec.bytes for spec in self.specs)


def plan_moe(config: MoeConfigLike, allow_mismatch: bool = False) -> MoePlan:
    """Check a configuration against its models.

    Only configs and headers of the checkpoints are read, no weights.

    Args:
        config: A `MoeConfig`, a mapping, the path of a YAML file or YAML text.
        allow_mismatch: Whether to take models that do not seem to belong together.

    Returns:
        The plan.

    Raises:
        RecipeError: If the configuration has no meaning.
        CheckpointError: If a model cannot be read, or the models do not fit together. One error
            reports everything that is wrong.
    """
    config = as_moe_config(config)
    weights = open_weights(config.source_models)
    base_name = config.base_model
    base = weights[base_name]
    base_type = str(base.config.get("model_type"))
    target = choose_target(
        config.architecture, base_name, base_type, len(config.shared_experts)
    )
    problems = ErrorCollector()
    notes = list(_notes(config))
    for name, model in weights.items():
        with problems.collect():
            _check_type(target, name, model)
            _check_only_known_tensors(target, name, model)
    problems.raise_if_any()
    for name in config.source_models[1:]:
        with problems.collect():
            notes += _check_belongs(
                base_name, base, name, weights[name], allow_mismatch
            )
    problems.raise_if_any()
    return _Layout(config, target, weights).plan(tuple(notes))


def _notes(config: MoeConfig) -> list[str]:
    notes = []
    models = {expert.source_model for expert in config.all_experts}
    if len(models) == 1 and len(config.all_experts) > 1:
        notes.append(
            "experts: all are the same model, so until it is trained the result answers like a "
            "dense one, with more memory"
        )
    has_prompts = any(expert.positive_prompts for expert in config.all_experts)
    if config.gate_mode == "random" and has_prompts:
        notes.append("positive_prompts: have no effect with gate_mode random")
    for expert in config.shared_experts:
        if expert.residual_scale == 1:
            notes.append(
                "shared_experts[0]: its output is added to that of the routed experts; "
                "a residual_scale below 1 keeps the sum near that of a dense model"
            )
    return notes


def _check_type(target: Target, name: str, model: Weights) -> None:
    kind = model.config.get("model_type")
    if kind not in target.sources:
        raise CheckpointError(
            f"{name}: is of type {kind}, and a {target.title} is made of "
            f"{' or '.join(target.sources)}; use other models or another `architecture`"
        )


def _check_only_known_tensors(target: Target, name: str, model: Weights) -> None:
    """Check that a dense model has nothing that the architecture of the result has no place for.

    Raises:
        CheckpointError: If it has, such as biases in a model that becomes a Mixtral.
    """
    depth = model.architecture.depth
    known = {EMBEDDING, HEAD, FINAL_NORM}
    for layer in range(depth):
        for part in MLP_PARTS:
            known.add(dense_mlp(layer, part))
        for tensor in target.layer_tensors:
            known.add(dense_tensor(layer, tensor))
        for tensor in ATTENTION_BIASES if target.biases else ():
            known.add(dense_tensor(layer, tensor))
    stored = {_stored_name(model, tensor) for tensor in known}
    left_over = []
    for tensor in model.headers:
        if tensor not in stored and not model.architecture.is_auxiliary(tensor):
            left_over.append(tensor)
    if left_over:
        shown = ", ".join(left_over[:_MAX_NAMES_IN_MESSAGE])
        raise CheckpointError(
            f"{name}: a {target.title} has no place for {shown} ({len(left_over)} such tensors), "
            "without which the model is another one; build another `architecture`, or use models "
            "without them"
        )


def _check_belongs(
    base_name: str, base: Weights, name: str, model: Weights, allow_mismatch: bool
) -> list[str]:
    """Check that an expert computes in the network of the base; returns notes.

    Raises:
        CheckpointError: If it does not.
    """
    one, other = with_class_defaults(base.config), with_class_defaults(model.config)
    # No option takes these: the result has one activation and one depth.
    for key in ("hidden_act", "num_hidden_layers", "hidden_size"):
        if one[key] != other[key]:
            raise CheckpointError(
                f"{name}: {key} is {other[key]}, {one[key]} in {base_name}; experts must agree "
                "with the base"
            )
    # The MLPs of all types that a target is made of are one network.
    mismatch = find_mismatch(
        base_name, base, name, model, same_vocabulary=False, same_type=False
    )
    errors = list(mismatch.errors)
    moved = moved_tokens(base, model)
    if moved:
        listed = ", ".join(map(repr, moved[:_MAX_NAMES_IN_MESSAGE]))
        errors.append(
            f"{name}: {len(moved)} tokens have other ids than in {base_name}, such as {listed}"
        )
    sizes = (one["vocab_size"], other["vocab_size"])
    if sizes[0] != sizes[1] and not moved:
        errors.append(
            f"{name}: vocab_size is {sizes[1]}, {sizes[0]} in {base_name}, whose vocabulary the "
            "result has"
        )
    if errors and not allow_mismatch:
        raise CheckpointError(
            f"{'; '.join(errors)}; do the models come from one base? --allow-mismatch takes them "
            "anyway"
        )
    return [*mismatch.notes, *errors]


def _stored_name(model: Weights, name: str) -> str | None:
    """The name of a dense model's tensor in its file, where `model.` may be left out."""
    # A tied head is no tensor of its own, for all that `find_equivalent` finds the embedding.
    if name == HEAD:
        return name if name in model.headers else None
    return model.architecture.find_equivalent(name)


class _Layout:
    """Lays out the tensors of the result.

    Args:
        config: The configuration.
        target: The architecture of the result.
        weights: The opened dense models.
    """

    def __init__(
        self, config: MoeConfig, target: Target, weights: Mapping[str, Weights]
    ) -> None:
        self.config = config
        self.target = target
        self.weights = weights
        base = weights[config.base_model]
        self.dtype = config.dtype or base.dtype
        self.depth = base.architecture.depth
        full = with_class_defaults(base.config)
        self.width: int = full["hidden_size"]
        self.is_tied: bool = full["tie_word_embeddings"]
        self.copies: list[CopyJob] = []
        self.zeros: list[TensorSpec] = []
        self.gates: list[TensorSpec] = []
        self.problems = ErrorCollector()

    def plan(self, notes: tuple[str, ...]) -> MoePlan:
        """Make the plan.

        Raises:
            CheckpointError: If a model lacks a tensor, or has one of another shape.
        """
        self._lay_out_base()
        width = self._lay_out_experts()
        shared_width = self._lay_out_shared_expert()
        self.problems.raise_if_any()
        model_config = moe_config(
            self.target,
            self.config.base_model,
            self.weights[self.config.base_model].config,
            self.dtype,
            (len(self.config.experts), self.config.experts_per_token),
            (width, shared_width),
        )
        # What the class of the result rejects is an error before anything is written.
        with_class_defaults(model_config)
        return MoePlan(
            config=self.config,
            target=self.target,
            weights=self.weights,
            depth=self.depth,
            width=self.width,
            dtype=self.dtype,
            copies=tuple(self.copies),
            zeros=tuple(self.zeros),
            gates=tuple(self.gates),
            model_config=model_config,
            notes=notes,
        )

    def _lay_out_base(self) -> None:
        """Attention, norms, embedding and head."""
        base_name = self.config.base_model
        base = self.weights[base_name]
        names = [EMBEDDING, FINAL_NORM]
        # Without a head, and without `tie_word_embeddings`, transformers would make one up.
        if HEAD in base.headers or not self.is_tied:
            names.append(HEAD)
        for layer in range(self.depth):
            for tensor in self.target.layer_tensors:
                names.append(dense_tensor(layer, tensor))
        for name in names:
            with self.problems.collect():
                self._copy(name, base_name, name)
        if self.target.biases:
            self._lay_out_biases(base_name)

    def _lay_out_biases(self, base_name: str) -> None:
        base = self.weights[base_name]
        for layer in range(self.depth):
            for tensor in ATTENTION_BIASES:
                name = dense_tensor(layer, tensor)
                if _stored_name(base, name) is not None:
                    self._copy(name, base_name, name)
                    continue
                with self.problems.collect():
                    weight = name.removesuffix("bias") + "weight"
                    rows = self._header_shape(base_name, weight)[0]
                    # Llama has no biases, and most readers of a Qwen2-MoE ask for them.
                    self.zeros.append(TensorSpec(name, self.dtype, (rows,)))

    def _lay_out_experts(self) -> int:
        """The routed experts with their router; returns their inner width."""
        width = self._inner_width(self.config.experts[0])
        for number, expert in enumerate(self.config.experts):
            self._lay_out_expert(expert, partial(self.target.expert, number), width)
        for layer in range(self.depth):
            shape = (len(self.config.experts), self.width)
            self.gates.append(TensorSpec(self.target.router(layer), self.dtype, shape))
        return width

    def _lay_out_shared_expert(self) -> int | None:
        """The shared expert with its gate; returns its inner width."""
        if not self.config.shared_experts:
            return None
        expert = self.config.shared_experts[0]
        width = self._inner_width(expert)
        self._lay_out_expert(expert, self.target.shared_expert, width)
        for layer in range(self.depth):
            name = self.target.shared_gate(layer)
            self.gates.append(TensorSpec(name, self.dtype, (1, self.width)))
        return width

    def _lay_out_expert(
        self, expert: MoeExpert, name: Callable[[int, str], str], width: int
    ) -> None:
        """The MLPs of a model. Its first problem is enough, for others are like it."""
        with self.problems.collect():
            for layer in range(self.depth):
                for part in MLP_PARTS:
                    self._copy(
                        name(layer, part),
                        expert.source_model,
                        dense_mlp(layer, part),
                        _factor(part, expert.residual_scale),
                        self._mlp_shape(part, width),
                    )

    def _inner_width(self, expert: MoeExpert) -> int:
        """The inner width of a model's first MLP; 0, and a problem, if there is none."""
        with self.problems.collect():
            first = dense_mlp(0, MLP_PARTS[0])
            return self._header_shape(expert.source_model, first)[0]
        return 0

    def _mlp_shape(self, part: str, width: int) -> tuple[int, int]:
        return (self.width, width) if part == OUTPUT_PART else (width, self.width)

    def _header_shape(self, model: str, name: str) -> tuple[int, ...]:
        return tuple(self.weights[model].headers[self._find(model, name)].shape)

    def _find(self, model: str, name: str) -> str:
        stored = _stored_name(self.weights[model], name)
        if stored is None:
            raise CheckpointError(
                f"{model}: has no {name}; save the whole model as its class in transformers writes "
                "it"
            )
        return stored

    def _copy(
        self,
        name: str,
        model: str,
        dense_name: str,
        scale: float = 1.0,
        expected: Sequence[int] | None = None,
    ) -> None:
        """Add a tensor of a dense model.

        Raises:
            CheckpointError: If the model has no such tensor, or one of another shape.
        """
        shape = self._header_shape(model, dense_name)
        if expected is not None and shape != tuple(expected):
            raise CheckpointError(
                f"{model}: {dense_name} has the shape {list(shape)}, and that of the other "
                f"experts is {list(expected)}; experts must have one width"
            )
        source = TensorRef(model, self._find(model, dense_name))
        spec = TensorSpec(name, self.dtype, shape)
        self.copies.append(CopyJob(spec, source, scale))


def _factor(part: str, residual_scale: float) -> float:
    return residual_scale if part == OUTPUT_PART else 1.0
