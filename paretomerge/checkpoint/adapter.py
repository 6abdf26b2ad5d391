"""A model with a LoRA adapter in peft's format added to it, tensor by tensor, in memory only."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from paretomerge.checkpoint.adapter_factors import AdaptedTensor, Factors
from paretomerge.checkpoint.adapter_match import AdapterMatcher
from paretomerge.checkpoint.adapter_names import ModelNames, Packed
from paretomerge.checkpoint.adapter_options import check_plain_lora
from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.gathered import GatheredTensor
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.json_file import JsonObject, read_json
from paretomerge.checkpoint.model_config import untied_config, with_vocab_size
from paretomerge.checkpoint.operand import Operand
from paretomerge.checkpoint.reader import (
    ADAPTER_CONFIG_FILE,
    Checkpoint,
    Shards,
    shard_path,
)
from paretomerge.checkpoint.reference import resolve_folder
from paretomerge.errors import CheckpointError

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
"""The tensors of an adapter in peft's format."""


class AdaptedCheckpoint:
    """A checkpoint with an adapter added to it; tensors without an update stay as they are.

    Args:
        checkpoint: The model that the adapter was trained on.
        adapter: Folder or Hub name of the adapter.

    Attributes:
        checkpoint: The model.
        name: `model+adapter`.
        adapter: The folder of the adapter.

    Raises:
        CheckpointError: If the adapter is not LoRA, is damaged or does not fit the model.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: str) -> None:
        self.checkpoint = checkpoint
        self.name = f"{checkpoint.name}+{adapter}"
        self.adapter = resolve_folder(adapter)
        config = read_json(
            self.adapter / ADAPTER_CONFIG_FILE, f"{adapter}: {ADAPTER_CONFIG_FILE}"
        )
        check_plain_lora(config, adapter)
        if not (self.adapter / ADAPTER_WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{adapter}: the folder has no {ADAPTER_WEIGHTS_FILE}; "
                "save the adapter as safetensors"
            )
        adapter_headers = read_header(shard_path(self.adapter, ADAPTER_WEIGHTS_FILE))
        self._shards = Shards(adapter, adapter_headers, checkpoint.shards.allow_nan)
        matcher = AdapterMatcher(
            config=config,
            shards=self._shards,
            names=ModelNames(checkpoint, adapter),
        )
        self._factors, self._replacements = matcher.match()
        # Stored tensor -> the stored tensors that the adapter changes together with it, because
        # in memory they are other tensors.
        self._packed: dict[str, Packed] = {}
        for name in (*self._factors, *self._replacements):
            packed = matcher.names.packed(name)
            if packed is not None:
                self._packed |= dict.fromkeys(packed.stored, packed)
        # Tensors that the model ties, once the adapter makes them differ: name -> the stored
        # tensor whose values they have without the adapter.
        self._separated: dict[str, str] = {}
        for group in matcher.tied_groups():
            if self._differ(group):
                self._separated |= group
        if self._separated:
            self._separated |= matcher.names.all_tied()
        self._resized = self._find_resized()

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.checkpoint.folder

    @property
    def weight_folders(self) -> tuple[Path, ...]:
        """The folders whose files hold the weights: the model's, and the adapter's."""
        return (self.checkpoint.folder, self.adapter)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the adapter if it holds a tokenizer of its own, else the model's."""
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if any((self.adapter / name).is_file() for name in names):
            return self.adapter
        return self.checkpoint.tokenizer_folder

    @cached_property
    def config(self) -> JsonObject:
        """config.json of the model, without tied embeddings if the adapter unties them.

        `vocab_size` is that of the adapter if it brings embeddings of more or fewer tokens.
        """
        config = self.checkpoint.config
        if self._separated:
            config = untied_config(config)
        if self.resized is not None:
            config = with_vocab_size(config, self.resized)
        return config

    @property
    def resized(self) -> int | None:
        """The number of tokens if the adapter changes it; else None."""
        return next(iter(self._resized.values()), None)

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Tensor name -> header entry: those of the model, and of tensors that were tied."""
        own_headers = self.checkpoint.headers
        headers = dict(own_headers)
        for name, stored_name in self._separated.items():
            headers.setdefault(name, own_headers[stored_name])
        for name, n_rows in self._resized.items():
            if name in headers:
                shape = (n_rows, *headers[name].shape[1:])
                headers[name] = replace(headers[name], shape=shape)
        return headers

    @cached_property
    def architecture(self) -> Architecture:
        """What the names of the tensors say about the network."""
        if not self._separated and not self._resized:
            return self.checkpoint.architecture
        architecture = Architecture.infer(self.headers, self.config)
        return replace(architecture, separated=frozenset(self._separated))

    @property
    def dtype(self) -> str:
        """The dtype of most of the model's float tensors, as torch names it."""
        return self.checkpoint.dtype

    def operand(self, name: str) -> Operand:
        """Return the tensor, to be read a few rows at a time."""
        packed = self._packed.get(name)
        if packed is None:
            stored = self.checkpoint.operand(self._separated.get(name, name))
            return self._adapted(name, stored)
        index = packed.stored.index(name)
        return GatheredTensor(
            shape=packed.moves.stored_shapes[index],
            dtype=self.checkpoint.headers[name].dtype,
            parts=self._loaded_operands(packed),
            moves=packed.moves,
            index=index,
            is_loaded=False,
        )

    def _loaded_operands(self, packed: Packed) -> tuple[Operand, ...]:
        """Tensors as they are in memory, with the adapter."""
        stored = tuple(self.checkpoint.operand(name) for name in packed.stored)
        operands = []
        for index, name in enumerate(packed.loaded):
            loaded = GatheredTensor(
                shape=packed.moves.loaded_shapes[index],
                dtype=stored[0].dtype,
                parts=stored,
                moves=packed.moves,
                index=index,
                is_loaded=True,
            )
            operands.append(self._adapted(name, loaded))
        return tuple(operands)

    def _adapted(self, name: str, stored: Operand) -> Operand:
        """A tensor of the model as the adapter changes it."""
        if name in self._replacements:
            stored = self._shards.stored(self._replacements[name])
        if name in self._factors:
            return AdaptedTensor(stored, self._factors[name])
        return stored

    def _find_resized(self) -> dict[str, int]:
        """Embeddings and heads whose number of tokens the adapter changes: name -> rows.

        Raises:
            CheckpointError: If it changes some of them only.
        """
        stored = self.checkpoint.headers
        resized = {}
        for name, key in self._replacements.items():
            shape = self._shards.headers[key].shape
            old = stored.get(self._separated.get(name, name))
            if old is not None and old.shape != shape:
                resized[name] = shape[0]
        architecture = self.checkpoint.architecture
        for name in (*stored, *self._separated):
            header = stored[self._separated.get(name, name)]
            axis = architecture.vocabulary_axis(name, header.shape)
            if axis is None or not resized:
                continue
            n_rows = resized.get(name, header.shape[axis])
            if n_rows != next(iter(resized.values())):
                other = next(iter(resized))
                raise CheckpointError(
                    f"{self.name}: the adapter brings {resized[other]} tokens for {other}, but "
                    f"{name} has {n_rows}, and peft does not store those that were added to it; "
                    "merge it into the resized model with peft first"
                )
        return resized

    def _differ(self, group: Mapping[str, str]) -> bool:
        """Whether the adapter gives tied tensors values that are not the same for all."""
        first, *others = group
        return not all(self._has_same_changes(first, other) for other in others)

    def _has_same_changes(self, name: str, other: str) -> bool:
        key, other_key = self._replacements.get(name), self._replacements.get(other)
        factors, other_factors = self._factors.get(name), self._factors.get(other)
        if (key is None) != (other_key is None):
            return False
        if (factors is None) != (other_factors is None):
            return False
        has_same_factors = True
        # Embeddings and heads, which are all that models tie, are single matrices.
        if isinstance(factors, Factors) and isinstance(other_factors, Factors):
            has_same_factors = factors.is_equal(other_factors)
        if key is None or other_key is None:
            return has_same_factors
        return has_same_factors and self._is_equal(key, other_key)

    def _is_equal(self, key: str, other_key: str) -> bool:
        """Whether two tensors of the adapter hold the same values."""
        if key == other_key:
            return True
        tensor = self._shards.stored(key).read()
        return tensor.equal(self._shards.stored(other_key).read())

    def check_unchanged(self) -> None:
        """Check that every file is still the one whose header was read.

        Raises:
            CheckpointError: If a file was changed, replaced or removed.
        """
        self.checkpoint.check_unchanged()
        self._shards.check_unchanged()
