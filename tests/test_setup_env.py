"""The set-up of the Python environment: what it accepts, and what a failed or killed installation leaves behind."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from faqd_lib.utils.files import project_root

SCRIPTS = project_root() / "scripts"


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module, with a project in a temporary folder. Every environment satisfies pyproject.toml."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPTS / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("FAQD_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    venv = tmp_path / ".venv"
    paths = {
        "ROOT": tmp_path, "PYPROJECT": tmp_path / "pyproject.toml", "VERSIONS": tmp_path / "requirements.lock",
        "VENV": venv, "PYTHON": venv / "bin/python", "STAMP": venv / "faqd-setup.json",
        "OUTPUT": venv / "faqd-setup.log", "LOCK": tmp_path / ".venv.lock",
    }  # fmt: skip
    for name, path in paths.items():
        monkeypatch.setattr(module, name, path)
    module.PYPROJECT.write_text("[project]\ndependencies = []\n")
    module.VERSIONS.write_text("")
    monkeypatch.setattr(module, "shortcoming", lambda python, extras: "")
    return module


@pytest.fixture
def installed(setup_env):
    """An up-to-date ``.venv``."""
    setup_env.VENV.mkdir()
    setup_env.STAMP.write_text(json.dumps(setup_env.current_stamp()))
    return setup_env


def test_unmet_requirements(setup_env):
    setup_env.PYPROJECT.write_text(
        "[project]\n"
        "dependencies = ['packaging', 'pytest<1', 'no-such-package', 'no-such-package; python_version < \"3\"']\n"
        "[project.optional-dependencies]\ntest = ['no-such-tool>=2']\n"
    )
    assert setup_env.unmet([]) == [f"pytest<1: {pytest.__version__} installed", "no-such-package: not installed"]
    assert setup_env.unmet(["test"])[2:] == ["no-such-tool>=2: not installed"]


def test_the_notebooks_are_always_set_up(installed, monkeypatch):
    asked = []
    monkeypatch.setattr(installed, "shortcoming", lambda python, extras: asked.append(extras) or "")
    assert installed.usable()
    assert asked == [["notebooks", "test"]]


def test_failure_is_the_last_line_of_the_error_message(setup_env):
    assert setup_env.failure(sys.executable, "-c", "pass") == ""
    assert setup_env.failure(sys.executable, "-c", "import sys; sys.exit('one\\ntwo')") == "two"
    assert setup_env.failure(sys.executable, "-c", "import sys; sys.exit(3)") == "exit status 3"
    assert "/no/python does not start" in setup_env.failure("/no/python")


def test_faqd_python_comes_before_active_environments(setup_env, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "/active")
    assert [str(python) for python in setup_env.chosen_environments().values()] == ["/active/bin/python"]
    monkeypatch.setenv("FAQD_PYTHON", "python")
    assert [str(python) for python in setup_env.chosen_environments().values()] == [sys.executable]


def test_an_up_to_date_environment_is_used(installed):
    assert installed.usable()
    assert installed.find_environment([]) == installed.PYTHON


@pytest.mark.parametrize("text", ["{}", "", '{"folder": "/so'])
def test_an_incomplete_or_damaged_stamp_is_not_used(installed, text):
    installed.STAMP.write_text(text)
    assert installed.read_stamp() == installed.INCOMPLETE
    assert not installed.usable()


@pytest.mark.parametrize("name", ["PYPROJECT", "VERSIONS"])
def test_changed_requirements_are_noticed(installed, name):
    getattr(installed, name).write_text("# changed")
    assert not installed.usable()


def test_a_moved_project_is_noticed(installed, monkeypatch):
    monkeypatch.setattr(installed, "ROOT", installed.ROOT / "elsewhere")
    assert not installed.usable()


def test_another_version_of_python_is_noticed(installed, monkeypatch):
    (installed.VENV / f"lib/python3.{sys.version_info.minor + 1}").mkdir(parents=True)
    assert installed.usable()
    monkeypatch.setenv("FAQD_PYTHON", sys.executable)
    assert not installed.usable()


@pytest.mark.parametrize(("status", "kept"), [(1, True), (-9, False)])
def test_a_failed_update_keeps_the_environment_and_a_killed_one_does_not(installed, monkeypatch, status, kept):
    before = installed.read_stamp()
    installed.VERSIONS.write_text("# changed")
    monkeypatch.setattr(installed, "failure", lambda *command: "")
    monkeypatch.setattr(installed, "run", lambda *command: status)
    with pytest.raises(SystemExit, match=f"exit status {status}"):
        installed.install()
    assert installed.read_stamp() == (before if kept else installed.INCOMPLETE)


def test_an_incomplete_environment_is_made_anew(installed, monkeypatch):
    installed.STAMP.write_text("{}")
    (installed.VENV / "lib").mkdir()
    (installed.VENV / "lib64").symlink_to(installed.ROOT)
    commands = []

    def run(*command):
        assert installed.read_stamp() == installed.INCOMPLETE
        assert not (installed.VENV / "lib").exists()
        commands.append(command)
        return 0

    monkeypatch.setattr(installed, "failure", lambda *command: "")
    monkeypatch.setattr(installed, "run", run)
    installed.install()
    assert [command[3] for command in commands] == ["venv", "pip"]
    assert commands[1][-1] == f"{installed.ROOT}[notebooks,test]"
    assert installed.usable()


@pytest.mark.parametrize("no_bytecode", [False, True])
def test_where_python_writes_no_bytecode_pip_does(installed, monkeypatch, no_bytecode):
    """Else every process would compile torch and what it imports again: seconds each."""
    installed.VERSIONS.write_text("# changed")
    commands = []
    monkeypatch.setattr(installed, "failure", lambda *command: "")
    monkeypatch.setattr(installed, "run", lambda *command: commands.append(command) or 0)
    monkeypatch.setattr(sys, "dont_write_bytecode", no_bytecode)
    installed.install()
    assert ("--no-compile" in commands[0]) is not no_bytecode


def test_an_environment_made_by_the_user_is_not_changed(setup_env, monkeypatch):
    setup_env.VENV.mkdir()
    (setup_env.VENV / "mine").touch()
    assert setup_env.usable()
    monkeypatch.setattr(setup_env, "shortcoming", lambda python, extras: "numpy: not installed")
    with pytest.raises(SystemExit, match="was not made by this set-up and cannot be used: numpy"):
        setup_env.find_environment([])
    assert os.listdir(setup_env.VENV) == ["mine"]


def test_two_set_ups_wait_for_each_other(setup_env):
    code = f"import setup_env as s; s.LOCK = {str(setup_env.LOCK)!r}; s.hold_lock(); print('locked')"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    with open(setup_env.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting for another set-up" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate(timeout=60) == ("locked\n", "")


def find_python(root, **environment):
    """What environment.sh makes of a set-up that prints the name of its Python."""
    (root / "scripts").mkdir()
    (root / "scripts/setup_env.py").write_text("import sys; print(sys.executable)")
    command = f"set -euo pipefail; root='{root}'; source '{SCRIPTS}/environment.sh'; set_up; echo \"$python\""
    return subprocess.run(["/bin/bash", "-c", command], env=environment, capture_output=True, text=True, check=False)


def test_a_wrong_faqd_python_is_named(tmp_path):
    done = find_python(tmp_path, PATH=os.environ["PATH"], FAQD_PYTHON="/no/python")
    assert done.returncode == 1
    assert "FAQD_PYTHON" in done.stderr
    assert "/no/python: does not start" in done.stderr


@pytest.mark.parametrize("code", ["exit 1", 'exec {} -c "import sys; sys.version_info = (3, 10); $2"'])
def test_commands_that_do_not_start_or_are_too_old_are_passed_over(tmp_path, code):
    for name, line in (("python3.13", code.format(sys.executable)), ("python3", f'exec {sys.executable} "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = find_python(tmp_path, PATH=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr
