"""Folders of runs with numbers that look like those of real runs, and what a test asks of a figure."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from matplotlib.colors import to_rgb

import plots

ROOT = Path(plots.__file__).parent
CLASSES, TRAIN, TEST, DIGITS = 10, 1000, 200, 3
DIGIT_ENTROPY = 2.19
FIGURES = (
    plots.summary,
    plots.training_curves,
    plots.nc1_over_epochs,
    plots.nc1_over_depth,
    plots.heat_map,
    plots.minimality_over_epochs,
    plots.sufficiency_minimality,
    plots.head_losses,
    plots.rank_over_epochs,
    plots.rank_over_depth,
    plots.nc1_against_minimality,
    plots.clusters_over_epochs,
    plots.directions_over_epochs,
    plots.singular_values,
    plots.alignment_of_classes,
    plots.cka_of_layers,
    plots.cka_between_epochs,
    plots.cka_between_runs,
    plots.tsne_maps,
    plots.spectra,
    plots.eigenvalues_over_epochs,
    plots.look_over_epochs,
    plots.matrices,
    plots.gradient_cosines,
    plots.jacobian_singular_values,
    plots.ntk_spectrum,
    plots.path,
    plots.landscape_curves,
    plots.landscape_maps,
    plots.perturbation_curves,
    plots.channel_importance,
    plots.views_over_epochs,
    plots.views_images,
    plots.views_classes,
    plots.views_units,
    plots.views_filters,
    plots.lr_range_test,
)
SAMPLES = 60  # in which clusters are looked for


def make_run(
    folder,
    num_layers=3,
    num_epochs=5,
    seed=0,
    *,
    measured=None,
    measures=("nc1", "dib", "rank"),
    num_head_epochs=6,
    lr_test=False,
    cluster_set="test",
    **flags,
):
    """A run's folder as `main.py` leaves it, with numbers that look like those of a real run."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    layers = [f"layer{i // 2 + 1}.{i % 2}" for i in range(num_layers - 1)] + ["avgpool"]
    measured = range(num_epochs + 1) if measured is None else measured
    noise = np.random.default_rng(seed)
    rows, heads = [], []
    for epoch in range(num_epochs + 1):
        progress = 1 - math.exp(-3 * epoch / max(num_epochs, 1))
        row = _training_row(epoch, progress, noise)
        if epoch in measured:
            for depth, layer in enumerate(layers):
                row |= _measures(layer, depth, progress, measures, noise)
                if "dib" in measures:
                    heads += _head_rows(epoch, layer, row[f"dib/loss/{layer}"], num_head_epochs)
                if "clusters" in measures:
                    row |= _clusters(epoch, layer, cluster_set, noise)
            if "dib" in measures:
                row |= {f"dib/sufficiency/{split}": 2.3 - row[f"{split}_loss"] for split in ("train", "test")}
            if "views" in measures:
                row |= _views(layers[-1], noise)
        rows.append(row)
    write_csv(folder / "metrics.csv", rows)
    if heads:
        write_csv(folder / "dib.csv", heads)
    if "clusters" in measures:
        for epoch in {min(measured), max(measured)}:
            _keep_clusters(folder, epoch, layers, cluster_set, seed)
    for measure, made in (("landscape", _landscape), ("perturb", _perturbations)):
        for epoch in {min(measured), max(measured)} if measure in measures else ():
            _keep(folder, epoch, measure, made(epoch, layers, seed))
    for epoch in {min(measured), max(measured)} if "views" in measures else ():
        names = [f"class {c}" for c in range(CLASSES)]
        _keep(folder, epoch, "views", _pictures(layers[-1], seed), samples=64, layers=layers[-1:], classes=names,
              white_roughness=0.8)  # fmt: skip
    if "landscape" in measures:
        _keep(
            folder, "average", "landscape", _around_path(), networks=["epoch0001.ckpt", "epoch0002.ckpt", "last.ckpt"]
        )
    if lr_test:
        write_csv(folder / "lr_range_test.csv", _lr_test_rows(noise))
    provenance = {
        "num_classes": CLASSES,
        "train_samples": TRAIN,
        "test_samples": TEST,
        "layers": layers,
        "dimensions": {layer: 4096 // 2 ** min(depth, 6) for depth, layer in enumerate(layers)},
    }
    hparams = {"seed": seed, "log_dir": str(folder.parent), "dataset": "MNIST", "model": "ResNet"}
    hparams |= {"nonlinearity": "relu", "learning_rate": 0.01, "epochs": num_epochs}
    hparams |= {"lr_range_test": "train" if lr_test else None, **flags, "provenance": provenance}
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams, sort_keys=False))
    return folder


