"""The whole series on photographs, where the user has some: what notebooks assert must hold on them, too."""

import pytest
from series_runs import NOTEBOOKS, run

from faqd_lib import data

pytestmark = pytest.mark.series


def test_every_notebook_runs_on_photographs(tmp_path, user_data):
    found = [name for name in ("cifar10-jpeg", "cifar10") if user_data and data.on_disk(name, user_data)]
    if not found:
        pytest.skip("there is no CIFAR-10 in FAQD_DATA")
    arguments = ["smoke", "--dataset", found[0], "--data-root", str(user_data), "--results", str(tmp_path / "results")]
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    copies = sorted((tmp_path / "results" / f"smoke-{found[0]}" / "notebooks").glob("*.ipynb"))
    assert [copy.name for copy in copies] == [path.name for path in NOTEBOOKS]
