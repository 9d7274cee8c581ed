"""The mode "encode": images to latents and back, the reconstruction error, interpolated and rescaled latents."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Num, UInt8
from ml_collections import ConfigDict

import datasets
from configs.settings import flatten
from errors import UserError
from experiment import drawing
from experiment.build import Experiment, open_experiment
from latents import build_codec, compare_with_prior, scale_temperature, slerp
from metrics.metric import Metric, make_metric, mean_metric
from parallel import distributed
from report import number_text, plots
from solvers import ode
from sources.npz import load_npz
from storage import files
from workdir import folder as workdirs
from workdir import locks, results
from workdir.progress import track

WEIGHTS = tuple(i / 8 for i in range(9))  # of interpolations between two images
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
NUM_SHOWN = 64  # images in the picture of reconstructions
NUM_IMAGES = 16  # without --num_images
NUM_ROWS = 8  # rows of the other pictures
SUMMARY_FILE = "encode.json"  # written last: if it exists, the other files are of the same run
LATENTS_FILE = "latents.npz"
PICTURES = ("reconstruction.png", "interpolation.png", "temperature.png")

# (replicated params, batch of all hosts) -> arrays by name, a row for each example
Program = Callable[[Any, np.ndarray], dict[str, np.ndarray]]


def _on_devices(fn: Callable[[Any, Array], dict[str, Array]]) -> Program:
    """Compile a function of a batch for all devices."""
    program = distributed.pmap(fn)

    def run(params: Any, batch: np.ndarray) -> dict[str, np.ndarray]:
        outputs = program(params, distributed.shard(distributed.host_share(batch)))
        return {name: distributed.gather(output) for name, output in outputs.items()}

    return run


def build_encoding_program(experiment: Experiment) -> Program:
    """Compile the encoder: (replicated params, levels [B, H, W, C]) -> {"x", "latents", "nfe": [B]}.

    `x` is the middle of the image's levels in the network's range, without noise: the latent depends on nothing else.
    """
    codec = build_codec(experiment.config, experiment.sde)

    def encode(params: Any, levels: UInt8[Array, "B H W C"]) -> dict[str, Array]:
        x = experiment.scaler.middle(levels)
        latents, nfe = codec.encode(experiment.score_fn(params, smooth=True), x)
        return {"x": x, "latents": latents, "nfe": jnp.broadcast_to(nfe, len(x))}

    return _on_devices(encode)


def build_decoding_program(experiment: Experiment) -> Program:
    """Compile the decoder: (replicated params, latents) -> {"x": in the network's range, "levels", "nfe": [B]}."""
    codec = build_codec(experiment.config, experiment.sde)

    def decode(params: Any, latents: Float[Array, "B H W C"]) -> dict[str, Array]:
        x, nfe = codec.decode(experiment.score_fn(params, smooth=True), latents)
        return {"x": x, "levels": experiment.scaler.to_levels(x), "nfe": jnp.broadcast_to(nfe, len(x))}

    return _on_devices(decode)


def run_in_batches(
    program: Program, params: Any, array: Num[np.ndarray, "N ..."], *, batch_size: int, name: str
) -> dict[str, np.ndarray]:
    """Apply a program to all rows of an array in batches of one size, which the devices divide.

    Pads the last batch with the first row. `name` is for the progress log and the error.

    Raises:
      SolverError: if the integration of a row failed.
    """
    parts = []
    for start in track(range(0, len(array), batch_size), name):
        rows = array[start : start + batch_size]
        padded = np.concatenate([rows, np.repeat(array[:1], batch_size - len(rows), axis=0)])
        parts.append({key: value[: len(rows)] for key, value in program(params, padded).items()})
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    ode.require_solved(joined["latents" if "latents" in joined else "x"], name)
    return joined


def load_images(
    experiment: Experiment, num_images: int, path: Path | None = None
) -> tuple[UInt8[np.ndarray, "N H W C"], str]:
    """Return the levels of the first images of an .npz file or, without one, the test split; and their name.

    Raises:
      UserError: if the file is missing, has fewer images, or others than the network was trained on.
    """
    if num_images < 1:
        raise UserError(f"num_images={num_images}; expected 1 or more")
    config = experiment.config
    source: datasets.Source
    if path is None:
        source, name = datasets.build_source(config, "test"), f"the test split of {config.data.dataset}"
    else:
        source, name = load_npz(path, experiment.image_shape, experiment.scaler.num_levels), str(path)
    if num_images > len(source):
        raise UserError(f"num_images={num_images}, but {name} has {len(source)} images; ask for at most that many")
    return source.images(np.arange(num_images)), name


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images, their latents, and the decoded images of these and of interpolated and rescaled latents."""

    levels: np.ndarray  # uint8[N, H, W, C]
    x: np.ndarray  # the images in the network's range, float32[N, H, W, C]
    latents: np.ndarray  # float32[N, H, W, C]
    x_decoded: np.ndarray  # the reconstructions in the network's range, float32[N, H, W, C]
    reconstruction: np.ndarray  # their levels, uint8[N, H, W, C]
    interpolation: np.ndarray  # levels between images 2 k and 2 k + 1, uint8[K, weights, H, W, C]; K may be 0
    temperature: np.ndarray  # levels of the first images' latents, scaled, uint8[R, temperatures, H, W, C]
    nfe: dict[str, int]  # to "encode" and to "decode": score evaluations of the slowest image

    def errors(self, bin_width: float) -> dict[str, Float[np.ndarray, "N"]]:
        """Return the reconstruction errors of each image; `bin_width` is a level's width in the network's range."""
        difference = self.x_decoded.astype(np.float64) - self.x
        axes = (1, 2, 3)
        rms = np.sqrt(np.mean(difference**2, axis=axes))
        return {
            "rms": rms,
            "rms_levels": rms / bin_width,
            "max_levels": np.abs(difference).max(axis=axes) / bin_width,
            "unchanged": (self.reconstruction == self.levels).mean(axis=axes),
        }


def encode_and_decode(experiment: Experiment, params: Any, levels: UInt8[np.ndarray, "N H W C"]) -> Encoded:
    """Encode images with replicated parameters; decode their latents, interpolated and rescaled ones.

    Raises:
      SolverError: if an integration failed.
    """
    # One batch size for everything, so that each program is compiled once.
    size = min(experiment.config.eval.batch_size, distributed.round_up(len(levels)))
    run = functools.partial(run_in_batches, params=params, batch_size=size)
    decode = build_decoding_program(experiment)
    encoded = run(build_encoding_program(experiment), array=levels, name="encoding")
    latents = encoded["latents"]
    decoded = run(decode, array=latents, name="decoding")

    pairs = min(len(latents) // 2, NUM_ROWS)
    between = slerp(latents[: 2 * pairs : 2], latents[1 : 2 * pairs : 2], WEIGHTS)
    scaled = scale_temperature(latents[:NUM_ROWS], TEMPERATURES)
    changed = np.concatenate([group.reshape(-1, *latents.shape[1:]) for group in (between, scaled)])
    drawn = run(decode, array=changed, name="decoding interpolated and rescaled latents")["levels"]
    return Encoded(
        levels=levels,
        x=encoded["x"],
        latents=latents,
        x_decoded=decoded["x"],
        reconstruction=decoded["levels"],
        interpolation=drawn[: pairs * len(WEIGHTS)].reshape(between.shape),
        temperature=drawn[pairs * len(WEIGHTS) :].reshape(scaled.shape),
        nfe={"encode": int(encoded["nfe"].max()), "decode": int(decoded["nfe"].max())},
    )


def measure(encoded: Encoded, scaler: datasets.Scaler) -> tuple[Metric, ...]:
    """Return the reconstruction errors: their means over the images with standard errors, and the largest."""
    errors = encoded.errors(scaler.bin_width)
    num_images, network_range = len(encoded.levels), "-1..1" if scaler.centered else "0..1"

    def mean(name: str, values: Float[np.ndarray, "N"], unit: str) -> Metric:
        if num_images == 1:
            return make_metric(name, values[0], np.nan, 1, unit=unit)
        return mean_metric(name, values, unit=unit)

    return (
        mean("reconstruction_rms", errors["rms"], f"of the network's range {network_range}"),
        mean("reconstruction_rms_levels", errors["rms_levels"], "grey levels"),
        make_metric("reconstruction_max_levels", errors["max_levels"].max(), np.nan, num_images, unit="grey levels"),
        mean("unchanged_levels", errors["unchanged"], "share of values"),
    )


def _draw(encoded: Encoded, num_levels: int) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Draw the pictures, by file name; interpolations need two images."""

    def columns(images: np.ndarray, names: list[str]) -> UInt8[np.ndarray, "h w 3"]:
        grids = {name: plots.grid_of_levels(images[:, i], num_levels, num_columns=1) for i, name in enumerate(names)}
        return plots.side_by_side(grids, gap=0)

    grids = {"images": encoded.levels, "reconstructions": encoded.reconstruction}
    shown = {caption: plots.grid_of_levels(levels[:NUM_SHOWN], num_levels) for caption, levels in grids.items()}
    pictures = {"reconstruction.png": plots.side_by_side(shown)}
    if len(encoded.interpolation):
        names = [f"{weight:g}".removeprefix("0") or "0" for weight in WEIGHTS]
        pictures["interpolation.png"] = columns(encoded.interpolation, names)
    with_images = np.concatenate([encoded.levels[: len(encoded.temperature), None], encoded.temperature], axis=1)
    pictures["temperature.png"] = columns(with_images, ["image", *(f"{t:.1f}" for t in TEMPERATURES)])
    return pictures


def _write(folder: Path, encoded: Encoded, summary: dict[str, Any], scaler: datasets.Scaler) -> None:
    """Replace the files of an earlier encoding, the summary last; log the summary.

    All new files are complete before the first old one is touched: a full disk costs no result.
    """
    fields = ("levels", "latents", "reconstruction", "interpolation", "temperature")
    arrays = {name: getattr(encoded, name) for name in fields} | encoded.errors(scaler.bin_width)
    arrays |= {f"nfe_{direction}": np.asarray(nfe) for direction, nfe in encoded.nfe.items()}
    arrays |= {"weights": np.asarray(WEIGHTS), "temperatures": np.asarray(TEMPERATURES)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        new = Path(temporary)
        files.write_atomically(new / LATENTS_FILE, lambda file: np.savez(file, **arrays))
        for name, picture in _draw(encoded, scaler.num_levels).items():
            plots.save_png(new / name, picture)
        files.write_json(new / SUMMARY_FILE, summary)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)
        for name in (LATENTS_FILE, *PICTURES, SUMMARY_FILE):
            if (new / name).exists():
                (new / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)

    checkpoint, images, nfe = summary["checkpoint"], summary["images"], summary["nfe"]
    rms, rms_levels, largest, unchanged = (number_text(m["value"], m["stderr"]) for m in summary["metrics"])
    logging.info(
        "checkpoint %d (step %d): encoded %d image(s) of %s in %d network evaluations, decoded them in %d",
        *(checkpoint["number"], checkpoint["step"], images["count"], images["source"], nfe["encode"], nfe["decode"]),
    )
    logging.info("reconstruction error: %s rms %s", rms, summary["metrics"][0]["unit"])
    logging.info(
        "  in grey levels: %s rms, %s at most; fraction of unchanged levels: %s", rms_levels, largest, unchanged
    )
    logging.info("latents, in units of the prior's standard deviation:")
    for name, c in summary["latents"].items():
        expected = number_text(c["expected"], c["stderr"])
        logging.info("  %-16s %.3g; expected of draws from the prior: %s", name, c["value"], expected)
    logging.info("pictures, %s and %s are in %s", LATENTS_FILE, SUMMARY_FILE, folder)


def _warn_of_discrete(experiment: Experiment) -> None:
    """Warn that the flow of a discretely trained network is approximate."""
    if experiment.config.training.continuous:
        return
    if experiment.sde.interpolates_levels:
        logging.warning(
            "the network was trained at %d noise levels; the flow also uses times between them", experiment.sde.N
        )
    else:
        logging.warning(
            "the network knows only the %d noise levels of its training: its flow is a staircase in time, which takes "
            "the solver many steps and can be inverted only roughly",
            experiment.sde.N,
        )


def encode(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    snapshot: int = 0,
    num_images: int = 0,
    images: str = "",
) -> None:
    """Encode images through the probability-flow ODE, decode them, and interpolate and rescale their latents.

    Writes latents.npz, three pictures and the summary encode.json once everything is computed; replaces results of the
    same settings.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "encode".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: images, the first ones of the test split or of the file; 0: 16.
      images: .npz file of uint8[N, H, W, C] named "samples" or "images"; empty: the test split.

    Raises:
      UserError: if a setting is wrong, or there are fewer images of the right shape.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
      SolverError: if an integration failed.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config, sde = experiment.config, experiment.sde
    folder = workdirs.output_folder(workdir, output or "encode")
    distributed.check_batch_size("eval.batch_size", config.eval.batch_size)
    levels, source = load_images(experiment, num_images or NUM_IMAGES, Path(images) if images else None)
    content = files.content_hash(levels)
    distributed.require_same({"content of the images": content})
    restored = drawing.restore(experiment, workdir, snapshot)
    with locks.hold(folder, "--output"):
        arguments = folder, config, ("latents",), restored.params
        open_folder = functools.partial(results.open_folder, *arguments, flag="--output")
        if distributed.once((folder / results.SETTINGS_FILE).exists):  # refuse before the work; create after it
            open_folder()
        _warn_of_discrete(experiment)
        encoded = encode_and_decode(experiment, distributed.replicate(restored.params), levels)
        comparisons = compare_with_prior(encoded.latents, float(sde.prior_std))
        summary = {
            "checkpoint": {"number": restored.number, "step": restored.step, "ema": True},
            "images": {"source": source, "count": len(levels), "sha256": content},
            "solver": {"eps": sde.sampling_eps, "rtol": config.sampling.rtol, "atol": config.sampling.atol},
            "nfe": encoded.nfe,
            "metrics": [dataclasses.asdict(metric) for metric in measure(encoded, experiment.scaler)],
            "latents": {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()},
            "interpolation": {"weights": WEIGHTS, "pairs": len(encoded.interpolation)},
            "temperature": {"factors": TEMPERATURES, "images": len(encoded.temperature)},
            "seed": config.seed,
            "config": flatten(config),
        }
        if not len(encoded.interpolation):
            logging.info("no interpolation.png: it needs two images or more")
        open_folder()
        if distributed.is_main_process():
            _write(folder, encoded, summary, experiment.scaler)
