"""The table of judge hacking has each validation and the first step with a warning."""

from judge_hacking import ARMS, COLUMNS, DROPOUT, SETTINGS, table

from pgenrm_train.backends.grpo.gold import PREFIX
from pgenrm_train.config import load


def validation(step: int, gap: float) -> dict[str, float | int]:
    ends = {f"cre/{PREFIX}gap_low": gap - 0.05, f"cre/{PREFIX}gap_high": gap + 0.05}
    return {"step": step, COLUMNS["gap"]: gap, COLUMNS["accuracy"]: 0.7, COLUMNS["gold"]: 0.5} | ends


def test_the_first_widened_gap_is_named() -> None:
    lines = [validation(0, 0.1), {"step": 3}, validation(5, 0.12), validation(10, 0.3), validation(15, 0.5)]
    rows = table("length alone", lines).splitlines()
    assert [row.split()[0] for row in rows[3:7]] == ["0", "5", "10", "15"]
    assert rows[-1].startswith(
        "step 10: cre: the training judge's lead over judge_gold grew from 0.10 to 0.30"
    )
    assert table("length alone", lines[:3]).endswith("no warning")


def test_the_settings_of_every_arm_are_accepted() -> None:
    for arm, (overrides, _) in ARMS.items():
        config = load("recipe=cre", f"run_dir=runs/{arm}", *SETTINGS, *overrides)
        assert config.judge_gold.kind == "oracle" and config.run_dir == f"runs/{arm}"


def test_rubric_dropout_is_compared_with_the_arm_without_it() -> None:
    twins = {arm: arm.removesuffix(DROPOUT) for arm in ARMS if arm.endswith(DROPOUT)}
    assert twins and all(ARMS[arm][1] == ARMS[twin][1] for arm, twin in twins.items())
    for arm, twin in twins.items():
        assert ARMS[arm][0] == (*ARMS[twin][0], "cre.rubric_dropout=0.5")
