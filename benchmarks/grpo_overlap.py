"""What a judge costs a GRPO step, and what our trainer costs against stock veRL's, in one run.

From one checkpoint, on the same rows and with the same settings:

    plain        our trainer without a judge, before and after the others
    judge 0.1 …  the same with a stub judge that answers each chain after this share of a step's generation time, without any CPU
    stock        veRL's own PPOTrainerSync, agent loop and reward worker, with our reward as its custom reward function; its replay
                 buffer polls as often as ours

    python benchmarks/grpo_overlap.py --out runs/overlap
    python benchmarks/grpo_overlap.py --out runs/overlap --overrides cre.group_size=16

A step is veRL's own `timing_s/step`: generation, rewards, update and weight sync.  The table gives the median over the steps after the
first.  A judge's verdicts are asked for as each chain ends, so what is left of its latency is that of the chain that ends last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.backends import verl_grpo
from pgenrm_train.config import ROOT, Config, load
from pgenrm_train.rewards import chain_reward

SHARES = (0.1, 0.5, 1.0)  # of the generation time of a plain step
PLAIN = ("plain-before", "plain-after")
ROLLOUT = "actor_rollout_ref.rollout"
STOCK: dict[str, Any] = {
    "trainer.v1.trainer_mode": "sync",
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": __file__,
    "reward.custom_reward_function.name": "compute_score",
    f"{ROLLOUT}.agent.num_workers": 1,
    f"{ROLLOUT}.calculate_log_probs": True,
}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], **_: Any) -> float:
    """Stock veRL's reward hook over our reward."""
    return chain_reward(solution_str, int(ground_truth), n_responses=int(extra_info["n_responses"])).total


def stub_judge(times: str, share: float) -> Any:
    """A judge of `share` times the generation time that the plain phase has measured."""
    seconds = share * median(Path(times), "timing_s/gen")

    def judge(chain_text: str, example: Mapping[str, Any]) -> float:
        time.sleep(seconds)
        return 0.5

    return judge


def median(times: Path, name: str) -> float:
    lines = [json.loads(line)["data"] for line in times.read_text().splitlines()]
    return statistics.median(line[name] for line in lines[1:])  # the first step imports and compiles


def times_of(out: Path, phase: str) -> Path:
    return out / "times" / "pgenrm-train" / f"{phase}.jsonl"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="run folder; a finished measurement in it is kept")
    parser.add_argument("--start", type=Path, default=ROOT / "tests/data/psi_nano", help="checkpoint in Hugging Face format")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--overrides", nargs="*", default=[], help="more Hydra overrides")
    parser.add_argument("--child", choices=("ours", "stock"), help=argparse.SUPPRESS)
    return parser.parse_args()


def configuration(args: argparse.Namespace) -> Config:
    return load("recipe=cre", "pipeline.budget=smoke", "tracking=none", f"run_dir={args.out.resolve()}", f"cre.steps={args.steps}",
                f"model.path={args.start}", "cre.save_every=0", "cre.validate_every=0", "cre.rows=96", *args.overrides)  # fmt: skip


def base_phase(config: Config) -> Any:
    """CRE's rows as the recipe makes them."""
    from recipes import build_data, grpo

    build_data.run(config)
    return grpo.phase(config, "cre", Path(config.model.path or ""), config.judge)


def timed(config: Config, section: str, **where: Any) -> Any:
    """`to_verl`, with veRL's own file logger: one file a phase."""
    composed = to_verl(config, section, **where)
    composed.trainer.logger, composed.trainer.experiment_name = ["file"], where["work_dir"].name
    return composed


to_verl = verl_grpo.to_verl


def ours(config: Config, out: Path) -> None:
    verl_grpo.to_verl = timed  # type: ignore[assignment]
    base = dataclasses.replace(base_phase(config), judge=None, judge_kwargs={}, validation=None)
    chains = config.cre.prompts_per_step * config.cre.group_size

    def phase(name: str, **more: Any) -> Any:
        return dataclasses.replace(base, work_dir=out / name, judge_in_flight=chains, **more)

    kwargs = {"times": str(times_of(out, PLAIN[0]))}
    judged = [
        phase(f"judge-{share}", judge="grpo_overlap:stub_judge", judge_kwargs=kwargs | {"share": share}) for share in SHARES
    ]
    verl_grpo.train(config, [phase(PLAIN[0]), *judged, phase(PLAIN[1])])


def stock(config: Config, out: Path) -> None:
    import transfer_queue
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from pgenrm_train.backends.verl_session import Session, Watchdog

    class StockSession(Session):
        def _start_trainer(self, verl: Any) -> None:
            transfer_queue.init(verl.transfer_queue)
            self.trainer = PPOTrainerSync(verl)
            self.trainer.replay_buffer.poll_interval = 0.05
            self.trainer.init()

    base = base_phase(config)
    verl = timed(config, "cre", start=base.start, rows=base.rows, work_dir=out / "stock", total_steps=base.steps)
    for key, value in STOCK.items():
        OmegaConf.update(verl, key, value, force_add=True)
    with StockSession(config, verl, Watchdog(1800.0, print)) as session:
        trainer = session.trainer
        trainer.fit(
            AgentLoopManagerTQ.create(
                config=verl, llm_client=trainer.get_llm_client(), teacher_client=trainer.get_teacher_client(),
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
        )  # fmt: skip


def run_child(args: argparse.Namespace, config: Config, which: str) -> None:
    folders = (str(ROOT), str(ROOT / "benchmarks"))
    env = os.environ | verl_grpo.environment(config) | {"VERL_FILE_LOGGER_ROOT": str(args.out.resolve() / "times")}
    env["PYTHONPATH"] = os.pathsep.join((*folders, env["PYTHONPATH"]))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{which}.log").open("w") as log:
        code = subprocess.run([sys.executable, *sys.argv, "--child", which], env=env, cwd=ROOT, stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"error: {which} ended with code {code}; see {args.out / f'{which}.log'}")


def report(out: Path) -> None:
    seconds = {name: median(times_of(out, name), "timing_s/step") for name in (*PLAIN, *(f"judge-{s}" for s in SHARES), "stock")}
    plain = statistics.fmean(seconds[name] for name in PLAIN)
    generation = statistics.fmean(median(times_of(out, name), "timing_s/gen") for name in PLAIN)
    print(
        f"plain step {plain:.2f} s ({' and '.join(f'{seconds[name]:.2f}' for name in PLAIN)}), generation {generation:.2f} s of it"
    )
    for share in SHARES:
        step = seconds[f"judge-{share}"]
        print(f"judge of {share:.0%} of the generation time: step {step:.2f} s = {step / plain:.2f} × plain")
    print(f"stock veRL step {seconds['stock']:.2f} s; ours = {plain / seconds['stock']:.2f} × stock")


def main() -> None:
    args = arguments()
    config = configuration(args)
    if args.child:
        {"ours": ours, "stock": stock}[args.child](config, args.out.resolve())
        return
    for which, last in (("ours", PLAIN[1]), ("stock", "stock")):
        file = times_of(args.out, last)
        if not file.exists() or len(file.read_text().splitlines()) < args.steps:
            run_child(args, config, which)
    report(args.out)


if __name__ == "__main__":
    main()
