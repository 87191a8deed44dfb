"""Tools: model summary, installation check, comparison of runs, saliency maps."""

from jaxnets.tools.comparison import Comparison, compare, read_run
from jaxnets.tools.doctor import examine
from jaxnets.tools.flops import count_flops
from jaxnets.tools.memory_fit import MemoryFit, fit_memory
from jaxnets.tools.report import write_report
from jaxnets.tools.results import read_result, write_result
from jaxnets.tools.saliency import input_gradient, visual_backprop
from jaxnets.tools.summary import Summary, summarize, summarize_model

__all__ = [
    "Comparison",
    "MemoryFit",
    "Summary",
    "compare",
    "count_flops",
    "examine",
    "fit_memory",
    "input_gradient",
    "read_result",
    "read_run",
    "summarize",
    "summarize_model",
    "visual_backprop",
    "write_report",
    "write_result",
]
