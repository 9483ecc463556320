"""Command line -> configuration: Hydra's compose API in words a user can act on. Nothing here imports torch.

A configuration is train.yaml, one choice of every group, what the chosen architecture and data set change in
the recipe (their ``recipe:`` entries), then the command line; later wins. A key that the yaml does not spell
out is accepted when the thing that it belongs to takes it as an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anorm.config.values import Option, as_word
from anorm.words import nearest

GROUPS = ("task", "arch", "norm", "setup", "data", "hardware")
BUILT = ("task", "arch", "norm", "data")
"""Groups whose keys are the arguments of what they build."""
RECIPE = "recipe"
"""Entry in the yaml of an architecture or a data set: "key: value", or "group=choice ...: {key: value}"."""
LIBRARIES = {"arch": ("timm:", "torchvision:"), "norm": ("timm:",)}
"""Groups that also take LIBRARY:NAME, what another library calls it, without a yaml."""
OWN = {"run.dir": "run_dir=FOLDER", "sweep.dir": "run_dir=FOLDER", "job.chdir": "cd FOLDER first", "launcher": "--submit slurm"}
"""What stands here for some of Hydra's own settings."""
Options = Callable[[str, Any], "dict[str, Option] | None"]
"""(section, its content) -> the keys that it takes, None for any; ("", None) -> those of the top level."""


def choices(folder: Path, group: str) -> list[str]:
    """Return the choices of a group: its yamls without their ending."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


def compose(folder: Path, overrides: list[str], options: Options) -> tuple[dict, dict[str, str], list[str]]:
    """Compose the yamls in ``folder`` under command-line ``overrides``.

    Returns the configuration as a nested dict, group -> chosen yaml, and the deviations that a recipe made, in words.
    A key is accepted where its yaml holds it or ``options`` knows it. Raises ValueError, in words, for an unknown group
    choice, key or form of override.
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
    _check_keys(base, config, options)
    _as_typed(config, values, options)
    given = {key for key, _ in values}
    said = [f"{why}: {key}={_literal(value)}" for key, (why, value) in recipe.items() if key not in given]
    return config, chosen, said


def _choice(group: str, choice: str) -> list[str]:
    """Return the words by which Hydra takes a choice; another library's name stands for a section with this name."""
    return [f"~{group}", f"+{group}.name='{choice}'"] if ":" in choice else [f"{group}={choice}"]


def change(config: dict, overrides: list[str], options: Options) -> dict:
    """Return a composed configuration with some keys (not groups) set anew; errors as those of ``compose``."""
    from omegaconf import OmegaConf

    changed, values = OmegaConf.create(config), []
    for override in overrides:
        parsed, text = _read(override)
        if parsed.key_or_group in GROUPS:
            raise ValueError(
                f"{override}: a run keeps its {parsed.key_or_group}; change single keys, such as eval.stats=batch"
            )
        if parsed.is_sweep_override():
            raise ValueError(f"{override} gives several values and one is changed at a time: a list is [a,b]")
        OmegaConf.update(changed, parsed.key_or_group, parsed.value(), force_add=True)
        values.append((parsed.key_or_group, text))
    changed = OmegaConf.to_container(changed, resolve=True)
    _check_keys(config, changed, options)
    _as_typed(changed, values, options)
    return changed


def sweep(folder: Path, overrides: list[str]) -> list[list[str]]:
    """Return every job of a sweep: the cartesian product of overrides such as norm=bn,an, seed=range(0,3) or norm=glob(a*).

    Raises ValueError for a form that names no values (interval), and where there is no job.
    """
    from hydra.core.override_parser.types import Glob, IntervalSweep

    axes = []
    for override in overrides:
        parsed, _ = _read(override)
        key, value = parsed.get_key_element(), parsed.value()
        if isinstance(value, IntervalSweep):
            raise ValueError(f"{override}: an interval has no end of values; name them, or take {key}=range(0,3)")
        if isinstance(value, Glob):
            if parsed.key_or_group not in GROUPS:
                raise ValueError(f"{override}: glob() is for the choices of {', '.join(GROUPS)}")
            found = value.filter(choices(folder, parsed.key_or_group))
            axes.append([f"{key}={choice}" for choice in found])
        elif parsed.is_sweep_override():
            axes.append([f"{key}={text}" for text in parsed.sweep_string_iterator()])
        else:
            axes.append([override])
        if not axes[-1]:
            raise ValueError(f"{override} names nothing to run")
    return [list(job) for job in itertools.product(*axes)]


