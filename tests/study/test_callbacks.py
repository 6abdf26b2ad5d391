"""The documented callback, with a real tracker that needs no network."""

import re
import struct
import warnings

import paretomerge as pm
from tests.conftest import REPOSITORY
from tests.study.test_build import write

# Its protocol buffers warn of their own future.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorboardX  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event


def example():
    """The code of the section on callbacks."""
    section = (REPOSITORY / "docs" / "api.md").read_text().split("## Callbacks")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def events(path):
    """What a TensorBoard file holds: records of length, checksum, content and checksum."""
    content = path.read_bytes()
    place = 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        yield Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length


def test_the_documented_callback_logs_every_score(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = pm.load_study(write(tmp_path, pico, trials=4, sampler="random"))
    exec(example(), {"study": study})
    (file,) = (tmp_path / "runs" / "tensorboard").iterdir()
    logged = {}
    for event in events(file):
        for value in event.summary.value:
            logged[value.tag, event.step] = value.simple_value
    for trial in study.get_trials():
        for name, score in trial.scores.items():
            assert logged[f"search/{name}", trial.number] == score.value
        assert ("seconds/evaluate", trial.number) in logged
