"""Pictures of a user's own: every kind that Pillow reads becomes the values that are written here by hand."""

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from sources.pictures import Fit, central_part, fit_picture, load_pictures, read_picture
from storage import untrusted

GENERATOR = np.random.default_rng(0)
GRAY = GENERATOR.integers(0, 256, (4, 5), dtype=np.uint8)
COLOR = GENERATOR.integers(0, 256, (4, 5, 3), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, (4, 5, 1), dtype=np.uint8)
WIDE = GENERATOR.integers(0, 65536, (4, 5), dtype=np.uint16)
INDICES = GENERATOR.integers(0, 3, (4, 5), dtype=np.uint8)
PALETTE = np.array([[250, 0, 10], [0, 200, 30], [5, 60, 100]], np.uint8)
LAID_ON_WHITE = lambda color: (ALPHA / 255) * (color / 255) + (1 - ALPHA / 255)  # noqa: E731


def with_palette():
    picture = Image.fromarray(INDICES)
    picture.putpalette(PALETTE.tobytes())  # makes its mode "P"
    return picture


def turned():
    """Stored on its side: orientation 6 says that its first row is the right-hand side of what was seen."""
    picture, exif = Image.fromarray(COLOR), Image.Exif()
    exif[0x0112] = 6
    return picture, {"exif": exif}


