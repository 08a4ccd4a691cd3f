"""How far should the first stage compress: the paper's central study (section 4.1, table 8).

Every first stage is trained for the same minutes and measured on emoji that it never saw; then a
UNet of the same number of parameters is trained for the same minutes in each latent space, and its
pictures are measured along the way.
"""

from mezzotint.studies.compression.recipes import STAGES, find_stage
from mezzotint.studies.compression.report import write_report
from mezzotint.studies.compression.results import CompressionStudy, read_results
from mezzotint.studies.compression.runs import run_compression_study

__all__ = [
    "STAGES",
    "CompressionStudy",
    "find_stage",
    "read_results",
    "run_compression_study",
    "write_report",
]
