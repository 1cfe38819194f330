"""Cost of a judge in a GRPO step, and our trainer against stock veRL's, in one run.

From one checkpoint, on the same rows and with the same settings:

    sync     our trainer with a stub judge that takes no CPU.  Its verdicts come at once, or after 10, 50 or
             100 % of a step's generation time.  Latencies alternate by step, so other load affects all
    async    the same with cre.mode=async, in the same session
    stock    veRL's own PPOTrainerSync, agent loop and reward worker, with our reward as its custom reward
             function; its replay buffer polls as often as ours

    python benchmarks/speed/grpo_overlap.py --out runs/overlap
    python benchmarks/speed/grpo_overlap.py --out runs/overlap --rounds 3
        --overrides cre.prompts_per_step=8 cre.mini_batch_prompts=8

A step is veRL's own `timing_s/step`: generation, rewards, update and weight sync, and as on GPUs the
log-probabilities of actor and reference.  Prints medians, and for the judge the median over rounds of the
ratio to the round's step with instant verdicts.  A verdict is requested when its chain ends and awaited
after the log-probabilities.  So with `sync` the rest of a judge's latency is that of the chain that ends
last, less the time of the log-probabilities.  With `async` an update, a weight sync and the next step's
generation are in between too.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.backends.grpo import engine
from pgenrm_train.backends.grpo.phase import Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.backends.grpo.session import Session
from pgenrm_train.config import ROOT, Config, load
from pgenrm_train.config.grpo import ASYNC, SYNC
from pgenrm_train.config.setting import known
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.rewards.reward import chain_reward
from pgenrm_train.run.process import die_with_parent, end_on_sigterm

JUDGES = {SYNC: "stub_judge", ASYNC: "stub_judge_ahead"}
PHASES = {"ours": (SYNC, ASYNC), "stock": ("stock",)}  # by child process
SHARES = (0.0, 0.1, 0.5, 1.0)  # of the generation time of a step whose verdicts come at once
ROLLOUT = "actor_rollout_ref.rollout"
TIMES = "VERL_FILE_LOGGER_ROOT"  # folder of veRL's file logger
STOCK: dict[str, Any] = {
    "trainer.v1.trainer_mode": "sync",
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": __file__,
    "reward.custom_reward_function.name": "compute_score",
    f"{ROLLOUT}.agent.num_workers": 1,
    f"{ROLLOUT}.calculate_log_probs": True,
}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], **_: Any
) -> float:
    """Stock veRL's reward hook over our reward."""
    return chain_reward(solution_str, int(ground_truth), n_responses=int(extra_info["n_responses"])).total


def stub_judge(mode: str = SYNC) -> Any:
    """Judge with the latency of the step whose chains are sampled; veRL's log has the steps before."""
    out = Path(os.environ[TIMES]).parent
    times = times_of(out, mode)

    def judge(chain_text: str, example: Mapping[str, Any]) -> float:
        done = read_times(times)
        if share := share_of(len(done) + (2 if mode == ASYNC else 1)):
            generation = of_share(done, 0.0, "timing_s/gen")
            # `async` samples its third step before its second has ended
            generation = generation or of_share(read_times(times_of(out, SYNC)), 0.0, "timing_s/gen")
            time.sleep(share * statistics.median(generation))
        return 0.5

    return judge


def stub_judge_ahead() -> Any:
    return stub_judge(ASYNC)


def share_of(step: int) -> float:
    """Latency of a step's verdicts; the first step imports and compiles, and is not measured."""
    return SHARES[(step - 2) % len(SHARES)] if step > 1 else 0.0


def read_times(file: Path) -> list[dict[str, float]]:
    return [json.loads(line)["data"] for line in file.read_text().splitlines()] if file.exists() else []


def of_share(times: Sequence[Mapping[str, float]], share: float, name: str) -> list[float]:
    """Values of the measured steps with this latency; `report` drops the last step, which also saves."""
    return [line[name] for step, line in enumerate(times, start=1) if step > 1 and share_of(step) == share]


