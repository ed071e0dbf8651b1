"""Slots: a last layer that grows while it trains, memorises with exact precision, and is updated without forgetting.

A slot is a direction with a label and a threshold. A sample whose features point towards it at least as closely as the
threshold says *matches* it, and on the samples by which the threshold was set, only samples of its label do.

    slots = Slots(dimension=784, num_classes=10)
    slots.fit(h, y)  # features (N, 784) of any backbone, or plain pixels
    slots.predict(h)

Letters: N samples (B of a batch), V variants of each, d their dimension, S slots, C classes; h features, z features of
length 1, s similarities, t thresholds.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cover import ROUNDING, ROWS_AT_ONCE, calibrated, column_sums, covers, greedy_cover, similarities, thresholds, unit
from whitebox import SoftMaxPool

POOLS = ("softmax", "max")
NEAREST = -1.0  # the score of a class without slots: no similarity is lower
FOLLOWS = 0.1  # how far a threshold goes towards that of the last batch


def slots_of(network: nn.Module) -> "Slots | None":
    """The layer of slots in a network, if it has one."""
    return next((layer for layer in network.modules() if isinstance(layer, Slots)), None)


def similarities_in(network: nn.Module, x: Tensor) -> Tensor:
    """Of a batch's samples with all slots of a network, (B, S): what can be looked at as its last units."""
    h = network.feature_extractor(x)[network.layers[-1]]  # (B, d), or V variants of each (B, V, d)
    return similarities(unit(h), slots_of(network).W)


class Similarities(nn.Module):
    """A network as a function of its input whose outputs are the similarities with its slots, (B, S), not logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → (B, S)."""
        return similarities_in(self.network, x)


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm without learnt parameters of features (B, d), or of all V variants of each together (B, V, d).

    In front of slots it makes directions of how a sample differs from the others, by each feature's spread.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension, affine=False)

    def forward(self, h: Tensor) -> Tensor:
        """In the shape of h; in eval mode to the bit the same for a sample wherever in a batch it stands."""
        if self.training:
            return super().forward(h.flatten(0, -2)).view_as(h)
        return (h - self.running_mean) / (self.running_var + self.eps).sqrt()


class Growth(NamedTuple):
    """What a batch did: slots added, and unmatched samples that no slot can tell from those of another class."""

    added: int
    uncovered: int


