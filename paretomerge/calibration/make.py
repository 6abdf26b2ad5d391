"""Make a folder of statistics: which models read which texts, and what is measured."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.arguments import describe, flag, integer, optional, sequence_of
from paretomerge.arguments import model as read_model
from paretomerge.arguments import number as read_number
from paretomerge.arguments import path as read_path
from paretomerge.calibration.text import (
    Example,
    TextReader,
    Tokens,
    make_batches,
    read_examples,
    tokens_digest,
)
from paretomerge.checkpoint.digest import digest_of_weights
from paretomerge.checkpoint.writer import (
    TensorSpec,
    WeightsWriter,
    check_not_current,
    new_folder,
)
from paretomerge.errors import (
    CheckpointError,
    ConfigError,
    ErrorCollector,
    shorten,
    unknown_name,
)
from paretomerge.merging.statistics import (
    MANIFEST_FILE,
    STATISTIC_KINDS,
    Manifest,
    SourceEntry,
    StatisticFile,
    StatisticKind,
    TensorEntry,
    ThroughMerge,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from paretomerge.calibration.inputs import SharedInput
    from paretomerge.merging.live.in_place import ResidentModel

DEFAULT_EXAMPLES = 256
DEFAULT_TOKENS = 512
DEFAULT_ALPHA = 0.9
_MEMORY = 4 << 30
_ONE_FILE = 1 << 62

# Two texts that differ in their last token.
_PROBE = ((3, 5, 7, 4, 6, 8), (3, 5, 7, 4, 6, 9))
_PROBE_TOLERANCE = 1e-5  # relative, in float32

CalibrationText = str | Path | Sequence[Example]
"""The text of one model: a file, see `read_examples`, or examples."""


def calibrate(  # noqa: PLR0913 - the options of a calibration, all with a default
    base: str,
    models: Sequence[str],
    data: Mapping[str, CalibrationText],
    out: str | Path,
    *,
    kinds: Sequence[StatisticKind] = ("regmean",),
    examples: int = DEFAULT_EXAMPLES,
    max_tokens: int = DEFAULT_TOKENS,
    batch_size: int = 8,
    alpha: float = DEFAULT_ALPHA,
    add_bos_token: bool | None = None,
    memory: int = _MEMORY,
    device: str = "cpu",
    overwrite: bool = False,
    origin: str = "",
    on_progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Measure statistics of models on text, for the methods `regmean`, `regmean_pp` and `fisher`.

    The folder appears whole or not at all. A recipe names it as `calibration: FOLDER`.

    Args:
        base: The model that the others were fine-tuned from.
        models: The fine-tunes.
        data: Each model of `models` -> its text.
        out: The folder to create.
        kinds: What to measure. `regmean_pp` merges the models layer by layer while it measures, all
            with one weight.
        examples: How many examples each model reads at most; they are spread over its text.
        max_tokens: The longest example.
        batch_size: Examples in one forward pass.
        alpha: Of `regmean_pp`: the factor of the entries off the diagonal.
        add_bos_token: Whether texts begin with the token that begins a sequence. By default as the
            tokenizer does it.
        memory: Bytes that statistics may take in memory at a time. With less, the text is read more
            often.
        device: `cpu`, `cuda` or `cuda:N`.
        overwrite: Whether to replace statistics in `out`.
        origin: A note of what the texts are, for the manifest.
        on_progress: Receives what is done, as text.

    Returns:
        The folder.

    Raises:
        ConfigError: A model has no text, or an argument is wrong.
        CheckpointError: A model cannot be read, or `out` cannot be written.

    Example:
        >>> from paretomerge.calibration import calibrate
        >>> data = {"./math": "math.jsonl", "./code": "code.jsonl"}
        >>> calibrate("./base", ["./math", "./code"], data, "statistics")  # doctest: +SKIP
        PosixPath('statistics')
    """
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    _check_kinds(kinds)
    texts = calibration_texts(models, data)
    _check_target(folder, overwrite)
    options = _Options(
        base=read_model("base", base),
        kinds=tuple(dict.fromkeys(kinds)),
        examples=integer(1)("examples", examples),
        max_tokens=integer(2)("max_tokens", max_tokens),
        batch_size=integer(1)("batch_size", batch_size),
        alpha=_share("alpha", alpha),
        add_bos_token=optional(flag)("add_bos_token", add_bos_token),
        memory=integer(1)("memory", memory),
        device=device,
        origin=origin,
        on_progress=on_progress,
    )
    with new_folder(folder, overwrite) as new:
        _Calibration(options, new).write(texts)
    return folder


