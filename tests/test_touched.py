"""`rows="touched"`: of an embedding a step trains the rows of the tokens that it read."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits, assert_same_tree, bits
from models import (
    PAD,
    QK,
    VOCAB,
    adam,
    assert_same_params,
    changed_rows,
    hooks_of,
    params_of,
    rows_of,
    tiny_model,
    token_ids,
    train_step,
)
from ranks import join, start_ranks
from test_apply import refused, snapshot
from test_selection import padded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import longact
from longact.nn import SalientEmbedding, SalientLinear

# transformers 5.24 renamed the argument, and deprecates the name that earlier versions know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

EMBED = "model.embed_tokens"
WEIGHT = f"{EMBED}.weight"


def touched(**options: Any) -> tuple[Any, longact.LongAct]:
    model = tiny_model()
    return model, longact.apply(model, rows="touched", **options)


def tokens(ids: Tensor, mask: Tensor | None = None) -> list[int]:
    """Which are read, ascending."""
    read = ids if mask is None else ids[mask.bool()]
    return sorted(set(read.flatten().tolist()))


def read(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> None:
    """A micro-batch whose loss depends on every token, padding included."""
    output = model(input_ids=ids, attention_mask=mask).logits
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean().backward()


def embedding_rows(model: nn.Module, before: dict[str, Tensor]) -> list[int]:
    return changed_rows(before[WEIGHT], params_of(model)[WEIGHT])


# ---- what apply changes --------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, "embed_tokens", EMBED, "*embed*", ["embed_tokens"]])
def test_apply_puts_a_salient_embedding_in_place(targets: Any) -> None:
    model, plain = tiny_model(), tiny_model()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    original, weight = model.model.embed_tokens, model.model.embed_tokens.weight
    handle = longact.apply(model, rows="touched", targets=targets)
    layer = model.model.embed_tokens
    assert type(layer) is SalientEmbedding
    assert handle.projections == {EMBED: layer}
    assert handle.rows == {EMBED: None}
    assert handle.arguments["targets"] == [EMBED]
    assert (layer.weight is weight, layer.padding_idx) == (True, PAD)
    assert model.get_input_embeddings() is layer
    assert_same_tree(dict(model.state_dict()), dict(state))
    ids, mask = padded("left", 12, 7)
    for one in (model, plain):
        read(one, ids, mask)
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same_bits(param.grad, other.grad, name)  # its gradient is nn.Embedding's own
    assert not model.model.embed_tokens.weight.grad[PAD].any()
    output = model(input_ids=ids).logits

    handle.remove()
    assert model.model.embed_tokens is original
    assert snapshot(model) == before
    assert hooks_of(model) == 0
    assert longact.get_rows(weight) is None
    assert_same_bits(model(input_ids=ids).logits, output, "logits")
    with longact.apply(model, **handle.arguments) as again:
        assert again.arguments == handle.arguments


def test_an_embedding_module_is_a_target() -> None:
    model = tiny_model()
    handle = longact.apply(model, rows="touched", targets=model.model.embed_tokens)
    assert list(handle.projections) == [EMBED]


class Bag(nn.Module):
    """No transformers model; two embeddings of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(9, 4)
        self.other = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.word(ids) * self.other(ids)


def test_embeddings_of_any_module_by_name() -> None:
    model = Bag()
    handle = longact.apply(model, rows="touched", targets=["word", "other"])
    optimizer, before = adam(model), params_of(model)
    # Of whatever integer type and shape; the mask by position.
    model(torch.tensor([[2, 7, 7], [0, 1, 1]], dtype=torch.int32)).sum().backward()
    model(torch.tensor([[5, 8]]), torch.tensor([[1, 0]])).sum().backward()
    optimizer.step()
    assert rows_of(handle) == {"word": [0, 1, 2, 5, 7], "other": [0, 1, 2, 5, 7]}
    for name in ("word", "other"):
        now = model.get_submodule(name).weight.detach()
        assert changed_rows(before[f"{name}.weight"], now) == [0, 1, 2, 5, 7]


