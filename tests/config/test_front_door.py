"""The room of the settings names its files, and is light to enter."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distspec import config

ROOT = Path(config.__file__).parent


@pytest.mark.parametrize("room", ["distspec.config", "distspec.config.presets"])
def test_the_front_door_names_every_file(room: str) -> None:
    module: ModuleType = sys.modules[room]
    folder = Path(str(module.__file__)).parent
    named = re.findall(r"^    (\S+)  ", module.__doc__ or "", re.MULTILINE)
    real = {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name[0] != "_"}
    assert set(named) == real
    assert len(named) == len(real)


def test_settings_know_nothing_but_errors() -> None:
    probe = (
        "import sys, distspec.config.reference\n"
        "heavy = {'ray', 'torch', 'mlflow', 'zarr', 'astropy', 'bokeh', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('distspec.')}\n"
        "print(sorted(heavy), sorted(ours))\n"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert said.stdout == "[] ['config', 'errors']\n"


def test_all_that_is_named_is_there() -> None:
    assert sorted(config.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)) == config.__all__
    for name in config.__all__:
        assert hasattr(config, name)
