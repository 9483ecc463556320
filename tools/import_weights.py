"""Turn weights in any known naming into a file with ours.

    python tools/import_weights.py FILE OUT.safetensors arch=resnet50 norm=an        the authors' ResNet-50 with AN
    python tools/import_weights.py FILE OUT.safetensors arch=resnet34 norm=an norm.place=[1,2]
    python tools/import_weights.py FILE OUT.safetensors arch=resnet50 norm=an setup=sota     with the deep stem
    python tools/import_weights.py FILE arch=mobilenetv2 norm=bn                     only say whether it fits

FILE is what torch.save or safetensors wrote: own checkpoints, torchvision's, timm's and the authors' weights. The other
arguments are train.py's and describe the network; the number of classes is the file's. entry=NAME picks an entry of a
checkpoint, such as entry=ema. tools/validate.py OUT.safetensors evaluates the result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HEADS = ("fc.weight", "classifier.weight", "classifier.1.weight", "fc2.weight")  # of all namings


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "the weights, the file to write, then arguments of train.py and entry=NAME"
    found.add_argument("words", nargs="+", metavar="FILE [OUT] key=value", help=words)
    return found


def main(argv: list[str]) -> int:
    """Convert and report; the exit status."""
    asked = parser().parse_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        files = [Path(word) for word in asked.words if "=" not in word]
        if not 1 <= len(files) <= 2:
            raise ValueError(
                f"give a file of weights and the file to write, then key=value; got {len(files)} files"
            )
        options = [word for word in asked.words if "=" in word]
        entry = next((word.removeprefix("entry=") for word in options if word.startswith("entry=")), None)
        overrides = [word for word in options if not word.startswith("entry=")]
        convert(files[0], files[1] if len(files) == 2 else None, overrides, entry)
    return outcome.status


def convert(source: Path, target: Path | None, overrides: list[str], entry: str | None) -> None:
    """Load ``source`` into the network that ``overrides`` describe, say what fitted, and write ``target`` if given."""
    from safetensors.torch import save

    from anorm.config.frozen import Config
    from anorm.files import write_atomic
    from anorm.registry import create_model
    from anorm.study.printed import CONFIGS
    from anorm.weights import load_weights, read_state

    if target and (target.suffix != ".safetensors" or target.exists()):
        reason = (
            "exists already"
            if target.exists()
            else "is to be written as safetensors: its name ends in .safetensors"
        )
        raise ValueError(f"{target} {reason}")
    config = Config.compose(CONFIGS, overrides)
    state = read_state(source, entry)
    classes = next((state[name].shape[0] for name in HEADS if name in state), 1000)
    model = create_model(config.arch.name, config.norm.tree(), classes, **config.arch.options)
    print(f"{config.arch.name}: {load_weights(model, source, entry=entry)}")
    if target:
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        write_atomic(target, save(tensors, {"arch": config.arch.name, "format": "pt"}))
        print(f"{target}: {model.norm_summary}, {classes} classes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
