"""A model whose chat template refuses a system message, as Gemma's does, through build_sec."""

import json
import shutil

import pyarrow.parquet as pq

from pgenrm_train.backends.sft.checks import encode_rows
from pgenrm_train.config import ROOT, load
from pgenrm_train.prompts.messages import INSTRUCTIONS
from recipes import build_sec
from recipes.wiring.models import load_tokenizer

GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|user|>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|user|>model\n{% endif %}"
)


def test_the_instructions_are_in_the_users_message_of_every_chain(tmp_path, capsys):
    model = shutil.copytree(ROOT / "tests/data/psi_nano", tmp_path / "model")
    (model / "chat_template.jinja").write_text(GEMMA)
    rows = [
        {
            "user_id": f"u{n % 2}",
            "conversation_id": f"c{n}",
            "context": [
                *([{"role": "system", "content": "Be kind."}] if n == 0 else []),
                {"role": "user", "content": f"Question {n}?"},
            ],
            "chosen": f"A long and careful answer to number {n}, in full sentences.",
            "rejected": f"No {n}.",
            "split": "train",
        }
        for n in range(6)
    ]
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_sec.run(
        load(
            *("recipe=build_sec", "data=pairs", f"data.path={votes}", "teacher=features", "tracking=none"),
            *(f"model.path={model}", "model.instructions=true", "model.max_prompt_tokens=4000"),
            *("model.max_response_tokens=2000", f"run_dir={tmp_path / 'run'}", "preflight.skip=[memory]"),
        )
    )
    rows_file = tmp_path / "run" / "build_sec" / "sec.parquet"
    chats = pq.read_table(rows_file).column("messages").to_pylist()
    assert chats and all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    assert all(chat[0]["content"].startswith(INSTRUCTIONS[:60]) for chat in chats)
    assert capsys.readouterr().out.count("has no system role; the instructions are in the user") == 1
    assert len(encode_rows(load_tokenizer(model), rows_file, 8000)) == len(chats), "and PSI can learn them"
