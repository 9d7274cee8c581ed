"""A folder or .zip file of one's own pictures: what becomes of each, and that nothing is decoded twice."""

import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from sources import cache, listing
from sources import folder as folders
from sources.folder import PictureSource, Rules, load_folder
from sources.pictures import GRAY_WEIGHTS, Fit
from storage import untrusted

GENERATOR = np.random.default_rng(0)
COLOR = [GENERATOR.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(8)]
RULES = Rules(Fit((4, 6, 3), "crop", convert_channels=True, group="data"), 256, test_share=0.25)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def everything(source):
    return source.images(np.arange(len(source)))


def as_set(images):
    return {image.tobytes() for image in images}


def fill(root, images=COLOR):
    for number, image in enumerate(images):
        save(root / f"{number}.png", image)
    return root


# --- what becomes of a picture ---------------------------------------------------------------------------------------


def laid_on_white(rgba):
    color, alpha = rgba[..., :3] / 255, rgba[..., 3:] / 255
    return np.rint(255 * (alpha * color + 1 - alpha)).astype(np.uint8)


def test_a_mixed_folder_follows_the_policy(tmp_path, caplog):
    """One of each: colour, grey, RGBA, broken, another size, and files that are no pictures."""
    root = tmp_path / "mixed"
    rgba = GENERATOR.integers(0, 256, (4, 6, 4), dtype=np.uint8)
    wide = GENERATOR.integers(0, 256, (4, 9, 3), dtype=np.uint8)  # its middle six columns have the right proportions
    save(root / "a.png", COLOR[0])
    save(root / "b.png", COLOR[1][..., 0])
    save(root / "c.png", rgba)
    save(root / "d.png", wide[:, :8])
    (root / "e.jpg").write_bytes(b"not a picture")
    (root / "f.png").write_bytes((root / "a.png").read_bytes()[:60])
    (root / "notes.txt").write_text("no picture by its name")
    (root / ".hidden.png").write_bytes(b"")
    splits = [everything(load_folder(str(root), split, RULES)) for split in ("train", "test")]
    expected = [COLOR[0], np.repeat(COLOR[1][..., :1], 3, axis=-1), laid_on_white(rgba), wide[:, 1:7]]
    assert as_set(np.concatenate(splits)) == as_set(expected)
    assert [len(split) for split in splits] == [3, 1]
    assert "left out 2 of 6 pictures: e.jpg: it cannot be read: it is not a picture; f.png: " in caplog.text


def test_strict_names_what_cannot_be_used(tmp_path):
    root = fill(tmp_path / "data", COLOR[:3])
    (root / "bad.png").write_bytes(b"?")
    with pytest.raises(
        ValueError, match=r"1 of 4 pictures .* cannot be used: bad.png: it cannot be read.*data.strict="
    ):
        load_folder(str(root), "train", Rules(RULES.fit, 256, strict=True))


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (1, lambda rgba: np.rint(laid_on_white(rgba).astype(np.float32) @ GRAY_WEIGHTS)[..., None]),
        (3, laid_on_white),
        (4, lambda rgba: rgba),
    ],
)
def test_channels(tmp_path, channels, expected):
    """Opaque pictures have opacity 1; grey of an RGBA picture is that of its picture on white, to a level."""
    rgba = GENERATOR.integers(0, 256, (4, 6, 4), dtype=np.uint8)
    save(tmp_path / "data/a.png", rgba)
    save(tmp_path / "data/b.png", COLOR[0])
    rules = Rules(Fit((4, 6, channels), "crop", convert_channels=True, group="data"), 256)
    both = [load_folder(str(tmp_path / "data"), split, rules) for split in ("train", "test")]
    images = np.concatenate([everything(source) for source in both]).astype(int)
    opaque = np.concatenate([COLOR[0], np.full((4, 6, 1), 255, np.uint8)], axis=-1)
    for picture in (rgba, opaque):
        assert np.abs(images - expected(picture)).max(axis=(1, 2, 3)).min() <= (channels == 1)


