"""Slots: each step against a slow independent one, and what they guarantee."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cover import blobs, quick, seeds
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cover
from cover import covers, greedy_cover, similarities, unit
from slots import NEAREST, FeatureNorm, Slots


def trained(num=600, prune=2, **options):
    """Slots after three epochs on blobs, with those samples."""
    h, y = blobs(num, **options)
    slots = Slots(h.shape[1], 3)
    slots.fit(h, y, epochs=3, batch_size=100, lr=0.3, prune=prune)
    return slots, h, y


@quick
@given(st.integers(1, 5), st.integers(0, 12), st.sampled_from(["softmax", "max"]), st.floats(0.5, 200), seeds)
def test_scores_are_pooled_class_by_class(num, num_slots, pool, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = Slots(4, 3, scale, pool)
    W, label = torch.randn(num_slots, 4, generator=generator), torch.randint(3, (num_slots,), generator=generator)
    slots._append(W, label, torch.zeros(num_slots), label, update=0)
    s = similarities(unit(torch.randn(num, 4, generator=generator)), W)
    expected = []
    for row in s.double():
        expected.append([])
        for c in range(3):
            of_class = [v for v, name in zip(row.tolist(), label.tolist(), strict=True) if name == c]
            weights = [math.exp(scale * (v - max(of_class))) for v in of_class]
            soft = sum(w * v for w, v in zip(weights, of_class, strict=True)) / sum(weights) if of_class else NEAREST
            expected[-1].append(max(of_class, default=NEAREST) if pool == "max" else soft)
    assert torch.allclose(slots.scores(s).double(), torch.tensor(expected).double(), atol=1e-5)  # float32, scale 200


def test_the_most_similar_variant_counts():
    z, W = unit(torch.randn(5, 3, 4)), torch.randn(2, 4)
    each = torch.stack([similarities(z[:, v], W) for v in range(3)])
    assert torch.allclose(similarities(z, W), each.amax(0), atol=1e-6)
    slots = Slots(4, 2)
    y = torch.tensor([0, 1, 0, 1, 1])
    slots.grow(z, y)
    assert torch.equal(slots.predict(z), y)  # each is memorised by its first variant
    assert slots(z).shape == (5, 2)


def test_features_are_normalised_over_all_samples_and_variants():
    norm, h = FeatureNorm(4), 3 * torch.randn(20, 3, 4) + 5
    rows = h.reshape(60, 4)
    expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(norm(h), expected.view(20, 3, 4))
    assert list(norm.parameters()) == []
    norm.eval()
    torch.testing.assert_close(
        norm(h[:1, :1])[0, 0], (h[0, 0] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    )
    assert torch.equal(norm(h[:, 0]), norm(h)[:, 0])


@quick
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 90), seeds)
def test_the_order_of_variants_changes_nothing_to_the_bit(num, num_variants, num_slots, seed):
    generator = torch.Generator().manual_seed(seed)
    z = unit(torch.randn(num, num_variants, 33, generator=generator))
    W = torch.randn(num_slots, 33, generator=generator)
    order = torch.randperm(num_variants, generator=generator)
    assert torch.equal(similarities(z[:, order], W), similarities(z, W))


def variants(num, seed):
    """Three variants of each of blobs' samples."""
    h, y = blobs(num, seed=seed, spread=0.8, label_noise=0.05)
    return torch.stack([h, h.roll(1, 1), h.flip(1)], 1), y


def test_every_step_works_on_variants_as_on_their_largest_similarities():
    (h, y), (new, answers), (seen, labels) = (variants(num, seed) for num, seed in ((400, 0), (200, 1), (300, 2)))
    slots = Slots(6, 3)
    history = slots.fit(h, y, epochs=3, batch_size=100, lr=0.3, prune=1)
    unmatched = ~slots.matched(new)
    before, old, matched = slots.predict(seen), len(slots), slots.matched(seen)
    slots.update(h, y, new[unmatched], answers[unmatched])
    assert history[-1]["slots"] == old < len(slots) and 0 < matched.sum() < len(seen)
    assert torch.equal(slots.predict(seen)[matched], before[matched])
    on_h, on_new, on_seen = (matches(slots, x) for x in (h, new[unmatched], seen))
    assert on_h[:, :old].any(0).all() and on_new[:, old:].any(0).all()
    assert (slots.label == y[:, None])[on_h].all()  # old thresholds know nothing of new samples
    assert (slots.label[old:] == answers[unmatched][:, None])[on_new[:, old:]].all()
    assert torch.equal(slots.matched(seen), on_seen.any(1))
    is_old = on_seen[:, :old].any(1)
    on_seen[is_old, old:] = False  # a new slot decides nothing where an old one does
    winner = slow_similarities(seen, slots.W).masked_fill(~on_seen, -1).argmax(1)
    assert torch.equal(slots.predict(seen)[on_seen.any(1)], slots.label[winner][on_seen.any(1)])
    assert slots.accuracies(seen, labels)[-1].item() == (slots.predict(seen) == labels).double().mean().item()


