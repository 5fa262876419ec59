"""The laws, for anyone's structure, method, metric or host: two lines in a test of yours replace twenty.

    rankfold.testing.check_structure(Mine((12, 20), terms=3))
    rankfold.testing.check_method(MyMethod(), shape=(12, 20))

Each law is checked in float64 on small random data, raises AssertionError saying which law broke, by how much
and on what, and leaves the global random state as it was. Our own tests run the same functions over every
structure, method and metric that ships.
"""

from rankfold.testing_allocator import check_allocator
from rankfold.testing_method import check_method, sample_metrics
from rankfold.testing_metric import check_metric
from rankfold.testing_structure import check_host, check_structure

__all__ = [
    "check_allocator",
    "check_host",
    "check_method",
    "check_metric",
    "check_structure",
    "sample_metrics",
]
