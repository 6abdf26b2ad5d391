"""What `benchmarks/merge.py` starts besides the two tools: random checkpoints, the floor of a merge, copies in memory.

    python benchmarks/workloads.py make FOLDER 0.5             # base and three fine-tunes
    python benchmarks/workloads.py floor OUT MODEL...          # the least that a merge to disk must do
    python benchmarks/workloads.py in-place THREADS [MODEL...] # prints JSON

Each imports torch, and is a process of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.merging.block import Inputs
from paretomerge.merging.methods import METHODS

MODELS = ("base", "a", "b", "c")
SEED = 0
EQUAL = (
    0.2  # share of a fine-tune's entries that training left alone; rounding to bfloat16 adds to it
)
BLOCK = 1 << 18
SQUARE = 4096  # 16.8 million elements
VOCABULARY = 151_936
FILE = "model.safetensors"


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
        d, k = self.hidden, self.hidden // self.heads * self.key_value_heads
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
        }
        layer |= {
            "mlp.gate_proj.weight": (self.intermediate, d),
            "mlp.up_proj.weight": (self.intermediate, d),
        }
        layer |= {"mlp.down_proj.weight": (d, self.intermediate), "self_attn.o_proj.weight": (d, d)}
        for name, rows in (("q", d), ("k", k), ("v", k)):
            layer |= {
                f"self_attn.{name}_proj.weight": (rows, d),
                f"self_attn.{name}_proj.bias": (rows,),
            }
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCABULARY, d),
            "model.norm.weight": (d,),
        }
        found |= {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        return dict(sorted(found.items()))

    def config(self) -> dict[str, Any]:
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
        }
        heads = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": VOCABULARY,
        }
        kind = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": True,
        }
        return {
            **kind,
            **sizes,
            **heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }


SHAPES = {"0.5": Shape(24, 896, 4864, 14, 2), "2": Shape(28, 1792, 10240, 14, 2)}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
}


def make(folder: Path, size: str) -> None:
    """Write the four checkpoints side by side, block by block, with random weights of a trained model's scale."""
    shape = SHAPES[size]
    generator = torch.Generator().manual_seed(SEED)
    with ExitStack() as stack:
        files = []
        for model in MODELS:
            (folder / model).mkdir(parents=True)
            (folder / model / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
            (folder / model / "tokenizer.json").write_text(json.dumps(TOKENIZER) + "\n")
            (folder / model / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
            )
            files.append(stack.enter_context((folder / model / FILE).open("wb")))
            files[-1].write(header(shape.tensors()))
        for name, sides in shape.tensors().items():
            for blocks in fine_tunes(name, torch.Size(sides).numel(), generator):
                for file, block in zip(files, blocks, strict=True):
                    file.write(raw(block))


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors header for bfloat16 tensors that follow each other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, sides in tensors.items():
        end = start + 2 * torch.Size(sides).numel()
        entries[name] = {"dtype": "BF16", "shape": list(sides), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fine_tunes(name: str, n: int, generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    """Blocks of one tensor: the base's, and for each fine-tune base + a small normal delta, a share of it exactly 0."""
    centre, spread, moved = (
        (1.0, 0.1, 0.01)
        if "norm" in name
        else (0.0, 0.5, 0.01)
        if "bias" in name
        else (0.0, 0.02, 3e-4)
    )
    scales = moved * torch.exp2(torch.rand(len(MODELS) - 1, generator=generator) * 2 - 1)
    for start in range(0, n, 16 * BLOCK):
        size = (min(16 * BLOCK, n - start),)
        base = torch.randn(size, generator=generator).mul_(spread).add_(centre).bfloat16()
        blocks = [base]
        for scale in scales.tolist():
            delta = torch.randn(size, generator=generator).mul_(scale)
            delta *= torch.rand(size, generator=generator) >= EQUAL
            blocks.append(delta.add_(base).bfloat16())
        yield blocks


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def floor(out: Path, models: list[Path]) -> None:
    """Read every input, sum in float32 block by block, write one output; nothing else."""
    opened = [safe_open(model / FILE, framework="pt") for model in models]
    shapes = {
        name: tuple(opened[0].get_slice(name).get_shape()) for name in opened[0].offset_keys()
    }
    out.mkdir(parents=True)
    total = torch.empty(BLOCK)
    with (out / FILE).open("wb", buffering=0) as file:
        file.write(header(shapes))
        for name in shapes:
            tensors = [one.get_tensor(name).view(-1) for one in opened]
            for start in range(0, tensors[0].numel(), BLOCK):
                first, *rest = (tensor[start : start + BLOCK] for tensor in tensors)
                block = total[: first.numel()].copy_(first)
                for other in rest:
                    block.add_(other)
                file.write(raw(block.bfloat16()))


def in_place(threads: int, models: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds per set of tensors: `copy` (base, sources and output, byte for byte) and each warm re-merge."""
    torch.set_num_threads(threads)
    found = {f"{SQUARE} x {SQUARE}": timed(random_set())}
    if models:
        needed = (
            2
            * (len(models) + 1)
            * sum((model / FILE).stat().st_size for model in models)
            / len(models)
        )
        if needed < 0.8 * available():
            found["whole model"] = timed([in_memory(model) for model in models])
    return found


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if "MemAvailable" in line
    )


def random_set() -> list[dict[str, torch.Tensor]]:
    """One square matrix of the base and of each fine-tune."""
    generator = torch.Generator().manual_seed(SEED)
    pieces = list(fine_tunes("weight", SQUARE * SQUARE, generator))
    return [
        {"weight": torch.cat([blocks[i] for blocks in pieces]).view(SQUARE, SQUARE)}
        for i in range(len(MODELS))
    ]


def in_memory(model: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, in memory of their own rather than mapped."""
    with safe_open(model / FILE, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def timed(models: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Median seconds of each piece of work on one set: the base's tensors first, then each source's."""
    live = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    arrays = [*models, live]
    room = [{name: torch.zeros_like(tensor) for name, tensor in one.items()} for one in arrays]

    def copy() -> None:
        for one, to in zip(arrays, room, strict=True):
            for name, tensor in one.items():
                to[name].copy_(tensor)

    def merge(method: str) -> None:
        density = 1.0 if method == "task_arithmetic" else 0.5
        parameters = [{"weight": 0.4, "density": density}] * (len(models) - 1)
        options = {"lambda": 1.0, "normalize": False, "rescale": method.startswith("dare")}
        with torch.inference_mode():
            for name, base in models[0].items():
                sources = [InMemoryTensor(model[name]) for model in models[1:]]
                inputs = Inputs(
                    name, tuple(base.shape), InMemoryTensor(base), sources, parameters, options
                )
                combine = METHODS[method].combine(inputs)
                flat = live[name].view(-1)
                for block in inputs.blocks():
                    flat[block.start : block.start + block.size] = (
                        combine(block).view(-1).to(flat.dtype)
                    )

    work: dict[str, Callable[[], None]] = {"copy": copy}
    work |= {method: partial(merge, method) for method in ("task_arithmetic", "ties", "dare_ties")}
    return {name: median_seconds(do) for name, do in work.items()}


def median_seconds(do: Callable[[], None], repeat: int = 7) -> float:
    """The first call is not counted: it is the one that warms."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
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
    if arguments.what == "make":
        make(arguments.folder, arguments.size)
    elif arguments.what == "floor":
        floor(arguments.out, arguments.models)
    else:
        print(json.dumps(in_place(arguments.threads, arguments.models)))


if __name__ == "__main__":
    main()
