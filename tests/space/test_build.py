import json
import shutil

import pytest
from pydantic import ValidationError

from paretomerge.config.space_schema import SpaceConfig
from paretomerge.errors import ConfigError
from paretomerge.space.build import Pool, build_space
from paretomerge.space.measurements import Measurements
from paretomerge.space.sources import digest
from paretomerge.space.specs import WeightSpace
from tests.conftest import EXPERTS


def build(pico, folder, sources=EXPERTS, **settings):
    base = str(pico / "base")
    named = {name: str(pico / name) for name in sources}
    measurements = Measurements(folder)
    space = build_space(WeightSpace(**settings), Pool(base, named), 0, measurements)
    measurements.write()
    return space


def test_the_defaults(pico, tmp_path):
    space = build(pico, tmp_path)
    assert space.weight.bounds == (-0.5, 1.5) and space.methods == (
        "task_arithmetic",
        "ties",
        "dare_ties",
    )
    assert space.profile is None and not list(
        tmp_path.iterdir()
    )  # nothing is read that is not needed


def test_every_key(pico, tmp_path):
    space = build(
        pico,
        tmp_path,
        methods=["ties", "della"],
        method_groups=2,
        weight={"groups": [[0, 1], [1, 4]], "roles": {"ends": ["embed", "lm_head"]}},
        density={"bounds": [0.2, 0.9], "groups": {"by": "profile", "count": 3}},
        method_parameters={"epsilon": [0.1, 0.5]},
        subset=True,
    )
    names = set(space.distributions)
    assert {
        "method/0",
        "method/1",
        "epsilon/1",
        "use/bob",
        "weight/ada/1/other",
        "weight/ada/1/ends",
        "density/cyd/2",
    } <= names
    layouts = space.parameters.layouts
    assert layouts["weight"].starts == (0, 1) and len(layouts["density"].starts) == 3
    assert SpaceConfig.model_validate(
        json.loads(SpaceConfig(method_parameters={"gamma": [0, 0.1]}).model_dump_json())
    ).method_parameters == {"gamma": (0, 0.1)}
    smooth = build(pico, tmp_path, weight={"groups": 3, "smooth": True})
    assert [n for n in smooth.distributions if n.startswith("weight/ada")] == [
        "weight/ada/0",
        "weight/ada/1",
        "weight/ada/2",
    ]


def test_near_duplicates_are_left_out_and_told(pico, tmp_path):
    space = build(pico, tmp_path, sources=("ada", "bob", "ada"), near_duplicates=0.98)
    assert space.notes == ()
    doubled = {
        "ada": str(pico / "ada"),
        "again": str(pico / "ada") + "/",
        "bob": str(pico / "bob"),
    }
    base = str(pico / "base")
    spec = WeightSpace(near_duplicates=0.98, order="kinship")
    space = build_space(spec, Pool(base, doubled), 0, Measurements(tmp_path))
    assert sorted(space.sources) == ["ada", "bob"] == sorted(space.profile.names)
    assert space.notes == (
        "again is left out: the cosine of its delta to that of ada is 1.000, above 0.98",
    )


def test_the_profile_is_kept_until_a_model_changes(pico, tmp_path):
    first = build(pico, tmp_path, importance=True)
    (file,) = tmp_path.glob("deltas-*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"size": 7}))
    assert (
        build(pico, tmp_path, importance=True).profile.size == 7
    )  # read, not made again
    assert set(first.importance) == set(first.distributions)
    build(pico, tmp_path, sources=("ada", "bob"), importance=True)
    assert len(list(tmp_path.glob("deltas-*.json"))) == 2
    file.write_text("{")
    with pytest.raises(
        ConfigError, match=r"deltas-.*json: expected a delta profile .*delete the file"
    ):
        build(pico, tmp_path, importance=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weight": {"groups": 2, "layer_groups": 2}}, "layer_groups"),
        ({"weight": {"groups": "profile"}}, "expected a number, {by"),
        ({"method_groups": {"by": "depht", "count": 2}}, "did you mean 'depth'"),
        ({"order": "random"}, "kinship"),
        ({"near_duplicates": 0}, "greater than 0"),
        ({"near_duplicates": 1.01}, "less than or equal to 1"),
        ({"method_parameters": {"gamma": "high"}}, "number"),
        ({"weight": {"roles": {"a": "mlp"}}}, "list"),
    ],
)
def test_bad_settings(settings, told):
    with pytest.raises(ValidationError, match=told):
        SpaceConfig.model_validate(settings)


def test_bounds_that_are_no_bounds(pico, tmp_path):
    with pytest.raises(ConfigError, match=r"space\.weight\.bounds: .*low < high"):
        build(pico, tmp_path, weight={"bounds": [float("nan"), 1]})
    with pytest.raises(ConfigError, match=r"space\.density\.smooth: "):
        build(pico, tmp_path, density={"smooth": True})


def test_a_space_without_its_sources_tells(pico, tmp_path):
    (note,) = build(pico, tmp_path, weight={"bounds": [0.2, 0.8]}).notes
    assert "only near the sources" in note
    assert not build(pico, tmp_path).notes


def test_a_digest_follows_the_weights_and_not_the_folder(pico, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pico / "bob", copy)
    assert digest(str(copy)) == digest(str(pico / "bob")) != digest(str(pico / "cyd"))
    assert digest("owner/name") == "" and digest(f"{pico / 'ada'}+{copy}") not in (
        digest(str(pico / "ada")),
        digest(str(copy)),
        "",
    )
    file = sorted(copy.glob("*.safetensors"))[-1]
    torn = bytearray(file.read_bytes())
    torn[-1] ^= 1
    file.write_bytes(torn)
    assert digest(str(copy)) != digest(str(pico / "bob"))