def _training_row(epoch, progress, noise):
    row = {"epoch": epoch}
    for split, gap in (("train", 0.0), ("test", 0.08)):
        row[f"{split}_loss"] = 2.3 * (1 - progress) + gap * progress + 0.02 * noise.random()
        row[f"{split}_acc"] = 0.1 + 0.88 * progress - gap * progress - 0.01 * noise.random()
    return row


def _measures(layer, depth, progress, measures, noise):
    row = {}
    for split in ("train", "test"):
        if "nc1" in measures:
            row[f"nc1/{split}/{layer}"] = 50 * math.exp(-0.6 * depth * progress + 0.05 * noise.normal())
        if "nc1_chance" in measures:
            row[f"nc1_chance/{split}/{layer}"] = 200 * math.exp(-0.1 * depth + 0.05 * noise.normal())
        if "rank" in measures:
            for i, kind in enumerate(("numerical", "stable", "effective"), start=1):
                row[f"rank/{kind}/{split}/{layer}"] = 900 / 4**i * math.exp(-0.1 * depth * progress)
                row[f"rank/means_{kind}/{split}/{layer}"] = 9 / i
    if "dib" in measures:
        minimality = DIGIT_ENTROPY * 0.4 * math.exp(-0.2 * depth - progress) + 0.01 * noise.random()
        row[f"dib/loss/{layer}"] = DIGIT_ENTROPY - minimality
        row[f"dib/minimality/{layer}"] = minimality
    return row


def _clusters(epoch, layer, split, noise):
    names = ("directions", "coverage", "purity", "purity_all", "homogeneity", "ami", "alignment", "num_clusters")
    row = {f"clusters/{name}/{split}/{layer}": noise.random() for name in names}
    row |= {f"clusters/directions/{split}/{layer}": 8, f"clusters/energy/{split}/{layer}": 0.91}
    row |= {f"clusters/purity/{split}/{layer}": "" if epoch == 0 else 0.9}  # before training there are no clusters
    return row | ({} if layer == "avgpool" else {f"cka/{split}/{layer}": noise.random()})


