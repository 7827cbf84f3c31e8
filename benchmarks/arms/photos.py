"""The arms on captioned photographs: numbers of images and captions, and settings that may make the bridge pay."""

from dataclasses import dataclass, replace

from arms.grid import ALL_THREE, ALONE, EQUAL, MOCA_ARM, NO_BRIDGE, Arm, Grid, Sizes, StageRun

BRIDGE_ONLY = "bridge, contrastive"
ONLY_PAIRS = "all three, on the pairs alone"
NO_PAIRS = "warm-up, bridge"
HALF = "all three, half of the bridge"
"""With additional contrastive steps that cost as much as the other half."""

FIRST = (ALONE, EQUAL, ALL_THREE)
"""The arms that are trained before all others, with all data."""

SETTINGS = (
    "bridge.eos_attends_to_b=false",
    "bridge.mask_ratio=0.5",
    "bridge.mask_ratio=0.7",
    "bridge.mask_ratio=0.9",
    "bridge.data.paraphrases=0",
    "bridge.data.paraphrases=5",
    "bridge.learning_rate=2.0e-4",
    "bridge.learning_rate=1.0e-3",
    "bridge.freeze_vision=true",
    "bridge.freeze_layers=2",
    "contrastive.learning_rate=5.0e-4",
    "contrastive.freeze_vision=true",
    "contrastive.reconstruction_weight=0.03",
    "contrastive.reconstruction_weight=0.3",
)
"""Settings of the bridge or the contrastive stage, each compared with all three stages at equal compute."""


@dataclass(frozen=True)
class PhotoSizes(Sizes):
    """Sizes on the user's photographs; those of the probe are also used as contrastive pairs.

    :param images: The numbers of images to make contrastive pairs of, the most informative first; a number larger than
        the number of images stands for all.
    :param complete: Train every arm with every number of images and captions. Otherwise, further arms (without a stage,
        with half of the bridge, or with MoCa) are trained only with the first number and all captions, and all three
        stages on the pairs alone only with all captions and fewer images.
    :param captions: The mean number of captions per image.
    """

    images: tuple[int, ...] = (1000, 100, 6000)
    complete: bool = False
    captions: float = 1


