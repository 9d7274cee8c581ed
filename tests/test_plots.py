"""Pictures by their pixels: against grids of the 2021 code, and against what a curve must show."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report import plots
from storage.files import write_bytes

GOLDEN = Path(__file__).parent / "golden" / "save_image.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return dict(stored)


def read_png(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


class TestGrid:
    @pytest.mark.parametrize(
        ("case", "options"),
        [
            ("nrow8_pad2", {"num_columns": 8}),
            ("nrow2_pad2", {"num_columns": 2}),
            ("nrow3_pad0", {"num_columns": 3, "padding": 0}),
        ],
    )
    def test_is_that_of_the_2021_code(self, golden, case, options):
        np.testing.assert_array_equal(plots.image_grid(golden["images"], **options), golden[case])

    def test_of_grey_images_is_that_of_the_2021_code(self, golden):
        grid = plots.image_grid(golden["images"][..., :1], num_columns=2, padding=1, pad_value=0.5)
        np.testing.assert_array_equal(grid, golden["gray_nrow2_pad1_padvalue0.5"])

    def test_of_levels_is_enlarged_so_that_it_can_be_seen(self):
        levels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1) % 17
        grid = plots.grid_of_levels(levels, 17)
        assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # 3 columns of 8 pixels drawn 4 times larger
        for index, image in enumerate(levels):
            top, left = 2 + 34 * (index // 3), 2 + 34 * (index % 3)
            shown = grid[top : top + 32, left : left + 32]
            expected = np.floor(image[..., 0] / 16 * 255 + 0.5)
            for row, column in np.ndindex(4, 4):
                np.testing.assert_array_equal(shown[row::4, column::4, 1], expected)
        assert (grid[:2] == 128).all()
        assert (grid[36:, 70:] == 128).all()  # no sixth image

    def test_of_large_images_keeps_their_size(self):
        grid = plots.grid_of_levels(np.zeros((4, 32, 40, 3), np.uint8), 256, num_columns=4)
        assert grid.shape == (36, 4 * 42 + 2, 3)

    def test_any_number_of_channels_can_be_seen(self):
        image = np.array([[[255, 0, 40, 51, 7, 9]]], np.uint8)
        shown = {C: plots.to_rgb(image[..., :C]).ravel().tolist() for C in (1, 2, 3, 4, 6)}
        opaque = 51 / 255
        on_white = [round(255 * (opaque * v / 255 + 1 - opaque)) for v in (255, 0, 40)]
        assert shown == {1: [255] * 3, 2: [255] * 3, 3: [255, 0, 40], 4: on_white, 6: [255, 0, 40]}

    def test_transparency_survives_a_png_file(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
        for image in (images, images[..., :2]):
            plots.save_png(tmp_path / "image.png", image)
            with Image.open(tmp_path / "image.png") as stored:
                np.testing.assert_array_equal(np.asarray(stored), image)

    def test_survives_a_png_file(self, tmp_path, golden):
        path = tmp_path / "new" / "grid.png"
        plots.save_png(path, golden["nrow2_pad2"])
        np.testing.assert_array_equal(read_png(path), golden["nrow2_pad2"])
        assert [file.name for file in path.parent.iterdir()] == ["grid.png"]  # no temporary file is left

    def test_side_by_side_keeps_the_pixels_of_both(self):
        rng = np.random.default_rng(0)
        samples, real = (rng.integers(0, 17, (n, 8, 8, 1)).astype(np.uint8) for n in (20, 9))
        picture = plots.samples_beside_real(samples, real, 17, num_images=16)
        top = plots.CAPTION_PIXELS
        grids = [plots.grid_of_levels(levels[:9], 17) for levels in (real, samples)]
        height, width = grids[0].shape[:2]
        np.testing.assert_array_equal(picture[top : top + height, :width], grids[0])
        np.testing.assert_array_equal(picture[top:, width + 16 :], grids[1])
        assert (picture[top:, width : width + 16] == 255).all()
        for left in (0, width + 16):  # the captions are there: black on white
            caption = picture[:top, left : left + width]
            assert caption.min() < 50
            assert (caption == 255).mean() > 0.5

    def test_upscale_repeats_pixels(self):
        image = np.arange(6).reshape(2, 3, 1)
        np.testing.assert_array_equal(plots.upscale(image, 2)[..., 0], np.kron(image[..., 0], np.ones((2, 2), int)))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: plots.image_grid(np.zeros((0, 8, 8, 1))), r"images have shape \(0, 8, 8, 1\); expected"),
            (lambda: plots.png_bytes(np.zeros((8, 8, 5), np.uint8)), "an image has 5 channels; a PNG can have 1 to 4"),
            (lambda: plots.image_grid(np.zeros((1, 8, 8, 1)), num_columns=0), "num_columns=0, padding=2; expected"),
            (lambda: plots.to_uint8(np.zeros(3, np.int64)), "images have type int64; expected uint8, or float"),
            (lambda: plots.to_uint8(np.array([0.5, np.nan])), "NaN or infinite; the sampler diverged"),
            (lambda: plots.levels_to_uint8(np.array([17], np.uint8), 17), "level 17 is not below num_levels=17"),
            (lambda: plots.upscale(np.zeros((1, 1, 1)), 0), "factor=0; expected 1 or more"),
        ],
    )
    def test_bad_images_are_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestLosses:
    def test_are_read_without_a_line_that_is_still_being_written(self, tmp_path):
        path = tmp_path / "losses.jsonl"
        records = [{"step": 50, "loss": 2.0}, {"step": 100, "loss": 1.0, "eval_loss": 1.5}]
        path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 150, "lo')
        assert plots.read_losses(path) == records

    def test_a_damaged_line_is_named(self, tmp_path):
        path = tmp_path / "losses.jsonl"
        for damaged in ("{broken\n", "3\n", '{"loss": 1.0}\n'):
            path.write_text('{"step": 1, "loss": 1.0}\n' + damaged)
            with pytest.raises(ValueError, match=r"losses.jsonl, line 2, is not a record of a step"):
                plots.read_losses(path)

    def test_curve_shows_both_losses_at_their_steps_and_leaves_out_what_is_not_finite(self):
        records = [
            {"step": 10, "loss": 3.0},
            {"step": 20, "loss": float("nan"), "eval_loss": 2.5},
            {"step": 30, "loss": 1.0, "eval_loss": None},
        ]
        (axes,) = plots.loss_figure(records).axes
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert curves == {"training": [[10, 3], [30, 1]], "test images": [[20, 2.5]]}
        assert axes.get_yscale() == "log"
        negative = plots.loss_figure([{"step": 1, "loss": -1.0}, {"step": 2, "loss": 2.0}]).axes[0]
        assert negative.get_yscale() == "linear"

    def test_curve_needs_a_loss(self):
        with pytest.raises(ValueError, match="no record has a finite loss; train first"):
            plots.loss_figure([{"step": 1, "loss": float("inf")}])


class TestMetricFigure:
    def test_shows_values_bars_and_level(self):
        figure = plots.metric_figure(
            [2000, 1000, 3000], [2.0, 5.0, None], [0.5, None, None], label="FD", level=1.5, level_label="floor"
        )
        (axes,) = figure.axes
        (bars,) = axes.containers
        line, _, (segments,) = bars.lines
        assert line.get_xydata().tolist() == [[1000, 5.0], [2000, 2.0]]
        assert [segment.tolist() for segment in segments.get_segments()] == [
            [[1000, 5.0], [1000, 5.0]],
            [[2000, 1.5], [2000, 2.5]],
        ]
        (level,) = [line for line in axes.lines if line.get_label() == "floor"]
        assert set(level.get_ydata()) == {1.5}
        assert axes.get_ylabel() == "FD"

    def test_is_drawn_to_a_file(self, tmp_path):
        figure = plots.metric_figure([1, 2], [2.0, 3.0], [0.1, 0.1], label="FD")
        write_bytes(tmp_path / "curve.png", plots.figure_bytes(figure))
        picture = read_png(tmp_path / "curve.png")
        assert picture.shape == (440, 770, 3)
        blue = (np.abs(picture.astype(int) - [31, 119, 180]) < 8).all(axis=2)  # matplotlib's first colour
        assert 200 < blue.sum() < 20_000
        np.testing.assert_array_equal(picture, np.array(Image.open(io.BytesIO(plots.figure_bytes(figure))))[..., :3])

    def test_needs_a_value(self):
        with pytest.raises(ValueError, match="no checkpoint has a value of FD; evaluate with that metric enabled"):
            plots.metric_figure([1], [None], [None], label="FD")


CURVES = {
    "fast": [
        {"nfe": 10, "seconds": 1.0, "fd": (2.0, 0.5), "kid": (0.02, 0.01)},
        {"nfe": 20, "seconds": 2.5, "fd": (1.0, None), "kid": (-0.01, 0.01)},
    ],
    "slow": [{"nfe": 300, "seconds": 40.0, "fd": (0.5, 0.1), "kid": (None, None)}],
}


class TestTradeoffFigure:
    def draw(self, curves=None):
        figure = plots.tradeoff_figure(
            CURVES if curves is None else curves,
            costs={"nfe": "evaluations", "seconds": "time"},
            qualities={"fd": "FD", "kid": "KID"},
            floors={"fd": (0.4, 0.2), "kid": (0.001, 0.004)},
            floor_label="floor",
        )
        return np.array(figure.axes).reshape(2, 2)

    def test_shows_each_quality_against_each_cost(self):
        for panels, quality in zip(self.draw(), ("fd", "kid"), strict=True):
            for axes, cost in zip(panels, ("nfe", "seconds"), strict=True):
                for container in axes.containers:
                    points = [
                        (point[cost], *point[quality])
                        for point in CURVES[container.get_label()]
                        if point[quality][0] is not None
                    ]
                    line, _, (bars,) = container.lines
                    assert line.get_xydata().tolist() == [[x, y] for x, y, _ in points]
                    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
                    expected = [[y - (stderr or 0), y + (stderr or 0)] for _, y, stderr in points]
                    np.testing.assert_allclose(ends, expected)
        assert [len(axes.containers) for axes in self.draw().flat] == [2, 2, 1, 1]

    def test_floors_are_dashed_lines_and_scales_fit_the_values(self):
        (fd, fd_time), (kid, kid_time) = self.draw()
        for axes, floor in ((fd, 0.4), (fd_time, 0.4), (kid, 0.001), (kid_time, 0.001)):
            [line] = [line for line in axes.lines if line.get_linestyle() == "--"]
            assert set(line.get_ydata()) == {floor}
            assert axes.get_xscale() == "log"
        assert (fd.get_yscale(), kid.get_yscale()) == ("log", "symlog")  # KID may be negative
        assert (fd.get_ylabel(), kid.get_ylabel()) == ("FD", "KID")
        assert (kid.get_xlabel(), kid_time.get_xlabel()) == ("evaluations", "time")
        assert [text.get_text() for text in fd.figure.legends[0].get_texts()] == ["floor", "fast", "slow"]

    def test_a_curve_keeps_its_look_in_every_panel_and_differs_from_the_others(self):
        many = {f"sampler {index}": CURVES["fast"] for index in range(14)}
        looks = [
            [(line.get_color(), line.get_marker(), line.get_linestyle()) for line, _, _ in axes.containers]
            for axes in self.draw(many).flat
        ]
        assert looks[0] == looks[1] == looks[2] == looks[3]
        assert len(set(looks[0])) == 14

    def test_one_point_has_room_around_it(self):
        axes = self.draw({"one": [{"nfe": 100, "seconds": 10.0, "fd": (1.0, 0.1), "kid": (0.1, 0.01)}]})[0, 0]
        assert axes.get_xlim() == (80, 125)
        assert plots.figure_bytes(axes.figure)

    def test_needs_a_point(self):
        with pytest.raises(ValueError, match="there is no point to draw"):
            self.draw({"fast": []})
