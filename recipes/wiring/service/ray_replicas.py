"""The scoring service on Ray Serve: a front with the app, vLLM engines as replicas.

Serve sends each prompt to the shorter of two replicas' queues.  By the number of open prompts it runs between
`serve.replicas` and `serve.max_replicas` replicas.  Sampling is seeded by the prompt, so the prompt of a dead
replica is sent again and has the same chains.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.backends.ray.cluster import connect
from pgenrm_train.backends.vllm.continuous import ContinuousEngine
from pgenrm_train.backends.vllm.engine import VllmGenerator, vllm_variables
from pgenrm_train.config import Config, ServeConfig, load
from pgenrm_train.errors import ConfigError, EngineLostError, last_line
from pgenrm_train.run.folder import weights_digest
from pgenrm_train.serving.store import local_place
from pgenrm_train.stages.stage import with_totals
from recipes.wiring.service.calibrate import calibrated
from recipes.wiring.service.local import api_key, checkpoint_of, make_service, open_store, similar_users

TRIES = 3  # replicas on which a prompt is tried
EXTRA_SECONDS = 30.0  # Serve's time-out comes after the app's own


class EngineReplica:
    """One vLLM engine, as a replica of Serve."""

    def __init__(self, config: Config, checkpoint: str) -> None:
        self._engine = ContinuousEngine(VllmGenerator(config, checkpoint))

    async def generate(self, request: GenerationRequest, temperature: float) -> Sequence[Generation]:
        return await self._engine.generate(request, temperature)

    def check_health(self) -> None:
        """Raise the reason why the engine is lost; Serve then replaces the replica."""
        if lost := self._engine.lost():
            raise lost


class ReplicatedEngine:
    """The app's engine: all replicas behind one handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(self, request: GenerationRequest, temperature: float) -> Sequence[Generation]:
        """Raises EngineLostError after `TRIES` replicas."""
        from ray.exceptions import RayError

        for attempt in range(1, TRIES + 1):
            try:
                return list(await self._handle.generate.remote(request, temperature))
            except (RayError, EngineLostError) as error:
                if attempt == TRIES:
                    raise EngineLostError(f"{TRIES} replicas were lost ({last_line(error)})") from error
        raise AssertionError

    def lost(self) -> None:
        """Always None: Serve replaces lost replicas."""


class Front:
    """The app, as a deployment of Serve."""

    def __init__(self, config: Config, checkpoint: str, engines: Any) -> None:
        engine, store, find = ReplicatedEngine(engines), open_store(config), similar_users(config)
        service = make_service(config, Path(checkpoint), engine, store, find)
        self._service, self._key = calibrated(service, weights_digest(Path(checkpoint))), api_key(config)

    def __serve_build_asgi_app__(self) -> Any:
        from pgenrm_train.serving.app import make_app

        return make_app(self._service, self._key)


def serve_on_ray(config: Config, checkpoint: Path) -> None:
    """Serve until SIGTERM or Ctrl-C.  Raises ConfigError for settings that need `serve.local=true`."""
    settings = config.serve
    if settings.calibrate:
        raise ConfigError("serve.calibrate needs serve.local=true; a service on Ray reads the calibration")
    if not settings.port:
        raise ConfigError("serve.port=0 needs serve.local=true; Ray Serve needs a port")
    # Replicas have another working directory.
    config = replace(
        with_totals(config, checkpoint), serve=replace(settings, store=local_place(settings.store))
    )
    variables = vllm_variables(config.cluster.device)
    close = connect(config, _most(settings) * config.cluster.tensor_parallel, variables)
    try:
        from ray import serve

        seconds = settings.timeout_seconds + EXTRA_SECONDS
        serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": seconds})
        serve.run(application_of(config, str(checkpoint.resolve())), name="pgenrm")
        address = f"http://{settings.host}:{settings.port}"
        print(f"serving {config.model.label} at {address} (routes: /docs)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        serve.shutdown()
    finally:
        close()
    print("stopped", flush=True)


def application(arguments: Mapping[str, Sequence[str]]) -> Any:
    """The service as an application of a Serve configuration file, as in examples/rayservice.yaml.

    `arguments`: `overrides`, a list of `key=value` as on the command line.
    """
    config = load("recipe=serve", *arguments["overrides"])
    checkpoint = checkpoint_of(config)
    return application_of(with_totals(config, checkpoint), str(checkpoint))


def application_of(config: Config, checkpoint: str, replica: type = EngineReplica) -> Any:
    """A front and its engines; a benchmark replaces the class of the engines."""
    from ray import serve

    settings, on_gpus = config.serve, config.cluster.device == "cuda"
    gpus = config.cluster.tensor_parallel if on_gpus else 0
    drain = {"graceful_shutdown_timeout_s": settings.drain_seconds}
    engines = serve.deployment(replica).options(
        name="engines",
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=config.eval.max_in_flight,
        autoscaling_config={
            "min_replicas": settings.replicas,
            "max_replicas": _most(settings),
            "target_ongoing_requests": settings.target_in_flight,
        },
        **drain,
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front",
        ray_actor_options={"num_cpus": 0},
        # The app itself answers 429, so Serve must not queue before it.
        max_ongoing_requests=2 * settings.max_waiting,
        **drain,
    )
    return front.bind(config, checkpoint, engines.bind(config, checkpoint))


def _most(settings: ServeConfig) -> int:
    return max(settings.replicas, settings.max_replicas or 0)
