"""What makes a run another run."""

from anorm.config.settings import settings_from
from anorm.config.signature import EXCLUDED, flatten, signature

CONFIG = {
    "arch": {"name": "resnet50", "zero_init": False},
    "norm": {"name": "an", "sync": False},
    "data": {"name": "imagenet", "root": "/a"},
}


def full_config(**changes):
    import dataclasses

    flat = flatten(dataclasses.asdict(settings_from({})) | CONFIG)
    flat |= changes
    tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    return tree


def signed(processes=1, identity="data", **changes):
    return signature(full_config(**changes), identity, processes)


def test_what_changes_the_mathematics_changes_the_signature():
    """Every key is changed in turn: excluded ones leave the signature as it is, all others do not."""
    flat = flatten(full_config())
    for key, value in flat.items():
        if key == "weights":
            continue  # needs a file, below
        other = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v + 0.5,
            str: lambda v: v + "x",
        }.get(type(value), lambda v: "something")(value)
        excluded = any(key == word or key.startswith(word + ".") for word in EXCLUDED)
        assert (signed(**{key: other}) == signed()) == excluded, key


def test_data_weights_and_synced_processes_count(tmp_path):
    assert signed(identity="other") != signed()
    assert signed(processes=2) == signed()
    assert signed(processes=2, **{"norm.sync": True}) != signed(**{"norm.sync": True})
    # evaluation's batches are the same for any number of processes; their size matters where their statistics do
    assert signed(processes=2, **{"eval.stats": "batch"}) == signed(**{"eval.stats": "batch"})
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "c").write_bytes(b"other")
    a, b, c = (signed(weights=str(tmp_path / name)) for name in "abc")
    assert a == b != c and a != signed()