KINDS = {
    "grey": (lambda: (Image.fromarray(GRAY), {}), "png", GRAY[..., None] / 255),
    "black and white": (lambda: (Image.fromarray(GRAY > 99), {}), "tif", (GRAY > 99)[..., None]),
    "16 bits": (lambda: (Image.fromarray(WIDE), {}), "png", WIDE[..., None] / 65535),
    "16 bits, TIFF": (lambda: (Image.fromarray(WIDE), {}), "tiff", WIDE[..., None] / 65535),
    "colour": (lambda: (Image.fromarray(COLOR), {}), "bmp", COLOR / 255),
    "colour, WebP": (lambda: (Image.fromarray(COLOR), {"lossless": True}), "webp", COLOR / 255),
    "upper-case name": (lambda: (Image.fromarray(COLOR), {}), "PNG", COLOR / 255),
    "palette": (lambda: (with_palette(), {}), "png", PALETTE[INDICES] / 255),
    "palette, one colour transparent": (
        lambda: (with_palette(), {"transparency": 1}),
        "png",
        np.where(INDICES[..., None] == 1, 1.0, PALETTE[INDICES] / 255),
    ),
    "alpha": (
        lambda: (Image.fromarray(np.concatenate([COLOR, ALPHA], axis=-1)), {}),
        "png",
        LAID_ON_WHITE(COLOR),
    ),
    "grey with alpha": (
        lambda: (Image.fromarray(np.concatenate([GRAY[..., None], ALPHA], axis=-1)), {}),
        "png",
        LAID_ON_WHITE(GRAY[..., None]),
    ),
    "turned": (turned, "png", np.rot90(COLOR, -1) / 255),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_every_kind_is_read(tmp_path, kind):
    make, suffix, expected = KINDS[kind]
    picture, options = make()
    picture.save(tmp_path / f"p.{suffix}", **options)
    values = read_picture(tmp_path / f"p.{suffix}")
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_cmyk_becomes_rgb(tmp_path):
    """JPEG loses something, but not of a picture of one colour."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=100)
    np.testing.assert_allclose(read_picture(tmp_path / "p.jpg"), np.broadcast_to([1.0, 0, 0], (8, 8, 3)), atol=0.02)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_black_and_white_are_refused(tmp_path, mode):
    Image.new(mode, (3, 3)).save(tmp_path / "p.tif")
    with pytest.raises(ValueError, match="32 bits, of which black and white are not known; save it with 8 or 16"):
        read_picture(tmp_path / "p.tif")


# --- size and channels -----------------------------------------------------------------------------------------------


def test_the_central_part_has_the_proportions():
    image = GENERATOR.random((8, 13, 1))
    np.testing.assert_array_equal(central_part(image, 4, 4), image[:, 2:10])
    np.testing.assert_array_equal(central_part(image, 4, 5), image[:, 1:11])
    np.testing.assert_array_equal(central_part(image.transpose(1, 0, 2), 2, 4), image.transpose(1, 0, 2)[4:8])
    assert central_part(image, 100, 1).shape == (8, 1, 1)


def test_crop_keeps_the_proportions_and_stretch_does_not():
    """A wide picture whose sides are black and whose middle is white: cropped it is white, stretched it is not."""
    image = np.zeros((8, 16, 1), np.float32)
    image[:, 4:12] = 1.0
    np.testing.assert_array_equal(fit_picture(image, Fit((8, 8, 1), "crop")), np.ones((8, 8, 1)))
    np.testing.assert_allclose(fit_picture(image, Fit((4, 4, 1), "crop")), 1.0, atol=1e-6)
    stretched = fit_picture(image, Fit((8, 8, 1), "stretch"))
    np.testing.assert_allclose(stretched[:, 0], 0.0, atol=0.02)
    np.testing.assert_allclose(stretched[:, 3:5], 1.0, atol=0.02)
    np.testing.assert_allclose(stretched.mean(), 0.5, atol=0.01)
    assert stretched.min() >= 0
    assert stretched.max() <= 1  # the kernel overshoots at edges; that is clipped


def test_resizing_does_not_alias():
    """Stripes one pixel wide become grey; taking every other pixel would make them black or white."""
    stripes = np.tile(np.array([0.0, 1.0], np.float32), (16, 8))[..., None]
    np.testing.assert_allclose(fit_picture(stripes, Fit((8, 8, 1), "stretch"))[:, 2:-2], 0.5, atol=0.01)


def test_channels_are_converted_only_if_so_set():
    color = COLOR.astype(np.float32) / 255
    converted = fit_picture(color, Fit((4, 5, 1), convert_channels=True))
    luma = 0.299 * color[..., 0] + 0.587 * color[..., 1] + 0.114 * color[..., 2]
    np.testing.assert_allclose(converted[..., 0], luma, atol=1e-6)
    # Pillow's own conversion, rounded to 8 bits
    np.testing.assert_allclose(converted[..., 0] * 255, np.asarray(Image.fromarray(COLOR).convert("L")), atol=0.51)
    gray = GRAY[..., None].astype(np.float32) / 255
    np.testing.assert_array_equal(fit_picture(gray, Fit((4, 5, 3), convert_channels=True)), np.repeat(gray, 3, axis=-1))
    for image, channels in ((color, 1), (gray, 3)):
        with pytest.raises(ValueError, match=rf"has {4 - channels} channel\(s\), expected {channels}; .*channels=True"):
            fit_picture(image, Fit((4, 5, channels), "stretch"))
    with pytest.raises(ValueError, match="has 3 channels, which cannot be converted to 2"):
        fit_picture(color, Fit((4, 5, 2), convert_channels=True))


def test_another_size_is_told_as_found_and_expected():
    with pytest.raises(ValueError, match=r"it has 4x5 pixels \(height x width\), expected 8x8; .* restore.resize"):
        fit_picture(COLOR / 255, Fit((8, 8, 3)))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Pictures b and a, and what is no picture of this size."""
    for name, value in (("b", 100), ("a", 200)):
        Image.new("L", (5, 4), value).save(tmp_path / f"{name}.png")
    Image.new("L", (5, 5)).save(tmp_path / "square.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "colour.png")
    Image.fromarray(GRAY).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("two files")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "more").mkdir()
    Image.new("L", (5, 4)).save(tmp_path / "more" / "c.png")
    return tmp_path


FIT = Fit((4, 5, 1))


def test_a_folder_gives_what_can_be_used_and_names_the_rest(folder, caplog):
    loaded = load_pictures(folder, FIT, num_levels=256)
    assert loaded.names == ("a.png", "b.png")
    np.testing.assert_array_equal(loaded.to_levels(256), np.stack([np.full((4, 5, 1), v) for v in (200, 100)]))
    assert loaded.source == str(folder)
    assert set(loaded.skipped) == {"broken.jpg", "colour.png", "cut.png", "notes.txt", "square.png"}
    for name, reason in {"broken.jpg": "cannot be read: ", "square.png": "5x5 pixels", "notes.txt": ".png"}.items():
        assert reason in loaded.skipped[name]
        assert f"{folder / name} is left out: " in caplog.text


def test_a_limit_counts_pictures_that_can_be_used(folder):
    assert load_pictures(folder, FIT, num_levels=256, limit=1).names == ("a.png",)
    assert load_pictures(folder / "b.png", FIT, num_levels=256, limit=3).names == ("b.png",)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "none",
            UserError,
            r"restore.images='.*none' does not exist; give a picture, a folder or an .npz file",
        ),
        ("empty", ValueError, "empty' is a folder without files; put pictures in it"),
        ("square.png", ValueError, "no picture that can be used: square.png: it has 5x5 pixels"),
        ("broken.jpg", ValueError, "no picture that can be used: broken.jpg: it cannot be read: "),
        (
            "notes.txt",
            ValueError,
            "notes.txt: neither its name nor its content is that of a picture; expected .png, .jpg",
        ),
        (
            "bad",
            ValueError,
            "bad' has no picture that can be used: 0.png: .*; 4.png: it cannot be read: .*; and 2 more",
        ),
    ],
)
def test_nothing_to_use_is_an_error(folder, path, error, message):
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    for index in range(7):
        (folder / "bad" / f"{index}.png").write_bytes(b"damaged")
    with pytest.raises(error, match=message):
        load_pictures(folder / path, FIT, num_levels=256)


