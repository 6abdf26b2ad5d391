"""The rows of a router: directions in which its input tells the experts apart.

A router scores an expert by the product of the expert's row with the hidden state that goes into
the MLP: after attention, its residual, and the norm behind it. Rows made of other states, such as
the input of the layer, point into another space.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from paretomerge.checkpoint.operand import matrix_shape
from paretomerge.errors import CheckpointError, RecipeError, shorten
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.model_class import load_tokenizer
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe, Slice, Source
from paretomerge.systems.moe.config import MoeConfig, MoeExpert
from paretomerge.systems.moe.plan import MoePlan
from paretomerge.systems.moe.targets import EMBEDDING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_States = Mapping[str, torch.Tensor]
"""Prompt -> its mean state in each layer, `(layers, d)` in float64."""

# Relative to what a difference is taken of, and as a cosine: beyond, it is rounding.
_ZERO = 1e-6
_PARALLEL = 1 - 1e-6


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a prompt.

    Attributes:
        ids: What the model reads.
        own: The positions of what the prompt says. What the tokenizer adds, such as a token that
            begins every sequence, tells no prompt from another.
    """

    ids: list[int]
    own: list[int]

    @property
    def own_ids(self) -> list[int]:
        """The ids without what the tokenizer adds."""
        return [self.ids[position] for position in self.own]


@dataclass(frozen=True)
class Router:
    """The rows of all layers.

    Attributes:
        gates: `(layers, experts, d)`, each row of unit length, in float32.
        shared: `(layers, 1, d)`, the gate of the shared expert; zeros where it has no prompts, so
            that its factor is sigmoid(0) = 1/2 for every token.
        notes: What to tell the user.
    """

    gates: torch.Tensor
    shared: torch.Tensor
    notes: tuple[str, ...] = ()

    def without_rows(self) -> "Router":
        """Return a router that scores all experts alike; the shared expert's gate stays."""
        return replace(self, gates=torch.zeros_like(self.gates))


def make_router(plan: MoePlan, device: str = "cpu", seed: int = 0) -> Router:
    """Make the rows of a plan's routers.

    Args:
        plan: The plan.
        device: Where the base runs, for `gate_mode: hidden`.
        seed: The seed of `gate_mode: random`.

    Returns:
        The rows.

    Raises:
        RecipeError: If prompts give no direction, or all experts the same one.
        CheckpointError: If the base cannot be run, or has no tokenizer.
    """
    config = plan.config
    if config.gate_mode == "random":
        shape = (plan.depth, len(config.experts), plan.width)
        generator = torch.Generator().manual_seed(seed)
        rows = _unit(torch.randn(shape, generator=generator))
        return Router(rows, torch.zeros(plan.depth, 1, plan.width))
    prompts = _tokenize(config, plan.base)
    if config.gate_mode == "cheap_embed":
        states = _embeddings(plan, prompts)
    else:
        states = _hidden_states(plan, prompts, device)
    directions = []
    for index, expert in enumerate(config.experts):
        directions.append(_direction(expert, states, f"experts[{index}]"))
    gates = torch.stack(directions, dim=1).to(torch.float32)
    _check_distinct(gates)
    shared = torch.zeros(plan.depth, 1, plan.width)
    for expert in config.shared_experts:
        if expert.positive_prompts:
            direction = _direction(expert, states, "shared_experts[0]")
            shared = direction[:, None].to(torch.float32)
    return Router(gates, shared, tuple(_notes(config, gates, states)))


def _direction(expert: MoeExpert, states: _States, where: str) -> torch.Tensor:
    """The mean state of positive prompts less that of negative ones, at unit length: (layers, d).

    Raises:
        RecipeError: If there is no difference.
    """
    positive = torch.stack([states[prompt] for prompt in expert.positive_prompts])
    mean = positive.mean(0)
    difference = mean
    if expert.negative_prompts:
        negative = torch.stack([states[prompt] for prompt in expert.negative_prompts])
        difference = mean - negative.mean(0)
    relative = difference.norm(dim=-1) / mean.norm(dim=-1)
    if not bool((relative > _ZERO).all()):
        raise RecipeError(
            f"{where}: its positive and negative prompts have the same mean, so they give the "
            "router no direction; change some"
        )
    return _unit(difference)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / norms


def _check_distinct(gates: torch.Tensor) -> None:
    """Check that a router can choose.

    Raises:
        RecipeError: If two experts have the same row in every layer.
    """
    for one, other in combinations(range(gates.shape[1]), 2):
        cosines = (gates[:, one] * gates[:, other]).sum(-1)
        if bool((cosines > _PARALLEL).all()):
            raise RecipeError(
                f"experts[{one}] and experts[{other}]: their prompts give the router the same row, "
                "so it could not tell them apart; give them prompts that differ more"
            )


