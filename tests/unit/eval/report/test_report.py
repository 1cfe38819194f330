"""The report is one inert file with its content: it fetches nothing and runs no text of a model or user."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from eval.report.console import text_table
from eval.report.report import ChainView, Curve, Report, Section, write_markdown, write_report
from pgenrm_train.records.pairs import HistoryItem

ATTACK = '</pre></script><script>alert("owned")</script><img src=x onerror=alert(1)> {{ 7*7 }} "\'>'


def chain(**fields):
    given = {
        "pair_id": "p1",
        "user_id": "u1",
        "query": "Which?",
        "responses": ("first", "second"),
        "label": 1,
        "text": "raw chain",
        "declared": (4.0, 8.5),
    }
    return ChainView(**{**given, **fields})


def full_report(text="plain"):
    hostile = chain(
        pair_id=text,
        user_id=text,
        kind=text,
        stage=text,
        query=text,
        responses=(text, f"{text}, again"),
        text=text,
        analysis=text,
        history=(HistoryItem(text, text, text),),
        criteria=((text, 60.0), ("brevity", 40.0)),
        criterion_scores=((4.0, 9.0), (4.0, None)),
        verified=(4.0, 8.6),
        issues=(text,),
    )
    return Report(
        title=f"Report {text}",
        run={"model": text, "seeds": [0, 1], "versions": {"torch": "2.9", "none": None}},
        stages=[
            {
                "stage": f"psi {text}",
                "accuracy": 0.6676,
                "stderr": 0.0123,
                "ci95": [0.61, 0.72],
                "ties": 1200,
                "seconds": 3.25,
            },
            {
                "stage": "cre",
                "accuracy": 0.7,
                "stderr": None,
                "ci95": [0.65, 0.75],
                "hard_accuracy": 0.5,
                "ties": 0,
            },
        ],
        comparisons=[{"baseline": "majority", "accuracy": 0.55, "ci95": None, "failures": {"length": 2}}],
        sections=[
            Section("By kind", text, pd.DataFrame({"kind": [text], "pairs": [np.int64(3)]})),
            ("Empty", "", []),
        ],
        curves=[
            Curve(
                f"Reward {text}",
                [0, 1, 2],
                {f"mean {text}": [0.1, None, 0.4], "$x": [0.0, 0.1, 0.2]},
                text,
                "reward",
            )
        ],
        notes=["judge=none: no process reward", text],
        chains=[hostile, chain(failure="no_marker", declared=None, text=text)],
    )


class Page(HTMLParser):
    """Start tags with their attributes, and the ids."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]


def render(tmp_path, report):
    write_report(tmp_path / "deep" / "report.html", report)
    return (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")


def test_model_and_user_text_is_inert(tmp_path):
    html = render(tmp_path, full_report(ATTACK))
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "&lt;script&gt;alert" in html
    assert "49" not in re.findall(r"Report [^<]*", html)[0]  # text is no template
    clean = Page(render(tmp_path, full_report()))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]


