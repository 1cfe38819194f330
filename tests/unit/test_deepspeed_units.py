"""What SFT learns from: only the assistant's tokens, under the chat templates of the families we train, and whole checkpoints."""

import pytest

from pgenrm_train.artifacts import write_json
from pgenrm_train.backends.deepspeed_sft import (
    COMPLETE,
    IGNORED,
    Encoded,
    _collate,
    deepspeed_settings,
    encode_chat,
    environment,
    newest_complete,
)
from pgenrm_train.backends.nano import CHAT_TEMPLATE, train_tokenizer
from pgenrm_train.chains import write_chain
from pgenrm_train.config import ClusterConfig, Config, NanoConfig
from pgenrm_train.errors import DataError

# Shaped like the published templates in what matters here: headers, a default system message, stripped contents, empty thoughts.
LLAMA = (
    "{{ '<|begin_of_text|>' }}{% set first = messages[0]['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday is a day.\\n\\n' }}"
    "{{ messages[0]['content'] | trim if first else '' }}{{ '<|eot_id|>' }}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
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
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]

ANSWER = write_chain("This user likes it short.", [("brevity", 70), ("wit", 30)], [[8, 5], [3, 6]])
CHATS = {
    "plain": [("user", "Which is better?"), ("assistant", ANSWER)],
    "system": [("system", "You judge."), ("user", "Which is better?"), ("assistant", ANSWER)],
    "several turns": [("user", "a"), ("assistant", "An earlier answer."), ("user", "b"), ("assistant", ANSWER)],
    "one that quotes its answer": [("user", f"Repeat: {ANSWER}"), ("assistant", ANSWER)],
    "unicode": [("user", "日本語 é🙂"), ("assistant", "Ünï 漢字 🙂.")],
}


def messages(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[name]]


@pytest.fixture(scope="module")
def plain_tokenizer():
    tokenizer = train_tokenizer([ANSWER, "Which is better? You judge. An earlier answer."], [], NanoConfig(vocabulary=400))
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
    encoded = encode_chat(tokenizer, chat, 10_000)
    learnt = tokenizer.decode(encoded.ids[encoded.loss_from :], skip_special_tokens=False)
    assert learnt == EXPECTED[tokenizer.family].format(chat[-1]["content"])
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert whole == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("name", CHATS)
def test_the_prompt_in_training_is_the_prompt_of_generation(tokenizer, name):
    chat = messages(name)
    encoded = encode_chat(tokenizer, chat, 10_000)
    text = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert list(encoded.ids[: encoded.loss_from]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_end_of_turn_is_one_learnt_token(tokenizer):
    encoded = encode_chat(tokenizer, messages("plain"), 10_000)
    end = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "nano": "<|end|>"}[tokenizer.family]
    assert tokenizer.convert_tokens_to_ids(end) in encoded.ids[encoded.loss_from :][-2:]


def test_a_chat_that_is_too_long_is_said(tokenizer):
    encoded = encode_chat(tokenizer, messages("plain"), 10_000)
    size = len(encoded.ids)
    assert encode_chat(tokenizer, messages("plain"), size) == encoded
    with pytest.raises(DataError, match=f"a chat of {size} tokens is longer than the model's limit of {size - 1}"):
        encode_chat(tokenizer, messages("plain"), size - 1)


def test_a_template_whose_prompt_is_no_prefix_is_refused(plain_tokenizer):
    """Some templates open a thought in the generation prompt that they leave out of a finished answer."""
    plain_tokenizer.chat_template = QWEN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\nHm'")
    with pytest.raises(DataError, match="not a prefix"):
        encode_chat(plain_tokenizer, messages("plain"), 10_000)


def test_batches_align_their_ends_and_keep_logits_for_the_answers_only():
    batch = _collate([Encoded((5, 6, 7, 8), 2), Encoded((5, 9), 1)], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["logits_to_keep"] == 3  # the answers' two tokens at most, and the one that predicts the first
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 9]]


def test_a_pad_that_is_also_the_end_is_still_learnt_where_it_ends_an_answer():
    batch = _collate([Encoded((5, 6, 2), 1), Encoded((5, 2), 1)], pad=2)
    assert batch["labels"].tolist() == [[IGNORED, 6, 2], [IGNORED, IGNORED, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_of_a_batch_is_that_of_its_chats_alone(attention):
    """Padding, alignment and the cut of the logits change no gradient."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation=attention,
        )
    )
    chats = [Encoded(tuple(range(3, 23)), 12), Encoded(tuple(range(30, 41)), 9), Encoded((7, 8, 9, 10, 11, 12, 13), 1)]
    together = model(**_collate(chats, pad=0)).loss
    total, count = torch.zeros(()), 0
    for chat in chats:
        log_probs = model(input_ids=torch.tensor([chat.ids])).logits[0].log_softmax(-1)
        for place in range(chat.loss_from, len(chat.ids)):
            total, count = total - log_probs[place - 1, chat.ids[place]], count + 1
    torch.testing.assert_close(together, total / count, rtol=1e-5, atol=1e-6)
    grad_together = torch.autograd.grad(together, list(model.parameters()), retain_graph=True)
    for one, other in zip(grad_together, torch.autograd.grad(total / count, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---- checkpoints ----


def checkpoint(steps, number, complete=True):
    folder = steps / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if complete:
        write_json(folder / COMPLETE, {"step": number})
    return folder


def test_no_checkpoint_is_none(tmp_path):
    assert newest_complete(tmp_path / "steps") is None


def test_the_newest_is_by_number_not_by_name(tmp_path):
    checkpoint(tmp_path, 900)
    newest = checkpoint(tmp_path, 1000)
    assert newest_complete(tmp_path) == newest


def test_a_half_written_one_is_told_removed_and_passed_over(tmp_path, capsys):
    older, whole = checkpoint(tmp_path, 100), checkpoint(tmp_path, 200)
    half = checkpoint(tmp_path, 300, complete=False)
    assert newest_complete(tmp_path) == whole
    assert not half.exists() and older.exists() and "checkpoint-300" in capsys.readouterr().out


def test_only_half_written_ones_mean_a_new_start(tmp_path):
    checkpoint(tmp_path, 100, complete=False)
    assert newest_complete(tmp_path) is None and not list(tmp_path.iterdir())


# ---- settings ----


def test_zero_follows_the_cluster():
    three = deepspeed_settings(Config(cluster=ClusterConfig(device="cuda", zero_stage=3)))
    assert three["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert three["bf16"] == {"enabled": True}
    offload = deepspeed_settings(Config(cluster=ClusterConfig(device="cuda", zero_stage=2, offload_optimizer=True)))
    assert offload["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert deepspeed_settings(Config())["bf16"] == {"enabled": False}


def test_a_single_process_needs_no_launcher_and_several_are_left_to_it():
    assert environment(Config())["WORLD_SIZE"] == "1" and environment(Config())["DS_ACCELERATOR"] == "cpu"
    many = environment(Config(cluster=ClusterConfig(device="cuda", processes_per_node=8)))
    assert "WORLD_SIZE" not in many and "DS_ACCELERATOR" not in many
