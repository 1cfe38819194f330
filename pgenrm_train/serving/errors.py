"""Refusals of the service: a status, a kind for programs and one sentence for people."""

from pydantic import BaseModel


class FailureFacts(BaseModel):
    kind: str
    message: str


class Failure(BaseModel):
    """The body of every error."""

    error: FailureFacts


class Refused(Exception):
    """A refused request; `retry_after`, in seconds, if a later try may succeed."""

    def __init__(self, status: int, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


def bad_request(message: str) -> Refused:
    return Refused(422, "bad_request", message)
