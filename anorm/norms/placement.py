"""Which law stands at which site of a network, and what stands elsewhere."""

from __future__ import annotations

import collections
from dataclasses import replace

from torch import nn

from anorm.norms.base import ROLES, Site
from anorm.norms.build import build, check_options, lookup_norm, set_sync
from anorm.norms.group import GroupNorm

__all__ = ["Placement"]

WORDS = ("published", "text", "all", "focus", "last", "block", *ROLES)


class Placement:
    """Site -> layer: what an architecture calls for each of its norms.

    Args:
        name: the law.
        place: where it stands. "published" (default): where its published networks have it (AN at the focus, SE at a
            block's last norm, the others everywhere); "text": where the AN paper's text puts it, which differs in basic
            blocks alone (ResNet-18 and 34: the last norm, which cost 5 points on this project's small grid; the
            published ResNet-34 has AN at the first); "all"; "focus", "last", "block" (every norm inside blocks); a role (stem,
            reduce, spatial, expand, shortcut, transition, final; of detectors lateral, output, box, mask); a number 1, 2, 3: that norm of every block; a list
            of these (any of them); or {at: ..., stages: [3, 4]} to keep to some stages (counted from 1).
        elsewhere: the law for all other sites, a name or {name: ..., options}; default: the law's own (the base norm
            of AN and SE, BN for the others).
        sync: pool statistics over all processes.
        options: of the law; a list per stage where it has one (AN's k).

    ``summary`` says what was built: "an x16, bn x37".
    """

    def __init__(
        self,
        name: str,
        place: str | int | list | dict = "published",
        elsewhere: str | dict | None = None,
        sync: bool = False,
        **options,
    ) -> None:
        check_options(name, options)
        self.name, self.sync, self.options = name, sync, options
        self.cls = lookup_norm(name)
        at, self.stages = (
            (place.get("at", "published"), place.get("stages")) if isinstance(place, dict) else (place, None)
        )
        if isinstance(place, dict) and (unknown := set(place) - {"at", "stages"}):
            raise ValueError(f"place has no key {', '.join(sorted(unknown))}; it has at and stages")
        self.at = list(at) if isinstance(at, (list, tuple)) else [at]
        for word in self.at:
            if word not in WORDS and not (isinstance(word, int) and 1 <= word <= 3):
                raise ValueError(f"place={word!r} is none of 1, 2, 3, {', '.join(WORDS)}")
        if elsewhere is None:
            elsewhere = self.options.get("base", self.cls.elsewhere)
        if isinstance(elsewhere, tuple):
            elsewhere = {"name": elsewhere[0], **elsewhere[1]}
        self.elsewhere = {"name": elsewhere} if isinstance(elsewhere, str) else dict(elsewhere)
        self.built: collections.Counter[str] = collections.Counter()
        self.groups: set[tuple[int, int]] = set()

    def __call__(self, site: Site) -> nn.Module:
        if self.includes(site):
            norm, name = self.cls.at(site, **self.options), self.name
            set_sync(norm, self.sync)
        else:
            options = dict(self.elsewhere)
            name = options.pop("name")
            norm = build(name, site.channels, site.act, self.sync, **options)
        norm.site = site
        self.built[name] += 1
        self._note_groups(norm)
        return norm

    def includes(self, site: Site) -> bool:
        if self.stages is not None:
            if any(not 1 <= s <= site.stages for s in self.stages):
                raise ValueError(
                    f"place.stages={list(self.stages)}: this architecture has stages 1 to {site.stages}"
                )
            if site.stage + 1 not in self.stages:
                return False
        return any(self._matches(word, site) for word in self.at)

    def _matches(self, word: str | int, site: Site) -> bool:
        if isinstance(word, int):
            return site.block_norm == word
        of_text = site if site.text is None else replace(site, focus=site.text)
        special = {
            "published": self.cls.belongs(site),
            "text": self.cls.belongs(of_text),
            "all": True,
            "focus": site.focus,
            "last": site.last,
            "block": site.block_norm > 0,
        }
        return special.get(word, site.role == word)

    def _note_groups(self, norm: nn.Module) -> None:
        for layer in norm.modules():
            if isinstance(layer, GroupNorm) and layer.groups not in (1, 32, layer.channels):
                self.groups.add((layer.channels, layer.groups))

    def summary(self) -> str:
        """What was built: laws with their numbers, and for which channels "auto" chose other than 32 groups."""
        text = ", ".join(f"{name} x{count}" for name, count in self.built.most_common())
        groups = ", ".join(f"{g} for {c} channels" for c, g in sorted(self.groups))
        return text + (f"; groups: {groups}" if groups else "")
