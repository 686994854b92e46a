"""Help: it comes without heavy imports, explains every option, and shows own options first."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("tyro")

import paceline
from paceline import cli
from paceline.cli import COMMANDS, main
from paceline.train.help import help_of
from paceline.train.options import Merge, Train

HEAVY = {
    *("torch", "transformers", "datasets", "trl", "peft", "accelerate", "tokenizers", "scipy"),
    *("matplotlib", "schedulefree", "pytorch_optimizer", "optuna", "sqlalchemy", "plotly"),
}
WITH_OPTIONS = {name: x for name, x in COMMANDS.items() if x.options}
# What each set of arguments loads, in a process of its own.
LOADED = """
import sys
from paceline.cli import main
status = main(sys.argv[1:])
print("loaded", *sys.modules)
sys.exit(status)
"""


def loaded(*arguments):
    command = [sys.executable, "-c", LOADED, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in found.stdout.rpartition("loaded")[2].split()}


@pytest.mark.parametrize("arguments", ["", "--version", "theory --help", "train --help"])
def test_nothing_heavy_is_imported_for_help(arguments):
    assert not loaded(*arguments.split()) & HEAVY


def test_nothing_heavy_is_imported_for_the_help_of_any_command():
    """All in one process, which imports more and more."""
    code = "import sys; from paceline.cli import COMMANDS, main\n"
    code += "for x in COMMANDS: assert not main([*x.split(), '--help']); print('loaded', x, *["
    code += f"m for m in {sorted(HEAVY)} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = re.findall(r"(?m)^loaded (.+)$", found)
    assert said == list(COMMANDS)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_option_is_explained(name, capsys):
    options = cli.options_of(COMMANDS[name])
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: paceline {name} ")
    assert "None" not in said
    assert "-h, --help" in said
    assert max(map(len, said.splitlines())) <= 80
    arguments = re.search(r"(?ms)^arguments:\n(.*?)\n\n", said)
    for field in options.model_fields:
        called = {"print_recipe": "print", "from_checkpoint": "from", "as_json": "json"}
        option = "--" + called.get(field, field).replace("_", "-")
        entry = re.findall(rf"(?ms)^  {option}(?![\w-]).*?(?=^  -|^$|\Z)", said)
        if not entry:  # it has no name on the command line
            assert arguments, field
            continue
        [entry] = entry
        assert len(re.findall(r"[A-Za-z]{2,}", entry)) > 3, entry


def test_own_options_come_first_and_others_under_their_subject():
    said = help_of("train", Train)
    titles = re.findall(r"(?m)^(\w.*):$", said)
    assert titles[:4] == ["arguments", "options", "model", "data"]
    own = said[said.index("\noptions:") : said.index("\nmodel:")]
    assert set(re.findall(r"(?m)^  --([\w-]+)", own)) == {
        *("out", "resume", "from", "find-lr", "print"),
    }
    model = said[said.index("\nmodel:") : said.index("\ndata:")]
    assert "--vocabulary INT" in model
    assert "--lr" not in model


def test_help_shows_defaults_as_they_are_written_and_those_of_a_recipe(capsys):
    plain = " ".join(help_of("train", Train).split())
    assert (
        "--betas FLOAT FLOAT β1 and β2 of Adam's moments, each in [0, 1). (default: 0.9 0.999)"
        in (plain)
    )
    assert "(default: 0.005)" not in plain
    assert main(["train", "smollm2-135m", "--help"]) == 0
    assert "(default: 0.005)" in capsys.readouterr().out
    assert "CHECKPOINT… [OPTIONS]" in help_of("average", Merge)


# ---- the public API -------------------------------------------------------------------------


def test_importing_the_package_takes_no_torch_and_its_names_do():
    code = "import sys, paceline; assert 'torch' not in sys.modules; "
    code += "paceline.averaging.PowerEMA; from paceline import PACE; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_the_names_that_are_there():
    """The list for them, the one for the run time, and `__all__` have the same names."""
    seen = {}
    for node in ast.walk(ast.parse(inspect.getsource(paceline))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            seen[node.module] = sorted(name.name for name in node.names)
    assert seen == {module: sorted(names) for module, names in paceline._PUBLIC.items()}
    assert sorted(paceline.__all__) == sorted(name for names in seen.values() for name in names)
    for name in paceline.__all__:
        assert getattr(paceline, name).__module__.startswith("paceline.")
        assert name in dir(paceline)
    with pytest.raises(AttributeError, match="no attribute 'Pace'"):
        paceline.Pace  # noqa: B018
    assert not hasattr(paceline, "pace")
    assert (Path(paceline.__file__).parent / "py.typed").exists()


# ---- completion -----------------------------------------------------------------------------

# What bash would offer after these words.
OFFERED = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
_tyro_paceline
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash"])
    assert not stop.value.code
    script = tmp_path / "paceline"
    script.write_text(capsys.readouterr().out)

    def offered(*words):
        command = ["bash", "-c", OFFERED, "bash", script, "paceline", *words]
        return set(subprocess.run(command, capture_output=True, text=True).stdout.split())

    assert offered("") - {"-h", "--help"} == {name.partition(" ")[0] for name in COMMANDS}
    assert offered("verify") == {"verify-resume"}
    assert offered("train", "--pull") == {"--pullback"}
    theory = {name.removeprefix("theory ") for name in COMMANDS if name.startswith("theory ")}
    assert offered("theory", "") - {"-h", "--help"} == theory
    assert "--gain" in offered("theory", "limit", "--")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell, capsys):
    with pytest.raises(SystemExit):
        main(["completion", shell])
    said = capsys.readouterr().out
    assert "verify-resume" in said
    assert "pullback" in said
