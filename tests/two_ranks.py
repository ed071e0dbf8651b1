"""Two threads that stand for two processes of a distributed run."""

import threading

from run.ranks import Ranks


class ThreadRanks(Ranks):
    """One of two ranks that are threads; counts its collectives."""

    def __init__(self, index, barrier, things):
        super().__init__(index, 2)
        self.barrier, self.things, self.calls = barrier, things, 0

    def sum(self, tensor):
        mine, other = self.exchanged(tensor.clone())
        return mine + other if self.is_first else other + mine

    def gathered(self, thing):
        both = self.exchanged(thing)
        return list(both) if self.is_first else []

    def from_first(self, thing):
        mine, other = self.exchanged(thing)
        return mine if self.is_first else other

    def exchanged(self, thing):
        """Both ranks' things, this one's first."""
        self.calls += 1
        self.things[self.index] = thing
        self.barrier.wait()
        both = self.things[self.index], self.things[1 - self.index]
        self.barrier.wait()
        return both


def on_two_ranks(measure):
    """What `measure(ranks)` returns on each of two ranks, and how often each of them called for the other."""
    barrier, things, results = threading.Barrier(2, timeout=20), [None, None], [None, None]
    both = [ThreadRanks(index, barrier, things) for index in range(2)]

    def run(ranks):
        try:
            results[ranks.index] = measure(ranks)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(ranks,)) for ranks in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, [ranks.calls for ranks in both]
