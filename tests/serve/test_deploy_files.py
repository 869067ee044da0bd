"""The files for `serve deploy`: their fields are ours, and none opens a port without keys."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.keys import is_loopback
from serve.on_ray import build
from sharegpt4v.config.base import resolve
from sharegpt4v.config.serve import ServeConfig
from sharegpt4v.errors import UserError
from tests.commands import REPOSITORY

FILES = sorted((REPOSITORY / "cluster" / "serve").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_that_serve_deploys(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(content)
    (application,) = schema.applications
    assert application.import_path == "serve.on_ray:build"
    given = dict(application.args)
    config = resolve(ServeConfig, ServeConfig.presets[given.pop("preset")].values, given)
    assert config.host == content["http_options"]["host"]
    assert is_loopback(config.host) or config.api_keys


def test_the_builder_takes_the_fields_of_the_command_and_names_unknown_ones() -> None:
    assert build({"preset": "toy", "replicas": "1:3"}).__class__.__name__ == "Application"
    with pytest.raises(UserError, match="did you mean replicas"):
        build({"replica": 2})
    with pytest.raises(UserError, match="in quotes"):
        build({"replicas": 64})
    with pytest.raises(UserError, match="preset"):
        build({"preset": "70b"})
    with pytest.raises(UserError, match="from elsewhere"):
        build({"host": "0.0.0.0"})
