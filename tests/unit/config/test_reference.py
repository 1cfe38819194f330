"""docs/configuration.md is the reference that the schema generates, and every setting has a document."""

import dataclasses

import pytest

from pgenrm_train.config import ROOT, Config
from pgenrm_train.config.reference import reference


def fields(section, prefix=""):
    for field in dataclasses.fields(section):
        yield prefix + field.name, field
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")


def test_the_page_is_not_stale():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run python -m pgenrm_train.config.reference > docs/configuration.md"


@pytest.mark.parametrize(
    "key,field", list(fields(Config())), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_setting_has_one_line_of_document(key, field):
    document = field.metadata["document"]
    assert document and "\n" not in document and "|" not in document, key


def test_a_row_has_key_default_constraint_and_meaning():
    page = reference()
    assert "| `cre.group_size` | `8` (at least 2) | samples per prompt, which GRPO compares |" in page
    assert "| `psi.max_steps` | `null` (int above 0) |" in page
    assert "| `plan.emit` | `null` (slurm, rayjob, verl, deepspeed, vllm) |" in page


def test_a_row_of_an_earlier_section_is_named_and_not_repeated():
    page = reference()
    teacher, judge, gold = (
        page.partition(f"## `{name}`")[2].partition("\n## ")[0] for name in ("teacher", "judge", "judge_gold")
    )
    assert "`teacher.attempts`" not in page and "As in [`model`](#model): `base_url`" in teacher
    assert "`attempts`" in teacher and "`judge.attempts`" not in page
    assert "All keys of [`teacher`](#teacher) except `kind`" in judge and "| `judge.kind` | `none` (" in judge
    assert "All keys of [`judge`](#judge)." in gold and "|" not in gold
    assert "| `curriculum.process_weight` | `0.0` |" in page, "another default is a row of its own"


def test_groups_are_listed_with_their_files():
    assert "- `cluster=`: `cpu`, `gpu1`, `gpu8`, `multi_node`\n" in reference()


def test_sections_of_one_type_share_a_table():
    row = "| `plan.cards.NAME.memory_gib` | `a100 80.0, h100 79.6, h200 140.4, l40s 45.0, cpu 24.0` |"
    assert row in reference()
