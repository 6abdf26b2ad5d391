"""`TwinModel`: a shared model whose weights depend on the prompt, as one model of transformers."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.batching import Tokens, pad_left
from paretomerge.merging.engine import usable_device
from paretomerge.merging.live.model_class import load_model
from paretomerge.systems.twin.exclusive import Parts, load_parts
from paretomerge.systems.twin.manifest import ROUTER_FILE, SHARED_FOLDER, Manifest
from paretomerge.systems.twin.mixture import Held, TaskWeights, attach
from paretomerge.systems.twin.places import find_places
from paretomerge.systems.twin.router import Router, load_router

_BATCH = 16


class TwinCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of prompts, with the weights of the tasks that they were computed with.

    Args:
        config: The model's config.
        task_weights: `(rows, T)`.
    """

    def __init__(self, config: Any, task_weights: TaskWeights) -> None:
        super().__init__(config=config)
        self.task_weights = task_weights

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, or repeat them."""
        super().batch_select_indices(indices)
        self.task_weights = self.task_weights[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.task_weights = self.task_weights.repeat_interleave(repeats, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self.task_weights = self.task_weights[beam_idx]


class TwinModel(nn.Module):
    """A causal language model with theta(x) = theta* + sum_t g_t(x) v_t for each prompt x.

    Twin-Merging, Lu et al. 2024, arXiv 2406.15479. It is called like a model of transformers, for
    inference alone. What the router reads:

    - `generate` reads the prompt once and keeps its weights for all that is written.
    - `forward` without a cache reads the whole input without its padding. To score an answer to a
      prompt, call it on the prompt with `use_cache=True`, then on the answer with the cache that it
      returned: the weights of the prompt stay with the cache. The evaluators of studies do so.
    - `task_weights=` gives the weights instead, of one row or of each; then no router is asked.

    Each row of a batch has its own weights, exactly: rows are not grouped, and weights not rounded.

    Args:
        shared: The model of theta*.
        router: Its router.
        tasks: Names of the tasks.
        parts: The exclusive parts of each task.
        names: Names of all tensors of the checkpoint of theta*.

    Attributes:
        shared: The model of theta*.
        router: The router.
        tasks: Names of the tasks, in the order of the router's weights.

    Example:
        >>> model = TwinModel.from_pretrained("twin")  # doctest: +SKIP
        >>> inputs = tokenizer(["Sort: b a"], return_tensors="pt")  # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=8)  # doctest: +SKIP
        >>> model.task_weights(**inputs)  # doctest: +SKIP
        tensor([[0.98, 0.01, 0.01]])
    """

    # Prompts are read apart from answers, and no prefix is read once for several prompts:
    # `evaluate.inference` asks for it.
    weights_depend_on_prompt = True

    def __init__(
        self,
        shared: PreTrainedModel,
        router: Router,
        tasks: Sequence[str],
        parts: Sequence[Parts],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self.shared = shared
        self.router = router
        self.tasks = tuple(tasks)
        self._held = Held()
        places = find_places(shared, names).layers
        additions = attach(shared, places, parts, self._held)
        self.additions = additions.to(shared.device, shared.dtype)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "TwinModel":
        """Load a folder that `paretomerge twin` wrote.

        Args:
            folder: The folder.
            device: `cpu`, `cuda` or `cuda:N`.
            dtype: The dtype of the loaded weights; by default the folder's.

        Returns:
            The model, ready for inference.

        Raises:
            CheckpointError: The folder is something else, or a file of it changed.
            ConfigError: The device is not available.
        """
        folder = Path(folder).expanduser()
        device = usable_device(device)
        manifest = Manifest.read(folder)
        files = [manifest.exclusive_file(task) for task in manifest.tasks]
        manifest.check_files(folder, contents=[*files, ROUTER_FILE])
        checkpoint = Checkpoint(str(folder / SHARED_FOLDER))
        shared = load_model(checkpoint.folder, dtype)
        router = load_router(
            folder / ROUTER_FILE, hidden_size(shared), len(manifest.tasks)
        )
        parts = [load_parts(folder / file) for file in files]
        model = cls(shared, router, manifest.tasks, parts, list(checkpoint.headers))
        return model.to(device)

    @property
    def config(self) -> Any:
        """The config of the shared model."""
        return self.shared.config

    @property
    def generation_config(self) -> Any:
        """The generation config of the shared model."""
        return self.shared.generation_config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.shared.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the shared weights."""
        dtype: torch.dtype = self.shared.dtype
        return dtype

    @property
    def name_or_path(self) -> str:
        """Where the shared model was loaded from."""
        return str(self.shared.name_or_path)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the shared model."""
        layer: nn.Module = self.shared.get_input_embeddings()
        return layer

    def tie_weights(self) -> None:
        """Do nothing: the shared model's weights are tied when it is loaded."""

    def can_generate(self) -> bool:
        """Whether there is a `generate`."""
        return True

    def num_parameters(self) -> int:
        """Numbers that are stored: of theta*, of the exclusive parts and of the router."""
        total = 0
        for parameter in self.shared.parameters():
            total += int(parameter.numel())
        # Tied layers share their factors.
        seen: set[int] = set()
        for part in (*self.additions.buffers(), *self.router.state_dict().values()):
            if part.data_ptr() not in seen and part.is_floating_point():
                seen.add(part.data_ptr())
                total += part.numel()
        return total

    def weights_of(self, weights: Mapping[str, float]) -> TaskWeights:
        """Weights by name as `task_weights` takes them, `(T,)`; 0 for other tasks.

        Raises:
            EvaluationError: There is no such task.
        """
        vector = torch.zeros(len(self.tasks))
        for task, weight in weights.items():
            if task not in self.tasks:
                known = ", ".join(self.tasks)
                raise EvaluationError(f"unknown task {task!r}; known: {known}")
            vector[self.tasks.index(task)] = weight
        return vector

    @torch.no_grad()
    def task_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> TaskWeights:
        """What the router gives to the tasks.

        Args:
            input_ids: Prompts, `(rows, positions)`, padded on either side.
            attention_mask: Which of them are tokens; needed for more than one row.
            **_: What else a tokenizer returns; ignored.

        Returns:
            `(rows, T)`, in float32; each row sums to 1.
        """
        states = self.mean_states(input_ids, attention_mask)
        logits: Tensor = self.router(states)
        return torch.softmax(logits, -1)

    @torch.no_grad()
    def mean_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The mean over a prompt's tokens of theta*'s last hidden state: what the router reads.

        Args:
            input_ids: Prompts, `(rows, positions)`.
            attention_mask: Which of them are tokens; needed for more than one row.

        Returns:
            `(rows, d)`, in float32.
        """
        mask = _mask(input_ids, attention_mask)
        with self._held.use(None):
            output = self.shared.base_model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=_positions(mask),
                use_cache=False,
            )
        states = output.last_hidden_state.float()
        is_token = mask[:, :, None].float()
        # `where` and not a product: 0 times the NaN of an unattended row would be NaN.
        tokens = torch.where(is_token > 0, states, 0.0)
        mean: Tensor = tokens.sum(1) / is_token.sum(1)
        return mean

    def encode_prompts(self, prompts: Sequence[Tokens]) -> Tensor:
        """`mean_states` of any number of prompts, in batches.

        Args:
            prompts: Token ids, at least one per prompt.

        Returns:
            `(prompts, d)`, in float32, on the CPU.
        """
        # Prompts of one length are read together, with as little padding as possible.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        states = torch.empty(len(prompts), hidden_size(self.shared))
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            batch = [prompts[i] for i in indices]
            ids, mask, _ = pad_left(batch, self.device)
            states[indices] = self.mean_states(ids, mask).cpu()
        return states

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TwinCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        task_weights: TaskWeights | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits, with the weights of each row's prompt; see the class.

        Args:
            input_ids: `(rows, positions)`.
            attention_mask: Which positions are tokens, those of the cache included; needed for more
                than one row.
            position_ids: The tokens' positions.
            past_key_values: The cache that an earlier call returned.
            use_cache: Whether to return a cache.
            logits_to_keep: Of how many last positions logits are computed; 0 for all.
            task_weights: Weights of the tasks, `(T,)` or `(rows, T)`, in place of the router's.
            **kwargs: Passed to the shared model.

        Returns:
            The output of the shared model's class.

        Raises:
            EvaluationError: It is not clear which prompt a row belongs to.
        """
        weights, cache = self._prepare(
            input_ids, attention_mask, past_key_values, use_cache, task_weights
        )
        if position_ids is None and attention_mask is not None:
            width = input_ids.shape[1]
            position_ids = _positions(attention_mask)[:, -width:]
        if logits_to_keep and "logits_to_keep" in _parameters(self.shared):
            kwargs["logits_to_keep"] = logits_to_keep
        with self._held.use(weights):
            return self.shared(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                **kwargs,
            )

    def _prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: object,
        use_cache: bool | None,
        task_weights: TaskWeights | None,
    ) -> tuple[TaskWeights, TwinCache | None]:
        """The weights of each row, and the cache to compute with."""
        n_rows = len(input_ids)
        if past_key_values is not None:
            if not isinstance(past_key_values, TwinCache):
                raise EvaluationError(
                    "past_key_values: only a cache that this model returned says which prompts its "
                    "rows belong to; call the model on the prompts with use_cache=True first"
                )
            if task_weights is not None:
                raise EvaluationError(
                    "task_weights: the cache was computed with weights of its own; give them with "
                    "the prompts"
                )
            return past_key_values.task_weights, past_key_values
        if task_weights is None:
            weights = self.task_weights(input_ids, attention_mask)
        else:
            weights = self._given_weights(task_weights, n_rows)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        cache = TwinCache(self.config, weights) if use_cache else None
        return weights, cache

    def _given_weights(self, task_weights: TaskWeights, n_rows: int) -> TaskWeights:
        weights = task_weights.to(self.device, torch.float32)
        n_tasks = len(self.tasks)
        if tuple(weights.shape) not in ((n_tasks,), (n_rows, n_tasks)):
            raise EvaluationError(
                f"task_weights: expected the shape ({n_tasks},) or ({n_rows}, {n_tasks}), got "
                f"{tuple(weights.shape)}"
            )
        return weights.expand(n_rows, n_tasks)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        task_weights: TaskWeights | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write answers as the shared model's `generate` does, each with its prompt's weights.

        Args:
            inputs: Prompts, `(rows, positions)`, padded on the left; also as `input_ids`.
            attention_mask: Which positions are tokens; needed for more than one row.
            task_weights: Weights of the tasks, `(T,)` or `(rows, T)`, in place of the router's.
            **kwargs: Passed to the shared model's `generate`.

        Returns:
            What that returns.

        Raises:
            EvaluationError: There are no token ids, or there is a cache: the router must read the
                whole prompt.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None or kwargs.get("past_key_values") is not None:
            raise EvaluationError(
                "generate: needs the whole prompt as input_ids, without a cache: the router reads "
                "it"
            )
        mask = _mask(input_ids, attention_mask)
        if task_weights is None:
            weights = self.task_weights(input_ids, mask)
        else:
            weights = self._given_weights(task_weights, len(input_ids))
        with self._held.use(weights), self._repeating():
            return self.shared.generate(
                input_ids=input_ids, attention_mask=mask, **kwargs
            )

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Repeat the weights where `generate` repeats the prompts, for beams and for samples."""
        of_prompts = self._held.weights
        assert of_prompts is not None

        def repeat(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> None:
            given = kwargs.get("input_ids")
            if given is None:
                given = args[0] if args else kwargs["inputs_embeds"]
            # Copies of a prompt stand side by side, and beams stay among those of their prompt.
            n_copies = len(given) // len(of_prompts)
            self._held.weights = of_prompts.repeat_interleave(n_copies, 0)

        handle = self.shared.register_forward_pre_hook(repeat, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def hidden_size(model: PreTrainedModel) -> int:
    """The width of a model's last hidden state."""
    return int(model.config.get_text_config().hidden_size)


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask of prompts; all positions of a single row are tokens."""
    if attention_mask is None:
        if len(input_ids) > 1:
            raise EvaluationError(
                "attention_mask: needed for a batch, since the router reads prompts without their "
                "padding; pass what the tokenizer returns, or ones where no prompt is padded"
            )
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape or not attention_mask.any(1).all():
        raise EvaluationError(
            "attention_mask: needs the shape of input_ids, "
            f"{tuple(input_ids.shape)}, and a token in each row; it has the shape "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask


def _positions(mask: Tensor) -> Tensor:
    """Positions of tokens, without counting the padding before them."""
    positions: Tensor = mask.long().cumsum(1) - 1
    return positions.clamp_min(0)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
