"""The transfer set: a teacher's sparse distributions on disk, written once and read many times."""

from quantkd.transfer_set.batch import IGNORE_INDEX as IGNORE_INDEX, RowBatch as RowBatch
from quantkd.transfer_set.conversion import convert as convert, estimate_bytes as estimate_bytes
from quantkd.transfer_set.info import TransferSetInfo as TransferSetInfo
from quantkd.transfer_set.plan import FORMAT_VERSION as FORMAT_VERSION, Plan as Plan
from quantkd.transfer_set.reader import TransferSet as TransferSet
from quantkd.transfer_set.row import TransferRow as TransferRow
from quantkd.transfer_set.store import verify as verify
from quantkd.transfer_set.writer import ShardTask as ShardTask, TransferSetWriter as TransferSetWriter
