"""Recordings: a teacher's outputs over a data set, distributions or texts, as columns of it."""

from hf_distill.recordings.annotation import annotate
from hf_distill.recordings.codec import KINDS, Sampled, TopK
from hf_distill.recordings.collator import RecordingCollator, header_of
from hf_distill.recordings.recorder import Estimate, estimate, load_recording, record
from hf_distill.recordings.row_format import COLUMN, Header
from hf_distill.recordings.writer import RecordingSettings

__all__ = [
    "COLUMN",
    "KINDS",
    "Estimate",
    "Header",
    "RecordingCollator",
    "RecordingSettings",
    "Sampled",
    "TopK",
    "annotate",
    "estimate",
    "header_of",
    "load_recording",
    "record",
]
