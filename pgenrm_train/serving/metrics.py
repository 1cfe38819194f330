"""Prometheus metrics of the service: requests, chains, tokens, failures.  No label has a user's text."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pgenrm_train.backends.protocols import Generation
from pgenrm_train.serving.scoring import Scored

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pgenrm_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "pgenrm_request_seconds", "Duration by route", ["route"], registry=self.registry, buckets=SECONDS
        )
        self.in_flight = Gauge("pgenrm_requests_in_flight", "Open scoring requests", registry=self.registry)
        self.chains = Counter(
            "pgenrm_chains", "Chains by source, model or cache", ["source"], registry=self.registry
        )
        self.tokens = Counter(
            "pgenrm_completion_tokens", "Tokens that the model wrote", registry=self.registry
        )
        self.failures = Counter(
            "pgenrm_failed_chains", "Chains without a score, by kind", ["kind"], registry=self.registry
        )

    def count(self, scored: Scored) -> None:
        """Count the chains of one task."""
        for chain in scored.chains:
            self.chains.labels("cache" if chain.cached else "model").inc()
            self.tokens.inc(0 if chain.cached else chain.generation.tokens)
            if chain.failure:
                self.failures.labels(chain.failure).inc()

    def count_written(self, samples: Sequence[Generation]) -> None:
        """Count chains that are returned as text, without a score."""
        for sample in samples:
            self.chains.labels("model").inc()
            self.tokens.inc(sample.tokens)
            if sample.failure:
                self.failures.labels(sample.failure).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
