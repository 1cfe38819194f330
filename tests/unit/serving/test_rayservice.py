"""The Kubernetes example names an application of this checkout, with settings that exist."""

import importlib

import yaml

from pgenrm_train.config import ROOT, load


def test_the_example_composes():
    service = yaml.safe_load((ROOT / "examples" / "rayservice.yaml").read_text(encoding="utf-8"))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    config = load("recipe=serve", *application["args"]["overrides"])
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    names = {variable["name"] for variable in head["env"]}
    assert config.serve.api_key_env in names and service["kind"] == "RayService"
