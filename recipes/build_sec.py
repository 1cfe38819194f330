"""build_sec: teacher chains → rejection sampling → SFT set; also the untrained nano."""

from collections.abc import Sequence
from pathlib import Path

from pgenrm_train.config import Config, StageName
from pgenrm_train.prompts.writer import PromptWriter, load_pairs
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages import build_sec
from pgenrm_train.stages.stage import prepare, run_stage, with_totals
from recipes import build_data
from recipes.wiring.models import load_tokenizer, make_base
from recipes.wiring.teachers import teacher


def run(config: Config) -> None:
    prepare(config)
    config = with_totals(config, *([Path(config.model.path)] if config.model.path else []))
    build_data.run(config)

    def writer_for(kept: Sequence[build_sec.Kept]) -> PromptWriter:
        return PromptWriter(config.model, load_tokenizer(make_base(config, kept)))

    def body(folder: StageFolder, _: Tracker) -> build_sec.Yield:
        pairs = load_pairs(Path(config.run_dir))
        with teacher(config, pairs, folder.path) as writes:
            return build_sec.run(config, folder, pairs, writes, writer_for)

    # With other settings an unfinished set is rebuilt in place: paid answers are cached by question.
    unfinished = not StageFolder.read(Path(config.run_dir), StageName.BUILD_SEC).complete
    summary = "{chains} chains kept of {asked} requested; teacher: {teacher}"
    run_stage(config, StageName.BUILD_SEC, body, summary, renew=unfinished)
