"""One run's configuration as a whole: composed, completed, decided for a machine, signed, written down and read."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anorm.config import compose as hydra
from anorm.config.complete import check_pair, complete, options
from anorm.config.compose import BUILT
from anorm.config.machine import Machine, check_batches, decide
from anorm.config.settings import Settings, settings_from
from anorm.config.signature import difference, signature
from anorm.config.values import is_path
from anorm.files import file_digest
from anorm.registry import has_basic_blocks

DEFAULT_TASK = "classification"
"""The task of configurations that were frozen when there was no other."""


@dataclass(frozen=True)
class Chosen:
    """What a section builds: its name and all arguments."""

    name: str
    options: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """Return the section as a yaml holds it."""
        return {"name": self.name} | self.options


@dataclass(frozen=True)
class Config:
    """A complete and checked configuration; what changes it returns another.

    choices: group -> the yaml that was chosen, for names of folders and reports. recipe: what the architecture and the
    data set changed in the recipe, in words. weights_digest: of the file ``settings.weights``, once a run started with it.
    """

    settings: Settings
    task: Chosen
    arch: Chosen
    norm: Chosen
    data: Chosen
    choices: dict[str, str]
    recipe: tuple[str, ...] = ()
    weights_digest: str | None = None

    @classmethod
    def compose(cls, folder: Path, overrides: list[str]) -> Config:
        """Compose what ``overrides`` of a command line make of the yamls in ``folder``. Raises ValueError in words."""
        tree, choices, recipe = hydra.compose(folder, overrides, options)
        return cls._from(tree, choices, tuple(recipe))

    @classmethod
    def from_text(cls, text: str, where: str = "this text", **changes: Any) -> Config:
        """Return what ``text()`` wrote, in this version or an earlier one; ``changes`` of top-level keys.

        Raises ValueError, naming ``where`` it was read.
        """
        held = yaml.safe_load(text)
        if not isinstance(held, dict) or "choices" not in held:
            raise ValueError(f"{where} is no frozen configuration: it has no choices")
        choices = held.pop("choices")
        digest = held.pop("weights_digest", None)
        held.pop("signature", None)
        norm = held.get("norm", {})
        older = "task" not in held and norm.get("place") == "published" and "attention" in norm
        if older and has_basic_blocks(held["arch"]["name"]):
            # AN stood at the last norm of basic blocks when this was written
            held["norm"] = norm | {"place": "text"}
        return cls._from(held | changes, choices, weights_digest=digest)

    @classmethod
    def _from(cls, tree: dict, choices: dict, recipe: tuple[str, ...] = (), weights_digest=None) -> Config:
        tree = {"task": {"name": DEFAULT_TASK}} | tree
        sections = {section: _absolute(section, complete(section, tree[section])) for section in BUILT}
        check_pair(sections["arch"], sections["norm"])
        built = {
            section: Chosen(node["name"], {key: value for key, value in node.items() if key != "name"})
            for section, node in sections.items()
        }
        others = {key: value for key, value in tree.items() if key not in BUILT}
        settings = settings_from(_absolute("", others))
        choices = {"task": DEFAULT_TASK} | choices
        return cls(settings, **built, choices=choices, recipe=recipe, weights_digest=weights_digest)

    def tree(self) -> dict[str, Any]:
        """Return the configuration as nested plain values."""
        return dataclasses.asdict(self.settings) | {section: getattr(self, section).tree() for section in BUILT}

    def text(self, **head: Any) -> str:
        """Return the configuration for ``from_text``, under the lines of ``head``."""
        if self.weights_digest:
            head |= {"weights_digest": self.weights_digest}
        return yaml.safe_dump(head | {"choices": self.choices} | self.tree(), sort_keys=False)

    def change(self, overrides: list[str]) -> Config:
        """Return the configuration under single keys of a command line (no groups). Raises ValueError in words."""
        return self._again(hydra.change(self.tree(), overrides, options))

    def having(self, **values: Any) -> Config:
        """Return the configuration with other top-level keys; a section is given by its changed keys alone."""
        tree = self.tree()
        return self._again(tree | {k: tree[k] | v if isinstance(v, dict) else v for k, v in values.items()})

    def _again(self, tree: dict[str, Any]) -> Config:
        digest = self.weights_digest if tree["weights"] == self.settings.weights else None
        return self._from(tree, self.choices, self.recipe, digest)

    def on(self, machine: Machine | None = None, started: int | None = None) -> Config:
        """Return the configuration with every "auto" of its hardware decided for a machine (default: this one).

        started: the number of processes that another launcher started. Raises ValueError where the machine lacks what is
        asked for, or where the batches do not fit the processes.
        """
        hardware = decide(self.settings.hardware, started, machine)
        check_batches(self.settings.batch_size, self.settings.optim.global_batch, hardware.processes)
        return self._with(hardware)

    def meant_for(self, machine: Machine) -> Config:
        """Return the configuration with device and precision, which is part of its signature, decided for a machine
        elsewhere.
        """
        decided = self.on(machine).settings.hardware
        kept = {"device": decided.device, "dtype": decided.dtype}
        return self._with(dataclasses.replace(self.settings.hardware, **kept))

    def _with(self, hardware: Any) -> Config:
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, hardware=hardware))

    def with_weights(self, digest: str | None = None) -> Config:
        """Return the configuration with the digest of the file that the run starts from; ``digest`` where it is known.

        Raises ValueError where there is no such file and nothing is known.
        """
        if self.settings.weights is None or self.weights_digest:
            return self
        if digest is None:
            if not Path(self.settings.weights).is_file():
                raise ValueError(f"weights={self.settings.weights} is not a file")
            digest = file_digest(Path(self.settings.weights))
        return dataclasses.replace(self, weights_digest=digest)

    @property
    def starting_weights(self) -> Path | None:
        """The file that a run without a checkpoint starts from. Raises ValueError where it is not the one that was signed."""
        if self.settings.weights is None:
            return None
        found = dataclasses.replace(self, weights_digest=None).with_weights().weights_digest
        if self.weights_digest not in (None, found):
            raise ValueError(f"weights={self.settings.weights} is another file than when this run was first started")
        return Path(self.settings.weights)

    def signed(self, data_identity: str) -> str:
        """Return the signature of the run: ten hexadecimal digits of all that changes its mathematics."""
        return signature(self.tree(), data_identity, self.with_weights().weights_digest)

    def difference(self, other: Config) -> str:
        """Return in words which keys that count for a signature differ: their values here and in ``other``."""
        return difference(self.tree(), other.tree())


def _absolute(section: str, node: dict[str, Any]) -> dict[str, Any]:
    """Return a section with its paths as they are called from any folder: ``~`` and variables expanded, once."""
    known = options(section, node) or {}
    return {
        key: str(Path(os.path.expandvars(value)).expanduser().absolute())
        if key in known and is_path(known[key].hint, value)
        else value
        for key, value in node.items()
    }
