"""SFT trains on the assistant's tokens only, under the chat templates of all our model families."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pgenrm_train.backends.sft.batches import encode_chat
from pgenrm_train.backends.sft.engine import publish
from pgenrm_train.backends.sft.job import STEPS, Job, Mark, check_resumable, is_over
from pgenrm_train.backends.sft.nano import CHAT_TEMPLATE, train_tokenizer
from pgenrm_train.backends.sft.settings import deepspeed_settings, deepspeed_variables
from pgenrm_train.chains.chain import JSON_START, write_chain
from pgenrm_train.config import ROOT, ClusterConfig, Config, ModelConfig, NanoConfig, PsiConfig, load
from pgenrm_train.errors import ArtifactError, DataError, NothingTrainedError
from pgenrm_train.files import write_json
from pgenrm_train.run.checkpoints import COMPLETE, newest_complete

# Like the published templates in all that matters here: headers, a default system message, stripped contents,
# empty thoughts.
LLAMA = (
    "{{ '<|begin_of_text|>' }}{% set first = messages[0]['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday is a day.\\n\\n' }}"
    "{{ messages[0]['content'] | trim if first else '' }}{{ '<|eot_id|>' }}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "nano": CHAT_TEMPLATE}
EXPECTED = {"llama": "{}<|eot_id|>", "qwen": "<think>\n\n</think>\n\n{}<|im_end|>\n", "nano": "{}<|end|>"}
SPECIAL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]

# Local folders of real tokenizers, separated by `:`, e.g.
# PGENRM_TOKENIZERS=/models/Llama-3.1-8B-Instruct:/models/Qwen3-8B
REAL = os.environ.get("PGENRM_TOKENIZERS", str(ROOT / "tests" / "data" / "psi_nano")).split(os.pathsep)

ANSWER = write_chain("This user likes it short.", [("brevity", 70), ("wit", 30)], [[8, 5], [3, 6]])
CHATS = {
    "plain": [("user", "Which is better?"), ("assistant", ANSWER)],
    "system": [("system", "You judge."), ("user", "Which is better?"), ("assistant", ANSWER)],
    "several turns": [
        ("user", "a"),
        ("assistant", "An earlier answer."),
        ("user", "b"),
        ("assistant", ANSWER),
    ],
    "one that quotes its answer": [("user", f"Repeat: {ANSWER}"), ("assistant", ANSWER)],
    "unicode": [("user", "日本語 é🙂"), ("assistant", "Ünï 漢字 🙂.")],
}


def messages(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[name]]


@pytest.fixture(scope="module")
def plain_tokenizer():
    tokenizer = train_tokenizer(
        [ANSWER, "Which is better? You judge. An earlier answer."], [], NanoConfig(vocabulary=400)
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, plain_tokenizer):
    plain_tokenizer.chat_template = TEMPLATES[request.param]
    plain_tokenizer.family = request.param
    return plain_tokenizer


@pytest.mark.parametrize("name", CHATS)
def test_loss_falls_on_the_last_answer_and_its_end_and_on_nothing_else(tokenizer, name):
    chat = messages(name)
    encoded = encode_chat(tokenizer, chat)
    learnt = tokenizer.decode(encoded.ids[encoded.loss_from :], skip_special_tokens=False)
    assert learnt == EXPECTED[tokenizer.family].format(chat[-1]["content"])
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert whole == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("name", CHATS)
def test_the_prompt_in_training_is_the_prompt_of_generation(tokenizer, name):
    chat = messages(name)
    encoded = encode_chat(tokenizer, chat)
    text = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert list(encoded.ids[: encoded.loss_from]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_end_of_turn_is_one_learnt_token(tokenizer):
    encoded = encode_chat(tokenizer, messages("plain"))
    end = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "nano": "<|end|>"}[tokenizer.family]
    assert tokenizer.convert_tokens_to_ids(end) in encoded.ids[encoded.loss_from :][-2:]


@pytest.mark.parametrize("folder", REAL)
@pytest.mark.parametrize("name", ["plain", "several turns", "one that quotes its answer", "unicode"])
def test_real_tokenizers_learn_the_last_answer_and_its_end_and_nothing_else(folder, name):
    from transformers import AutoTokenizer

    real, chat = AutoTokenizer.from_pretrained(Path(folder)), messages(name)
    encoded = encode_chat(real, chat)
    prompt = real.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert list(encoded.ids[: encoded.loss_from]) == real(prompt, add_special_tokens=False)["input_ids"]
    before, answer, end = real.decode(encoded.ids[encoded.loss_from :], skip_special_tokens=False).rpartition(
        chat[-1]["content"]
    )
    assert answer == chat[-1]["content"] and before in ("", "<think>\n\n</think>\n\n")
    assert end.strip() == real.eos_token, "the end of the turn is learnt, and generation stops at it"


@pytest.mark.parametrize("name", ["plain", "system", "several turns", "one that quotes its answer"])
def test_the_score_part_begins_at_the_last_marker_and_reaches_to_the_end(tokenizer, name):
    encoded = encode_chat(tokenizer, messages(name))
    analysis = tokenizer.decode(
        encoded.ids[encoded.loss_from : encoded.score_from], skip_special_tokens=False
    )
    score = tokenizer.decode(encoded.ids[encoded.score_from :], skip_special_tokens=False)
    assert JSON_START not in analysis and score.lstrip().startswith(JSON_START)
    assert analysis + score == EXPECTED[tokenizer.family].format(ANSWER)


def test_a_marker_that_the_analysis_quotes_does_not_open_the_score_part(tokenizer):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"I write {JSON_START} now. {ANSWER}"},
    ]
    encoded = encode_chat(tokenizer, chat)
    assert JSON_START in tokenizer.decode(encoded.ids[encoded.loss_from : encoded.score_from])


def test_an_answer_without_a_marker_has_no_score_part(tokenizer):
    encoded = encode_chat(tokenizer, messages("unicode"))
    assert encoded.score_from == len(encoded.ids)


def test_a_template_whose_prompt_is_no_prefix_is_refused(plain_tokenizer):
    """Some templates open a thought in the generation prompt that they leave out of a finished answer."""
    plain_tokenizer.chat_template = QWEN.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\nHm'"
    )
    with pytest.raises(DataError, match="not a prefix"):
        encode_chat(plain_tokenizer, messages("plain"))


# ---- checkpoints ----


def checkpoint(steps, number, complete=True):
    folder = steps / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if complete:
        write_json(folder / COMPLETE, {"step": number})
    return folder


def test_no_checkpoint_is_none(tmp_path):
    assert newest_complete(tmp_path / "steps", STEPS) is None


def test_the_newest_is_by_number_not_by_name(tmp_path):
    checkpoint(tmp_path, 900)
    newest = checkpoint(tmp_path, 1000)
    assert newest_complete(tmp_path, STEPS) == newest


def test_a_half_written_one_is_reported_removed_and_skipped(tmp_path, capsys):
    older, whole = checkpoint(tmp_path, 100), checkpoint(tmp_path, 200)
    half = checkpoint(tmp_path, 300, complete=False)
    assert newest_complete(tmp_path, STEPS) == whole
    assert not half.exists() and older.exists() and "checkpoint-300" in capsys.readouterr().out


def test_only_half_written_ones_mean_a_new_start(tmp_path):
    checkpoint(tmp_path, 100, complete=False)
    assert newest_complete(tmp_path, STEPS) is None and not list(tmp_path.iterdir())


MARK = Mark(ranks=8, zero_stage=3, model="abc")


def test_a_checkpoint_resumes_under_its_own_mark(tmp_path):
    folder = checkpoint(tmp_path, 100)
    write_json(folder / COMPLETE, {"step": 100, **asdict(MARK)})
    check_resumable(folder, MARK)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("ranks", 4, r"checkpoint-100 was written with another number of processes \(8, now 4\)"),
        ("zero_stage", 2, r"another ZeRO stage \(3, now 2\)"),
        ("model", "def", r"another model or adapter \(abc, now def\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, key, value, sentence):
    folder = checkpoint(tmp_path, 100)
    write_json(folder / COMPLETE, {"step": 100, **asdict(MARK)})
    with pytest.raises(ArtifactError, match=sentence):
        check_resumable(folder, replace(MARK, **{key: value}))


@pytest.mark.parametrize(
    ("step", "best", "over"),
    [(100, 100, False), (150, 100, False), (200, 100, True), (1000, 990, True), (200, None, False)],
)
def test_training_is_over_after_the_last_step_or_when_patience_is_out(step, best, over):
    from transformers import TrainerState

    psi = PsiConfig(evaluate_every=50, patience=2)
    assert is_over(psi, TrainerState(global_step=step, max_steps=1000, best_global_step=best)) is over


def test_a_training_that_left_too_few_steps_fails_and_publishes_nothing(tmp_path):
    job = Job(Config(), "base", tmp_path, MARK, None)
    with pytest.raises(NothingTrainedError, match="PSI made 0 of the planned optimiser steps"):
        publish(job, None)
    folder = checkpoint(tmp_path / "steps", 100)
    write_json(folder / "trainer_state.json", {"global_step": 100, "max_steps": 200})
    with pytest.raises(NothingTrainedError, match="PSI made 100 of 200 planned optimiser steps"):
        publish(job, None)
    assert not (tmp_path / "checkpoint").exists()


def test_a_missing_best_checkpoint_is_an_error(tmp_path):
    folder = checkpoint(tmp_path / "steps", 200)
    write_json(folder / "trainer_state.json", {"global_step": 200, "max_steps": 200, "best_global_step": 100})
    with pytest.raises(ArtifactError, match="checkpoint-100, the best checkpoint by validation, is missing"):
        publish(Job(Config(), "base", tmp_path, MARK, "a:b"), None)


def test_a_job_survives_its_file(tmp_path):
    job = Job(load("recipe=psi"), "base", tmp_path, MARK, "a:b")
    assert Job.read(job.write()) == job


# ---- settings ----


def test_zero_follows_the_cluster():
    three = deepspeed_settings(ClusterConfig(device="cuda", zero_stage=3), ModelConfig(), PsiConfig())
    assert three["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert three["bf16"] == {"enabled": True}
    offload = deepspeed_settings(
        ClusterConfig(device="cuda", zero_stage=2, offload_optimizer=True), ModelConfig(), PsiConfig()
    )
    assert offload["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    plain = deepspeed_settings(ClusterConfig(), ModelConfig(), PsiConfig())
    assert plain["bf16"] == {"enabled": False} and "data_types" not in plain


def test_muon_is_deepspeeds_and_needs_whole_gradients_under_zero_3():
    muon = PsiConfig(optimizer="muon", muon_learning_rate=0.03)
    settings = deepspeed_settings(ClusterConfig(device="cuda", zero_stage=3), ModelConfig(), muon)
    assert settings["optimizer"] == {
        "type": "Muon",
        "params": {"lr": "auto", "muon_lr": 0.03, "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        | {"torch_adam": True},
    }
    assert settings["zero_optimization"]["reduce_scatter"] is False
    assert "optimizer" not in deepspeed_settings(ClusterConfig(), ModelConfig(), PsiConfig())


def test_a_single_process_needs_no_launcher_and_several_are_left_to_it():
    single = deepspeed_variables(ClusterConfig())
    assert single["WORLD_SIZE"] == "1" and single["DS_ACCELERATOR"] == "cpu"
    many = deepspeed_variables(ClusterConfig(device="cuda", processes_per_node=8))
    assert "WORLD_SIZE" not in many and "DS_ACCELERATOR" not in many
