"""Command line -> configuration: Hydra's compose API in words a user can act on. Nothing here imports torch.

A configuration is train.yaml, one choice of every group, what the chosen architecture and data set change in
the recipe (their ``recipe:`` entries), then the command line; later wins. A key that the yaml does not spell
out is accepted when the thing that it belongs to takes it as an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anorm.words import nearest

GROUPS = ("task", "arch", "norm", "setup", "data", "hardware")
BUILT = ("task", "arch", "norm", "data")
"""Groups whose keys are the arguments of what they build."""
RECIPE = "recipe"
"""Entry in the yaml of an architecture or a data set: "key: value", or "group=choice ...: {key: value}"."""
LIBRARIES = {"arch": ("timm:", "torchvision:"), "norm": ("timm:",)}
"""Groups that also take LIBRARY:NAME, what another library calls it, without a yaml."""
Accepted = Callable[[str, dict], "set[str] | None"]


@dataclass(frozen=True)
class Composed:
    """config: plain nested dict; choices: group -> chosen yaml; recipe: the deviations applied, in words."""

    config: dict
    choices: dict[str, str]
    recipe: list[str]


def choices(folder: Path, group: str) -> list[str]:
    """The yamls of a group, without their ending."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


def compose(folder: Path, overrides: list[str], accepted: Accepted) -> Composed:
    """Compose the configuration in ``folder`` under command-line ``overrides``.

    ``accepted(section, config)`` gives the keys that a section takes beyond those its yaml holds, or None
    where it takes any. Raises ValueError, in words, for an unknown group choice, key or form of override.
    """
    picked, values = _split(folder, overrides)
    groups = [word for group, choice in picked.items() for word in _choice(group, choice)]
    base, chosen = _hydra(folder, groups)
    chosen |= picked
    recipe = {key: (why, value) for why, key, value in _recipe(base, chosen, values)}  # later wins
    forced = [f"++{key}={_literal(value)}" for key, (_, value) in recipe.items()]
    config, _ = _hydra(folder, groups + forced + [f"++{key}={text}" for key, text in values])
    for group in GROUPS:
        if isinstance(config.get(group), dict):
            config[group].pop(RECIPE, None)
    _check_keys(base, config, accepted)
    given = {key for key, _ in values}
    said = [f"{why}: {key}={_literal(value)}" for key, (why, value) in recipe.items() if key not in given]
    return Composed(config, chosen, said)


def _choice(group: str, choice: str) -> list[str]:
    """The words by which Hydra takes a choice; another library's name stands for a section with this name."""
    return [f"~{group}", f"+{group}.name='{choice}'"] if ":" in choice else [f"{group}={choice}"]


def change(config: dict, overrides: list[str], accepted: Accepted) -> dict:
    """A composed configuration with some keys (not groups) set anew; errors as those of ``compose``."""
    from omegaconf import OmegaConf

    changed = OmegaConf.create(config)
    for override in overrides:
        parsed = _parse(override)
        if parsed.key_or_group in GROUPS:
            raise ValueError(
                f"{override}: a run keeps its {parsed.key_or_group}; change single keys, such as "
                f"eval.stats=batch"
            )
        OmegaConf.update(changed, parsed.key_or_group, parsed.value(), force_add=True)
    changed = OmegaConf.to_container(changed, resolve=True)
    _check_keys(config, changed, accepted)
    return changed


def sweep(overrides: list[str]) -> list[list[str]]:
    """Every job of a sweep: the cartesian product of overrides such as norm=bn,an or seed=range(0,3)."""
    axes = []
    for override in overrides:
        parsed = _parse(override)
        if parsed.is_sweep_override():
            axes.append([f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()])
        else:
            axes.append([override])
    return [list(job) for job in itertools.product(*axes)]


