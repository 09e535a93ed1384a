"""Caches forked from one prefill go on as if each had been prefilled by itself, and replies are those of generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.evaluate.forks import Contender, Prefix, contenders
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from tests.bench.machines import tiny
from tests.tiny_models import tokens

FULL = Policy(offload="none")
FEW = Policy.paper(4, dense_layers=1, offload="all")
TAIL = Policy(topn=4, dense_layers=1, dense_below=0, offload="all")
EVERY = FEW.replace(topn=4096)


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny()


def own(lm: LoadedModel, policy: Policy, ids: list[int]) -> tuple[KCache, torch.Tensor]:
    """A cache prefilled by itself, and the logits after it."""
    cache = KCache(lm.model, policy)
    with attach(lm.model):
        for newest, _ in prefill(lm.model, cache, torch.tensor([ids]), None):
            logits = newest
    return cache, logits


@pytest.mark.parametrize("kind", ["llama", "mqa", "gpt2", "gemma3"])
@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_a_fork_goes_on_as_a_prefill_of_its_own(kind: str, cut: int) -> None:
    lm = tiny(kind)
    ids = tokens(1, 40).tolist()
    fork = Prefix(lm, ids[:cut]).fork(ids[cut:], [FULL, FEW, TAIL], 6)
    for policy, cache in zip((FULL, FEW, TAIL), fork.caches, strict=True):
        beside, logits = own(lm, policy, ids)
        torch.testing.assert_close(fork.logits, logits, rtol=1e-4, atol=1e-4)
        with attach(lm.model):
            for token in (5, 9, 30):
                one = step_logits(lm.model, cache, torch.tensor([[token]]))
                two = step_logits(lm.model, beside, torch.tensor([[token]]))
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_forks_do_not_share_rows(lm: LoadedModel) -> None:
    prefix = Prefix(lm, tokens(2, 20).tolist())
    first, second = prefix.fork((), [FULL, FULL], 4).caches
    before = [layer.keys.clone() for layer in second.tiered_layers if layer.keys is not None]
    with attach(lm.model):
        step_logits(lm.model, first, torch.tensor([[7]]))
    first.tiered_layers[0].keys.zero_()  # type: ignore[union-attr]
    for layer, keys in zip(second.tiered_layers, before, strict=True):
        assert torch.equal(layer.keys, keys)  # type: ignore[arg-type]
    assert (first.get_seq_length(), second.get_seq_length()) == (21, 20)


@pytest.mark.parametrize("policy", [FULL, EVERY])
def test_a_reply_is_that_of_generate(lm: LoadedModel, policy: Policy) -> None:
    ids = tokens(3, 30).tolist()
    wanted: Any = lm.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    fork = Prefix(lm, ids[:10]).fork(ids[10:], [policy], 12)
    reply = fork.reply(fork.caches[0], (), 12)
    assert reply == lm.tokenizer.decode(wanted[0, 30:], skip_special_tokens=True) != ""


def test_a_question_fed_by_decode_steps_is_read_with_topn(lm: LoadedModel) -> None:
    ids = tokens(4, 30).tolist()
    fork = Prefix(lm, ids).fork((), [FEW], 20)
    (cache,) = fork.caches
    fork.reply(cache, [5, 6, 7], 5)
    steps, layers, heads = 3 + 4, 2, 4  # the last token of a reply is not fed
    assert cache.stats.rows_fetched == steps * layers * heads * FEW.topn
    (exact,) = Prefix(lm, ids).fork([5, 6, 7], [FEW], 20).caches
    assert exact.stats.rows_fetched == 0


def test_a_reply_ends_at_a_stop_string_and_at_an_end_token(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(3, 30).tolist()
    fork = Prefix(lm).fork(ids, [FULL] * 3, 12)
    whole = fork.reply(fork.caches[0], (), 12)
    stop = whole[3:5]
    assert fork.reply(fork.caches[1], (), 12, (stop,)) == whole[: whole.index(stop)]
    wanted: Any = lm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    said = wanted[0, 30:].tolist()
    end = next(at for at in range(2, 6) if said[at] not in said[:at])
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [said[end]])
    assert fork.reply(fork.caches[2], (), 12) == lm.tokenizer.decode(said[:end])


@pytest.mark.parametrize(("policy", "same"), [(FULL, True), (EVERY, True), (FEW, False)])
def test_a_likelihood_is_that_of_one_forward_only_if_every_row_is_read(
    lm: LoadedModel, policy: Policy, same: bool
) -> None:
    ids, rest = tokens(5, 40).tolist(), tokens(6, 3).tolist()
    with torch.no_grad():
        scores = lm.model(torch.tensor([ids + rest])).logits[0, -4:-1].log_softmax(-1)
    wanted = float(scores.gather(1, torch.tensor(rest)[:, None]).sum())
    fork = Prefix(lm, ids[:20]).fork(ids[20:-1], [policy], 4)
    got, greedy = fork.log_likelihood(fork.caches[0], ids[-1:], rest)
    assert (abs(got - wanted) < 1e-3) is same
    assert not greedy


def test_what_greedy_decoding_says_is_called_greedy(lm: LoadedModel) -> None:
    ids = tokens(7, 20).tolist()
    wanted: Any = lm.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    said = wanted[0, 20:].tolist()
    fork = Prefix(lm, ids).fork((), [FULL, FULL], 4)
    assert fork.log_likelihood(fork.caches[0], (), said)[1]
    assert not fork.log_likelihood(fork.caches[1], (), [*said[:2], said[2] - 1])[1]


def test_contenders_are_full_attention_and_each_n() -> None:
    found = contenders(FEW, (64, 128))
    assert [(each.engine, each.topn, each.label) for each in found] == [
        ("dense", None, "dense"),
        ("kcache", 64, "N=64"),
        ("kcache", 128, "N=128"),
    ]
    assert found[0] == Contender("dense", FULL)
    assert found[1].policy == FEW.replace(topn=64)
