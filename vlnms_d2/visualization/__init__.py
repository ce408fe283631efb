"""Pictures of proposals."""

from .comparison import draw_comparison
from .records import proposal_records, query_record, result_table

__all__ = ["draw_comparison", "proposal_records", "query_record", "result_table"]
