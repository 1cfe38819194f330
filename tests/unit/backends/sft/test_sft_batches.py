"""Layouts of a step: the same sequences, the same loss and gradient, less padding."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pgenrm_train.backends.sft.attention import part_of, register_packed
from pgenrm_train.backends.sft.batches import (
    Batching,
    Chats,
    Encoded,
    Layout,
    StepOrder,
    collate,
    cut,
    layout_of,
    rows_for,
    write_chats,
)
from pgenrm_train.backends.sft.loss import train_in_pieces, weighted_loss
from pgenrm_train.config import PsiConfig

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CHATS = [
    Encoded(tuple(range(3, 23)), 12, 18),
    Encoded(tuple(range(30, 41)), 9, 10),
    Encoded((7, 8, 9, 10, 11, 12, 13), 1, 7),
]


def random_chats(count, seed=0):
    rng = random.Random(seed)
    chats = []
    for _ in range(count):
        length, loss_from = rng.randint(6, 40), rng.randint(1, 4)
        chats.append(
            Encoded(
                tuple(rng.randrange(1, 50) for _ in range(length)), loss_from, rng.randint(loss_from, length)
            )
        )
    return chats


# ---- a micro-batch ----


def test_padding_is_on_the_right_and_bears_no_loss():
    batch = collate(
        [Encoded((5, 6, 7, 8), 2, 3), Encoded((5, 9), 1, 2)], pad=0, packed=False, score_weight=3.0
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["predicts"].tolist() == [1, 2, 4] and batch["labels"].tolist() == [7, 8, 9]
    assert batch["weights"].tolist() == [1.0, 3.0, 1.0]
    assert set(batch) == {"input_ids", "predicts", "labels", "weights"}


def test_a_packed_row_has_no_padding_and_positions_that_restart():
    batch = collate([Encoded((5, 6, 7, 8), 2, 4), Encoded((5, 9), 1, 2)], pad=0, packed=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 5, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["predicts"].tolist() == [1, 2, 4] and batch["labels"].tolist() == [7, 8, 9]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6] == batch["cu_seq_lens_k"].tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == 4 == batch["max_length_k"]


def test_a_pad_that_is_also_the_end_is_still_learnt_where_it_ends_an_answer():
    batch = collate([Encoded((5, 6, 2), 1, 3), Encoded((5, 2), 1, 2)], pad=2, packed=False)
    assert batch["labels"].tolist() == [6, 2, 2]


def test_chats_survive_their_file(tmp_path):
    write_chats(tmp_path / "chats.parquet", CHATS)
    chats = Chats(tmp_path / "chats.parquet")
    assert chats.lengths == [20, 11, 7] and len(chats) == 3
    for chat, read in zip(CHATS, chats[(0, 1, 2)], strict=True):
        assert (tuple(read.ids), read.loss_from, read.score_from) == (
            chat.ids,
            chat.loss_from,
            chat.score_from,
        )


# ---- loss and gradient of a model ----


def model_of(family, attention):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attention))
    window = (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        if family == "windowed"
        else {}
    )
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **window, attn_implementation=attention))


def alone(model, chats, score_weight):
    """Loss and gradient of each chat by itself, by the definition: Σ w · −log p / Σ w."""
    total, weights = torch.zeros(()), 0.0
    for chat in chats:
        log_probs = model(input_ids=torch.tensor([chat.ids])).logits[0].log_softmax(-1)
        for place in range(chat.loss_from, len(chat.ids)):
            weight = score_weight if place >= chat.score_from else 1.0
            total, weights = total - weight * log_probs[place - 1, chat.ids[place]], weights + weight
    loss = total / weights
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("score_weight", [1.0, 4.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen2", "sdpa"),
        ("qwen2", "eager"),
        ("llama", "sdpa"),
        ("qwen2", register_packed()),
        ("llama", register_packed()),
        ("windowed", register_packed()),
    ],
)
def test_loss_and_gradient_of_a_batch_are_those_of_its_chats_alone(family, attention, packed, score_weight):
    """Neither padding nor a neighbour in the row has an effect."""
    expected, gradients = alone(model_of(family, "eager"), CHATS, score_weight)
    model = model_of(family, attention)
    train_in_pieces(model)
    loss = model(**collate(CHATS, pad=0, packed=packed, score_weight=score_weight)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", Layout)
def test_a_step_has_the_same_gradient_under_every_layout(layout):
    chats = random_chats(13)
    model = model_of("qwen2", "sdpa")
    expected, gradients = alone(model, chats, 2.0)
    train_in_pieces(model)
    batches = [
        collate([chats[i] for i in micro_batch], pad=0, packed=layout is Layout.PACKED, score_weight=2.0)
        for micro_batch in cut([len(c.ids) for c in chats], layout, 4)
    ]
    total = sum(batch["weights"].sum() for batch in batches)
    losses = [model(**batch, num_items_in_batch=total).loss for batch in batches]
    torch.testing.assert_close(sum(losses), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(sum(losses), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_packed_attention_reads_nothing_back_from_the_device(monkeypatch):
    """`tolist` of a tensor on a GPU waits for the GPU: once per layer, it would stop each forward pass."""
    model = model_of("qwen2", register_packed())
    train_in_pieces(model)
    batch = collate(CHATS, pad=0, packed=True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("a tensor was read back"))
    model(**batch).loss.backward()


def test_packed_attention_generates_like_sdpa_and_leaves_no_trace_in_a_checkpoint(tmp_path):
    ids = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # prompts of unequal length
    answers = []
    for attention in ("sdpa", register_packed()):
        model = model_of("qwen2", attention).eval()
        answers.append(
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        )
    assert answers[0].tolist() == answers[1].tolist()
    model.save_pretrained(tmp_path)
    assert "sdpa_packed" not in (tmp_path / "config.json").read_text()


def test_without_labels_the_model_answers_as_before():
    model = model_of("qwen2", "sdpa").eval()
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    train_in_pieces(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


# ---- cross entropy in pieces ----


@pytest.mark.parametrize("piece", [1, 700, 10_000, 2**26])
def test_cross_entropy_in_pieces_is_exact(piece):
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 100, bias=False, dtype=torch.float64)
    hidden = torch.randn(57, 16, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 100, (57,)), torch.rand(57, dtype=torch.float64)
    whole = (
        torch.nn.functional.cross_entropy(head(hidden).float(), labels, reduction="none") * weights
    ).sum()
    pieces = weighted_loss(head, hidden, labels, weights, 100, piece)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(pieces, [hidden, head.weight]),
        torch.autograd.grad(whole, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_no_more_logits_than_a_piece_are_alive_at_a_time():
    """Memory kept for the backward pass does not grow with the vocabulary."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    head, hidden = torch.nn.Linear(8, 1000, bias=False), torch.randn(64, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weighted_loss(head, hidden, torch.zeros(64, dtype=torch.long), torch.ones(64), 1000, 4000)
    assert max(kept) <= 8 * 1000  # the head itself; 64 × 1000 logits are not there


