"""Flags that lie in files: a config file, or the `hparams.yaml` of a run to resume or to measure."""

import os
import reprlib
from pathlib import Path

from run import slurm
from run.parser import Parser
from run.presets import DEFAULTS, FREE_ON_RESUME, OF_ONE_CALL, OF_SEVERAL, merged, rivals
from run.values import perhaps

OF_RUN_ALONE = ("name", "slot_update", "target_acc")  # its folder, and what was done once when it had ended


def stored_flags(parser: Parser, given: dict) -> dict:
    """Flags from a config file, from the run to resume, or from the run that a checkpoint belongs to."""
    if "config" in given and "resume" in given:
        parser.error("argument -c/--config: not allowed with --resume, which takes the run's own flags")
    if "resume" in given:
        given["resume"] = str(_run_to_resume(parser, given))
        stored = _read_config(parser, Path(given["resume"]) / "hparams.yaml", "--resume", is_whole_run=True)
        _refuse_changes(parser, stored, given)
        return stored
    if "config" in given:
        return _read_config(parser, Path(given["config"]), "-c/--config")
    if "measure" in given:
        stored = _flags_of_measured(parser, given)
        return {flag: value for flag, value in stored.items() if flag not in OF_RUN_ALONE}
    return {}


def _flags_of_measured(parser: Parser, given: dict) -> dict:
    """The flags of the run that the first checkpoint to measure belongs to, if it lies in one's folder.

    Refuses runs on other data than that one, unless the command line says which data to take.
    """
    folders = [Path(name) if os.path.isdir(name) else Path(name).parent.parent for name in given["measure"]]
    files = {folder: folder / "hparams.yaml" for folder in folders}
    stored = {
        folder: _read_config(parser, path, "--measure") if os.path.isfile(path) else {}
        for folder, path in files.items()
    }
    first, *others = stored
    _refuse_other_classes(parser, given, stored)
    for other in others:
        for name in ("dataset", "classes", "image_size", "limit"):
            here, there = ((DEFAULTS | stored[folder])[name] for folder in (first, other))
            if stored[other] and name not in given and here != there:
                flag = f"--{name.replace('_', '-')}"
                parser.error(
                    f"argument --measure: the run in {first} has {flag} {here}, that in {other} {flag} {there}: "
                    f"say on which data to measure with {flag}"
                )
    return stored[first]


def _refuse_other_classes(parser: Parser, given: dict, stored: dict[Path, dict]) -> None:
    """A network knows its own classes alone; on another dataset the user says which these are."""
    for folder, flags in stored.items():
        own = DEFAULTS | flags
        is_other_data = given.get("dataset", own["dataset"]) != own["dataset"]
        if flags and "classes" in given and given["classes"] != own["classes"] and not is_other_data:
            trained = "all" if own["classes"] is None else " ".join(own["classes"])
            parser.error(
                f"argument --classes: the run in {folder} was trained on {trained}, not on "
                f"{' '.join(given['classes'])}; without the flag it is measured on its own"
            )


def _run_to_resume(parser: Parser, given: dict) -> Path:
    if given["resume"] != "last":
        folder = Path(given["resume"])
    else:
        log_dir = Path(given.get("log_dir", DEFAULTS["log_dir"]))
        newest_first = sorted(log_dir.glob("*/hparams.yaml"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        folder = next((path.parent for path in newest_first if not slurm.is_measurement(path.parent)), None)
        if folder is None:
            parser.error(f"argument --resume: there is no run in {log_dir} to go on with")
    if not (folder / "hparams.yaml").is_file():
        parser.error(f"argument --resume: {folder} is no run's folder: it has no hparams.yaml")
    if slurm.is_measurement(folder):
        parser.error(f"argument --resume: {folder} holds what --measure found: no run that could go on")
    return folder


def _refuse_changes(parser: Parser, stored: dict, given: dict) -> None:
    own = merged(DEFAULTS, stored)
    changed = [name for name in given if name not in FREE_ON_RESUME and given[name] != own[name]]
    if changed:
        name = changed[0]
        kept = next((other for other in rivals(name) if own[other] is not None), name)
        parser.error(
            f"argument --{name.replace('_', '-')}: a resumed run keeps its {kept}={own[kept]}; "
            "start a new run to change it"
        )


def _read_config(parser: Parser, path: Path, flag: str, *, is_whole_run: bool = False) -> dict:
    """The flags in a YAML mapping from flag names to values, checked as the command line is."""
    import yaml  # only where a file is read: the rest of the command line does without

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"argument {flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        parser.error(f"argument {flag}: {path} is not plain YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"argument {flag}: {path} must hold a mapping from flag names to values")
    if is_whole_run and "provenance" not in content:
        parser.error(f"argument {flag}: {path} is cut off: a run's provenance is missing at its end")
    parser.source = f"{path}: "
    known = [name for name in DEFAULTS if name not in OF_ONE_CALL]
    argv: list[str] = []
    for name, value in content.items():
        if name == "provenance":
            if not isinstance(value, dict):
                parser.error("provenance is no mapping, as a run writes it")
            continue
        if name not in known:
            parser.error(f"unknown key {name!r}" + (perhaps(str(name), known) or f"; known are {known}"))
        argv += _as_argv(parser, name, value)
    values = vars(parser.parse_args(argv))
    parser.source = ""
    return values


def _as_argv(parser: Parser, name: str, value: object) -> list[str]:
    """The words on the command line that mean `name: value`."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(DEFAULTS[name], bool):
        if not isinstance(value, bool):
            parser.error(f"argument {flag}: {value!r} is neither true nor false")
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, bool) and name == "in_memory":
        value = "yes" if value else "no"  # which YAML takes for truth values
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and name not in OF_SEVERAL:
        parser.error(f"argument {flag}: {reprlib.repr(value)} is a list, allowed is one value")
    if isinstance(value, dict | bool) or any(isinstance(item, dict | list | bool | None) for item in items):
        parser.error(f"argument {flag}: {reprlib.repr(value)} is no value for it")
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
