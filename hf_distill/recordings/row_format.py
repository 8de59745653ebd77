"""The layout of a row's recording: a checksum, a header, and the encoded outputs.

    4 bytes  checksum (CRC-32) of all that follows
    1        version of this layout and of the codec
    1        kind
    4        k, or the number of draws
    4        temperature, float32
    4        vocabulary: the distribution is over the first so many ids
    4        number of targets
    8        hash of the row that it belongs to: input ids, targets, labels, documents
    8        hash of the teacher
    8        hash of the tokenizer, 0 if it was not known
    ...      the outputs, as encoded by `recordings.codec`

Little-endian. The header is in every row, since metadata of a data set (`info.description`) is lost
by Parquet, streaming and concatenation.
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
    """The fields of the module's table; `row` is 0 in the header of a whole recording."""

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
    """Verify the checksum and return header and content. raises: Damaged"""
    at = CHECKSUM.size
    if len(value) < at + LAYOUT.size:
        raise Damaged(f"it has {len(value)} bytes, fewer than its header")
    if CHECKSUM.unpack_from(value)[0] != zlib.crc32(value[at:]):
        raise Damaged("its checksum does not fit: it was cut or changed after it was written")
    version, kind, *rest = LAYOUT.unpack_from(value, at)
    if version != VERSION:
        raise Damaged(f"it is of version {version}, and this is a reader of version {VERSION}")
    return Header(KINDS[kind], *rest), value[at + LAYOUT.size :]


def row_hash(input_ids: Any, targets: Any, labels: Any, position_ids: Any = None) -> int:
    """The hash of the row that a recording belongs to.

    input_ids, position_ids: of the row, without padding; position_ids only for packed rows, where
        they mark where documents begin
    targets: the positions that predict a label, ascending, counted from the row's first token
    labels: of the targets
    """
    digest = xxhash.xxh3_64()
    for part in (input_ids, targets, labels, () if position_ids is None else position_ids):
        values = np.asarray(part, dtype="<i4")
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values.tobytes())
    return digest.intdigest()


def tokenizer_hash(tokenizer: Any) -> int:
    """The hash of every token with its id, and of the chat template; 0 for no tokenizer."""
    if tokenizer is None:
        return 0
    digest = xxhash.xxh3_64(str(getattr(tokenizer, "chat_template", None) or "").encode())
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.intdigest() or 1


def model_hash(model: Any) -> int:
    """The hash of every weight, by name. For a sharded model a collective of all processes."""
    digest = xxhash.xxh3_64()
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # offloaded: hooks hold the weights
        weights = get_state_dict_offloaded_model(model)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.intdigest()
