"""Train a policy for several users with veRL's own GRPO and the scoring service, and measure true utility.

    python -m examples.policy.train --reward-model runs/personaworld-nano-demo --out runs/policy

1. Draw new users of PersonaWorld, and their votes.
2. Teach a policy the language of the answers, by SFT on texts that carry no user's taste.
3. Store each user's votes in the service.
4. Run `verl.trainer.main_ppo` with `pgenrm_train/client.py` as its reward function, once with the users' own
   votes and once, as the control, with those of other users.
5. Read true utilities from the answers that veRL dumps.

Each finished part is kept: the same command continues.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from data_builders.sources import personaworld
from examples.policy import report
from examples.policy.world import Asker, chats_of, draw_askers, histories, prompt_of, rows_of, split_queries
from pgenrm_train import client
from pgenrm_train.client import PersonalReward, ScoringError
from pgenrm_train.config import Config, load
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ArtifactError, BackendError, PGenRMError
from pgenrm_train.files import read_json, write_json, write_table
from pgenrm_train.run.process import child_environment, die_with_parent, end_on_sigterm, run_child, stop_child

ENVIRONMENT = child_environment()  # before SFT sets variables of its own
OWN, OTHERS = "own", "others"  # whose votes the reward model reads
ROLLOUT = "actor_rollout_ref.rollout"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/policy"), help="folder of the run")
    parser.add_argument(
        "--plan", action="store_true", help="print needs and hours of the trainings, start nothing"
    )
    parser.add_argument("--reward-model", type=Path, help="checkpoint or run folder to serve")
    parser.add_argument("--url", help="a running service, in place of --reward-model")
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_name("nano.txt"))
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--votes", type=int, default=6, help="votes per user and scenario")
    parser.add_argument("--queries", type=int, default=2, help="evaluated queries per user and scenario")
    parser.add_argument(
        "--control", action=argparse.BooleanOptionalAction, default=True, help="also train on others' votes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="more settings, e.g. cre.steps=10")
    args = parser.parse_intermixed_args(words)
    args.arms = [OWN, OTHERS] if args.control else [OWN]
    if not args.settings.exists():
        parser.error(f"--settings: {args.settings} does not exist")
    if not args.plan and (args.reward_model is None) == (args.url is None):
        parser.error("expected one of --reward-model and --url")
    if args.users < 2:
        parser.error("--users: expected at least 2, because the control exchanges their votes")
    return args


def settings_of(path: Path) -> list[str]:
    """The overrides in a settings file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def configuration(args: argparse.Namespace, *more: str) -> Config:
    fixed = ["recipe=cre", "tracking=none", "cre.save_every=0", f"run_dir={args.out.resolve()}"]
    return load(*fixed, f"seed={args.seed}", *settings_of(args.settings), *args.overrides, *more)


def plan(args: argparse.Namespace) -> int:
    """Print memory and hours of the policy's SFT and GRPO by the planner; 1 if one does not fit."""
    from pgenrm_train.cluster.planning.plan import plan_of
    from pgenrm_train.cluster.planning.table import show

    plans = [plan_of(configuration(args, f"plan.stage={stage}")) for stage in ("psi", "cre")]
    for each in plans:
        show(each)
    return 0 if all(each.fits for each in plans) else 1


# ---- the policy before GRPO --------------------------------------------------------------------------------


def teach(config: Config, users: Sequence[str]) -> Path:
    """The checkpoint of SFT on PersonaWorld's texts; its prompts name random users."""
    from pgenrm_train.backends.sft import engine
    from pgenrm_train.backends.sft.nano import make_nano
    from pgenrm_train.backends.sft.settings import set_variables
    from pgenrm_train.config import psi_cluster
    from recipes.psi import with_zero_stage

    folder = Path(config.run_dir) / "sft"
    checkpoint, chats = folder / "checkpoint", folder / "chats.parquet"
    if checkpoint.exists():
        return checkpoint
    votes = takewhile(lambda vote: vote.user_split != "val", personaworld.build(config.data, config.seed))
    rows = chats_of(votes, users, config.seed)
    write_table(chats, rows)
    start: Path | str = config.model.path or config.model.name
    if config.model.kind == "nano" and config.model.path is None:
        start = folder / "base"
        texts = [message["content"] for row in rows for message in row["messages"]]
        make_nano(start, texts, [prompt_of(user, "") for user in users], config.model.nano, config.seed)
    set_variables(psi_cluster(config))
    return engine.train(with_zero_stage(config, folder), chats, start=start, work_dir=folder).checkpoint


# ---- the service -------------------------------------------------------------------------------------------


