"""Data of one's own: captioned images, texts, icons; and what the command says when they cannot be
used.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revnet.app.cli import main
from revnet.app.data import Patches, corpus, folder, icons, split, split_words
from revnet.app.errors import UserError

SMALL = ("--depth", "1", "--width", "32", "--batch", "4", "--steps", "2", "--device", "cpu")
TINY = (*SMALL, "--image-size", "8")
COLOURS = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 220)}


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12, 10, 3), colour, dtype=np.uint8)
    pixels[np.random.default_rng(seed).integers(12), 3] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve images in two folders, each with two captions in a text file."""
    root = tmp_path / "pictures"
    for i in range(12):
        name = list(COLOURS)[i % 3]
        path = root / ("a" if i < 6 else "b") / f"{i}.png"
        paint(path, COLOURS[name], i)
        path.with_suffix(".txt").write_text(f"a {name} card\n\n{name}\n", encoding="utf-8")
    return root


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("revnet: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_folder_of_images(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(pictures), *TINY, "--codes", "16", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pictures: 11 examples, 1 held out.")
    spec = json.loads((run / "data.json").read_text())
    assert set(spec["words"]) == {"a", "card", *COLOURS}
    assert len(spec["codes"]) <= 16
    assert np.array(spec["codes"]).shape[1:] == (2, 2, 3)
    assert (spec["rows"], spec["columns"]) == (4, 4)
    assert {path.name for path in run.glob("*.png")} == {
        "loss.png",
        "samples-00000001.png",
        "samples.png",
        "held_out.png",
    }
    assert main(["sample", str(run), "a blue card", "purple", "--each", "2"]) == 0
    assert (run / "sample.png").exists()


def test_a_folder_that_is_called_as_a_data_set_is(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                str(pictures.rename(tmp_path / "digits")),
                *TINY,
                "--codes",
                "16",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    assert "own_caption_likelier" in json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("table", ["captions.csv", "metadata.jsonl"])
def test_captions_in_a_table(pictures: Path, tmp_path: Path, table: str) -> None:
    images = folder.find_images(pictures)
    for path in pictures.rglob("*.txt"):
        path.unlink()
    rows = [
        (path.relative_to(pictures).as_posix(), f'caption, "{i}"') for i, path in enumerate(images)
    ]
    if table.endswith("csv"):
        lines = [
            "file,caption",
            *(f'{name},"{caption.replace(chr(34), chr(34) * 2)}"' for name, caption in rows),
        ]
    else:
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
    (pictures / table).write_text("\n".join(lines), encoding="utf-8")
    assert folder.find_captions(pictures, images) == [[caption] for _, caption in rows]


def test_captions_are_taken_as_they_are_written(pictures: Path) -> None:
    images = folder.find_images(pictures)
    names = [path.relative_to(pictures).as_posix() for path in images]
    table = pictures / "captions.csv"
    table.write_text(
        "file,caption\r\n" + "".join(f'{name},"red\ncard, {name}"\r\n' for name in names),
        newline="",
    )
    assert folder.find_captions(pictures, images) == [[f"red\ncard, {name}"] for name in names]
    table.unlink()
    lines = [
        json.dumps({"file": name, "caption": f"red\u2028\x85{name}"}, ensure_ascii=False)
        for name in names
    ]
    (pictures / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert folder.find_captions(pictures, images) == [[f"red\u2028\x85{name}"] for name in names]
    lines = [f'{{"file": "{name}", "caption": "red \\ud800"}}\r' for name in names]
    (pictures / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert folder.find_captions(pictures, images) == [["red ?"]] * len(names)


def test_equal_images_are_in_one_split(pictures: Path) -> None:
    for path in list(pictures.rglob("*.png")):
        for copy in "xyz":
            twin = path.with_name(f"{copy}{path.name}")
            twin.write_bytes(path.read_bytes())
            twin.with_suffix(".txt").write_text("twin")
    images = folder.find_images(pictures)
    splits = folder.load(pictures, images, 8, 2, 16, False, None).splits
    content = {name: {images[i].read_bytes() for i in numbers} for name, numbers in splits.items()}
    assert len(content["held_out"]) == 1
    assert len(splits["held_out"]) == 4
    assert not content["train"] & content["held_out"]


def test_split_follows_from_content_alone() -> None:
    keys = [f"{i * 7919 % 1000:04}" for i in range(500)]
    whole = split(keys)
    held_out = {keys[i] for i in whole["held_out"]}
    assert len(held_out) == 25
    assert sorted([*whole["train"], *whole["held_out"]]) == list(range(500))
    other = keys[::-1]
    assert {other[i] for i in split(other)["held_out"]} == held_out


def test_images_are_read_only_when_needed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "CODE_BOOK_IMAGES", 3)
    read: list[Path] = []
    decode = folder.read_image
    monkeypatch.setattr(
        folder, "read_image", lambda path, *rest: read.append(path) or decode(path, *rest)
    )
    data = folder.load(pictures, folder.find_images(pictures), 8, 2, 16, True, None)
    assert len(read) == 3
    prefix, tokens = data.batch("train", np.array([0, 5]), np.array([0.0, 0.9]))
    assert len(read) == 5
    assert tokens.shape == (2, 16)
    assert (prefix[0] != prefix[1]).any()


def test_transparency_shape_and_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 4), dtype=np.uint8)
    pixels[:, 2:6] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = folder.read_image(tmp_path / "a.png", 4, grey=False)
    assert (found == (255, 0, 0)).all()
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert (folder.read_image(tmp_path / "b.png", 4, grey=True) == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    grey = np.tile(np.arange(0, 256, 17, dtype=np.uint16), (16, 1))
    Image.fromarray(grey * 257).save(tmp_path / name)
    assert (folder.read_image(tmp_path / name, 16, grey=True)[..., 0] == grey).all()
    assert (folder.read_image(tmp_path / name, 16, grey=False) == grey[..., None]).all()
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match="cannot be decoded: its pixels are floats"):
        folder.read_image(tmp_path / "b.tif", 16, grey=True)