def test_the_page_is_self_contained(tmp_path):
    html = render(tmp_path, full_report())
    page = Page(html)
    assert not re.search(r"(?:https?:)?//[\w.]+", re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    assert "@import" not in html
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    policy = next(
        attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_ids_are_unique_and_references_resolve(tmp_path):
    html = render(tmp_path, full_report())
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert {a or b for a, b in references} <= set(page.ids)
    labels = {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs}
    assert labels <= set(page.ids)


def test_tables_show_percentages_intervals_and_gaps(tmp_path):
    html = render(tmp_path, full_report())
    assert "66.8 %" in html
    assert "[61.0, 72.0]" in html
    assert "1\u202f200" in html  # a count, not a percentage
    assert "length 2" in html
    assert "hard accuracy" in html
    assert html.count("<caption") == html.count("<table")


def test_chains_show_rubric_scores_verdict_and_label(tmp_path):
    html = render(tmp_path, full_report())
    first, second = re.findall(r'<article class="chain".*?</article>', html, flags=re.DOTALL)
    assert "hit" in first
    assert "declared by the model" in first
    assert re.search(r"verified \(recomputed\).*8\.6", first, flags=re.DOTALL)
    assert "response 2" in first
    assert "no verdict" in second
    assert "no_marker" in second


@pytest.mark.parametrize(
    ("fields", "outcome", "verdict"),
    [
        ({"declared": (4.0, 8.5)}, "hit", 1),
        ({"declared": (9.0, 8.5)}, "miss", 0),
        ({"declared": (8.5, 8.5)}, "tie", None),
        ({"declared": None, "failure": "no_marker"}, "failure", None),
        ({"declared": (4.0, 8.5, 8.5), "responses": ("a", "b", "c")}, "tie", None),
    ],
)
def test_outcome_of_a_chain(fields, outcome, verdict):
    assert (chain(**fields).outcome, chain(**fields).verdict) == (outcome, verdict)


def test_an_empty_report_and_odd_text_can_be_written(tmp_path):
    assert "No stage has been evaluated yet" in render(tmp_path, Report("Nothing"))
    html = render(
        tmp_path, Report("Odd \ud800 \x00 text", chains=[chain(text="\udfff", criteria=(("a", 50.0),))])
    )
    assert "Odd ?" in html


def test_writing_replaces_the_file_and_is_repeatable(tmp_path):
    first = render(tmp_path, full_report())
    assert render(tmp_path, full_report()) == first
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_markdown_holds_the_tables_and_escapes_text(tmp_path):
    write_markdown(tmp_path / "report.md", full_report("a|b\n<script>"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| stage | accuracy | stderr | ties | seconds | hard accuracy |" in text
    assert "| 66.8 % \\[61.0, 72.0\\] | 1.2 % |" in text
    assert "a\\|b \\<script\\>" in text
    assert "1 curves and 2 evaluation chains" in text
    assert "No rows." in text


def test_the_curriculums_mix_and_pass_rates_are_curves(tmp_path):
    from eval.report.figures import training_curves

    (tmp_path / "curriculum").mkdir()
    lines = [
        {
            "step": n,
            "curriculum/reward/outcome": 0.5,
            "curriculum/curriculum/target_hard_share": 0.3 + n / 10,
            "curriculum/curriculum/realised_hard_share": 0.25,
            "curriculum/curriculum/hard_pass_rate": None if n == 1 else 0.4,
            "curriculum/curriculum/rest_pass_rate": 0.9,
        }
        for n in (1, 2)
    ]
    (tmp_path / "curriculum/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward, mix, rates = training_curves(tmp_path)
    assert (reward.title, mix.title, rates.title) == (
        "curriculum: reward parts",
        "curriculum: curriculum mix",
        "curriculum: pass rate by hardness",
    )
    assert mix.x == [1, 2] and mix.series == {"target": [0.4, 0.5], "realised": [0.25, 0.25]}
    assert set(rates.series) == {"hard", "rest"} and rates.series["rest"] == [0.9, 0.9]
    write_report(tmp_path / "report.html", Report(title="mix", curves=[reward, mix, rates]))
    assert (tmp_path / "report.html").read_text().count("<svg") == 3


def test_validation_and_its_probes_are_a_curve_next_to_the_rewards(tmp_path):
    from eval.report.figures import training_curves

    (tmp_path / "cre").mkdir()
    lines = [
        {
            "step": 0,
            "eval/accuracy": 0.5,
            "cre/validation/accuracy": 0.5,
            "cre/validation/probe/swapped_history_accuracy": 0.25,
        },
        *({"step": n, "cre/reward/outcome": 0.5} for n in (1, 2)),
        {
            "step": 2,
            "eval/accuracy": 0.75,
            "cre/validation/accuracy": 0.75,
            "cre/validation/probe/swapped_history_accuracy": 0.125,
        },
    ]
    (tmp_path / "cre/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward, validation = training_curves(tmp_path)
    assert reward.x == [1, 2] and validation.x == [0, 2]
    assert validation.series == {"their own history": [0.5, 0.75], "another user's": [0.25, 0.125]}


def test_a_console_table_leaves_out_columns_without_a_value():
    rows = [
        {"model": "psi", "accuracy": 0.5, "stderr": None},
        {"model": "cre", "accuracy": None, "seconds": float("nan")},
    ]
    text = text_table(rows, "title", 80)
    assert "stderr" not in text and "seconds" not in text
    assert "50.0" in text and "–" in text, "a value may be missing in one row"