def matches(slots, h):
    """Which slots match which samples, (N, S)."""
    return slow_similarities(h, slots.W) >= slots.threshold.double()


def slow_similarities(h, W):
    """(N, S) of variants, in float64, variant by variant."""
    W = F.normalize(W.detach().double())
    return torch.stack([F.normalize(of.double()) @ W.T for of in h.unbind(1)]).amax(0)


@quick
@given(st.integers(1, 60), st.integers(1, 20), seeds)
def test_growth_covers_every_sample_and_makes_no_more_slots_than_samples(num, batch_size, seed):
    h, y = blobs(num, seed=seed % 1000, label_noise=0.3)
    slots = Slots(6, 3)
    for h_b, y_b in zip(h.split(batch_size), y.split(batch_size), strict=True):
        before = len(slots)
        growth = slots.grow(h_b, y_b)
        assert len(slots) == before + growth.added <= num and growth.uncovered == 0
        now = covers(similarities(unit(h_b), slots.W[before:]), y_b, slots.label[before:], slots.threshold[before:])
        assert growth.added == 0 or now.any(0).all()  # every new slot is there for somebody
    slots.calibrate(h, y)
    s = similarities(unit(h), slots.W)
    matched = s >= slots.threshold
    assert torch.equal(matched, matched & (y[:, None] == slots.label))  # exact precision, of every slot
    assert torch.equal(slots.hits, matched.sum(0))
    assert torch.equal(slots.predict(h)[slots.matched(h)], y[slots.matched(h)])
    assert torch.equal(slots.matched(h), torch.cat([slots.matched(one) for one in h.split(1)]))  # in batches of one


def test_a_sample_that_is_also_one_of_another_class_stays_uncovered():
    h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    slots = Slots(2, 2)
    assert slots.grow(h, torch.tensor([0, 1, 1])) == (1, 2)
    assert slots.label.tolist() == [1]
    assert slots.matched(h).tolist() == [False, False, True]


def test_it_grows_in_the_forward_pass_of_a_batch_whose_labels_it_awaits():
    (h, y), slots, other = blobs(50), Slots(6, 3), Slots(6, 3)
    network = torch.nn.Sequential(torch.nn.Identity(), slots)
    slots.await_batch(y)
    logits = network(h)
    assert slots.growth == other.grow(h, y) and torch.equal(logits, other(h)) and logits.requires_grad
    network(h)
    assert len(slots) == len(other)  # once


def test_thresholds_follow_those_of_a_batch():
    slots = Slots(2, 2)
    slots._append(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0.5, torch.inf]), torch.tensor([1, 1]), update=0)
    slots.grow(torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([0, 0]))
    assert slots.threshold[0].item() == pytest.approx(0.9 * 0.5 + 0.1 * 0.8)
    assert slots.threshold[1].item() == math.inf  # no sample of its class: it stays as it is
    slots.grow(torch.tensor([[0.6, 0.8]]), torch.tensor([1]))
    assert slots.threshold[1].item() == pytest.approx(0.8)


def test_a_step_is_one_of_plain_gradient_descent():
    slots, h, y = trained(100)
    W = torch.nn.Parameter(slots.W.detach().clone())
    F.cross_entropy(slots(h), y).backward()
    W.grad = slots.W.grad.clone()
    torch.optim.SGD([W], lr=0.7).step()
    slots.step(0.7)
    assert torch.equal(slots.W, W) and slots.W.grad is None


def test_pruning_keeps_a_cover_and_drops_what_gains_little():
    slots, h, y = trained(prune=0)
    whole, other = len(slots), Slots(6, 3)
    other.load_state_dict(slots.state_dict())
    covered = slots.calibrate(h, y)
    kept = slots.prune(covered, 0)
    assert torch.equal(covered[:, kept].any(1), covered.any(1))
    assert len(slots) == len(kept) <= whole and torch.equal(slots.W, other.W[kept])
    kept = other.prune(other.calibrate(h, y), 20)
    assert 0 < len(other) < len(slots)
    _, gains = greedy_cover(covered)
    assert len(kept) == (gains > 20).sum()


