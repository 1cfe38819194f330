"""Settings of teacher and judge: a rule, a model behind an OpenAI-compatible API, or none."""

from dataclasses import dataclass

from pgenrm_train.config.setting import setting

# Settings of teacher and judge that an answer depends on.
ANSWER_KEYS = ("kind", "name", "max_tokens", "temperature", "structured", "instructions")


@dataclass
class EndpointConfig:
    kind: str = setting(
        "none", "oracle and features are rules; endpoint is an API; vllm is served by the run"
    )
    base_url: str | None = setting(None, "address of the server, e.g. http://localhost:8000/v1")
    name: str | None = setting(None, "the served model; with vllm a checkpoint folder or hub id")
    api_key_env: str | None = setting(None, "environment variable that holds the key")
    gpus: int = setting(1, "GPUs of a vLLM server that the run starts", gt=0)
    instructions: bool = setting(True, "teacher only: false for a model that has learnt the task from chains")
    max_in_flight: int = setting(64, "calls at the same time", gt=0)
    requests_per_minute: float | None = setting(None, "pace of the calls; null: no limit", gt=0)
    tokens_per_minute: float | None = setting(
        None, "pace of prompts and answers together; null: no limit", gt=0
    )
    timeout_seconds: float = setting(120.0, "longest wait for one answer", gt=0)
    attempts: int = setting(
        5, "tries per call, with exponential backoff, on 429, 5xx, time-outs and lost connections", gt=0
    )
    give_up_after: int = setting(20, "calls that fail in a row before the server counts as down", gt=0)
    max_tokens: int = setting(2048, "longest answer", gt=0)
    max_tokens_field: str = setting(
        "max_tokens",
        "name of that field in a request; OpenAI's reasoning models need max_completion_tokens",
        choices=("max_tokens", "max_completion_tokens"),
    )
    temperature: float = setting(0.7, "sampling temperature")
    structured: str = setting(
        "json_schema", "how a judge's answer is constrained", choices=("json_schema", "json_object", "none")
    )
    dollars_per_million_in: float = setting(0.0, "price of prompt tokens")
    dollars_per_million_out: float = setting(0.0, "price of answer tokens")
    max_dollars: float | None = setting(None, "spending that stops the run; answers stay in the cache")
    max_total_tokens: int | None = setting(None, "tokens that stop the run; answers stay in the cache")


@dataclass
class TeacherConfig(EndpointConfig):
    kind: str = setting(
        "oracle",
        "oracle knows PersonaWorld; features is a rule on texts; endpoint: an API; vllm: served by the run",
        choices=("oracle", "features", "endpoint", "vllm"),
    )


@dataclass
class JudgeConfig(EndpointConfig):
    kind: str = setting(
        "none",
        "none: no process reward; oracle knows PersonaWorld; endpoint: an API; vllm: served by the run",
        choices=("oracle", "none", "endpoint", "vllm"),
    )