def test_levels_of_a_file_of_arrays_come_back(tmp_path):
    levels = GENERATOR.integers(0, 17, (3, 4, 5, 1), dtype=np.uint8)
    np.savez(tmp_path / "drawn.npz", samples=levels)
    loaded = load_pictures(tmp_path / "drawn.npz", FIT, num_levels=17, limit=2)
    assert loaded.names == ("drawn_0", "drawn_1")
    np.testing.assert_array_equal(loaded.to_levels(17), levels[:2])
    np.savez(tmp_path / "none.npz", images=levels[:0])
    with pytest.raises(ValueError, match=r"none.npz has no images"):
        load_pictures(tmp_path / "none.npz", FIT, num_levels=17)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_eight_bits_become_the_nearest_level(tmp_path, num_levels):
    """All 256 values, against the nearest of the levels spread from 0 to 255; and levels as PNG come back."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "all.png")
    loaded = load_pictures(tmp_path / "all.png", Fit((16, 16, 1)), num_levels=num_levels)
    places = np.arange(num_levels) * 255 / (num_levels - 1)
    nearest = np.abs(np.arange(256)[:, None] - places[None]).argmin(axis=1)
    np.testing.assert_array_equal(loaded.to_levels(num_levels).ravel(), nearest)
    np.testing.assert_array_equal(nearest[np.floor(places + 0.5).astype(int)], np.arange(num_levels))


def test_a_file_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    """Whatever its name; root may read everything."""
    good = np.zeros((4, 4, 3), np.uint8)
    for name in ("a.png", "b.png", "c"):
        Image.fromarray(good).save(tmp_path / name, format="PNG")
    read = untrusted.read_content

    def refuse(path):
        if not str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(untrusted, "read_content", refuse)
    pictures = load_pictures(tmp_path, Fit((4, 4, 3)), num_levels=256)
    assert pictures.names == ("a.png",)
    assert pictures.skipped == dict.fromkeys(("b.png", "c"), "it cannot be read: Permission denied")
