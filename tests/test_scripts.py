"""scripts/: what a person runs once."""

import shutil

import pytest
from commands import script


def test_the_subset_of_tiny_imagenet(tmp_path, capsys, monkeypatch):
    source = tmp_path / "tiny-imagenet-200"
    classes = [f"n{i:08d}" for i in (7, 3, 5, 1, 9, 11)]
    for name in classes:
        folder = source / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{name}_{i}.JPEG").write_text(f"{name} {i}")
    (source / "val" / "images").mkdir(parents=True)
    for i, name in enumerate(classes):
        (source / "val" / "images" / f"val_{i}.JPEG").write_text(f"val {name}")
    (source / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n" for i, name in enumerate(classes))
    )
    main = script("scripts/tiny_imagenet_50.py").main
    for _ in range(2):  # repeated, it changes nothing
        assert main([str(source), str(tmp_path / "out")]) == 0
        found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.JPEG"))
        assert found == [  # sorted: 1 3 5 7 9 11; every fourth: 1 and 9
            "train/n00000001/n00000001_0.JPEG", "train/n00000001/n00000001_1.JPEG",
            "train/n00000009/n00000009_0.JPEG", "train/n00000009/n00000009_1.JPEG",
            "val/n00000001/val_3.JPEG", "val/n00000009/val_4.JPEG",
        ]  # fmt: skip
    assert (tmp_path / "out/val/n00000009/val_4.JPEG").read_text() == "val n00000009"
    assert "2 classes, 4 training and 2 evaluation images" in capsys.readouterr().out
    (tmp_path / "out/val/n00000009/val_4.JPEG").unlink()
    with monkeypatch.context() as full:
        full.setattr(shutil, "copyfile", lambda image, place: place.write_text("half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out/val/n00000009/val_4.JPEG").exists()
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/val/n00000009/val_4.JPEG").read_text() == "val n00000009"
    assert main([str(tmp_path), "x"]) == 2 and "give the folder tiny-imagenet-200" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
