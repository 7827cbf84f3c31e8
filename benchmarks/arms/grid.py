"""The arms of the ablation, each a chain of stages; a stage that several arms share is trained once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from typing import Literal

Group = Literal["stages", "variants", "mask ratio", "pairs", "length", "photographs", "settings"]

FRACTIONS = (0.1, 0.3, 1.0)
"""The fractions of the pairs that the contrastive stage is trained on."""

MASK_RATIOS = (0.3, 0.5, 0.7, 0.9)

LENGTHS = (0.125, 0.25, 0.5, 1.0)
"""The fractions of the bridge's steps after which a contrastive stage is tried."""

ALONE, EQUAL, ALL_THREE = "contrastive only", "contrastive only, compute of all three", "all three"
ALONE_CAUSAL = "contrastive only, causal"
NO_BRIDGE = "warm-up, contrastive"
MOCA = "moca"
MOCA_ARM = "moca, contrastive"
MOCA_SETTINGS = (
    "pooling=mean",
    "moca.batch_size=48",
    "moca.learning_rate=5.0e-4",
    "moca.warmup_steps=40",
    "moca.adam_beta2=0.98",
    "moca.schedule=constant_with_warmup",
    "moca.group_by_length=false",
)
"""Overrides of the stage that replaces warm-up and bridge, for the package's recipes of small backbones."""

CAPTIONS_AS_PAIRS = "contrastive only, compute of all three, every captioned image a pair"


@dataclass(frozen=True)
class Sizes:
    """How much data is drawn, and how long the stages are trained.

    :param training: Captioned images that the bridge is trained on; the warm-up also sees those of the probe.
    :param held_out: Scenes that retrieval is measured on, with one caption each; with the user's folders, all
        images of the held-out one.
    :param pairs: Contrastive pairs at fraction 1, taken from the captioned images.
    :param variant_part: The fraction of the bridge's steps after which variants are compared, one of ``LENGTHS``.
    :param equal_fractions: The fractions of the pairs for which contrastive learning alone also gets the compute of
        all three stages.
    :param probe_rows: Further images, held out of the bridge to measure how much of an image ``<EOS>`` carries; they
        are not used as contrastive pairs.
    :param captions_as_pairs: Also train contrastive learning alone on every captioned image, in every wording.
    """

    training: int
    held_out: int
    pairs: int
    warmup_steps: int
    bridge_steps: int
    contrastive_steps: int
    variant_part: float = 1.0
    equal_fractions: tuple[float, ...] = FRACTIONS
    probe_rows: int = 256
    captions_as_pairs: bool = True

    @property
    def snapshots(self) -> dict[float, int]:
        """The bridge's steps after which its weights are saved, by their fraction of the bridge."""
        return {part: round(self.bridge_steps * part) for part in LENGTHS}


@dataclass(frozen=True)
class StageRun:
    """One stage, which starts from the backbone or from the weights of another stage.

    :param settings: Overrides of the base recipe.
    :param at_step: The step of ``start`` whose weights the stage starts from; None for its end.
    :param varied: The setting whose values are compared.
    """

    stage: str
    steps: int
    settings: tuple[str, ...] = ()
    start: "StageRun | None" = None
    at_step: int | None = None
    varied: str | None = None

    @property
    def chain(self) -> "list[tuple[StageRun, int]]":
        """The stages from the backbone to this one, and how many steps of each the chain includes."""
        if self.start is None:
            return [(self, self.steps)]
        *before, (last, steps) = self.start.chain
        return [*before, (last, self.at_step or steps), (self, self.steps)]


@dataclass(frozen=True)
class Arm:
    """A model that is scored.

    :param x: Its position on the axis of the group's figure: fraction of the pairs, mask ratio, fraction of the bridge.
    :param at_step: The step of the last stage whose weights are scored; None for its end.
    :param captions: The number of captions per image, each of which makes a contrastive pair.
    """

    group: Group
    name: str
    last: StageRun
    fraction: float = 1.0
    x: float | None = None
    at_step: int | None = None
    captions: float = 1

    @property
    def chain(self) -> list[tuple[StageRun, int]]:
        """The stages of the scored weights, and how many steps of each."""
        *before, (last, steps) = self.last.chain
        return [*before, (last, self.at_step or steps)]


