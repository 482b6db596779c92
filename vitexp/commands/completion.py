"""`python -m vitexp completion bash|zsh|fish`: prints what makes that shell complete what is typed after vitexp.

A shell asks at every press of the key, so neither torch nor Hydra is imported: keys and their values are read from the
YAML files as text. What a command takes is read from its source."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitexp import checks
from vitexp.config_paths import conf_dir, config_groups
from vitexp.errors import UserError, nearest

LINE = "line="  # what a shell asks with: the line up to the cursor
SHELLS = ("bash", "zsh", "fish")
OPTIONS = {
    "--help": (),
    "--version": (),
    "--multirun": (),
    "--config-dir": None,  # a folder: the shell's own completion knows better
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
COMMENTED = re.compile(r"^(?P<indent> *)(?P<key>\w+):[^#]*?(?:#\s*(?P<words>.*))?$")
CHOICE = re.compile(r"(?:^|^[^|]*?: )(?P<word>[\w.+-]{2,})(?=$| *[(:,;])")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def main(arguments: list[str], config_dir: str | None) -> int:
    """Prints a shell's script or, asked by one, the words that may stand at the end of a line."""
    if arguments and arguments[0].startswith(LINE):
        print("\n".join(candidates(arguments[0].removeprefix(LINE))))
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments)
        raise UserError(f"completion {given}: expected one shell, of {', '.join(SHELLS)}.{nearest(given, SHELLS)}")
    names = sorted({"python", "python3", Path(sys.executable).name})
    print({"bash": BASH, "zsh": ZSH, "fish": FISH}[arguments[0]].replace("PYTHONS", " ".join(names)), end="")
    return 0


def candidates(line: str) -> list[str]:
    """Whole words that may stand in the place of the line's last one. None where a file's name is expected."""
    *before, word = line.split(" ")
    before = [text for text in before if text]
    start = next((i for i, text in enumerate(before) if Path(text).name == "vitexp"), None)
    if start is None:
        return []
    before = before[start + 1 :]
    config_dir = _config_dir(before)
    if before and before[-1] in OPTIONS and OPTIONS[before[-1]] != ():
        return _starting(word, OPTIONS[before[-1]] or ())
    if word.startswith("-"):
        return _starting(word, OPTIONS)
    commands = _commands()
    named = next((text for text in before if not text.startswith("-")), "")
    command = named if named in commands else "train"
    if command in ("list", "completion"):
        return _starting(word, _words_of(command, before[before.index(command) + 1 :], config_dir))
    takes = _takes(command, commands[command])
    if "=" in word:
        return _values(word, before, takes, config_dir)
    found = [f"{key}=" for key in takes.keys]
    if not named:
        found += commands
    if takes.settings:
        found += _keys(word, before, config_dir)
    return _starting(word, found)


def _commands() -> dict[str, str]:
    """Each command with its line of help, read from the command line's source, which is above this in the layers."""
    tree = ast.parse((Path(__file__).parent.parent / "cli.py").read_text(encoding="utf-8"))
    found = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "COMMANDS")
    return ast.literal_eval(next(found))


