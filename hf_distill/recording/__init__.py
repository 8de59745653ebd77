"""A recording: what a teacher said of a data set, as one more column of it."""

from hf_distill.recording.codec import KINDS, Sampled, TopK
from hf_distill.recording.collate import ALL_NAMES, RecordingCollator, header_of
from hf_distill.recording.row import COLUMN, Header

__all__ = [
    "ALL_NAMES",
    "COLUMN",
    "KINDS",
    "Header",
    "RecordingCollator",
    "Sampled",
    "TopK",
    "header_of",
]
