"""One thread for all work whose bits are promised.

A library that cuts a sum among threads rounds it otherwise than in one, and a worker has one core where the driver has
all of them. So whatever ends in a store, in scores, explanations or facts is computed under `one_thread`, by whomever.

What is promised: on one kind of processor and with the same versions of the libraries, the same settings give the same
bytes, whatever the workers, batches and shards, and however often a run was broken off. On another kind of processor
the libraries take other kernels, which round otherwise: prepared spectra are equal to 1e-5 of their values, and scores
and explanations by the same model to 1e-4 of theirs (measured: 5e-7 and 8e-6). Training alone takes the threads that it
is given, one in a worker and all cores in the driver: its weights are the same for the same `train.workers` and, in the
driver, the same number of cores. A model that is trained anew with other kernels is another one, as by another seed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Its BLAS is another copy than numpy's, and only pools of libraries that are loaded can be limited.
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold every pool of threads of this process (BLAS of numpy and scipy, OpenMP, torch) to one; a decorator too.

    It knows the libraries that are loaded when it is entered, and may be entered again within itself once there are
    more of them.
    """
    # Not loaded for its sake: it takes seconds, and a worker that computes without it starts without it.
    torch = sys.modules.get("torch")
    threads = 1 if torch is None else torch.get_num_threads()
    with threadpool_limits(limits=1):
        if torch is not None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(threads)
