import json

import pytest
from typer.testing import CliRunner

from paretomerge.cli.main import app
from paretomerge.errors import ConfigError


def run(*arguments):
    result = CliRunner().invoke(app, ["kinship", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_table_and_the_same_as_json(pico):
    shown = run(pico / "base", pico / "ada", pico / "bob")
    assert all(
        word in shown
        for word in (
            "cosine",
            "pearson",
            "euclidean",
            "layers 0 to 3",
            "attention",
            "ada",
            "bob",
        )
    )
    told = json.loads(run(pico / "base", pico / "ada", pico / "bob", "--json"))
    assert (
        told["cosine"]["ada"]["ada"] == 1
        and told["cosine"]["ada"]["bob"] == told["cosine"]["bob"]["ada"]
    )
    assert (
        f"{told['cosine']['ada']['bob']:.3f}" in shown
        and f"{told['norms']['ada']:.4g}" in shown
    )
    assert len(told["layers"]["bob"]) == 4
    assert sum(v**2 for v in told["roles"]["ada"].values()) == pytest.approx(
        told["norms"]["ada"] ** 2
    )


def test_of_a_study(specialists):
    told = json.loads(run(specialists / "study.yaml", "--json"))
    assert list(told["models"]) == ["order", "mirror", "scribe"]
    assert 0.2 < told["cosine"]["order"]["mirror"] < 0.9


def test_too_few_models(pico):
    with pytest.raises(ConfigError, match="at least one model"):
        run(pico / "base")