def test_a_state_dict_resizes_what_reads_it():
    slots, h, _ = trained()
    other = torch.nn.Sequential(Slots(6, 3))
    other.load_state_dict({f"0.{name}": value for name, value in slots.state_dict().items()})
    assert torch.equal(other[0](h), slots(h)) and other[0].W.requires_grad
    slots.load_state_dict(Slots(6, 3).state_dict())
    assert len(slots) == 0 and torch.equal(slots(h), torch.full((len(h), 3), 30 * NEAREST))
    with pytest.raises(RuntimeError, match="size mismatch"):
        slots.load_state_dict(Slots(5, 3).state_dict())


def test_an_update_changes_no_prediction_of_an_old_match():
    slots, h, y = trained()
    new, answers = blobs(500, spread=1.5, seed=7, label_noise=0.1)
    seen, _ = blobs(2000, spread=1.5, seed=8)
    for _ in range(2):  # an update upon an update
        before, matched, logits = slots.predict(seen), slots.matched(seen), slots(seen)
        unmatched = ~slots.matched(new)
        old = slots.state_dict()
        gains = slots.update(h, y, new[unmatched], answers[unmatched])
        assert 0 < len(gains) <= unmatched.sum()
        after = slots.predict(seen)
        assert torch.equal(after[matched], before[matched]) and not torch.equal(after, before)
        assert torch.equal(slots(seen)[matched], logits[matched])
        assert torch.equal(slots(seen).argmax(1)[~matched], after[~matched])  # the network says what `predict` does
        assert all(torch.equal(slots.state_dict()[name][: len(value)], value) for name, value in old.items())
        assert torch.equal(slots.predict(new[unmatched]), answers[unmatched])
        new, answers = blobs(500, spread=2.5, seed=9, label_noise=0.1)


def test_slots_of_an_update_have_precision_one_on_training_samples_and_new_ones_together():
    slots, h, y = trained()
    new, answers = blobs(400, spread=1.5, seed=7, label_noise=0.1)
    unmatched = ~slots.matched(new)
    slots.update(h, y, new[unmatched], answers[unmatched])
    both, labels = torch.cat([h, new[unmatched]]), torch.cat([y, answers[unmatched]])
    is_new = slots.update_of == 1
    matched = (similarities(unit(both), slots.W) >= slots.threshold)[:, is_new]
    assert is_new.any() and matched.any(0).all()
    assert (slots.label[is_new] == labels[:, None])[matched].all()


def test_accuracies_are_those_of_networks_with_fewer_slots():
    slots, h, y = trained()
    new, answers = blobs(300, spread=1.5, seed=7)
    seen, labels = blobs(500, spread=1.5, seed=8)
    assert slots.accuracies(seen, labels).tolist() == [(slots.predict(seen) == labels).double().mean().item()]
    unmatched, old = ~slots.matched(new), len(slots)
    slots.update(h, y, new[unmatched], answers[unmatched])
    curve = slots.accuracies(seen, labels)
    fewer = Slots(6, 3)
    for k in range(len(slots) - old + 1):
        fewer.load_state_dict({name: value[: old + k] for name, value in slots.state_dict().items()})
        assert curve[k].item() == (fewer.predict(seen) == labels).double().mean().item()


@pytest.mark.parametrize("num_old", [None, 0])
def test_accuracies_without_any_slot_are_those_of_scores_that_are_all_alike(num_old):
    labels = torch.tensor([0, 0, 2])
    accuracies = Slots(6, 3).accuracies(torch.randn(3, 6), labels, num_old)
    torch.testing.assert_close(accuracies, torch.tensor([2 / 3], dtype=torch.float64))


def test_training_repeats_bit_for_bit_and_learns():
    slots, h, y = trained(2000, spread=0.8)
    again, *_ = trained(2000, spread=0.8)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in slots.state_dict().items())
    seen, labels = blobs(2000, spread=0.8, seed=1)
    nearest = F.normalize(h) @ F.normalize(seen).T
    accuracy = (slots.predict(seen) == labels).double().mean()
    assert (
        accuracy > (y[nearest.argmax(0)] == labels).double().mean()
    )  # better than the nearest training sample's class
    assert len(slots) < 500


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that is made inside."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def test_nothing_is_as_large_as_all_similarities(monkeypatch):
    monkeypatch.setattr(cover, "ROWS_AT_ONCE", 512)
    h, y = blobs(4000)
    slots = Slots(6, 3)
    slots._append(h[:400], y[:400], torch.ones(400), y[:400], update=0)
    with Largest() as largest:
        slots.prune(slots.calibrate(h, y))
    assert largest.nbytes <= 4000 * 400  # which slot matches which sample: a byte each, for float32 it would be four


@pytest.mark.parametrize(("options", "reason"), [({"pool": "mean"}, "'mean' is no way"), ({"scale": 0}, "above 0")])
def test_what_makes_no_sense_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Slots(4, 3, **options)