def _notes(config: MoeConfig, gates: torch.Tensor, states: _States) -> list[str]:
    """A note on each expert that the router does not choose for the expert's own prompts."""
    notes = []
    for index, expert in enumerate(config.experts):
        n_right = 0
        for prompt in expert.positive_prompts:
            logits = gates.double() @ states[prompt][:, :, None]
            chosen = logits[:, :, 0].argmax(-1)
            n_right += int((chosen == index).sum())
        share = n_right / (len(expert.positive_prompts) * gates.shape[0])
        if share < 0.5:
            notes.append(
                f"experts[{index}]: for its own positive prompts the router puts another expert "
                f"first in {1 - share:.0%} of the layers; prompts that differ more, or "
                "negative_prompts, may help"
            )
    return notes


def _tokenize(config: MoeConfig, base: Weights) -> dict[str, _Tokens]:
    """The tokens of every prompt, as plain text.

    Raises:
        RecipeError: If a prompt has no tokens.
        CheckpointError: If the base has no tokenizer.
    """
    tokenizer = load_tokenizer(base.tokenizer_folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{config.base_model}: has no tokenizer, which reads the prompts; copy its files, such "
            "as tokenizer.json, into the folder, or use gate_mode random"
        )
    tokens = {}
    for expert in config.all_experts:
        for prompt in (*expert.positive_prompts, *expert.negative_prompts):
            tokens[prompt] = _tokens(tokenizer, prompt)
    return tokens


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> _Tokens:
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    own = []
    for position, is_added in enumerate(encoded["special_tokens_mask"]):
        if not is_added:
            own.append(position)
    if not own:
        raise RecipeError(
            f"the prompt {shorten(prompt)} has no tokens; write another one"
        )
    return _Tokens(encoded["input_ids"], own)


def _embeddings(
    plan: MoePlan, prompts: Mapping[str, _Tokens]
) -> dict[str, torch.Tensor]:
    """Mean embeddings of the prompts' tokens, the same for every layer."""
    base = plan.base
    name = base.architecture.find_equivalent(EMBEDDING) or EMBEDDING
    operand = base.operand(name)
    n_rows = matrix_shape(operand.shape)[0]
    rows: dict[int, torch.Tensor] = {}
    means = {}
    for prompt, tokens in prompts.items():
        for token in tokens.own_ids:
            if token >= n_rows:
                raise CheckpointError(
                    f"{plan.config.base_model}: the tokenizer gives the id {token}, and there are "
                    f"{n_rows} embeddings; is it the tokenizer of this model?"
                )
            # Rows are read one by one: a vocabulary may take gigabytes.
            if token not in rows:
                rows[token] = operand.rows(token, token + 1)[0].double()
        mean = torch.stack([rows[token] for token in tokens.own_ids]).mean(0)
        means[prompt] = mean.expand(plan.depth, -1)
    return means


def _hidden_states(
    plan: MoePlan, prompts: Mapping[str, _Tokens], device: str
) -> dict[str, torch.Tensor]:
    """Mean hidden states of the prompts' tokens at the input of each layer's MLP, in the base."""
    name = plan.config.base_model
    whole_model = Slice((Source(name),))
    live = ResidentModel(name, (), device=device, sources_on_device=False)
    # With its adapter, if it has one, which transformers did not load.
    model = live.load(Recipe("passthrough", (whole_model,))).model
    decoder: Any = model.base_model
    longest = model.config.max_position_embeddings
    means = {}
    with torch.inference_mode(), _mlp_inputs(decoder.layers) as inputs:
        # One by one: no prompt depends on the padding of others.
        for prompt, tokens in prompts.items():
            if len(tokens.ids) > longest:
                raise RecipeError(
                    f"the prompt {shorten(prompt)} has {len(tokens.ids)} tokens, and the base "
                    f"reads {longest}; shorten it"
                )
            ids = torch.tensor([tokens.ids], device=device)
            decoder(input_ids=ids, use_cache=False)
            layers = []
            for states in inputs:
                own = states[0, tokens.own].double()
                layers.append(own.mean(0).cpu())
            means[prompt] = torch.stack(layers)
    return means


@contextmanager
def _mlp_inputs(layers: Iterable[Any]) -> Iterator[list[torch.Tensor]]:
    """Record what goes into the MLP of each layer; each forward pass replaces the last one's."""
    layers = list(layers)
    inputs: list[torch.Tensor] = [torch.empty(0)] * len(layers)
    handles = []

    def recorder(index: int) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs[index] = args[0]

        return record

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.mlp.register_forward_pre_hook(recorder(index)))
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
