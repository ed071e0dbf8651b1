"""Which epochs are measured, and what else the length of a run decides."""

import argparse


def epochs_to_measure(args: argparse.Namespace) -> frozenset[int]:
    """The epochs after which to measure; 0 is before training. The last epoch always counts."""
    if args.measure_at is None:
        return frozenset({*range(0, args.epochs + 1, args.measure_every), args.epochs})
    epochs = set()
    for item in args.measure_at:
        if item.startswith("log:"):
            num = int(item.removeprefix("log:"))
            epochs |= {0, args.epochs}
            epochs |= {round(args.epochs ** (i / max(num - 2, 1))) for i in range(num - 1)}
        else:
            epochs.add(int(item))
    return frozenset(epochs)


def why_of_one_length(args: argparse.Namespace, planned: int, done: int) -> str:
    """Why what a run of `planned` epochs has `done` is not what one of `args.epochs` does; empty if it is."""
    if args.epochs == planned:
        return ""
    if args.schedule != "constant":
        return f"--schedule {args.schedule} spreads the learning rate over all of them"
    if args.warmup > 0:
        return "--warmup is a share of all of them"
    if args.head == "slots":
        return "--head slots grows in all of them but the last"
    if args.lookahead:
        return "--lookahead averages by the share of them that is done"
    plans = (argparse.Namespace(**vars(args) | {"epochs": epochs}) for epochs in (planned, args.epochs))
    before, now = ({epoch for epoch in epochs_to_measure(plan) if epoch <= done} for plan in plans)
    return "" if before == now else "their number decides which are measured (--measure-at, --measure-every)"
