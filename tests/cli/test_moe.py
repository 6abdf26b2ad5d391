"""The command `moe`."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from paretomerge.cli.main import app
from tests.systems.moe.pico import load, save_dense


def test_the_command_writes_a_mixture_and_its_router(tmp_path: Path):
    source = save_dense(tmp_path / "dense", "llama")
    experts = [
        {"source_model": source, "positive_prompts": [p]} for p in ("abc", "xyz")
    ]
    content = {"base_model": source, "experts": experts}
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(content))
    arguments = ["moe", str(file), str(tmp_path / "moe"), "--shard-size", "4KB"]
    done = CliRunner().invoke(app, [*arguments, "--for-search"])
    assert done.exit_code == 0
    assert "a Mixtral of 2 experts" in done.stdout
    assert "all are the same model" in done.stderr
    assert load(tmp_path / "moe").config.num_local_experts == 2
    assert len(list((tmp_path / "moe/router").iterdir())) == 2
    again = CliRunner().invoke(app, arguments)
    assert "--overwrite" in str(again.exception)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert not (tmp_path / "moe/router").exists()
