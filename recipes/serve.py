"""serve: scores over HTTP, from `model.path` or the newest checkpoint of the run (docs/serving.md)."""

from pgenrm_train.config import Config
from pgenrm_train.run.store import publisher
from recipes.wiring.service.local import api_key, checkpoint_of, listening_socket, local_service, run_app
from recipes.wiring.service.ray_replicas import serve_on_ray


def run(config: Config) -> int:
    key = api_key(config)
    if config.serve.local:
        listening = listening_socket(config)
        publisher.fetch(config)
        with local_service(config) as service:
            run_app(service, key, listening)
        return 0
    publisher.fetch(config)
    serve_on_ray(config, checkpoint_of(config))
    return 0
