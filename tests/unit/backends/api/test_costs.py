"""The cost of a paid model: an estimate before the start by the user's prices, the spending afterwards."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.report.sections import cost_section, yield_section
from pgenrm_train.backends.api.answers import Answers, Reply
from pgenrm_train.backends.api.costs import announce, characters, estimate
from pgenrm_train.config import Config, EndpointConfig
from recipes.wiring.costs import estimate_judge, judge_cost

SETTINGS = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "name": "stub"}


def test_tokens_calls_and_dollars_follow_from_the_rates():
    settings = EndpointConfig(
        **SETTINGS, max_tokens=1000, dollars_per_million_in=2.0, dollars_per_million_out=8.0
    )
    expected = estimate(settings, 1200.0, 100, tries=4)
    assert expected.calls == (100, 400)
    assert expected.prompt_tokens == (100 * 300, 400 * 400) and expected.completion_tokens == (
        100 * 700,
        400 * 1000,
    )
    assert expected.dollars == pytest.approx((30_000 * 2e-6 + 70_000 * 8e-6, 160_000 * 2e-6 + 400_000 * 8e-6))


def test_answers_on_disk_cost_nothing_and_without_prices_there_are_no_dollars():
    expected = estimate(EndpointConfig(**SETTINGS), 400.0, 10, known_share=1.0)
    assert (
        expected.calls == (0, 0)
        and expected.prompt_tokens == (0, 0)
        and expected.dollars is None
        and "dollars" not in expected.for_manifest()
    )


@pytest.mark.parametrize(
    ("pace", "minutes"),
    [
        ({"requests_per_minute": 60.0}, 10.0),
        ({"tokens_per_minute": 60_000.0}, 10.0),  # 600 × (300 in + 700 out)
        ({"max_in_flight": 4}, 600 * 700 / 50 / 60 / 4),
        ({"max_in_flight": 4, "requests_per_minute": 1.0}, 600.0),
    ],
)
def test_minutes_follow_from_the_slowest_of_the_configured_paces(pace, minutes):
    assert estimate(EndpointConfig(**SETTINGS, **pace), 1200.0, 600).minutes[0] == pytest.approx(minutes)


@pytest.mark.parametrize(
    ("limit", "warning"), [(None, None), (1e9, None), (1.0, "may be spent"), (0.01, "will be spent")]
)
def test_a_budget_that_is_too_small_is_reported_before_the_start(capsys, limit, warning):
    settings = EndpointConfig(**SETTINGS, dollars_per_million_out=8.0, max_tokens=1000, max_dollars=limit)
    announce("teacher", settings, estimate(settings, 100.0, 100, tries=4))
    out = capsys.readouterr().out
    assert "teacher stub: 100 to 400 calls" in out and "0.56 to 3.20 dollars" in out
    assert (f"warning: teacher.max_dollars={limit:g} {warning}" in out) if warning else ("warning" not in out)


def test_characters_are_of_whole_chats():
    assert (
        characters(
            [
                [{"role": "system", "content": "ab"}, {"role": "user", "content": "cd"}],
                [{"role": "user", "content": "efgh"}],
            ]
        )
        == 4
    )
    assert characters([]) == 0


def test_a_judge_reads_every_chain_of_users_with_signals(tmp_path, capsys):
    rows = [{"extra_info": {"explicit": text}} for text in ("{}", json.dumps({"criteria": "short"}))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = Config(run_dir=str(tmp_path))
    config.cre.steps, config.cre.prompts_per_step, config.cre.group_size = 10, 8, 4
    expected = estimate_judge(config, EndpointConfig(**SETTINGS), {"cre": tmp_path / "rows.parquet"})
    assert expected.calls == (160, 160) and "judge stub: 160 calls" in capsys.readouterr().out
    probes = [{"extra_info": {"explicit": text}} for text in ("{}", "{}", '{"criteria": "short"}')]
    pq.write_table(pa.Table.from_pylist(probes), tmp_path / "validation.parquet")
    config.cre.validate_every = 4  # at the start and after every fourth step
    calls = 160 + 1 + -(-config.cre.steps // 4)
    expected = estimate_judge(config, EndpointConfig(**SETTINGS), {"cre": tmp_path / "rows.parquet"})
    assert expected.calls == (calls, calls)


def test_the_cost_of_a_judge_is_summed_over_starts_and_stages(tmp_path):
    settings = EndpointConfig(**SETTINGS, dollars_per_million_in=1e6)
    for folder, tokens in (("cre", 3), ("curriculum", 4), ("cre", 5)):
        answers = Answers(tmp_path / folder)
        answers.add(f"{folder}{tokens}", Reply("x", None, tokens, 1))
        answers.close()
    cost = judge_cost(settings, [tmp_path / name for name in ("cre", "curriculum", "absent")])
    assert cost == {"prompt tokens": 12, "completion tokens": 3, "dollars": 12.0}
    assert judge_cost(settings, [tmp_path / "absent"]) == {} and not (tmp_path / "absent").exists()


def test_the_report_shows_yield_and_cost(tmp_path: Path):
    assert yield_section(tmp_path) is None and cost_section({"m": {}}) is None
    (tmp_path / "build_sec").mkdir()
    facts = {"chains": 3, "users": 2, "asked": 4, "rejected": {"<b>tie</b>": 1}, "teacher": {}}
    (tmp_path / "build_sec" / "yield.json").write_text(json.dumps(facts))
    section = yield_section(tmp_path)
    assert section and list(section.table) == [
        {"reason": "kept", "chains": 3, "share": 0.75},
        {"reason": "<b>tie</b>", "chains": 1, "share": 0.25},
    ]
    paid = cost_section({"api": {"calls": 2, "dollars": 0.5, "failures": {"timeout": 1}}, "local": {}})
    assert paid and list(paid.table) == [{"model": "api", "calls": 2, "dollars": 0.5}]