def test_the_head_is_called_once_whatever_the_number_of_pieces(monkeypatch):
    """Under ZeRO-3 each call gathers the head's weights, and the numbers of pieces of processes differ."""
    calls = []
    model = model_of("qwen2", "sdpa")
    train_in_pieces(model)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(CHATS, pad=0, packed=False)
    whole = model(**batch).loss
    monkeypatch.setattr("pgenrm_train.backends.sft.loss.PIECE", 100)  # two tokens
    pieces = model(**batch).loss
    torch.testing.assert_close(pieces, whole)
    pieces.backward()
    assert len(calls) == 2


# ---- which sequences share a micro-batch ----


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("count", "size"), [(8, 8), (32, 4), (13, 4), (3, 4), (17, 16), (1, 1)])
def test_every_sequence_of_a_step_is_in_it_once(layout, count, size):
    rng = random.Random(count)
    micro_batches = cut([rng.randint(1, 99) for _ in range(count)], layout, size)
    assert sorted(i for one in micro_batches for i in one) == list(range(count)) and all(micro_batches)


def mixed_lengths(count=128):
    rng = random.Random(0)
    return [rng.choice([100, 200, 800, 3000]) + rng.randint(0, 99) for _ in range(count)]


def test_grouping_pads_less_and_packing_evens_out_the_tokens():
    lengths = mixed_lengths()
    padded, grouped = (
        sum(8 * max(lengths[i] for i in one) for one in cut(lengths, layout, 8))
        for layout in (Layout.PADDED, Layout.GROUPED)
    )
    assert grouped < 0.6 * padded
    dealt = [sum(lengths[i] for i in row) for row in cut(lengths, Layout.PACKED, 16)]
    assert max(dealt) < 1.15 * min(dealt) and max(dealt) < 1.1 * sum(lengths) / 16


