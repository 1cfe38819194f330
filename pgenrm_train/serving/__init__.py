"""The scoring service: users' votes, scores of responses, and the HTTP faces of both."""