# ---- which rows a step trains --------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_trains_the_rows_that_its_micro_batches_read(side: str) -> None:
    model, handle = touched()
    optimizer = adam(model)
    held: dict[str, Tensor] = {}
    for step in range(4):
        before = params_of(model)
        expected: set[int] = set()
        for micro in range(2):
            ids, mask = padded(side, 5, 3, seed=10 * step + micro)
            ids = ids.masked_fill(mask == 0, 3 + step)  # padding that is a token like others
            read(model, ids, mask)
            expected |= set(tokens(ids, mask))
        assert len(expected) < VOCAB // 2
        with torch.no_grad():
            model(input_ids=torch.arange(20, 30)[None])
        model.eval()
        model(input_ids=torch.arange(20, 30)[None]).logits.sum().backward()
        model.train()
        optimizer.step()
        optimizer.zero_grad()
        assert rows_of(handle) == {EMBED: sorted(expected)}
        assert embedding_rows(model, before) == sorted(expected)
        state = optimizer.state[model.model.embed_tokens.weight]
        rest = torch.ones(VOCAB, dtype=torch.bool)
        rest[list(expected)] = False
        for key in ("exp_avg", "exp_avg_sq", "ages"):
            old = held.get(key, torch.zeros_like(state[key]))
            assert torch.equal(bits(state[key])[rest], bits(old)[rest]), key
            assert not torch.equal(state[key][~rest], old[~rest]), key
            held[key] = state[key].clone()
        # Everything else is trained as ever.
        after = params_of(model)
        assert all(not torch.equal(after[n], before[n]) for n in after if n != WEIGHT)


def test_padding_alone_does_not_train_its_row() -> None:
    model, handle = touched()
    model.model.embed_tokens.padding_idx = None  # else its gradient is zero anyway
    optimizer, before = adam(model, weight_decay=0.1), params_of(model)
    ids, mask = padded("right", 12, 6)
    read(model, ids, mask)
    assert model.model.embed_tokens.weight.grad[PAD].any()
    optimizer.step()
    assert PAD not in rows_of(handle)[EMBED]
    assert embedding_rows(model, before) == tokens(ids, mask)
    optimizer.zero_grad()
    read(model, ids)  # without a mask it is read as any other
    optimizer.step()
    assert PAD in rows_of(handle)[EMBED]


def test_embeddings_that_are_read_outside_of_the_forward_train() -> None:
    """As soft prompts and some multimodal models do it."""
    model, _ = touched()
    before = params_of(model)
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    adam(model).step()
    assert embedding_rows(model, before) == ids.unique().tolist()


def test_position_embeddings_train_the_positions_that_were_read() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wpe, self.out = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.out(x + self.wpe(torch.arange(x.shape[1])[None]))
            return y

    model = Positions()
    longact.apply(model, targets="wpe", rows="touched")
    before = model.wpe.weight.detach().clone()
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    model(torch.randn(2, 7, 4), attention_mask=mask).sum().backward()
    adam(model).step()
    assert changed_rows(before, model.wpe.weight.detach()) == list(range(7))


def test_all_tokens_or_none() -> None:
    model, handle = touched()
    optimizer, before = adam(model), params_of(model)
    every = torch.arange(VOCAB).view(2, -1)
    read(model, every)
    optimizer.step()
    assert rows_of(handle) == {EMBED: list(range(VOCAB))}
    assert len(embedding_rows(model, before)) in (VOCAB - 1, VOCAB)  # PAD's gradient is zero
    before = params_of(model)
    state = copy.deepcopy(optimizer.state[model.model.embed_tokens.weight])
    optimizer.zero_grad()
    read(model, every, torch.zeros_like(every))
    optimizer.step()
    assert rows_of(handle) == {EMBED: []}
    assert embedding_rows(model, before) == []
    for key in ("exp_avg", "exp_avg_sq", "ages"):
        assert_same_bits(optimizer.state[model.model.embed_tokens.weight][key], state[key], key)


def test_a_step_without_a_gradient_of_it_keeps_the_rows_for_the_next() -> None:
    model, handle = touched()
    optimizer = adam(model)
    model(input_ids=token_ids(1, 4))  # counted, and its loss never computed
    optimizer.step()
    read(model, token_ids(1, 4, seed=1))
    before = params_of(model)
    optimizer.step()
    both = tokens(torch.cat([token_ids(1, 4), token_ids(1, 4, seed=1)]))
    assert rows_of(handle) == {EMBED: both}
    assert embedding_rows(model, before) == both  # a zero gradient still decays


def test_a_step_that_the_grad_scaler_skips_drops_its_tokens() -> None:
    model, handle = touched()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    for seed in range(2):
        before = params_of(model)
        scaler.scale(model(input_ids=token_ids(1, 4, seed=seed)).logits.square().mean()).backward()
        if seed == 0:
            model.lm_head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if seed == 0:
            assert_same_params(model, before)
    assert rows_of(handle) == {EMBED: tokens(token_ids(1, 4, seed=1))}
    assert embedding_rows(model, before) == tokens(token_ids(1, 4, seed=1))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    (model, handle), (plain, other) = touched(), touched()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizers = [adam(model), adam(plain)]
    for seed in range(3):
        ids, mask = padded("left", 5, 3, seed=seed)
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            read(one, ids, mask)
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handle) == rows_of(other) == {EMBED: tokens(ids, mask)}
    assert_same_params(model, plain)


