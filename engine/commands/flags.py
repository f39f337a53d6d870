"""From configuration classes to command-line flags and back; shared by the commands."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

from engine.config import Budget, Resources, RunSettings, SearchConfig, flatten, is_library_model
from engine.recipes import recipe_values
from engine.shipped import shipped
from engine.trial import Fidelity, UsageError, WrongFlags

if TYPE_CHECKING:
    from engine.search.runs import Run


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(f"{text} divides by zero") from None
    except ValueError:
        raise ValueError(f"'{text}' is not a fraction; write 1/27 or 0.1") from None


register_type(Fraction, serializer=str, deserializer=_fraction)

FIDELITY_HELP = {
    "fraction": "fraction of the training images, like 1/27",
    "epochs": "passes over its training images",
    "width": "width multiplier of the networks",
    "resolution": "image size in pixels; 0 means the size of the data",
    "kd_loss": "distillation terms added to the cross entropy",
}
# By FINAL_SETTINGS.
FINAL_HELP = {
    "epochs": "passes over the training and validation images; 0 means twice --high.epochs",
    "kd_loss": "distillation terms added to the cross entropy, if the low fidelity has any",
}
# Title and description of the flags that come from a configuration class.
GROUPS = {
    SearchConfig: ("What results depend on", "Fixed for the life of a run folder."),
    Budget: (
        "Budget",
        "Counted over the life of a run folder; the first limit reached ends the run. It can be raised later.",
    ),
    Resources: ("Resources", "May differ from call to call."),
}
METAVARS: dict[Any, str] = {int: "N", float: "X", Fraction: "P/Q"}
# Those of text flags whose own name would say nothing.
TEXT_METAVARS = {
    **dict.fromkeys(("teacher_weights", "initial_weights", "weights", "check", "script", "out", "yaml"), "FILE"),
    **dict.fromkeys(("gpus", "students_per_gpu"), "N"),
    **dict.fromkeys(("mean", "std"), "R,G,B"),
    "fidelity_study": "RUN",
    "run_dir": "FOLDER",
    "only": "ARCHITECTURES",
    "teacher_cache": "SIZE",
    "time": "HH:MM:SS",
    "time_limit": "SECONDS",
    "job_options": "OPTIONS",
    "worker_init": "COMMAND",
    "claim": "CLAIM:PATH",
    "address": "HOST",
}


class HelpFormatter(DefaultHelpFormatter):
    """Shows the text and default of each flag, without its type, which the text, default or choices make clear.

    If it is `brief`, only the options named there, without the descriptions of their groups, and the text of each up to
    its first semicolon, where details begin.
    """

    brief: frozenset[str] = frozenset()

    def add_text(self, text: str | None) -> None:
        if not self.brief or self._current_section is self._root_section:
            super().add_text(text)

    def add_argument(self, action: argparse.Action) -> None:
        if not self.brief or not action.option_strings or self.brief & {*action.option_strings}:
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if self.brief:
            text, _, details = text.partition(";")
            if action.default == math.inf or (action.default == 0 and "0 " in details):
                return text
        if action.required:
            return f"{text} (required)"
        silent = any(action.default is none for none in (None, "", argparse.SUPPRESS))
        if silent or not action.option_strings or action.nargs == 0:
            return text
        return f"{text} (default: {'no limit' if action.default == math.inf else '%(default)s'})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = action.type or getattr(action, "_typehint", None)
        if kind in METAVARS:
            return METAVARS[kind]
        return TEXT_METAVARS.get(action.dest) or super()._get_default_metavar_for_optional(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wraps at spaces only: a flag named in a help text stays in one piece."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wraps text, and examples, which are indented, as a shell reads them."""
        wrapper = textwrap.TextWrapper(width, initial_indent=indent, subsequent_indent=indent)
        lines = text.splitlines()
        return "\n".join(wrap_example(line, width) if line.startswith("  ") else wrapper.fill(line) for line in lines)


