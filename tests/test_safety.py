"""What others give us cannot run code, fill the memory, or learn secrets."""

import ast
import json
import sqlite3

import pytest
from sqlalchemy import create_engine, inspect, text

import paretomerge as pm
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.live.model_class import load_tokenizer, read_config
from paretomerge.record.storage import Storage
from tests.cli.test_cli import paretomerge
from tests.conftest import REPOSITORY
from tests.openai_server import says, serve
from tests.postgresql import server
from tests.study.test_build import write

SOURCES = sorted((REPOSITORY / "paretomerge").rglob("*.py"))
# Names that read a pickle, and run what is in it.
UNPICKLING = {
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "torch": {"load"},
    "pandas": {"read_pickle"},
}
# They read what a process of ours sends through a pipe, and no file.
BETWEEN_OWN_PROCESSES = {
    REPOSITORY / "paretomerge" / "merging" / "worker.py",
    REPOSITORY / "paretomerge" / "study" / "worker.py",
}
FROM_FILES = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def calls(tree):
    """Each call of the form `owner.name(...)`."""
    for node in ast.walk(tree):
        function = getattr(node, "func", None)
        owner = getattr(function, "value", None)
        if isinstance(function, ast.Attribute) and isinstance(owner, ast.Name):
            yield owner.id, function.attr, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_reads_a_pickle_or_lets_a_model_bring_code(path):
    tree = ast.parse(path.read_text())
    for owner, name, node in calls(tree):
        if owner == "pickle" and path in BETWEEN_OWN_PROCESSES:
            continue
        assert name not in UNPICKLING.get(owner, ()), f"{path}:{node.lineno}"
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert "allow_pickle" not in keywords, f"{path}:{node.lineno}"
        if owner in FROM_FILES and name == "from_pretrained":
            trusts = keywords.get("trust_remote_code")
            # gguf.py passes it with other arguments, as `**where`.
            if trusts is None and None in keywords:
                assert '"trust_remote_code": False' in path.read_text()
                continue
            # Not left out: transformers would ask at a terminal.
            assert isinstance(trusts, ast.Constant) and trusts.value is False, path


def test_a_model_that_needs_code_of_its_own_is_refused_and_runs_nothing(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    config = {
        "model_type": "never_seen",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )
    with pytest.raises(CheckpointError, match=r"never run.*paretomerge merge"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not ran.exists()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{previous}'] * 9)}]\n"
    for previous, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (LAUGHS, "do aliases multiply each other"),
        ("base: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("base: " + "[" * 60 + "]" * 60, "levels deep"),
        ("base: &b [*b]", "does an alias contain itself"),
        ("base: " + "x" * 1_000_001, "is this the right file"),
        ("base: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("base: a\n---\nbase: b", "holds 2 documents"),
        ("base: a\nbase: b", "there twice"),
    ],
)
def test_a_study_file_is_bounded(tmp_path, content, problem):
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        pm.load_study(tmp_path / "study.yaml")
    assert len(str(caught.value)) < 1000


SECRET = "hunter2-planted-secret"


@pytest.fixture(scope="module")
def postgresql():
    with server() as url:
        yield url.replace(":secret@", f":{SECRET}@")


def everything_in(url):
    """Each cell of each table of a database, as text."""
    engine = create_engine(url)
    cells = []
    with engine.connect() as connection:
        for table in inspect(engine).get_table_names():
            for row in connection.execute(text(f'SELECT * FROM "{table}"')):
                cells += map(str, row)
    engine.dispose()
    return "\n".join(cells)


def test_secrets_stay_where_they_are(postgresql, pico, tmp_path, monkeypatch):
    """A database's password and an API key, through a search with failures, and its report."""
    lines = [json.dumps({"prompt": letter * 3 + "="}) for letter in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    judged = {"judge": {"prompts": "prompts.jsonl", "criteria": "short"}}
    shown = []
    # The third answer fails its trial, and its error quotes the server, which quotes the key.
    leaks = says(f"wrong key {SECRET}")
    with serve(says('{"score": 7}'), leaks, says('{"score": 6}')) as judge:
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        monkeypatch.setenv("OPENAI_MODEL", "any")
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        file = write(
            tmp_path,
            pico,
            objectives=[judged, {"function": "mine:score"}],
            sampler={"name": "llm"},
            storage=postgresql,
            trials=6,
        )
        log = tmp_path / "log.jsonl"
        for arguments in (
            ("search", file, "--log-json", log),
            ("status", file),
            ("status", file, "--watch"),
            ("front", file),
            ("front", file, "--json"),
            ("report", file, "--out", tmp_path / "report.html"),
            ("pick", file, "--trial", "3", "--out", tmp_path / "picked"),
            ("plan", file, "--no-measure"),
            ("status", file, "--set", "study_name=no-such-study"),
        ):
            done = paretomerge(*arguments, ok=False)
            shown += [done.stdout, done.stderr]
        # The key was used, else this test would show nothing.
        assert any(SECRET in str(headers) for headers in judge.headers)
    failures = [
        json.loads(line).get("failure") for line in log.read_text().splitlines()
    ]
    assert any(failures), "the server's answer has failed no trial"
    for part in shown:
        assert SECRET not in part
    for path in tmp_path.rglob("*"):
        # The study's file is where the user wrote the password.
        if path.is_file() and path != file:
            assert SECRET.encode() not in path.read_bytes(), path
    recorded = everything_in(postgresql)
    assert "recipe" in recorded and SECRET not in recorded


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql://host/db?user=me&password={SECRET}",
        f"mysql://host/db?ssl_key={SECRET}&charset=utf8",
        f"mysql://host/db?auth_token={SECRET}",
    ],
)
def test_a_storage_shows_no_secret(url):
    assert SECRET not in str(Storage(url)) and "host/db" in str(Storage(url))


def test_errors_of_a_database_show_no_password(tmp_path):
    url = f"postgresql://me:{SECRET}@127.0.0.1:1/db"
    with pytest.raises(pm.ParetoMergeError) as caught, Storage(url).connect():
        pass
    assert SECRET not in str(caught.value)


def test_a_record_file_holds_no_environment(pico, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    file = write(tmp_path, pico, trials=2, sampler="random")
    paretomerge("search", file)
    (record,) = tmp_path.rglob("study.db")
    with sqlite3.connect(record) as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert SECRET not in dump
