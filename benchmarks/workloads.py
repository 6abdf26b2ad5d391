"""What `benchmarks.merge` starts besides the two tools: checkpoints, a floor, copies in memory.

    python -m benchmarks.workloads make FOLDER 0.5             # base and three fine-tunes
    python -m benchmarks.workloads floor OUT MODEL...          # the least that a merge must do
    python -m benchmarks.workloads in-place THREADS [MODEL...] # prints JSON

Each imports torch, and is a process of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.merging.block import Inputs
from paretomerge.merging.methods import METHODS

MODELS = ("base", "a", "b", "c")
FILE = "model.safetensors"
SEED = 0
# Share of a fine-tune's entries that training left alone; rounding to bfloat16 adds to it.
UNCHANGED = 0.2
BLOCK = 1 << 18
SQUARE = 4096  # 16.8 million entries
VOCABULARY = 151_936

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A Qwen2 decoder with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, in the file's order."""
        hidden, intermediate = self.hidden, self.intermediate
        key_value = hidden // self.heads * self.key_value_heads
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "self_attn.o_proj.weight": (hidden, hidden),
        }
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value)):
            layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCABULARY, hidden),
            "model.norm.weight": (hidden,),
        }
        for i in range(self.layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{i}.{name}"] = shape
        return dict(sorted(shapes.items()))

    def config(self) -> dict[str, object]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": True,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }


SHAPES = {"0.5": Shape(24, 896, 4864, 14, 2), "2": Shape(28, 1792, 10240, 14, 2)}
"""Billions of parameters -> shape."""

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
}


# ----- checkpoints


def make(folder: Path, size: str) -> None:
    """Write the four checkpoints block by block, with weights of a trained model's scale."""
    shape = SHAPES[size]
    generator = torch.Generator().manual_seed(SEED)
    with ExitStack() as stack:
        files = []
        for model in MODELS:
            write_config(folder / model, shape)
            file = stack.enter_context((folder / model / FILE).open("wb"))
            file.write(header(shape.tensors()))
            files.append(file)
        for name, sides in shape.tensors().items():
            n = torch.Size(sides).numel()
            for blocks in fine_tunes(name, n, generator):
                for file, block in zip(files, blocks, strict=True):
                    file.write(raw(block))


def write_config(folder: Path, shape: Shape) -> None:
    """Write all of a checkpoint but its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER) + "\n")
    tokenizer_config = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    (folder / "tokenizer_config.json").write_text(tokenizer_config)


def header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors header for bfloat16 tensors that follow each other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, sides in tensors.items():
        end = start + 2 * torch.Size(sides).numel()
        entries[name] = {
            "dtype": "BF16",
            "shape": list(sides),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fine_tunes(
    name: str, n: int, generator: torch.Generator
) -> Iterator[list[torch.Tensor]]:
    """Blocks of one tensor of n entries: the base's, then each fine-tune's.

    A fine-tune is the base and a small normal delta, a share of which is exactly 0.
    """
    centre, spread, moved = distribution(name)
    u = torch.rand(len(MODELS) - 1, generator=generator)
    scales = moved * torch.exp2(u * 2 - 1)
    for start in range(0, n, 16 * BLOCK):
        size = (min(16 * BLOCK, n - start),)
        base = torch.randn(size, generator=generator)
        base = base.mul_(spread).add_(centre).bfloat16()
        blocks = [base]
        for scale in scales.tolist():
            delta = torch.randn(size, generator=generator).mul_(scale)
            delta *= torch.rand(size, generator=generator) >= UNCHANGED
            blocks.append(delta.add_(base).bfloat16())
        yield blocks


def distribution(name: str) -> tuple[float, float, float]:
    """Mean and standard deviation of a tensor's entries, and scale of a fine-tune's delta."""
    if "norm" in name:
        return 1.0, 0.1, 0.01
    if "bias" in name:
        return 0.0, 0.5, 0.01
    return 0.0, 0.02, 3e-4


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.view(torch.uint8).numpy().data


# ----- the floor


def floor(out: Path, models: list[Path]) -> None:
    """Read every input, sum in float32 block by block, write one output; nothing else."""
    opened = [safe_open(model / FILE, framework="pt") for model in models]
    shapes = {}
    for name in opened[0].offset_keys():
        shapes[name] = tuple(opened[0].get_slice(name).get_shape())
    out.mkdir(parents=True)
    total = torch.empty(BLOCK)
    with (out / FILE).open("wb", buffering=0) as file:
        file.write(header(shapes))
        for name in shapes:
            tensors = [checkpoint.get_tensor(name).view(-1) for checkpoint in opened]
            for start in range(0, tensors[0].numel(), BLOCK):
                end = start + BLOCK
                first, *rest = (tensor[start:end] for tensor in tensors)
                block = total[: first.numel()].copy_(first)
                for other in rest:
                    block.add_(other)
                file.write(raw(block.bfloat16()))


# ----- in memory


def in_place(threads: int, models: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds per set of tensors: of `copy`, and of each warm merge.

    `copy` copies base, sources and output, byte for byte.
    """
    torch.set_num_threads(threads)
    seconds = {f"{SQUARE} x {SQUARE}": timed(random_matrices())}
    if models:
        sizes = [(model / FILE).stat().st_size for model in models]
        # Base, sources and output, each with a copy.
        needed = 2 * (len(models) + 1) * statistics.mean(sizes)
        if needed < 0.8 * available_memory():
            seconds["whole model"] = timed([in_memory(model) for model in models])
    return seconds


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if "MemAvailable" in line:
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def random_matrices() -> list[Tensors]:
    """One square matrix of the base and of each fine-tune."""
    generator = torch.Generator().manual_seed(SEED)
    pieces = list(fine_tunes("weight", SQUARE * SQUARE, generator))
    models = []
    for i in range(len(MODELS)):
        entries = torch.cat([blocks[i] for blocks in pieces])
        models.append({"weight": entries.view(SQUARE, SQUARE)})
    return models


