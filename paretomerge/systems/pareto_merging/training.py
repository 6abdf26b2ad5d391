"""Trains the factors of a family on unlabelled texts of its sources' tasks.

Chen & Kwok 2024 (Pareto Merging, arXiv 2408.12105) draw a preference gamma for each step and
minimise sum_k gamma_k L_k(theta(gamma)), where L_k is the entropy of the merged model's predictions
on task k, as in AdaMerging (Yang et al. 2023, arXiv 2310.02575). A language model has the least
entropy of next tokens where it repeats itself, so here L_k is the divergence KL(p_k || p_gamma) of
the next token's distribution from that of source k, on source k's texts: every source is the
teacher of its own task. It is 0 where the merge answers as the source does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from paretomerge.arguments import integer, number, read_fields
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.evaluate.inference.batching import AdaptiveBatcher
from paretomerge.evaluate.inference.generate import GreedyGenerator
from paretomerge.evaluate.inference.prefill import supports_cache
from paretomerge.merging.live.model_class import load_model, load_tokenizer
from paretomerge.merging.live.names import loading_layout
from paretomerge.systems.pareto_merging.factors import Factors
from paretomerge.systems.pareto_merging.family import WHOLE, ParetoFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Expert = Callable[[str], Tensor]
"""Reads a tensor of a source, by its name in the base, in float32."""

_State = dict[
    str, Tensor
]  # name in the loaded model -> tensor in place of the model's own
_MOST_WATCHED = 64  # texts of a source that are split off to watch the training
_GENERATION_ROWS = 64


@dataclass(frozen=True)
class TrainingSettings:
    """How the factors are trained.

    Attributes:
        steps: The most steps of Adam.
        learning_rate: That of Adam at first; it falls linearly to 0.
        batch_size: Texts of each source in a step.
        concentration: That of the Dirichlet distribution of gamma; 1 is uniform on the simplex,
            less is nearer to the corners.
        new_tokens: The most tokens that each source writes after its texts, greedily. The
            divergence is then measured on what it wrote. 0 to measure it on the texts themselves.
        max_tokens: Texts are cut to so many tokens, or to what the models read: to the last ones
            where the sources write after them, else to the first ones.
        check_every: Steps between two looks at the texts that were split off.
        patience: Looks without an improvement after which the training ends. The first steps often
            cost more than they bring, so that a few looks are too few.
        watched_share: The share of each source's texts that is split off, 64 texts at most.
        seed: Decides the split, the batches and the gammas.
    """

    steps: int = 400
    learning_rate: float = 5e-4
    batch_size: int = 16
    concentration: float = 1.0
    new_tokens: int = 32
    max_tokens: int = 256
    check_every: int = 20
    patience: int = 20
    watched_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        readers = {
            "steps": integer(1),
            "learning_rate": number,
            "batch_size": integer(1),
            "concentration": number,
            "new_tokens": integer(0),
            "max_tokens": integer(1),
            "check_every": integer(1),
            "patience": integer(1),
            "watched_share": number,
            "seed": integer(0),
        }
        read_fields(self, readers, "training.")
        for field in ("learning_rate", "concentration"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"training.{field}: must be above 0")
        if not 0 < self.watched_share < 1:
            raise ConfigError("training.watched_share: must be between 0 and 1")


@dataclass(frozen=True)
class _Sequence:
    """Tokens, and which of their positions count: [start, end)."""

    tokens: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class _Batch:
    """Sequences of equal length, padded on the right.

    Attributes:
        tokens: (n, length).
        mask: (n, length), 1 for tokens and 0 for padding.
        counted: (n, length), true where the next token's distribution counts.
    """

    tokens: Tensor
    mask: Tensor
    counted: Tensor


def train(
    family: ParetoFamily,
    experts: Sequence[Expert],
    texts: Mapping[str, Sequence[str]],
    settings: TrainingSettings,
    device: str = "cpu",
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Train the factors of a family; deltas that are stored whole stay.

    The factors with the least divergence on the texts that were split off are returned, which may
    be those that the training began with.

    Args:
        family: The closed form, with which the training begins.
        experts: The sources, in the order of the family's names.
        texts: Source -> its texts.
        settings: How to train.
        device: Where to train.

    Returns:
        The factors by tensor name, and facts on the training for the manifest.

    Raises:
        ConfigError: If the family cannot be trained, or the texts have no tokens.
        CheckpointError: If the model has no tokenizer or cannot be loaded.
    """
    if not family.manifest.ranks:
        raise ConfigError(
            "data: there is nothing to train, since all deltas are stored whole at this rank; use "
            "a smaller rank, or leave the data out"
        )
    rng = np.random.default_rng(settings.seed)
    teachers = _Teachers(family, experts, device)
    learning: list[list[_Sequence]] = []
    watched: list[list[_Sequence]] = []
    for k, name in enumerate(family.names):
        sequences = teachers.sequences(k, texts[name], settings)
        n_watched = int(settings.watched_share * len(sequences))
        n_watched = min(max(n_watched, 1), _MOST_WATCHED)
        order = rng.permutation(len(sequences))
        watched.append([sequences[i] for i in order[:n_watched]])
        learning.append([sequences[i] for i in order[n_watched:]])
    student = _Student(family, teachers)
    optimiser = torch.optim.Adam(student.parameters, lr=settings.learning_rate)
    first_loss = _mean_watched_loss(student, watched, settings)
    best = _Best(first_loss, 0, student.snapshot())
    step = 0
    for step in range(1, settings.steps + 1):
        optimiser.zero_grad()
        _drawn_loss(student, learning, settings, rng).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        # Falls linearly to 0: the last steps settle what the noise of the gammas stirred up.
        share_left = 1 - step / settings.steps
        optimiser.param_groups[0]["lr"] = settings.learning_rate * share_left
        if step % settings.check_every and step != settings.steps:
            continue
        loss = _mean_watched_loss(student, watched, settings)
        if loss < best.loss:
            best = _Best(loss, step, student.snapshot())
        elif step - best.step >= settings.patience * settings.check_every:
            break
    report = {
        **asdict(settings),
        "texts": {name: len(texts[name]) for name in family.names},
        "divergence_before": first_loss,
        "divergence_after": best.loss,
        "steps_taken": step,
        "best_step": best.step,
    }
    return best.factors, report


