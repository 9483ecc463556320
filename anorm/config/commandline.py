"""The shell's side of train.py and the tools: arguments, help, errors in words, exit statuses."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from anorm.config.compose import GROUPS, choices
from anorm.words import nearest

FLAGS = ("-h", "--help", "-m", "--multirun", "--cfg", "--config", "--submit")


@dataclass
class Arguments:
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    multirun: bool = False
    print_config: bool = False
    frozen: Path | None = None
    submit: bool = False
    slurm: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Arguments:
    """train.py's arguments. Raises ValueError in words."""
    arguments, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            arguments.help = True
        elif word in ("-m", "--multirun"):
            arguments.multirun = True
        elif word == "--cfg":
            if not rest or rest.pop(0) != "job":
                raise ValueError("--cfg takes one word: --cfg job prints the composed configuration")
            arguments.print_config = True
        elif word == "--config":
            if not rest:
                raise ValueError("--config needs a file, such as the config.yaml of a run folder")
            arguments.frozen = Path(rest.pop(0))
        elif word == "--submit":
            if not rest or rest.pop(0) != "slurm":
                raise ValueError(
                    "--submit takes one word: --submit slurm makes each run a job of a Slurm cluster"
                )
            arguments.submit = True
        elif word.startswith("slurm."):
            arguments.slurm.append(word)
        elif word.startswith("-"):
            raise ValueError(f"unknown option {word}{nearest(word, FLAGS, 'options')}")
        else:
            arguments.overrides.append(word)
    if arguments.slurm and not arguments.submit:
        raise ValueError(f"{arguments.slurm[0]} is for jobs of a Slurm cluster: add --submit slurm")
    if arguments.print_config and (arguments.multirun or arguments.submit):
        raise ValueError("--cfg job prints one configuration: leave out -m and --submit")
    if arguments.frozen and (arguments.overrides or arguments.multirun):
        raise ValueError("--config runs a frozen configuration as it is: leave out the other arguments")
    return arguments


def help_text(script: Path, configs: Path) -> str:
    """Return the docstring of ``script``, then the groups with their choices and the top-level keys of train.yaml.

    It is read from the file: python -OO drops docstrings.
    """
    story = ast.get_docstring(ast.parse(script.read_text()))
    lines = [story, "", "Groups and choices:"]
    lines += [f"    {group:<10}{' '.join(choices(configs, group))}" for group in GROUPS]
    yaml = (configs / "train.yaml").read_text().split("\n\n")[1]
    lines += [
        "",
        "Top-level keys (configs/train.yaml and configs/setup/vanilla.yaml hold the others):",
        *(f"    {line}" for line in yaml.splitlines()),
    ]
    lines += [
        "    epochs, batch_size        (of a process: the images that batch statistics are taken over); "
        "optim.global_batch is the step's"
    ]
    return "\n".join(lines)
