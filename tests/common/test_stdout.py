from __future__ import annotations

import subprocess
import sys


def test_what_libraries_print_goes_to_stderr(root):
    script = (
        "import os\n"
        "from common.console import stdout_to_stderr\n"
        "print('before')\n"
        "with stdout_to_stderr():\n"
        "    print('from Python')\n"
        "    os.write(1, b'from C\\n')\n"
        "    os.system('echo from a child')\n"
        "print('after')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "before\nafter\n"
    assert sorted(result.stderr.splitlines()) == ["from C", "from Python", "from a child"]