def _keep_clusters(folder, epoch, layers, split, seed):
    """The arrays of an epoch; runs of all seeds look at the same samples."""
    import torch

    from run.arrays import Arrays

    labels = np.random.default_rng(0).integers(0, CLASSES, SAMPLES)
    noise = np.random.default_rng((seed, epoch))
    predictions = np.where(np.arange(SAMPLES) % 4, labels, CLASSES)
    kept = {
        f"cka/{split}": noise.random((len(layers), len(layers))),
        f"index/{split}": 2 * np.arange(SAMPLES),
        f"labels/{split}": labels,
        f"mapped/{split}": np.arange(0, SAMPLES, 3),
        f"predictions/{split}": predictions,
    }
    for i, layer in enumerate(layers):
        k = 8 + i % 3 + seed
        kept[f"scores/{split}/{layer}"] = (np.eye(CLASSES, k)[labels] + noise.normal(size=(SAMPLES, k))).astype("f4")
        kept[f"singular_values/{split}/{layer}"] = np.arange(1.0, k + 1) ** -(1 + epoch)
        kept[f"map/{split}/{layer}"] = noise.random((SAMPLES // 3, 2))
        kept[f"clusters/{split}/{layer}"] = noise.integers(-1, 4, SAMPLES)
        kept[f"alignment/{split}/{layer}"] = noise.random((CLASSES, CLASSES))
    Arrays(folder).write(epoch, "clusters", {name: torch.from_numpy(array) for name, array in kept.items()},
                         {"layers": layers})  # fmt: skip


def _landscape(epoch, layers, seed):
    """Loss 2 - epoch / 10 + slope α + curvature α² / 2 and a term of α⁴ that parabolas lack."""
    alphas = np.linspace(-1, 1, 5)
    kept = {"alphas": alphas, "map/alphas": alphas}
    for i, name in enumerate(("eig1", "eig2", "gradient", "random")):
        parabola = 2 - epoch / 10 + 0.1 * seed + 20 / 4**i * alphas**2
        kept |= {f"{name}/parabola": parabola, f"{name}/losses": parabola + alphas**4 / 4**i}
    return kept | {"map/losses": 1 + 20 * alphas[:, None] ** 2 + 5 * alphas**2}


def _around_path():
    x, y = np.linspace(-6, 1, 8), np.linspace(-1, 2, 4)
    path = np.array([[-5.0, 0.0], [-2.0, 1.0], [0.0, 0.0]])
    return {"path": path, "map/alphas1": x, "map/alphas2": y, "map/losses": 1 + x[:, None] ** 2 + y**2}


def _perturbations(epoch, layers, seed):
    sizes, draws = np.array([0.0, 0.5, 1.0, 5.0]), np.arange(2)[:, None]
    kept = {"sizes": sizes, "clean": np.array([0.5, 0.9])}
    for i, layer in enumerate(("input", *layers)):
        lost = sizes * (1 + draws + seed) / (20 + i)
        kept |= {f"noise/{layer}/losses": 0.5 + lost, f"noise/{layer}/accuracies": 0.9 - lost}
        lost = np.arange(-1, 3 * i) / 100
        kept |= {f"channels/{layer}/losses": 0.5 + lost, f"channels/{layer}/accuracies": 0.9 - lost}
    return kept


def _views(layer, noise):
    names = [f"{score}/{kind}" for score in ("stability", "roughness") for kind in ("noise", "images")]
    row = {f"views/{name}": noise.random() for name in ("separation/noise", "separation/images")}
    for name in ("agreement", *names):
        row |= {f"views/{name}": noise.random(), f"views/units/{name}/{layer}": noise.random()}
        row |= {f"views/{name}/class{c}": noise.random() for c in range(CLASSES)}
    return row


def _pictures(layer, seed, images=6, units=5, shape=(1, 4, 4)):
    """Pictures of 6 images whose last ones are classified wrongly, and of 5 of 10 units."""
    noise = np.random.default_rng(seed)
    labels = np.arange(images) % CLASSES
    kept = {
        "images": noise.integers(0, 256, (images, *shape), dtype=np.uint8),
        "labels": labels,
        "logits": np.eye(CLASSES)[(labels + (labels > 3)) % CLASSES],
        "gradients": noise.normal(size=(images, CLASSES, *shape)),
        "gradients_of": np.tile(np.arange(CLASSES), (images, 1)),
        "filters": noise.normal(size=(7, 3, 2, 2)),
        f"units/{layer}/index": 2 * np.arange(units),
    }
    for of, num in (("classes", CLASSES), (f"units/{layer}", units)):
        kept |= {f"{of}/pictured": np.arange(num), f"{of}/examples": noise.normal(size=(num, 2, *shape))}
        for kind in ("noise", "images"):
            kept[f"{of}/mean/{kind}"] = noise.normal(size=(num, *shape))
            kept |= {f"{of}/stability/{kind}": np.linspace(0, 1, num), f"{of}/zeros/{kind}": np.zeros(num)}
    return kept


def _keep(folder, epoch, measure, kept, **settings):
    import torch

    from run.arrays import Arrays

    Arrays(folder).write(epoch, measure, {name: torch.from_numpy(array) for name, array in kept.items()}, settings)


def _head_rows(epoch, layer, final, num_head_epochs):
    """Digits around the mean `final`; the losses before training lie at the entropy of the digits."""
    for digit in range(DIGITS):
        for head_epoch in range(num_head_epochs + 1):
            falls = (1 - math.exp(-4 * head_epoch / num_head_epochs)) / (1 - math.exp(-4))
            loss = DIGIT_ENTROPY + (final + 0.1 * (digit - 1) - DIGIT_ENTROPY) * falls
            yield dict(epoch=epoch, layer=layer, digit=digit, head_epoch=head_epoch, cross_entropy=loss)


def _lr_test_rows(noise):
    for step, rate in enumerate(np.geomspace(1e-6, 10, 100), start=1):
        smoothed = 2.3 - 2 / (1 + math.exp(-2 * (math.log10(rate) + 3))) + 40 * max(0, math.log10(rate)) ** 2
        yield dict(step=step, lr=rate, loss=smoothed * (1 + 0.1 * noise.normal()), smoothed=smoothed)


def write_csv(path, rows):
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def load(*folders):
    return plots.load(folders, say=lambda sentence: None)


def read(folder):
    return pd.read_csv(folder / "metrics.csv", index_col="epoch")


def rewrite(folder, change):
    """Puts the text of `metrics.csv` through a function."""
    path = folder / "metrics.csv"
    path.write_text(change(path.read_text()))


def change_flags(folder, **flags):
    path = folder / "hparams.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | flags, sort_keys=False))


def title(figure):
    return " ".join(figure.get_suptitle().split())


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def lines(ax):
    """The labelled lines of a panel by their label."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def sentence(figure):
    """What a figure says that draws nothing, else None."""
    (text,) = [text.get_text() for ax in figure.axes if not ax.axison for text in ax.texts] or [None]
    return text


def contrast(color):
    """Of a color on white, as the Web Content Accessibility Guidelines define it: 1 to 21."""
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(color)]
    return 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05)


def command(*args, **options):
    options = {"capture_output": True, "text": True, "timeout": 250} | options
    python = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([*python, ROOT / "plots.py", *map(str, args)], **options)
