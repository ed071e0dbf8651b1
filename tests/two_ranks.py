"""Two threads that stand for two processes of a distributed run."""

import threading


def on_two_ranks(measure):
    """What `measure(rank, reduce)` returns on each of two ranks, and how often each of them called `reduce`."""
    barrier, tensors, calls, results = threading.Barrier(2, timeout=20), [None, None], [0, 0], [None, None]

    def run(rank):
        def reduce(tensor):
            calls[rank] += 1
            tensors[rank] = tensor.clone()
            barrier.wait()
            total = tensors[0] + tensors[1]
            barrier.wait()
            return total

        results[rank] = measure(rank, reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, calls
