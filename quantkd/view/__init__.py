"""The divergence page: where a student differs from its teacher, token by token, before and after training."""

from __future__ import annotations

from quantkd.view.collect import collect_divergence
from quantkd.view.divergence import Alternatives, Divergence, RowDivergence
from quantkd.view.page import render_page, write_page

__all__ = ["Alternatives", "Divergence", "RowDivergence", "collect_divergence", "render_page", "write_page"]
