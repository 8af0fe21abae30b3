"""An installed wheel, used from another folder."""

import subprocess
import sys
import zipfile

from conftest import ROOT


def test_wheel_works_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "sys.argv = ['cornucopia', *sys.argv[1:]]\n"
        "from shared import command\n"
        "assert command.__file__.startswith(sys.argv.pop(1)), command.__file__\n"
        "command.main()"
    )

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "site"), *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "vision.classify" in run("list")
    done = run("train", "vision.classify", "--size=8", "--width=8", "--epochs=1", "--batch=64")
    assert "over gRPC equal the model in memory" in done
    assert (tmp_path / "saved_models" / "vision.classify" / "1" / "saved_model.pb").exists()
