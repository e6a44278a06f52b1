"""The report: a run as one HTML file that can be looked at instead of read."""

from kvpolicy.lab.show.report.page import report_on_run, report_on_trace

__all__ = ["report_on_run", "report_on_trace"]
