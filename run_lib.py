"""The public door: build an experiment, and run what main.py runs. One function for each mode; see their docstrings."""

from experiment.build import build_experiment
from metrics.inception import convert_weights
from modes.compare_reports import compare_reports
from modes.compare_samplers.compare import compare_samplers
from modes.doctor.doctor import doctor
from modes.encode import encode
from modes.evaluate.evaluate import evaluate
from modes.importing import export_checkpoint, import_checkpoint
from modes.memory import memory
from modes.prepare import prepare
from modes.restore.restore import restore
from modes.sample import sample
from modes.stats import stats
from modes.train import train, train_classifier

__all__ = [
    "build_experiment",
    "compare_reports",
    "compare_samplers",
    "convert_weights",
    "doctor",
    "encode",
    "evaluate",
    "export_checkpoint",
    "import_checkpoint",
    "memory",
    "prepare",
    "restore",
    "sample",
    "stats",
    "train",
    "train_classifier",
]
