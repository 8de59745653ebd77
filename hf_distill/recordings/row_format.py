"""The value that a row carries: whose word it is on what, and that it is whole.

    4 bytes  checksum (CRC-32) of all that follows
    1        version of this layout and of the codec
    1        kind
    4        k, or the number of draws
    4        temperature, float32
    4        vocabulary: the first so many ids are what the distribution is over
    4        number of targets
    8        what it belongs to: input ids, targets and documents of the row
    8        the teacher
    8        the tokenizer, 0 where it was not known
    ...      what `hf_distill.recordings.codec` has made

Little-endian. In the row, because what is written beside a data set (`info.description`) survives
neither Parquet nor streaming nor concatenation.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch.distributed.tensor import DTensor

from hf_distill.recordings.codec import KINDS, VERSION, Damaged

COLUMN = "recording"
LAYOUT = struct.Struct("<BBIfIIQQQ")
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """See the module; `row` is 0 in a header that stands for a whole recording."""

    kind: str
    k: int
    temperature: float
    vocabulary: int
    targets: int
    row: int
    teacher: int
    tokenizer: int


def write(header: Header, content: bytes) -> bytes:
    """A row's value: header, content and their checksum; `read` is its inverse."""
    packed = LAYOUT.pack(
        VERSION,
        KINDS.index(header.kind),
        header.k,
        header.temperature,
        header.vocabulary,
        header.targets,
        header.row,
        header.teacher,
        header.tokenizer,
    )
    return CHECKSUM.pack(zlib.crc32(packed + content)) + packed + content


def read(value: bytes) -> tuple[Header, bytes]:
    """raises: Damaged where a bit is not as it was written, or the version is another"""
    at = CHECKSUM.size
    if len(value) < at + LAYOUT.size:
        raise Damaged(f"it has {len(value)} bytes, fewer than its header")
    if CHECKSUM.unpack_from(value)[0] != zlib.crc32(value[at:]):
        raise Damaged("its checksum does not fit: it was cut or changed after it was written")
    version, kind, *rest = LAYOUT.unpack_from(value, at)
    if version != VERSION:
        raise Damaged(f"it is of version {version}, and this is a reader of version {VERSION}")
    return Header(KINDS[kind], *rest), value[at + LAYOUT.size :]


def row_hash(input_ids: Any, targets: Any, position_ids: Any = None) -> int:
    """What a recording belongs to.

    input_ids, position_ids: of the row, without padding; position_ids only for packed rows, where
        they say where documents begin
    targets: the positions that predict something, ascending, counted from the row's first token
    """
    digest = xxhash.xxh3_64()
    for part in (input_ids, targets, () if position_ids is None else position_ids):
        values = np.asarray(part, dtype="<i4")
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values.tobytes())
    return digest.intdigest()


def tokenizer_hash(tokenizer: Any) -> int:
    """Of every token with its id, and of the chat template; 0 for no tokenizer."""
    if tokenizer is None:
        return 0
    digest = xxhash.xxh3_64(str(getattr(tokenizer, "chat_template", None) or "").encode())
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.intdigest() or 1


def model_hash(model: Any) -> int:
    """Of every weight, by name. Of a sharded model a collective of all processes."""
    digest = xxhash.xxh3_64()
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # offloaded: the hooks have them
        weights = get_state_dict_offloaded_model(model)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.intdigest()
