"""Settings of the scoring service, and of publishing a run on a hub."""

from dataclasses import dataclass

from pgenrm_train.config.setting import setting


@dataclass
class ServeConfig:
    local: bool = setting(False, "true: one process with its engine, without Ray")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network of the machine")
    port: int = setting(8000, "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key_env: str | None = setting(
        None, "environment variable with the key that requests must carry; null: no key"
    )
    store: str = setting(
        "sqlite:///users.db", "SQLAlchemy URL of the users' votes: SQLite, or postgresql://…"
    )
    votes: str | None = setting(
        None, "votes to import at the start, in the form of data=pairs; a run has build_data/pairs.parquet"
    )
    replicas: int = setting(1, "on Ray: fewest engines, each with cluster.tensor_parallel GPUs", gt=0)
    max_replicas: int | None = setting(None, "on Ray: most engines; null: as many as replicas", gt=0)
    target_in_flight: int = setting(64, "on Ray: open prompts per engine above which another starts", gt=0)
    calibrate: int = setting(
        0,
        "validation pairs on which probabilities are fitted before serving; 0: use an earlier fit",
        ge=0,
    )
    max_body_bytes: int = setting(2_000_000, "largest body of a request", gt=0)
    max_text_characters: int = setting(100_000, "longest text of a request", gt=0)
    max_responses: int = setting(64, "most responses of a request", ge=2)
    max_chains: int = setting(4096, "most chains that a request may cost", gt=0)
    max_waiting: int = setting(256, "requests at the same time; further ones get 429", gt=0)
    timeout_seconds: float = setting(600.0, "longest time of a request; then 503", gt=0)
    drain_seconds: int = setting(60, "time for open requests to end after SIGTERM", gt=0)
    on_failure: str = setting(
        "error", "a missing score on routes of trainers: an error, or NaN", choices=("error", "nan")
    )


@dataclass
class PublishConfig:
    repo: str | None = setting(None, "repository of the model, NAMESPACE/NAME")
    dataset_repo: str | None = setting(None, "repository of the built pairs; null: they are not published")
    dry_run: bool = setting(True, "write all files and upload nothing; false uploads")
    private: bool = setting(True, "a repository that is made here is private")
    weights: bool = setting(True, "upload the checkpoint, not only its card and results")
    license: str | None = setting(None, "licence of the model as the hub spells it, e.g. llama3.1")
    source_url: str | None = setting(None, "link to the evaluation, shown with its results")
    token_env: str = setting("HF_TOKEN", "environment variable with the hub's token")
