import subprocess
import sys

import vlnms_d2


def test_the_public_names_are_there():
    for name in vlnms_d2.__all__:
        assert getattr(vlnms_d2, name) is not None


def test_without_detectron2_one_sentence_says_what_to_do():
    code = "import sys; sys.modules['detectron2'] = None; import vlnms_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: vlnms_d2 is a Detectron2 plugin")
    assert "tools/install_detectron2.py" in last