@dataclass(frozen=True)
class _Best:
    """The factors with the least divergence on the watched texts, and when they were found."""

    loss: float
    step: int
    factors: dict[str, Factors]


def _drawn_loss(
    student: "_Student",
    learning: Sequence[Sequence[_Sequence]],
    settings: TrainingSettings,
    rng: np.random.Generator,
) -> Tensor:
    """The loss of a step: at a preference drawn at random, on texts drawn from each source's."""
    device = student.teachers.device
    gamma = torch.tensor(rng.dirichlet([settings.concentration] * len(learning)))
    batches = []
    for sequences in learning:
        n = min(settings.batch_size, len(sequences))
        rows = rng.choice(len(sequences), size=n, replace=False)
        batches.append(student.teachers.batch([sequences[i] for i in rows]))
    return student.loss(gamma.to(device, torch.float32), batches)


def _mean_watched_loss(
    student: "_Student",
    watched: Sequence[Sequence[_Sequence]],
    settings: TrainingSettings,
) -> float:
    """The mean loss on the watched texts over the preferences that are looked at."""
    losses = []
    with torch.no_grad():
        for gamma in _watched_gammas(len(watched)):
            losses.append(_watched_loss(student, gamma, watched, settings))
    return sum(losses) / len(losses)


def _watched_gammas(k: int) -> list[Tensor]:
    """The preferences that are looked at: each source alone, and equal shares."""
    return [*torch.eye(k), torch.full((k,), 1 / k)]


