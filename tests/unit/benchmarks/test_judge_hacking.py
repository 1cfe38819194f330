"""The table of judge hacking has each validation and the first step with a warning."""

from judge_hacking import ARMS, COLUMNS, SETTINGS, table

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
    for overrides, _ in ARMS.values():
        assert load("recipe=cre", *SETTINGS, *overrides).judge_gold.kind == "oracle"