def test_a_compiled_model_trains_the_same_rows() -> None:
    torch._dynamo.reset()
    model, eager = (tiny_model(num_hidden_layers=1) for _ in range(2))
    handles = [longact.apply(one, rows="touched") for one in (model, eager)]
    optimizers = [adam(one) for one in (model, eager)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        ids, mask = padded("left", 5, 3, seed=seed)
        for one, optimizer in zip((compiled, eager), optimizers, strict=True):
            read(one, ids, mask)
            optimizer.step()
            optimizer.zero_grad()
        assert rows_of(handles[0]) == rows_of(handles[1]) == {EMBED: tokens(ids, mask)}
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


# ---- each row by its own clock -------------------------------------------------------------------


class LazyAdamW:
    """The definition, row by row in float64; `forgets`: a row that a step leaves out starts anew,
    as compact state has it."""

    def __init__(self, weight: Tensor, *, amsgrad: bool, forgets: bool) -> None:
        self.rows = list(weight.detach().double())
        self.amsgrad, self.forgets = amsgrad, forgets
        self.state: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}

    def step(self, read: list[int], grad: Tensor, lr: float, decay: float) -> None:
        b1, b2, eps = 0.9, 0.999, 1e-8
        if self.forgets:
            self.state = {r: state for r, state in self.state.items() if r in read}
        for r in read:
            zero = torch.zeros_like(self.rows[r])
            age, m, v, largest = self.state.get(r, (0, zero, zero, zero))
            g, age = grad[r].double(), age + 1
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            largest = torch.maximum(largest, v)
            self.state[r] = (age, m, v, largest)
            corrected = (largest if self.amsgrad else v) / (1 - b2**age)
            step = lr * (m / (1 - b1**age)) / (corrected.sqrt() + eps)
            self.rows[r] = (1 - lr * decay) * self.rows[r] - step


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adamw", "amsgrad"])
def test_rows_train_as_lazy_adamw_of_their_own_age(state: str, amsgrad: bool) -> None:
    torch.manual_seed(0)
    model = Bag()
    longact.apply(model, rows="touched", targets="word")
    weight, lr, decay = model.word.weight, 0.03, 0.2
    optimizer = longact.FusedMaskedAdam(
        model.parameters(), lr=lr, weight_decay=decay, amsgrad=amsgrad, state=state
    )
    reference = LazyAdamW(weight, amsgrad=amsgrad, forgets=state == "compact")
    generator = torch.Generator().manual_seed(1)
    ages = set()
    for _ in range(25):
        count = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(0, 9, (2, count), generator=generator)
        mask = torch.rand(ids.shape, generator=generator) < 0.7
        scale = 10 ** (2 * torch.rand((), generator=generator) - 2)
        (model(ids, mask).sin().sum() * scale).backward()
        assert weight.grad is not None
        reference.step(tokens(ids, mask), weight.grad, lr, decay)
        optimizer.step()
        optimizer.zero_grad()
        expected = torch.stack(reference.rows)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=2e-5, atol=2e-6)
        held = optimizer.state[weight]
        rows = held.get("moment_rows", torch.arange(9)).tolist()
        assert len(rows) == len(held["ages"])
        for i, r in enumerate(rows):
            zero = torch.zeros(4, dtype=torch.float64)
            age, m, v, largest = reference.state.get(r, (0, zero, zero, zero))
            ages.add(age)
            assert int(held["ages"][i]) == age
            torch.testing.assert_close(held["exp_avg"][i].double(), m, rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(held["exp_avg_sq"][i].double(), v, rtol=2e-5, atol=1e-9)
            if amsgrad:
                got = held["max_exp_avg_sq"][i].double()
                torch.testing.assert_close(got, largest, rtol=2e-5, atol=1e-9)
    assert len(ages) > 4


# ---- with other handles --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["touched first", "salient first"])
@pytest.mark.parametrize("others", ["train", "freeze"])
def test_with_salient_projections_on_the_same_model(order: str, others: Any) -> None:
    model, alone = tiny_model(), tiny_model()
    options: list[dict[str, Any]] = [{"rows": "touched"}, {"keep_ratio": 0.3}]
    if order == "salient first":
        options.reverse()
    first, second = (longact.apply(model, others=others, **o) for o in options)
    embedding, salient = (first, second) if order == "touched first" else (second, first)
    expected = longact.apply(alone, others=others)
    optimizer, plain = adam(model), adam(alone)
    for seed in range(3):
        ids, mask = padded("left", 7, 5, seed=seed)
        held, before = rows_of(salient), params_of(model)
        read(model, ids, mask)
        if seed == 0:
            read(alone, ids, mask)
            plain.step()
        optimizer.step()
        optimizer.zero_grad()
        assert rows_of(embedding) == {EMBED: tokens(ids, mask)}
        after = params_of(model)
        assert embedding_rows(model, before) == tokens(ids, mask)
        if seed == 0:
            held = rows_of(salient)
            assert held == rows_of(expected)
        for name in QK:
            assert changed_rows(before[f"{name}.weight"], after[f"{name}.weight"]) == held[name]
        fixed = [n for n in after if n != WEIGHT and n.rpartition(".")[0] not in QK]
        same = [torch.equal(after[n], before[n]) for n in fixed]
        assert all(same) if others == "freeze" else not any(same)
    first.remove()
    second.remove()
    assert hooks_of(model) == 0
    assert all(param.requires_grad for param in model.parameters())
    salient_left = [m for m in model.modules() if isinstance(m, (SalientEmbedding, SalientLinear))]
    assert salient_left == []


def test_with_others_frozen_only_embedding_rows_train() -> None:
    model, handle = touched(others="freeze")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [WEIGHT]
    optimizer, start = adam(model), params_of(model)
    seen: set[int] = set()
    for seed in range(3):
        ids, mask = padded("left", 7, 5, seed=seed)
        train_step(model, optimizer, ids, attention_mask=mask)
        seen |= set(tokens(ids, mask))
    after = params_of(model)
    assert embedding_rows(model, start) == sorted(seen)
    for name, value in start.items():
        if name != WEIGHT:
            assert_same_bits(after[name], value, name)
    handle.remove()
    assert all(param.requires_grad for param in model.parameters())


def test_a_delta_is_refused_with_the_reason() -> None:
    _, handle = touched(others="freeze")
    with pytest.raises(ValueError, match="rows='touched'"):
        handle.save_delta("unused")


def test_the_steps_of_another_optimizer_leave_padding_alone() -> None:
    model, handle = touched()
    model.model.embed_tokens.padding_idx = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    handle.follow(optimizer)
    for seed in range(3):
        before = params_of(model)
        ids, mask = padded("left", 7, 5, seed=seed)
        read(model, ids, mask)
        assert model.model.embed_tokens.weight.grad[PAD].any()
        optimizer.step()
        optimizer.zero_grad()
        assert rows_of(handle) == {EMBED: tokens(ids, mask)}
        assert PAD not in embedding_rows(model, before)


# ---- checkpoints and copies ----------------------------------------------------------------------


@pytest.mark.parametrize("state", ["full", "compact"])
def test_a_run_resumes_bit_for_bit(state: Any) -> None:
    model, handle = touched()
    optimizer = adam(model, state=state)
    for seed in range(3):
        train_step(model, optimizer, token_ids(1, 5, seed=seed))
    file = io.BytesIO()
    torch.save((model.state_dict(), handle.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, saved, moments = torch.load(file, weights_only=True)

    twin = tiny_model(seed=7)
    twin.load_state_dict(weights)
    twin_handle = longact.apply(twin, rows="touched")
    twin_optimizer = adam(twin, state=state)
    twin_optimizer.load_state_dict(moments)
    twin_handle.load_state_dict(saved)
    assert_same_tree(twin_handle.state_dict(), handle.state_dict())
    for seed in range(3, 6):
        ids = token_ids(1, 5, seed=seed)
        assert train_step(twin, twin_optimizer, ids) == train_step(model, optimizer, ids)
        assert rows_of(twin_handle) == rows_of(handle) == {EMBED: tokens(ids)}
    assert_same_params(twin, model)
    assert_same_tree(twin_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert_same_tree(twin_handle.state_dict(), handle.state_dict())


def test_a_copy_counts_for_itself() -> None:
    model, handle = touched()
    read(model, token_ids(1, 4))
    twin = copy.deepcopy(model)
    read(twin, token_ids(1, 4, seed=1))
    for one, expected in (
        (model, tokens(token_ids(1, 4))),
        (twin, tokens(torch.cat([token_ids(1, 4), token_ids(1, 4, seed=1)]))),
    ):
        before = params_of(one)
        adam(one).step()
        assert one.model.embed_tokens.rows.tolist() == expected
        assert embedding_rows(one, before) == expected
    assert handle.rows[EMBED] is model.model.embed_tokens.rows


# ---- several ranks -------------------------------------------------------------------------------


def rank_ids(rank: int, step: int) -> Tensor:
    return torch.arange(3, 6 + 4 * rank)[None] + 10 * step + 5 * rank


def _rank(rank: int, tmp: str) -> None:
    join(rank, 2, tmp)
    torch.manual_seed(0)
    model = models.tiny_model()
    handle = longact.apply(model, rows="touched")
    ddp = DistributedDataParallel(model)
    optimizer = longact.FusedMaskedAdam(ddp.parameters(), lr=1e-2, weight_decay=0.1)
    history = []
    for step in range(3):
        before = models.params_of(model)[WEIGHT]
        ids = rank_ids(rank, step)
        ddp(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = models.changed_rows(before, models.params_of(model)[WEIGHT])
        history.append((models.rows_of(handle)[EMBED], changed))
    torch.save((history, model.state_dict()), f"{tmp}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_ranks_train_the_rows_that_any_of_them_read(tmp_path: Path) -> None:
    start_ranks(2, _rank, str(tmp_path))
    (history, state), (other, other_state) = (
        torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)
    )
    union = [tokens(torch.cat([rank_ids(rank, i) for rank in range(2)], 1)) for i in range(3)]
    assert history == other == [(rows, rows) for rows in union]
    assert_same_tree(dict(state), dict(other_state))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0.5}, "keep_ratio=0.5 with rows='touched'.*leave keep_ratio out"),
        ({"metric": "rms"}, "metric='rms' with rows='touched'"),
        ({"scope": "head"}, "scope='head' with rows='touched'"),
        ({"refresh_every": 2}, "refresh_every=2 with rows='touched'"),
        ({"refresh_every": "forward"}, "refresh_every='forward' with rows='touched'"),
        ({"capture": "rope"}, "capture='rope' with rows='touched'"),
        ({"pair_rope": True}, "pair_rope=True with rows='touched'"),
        ({"targets": "embed_tokens[0:8]"}, "range of model.embed_tokens's rows"),
        ({"targets": "nope"}, "matches 'nope'; its embeddings are named embed_tokens"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_what_says_nothing_of_touched_rows_is_refused(options: dict[str, Any], match: str) -> None:
    refused(tiny_model(), ValueError, match, rows="touched", **options)


@pytest.mark.parametrize("rows", ["Touched", None, True, [1]])
def test_rows_of_another_name_are_refused(rows: Any) -> None:
    match = rf"rows={rows!r}: use 'salient' or 'touched'".replace("[", r"\[")
    refused(tiny_model(), ValueError, match, rows=rows)


def test_a_tied_embedding_is_refused() -> None:
    model = tiny_model(tie_word_embeddings=True)
    for targets in (None, "embed_tokens"):
        refused(model, ValueError, r"embed_tokens\.weight.*tied", rows="touched", targets=targets)


def test_other_layers_are_refused() -> None:
    model = tiny_model()
    refused(model, TypeError, r"q_proj is a .*Linear, not a plain torch\.nn\.Embedding",
            rows="touched", targets="q_proj")  # fmt: skip
    # Gemma 3's scales what it reads.
    gemma = tiny_model("gemma3_text", tie_word_embeddings=False)
    refused(gemma, TypeError, r"embed_tokens is a .*Gemma3TextScaledWordEmbedding", rows="touched")


def test_sparse_gradients_are_refused() -> None:
    model = tiny_model()
    model.model.embed_tokens.sparse = True
    refused(model, ValueError, r"embed_tokens has sparse=True.*embed_tokens\.sparse = False",
            rows="touched")  # fmt: skip


def test_twice_is_refused_and_the_first_goes_on() -> None:
    model, handle = touched()
    refused(model, ValueError, r"SalientEmbedding already: call remove\(\)", rows="touched")
    refused(model, TypeError, "embed_tokens is a .*SalientEmbedding", targets="embed_tokens")
    train_step(model, adam(model), token_ids(1, 4))
    assert rows_of(handle) == {EMBED: tokens(token_ids(1, 4))}


def test_a_model_without_an_input_embedding_needs_targets() -> None:
    refused(Bag(), ValueError, r"Bag does not say.*targets=\['embed_tokens'\]", rows="touched")


def test_a_state_of_other_rows_is_refused() -> None:
    (model, handle), bigger = touched(), tiny_model(vocab_size=VOCAB + 1)
    other = longact.apply(bigger, rows="touched")
    train_step(bigger, adam(bigger), torch.tensor([[3, VOCAB]]))
    train_step(model, adam(model), token_ids(1, 4))
    before = rows_of(handle)
    with pytest.raises(ValueError, match=rf"{EMBED}.*{VOCAB}"):
        handle.load_state_dict(other.state_dict())
    assert rows_of(handle) == before
