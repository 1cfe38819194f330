"""What `--help` and `--version` print.  Ours and not Hydra's, which copies the whole schema for each file of each group: seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import metadata

HELP = """\
Train, evaluate and scale personalised generative reward models (P-GenRM).

usage: python -m pgenrm_train recipe=NAME [group=choice …] [key=value …]

== Recipes and groups (group=choice) ==
{groups}
== Common keys ==
run_dir=FOLDER|URL        where the run lives; a second start with the same one continues.  A URL (s3://bucket/path, gs://…) is worked
                          on in mirror= (runs/mirror), from where all that is complete goes to the URL
seed=0                    of data, training and evaluation
resume=true|false         false sets an existing run folder aside and starts anew
pipeline.budget=          smoke | demo | full
model.path=FOLDER         start from, or evaluate, this checkpoint
data.path=FILE            parquet or JSONL for data=pairs
score.input=FILE.json     the question for recipe=score; score.dry_run=true shows the prompt only
preflight.only=true       what the machine or the network lacks, as a table; starts nothing

== Examples ==
python -m pgenrm_train recipe=pipeline
python -m pgenrm_train recipe=pipeline data=pairs data.path=votes.parquet
python -m pgenrm_train recipe=psi model=llama31_8b cluster=gpu8 data=pairs data.path=votes.parquet
python -m pgenrm_train recipe=plan model=llama31_8b cluster=gpu8 data=chatbot_arena     # memory, hours, cost; starts nothing

--cfg job --resolve prints the composed configuration; -m runs several values of a key one after the other.
"""


def asked_for(
    arguments: Iterable[str], groups: Iterable[str], choices: Callable[[str], list[str]]
) -> str | None:
    """The text that the command line asks for; None when it asks for a run."""
    given = set(arguments)
    if given & {"--help", "-h"}:
        return HELP.format(groups="\n".join(f"{group}: {', '.join(choices(group))}" for group in groups))
    return f"pgenrm-train {metadata.version('pgenrm-train')}\n" if "--version" in given else None
