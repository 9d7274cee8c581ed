"""Images to latents and back: the reconstruction error, and pictures of what lies between and around the latents."""

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
from experiment.drawing import Snapshot
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

WEIGHTS = tuple(i / 8 for i in range(9))  # places between two images
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
NUM_SHOWN = 64  # images of the picture of reconstructions
NUM_IMAGES = 16  # without --num_images
NUM_ROWS = 8  # rows of the other pictures
SUMMARY_FILE = "encode.json"  # written last: where it is, the other files are those of the same run
LATENTS_FILE = "latents.npz"
PICTURES = ("reconstruction.png", "interpolation.png", "temperature.png")

# (replicated params, batch of all hosts) -> arrays by name, a row for each example
Program = Callable[[Any, np.ndarray], dict[str, np.ndarray]]


# --- programs --------------------------------------------------------------------------------------------------------


def _on_devices(fn: Callable[[Any, Array], dict[str, Array]]) -> Program:
    """Compiles a function of a batch for all devices."""
    program = distributed.pmap(fn)

    def run(params: Any, batch: np.ndarray) -> dict[str, np.ndarray]:
        outputs = program(params, distributed.shard(distributed.host_share(batch)))
        return {name: distributed.gather(output) for name, output in outputs.items()}

    return run


def build_encoding_program(experiment: Experiment) -> Program:
    """Compiles the encoder: (replicated params, levels [B, H, W, C]) -> {"x", "latents", "nfe": [B]}.

    An image enters as `x`, the middle of its levels in the network's range: without noise, so that its latent follows
    from the image alone.
    """
    codec = build_codec(experiment.config, experiment.sde)

    def encode(params: Any, levels: UInt8[Array, "B H W C"]) -> dict[str, Array]:
        x = experiment.scaler.middle(levels)
        latents, nfe = codec.encode(experiment.score_fn(params, smooth=True), x)
        return {"x": x, "latents": latents, "nfe": jnp.broadcast_to(nfe, len(x))}

    return _on_devices(encode)


def build_decoding_program(experiment: Experiment) -> Program:
    """Compiles the decoder: (replicated params, latents) -> {"x": in the network's range, "levels", "nfe": [B]}."""
    codec = build_codec(experiment.config, experiment.sde)

    def decode(params: Any, latents: Float[Array, "B H W C"]) -> dict[str, Array]:
        x, nfe = codec.decode(experiment.score_fn(params, smooth=True), latents)
        return {"x": x, "levels": experiment.scaler.to_levels(x), "nfe": jnp.broadcast_to(nfe, len(x))}

    return _on_devices(decode)


def run_in_batches(
    program: Program, params: Any, array: Num[np.ndarray, "N ..."], *, batch_size: int, name: str
) -> dict[str, np.ndarray]:
    """Applies a program to all rows, in batches of one size; the last is filled up with the first row.

    Args:
      program: from `build_encoding_program` or `build_decoding_program`.
      params: replicated.
      array: what it is applied to.
      batch_size: rows of a batch, over all devices and hosts; the devices divide it.
      name: of the work, for the log and the error.

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


# --- images ----------------------------------------------------------------------------------------------------------


def load_images(
    experiment: Experiment, num_images: int, path: Path | None = None
) -> tuple[UInt8[np.ndarray, "N H W C"], str]:
    """Loads the first images of the test split, or of an .npz file.

    Args:
      experiment: says what images are.
      num_images: how many.
      path: of a file of samples or images, see `sources.npz`; None for the test split.

    Returns:
      The images as levels, and what they are, in words.

    Raises:
      UserError: if there are fewer, or the images are not what the network was trained on.
      UserError: if there is no such file.
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


