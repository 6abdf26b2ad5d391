"""Merge weights learned by gradient from text without labels: AdaMerging for language models.

Yang et al. 2023, arXiv 2310.02575, learn one coefficient per source and layer of task arithmetic
with Adam, from 0.3, so that the merged model is sure of its answers (low entropy). The entropy of
next tokens is lowest for a model that repeats itself, so here the merged model learns to answer as
each source does on that source's text: the loss is the mean over the sources i of KL(p_i || p) for
the next token. A part of the text is split off, and decides when to stop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from paretomerge.arguments import integer, number, optional
from paretomerge.arguments import model as read_model
from paretomerge.calibration.make import (
    DEFAULT_TOKENS,
    CalibrationText,
    calibration_texts,
    load_source,
    read_tokens,
)
from paretomerge.calibration.text import Batch, Example, Tokens, make_batches
from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe, Slice, Source

if TYPE_CHECKING:
    from torch import Tensor

    from paretomerge.merging.live.in_place import ResidentModel

_HELD_OUT_EVERY = 4  # one example of so many
_DIGITS = 4


@dataclass(frozen=True)
class LearnedWeights:
    """Weights of task arithmetic, and how they were learned.

    Attributes:
        recipe: The recipe with the weights.
        weights: Source -> one weight per group of layers.
        held_out: KL on the text that was split off, by step; the first is that of the start.
        best: The step whose weights these are.
    """

    recipe: Recipe
    weights: Mapping[str, tuple[float, ...]]
    held_out: Mapping[int, float]
    best: int


def learn_weights(  # noqa: PLR0913 - the options of an optimisation, all with a default
    base: str,
    models: Sequence[str],
    data: Mapping[str, CalibrationText],
    *,
    groups: int | None = None,
    start: float = 0.3,
    lr: float = 0.01,
    steps: int = 300,
    check_every: int = 10,
    patience: int = 5,
    examples: int = 128,
    max_tokens: int = DEFAULT_TOKENS,
    batch_size: int = 8,
    add_bos_token: bool | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda message: None,
) -> LearnedWeights:
    """Learn the weights of a task arithmetic from text, one per source and group of layers.

    The base, each source and the gradient are in memory, in float32; so are the sources' answers,
    with one number per answered token and entry of the vocabulary.

    Args:
        base: The model that the others were fine-tuned from.
        models: The fine-tunes.
        data: Each model of `models` -> its text, as for `calibrate`. Answers are context, and no
            labels: what is learned are the model's own next tokens.
        groups: Groups of layers with weights of their own; by default four, or one per layer if
            there are fewer.
        start: The weights to begin with.
        lr: Adam's learning rate.
        steps: The most steps. Each reads one batch of each model's text.
        check_every: Steps between two looks at the text that was split off.
        patience: Looks without an improvement after which to stop.
        examples: How many examples of each model are read at most. A quarter is split off.
        max_tokens: The longest example.
        batch_size: Examples in one forward pass.
        add_bos_token: Whether texts begin with the token that begins a sequence.
        device: `cpu`, `cuda` or `cuda:N`.
        on_progress: Receives what is done, as text.

    Returns:
        The weights of the best look, as a recipe and as numbers.

    Raises:
        ConfigError: A model has no text, or an argument is wrong.
        CheckpointError: A model cannot be read.

    Example:
        >>> from paretomerge.calibration import learn_weights
        >>> data = {"./math": "math.jsonl", "./code": "code.jsonl"}
        >>> learned = learn_weights("./base", ["./math", "./code"], data)  # doctest: +SKIP
        >>> learned.recipe.to_yaml()  # doctest: +SKIP
    """
    start, lr = _positive("start", start), _positive("lr", lr)
    texts = calibration_texts(models, data)
    learner = _Learner.load(
        read_model("base", base),
        texts,
        groups=optional(integer(1))("groups", groups),
        examples=integer(2)("examples", examples),
        max_tokens=integer(2)("max_tokens", max_tokens),
        batch_size=integer(1)("batch_size", batch_size),
        add_bos_token=add_bos_token,
        device=device,
        on_progress=on_progress,
    )
    return learner.learn(
        start,
        lr,
        integer(0)("steps", steps),
        integer(1)("check_every", check_every),
        integer(1)("patience", patience),
        on_progress,
    )


def _positive(name: str, value: float) -> float:
    checked: float = number(name, value)
    if checked < 0:
        raise ConfigError(f"{name}: expected a number of 0 or more, got {checked:g}")
    return checked


@dataclass(frozen=True)
class _Answers:
    """A batch, and what its source says at each place where an answer goes on.

    Attributes:
        batch: The tokens.
        places: Places whose next token counts, (examples, length).
        log_probabilities: The source's, (places, vocabulary).
    """

    batch: Batch
    places: "Tensor"
    log_probabilities: "Tensor"


@dataclass
class _Learner:
    """Learns the weights of one merge.

    Attributes:
        live: The model that takes on each merge.
        sources: The sources, in the order of the weights.
        training: For each source, its batches to learn from.
        held_out: For each source, its batches to stop by.
        groups: The first layer of each group.
        group_of: Parameter of the loaded model -> its group.
        base: Parameter -> theta_0.
        deltas: For each source, parameter -> tau_i.
    """

    live: "ResidentModel"
    sources: tuple[str, ...]
    training: list[list[_Answers]]
    held_out: list[list[_Answers]]
    groups: list[int]
    group_of: dict[str, int]
    base: "dict[str, Tensor]"
    deltas: "list[dict[str, Tensor]]"

    @classmethod
    def load(  # noqa: PLR0913 - the options of `learn_weights`
        cls,
        base: str,
        texts: Mapping[str, Sequence[Example]],
        *,
        groups: int | None,
        examples: int,
        max_tokens: int,
        batch_size: int,
        add_bos_token: bool | None,
        device: str,
        on_progress: Callable[[str], None],
    ) -> "_Learner":
        """Load the models, and ask each source for its answers."""
        from paretomerge.merging.live.in_place import ResidentModel

        training, held_out = [], []
        for model, of_model in texts.items():
            on_progress(f"{model}: its answers")
            source = load_source(model, device)
            tokens = read_tokens(
                source, model, of_model, examples, max_tokens, add_bos_token
            )
            if len(tokens) < 2:
                raise ConfigError(
                    f"data: {model} needs two examples or more, one of which is split off"
                )
            every = min(_HELD_OUT_EVERY, len(tokens))
            split_off = tokens[every - 1 :: every]
            others = [one for i, one in enumerate(tokens) if i % every != every - 1]
            training.append(_answers(source, others, batch_size))
            held_out.append(_answers(source, split_off, batch_size))
        live = ResidentModel(
            base,
            tuple(texts),
            dtype="float32",
            device=device,
            sources_on_device=False,
        )
        depth = live.checkpoints[base].architecture.depth
        count = min(groups or 4, depth)
        starts = [depth * group // count for group in range(count)]
        sources = tuple(texts)
        learner = cls(live, sources, training, held_out, starts, {}, {}, [])
        learner._load_deltas()
        return learner

    def _load_deltas(self) -> None:
        """Read theta_0 and tau_i as they are in the loaded model, where experts may be packed."""
        model = self.live.model
        parameters = dict(model.named_parameters())
        architecture = Architecture.infer(
            list(parameters), self.live.checkpoints[self.live.base].config
        )
        zero = [[0.0] * len(self.groups) for _ in self.sources]
        self.live.load(self._recipe(zero))
        for name, parameter in parameters.items():
            self.base[name] = parameter.detach().clone()
            self.group_of[name] = self._group(architecture, name)
        for index in range(len(self.sources)):
            one_hot = [list(row) for row in zero]
            one_hot[index] = [1.0] * len(self.groups)
            self.live.load(self._recipe(one_hot))
            delta = {}
            for name, parameter in parameters.items():
                delta[name] = parameter.detach() - self.base[name]
            self.deltas.append(delta)

    def _group(self, architecture: Architecture, name: str) -> int:
        layer = architecture.layer(name)
        if layer is not None:
            starts = [start for start in self.groups if start <= layer]
            return len(starts) - 1
        # As in recipes, whose first and last slices decide for what is outside the layers.
        return 0 if architecture.is_embedding(name) else len(self.groups) - 1

    def _recipe(self, weights: Sequence[Sequence[float]]) -> Recipe:
        """Task arithmetic with one weight per source (row) and group of layers (column)."""
        depth = self.live.checkpoints[self.live.base].architecture.depth
        ends = [*self.groups[1:], depth]
        slices = []
        for group, (first, end) in enumerate(zip(self.groups, ends, strict=True)):
            layers = None if len(self.groups) == 1 else (first, end)
            listed = []
            for row, source in enumerate(self.sources):
                parameters = {"weight": round(float(weights[row][group]), _DIGITS)}
                listed.append(Source(source, layers, parameters))
            slices.append(Slice(tuple(listed)))
        return Recipe(
            "task_arithmetic",
            tuple(slices),
            base_model=self.live.base,
            parameters={"normalize": False},
        )

    def learn(
        self,
        start: float,
        lr: float,
        steps: int,
        check_every: int,
        patience: int,
        on_progress: Callable[[str], None],
    ) -> LearnedWeights:
        """Descend, and stop where the text that was split off gets no better."""
        import torch

        shape = (len(self.sources), len(self.groups))
        weights = torch.full(shape, start, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=lr)
        best, best_weights = 0, weights.detach().clone()
        history: dict[int, float] = {}
        for step in range(steps + 1):
            self._set(weights.detach())
            if step % check_every == 0 or step == steps:
                history[step] = self._held_out_loss()
                on_progress(f"step {step}: KL {history[step]:.4f}")
                if history[step] < history[best]:
                    best, best_weights = step, weights.detach().clone()
                looks = [look for look in history if look > best]
                if len(looks) >= patience:
                    break
            if step < steps:
                weights.grad = self._gradient(step)
                optimizer.step()
        return self._result(best_weights.tolist(), history, best)

    def _result(
        self, weights: list[list[float]], history: Mapping[int, float], best: int
    ) -> LearnedWeights:
        by_source = {}
        for source, row in zip(self.sources, weights, strict=True):
            by_source[source] = tuple(round(weight, _DIGITS) for weight in row)
        return LearnedWeights(self._recipe(weights), by_source, history, best)

    def _set(self, weights: "Tensor") -> None:
        """Give the model theta_0 + sum w_i tau_i."""
        import torch

        by_source = weights.tolist()
        with torch.no_grad():
            for name, parameter in self.live.model.named_parameters():
                group = self.group_of[name]
                parameter.copy_(self.base[name])
                for row, delta in zip(by_source, self.deltas, strict=True):
                    parameter.add_(delta[name], alpha=row[group])

    def _gradient(self, step: int) -> "Tensor":
        """The gradient with respect to the weights, from that with respect to the parameters.

        d L / d w_ig is the inner product of d L / d theta and tau_i over the parameters of group g.
        """
        import torch

        parameters = dict(self.live.model.named_parameters())
        for of_source in self.training:
            answers = of_source[step % len(of_source)]
            loss = self._loss(answers) / len(self.training)
            loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.zeros(len(self.sources), len(self.groups))
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            for row, delta in enumerate(self.deltas):
                product = (parameter.grad * delta[name]).sum()
                gradient[row, self.group_of[name]] += product.item()
            parameter.grad = None
        return gradient

    def _held_out_loss(self) -> float:
        """The mean over the sources of the mean KL of a token."""
        import torch

        losses = []
        with torch.no_grad():
            for of_source in self.held_out:
                total, count = 0.0, 0
                for answers in of_source:
                    n = len(answers.log_probabilities)
                    total += float(self._loss(answers)) * n
                    count += n
                losses.append(total / count)
        return sum(losses) / len(losses)

    def _loss(self, answers: _Answers) -> "Tensor":
        """Mean over the places of KL(p_i || p)."""
        import torch

        logits = self.live.model(**answers.batch.model_inputs()).logits
        merged = logits[answers.places].float().log_softmax(-1)
        return torch.nn.functional.kl_div(
            merged, answers.log_probabilities, reduction="batchmean", log_target=True
        )


def _answers(
    source: "ResidentModel", tokens: Sequence[Tokens], batch_size: int
) -> list[_Answers]:
    """What a source says at each place where an answer goes on."""
    import torch

    # Batches are in the order of the lengths, and so are these.
    ordered = sorted(tokens, key=lambda example: len(example.ids), reverse=True)
    result = []
    for batch, first in zip(
        make_batches(ordered, batch_size, 0, source.device),
        range(0, len(ordered), batch_size),
        strict=True,
    ):
        places = torch.zeros_like(batch.mask, dtype=torch.bool)
        for row, example in enumerate(ordered[first : first + batch_size]):
            # The logits at a token are those of the next one.
            places[row, example.start - 1 : len(example.ids) - 1] = True
        with torch.no_grad():
            logits = source.model(**batch.model_inputs()).logits[places]
            log_probabilities = logits.float().log_softmax(-1)
        result.append(_Answers(batch, places, log_probabilities))
    return result


def check_recipe_file(out: Path, overwrite: bool) -> None:
    """Check that a recipe can be written, before the weights are learned.

    Args:
        out: The file.
        overwrite: Whether it may be replaced.

    Raises:
        ConfigError: It is there, is a folder, or cannot be written.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file, such as {out}/recipe.yml")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: exists; replace it with --overwrite")
    # The folder is made when the recipe is written: a search that is stopped leaves nothing.
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error.strerror}; name another file"
        ) from error


def write_recipe(learned: LearnedWeights, out: Path) -> None:
    """Write a recipe with learned weights.

    Args:
        learned: The weights.
        out: The file.
    """
    look = learned.held_out[learned.best]
    first = learned.held_out[0]
    comment = (
        f"# Learned weights: step {learned.best}, KL to the sources' own answers {look:.4f} "
        f"({first:.4f} at the start)\n"
    )
    recipe = learned.recipe.resolve_paths(Path.cwd())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(comment + recipe.to_yaml(), encoding="utf-8")
