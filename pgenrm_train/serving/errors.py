"""Refusals of the service: a status, a kind for programs and one sentence for people."""


class Refused(Exception):
    """A request that gets no answer; `retry_after` in seconds where a later try can succeed."""

    def __init__(self, status: int, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


def bad_request(message: str) -> Refused:
    return Refused(422, "bad_request", message)