# --- results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images, their latents, and what the latents and others near them decode to.

    Attributes:
      levels: of the images, uint8[N, H, W, C].
      x: the images in the network's range, float32[N, H, W, C].
      latents: float32[N, H, W, C].
      x_decoded: the reconstructions in the network's range, float32[N, H, W, C].
      reconstruction: their levels, uint8[N, H, W, C].
      interpolation: levels on the way from image 2 k to image 2 k + 1, uint8[K, weights, H, W, C]; K may be 0.
      temperature: levels of the first images' latents, scaled, uint8[R, temperatures, H, W, C].
      nfe: evaluations of the score that the slowest image took, to "encode" and to "decode".
    """

    levels: np.ndarray
    x: np.ndarray
    latents: np.ndarray
    x_decoded: np.ndarray
    reconstruction: np.ndarray
    interpolation: np.ndarray
    temperature: np.ndarray
    nfe: dict[str, int]

    def errors(self, bin_width: float) -> dict[str, Float[np.ndarray, "N"]]:
        """Returns the reconstruction error of each image, by name.

        Args:
          bin_width: distance of two levels in the network's range.
        """
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
    """Encodes images; decodes their latents, and those between pairs of them and scaled ones.

    Args:
      experiment: gives the flow and the largest batch size, `eval.batch_size`.
      params: of the network, replicated.
      levels: images.

    Raises:
      SolverError: if an integration failed.
    """
    # One size for all, so that each program is compiled once.
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
    drawn = run(decode, array=changed, name="decoding latents between and around them")["levels"]
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


# --- files -----------------------------------------------------------------------------------------------------------


def _mean(name: str, values: Float[np.ndarray, "N"], unit: str) -> Metric:
    """Returns the mean over images, without a standard error if there is only one."""
    if len(values) == 1:
        return make_metric(name, values[0], np.nan, 1, unit=unit)
    return mean_metric(name, values, unit=unit)


def measure(encoded: Encoded, scaler: datasets.Scaler) -> tuple[Metric, ...]:
    """Returns the reconstruction error over all images, its means with their standard errors."""
    errors = encoded.errors(scaler.bin_width)
    network_range = "-1..1" if scaler.centered else "0..1"
    largest = errors["max_levels"].max()
    return (
        _mean("reconstruction_rms", errors["rms"], f"of the network's range {network_range}"),
        _mean("reconstruction_rms_levels", errors["rms_levels"], "grey levels"),
        make_metric("reconstruction_max_levels", largest, np.nan, len(encoded.levels), unit="grey levels"),
        _mean("unchanged_levels", errors["unchanged"], "share of values"),
    )


def _columns(images: np.ndarray, names: list[str], num_levels: int) -> UInt8[np.ndarray, "h w 3"]:
    """Draws images [rows, columns, H, W, C] with the name of each column above it."""
    grids = {
        name: plots.grid_of_levels(images[:, column], num_levels, num_columns=1) for column, name in enumerate(names)
    }
    return plots.side_by_side(grids, gap=0)


def draw(encoded: Encoded, num_levels: int) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Draws the pictures, by the name of their file; that of interpolations needs two images."""
    grids = {"images": encoded.levels, "reconstructions": encoded.reconstruction}
    shown = {caption: plots.grid_of_levels(levels[:NUM_SHOWN], num_levels) for caption, levels in grids.items()}
    pictures = {"reconstruction.png": plots.side_by_side(shown)}
    if len(encoded.interpolation):
        names = [f"{weight:g}".removeprefix("0") or "0" for weight in WEIGHTS]
        pictures["interpolation.png"] = _columns(encoded.interpolation, names, num_levels)
    with_images = np.concatenate([encoded.levels[: len(encoded.temperature), None], encoded.temperature], axis=1)
    pictures["temperature.png"] = _columns(with_images, ["image", *(f"{t:.1f}" for t in TEMPERATURES)], num_levels)
    return pictures


