"""What W&B (offline) and TensorBoard are told, read back from their files."""

import json
import struct
import sys

import pytest

from fedlight.cli.command import FederatedCLI
from fedlight.data import DatasetPartition
from fedlight.models import MLP, Classifier
from tests.helpers.tiny import Clients, Regression, quiet_trainer, two_classes


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without a network."""
    pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_CODE": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    monkeypatch.chdir(tmp_path)


def entries(data):
    """The entries of a .wandb file, a log in LevelDB's format: blocks of 32 KiB with parts of entries in them."""
    whole, at = b"", 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def records(folder):
    """Every record of every W&B run below a folder, in the order in which the runs began, by kind."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process writes the rest of the files
    found = []
    for path in sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_mtime):
        run = {}
        for entry in entries(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(entry)
            kind = record.WhichOneof("record_type")
            run.setdefault(kind, []).append(getattr(record, kind))
        found.append(run)
    return found


def items(record):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item}


def values(record):
    """The values of a record by their names, whether a nested one came whole or leaf by leaf."""
    out = {}
    for item in record.item:
        *above, last = item.nested_key or [item.key]
        at = out
        for name in above:
            at = at.setdefault(name, {})
        at[last] = json.loads(item.value_json)
    return out


class EvaluatedClients(DatasetPartition):
    """Clients that are evaluated on what they train on."""

    def client_val_dataset(self, client):
        return self.client_dataset(client)


@pytest.mark.usefixtures("offline")
def test_a_run_and_its_continuation_in_wandb(tmp_path):
    from fedlight.callbacks.pictures import PartitionPicture

    def fit(rounds, ckpt_path=None):
        trainer = quiet_trainer(tmp_path, logger="wandb", max_rounds=rounds, callbacks=[PartitionPicture()])
        trainer.fit(Classifier(MLP(3, 2), 2), two_classes(), ckpt_path=ckpt_path)
        return trainer

    trainer = fit(2)
    fit(3, "last")
    first, second = records(trainer.run_dir)
    assert first["run"][0].run_id == second["run"][0].run_id
    assert first["run"][0].project == "fedlight"
    axis = {(m.name or m.glob_name): m.step_metric for m in first["metric"]}
    assert "round" in axis
    assert axis["*"] == "round"  # the last word, after Lightning's own
    rows = [items(r) for run in (first, second) for r in run["history"]]
    logged = [row for row in rows if "train/loss" in row]
    assert [row["round"] for row in logged] == [0, 1, 2]
    wanted = {"val/loss", "val/accuracy", "val/accuracy_all", "clients/drift", "comm/up_mb", "time/round_s"}
    assert not [wanted - row.keys() for row in logged if not wanted <= row.keys()]
    # A nested value is one item or one for each of its leaves, as wandb's version has it.
    kinds = [
        row.get("partition/_type") or row["partition"]["_type"]
        for row in rows
        if {"partition", "partition/_type"} & {*row}
    ]
    assert len(kinds) == 1
    assert kinds[0].startswith("image")


@pytest.mark.usefixtures("offline")
def test_charts_at_the_end_and_a_histogram_of_the_clients_in_every_round(tmp_path):
    from fedlight.callbacks.hessian import HessianSpectrum

    spectrum = HessianSpectrum(every_n_rounds=5, layerwise=False, trace=False)
    trainer = quiet_trainer(tmp_path, logger="wandb", max_rounds=2, callbacks=[spectrum])
    module, points = Classifier(MLP(3, 2), 2), two_classes().test_dataset()
    trainer.fit(module, EvaluatedClients(points, val=points, num_clients=4, batch_size=5))
    (run,) = records(trainer.run_dir)
    rows = [values(record) for record in run["history"]]
    histograms = [row["clients/accuracy"]["values"] for row in rows if "clients/accuracy" in row]
    assert [sum(counts) for counts in histograms] == [4, 4], "every client counts once"
    tables = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "table-file":
                (file,) = trainer.run_dir.rglob(f"files/{value['path']}")
                tables[key] = json.loads(file.read_text())
    x, y = points.tensors
    actual = [[0, 0], [0, 0]]
    for label, predicted in zip(y.tolist(), module(x).argmax(1).tolist(), strict=True):
        actual[label][predicted] += 1
    found = {tuple(row[:2]): row[2] for row in tables["val/confusion_matrix_table"]["data"]}
    assert found == {(str(i), str(j)): actual[i][j] for i in range(2) for j in range(2)}
    assert "test/confusion_matrix_table" not in tables
    density = spectrum.results["server"].density_table()
    assert tables["hessian/density_table"]["data"] == [pytest.approx(list(row)) for row in density]
    charts = str(run["config"])
    assert "wandb/confusion_matrix/v1" in charts
    assert "wandb/line/v0" in charts


@pytest.mark.usefixtures("offline")
def test_the_whole_configuration_goes_to_wandb(tmp_path):
    args = ["--model=tests.helpers.tiny.Regression", "--data=tests.helpers.tiny.Clients", "--trainer.accelerator=cpu"]
    args += ["--algorithm=FedProx", "--algorithm.mu=0.25", "--trainer.max_rounds=1", "--trainer.logger=wandb"]
    FederatedCLI(["fit", *args, "--seed_everything=3", "--trainer.enable_progress_bar=false"])
    (run,) = records(tmp_path)
    config = {}
    for update in [run["run"][0].config, *run.get("config", [])]:
        config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in update.update}
    assert config["algorithm.class_path"] == "fedlight.FedProx"
    assert config["algorithm.init_args.mu"] == 0.25
    assert config["seed_everything"] == 3
    assert config["trainer.max_rounds"] == 1
    assert config["model.class_path"] == "tests.helpers.tiny.Regression"


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = quiet_trainer(tmp_path, logger=["tensorboard", "csv"], max_rounds=2)
    trainer.fit(Regression(), Clients())
    events = accumulator.EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("val/loss")
    assert [s.step for s in scalars] == [0, 1]
    assert scalars[-1].value == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-6)
    assert len(trainer.loggers) == 2


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    for module in ("tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(MisconfigurationException, match=r"trainer.logger=tensorboard needs .*fedlight\[tensorboard\]"):
        quiet_trainer(tmp_path, logger="tensorboard").fit(Regression(), Clients())
    assert not list(tmp_path.glob("default/*"))
