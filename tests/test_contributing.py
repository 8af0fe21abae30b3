"""The example in CONTRIBUTING.md is a whole task: it trains, beats its baseline, and is served."""

import re

from conftest import ROOT


def test_the_example_runs(tmp_path, cornucopia):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "apps" / "vision").mkdir(parents=True)
    for file in ("__init__.py", "vision/__init__.py"):
        (tmp_path / "apps" / file).write_text((ROOT / "apps" / file).read_text())
    (tmp_path / "apps" / "vision" / "brightness.py").write_text(code)
    env = {"PYTHONPATH": str(tmp_path)}
    assert "vision.brightness" in cornucopia("list", env=env).stdout
    done = cornucopia("train", "vision.brightness", "--epochs=20", env=env)
    closeness, baseline = re.search(r"closeness +(0\.\d+).*baseline (0\.\d+)", done.stdout).groups()
    assert float(closeness) > 0.9 > float(baseline)
    assert "over gRPC equal the model in memory" in done.stdout
