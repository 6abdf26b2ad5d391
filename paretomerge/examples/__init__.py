"""Models and tasks that travel with the package, for the quickstart and for trying things out.

`specialists` is a base and three experts of 0.86 M parameters that read single characters, their
tasks and a study.yaml. `examples/specialists/train.py` in the repository trained them.
"""

from pathlib import Path

SPECIALISTS = Path(__file__).parent / "specialists"
"""The folder of the specialists; copy it before you write there."""
