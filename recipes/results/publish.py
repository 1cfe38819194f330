"""publish: write a model card with results, `.eval_results/` and a data set's card; dry_run=false uploads.

    <run_dir>/publish/model/     README.md, .eval_results/*.yaml
    <run_dir>/publish/dataset/   README.md, if publish.dataset_repo is given
    <run_dir>/publish/files.json every file of the upload with its place in the repository and its bytes

The model repository also gets the checkpoint, and that of the data set the built pairs.  `HF_ENDPOINT` names
another hub.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_builders.sources import choices, lampqa, pairs, prism
from eval.report.hub_files import card_with_results, eval_results
from eval.report.leaderboard import Entry, find_runs
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.config.data import QUESTIONS
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError, first_line
from pgenrm_train.files import write_json, write_text
from pgenrm_train.prompts.writer import PAIRS
from pgenrm_train.run.folder import StageFolder, check_checkpoint
from pgenrm_train.stages.stage import newest

HUBS = {
    **pairs.HUB,
    "prism": prism.HUB,
    "lampqa": lampqa.HUB,
    "personalized_rewardbench": choices.HUB,
}
# File of a build → its place in the repository.  `datasets` would read visible JSON in place of the pairs.
DATA_FILES = {
    "pairs.parquet": "pairs.parquet",
    "card.json": ".build/card.json",
    "leaks.json": ".build/leaks.json",
}


@dataclass(frozen=True)
class File:
    """One file of an upload: its place in the repository, its source and its size."""

    path: str
    source: Path

    @property
    def bytes(self) -> int:
        return self.source.stat().st_size


@dataclass(frozen=True)
class Upload:
    """The files of one repository."""

    repo: str
    kind: str  # model or dataset
    files: Sequence[File]


def run(config: Config) -> None:
    settings = config.publish
    if not settings.repo:
        raise ConfigError("recipe=publish needs publish.repo=NAMESPACE/NAME, the repository of the model")
    for key in ("repo", "dataset_repo"):
        _check_name(f"publish.{key}", getattr(settings, key))
    token = os.environ.get(settings.token_env)
    if not settings.dry_run and not token:
        raise ConfigError(
            f"publish.dry_run=false uploads and needs a token with write access in {settings.token_env}; "
            "the variable is not set"
        )
    uploads = [model_upload(config)]
    if settings.dataset_repo:
        uploads.append(dataset_upload(config))
    folder = Path(config.run_dir) / "publish"
    write_json(folder / "files.json", [_listed(upload) for upload in uploads])
    for upload in uploads:
        total = sum(file.bytes for file in upload.files)
        print(f"{upload.kind} {upload.repo}: {len(upload.files)} files, {total:,} bytes", flush=True)
        for file in upload.files:
            print(f"  {file.path} ({file.bytes:,} bytes)", flush=True)
    if settings.dry_run:
        print(f"dry run: nothing was uploaded; see {folder}, then use publish.dry_run=false")
        return
    for upload in uploads:
        print(
            f"{upload.kind} {upload.repo}: {_commit(upload, str(token), private=settings.private)}",
            flush=True,
        )


def _check_name(key: str, repo: str | None) -> None:
    """Raise ConfigError for a name that the hub would refuse, also in a dry run."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo or "me/name")
        named = repo is None or repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise ConfigError(
            f"{key}={repo} must be NAMESPACE/NAME, of letters, digits, '-', '_' and '.', at most 96 "
            "characters"
        )


def model_upload(config: Config) -> Upload:
    """Write the card and the results; the checkpoint's own files are uploaded as they are."""
    settings, folder = config.publish, Path(config.run_dir) / "publish" / "model"
    checkpoint = (
        check_checkpoint(Path(config.model.path))
        if config.model.path
        else newest(config, *reversed(TRAINED)).path / "checkpoint"
    )
    readme = checkpoint / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.exists() else f"# {config.model.label}\n"
    entries, notes = entries_of(config)
    for note in notes:
        print(f"note: {note}", flush=True)
    name = str(settings.repo).rpartition("/")[2]
    text = card_with_results(card, name, entries, HUBS, settings.license, settings.source_url)
    write_text(folder / "README.md", text)
    files = [File("README.md", folder / "README.md")]
    for file, content in eval_results(entries, HUBS, settings.source_url).items():
        write_text(folder / ".eval_results" / file, content)
        files.append(File(f".eval_results/{file}", folder / ".eval_results" / file))
    weights = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p != readme]
    files += [File(str(path.relative_to(checkpoint)), path) for path in weights if settings.weights]
    return Upload(str(settings.repo), "model", files)


def entries_of(config: Config) -> tuple[list[Entry], list[str]]:
    """The run's evaluations, those of its tasks included; a run without any gets a note."""
    try:
        return find_runs([config.run_dir])
    except ArtifactError:
        return [], [f"run_dir={config.run_dir} holds no finished evaluation: the card has no accuracies"]


def dataset_upload(config: Config) -> Upload:
    """The built pairs with their card.

    The card has no `configs`: with them datasets 5.2 caches a copy on disk by its folder's name alone, and
    returns the pairs of an older version.
    """
    built = StageFolder.read(Path(config.run_dir), StageName.BUILD_DATA)
    if config.data.name in QUESTIONS or not built.complete or not (built.path / PAIRS).exists():
        raise ArtifactError(
            f"publish.dataset_repo needs built pairs, and run_dir={config.run_dir} holds none; run "
            "recipe=build_data there first, with a data= of votes"
        )
    readme = Path(config.run_dir) / "publish" / "dataset" / "README.md"
    write_text(readme, (built.path / "README.md").read_text(encoding="utf-8"))
    files = [File("README.md", readme)]
    for name, place in DATA_FILES.items():
        source = built.path / name
        if source.is_dir():
            files += [
                File(f"{place}/{path.name}", path) for path in sorted(source.iterdir()) if path.is_file()
            ]
        elif source.is_file():
            files.append(File(place, source))
    return Upload(str(config.publish.dataset_repo), "dataset", files)


def _listed(upload: Upload) -> Mapping[str, Any]:
    return {
        **{key: value for key, value in asdict(upload).items() if key != "files"},
        "files": [{"path": file.path, "bytes": file.bytes} for file in upload.files],
    }


def _commit(upload: Upload, token: str, *, private: bool) -> str:
    """Create a missing repository and commit all files; returns the commit's URL."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    operations = [CommitOperationAdd(file.path, file.source) for file in upload.files]
    try:
        api.create_repo(upload.repo, repo_type=upload.kind, private=private, exist_ok=True)
        commit = api.create_commit(
            upload.repo, operations, commit_message="Publish with results", repo_type=upload.kind
        )
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise BackendError(
            f"publish.repo: the upload to {upload.repo} failed ({first_line(error)}); the same command tries "
            "again"
        ) from None
    return str(commit.commit_url)
