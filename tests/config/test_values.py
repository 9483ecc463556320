"""What is typed, as the argument that takes it: read, or refused in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import ROOT, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anorm.config.frozen import Config
from anorm.config.values import TRUTH, checked

CONFIGS = ROOT / "configs"
FOLDER = ["data=imagefolder", "data.root=/data", "norm=bn", "arch=resnet18"]


def composed(*arguments):
    return Config.compose(CONFIGS, [*FOLDER, *arguments])


def held(config, key):
    section, _, name = key.rpartition(".")
    return getattr(config, section).options[name] if section else getattr(config.settings, name)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("arch.zero_init=off", False),
        ("arch.zero_init=On", True),
        ("data.flip=no", False),
        ("data.flip=y", True),
        ("data.cache=n", False),
        ("norm.sync=yes", True),
        ("norm.affine=FALSE", False),
        ("data.train=off", "off"),
        ("data.train=no", "no"),
        ("data.train=true", "true"),
        ("data.train=2012", "2012"),
        ("data.train=007", "007"),
        ("data.train=1e3", "1e3"),
        ("data.train='yes'", "yes"),
        ("data.val=1.50", "1.50"),
        ("data.mean=[0,0,0]", [0, 0, 0]),
        ("data.eval_resize=null", None),
        ("norm.place=2", 2),
        ("norm.place=[reduce,2]", ["reduce", 2]),
        ("norm.momentum=1", 1),
        ("data.root=2012", str(Path.cwd() / "2012")),
        ("data.root=~/set", str(Path.home() / "set")),
        ("data.root=/a=b/c d, e (1)/x", "/a=b/c d, e (1)/x"),
        ("weights=w.pth", str(Path.cwd() / "w.pth")),
        ("dry=yes", True),
        ("freeze=norm", ["norm"]),
        ("freeze=[off,7]", ["off", "7"]),
    ],
)
def test_values_are_read_as_their_argument_wants_them(argument, value):
    found = held(composed(argument), argument.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


def test_variables_in_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("PLACE", "/somewhere")
    assert composed("data.root=$PLACE/set").data.options["root"] == "/somewhere/set"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.image_size=32.0", "data.image_size=32.0 must be a whole number"),
        ("data.image_size=big", "data.image_size='big' must be a whole number"),
        ("data.image_size=true", "data.image_size=True must be a whole number"),
        ("data.image_size=[32]", r"data.image_size=\[32\] must be a whole number"),
        ("data.mean=0.5", "data.mean=0.5 must be a list of numbers"),
        ("data.mean=[a,b,c]", r"data.mean\[0\]='a' must be a number"),
        ("data.crop_scale=[0.1]", r"data.crop_scale=\[0.1\] must be a list of 2 numbers"),
        ("data.crop_ratio=[1,2,3]", r"data.crop_ratio=\[1, 2, 3\] must be a list of 2 numbers"),
        ("data.on_error=null", "data.on_error=null must be a word"),
        ("data.eval_resize=36.5", "data.eval_resize=36.5 must be a whole number or null"),
        ("data.flip=1", "data.flip=1 must be true or false"),
        ("data.flip=maybe", "data.flip='maybe' must be true or false"),
        ("data.train={a:1}", "data.train={'a': 1} must be a word"),
        ("norm.eps=null", "norm.eps=null must be a number"),
        ("norm.eps=small", "norm.eps='small' must be a number"),
        ("norm.eps=nan", "norm.eps=nan must be a number"),
        ("norm.sync=2", "norm.sync=2 must be true or false"),
        ("norm.place=1.5", "norm.place=1.5 must be"),
        ("arch.stem=[7x7]", r"arch.stem=\['7x7'\] must be a word"),
        ("epochs=1.5", "epochs=1.5 must be a whole number"),
        ("dry=2", "dry=2 must be true or false"),
        ("norm.elsewhere={name:gn,eps:tiny}", "norm.elsewhere.eps='tiny' must be a number"),
        ("weights=", "no value"),
        ("run_dir=", "no value"),
    ],
)
def test_values_of_another_type_are_refused_in_words(argument, words):
    with pytest.raises(ValueError, match=words):
        composed(argument)


def test_a_norms_and_a_modules_own_arguments():
    def an(*arguments):
        return composed("norm=an", *arguments).norm.options

    assert an("norm.separate=no")["separate"] is False and an("norm.k=[5,5,10,10]")["k"] == [5, 5, 10, 10]
    with pytest.raises(ValueError, match=r"norm.k=5.0 must be a whole number or a list of whole numbers or null"):
        an("norm.k=5.0")
    assert an("norm.base={name:gn,affine:off}")["base"] == {"name": "gn", "affine": False}
    module = ["norm=module", "norm.target=torch.nn.GroupNorm", "norm.num_groups=8"]
    assert composed(*module, "norm.affine=off").norm.options["affine"] is False
    with pytest.raises(ValueError, match=r"norm.num_groups=8.5 must be a whole number"):
        composed(*module, "norm.num_groups=8.5")
    with pytest.raises(ValueError, match="arch.drop=off is a word.*give true or false"):
        composed("arch=timm:resnet18", "arch.drop=off")


KINDS = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    str: st.text(min_size=1),
    type(None): st.none(),
    Sequence[float]: st.lists(st.floats(allow_nan=False)),
    Literal["like"]: st.just("like"),
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(data=st.data(), kinds=st.sets(st.sampled_from(list(KINDS)), min_size=1))
def test_a_value_of_an_accepted_type_stays_what_it_is(data, kinds):
    """Whatever the union; a word for true or false alone becomes one where a truth value is wanted."""
    hint = None
    for kind in sorted(kinds, key=str):
        hint = kind if hint is None else hint | kind
    value = data.draw(KINDS[data.draw(st.sampled_from(sorted(kinds, key=str)))])
    found = checked(hint, value, "key")
    if bool in kinds and isinstance(value, str) and value.lower() in TRUTH:
        assert found is TRUTH[value.lower()]
    else:
        assert found == value and type(found) is type(value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(value=st.one_of(st.text(), st.floats(), st.none(), st.lists(st.integers())))
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="^key=.* must be a whole number$"):
        checked(int, value, "key")


def test_words_in_doubt_are_refused():
    for word in ("off", "No", "yes"):
        with pytest.raises(ValueError, match="give true or false"):
            checked(Any, word, "key")


@pytest.mark.parametrize("group", ["task", "arch", "norm", "data"])
def test_a_name_is_chosen_by_its_group_alone(capsys, group):
    """norm=bn norm.name=gn trained GN in a folder and a page that said bn."""
    assert train(*FOLDER, f"{group}.name=gn") == 2
    assert f"the name of what is built is chosen by {group}=gn" in capsys.readouterr().err