@dataclass(frozen=True)
class Grid:
    """All arms of one ablation.

    :param flops_per_row: The FLOPs of a row of each stage, including MoCa's if it is compared; in the contrastive
        stage, of a pair.
    :param batch_sizes: The batch size of each stage.
    :param mask_ratio: The mask ratio of the bridge where mask ratios are not compared.
    :param groups: The groups to run; None for all.
    :param patterns: Patterns, as for file names, of the ``label`` of the arms to run; none for all.
    :param seconds_per_step: The seconds of a step of each stage, if they were timed.
    """

    sizes: Sizes
    flops_per_row: Mapping[str, float]
    batch_sizes: Mapping[str, int]
    mask_ratio: float
    groups: Sequence[Group] | None = None
    patterns: Sequence[str] = ()
    seconds_per_step: Mapping[str, float] = field(default_factory=dict)

    @property
    def arms(self) -> list[Arm]:
        """The arms to run, in the order in which they are trained."""
        arms = [arm for arm in self._all() if self.groups is None or arm.group in self.groups]
        patterns = self.patterns or ("*",)
        return [arm for arm in arms if any(fnmatchcase(self.label(arm), pattern) for pattern in patterns)]

    def label(self, arm: Arm) -> str:
        """Return an arm's name and its data."""
        return f"{arm.name}, {self.pairs(arm.fraction)} pairs"

    def _all(self) -> list[Arm]:
        return [*self._stages(), *self._variants(), *self._mask_ratios(), *self._pairs(), *self._lengths()]

    def pairs(self, fraction: float) -> int:
        """Return the number of pairs at a fraction."""
        return round(self.sizes.pairs * fraction)

    def flops_per_step(self, stage: str, fraction: float, captions: float = 1, setting: str | None = None) -> float:
        """Return the FLOPs of a step.

        The last contrastive batch of an epoch holds the remaining pairs, so on average a step has less than a batch.

        :param setting: The setting that is varied, with which rows may cost more or less.
        """
        rows: float = self.batch_sizes[stage]
        if stage == "contrastive":
            pairs = self.pairs(fraction) * captions
            rows = pairs / ceil(pairs / self.batch_sizes[stage])
        return rows * self.flops_per_row.get(str(setting), self.flops_per_row[stage])

    def flops(self, arm: Arm) -> float:
        """Return the FLOPs of training an arm."""
        return sum(
            steps * self.flops_per_step(run.stage, arm.fraction, arm.captions, run.varied) for run, steps in arm.chain
        )

    def equal_compute_steps(self, bridge_steps: int, fraction: float, captions: float = 1) -> int:
        """Return the contrastive steps that cost as much as warm-up, bridge and contrastive stage together."""
        step = self.flops_per_step("contrastive", fraction, captions)
        return self.sizes.contrastive_steps + round(self.flops_before(bridge_steps) / step)

    def flops_before(self, bridge_steps: int) -> float:
        """Return the FLOPs of warm-up and bridge."""
        warmup, bridge = (self.flops_per_step(stage, 1.0) for stage in ("warmup", "bridge"))
        return self.sizes.warmup_steps * warmup + bridge_steps * bridge

    def warmup(self, *settings: str) -> StageRun:
        """Return stage 1."""
        return StageRun("warmup", self.sizes.warmup_steps, settings)

    @property
    def has_moca(self) -> bool:
        """Whether MoCa is also compared."""
        return MOCA in self.flops_per_row

    def moca(self) -> StageRun:
        """Return the stage of MoCa, with the compute of warm-up and bridge."""
        steps = round(self.flops_before(self.sizes.bridge_steps) / self.flops_per_step(MOCA, 1.0))
        return StageRun(MOCA, steps, MOCA_SETTINGS)

    def bridge(self, start: StageRun | None) -> StageRun:
        """Return stage 2 with its snapshots."""
        steps = sorted(set(self.sizes.snapshots.values()) - {self.sizes.bridge_steps})
        return StageRun("bridge", self.sizes.bridge_steps, (f"bridge.snapshot_steps={steps}",), start)

    def variant(self, *settings: str, start: StageRun | None) -> StageRun:
        """Return a variant of stage 2, with the number of steps of all variants."""
        return StageRun("bridge", self.sizes.snapshots[self.sizes.variant_part], settings, start)

    def contrastive(
        self, start: StageRun | None, fraction: float = 1.0, *settings: str, at_step: int | None = None, steps: int = 0
    ) -> StageRun:
        """Return stage 3 on a fraction of the pairs."""
        limit = f"contrastive.data.limit={self.pairs(fraction)}"
        return StageRun("contrastive", steps or self.sizes.contrastive_steps, (limit, *settings), start, at_step)

    def all_three(self, fraction: float = 1.0, part: float = 1.0) -> StageRun:
        """Return the whole chain, with the contrastive stage starting after a fraction of the bridge."""
        bridge, step = self.bridge(self.warmup()), self.sizes.snapshots[part]
        return self.contrastive(bridge, fraction, at_step=None if step == bridge.steps else step)

    def equal(self, fraction: float, *, captions: bool = False) -> StageRun:
        """Return contrastive learning alone with the compute of all three, and snapshots for the shorter bridges."""
        ends = {self.equal_compute_steps(steps, fraction) for steps in self.sizes.snapshots.values()}
        setting = "data.captions=captions" if captions else f"snapshot_steps={sorted(ends - {max(ends)})}"
        return self.contrastive(None, fraction, f"contrastive.{setting}", steps=max(ends))

    def _stages(self) -> list[Arm]:
        chains = {
            ALONE: self.contrastive(None),
            EQUAL: self.equal(1.0),
            NO_BRIDGE: self.contrastive(self.warmup()),
            "bridge, contrastive": self.contrastive(self.bridge(None)),
            ALL_THREE: self.all_three(),
        }
        if self.has_moca:
            chains[MOCA_ARM] = self.contrastive(self.moca())
        return [Arm("stages", name, last) for name, last in chains.items()]

    def _variants(self) -> list[Arm]:
        causal = "bidirectional=false"
        unseen = self.variant("bridge.eos_attends_to_b=false", start=self.warmup())
        chains = {
            ALL_THREE: self.all_three(part=self.sizes.variant_part),
            "all three, <EOS> does not see B": self.contrastive(unseen),
            "all three, causal": self.contrastive(self.variant(causal, start=self.warmup(causal)), 1.0, causal),
            ALONE: self.contrastive(None),
            ALONE_CAUSAL: self.contrastive(None, 1.0, causal),
        }
        return [Arm("variants", name, last) for name, last in chains.items()]

    def _mask_ratios(self) -> list[Arm]:
        arms = []
        for ratio in MASK_RATIOS:
            last = self.all_three(part=self.sizes.variant_part)
            if ratio != self.mask_ratio:
                last = self.contrastive(self.variant(f"bridge.mask_ratio={ratio}", start=self.warmup()))
            arms.append(Arm("mask ratio", f"mask ratio {ratio}", last, x=ratio))
        return arms

    def _pairs(self) -> list[Arm]:
        arms = []
        for fraction in FRACTIONS:
            chains = {ALONE: self.contrastive(None, fraction), ALL_THREE: self.all_three(fraction)}
            if fraction in self.sizes.equal_fractions:
                chains[EQUAL] = self.equal(fraction)
            arms += [Arm("pairs", name, last, fraction, x=fraction) for name, last in chains.items()]
        if self.sizes.captions_as_pairs:
            fraction = self.sizes.training / self.sizes.pairs
            arms.append(Arm("pairs", CAPTIONS_AS_PAIRS, self.equal(fraction, captions=True), fraction, x=fraction))
        return arms

    def _lengths(self) -> list[Arm]:
        arms = []
        for fraction in (FRACTIONS[0], FRACTIONS[-1]):
            arms.append(Arm("length", NO_BRIDGE, self.contrastive(self.warmup(), fraction), fraction, x=0.0))
            for part, steps in self.sizes.snapshots.items():
                equal, end = self.equal(fraction), self.equal_compute_steps(steps, fraction)
                at_step = None if end == equal.steps else end
                arms += [
                    Arm("length", ALL_THREE, self.all_three(fraction, part), fraction, part),
                    Arm("length", EQUAL, equal, fraction, part, at_step),
                ]
        return arms

    def references(self, arm: Arm) -> list[Arm]:
        """Return the arms of the same group that an arm is compared with."""
        others = [other for other in self.arms if other.group == arm.group and other != arm]
        if arm.group == "mask ratio":
            return [other for other in others if other.x == self.mask_ratio]
        if arm.group == "stages":
            names = {
                ALONE: (),
                ALL_THREE: (ALONE, EQUAL, NO_BRIDGE),
                MOCA_ARM: (ALONE, EQUAL, ALL_THREE),
            }.get(arm.name, (ALONE,))
        elif arm.group == "variants":
            names = {ALONE: (), ALL_THREE: (), ALONE_CAUSAL: (ALONE,)}.get(arm.name, (ALL_THREE,))
        else:
            names = (ALONE, EQUAL) if arm.name == ALL_THREE else ()
        return [other for other in others if other.name in names and (other.fraction, other.x) == (arm.fraction, arm.x)]