@contextmanager
def service(reward_model: Path, out: Path) -> Iterator[str]:
    """Start the service as another process and yield its URL.  Raises BackendError if it does not start."""
    which = "model.path" if (reward_model / "config.json").exists() else "run_dir"
    words = [f"{which}={reward_model.resolve()}", f"serve.store=sqlite:///{out.resolve()}/users.db"]
    if which == "model.path":
        words.append(f"run_dir={out.resolve() / 'service'}")
    command = [sys.executable, "-m", "pgenrm_train", "recipe=serve", "serve.local=true", "serve.port=0"]
    with (out / "service.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "tracking=none", *words],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=die_with_parent,
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"serving .* at (http://\S+)", line):
                yield address[1]
                return
        raise BackendError(f"the service did not start: {_last_line(out / 'service.log')}")
    finally:
        stop_child(process, patience=20.0)


def store_votes(url: str, askers: Sequence[Asker], arm: str) -> None:
    """Replace the votes of all askers.  Raises BackendError if the service does not answer."""
    reward = PersonalReward(url, attempts=2)
    try:
        for key, votes in histories(askers, of_others=arm == OTHERS).items():
            reward.put_votes(key, votes)
    except ScoringError as error:
        raise BackendError(f"the service cannot store votes: {error.message}") from None


# ---- GRPO by veRL's own trainer ----------------------------------------------------------------------------


def verl_settings(config: Config, folder: Path, start: Path, url: str, *, evaluate_start: bool) -> Any:
    """veRL's complete configuration (an OmegaConf DictConfig): its own trainer, with our client as reward.

    Shapes, memory and precision are those that this package gives veRL on the same machine.
    """
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.config import to_verl

    grpo, steps, rows = config.cre, known(config.cre.steps), folder / "train.parquet"
    settings = to_verl(config, "cre", start=start, rows=rows, work_dir=folder, total_steps=steps)
    keys: dict[str, object] = {
        "trainer.v1.trainer_mode": "sync",
        "trainer.logger": ["console"],
        "trainer.val_before_train": evaluate_start,
        "trainer.test_freq": steps,
        "trainer.validation_data_dir": str(folder / "evaluation"),
        "trainer.rollout_data_dir": str(folder / "rollouts"),
        "data.val_files": str(folder / "evaluation.parquet"),
        "data.shuffle": True,
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.val_kwargs.n": grpo.group_size,
        f"{ROLLOUT}.val_kwargs.temperature": grpo.temperature,
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.agent.num_workers": 1,
        # One worker sees all rollouts of a prompt, and sends them as one group.
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": client.__file__,
        "reward.custom_reward_function.name": "compute_score",
        "reward.custom_reward_function.reward_kwargs": {"url": url, "group_size": grpo.group_size},
        "ray_kwargs.ray_init.address": "local",
        "ray_kwargs.ray_init.include_dashboard": False,
    }
    if config.cluster.device == "cpu":
        ranks = config.cluster.ranks
        # Logical CPUs and GPUs, as in our own sessions: veRL's actors request more than a small machine has.
        keys |= {
            "ray_kwargs.ray_init.num_cpus": 8 + 4 * ranks,
            "ray_kwargs.ray_init.num_gpus": ranks,
            "ray_kwargs.ray_init.object_store_memory": 256 * 1024**2,
        }
    for key, value in keys.items():
        OmegaConf.update(settings, key, value, force_add=True)
    return settings


def train(config: Config, folder: Path, start: Path, url: str, *, evaluate_start: bool) -> None:
    """Run veRL's trainer in a child process.  Raises BackendError if it fails."""
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.config import verl_variables

    settings = verl_settings(config, folder, start, url, evaluate_start=evaluate_start)
    scratch = Path(tempfile.mkdtemp(prefix="pg_", dir="/tmp"))  # Unix sockets have short paths
    OmegaConf.update(settings, "ray_kwargs.ray_init._temp_dir", str(scratch), force_add=True)
    OmegaConf.save(settings, folder / "verl.yaml")
    command = [
        sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(folder), "--config-name", "verl",
        f"hydra.run.dir={folder}", "hydra.output_subdir=null",
    ]  # fmt: skip
    steps = known(config.cre.steps)
    try:
        code = run_child(
            command,
            ENVIRONMENT | verl_variables(config),
            patience=60.0,
            relay=lambda lines: _relay(lines, folder / "verl.log", f"{folder.name}: step {{}}/{steps}"),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if code or not (folder / "evaluation" / f"{steps}.jsonl").exists():
        reason = f"veRL ended with code {code} before the evaluation of step {steps}"
        raise BackendError(f"{reason}: {_last_line(folder / 'verl.log')} (see {folder / 'verl.log'})")


def _relay(lines: IO[str], log: Path, progress: str) -> None:
    """Write veRL's output to a file, and print one line per step."""
    with log.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(line)
            out.flush()
            if step := re.search(r"\bstep:(\d+) - .*critic/score/mean:([\d.-]+)", line):
                print(progress.format(step[1]), f"reward {float(step[2]):.2f}", flush=True)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|error)\b: ", line)]
    return (errors or lines or ["no output"])[-1].strip()[:300]


