"""Importing the data package is cheap."""

import subprocess
import sys


def test_importing_the_data_package_imports_no_optional_or_slow_package():
    script = "import sys, jaxnets.data; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    optional = {
        *("sklearn", "grain", "PIL", "matplotlib", "tokenizers"),
        *("gymnasium", "pygame", "Box2D"),
    }
    assert not optional & set(done.stdout.split())