def save(folder: Path, encoded: Encoded, summary: dict[str, Any], scaler: datasets.Scaler) -> None:
    """Writes the files of one encoding in the place of those of another, the summary last.

    They are whole before the first of the others is touched: a full disk costs nothing that was complete.
    """
    fields = ("levels", "latents", "reconstruction", "interpolation", "temperature")
    arrays = {name: getattr(encoded, name) for name in fields} | encoded.errors(scaler.bin_width)
    arrays |= {f"nfe_{direction}": np.asarray(nfe) for direction, nfe in encoded.nfe.items()}
    arrays |= {"weights": np.asarray(WEIGHTS), "temperatures": np.asarray(TEMPERATURES)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        new = Path(temporary)
        files.write_atomically(new / LATENTS_FILE, lambda file: np.savez(file, **arrays))
        for name, picture in draw(encoded, scaler.num_levels).items():
            plots.save_png(new / name, picture)
        files.write_json(new / SUMMARY_FILE, summary)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)
        for name in (LATENTS_FILE, *PICTURES, SUMMARY_FILE):
            if (new / name).exists():
                (new / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


# --- the mode --------------------------------------------------------------------------------------------------------


def _describe_flow(experiment: Experiment) -> None:
    """Says what a discretely trained network makes of the flow."""
    if experiment.config.training.continuous:
        return
    if not experiment.sde.interpolates_levels:
        logging.warning(
            "the network knows only the %d noise levels of its training: its flow is a staircase in time, which the "
            "solver takes many steps for and can only invert roughly",
            experiment.sde.N,
        )
    else:
        logging.warning("the network was trained at %d noise levels and is asked between them", experiment.sde.N)


def _log(summary: dict[str, Any], folder: Path) -> None:
    """Says what came out, and where the pictures are."""
    checkpoint, images, nfe = summary["checkpoint"], summary["images"], summary["nfe"]
    rms, rms_levels, largest, unchanged = (number_text(m["value"], m["stderr"]) for m in summary["metrics"])
    logging.info(
        "checkpoint %d (step %d) encoded %d image(s) of %s in %d network evaluations, decoded them in %d",
        *(checkpoint["number"], checkpoint["step"], images["count"], images["source"], nfe["encode"], nfe["decode"]),
    )
    logging.info("reconstruction error: %s rms %s", rms, summary["metrics"][0]["unit"])
    logging.info(
        "  in grey levels: %s rms, %s at the most; share of unchanged levels: %s", rms_levels, largest, unchanged
    )
    logging.info("latents, in units of the prior's standard deviation:")
    for name, c in summary["latents"].items():
        logging.info(
            "  %-16s %.3g; of draws of the prior %s", name, c["value"], number_text(c["expected"], c["stderr"])
        )
    logging.info("pictures, %s and %s are in %s", LATENTS_FILE, SUMMARY_FILE, folder)


def _summarize(experiment: Experiment, encoded: Encoded, snapshot: Snapshot, source: str) -> dict[str, Any]:
    """Returns what encode.json holds."""
    config, sde = experiment.config, experiment.sde
    comparisons = compare_with_prior(encoded.latents, float(sde.prior_std))
    return {
        "checkpoint": {"number": snapshot.number, "step": snapshot.step, "ema": True},
        "images": {"source": source, "count": len(encoded.levels), "sha256": files.content_hash(encoded.levels)},
        "solver": {"eps": sde.sampling_eps, "rtol": config.sampling.rtol, "atol": config.sampling.atol},
        "nfe": encoded.nfe,
        "metrics": [dataclasses.asdict(metric) for metric in measure(encoded, experiment.scaler)],
        "latents": {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()},
        "interpolation": {"weights": WEIGHTS, "pairs": len(encoded.interpolation)},
        "temperature": {"factors": TEMPERATURES, "images": len(encoded.temperature)},
        "seed": config.seed,
        "config": flatten(config),
    }


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
    folder = workdirs.output_folder(workdir, output or "encode")
    distributed.check_batch_size("eval.batch_size", experiment.config.eval.batch_size)
    build_codec(experiment.config, experiment.sde)  # its checks, before anything is read
    levels, source = load_images(experiment, num_images or NUM_IMAGES, Path(images) if images else None)
    distributed.require_same({"content of the images": files.content_hash(levels)})
    restored = drawing.restore(experiment, workdir, snapshot)
    with locks.hold(folder, "--output"):
        open_folder = functools.partial(
            results.open_folder, folder, experiment.config, ("latents",), restored.params, flag="--output"
        )
        if distributed.once((folder / results.SETTINGS_FILE).exists):  # to be refused before the work; made after it
            open_folder()
        _describe_flow(experiment)
        encoded = encode_and_decode(experiment, distributed.replicate(restored.params), levels)
        summary = _summarize(experiment, encoded, restored, source)
        if not len(encoded.interpolation):
            logging.info("one image alone: there is nothing to interpolate to, and no interpolation.png")
        open_folder()
        if distributed.is_main_process():
            save(folder, encoded, summary, experiment.scaler)
            _log(summary, folder)
