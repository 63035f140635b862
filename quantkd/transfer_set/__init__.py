"""The transfer set: a teacher's sparse distributions on disk, written once and read many times."""

from quantkd.transfer_set.batch import IGNORE_INDEX, RowBatch
from quantkd.transfer_set.conversion import convert, estimate_bytes
from quantkd.transfer_set.info import TransferSetInfo
from quantkd.transfer_set.plan import FORMAT_VERSION, Plan
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.verification import Verification, verify
from quantkd.transfer_set.writer import ShardTask, TransferSetWriter

__all__ = [
    "FORMAT_VERSION",
    "IGNORE_INDEX",
    "Plan",
    "RowBatch",
    "ShardTask",
    "TransferRow",
    "TransferSet",
    "TransferSetInfo",
    "TransferSetWriter",
    "Verification",
    "convert",
    "estimate_bytes",
    "verify",
]