def test_arrays_may_have_any_number_of_channels(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    arrays = [GENERATOR.integers(0, 256, (4, 6, 13), dtype=np.uint8) for _ in range(2)]
    for number, array in enumerate(arrays):
        np.save(root / f"{number}.npy", array)
    rules = Rules(Fit((4, 6, 13), "crop", convert_channels=True, group="data"), 256)
    both = [everything(load_folder(str(root), split, rules)) for split in ("train", "test")]
    assert as_set(np.concatenate(both)) == as_set(arrays)


def test_transparent_colours_do_not_bleed(tmp_path):
    """The left half is red; the right half is transparent, and green, which nobody sees."""
    rgba = np.zeros((8, 12, 4), np.uint8)
    rgba[:, :6] = (255, 0, 0, 255)
    rgba[:, 6:] = (0, 255, 0, 0)
    for name in ("a", "b"):
        rgba[0, 0, 2] += 1
        save(tmp_path / f"data/{name}.png", rgba)
    rules = Rules(Fit((4, 6, 4), "crop", convert_channels=True, group="data"), 256)
    image = everything(load_folder(str(tmp_path / "data"), "train", rules))[0]
    assert image[..., 1][image[..., 3] > 0].max() == 0
    assert image[2, 0].tolist() == [255, 0, 0, 255]


# --- splits and classes ----------------------------------------------------------------------------------------------


def test_folders_are_splits_and_classes(tmp_path):
    root = tmp_path / "data"
    for number, image in enumerate(COLOR):
        split, kind = ("train" if number < 5 else "val"), ("cat" if number % 2 else "dog")
        save(root / f"unzipped/{split}/{kind}/deeper/{number}.png", image)
    train, test = (load_folder(str(root), split, RULES) for split in ("train", "test"))
    assert as_set(everything(train)) == as_set(COLOR[:5])
    assert as_set(everything(test)) == as_set(COLOR[5:])
    assert train.num_classes == test.num_classes == 2
    images, labels = everything(train), train.labels(np.arange(len(train)))
    for number, image in enumerate(COLOR[:5]):
        place = [other.tobytes() for other in images].index(image.tobytes())
        assert labels[place] == (0 if number % 2 else 1)  # cat comes before dog


@pytest.mark.parametrize(
    ("names", "splits", "classes"),
    [
        (["a.png", "b.png"], {"train": ""}, ()),
        (["x/a.png", "x/b.png"], {"train": "x/"}, ()),
        (["x/a.png", "b.png"], {"train": ""}, ()),
        (["cat/a.png", "dog/b.png"], {"train": ""}, ("cat", "dog")),
        (["car/a.png", "train/b.png"], {"train": ""}, ("car", "train")),  # a class of vehicles
        (["train/a.png", "test/b.png"], {"train": "train/", "test": "test/"}, ()),
        (["Train/a.png", "VAL/b.png"], {"train": "Train/", "test": "VAL/"}, ()),
        (["train/a.png"], {"train": "train/"}, ()),
        (["test/a.png"], {"train": ""}, ()),
        (["r/train/c/a.png", "r/train/d/a.png", "r/val/c/b.png"], {"train": "r/train/", "test": "r/val/"}, ("c", "d")),
        (["train/a.png", "test/a.png", "val/a.png"], {"train": "train/", "test": "test/"}, ()),
    ],
)
def test_what_folders_mean(names, splits, classes):
    assert listing.find_splits(names) == splits
    assert listing.find_classes(names, splits) == classes


def test_the_held_out_pictures_are_a_matter_of_content(tmp_path):
    """Neither names nor order nor a .zip change them, and copies of a picture are never in both splits."""
    first = fill(tmp_path / "first", [*COLOR, *COLOR])
    second = fill(tmp_path / "second", [*COLOR, *COLOR][::-1])
    with zipfile.ZipFile(tmp_path / "third.zip", "w") as archive:
        for path in first.iterdir():
            archive.write(path, f"anything/{path.name}")
    chosen = [as_set(everything(load_folder(str(p), "test", RULES))) for p in (first, second, tmp_path / "third.zip")]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 2
    train = everything(load_folder(str(first), "train", RULES))
    assert as_set(train) == as_set(COLOR) - chosen[0]
    assert len(train) == 12


# --- the cache -------------------------------------------------------------------------------------------------------


def count_decodings(monkeypatch):
    names = []

    def counted(pictures, name, rules):
        names.append(name)
        return read(pictures, name, rules)

    read = folders.read_levels
    monkeypatch.setattr(folders, "read_levels", counted)
    return names


def test_nothing_is_decoded_twice(tmp_path, monkeypatch):
    root = fill(tmp_path / "data")
    decoded = count_decodings(monkeypatch)
    first = everything(load_folder(str(root), "train", RULES))
    assert len(decoded) == len(COLOR)
    load_folder(str(root), "test", RULES)
    for path in root.iterdir():
        path.touch()  # another time of change, the same content
    shutil.move(root, tmp_path / "moved")
    source = load_folder(str(tmp_path / "moved"), "train", RULES)
    assert len(decoded) == len(COLOR)
    np.testing.assert_array_equal(everything(source), first)
    assert isinstance(source.source.levels, np.memmap)


def test_another_content_or_rule_is_decoded_anew(tmp_path, monkeypatch):
    root = fill(tmp_path / "data")
    decoded = count_decodings(monkeypatch)
    prints = [load_folder(str(root), "train", RULES).fingerprint]
    save(root / "0.png", COLOR[0][::-1])
    prints.append(load_folder(str(root), "train", RULES).fingerprint)
    assert len(decoded) == 2 * len(COLOR)
    stretched = Rules(Fit((4, 6, 3), "stretch", convert_channels=True, group="data"), 256)
    prints.append(load_folder(str(root), "train", stretched).fingerprint)
    assert len(decoded) == 3 * len(COLOR)
    assert len(set(prints)) == 3


def test_what_is_too_large_to_keep_is_decoded_when_it_is_read(tmp_path):
    root = fill(tmp_path / "data")
    kept = load_folder(str(root), "train", RULES)
    read = load_folder(str(root), "train", Rules(RULES.fit, 256, test_share=0.25, cache_gib=0.0))
    assert isinstance(read.source, PictureSource)
    np.testing.assert_array_equal(everything(read), everything(kept))
    (root / "3.png").unlink()
    with pytest.raises(
        ValueError, match=r"3.png of data.path=.* could be read when the run began: it cannot be read: No"
    ):
        read.source.images(np.array([3]))


def test_a_failure_leaves_no_half_of_a_folder(tmp_path):
    def fail(folder):
        (folder / "images.npy").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.prepared_folder("0" * 64, fail)
    assert list((tmp_path / "cache/data").iterdir()) == []
    built = cache.prepared_folder("0" * 64, lambda folder: (folder / "images.npy").write_bytes(b"whole"))
    assert (built / "images.npy").read_bytes() == b"whole"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    root = fill(tmp_path / "data")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, cache.RESERVE))
    with pytest.raises(ValueError, match=r"need 0.00 GiB, but .* has only 0.25 GiB free; set \$SCORE_SDE_CACHE"):
        load_folder(str(root), "train", RULES)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"data.path is empty; set --config.data.path to a folder or .zip file"):
        load_folder("", "train", RULES)
    with pytest.raises(ValueError, match=r"none' does not exist; set it to a folder or .zip file of pictures"):
        load_folder(str(tmp_path / "none"), "train", RULES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("?")
    with pytest.raises(ValueError, match=r"empty' has no picture \(1 files of other kinds\); expected .png, .jpg"):
        load_folder(str(tmp_path / "empty"), "train", RULES)
    (tmp_path / "bad.zip").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"bad.zip' is damaged or no .zip file"):
        load_folder(str(tmp_path / "bad.zip"), "train", RULES)
    save(tmp_path / "same/a.png", COLOR[0])
    save(tmp_path / "same/b.png", COLOR[0])
    with pytest.raises(ValueError, match=r"same has 2 image\(s\), all the same, which cannot"):
        load_folder(str(tmp_path / "same"), "train", RULES)


