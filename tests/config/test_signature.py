"""What makes a run another run."""

from anorm.config.settings import settings_from
from anorm.config.signature import EXCLUDED, flatten, signature

CONFIG = {
    "task": {"name": "classification"},
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


def signed(processes=1, identity="data", digest=None, **changes):
    return signature(full_config(**{"hardware.processes": processes} | changes), identity, digest)


def test_what_changes_the_mathematics_changes_the_signature():
    """Every key is changed in turn: excluded ones leave the signature as it is, all others do not."""
    flat = flatten(full_config())
    for key, value in flat.items():
        other = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v + 0.5,
            str: lambda v: v + "x",
        }.get(type(value), lambda v: "something")(value)
        excluded = any(key == word or key.startswith(word + ".") for word in EXCLUDED)
        assert (signed(**{key: other}) == signed()) == excluded, key


def test_data_weights_and_synced_processes_count():
    assert signed(identity="other") != signed()
    assert signed(processes=2) == signed()
    assert signed(processes=2, **{"norm.sync": True}) != signed(**{"norm.sync": True})
    # evaluation's batches are the same for any number of processes; their size matters where their statistics do
    assert signed(processes=2, **{"eval.stats": "batch"}) == signed(**{"eval.stats": "batch"})
    assert len({signed(), signed(digest="of a"), signed(digest="of b")}) == 3


def test_the_batches_of_a_law_with_batch_statistics_of_its_own_count():
    """afn_as_released evaluates so under eval.stats=running too; with the default batches its older runs stay."""
    own = {"norm.eval_stats": "batch"}
    for key, value in {"eval.batch_size": 32, "eval.order": "classes", "eval.seed": 1}.items():
        assert signed(**own, **{key: value}) != signed(**own)
        assert signed(**{key: value}) == signed()


def test_places_keep_the_signatures_of_what_they_name():
    """In basic blocks "published" was once the text's place: runs of that keep their signature, under their own word."""
    at = {
        (arch, place): signed(**{"arch.name": arch, "norm.attention": "a2", "norm.place": place})
        for arch in ("resnet20", "resnet50")
        for place in ("published", "text", 1)
    }
    assert at["resnet50", "published"] == at["resnet50", "text"] != at["resnet50", 1]  # one place there
    assert at["resnet20", "published"] == at["resnet20", 1] != at["resnet20", "text"]
    plain = [signed(**{"arch.name": "resnet20", "norm.name": "bn", "norm.place": p}) for p in ("published", "text")]
    assert plain[0] == plain[1]