def test_too_many_patches_become_their_means() -> None:
    images = (
        np.random.default_rng(0).normal((60, 200), 3, (8, 8, 8, 2)).clip(0, 255).astype(np.uint8)
    )
    images = images.reshape(8, 8, 16, 1)
    patches = Patches.learn(images, patch=1, vocab=2)
    assert patches.codes.flatten().tolist() == [pytest.approx(60, abs=1), pytest.approx(200, abs=1)]
    assert abs(patches.decode(patches.encode(images)).astype(int) - images).max() < 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "a" / "1.txt").unlink(),
            "1 image without a caption, such as {p}/a/1.png: it needs a file 1.txt",
        ),
        (
            lambda p: (p / "a" / "1.txt").write_text(" \n"),
            "1 image without a caption, such as {p}/a/1.png",
        ),
        (
            lambda p: (p / "a" / "1.png").unlink(),
            "1 caption file without an image, such as {p}/a/1.txt",
        ),
        (
            lambda p: (p / "a" / "1.txt").write_bytes(b"caf\xe9"),
            "{p}/a/1.txt is not UTF-8: unexpected end of data at",
        ),
        (
            lambda p: (p / "a" / "1.txt").write_bytes("red".encode("utf-16-le")),
            "{p}/a/1.txt has zero bytes, as UTF-16 without its mark has. Save it as UTF-8.",
        ),
        (
            lambda p: (p / "captions.csv").write_bytes("красный мак".encode("utf-16-be")),
            "{p}/captions.csv has zero bytes, as UTF-16 without its mark has.",
        ),
        (
            lambda p: (p / "a" / "1.png").write_bytes(b"no image"),
            "the image {p}/a/1.png cannot be decoded",
        ),
        (lambda p: truncate(p / "a" / "1.png"), "the image {p}/a/1.png cannot be decoded"),
        (
            lambda p: (p / "captions.csv").write_text("file,caption\nz.png,red"),
            "row 2: there is no image {p}/z.png",
        ),
        (
            lambda p: (p / "captions.csv").write_text("name,words\nz.png,red"),
            "row 2: needs an image (file, ",
        ),
        (
            lambda p: (p / "captions.csv").write_text("file,caption\na/1.png,red"),
            "it needs a row in captions.csv",
        ),
        (
            lambda p: (p / "captions.csv").write_text("file,caption\na/1.png,a red, big card"),
            "has more columns than",
        ),
        (
            lambda p: (p / "captions.csv").write_text(f"file,caption\na/1.png,{'x' * 200_000}"),
            "is not a table: field l",
        ),
        (lambda p: (p / "captions.jsonl").write_text("{"), "captions.jsonl, line 1 is not JSON"),
        (
            lambda p: (p / "captions.jsonl").write_text("[" * 100_000),
            "captions.jsonl, line 1 is not JSON",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    damage(pictures)
    assert message.format(p=pictures) in refused(
        capsys, str(pictures), *TINY, "--out", str(tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_an_image_that_breaks_later_loses_no_step(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folder, "CODE_BOOK_IMAGES", 1)
    for path in folder.find_images(pictures)[6:]:
        truncate(path)
    run = tmp_path / "run"
    message = refused(
        capsys, str(pictures), *TINY, "--batch", "1", "--steps", "50", "--out", str(run)
    )
    assert "cannot be decoded" in message
    assert (run / "checkpoint.pt").exists()


def test_a_held_out_image_that_breaks_loses_no_step(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = folder.find_images(pictures)
    (number,) = folder.load(pictures, images, 8, 2, 16, False, None).splits["held_out"]
    truncate(images[number])
    # With its content its split changes too, unless that is held fast.
    splits = {"train": np.delete(np.arange(12), number), "held_out": np.array([number])}
    monkeypatch.setattr(folder, "split", lambda keys: splits)
    run = tmp_path / "run"
    assert f"the image {images[number]} cannot" in refused(
        capsys, str(pictures), *TINY, "--out", str(run)
    )
    assert (run / "checkpoint.pt").exists()


def test_a_text_that_vanishes_loses_no_step(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = corpus.Corpus.batch

    def vanish(
        self: corpus.Corpus, split: str, *which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if split == "held_out":
            shutil.rmtree(texts, ignore_errors=True)
        return read(self, split, *which)

    monkeypatch.setattr(corpus.Corpus, "batch", vanish)
    run = tmp_path / "run"
    assert f"cannot read {texts}" in refused(
        capsys, str(texts), *SMALL, "--context", "32", "--out", str(run)
    )
    assert (run / "checkpoint.pt").exists()


def test_other_data_that_cannot_be_used(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ("--out", str(tmp_path / "run"))
    assert f"{empty} holds neither images nor texts" in refused(capsys, str(empty), *out)
    assert "there is no file or folder nowhere" in refused(capsys, "nowhere", *out)
    text = tmp_path / "a.txt"
    text.write_text("short")
    assert "give one folder of images, or only texts" in refused(
        capsys, str(pictures), str(text), *out
    )
    assert "it needs twice --context 256" in refused(capsys, str(text), *out)
    text.write_text("")
    assert "all files are empty" in refused(capsys, str(text), *out)
    assert "--image-size 9 is not a multiple of --patch 2" in refused(
        capsys, str(pictures), *TINY, "--image-size", "9", *out
    )


@pytest.mark.skipif(find_spec("qtawesome") is None, reason="needs qtawesome")
def test_icons_hold_combinations_out() -> None:
    data = icons.load()
    train, held_out = data.splits["train"], data.splits["held_out"]
    assert len(train) > 6500
    assert len(held_out) == 400
    assert data.load(0).shape == (24, 24, 1)
    combinations = [frozenset(split_words(data.captions[i][0])) for i in train]
    words = frozenset().union(*combinations)
    drawings = {data.load(i).tobytes() for i in train}
    for i in held_out:
        combination = frozenset(split_words(data.captions[i][0]))
        assert combination <= words
        assert combination not in combinations
        assert data.load(i).tobytes() not in drawings
    prefix, tokens = data.batch("held_out", np.arange(3), np.zeros(3))
    assert tokens.shape == (3, 144)
    assert prefix.min() < 2 < prefix.max()
    error = data.patches.decode(tokens).astype(float) - np.stack(
        [data.load(i) for i in held_out[:3]]
    )
    assert np.abs(error).mean() < 12


def test_icons_without_their_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'revnet[icons]'" in refused(capsys, "icons", "--out", str(tmp_path / "run"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        (root / f"{i:02}.txt").write_bytes(
            bytes(rng.integers(97, 123, rng.integers(40, 400), dtype=np.uint8))
        )
    (root / "copy.txt").write_bytes((root / "00.txt").read_bytes())
    (root / "binary.dat").write_bytes(b"abc\0def" * 100)
    return root


def test_a_corpus_is_its_files_one_after_the_other(texts: Path) -> None:
    files = corpus.find_texts([texts])
    assert len(files) == 31
    data = corpus.Corpus("texts", files, length=16)
    content = {path.read_bytes() for path in files}
    whole = {}
    for name, documents in data._documents.items():
        parts = [path.read_bytes()[start:end] for path, start, end in documents]
        content -= set(parts)
        whole[name] = b"".join(parts)
    assert not content
    assert sum(map(len, whole.values())) == sum(
        len(part) for part in {path.read_bytes() for path in files}
    )
    for name, text in whole.items():
        count = data.counts[name]
        indices, draws = np.arange(count), np.random.default_rng(1).random(count)
        prefix, tokens = data.batch(name, indices, draws)
        assert prefix.shape == (count, 1)
        for i, draw, row in zip(indices, draws, tokens, strict=True):
            start = int((i + draw) * 16)
            assert bytes(row.tolist()) == text[start : start + 16]
    assert 2 * 16 <= len(whole["held_out"]) < len(whole["train"])


def test_hidden_folders_are_no_text(texts: Path) -> None:
    files = corpus.find_texts([texts])
    (texts / ".git" / "objects").mkdir(parents=True)
    (texts / ".git" / "objects" / "ab").write_bytes(b"\xff" * 1000)
    assert corpus.find_texts([texts]) == files


def test_of_few_texts_the_ends_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(256)) * 10)
    data = corpus.Corpus("one", [path], length=16)
    assert data._documents == {"train": [(path, 0, 2432)], "held_out": [(path, 2432, 2560)]}
    more = tmp_path / "more.txt"
    more.write_bytes(bytes(range(100)) * 4)
    data = corpus.Corpus("two", [path, more], length=16)
    assert data._documents == {
        "train": [(path, 0, 2432), (more, 0, 380)],
        "held_out": [(path, 2432, 2560), (more, 380, 400)],
    }


def test_a_text_that_shrinks_is_noticed(texts: Path) -> None:
    data = corpus.Corpus("texts", corpus.find_texts([texts]), length=16)
    for path in texts.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="has become shorter since the run began"):
        data.batch("train", np.arange(9), np.zeros(9))


def test_a_text_run(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", str(texts), *SMALL, "--context", "32", "--out", str(run)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert (run / "samples.txt").read_text(encoding="utf-8").count("\n\n----\n\n") == 1
    spec = json.loads((run / "data.json").read_text())
    outputs = []
    for flags in ([], ["--no-cache"]):
        assert main(["sample", str(run), "abcdef", "xyz", "--length", "20", *flags]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("abcdef")
    assert "\n\nxyz" in outputs[0]
    assert main(["sample", str(run), "--length", "33"]) == 2
    assert "--length 33 is more than the run's context of 32 bytes" in capsys.readouterr().err
    assert main(["sample", str(run), "abcdef", "--length", "6"]) == 2
    assert (
        "there is nothing to add to 'abcdef', which is as long as --length 6"
        in capsys.readouterr().err
    )
    assert main(["sample", str(run)]) == 0
    assert main(["sample", str(run), "x" * 32]) == 2
    assert "which is as long as the run's context of 32 bytes" in capsys.readouterr().err
    (texts / "00.txt").write_text("something else")
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 2
    assert f"the data of {run} has changed since it was started" in capsys.readouterr().err
    assert spec["name"] == "texts"


def test_the_standard_library_is_there() -> None:
    files = corpus.standard_library()
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in files}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