def test_only_broken_pictures_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(7):
        (tmp_path / f"data/{number}.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"no picture for the train split that can be used: 0.png: .*; and 2 more"):
        load_folder(str(tmp_path / "data"), "train", RULES)


def test_a_damaged_member_of_a_zip_is_left_out(tmp_path):
    fill(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted((tmp_path / "data").iterdir()):
            archive.write(path, path.name)
    content = bytearray((tmp_path / "data.zip").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255  # in the first picture
    (tmp_path / "data.zip").write_bytes(content)
    both = [everything(load_folder(str(tmp_path / "data.zip"), split, RULES)) for split in ("train", "test")]
    assert as_set(np.concatenate(both)) == as_set(COLOR[1:])


# --- what failed is tried again --------------------------------------------------------------------------------------


def zip_of(path, images):
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images):
            save(path.parent / "one.png", image)
            archive.write(path.parent / "one.png", f"{number}.png")
    return path


def flip_data(path, num):
    """Flips a byte of the first entries' data."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist()[:num]:
            content[entry.header_offset + 80] ^= 0xFF
    path.write_bytes(content)


def mark_encrypted(path, num):
    """Sets the flag of encryption in both headers of the first entries."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        for _ in range(num):
            place = content.index(signature, place + 1)
            content[place + offset] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize("cache_gib", [16.0, 0.0])
@pytest.mark.parametrize("damage", [flip_data, mark_encrypted])
def test_a_good_zip_in_the_place_of_a_damaged_one_is_read(tmp_path, caplog, damage, cache_gib):
    """Both have the same names, sizes and declared checksums, and so the same key of the cache."""
    rules = Rules(RULES.fit, 256, test_share=0.25, cache_gib=cache_gib)
    path = zip_of(tmp_path / "set.zip", COLOR)
    good = path.read_bytes()
    damage(path, 3)
    load_folder(str(path), "train", rules)
    assert "left out 3 of 8 pictures" in caplog.text
    with pytest.raises(ValueError, match="3 of 8 pictures"):
        load_folder(str(path), "train", Rules(RULES.fit, 256, strict=True, cache_gib=cache_gib))
    caplog.clear()
    path.write_bytes(good)
    both = [everything(load_folder(str(path), split, rules)) for split in ("train", "test")]
    assert as_set(np.concatenate(both)) == as_set(COLOR)
    assert "left out" not in caplog.text


def test_what_may_be_read_again_is_read(tmp_path, monkeypatch, caplog):
    """Permissions change neither size nor time of a file."""
    root, read = fill(tmp_path / "data"), untrusted.read_content

    def refuse(path):
        if str(path).endswith(("1.png", "4.png")):
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(untrusted, "read_content", refuse)
        load_folder(str(root), "train", RULES)
        assert "left out 2 of 8 pictures: 1.png: it cannot be read: Permission denied" in caplog.text
    caplog.clear()
    both = [everything(load_folder(str(root), split, RULES)) for split in ("train", "test")]
    assert as_set(np.concatenate(both)) == as_set(COLOR)
    assert "left out" not in caplog.text


# --- what is a picture -----------------------------------------------------------------------------------------------

KINDS = {  # name -> Pillow's format; these are lossless
    "a.png": "PNG",
    "b.apng": "PNG",
    "c.bmp": "BMP",
    "d.tga": "TGA",
    "e.jp2": "JPEG2000",
    "f": "PNG",
    "g.dat": "TIFF",
    "h.20260101": "PPM",
    "i.img": "JPEG2000",
    "j.webp": "WEBP",
    "k.picture": "WEBP",
}
OPTIONS = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False, "num_resolutions": 1}}