class HelpAll(argparse._HelpAction):
    """The action of --help-all, for parsers that show only everyday options under --help."""

    def __call__(self, parser: Any, *arguments: Any) -> None:
        parser.everyday = frozenset()
        super().__call__(parser, *arguments)


class Parser(ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest flag or the right way to write a value."""

    reading = ""  # the YAML file being read
    everyday: frozenset[str] = frozenset()  # the options that --help shows; if empty, all

    def show_everyday(self, *flags: str) -> None:
        """Makes --help show only these flags, and adds --help-all for the rest; a later call changes which."""
        if not self.everyday:
            self.add_argument("--help-all", action=HelpAll, help="show every flag, with all details, and exit")
        self.everyday = frozenset({"--help", "--help-all", "--config", *(f"--{flag}" for flag in flags)})

    def _get_formatter(self) -> HelpFormatter:
        formatter = super()._get_formatter()
        assert isinstance(formatter, HelpFormatter)
        formatter.brief = self.everyday
        return formatter

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a WrongFlags that says what is wrong and what to write instead."""
        text = self._with_positionals(reworded(message)) + self._suggestion(message)
        raise WrongFlags(f"{self.reading}: {text}" if self.reading else text)

    def parse_args(self, *arguments: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """The flags, above the defaults of the recipe that they choose."""
        values: Namespace = super().parse_args(*arguments, **options)
        defaults = recipe_defaults(self, values)
        if not defaults:
            return values
        self.set_defaults(defaults)
        found: Namespace = super().parse_args(*arguments, **options)
        return found

    def parse_string(self, content: str, *more: Any, **options: Any) -> Namespace:
        """The flags of a YAML text."""
        return super().parse_string(self.quote_text(content), *more, **options)

    def quote_text(self, content: str) -> str:
        """The YAML with quotes around the values of text flags, or YAML would read `gpus: 8` as a number and
        `24:00:00` as one to base 60."""
        root = yaml.compose(content, yaml.SafeLoader)
        texts = [action.dest for action in self._actions if getattr(action, "_typehint", None) in (str, str | None)]
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value in texts and isinstance(value, yaml.ScalarNode) and not value.tag.endswith(":null"):
                value.tag, value.style = "tag:yaml.org,2002:str", '"'
        return yaml.serialize(root, Dumper=yaml.SafeDumper) if root else content

    def _with_positionals(self, text: str) -> str:
        """The text with positional arguments written as in the usage line, RUN instead of --run or run."""
        for action in self._actions:
            if not action.option_strings:
                name = action.dest.upper()
                text = re.sub(rf"--{action.dest}(?=:)|(?<=required: ){action.dest}$", name, text)
        return text

    def _suggestion(self, message: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        keys = {option.lstrip("-").replace("-", "_"): option for option in known}
        for word in re.findall(r"(?:unrecognized arguments: --|option '|key ')([\w.-]+)", message, re.IGNORECASE):
            key = word.replace("-", "_")
            near = [name for name in keys if name.startswith(f"{key}.")]
            near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
            if near:
                return f"; did you mean {' or '.join(name if self.reading else keys[name] for name in near)}?"
        short = re.search(r"Got value: ([\d.]+)([kMG])$", message.strip())
        if short:
            return f"; write {short[1]}e{3 + 3 * 'kMG'.index(short[2])}"
        if re.search(r"unrecognized arguments: [^-]", message):
            return "; a value follows its flag, like --data FOLDER"
        return ""


def recipe_defaults(parser: ArgumentParser, values: Namespace) -> dict[str, Any]:
    """The defaults of a recipe for the flags of a command, {} if it takes no recipe.

    The space decides under `auto`. The command `teacher` has a network of its own (--arch), and `train` a single
    fidelity, whose flags have no prefix.
    """
    if "recipe" not in values:
        return {}
    library = is_library_model(values.get("arch") or "") and not values.from_scratch
    recipe = "finetune" if values.recipe == "auto" and library else values.recipe
    deciding = {"space": values.space, "recipe": recipe, "from_scratch": values.from_scratch}
    config = SearchConfig(**deciding, teacher=values.get("teacher") or "auto")
    flags = {action.dest for action in parser._actions}
    named = {name if name in flags else name.removeprefix("high."): v for name, v in recipe_values(config).items()}
    return {name: value for name, value in named.items() if name in flags}


def reworded(message: str) -> str:
    """A message of jsonargparse with flags instead of keys, and words instead of Python types."""
    text = " ".join(message.split())
    text = re.sub(r'Parser key "([\w.]+)":', lambda found: f"--{found[1].replace('_', '-')}:", text)
    text = re.sub(r"Not of type \w+: |--config: ", "", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: f"value from {found[1]}", text)
    several = r"Does not validate against any of the Union .*?- (Expected a .*?) - Expected.*(Given value: .*)$"
    if union := re.search(several, text):
        text = f"{text[: union.start()]}{union[1]}. {union[2].replace('Given', 'Got')}"
    for kind, word in (("float", "number"), ("int", "whole number"), ("bool", "true or false"), ("str", "text")):
        text = text.replace(f"<class '{kind}'>", word)
    return text


class ConfigFile(ActionConfigFile):
    """The action of `-c`: its errors name the file, and the key or line in it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        parser.reading, values = f"-c {values}", str(shipped(values))
        try:
            if Path(values).is_file():
                check_sections(yaml.safe_load(parser.quote_text(Path(values).read_text())), parser)
            super().__call__(parser, cfg, values, option_string)
        except yaml.YAMLError as error:
            parser.error(f"not YAML: {error}")
        except (UnicodeDecodeError, OSError) as error:
            parser.error(f"cannot be read as text: {error}")
        parser.reading = ""


def check_sections(content: Any, parser: ArgumentParser) -> None:
    """Calls the parser's error if a YAML file is not a mapping of flags, or gives a section like `low` a value."""
    if not isinstance(content, dict):
        parser.error("holds no flags; write one per line, like max_low: 50")
    if {"config", "budget"} <= content.keys():
        parser.error("is the record of a run; write a file for -c with: cli.py config ... --yaml FILE")
    known = [action.dest for action in parser._actions]
    for key, value in content.items():
        parts = [name for name in known if name.startswith(f"{key}.")]
        if parts and not isinstance(value, dict):
            names = ", ".join(part.removeprefix(f"{key}.") for part in parts)
            parser.error(f"{key} is a section; write {names} under it, indented")
    for key, _ in flatten(content):
        if key not in known:
            parser.error(f"Option '{key}' is not accepted")


def add_options(parser: ArgumentParser, kind: type, skip: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of a configuration class; name, type, default and help come from the field."""
    hints = get_type_hints(kind)
    title, description = GROUPS[kind]
    group = parser.add_argument_group(title, description)
    for item in dataclasses.fields(kind):
        if item.name in skip:
            continue
        flag = item.name.replace("_", "-")
        if hints[item.name] is Fidelity:
            add_fidelity(group, flag, item.default)
            continue
        text = item.metadata["help"]
        added = group.add_argument(f"--{flag}", type=hints[item.name], default=item.default, help=text)
        if hints[item.name] is bool:
            added.nargs, added.const = "?", True  # --flag is short for --flag true
        choices = get_args(hints[item.name])
        if any("," in str(choice) for choice in choices):  # argparse joins choices by commas
            added.metavar = f"{{{' | '.join(choices)}}}"


def add_fidelity(group: Any, flag: str, default: Any) -> None:
    """Adds the flags of a fidelity, such as --low.epochs."""
    hints = get_type_hints(Fidelity)
    for name, text in (FINAL_HELP if flag == "final" else FIDELITY_HELP).items():
        group.add_argument(
            f"--{flag}.{name.replace('_', '-')}",
            type=hints[name],
            default=getattr(default, name),
            help=f"{flag} fidelity: {text}",
        )


def gather(kind: Callable[..., Any], values: Namespace) -> Any:
    """A configuration object from parsed flags."""
    arguments = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = values.get(item.name, item.default)
        arguments[item.name] = Fidelity(item.name, **vars(value)) if isinstance(value, Namespace) else value
    return kind(**arguments)


def gather_settings(values: Namespace) -> RunSettings:
    """All settings of a run from parsed flags."""
    return RunSettings(gather(SearchConfig, values), gather(Budget, values), gather(Resources, values))


def command_parser(description: str, examples: str = "") -> Parser:
    """The parser of a command, with `-c` for a YAML file of flags. `examples` are lines of arguments, or comments."""
    parser = Parser(
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description=description,
        epilog=example_text(examples) if examples else None,
        formatter_class=HelpFormatter,
        print_config=None,  # the command `config` does that
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", action=ConfigFile, help="YAML file of flags; later files and flags win"
    )
    return parser


def example_text(examples: str) -> str:
    """Examples as `--help` prints them: each line is the arguments of a call, or a comment (#)."""
    lines = (line if line.startswith("#") else f"%(prog)s {line}".rstrip() for line in examples.splitlines())
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def wrap_example(line: str, width: int) -> str:
    """An example, indented by two spaces, in lines of at most `width` characters: a comment (#), or a command, which is
    broken before flags."""
    if line.startswith("  #"):
        return textwrap.fill(line, width, subsequent_indent="  # ")
    first, *parts = re.split(r" (?=--)", line)
    lines = [first]
    for part in parts:
        if len(f"{lines[-1]} {part} \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def add_run_options(parser: ArgumentParser, run_dir: bool = True, name: str = "search") -> Any:
    """Adds the flags for the run folder and the display; returns their group."""
    group = parser.add_argument_group("This call")
    if run_dir:
        group.add_argument("--name", type=str, default=name, help="name of the run: its folder is runs/NAME")
        group.add_argument("--run-dir", type=str | None, default=None, help="run folder, instead of runs/NAME")
    group.add_argument(
        "--progress",
        type=Literal["auto", "bar", "lines", "none"],
        default="auto",
        help="progress on stderr; auto means bars on a terminal and lines elsewhere",
    )
    group.add_argument(
        "-q",
        "--quiet",
        dest="progress",
        action="store_const",
        const="none",
        default="auto",
        help="print only errors to stderr; short for --progress none",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="also show library logs, and tracebacks of errors")
    return group


def add_run_argument(parser: ArgumentParser) -> None:
    """Adds RUN, the run that a command reads, as its first argument."""
    parser.usage = "%(prog)s RUN [options]"
    parser.add_argument("run", metavar="RUN", type=str, help="run folder, or a name under runs/")


def add_optional_run(parser: ArgumentParser) -> None:
    """Adds RUN, which may be left out and otherwise gives the settings, and --arch."""
    parser.usage = "%(prog)s [RUN] [options]"
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help="run folder, or a name under runs/")
    parser.add_argument("--arch", type=str | None, default=None, help="ARCHITECTURE; by default, the winner of RUN")


def with_settings(parser: ArgumentParser, arguments: list[str], settings: Callable[[Run], dict[str, Any]]) -> list[str]:
    """The command line with the settings of RUN, if it names one, before the flags that change them."""
    run = parser.parse_args(arguments).run
    if not run:
        return arguments
    from engine.search.runs import open_run

    found = settings(open_run(run))
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in found.items()), *arguments]


def add_device_option(parser: ArgumentParser) -> None:
    """Adds --device, for commands that need a single worker."""
    add_options(parser, Resources, skip=tuple(f.name for f in dataclasses.fields(Resources) if f.name != "device"))


def run_dir_of(values: Namespace) -> Path:
    """The run folder given by --run-dir or --name; UsageError for a name that is a path."""
    if not values.run_dir and (Path(values.name).name != values.name or values.name in ("", "..")):
        raise UsageError(f"--name '{values.name}' is not the name of a folder under runs/; --run-dir takes a path")
    folder = Path(values.run_dir) if values.run_dir else Path("runs") / values.name
    if odd := re.search(r"""["'`$\\\n]""", str(folder)):
        raise UsageError(f"the run folder {folder} contains {odd[0]!r}, which shells would expand; choose another name")
    return folder