# ---- the run -----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train the arms and write `results.json` and `steps.jsonl`; returns the results."""
    config, out = configuration(args), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check_settings(args, out / "settings.json")
    askers = draw_askers(args.users, args.votes, args.seed)
    start = teach(config, list(dict.fromkeys(asker.user for asker in askers)))
    todo = [arm for arm in args.arms if not _finished(config, out / arm)]
    if todo and args.url:
        _train_arms(config, args, askers, start, args.url, todo)
    elif todo:
        with service(args.reward_model, out) as url:
            _train_arms(config, args, askers, start, url, todo)
    return summarise(config, args, askers)


def check_settings(args: argparse.Namespace, file: Path) -> None:
    """Write what the parts of a run depend on.  Raises ArtifactError for a folder of another run."""
    settings: dict[str, object] = {
        "users": args.users,
        "votes": args.votes,
        "queries": args.queries,
        "seed": args.seed,
        "reward_model": args.reward_model and str(args.reward_model.resolve()),
        "settings": sorted([*settings_of(args.settings), *args.overrides]),
    }
    made: dict[str, object] = read_json(file) if file.exists() else settings
    if changed := [name for name, value in settings.items() if made.get(name) != value]:
        raise ArtifactError(
            f"{file.parent} holds a run with other {', '.join(changed)}; use another --out, or delete it"
        )
    write_json(file, settings)


def _finished(config: Config, folder: Path) -> bool:
    return (folder / "evaluation" / f"{known(config.cre.steps)}.jsonl").exists()


def _train_arms(
    config: Config, args: argparse.Namespace, askers: Sequence[Asker], start: Path, url: str, arms: list[str]
) -> None:
    training, evaluation = split_queries(args.seed)
    evaluation = {scenario: queries[: args.queries] for scenario, queries in evaluation.items()}
    for arm in arms:
        folder = args.out.resolve() / arm
        store_votes(url, askers, arm)
        write_table(folder / "train.parquet", rows_of(askers, training))
        write_table(folder / "evaluation.parquet", rows_of(askers, evaluation))
        # Both arms start from the same policy, so its answers are evaluated once.
        train(config, folder, start, url, evaluate_start=arm == args.arms[0])


def summarise(config: Config, args: argparse.Namespace, askers: Sequence[Asker]) -> dict[str, object]:
    """Print and write true utility before and after, its intervals, and the signs of hacking."""
    out, steps = args.out.resolve(), known(config.cre.steps)
    per_step = known(config.cre.prompts_per_step) * config.cre.group_size
    asked = len(askers) * args.queries * config.cre.group_size
    before = report.read_answers(out / args.arms[0] / "evaluation" / "0.jsonl", askers)
    after = {
        arm: report.read_answers(out / arm / "evaluation" / f"{steps}.jsonl", askers) for arm in args.arms
    }
    signs = {"before": report.signs(before, asked)}
    signs |= {f"after, {arm} votes": report.signs(answers, asked) for arm, answers in after.items()}
    differences = {f"{arm}: after − before": report.paired(after[arm], before) for arm in after}
    if len(after) == 2:
        differences["own − others, after"] = report.paired(after[OWN], after[OTHERS])
    popular = sum(asker.popular for asker in askers) / len(askers)
    print(
        f"\n{len(askers)} pairs of user and scenario, {asked} answers per evaluation\n{report.table(signs)}"
    )
    print(f"utility of the population's favourite answer: {popular:.3f}; the best possible: 1\n")
    for name, difference in differences.items():
        print(f"true utility, {name}: {difference}, 95 % interval over {args.users} users")
    logged: dict[str, list[Mapping[str, float | None]]] = {}
    for arm in args.arms:
        dumps = [out / arm / "rollouts" / f"{step}.jsonl" for step in range(1, steps + 1)]
        logged[arm] = [report.signs(report.read_answers(dump, askers), per_step) for dump in dumps]
        shown = sorted({*range(0, steps, max(1, steps // 8)), steps - 1})
        print(f"\nRollouts, {arm} votes\n{report.table({f'step {i + 1}': logged[arm][i] for i in shown})}")
        print(report.hacking(logged[arm]))
    results: dict[str, object] = {
        "users": args.users,
        "seed": args.seed,
        "steps": steps,
        "signs": signs,
        "utility": {name: asdict(difference) for name, difference in differences.items()},
        "popular": popular,
        "training": logged,
    }
    write_json(out / "results.json", results)
    return results


def main() -> int:
    end_on_sigterm()
    args = arguments()
    try:
        if args.plan:
            return plan(args)
        run(args)
    except PGenRMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
