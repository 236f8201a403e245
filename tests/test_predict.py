"""``FederatedTrainer.predict`` and ``fedlight predict``."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from fedlight.cli.command import main
from fedlight.data.federated import Federated
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded

SEEN = []
NEW = seeded(5, 3, seed=7)


class Watching(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        SEEN.append((trainer.predicting, pl_module.training, len(outputs), batch_idx))


class Signs(Regression):
    def predict_step(self, batch, batch_idx):
        return {"sign": self(batch[0]).sign()}


class Stock(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(seeded(12, 3), seeded(12)), batch_size=4)

    def predict_dataloader(self):
        return DataLoader(NEW, batch_size=2, collate_fn=lambda rows: torch.stack(rows) * 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = quiet_trainer(tmp_path_factory.mktemp("predict"))
    trainer.fit(Regression(), Clients())
    return trainer.run_dir


def predict(run, model=None, data=None, **options):
    return quiet_trainer(run.parents[1], callbacks=[Watching()]).predict(
        model or Regression(), data or Clients(), run / "checkpoints" / "last.ckpt", **options
    )


def test_it_predicts_what_lightnings_trainer_predicts(run, capsys):
    SEEN.clear()
    model, data = Regression(), Clients()
    found = predict(run, model)
    assert SEEN == [(True, False, 4, 0), (True, False, 4, 1), (True, False, 2, 2)]
    x = torch.stack([data.held_out[i][0] for i in range(10)])
    with torch.no_grad():
        assert torch.equal(torch.cat(found), model(x))
    path = run / "predictions" / "last_round3.pt"
    assert f"predictions: {path}" in capsys.readouterr().out
    saved = torch.load(path)
    assert torch.equal(saved.pop("predictions"), torch.cat(found))
    assert saved == {"view": "server", "checkpoint": "checkpoints/last.ckpt", "rounds": 3}
    rows = path.with_suffix(".csv").read_text().splitlines()
    assert rows[:2] == ["sample,prediction", f"0,{found[0][0].item()}"]
    assert len(rows) == 11
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    theirs = Trainer(**quiet).predict(signs := Signs.load_from_checkpoint(run / "checkpoints" / "last.ckpt"), data)
    ours = predict(run, signs)
    assert [list(batch) for batch in ours] == [["sign"]] * 3
    assert all(torch.equal(a["sign"], b["sign"]) for a, b in zip(ours, theirs, strict=True))
    assert predict(run, return_predictions=False) is None


def test_another_view_and_another_folder(run, tmp_path):
    server, everyone = predict(run), predict(run, view="all", output=tmp_path)
    assert not torch.equal(server[0], everyone[0])
    assert {p.name for p in tmp_path.iterdir()} == {"last_round3_all.pt", "last_round3_all.csv"}
    with pytest.raises(MisconfigurationException, match=r"view='local': .*last.ckpt has the views \['server'"):
        predict(run, view="local")
    with pytest.raises(MisconfigurationException, match=r"view='all': a module as it is has the views \['server'\]"):
        quiet_trainer(tmp_path).predict(Regression(), Clients(), view="all")


def test_classes_that_have_names(tmp_path):
    class Named(Clients):
        classes = ("no", "yes, or perhaps")

    class Signed(Regression):
        def predict_step(self, batch, batch_idx):
            return (batch[0].sum(1) > 0).long()

    found = torch.cat(quiet_trainer(tmp_path).predict(Signed(), Named(), output=tmp_path)).tolist()
    rows = (tmp_path / "model.csv").read_text().splitlines()
    assert set(found) == {0, 1}
    quoted = ("no", '"yes, or perhaps"')
    assert rows == ["sample,prediction,class", *(f"{i},{value},{quoted[value]}" for i, value in enumerate(found))]
    assert torch.load(tmp_path / "model.pt")["classes"] == list(Named.classes)
    Named.classes = ("one",)  # of something else
    quiet_trainer(tmp_path).predict(Signed(), Named(), output=tmp_path)
    assert (tmp_path / "model.csv").read_text().splitlines()[0] == "sample,prediction"


def test_a_stock_datamodule_has_its_own_loader(tmp_path):
    model = Regression()
    found = quiet_trainer(tmp_path).predict(model, Federated(Stock(), num_clients=3))
    with torch.no_grad():
        assert torch.equal(torch.cat(found), model(2 * NEW))
    assert (tmp_path / "default" / "analysis" / "predictions" / "model.csv").exists()


class Untested(Clients):
    def test_dataset(self):
        return None


class Empty(Clients):
    def predict_dataloader(self):
        return DataLoader([], 1)


def test_a_loader_without_a_batch_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"data: Empty\.predict_dataloader gives no batch"):
        quiet_trainer(tmp_path).predict(Regression(), Empty())


def test_without_data_there_is_nothing_to_predict(tmp_path):
    with pytest.raises(MisconfigurationException, match="Untested has nothing to predict from: .*predict_dataloader"):
        quiet_trainer(tmp_path).predict(Regression(), Untested())


def test_the_command_line(run, capsys):
    text = (run / "config.yaml").read_text()
    assert "not_written" in text  # the network, and a type that no YAML has: neither is needed
    config = run / "mine.yaml"
    config.write_text(
        "model: {class_path: tests.test_predict.Signs}\ndata: {class_path: tests.test_predict.Clients}\n"
        f"trainer: {{default_root_dir: {run.parents[1]}, accelerator: cpu, devices: 1}}\n"
    )
    main(["predict", "-c", str(config), "--ckpt_path", "best", "--view", "selected"])
    assert torch.load(next((run / "predictions").glob("best_round*_selected.pt")))["view"] == "selected"