def _watched_loss(
    student: "_Student",
    gamma: Tensor,
    watched: Sequence[Sequence[_Sequence]],
    settings: TrainingSettings,
) -> float:
    """sum_k gamma_k times the mean divergence of a position on the watched texts of source k."""
    teachers = student.teachers
    gamma = gamma.to(teachers.device)
    state = student.state(gamma)
    total = 0.0
    for k, sequences in enumerate(watched):
        if not float(gamma[k]):
            continue
        summed, count = 0.0, 0
        for first in range(0, len(sequences), settings.batch_size):
            batch = teachers.batch(sequences[first : first + settings.batch_size])
            n = int(batch.counted.sum())
            summed += n * float(
                teachers.divergence(k, batch, teachers.logits(state, batch))
            )
            count += n
        total += float(gamma[k]) * summed / count
    return total


class _Teachers:
    """The sources, as states of one loaded model in float32.

    Raises:
        ConfigError: If transformers changes tensors when it loads them.
        CheckpointError: If the model has no tokenizer or cannot be loaded.
    """

    def __init__(
        self, family: ParetoFamily, experts: Sequence[Expert], device: str
    ) -> None:
        folder = family.base.folder
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise CheckpointError(
                f"{folder}: has no tokenizer, which training on texts needs; copy its files, such "
                "as tokenizer.json, into the base's folder"
            )
        self.tokenizer = tokenizer
        self.device = device
        self.model: PreTrainedModel = (
            load_model(folder, torch.float32).to(device).eval()
        )
        self.model.requires_grad_(False)
        layout = loading_layout(self.model, family.base.headers)
        if layout.conversions:
            name = next(iter(layout.conversions[0].members))
            raise ConfigError(
                f"data: transformers packs or permutes {name} when it loads it, so this "
                "architecture cannot be trained; leave the data out for the closed form"
            )
        self.names: dict[str, str] = {}
        for name in family.varying:
            if name in layout.renamed:
                self.names[name] = layout.renamed[name]
        self._states: list[_State] = []
        for expert in experts:
            state = {}
            for name, loaded in self.names.items():
                state[loaded] = expert(name).to(device)
            self._states.append(state)

    def sequences(
        self, k: int, texts: Sequence[str], settings: TrainingSettings
    ) -> list[_Sequence]:
        """Tokenise the texts of source k, and let it continue them."""
        limit = self._longest_text(settings)
        prompts = []
        for text in texts:
            tokens = self.tokenizer(text)["input_ids"]
            # What is written goes on from the end of a text.
            tokens = tokens[-limit:] if settings.new_tokens else tokens[:limit]
            if tokens:
                prompts.append(tokens)
        if len(prompts) < 2:
            raise ConfigError("data: the texts of a source have no tokens")
        if not settings.new_tokens:
            return [_Sequence(tokens, 0, len(tokens)) for tokens in prompts]
        answers = self._answers(k, prompts, settings.new_tokens)
        sequences = []
        for i, tokens in enumerate(prompts):
            whole = tokens + answers[i]
            # The distribution at a position is that of the token behind it.
            sequences.append(_Sequence(whole, len(tokens) - 1, len(whole) - 1))
        return sequences

    def _longest_text(self, settings: TrainingSettings) -> int:
        """The most tokens of a text, so that what is written after it fits the model, too."""
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if not positions:
            return settings.max_tokens
        room = int(positions) - settings.new_tokens
        if room < 1:
            raise ConfigError(
                f"training.new_tokens: the models read {positions} tokens in all, so "
                f"{settings.new_tokens} (--new-tokens) leave none for the texts; use fewer"
            )
        return min(settings.max_tokens, room)

    def _answers(
        self, k: int, prompts: Sequence[list[int]], new_tokens: int
    ) -> dict[int, list[int]]:
        """What source k writes after prompts, by their positions."""
        if not supports_cache(self.model):
            raise ConfigError(
                "data: this architecture cannot continue texts here; set new_tokens to 0 "
                "(--new-tokens 0) to train on the texts themselves"
            )
        own = self.model.state_dict()
        before = {name: own[name].clone() for name in self._states[k]}
        try:
            self.model.load_state_dict(self._states[k], strict=False)
            generator = GreedyGenerator(self.model, self.tokenizer, (), new_tokens)
            batcher = AdaptiveBatcher(_GENERATION_ROWS)
            numbered = [(i, tuple(tokens)) for i, tokens in enumerate(prompts)]
            return generator.generate_in_batches(numbered, batcher)
        finally:
            self.model.load_state_dict(before, strict=False)

    def batch(self, sequences: Sequence[_Sequence]) -> _Batch:
        """Put sequences into one batch."""
        length = max(len(sequence.tokens) for sequence in sequences)
        tokens = torch.zeros(len(sequences), length, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        counted = torch.zeros(len(sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            n = len(sequence.tokens)
            tokens[row, :n] = torch.tensor(sequence.tokens)
            mask[row, :n] = 1
            counted[row, sequence.start : sequence.end] = True
        device = self.device
        return _Batch(tokens.to(device), mask.to(device), counted.to(device))

    def logits(self, state: _State, batch: _Batch) -> Tensor:
        """The logits (counted positions, vocabulary) of the model in a state."""
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        output = functional_call(self.model, state, (), {**inputs, "use_cache": False})
        logits: Tensor = output.logits[batch.counted]
        return logits.float()

    def divergence(self, k: int, batch: _Batch, logits: Tensor) -> Tensor:
        """The mean over positions of KL(source k || logits), in nats."""
        with torch.no_grad():
            wanted = self.logits(self._states[k], batch).log_softmax(-1)
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean"
        )


class _Student:
    """The family's factors while they are trained."""

    def __init__(self, family: ParetoFamily, teachers: _Teachers) -> None:
        self.teachers = teachers
        device = teachers.device
        self._stored: dict[str, Tensor] = {}
        self._deltas: dict[str, Tensor] = {}
        self._factors: dict[str, Factors] = {}
        for name in teachers.names:
            self._stored[name] = family.base.tensor(name).float().to(device)
            if name in family.manifest.whole:
                self._deltas[name] = family.part(name, WHOLE).to(device)
                continue
            start = family.factors(name)
            self._factors[name] = Factors(
                start.a.to(device).requires_grad_(),
                start.b.to(device).requires_grad_(),
                start.cores.to(device).requires_grad_(),
            )

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained: all A, B and G_k."""
        tensors: list[Tensor] = []
        for factors in self._factors.values():
            tensors += [factors.a, factors.b, factors.cores]
        return tensors

    def state(self, gamma: Tensor) -> _State:
        """The weights at a preference, by their names in the loaded model."""
        state = {}
        for name, loaded in self.teachers.names.items():
            if name in self._deltas:
                delta = torch.tensordot(gamma, self._deltas[name], dims=1)
            else:
                delta = self._factors[name].update(gamma)
            stored = self._stored[name]
            state[loaded] = stored + delta.reshape(stored.shape)
        return state

    def loss(self, gamma: Tensor, batches: Sequence[_Batch]) -> Tensor:
        """sum_k gamma_k times the divergence from source k on a batch of its texts."""
        state = self.state(gamma)
        total = torch.zeros((), device=self.teachers.device)
        for k, batch in enumerate(batches):
            logits = self.teachers.logits(state, batch)
            total = total + gamma[k] * self.teachers.divergence(k, batch, logits)
        return total

    def snapshot(self) -> dict[str, Factors]:
        """A copy of the factors, on the CPU."""
        copies = {}
        for name, factors in self._factors.items():
            parts = (factors.a, factors.b, factors.cores)
            a, b, cores = (part.detach().cpu().clone() for part in parts)
            copies[name] = Factors(a, b, cores)
        return copies
