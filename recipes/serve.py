"""serve: scores over HTTP, from `model.path` or the newest checkpoint of the run (docs/serving.md)."""

from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.store import publisher
from recipes.wiring.service.local import api_key, listening_socket, local_service, run_app


def run(config: Config) -> int:
    if not config.serve.local:
        raise ConfigError("recipe=serve needs serve.local=true: one process with its engine")
    key, socket = api_key(config), listening_socket(config)
    publisher.fetch(config)
    with local_service(config) as service:
        run_app(service, key, socket)
    return 0