def _check_kinds(kinds: Sequence[StatisticKind]) -> None:
    if not kinds or isinstance(kinds, str):
        raise ConfigError(
            f"kinds: list at least one of {', '.join(STATISTIC_KINDS)}, not {kinds!r}"
        )
    for kind in kinds:
        if kind not in STATISTIC_KINDS:
            raise ConfigError(f"kinds: {unknown_name('kind', kind, STATISTIC_KINDS)}")


def _share(name: str, value: float) -> float:
    share: float = read_number(name, value)
    if not 0 <= share <= 1:
        raise ConfigError(f"{name}: expected a number from 0 to 1, got {share:g}")
    return share


def calibration_texts(
    models: Sequence[str], data: Mapping[str, CalibrationText]
) -> dict[str, Sequence[Example]]:
    """The examples of each model.

    Args:
        models: The models.
        data: Model -> its text.

    Returns:
        Model -> its examples, in the order of the models.

    Raises:
        ConfigError: A model has no text, or a text is of no model.
    """
    models = sequence_of(read_model, "['./math', './code']")("models", models)
    if not models:
        raise ConfigError("models: list the fine-tunes, such as ['./math', './code']")
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"data: expected {{'./math': 'math.jsonl'}}, got {describe(data)}"
        )
    data = {read_model("data", name): text for name, text in data.items()}
    errors = ErrorCollector()
    for name in data:
        with errors.collect():
            if name not in models:
                raise ConfigError(f"data: {unknown_name('model', name, models)}")
    texts: dict[str, Sequence[Example]] = {}
    for model in dict.fromkeys(models):
        with errors.collect():
            text = data.get(model, ())
            if isinstance(text, str | Path):
                text = read_examples(text)
            _check_examples(model, text)
            if not text:
                raise ConfigError(
                    f"data: {model} has no text; give some of what it was trained for"
                )
            texts[model] = text
    errors.raise_if_any()
    return texts


