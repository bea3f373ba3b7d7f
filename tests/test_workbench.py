import subprocess
import sys


def test_to_import_the_package_takes_no_torch():
    code = "import sys, workbench as wb; list(wb.editors); print(sorted(sys.modules))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "ipywidgets", "matplotlib"):
        assert f"'{heavy}'" not in names.stdout
