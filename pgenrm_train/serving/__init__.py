"""The scoring service: users' votes, scores of responses, and the HTTP routes to both."""
