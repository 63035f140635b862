"""The histograms that `quantkd inspect` prints."""

import numpy as np
import pytest
from transfer_sets import make_plan, write_set

from quantkd.report.histograms import compute_histograms
from quantkd.transfer_set import TransferSet


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0,)])
def test_histograms(tmp_path, temperatures):
    write_set(tmp_path / "set", make_plan(num_prompts=12, temperatures=temperatures))
    transfer_set = TransferSet(tmp_path / "set")
    found = compute_histograms(transfer_set)
    sizes, entropies = [], []
    for row in transfer_set.rows(range(12)):
        sizes += row.counts.tolist()
        for logprobs in np.split(row.logprobs.astype(np.float64), np.cumsum(row.counts)[:-1]):
            p = np.append(np.exp(logprobs), max(1 - np.exp(logprobs).sum(), 0))
            entropies.append(float(-(p[p > 0] * np.log(p[p > 0])).sum()))
    assert found.entries.tolist() == np.bincount(sizes).tolist()
    wanted = np.histogram(entropies, bins=np.append(found.entropy_edges[:-1], 1e9))[0]
    assert found.entropy.tolist() == wanted.tolist()
    assert compute_histograms(transfer_set[:0]).entropy.sum() == 0