def test_pictures_are_recognized_by_content_whatever_their_names(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    root = tmp_path / "data"
    pictures = [GENERATOR.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in KINDS]
    for (name, kind), picture in zip(KINDS.items(), pictures, strict=True):
        save(root / name, picture, format=kind, **OPTIONS.get(kind, {}))
    np.save(root / "l.npy", COLOR[0])
    shutil.copy(root / "l.npy", root / "m")
    np.save(root / "l.npy", COLOR[1])
    (root / "notes.md").write_text("P2P is not a picture")
    (root / "BMW.txt").write_text("BMW is not a bitmap")
    (root / "empty").write_bytes(b"")
    both = [everything(load_folder(str(root), split, RULES)) for split in ("train", "test")]
    assert as_set(np.concatenate(both)) == as_set([*pictures, *COLOR[:2]])
    assert "passed over 3 files that are no pictures: BMW.txt, empty, notes.md" in caplog.text


@pytest.mark.parametrize("name", ["a.jfif", "b.jpe", "c.avif", "d"])
def test_lossy_pictures_of_other_names_are_read(tmp_path, name):
    """They are not left out; their values are those that Pillow gives."""
    root = fill(tmp_path / "data", COLOR[:3])
    flat = np.full((4, 6, 3), 90, np.uint8)
    save(root / name, flat, format="AVIF" if name == "c.avif" else "JPEG")
    both = np.concatenate([everything(load_folder(str(root), split, RULES)) for split in ("train", "test")])
    assert len(both) == 4
    assert np.abs(both.astype(int) - 90).max(axis=(1, 2, 3)).min() <= 2


def test_a_picture_of_a_format_that_is_not_read_is_left_out_with_the_reason(tmp_path, caplog):
    root = fill(tmp_path / "data", COLOR[:3])
    (root / "layers.psd").write_bytes(b"8BPS" + bytes(100))
    load_folder(str(root), "train", RULES)
    assert "left out 1 of 4 pictures: layers.psd: it cannot be read: it is not a picture" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 4 pictures .* cannot be used: layers.psd"):
        load_folder(str(root), "train", Rules(RULES.fit, 256, strict=True))


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    root, elsewhere = tmp_path / "data", fill(tmp_path / "elsewhere", COLOR[:3])
    fill(root / "dog", COLOR[3:6])
    (root / "cat").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    train, test = (load_folder(str(root), split, RULES) for split in ("train", "test"))
    assert train.num_classes == 2
    images = np.concatenate([everything(train), everything(test)])
    labels = np.concatenate([source.labels(np.arange(len(source))) for source in (train, test)])
    assert as_set(images[labels == 0]) == as_set(COLOR[:3])
    assert as_set(images[labels == 1]) == as_set(COLOR[3:6])


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(number) for number in range(12)], [str(number) for number in range(12)]),
        (["007", "10", "9"], ["007", "9", "10"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
        (["n02", "n1"], ["n02", "n1"]),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are(names, expected):
    pictures = [f"{name}/{i}.png" for name in names for i in range(2)]
    classes = listing.find_classes(pictures, {"train": ""})
    assert list(classes) == expected
    labels = listing.classes_of(pictures, {"train": ""}, classes)
    assert [expected[label] for label in labels] == [name for name in names for _ in range(2)]


def test_an_entry_without_a_name_is_passed_over(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"no name")
        for number, image in enumerate(COLOR):
            save(tmp_path / "one.png", image)
            archive.write(tmp_path / "one.png", f"{number}.png")
    train, test = (load_folder(str(path), split, RULES) for split in ("train", "test"))
    assert as_set(everything(train)) | as_set(everything(test)) == as_set(COLOR)


def test_a_zip_with_separators_of_windows_has_its_folders(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(COLOR):
            save(tmp_path / "one.png", image)
            entry = zipfile.ZipInfo("placeholder")
            entry.filename = f"data\\{'cat' if number % 2 else 'dog'}\\{number}.png"
            archive.writestr(entry, (tmp_path / "one.png").read_bytes())
    train, test = (load_folder(str(path), split, RULES) for split in ("train", "test"))
    images = np.concatenate([everything(train), everything(test)])
    labels = np.concatenate([source.labels(np.arange(len(source))) for source in (train, test)])
    assert train.num_classes == 2
    assert as_set(images[labels == 0]) == as_set(COLOR[1::2])
    assert as_set(images[labels == 1]) == as_set(COLOR[::2])


def test_what_a_path_is_instead_of_a_folder_is_said(tmp_path):
    save(tmp_path / "one.png", COLOR[0])
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "one.png", "one.png")
    with pytest.raises(ValueError, match=r"one.png' is a single picture; expected a folder or .zip file of pictures"):
        load_folder(str(tmp_path / "one.png"), "train", RULES)
    with pytest.raises(ValueError, match=r"set.tar' is a .tar file; unpack it, or pack its files as .zip"):
        load_folder(str(tmp_path / "set.tar"), "train", RULES)
