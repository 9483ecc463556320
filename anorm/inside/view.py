"""What is asked of a look inside, and what of it is measured once for several sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anorm.data.loaders import EvalLoader
from anorm.inside.landscape import LENGTHS
from anorm.inside.probes import LayerProbe, look
from anorm.inside.subject import Subject, chosen_classes, of_classes, spread_out

__all__ = ["Inspection"]


@dataclass
class Inspection:
    """A run, perhaps another to compare it with, and what is asked. What is seen of layers is measured once."""

    run: Subject
    other: Subject | None = None
    classes: str | None = None
    images: int = 1000
    each: int = 16
    steps: int = 0
    lengths: Sequence[float] = LENGTHS

    @property
    def subjects(self) -> list[Subject]:
        return [self.run, *([self.other] if self.other else [])]

    def named(self, values: Iterable) -> dict[str, Any]:
        """Run -> value. A run is called by its norm, or, where both have one norm, by the end of its folder's
        name (a legend has room for so much), or by its number.
        """
        by_norm, by_folder = ([s.norm for s in self.subjects], [s.folder.name[-24:] for s in self.subjects])
        names = next((names for names in (by_norm, by_folder) if len(set(names)) == len(names)), None)
        return dict(zip(names or ["run 1", "run 2"], values, strict=True))

    def evaluation(self, subject: Subject) -> EvalLoader:
        return subject.batches(subject.source.val, spread_out(len(subject.source.val), self.images))

    def chosen(self, subject: Subject) -> list[int]:
        return chosen_classes(subject.source, self.classes)

    def of_chosen(self, subject: Subject) -> EvalLoader:
        labels = subject.source.val.labels
        return subject.batches(subject.source.val, of_classes(labels, self.chosen(subject), self.each))

    def seen_in(self, subject: Subject, batches: EvalLoader) -> dict[str, LayerProbe]:
        with subject.as_evaluated():
            return look(subject.model, batches, subject.evaluator.autocast)

    @cached_property
    def seen(self) -> list[dict[str, LayerProbe]]:
        """Of each subject, over its evaluation images."""
        return [self.seen_in(subject, self.evaluation(subject)) for subject in self.subjects]

    @cached_property
    def seen_by_class(self) -> dict[str, LayerProbe]:
        return self.seen_in(self.run, self.of_chosen(self.run))
