"""Other engines behind the protocol of vLLM's worker, run as `python engines.py FOLDER`.

The first computes a Llama with NumPy, whose tokenizer has single characters; it starts at once. The
second, with `echo` behind the folder, has no model. The argument `fault` breaks them at a method,
only once if it names a file `once`.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__)
WORKER = FILE.parents[3] / "paretomerge" / "evaluate" / "vllm" / "worker.py"


def load_worker() -> Any:
    # By its path: the interpreter may have another paretomerge, or none.
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLING = {
    "max_tokens",
    "stop",
    "temperature",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of `model.safetensors`, which are in float32 or bfloat16."""
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            flat = bits.view(np.float32)
        else:
            flat = np.frombuffer(data, np.float32)
        tensors[name] = flat.reshape(entry["shape"]).copy()
    return tensors


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Llama:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.state = read_weights(folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = dict(tokenizer["model"]["vocab"])
        for added in tokenizer["added_tokens"]:
            vocabulary[added["content"]] = added["id"]
        self.tokens = {i: token for token, i in vocabulary.items()}

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Of each next token `(positions, vocabulary)`."""
        state, config = self.state, self.config
        embedding = state["model.embed_tokens.weight"]
        x = embedding[tokens]
        for i in range(config["num_hidden_layers"]):
            x = self.layer(x, f"model.layers.{i}.")
        x = self.norm(x, "model.norm.weight")
        logits = x @ state.get("lm_head.weight", embedding).T
        return np.log(softmax(logits))

    def norm(self, x, name):
        mean_square = (x * x).mean(-1, keepdims=True)
        scale = 1 / np.sqrt(mean_square + self.config["rms_norm_eps"])
        return x * scale * self.state[name]

    def layer(self, x, prefix):
        w = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }
        y = self.norm(x, f"{prefix}input_layernorm.weight")
        x = x + self.attention(y, w) @ w["self_attn.o_proj"].T
        y = self.norm(x, f"{prefix}post_attention_layernorm.weight")
        gate = y @ w["mlp.gate_proj"].T
        gate = gate / (1 + np.exp(-gate))
        return x + (gate * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T

    def attention(self, y, w):
        n, heads = len(y), self.config["num_attention_heads"]
        q, k, v = (
            (y @ w[f"self_attn.{name}_proj"].T).reshape(n, -1, self.head_size)
            for name in "qkv"
        )
        q, k = self.rotate(q), self.rotate(k)
        repeats = heads // k.shape[1]
        k, v = (np.repeat(each, repeats, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_size)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        return np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n, -1)

    @property
    def head_size(self):
        default = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.config.get("head_dim") or default

    def rotate(self, x):
        size = self.head_size
        parameters = self.config.get("rope_parameters") or self.config
        theta = parameters.get("rope_theta", 10000.0)
        frequencies = theta ** (-np.arange(0, size, 2) / size)
        angles = np.outer(np.arange(len(x)), frequencies)
        angles = np.concatenate([angles, angles], 1)[:, None].astype(np.float32)
        left, right = np.split(x, 2, axis=-1)
        turned = np.concatenate([-right, left], -1)
        return x * np.cos(angles) + turned * np.sin(angles)


class Engine:
    def __init__(self, stdout: int) -> None:
        self.model = None
        self.fault: dict[str, str] = {}
        self.stdout = stdout

    def check(self, arguments):
        self.fail("check", arguments.get("fault", {}))
        known = ["dtype", "engine", "fault", "max_model_len"]
        unknown = sorted(set(arguments) - set(known))
        version = arguments.get("version", "1")
        return {
            "version": version,
            "replaces": True,
            "unknown": unknown,
            "known": known,
        }

    def start(self, model, arguments):
        self.fault = arguments.get("fault", {})
        self.fail("start", self.fault)
        self.model = Llama(Path(model))
        if self.fault.get("kind") == "wrong":
            self.model.state["lm_head.weight"] *= 2
        os.write(1, b"what is printed does no harm")
        length = self.model.config["max_position_embeddings"]
        length = arguments.get("max_model_len", length)
        return {"max_length": length, "dtype": arguments["dtype"]}

    def replace(self, model):
        self.fail("replace", self.fault)
        kind = self.fault.get("kind")
        if kind == "stale":
            return
        for name, tensor in read_weights(Path(model)).items():
            if kind != "half" or "layers.1" not in name:
                self.model.state[name] = tensor

    def log_likelihoods(self, prompts, starts):
        self.fail("log_likelihoods", self.fault)
        answers = []
        for prompt, start in zip(prompts, starts, strict=True):
            scores = self.model.log_probabilities(prompt)[start - 1 : -1]
            chosen = np.array([scores[i, t] for i, t in enumerate(prompt[start:])])
            is_greedy = (chosen >= scores.max(-1)).all()
            answers.append([chosen.tolist(), bool(is_greedy)])
        return answers

    def generate(self, prompts, settings):
        self.fail("generate", self.fault)
        return [self.write(*each) for each in zip(prompts, settings, strict=True)]

    def write(self, prompt, setting):
        unknown = set(setting) - SAMPLING
        if unknown:
            raise worker.RefusedError(f"Unexpected keyword argument {min(unknown)!r}")
        assert setting["temperature"] == 0
        tokens = list(prompt)
        words: list[str] = []
        text = ""
        for _ in range(setting["max_tokens"]):
            tokens.append(int(self.model.log_probabilities(tokens)[-1].argmax()))
            if tokens[-1] in self.model.tokens:
                words.append(self.model.tokens[tokens[-1]])
            # as a tokenizer without a decoder writes them
            text = " ".join(words)
            if any(stop in text for stop in setting["stop"]):
                break
        return text

    def fail(self, method: str, fault: dict[str, str]) -> None:
        if fault.get("method") != method:
            return
        once = fault.get("once")
        if once:
            if Path(once).exists():
                return
            Path(once).touch()
        kind = fault["kind"]
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(600)
        elif kind == "rubbish":
            os.write(self.stdout, b"INFO 12-01 loading the model\n")
        elif kind == "raise":
            raise RuntimeError("out of cheese")


class EchoEngine(Engine):
    """Without a model, so that it starts at once; has children, as vLLM has."""

    def start(self, model, arguments):
        import subprocess

        self.fault = arguments.get("fault", {})
        self.fail("start", self.fault)
        child = subprocess.Popen(["sleep", "600"])
        return {"child": child.pid, "max_length": 10, "dtype": "float32"}

    def log_likelihoods(self, prompts, starts):
        self.fail("log_likelihoods", self.fault)
        return [[prompt, True] for prompt in prompts]


worker = load_worker()

if __name__ == "__main__":
    stdout = os.dup(1)
    kind = EchoEngine if "echo" in sys.argv[2:] else Engine
    worker.serve(kind(stdout), sys.argv[1])
