"""Measurements of images: each operator's functions against its own dense matrix, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from configs import base
from controllable_generation import build_operator, from_functions, operators
from controllable_generation.masks import read_mask
from errors import UserError

SHAPE = (6, 4, 3)
NAMES = {
    "half": {"operator": "inpaint", "mask": "right"},
    "random": {"operator": "inpaint", "mask": "random:0.4"},
    "colorize": {"operator": "colorize"},
    "box": {"operator": "super_resolution"},
    "bicubic": {"operator": "super_resolution", "downsampling": "bicubic"},
    "gaussian_blur": {"operator": "gaussian_blur", "blur_std": 0.7},
    "motion_blur": {"operator": "motion_blur", "blur_length": 3.0, "blur_angle": 30.0},
    "fourier": {"operator": "fourier", "fourier_share": 0.7},
}


def build(shape=SHAPE, **settings):
    config = base.get_config()
    config.restore.update(settings)
    return build_operator(config, shape)


def dense(function, num_inputs, shape):
    """The matrix of a linear function of a batch, a column for each unit vector."""
    return np.asarray(function(jnp.eye(num_inputs).reshape(num_inputs, *shape))).reshape(num_inputs, -1).T


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    operator = build(**NAMES[request.param])
    with jax.enable_x64(True):
        matrix = dense(operator.apply, int(np.prod(SHAPE)), SHAPE)
    return request.param, operator, matrix


def test_transpose_is_the_matrix_transposed(case):
    _, operator, matrix = case
    with jax.enable_x64(True):
        transposed = dense(operator.transpose, len(matrix), operator.measurement_shape)
    np.testing.assert_allclose(transposed, matrix.T, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.3, 0.2)])
def test_solves_with_the_gram_matrix(case, a, b):
    name, operator, matrix = case
    with jax.enable_x64(True):
        v = np.random.default_rng(0).standard_normal((len(matrix), 2))
        v = v * np.broadcast_to(operator.measured, operator.measurement_shape).reshape(-1, 1)
        v = v if b else matrix @ matrix.T @ v  # on the range of A
        coefficients = jnp.full(2, a), jnp.full(2, b)
        u = operator.solve(jnp.asarray(v.T.reshape(2, *operator.measurement_shape)), *coefficients)
    expected = np.linalg.pinv(a * matrix @ matrix.T + b * np.eye(len(matrix)), rcond=1e-9) @ v
    np.testing.assert_allclose(np.asarray(u).reshape(2, -1).T, expected, atol=2e-7 if name == "bicubic" else 1e-10)


def test_pseudo_inverse_is_the_dense_one(case):
    _, operator, matrix = case
    y = matrix @ np.random.default_rng(1).standard_normal((matrix.shape[1], 1))
    x = np.asarray(operator.pseudo_inverse(jnp.asarray(y.T.reshape(1, *operator.measurement_shape), jnp.float32)))
    np.testing.assert_allclose(x.reshape(-1, 1), np.linalg.pinv(matrix, rcond=1e-5) @ y, atol=2e-5)


def test_says_what_is_measured_and_whether_white_noise_stays_white(case):
    name, operator, matrix = case
    measured = np.broadcast_to(operator.measured, operator.measurement_shape).ravel()
    assert operator.num_measured == measured.sum()
    assert not np.abs(matrix[measured == 0]).any()
    if name != "fourier":  # a real image has no imaginary part at frequencies that are their own opposites
        assert np.abs(matrix[measured == 1]).sum(axis=1).all()
    gram = (matrix @ matrix.T)[measured == 1][:, measured == 1]
    # On the range of A: its eigenvalues are 0 (opposite frequencies of a real image say the same) or all alike.
    eigenvalues = np.linalg.eigvalsh(gram)
    eigenvalues = eigenvalues[eigenvalues > 1e-6]
    assert operator.is_orthogonal == (np.ptp(eigenvalues) < 1e-6)


def test_blurs_are_those_of_scipy():
    x = np.random.default_rng(2).standard_normal((1, 8, 6, 2)).astype(np.float32)
    blurred = build((8, 6, 2), operator="gaussian_blur", blur_std=1.3).apply(x)
    np.testing.assert_allclose(blurred[0, ..., 1], scipy.ndimage.gaussian_filter(x[0, ..., 1], 1.3), atol=1e-6)
    moved = build((8, 6, 2), operator="motion_blur", blur_length=3.0, blur_angle=90.0).apply(x)
    kernel = operators._motion_kernel(3.0, 90.0)
    np.testing.assert_allclose(moved[0, ..., 0], scipy.ndimage.convolve(x[0, ..., 0], kernel, mode="wrap"), atol=1e-6)
    column = kernel[:, kernel.shape[1] // 2]
    assert kernel.sum() == pytest.approx(column.sum())  # straight up
    np.testing.assert_allclose(np.arange(len(column)) @ column, len(column) // 2)  # and centred
    still = build((8, 6, 2), operator="motion_blur", blur_length=1.0).apply(x)
    np.testing.assert_allclose(still, x, atol=1e-6)


def test_shrinks_like_pillow():
    x = np.random.default_rng(3).uniform(0, 1, (1, 8, 8, 1)).astype(np.float32)
    expected = np.asarray(Image.fromarray(x[0, ..., 0]).resize((4, 4), Image.Resampling.BICUBIC))
    bicubic = build((8, 8, 1), operator="super_resolution", downsampling="bicubic")
    np.testing.assert_allclose(bicubic.apply(x)[0, ..., 0], expected, atol=1e-6)
    expected = x[0].reshape(4, 2, 4, 2).mean((1, 3))
    np.testing.assert_allclose(build((8, 8, 1), operator="super_resolution").apply(x)[0, ..., 0], expected, atol=1e-6)


def test_fourier_measures_the_low_lines_and_some_others():
    operator = build((8, 16, 1), operator="fourier", fourier_share=0.5, fourier_center=0.25)
    lines = np.broadcast_to(operator.measured, operator.measurement_shape)[0, 0, :, 0]
    assert lines.sum() == 8
    assert lines[[0, 1, -1, 2]].all()  # a quarter of 16 lines; of the two fourth ones the positive
    x = np.random.default_rng(4).standard_normal((1, 8, 16, 1))
    spectrum = np.fft.fft2(x[0, ..., 0]) / np.sqrt(8 * 16)
    y = np.asarray(operator.apply(jnp.asarray(x, jnp.float32)))[0, ..., 0]
    np.testing.assert_allclose(y[0] + 1j * y[1], spectrum * lines[None], atol=1e-5)


# --- one's own -------------------------------------------------------------------------------------------------------


def test_a_pair_of_functions_is_an_operator():
    known = build(operator="gaussian_blur", blur_std=0.7)
    own = from_functions(known.apply, known.transpose, SHAPE)
    v = known.apply(jnp.asarray(np.random.default_rng(5).standard_normal((2, *SHAPE)), jnp.float32))
    a, b = jnp.array([1.0, 0.5]), jnp.array([0.1, 0.3])
    np.testing.assert_allclose(own.solve(v, a, b), known.solve(v, a, b), rtol=1e-3, atol=1e-4)
    assert own.measurement_shape == known.measurement_shape
    with pytest.raises(ValueError, match=r"transpose is not apply's: <A x, y> = .*, but <x, A\^T y> = "):
        from_functions(known.apply, lambda y: 2 * known.transpose(y), SHAPE)
    with pytest.raises(ValueError, match="apply is not linear"):
        from_functions(lambda x: x**2, known.transpose, SHAPE)
    with pytest.raises(ValueError, match=r"transpose makes images of shape \(3, 4, 3\); expected \(6, 4, 3\)"):
        from_functions(known.apply, lambda y: y[:, :3], SHAPE)


def test_an_operator_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from controllable_generation import from_functions\n"
        "def negative(image_shape):\n    return from_functions(lambda x: -x, lambda y: -y, image_shape)\n"
        "def number(image_shape):\n    return 3\n"
    )
    x = jnp.ones((1, *SHAPE))
    np.testing.assert_array_equal(build(operator=f"{path}:negative").apply(x), -x)
    for name in ("number", "missing"):
        with pytest.raises(ValueError, match=r"expected a function of .*mine.py that returns an Operator"):
            build(operator=f"{path}:{name}")
    with pytest.raises(ValueError, match=r"none.py is not a file; expected FILE.py:FUNCTION"):
        build(operator="none.py:f")


# --- masks and refusals ----------------------------------------------------------------------------------------------


def test_masks(tmp_path):
    def hidden(setting, shape=(4, 6, 2), seed=0):
        mask = read_mask(setting, shape, seed)
        assert mask.shape == shape
        assert (mask == mask[..., :1]).all()
        return 1 - mask[..., 0]

    halves = {"top": np.s_[:2], "bottom": np.s_[2:], "left": np.s_[:, :3], "right": np.s_[:, 3:]}
    for name, where in (*halves.items(), ("box:1,2,2,3", np.s_[1:3, 2:5])):
        expected = np.zeros((4, 6))
        expected[where] = 1
        np.testing.assert_array_equal(hidden(name), expected)
    assert hidden("random:0.25").sum() == 6
    np.testing.assert_array_equal(hidden("random:0.25"), hidden("random:0.25"))
    assert (hidden("random:0.25") != hidden("random:0.25", seed=1)).any()
    picture = np.zeros((4, 6), np.uint8)
    picture[1, 2] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(hidden(str(tmp_path / "mask.png")), picture / 255)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"operator": "unblur"}, ValueError, "restore.operator='unblur' is unknown; known: colorize"),
        ({"mask": ""}, ValueError, "restore.mask is empty; set it to a half"),
        ({"mask": "box:1,2,3"}, ValueError, "expected box:TOP,LEFT,HEIGHT,WIDTH, four whole numbers"),
        ({"mask": "box:5,0,2,2"}, ValueError, "is empty or not inside the image of 6x4 pixels"),
        ({"mask": "box:0,0,6,4"}, ValueError, "hides everything; expected a part"),
        ({"mask": "random:1.5"}, ValueError, r"expected the fraction of pixels to be drawn, in \(0, 1\)"),
        ({"mask": "middle"}, UserError, "restore.mask='middle': no such file; expected a half"),
        ({"operator": "super_resolution", "factor": 4}, ValueError, "restore.factor=4: expected a divisor"),
        (
            {"operator": "super_resolution", "downsampling": "area"},
            ValueError,
            "restore.downsampling='area' is unknown",
        ),
        ({"operator": "gaussian_blur", "blur_std": 0.0}, ValueError, "restore.blur_std=0.0: expected a positive"),
        ({"operator": "motion_blur", "blur_length": 0.5}, ValueError, "restore.blur_length=0.5: expected 1 or more"),
        (
            {"operator": "fourier", "fourier_share": 0.0},
            ValueError,
            "restore.fourier_share=0.0: expected more than 0",
        ),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        build(**settings)


def test_bad_masks_and_grey_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png' has 3x3 pixels; expected 6x4, as the images"):
        build(mask=str(tmp_path / "small.png"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png' is not a picture that can be read"):
        build(mask=str(tmp_path / "broken.png"))
    with pytest.raises(ValueError, match="images have 1 channel and are grey already"):
        build((6, 4, 1), operator="colorize")