@dataclass(frozen=True)
class PhotoGrid(Grid):
    """The arms on photographs, for each choice of data; contrastive learning alone is a snapshot of its longer run."""

    sizes: PhotoSizes

    def label(self, arm: Arm) -> str:
        """Return an arm's name and its data."""
        return f"{arm.name}, {self.pairs(arm.fraction)} images, {arm.captions:g} captions"

    def _all(self) -> list[Arm]:
        counts = list(dict.fromkeys(min(count, self.sizes.training) for count in self.sizes.images))
        choices = list(dict.fromkeys((self.sizes.captions, 1)))
        arms = [arm for captions in choices for count in counts for arm in self._with_data(count, captions, counts[0])]
        arms.sort(key=lambda arm: arm.name not in FIRST)
        return arms + self._settings(counts[0] / self.sizes.pairs)

    def _with_data(self, images: int, captions: float, first: int) -> list[Arm]:
        fraction, has_all = images / self.sizes.pairs, captions == self.sizes.captions
        is_first = self.sizes.complete or (images == first and has_all)
        chains = {EQUAL: self.alone(fraction, captions), ALL_THREE: self.third(fraction, captions)}
        if (self.sizes.complete or has_all) and (images < self.sizes.training or not has_all):
            chains[ONLY_PAIRS] = self.third(fraction, captions, start=self._on_pairs(images, has_all=has_all))
        if is_first:
            chains[NO_BRIDGE] = self.third(fraction, captions, start=self.warmup())
            chains[BRIDGE_ONLY] = self.third(fraction, captions, start=self.bridge(None))
            chains[HALF] = self._half_of_the_bridge(fraction, captions)
            if self.has_moca:
                chains[MOCA_ARM] = self.third(fraction, captions, start=self.moca())
            chains[NO_PAIRS] = self.bridge(self.warmup())
        at_step = {ALONE: self.sizes.contrastive_steps}
        return [
            Arm("photographs", name, last, fraction, fraction, at_step.get(name), captions)
            for name, last in {ALONE: chains[EQUAL], **chains}.items()
        ]

    def third(
        self,
        fraction: float,
        captions: float,
        *settings: str,
        start: StageRun | None = None,
        at_step: int | None = None,
        steps: int = 0,
    ) -> StageRun:
        """Return the contrastive stage on a fraction of the images, after warm-up and bridge on all of them."""
        of_images = () if captions == 1 else ("contrastive.data.captions=captions",)
        start = start or self.bridge(self.warmup())
        return self.contrastive(start, fraction, *of_images, *settings, at_step=at_step, steps=steps)

    def alone(self, fraction: float, captions: float) -> StageRun:
        """Return contrastive learning alone with the compute of all three, and a snapshot of its own length."""
        steps = self.equal_compute_steps(self.sizes.bridge_steps, fraction, captions)
        snapshot = f"contrastive.snapshot_steps=[{self.sizes.contrastive_steps}]"
        return replace(self.third(fraction, captions, snapshot, steps=steps), start=None)

    def _on_pairs(self, images: int, *, has_all: bool) -> StageRun:
        """Return warm-up and bridge on only the images and captions of the contrastive pairs."""
        one = () if has_all else ("data.captions=text",)
        warmup = self.warmup(f"warmup.data.limit={images}", *one)
        settings = (f"bridge.data.limit={images}", *one, *(() if has_all else ("bridge.data.paraphrases=0",)))
        return StageRun("bridge", self.sizes.bridge_steps, settings, warmup)

    def bridge(self, start: StageRun | None) -> StageRun:
        """Return stage 2 with a snapshot after half of its steps."""
        return StageRun("bridge", self.sizes.bridge_steps, (f"bridge.snapshot_steps=[{self._half}]",), start)

    @property
    def _half(self) -> int:
        return self.sizes.bridge_steps // 2

    def _half_of_the_bridge(self, fraction: float, captions: float) -> StageRun:
        saved = (self.sizes.bridge_steps - self._half) * self.flops_per_step("bridge", fraction)
        more = round(saved / self.flops_per_step("contrastive", fraction, captions))
        return self.third(fraction, captions, at_step=self._half, steps=self.sizes.contrastive_steps + more)

    def _settings(self, fraction: float) -> list[Arm]:
        captions = self.sizes.captions
        longer = StageRun("bridge", 2 * self.sizes.bridge_steps, start=self.warmup())
        chains = {
            EQUAL: self.alone(fraction, captions),
            ALL_THREE: self.third(fraction, captions),
            "twice the bridge": self.third(fraction, captions, start=longer),
            **{setting: self._varied(setting, fraction) for setting in SETTINGS},
        }
        return [Arm("settings", name, last, fraction, fraction, None, captions) for name, last in chains.items()]

    def _varied(self, setting: str, fraction: float) -> StageRun:
        """Return the whole chain with another setting, and a number of steps of its stage that costs the same."""
        stage, captions = setting.partition(".")[0], self.sizes.captions
        usual, varied = (self.flops_per_step(stage, fraction, captions, each) for each in (None, setting))
        if stage == "contrastive":
            steps = round(self.sizes.contrastive_steps * usual / varied)
            return replace(self.third(fraction, captions, setting, steps=steps), varied=setting)
        steps = round(self.sizes.bridge_steps * usual / varied)
        bridge = StageRun("bridge", steps, (setting,), self.warmup(), varied=setting)
        return self.third(fraction, captions, start=bridge)

    def references(self, arm: Arm) -> list[Arm]:
        """Return the arms on the same data that an arm is compared with."""
        others = (ALL_THREE,) if arm.group == "settings" else (ALONE,)
        if arm.name in (HALF, MOCA_ARM):
            others += (ALL_THREE,)
        names = () if arm.name in (ALONE, EQUAL) else (EQUAL, *others)
        data = (arm.group, arm.fraction, arm.captions)
        same = [other for other in self.arms if (other.group, other.fraction, other.captions) == data]
        return [other for other in same if other.name in names and other != arm]
