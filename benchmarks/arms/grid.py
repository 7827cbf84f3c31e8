"""What is compared: the arms of the ablation, each a chain of stages. Chains share their first stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from cocoa_embed.errors import UsageError

Group = Literal["stages", "variants", "mask ratio", "pairs", "length"]

SHARES = (0.1, 0.3, 1.0)
MASK_RATIOS = (0.3, 0.5, 0.7, 0.9)
LENGTHS = (0.125, 0.25, 0.5, 1.0)
"""Parts of the bridge's steps after which a contrastive stage is tried."""

ALONE, EQUAL, ALL_THREE = "contrastive only", "contrastive only, compute of all three", "all three"
ALONE_CAUSAL = "contrastive only, causal"
NO_BRIDGE = "warm-up, contrastive"
CAPTIONS_AS_PAIRS = "contrastive only, compute of all three, every captioned image a pair"


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and trained.

    :param training: Captioned images that the bridge is trained on; the warm-up sees those that are kept out too.
    :param held_out: Images, and as many captions, that retrieval is measured among.
    :param pairs: What contrastive learning sees of the captioned images where all pairs are used.
    :param compared_part: The part of the bridge's steps that variants of it are compared after, one of ``LENGTHS``.
    :param equal_shares: The shares of the pairs that contrastive learning alone gets all the compute with.
    :param kept_out: More images: the bridge keeps them out of its training to measure what ``<EOS>`` carries, and they
        are no contrastive pairs.
    :param captions_as_pairs: Give it every captioned image as a pair too, in every wording.
    """

    training: int
    held_out: int
    pairs: int
    warmup_steps: int
    bridge_steps: int
    contrastive_steps: int
    compared_part: float = 1.0
    equal_shares: tuple[float, ...] = SHARES
    kept_out: int = 256
    captions_as_pairs: bool = True

    @property
    def kept_steps(self) -> dict[float, int]:
        """The steps of the bridge after which its weights are kept, by the part of it that they are."""
        return {part: round(self.bridge_steps * part) for part in LENGTHS}


@dataclass(frozen=True)
class StageRun:
    """One stage, from the backbone or from the weights that another left.

    :param settings: What is changed in the base recipe.
    :param at_step: Start from what ``start`` kept after that step; from its end if None.
    """

    stage: str
    steps: int
    settings: tuple[str, ...] = ()
    start: "StageRun | None" = None
    at_step: int | None = None

    @property
    def chain(self) -> "list[tuple[StageRun, int]]":
        """The stages from the backbone to this one, and how many steps of each it has been through."""
        if self.start is None:
            return [(self, self.steps)]
        *before, (last, steps) = self.start.chain
        return [*before, (last, self.at_step or steps), (self, self.steps)]


@dataclass(frozen=True)
class Arm:
    """A model that is scored.

    :param x: What the group's figure is drawn over: the share of the pairs, the mask ratio, the part of the bridge.
    :param at_step: Score what the last stage kept after that step; its end if None.
    """

    group: Group
    name: str
    last: StageRun
    share: float = 1.0
    x: float | None = None
    at_step: int | None = None

    def steps(self) -> list[tuple[StageRun, int]]:
        """The stages that the scored weights have been through, and how many steps of each."""
        *before, (last, steps) = self.last.chain
        return [*before, (last, self.at_step or steps)]


@dataclass(frozen=True)
class Grid:
    """All arms of one profile.

    :param per_row: Floating-point operations of a row of each stage, or of a pair of the contrastive stage.
    :param batch_sizes: Of each stage.
    :param mask_ratio: Of the bridge, where it is not what is compared.
    :param groups: The groups that are asked for; all if None.
    """

    sizes: Sizes
    per_row: Mapping[str, float]
    batch_sizes: Mapping[str, int]
    mask_ratio: float
    groups: Sequence[Group] | None = None

    def __post_init__(self) -> None:
        """Check the groups.

        :raises UsageError: If one is not known.
        """
        for group in self.groups or ():
            if group not in get_args(Group):
                raise UsageError(f"no group {group!r} of arms; there are {', '.join(get_args(Group))}")

    @property
    def arms(self) -> list[Arm]:
        """All of them, group after group."""
        laid_out = [*self._stages(), *self._variants(), *self._mask_ratios(), *self._pairs(), *self._lengths()]
        return [arm for arm in laid_out if self.groups is None or arm.group in self.groups]

    def pairs(self, share: float) -> int:
        """Return how many pairs a share of them is."""
        return round(self.sizes.pairs * share)

    def flops_per_step(self, stage: str, share: float) -> float:
        """Return what a step of a stage takes, in floating-point operations.

        An epoch's last contrastive batch holds what is left of the pairs, so a step has fewer than a batch on average.
        """
        rows: float = self.batch_sizes[stage]
        if stage == "contrastive":
            pairs = self.pairs(share)
            rows = pairs / ceil(pairs / self.batch_sizes[stage])
        return rows * self.per_row[stage]

    def flops(self, arm: Arm) -> float:
        """Return what the training of an arm takes, in floating-point operations."""
        return sum(steps * self.flops_per_step(run.stage, arm.share) for run, steps in arm.steps())

    def compute_in_contrastive_steps(self, bridge_steps: int, share: float) -> int:
        """Return the contrastive steps that take the compute of warm-up, so much of the bridge, and stage 3."""
        sizes = self.sizes
        before = sizes.warmup_steps * self.flops_per_step("warmup", share)
        before += bridge_steps * self.flops_per_step("bridge", share)
        return sizes.contrastive_steps + round(before / self.flops_per_step("contrastive", share))

    def warmup(self, *settings: str) -> StageRun:
        """Stage 1."""
        return StageRun("warmup", self.sizes.warmup_steps, settings)

    def bridge(self, start: StageRun | None, *settings: str) -> StageRun:
        """Stage 2, with its weights kept on the way."""
        steps = sorted(set(self.sizes.kept_steps.values()) - {self.sizes.bridge_steps})
        return StageRun("bridge", self.sizes.bridge_steps, (*settings, f"bridge.snapshot_steps={steps}"), start)

    def variant(self, *settings: str, start: StageRun | None) -> StageRun:
        """Another stage 2, as long as variants are."""
        return StageRun("bridge", self.sizes.kept_steps[self.sizes.compared_part], settings, start)

    def contrastive(
        self, start: StageRun | None, share: float, *settings: str, at_step: int | None = None, steps: int | None = None
    ) -> StageRun:
        """Stage 3 on a share of the pairs."""
        limit = f"contrastive.data.limit={self.pairs(share)}"
        return StageRun("contrastive", steps or self.sizes.contrastive_steps, (limit, *settings), start, at_step)

    def all_three(self, share: float = 1.0, part: float = 1.0) -> StageRun:
        """The whole chain, the contrastive stage from some part of the bridge."""
        whole = self.bridge(self.warmup())
        step = self.sizes.kept_steps[part]
        return self.contrastive(whole, share, at_step=None if step == whole.steps else step)

    def equal(self, share: float, *, captions: bool = False) -> StageRun:
        """Contrastive learning alone for the compute of all three, kept where a shorter bridge would have ended."""
        ends = {self.compute_in_contrastive_steps(steps, share) for steps in self.sizes.kept_steps.values()}
        setting = "data.captions=captions" if captions else f"snapshot_steps={sorted(ends - {max(ends)})}"
        return self.contrastive(None, share, f"contrastive.{setting}", steps=max(ends))

    def _stages(self) -> list[Arm]:
        chains = {
            ALONE: self.contrastive(None, 1.0),
            EQUAL: self.equal(1.0),
            NO_BRIDGE: self.contrastive(self.warmup(), 1.0),
            "bridge, contrastive": self.contrastive(self.bridge(None), 1.0),
            ALL_THREE: self.all_three(),
        }
        return [Arm("stages", name, last) for name, last in chains.items()]

    def _variants(self) -> list[Arm]:
        causal = "bidirectional=false"
        unseen = self.variant("bridge.eos_attends_to_b=false", start=self.warmup())
        chains = {
            ALL_THREE: self.all_three(part=self.sizes.compared_part),
            "all three, <EOS> does not see B": self.contrastive(unseen, 1.0),
            "all three, causal": self.contrastive(self.variant(causal, start=self.warmup(causal)), 1.0, causal),
            ALONE: self.contrastive(None, 1.0),
            ALONE_CAUSAL: self.contrastive(None, 1.0, causal),
        }
        return [Arm("variants", name, last) for name, last in chains.items()]

    def _mask_ratios(self) -> list[Arm]:
        arms = []
        for ratio in MASK_RATIOS:
            if ratio == self.mask_ratio:
                last = self.all_three(part=self.sizes.compared_part)
            else:
                last = self.contrastive(self.variant(f"bridge.mask_ratio={ratio}", start=self.warmup()), 1.0)
            arms.append(Arm("mask ratio", f"mask ratio {ratio}", last, x=ratio))
        return arms

    def _pairs(self) -> list[Arm]:
        arms = []
        for share in SHARES:
            chains = {ALONE: self.contrastive(None, share), ALL_THREE: self.all_three(share)}
            chains |= {EQUAL: self.equal(share)} if share in self.sizes.equal_shares else {}
            arms += [Arm("pairs", name, last, share, x=share) for name, last in chains.items()]
        if self.sizes.captions_as_pairs:
            share = self.sizes.training / self.sizes.pairs
            arms.append(Arm("pairs", CAPTIONS_AS_PAIRS, self.equal(share, captions=True), share, x=share))
        return arms

    def _lengths(self) -> list[Arm]:
        arms = []
        for share in (SHARES[0], SHARES[-1]):
            arms.append(Arm("length", NO_BRIDGE, self.contrastive(self.warmup(), share), share, x=0.0))
            for part, steps in self.sizes.kept_steps.items():
                equal, end = self.equal(share), self.compute_in_contrastive_steps(steps, share)
                at_step = None if end == equal.steps else end
                arms += [
                    Arm("length", ALL_THREE, self.all_three(share, part), share, part),
                    Arm("length", EQUAL, equal, share, part, at_step),
                ]
        return arms

    def references(self, arm: Arm) -> list[Arm]:
        """Return the arms of its group that an arm is held against."""
        others = [other for other in self.arms if other.group == arm.group]
        if arm.group == "stages":
            names = {ALONE: (), ALL_THREE: (ALONE, EQUAL, NO_BRIDGE)}.get(arm.name, (ALONE,))
            return [other for other in others if other.name in names]
        if arm.group == "variants":
            names = {ALONE: (), ALL_THREE: (), ALONE_CAUSAL: (ALONE,)}.get(arm.name, (ALL_THREE,))
            return [other for other in others if other.name in names]
        if arm.group == "mask ratio":
            return [other for other in others if other.x == self.mask_ratio and other != arm]
        same = [other for other in others if (other.share, other.x) == (arm.share, arm.x)]
        return [other for other in same if arm.name == ALL_THREE and other.name in (ALONE, EQUAL)]
