"""The room of the settings is light to enter."""

import subprocess
import sys

from distspec import config


def test_settings_know_nothing_but_errors_and_addresses() -> None:
    probe = (
        "import sys, distspec.config.reference\n"
        "heavy = {'ray', 'torch', 'mlflow', 'zarr', 'astropy', 'bokeh', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('distspec.')}\n"
        "print(sorted(heavy), sorted(ours))\n"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert said.stdout == "[] ['addresses', 'config', 'errors']\n"


def test_all_that_is_named_is_there() -> None:
    assert sorted(config.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)) == config.__all__
    for name in config.__all__:
        assert hasattr(config, name)