class Slots(nn.Module):
    """A last layer of slots: features (B, d), or V variants of each (B, V, d), to logits (B, C).

    A class's score is the soft maximum (`SoftMaxPool`, p = softmax(scale · s)) or the maximum of the similarities with
    its slots; logits are scale × score. It starts without slots: `grow` makes them of samples that no slot of their
    class matches, `step` moves them along the gradient of a loss, `calibrate` and `prune` end an epoch, and `fit` does
    all of it. `update` adds slots for new samples and leaves every prediction as it was that an old match decides.

    State: W (S, d), and of each slot its `label`, its `threshold`, `hits`, the number of samples that it matched when
    it was last calibrated, and `update_of`, in which update it came (0: in training). Reading a state dict resizes it.
    """

    def __init__(self, dimension: int, num_classes: int, scale: float = 30.0, pool: str = "softmax") -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"{pool!r} is no way of pooling slots; choose one of {', '.join(POOLS)}")
        if scale <= 0:
            raise ValueError(f"the scale of slots must be above 0, not {scale}")
        self.dimension, self.num_classes, self.scale, self.pool = dimension, num_classes, scale, pool
        self.W = nn.Parameter(torch.empty(0, dimension))
        self.growth = Growth(0, 0)  # in the last batch
        self._awaited: Tensor | None = None
        self.register_buffer("label", torch.empty(0, dtype=torch.long))
        self.register_buffer("threshold", torch.empty(0))
        self.register_buffer("hits", torch.empty(0, dtype=torch.long))
        self.register_buffer("update_of", torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.W)

    def __bool__(self) -> bool:
        return True  # without slots it is a layer all the same

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.dimension}, {self.num_classes}, scale={self.scale:g}, pool={self.pool}, {len(self)} slots"

    def reset_parameters(self) -> None:
        """No slots."""
        self._keep(torch.empty(0, dtype=torch.long, device=self.W.device))

    @property
    def counts(self) -> Tensor:
        """How many slots each class has, (C,)."""
        return self.label.bincount(minlength=self.num_classes)

    # What slots say of samples

    def forward(self, h: Tensor) -> Tensor:
        """Logits (B, C): scale × score, and where no slot of training matches but one of an update, its class first."""
        if self._awaited is not None:
            self.growth, self._awaited = self.grow(h.detach(), self._awaited), None
        s = similarities(unit(h), self.W)
        logits = self.scale * self.scores(s) + (0 if len(self) else self.W.sum())  # a gradient, though it is none
        return self._with_updates_first(logits, s) if self.update_of.any() else logits

    def scores(self, s: Tensor) -> Tensor:
        """Class scores (B, C) from similarities s (B, S), of the slots that came in training."""
        label = torch.where(self.update_of == 0, self.label, self.num_classes)  # updates go behind the last class
        order = label.argsort(stable=True)
        counts = label.bincount(minlength=self.num_classes + 1)[: self.num_classes + 1].tolist()
        by_class = s[:, order].split(counts, dim=1)[: self.num_classes]
        return torch.stack([self._pooled(of_class) for of_class in by_class], dim=1)

    def _pooled(self, s: Tensor) -> Tensor:
        """(B, n) → (B,)."""
        if s.shape[1] == 0:
            return s.new_full((len(s),), NEAREST)
        return s.amax(1) if self.pool == "max" else SoftMaxPool(1, 1 / self.scale)(s)[:, 0]

    def deciding(self, s: Tensor) -> Tensor:
        """The matching slot of each sample that decides, (B,), -1 where none matches: the most similar of the oldest.

        Oldest are those of training, then those of each update: a later one changes nothing about earlier matches.
        """
        winner = torch.full((len(s),), -1, device=s.device)
        matched = s >= self.threshold
        for update in self.update_of.unique().tolist():  # ascending
            of_update = matched & (self.update_of == update)
            best = s.masked_fill(~of_update, -torch.inf).argmax(1)
            winner = torch.where((winner < 0) & of_update.any(1), best, winner)
        return winner

    def _with_updates_first(self, logits: Tensor, s: Tensor) -> Tensor:
        """Logits with that of a deciding new slot's class raised above the others, by scale · (s_j − t_j) + 1."""
        winner = self.deciding(s)
        c = self.label[winner.clamp(min=0)]
        excess = s.gather(1, winner.clamp(min=0)[:, None])[:, 0] - self.threshold[winner.clamp(min=0)]
        raised = logits.amax(1) + self.scale * excess + 1  # (B,)
        is_overruled = (winner >= 0) & (self.update_of[winner] > 0) & (logits.argmax(1) != c)
        target = F.one_hot(c, self.num_classes).bool() & is_overruled[:, None]
        return torch.where(target, raised[:, None], logits)

    @torch.no_grad()
    def matched(self, h: Tensor) -> Tensor:
        """Whether some slot matches each sample, bool (N,). One that none matches is unlike all that was memorised."""
        return torch.cat([(similarities(unit(part), self.W) >= self.threshold).any(1) for part in self._parts(h)])

    @torch.no_grad()
    def predict(self, h: Tensor) -> Tensor:
        """Classes (N,): that of the oldest, most similar slot that matches; where none does, of the highest score."""
        return torch.cat([self._predicted(similarities(unit(part), self.W)) for part in self._parts(h)])

    def _predicted(self, s: Tensor) -> Tensor:
        winner = self.deciding(s)
        pooled = self.scores(s).argmax(1)
        return torch.where(winner >= 0, self.label[winner], pooled) if len(self) else pooled

    def _parts(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.split(ROWS_AT_ONCE)

    # How slots come, move and go

    @torch.no_grad()
    def grow(self, h: Tensor, y: Tensor) -> Growth:
        """Add slots for the samples of a batch, (B, d) and (B,), that no slot of their class matches.

        Candidates are those samples themselves, each with its threshold on the batch; a greedy cover chooses. One whose
        features are also those of another class is covered by none. The thresholds of the slots that were there follow
        a tenth of the way to those of the batch.
        """
        z = unit(h)
        s = similarities(z, self.W)
        is_new = ~covers(s, y, self.label, self.threshold).any(1)
        self._follow(thresholds(s, y, self.label, ROUNDING).to(self.threshold.dtype))
        W, label = self._as_slots(z[is_new]), y[is_new]
        threshold, (covered,) = calibrated([(z, y)], W, label)
        chosen, gains = greedy_cover(covered[is_new])
        self._append(W[chosen], label[chosen], threshold[chosen], covered[:, chosen].sum(0), update=0)
        return Growth(len(chosen), int(is_new.sum() - gains.sum()))

    def await_batch(self, y: Tensor) -> None:
        """Have the next forward pass grow first, by its batch, whose labels are y; `growth` then says what it did.

        So the layer grows wherever in a network it stands.
        """
        self._awaited = y

    def _follow(self, t: Tensor) -> None:
        """Move thresholds towards t (S,) where both are finite; one that is infinite takes what there is."""
        near = torch.where(self.threshold.isinf(), t, self.threshold.lerp(t, FOLLOWS))
        self.threshold.copy_(torch.where(t.isinf(), self.threshold, near))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """A plain step of gradient descent for W, whose gradient is then spent."""
        if self.W.grad is not None:
            self.W.add_(self.W.grad, alpha=-lr)
            self.W.grad = None

    @torch.no_grad()
    def calibrate(self, h: Tensor, y: Tensor) -> Tensor:
        """Give every slot the threshold that has full precision on these samples; which of them it covers, (N, S)."""
        threshold, (covered,) = calibrated([(unit(h), y)], self.W, self.label)
        self.threshold.copy_(threshold)
        self.hits.copy_(column_sums(covered))
        return covered

    @torch.no_grad()
    def prune(self, covered: Tensor, most: int = 5) -> Tensor:
        """Keep a greedy cover of the samples by slots, without those that gain at most `most`; the kept ones (S',).

        `covered` (N, S) is what `calibrate` returns. Slots keep their order.
        """
        chosen, _ = greedy_cover(covered, most + 1)
        kept = chosen.sort().values.to(self.W.device)
        self._keep(kept)
        return kept

    @torch.no_grad()
    def update(self, h: Tensor, y: Tensor, asked: Tensor, answers: Tensor) -> Tensor:
        """Add slots for new samples (K, d) whose labels (K,) were asked for; how many of them each new slot gains.

        Which to ask for says `~matched(…)`. h and y are the training samples: thresholds have full precision on them
        and the new ones together. Slots come in greedy order. No match of an older slot is changed.
        """
        z = unit(asked)
        W = self._as_slots(z)
        threshold, (_, covered) = calibrated([(unit(h), y), (z, answers)], W, answers)
        chosen, gains = greedy_cover(covered)
        update = int(self.update_of.max()) + 1 if len(self) else 1
        self._append(W[chosen], answers[chosen], threshold[chosen], covered[:, chosen].sum(0), update)
        return gains

    def fit(
        self,
        h: Tensor,
        y: Tensor,
        *,
        epochs: int = 6,
        batch_size: int = 1000,
        lr: float = 20.0,
        prune: int = 5,
        seed: int = 0,
    ) -> list[dict[str, float]]:
        """Train on features (N, d) and labels (N,) as they are; what each epoch did. In the last one nothing grows."""
        generator, history = torch.Generator().manual_seed(seed), []
        for epoch in range(epochs):
            before, added, uncovered = len(self), 0, 0
            for batch in torch.randperm(len(y), generator=generator).split(batch_size):
                h_b, y_b = h[batch], y[batch]
                if epoch < epochs - 1:
                    growth = self.grow(h_b, y_b)
                    added, uncovered = added + growth.added, uncovered + growth.uncovered
                if len(self):
                    F.cross_entropy(self(h_b), y_b).backward()
                    self.step(lr)
            covered = self.calibrate(h, y)
            self.prune(covered, prune)
            pruned = before + added - len(self)
            history.append({"slots": len(self), "added": added, "pruned": pruned, "uncovered": uncovered})
        return history

    @torch.no_grad()
    def accuracies(self, h: Tensor, y: Tensor, num_old: int | None = None) -> Tensor:
        """Accuracy of `predict` with none, one, two, … all K slots of the last update, in their order: (K + 1,).

        An update that adds none leaves no slot to know it by: with `num_old`, those beyond so many are the last one's.
        """
        if num_old is None:
            is_new = (self.update_of > 0) & (self.update_of == max(self.update_of.tolist(), default=0))
        else:
            is_new = torch.arange(len(self), device=h.device) >= num_old
        parts = self._parts(h)
        labels = y.split(len(parts[0]))
        correct = [self._correct_by_slots(part, of, is_new) for part, of in zip(parts, labels, strict=True)]
        return torch.stack(correct).sum(0).double() / len(y)

    def _correct_by_slots(self, h: Tensor, y: Tensor, is_new: Tensor) -> Tensor:
        """How many of these samples are right with so many of the last slots, those that are new, (K + 1,)."""
        s = similarities(unit(h), self.W)
        older = self.deciding(s.masked_fill(is_new, -torch.inf))
        pooled = self.scores(s).argmax(1)
        before = torch.where(older >= 0, self.label[older], pooled) if len(self) else pooled  # (N,)
        s_new = s[:, is_new].masked_fill((s < self.threshold)[:, is_new] | (older >= 0)[:, None], -torch.inf)
        best, first = s_new.cummax(1)  # (N, K): of the first slots that match, the most similar
        after = torch.where(best.isinf(), before[:, None], self.label[is_new][first])
        return (torch.cat([before[:, None], after], dim=1) == y[:, None]).sum(0)

    # Housekeeping

    def _as_slots(self, z: Tensor) -> Tensor:
        """Directions of samples as those of slots: of several variants, the first."""
        return (z if z.ndim == 2 else z[:, 0]).to(self.W.dtype)

    def _append(self, W: Tensor, label: Tensor, threshold: Tensor, hits: Tensor, update: int) -> None:
        new = {"label": label, "threshold": threshold, "hits": hits, "update_of": torch.full_like(label, update)}
        self.W = nn.Parameter(torch.cat([self.W.detach(), W]))
        for name, values in new.items():
            setattr(self, name, torch.cat([getattr(self, name), values.to(getattr(self, name))]))

    def _keep(self, kept: Tensor) -> None:
        self.W = nn.Parameter(self.W.detach()[kept])
        for name, values in self.named_buffers(recurse=False):
            setattr(self, name, values[kept])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name, mine in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape[1:] == mine.shape[1:]:
                resized = mine.detach().new_empty(value.shape)
                setattr(self, name, nn.Parameter(resized) if name == "W" else resized)
        super()._load_from_state_dict(state_dict, prefix, *args)