def _check_examples(model: str, text: object) -> None:
    """Refuse a list of anything but examples, such as of plain text."""
    if not isinstance(text, Sequence) or not all(
        isinstance(one, Example) for one in text
    ):
        raise ConfigError(
            f"data: {model}: expected a file or a list of examples, such as "
            f'[Example("4", prompt="2 + 2 = ")], got {shorten(text)}'
        )


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse to replace anything but statistics."""
    check_not_current(folder)
    if overwrite and folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST_FILE).is_file():
            raise CheckpointError(
                f"{folder}: holds no statistics (no {MANIFEST_FILE}), and would be lost; name a "
                "new folder, or remove this one yourself"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists and is not an empty folder; choose another, or replace statistics "
            "with --overwrite (in Python: overwrite=True)"
        )


@dataclass(frozen=True)
class _Options:
    """The options of `calibrate`."""

    base: str
    kinds: tuple[StatisticKind, ...]
    examples: int
    max_tokens: int
    batch_size: int
    alpha: float
    add_bos_token: bool | None
    memory: int
    device: str
    origin: str
    on_progress: Callable[[str], None]


@dataclass(frozen=True)
class _Calibration:
    """Makes the files of one folder."""

    options: _Options
    folder: Path

    def write(self, texts: Mapping[str, Sequence[Example]]) -> None:
        """Measure and write everything.

        Args:
            texts: Model -> its examples.
        """
        from paretomerge.merging.plan.make import open_weights

        opened = open_weights((self.options.base, *texts))
        digests = {}
        for model, weights in opened.items():
            digests[model] = digest_of_weights(weights.weight_folders)
        tokens: dict[str, list[Tokens]] = {}
        statistics: dict[str, dict[str, StatisticFile]] = {}
        for number, (model, examples) in enumerate(texts.items()):
            live = load_source(model, self.options.device)
            tokens[model] = self._read(live, model, examples)
            statistics[model] = {}
            name = _file_name(model, number)
            if "regmean" in self.options.kinds:
                self.options.on_progress(f"{model}: inputs of its layers")
                file = self._write_inputs(live, model, tokens[model], name)
                statistics[model]["regmean"] = file
                self._tell_without(live, model, "regmean", file)
            if "fisher" in self.options.kinds:
                self.options.on_progress(f"{model}: squared gradients")
                file = self._write_squares(live, model, tokens[model], name)
                statistics[model]["fisher"] = file
                self._tell_without(live, model, "fisher", file)
        through_merge = None
        if "regmean_pp" in self.options.kinds:
            base_digest = digests[self.options.base]
            through_merge = ThroughMerge(self.options.alpha, base_digest)
            for model, file in self._write_through_merge(tokens).items():
                statistics[model]["regmean_pp"] = file
        for weights in opened.values():
            weights.check_unchanged()
        entries = []
        for model, of_model in tokens.items():
            entry = SourceEntry(
                name=model,
                digest=digests[model],
                data=tokens_digest(of_model),
                examples=len(of_model),
                tokens=sum(len(example.ids) for example in of_model),
                statistics=statistics[model],
            )
            entries.append(entry)
        manifest = Manifest(tuple(entries), through_merge, self.options.origin)
        manifest.write(self.folder)

    def _tell_without(
        self, live: "ResidentModel", model: str, kind: str, file: StatisticFile
    ) -> None:
        """Tell the user which matrices have no statistics, such as packed experts."""
        from paretomerge.merging.plan.calibration import averaged_text, is_layer_matrix

        checkpoint = live.checkpoints[model]
        without = []
        for tensor, header in checkpoint.headers.items():
            is_matrix = is_layer_matrix(checkpoint.architecture, tensor, header.shape)
            if is_matrix and tensor not in file.tensors:
                without.append(tensor)
        if without:
            self.options.on_progress(f"{model}: {kind}: {averaged_text(without)}")

    def _read(
        self, live: "ResidentModel", model: str, examples: Sequence[Example]
    ) -> list[Tokens]:
        return read_tokens(
            live,
            model,
            examples,
            self.options.examples,
            self.options.max_tokens,
            self.options.add_bos_token,
        )

    def _write_inputs(
        self, live: "ResidentModel", model: str, tokens: Sequence[Tokens], name: str
    ) -> StatisticFile:
        from paretomerge.calibration.inputs import (
            find_shared_inputs,
            linear_layers,
            measure_inputs,
        )

        network = live.model
        batches = make_batches(
            tokens, self.options.batch_size, _pad(network), self.options.device
        )
        layers = linear_layers(network, list(live.checkpoints[model].headers))

        def forward(batch: object) -> object:
            return network(**batch.model_inputs())  # type: ignore[attr-defined]

        inputs = find_shared_inputs(layers, batches[-1], forward)
        _check_found(model, inputs)
        measured = measure_inputs(inputs, batches, forward, self.options.memory)
        pairs = ((shared.first.tensor, gram) for shared, gram in measured)
        return write_grams(self.folder, f"{name}.regmean", inputs, pairs)

    def _write_squares(
        self, live: "ResidentModel", model: str, tokens: Sequence[Tokens], name: str
    ) -> StatisticFile:
        from paretomerge.calibration.gradients import (
            measure_squares,
            trained_parameters,
        )

        parameters = trained_parameters(
            live.model, list(live.checkpoints[model].headers)
        )
        specs = []
        for tensor, parameter in parameters.items():
            specs.append(TensorSpec(tensor, "float32", tuple(parameter.shape)))
        total = 0.0

        def measured() -> "Iterable[tuple[str, Tensor]]":
            nonlocal total
            for tensor, squares in measure_squares(
                live.model, parameters, tokens, self.options.memory
            ):
                total += float(squares.double().square().sum())
                yield tensor, squares

        file = write_tensors(self.folder, f"{name}.fisher", specs, measured())
        if not total > 0:
            raise ConfigError(
                f"data: {model} has no gradient on its text; give some of what it was trained for"
            )
        entries = {tensor: TensorEntry(tensor) for tensor in parameters}
        return StatisticFile(file, entries, total**0.5)

    def _write_through_merge(
        self, tokens: Mapping[str, Sequence[Tokens]]
    ) -> dict[str, StatisticFile]:
        from paretomerge.calibration.through_merge import MergeWalk
        from paretomerge.merging.engine import usable_device

        options = self.options
        device = usable_device(options.device)
        batches = {}
        for model, of_model in tokens.items():
            # Padding is masked, so that any token will do.
            batches[model] = make_batches(of_model, options.batch_size, 0, device)
        options.on_progress("all models: layer by layer through the merge")
        walk = MergeWalk(options.base, batches, options.alpha, device)
        _check_found(options.base, walk.inputs)
        specs, entries = gram_entries(walk.inputs)
        files = {}
        with ExitStack() as stack:
            writers = {}
            for number, model in enumerate(tokens):
                # Each writer gives its file the same name.
                parts = self.folder / f"part-{number}"
                parts.mkdir()
                writer = WeightsWriter(parts, specs, _ONE_FILE)
                writers[model] = stack.enter_context(writer)
            for measured in walk.measure():
                for model, gram in measured.grams.items():
                    writers[model].write(measured.shared.first.tensor, 0, gram)
            for number, (model, writer) in enumerate(writers.items()):
                file = f"{_file_name(model, number)}.regmean_pp.safetensors"
                _rename(writer, self.folder / f"part-{number}", self.folder / file)
                (self.folder / f"part-{number}").rmdir()
                own = {}
                for tensor, entry in entries.items():
                    own[walk.name_in_source(model, tensor)] = entry
                files[model] = StatisticFile(file, own)
        return files


def load_source(model: str, device: str) -> "ResidentModel":
    """Load a model, with its adapter if it has one, in float32.

    Args:
        model: The model, as recipes name it.
        device: Where it is loaded.

    Returns:
        The live model.

    Raises:
        CheckpointError: It cannot be loaded, or does not write text from left to right.
    """
    from paretomerge.merging.engine import usable_device
    from paretomerge.merging.live.in_place import ResidentModel
    from paretomerge.recipe import Recipe, Slice, Source

    live = ResidentModel(
        model,
        (model,),
        dtype="float32",
        device=usable_device(device),
        sources_on_device=False,
    )
    config = live.model.config
    if not live.model.can_generate() or config.is_encoder_decoder:
        raise CheckpointError(
            f"{model}: expected a model that writes text from left to right, got "
            f"{type(live.model).__name__}; statistics of others are not measured"
        )
    if live.tokenizer is None:
        raise CheckpointError(
            f"{model}: has no tokenizer, which reading text needs; copy its files, such as "
            "tokenizer.json, into the folder"
        )
    # An adapter is not loaded by transformers, but by a merge.
    live.load(Recipe("passthrough", (Slice((Source(model),)),)))
    _check_left_to_right(live.model, model)
    return live


def _check_left_to_right(network: "PreTrainedModel", model: str) -> None:
    """Refuse an encoder, such as BERT: its predictions of a token read that token.

    transformers loads encoders as language models, too, so a text shows what they are: a later
    token must not change what comes before it.
    """
    import torch

    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.tensor(_PROBE, device=network.device) % vocabulary
    with torch.no_grad():
        one, other = network(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if bool((one - other).abs().max() > _PROBE_TOLERANCE * one.abs().max()):
        raise CheckpointError(
            f"{model}: expected a model that writes text from left to right, got a "
            f"{type(network).__name__} whose tokens see later ones; statistics of encoders are "
            "not measured"
        )


def read_tokens(
    live: "ResidentModel",
    model: str,
    examples: Sequence[Example],
    most: int = DEFAULT_EXAMPLES,
    max_tokens: int = DEFAULT_TOKENS,
    add_bos_token: bool | None = None,
) -> list[Tokens]:
    """The tokens of a model's examples.

    Args:
        live: The model.
        model: Its name, for messages.
        examples: The text.
        most: How many examples at most.
        max_tokens: The longest example.
        add_bos_token: See `TextReader`.

    Returns:
        The tokens.

    Raises:
        ConfigError: The text has no example of two tokens or more.
    """
    assert live.tokenizer is not None
    config = live.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or max_tokens
    reader = TextReader(live.tokenizer, min(max_tokens, longest), add_bos_token)
    tokens = reader.read(examples, most)
    if not tokens:
        raise ConfigError(
            f"data: the text of {model} has no example of two tokens or more"
        )
    return tokens


def _pad(model: "PreTrainedModel") -> int:
    """A token that fills up examples; which one does not matter, as it is masked."""
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _check_found(model: str, inputs: Sequence["SharedInput"]) -> None:
    if not inputs:
        raise CheckpointError(
            f"{model}: has no linear layers of its own to measure; its layers are packed, or "
            "transformers changes them when it loads them"
        )


def write_grams(
    folder: Path,
    name: str,
    inputs: Sequence["SharedInput"],
    measured: Iterable[tuple[str, "Tensor"]],
) -> StatisticFile:
    """Write one G for each input.

    Args:
        folder: The folder.
        name: The name of the file, without its ending.
        inputs: The inputs.
        measured: Name of the first layer's weight of each input, and G.

    Returns:
        Where they are.
    """
    specs, entries = gram_entries(inputs)
    file = write_tensors(folder, name, specs, measured)
    return StatisticFile(file, entries)


def gram_entries(
    inputs: Sequence["SharedInput"],
) -> tuple[list[TensorSpec], dict[str, TensorEntry]]:
    """The tensors of a file with one G for each input, and which layers have which."""
    specs = []
    entries: dict[str, TensorEntry] = {}
    for shared in inputs:
        first = shared.first
        specs.append(TensorSpec(first.tensor, "float32", (first.inputs, first.inputs)))
        for layer in shared.layers:
            entries[layer.tensor] = TensorEntry(first.tensor, layer.of_rows)
    return specs, entries


def write_tensors(
    folder: Path,
    name: str,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, "Tensor"]],
) -> str:
    """Write tensors as they come.

    Args:
        folder: The folder.
        name: The name of the file, without its ending.
        specs: All tensors.
        tensors: Name and values, in any order.

    Returns:
        The name of the file.
    """
    with WeightsWriter(folder, specs, _ONE_FILE) as writer:
        for tensor, values in tensors:
            writer.write(tensor, 0, values)
        file = f"{name}.safetensors"
        _rename(writer, folder, folder / file)
    return file


def _rename(writer: WeightsWriter, folder: Path, file: Path) -> None:
    """Give a finished file its name; the writer gives it that of a checkpoint."""
    (written,) = writer.checksums()
    (folder / written).rename(file)


def _file_name(model: str, number: int) -> str:
    """A name for the files of a model, which its place among the models makes unique."""
    last_part = Path(model).name
    readable = re.sub(r"[^\w-]", "_", last_part)[:40]
    return f"{number}-{readable}"