def times_of(out: Path, phase: str) -> Path:
    return out / "times" / "pgenrm-train" / f"{phase}.jsonl"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="run folder; a finished measurement in it is kept"
    )
    parser.add_argument(
        "--start", type=Path, default=ROOT / "tests/data/psi_nano", help="checkpoint in Hugging Face format"
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps with each latency")
    parser.add_argument("--overrides", nargs="*", default=[], help="more Hydra overrides")
    parser.add_argument("--child", choices=tuple(PHASES), help=argparse.SUPPRESS)
    return parser.parse_args()


def steps_of(rounds: int) -> int:
    """Measured steps, and the first and the last."""
    return 1 + rounds * len(SHARES) + 1


def configuration(args: argparse.Namespace) -> Config:
    return load(
        "recipe=cre",
        "pipeline.budget=smoke",
        "tracking=none",
        f"run_dir={args.out.resolve()}",
        f"cre.steps={steps_of(args.rounds)}",
        f"model.path={args.start}",
        "cre.kl_coefficient=0.001",
        "cre.save_every=0",
        "cre.validate_every=0",
        "cre.rows=96",
        *args.overrides,
    )


def base_phase(config: Config) -> Phase:
    """CRE's rows as the recipe makes them."""
    from recipes import build_data
    from recipes.wiring import grpo

    build_data.run(config)
    return grpo.phase(config, StageName.CRE, Path(config.model.path or ""))


def timed(config: Config, section: str, **where: Any) -> Any:
    """`to_verl` with veRL's own file logger: one file per phase."""
    composed = to_verl(config, section, **where)
    # By default a CPU run uses the sampler's log-probabilities as the actor's.
    composed.algorithm.rollout_correction.bypass_mode = False
    composed.trainer.logger, composed.trainer.experiment_name = ["file"], where["work_dir"].name
    return composed


to_verl = engine.to_verl


def ours(config: Config, out: Path) -> None:
    engine.to_verl = timed  # type: ignore[assignment]
    in_flight = known(config.cre.prompts_per_step) * config.cre.group_size
    base = base_phase(config)
    phases = [
        dataclasses.replace(
            base,
            work_dir=out / mode,
            judge=JudgeSpec(f"grpo_overlap:{judge}", in_flight=in_flight),
            settings={"mode": mode},
        )
        for mode, judge in JUDGES.items()
    ]
    engine.train(config, phases)


def stock(config: Config, out: Path) -> None:
    import transfer_queue
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class StockSession(Session):
        def _start_trainer(self, verl: Any) -> None:
            transfer_queue.init(verl.transfer_queue)
            self.trainer = PPOTrainerSync(verl)
            self.trainer.replay_buffer.poll_interval = 0.05
            self.trainer.init()

    base = base_phase(config)
    verl = timed(
        config, "cre", start=base.start, rows=base.rows, work_dir=out / "stock", total_steps=base.steps
    )
    for key, value in STOCK.items():
        OmegaConf.update(verl, key, value, force_add=True)
    with StockSession(config, verl, 1800.0, out / "stock" / "report.json") as session:
        trainer = session.trainer
        trainer.fit(
            AgentLoopManagerTQ.create(
                config=verl,
                llm_client=trainer.get_llm_client(),
                teacher_client=trainer.get_teacher_client(),
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
        )


def run_child(args: argparse.Namespace, config: Config, which: str) -> None:
    folders = (str(ROOT), str(Path(__file__).resolve().parent))
    env = os.environ | engine.verl_variables(config) | {TIMES: str(args.out.resolve() / "times")}
    env["PYTHONPATH"] = os.pathsep.join((*folders, env["PYTHONPATH"]))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{which}.log").open("w") as log:
        code = subprocess.run(
            [sys.executable, *sys.argv, "--child", which], env=env, cwd=ROOT, stdout=log, stderr=log
        ).returncode
    if code:
        sys.exit(f"error: {which} ended with code {code}; see {args.out / f'{which}.log'}")


def report(out: Path) -> None:
    at_once = [report_mode(mode, read_times(times_of(out, mode))[:-1]) for mode in JUDGES]
    print(f"async, verdicts at once: {at_once[1] / at_once[0]:.2f} × sync")
    stock = read_times(times_of(out, "stock"))[1:-1]
    theirs = statistics.median(line["timing_s/step"] for line in stock)
    print(f"stock veRL: step {theirs:.2f} s; sync = {at_once[0] / theirs:.2f} × stock")


def report_mode(mode: str, ours: Sequence[Mapping[str, float]]) -> float:
    """Print the steps of a mode by latency; returns the median step with verdicts at once."""
    at_once = of_share(ours, 0.0, "timing_s/step")
    generation = statistics.median(of_share(ours, 0.0, "timing_s/gen"))
    hidden = sum(
        statistics.median(of_share(ours, 0.0, f"timing_s/{name}")) for name in ("old_log_prob", "ref")
    )
    print(
        f"{mode}, verdicts at once: step {statistics.median(at_once):.2f} s, of which "
        f"{generation:.2f} s generation and "
        f"{hidden:.2f} s log-probabilities ({len(at_once)} rounds)"
    )
    for share in SHARES[1:]:
        steps = of_share(ours, share, "timing_s/step")
        ratio = statistics.median(step / plain for step, plain in zip(steps, at_once, strict=True))
        waits = statistics.median(of_share(ours, share, "timing_s/verdicts"))
        # the same step without its wait: other load between steps does not count
        within = [
            line["timing_s/step"] / (line["timing_s/step"] - line["timing_s/verdicts"])
            for step, line in enumerate(ours, start=1)
            if step > 1 and share_of(step) == share
        ]
        print(
            f"{mode}, judge of {share:.0%} of the generation time: step {statistics.median(steps):.2f} s = "
            f"{ratio:.2f} × at once; waits {waits:.2f} s for verdicts, "
            f"{statistics.median(within):.2f} × the step without"
        )
    return statistics.median(at_once)


def main() -> None:
    args = arguments()
    config = configuration(args)
    if args.child:
        die_with_parent(signal.SIGTERM)
        end_on_sigterm()
        {"ours": ours, "stock": stock}[args.child](config, args.out.resolve())
        return
    for which, phases in PHASES.items():
        if min(len(read_times(times_of(args.out, phase))) for phase in phases) < known(config.cre.steps):
            run_child(args, config, which)
    report(args.out)


if __name__ == "__main__":
    main()
