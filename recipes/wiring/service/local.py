"""The service in this process: model, prompts, similar users, store and HTTP server."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pgenrm_train.backends.vllm.continuous import ContinuousEngine
from pgenrm_train.backends.vllm.engine import VllmGenerator
from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import ArtifactError, ConfigError
from pgenrm_train.files import fingerprint
from pgenrm_train.prompts.writer import PromptWriter, load_pairs
from pgenrm_train.run.checkpoints import check_group_size
from pgenrm_train.run.folder import StageFolder, check_checkpoint, weights_digest
from pgenrm_train.serving.app import make_app
from pgenrm_train.serving.cached_engine import CachedEngine, Engine
from pgenrm_train.serving.guard import LOG
from pgenrm_train.serving.metrics import Metrics
from pgenrm_train.serving.scoring import FindNeighbours, TaskScorer
from pgenrm_train.serving.service import Service, import_votes
from pgenrm_train.serving.store import UserStore
from pgenrm_train.stages.stage import start_of, with_totals
from recipes.wiring.models import load_tokenizer
from recipes.wiring.service.calibrate import calibrated
from recipes.wiring.similar_users import find_similar


@contextlib.contextmanager
def local_service(config: Config) -> Iterator[Service]:
    """A service with its engine in this process."""
    checkpoint = checkpoint_of(config)
    config = with_totals(config, checkpoint)
    with contextlib.closing(open_store(config)) as store:
        find = similar_users(config)
        with contextlib.closing(ContinuousEngine(VllmGenerator(config, checkpoint))) as engine:
            yield calibrated(
                make_service(config, checkpoint, engine, store, find), weights_digest(checkpoint)
            )


def checkpoint_of(config: Config) -> Path:
    """The checkpoint of `model.path` or the newest of the run.

    Raises ArtifactError if there is none, or for one of another group size.
    """
    checkpoint = check_checkpoint(start_of(config, StageName.EVALUATE.starts_from).checkpoint)
    check_group_size(checkpoint)
    return checkpoint


def make_service(
    config: Config, checkpoint: Path, engine: Engine, store: UserStore, find: FindNeighbours | None
) -> Service:
    """The service around an engine that runs `checkpoint`."""
    model = config.model
    limits = (model.prompt, model.max_prompt_tokens, model.max_response_tokens, model.dtype, model.counted)
    cached = CachedEngine(engine, store, fingerprint(weights_digest(checkpoint), *limits))
    # Another tokenizer than the engine's, which another thread uses.
    write = PromptWriter(config.model, load_tokenizer(checkpoint))
    return Service(config, TaskScorer(config, cached, write, find), store, Metrics())


def open_store(config: Config) -> UserStore:
    """The store of users, with the votes of `serve.votes`."""
    store = UserStore(config.serve.store)
    if config.serve.votes:
        users, votes = import_votes(store, Path(config.serve.votes))
        print(f"imported {votes} votes of {users} users from {config.serve.votes}", flush=True)
    return store


def similar_users(config: Config) -> FindNeighbours | None:
    """Neighbours from the prototypes of the run; None for a run without.

    Raises ArtifactError for prototypes of another model, if scores use similar users by default.
    """
    if not StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES).complete:
        if config.score.pro:
            raise ArtifactError(
                f"score.pro={config.score.pro} needs user prototypes, and run_dir={config.run_dir} has "
                "none; run recipe=prototypes there first, or use score.pro=0"
            )
        return None
    try:
        return find_similar(config, load_pairs(Path(config.run_dir)))
    except ArtifactError as error:
        if config.score.pro:
            raise
        print(f"no similar users: {error}", flush=True)
        return None


def api_key(config: Config) -> str | None:
    """The key that requests must carry.  Raises ConfigError for a variable that is not set."""
    settings = config.serve
    if settings.api_key_env is None:
        if settings.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"warning: serve.host={settings.host} is open to the network without a key", flush=True)
        return None
    if not (key := os.environ.get(settings.api_key_env)):
        raise ConfigError(
            f"serve.api_key_env={settings.api_key_env}: the environment variable is not set or empty"
        )
    return key


def listening_socket(config: Config) -> socket.socket:
    """A bound socket, opened before the model loads.  Raises ConfigError if the address is taken."""
    settings = config.serve
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"serve.host={settings.host} serve.port={settings.port} cannot be opened ({error.strerror}); "
            "choose another address or port"
        ) from None


def run_app(service: Service, key: str | None, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; open requests have `serve.drain_seconds` to end."""
    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO)
    host, port = listening.getsockname()[:2]
    print(f"serving {service.config.model.label} at http://{host}:{port} (routes: /docs)", flush=True)
    server = http_server(service, key)
    # uvicorn raises the signal again after draining; a stopped service has not failed.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    print("stopped", flush=True)


def http_server(service: Service, key: str | None) -> uvicorn.Server:
    """The HTTP server of a service."""
    settings = uvicorn.Config(
        make_app(service, key),
        # httptools, uvicorn's default, reads headers of any length into memory; h11 refuses more than 64 KiB.
        http="h11",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=service.config.serve.drain_seconds,
    )
    return uvicorn.Server(settings)