def _read(override: str) -> tuple[Any, str]:
    """Return (Hydra's reading of an override, its value as text that Hydra reads), of the forms that have an effect here.

    Raises ValueError in words for the others.
    """
    key, equals, text = override.partition("=")
    bare = key.lstrip("+~").partition("@")[0]
    if bare == "hydra" or bare.startswith(("hydra.", "hydra/")):
        instead = OWN.get(bare.removeprefix("hydra").lstrip("./"))
        raise ValueError(
            f"{override}: Hydra composes the configuration here and runs nothing, so its own settings have no effect"
            + (f"; use {instead}" if instead else "")
        )
    if key.startswith("~"):
        raise ValueError(f"{override}: nothing can be deleted; set {bare}=null instead")
    if "@" in key or "/" in key:
        raise ValueError(f"{override}: a group is chosen as it is called: {bare.partition('/')[0]}=CHOICE")
    if not bare:
        raise ValueError(f"cannot read the argument {override!r}: give key=value, for example norm=an or epochs=90")
    if equals and not text:
        raise ValueError(f"{override} has no value (an empty variable of the shell?): for none give {key}=null")
    section, _, inner = bare.partition(".")
    if section in BUILT and inner == "name":
        raise ValueError(f"{override}: the name of what is built is chosen by {section}={text}")
    try:
        return _parse(override), text
    except ValueError:
        # a path may hold blanks, = or other signs of the grammar; lists, mappings and quotes are left to it
        if not equals or not text or text[0] in "[{(\"'":
            raise
        quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return _parse(f"{key}={quoted}"), quoted


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
    """Return ({group: choice}, [(key, value as text)]) of the overrides."""
    picked, values = {}, []
    for override in overrides:
        parsed, text = _read(override)
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise ValueError(f"{override} asks for several runs: add -m to run each of them")
        if key not in GROUPS:
            values.append((key, text))
            continue
        value, known, foreign = str(parsed.value()), choices(folder, key), LIBRARIES.get(key, ())
        if value not in known and not value.startswith(foreign):
            other = f"; or {' or '.join(f'{library}NAME' for library in foreign)}" if foreign else ""
            raise ValueError(f"unknown {key} {value!r}{nearest(value, known, 'choices')}{other}")
        picked[key] = value
    return picked, values


def _as_typed(config: dict, values: list[tuple[str, str]], options: Options) -> None:
    """Put back what was typed where Hydra read a number or a truth value and a name is wanted: data.train=2012."""
    for key, text in dict(values).items():  # the last of a key wins
        section, _, inner = key.rpartition(".")
        node = config if not section else config.get(section)
        known = (options(section, node) or {}) if isinstance(node, dict) else {}
        if inner in known and inner in node:
            node[inner] = as_word(known[inner].hint, node[inner], text)


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
    """Give (why, key, value) for all that the chosen architecture, then the data set, change in the recipe.

    Entries under a condition ("setup=sota", "faithful=code norm=bn") count when all of its words hold.
    """
    facts = {f"{group}={choice}" for group, choice in chosen.items()}
    facts.add(
        "faithful="
        + next((text for key, text in reversed(values) if key == "faithful"), str(base.get("faithful")))
    )
    for group in ("arch", "data"):
        for key, value in (base.get(group, {}).get(RECIPE) or {}).items():
            # an architecture's recipe is for classifying ImageNet, unless it names a task
            if group == "arch" and chosen.get("task") not in (None, "classification") and "task=" not in key:
                continue
            if "=" not in key:
                yield f"{group}={chosen[group]}", key, value
            elif facts.issuperset(key.split()):
                for inner, setting in value.items():
                    yield f"{group}={chosen[group]} with {key}", inner, setting


def _literal(value: Any) -> str:
    """Return a value as text that Hydra's override grammar reads."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_literal(inner) for inner in value) + "]"
    return str(value)


def _check_keys(base: dict, config: dict, options: Options) -> None:
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
            keys = sorted(set(base[section]) | set(options(section, base[section]) or ()))
            raise ValueError(
                f"{section}={value} cannot be: {section} is a section, set {section}.KEY=... "
                f"({', '.join(keys)})"
            )
        known = options(section, value)
        if known is None:
            continue
        allowed = set(known) | (set(base[section]) - {RECIPE} if section not in BUILT else set())
        for key in value:
            if key not in allowed:
                raise ValueError(f"unknown key {section}.{key}{nearest(key, allowed)}")


def _where(key: str, base: dict) -> str:
    homes = [
        f"{section}.{key}" for section, inner in base.items() if isinstance(inner, dict) and key in inner
    ]
    return f"; perhaps {' or '.join(homes)}" if homes else ""