def test_rows_hold_the_budget_and_are_few():
    lengths = mixed_lengths()
    rows = rows_for(lengths, 8000, multiple=8)
    assert rows % 8 == 0 and rows < sum(lengths) / 8000 + 8
    assert max(sum(lengths[i] for i in row) for row in cut(lengths, Layout.PACKED, rows)) <= 8000
    assert rows_for([5000, 10, 10], 1000, multiple=1) == 2, "a longer sequence has a row of its own"
    assert rows_for([900] * 6, 1000, multiple=2) == 6


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_process_has_the_same_rows_in_every_step(ranks):
    """transformers' Trainer takes `accumulation` micro-batches per process and step."""
    lengths = mixed_lengths(50)
    order = StepOrder(lengths, Batching(Layout.PACKED, 16, 8000, ranks), seed=3, epochs=1.5)
    for epoch in range(2):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order) and all(rows)
        assert max(sum(lengths[i] for i in row) for row in rows) <= 8000
        per_step = order.accumulation * ranks
        for step in range(3):
            step_rows = rows[step * per_step : (step + 1) * per_step]
            assert sum(map(len, step_rows)) == 16, "a step is the same sequences, however many rows"
        assert sum(map(len, rows)) == 50


def flat(order):
    return [i for micro_batch in order for i in micro_batch]


@pytest.mark.parametrize("layout", Layout)
def test_a_step_takes_the_same_sequences_whatever_the_layout(layout):
    lengths = [len(c.ids) for c in random_chats(50)]
    order, plain = (
        flat(StepOrder(lengths, Batching(name, 16, 4), seed=3)) for name in (layout, Layout.PADDED)
    )
    for first in range(0, 50, 16):
        assert sorted(order[first : first + 16]) == sorted(plain[first : first + 16])
    assert sorted(order) == list(range(50))


def test_the_order_depends_on_seed_and_epoch_only():
    lengths, batching = [len(c.ids) for c in random_chats(50)], Batching(Layout.PACKED, 16, 100)
    first = StepOrder(lengths, batching, seed=3, epochs=3)
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(first))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    resumed = StepOrder(lengths, batching, seed=3, epochs=3)
    resumed.set_epoch(resumed.epoch_of(8))  # 4 steps an epoch
    assert list(resumed) == epochs[2]
    assert [resumed.epoch_of(step) for step in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert list(StepOrder(lengths, batching, seed=4, epochs=3)) != epochs[0]


def test_packing_is_the_default_on_gpus_and_can_be_set():
    assert layout_of(PsiConfig(), "cpu") is Layout.GROUPED
    assert layout_of(PsiConfig(), "cuda") is Layout.PACKED
    assert layout_of(PsiConfig(packing=False), "cuda") is Layout.GROUPED
    assert layout_of(PsiConfig(packing=True), "cpu") is Layout.PACKED
    assert layout_of(PsiConfig(sequence_parallel=2), "cuda") is Layout.GROUPED


# ---- sequences that processes share ----


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_parts_of_a_sequence_add_up_to_it_and_each_trained_token_is_in_one(parts):
    chat = CHATS[0]
    whole = collate([chat], pad=0, packed=False, score_weight=3.0)
    shares = [part_of(whole, part, parts, pad=0) for part in range(parts)]
    ids = torch.cat([share["input_ids"] for share in shares], 1)[0].tolist()
    assert tuple(ids[: len(chat.ids)]) == chat.ids and not any(ids[len(chat.ids) :])
    assert torch.cat([share["position_ids"] for share in shares], 1)[0].tolist() == list(range(len(ids)))
    assert len({share["input_ids"].shape for share in shares}) == 1
    width = len(ids) // parts
    predicts = [share["predicts"] + part * width for part, share in enumerate(shares)]
    assert torch.equal(torch.cat(predicts), whole["predicts"])
    for name in ("labels", "weights"):
        assert torch.equal(torch.cat([share[name] for share in shares]), whole[name])


def test_neighbours_take_the_same_sequence_and_a_step_stays_the_same():
    alone, shared = (
        StepOrder([9] * 10, Batching(Layout.GROUPED, 4, 1, copies, copies), seed=3) for copies in (1, 2)
    )
    assert len(shared) == 2 * len(alone) == len(list(shared))
    assert list(shared)[::2] == list(alone) == list(shared)[1::2]
    assert shared.epoch_of(3) == alone.epoch_of(3) == 1
    assert shared.accumulation == alone.accumulation == 4
