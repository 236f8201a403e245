"""``plots/curves.png`` of every run."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from matplotlib.image import imread

from fedlight.callbacks import pictures
from fedlight.callbacks.pictures import draw_curves
from tests.helpers.tiny import Clients, Regression, quiet_trainer

DRAWN = []
ROWS = [
    {"round": 0.0, "lr": 0.1, "train/loss": 3.0, "val/loss": 4.0, "val/loss_all": 5.0, "clients/loss_mean": 7.0},
    {"round": 1.0, "lr": 0.05, "train/loss": 2.0, "comm/up_mb": 1.0, "man/accent": 2.0},
    {"round": 2.0, "lr": 0.025, "train/loss": 1.0, "val/loss": 3.0, "val/loss_all": 4.5, "val/Accuracy": 0.5},
]


def test_the_lines_of_the_picture(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "drawn", lambda path, plot, size: figures.append((plot, size)) or path)
    draw_curves(ROWS, tmp_path / "x.png")
    from matplotlib.figure import Figure

    ((plot, size),) = figures
    plot(figure := Figure())
    assert size[0] == pytest.approx(3 * 4.2)
    accuracy, loss, rate = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    )
    assert accuracy == {"val/Accuracy": [[3, 0.5]]}
    assert loss == {
        "train/loss": [[1, 3], [2, 2], [3, 1]],
        "val/loss": [[1, 4], [3, 3]],
        "val/loss_all": [[1, 5], [3, 4.5]],
    }
    assert rate == {"lr": [[1, 0.1], [2, 0.05], [3, 0.025]]}
    assert {axes.get_xlabel() for axes in figure.axes} == {"round"}


def test_other_metrics_are_drawn_where_there_are_none_of_these(tmp_path):
    """It ended in an error of matplotlib's."""
    rows = [{"round": float(r), "val/mae": 3.0 - r, "comm/up_mb": 1.0} for r in range(2)]
    height, width = imread(draw_curves(rows, tmp_path / "x.png")).shape[:2]
    assert (height, width) == (510, 630)


def test_a_run_draws_it_and_can_be_told_not_to(tmp_path):
    quiet_trainer(tmp_path, name="on").fit(Regression(), Clients())
    height, width = imread(tmp_path / "on" / "version_0" / "plots" / "curves.png").shape[:2]
    assert (height, width) == (510, 1260)  # two panels: no accuracy is logged
    quiet_trainer(tmp_path, name="off", enable_plots=False).fit(Regression(), Clients())
    quiet_trainer(tmp_path, name="short", max_rounds=1).fit(Regression(), Clients())
    for name in ("off", "short"):
        assert not (tmp_path / name / "version_0" / "plots").exists()


class Failing(Callback):
    def on_round_start(self, trainer, pl_module):
        if trainer.current_round == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_draws_what_there_is_and_failing_pictures_end_nothing(tmp_path, monkeypatch):
    DRAWN.clear()
    monkeypatch.setattr(pictures, "draw_curves", lambda rows, path: DRAWN.append(len(rows)))
    with pytest.raises(KeyboardInterrupt):
        quiet_trainer(tmp_path, callbacks=[Failing()]).fit(Regression(), Clients())
    assert DRAWN == [2]
    monkeypatch.setattr(pictures, "draw_curves", lambda rows, path: 1 / 0)
    trainer = quiet_trainer(tmp_path)
    with pytest.warns(UserWarning, match="Curves failed, and the run goes on without it: ZeroDivisionError"):
        trainer.fit(Regression(), Clients())
    assert (trainer.run_dir / "summary.json").exists()


def test_a_fit_that_trains_nothing_leaves_the_picture_alone(tmp_path, monkeypatch):
    DRAWN.clear()

    def draw(rows, path):
        DRAWN.append(len(rows))
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(pictures, "draw_curves", draw)
    quiet_trainer(tmp_path).fit(Regression(), Clients())
    quiet_trainer(tmp_path).fit(Regression(), Clients(), ckpt_path="last")  # it is finished
    with pytest.raises(MisconfigurationException):
        quiet_trainer(tmp_path, seed=1, max_rounds=4).fit(Regression(), Clients(), ckpt_path="last")
    assert DRAWN == [3]
    (tmp_path / "default" / "version_0" / "plots" / "curves.png").unlink()  # killed before it was drawn
    quiet_trainer(tmp_path).fit(Regression(), Clients(), ckpt_path="last")
    assert DRAWN == [3, 3]
