"""The result of a run: one HTML page that opens anywhere, and a table for the terminal.  Reads files, never torch."""

from ofa.report.page import write_report
from ofa.report.summary import print_summary, summary_table

__all__ = ["print_summary", "summary_table", "write_report"]
