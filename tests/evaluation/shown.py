"""The functions of a report by the method that a summary names, as `experiment` calls them."""

from sera_jax.evaluation import report
from sera_jax.evaluation.report import KEYS
from sera_jax.experiment.methods import method_of

__all__ = ["KEYS", "check_summary", "legend", "report_png", "table", "write_summary"]


def table(summary):
    return report.table(summary, method_of(summary).report)


def legend(summary):
    return report.legend(summary, method_of(summary).report)


def check_summary(summary):
    report.check_summary(summary, method_of({"config": {}} | summary).report)


def write_summary(path, summary):
    report.write_summary(path, summary, method_of(summary).report)


def report_png(summary, path):
    method_of(summary).report.draw(summary, path)