def in_memory(model: Path) -> Tensors:
    """The weights of a checkpoint, in memory of their own rather than mapped."""
    with safe_open(model / FILE, framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name).clone() for name in names}


def timed(models: list[Tensors]) -> dict[str, float]:
    """Median seconds of each piece of work; the base's tensors come first."""
    live = zeros_like(models[0])
    work: dict[str, Callable[[], None]] = {}
    work["copy"] = copier([*models, live])
    for method in ("task_arithmetic", "ties", "dare_ties"):
        work[method] = partial(merge_into, live, models, method)
    return {name: median_seconds(action) for name, action in work.items()}


def zeros_like(model: Tensors) -> Tensors:
    """Tensors of the same shapes and types."""
    return {name: torch.zeros_like(tensor) for name, tensor in model.items()}


def copier(models: list[Tensors]) -> Callable[[], None]:
    """A function that copies all tensors into memory that is there already."""
    targets = [zeros_like(model) for model in models]

    def copy() -> None:
        for model, target in zip(models, targets, strict=True):
            for name, tensor in model.items():
                target[name].copy_(tensor)

    return copy


def merge_into(live: Tensors, models: list[Tensors], method: str) -> None:
    """Merge all tensors into `live`, block by block."""
    density = 1.0 if method == "task_arithmetic" else 0.5
    parameters = [{"weight": 0.4, "density": density}] * (len(models) - 1)
    options = {"lambda": 1.0, "normalize": False, "rescale": method.startswith("dare")}
    with torch.inference_mode():
        for name, base in models[0].items():
            sources = [InMemoryTensor(model[name]) for model in models[1:]]
            shape = tuple(base.shape)
            inputs = Inputs(
                name, shape, InMemoryTensor(base), sources, parameters, options
            )
            merge_block = METHODS[method].function(inputs)
            flat = live[name].view(-1)
            for block in inputs.blocks():
                end = block.start + block.numel
                merged = merge_block(block).view(-1)
                flat[block.start : end] = merged.to(flat.dtype)


def median_seconds(action: Callable[[], None], repeat: int = 7) -> float:
    """Median over the calls but the first, which warms."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("folder", type=Path)
    command.add_argument("size", choices=SHAPES)
    command = commands.add_parser("floor")
    command.add_argument("out", type=Path)
    command.add_argument("models", type=Path, nargs="+")
    command = commands.add_parser("in-place")
    command.add_argument("threads", type=int)
    command.add_argument("models", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, arguments.size)
    elif arguments.command == "floor":
        floor(arguments.out, arguments.models)
    else:
        print(json.dumps(in_place(arguments.threads, arguments.models)))


if __name__ == "__main__":
    main()
