"""The router: which tasks a prompt belongs to.

Twin-Merging, Lu et al. 2024, arXiv 2406.15479: an MLP d -> 2d -> 2d -> T on the mean over the
prompt's tokens of the last hidden state of theta*, trained with cross-entropy on the names of the
tasks. It differs from the published program in two ways. That one selects the epoch on the test
data; this one on prompts that were split off the given ones. That one normalises each layer over a
batch; this one standardises the input once, so that a few prompts are enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from paretomerge.errors import CheckpointError

_DROPOUT = (
    0.5  # this, the learning rate and the epochs are those of the published program
)
_LEARNING_RATE = 5e-4
_EPOCHS = 50
_MIN_STEPS = 500  # with few prompts, 50 epochs are too few steps to learn anything
_BATCH = 64
_VALIDATION_SHARE = 0.2


class Router(nn.Module):
    """An MLP from the mean hidden state of a prompt to a logit per task.

    Args:
        width: The model's hidden size d.
        n_tasks: The number of tasks T.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, n_tasks: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        hidden = 2 * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.LeakyReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, n_tasks),
        )

    def forward(self, states: Tensor) -> Tensor:
        """Logits of the tasks.

        Args:
            states: Mean hidden states of prompts, `(prompts, d)`.

        Returns:
            `(prompts, T)`, in float32.
        """
        standardised = (states.float() - self.mean) / self.deviation
        logits: Tensor = self.layers(standardised)
        return logits


@dataclass(frozen=True)
class TrainedRouter:
    """A router and how well it does on prompts that it was not trained on.

    Attributes:
        router: The router of the best epoch.
        accuracy: Share of the validation prompts whose task it found.
        n_training: Prompts that it was trained on.
        n_validation: Prompts that selected the epoch.
    """

    router: Router
    accuracy: float
    n_training: int
    n_validation: int


def train_router(states: Sequence[Tensor], seed: int) -> TrainedRouter:
    """Train a router, always on the CPU, so that a seed gives the same router.

    Args:
        states: For each task the mean hidden states of its prompts, `(prompts, d)`; at least two.
        seed: Of the split into training and validation, of the weights, batches and dropout.

    Returns:
        The router of the epoch with the lowest cross-entropy on the validation prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    training, validation = _split(states, generator)
    inputs, labels = training
    # Dropout and the first weights draw from torch's own generator, which stays as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        router = Router(inputs.shape[1], len(states))
        router.mean.copy_(inputs.mean(0))
        # A constant coordinate says nothing, and must not be divided by 0.
        router.deviation.copy_(inputs.std(0, correction=0).clamp_min(1e-6))
        optimizer = torch.optim.AdamW(router.parameters(), lr=_LEARNING_RATE)
        best_loss = float("inf")
        best_state: dict[str, Tensor] = {}
        n_batches = math.ceil(len(labels) / _BATCH)
        epochs = max(_EPOCHS, math.ceil(_MIN_STEPS / n_batches))
        for _ in range(epochs):
            _train_epoch(router, optimizer, inputs, labels, generator)
            loss = _loss(router, *validation)
            if loss < best_loss:
                best_loss = loss
                current = router.state_dict()
                best_state = {name: value.clone() for name, value in current.items()}
    router.load_state_dict(best_state)
    router.eval().requires_grad_(False)
    n_validation = len(validation[1])
    return TrainedRouter(
        router, accuracy(router, *validation), len(labels), n_validation
    )


def accuracy(router: Router, states: Tensor, labels: Tensor) -> float:
    """Share of the prompts whose task has the largest logit."""
    chosen = router(states).argmax(1)
    return float((chosen == labels).double().mean())


def _split(
    states: Sequence[Tensor], generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation inputs with their labels; a fifth of each task validates."""
    groups: list[list[Tensor]] = [[], []]
    labels: list[list[Tensor]] = [[], []]
    for task, of_task in enumerate(states):
        order = torch.randperm(len(of_task), generator=generator)
        n_validation = max(1, int(_VALIDATION_SHARE * len(of_task)))
        for which, indices in enumerate((order[n_validation:], order[:n_validation])):
            groups[which].append(of_task[indices].float())
            labels[which].append(torch.full((len(indices),), task))
    training = (torch.cat(groups[0]), torch.cat(labels[0]))
    validation = (torch.cat(groups[1]), torch.cat(labels[1]))
    return training, validation


def _train_epoch(
    router: Router,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> None:
    router.train()
    order = torch.randperm(len(labels), generator=generator)
    for batch in torch.split(order, _BATCH):
        logits = router(inputs[batch])
        loss = nn.functional.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def _loss(router: Router, inputs: Tensor, labels: Tensor) -> float:
    router.eval()
    return float(nn.functional.cross_entropy(router(inputs), labels))


def save_router(router: Router, file: Path) -> None:
    """Write a router as a safetensors file."""
    from safetensors.torch import save_file

    save_file(router.state_dict(), file, metadata={"format": "pt"})
    # It gives access to the owner alone; a model folder is like any other folder.
    file.chmod(0o644)


def load_router(file: Path, width: int, n_tasks: int) -> Router:
    """Read a router.

    Args:
        file: What `save_router` wrote.
        width: The model's hidden size.
        n_tasks: The number of tasks.

    Returns:
        The router, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    router = Router(width, n_tasks)
    try:
        router.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not the router of {n_tasks} tasks of this model; make the Twin-Merging "
            "folder again"
        ) from error
    router.eval().requires_grad_(False)
    return router