@dataclass
class Takes:
    """What stands behind a command, but for settings: its own keys, with their choices where it has any."""

    settings: bool
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _takes(command: str, words: str) -> Takes:
    """From the command's line of help (`run=<folder> format=timm, onnx or hf`) and its source: the tuple KEYS, for a
    key `split` the choices in SPLITS, and whether it composes settings."""
    if command == "train":
        return Takes(settings=True)
    tree = ast.parse((Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8"))
    tuples: dict[str, tuple[str, ...]] = {}
    settings = False
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple):
            texts = [one.value for one in node.value.elts if isinstance(one, ast.Constant) and type(one.value) is str]
            tuples[node.targets[0].id] = tuple(texts)
        if isinstance(node, ast.ImportFrom) and node.module == "vitexp.config":
            settings |= any(name.name.startswith("compose") for name in node.names)
    takes = Takes(settings)
    for key in (*re.findall(r"([a-z_]+)=", words), *tuples.get("KEYS", ())):
        said = re.search(rf"\b{key}=((?:\w+, )*\w+ or \w+)", words)
        choices = tuple(re.split(r", | or ", said.group(1))) if said else ()
        takes.keys.setdefault(key, choices or tuples.get(f"{key.upper()}S", ()))
    return takes


def _words_of(command: str, before: list[str], config_dir: str | None) -> list[str]:
    if command == "completion":
        return [] if before else [*SHELLS]
    groups = config_groups(config_dir)
    if not before:
        return [*(f"{group}s" for group in groups if "/" not in group), "timm"]
    named = {f"{group}s": options for group, options in groups.items()} | groups
    return [*named.get(before[0], ()), *(["params=true"] if before[0] in ("model", "models") else [])]


# ---- Settings --------------------------------------------------------------------------------------------------------


def _keys(word: str, before: list[str], config_dir: str | None) -> list[str]:
    """`model=` and `model.` for the groups, and the keys of the level that the word is at."""
    prefix = re.match(r"[+~]*", word)
    sign, bare = (prefix.group() if prefix else ""), word.lstrip("+~")
    settings = read_settings(chosen(before, config_dir), config_dir)
    level = bare.rpartition(".")[0]
    node = settings.at(level)
    found = [f"{group}=" for group in config_groups(config_dir) if not level and "/" not in group]
    for key, value in node.items() if isinstance(node, dict) else ():
        dotted = f"{level}.{key}" if level else str(key)
        if str(key)[0] != "_":
            found.append(f"{dotted}." if isinstance(value, dict) and value else f"{dotted}=")
    return [f"{sign}{key}" for key in found]


def _values(word: str, before: list[str], takes: Takes, config_dir: str | None) -> list[str]:
    """`key=value` for every value that begins so; behind a comma the list of a sweep goes on."""
    key, _, text = word.partition("=")
    bare = key.lstrip("+~")
    groups = config_groups(config_dir)
    if bare in takes.keys:
        choices: list[str] = [*takes.keys[bare]]
    elif not takes.settings:
        choices = []
    elif bare in groups:
        choices = groups[bare]
    else:
        settings = read_settings(chosen(before, config_dir), config_dir)
        choices = settings.choices_of(bare)
    earlier = text[: text.rfind(",") + 1]
    return _starting(word, [f"{key}={earlier}{choice}" for choice in choices])


@dataclass
class Settings:
    """A tree of settings as the YAML files write it, and what their comments say of its leaves."""

    tree: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    def at(self, level: str) -> Any:
        node: Any = self.tree
        for part in level.split(".") if level else ():
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def choices_of(self, key: str) -> list[str]:
        """What the checks allow, true and false, or `a | b` of the comment behind the key."""
        if key in checks.CHOICES:
            return [checks.show(choice) for choice in checks.CHOICES[key]]
        if isinstance(self.at(key), bool):
            return ["true", "false"]
        choices, value = commented_choices(self.comments.get(key, "")), self.at(key)
        return [*choices, value] if choices and isinstance(value, str) and value[:1] not in "$?" else choices


def commented_choices(comment: str) -> list[str]:
    """`cls | mean (of the patches)` and `of the head: cls | mean` name cls and mean; without a bar nothing is named."""
    parts = [CHOICE.search(part.strip()) for part in comment.split("|")]
    return [part["word"] for part in parts if part] if len(parts) > 1 else []


def chosen(before: list[str], config_dir: str | None) -> dict[str, str]:
    """The option of every group: as config.yaml has it, as presets on the line have it, as the line has it."""
    groups = config_groups(config_dir)
    pairs = [text.partition("=")[::2] for text in before if "=" in text]
    typed = {key: value for key, value in pairs if value in groups.get(key, ())}
    options = dict(_defaults(_load(conf_dir() / "config.yaml")))
    for preset in ("pipeline", "experiment", "debug"):
        if name := typed.get(preset):
            options |= dict(_defaults(_load(_file(preset, name, config_dir))))
    return options | typed


def read_settings(options: dict[str, str], config_dir: str | None) -> Settings:
    """What these options make, as Hydra would compose it but for values that refer to others."""
    settings = Settings()
    _add(settings, conf_dir() / "config.yaml", "", "", config_dir)
    settings.tree.pop("hydra", None)
    for group, option in options.items():
        path = _file(group, option, config_dir)
        everywhere = path.read_text(encoding="utf-8").startswith("# @package _global_")
        _add(settings, path, group, "" if everywhere else group.replace("/", "."), config_dir)
    return settings


def _add(settings: Settings, path: Path, group: str, place: str, config_dir: str | None) -> None:
    tree = _load(path)
    for entry in tree.pop("defaults", ()):
        if isinstance(entry, str) and entry != "_self_":
            _add(settings, _file(group, entry, config_dir), group, place, config_dir)
        elif isinstance(entry, dict) and group:  # a group within: launcher of sweep; those from the top are `chosen`
            for key, option in entry.items():
                name = key.removeprefix("override ").strip()
                if option and not name.startswith("/"):
                    within = f"{group}/{name}"
                    _add(settings, _file(within, option, config_dir), within, f"{place}.{name}", config_dir)
    node = settings.tree
    for part in place.split(".") if place else ():
        node = node.setdefault(part, {})
    _merge(node, tree)
    settings.comments |= {f"{place}.{key}" if place else key: words for key, words in _comments(path)}


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _comments(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted key, comment on its line) of a YAML file in block style."""
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := COMMENTED.match(line):
            indent = len(found["indent"])
            parents = [parent for parent in parents if parent[0] < indent] + [(indent, found["key"])]
            if found["words"]:
                yield ".".join(key for _, key in parents), found["words"]


def _defaults(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(group, option) of a file's defaults list, `override /group: option` as well."""
    for entry in tree.get("defaults", ()):
        for key, option in entry.items() if isinstance(entry, dict) else ():
            group = key.removeprefix("override ").strip().lstrip("/")
            if option and not group.startswith("hydra") and "@" not in group:
                yield group, option


def _load(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return {}  # a file that a person is writing just now: no reason to answer a key press with an error
    return tree if isinstance(tree, dict) else {}


def _file(group: str, option: str, config_dir: str | None) -> Path:
    shipped = conf_dir() / group / f"{option}.yaml"
    return shipped if shipped.exists() or config_dir is None else Path(config_dir) / group / f"{option}.yaml"


def _config_dir(before: list[str]) -> str | None:
    for name, value in itertools.zip_longest(before, before[1:], fillvalue=""):
        if name in ("--config-dir", "-cd") and Path(value).is_dir():
            return value
        if name.startswith("--config-dir=") and Path(name.partition("=")[2]).is_dir():
            return name.partition("=")[2]
    return None


def _starting(word: str, known: Any) -> list[str]:
    return sorted({text for text in known if text.startswith(word)})


# ---- Scripts ---------------------------------------------------------------------------------------------------------

# Bash takes = and : for ends of words, so what stands before the last of them in the word is taken off the answers.
BASH = r"""# vitexp and python -m vitexp for bash: eval "$(vitexp completion bash)", also in ~/.bashrc
_vitexp_before=$(complete -p python 2>/dev/null | sed -n 's/.*-F \([^ ]*\) .*/\1/p')
[[ $_vitexp_before == _vitexp_complete ]] && _vitexp_before=
_vitexp_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" word strip candidate open=
    local -a call=("${COMP_WORDS[0]/#\~/$HOME}")
    if [[ ${COMP_WORDS[0]##*/} != vitexp ]]; then
        if [[ ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != vitexp || $COMP_CWORD -lt 3 ]]; then
            [[ -n $_vitexp_before ]] && "$_vitexp_before" "$@"
            return
        fi
        call+=(-m vitexp)
    fi
    word="${line##* }"
    strip="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ -z $candidate ]] && continue
        [[ $candidate == *[=.] ]] && open=yes
        COMPREPLY+=("${candidate#"$strip"}")
    done < <("${call[@]}" completion "line=$line" 2>/dev/null)
    [[ -n $open ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _vitexp_complete vitexp PYTHONS
"""
ZSH = r"""# vitexp and python -m vitexp for zsh: eval "$(vitexp completion zsh)" in ~/.zshrc, after compinit
_vitexp_complete() {
    local -a call found
    call=("${words[1]/#\~/$HOME}")
    if [[ ${words[1]:t} != vitexp ]]; then
        if [[ $words[2] != -m || $words[3] != vitexp || $CURRENT -lt 4 ]]; then
            if (( $+functions[_python] )); then _python "$@"; else _default "$@"; fi
            return
        fi
        call+=(-m vitexp)
    fi
    found=("${(@f)$("${call[@]}" completion "line=${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    found=("${(@)found:#}")
    if (( ! $#found )); then
        compset -P '*='
        _files
        return
    fi
    compadd -Q -S '' -- "${(@M)found:#*[=.]}"
    compadd -Q -- "${(@)found:#*[=.]}"
}
compdef _vitexp_complete vitexp PYTHONS
"""
FISH = r"""# vitexp and python -m vitexp for fish: vitexp completion fish | source, also in config.fish
function __vitexp_complete
    set -l call (commandline -opc)[1]
    string match -qr '(^|/)vitexp$' -- $call; or set call $call -m vitexp
    set -l found ($call completion "line="(commandline -cp) 2>/dev/null | string match -v '')
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        set -l key (string match -r '^[^=]*=' -- (commandline -ct))
        __fish_complete_path (string replace -r '^[^=]*=' '' -- (commandline -ct)) | string replace -r '^' -- "$key"
    end
end
complete -c vitexp -f -a '(__vitexp_complete)'
for python in PYTHONS
    complete -c $python -f -n "string match -qr -- '-m vitexp ' (commandline -cp)" -a '(__vitexp_complete)'
end
"""