def _parse(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(
                f"cannot read the argument {override!r}: give key=value, for example norm=an or epochs=90"
            ) from error
        raise ValueError(
            f"cannot read the argument {override!r}: a value with special characters wants quotes that the shell leaves, "
            f"""'{key}="{value}"'"""
        ) from error


def _split(folder: Path, overrides: list[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Overrides -> ({group: choice}, [(key, value as text)])."""
    picked, values = {}, []
    for override in overrides:
        parsed = _parse(override)
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise ValueError(f"{override} asks for several runs: add -m to run each of them")
        if parsed.is_delete():
            raise ValueError(f"{override}: nothing can be deleted; set {key}=null instead")
        if key not in GROUPS:
            values.append((key, override.split("=", 1)[1]))
            continue
        value, known, foreign = str(parsed.value()), choices(folder, key), LIBRARIES.get(key, ())
        if value not in known and not value.startswith(foreign):
            other = f"; or {' or '.join(f'{library}NAME' for library in foreign)}" if foreign else ""
            raise ValueError(f"unknown {key} {value!r}{nearest(value, known, 'choices')}{other}")
        picked[key] = value
    return picked, values


def _hydra(folder: Path, overrides: list[str]) -> tuple[dict, dict[str, str]]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    # Hydra 1.4 deprecates version_base; 1.3 warns without it
    version = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
    try:
        with hydra.initialize_config_dir(config_dir=str(folder.resolve()), **version):
            tree = hydra.compose("train", overrides=overrides, return_hydra_config=True)
        chosen = {group: tree.hydra.runtime.choices.get(group) for group in GROUPS}
        del tree._metadata.flags["struct"]
        config = OmegaConf.to_container(
            OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"]), resolve=True
        )
    except (HydraException, OmegaConfBaseException) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"the configuration does not compose: {first.strip()}") from error
    return config, chosen


def _recipe(
    base: dict, chosen: dict[str, str], values: list[tuple[str, str]]
) -> Iterator[tuple[str, str, Any]]:
    """(why, key, value) for all that the chosen architecture, then the data set, change in the recipe.

    Entries under a condition ("setup=sota", "faithful=code norm=bn") count when all of its words hold.
    """
    facts = {f"{group}={choice}" for group, choice in chosen.items()}
    facts.add(
        "faithful="
        + next((text for key, text in reversed(values) if key == "faithful"), str(base.get("faithful")))
    )
    for group in ("arch", "data"):
        for key, value in (base.get(group, {}).get(RECIPE) or {}).items():
            if "=" not in key:
                yield f"{group}={chosen[group]}", key, value
            elif facts.issuperset(key.split()):
                for inner, setting in value.items():
                    yield f"{group}={chosen[group]} with {key}", inner, setting


def _literal(value: Any) -> str:
    """A value as Hydra's override grammar reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_literal(inner) for inner in value) + "]"
    return str(value)


def _check_keys(base: dict, config: dict, accepted: Accepted) -> None:
    for section, value in config.items():
        if section not in base:
            known = [
                *base,
                *(
                    f"{outer}.{key}"
                    for outer, inner in base.items()
                    if isinstance(inner, dict)
                    for key in inner
                ),
            ]
            raise ValueError(f"unknown key {section}{nearest(section, known)}{_where(section, base)}")
        if not isinstance(base[section], dict):
            continue
        if not isinstance(value, dict):
            keys = sorted(set(base[section]) | (accepted(section, config) or set()))
            raise ValueError(
                f"{section}={value} cannot be: {section} is a section, set {section}.KEY=... "
                f"({', '.join(keys)})"
            )
        allowed = accepted(section, config)
        if allowed is None:
            continue
        allowed |= set(base[section]) - {RECIPE} if section not in BUILT else set()
        for key in value:
            if key not in allowed:
                raise ValueError(f"unknown key {section}.{key}{nearest(key, allowed)}")


def _where(key: str, base: dict) -> str:
    homes = [
        f"{section}.{key}" for section, inner in base.items() if isinstance(inner, dict) and key in inner
    ]
    return f"; perhaps {' or '.join(homes)}" if homes else ""
