"""Job ids that differ between the Rays of one machine.

A trainer sends its weights to vLLM over a Unix socket, which verl names by Ray's job id.  In every Ray that a
run starts for itself the first job is 01000000.  Two runs on one machine would share the socket: they hang,
or one loads the weights of the other.  With the id of the node the names differ; sender and receiver share
it, because both are on that node.

Loaded by `verl/__init__` in every process (`VERL_USE_EXTERNAL_MODULES`).  Goes when verl's socket has a name
of its own for each Ray.
"""

from ray.runtime_context import RuntimeContext

_of_ray = RuntimeContext.get_job_id


def get_job_id(context: RuntimeContext) -> str:
    """Ray's job id and the first digits of the node's id."""
    return f"{_of_ray(context)}-{context.get_node_id()[:12]}"


RuntimeContext.get_job_id = get_job_id
